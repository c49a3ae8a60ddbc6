"""Which ranges clip best, which biases are off, which blocks int8 costs most: measured on images that are held out.

The typed graph is run in ONNX Runtime with fp32 around its Q/DQ pairs: the arithmetic of the int8 graph, without an engine
to compile for every question. Noise is |x - r|^2 / |r|^2 over all images, r from the fp32 graph; -10 log10 of it is SQNR.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime

from edge_backbones.build.artifacts import ExportedGraph, Progress, no_progress
from edge_backbones.build.quantize import activation_scale, quantized_layers, write_typed_graph
from edge_backbones.build.ranges import METHODS, Magnitudes, find_ranges
from edge_backbones.spec import Precision

_CORRECTIONS = 3

Noise = Mapping[str, float]
"""Noise of each output of a graph."""


def choose_ranges(
    graph: ExportedGraph,
    magnitudes: Mapping[str, Magnitudes],
    batches: Sequence[np.ndarray],
    *,
    percentile: float,
    work: Path,
    progress: Progress = no_progress,
) -> tuple[dict[str, float], dict[str, str]]:
    """The ranges of the estimator that leaves each output the least noise, and that estimator by output.

    Outputs are decided one after the other: the tensors that only later ones depend on are still to come, those before
    are fixed. ``batches``: held-out inputs.
    """
    options = {method: find_ranges(magnitudes, method=method, percentile=percentile) for method in METHODS}
    order = list(graph.spec.outputs)
    deciding: dict[str, str] = {}
    for layer in sorted(quantized_layers(graph), key=lambda layer: order.index(layer.output)):
        deciding.setdefault(layer.tensor, layer.output)
    ranges = dict(options["percentile"])
    references, session = _references(graph, batches), _simulation(graph, ranges, work)
    chosen: dict[str, str] = {}
    for done, output in enumerate(order):
        tensors = [tensor for tensor, decides in deciding.items() if decides == output]
        if not tensors:
            continue
        progress("choosing ranges", done, len(order))
        noise = {}
        for method in METHODS:
            trial = {**ranges, **{tensor: options[method][tensor] for tensor in tensors}}
            noise[method] = _noise(session, batches, references, trial, [output])[output]
        chosen[output] = min(METHODS, key=lambda method: noise[method])
        ranges.update({tensor: options[chosen[output]][tensor] for tensor in tensors})
    return ranges, chosen


def correct_biases(
    graph: ExportedGraph,
    ranges: Mapping[str, float],
    batches: Sequence[np.ndarray],
    held_out: Sequence[np.ndarray],
    *,
    work: Path,
    progress: Progress = no_progress,
) -> dict[str, list[float]]:
    """What to add to the bias of each Conv so that its mean over images is that of fp32, by output channel.

    Bias correction (Nagel et al. 2019, Data-free quantization, section 4.2, with the means of real images). All layers are
    corrected at once, a few times over: every correction moves what the layers behind it see. Empty when the noise on
    ``held_out`` images, as a mean over outputs in dB, does not fall.
    """
    results = {layer.name: layer.result for layer in quantized_layers(graph) if layer.op_type == "Conv"}
    if not results:
        return {}
    references = _references(graph, held_out)
    expected = _channel_means(_exposing(onnx.load(graph.path), results.values()), graph, batches, results)
    best: dict[str, list[float]] = {}
    shifts: dict[str, np.ndarray] = {name: np.zeros_like(mean) for name, mean in expected.items()}
    least = _mean_db(_noise(_simulation(graph, ranges, work), held_out, references, {}, graph.spec.outputs))
    for done in range(_CORRECTIONS):
        progress("correcting biases", done, _CORRECTIONS)
        as_lists = {name: shift.tolist() for name, shift in shifts.items()}
        path = work / "simulation.onnx"
        write_typed_graph(graph, precision=Precision.INT8, path=path, ranges=ranges, shifts=as_lists, half=False)
        actual = _channel_means(_exposing(onnx.load(path), results.values()), graph, batches, results)
        shifts = {name: shift + expected[name] - actual[name] for name, shift in shifts.items()}
        as_lists = {name: [float(np.float32(v)) for v in shift] for name, shift in shifts.items()}
        session = _simulation(graph, ranges, work, shifts=as_lists)
        noise = _mean_db(_noise(session, held_out, references, {}, graph.spec.outputs))
        if noise < least:
            best, least = as_lists, noise
    return best


def noise_of_blocks(
    graph: ExportedGraph,
    ranges: Mapping[str, float],
    batches: Sequence[np.ndarray],
    *,
    excluded: Collection[str],
    work: Path,
    progress: Progress = no_progress,
) -> dict[str, Noise]:
    """What quantising each block alone does to every output; ``excluded`` layers stay out. Noises nearly add up."""
    layers = quantized_layers(graph)
    blocks = list(dict.fromkeys(layer.block for layer in layers if layer.name not in excluded))
    references = _references(graph, batches)
    found: dict[str, Noise] = {}
    for done, block in enumerate(blocks):
        progress("measuring blocks", done, len(blocks))
        others = {layer.name for layer in layers if layer.block != block or layer.name in excluded}
        session = _simulation(graph, ranges, work, excluded=others)
        found[block] = _noise(session, batches, references, {}, graph.spec.outputs)
    return found


def blocks_to_exclude(noise: Mapping[str, Noise], excess: Noise) -> list[str]:
    """The blocks to leave in half so that the noise of every output falls by the factor ``excess`` (1 where it is fine).

    Greedy: always the block with the largest share of an output that is still too noisy.
    """
    left = dict(noise)
    total = {output: sum(of_block[output] for of_block in noise.values()) for output in excess}
    excluded: list[str] = []
    while left:
        remaining = {output: sum(of_block[output] for of_block in left.values()) for output in excess}
        over = {o: remaining[o] / (total[o] / excess[o]) for o in excess if remaining[o] > total[o] / excess[o] > 0}
        if not over:
            break
        worst = max(over, key=lambda output: over[output])
        block = max(left, key=lambda name: left[name][worst])
        del left[block]
        excluded.append(block)
    return excluded


def _references(graph: ExportedGraph, batches: Sequence[np.ndarray]) -> list[dict[str, np.ndarray]]:
    session = onnxruntime.InferenceSession(graph.path, _options(), providers=["CPUExecutionProvider"])
    outputs = list(graph.spec.outputs)
    return [dict(zip(outputs, session.run(outputs, {graph.input.name: batch}), strict=True)) for batch in batches]


def _exposing(model: onnx.ModelProto, tensors: Collection[str]) -> onnxruntime.InferenceSession:
    """A session whose outputs are these tensors."""
    del model.graph.output[:]
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in tensors)
    return onnxruntime.InferenceSession(model.SerializeToString(), _options(), providers=["CPUExecutionProvider"])


def _channel_means(
    session: onnxruntime.InferenceSession,
    graph: ExportedGraph,
    batches: Sequence[np.ndarray],
    results: Mapping[str, str],
) -> dict[str, np.ndarray]:
    """Mean over images and pixels of each NCHW result, by layer name."""
    sums: dict[str, np.ndarray] = {}
    for batch in batches:
        values = session.run(list(results.values()), {graph.input.name: batch})
        for name, value in zip(results, values, strict=True):
            sums[name] = sums.get(name, 0.0) + len(batch) * value.mean(axis=(0, 2, 3), dtype=np.float64)
    count = sum(len(batch) for batch in batches)
    return {name: total / count for name, total in sums.items()}


def _mean_db(noise: Noise) -> float:
    return float(np.mean([10 * np.log10(max(value, 1e-30)) for value in noise.values()]))


def _simulation(
    graph: ExportedGraph,
    ranges: Mapping[str, float],
    work: Path,
    *,
    excluded: Collection[str] = (),
    shifts: Mapping[str, Sequence[float]] | None = None,
) -> onnxruntime.InferenceSession:
    """A session over the int8 graph with fp32 around it, whose ranges may be fed with every run."""
    path = work / "simulation.onnx"
    write_typed_graph(
        graph, precision=Precision.INT8, path=path, ranges=ranges, excluded=excluded, shifts=shifts, half=False
    )
    model = onnx.load(path)
    scales = {activation_scale(tensor, threshold)[0] for tensor, threshold in ranges.items()}
    for initializer in model.graph.initializer:
        if initializer.name in scales:  # an initializer that is an input too is a default
            model.graph.input.append(onnx.helper.make_tensor_value_info(initializer.name, onnx.TensorProto.FLOAT, []))
    onnx.save(model, path)
    return onnxruntime.InferenceSession(path, _options(), providers=["CPUExecutionProvider"])


def _options() -> onnxruntime.SessionOptions:
    """Without the fusions that make integer kernels of Q/DQ pairs: those round in other places."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.log_severity_level = 3  # errors only: these come back as exceptions
    return options


def _noise(
    session: onnxruntime.InferenceSession,
    batches: Sequence[np.ndarray],
    references: Sequence[Mapping[str, np.ndarray]],
    ranges: Mapping[str, float],
    outputs: Sequence[str],
) -> Noise:
    known = {value.name for value in session.get_overridable_initializers()}
    scales = dict(activation_scale(tensor, threshold) for tensor, threshold in ranges.items())
    feeds = {name: scale for name, scale in scales.items() if name in known}
    noise, signal = dict.fromkeys(outputs, 0.0), dict.fromkeys(outputs, 0.0)
    for batch, reference in zip(batches, references, strict=True):
        values = session.run(list(outputs), {session.get_inputs()[0].name: batch, **feeds})
        for output, value in zip(outputs, values, strict=True):
            expected = reference[output].astype(np.float64)
            noise[output] += float(((value - expected) ** 2).sum())
            signal[output] += float((expected**2).sum())
    return {output: noise[output] / signal[output] if signal[output] else 0.0 for output in outputs}
