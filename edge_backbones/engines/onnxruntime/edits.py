"""Small edits of ONNX graphs, and questions about them, that the modules of this folder share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import onnx_ir as ir
    from numpy.typing import NDArray


class Editor:
    """Add nodes and constants to a graph, under names that it does not have yet."""

    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph
        taken = {value.name for node in graph for value in node.outputs} | set(graph.initializers)
        taken |= {value.name for value in graph.inputs}
        self._taken = taken
        self._added = 0

    def _name(self, near: ir.Value) -> str:
        """Return a name that no value of the graph has."""
        while (name := f"{near.name}.ort{self._added}") in self._taken:
            self._added += 1
        self._taken.add(name)
        return name

    def constant(self, array: NDArray[Any], near: ir.Value) -> ir.Value:
        """Add an initializer, named after the value ``near``."""
        import onnx_ir as ir

        name = self._name(near)
        tensor = ir.tensor(array, name=name)
        value = ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
        self.graph.register_initializer(value)
        return value

    def node(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        dtype: str,
        near: ir.Value,
        *,
        before: ir.Node | None = None,
        **attributes: Any,
    ) -> ir.Value:
        """Add a node with one output, behind the nodes that make its inputs, and return the output.

        ``dtype``: name of the output's type. ``near``: value after which it is named. ``before``: node to insert it
        before; by default it is inserted behind the producer of the first input.
        """
        import onnx_ir as ir

        output = ir.Value(name=self._name(near), type=ir.TensorType(ir.DataType[dtype]))
        node = ir.node(op_type, inputs, attributes, outputs=[output], name=f"{op_type}:{output.name}")
        producer = None if inputs[0] is None else inputs[0].producer()
        if before is not None:
            self.graph.insert_before(before, node)
        elif producer is not None:
            self.graph.insert_after(producer, node)
        else:
            self.graph.insert_before(self.graph[0], node)
        return output


def array_of(value: ir.Value | None) -> NDArray[Any] | None:
    """Return the array of a constant, looking through a Cast to float32; None for any other value."""
    if value is None:
        return None
    if value.const_value is not None:
        return value.const_value.numpy()
    cast = value.producer()
    if cast is None or cast.op_type != "Cast" or cast.inputs[0] is None or cast.inputs[0].const_value is None:
        return None
    wide: NDArray[Any] = cast.inputs[0].const_value.numpy().astype(np.float32)
    return wide


def only_reader(value: ir.Value) -> ir.Node | None:
    """Return the node that alone reads a value; None if several do, or if it is an output of the graph."""
    uses = tuple(value.uses())
    return uses[0].node if len(uses) == 1 and not value.is_graph_output() else None


def producer_of(value: ir.Value | None, *op_types: str) -> ir.Node | None:
    """Return the node that makes a value, if it has one of these operators."""
    node = None if value is None else value.producer()
    return node if node is not None and node.op_type in op_types else None


def integer_attribute(node: ir.Node, name: str, default: int) -> int:
    """Return an integer attribute of a node."""
    return node.attributes[name].as_int() if name in node.attributes else default
