"""Photographs, and quick timings, for the tests of benchmarks/."""

from __future__ import annotations

from tests.photographs import photograph_folder, photographs, quick_timing

__all__ = ["photograph_folder", "photographs", "quick_timing"]
