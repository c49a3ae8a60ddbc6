"""Rewrite a typed graph into the one that ONNX Runtime runs fastest on a CPU."""

from __future__ import annotations

from edge_backbones.bundle.onnx_gate import graph_fault
from edge_backbones.engines import compat
from edge_backbones.engines.base import CompiledEngine
from edge_backbones.engines.onnxruntime import float_graph, int8_graph, session
from edge_backbones.errors import (
    CompileError,
    EdgeBackbonesError,
    MissingDependencyError,
    needing,
    refuse_lack,
)
from edge_backbones.reading import in_short
from edge_backbones.spec import Precision


def compile_graph(graph: bytes, precision: Precision) -> CompiledEngine:
    """Return the engine of ONNX bytes for this machine's CPU.

    An fp32 graph is the engine itself. Of other graphs, what is in half precision is computed in float32
    (:mod:`edge_backbones.engines.onnxruntime.float_graph`), and int8 graphs are adapted to the integer kernels
    (:mod:`edge_backbones.engines.onnxruntime.int8_graph`).

    Raises:
        CompileError: The graph is not one that can be rewritten.
        MissingDependencyError: ONNX Runtime or, for other graphs than fp32, onnx or onnx-ir is not installed.
    """
    version = session.library_version()
    if version is None:
        raise MissingDependencyError("the ONNX Runtime engine", "onnxruntime")
    key = compat.cpu_key("onnxruntime", version, precision, graph)
    data = graph if precision is Precision.FP32 else rewrite(graph, precision)
    return CompiledEngine(data, key, ".onnx", from_cache=False)


def rewrite(graph: bytes, precision: Precision) -> bytes:
    """Return a graph with the same inputs and outputs that ONNX Runtime runs faster. Raises as `compile_graph` does."""
    if fault := graph_fault(graph):
        raise CompileError(f"this graph is refused: {fault}. Build the bundle again")
    with needing(f"compiling an {precision} graph for ONNX Runtime", "onnxruntime"):
        import onnx
        import onnx_ir as ir
    try:
        model = ir.from_proto(onnx.load_model_from_string(graph))
        if model.functions or any(
            a.type.name in ("GRAPH", "GRAPHS") for n in model.graph for a in n.attributes.values()
        ):
            raise CompileError("this graph is refused: it has functions or control flow. Build the bundle again")
        float_graph.to_float(model)
        if precision is Precision.INT8:
            int8_graph.adapt(model)
        data: bytes = ir.to_proto(model).SerializeToString()
    except EdgeBackbonesError:
        raise
    except Exception as error:  # a graph that no build has written, in any of many ways
        refuse_lack("rewriting a graph for ONNX Runtime", error)
        raise CompileError(
            f"the {precision} graph cannot be rewritten for ONNX Runtime ({in_short(error)}): build the bundle again"
        ) from error
    return data
