"""ONNX Runtime without its telemetry. Import ``onnxruntime`` from this module and from nowhere else.

From release 1.29 on it reports which graphs it opens (names, hashes, sizes) to its maker, from threads of its own, and keeps
an identifier of the device in the home folder. Nobody who builds a bundle asked for that.
"""

from __future__ import annotations

import os

__all__ = ["onnxruntime", "reference_options"]

# Read once, when the library starts. It stays set, so that child processes are quiet too; a value of the user's wins.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

import onnxruntime

onnxruntime.disable_telemetry_events()  # the program may have imported it before, with telemetry


def reference_options() -> onnxruntime.SessionOptions:
    """Return options for sessions that values are compared with: Q/DQ pairs stay as they are in the graph.

    More optimisation would make integer kernels of them, which round in other places.
    """
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.log_severity_level = 3  # errors only: these come back as exceptions
    return options
