"""Say in one line what a machine lacks for the GPU suite. Import this first: it needs nothing but Python."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence

NOTHING_RUN = 3
"""Exit code of a run in which nothing could be run."""


def is_installed(module: str) -> bool:
    """Return whether a module can be found. It is not imported."""
    if module in sys.modules:
        return sys.modules[module] is not None
    try:
        return importlib.util.find_spec(module) is not None
    except (ModuleNotFoundError, ValueError):  # the package above it is missing
        return False


def what_is_missing(modules: Sequence[str] = ("numpy", "msgspec")) -> str:
    """Return in one line which libraries are missing, and the command that installs them; empty if all are here."""
    lacking = [module for module in modules if not is_installed(module)]
    if not lacking:
        return ""
    verb = "is" if len(lacking) == 1 else "are"
    folders = "its folder" if len(lacking) == 1 else "their folders"
    return (
        f"not run: {' and '.join(lacking)} {verb} missing: {sys.executable} -m pip install {' '.join(lacking)}, or copy "
        f"{folders} here and add the folder above to PYTHONPATH"
    )


# The modules that import this one import numpy and msgspec next, which would end in a traceback.
if reason := what_is_missing():
    print(reason)
    sys.exit(NOTHING_RUN)
