"""Rewrite a bf16 graph in float32 for OpenVINO, which then computes it in the format that it is asked for.

OpenVINO computes a graph with tensors of bf16 as it is written on every CPU with AVX-512. There are two reasons against it:

- On CPUs without instructions for bf16 it emulates them, which is slower than fp32.
- It fuses less: the casts around a softmax keep it from computing attention in one kernel, and it rounds the sums of
  residual branches to bf16. Written in float32 and computed in bf16, vit_tiny_patch16_224 gains 6 dB and resnet18 1 dB.

The weights keep the values that they have in bf16.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from edge_backbones.engines.openvino.session import load_library
from edge_backbones.rounding import round_to_bf16

if TYPE_CHECKING:
    import openvino


def adapt(model: openvino.Model) -> None:
    """Make every tensor of bf16 float32, in place. Outputs keep their type."""
    library = load_library()
    floats = (library.Type.bf16, library.Type.f32)
    for node in model.get_ordered_ops():
        kind = node.get_type_name()
        if kind == "Constant" and node.get_element_type() == library.Type.bf16:
            values = node.get_data(dtype=np.float32).reshape(node.shape)
            _replace(node, library.opset13.constant(values).output(0))
        elif kind == "Convert" and node.get_element_type() in floats:
            source = node.input_value(0)
            if source.get_element_type() in floats and not _is_result(node):
                _replace(node, source)
            else:  # the pixels of a camera, or an output, whose name belongs to this node
                node.set_destination_type("f32")
    model.validate_nodes_and_infer_types()


def round_weights(model: openvino.Model) -> None:
    """Round the weights of float convolutions to bf16 as :mod:`edge_backbones.rounding` does, in place.

    OpenVINO would round each weight to the nearest number, which costs EfficientNet-Lite0 5 dB in int8 with a bf16 rest.
    """
    library = load_library()
    for node in model.get_ordered_ops():
        if node.get_type_name() not in ("Convolution", "GroupConvolution"):
            continue
        weight = node.input_value(1).get_node()
        while weight.get_type_name() in ("Convert", "Reshape"):  # a Reshape puts the groups on an axis of their own
            weight = weight.input_value(0).get_node()
        if weight.get_type_name() != "Constant" or not weight.get_element_type().is_real():
            continue
        values = weight.get_data(dtype=np.float32)
        rounded = round_to_bf16(values.reshape(len(values), -1)).reshape(values.shape)
        # Every bf16 number near an fp16 number is an fp16 number.
        _replace(weight, library.opset13.constant(rounded, weight.get_element_type()).output(0))


def _replace(node: Any, by: Any) -> None:
    for reader in node.output(0).get_target_inputs():
        reader.replace_source_output(by)


def _is_result(node: Any) -> bool:
    return any(reader.get_node().get_type_name() == "Result" for reader in node.output(0).get_target_inputs())
