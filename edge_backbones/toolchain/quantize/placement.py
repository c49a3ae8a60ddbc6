"""Which tensors and layers an int8 or fp8 graph quantises, and why.

Times are OpenVINO's on two AVX512-VNNI cores (under 5 % is noise), dB the SQNR of feature
maps; "trained" is mobilenetv3_large_100 taught to read digits, the hardest that was measured. TensorRT reasons are its
documented fusion rules: no GPU timed them.

============================  =========  ==============================================================================
tensor                        quantised  why
============================  =========  ==============================================================================
input and weight of Conv,     yes        the int8 kernels; the Q of the next layer fuses into the epilogue of this one
Gemm, MatMul(x, constant)
the same, depthwise           behind a   all of them cost 7 dB (trained). Behind a ReLU channels are scaled alike first
                              ReLU       (`equalise`): within 1 dB of none, and a tenth faster on AMX cores. Behind a ReLU6:
                                         8 dB on EfficientNet-Lite0 with ImageNet's weights, and no faster without AMX
MatMul(x, constant) that      no         Swin merges patches in three, 4 % of its products: nothing goes around them, so what
everything passes through                they round stays in every later map. In half: 3.4 dB in the last stage of swin_tiny
                                         for 2 % of the time
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

fp8 leaves out what TensorRT documents no fp8 kernel for: a Conv with groups, with more than 32 weights in a kernel, or with
input or output channels that are no multiple of 16 (so every stem); and the skip branch of an Add behind such a Conv.
"""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from edge_backbones.errors import QuantizationError
from edge_backbones.spec import Precision
from edge_backbones.toolchain.artifacts import ExportedGraph
from edge_backbones.toolchain.layer_names import block_of
from edge_backbones.toolchain.quantize.onnx_edits import activations_of, constant_of, is_constant, load_graph, name_of

_MIN_CHANNELS = 16  # what the smallest int8 matrix instruction sums (mma.m16n8k16 on NVIDIA GPUs)
_MIN_PRODUCTS = 32  # products in a sum that a convolution with fewer channels needs
_MOST_BRIDGES = 0.1  # share of a network's weights: a network without branches has nothing but bridges
_FP8_KERNEL, _FP8_CHANNELS = 32, 16  # largest kernel and step of channels of TensorRT's fp8 convolutions
WEIGHTED = frozenset({"Conv", "Gemm", "MatMul"})


@dataclass(frozen=True)
class Layer:
    """A node that int8 quantises, and one activation that it reads in int8: a product of two activations is two of these.

    Args:
        name: the node's name, ``layer1.0.conv1/Conv``.
        op_type: the node's ONNX operator.
        block: the modules that are quantised or excluded together, ``layer1.0``.
        tensor: the activation.
        result: what the node computes.
        output: the first output of the graph that depends on it.
        weighted: whether its other operand is a weight.
    """

    name: str
    op_type: str
    block: str
    tensor: str
    result: str
    output: str
    weighted: bool


def quantized_layers(graph: ExportedGraph, precision: Precision = Precision.INT8) -> tuple[Layer, ...]:
    """Return the layers that an int8 or fp8 graph quantises when nothing is excluded, in graph order.

    Those of fp8 are some of those of int8.
    """
    model = load_graph(graph)
    first, placement = first_outputs(model.graph), find_placement(model.graph, frozenset(), precision)
    weighted = set(placement.weights)
    return tuple(
        Layer(
            name=str(node.name),
            op_type=node.op_type,
            block=block_of(str(node.name)),
            tensor=name_of(node.inputs[index]),
            result=name_of(node.outputs[0]),
            output=first[node],
            weighted=node in weighted,
        )
        for node, index in placement.activations
    )


def tensors_to_calibrate(graph: ExportedGraph) -> tuple[str, ...]:
    """Name the activations that an int8 graph may quantise, in graph order: `write_typed_graph` needs their ranges."""
    return tuple(dict.fromkeys(layer.tensor for layer in quantized_layers(graph)))


def select_layers(layers: Sequence[Layer], patterns: Iterable[str]) -> frozenset[str]:
    """Name the layers that one of the patterns means.

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


@dataclass(frozen=True)
class Placement:
    """The inputs of nodes that are quantised.

    ``activations``: as (node, index of the input). ``weights``: nodes whose input 1 is a weight to quantise.
    """

    activations: tuple[tuple[ir.Node, int], ...]
    weights: tuple[ir.Node, ...]


def find_placement(graph: ir.Graph, excluded: frozenset[str], precision: Precision = Precision.INT8) -> Placement:
    """Find what an int8 or fp8 graph quantises, by the table above. ``excluded``: names of nodes that are left alone."""
    is_fp8 = precision is Precision.FP8
    depths, left = depths_of(graph), excluded | _bridges(graph)
    activations: list[tuple[ir.Node, int]] = []
    weights: list[ir.Node] = []
    for node in graph:
        if node.name in left:
            continue
        if is_fp8 and node.op_type == "Conv" and not has_fp8_kernel(node):
            continue
        if _gains_from_int8(node):
            activations.append((node, 0))
            weights.append(node)
        elif _multiplies_activations(node):
            activations += [(node, 0), (node, 1)]
        elif node.op_type == "Add":
            skip = _skip_branch(node, depths)
            # In fp8 the Add fuses with an fp8 Conv only.
            branch = None if skip is None else node.inputs[1 - skip]
            if skip is not None and not (is_fp8 and (branch is None or branch.producer() not in weights)):
                activations.append((node, skip))
    return Placement(tuple(activations), tuple(weights))


def first_outputs(graph: ir.Graph) -> dict[ir.Node, str]:
    """Return for every node the first of the graph's outputs that depends on it."""
    order = {output: index for index, output in enumerate(graph.outputs)}
    names = [name_of(output) for output in graph.outputs]
    first: dict[ir.Node, int] = {}
    for node in reversed(graph):
        reached = [order[output] for output in node.outputs if output in order]
        reached += [first[use.node] for output in node.outputs for use in output.uses() if use.node in first]
        if reached:
            first[node] = min(reached)
    return {node: names[index] for node, index in first.items()}


def _gains_from_int8(node: ir.Node) -> bool:
    """Return whether a layer with weights is worth quantising."""
    if node.op_type not in WEIGHTED or is_constant(node.inputs[0]) or not is_constant(node.inputs[1]):
        return False
    sizes = constant_of(node.inputs[1]).shape
    if node.op_type != "Conv":
        # A stack of matrices has no output channel to scale.
        return len(sizes) == 2 and sizes[1 - output_channel_axis(node)] >= _MIN_CHANNELS
    if is_depthwise(node):
        producer = None if node.inputs[0] is None else node.inputs[0].producer()
        return producer is not None and producer.op_type == "Relu"
    return sizes[1] >= _MIN_CHANNELS or int(np.prod(sizes[1:])) >= _MIN_PRODUCTS


def _bridges(graph: ir.Graph) -> frozenset[str]:
    """Name the products with a weight that every path from the input to the later outputs leads through.

    None if they hold too many of the network's weights.
    """
    places = {node: place for place, node in enumerate(graph)}
    carries: set[ir.Node] = set()  # signal onwards: not a shape, nor what only gives an output its form
    for node in reversed(graph):
        goes_on = any(use.node in carries for output in node.outputs for use in output.uses())
        if node.op_type != "Shape" and (goes_on or node.op_type in WEIGHTED or len(activations_of(node)) > 1):
            carries.add(node)
    bridges: list[ir.Node] = []
    beyond = 0  # the place of the last node that reads what was computed so far, or the input
    for node, place in places.items():
        if beyond <= place and node.op_type == "MatMul" and _gains_from_int8(node):
            bridges.append(node)
        for value in (*node.inputs, *node.outputs):
            if value is not None and not is_constant(value) and value.dtype == ir.DataType.FLOAT:
                beyond = max([beyond, *(places[use.node] for use in value.uses() if use.node in carries)])
    weights = {
        node: constant_of(node.inputs[1]).size
        for node in graph
        if node.op_type in WEIGHTED and is_constant(node.inputs[1])
    }
    few = sum(weights[node] for node in bridges) <= _MOST_BRIDGES * sum(weights.values())
    return frozenset(str(node.name) for node in bridges) if few else frozenset()


def has_fp8_kernel(conv: ir.Node) -> bool:
    """Return whether TensorRT documents an fp8 kernel for a Conv, whose weights are constant."""
    if not is_constant(conv.inputs[1]):
        return False
    outputs, inputs, *kernel = constant_of(conv.inputs[1]).shape
    groups = conv.attributes["group"].as_int() if "group" in conv.attributes else 1
    whole = outputs % _FP8_CHANNELS == 0 == inputs % _FP8_CHANNELS
    return groups == 1 and whole and int(np.prod(kernel)) <= _FP8_KERNEL


def is_depthwise(node: ir.Node) -> bool:
    """Return whether a node is a Conv of constant weights whose every output channel reads one input channel."""
    return node.op_type == "Conv" and is_constant(node.inputs[1]) and constant_of(node.inputs[1]).shape[1] == 1


def _multiplies_activations(node: ir.Node) -> bool:
    """Return whether a node is one of the two products of an attention, with enough products in a sum."""
    if node.op_type != "MatMul" or any(is_constant(value) for value in node.inputs):
        return False
    first = node.inputs[0]
    products = None if first is None or not first.shape else first.shape[-1]
    return isinstance(products, int) and products >= _MIN_CHANNELS and node.inputs[0] is not node.inputs[1]


def _skip_branch(add: ir.Node, depths: Mapping[ir.Value, int]) -> int | None:
    """Return the index of a residual Add's skip input, or None if the Add does not end a Conv branch."""
    first, second = add.inputs
    if first is None or second is None or first is second or first.shape is None or first.shape != second.shape:
        return None
    ends_in_conv = [_is_conv_branch(first), _is_conv_branch(second)]
    if all(ends_in_conv):  # a projected skip: the branch with fewer layers behind it
        return 0 if depths[first] < depths[second] else 1
    return ends_in_conv.index(False) if any(ends_in_conv) else None


def _is_conv_branch(value: ir.Value) -> bool:
    """Return whether a value is the result of a Conv that an Add can fuse with."""
    producer = value.producer()
    # With a second reader, or as a feature map, the Conv's result must exist by itself and the Add cannot fuse into it.
    return (
        producer is not None
        and producer.op_type == "Conv"
        and len(tuple(value.uses())) == 1
        and not value.is_graph_output()
    )


def depths_of(graph: ir.Graph) -> dict[ir.Value, int]:
    """Return for every computed value the largest number of layers with weights on a path to it."""
    depths: dict[ir.Value, int] = {}
    for node in graph:
        depth = max((depths.get(value, 0) for value in node.inputs if value is not None), default=0)
        for output in node.outputs:
            depths[output] = depth + (node.op_type in WEIGHTED)
    return depths


def input_channel_axis(node: ir.Node) -> int:
    """Return the axis of a layer's weight that runs along its input's channels; a depthwise one has both on one axis."""
    return 0 if is_depthwise(node) else 1 - output_channel_axis(node)


def output_channel_axis(node: ir.Node) -> int:
    """Return the axis of a layer's weight that runs along its output's channels."""
    if node.op_type == "Conv":
        return 0
    transposed = node.op_type == "Gemm" and "transB" in node.attributes and node.attributes["transB"].as_int() == 1
    return 0 if transposed else 1
