"""Scales moved out of a normalisation into the layers that read it, so that one loud channel does not set an int8 step.

SmoothQuant (Xiao et al. 2022, section 4): x W = (x / s)(s W), and a LayerNormalization divides for nothing, by its own
scale and bias. On a transformer and a ConvNeXt trained on digits this brings 1 to 2 dB to the feature maps. Convs on both
sides of a ReLU could trade scales too (cross-layer equalisation, Nagel et al. 2019): on resnet18 that brought 0.0 dB,
because its noise is that of the residual stream, which takes no scale; and what stands before a pointwise layer of a
MobileNet or EfficientNet (a gate, a hard swish) takes none either. So only normalisations are equalised.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common as passes

from edge_backbones.build.artifacts import ExportedGraph
from edge_backbones.build.quantize import add_constant, constant_of, input_channel_axis, load_graph, quantized_layers

# s = (largest of a channel / largest of all) to this power: of 0.5, 0.75, 0.9 and 1 the best on vit and convnext.
_STRENGTH = 0.75
_SMALLEST = 1 / 256  # of a channel that is nearly silent on the calibration images, and may not be on others


@dataclass(frozen=True)
class _Site:
    """A normalisation, the tensor that layers read of it, the channel axis of that tensor, and those layers."""

    norm: ir.Node
    tensor: ir.Value
    axis: int
    readers: tuple[ir.Node, ...]


def tensors_to_equalise(graph: ExportedGraph) -> dict[str, int]:
    """Tensors whose channels can be scaled at no cost, and their channel axis."""
    return {str(site.tensor.name): site.axis for site in _sites(load_graph(graph), graph)}


def factors(largest: np.ndarray) -> np.ndarray:
    """What each channel is divided by, float32 in (0, 1], from the largest |x| of each channel."""
    if not largest.any():
        return np.ones(len(largest), np.float32)
    share: np.ndarray = np.maximum(largest / largest.max(), _SMALLEST) ** _STRENGTH
    return share.astype(np.float32)


def write_equalised_graph(graph: ExportedGraph, by_tensor: Mapping[str, Sequence[float]], path: Path) -> ExportedGraph:
    """The same network in `path`, with each of these tensors divided by its factors and its readers' weights multiplied.

    Nothing else changes but rounding in the last bits of fp32. Raises KeyError for a tensor that takes no factors.
    """
    model = load_graph(graph)
    sites = {str(site.tensor.name): site for site in _sites(model, graph)}
    for name, values in by_tensor.items():
        site, divisor = sites[name], np.asarray(values, np.float32)
        for index in (1, 2):  # scale, bias
            value = site.norm.inputs[index]
            divided = add_constant(
                model.graph, f"{name}.equalised.{index}", constant_of(value).astype(np.float32) / divisor
            )
            site.norm.replace_input_with(index, divided)
        for reader in site.readers:
            weight = constant_of(reader.inputs[1]).astype(np.float32)
            shape = [1] * weight.ndim
            shape[input_channel_axis(reader)] = -1
            multiplied = add_constant(model.graph, f"{reader.name}.equalised", weight * divisor.reshape(shape))
            reader.replace_input_with(1, multiplied)
    passes.RemoveUnusedNodesPass()(model)  # takes what was replaced
    ir.save(model, path)
    return dataclasses.replace(graph, path=path)


def _sites(model: ir.Model, graph: ExportedGraph) -> list[_Site]:
    layers = {layer.name: layer.tensor for layer in quantized_layers(graph) if layer.weighted}
    found = []
    for norm in model.graph:
        constants = norm.inputs[1:3]
        if norm.op_type != "LayerNormalization" or len(constants) < 2 or norm.outputs[0].shape is None:
            continue
        if any(value is None or not value.is_initializer() or constant_of(value).ndim != 1 for value in constants):
            continue
        tensor, axis = _behind_permutations(norm.outputs[0])
        readers = tuple(use.node for use in tensor.uses())
        channels = len(constant_of(constants[0]))
        if (
            readers
            and not tensor.is_graph_output()
            and all(layers.get(str(reader.name)) == tensor.name and _reads(reader, channels) for reader in readers)
        ):
            found.append(_Site(norm, tensor, axis, readers))
    return found


def _reads(layer: ir.Node, channels: int) -> bool:
    """False for a Conv in groups, whose weight has fewer channels than its input."""
    sizes: tuple[int, ...] = constant_of(layer.inputs[1]).shape
    return sizes[input_channel_axis(layer)] == channels


def _behind_permutations(value: ir.Value) -> tuple[ir.Value, int]:
    """The tensor behind the Transposes and Reshapes that alone read this one, and where its last axis went."""
    assert value.shape is not None  # _sites looked
    axis = len(value.shape) - 1
    while len(uses := tuple(value.uses())) == 1 and not value.is_graph_output():
        node = uses[0].node
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
