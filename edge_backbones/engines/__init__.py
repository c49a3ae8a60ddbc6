"""Load and compile engines: one folder for each engine library, behind the interface in base.py."""
