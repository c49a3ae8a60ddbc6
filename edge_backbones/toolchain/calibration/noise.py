"""Which ranges clip best, which biases are off, which blocks int8 costs most: measured on images that are held out.

The typed graph is run in ONNX Runtime with fp32 around its Q/DQ pairs: the arithmetic of the int8 graph, without an engine
to compile for every question. Noise is |x - r|^2 / |r|^2 over all images, r from the fp32 graph; -10 log10 of it is SQNR.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx

from edge_backbones.progress import Progress, no_progress
from edge_backbones.spec import Precision
from edge_backbones.toolchain.artifacts import ExportedGraph
from edge_backbones.toolchain.calibration.ranges import METHODS, Magnitudes, chunks, find_ranges, merge_magnitudes
from edge_backbones.toolchain.onnx_runtime import onnxruntime
from edge_backbones.toolchain.quantize import equalise
from edge_backbones.toolchain.quantize.formats import activation_scale
from edge_backbones.toolchain.quantize.placement import quantized_layers
from edge_backbones.toolchain.quantize.typed_graph import write_typed_graph

_CORRECTIONS = 3

Noise = Mapping[str, float]
"""Noise of each output of a graph."""


class Sample(NamedTuple):
    """A batch of network inputs, and how many calibration images each of them stands for."""

    images: np.ndarray
    weights: np.ndarray


@dataclass(frozen=True)
class Fold:
    """What some images showed, and other images to judge it by."""

    magnitudes: Mapping[str, Magnitudes]
    held_out: Sequence[Sample]


def choose_factors(
    graph: ExportedGraph, batches: Sequence[np.ndarray], held_out: Sequence[Sample], *, work: Path
) -> dict[str, list[float]]:
    """Factors by tensor for `equalise.write_equalised_graph`, from the largest values of each channel in ``batches``.

    Empty where the noise on ``held_out`` images, as a mean over outputs in dB, does not fall: judged with the tensors in
    question alone quantised, clipped at their largest value.
    """
    sites = equalise.tensors_to_equalise(graph)
    if not sites:
        return {}
    axes = {name: channels.axis for name, channels in sites.items()}
    largest = _channel_maxima(_exposing(onnx.load(graph.path), axes), graph, batches, axes)
    if not all(np.isfinite(values).all() for values in largest.values()):
        return {}  # whoever counts them next refuses them by name
    found = {name: equalise.factors(values, sites[name].strength).tolist() for name, values in largest.items()}
    equalised = equalise.write_equalised_graph(graph, found, work / "equalised.onnx")
    others = {layer.name for layer in quantized_layers(graph) if layer.tensor not in axes}
    references = _references(graph, held_out)
    judged = []
    for candidate, divisors in ((graph, dict.fromkeys(found, 1.0)), (equalised, found)):
        ranges = {name: float((values / divisors[name]).max()) or 1.0 for name, values in largest.items()}
        session = _simulation(candidate, ranges, work, excluded=others)
        judged.append(_mean_db(_noise([(session, held_out, references, {})], graph.spec.outputs)))
    return found if judged[1] < judged[0] else {}


def choose_ranges(
    graph: ExportedGraph,
    folds: Sequence[Fold],
    *,
    percentile: float,
    work: Path,
    progress: Progress = no_progress,
) -> tuple[dict[str, float], dict[str, str]]:
    """The ranges of the estimator that leaves each output the least noise, and that estimator by output.

    Each fold is judged on its held-out images with the ranges that its own counts give (cross-validation); the ranges that
    are returned come from the counts of all folds together. Outputs are decided one after the other: the tensors that
    only later ones depend on are still to come, those before are fixed.
    """
    options = [
        {method: find_ranges(fold.magnitudes, method=method, percentile=percentile) for method in METHODS}
        for fold in folds
    ]
    ranges = [dict(of_fold["percentile"]) for of_fold in options]
    session = _simulation(graph, ranges[0], work)
    references = [_references(graph, fold.held_out) for fold in folds]
    deciding = _deciding_outputs(graph)
    chosen: dict[str, str] = {}
    for done, output in enumerate(graph.spec.outputs):
        tensors = [tensor for tensor, decides in deciding.items() if decides == output]
        if not tensors:
            continue
        noise: dict[str, float] = {}
        for method in METHODS:
            progress("choosing ranges", done * len(METHODS) + len(noise), len(graph.spec.outputs) * len(METHODS))
            trials = [
                (
                    session,
                    fold.held_out,
                    reference,
                    {**fixed, **{tensor: of_fold[method][tensor] for tensor in tensors}},
                )
                for fold, reference, fixed, of_fold in zip(folds, references, ranges, options, strict=True)
            ]
            noise[method] = _noise(trials, [output])[output]
        chosen[output] = min(METHODS, key=lambda method: noise[method])
        for fixed, of_fold in zip(ranges, options, strict=True):
            fixed.update({tensor: of_fold[chosen[output]][tensor] for tensor in tensors})
    together = functools.reduce(merge_magnitudes, (fold.magnitudes for fold in folds))
    final = {method: find_ranges(together, method=method, percentile=percentile) for method in set(chosen.values())}
    return {tensor: final[chosen[output]][tensor] for tensor, output in deciding.items()}, chosen


def _deciding_outputs(graph: ExportedGraph) -> dict[str, str]:
    """For each tensor that is quantised, the first output that depends on its quantisation."""
    order = list(graph.spec.outputs)
    deciding: dict[str, str] = {}
    for layer in sorted(quantized_layers(graph), key=lambda layer: order.index(layer.output)):
        deciding.setdefault(layer.tensor, layer.output)
    return deciding


def correct_biases(
    graph: ExportedGraph,
    ranges: Mapping[str, float],
    batches: Sequence[np.ndarray],
    held_out: Sequence[Sample],
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
    least = _mean_db(_noise([(_simulation(graph, ranges, work), held_out, references, {})], graph.spec.outputs))
    for done in range(_CORRECTIONS):
        progress("correcting biases", done, _CORRECTIONS)
        as_lists = {name: shift.tolist() for name, shift in shifts.items()}
        path = work / "simulation.onnx"
        write_typed_graph(graph, precision=Precision.INT8, path=path, ranges=ranges, shifts=as_lists, half=False)
        actual = _channel_means(_exposing(onnx.load(path), results.values()), graph, batches, results)
        shifts = {name: shift + expected[name] - actual[name] for name, shift in shifts.items()}
        as_lists = {name: [float(np.float32(v)) for v in shift] for name, shift in shifts.items()}
        session = _simulation(graph, ranges, work, shifts=as_lists)
        noise = _mean_db(_noise([(session, held_out, references, {})], graph.spec.outputs))
        if noise < least:
            best, least = as_lists, noise
    return best


def noise_of_blocks(
    graph: ExportedGraph,
    ranges: Mapping[str, float],
    samples: Sequence[Sample],
    *,
    precision: Precision = Precision.INT8,
    excluded: Collection[str],
    work: Path,
    progress: Progress = no_progress,
) -> dict[str, Noise]:
    """What quantising each block alone does to every output; ``excluded`` layers stay out. Noises nearly add up."""
    layers = quantized_layers(graph)
    blocks = list(dict.fromkeys(layer.block for layer in layers if layer.name not in excluded))
    references = _references(graph, samples)
    found: dict[str, Noise] = {}
    for done, block in enumerate(blocks):
        progress("measuring blocks", done, len(blocks))
        others = {layer.name for layer in layers if layer.block != block or layer.name in excluded}
        session = _simulation(graph, ranges, work, precision=precision, excluded=others)
        found[block] = _noise([(session, samples, references, {})], graph.spec.outputs)
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


def _references(graph: ExportedGraph, samples: Sequence[Sample]) -> list[dict[str, np.ndarray]]:
    session = onnxruntime.InferenceSession(graph.path, reference_options(), providers=["CPUExecutionProvider"])
    outputs = list(graph.spec.outputs)
    found = [session.run(outputs, {graph.input.name: sample.images}) for sample in samples]
    return [dict(zip(outputs, values, strict=True)) for values in found]


def _exposing(model: onnx.ModelProto, tensors: Collection[str]) -> onnxruntime.InferenceSession:
    """A session whose outputs are these tensors, the same to the last bit for any batch size and number of cores."""
    del model.graph.output[:]
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in tensors)
    options = reference_options()
    options.intra_op_num_threads = 1  # threads that share a matrix product add it up in another order
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def _channel_means(
    session: onnxruntime.InferenceSession,
    graph: ExportedGraph,
    batches: Sequence[np.ndarray],
    results: Mapping[str, str],
) -> dict[str, np.ndarray]:
    """Mean over images and pixels of each NCHW result, by layer name."""
    rows: dict[str, list[np.ndarray]] = {name: [] for name in results}
    for name, value, images in _values(session, graph, batches, results):
        rows[name].append(value.mean(axis=(2, 3), dtype=np.float64) * (images / len(value)))
    count = sum(len(batch) for batch in batches)
    # Exact sums: what is rounded after them must not depend on the order, which is that of the batches.
    return {
        name: np.array([math.fsum(channel) for channel in np.concatenate(of_layer).T]) / count
        for name, of_layer in rows.items()
    }


def _channel_maxima(
    session: onnxruntime.InferenceSession,
    graph: ExportedGraph,
    batches: Sequence[np.ndarray],
    axes: Mapping[str, int],
) -> dict[str, np.ndarray]:
    """The largest |x| of each channel, by tensor."""
    found: dict[str, np.ndarray] = {}
    for name, value, _ in _values(session, graph, batches, {name: name for name in axes}):
        others = tuple(other for other in range(value.ndim) if other != axes[name])
        found[name] = np.maximum(found.get(name, 0.0), np.abs(value).max(axis=others))
    return found


def _values(
    session: onnxruntime.InferenceSession,
    graph: ExportedGraph,
    batches: Sequence[np.ndarray],
    tensors: Mapping[str, str],
) -> Iterator[tuple[str, np.ndarray, int]]:
    """Each key with the value of its tensor, and how many images that is of, each as often as the others."""
    for batch in batches:
        for chunk, repeats in chunks(batch, session):
            values = session.run(list(tensors.values()), {graph.input.name: chunk})
            yield from ((key, value, len(chunk) // repeats) for key, value in zip(tensors, values, strict=True))


def _mean_db(noise: Noise) -> float:
    return float(np.mean([10 * np.log10(max(value, 1e-30)) for value in noise.values()]))


def _simulation(
    graph: ExportedGraph,
    ranges: Mapping[str, float],
    work: Path,
    *,
    precision: Precision = Precision.INT8,
    excluded: Collection[str] = (),
    shifts: Mapping[str, Sequence[float]] | None = None,
) -> onnxruntime.InferenceSession:
    """A session over the int8 (or fp8) graph with fp32 around it, whose ranges may be fed with every run."""
    path = work / "simulation.onnx"
    write_typed_graph(
        graph, precision=precision, path=path, ranges=ranges, excluded=excluded, shifts=shifts, half=False
    )
    model = onnx.load(path)
    scales = {activation_scale(tensor, threshold)[0] for tensor, threshold in ranges.items()}
    for initializer in model.graph.initializer:
        if initializer.name in scales:  # an initializer that is an input too is a default
            model.graph.input.append(onnx.helper.make_tensor_value_info(initializer.name, onnx.TensorProto.FLOAT, []))
    onnx.save(model, path)
    return onnxruntime.InferenceSession(path, reference_options(), providers=["CPUExecutionProvider"])


def reference_options() -> onnxruntime.SessionOptions:
    """Without the fusions that make integer kernels of Q/DQ pairs: those round in other places."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.log_severity_level = 3  # errors only: these come back as exceptions
    return options


_Trial = tuple[onnxruntime.InferenceSession, Sequence[Sample], Sequence[Mapping[str, np.ndarray]], Mapping[str, float]]
"""A simulation, images, what fp32 makes of them, and ranges that replace those of the simulation."""


def _noise(trials: Sequence[_Trial], outputs: Sequence[str]) -> Noise:
    noise, signal = dict.fromkeys(outputs, 0.0), dict.fromkeys(outputs, 0.0)
    for session, samples, references, ranges in trials:
        known = {value.name for value in session.get_overridable_initializers()}
        scales = dict(activation_scale(tensor, threshold) for tensor, threshold in ranges.items())
        feeds = {name: scale for name, scale in scales.items() if name in known}
        for sample, reference in zip(samples, references, strict=True):
            values = session.run(list(outputs), {session.get_inputs()[0].name: sample.images, **feeds})
            for output, value in zip(outputs, values, strict=True):
                expected = reference[output].astype(np.float64)
                noise[output] += float(sample.weights @ _per_image((value - expected) ** 2))
                signal[output] += float(sample.weights @ _per_image(expected**2))
    return {output: noise[output] / signal[output] if signal[output] else 0.0 for output in outputs}


def _per_image(values: np.ndarray) -> np.ndarray:
    sums: np.ndarray = values.reshape(len(values), -1).sum(axis=1)
    return sums
