"""Bundles inside the models of other libraries, which need torch, and in the files of other systems, which need nothing."""
