"""Find where an error begins: given an engine outside its gate and its typed graph, name the layer, block or format.

Two causes are told apart by running the typed graph in ONNX Runtime on every golden image. If the graph holds the gate, the
engine computes something else than its graph says: bisection finds the first layer that differs. If the graph is outside
too, the number format is the cause: every block is quantised alone, and the noisiest is named. The reference is then the
typed graph without the rounding of activations, because a bundle need not have the fp32 graph; the rounding of weights is
measured as a whole. A graph without rounding points (fp16, bf16) is searched for values that its format cannot hold, and
compared with the fp32 graph where the bundle has it. ONNX Runtime has no kernels for bf16: every value is computed in
float32 and rounded wherever the graph has bf16.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
import numpy as np
import onnx
import onnx_ir as ir
from onnx_ir.passes import common as passes

from edge_backbones.bundle.golden import GoldenSamples, full_batches
from edge_backbones.bundle.onnx_gate import graph_fault
from edge_backbones.deploy.parity import allowed_noise
from edge_backbones.engines.onnxruntime.library import onnxruntime
from edge_backbones.engines.openvino import int8_graph as cpu_graph
from edge_backbones.engines.openvino.session import OpenVinoSession, compile_model, read_model
from edge_backbones.errors import IntegrityError
from edge_backbones.parity_report import ParityReport
from edge_backbones.progress import Progress, no_progress
from edge_backbones.spec import Precision
from edge_backbones.toolchain.layer_names import block_of
from edge_backbones.toolchain.onnx_runtime import reference_options

_LAYERS = frozenset({"Add", "Conv", "Gemm", "LayerNormalization", "MatMul", "Mul", "Relu", "Softmax"})
_PRODUCTS = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
_LOUDEST_SHOWN = 8
_AT_ONCE = 16  # values of layers that are in memory together


class LayerNoise(msgspec.Struct, frozen=True, kw_only=True):
    """A layer or block, and the noise that was measured for it as SQNR in dB."""

    name: str
    sqnr_db: float


class Explanation(msgspec.Struct, frozen=True, kw_only=True):
    """Why an engine is outside its gate.

    Args:
        precision: the precision of the engine.
        stage: the stage that is outside.
        cause: ``engine`` (it differs from its graph), ``activations`` or ``weights`` (rounding), or ``format`` (a graph
            without Q/DQ pairs is outside by itself).
        origin: the first wrong layer, or the noisiest block; the stage, where neither can be named.
        sentence: the explanation, for people.
        layers: for ``engine`` the layers that were compared, in graph order; for rounding the blocks, each quantised
            alone, the noisiest first; for ``format`` the layers that were compared with the fp32 graph, if there is one.
        limit_db: the SQNR that the layers or the stage have to reach.
    """

    precision: Precision
    stage: str
    cause: str
    origin: str
    sentence: str
    layers: tuple[LayerNoise, ...]
    limit_db: float


def explain(
    graph: Path,
    report: ParityReport,
    golden: GoldenSamples,
    *,
    plain: Path | None = None,
    progress: Progress = no_progress,
) -> Explanation:
    """Explain a report that did not pass. ``graph``: the engine's typed graph; ``plain``: the fp32 graph, if there is one.

    ``golden`` holds inputs and feature maps by ``<case>/<name>``. Raises IntegrityError for a graph that no library may have.
    """
    failing = next(stage.stage for stage in report.stages if not stage.passed)
    allowed = allowed_noise(report.gate)
    model = _loaded(graph)
    session = _session(model)
    worst, of_graph = ("opt", 0), -1.0
    for case, images in golden.inputs.items():
        found = _run(session, [failing], images, _batch(session, images))[0]
        for index, (actual, reference) in enumerate(zip(found, golden.outputs[case][failing], strict=True)):
            if (noise := _noise(actual, reference)) > of_graph:
                worst, of_graph = (case, index), noise
    if of_graph <= allowed:
        return _first_wrong_layer(model, report, failing, list(golden.inputs.values()), allowed, progress)
    case, index = worst
    image, expected = (of_case[index : index + 1] for of_case in (golden.inputs[case], golden.outputs[case][failing]))
    batch = _batch(session, image)
    if not _rounded(model.graph):
        return _outside_by_itself(model, plain, report, failing, image, batch, of_graph, allowed, progress)
    return _loudest_block(model, report, failing, image, batch, expected, allowed, progress)


def layer_noise(graph: Path, image: np.ndarray, *, plain: Path | None = None) -> tuple[LayerNoise, ...]:
    """Measure the error that has built up at each layer of a typed graph that multiplies, in graph order.

    A graph with rounding points is compared with itself without the rounding of activations, which leaves out the rounding
    of weights. Any other is compared with ``plain``, the fp32 graph; without that the result is empty. ``image``: one input,
    shape (1, ...). Raises IntegrityError for a graph that no library may have.
    """
    model = _loaded(graph)
    if _rounded(model.graph):
        reference = _with_rounding(model, None)
    elif plain is not None:
        reference = _loaded(plain)
    else:
        return ()
    known = {str(node.name): node.outputs[0] for node in reference.graph}
    layers = [node for node in model.graph if node.op_type in _PRODUCTS and str(node.name) in known]
    names = [str(node.name) for node in layers]
    actual = _session(_with_outputs(model, [node.outputs[0] for node in layers]))
    expected = _session(_with_outputs(reference, [known[name] for name in names]))
    found: list[LayerNoise] = []
    for start in range(0, len(names), _AT_ONCE):
        outputs = [f"explained {index}" for index in range(start, min(start + _AT_ONCE, len(names)))]
        ours, theirs = (_run(one, outputs, image, _batch(one, image)) for one in (actual, expected))
        for name, mine, right in zip(names[start:], ours, theirs, strict=False):
            found.append(LayerNoise(name=name, sqnr_db=round(_db(_noise(mine, right)), 2)))
    return tuple(found)


def _loaded(path: Path) -> ir.Model:
    """Load a graph of a bundle. Raises IntegrityError for one that no library may have."""
    data = path.read_bytes()
    fault = graph_fault(data)
    if fault is not None:
        raise IntegrityError(f"{path} is refused: {fault}. Build the bundle again")
    return ir.from_proto(onnx.load_from_string(data))


# ---- the engine differs from its graph ------------------------------------------------------------------------------


def _first_wrong_layer(
    model: ir.Model,
    report: ParityReport,
    failing: str,
    inputs: Sequence[np.ndarray],
    allowed: float,
    progress: Progress,
) -> Explanation:
    """Find the first layer that the engine library computes otherwise, by bisection: what lies behind it is wrong too."""
    layers = _layers(model.graph, failing)
    limit = min(allowed, 0.01)  # values that round to the other side are no difference
    free = _with_rounding(model, None) if report.precision.info.is_integer else None
    high, noise = _bisect(layers, lambda node: _difference_of_engine(model, free, node, inputs), limit, progress)
    if high < len(layers):
        origin = str(layers[high].name)
        sentence = f"the engine library computes {origin} otherwise than its graph says: report it, with this graph"
    else:
        origin = failing
        sentence = "the graph holds its gate, every layer of it compiled by itself too: the engine is not of this graph"
    return Explanation(
        precision=report.precision,
        stage=failing,
        cause="engine",
        origin=origin,
        sentence=f"{sentence}. First compile it again (edge-backbones compile BUNDLE --precision {report.precision})",
        layers=noise,
        limit_db=_db(limit),
    )


def _bisect(
    layers: Sequence[ir.Node], difference: Callable[[ir.Node], float], limit: float, progress: Progress
) -> tuple[int, tuple[LayerNoise, ...]]:
    """Find the first layer that differs by more than ``limit``.

    Returns its index (the number of layers if none does), and the layers that were compared.
    """
    seen: dict[int, float] = {}
    most = math.ceil(math.log2(len(layers) + 1))
    low, high = -1, len(layers)  # right up to low, wrong from high on (the output itself)
    while high - low > 1:
        middle = (low + high) // 2
        progress("comparing layers", len(seen), most)
        seen[middle] = difference(layers[middle])
        low, high = (middle, high) if seen[middle] <= limit else (low, middle)
    progress("comparing layers", most, most)
    return high, tuple(LayerNoise(name=str(layers[i].name), sqnr_db=_db(seen[i])) for i in sorted(seen))


def _difference_of_engine(
    model: ir.Model, free: ir.Model | None, layer: ir.Node, inputs: Sequence[np.ndarray]
) -> float:
    """Return the noise of a layer as the engine library computes it, against the graph's own value, for the worst batch.

    int8 engines are made of an adapted graph, which rounds more finely. So their noise is how much further they are than the
    graph from ``free``, where activations are not rounded; twice as far still counts as no difference.
    """
    name = str(layer.outputs[0].name)
    cut = _cut_behind(model, name)
    adapted = read_model(ir.to_proto(cut).SerializeToString())
    if free is not None:
        cpu_graph.adapt(adapted)
    engine = OpenVinoSession(bytearray(compile_model(adapted)), outputs=("explained",))
    own, unrounded = _session(cut), None if free is None else _session(_cut_behind(free, name))
    worst = 0.0
    try:
        for images in inputs:
            batch = _batch(own, images)
            for chosen in full_batches(len(images), batch):
                chunk = np.ascontiguousarray(images[chosen])
                actual, expected = engine.run(chunk)[0], _run(own, ["explained"], chunk, batch)[0]
                if unrounded is None:
                    noise = _noise(actual, expected)
                else:
                    reference = _run(unrounded, ["explained"], chunk, batch)[0]
                    noise = _noise(actual, reference) - 2 * _noise(expected, reference)
                worst = max(worst, math.inf if math.isnan(noise) else noise)
    finally:
        engine.close()
    return worst


def _cut_behind(model: ir.Model, name: str) -> ir.Model:
    """Return a copy whose only output is that tensor, in float32 and under the name ``explained``."""
    cut = ir.from_proto(ir.to_proto(model))
    [value] = [output for node in cut.graph for output in node.outputs if output.name == name]
    value = _as_float(cut.graph, value, "explained")
    del cut.graph.outputs[:]
    cut.graph.outputs.append(value)
    passes.RemoveUnusedNodesPass()(cut)
    return cut


# ---- the number format ----------------------------------------------------------------------------------------------


def _outside_by_itself(
    model: ir.Model,
    plain: Path | None,
    report: ParityReport,
    failing: str,
    image: np.ndarray,
    batch: int,
    of_graph: float,
    allowed: float,
    progress: Progress,
) -> Explanation:
    """Explain a graph without rounding points: find the first layer that overflows, or that is too far from fp32."""
    layers = _layers(model.graph, failing)
    noise: tuple[LayerNoise, ...] = ()
    needs = f"{failing} is left {_db(of_graph):.1f} dB of the {_db(allowed):.1f} dB that it needs"
    beyond = _first_beyond(model, layers, report.precision.info.rest.info.largest, image, batch)
    if beyond is not None:
        origin = str(beyond.name)
        sentence = (
            f"{origin} is the first layer with values that {report.precision} cannot hold: build bf16 or fp32 instead"
        )
    elif plain is not None:
        reference = _loaded(plain)
        known = {str(node.name): node for node in reference.graph}
        shared = [node for node in layers if str(node.name) in known]
        high, noise = _bisect(
            shared,
            lambda node: _noise(
                _value(model, node, image, batch), _value(reference, known[str(node.name)], image, batch)
            ),
            allowed,
            progress,
        )
        origin = str(shared[high].name) if high < len(shared) else failing
        sentence = f"{needs}; {origin} is the first layer that {report.precision} takes further from fp32 than that"
    else:
        origin = failing
        sentence = (
            f"{needs}: {report.precision} is too coarse here. With an fp32 graph in the bundle the layer can be told"
        )
    return Explanation(
        precision=report.precision,
        stage=failing,
        cause="format",
        origin=origin,
        sentence=sentence,
        layers=noise,
        limit_db=_db(allowed),
    )


def _first_beyond(
    model: ir.Model, layers: Sequence[ir.Node], largest: float, image: np.ndarray, batch: int
) -> ir.Node | None:
    """Return the first layer with values that are larger than ``largest`` or not finite.

    ONNX Runtime computes half in float32 and so shows such values.
    """
    names = [f"explained {index}" for index in range(len(layers))]
    copy = _with_outputs(model, [layer.outputs[0] for layer in layers])
    found = _run(_session(copy), names, image, batch)
    inside = [bool(np.isfinite(value).all()) and float(np.abs(value).max()) <= largest for value in found]
    return None if all(inside) else layers[inside.index(False)]


def _with_outputs(model: ir.Model, outputs: Sequence[ir.Value]) -> ir.Model:
    """Return a copy whose outputs are these tensors in float32, named ``explained 0``, ``explained 1``, ..."""
    copy = ir.from_proto(ir.to_proto(model))
    values = {output.name: output for node in copy.graph for output in node.outputs}
    del copy.graph.outputs[:]
    copy.graph.outputs.extend(_as_float(copy.graph, values[v.name], f"explained {i}") for i, v in enumerate(outputs))
    passes.RemoveUnusedNodesPass()(copy)
    return copy


def _value(model: ir.Model, layer: ir.Node, image: np.ndarray, batch: int) -> np.ndarray:
    return _run(_session(_cut_behind(model, str(layer.outputs[0].name))), ["explained"], image, batch)[0]


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
    """Find the block whose activations, rounded alone, change the failing output most; or blame the weights, all together."""
    blocks = list(dict.fromkeys(block_of(str(node.name)) for node, _, _ in _rounded(model.graph)))
    smooth = _run(_session(_with_rounding(model, None)), [failing], images, batch)[0]
    of_weights = _noise(smooth, expected)
    found: list[LayerNoise] = []
    for done, block in enumerate(blocks):
        progress("measuring blocks", done, len(blocks))
        alone = _run(_session(_with_rounding(model, block)), [failing], images, batch)[0]
        if (noise := _noise(alone, smooth)) > 0:  # else the output does not depend on it
            found.append(LayerNoise(name=block, sqnr_db=_db(noise)))
    progress("measuring blocks", len(blocks), len(blocks))
    found.sort(key=lambda layer: layer.sqnr_db)
    weights = f"rounding the weights alone leaves {_db(of_weights):.1f} dB"
    if not found or of_weights > allowed:
        cause = "weights"
        sentence = f"{weights} of the {_db(allowed):.1f} dB that {failing} needs: {report.precision} is too coarse here"
        origin = failing
    else:
        cause, origin = "activations", found[0].name
        sentence = (
            f"most of the error of {failing} begins in {origin}: its activations alone leave {found[0].sqnr_db:.1f} dB of "
            f"the {_db(allowed):.1f} dB that are needed ({weights}). Build with --exclude {origin}, or with more "
            "typical images"
        )
    return Explanation(
        precision=report.precision,
        stage=failing,
        cause=cause,
        origin=origin,
        sentence=sentence,
        layers=tuple(found[:_LOUDEST_SHOWN]),
        limit_db=_db(allowed),
    )


def _rounded(graph: ir.Graph) -> list[tuple[ir.Node, int, ir.Value]]:
    """Return the inputs that are read through Q/DQ of an activation: node, index of the input, and the value before the Q."""
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
    """Return a copy whose activations are rounded in one block only, or nowhere for None."""
    copy = ir.from_proto(ir.to_proto(model))
    for node, index, before in _rounded(copy.graph):
        if block is None or block_of(str(node.name)) != block:
            node.replace_input_with(index, before)
    passes.RemoveUnusedNodesPass()(copy)
    return copy


# ---- running graphs -------------------------------------------------------------------------------------------------


def _session(model: ir.Model) -> onnxruntime.InferenceSession:
    data = ir.to_proto(_without_bf16(model)).SerializeToString()
    return onnxruntime.InferenceSession(data, reference_options(), providers=["CPUExecutionProvider"])


def _without_bf16(model: ir.Model) -> ir.Model:
    """Return a copy that computes bf16 tensors in float32 and rounds each of them to bf16, as accelerators do."""
    if not any(output.dtype is ir.DataType.BFLOAT16 for node in model.graph for output in node.outputs):
        return model
    copy = ir.from_proto(ir.to_proto(model))
    for weight in copy.graph.initializers.values():
        if weight.dtype is ir.DataType.BFLOAT16 and weight.const_value is not None:
            weight.const_value = ir.tensor(weight.const_value.numpy().astype(np.float32), name=weight.name)
            weight.dtype = ir.DataType.FLOAT
    for node in tuple(copy.graph):
        for output in node.outputs:
            if output.dtype is not ir.DataType.BFLOAT16:
                continue
            readers = tuple(output.uses())
            added = []
            if node.op_type != "Cast":  # a Cast rounds already
                output.dtype = ir.DataType.FLOAT
                added.append(ir.node("Cast", [output], {"to": int(ir.DataType.BFLOAT16)}, name=f"{output.name}:round"))
            rounded = added[-1].outputs[0] if added else output
            added.append(ir.node("Cast", [rounded], {"to": int(ir.DataType.FLOAT)}, name=f"{output.name}:widen"))
            for reader, index in readers:
                reader.replace_input_with(index, added[-1].outputs[0])
            copy.graph.insert_after(node, added)
    return copy


def _batch(session: onnxruntime.InferenceSession, images: np.ndarray) -> int:
    fixed = session.get_inputs()[0].shape[0]
    return fixed if isinstance(fixed, int) else len(images)


def _run(
    session: onnxruntime.InferenceSession, outputs: Sequence[str], images: np.ndarray, batch: int
) -> list[np.ndarray]:
    """Run the images in batches of the graph's size. The last batch is filled from the beginning."""
    name, found = session.get_inputs()[0].name, []
    for chosen in full_batches(len(images), batch):
        found.append(session.run(list(outputs), {name: images[chosen]}))
    return [np.concatenate(arrays)[: len(images)] for arrays in zip(*found, strict=True)]


def _behind(graph: ir.Graph, output: str) -> list[ir.Node]:
    """Return the nodes that an output depends on, in graph order."""
    wanted = {value for value in graph.outputs if value.name == output}
    found = []
    for node in reversed(graph):
        if wanted.intersection(node.outputs):
            found.append(node)
            wanted.update(value for value in node.inputs if value is not None)
    return found[::-1]


def _layers(graph: ir.Graph, output: str) -> list[ir.Node]:
    """Return the layers that an output depends on and that compute floats, in graph order."""
    return [node for node in _behind(graph, output) if node.op_type in _LAYERS and _is_float(node.outputs[0])]


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
    """Return noise as SQNR in dB, within what JSON can hold."""
    return 300.0 if noise <= 0 else max(-300.0, -10 * math.log10(noise)) if math.isfinite(noise) else -300.0
