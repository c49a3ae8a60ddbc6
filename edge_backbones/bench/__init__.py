"""Engines against their peers, side by side: what is measured (results), how (compare), by whom (contender)."""
