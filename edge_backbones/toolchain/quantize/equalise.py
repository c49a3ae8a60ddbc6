"""Equalise channels: move scales out of a node into the layers that read it, so that one large channel sets no int8 step.

SmoothQuant (Xiao et al. 2022, section 4): x W = (x / s)(s W), and a LayerNormalization divides for nothing, by its own
scale and bias. On a transformer and a ConvNeXt trained on digits this brings 1 to 2 dB to the feature maps.

A convolution divides for nothing too, and ReLU(x / s) = ReLU(x) / s (cross-layer equalisation, Nagel et al. 2019, section
4.1). That is what a depthwise convolution reads and gives in the early blocks of a MobileNetV3, which have no hard swish
and mostly no gate (neither takes a scale). With random weights it brings 1 to 4 dB to the stages of these blocks, to
mobilenetv3_large_100 trained on digits 3 dB in the last stage. Where neither layer is depthwise nothing is done: there it
brought nothing that could be measured.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common as passes

from edge_backbones.errors import QuantizationError
from edge_backbones.toolchain.artifacts import ExportedGraph
from edge_backbones.toolchain.quantize.onnx_edits import add_constant, constant_of, load_graph
from edge_backbones.toolchain.quantize.placement import input_channel_axis, is_depthwise, quantized_layers

# A factor is (largest of a channel / largest of all) to this power. 0.75 was the best of 0.5, 0.75, 0.9 and 1 on vit and
# convnext; 0.5 was better than 0.75 on mobilenetv3, small and large.
_STRENGTHS = {"LayerNormalization": 0.75, "Conv": 0.5}
_SMALLEST = 1 / 256  # for a channel that is nearly silent on the calibration images: on others it may not be


@dataclass(frozen=True)
class _Site:
    """A node that takes a scale, its tensor that layers read, the channel axis of that tensor, and those layers."""

    source: ir.Node
    tensor: ir.Value
    axis: int
    readers: tuple[ir.Node, ...]


class Channels(NamedTuple):
    """The channel axis of a tensor, and how much of the difference between channels is taken away: 0 nothing, 1 all."""

    axis: int
    strength: float


def tensors_to_equalise(graph: ExportedGraph) -> dict[str, Channels]:
    """Return the tensors whose channels can be scaled without a node more in the graph."""
    sites = _sites(load_graph(graph), graph)
    return {str(site.tensor.name): Channels(site.axis, _STRENGTHS[site.source.op_type]) for site in sites}


def factors(largest: np.ndarray, strength: float) -> np.ndarray:
    """Return what each channel is divided by, float32 in (0, 1], from the largest |x| of each channel."""
    if not largest.any():
        return np.ones(len(largest), np.float32)
    share: np.ndarray = np.maximum(largest / largest.max(), _SMALLEST) ** strength
    return share.astype(np.float32)


def write_equalised_graph(graph: ExportedGraph, by_tensor: Mapping[str, Sequence[float]], path: Path) -> ExportedGraph:
    """Write the same network to ``path``, with these tensors divided by their factors and their readers' weights multiplied.

    Nothing else changes but rounding in the last bits of fp32. Raises QuantizationError for a tensor that takes no factors.
    """
    model = load_graph(graph)
    sites = {str(site.tensor.name): site for site in _sites(model, graph)}
    if unknown := sorted(by_tensor.keys() - sites.keys()):
        raise QuantizationError(
            f"the calibration has factors for {unknown[0]!r}, which takes none in this graph: calibrate again with --images"
        )
    for name, values in by_tensor.items():
        site, divisor = sites[name], np.asarray(values, np.float32)
        for index, value in enumerate(site.source.inputs[1:3], start=1):  # scale or weight, bias
            if value is not None:
                constant = constant_of(value).astype(np.float32)
                divided = constant / divisor.reshape(-1, *[1] * (constant.ndim - 1))
                site.source.replace_input_with(index, add_constant(model.graph, f"{name}.equalised.{index}", divided))
        for reader in site.readers:
            weight = constant_of(reader.inputs[1]).astype(np.float32)
            shape = [1] * weight.ndim
            shape[input_channel_axis(reader)] = -1
            multiplied = add_constant(model.graph, f"{reader.name}.equalised", weight * divisor.reshape(shape))
            reader.replace_input_with(1, multiplied)
    passes.RemoveUnusedNodesPass()(model)  # removes what was replaced
    ir.save(model, path)
    return dataclasses.replace(graph, path=path)


def _sites(model: ir.Model, graph: ExportedGraph) -> list[_Site]:
    """Find the norms and convolutions that take a scale and whose readers all take it back."""
    layers = {layer.name: layer.tensor for layer in quantized_layers(graph) if layer.weighted}
    found = []
    for node in model.graph:
        if _is_affine_norm(node):
            tensor, axis = _behind_permutations(node.outputs[0])
        elif _is_conv(node) and (relu := _only_reader(node.outputs[0])) is not None and relu.op_type == "Relu":
            tensor, axis = relu.outputs[0], 1
        else:
            continue
        readers = tuple(use.node for use in tensor.uses())
        if node.op_type == "Conv" and not (is_depthwise(node) or all(is_depthwise(reader) for reader in readers)):
            continue
        channels = len(constant_of(node.inputs[1]))
        if (
            readers
            and not tensor.is_graph_output()
            and all(layers.get(str(reader.name)) == tensor.name and _reads(reader, channels) for reader in readers)
        ):
            found.append(_Site(node, tensor, axis, readers))
    return found


def _is_conv(node: ir.Node) -> bool:
    return node.op_type == "Conv" and all(value is None or value.is_initializer() for value in node.inputs[1:])


def _is_affine_norm(node: ir.Node) -> bool:
    constants = node.inputs[1:3]
    return (
        node.op_type == "LayerNormalization"
        and len(constants) == 2
        and node.outputs[0].shape is not None
        and all(value is not None and value.is_initializer() and constant_of(value).ndim == 1 for value in constants)
    )


def _only_reader(value: ir.Value) -> ir.Node | None:
    uses = tuple(value.uses())
    return uses[0].node if len(uses) == 1 and not value.is_graph_output() else None


def _reads(layer: ir.Node, channels: int) -> bool:
    """Return whether a layer's weight has all channels of its input: a Conv in groups has fewer."""
    sizes: tuple[int, ...] = constant_of(layer.inputs[1]).shape
    return sizes[input_channel_axis(layer)] == channels


def _behind_permutations(value: ir.Value) -> tuple[ir.Value, int]:
    """Return the tensor behind the Transposes and Reshapes that alone read this one, and where its last axis went."""
    assert value.shape is not None  # _is_affine_norm has checked it
    axis = len(value.shape) - 1
    while (node := _only_reader(value)) is not None:
        output = node.outputs[0]
        if node.op_type == "Transpose":
            axis = list(node.attributes["perm"].as_ints()).index(axis)
        elif not (node.op_type == "Reshape" and _keeps_last_axis(value, output) and axis == len(value.shape or ()) - 1):
            break
        else:
            axis = len(output.shape or ()) - 1
        value = output
    return value, axis


def _keeps_last_axis(before: ir.Value, after: ir.Value) -> bool:
    if not before.shape or not after.shape:
        return False
    return isinstance(before.shape[-1], int) and before.shape[-1] == after.shape[-1]
