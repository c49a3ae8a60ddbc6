"""Rewrite an int8 graph into the form that ONNX Runtime has integer kernels for.

A graph of a bundle is written as TensorRT needs it: signed 8-bit tensors, and a Q only in front of a layer. ONNX Runtime
makes an integer kernel of a convolution only where a Q follows it too, and it computes everything else in fp32 with a
DequantizeLinear in front. So:

- Every pair is unsigned. Where a tensor is never below a bound (0 behind a ReLU, -0.17 behind a GELU), the 256 levels
  cover its range alone, which halves the steps. A ReLU in front of such a Q is removed: rounding cuts off the same values.
- A convolution whose result goes to a Q, also through a ReLU or a max pooling, becomes a QLinearConv.
- A convolution whose result is added to a skip branch and goes to a Q then: the sum is rounded to [low, high] and the skip
  branch has a known range, so what the convolution may contribute has known bounds too. A pair with them is put behind it.
  This clips nothing that the Q behind the sum would not clip. The Add becomes a QLinearAdd.
- A 1x1 convolution whose result stays float becomes a product of matrices, channels last: ONNX Runtime has integer
  products with float results, and no such convolutions. The Transposes around it cancel in networks with LayerNormalization.
- Every other convolution is computed in fp32: its weights are multiplied out, once, when ONNX Runtime loads the graph, and
  a Q/DQ pair that only fp32 layers read is removed.

The file keeps the 8-bit weights. Processor time of a call on one thread (ONNX Runtime 1.32, AVX512-VNNI, 224 x 224), in ms:
fp32, int8 as this module writes it, and int8 with nothing but its half-precision rest made float32: resnet18 34.5, 12.1
and 46.7; mobilenetv3_large_100 6.1, 5.0 and 8.1; convnext_atto 13.8, 8.9 and 17.8; vit_tiny_patch16_224 29.6, 15.2 and 38.0.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import permutations
from typing import TYPE_CHECKING, Any

import numpy as np

from edge_backbones.engines.onnxruntime.edits import Editor, array_of, integer_attribute, only_reader, producer_of

if TYPE_CHECKING:
    import onnx_ir as ir
    from numpy.typing import NDArray

# The lowest results of operators.
_LOWEST = {"Gelu": -0.1701, "HardSigmoid": 0.0, "HardSwish": -0.375, "Relu": 0.0, "Sigmoid": 0.0, "Softmax": 0.0}
_LOWEST_SILU = -0.2785
# Operators whose results are not below their lowest input.
_KEEP_LOWEST = frozenset({
    "AveragePool", "Flatten", "GlobalAveragePool", "MaxPool", "ReduceMean", "Reshape", "Squeeze", "Transpose", "Unsqueeze",
})  # fmt: skip
_SIGNED_ZERO = 128  # zero point of the unsigned levels that stand for the signed ones
_LARGEST_BIAS = 2.0**30  # of the int32 in a bias
_PRODUCT_CHANNELS = 32  # 16 is no faster on mobilenetv3_large_100, and 64 leaves out the first stage of convnext_atto
_BEFORE_ROUNDING = frozenset({"Clip", "MaxPool", "Relu"})  # ONNX Runtime rounds before these as well as behind them
_PRODUCTS = frozenset({"MatMul", "Gemm"})
_LAYERS = _PRODUCTS | {"Conv"}


@dataclass(eq=False)
class _Pair:
    """Hold a Q/DQ pair of an activation. A Concat of 8-bit tensors has a Q for each part."""

    quantize: tuple[ir.Node, ...]
    concat: ir.Node | None
    dequantize: ir.Node

    @property
    def result(self) -> ir.Value:
        return self.dequantize.outputs[0]

    @property
    def scale(self) -> float:
        return _number(self.dequantize.inputs[1])

    @property
    def low(self) -> float:
        """The smallest value that the levels stand for."""
        zero = array_of(self.dequantize.inputs[2])
        assert zero is not None  # _find_pairs has checked it
        return self.scale * (np.iinfo(zero.dtype).min - float(zero.item()))

    @property
    def high(self) -> float:
        """The largest value that the levels stand for."""
        return self.low + 255 * self.scale


def adapt(model: ir.Model) -> None:
    """Rewrite an int8 graph whose other values are float32, in place. Names and types of inputs and outputs stay."""
    from onnx_ir.passes import common as passes

    editor = Editor(model.graph)
    pairs = {pair.result: pair for pair in _find_pairs(model.graph)}
    for pair in pairs.values():
        _use_all_levels(editor, pair)
    integer = _integer_nodes(model.graph, pairs)
    for node in tuple(model.graph):
        if node.op_type == "Conv" and node not in integer and _is_product(node, pairs):
            integer.add(_as_product(editor, node, pairs))
    for node in tuple(model.graph):
        if node not in integer:
            _restore(editor, node)
        elif node.op_type == "MatMul":
            _round_parameters(editor, node, pairs)
            _keep_bias_apart(editor, node)
        elif node.op_type == "Add":
            _round_branch(editor, node, pairs)
        else:
            _round_parameters(editor, node, pairs)
    for pair in pairs.values():
        _read_floats(pair, integer)
        _let_rounding_clip(pair)
    passes.RemoveUnusedNodesPass()(model)
    passes.TopologicalSortPass()(model)


# ---- pairs


def _find_pairs(graph: ir.Graph) -> Iterable[_Pair]:
    """Yield the Q/DQ pairs of activations that have one signed scale."""
    for node in graph:
        if node.op_type != "DequantizeLinear" or node.inputs[0] is None or _weight_of(node.outputs[0]) is not None:
            continue
        concat = producer_of(node.inputs[0], "Concat")
        parts = node.inputs[:1] if concat is None else concat.inputs
        quantize = [producer_of(part, "QuantizeLinear") for part in parts]
        found = tuple(q for q in quantize if q is not None and _is_symmetric(q))
        if len(found) == len(quantize) and _is_symmetric(node) and all(only_reader(q.outputs[0]) for q in found):
            yield _Pair(found, concat, node)


def _is_symmetric(node: ir.Node) -> bool:
    """Return whether a Q or DQ has one scale and signed levels around 0."""
    scale, zero = array_of(node.inputs[1]), array_of(node.inputs[2]) if len(node.inputs) > 2 else None
    return scale is not None and scale.size == 1 and zero is not None and zero.dtype == np.int8 and not zero.any()


def _use_all_levels(editor: Editor, pair: _Pair) -> None:
    """Make a pair unsigned, with all its levels where values may be."""
    import onnx_ir as ir

    readers = tuple(pair.result.uses())
    if all(use.node.op_type == "MatMul" and use.idx == 1 for use in readers):
        return  # x86-64 has instructions for unsigned times signed
    reach = 127 * pair.scale
    low = max(-reach, min(_lowest(q.inputs[0]) for q in pair.quantize))
    high = min(reach, max(_highest(q.inputs[0]) for q in pair.quantize))
    scale, zero = _levels(low, high) if low > -reach else (pair.scale, _SIGNED_ZERO)
    parameters = [
        editor.constant(np.asarray(scale, np.float32), pair.result),
        editor.constant(np.asarray(zero, np.uint8), pair.result),
    ]
    for node in (*pair.quantize, pair.dequantize):
        for index, parameter in enumerate(parameters, start=1):
            node.replace_input_with(index, parameter)
    for node in (*pair.quantize, *([] if pair.concat is None else [pair.concat])):
        node.outputs[0].dtype = ir.DataType.UINT8


def _levels(low: float, high: float) -> tuple[float, int]:
    """Return the scale and the zero point of unsigned levels from low to high, which has 0 in it."""
    scale = (high - low) / 255
    return scale, int(np.clip(np.rint(-low / scale), 0, 255))


def _lowest(value: ir.Value | None) -> float:
    """Return a number that a value is never below."""
    node = None if value is None else value.producer()
    while node is not None and node.op_type in _KEEP_LOWEST and node.inputs[0] is not None:
        node = node.inputs[0].producer()
    if node is None:
        return -np.inf
    if node.op_type == "Clip":
        bound = array_of(node.inputs[1]) if len(node.inputs) > 1 else None
        return min(0.0, float(bound.item())) if bound is not None and bound.size == 1 else -np.inf
    if node.op_type == "Mul" and any(
        (gate := producer_of(a, "Sigmoid")) is not None and gate.inputs[0] is b for a, b in permutations(node.inputs)
    ):
        return _LOWEST_SILU
    if node.op_type == "Concat":
        return min(_lowest(part) for part in node.inputs)
    return _LOWEST.get(node.op_type, -np.inf)


def _highest(value: ir.Value | None) -> float:
    """Return a number that a value is never above: the upper bound of a Clip."""
    node = producer_of(value, "Clip")
    bound = None if node is None or len(node.inputs) < 3 else array_of(node.inputs[2])
    return float(bound.item()) if bound is not None and bound.size == 1 and bound > 0 else np.inf


def _weight_of(value: ir.Value | None) -> NDArray[Any] | None:
    """Return the 8-bit constant that a value is dequantised from; None if it is none."""
    node = producer_of(value, "DequantizeLinear")
    return None if node is None else array_of(node.inputs[0])


def _number(value: ir.Value | None) -> float:
    array = array_of(value)
    assert array is not None  # _find_pairs has checked it
    return float(array.item())


# ---- which nodes become integer kernels


def _integer_nodes(graph: ir.Graph, pairs: dict[ir.Value, _Pair]) -> set[ir.Node]:
    """Return the Convs, Adds and matrix products that ONNX Runtime will compute in integers.

    A Conv whose neighbours all are float is not among them: rounding its input and its result takes what it saves.
    """
    products = {node for node in graph if node.op_type in _PRODUCTS and _has_integer_inputs(node, pairs)}
    convs = {node for node in graph if node.op_type == "Conv" and _has_integer_inputs(node, pairs)}
    adds = {node for node in graph if node.op_type == "Add" and _branch_of(node, convs, pairs) is not None}
    chosen = adds | {n for n in convs if _rounding(n.outputs[0]) is not None or only_reader(n.outputs[0]) in adds}
    while lonely := {node for node in chosen if not _has_neighbour(node, chosen | products, pairs)}:
        chosen -= lonely
    return chosen | products


def _has_integer_inputs(node: ir.Node, pairs: dict[ir.Value, _Pair]) -> bool:
    """Return whether a layer reads a Q/DQ pair, and a second one or constants that integer kernels take."""
    first, second = node.inputs[:2]
    if first not in pairs or second is None:
        return False
    weight = _weight_of(second)
    if weight is None:
        return node.op_type == "MatMul" and second in pairs
    dequantize = second.producer()
    assert dequantize is not None  # _weight_of has looked at it
    scales = array_of(dequantize.inputs[1])
    zero = array_of(dequantize.inputs[2]) if len(dequantize.inputs) > 2 else None
    if weight.dtype != np.int8 or scales is None or scales.ndim > 1 or (zero is not None and zero.any()):
        return False
    transposed = node.op_type == "Conv" or integer_attribute(node, "transB", 0) == 1
    channels = 0 if transposed else 1
    if scales.size > 1 and integer_attribute(dequantize, "axis", 1) % weight.ndim != channels:
        return False
    if node.op_type == "MatMul":
        return weight.ndim == 2
    if any(name in node.attributes and node.attributes[name].value != 1 for name in ("alpha", "beta")):
        return False
    if len(node.inputs) < 3:
        return True
    bias = array_of(node.inputs[2])
    if bias is None or bias.shape != weight.shape[channels : channels + 1]:
        return False
    with np.errstate(all="ignore"):  # a scale of 0 makes infinities and NaN, which are not below
        return float(np.abs(bias / (pairs[first].scale * scales)).max(initial=0.0)) < _LARGEST_BIAS


def _rounding(value: ir.Value) -> ir.Node | None:
    """Return the Q that is alone in reading a value, also behind a ReLU, a Clip or a max pooling."""
    node = only_reader(value)
    while node is not None and node.op_type in _BEFORE_ROUNDING:
        node = only_reader(node.outputs[0])
    return node if node is not None and node.op_type == "QuantizeLinear" else None


def _branch_of(add: ir.Node, convs: set[ir.Node], pairs: dict[ir.Value, _Pair]) -> ir.Value | None:
    """Return the input of a residual Add that a Conv makes for it alone, if the other input and the sum are rounded."""
    q = _rounding(add.outputs[0])
    if q is None or not any(q in pair.quantize for pair in pairs.values()):
        return None
    for branch, skip in (add.inputs, reversed(add.inputs)):
        if branch is not None and branch.producer() in convs and only_reader(branch) is add and skip in pairs:
            return branch
    return None


def _maker_of(value: ir.Value | None) -> ir.Node | None:
    """Return the node that makes a value, looking through ReLUs, Clips and max pooling."""
    node = None if value is None else value.producer()
    while node is not None and node.op_type in _BEFORE_ROUNDING and node.inputs[0] is not None:
        node = node.inputs[0].producer()
    return node


def _has_neighbour(node: ir.Node, integer: set[ir.Node], pairs: dict[ir.Value, _Pair]) -> bool:
    """Return whether a layer before or behind a node is computed in integers too."""
    before = {_maker_of(q.inputs[0]) for value in node.inputs if value in pairs for q in pairs[value].quantize}
    before |= {value.producer() for value in node.inputs if value is not None}  # the Conv before an Add
    q, behind = _rounding(node.outputs[0]), {only_reader(node.outputs[0])}
    for pair in pairs.values() if q is not None else ():
        if q in pair.quantize:
            behind |= {use.node for use in pair.result.uses()}
    return not integer.isdisjoint(before | behind)


# ---- rewriting


def _round_branch(editor: Editor, add: ir.Node, pairs: dict[ir.Value, _Pair]) -> None:
    """Put a Q/DQ pair between a Conv and a residual Add.

    Its bounds are those of the sum less those of the skip branch: what lies outside, the Q behind the sum cuts off anyway.
    """
    branch = next(value for value in add.inputs if value not in pairs and value is not None)
    skip = next(pairs[value] for value in add.inputs if value in pairs)
    q = _rounding(add.outputs[0])
    total = next(pair for pair in pairs.values() if q in pair.quantize)
    scale, zero = _levels(total.low - skip.high, total.high - skip.low)
    parameters = [
        editor.constant(np.asarray(scale, np.float32), branch),
        editor.constant(np.asarray(zero, np.uint8), branch),
    ]
    index = list(add.inputs).index(branch)
    levels = editor.node("QuantizeLinear", [branch, *parameters], "UINT8", branch)
    result = editor.node("DequantizeLinear", [levels, *parameters], "FLOAT", branch)
    add.replace_input_with(index, result)


def _round_parameters(editor: Editor, node: ir.Node, pairs: dict[ir.Value, _Pair]) -> None:
    """Give a layer a bias of 32 bits, in units of its products, and its weight zero points."""
    weight = _weight_of(node.inputs[1])
    if weight is None:
        return
    dequantize = node.inputs[1].producer()  # type: ignore[union-attr]
    assert dequantize is not None  # _weight_of has looked at it
    scales = np.asarray(array_of(dequantize.inputs[1]), np.float32)
    if len(dequantize.inputs) < 3 or dequantize.inputs[2] is None:
        dequantize.resize_inputs(3)
        dequantize.replace_input_with(2, editor.constant(np.zeros(scales.shape, np.int8), dequantize.outputs[0]))
    bias = array_of(node.inputs[2]) if len(node.inputs) > 2 else None
    if bias is None or node.inputs[0] not in pairs:
        return
    steps = np.broadcast_to(np.float32(pairs[node.inputs[0]].scale) * scales, bias.shape)
    near = node.outputs[0]
    rounded = [
        editor.constant(np.rint(bias / steps).astype(np.int32), near),
        editor.constant(np.ascontiguousarray(steps, np.float32), near),
        editor.constant(np.zeros(bias.shape, np.int32), near),
    ]
    node.replace_input_with(2, editor.node("DequantizeLinear", rounded, "FLOAT", near, before=node, axis=0))


def _keep_bias_apart(editor: Editor, product: ir.Node) -> None:
    """Give the bias behind a matrix product leading axes of size 1.

    ONNX Runtime makes a Gemm of a product and a bias with one axis, before it looks for integer kernels, and has none then.
    """
    add = only_reader(product.outputs[0])
    if add is None or add.op_type != "Add":
        return
    index = 1 - list(add.inputs).index(product.outputs[0])
    bias, shape = array_of(add.inputs[index]), product.outputs[0].shape
    if bias is not None and bias.ndim == 1 and shape is not None and len(shape) > 2:
        apart = bias.astype(np.float32).reshape([1] * (len(shape) - 1) + [-1])
        add.replace_input_with(index, editor.constant(apart, add.outputs[0]))


def _is_product(conv: ir.Node, pairs: dict[ir.Value, _Pair]) -> bool:
    """Return whether a Conv is a product of matrices: 1x1, no stride, and one group."""
    weight = _weight_of(conv.inputs[1])
    if conv.inputs[0] not in pairs or weight is None or weight.ndim != 4 or not _has_integer_inputs(conv, pairs):
        return False
    pair = pairs[conv.inputs[0]]
    return (
        pair.concat is None
        and weight.shape[2:] == (1, 1)
        and min(weight.shape[:2]) >= _PRODUCT_CHANNELS
        and integer_attribute(conv, "group", 1) == 1
        and all(
            name not in conv.attributes or set(conv.attributes[name].as_ints()) <= {value}
            for name, value in (("strides", 1), ("pads", 0))
        )
    )


def _as_product(editor: Editor, conv: ir.Node, pairs: dict[ir.Value, _Pair]) -> ir.Node:
    """Replace a 1x1 Conv by a product of matrices on channels-last values, and return the product."""
    pair, output, weight = pairs[conv.inputs[0]], conv.outputs[0], conv.inputs[1]  # type: ignore[index]
    matrix = np.asarray(_weight_of(weight))[:, :, 0, 0].T
    scales = np.asarray(array_of(weight.producer().inputs[1]), np.float32)  # type: ignore[union-attr]
    levels = editor.node("Transpose", [pair.quantize[0].outputs[0]], "UINT8", output, perm=[0, 2, 3, 1])
    first = editor.node("DequantizeLinear", [levels, *pair.dequantize.inputs[1:]], "FLOAT", output)
    constants = [
        editor.constant(np.ascontiguousarray(matrix), output),
        editor.constant(scales, output),
        editor.constant(np.zeros(scales.shape, np.int8), output),
    ]
    second = editor.node("DequantizeLinear", constants, "FLOAT", output, before=conv, axis=1)
    product = result = editor.node("MatMul", [first, second], "FLOAT", output, before=conv)
    if len(conv.inputs) > 2:
        bias = np.asarray(array_of(conv.inputs[2]), np.float32).reshape(1, 1, 1, -1)  # as in _keep_bias_apart
        result = editor.node("Add", [result, editor.constant(bias, output)], "FLOAT", output, before=conv)
    result = editor.node("Transpose", [result], "FLOAT", output, before=conv, perm=[0, 3, 1, 2])
    result.shape = output.shape
    name = output.name
    output.replace_all_uses_with(result, replace_graph_outputs=True)
    editor.graph.remove(conv, safe=True)
    result.name = name
    node = product.producer()
    assert node is not None
    return node


def _restore(editor: Editor, node: ir.Node) -> None:
    """Let a layer read its weights as float32: 8-bit levels times scales, which ONNX Runtime multiplies when it loads."""
    import onnx_ir as ir

    if node.op_type not in _LAYERS:
        return
    for index, value in enumerate(node.inputs):
        weight = _weight_of(value)
        if value is None or weight is None:
            continue
        dequantize = value.producer()
        assert dequantize is not None  # _weight_of has looked at it
        scales = np.asarray(array_of(dequantize.inputs[1]), np.float32)
        zero = array_of(dequantize.inputs[2]) if len(dequantize.inputs) > 2 else None
        if scales.ndim > 1 or (zero is not None and zero.astype(np.float32).any()):
            continue
        shape = [1] * weight.ndim
        if scales.size > 1:
            shape[integer_attribute(dequantize, "axis", 1)] = -1
        levels = editor.node("Cast", [dequantize.inputs[0]], "FLOAT", value, before=node, to=int(ir.DataType.FLOAT))
        steps = editor.constant(scales.reshape(shape), value)
        node.replace_input_with(index, editor.node("Mul", [levels, steps], "FLOAT", value, before=node))


def _read_floats(pair: _Pair, integer: set[ir.Node]) -> None:
    """Let float nodes read what a pair rounds, unless only the rounded values will exist."""
    if pair.concat is not None:
        return
    (q,) = pair.quantize
    source, maker = q.inputs[0], _maker_of(q.inputs[0])
    fused = maker in integer and maker.op_type not in _PRODUCTS  # type: ignore[union-attr]
    for use in tuple(pair.result.uses()) if not fused and source is not None else ():
        if use.node not in integer:
            use.node.replace_input_with(use.idx, source)


def _let_rounding_clip(pair: _Pair) -> None:
    """Remove a ReLU or Clip that only a Q reads and whose bounds the levels keep."""
    for q in pair.quantize:
        node = producer_of(q.inputs[0], "Relu", "Clip")
        if node is None or only_reader(node.outputs[0]) is not q or pair.low < 0:
            continue
        if node.op_type == "Relu" or (_lowest(node.outputs[0]) == 0 and _highest(node.outputs[0]) >= pair.high):
            q.replace_input_with(0, node.inputs[0])
