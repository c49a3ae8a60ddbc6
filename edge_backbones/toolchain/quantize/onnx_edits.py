"""Small edits of an ONNX graph that the other modules of this package share."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from onnx_ir.passes import common as passes

from edge_backbones.errors import QuantizationError
from edge_backbones.toolchain.artifacts import ExportedGraph


def load_graph(graph: ExportedGraph) -> ir.Model:
    """Load the fp32 graph to edit it. Every constant is an initializer."""
    model = ir.load(graph.path)
    passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    return model


def activations_of(node: ir.Node) -> list[ir.Value]:
    """Return the inputs of a node that are no constants."""
    return [value for value in node.inputs if value is not None and not is_constant(value)]


def is_constant(value: ir.Value | None) -> bool:
    """Return whether a value is an initializer."""
    return value is not None and value.is_initializer()


def constant_of(value: ir.Value | None) -> npt.NDArray[np.generic]:
    """Return the array in an initializer. Raises QuantizationError where there is none."""
    if value is None or value.const_value is None:
        raise QuantizationError(f"initializer {name_of(value)!r} has no value; export the graph with its weights")
    return value.const_value.numpy()


def name_of(value: ir.Value | None) -> str:
    """Return the name of a value. Raises QuantizationError for one without a name."""
    if value is None or not value.name:
        raise QuantizationError("the graph has an unnamed tensor where a value is needed; export it again")
    return value.name


def new_node(
    op_type: str, inputs: list[ir.Value], output: str, dtype: ir.DataType, attributes: Mapping[str, int] | None = None
) -> ir.Node:
    """Return a node named after its one output, which has the shape of the first input."""
    value = ir.Value(name=output, shape=inputs[0].shape, type=ir.TensorType(dtype))
    return ir.node(op_type, inputs, attributes, outputs=[value], name=f"{op_type}:{output}")


def add_cast(graph: ir.Graph, value: ir.Value, dtype: ir.DataType, name: str) -> ir.Value:
    """Insert a Cast behind a value and return its output."""
    cast = new_node("Cast", [value], name, dtype, {"to": int(dtype)})
    insert_after(graph, value, [cast])
    return cast.outputs[0]


def insert_after(graph: ir.Graph, value: ir.Value, nodes: list[ir.Node]) -> None:
    """Insert nodes behind the one that makes a value, or at the beginning for a graph input."""
    producer = value.producer()
    if producer is None:  # a graph input
        graph.insert_before(graph[0], nodes)
    else:
        graph.insert_after(producer, nodes)


def add_constant(graph: ir.Graph, name: str, array: npt.NDArray[np.generic]) -> ir.Value:
    """Add an initializer to a graph and return it."""
    tensor = ir.tensor(array, name=name)
    value = ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph.register_initializer(value)
    return value
