"""Insert the Q/DQ pairs of an int8 or fp8 graph.

The form: symmetric, signed, zero points 0; activations per tensor, one Q (of a Concat one per part) and one DQ however
many readers; weights per output channel, stored as int8 and read through a DQ alone; scales rounded up to fp16 *before*
the weights are divided by them, so that the graph multiplies by the very numbers that were divided by. A quantised Conv
always has a bias: see `_add_bias`.

fp8 (E4M3) is the same with 448 in the place of 127.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from edge_backbones.errors import QuantizationError
from edge_backbones.rounding import round_to_int8
from edge_backbones.spec import Precision
from edge_backbones.toolchain.quantize import centre, optq
from edge_backbones.toolchain.quantize.formats import HALF_SMALLEST, largest_threshold, scales_of, type_of
from edge_backbones.toolchain.quantize.onnx_edits import (
    add_constant,
    constant_of,
    insert_after,
    is_constant,
    name_of,
    new_node,
)
from edge_backbones.toolchain.quantize.placement import find_placement, output_channel_axis


def insert_qdq(
    model: ir.Model,
    precision: Precision,
    ranges: Mapping[str, float],
    excluded: frozenset[str],
    rounding: Mapping[str, bytes] | None = None,
) -> None:
    """Put Q/DQ pairs on the fp32 graph, in place. Scales are float32 that hold fp16 numbers; `convert_to_half` converts them.

    ``rounding``: of int8 weights, by name, as `optq.pack` gives it. The others are rounded as :mod:`edge_backbones.rounding`
    does.

    Raises QuantizationError for ranges or weights that have no fp16 scale, and for an opset without fp16 scales.
    """
    graph = model.graph
    opset = model.opset_imports.get("", 0)
    if opset < precision.info.min_opset:
        raise QuantizationError(
            f"the graph is opset {opset}, fp16 scales need {precision.info.min_opset}; export it with opset 20"
        )
    placement = find_placement(graph, excluded, precision)
    _check_ranges({name_of(node.inputs[index]) for node, index in placement.activations}, precision, ranges)

    centres = {node: centre.centre_before(node) for node in placement.weights}
    read_tensors = {node: name_of(node.inputs[0]) for node in placement.weights}

    zero_point = add_constant(graph, "zero_point", np.zeros((), dtype=type_of(precision).numpy()))
    dequantized: dict[ir.Value, ir.Value] = {}
    for node, index in placement.activations:
        value = node.inputs[index]
        assert value is not None  # find_placement has checked it
        if value not in dequantized:
            dequantized[value] = _quantize_activation(graph, value, precision, ranges[name_of(value)], zero_point)
        node.replace_input_with(index, dequantized[value])

    dequantized_weights: dict[tuple[ir.Value, int], ir.Value] = {}
    for node in placement.weights:
        if precision.info.is_integer and node.op_type == "Conv" and (len(node.inputs) < 3 or node.inputs[2] is None):
            _add_bias(graph, node)
        weight, axis = node.inputs[1], output_channel_axis(node)
        assert weight is not None  # find_placement has checked it
        if (weight, axis) not in dequantized_weights:
            dequantized_weights[weight, axis] = _quantize_weight(graph, node, precision, weight, axis, rounding or {})
        if (subtracted := centres[node]) is not None:
            rounded, scales = _rounded(weight, axis, precision, rounding or {})
            step = float(scales_of(np.asarray(ranges[read_tensors[node]]), precision))
            dequantised_weight = rounded * scales.astype(np.float64)
            centre.shift_for_rounding(graph, node, subtracted, step, constant_of(weight), dequantised_weight)
        node.replace_input_with(1, dequantized_weights[weight, axis])


def _check_ranges(needed: Iterable[str], precision: Precision, ranges: Mapping[str, float]) -> None:
    """Raise QuantizationError unless every tensor has a range that an fp16 scale can express."""
    missing = sorted(set(needed) - set(ranges))
    if missing:
        raise QuantizationError(
            f"{precision} needs a range for {len(missing)} more tensors, {missing[0]!r} first; collect them over"
            " tensors_to_calibrate() of this graph"
        )
    for name in sorted(needed):
        threshold = ranges[name]
        if not 0.0 < threshold <= largest_threshold(precision):  # NaN fails this too
            raise QuantizationError(
                f"the range of {name!r} is {threshold!r}; it must be positive and at most {largest_threshold(precision):.3g}"
                " (an fp16 scale): calibrate again, or use fp32 if activations are really that large"
            )


def _quantize_activation(
    graph: ir.Graph, value: ir.Value, precision: Precision, threshold: float, zero_point: ir.Value
) -> ir.Value:
    """Put a Q (of a Concat one per part) and a DQ behind a tensor, and return the dequantised value."""
    name = name_of(value)
    scale = add_constant(graph, f"{name}.scale", scales_of(np.asarray(threshold), precision))
    # ONNX joins no fp8 tensors, and no engine for the CPU takes them.
    parts, axis, rectified = _concatenated(value) if precision.info.is_integer else ([value], 0, False)
    nodes: list[ir.Node] = []
    quantized: list[ir.Value] = []
    for index, part in enumerate(parts):
        if rectified:
            nodes.append(new_node("Relu", [part], f"{name}.{index}", ir.DataType.FLOAT))
            part = nodes[-1].outputs[0]  # noqa: PLW2901
        nodes.append(
            new_node("QuantizeLinear", [part, scale, zero_point], f"{name}.{precision}.{index}", type_of(precision))
        )
        quantized.append(nodes[-1].outputs[0])
    if len(parts) > 1:
        nodes.append(new_node("Concat", quantized, f"{name}.{precision}", type_of(precision), {"axis": axis}))
        nodes[-1].outputs[0].shape = value.shape
    dequantize = new_node(
        "DequantizeLinear", [nodes[-1].outputs[0], scale, zero_point], f"{name}.dequantized", ir.DataType.FLOAT
    )
    insert_after(graph, value, [*nodes, dequantize])
    return dequantize.outputs[0]


def _concatenated(value: ir.Value) -> tuple[list[ir.Value], int, bool]:
    """Return the parts that a Concat joined to make a tensor, the axis, and whether a Relu follows; else the tensor itself.

    Parts are quantised one by one, which gives the same numbers. OpenVINO 2026.4 loses the scale of a Q behind a Concat (or
    behind a Relu that follows one) in front of a Conv.
    """
    node = value.producer()
    relu = node if node is not None and node.op_type == "Relu" else None
    joined = relu.inputs[0] if relu is not None else value
    concat = joined.producer() if joined is not None else None
    if concat is None or concat.op_type != "Concat" or any(is_constant(part) for part in concat.inputs):
        return [value], 0, False
    axis = concat.attributes["axis"].as_int()
    parts: list[ir.Value] = []
    for part in concat.inputs:
        assert part is not None  # a Concat has no optional inputs
        inner, inner_axis, inner_rectified = _concatenated(part)
        parts += inner if len(inner) > 1 and inner_axis == axis and not inner_rectified else [part]
    return parts, axis, relu is not None


def _add_bias(graph: ir.Graph, conv: ir.Node) -> None:
    """Give a Conv without a bias one, of the smallest half.

    OpenVINO 2026.4 returns zeros for an int8 Conv without bias that two nodes read, when the batch is dynamic. It removes a
    bias of zeros, and then fails in the same way.
    """
    bias = np.full(constant_of(conv.inputs[1]).shape[0], HALF_SMALLEST, np.float32)
    conv.resize_inputs(3)
    conv.replace_input_with(2, add_constant(graph, f"{name_of(conv.outputs[0])}.bias", bias))


def shift_biases(graph: ir.Graph, shifts: Mapping[str, Sequence[float]]) -> None:
    """Add these shifts to the biases of Convs, by layer name. Each gets a constant of its own: a bias may be shared."""
    for node in tuple(graph):
        shift = shifts.get(str(node.name))
        if shift is not None and node.op_type == "Conv":
            bias = constant_of(node.inputs[2]) + np.asarray(shift, np.float32)
            node.replace_input_with(2, add_constant(graph, f"{name_of(node.outputs[0])}.corrected", bias))


def _quantize_weight(
    graph: ir.Graph, node: ir.Node, precision: Precision, weight: ir.Value, axis: int, rounding: Mapping[str, bytes]
) -> ir.Value:
    """Store a weight in int8 or fp8 with a scale per output channel, and return the dequantised value."""
    rounded, scales = _rounded(weight, axis, precision, rounding)
    name = f"{name_of(weight)}.axis{axis}"  # tied weights may be read along both
    stored = add_constant(graph, f"{name}.{precision}", rounded)
    scale = add_constant(graph, f"{name}.scale", scales.ravel())
    dequantize = new_node("DequantizeLinear", [stored, scale], f"{name}.dequantized", ir.DataType.FLOAT, {"axis": axis})
    graph.insert_before(node, dequantize)
    return dequantize.outputs[0]


def _rounded(
    weight: ir.Value, axis: int, precision: Precision, rounding: Mapping[str, bytes]
) -> tuple[np.ndarray, np.ndarray]:
    """Return a weight in int8 or fp8, and its scales, which broadcast against it."""
    steps, scales = in_steps(weight, axis, precision)
    if not precision.info.is_integer:
        return steps.astype(type_of(precision).numpy()), scales
    if (packed := rounding.get(name_of(weight))) is not None:
        return optq.unpack(steps, packed, name_of(weight)), scales
    rows = np.moveaxis(steps, axis, 0)
    rounded = round_to_int8(rows.reshape(len(rows), -1)).reshape(rows.shape)
    return np.ascontiguousarray(np.moveaxis(rounded, 0, axis)), scales


def in_steps(weight: ir.Value, axis: int, precision: Precision = Precision.INT8) -> tuple[np.ndarray, np.ndarray]:
    """Return a weight divided by its scales, in float64, and the scales, which broadcast against it.

    Raises QuantizationError for a weight that has no fp16 scale.
    """
    name, values = name_of(weight), constant_of(weight).astype(np.float64)
    largest = float(np.abs(values).max(initial=0.0))
    if not largest <= largest_threshold(precision):  # NaN fails this too
        raise QuantizationError(
            f"weight {name!r} holds {largest:.3g}, an {precision} weight with an fp16 scale reaches"
            f" {largest_threshold(precision):.3g}:"
            " the checkpoint is damaged, or needs fp32"
        )
    per_channel = np.moveaxis(values, axis, 0).reshape(values.shape[axis], -1)
    shape = [1] * values.ndim
    shape[axis] = -1
    scales = scales_of(np.abs(per_channel).max(axis=1), precision).reshape(shape)
    # Only the floor of scales_of can leave |value / scale| below the largest; nothing can leave it above.
    return values / scales.astype(np.float64), scales
