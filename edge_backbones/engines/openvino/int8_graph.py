"""What OpenVINO is given instead of three things that an int8 graph says the way TensorRT wants them.

- TensorRT takes signed 8-bit tensors alone. Behind a ReLU half of their levels lie idle; unsigned, all 256 serve the same
  range and the noise of rounding is a quarter. resnet50: 2.5 dB in its last stage, and 6 % faster.
- What rounds to unsigned 8 bits cuts off what is negative: a ReLU that nobody else reads is left out in front of it. resnet50
  has 45, which cost 2 %.
- Where a Q follows a max pooling, TensorRT moves it in front of it by itself. OpenVINO does not: there the convolution
  would write floats, and the pooling read them. The values are the same, for rounding keeps the order. resnet50: 4 %.

The models are as OpenVINO reads ONNX: Q is a FakeQuantize to [-128, 127] and a Convert to i8, DQ a Convert, a Subtract of 0
and a Multiply. (Times: OpenVINO 2026.4, two AVX512-VNNI cores.)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from edge_backbones.engines.openvino.session import load_library

if TYPE_CHECKING:
    import openvino

# Nodes whose result is not negative where their first input is not.
_KEEP_SIGN = frozenset({
    "AvgPool", "Convert", "MaxPool", "ReduceMean", "Reshape", "Squeeze", "Transpose", "Unsqueeze",
})  # fmt: skip


class _Pair(NamedTuple):
    """A Q/DQ pair of one scale: its FakeQuantize and its Multiply."""

    quantize: Any
    last: Any
    scale: float


def adapt(model: openvino.Model) -> None:
    """Rewrite an int8 graph for the CPU, in place."""
    _quantize_before_pooling(model)
    _use_all_levels(model)
    model.validate_nodes_and_infer_types()


def _quantize_before_pooling(model: openvino.Model) -> None:
    for quantize, last, _ in _pairs(model):
        entry = quantize.input(0)
        pooling = entry.get_source_output().get_node()
        if pooling.get_type_name() == "Convert" and _only_reader(pooling) is not None:
            entry = pooling.input(0)
            pooling = entry.get_source_output().get_node()
        if pooling.get_type_name() != "MaxPool" or _only_reader(pooling) is None:
            continue
        readers = last.output(0).get_target_inputs()
        entry.replace_source_output(pooling.input_value(0))
        pooling.input(0).replace_source_output(last.output(0))
        for reader in readers:
            reader.replace_source_output(pooling.output(0))


def _use_all_levels(model: openvino.Model) -> None:
    ops = load_library().opset13

    for quantize, last, scale in _pairs(model):
        readers = last.output(0).get_target_inputs()
        # A Concat stays one of 8 bits only where all its parts have the same scale.
        if not _never_negative(quantize.input_value(0)) or any(_type(reader) == "Concat" for reader in readers):
            continue
        step = scale * 127 / 255
        bounds = [ops.constant(np.array(value, np.float32)) for value in (0, 255 * step, 0, 255)]
        levels = ops.fake_quantize(ops.convert(_before_relu(quantize), "f32"), *bounds, 256)
        values = ops.multiply(ops.convert(ops.convert(levels, "u8"), "f32"), ops.constant(np.array(step, np.float32)))
        replacement = ops.convert(values, last.output(0).get_element_type()).output(0)
        for reader in readers:
            reader.replace_source_output(replacement)


def _before_relu(quantize: Any) -> Any:
    """What this node would read without the ReLU in front of it, where that serves it alone."""
    node = quantize.input_value(0).get_node()
    if node.get_type_name() == "Convert" and _only_reader(node) is not None:
        node = node.input_value(0).get_node()
    alone = node.get_type_name() == "Relu" and _only_reader(node) is not None
    return node.input_value(0) if alone else quantize.input_value(0)


def _pairs(model: openvino.Model) -> list[_Pair]:
    """The Q/DQ pairs of activations, in graph order."""
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
    if node.get_type_name() == "Clamp":
        return bool(node.get_attributes()["min"] >= 0)
    return bool(node.get_type_name() == "Relu")


def _scalar(node: Any, index: int) -> float | None:
    """The only value of a constant input, seen through conversions; None for any other input."""
    source = node.input_value(index).get_node()
    while source.get_type_name() == "Convert":
        source = source.input_value(0).get_node()
    if source.get_type_name() != "Constant" or np.size(source.data) != 1:
        return None
    return float(np.asarray(source.data).item())
