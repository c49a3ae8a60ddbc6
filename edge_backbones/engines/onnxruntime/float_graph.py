"""Rewrite what a graph holds in fp16 or bf16 as float32, for ONNX Runtime on the CPU.

ONNX Runtime has next to no half-precision kernels for CPUs: it casts to float32 and back around every node. Without these
casts resnet18 in fp16 takes the time of its fp32 graph. Weights keep the values that half precision rounded them to, and
large ones stay half in the file: ONNX Runtime converts them when it loads the graph.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import onnx_ir as ir

_SMALL = 1024  # elements of a constant that is stored as float32: a Cast and its names take as much


def to_float(model: ir.Model) -> None:
    """Compute a graph in float32, in place. Its inputs and outputs keep their names and types."""
    import onnx_ir as ir

    halves = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
    graph = model.graph
    for value in graph.inputs:
        if value.dtype in halves:
            _widen_input(graph, value)
    for value in tuple(graph.initializers.values()):
        if value.dtype in halves:
            _widen_constant(graph, value)
    for node in tuple(graph):
        for attribute in tuple(node.attributes.values()):
            if attribute.name in ("to", "dtype") and attribute.as_int() in map(int, halves):
                node.attributes[attribute.name] = ir.AttrInt64(attribute.name, int(ir.DataType.FLOAT))
            elif attribute.type == ir.AttributeType.TENSOR and attribute.as_tensor().dtype in halves:
                wide = ir.tensor(attribute.as_tensor().numpy().astype(np.float32))
                node.attributes[attribute.name] = ir.AttrTensor(attribute.name, wide)
        for output in node.outputs:
            if output.dtype in halves:
                if output.is_graph_output():
                    _round_output(graph, node, output)
                output.dtype = ir.DataType.FLOAT
    for node in tuple(graph):
        if node.op_type == "Cast" and _is_float(node.inputs[0]) and _is_float(node.outputs[0]):
            _remove_cast(graph, node)


def _widen_input(graph: ir.Graph, value: ir.Value) -> None:
    """Let the readers of an input in half precision read it as float32."""
    import onnx_ir as ir

    wide = ir.Value(name=f"{value.name}.float", shape=value.shape, type=ir.TensorType(ir.DataType.FLOAT))
    cast = ir.node("Cast", [value], {"to": int(ir.DataType.FLOAT)}, outputs=[wide], name=f"Cast:{wide.name}")
    for use in tuple(value.uses()):
        if use.node is not cast:
            use.node.replace_input_with(use.idx, wide)
    graph.insert_before(graph[0], cast)


def _round_output(graph: ir.Graph, node: ir.Node, output: ir.Value) -> None:
    """Round an output of the graph to half precision behind everything else. ``output`` becomes a value inside."""
    import onnx_ir as ir

    assert output.dtype is not None  # the caller has read it
    name, output.name = output.name, f"{output.name}.float"
    rounded = ir.Value(name=name, shape=output.shape, type=ir.TensorType(output.dtype))
    cast = ir.node("Cast", [output], {"to": int(output.dtype)}, outputs=[rounded], name=f"Cast:{name}")
    graph.insert_after(node, cast)
    position = next(index for index, one in enumerate(graph.outputs) if one is output)
    graph.outputs[position] = rounded


def _widen_constant(graph: ir.Graph, value: ir.Value) -> None:
    """Give the readers of a constant in half precision the same numbers in float32."""
    import onnx_ir as ir

    name, array = str(value.name), value.const_value
    assert array is not None  # the gate lets no other initializers through
    if array.size < _SMALL:
        tensor: Any = ir.tensor(array.numpy().astype(np.float32), name=f"{name}.float")
        wide = ir.Value(name=f"{name}.float", shape=value.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
        graph.register_initializer(wide)
    else:
        wide = ir.Value(name=f"{name}.float", shape=value.shape, type=ir.TensorType(ir.DataType.FLOAT))
        cast = ir.node("Cast", [value], {"to": int(ir.DataType.FLOAT)}, outputs=[wide], name=f"Cast:{name}.float")
        graph.insert_before(graph[0], cast)
    for use in tuple(value.uses()):
        if use.node is not wide.producer():
            use.node.replace_input_with(use.idx, wide)


def _is_float(value: ir.Value | None) -> bool:
    return value is not None and value.dtype is not None and value.dtype.name == "FLOAT"


def _remove_cast(graph: ir.Graph, cast: ir.Node) -> None:
    """Let the readers of a Cast from float32 to float32 read what it reads."""
    source, output = cast.inputs[0], cast.outputs[0]
    assert source is not None  # it has a type
    if source.is_initializer():
        return
    if output.is_graph_output():
        if source.is_graph_output() or source.is_graph_input():
            return  # two names for one value
        name, output.name = output.name, f"{output.name}.cast"
        source.name = name
    output.replace_all_uses_with(source, replace_graph_outputs=True)
    graph.remove(cast, safe=True)
