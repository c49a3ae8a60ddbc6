"""ONNX Runtime without its telemetry, imported here and nowhere else.

From release 1.29 on it reports which graphs it opens (names, hashes, sizes) to its maker, from threads of its own, and keeps
an identifier of the device in the home folder. Nobody who builds a bundle or runs an engine asked for that.

``from edge_backbones.engines.onnxruntime.library import onnxruntime`` imports the library; this module alone does not.
"""

from __future__ import annotations

import os
from typing import Any

from edge_backbones.errors import MissingDependencyError, refuse_lack


def load_library() -> Any:
    """Return the onnxruntime module, with its telemetry off. Raises MissingDependencyError where it is not installed."""
    # Read once, when the library starts. It stays set, so that child processes are quiet too; a value of the user's wins.
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    try:
        import onnxruntime
    except (ImportError, OSError, MemoryError) as error:
        refuse_lack("loading ONNX Runtime", error)
        raise MissingDependencyError("the ONNX Runtime engine", "onnxruntime") from error
    onnxruntime.disable_telemetry_events()  # the program may have imported it before, with telemetry
    return onnxruntime


def __getattr__(name: str) -> Any:
    if name == "onnxruntime":
        return load_library()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
