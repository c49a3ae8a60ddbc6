"""Import ONNX Runtime without its telemetry. No other module imports it.

From release 1.29 on, ONNX Runtime reports which graphs it opens (names, hashes, sizes) to its maker, from its own
threads, and keeps an identifier of the device in the home folder. Nobody who builds a bundle or runs an engine asked
for that.

``from edge_backbones.engines.onnxruntime.library import onnxruntime`` imports the library; importing this module alone
does not.
"""

from __future__ import annotations

import os
from typing import Any

from edge_backbones.errors import MissingDependencyError, refuse_lack


def load_library() -> Any:
    """Return the onnxruntime module with its telemetry off. Raises MissingDependencyError if it is not installed."""
    # The library reads it once, when it starts. It stays set for child processes. A value that the user has set stays.
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    try:
        import onnxruntime
        from onnxruntime import InferenceSession  # noqa: F401  # a folder named onnxruntime can be imported too
    except (ImportError, OSError, MemoryError) as error:
        refuse_lack("loading ONNX Runtime", error)
        raise MissingDependencyError("the ONNX Runtime engine", "onnxruntime") from error
    onnxruntime.disable_telemetry_events()  # the program may have imported it before, with telemetry on
    return onnxruntime


def __getattr__(name: str) -> Any:
    if name == "onnxruntime":
        return load_library()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
