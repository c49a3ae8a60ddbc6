"""Measurements: what `make bench`, `make gpu` and `python -m benchmarks.NAME` run. Run from the repository, not installed."""
