"""Write the graph of one precision: the fp32 graph with Q/DQ pairs for int8 and fp8, and casts for half precision.

The number format of every tensor is written in the graph, so one file per precision serves every engine. The form is
the one that TensorRT asks for (it refuses others); OpenVINO runs it at full int8 speed (after `cpu_graph`).
"""

from __future__ import annotations

import shutil
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import onnx_ir as ir
from onnx_ir.passes import common as passes

from edge_backbones.spec import Precision
from edge_backbones.toolchain.artifacts import ExportedGraph, TypedGraph
from edge_backbones.toolchain.quantize.ends import has_own_ends, write_ends
from edge_backbones.toolchain.quantize.half import convert_to_half
from edge_backbones.toolchain.quantize.onnx_edits import load_graph
from edge_backbones.toolchain.quantize.qdq import insert_qdq, shift_biases


def write_typed_graph(
    graph: ExportedGraph,
    *,
    precision: Precision,
    path: Path,
    ranges: Mapping[str, float] | None = None,
    excluded: Collection[str] = (),
    shifts: Mapping[str, Sequence[float]] | None = None,
    rounding: Mapping[str, bytes] | None = None,
    large: Collection[str] = (),
    half: bool = True,
) -> TypedGraph:
    """Write the graph of one precision to `path`. The same graph and ranges give the same bytes.

    Args:
        graph: the fp32 graph; it is not changed.
        precision: fp32 copies the file, unless its outputs change; `placement`, `qdq` and `half` say what is done for the
            others.
        path: the file to write.
        ranges: for int8 and fp8, the |x| threshold of every tensor that `tensors_to_calibrate` names: the value that
            becomes 127 or 448. Other precisions do not read it.
        excluded: for int8 and fp8, names of `quantized_layers` that are left as fp16 has them.
        shifts: for int8, what is added to the bias of a Conv, by layer name and output channel (bias correction).
        rounding: for int8, how weights are rounded, by name (`optq.pack`); the others so that errors add up to nearly 0.
        large: tensors whose values fp16 may not hold: the nodes that write or read them stay in fp32.
        half: False leaves what is not quantised in fp32, and the outputs too, for measuring: ONNX Runtime computes half
            slowly.

    Raises:
        QuantizationError: a range that is missing, not finite or not positive, or too large for an fp16 scale; a weight
            that is not finite; a graph that has subgraphs or, for int8, an opset before 19.
    """
    own_ends = half and has_own_ends(graph.spec)
    if precision is Precision.FP32 and not own_ends:
        shutil.copyfile(graph.path, path)
    else:
        model = load_graph(graph)
        if precision.is_calibrated:
            insert_qdq(model, precision, ranges or {}, frozenset(excluded), rounding)
        if precision.info.is_integer:
            shift_biases(model.graph, {n: v for n, v in (shifts or {}).items() if n not in excluded})
        if half and precision is not Precision.FP32:
            convert_to_half(model, precision.info.rest, large, float_outputs=not own_ends)
        if own_ends:
            write_ends(model.graph, graph.spec)
        passes.RemoveUnusedNodesPass()(model)  # removes the fp32 weights that were replaced, too
        ir.save(model, path)
    return TypedGraph(path=path, precision=precision, spec=graph.spec, input=graph.input)
