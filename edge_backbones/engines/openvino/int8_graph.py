"""Rewrite an int8 graph for OpenVINO, in the places where the graph is written the way that TensorRT needs it.

- TensorRT takes signed 8-bit tensors only. After a ReLU, half of their levels are unused. With unsigned tensors, all
  256 levels cover the same range, and rounding noise drops to a quarter. For resnet50: 2.5 dB in the last stage, and 6
  % faster.
- Rounding to unsigned 8 bits cuts off negative values, so a ReLU before it that has no other reader is removed.
  resnet50 has 45 of them, which took 2 % of the time. The same holds for a ReLU6 whose upper bound is the largest level.
- If a Q follows a max pooling, TensorRT moves the Q before the pooling. OpenVINO does not: the convolution would write
  floats, and the pooling would read them. The values stay the same, because rounding keeps the order. For resnet50: 4
  %.
- If a Q follows the Transpose of the keys of attention, the product cannot read them as they are: OpenVINO would transpose
  8-bit numbers with its slowest kernel. Behind the Q, the Transpose becomes part of the product. For swin_tiny: 3 to 5 %.

One thing is left as it is: the addition of an identity block is a kernel of its own (2.4 % of resnet50). OpenVINO fuses it
into the convolution before it only if its code generator (snippets) does not take it first, which is so where a Q follows
the convolution or where the generator is switched off. Either way the network takes as long: 0.99 to 1.01 times, on one and
two threads.

The models are as OpenVINO reads ONNX: Q is a FakeQuantize to [-128, 127] and a Convert to i8; DQ is a Convert, a
Subtract of 0 and a Multiply. (Times: OpenVINO 2026.4, two AVX512-VNNI cores.)
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from edge_backbones.engines.openvino.session import load_library

if TYPE_CHECKING:
    import openvino

# Operations whose result is never negative if their first input is not.
_KEEP_SIGN = frozenset({
    "AvgPool", "Convert", "MaxPool", "ReduceMean", "Reshape", "Squeeze", "Transpose", "Unsqueeze",
})  # fmt: skip

_ACTIVATIONS = frozenset({"Add", "Clamp", "Convert", "Maximum", "Minimum", "Relu"})  # and the addition of a bias


class _Pair(NamedTuple):
    """Hold a Q/DQ pair with one scale: its FakeQuantize and its Multiply."""

    quantize: Any
    last: Any
    scale: float


class _Clip(NamedTuple):
    """Hold what a node clips, and its bounds."""

    input: Any
    low: float
    high: float


class _Operands(NamedTuple):
    """Hold the operands of a node with a constant scalar."""

    other: Any
    value: float


def adapt(model: openvino.Model) -> None:
    """Rewrite an int8 graph for the CPU, in place."""
    _quantize_before_moving(model)
    _use_all_levels(model)
    model.validate_nodes_and_infer_types()


def _quantize_before_moving(model: openvino.Model) -> None:
    """Move Q/DQ pairs from behind a max pooling, or a Transpose of keys, to before it."""
    for quantize, last, _ in _pairs(model):
        entry = quantize.input(0)
        moved = entry.get_source_output().get_node()
        if moved.get_type_name() == "Convert" and _only_reader(moved) is not None:
            entry = moved.input(0)
            moved = entry.get_source_output().get_node()
        readers = last.output(0).get_target_inputs()
        if _only_reader(moved) is None or not (
            moved.get_type_name() == "MaxPool"
            or (_swaps_last_axes(moved) and {_type(one) for one in readers} == {"MatMul"})
        ):
            continue
        entry.replace_source_output(moved.input_value(0))
        moved.input(0).replace_source_output(last.output(0))
        for reader in readers:
            reader.replace_source_output(moved.output(0))


def _swaps_last_axes(node: Any) -> bool:
    order = node.input_value(1).get_node() if node.get_type_name() == "Transpose" else None
    if order is None or order.get_type_name() != "Constant":
        return False
    axes = [int(axis) for axis in np.ravel(order.data)]
    kept = list(range(len(axes)))[:-2]
    return axes == [*kept, len(axes) - 1, len(axes) - 2]


def _use_all_levels(model: openvino.Model) -> None:
    """Make Q/DQ pairs unsigned if their input is never negative.

    A pair is written as one node where that is faster: ResNets gain 1 %. Behind a depthwise convolution it would cost
    EfficientNet-Lite0 2 % or more.
    """
    ops = load_library().opset13

    for quantize, last, scale in _pairs(model):
        readers = last.output(0).get_target_inputs()
        # A Concat stays in 8 bits only if all its parts have the same scale.
        if not _never_negative(quantize.input_value(0)) or any(_type(reader) == "Concat" for reader in readers):
            continue
        step = scale * 127 / 255
        source = ops.convert(_before_relu(quantize, step), "f32")
        if _is_behind_depthwise(source):
            levels = ops.fake_quantize(source, *_constants(0, 255 * step, 0, 255), 256)
            values = ops.multiply(ops.convert(ops.convert(levels, "u8"), "f32"), *_constants(step))
        else:
            values = ops.fake_quantize(source, *_constants(0, 255 * step, 0, 255 * step), 256)
        replacement = ops.convert(values, last.output(0).get_element_type()).output(0)
        for reader in readers:
            reader.replace_source_output(replacement)


def _constants(*values: float) -> list[Any]:
    return [load_library().opset13.constant(np.array(value, np.float32)) for value in values]


def _is_behind_depthwise(node: Any) -> bool:
    """Return whether a node gets the result of a depthwise convolution, with its bias and activation."""
    while node.get_type_name() in _ACTIVATIONS:
        node = node.input_value(0).get_node()
    return bool(node.get_type_name() == "GroupConvolution")


def _before_relu(quantize: Any, step: float) -> Any:
    """Return the input of the ReLU before a Q if the Q is its only reader and does all that it does.

    Otherwise return the Q's own input. ``step``: of the Q's 256 levels from 0 on.
    """
    node = quantize.input_value(0).get_node()
    if node.get_type_name() == "Convert" and _only_reader(node) is not None:
        node = node.input_value(0).get_node()
    clip = None if _only_reader(node) is None else _clip_of(node)
    # What lies above the bound of a ReLU6 has to become the same level as the bound itself.
    return clip.input if clip is not None and clip.low == 0 and clip.high >= 254.5 * step else quantize.input_value(0)


def _clip_of(node: Any) -> _Clip | None:
    """Return what a ReLU, a ReLU6 or another Clip does; None for any other node."""
    kind = node.get_type_name()
    if kind == "Relu":
        return _Clip(node.input_value(0), 0.0, math.inf)
    if kind == "Clamp":
        bounds = node.get_attributes()
        return _Clip(node.input_value(0), bounds["min"], bounds["max"])
    # An ONNX Clip is read as a Minimum of a Maximum.
    if kind != "Minimum" or (upper := _constant_operand(node)) is None:
        return None
    inner = upper.other.get_node()
    lower = _constant_operand(inner) if inner.get_type_name() == "Maximum" else None
    return None if lower is None else _Clip(lower.other, lower.value, upper.value)


def _constant_operand(node: Any) -> _Operands | None:
    for index in (0, 1):
        if (value := _scalar(node, index)) is not None:
            return _Operands(node.input_value(1 - index), value)
    return None


def _pairs(model: openvino.Model) -> list[_Pair]:
    """Return the Q/DQ pairs of activations, in graph order."""
    load_library()
    found = []
    for quantize in model.get_ordered_ops():
        if quantize.get_type_name() != "FakeQuantize" or [_scalar(quantize, 3), _scalar(quantize, 4)] != [-128, 127]:
            continue
        node: Any = quantize
        for kind in ("Convert", "Convert", "Subtract", "Multiply"):
            reader = _only_reader(node)
            node = None if reader is None or _type(reader) != kind else reader.get_node()
            if node is None or (kind == "Subtract" and _scalar(node, 1) != 0):
                break
        else:
            if (scale := _scalar(node, 1)) is not None:
                found.append(_Pair(quantize, node, scale))
    return found


def _only_reader(node: Any) -> Any | None:
    readers = list(node.output(0).get_target_inputs())
    return readers[0] if len(readers) == 1 else None


def _type(reader: Any) -> str:
    return str(reader.get_node().get_type_name())


def _never_negative(output: Any) -> bool:
    node = output.get_node()
    while node.get_type_name() in _KEEP_SIGN:
        node = node.input_value(0).get_node()
    clip = _clip_of(node)
    return clip is not None and clip.low >= 0


def _scalar(node: Any, index: int) -> float | None:
    """Return the single value of a constant input, looking through conversions; None for any other input."""
    source = node.input_value(index).get_node()
    while source.get_type_name() == "Convert":
        source = source.input_value(0).get_node()
    if source.get_type_name() != "Constant" or np.size(source.data) != 1:
        return None
    return float(np.asarray(source.data).item())
