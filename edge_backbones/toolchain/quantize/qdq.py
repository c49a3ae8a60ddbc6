"""fp32 graph -> the graph of one precision: casts for fp16, Q/DQ pairs and casts for int8.

The number format of every tensor is written in the graph, so one file per precision serves every engine. The form is
the one that TensorRT asks for (it refuses others); OpenVINO runs it at full int8 speed (after `cpu_graph`).

What int8 quantises, and why. Times are OpenVINO's on two AVX512-VNNI cores (under 5 % is noise), dB the SQNR of feature
maps; "trained" is mobilenetv3_large_100 taught to read digits, the hardest that was measured. TensorRT reasons are its
documented fusion rules: no GPU timed them.

============================  =========  ==============================================================================
tensor                        quantised  why
============================  =========  ==============================================================================
input and weight of Conv,     yes        the int8 kernels; the Q of the next layer fuses into the epilogue of this one
Gemm, MatMul(x, constant)
the same, depthwise           behind a   all of them cost 7 dB (trained). Behind a ReLU channels are scaled alike first
                              ReLU       (`equalise`): within 1 dB of none, and a tenth faster on AMX cores
the same, few channels (stem  no         at least 16 channels or 32 products in a sum are asked for. A 3x3 stem is no faster
3x3)                                     and costs an fp8 resnet 1 to 2 dB; 1x1 layers of 16 and 24 channels make
                                         mobilenetv3 a tenth faster for under 1 dB in its last stage
squeeze-excite Conv           yes        mobilenetv3 is 4 to 8 % faster, its file a third smaller; costs 0.1 dB
skip branch of a residual     yes        TensorRT fuses Conv+Add when the other addend is int8; OpenVINO: resnet18 at 32 x 32
Add                                      is 15 % faster, large networks no different. Costs 1 dB with random weights, trained
                                         2 to 12 dB: what a gate or --precision auto gives up first
Conv branch of that Add       no         a Q between Conv and Add undoes that fusion; no faster on OpenVINO
Add behind a MatMul           no         would round a transformer's residual stream at every block: -10 dB on vit_small
attention MatMul(x, y), both  yes        vit_small 8 % faster (ModelOpt does the same); 1.3 dB on a trained ViT, as long as
inputs                                   softmax is scaled for its range on images (-23 dB for its full range of 1)
Concat                        in parts   each part gets the Q and scale of the whole: they join as int8
MaxPool, Transpose, Reshape   no         rounding commutes with them and engines move Q and DQ through them (`cpu_graph` a
                                         MaxPool); a Q moved above a Transpose by hand made convnext and vit 9 % slower
feature outputs               no         they stay the tensor before the Q: 8-bit steps never show in a result
bias                          no         TensorRT refuses int32 DequantizeLinear; fp16, added to the accumulator
                                         (and corrected by the mean error that rounding leaves in each channel)
============================  =========  ==============================================================================

What fp16 keeps in float32 (bf16, int8 and fp8 graphs too): normalisation, softmax, reductions, powers, roots,
exponentials and divisions, what lies between two of them (the epsilon of a norm written out as nodes), everything before
the first layer with weights (image preprocessing), nodes with a constant that half cannot hold, and nodes beside a tensor
whose values came near 65504 on the calibration images (the last two not in bf16, which has the range of fp32). Graph
inputs and outputs stay float32 (or uint8) with a cast inside. OpenVINO computes half nodes in fp32: the fp16 rest costs
it nothing.

The form: symmetric, signed, zero points 0; activations per tensor, one Q (of a Concat one per part) and one DQ however
many readers; weights per output channel, stored as int8 and read through a DQ alone; scales rounded up to fp16 *before*
the weights are divided by them, so that the graph multiplies by the very numbers that were divided by. A quantised Conv
always has a bias: see `_add_bias`.

fp8 (E4M3) is the same with 448 in the place of 127. bf16 graphs are opset 22, the first whose convolutions take it; hard
swish and mish stay float32 there, because TensorRT refuses them in bf16.
"""

from __future__ import annotations

import difflib
import fnmatch
import shutil
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from onnx_ir.passes import common as passes

from edge_backbones.errors import QuantizationError
from edge_backbones.spec import Precision
from edge_backbones.toolchain.artifacts import ExportedGraph, TypedGraph

_MIN_OPSET = 19  # the first whose QuantizeLinear takes fp16 scales
BF16_OPSET = 22  # the first whose Conv takes bf16; from 20 on only lists of types have grown
_MIN_CHANNELS = 16  # what the smallest int8 matrix instruction sums (mma.m16n8k16 on NVIDIA GPUs)
_MIN_PRODUCTS = 32  # of a convolution with fewer channels
_HALF_MAX = float(np.finfo(np.float16).max)
_HALF_SMALLEST_NORMAL = float(np.finfo(np.float16).smallest_normal)
_HALF_SMALLEST = float(np.finfo(np.float16).smallest_subnormal)

_FLOAT_REDUCTIONS = frozenset({
    "CumSum", "Exp", "GlobalAveragePool", "Log", "Pow", "Reciprocal", "ReduceL1", "ReduceL2", "ReduceLogSumExp",
    "ReduceMean", "ReduceProd", "ReduceSum", "ReduceSumSquare", "Sqrt",
})  # fmt: skip
_FLOAT_NORMS = frozenset({
    "BatchNormalization", "GroupNormalization", "InstanceNormalization", "LayerNormalization", "LogSoftmax",
    "LpNormalization", "RMSNormalization", "Softmax",
})  # fmt: skip
_NOT_IN_BF16 = frozenset({"HardSwish", "Mish"})  # TensorRT's ONNX parser takes them in fp32 and fp16
_ELEMENTWISE = frozenset({"Abs", "Add", "Clip", "Div", "Expand", "Max", "Min", "Mul", "Neg", "Sub", "Where"})
_WEIGHTED = frozenset({"Conv", "Gemm", "MatMul"})


@dataclass(frozen=True)
class Layer:
    """A node that int8 quantises, and one activation that it reads in int8: a product of two activations is two of these.

    ``name``: ``layer1.0.conv1/Conv``. ``block``: the modules that stand or fall together, ``layer1.0``. ``tensor``: the
    activation, ``result``: what the node computes. ``output``: the first output of the graph that depends on it.
    ``weighted``: its other operand is a weight.
    """

    name: str
    op_type: str
    block: str
    tensor: str
    result: str
    output: str
    weighted: bool


def quantized_layers(graph: ExportedGraph) -> tuple[Layer, ...]:
    """What an int8 graph quantises when nothing is excluded, in graph order."""
    model = load_graph(graph)
    first, placement = _first_outputs(model.graph), _find_placement(model.graph, frozenset())
    weighted = set(placement.weights)
    return tuple(
        Layer(
            name=str(node.name),
            op_type=node.op_type,
            block=block_of(str(node.name)),
            tensor=_name(node.inputs[index]),
            result=_name(node.outputs[0]),
            output=first[node],
            weighted=node in weighted,
        )
        for node, index in placement.activations
    )


def tensors_to_calibrate(graph: ExportedGraph) -> tuple[str, ...]:
    """Names of the activations that an int8 graph may quantise, in graph order: `write_typed_graph` needs their ranges."""
    return tuple(dict.fromkeys(layer.tensor for layer in quantized_layers(graph)))


def select_layers(layers: Sequence[Layer], patterns: Iterable[str]) -> frozenset[str]:
    """Names of the layers that one of the patterns means.

    ``op:Add``: by type. ``stage:layer4``: those between this output and the one before. Anything else: a layer's name, a
    module, or a pattern with ``*``: ``blocks.0.attn``, ``*.mlp.fc2``, ``layer1.0/Add``. Raises QuantizationError for a
    pattern that means no layer.
    """
    found: set[str] = set()
    for pattern in patterns:
        kind, _, value = pattern.partition(":")
        if kind == "op":
            meant = {layer.name for layer in layers if layer.op_type == value}
            known = {layer.op_type for layer in layers}
        elif kind == "stage":
            meant = {layer.name for layer in layers if layer.output == value}
            known = {layer.output for layer in layers}
        else:
            meant = {layer.name for layer in layers if _is_meant(layer.name, pattern)}
            known = {layer.block for layer in layers}
        if not meant:
            near = ", ".join(difflib.get_close_matches(value or kind, known, cutoff=0) or sorted(known)[:3])
            raise QuantizationError(f"exclude {pattern!r} means no layer that int8 quantises; there are {near}, ...")
        found |= meant
    return frozenset(found)


def _is_meant(name: str, pattern: str) -> bool:
    path = name.partition("/")[0].split(".")
    modules = (".".join(path[:length]) for length in range(1, len(path) + 1))
    return fnmatch.fnmatchcase(name, pattern) or any(fnmatch.fnmatchcase(module, pattern) for module in modules)


def activation_scale(tensor: str, threshold: float) -> tuple[str, npt.NDArray[np.float32]]:
    """Name and value of the scale that an int8 graph has for a range."""
    return f"{tensor}.scale", _scales(np.asarray(threshold), _FORMATS[Precision.INT8])


def write_typed_graph(
    graph: ExportedGraph,
    *,
    precision: Precision,
    path: Path,
    ranges: Mapping[str, float] | None = None,
    excluded: Collection[str] = (),
    shifts: Mapping[str, Sequence[float]] | None = None,
    large: Collection[str] = (),
    half: bool = True,
) -> TypedGraph:
    """Write the graph of one precision to `path`. The same graph and ranges give the same bytes.

    Args:
        graph: the fp32 graph; it is not changed.
        precision: fp32 copies the file; the others are described in the module's docstring.
        path: the file to write.
        ranges: for int8 and fp8, the |x| threshold of every tensor that `tensors_to_calibrate` names: the value that
            becomes 127 or 448. Other precisions do not read it.
        excluded: for int8 and fp8, names of `quantized_layers` that are left as fp16 has them.
        shifts: for int8, what is added to the bias of a Conv, by layer name and output channel (bias correction).
        large: tensors whose values fp16 may not hold: the nodes that write or read them stay in fp32.
        half: False leaves what is not quantised in fp32: for measuring, ONNX Runtime computes half slowly.

    Raises:
        QuantizationError: a range that is missing, not finite or not positive, or too large for an fp16 scale; a weight
            that is not finite; a graph that has subgraphs or, for int8, an opset before 19.
    """
    model = load_graph(graph)
    if precision is Precision.FP32:
        shutil.copyfile(graph.path, path)
    else:
        if precision in _FORMATS:
            _insert_quantization(model, _FORMATS[precision], ranges or {}, frozenset(excluded))
            if precision is Precision.INT8:
                _shift_biases(model.graph, {n: v for n, v in (shifts or {}).items() if n not in excluded})
        if precision is Precision.BF16:
            _raise_opset(model)
            _convert_to_half(model.graph, ir.DataType.BFLOAT16, frozenset())
        elif half:
            _convert_to_half(model.graph, ir.DataType.FLOAT16, frozenset(large))
        passes.RemoveUnusedNodesPass()(model)  # takes the replaced fp32 weights too
        ir.save(model, path)
    opset = model.opset_imports[""]
    return TypedGraph(path=path, precision=precision, opset=opset, spec=graph.spec, input=graph.input)


@dataclass(frozen=True)
class _Format:
    """What quantised tensors are stored as, and the largest magnitude of it that is used."""

    name: str
    dtype: ir.DataType
    largest: float

    @property
    def largest_threshold(self) -> float:
        return _HALF_MAX * self.largest


_FORMATS = {
    Precision.INT8: _Format("int8", ir.DataType.INT8, 127),  # symmetric: -128 is not used
    Precision.FP8: _Format("fp8", ir.DataType.FLOAT8E4M3FN, 448),
}


# ---- where Q/DQ goes ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Placement:
    """Node inputs to be quantised: `activations` as (node, input index), `weights` as the nodes whose input 1 it is."""

    activations: tuple[tuple[ir.Node, int], ...]
    weights: tuple[ir.Node, ...]


def _find_placement(graph: ir.Graph, excluded: frozenset[str]) -> _Placement:
    depths = _depths(graph)
    activations: list[tuple[ir.Node, int]] = []
    weights: list[ir.Node] = []
    for node in graph:
        if node.name in excluded:
            continue
        if _gains_from_int8(node):
            activations.append((node, 0))
            weights.append(node)
        elif _multiplies_activations(node):
            activations += [(node, 0), (node, 1)]
        elif node.op_type == "Add":
            skip = _skip_branch(node, depths)
            if skip is not None:
                activations.append((node, skip))
    return _Placement(tuple(activations), tuple(weights))


def block_of(name: str) -> str:
    """``layer1.0`` of ``layer1.0.conv1/Conv`` and of ``layer1.0/Add``: the module around a layer, up to its last number."""
    path, _, op_type = name.partition("/")
    parts = path.split(".")
    around = parts if op_type.startswith("Add") else parts[:-1]
    numbers = [i for i, part in enumerate(around) if part.rpartition("_")[2].isdecimal()]
    return ".".join(around[: numbers[-1] + 1] if numbers else around or parts)


def _first_outputs(graph: ir.Graph) -> dict[ir.Node, str]:
    """For every node, the first of the graph's outputs that depends on it."""
    order = {output: index for index, output in enumerate(graph.outputs)}
    names = [_name(output) for output in graph.outputs]
    first: dict[ir.Node, int] = {}
    for node in reversed(graph):
        reached = [order[output] for output in node.outputs if output in order]
        reached += [first[use.node] for output in node.outputs for use in output.uses() if use.node in first]
        if reached:
            first[node] = min(reached)
    return {node: names[index] for node, index in first.items()}


def _gains_from_int8(node: ir.Node) -> bool:
    if node.op_type not in _WEIGHTED or _is_constant(node.inputs[0]) or not _is_constant(node.inputs[1]):
        return False
    sizes = constant_of(node.inputs[1]).shape
    if node.op_type != "Conv":
        # A stack of matrices has no output channel to scale.
        return len(sizes) == 2 and sizes[1 - _output_channel_axis(node)] >= _MIN_CHANNELS
    if is_depthwise(node):
        producer = None if node.inputs[0] is None else node.inputs[0].producer()
        return producer is not None and producer.op_type == "Relu"
    return sizes[1] >= _MIN_CHANNELS or int(np.prod(sizes[1:])) >= _MIN_PRODUCTS


def is_depthwise(node: ir.Node) -> bool:
    """A Conv of constant weights whose every output channel reads one input channel."""
    return node.op_type == "Conv" and _is_constant(node.inputs[1]) and constant_of(node.inputs[1]).shape[1] == 1


def _multiplies_activations(node: ir.Node) -> bool:
    """Both products of an attention, where a sum has enough of them."""
    if node.op_type != "MatMul" or any(_is_constant(value) for value in node.inputs):
        return False
    first = node.inputs[0]
    products = None if first is None or not first.shape else first.shape[-1]
    return isinstance(products, int) and products >= _MIN_CHANNELS and node.inputs[0] is not node.inputs[1]


def _skip_branch(add: ir.Node, depths: Mapping[ir.Value, int]) -> int | None:
    """The index of a residual Add's skip input, or None if the Add does not end a Conv branch."""
    first, second = add.inputs
    if first is None or second is None or first is second or first.shape is None or first.shape != second.shape:
        return None
    ends_in_conv = [_is_conv_branch(first), _is_conv_branch(second)]
    if all(ends_in_conv):  # a projected skip: the branch with fewer layers behind it
        return 0 if depths[first] < depths[second] else 1
    return ends_in_conv.index(False) if any(ends_in_conv) else None


def _is_conv_branch(value: ir.Value) -> bool:
    producer = value.producer()
    # With a second reader, or as a feature map, the Conv's result must exist by itself and the Add cannot fuse into it.
    return (
        producer is not None
        and producer.op_type == "Conv"
        and len(tuple(value.uses())) == 1
        and not value.is_graph_output()
    )


def _depths(graph: ir.Graph) -> dict[ir.Value, int]:
    """For every computed value, the largest number of layers with weights on a path to it."""
    depths: dict[ir.Value, int] = {}
    for node in graph:
        depth = max((depths.get(value, 0) for value in node.inputs if value is not None), default=0)
        for output in node.outputs:
            depths[output] = depth + (node.op_type in _WEIGHTED)
    return depths


# ---- int8 -----------------------------------------------------------------------------------------------------------


def _insert_quantization(model: ir.Model, to: _Format, ranges: Mapping[str, float], excluded: frozenset[str]) -> None:
    """Put Q/DQ pairs on the fp32 graph. Scales hold fp16 numbers; `_convert_to_half` then gives them that type."""
    graph = model.graph
    opset = model.opset_imports.get("", 0)
    if opset < _MIN_OPSET:
        raise QuantizationError(f"the graph is opset {opset}, fp16 scales need {_MIN_OPSET}; export it with opset 20")
    placement = _find_placement(graph, excluded)
    _check_ranges({_name(node.inputs[index]) for node, index in placement.activations}, to, ranges)

    zero_point = add_constant(graph, "zero_point", np.zeros((), dtype=to.dtype.numpy()))
    dequantized: dict[ir.Value, ir.Value] = {}
    for node, index in placement.activations:
        value = node.inputs[index]
        assert value is not None  # _find_placement looked at it
        if value not in dequantized:
            dequantized[value] = _quantize_activation(graph, value, to, ranges[_name(value)], zero_point)
        node.replace_input_with(index, dequantized[value])

    dequantized_weights: dict[tuple[ir.Value, int], ir.Value] = {}
    for node in placement.weights:
        if to.dtype == ir.DataType.INT8 and node.op_type == "Conv" and (len(node.inputs) < 3 or node.inputs[2] is None):
            _add_bias(graph, node)
        weight, axis = node.inputs[1], _output_channel_axis(node)
        assert weight is not None  # as above
        if (weight, axis) not in dequantized_weights:
            dequantized_weights[weight, axis] = _quantize_weight(graph, node, to, weight, axis)
        node.replace_input_with(1, dequantized_weights[weight, axis])


def _check_ranges(needed: Iterable[str], to: _Format, ranges: Mapping[str, float]) -> None:
    missing = sorted(set(needed) - set(ranges))
    if missing:
        raise QuantizationError(
            f"{to.name} needs a range for {len(missing)} more tensors, {missing[0]!r} first; collect them over"
            " tensors_to_calibrate() of this graph"
        )
    for name in sorted(needed):
        threshold = ranges[name]
        if not 0.0 < threshold <= to.largest_threshold:  # NaN fails this too
            raise QuantizationError(
                f"the range of {name!r} is {threshold!r}; it must be positive and at most {to.largest_threshold:.3g}"
                " (an fp16 scale): calibrate again, or use fp32 if activations are really that large"
            )


def _quantize_activation(
    graph: ir.Graph, value: ir.Value, to: _Format, threshold: float, zero_point: ir.Value
) -> ir.Value:
    name = _name(value)
    scale = add_constant(graph, f"{name}.scale", _scales(np.asarray(threshold), to))
    # ONNX joins no fp8 tensors, and no engine for the CPU takes them.
    parts, axis, rectified = _concatenated(value) if to.dtype == ir.DataType.INT8 else ([value], 0, False)
    nodes: list[ir.Node] = []
    quantized: list[ir.Value] = []
    for index, part in enumerate(parts):
        if rectified:
            nodes.append(_new_node("Relu", [part], f"{name}.{index}", ir.DataType.FLOAT))
            part = nodes[-1].outputs[0]  # noqa: PLW2901
        nodes.append(_new_node("QuantizeLinear", [part, scale, zero_point], f"{name}.{to.name}.{index}", to.dtype))
        quantized.append(nodes[-1].outputs[0])
    if len(parts) > 1:
        nodes.append(_new_node("Concat", quantized, f"{name}.{to.name}", to.dtype, {"axis": axis}))
        nodes[-1].outputs[0].shape = value.shape
    dequantize = _new_node(
        "DequantizeLinear", [nodes[-1].outputs[0], scale, zero_point], f"{name}.dequantized", ir.DataType.FLOAT
    )
    _insert_after(graph, value, [*nodes, dequantize])
    return dequantize.outputs[0]


def _concatenated(value: ir.Value) -> tuple[list[ir.Value], int, bool]:
    """The parts that a Concat joined to make a tensor, the axis, and whether a Relu follows; else the tensor itself.

    They are quantised one by one, which gives the same numbers: of a Q behind a Concat (or a Relu behind one) in front of
    a Conv, OpenVINO 2026.4 loses the scale.
    """
    node = value.producer()
    relu = node if node is not None and node.op_type == "Relu" else None
    joined = relu.inputs[0] if relu is not None else value
    concat = joined.producer() if joined is not None else None
    if concat is None or concat.op_type != "Concat" or any(_is_constant(part) for part in concat.inputs):
        return [value], 0, False
    axis = concat.attributes["axis"].as_int()
    parts: list[ir.Value] = []
    for part in concat.inputs:
        assert part is not None  # a Concat has no optional inputs
        inner, inner_axis, inner_rectified = _concatenated(part)
        parts += inner if len(inner) > 1 and inner_axis == axis and not inner_rectified else [part]
    return parts, axis, relu is not None


def _add_bias(graph: ir.Graph, conv: ir.Node) -> None:
    """A bias of the smallest half, for a Conv that has none.

    OpenVINO 2026.4 returns zeros for an int8 Conv without bias that two nodes read, when the batch is dynamic. It removes
    a bias of zeros, and with it the cure.
    """
    bias = np.full(constant_of(conv.inputs[1]).shape[0], _HALF_SMALLEST, np.float32)
    conv.resize_inputs(3)
    conv.replace_input_with(2, add_constant(graph, f"{_name(conv.outputs[0])}.bias", bias))


def _shift_biases(graph: ir.Graph, shifts: Mapping[str, Sequence[float]]) -> None:
    """A constant of its own for each: the bias may be shared."""
    for node in tuple(graph):
        shift = shifts.get(str(node.name))
        if shift is not None and node.op_type == "Conv":
            bias = constant_of(node.inputs[2]) + np.asarray(shift, np.float32)
            node.replace_input_with(2, add_constant(graph, f"{_name(node.outputs[0])}.corrected", bias))


def _quantize_weight(graph: ir.Graph, node: ir.Node, to: _Format, weight: ir.Value, axis: int) -> ir.Value:
    name, values = _name(weight), constant_of(weight).astype(np.float64)
    largest = float(np.abs(values).max(initial=0.0))
    if not largest <= to.largest_threshold:  # NaN fails this too
        raise QuantizationError(
            f"weight {name!r} holds {largest:.3g}, an {to.name} weight with an fp16 scale reaches"
            f" {to.largest_threshold:.3g}:"
            " the checkpoint is damaged, or needs fp32"
        )
    per_channel = np.moveaxis(values, axis, 0).reshape(values.shape[axis], -1)
    scales = _scales(np.abs(per_channel).max(axis=1), to)
    shape = [1] * values.ndim
    shape[axis] = -1
    # Only the floor of _scales can leave |value / scale| below the largest; nothing can leave it above.
    scaled = values / scales.astype(np.float64).reshape(shape)
    rounded = np.rint(scaled).astype(np.int8) if to.dtype == ir.DataType.INT8 else scaled.astype(to.dtype.numpy())
    name = f"{name}.axis{axis}"  # tied weights may be read along both
    stored = add_constant(graph, f"{name}.{to.name}", rounded)
    scale = add_constant(graph, f"{name}.scale", scales)
    dequantize = _new_node(
        "DequantizeLinear", [stored, scale], f"{name}.dequantized", ir.DataType.FLOAT, {"axis": axis}
    )
    graph.insert_before(node, dequantize)
    return dequantize.outputs[0]


def _scales(thresholds: npt.NDArray[np.floating], to: _Format) -> npt.NDArray[np.float32]:
    """threshold / largest, rounded up to numbers that fp16 holds: nothing within the threshold is clipped. Never 0."""
    exact = np.maximum(thresholds.astype(np.float64) / to.largest, _HALF_SMALLEST)
    half = exact.astype(np.float16)
    with np.errstate(over="ignore"):  # what follows the largest half is computed, never chosen
        half = np.where(half < exact, np.nextafter(half, np.float16(np.inf)), half)
    # A channel of zeros takes any scale; 1 keeps engines away from their smallest numbers.
    return np.where(thresholds == 0.0, np.float32(1.0), half.astype(np.float32))


def input_channel_axis(node: ir.Node) -> int:
    """The axis of a layer's weight that runs along the channels of its input: of a depthwise one along both."""
    return 0 if is_depthwise(node) else 1 - _output_channel_axis(node)


def _output_channel_axis(node: ir.Node) -> int:
    if node.op_type == "Conv":
        return 0
    transposed = node.op_type == "Gemm" and "transB" in node.attributes and node.attributes["transB"].as_int() == 1
    return 0 if transposed else 1


# ---- fp16 -----------------------------------------------------------------------------------------------------------


def _raise_opset(model: ir.Model) -> None:
    if any(node.op_type == "GroupNormalization" for node in model.graph):
        raise QuantizationError("the graph has GroupNormalization, which means something else in opset 21: use fp16")
    model.opset_imports[""] = max(model.opset_imports[""], BF16_OPSET)


def _convert_to_half(graph: ir.Graph, half: ir.DataType, large: frozenset[str]) -> None:
    """Make every float32 tensor half, except inputs, outputs and what the nodes kept in float32 read and write."""
    nodes = tuple(graph)
    if any(attribute.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
           for node in nodes for attribute in node.attributes.values()):  # fmt: skip
        raise QuantizationError("the graph has If, Loop or Scan nodes; fp16 and int8 need a graph without control flow")
    kept = _nodes_kept_in_float(graph, half, large)
    for node in nodes:
        for output in node.outputs:
            if output.dtype == ir.DataType.FLOAT and node not in kept:
                output.dtype = half

    casts: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}
    for position, output in enumerate(tuple(graph.outputs)):
        if output.dtype == half:
            name = _name(output)
            output.name = f"{name}.half"
            graph.outputs[position] = _cast(graph, output, ir.DataType.FLOAT, name)
            casts[output, ir.DataType.FLOAT] = graph.outputs[position]

    for node in nodes:
        wanted, suffix = (ir.DataType.FLOAT, "float") if node in kept else (half, "half")
        for index, value in _convertible_inputs(node):
            if value.dtype == wanted:
                continue
            if (value, wanted) not in casts:
                name = f"{_name(value).removesuffix('.half')}.{suffix}"
                if _is_constant(value):
                    casts[value, wanted] = add_constant(graph, name, constant_of(value).astype(wanted.numpy()))
                else:
                    casts[value, wanted] = _cast(graph, value, wanted, name)
            node.replace_input_with(index, casts[value, wanted])


def _nodes_kept_in_float(graph: ir.Graph, half: ir.DataType, large: frozenset[str]) -> set[ir.Node]:
    depths = _depths(graph)
    reductions = {node for node in graph if node.op_type in _FLOAT_REDUCTIONS or _divides_by_activation(node)}
    after, before = set(reductions), set(reductions)
    for node in graph:
        if node.op_type in _ELEMENTWISE and any(value.producer() in after for value in _activations(node)):
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
            or not any(value.dtype == ir.DataType.FLOAT for value in _activations(node))
            or node.op_type == "Cast"
            or (half == ir.DataType.BFLOAT16 and node.op_type in _NOT_IN_BF16)
            or not large.isdisjoint(value.name for value in (*_activations(node), *node.outputs))
            or not all(_fits_half(node, value, half) for value in node.inputs if _is_constant(value))
        ):
            kept.add(node)
    return kept


def _divides_by_activation(node: ir.Node) -> bool:
    return node.op_type == "Div" and not _is_constant(node.inputs[1])


def _fits_half(node: ir.Node, constant: ir.Value | None, half: ir.DataType) -> bool:
    """False for a constant beyond the range of half, such as a mask of -1e9, or a factor or epsilon below it."""
    if constant is None or constant.dtype != ir.DataType.FLOAT or half == ir.DataType.BFLOAT16:
        return True  # bf16 has the range of fp32
    magnitudes = np.abs(constant_of(constant))
    largest = float(magnitudes[np.isfinite(magnitudes)].max(initial=0.0))
    too_small = node.op_type in _ELEMENTWISE and 0.0 < largest < _HALF_SMALLEST_NORMAL
    return largest <= _HALF_MAX and not too_small


def _convertible_inputs(node: ir.Node) -> list[tuple[int, ir.Value]]:
    """Float inputs that have the node's own type. ONNX fixes the scales of Resize to float32."""
    inputs = node.inputs[:1] if node.op_type == "Resize" else node.inputs
    return [
        (index, value)
        for index, value in enumerate(inputs)
        if value is not None and value.dtype in (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
    ]


# ---- graph edits ----------------------------------------------------------------------------------------------------


def load_graph(graph: ExportedGraph) -> ir.Model:
    """The fp32 graph to edit, every constant an initializer."""
    model = ir.load(graph.path)
    passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    return model


def _activations(node: ir.Node) -> list[ir.Value]:
    return [value for value in node.inputs if value is not None and not _is_constant(value)]


def _is_constant(value: ir.Value | None) -> bool:
    return value is not None and value.is_initializer()


def constant_of(value: ir.Value | None) -> npt.NDArray[np.generic]:
    """What an initializer holds."""
    if value is None or value.const_value is None:
        raise QuantizationError(f"initializer {_name(value)!r} has no value; export the graph with its weights")
    return value.const_value.numpy()


def _name(value: ir.Value | None) -> str:
    if value is None or not value.name:
        raise QuantizationError("the graph has an unnamed tensor where a value is needed; export it again")
    return value.name


def _new_node(
    op_type: str, inputs: list[ir.Value], output: str, dtype: ir.DataType, attributes: Mapping[str, int] | None = None
) -> ir.Node:
    """A node named after its one output, which has the shape of the first input."""
    value = ir.Value(name=output, shape=inputs[0].shape, type=ir.TensorType(dtype))
    return ir.node(op_type, inputs, attributes, outputs=[value], name=f"{op_type}:{output}")


def _cast(graph: ir.Graph, value: ir.Value, dtype: ir.DataType, name: str) -> ir.Value:
    cast = _new_node("Cast", [value], name, dtype, {"to": int(dtype)})
    _insert_after(graph, value, [cast])
    return cast.outputs[0]


def _insert_after(graph: ir.Graph, value: ir.Value, nodes: list[ir.Node]) -> None:
    producer = value.producer()
    if producer is None:  # a graph input
        graph.insert_before(graph[0], nodes)
    else:
        graph.insert_after(producer, nodes)


def add_constant(graph: ir.Graph, name: str, array: npt.NDArray[np.generic]) -> ir.Value:
    """A new initializer."""
    tensor = ir.tensor(array, name=name)
    value = ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph.register_initializer(value)
    return value
