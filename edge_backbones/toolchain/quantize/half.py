"""Cast a graph to fp16 or bf16, and keep in float32 what half precision cannot hold.

What fp16 keeps in float32 (bf16, int8 and fp8 graphs too): normalisation, softmax, reductions, powers, roots,
exponentials and divisions, what lies between two of them (the epsilon of a norm written out as nodes), everything before
the first layer with weights (image preprocessing), nodes with a constant that half cannot hold, and nodes beside a tensor
whose values came near 65504 on the calibration images (the last two not in bf16, which has the range of fp32). Graph
inputs keep their types, with a cast inside, and so do outputs unless they are left to :mod:`ends`. The cast of a float16
input to float32 is left out in front of half nodes. OpenVINO computes half nodes in fp32: the fp16 rest costs it nothing.

bf16 graphs are opset 22, the first whose convolutions take it; hard swish, mish and transposed convolutions stay float32
there, because TensorRT refuses them in bf16.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import onnx_ir as ir

from edge_backbones.errors import QuantizationError
from edge_backbones.rounding import round_to_bf16
from edge_backbones.spec import Precision
from edge_backbones.toolchain.quantize.formats import type_of
from edge_backbones.toolchain.quantize.onnx_edits import (
    activations_of,
    add_cast,
    add_constant,
    constant_of,
    is_constant,
    name_of,
)
from edge_backbones.toolchain.quantize.placement import WEIGHTED, depths_of, output_channel_axis

_HALF_SMALLEST_NORMAL = float(np.finfo(np.float16).smallest_normal)
_FLOAT_REDUCTIONS = frozenset({
    "CumSum", "Exp", "GlobalAveragePool", "Log", "Pow", "Reciprocal", "ReduceL1", "ReduceL2", "ReduceLogSumExp",
    "ReduceMean", "ReduceProd", "ReduceSum", "ReduceSumSquare", "Sqrt",
})  # fmt: skip
_FLOAT_NORMS = frozenset({
    "BatchNormalization", "GroupNormalization", "InstanceNormalization", "LayerNormalization", "LogSoftmax",
    "LpNormalization", "RMSNormalization", "Softmax",
})  # fmt: skip
_ELEMENTWISE = frozenset({"Abs", "Add", "Clip", "Div", "Expand", "Max", "Min", "Mul", "Neg", "Sub", "Where"})


def _raise_opset(model: ir.Model, opset: int) -> None:
    """Give the model an opset whose operators take half precision, where its own is older."""
    if model.opset_imports.get("", opset) >= opset:
        return
    if any(node.op_type == "GroupNormalization" for node in model.graph):
        raise QuantizationError("the graph has GroupNormalization, which means something else in opset 21: use fp16")
    model.opset_imports[""] = opset


def convert_to_half(
    model: ir.Model, precision: Precision, large: Collection[str], *, float_outputs: bool = True
) -> None:
    """Make every float32 tensor fp16 or bf16, except inputs, outputs and what the nodes kept in float32 read and write.

    ``large``: tensors whose values fp16 may not hold. ``float_outputs``: cast outputs back to float32. Raises
    QuantizationError for a graph with control flow, or with an operator that the opset of ``precision`` does not have.
    """
    _raise_opset(model, precision.info.min_opset)
    graph, half = model.graph, type_of(precision)
    nodes = tuple(graph)
    if any(attribute.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
           for node in nodes for attribute in node.attributes.values()):  # fmt: skip
        raise QuantizationError("the graph has If, Loop or Scan nodes; fp16 and int8 need a graph without control flow")
    kept = _nodes_kept_in_float(graph, precision, large)
    for node in nodes:
        for output in node.outputs:
            if output.dtype == ir.DataType.FLOAT and node not in kept:
                output.dtype = half

    casts: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}
    for node in nodes:  # a half input is read as it is, not through the cast of the fp32 graph
        value = node.inputs[0] if node.op_type == "Cast" else None
        if value is not None and value.is_graph_input() and value.dtype == half:
            casts[node.outputs[0], half] = value
    for position, output in enumerate(tuple(graph.outputs)):
        if output.dtype == half and float_outputs:
            name = name_of(output)
            output.name = f"{name}.half"
            graph.outputs[position] = add_cast(graph, output, ir.DataType.FLOAT, name)
            casts[output, ir.DataType.FLOAT] = graph.outputs[position]

    for node in nodes:
        wanted, suffix = (ir.DataType.FLOAT, "float") if node in kept else (half, "half")
        for index, value in _convertible_inputs(node):
            if value.dtype == wanted or (node.op_type == "Cast" and value.is_graph_input()):
                continue
            if (value, wanted) not in casts:
                name = f"{name_of(value).removesuffix('.half')}.{suffix}"
                if is_constant(value):
                    rounded = _rounded(node, index, constant_of(value), wanted)
                    casts[value, wanted] = add_constant(graph, name, rounded)
                else:
                    casts[value, wanted] = add_cast(graph, value, wanted, name)
            node.replace_input_with(index, casts[value, wanted])


def _rounded(node: ir.Node, index: int, constant: np.ndarray, wanted: ir.DataType) -> np.ndarray:
    """Return a constant input of a node in another type. bf16 has so few bits that weights are rounded with care."""
    is_weight = index == 1 and (node.op_type == "Conv" or (node.op_type in WEIGHTED and constant.ndim == 2))
    if wanted == ir.DataType.BFLOAT16 and is_weight:
        rows = np.moveaxis(constant, output_channel_axis(node), 0)
        rounded = round_to_bf16(rows.reshape(len(rows), -1)).reshape(rows.shape)
        constant = np.ascontiguousarray(np.moveaxis(rounded, 0, output_channel_axis(node)))
    return constant.astype(wanted.numpy())


def _nodes_kept_in_float(graph: ir.Graph, precision: Precision, large: Collection[str]) -> set[ir.Node]:
    """Find the nodes that stay in float32, by the rules above."""
    info, depths = precision.info, depths_of(graph)
    beyond = frozenset() if info.has_range_of_fp32 else frozenset(large)
    reductions = {node for node in graph if node.op_type in _FLOAT_REDUCTIONS or _divides_by_activation(node)}
    after, before = set(reductions), set(reductions)
    for node in graph:
        if node.op_type in _ELEMENTWISE and any(value.producer() in after for value in activations_of(node)):
            after.add(node)
    for node in reversed(graph):
        if node.op_type in _ELEMENTWISE and any(use.node in before for output in node.outputs for use in output.uses()):
            before.add(node)
    kept = after & before
    for node in graph:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            continue  # their scales are fp16 numbers already
        if (
            node.op_type in _FLOAT_NORMS
            or all(depths[output] == 0 for output in node.outputs)
            or not any(value.dtype == ir.DataType.FLOAT for value in activations_of(node))
            or node.op_type == "Cast"
            or node.op_type in info.refused_operators
            or not beyond.isdisjoint(value.name for value in (*activations_of(node), *node.outputs))
            or not all(_fits_half(node, value, precision) for value in node.inputs if is_constant(value))
        ):
            kept.add(node)
    return kept


def _divides_by_activation(node: ir.Node) -> bool:
    return node.op_type == "Div" and not is_constant(node.inputs[1])


def _fits_half(node: ir.Node, constant: ir.Value | None, precision: Precision) -> bool:
    """Return whether half can hold a constant: fp16 holds no mask of -1e9, and no factor or epsilon that is too small."""
    if constant is None or constant.dtype != ir.DataType.FLOAT or precision.info.has_range_of_fp32:
        return True
    magnitudes = np.abs(constant_of(constant))
    largest = float(magnitudes[np.isfinite(magnitudes)].max(initial=0.0))
    too_small = node.op_type in _ELEMENTWISE and 0.0 < largest < _HALF_SMALLEST_NORMAL
    return largest <= precision.info.largest and not too_small


def _convertible_inputs(node: ir.Node) -> list[tuple[int, ir.Value]]:
    """Return the float inputs that have the node's own type. ONNX fixes the scales of Resize to float32."""
    inputs = node.inputs[:1] if node.op_type == "Resize" else node.inputs
    return [
        (index, value)
        for index, value in enumerate(inputs)
        if value is not None and value.dtype in (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
    ]
