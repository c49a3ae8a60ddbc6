"""Whether a module can be imported where libraries are missing."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence


def require_import_without(module: str, libraries: Sequence[str]) -> None:
    """Import a module in a process of its own in which ``libraries`` cannot be imported, and fail if it fails or warns."""
    code = f"import sys; sys.modules.update(dict.fromkeys({tuple(libraries)})); import {module}"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
