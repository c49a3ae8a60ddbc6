"""ONNX Runtime as the reference that values are compared with."""

from __future__ import annotations

from typing import Any

from edge_backbones.engines.onnxruntime.library import onnxruntime
from edge_backbones.engines.onnxruntime.options import session_options


def reference_options() -> Any:
    """Return options for sessions that values are compared with: Q/DQ pairs stay as they are in the graph.

    More optimisation would make integer kernels of them, which round in other places.
    """
    options = session_options()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    return options
