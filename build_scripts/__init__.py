"""Tools of this repository: `python -m build_scripts.NAME`. Run from the repository, not installed."""
