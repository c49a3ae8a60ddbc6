"""Where an error is born: an engine that left its gate, its typed graph, and the layer with which it begins.

There are two causes, and they are told apart by running the typed graph in ONNX Runtime. If the graph holds the gate, the
engine computes something else than it says: the graph is cut behind one layer after another, by bisection, until the first
is found with which the engine's values differ. If the graph is outside too, the number format is to blame: every block is
quantised alone, and the one that brings the most noise into the failing output is named. The bundle has no fp32 graph;
its place takes the typed graph without the rounding of activations, so that what rounding the weights costs is told as a
whole, as the noise that is left.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec
import numpy as np
import onnx_ir as ir
import onnxruntime
from onnx_ir.passes import common as passes

from edge_backbones.build.artifacts import Progress, no_progress
from edge_backbones.build.parity import allowed_noise
from edge_backbones.build.quantize import block_of
from edge_backbones.errors import QuantizationError
from edge_backbones.manifest import ParityReport
from edge_backbones.runtime.openvino import OpenVinoSession, compile_model, read_model
from edge_backbones.spec import Precision

_LAYERS = frozenset({"Add", "Conv", "Gemm", "LayerNormalization", "MatMul", "Mul", "Relu", "Softmax"})
_LOUDEST_SHOWN = 8


class LayerNoise(msgspec.Struct, frozen=True, kw_only=True):
    """A layer (or block) and the noise that was measured for it, as SQNR in dB."""

    name: str
    sqnr_db: float


class Explanation(msgspec.Struct, frozen=True, kw_only=True):
    """Why an engine is outside its gate.

    ``cause``: ``engine`` (it differs from its graph; ``layers`` are those that were compared, in graph order),
    ``activations`` or ``weights`` (rounding; ``layers`` are blocks, each quantised alone, the loudest first), or
    ``format`` (a graph without Q/DQ pairs is outside by itself). ``born``: the first wrong layer, or the loudest block.
    """

    precision: Precision
    stage: str
    cause: str
    born: str
    sentence: str
    layers: tuple[LayerNoise, ...]
    limit_db: float


def explain(
    graph: Path,
    report: ParityReport,
    golden: Mapping[str, np.ndarray],
    input_name: str,
    *,
    progress: Progress = no_progress,
) -> Explanation:
    """Explain a report that did not pass, on the golden images of opt size. ``graph``: the typed graph of the engine.

    Raises QuantizationError for bf16.
    """
    failing = next(stage.stage for stage in report.stages if not stage.passed)
    if report.precision is Precision.BF16:
        raise QuantizationError("bf16 cannot be explained: ONNX Runtime, which would be asked, does not compute in it")
    images, expected = golden[f"opt/{input_name}"], golden[f"opt/{failing}"]
    allowed = allowed_noise(report.gate)
    model = ir.load(graph)
    session = _session(model)
    batch = _batch(session, images)
    of_graph = _noise(_run(session, [failing], images, batch)[0], expected)
    if of_graph <= allowed:
        return _first_wrong_layer(model, report, failing, images, batch, allowed, progress)
    return _loudest_block(model, report, failing, images, batch, expected, allowed, progress)


# ---- the engine differs from its graph ------------------------------------------------------------------------------


def _first_wrong_layer(
    model: ir.Model,
    report: ParityReport,
    failing: str,
    images: np.ndarray,
    batch: int,
    allowed: float,
    progress: Progress,
) -> Explanation:
    """Bisection: what lies behind the first wrong layer is wrong too."""
    layers = [node for node in _behind(model.graph, failing) if node.op_type in _LAYERS and _is_float(node.outputs[0])]
    limit = min(allowed, 0.01)  # rounding that falls to the other side is no difference
    seen: dict[int, float] = {}
    low, high = -1, len(layers)  # right up to low, wrong from high on (the output itself)
    while high - low > 1:
        middle = (low + high) // 2
        progress("comparing layers", len(seen), math.ceil(math.log2(len(layers) + 1)))
        seen[middle] = _difference_of_engine(model, layers[middle].outputs[0], images, batch)
        low, high = (middle, high) if seen[middle] <= limit else (low, middle)
    noise = tuple(LayerNoise(name=str(layers[i].name), sqnr_db=_db(seen[i])) for i in sorted(seen))
    if high < len(layers):
        born = str(layers[high].name)
        sentence = f"the engine library computes {born} otherwise than its graph says: report it, with this graph"
    else:
        born = failing
        sentence = "the graph holds its gate, every layer of it compiled by itself too: the engine is not of this graph"
    return Explanation(
        precision=report.precision,
        stage=failing,
        cause="engine",
        born=born,
        sentence=f"{sentence}. First compile it again (edge-backbones compile)",
        layers=noise,
        limit_db=_db(limit),
    )


def _difference_of_engine(model: ir.Model, tensor: ir.Value, images: np.ndarray, batch: int) -> float:
    """Noise of a tensor as the engine library computes it, against the graph's own value."""
    cut = ir.from_proto(ir.to_proto(model))
    [value] = [output for node in cut.graph for output in node.outputs if output.name == tensor.name]
    value = _as_float(cut.graph, value, "explained")
    del cut.graph.outputs[:]
    cut.graph.outputs.append(value)
    passes.RemoveUnusedNodesPass()(cut)
    data = ir.to_proto(cut).SerializeToString()
    session = OpenVinoSession(bytearray(compile_model(read_model(data))), outputs=("explained",))
    try:
        chunks = [images[start : start + batch] for start in range(0, len(images), batch)]
        actual = np.concatenate(
            [session.run(np.ascontiguousarray(chunk))[0] for chunk in chunks if len(chunk) == batch]
        )
    finally:
        session.close()
    expected = _run(_session(cut), ["explained"], images[: len(actual)], batch)[0]
    return _noise(actual, expected)


# ---- the number format ----------------------------------------------------------------------------------------------


def _loudest_block(
    model: ir.Model,
    report: ParityReport,
    failing: str,
    images: np.ndarray,
    batch: int,
    expected: np.ndarray,
    allowed: float,
    progress: Progress,
) -> Explanation:
    """Which block's activations, rounded alone, change the failing output most; or the weights, all together."""
    blocks = list(dict.fromkeys(block_of(str(node.name)) for node, _, _ in _rounded(model.graph)))
    smooth = _run(_session(_with_rounding(model, None)), [failing], images, batch)[0]
    of_weights = _noise(smooth, expected)
    found: list[LayerNoise] = []
    for done, block in enumerate(blocks):
        progress("measuring blocks", done, len(blocks))
        alone = _run(_session(_with_rounding(model, block)), [failing], images, batch)[0]
        if (noise := _noise(alone, smooth)) > 0:  # else the output does not depend on it
            found.append(LayerNoise(name=block, sqnr_db=_db(noise)))
    found.sort(key=lambda layer: layer.sqnr_db)
    weights = f"rounding the weights alone leaves {_db(of_weights):.1f} dB"
    if not found or of_weights > allowed:
        cause = "weights" if blocks else "format"
        sentence = f"{weights} of the {_db(allowed):.1f} dB that {failing} needs: {report.precision} is too coarse here"
        born = failing
    else:
        cause, born = "activations", found[0].name
        sentence = (
            f"most of the error of {failing} is born in {born}: its activations alone leave {found[0].sqnr_db:.1f} dB of "
            f"the {_db(allowed):.1f} dB that are needed ({weights}). Build with --exclude {born}, or with more typical images"
        )
    return Explanation(
        precision=report.precision,
        stage=failing,
        cause=cause,
        born=born,
        sentence=sentence,
        layers=tuple(found[:_LOUDEST_SHOWN]),
        limit_db=_db(allowed),
    )


def _rounded(graph: ir.Graph) -> list[tuple[ir.Node, int, ir.Value]]:
    """Inputs that are read through Q/DQ of an activation: the node, the input's index, and the value before the Q."""
    found = []
    for node in graph:
        for index, value in enumerate(node.inputs):
            dequantize = value.producer() if value is not None else None
            if dequantize is None or dequantize.op_type != "DequantizeLinear":
                continue
            quantize = dequantize.inputs[0].producer() if dequantize.inputs[0] is not None else None
            before = quantize.inputs[0] if quantize is not None and quantize.op_type == "QuantizeLinear" else None
            if before is not None:
                found.append((node, index, before))
    return found


def _with_rounding(model: ir.Model, block: str | None) -> ir.Model:
    """A copy whose activations are rounded in one block, or nowhere."""
    copy = ir.from_proto(ir.to_proto(model))
    for node, index, before in _rounded(copy.graph):
        if block is None or block_of(str(node.name)) != block:
            node.replace_input_with(index, before)
    passes.RemoveUnusedNodesPass()(copy)
    return copy


# ---- running graphs -------------------------------------------------------------------------------------------------


def _session(model: ir.Model) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.log_severity_level = 3  # errors only: these come back as exceptions
    data = ir.to_proto(model).SerializeToString()
    return onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])


def _batch(session: onnxruntime.InferenceSession, images: np.ndarray) -> int:
    fixed = session.get_inputs()[0].shape[0]
    return fixed if isinstance(fixed, int) else len(images)


def _run(
    session: onnxruntime.InferenceSession, outputs: Sequence[str], images: np.ndarray, batch: int
) -> list[np.ndarray]:
    """The images in batches of the graph's size; the last one is filled from the beginning."""
    name, found = session.get_inputs()[0].name, []
    for start in range(0, len(images), batch):
        chosen = np.arange(start, start + batch) % len(images)
        found.append(session.run(list(outputs), {name: images[chosen]}))
    return [np.concatenate(arrays)[: len(images)] for arrays in zip(*found, strict=True)]


def _behind(graph: ir.Graph, output: str) -> list[ir.Node]:
    """The nodes that an output depends on, in graph order."""
    wanted = {value for value in graph.outputs if value.name == output}
    found = []
    for node in reversed(graph):
        if wanted.intersection(node.outputs):
            found.append(node)
            wanted.update(value for value in node.inputs if value is not None)
    return found[::-1]


def _is_float(value: ir.Value) -> bool:
    return value.dtype in (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


def _as_float(graph: ir.Graph, value: ir.Value, name: str) -> ir.Value:
    output = ir.Value(name=name, shape=value.shape, type=ir.TensorType(ir.DataType.FLOAT))
    graph.append(ir.node("Cast", [value], {"to": int(ir.DataType.FLOAT)}, outputs=[output], name=f"Cast:{name}"))
    return output


def _noise(actual: np.ndarray, expected: np.ndarray) -> float:
    reference = expected.astype(np.float64)
    difference = actual.astype(np.float64) - reference
    if not np.isfinite(difference).all():
        return math.inf
    return float((difference**2).sum() / max(float((reference**2).sum()), 1e-300))


def _db(noise: float) -> float:
    """SQNR; kept within what JSON can hold."""
    return 300.0 if noise <= 0 else max(-300.0, -10 * math.log10(noise)) if math.isfinite(noise) else -300.0
