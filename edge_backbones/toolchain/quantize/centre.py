"""Centre activations: subtract the middle of a tensor's range before it is quantised, so that no int8 level is left unused.

int8 is symmetric here, because TensorRT takes no zero points. GELU, SiLU and hard swish give values from -0.4 at the
lowest to large positive ones: of 255 levels nearly half would stand for values that never come. A layer reads the centred
tensor at no cost, W x + b = W (x - c) + (b + c W 1): the sum over its inputs goes into the bias, of the rounded weights where
they are rounded (`shift_for_rounding`; of the others the errors of all weights would add up). Not where a convolution pads,
since it pads with zeros, which are -c here.

Nothing is done behind a ReLU, whose range begins at 0: the engine for CPUs gives it unsigned levels
(:mod:`edge_backbones.engines.openvino.int8_graph`), and TensorRT fuses the ReLU into the convolution before it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from pathlib import Path

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common as passes

from edge_backbones.errors import QuantizationError
from edge_backbones.spec import Precision
from edge_backbones.toolchain.artifacts import ExportedGraph
from edge_backbones.toolchain.quantize.formats import scales_of
from edge_backbones.toolchain.quantize.onnx_edits import (
    add_constant,
    constant_of,
    insert_after,
    is_constant,
    load_graph,
    new_node,
)
from edge_backbones.toolchain.quantize.placement import output_channel_axis, quantized_layers

# Behind the first an engine moves a Q, or puts it elsewhere; behind the next it rounds in the kernel of the layer itself,
# which a Sub between the two would prevent; behind the last no value is negative, as a rule.
_NOT_BEHIND = frozenset({
    "Concat", "Flatten", "MaxPool", "Reshape", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze",
    "Add", "Conv", "Gemm", "MatMul",
    "AveragePool", "Clip", "Relu",
})  # fmt: skip
_LEVELS = 127
_LARGEST_SHARE = 0.5  # of one side's reach in the other's: with more, centring gains less than 2.5 dB


def centred_name(tensor: str) -> str:
    """Return the name of a tensor after its centre was subtracted."""
    return f"{tensor}.centred"


def tensors_to_centre(graph: ExportedGraph) -> tuple[str, ...]:
    """Name the tensors whose readers in int8 all take a centre into their biases, in graph order."""
    return tuple(_readers(load_graph(graph), graph))


def centre_of(lowest: float, highest: float) -> tuple[float, float] | None:
    """Return the centre of a range and the |x - centre| that becomes 127; None for a range that gains nothing by one.

    0 stays a level, since many activations are exactly 0. A centre is a number of half precision other than 0.
    """
    if not np.isfinite([lowest, highest]).all():
        return None  # `ranges.collect_magnitudes` refuses such a tensor by name
    if not highest > lowest or min(-lowest, highest) > _LARGEST_SHARE * max(-lowest, highest):
        return None
    lowest, highest = min(lowest, 0.0), max(highest, 0.0)
    step = float(scales_of(np.asarray((highest - lowest) / 2), Precision.INT8))
    middle = step * round((lowest + highest) / 2 / step)
    if not 0 < abs(middle) <= float(np.finfo(np.float16).max):
        return None
    return float(np.float16(middle)), step * _LEVELS


def write_centred_graph(
    graph: ExportedGraph, centres: Mapping[str, float], path: Path, *, excluded: Collection[str] = ()
) -> ExportedGraph:
    """Write the same network to ``path``, with these centres subtracted from tensors and added to their readers' biases.

    ``excluded``: names of layers that go on reading the tensors themselves, because half precision has its finest steps at
    0. The centred tensors are called as `centred_name` says. Nothing else changes but rounding in the last bits of fp32.
    Raises QuantizationError for a tensor that takes no centre.
    """
    model = load_graph(graph)
    readers = _readers(model, graph)
    if unknown := sorted(centres.keys() - readers.keys()):
        raise QuantizationError(
            f"the calibration has a centre for {unknown[0]!r}, which takes none in this graph: calibrate again with --images"
        )
    for name, centre in centres.items():
        value, layers = readers[name][0], [layer for layer in readers[name][1] if layer.name not in excluded]
        if not layers:
            continue
        constant = add_constant(model.graph, f"{name}.centre", np.asarray(centre, np.float32))
        subtract = new_node("Sub", [value, constant], centred_name(name), ir.DataType.FLOAT)
        insert_after(model.graph, value, [subtract])
        for layer in layers:
            layer.replace_input_with(0, subtract.outputs[0])
            _shift_bias(model.graph, layer, centre, constant_of(layer.inputs[1]), "centred")
    passes.RemoveUnusedNodesPass()(model)  # removes the biases that were replaced
    ir.save(model, path)
    return dataclasses.replace(graph, path=path)


def centre_before(layer: ir.Node) -> float | None:
    """Return the centre that was subtracted from what a layer reads; None if none was."""
    value = layer.inputs[0]
    producer = None if value is None else value.producer()
    if value is None or producer is None or producer.op_type != "Sub" or not is_constant(producer.inputs[1]):
        return None
    subtracted_from = producer.inputs[0]
    named = subtracted_from is not None and value.name == centred_name(str(subtracted_from.name))
    return float(constant_of(producer.inputs[1])) if named else None


def shift_for_rounding(
    graph: ir.Graph, layer: ir.Node, centre: float, step: float, weight: np.ndarray, rounded: np.ndarray
) -> None:
    """Make a layer's bias that of its rounded weights and of a rounded 0, so that 0 is exact: many activations are 0.

    ``centre``: as `centre_before` returns it. ``step``: of the tensor in int8. ``rounded``: the layer's weights as they are
    dequantised.
    """
    zero = step * round(centre / step)
    _shift_bias(graph, layer, 1.0, zero * rounded - centre * weight, "rounded")


def _shift_bias(graph: ir.Graph, layer: ir.Node, centre: float, weight: np.ndarray, suffix: str) -> None:
    """Add to a layer's bias what its weights make of a centre. The bias gets a constant of its own: it may be shared."""
    axis = output_channel_axis(layer)
    shift = centre * weight.sum(axis=tuple(other for other in range(weight.ndim) if other != axis), dtype=np.float64)
    node, index = _bias_of(layer)
    bias = 0.0 if node.inputs[index] is None else constant_of(node.inputs[index]).astype(np.float64)
    shifted = add_constant(graph, f"{layer.name}.{suffix}", (bias + shift).astype(np.float32))
    node.replace_input_with(index, shifted)


def _readers(model: ir.Model, graph: ExportedGraph) -> dict[str, tuple[ir.Value, list[ir.Node]]]:
    """Return the tensors that take a centre, each with the layers that read it in int8."""
    nodes = {str(node.name): node for node in model.graph}
    by_tensor: dict[str, list[tuple[ir.Node, bool]]] = {}
    for layer in quantized_layers(graph):
        by_tensor.setdefault(layer.tensor, []).append((nodes[layer.name], layer.weighted))
    found = {}
    for name, layers in by_tensor.items():
        value = next(v for node, _ in layers for v in node.inputs if v is not None and v.name == name)
        producer = value.producer()
        if producer is None or producer.op_type in _NOT_BEHIND:
            continue
        if all(weighted and _takes_centre(node) for node, weighted in layers):
            found[name] = (value, list(dict.fromkeys(node for node, _ in layers)))
    return found


def _takes_centre(layer: ir.Node) -> bool:
    """Return whether a layer has a bias, or may have one, and pads with nothing."""
    attributes = layer.attributes
    if layer.op_type == "Conv":
        pads = attributes["pads"].as_ints() if "pads" in attributes else ()
        padding = attributes["auto_pad"].as_string() if "auto_pad" in attributes else "NOTSET"
        has_bias = len(layer.inputs) > 2 and layer.inputs[2] is not None
        return not any(pads) and padding in ("NOTSET", "VALID") and (not has_bias or is_constant(layer.inputs[2]))
    if layer.op_type == "Gemm":
        factors = [attributes[name].as_float() for name in ("alpha", "beta") if name in attributes]
        return all(factor == 1 for factor in factors) and len(layer.inputs) > 2 and is_constant(layer.inputs[2])
    return _adding(layer) is not None


def _adding(matmul: ir.Node) -> ir.Node | None:
    """Return the Add of a constant that alone reads a product."""
    output = matmul.outputs[0]
    uses = tuple(output.uses())
    if len(uses) != 1 or output.is_graph_output() or uses[0].node.op_type != "Add":
        return None
    return uses[0].node if any(is_constant(value) for value in uses[0].node.inputs) else None


def _bias_of(layer: ir.Node) -> tuple[ir.Node, int]:
    """Return the node whose input is a layer's bias, and the index of that input."""
    if layer.op_type == "MatMul":
        add = _adding(layer)
        assert add is not None  # _takes_centre has checked it
        return add, next(index for index, value in enumerate(add.inputs) if is_constant(value))
    if len(layer.inputs) < 3:
        layer.resize_inputs(3)
    return layer, 2
