"""End a typed graph in the dtype and the memory layout that a bundle's feature maps have.

The fp32 graph that everything is measured on ends in float32 NCHW whatever the bundle asks for, so that ranges, noise and
chosen layers are the same for every form of the maps. Only the graphs that engines are compiled from get these ends.
"""

from __future__ import annotations

import onnx_ir as ir

from edge_backbones.spec import BackboneSpec
from edge_backbones.toolchain.quantize.onnx_edits import name_of

_DTYPES = {"float32": ir.DataType.FLOAT, "float16": ir.DataType.FLOAT16}
_TO_NHWC = (0, 2, 3, 1)


def has_own_ends(spec: BackboneSpec) -> bool:
    """Return whether graphs of these outputs end in anything but float32 in the layout that callers see."""
    return spec.map_dtype != "float32" or spec.channels_last


def write_ends(graph: ir.Graph, spec: BackboneSpec) -> None:
    """Cast every output to the dtype of the maps, and transpose those in channels-last memory. Names stay."""
    wanted = _DTYPES[spec.map_dtype]
    for position, described in enumerate(spec.described_outputs):
        value = graph.outputs[position]
        kinds = ["Cast"] if value.dtype != wanted else []
        if described.is_reordered:
            # The values that are moved are the smaller ones.
            kinds.insert(0 if wanted is ir.DataType.FLOAT else len(kinds), "Transpose")
        for kind in kinds:
            value = _append(graph, value, kind, wanted)
        graph.outputs[position] = value


def _append(graph: ir.Graph, value: ir.Value, kind: str, dtype: ir.DataType) -> ir.Value:
    """Put a node behind an output of the graph, and return its result, which takes the output's name."""
    name = name_of(value)
    if kind == "Cast":
        before, shape = "uncast", value.shape
        node = ir.node("Cast", [value], {"to": int(dtype)}, name=f"Cast:{name}")
    else:
        before, dtype = "NCHW", value.dtype or dtype
        shape = None if value.shape is None else ir.Shape([value.shape[axis] for axis in _TO_NHWC])
        node = ir.node("Transpose", [value], {"perm": _TO_NHWC}, name=f"Transpose:{name}")
    result = node.outputs[0]
    value.name, result.name = f"{name}.{before}", name
    result.shape, result.type = shape, ir.TensorType(dtype)
    graph.append(node)
    return result
