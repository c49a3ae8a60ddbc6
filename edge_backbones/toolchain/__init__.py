"""Build bundles on a workstation. `build.py` is the entry, `steps.py` has its steps; both packages and steps need torch."""
