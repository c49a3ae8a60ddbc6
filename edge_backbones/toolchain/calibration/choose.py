"""Choose ranges, factors, centres, rounded weights and bias corrections by the noise that they leave on held-out images.

Each choice is judged on other images than it was found on, and dropped where it does not help.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir

from edge_backbones.engines.onnxruntime.library import onnxruntime
from edge_backbones.progress import Progress, no_progress
from edge_backbones.spec import Precision
from edge_backbones.toolchain.artifacts import ExportedGraph
from edge_backbones.toolchain.calibration.noise import Run, Sample, mean_db, measure_noise, run_reference, simulate
from edge_backbones.toolchain.calibration.ranges import METHODS, Magnitudes, chunks, find_ranges, merge_magnitudes
from edge_backbones.toolchain.onnx_runtime import reference_options
from edge_backbones.toolchain.quantize import centre, equalise, optq
from edge_backbones.toolchain.quantize.onnx_edits import constant_of, load_graph, name_of
from edge_backbones.toolchain.quantize.placement import find_placement, output_channel_axis, quantized_layers
from edge_backbones.toolchain.quantize.qdq import in_steps
from edge_backbones.toolchain.quantize.typed_graph import write_typed_graph

_CORRECTIONS = 3
_MOST_MOMENTS = 64 << 20  # numbers in the second moments that are held at a time: 512 MiB


@dataclass(frozen=True)
class Fold:
    """The counts of some images, and other images to judge a choice by."""

    magnitudes: Mapping[str, Magnitudes]
    held_out: Sequence[Sample]


def choose_factors(
    graph: ExportedGraph, batches: Sequence[np.ndarray], held_out: Sequence[Sample], *, work: Path
) -> dict[str, list[float]]:
    """Return factors by tensor for `equalise.write_equalised_graph`, from the largest values of each channel in ``batches``.

    Empty where the noise on ``held_out`` images, as a mean over outputs in dB, does not fall: judged with the tensors in
    question alone quantised, clipped at their largest value.
    """
    sites = equalise.tensors_to_equalise(graph)
    if not sites:
        return {}
    axes = {name: channels.axis for name, channels in sites.items()}
    largest = _channel_maxima(_exposing(onnx.load(graph.path), axes), graph, batches, axes)
    if not all(np.isfinite(values).all() for values in largest.values()):
        return {}  # `ranges.collect_magnitudes` refuses such a tensor by name
    found = {name: equalise.factors(values, sites[name].strength).tolist() for name, values in largest.items()}
    equalised = equalise.write_equalised_graph(graph, found, work / "equalised.onnx")
    others = {layer.name for layer in quantized_layers(graph) if layer.tensor not in axes}
    references = run_reference(graph, held_out)
    judged = []
    for tried, divisors in ((graph, dict.fromkeys(found, 1.0)), (equalised, found)):
        ranges = {name: float((values / divisors[name]).max()) or 1.0 for name, values in largest.items()}
        simulation = simulate(tried, ranges, work, excluded=others)
        judged.append(mean_db(measure_noise([Run(simulation, held_out, references)], graph.spec.outputs)))
    return found if judged[1] < judged[0] else {}


def choose_centres(
    graph: ExportedGraph,
    ranges: Mapping[str, float],
    batches: Sequence[np.ndarray],
    held_out: Sequence[Sample],
    *,
    work: Path,
) -> tuple[dict[str, float], dict[str, float]]:
    """Return centres by tensor for `centre.write_centred_graph`, and the ranges of the centred tensors.

    The farther end of a tensor's values is that of ``ranges``; ``batches`` say which end that is and where the other one
    lies. Outputs are
    decided one after the other, as in `choose_ranges`: the tensors that an output is the first to depend on get their
    centres if its noise on ``held_out`` images falls.
    """
    tensors = {name: name for name in centre.tensors_to_centre(graph)}
    if not tensors:
        return {}, {}
    found: dict[str, tuple[float, float]] = {}
    for name, (low, high) in _extremes(graph, batches, tensors).items():
        reach = ranges[name]  # the farther end, which more images have shown
        of_tensor = (
            centre.centre_of(max(low, -reach), reach) if high > -low else centre.centre_of(-reach, min(high, reach))
        )
        if of_tensor is not None:
            found[name] = of_tensor
    references = run_reference(graph, held_out)
    deciding = _deciding_outputs(graph)
    centres: dict[str, float] = {}
    centred_ranges: dict[str, float] = {}
    for output in graph.spec.outputs:
        group = [name for name in found if deciding[name] == output]
        if not group:
            continue
        tried = {**centres, **{name: found[name][0] for name in group}}
        tried_ranges = {**centred_ranges, **{centre.centred_name(name): found[name][1] for name in group}}
        before, after = (
            measure_noise(
                [Run(_simulate_centred(graph, some, {**ranges, **of_some}, work), held_out, references)], [output]
            )[output]
            for some, of_some in ((centres, centred_ranges), (tried, tried_ranges))
        )
        if after < before:
            centres, centred_ranges = tried, tried_ranges
    return centres, centred_ranges


def _simulate_centred(
    graph: ExportedGraph, centres: Mapping[str, float], ranges: Mapping[str, float], work: Path
) -> onnxruntime.InferenceSession:
    centred = centre.write_centred_graph(graph, centres, work / "centred.onnx") if centres else graph
    return simulate(centred, ranges, work)


def _extremes(
    graph: ExportedGraph, batches: Sequence[np.ndarray], tensors: Mapping[str, str]
) -> dict[str, tuple[float, float]]:
    """Return the lowest and the highest value of each tensor."""
    found: dict[str, tuple[float, float]] = {}
    for name, value in _values(_exposing(onnx.load(graph.path), tensors), graph, batches, tensors):
        low, high = found.get(name, (math.inf, -math.inf))
        found[name] = min(low, float(value.min())), max(high, float(value.max()))
    return found


def choose_ranges(
    graph: ExportedGraph,
    folds: Sequence[Fold],
    *,
    percentile: float,
    work: Path,
    progress: Progress = no_progress,
) -> tuple[dict[str, float], dict[str, str]]:
    """Return the ranges of the estimator that leaves each output the least noise, and that estimator by output.

    Each fold is judged on its held-out images with the ranges that its own counts give (cross-validation); the ranges that
    are returned come from the counts of all folds together. Outputs are decided one after the other: the tensors that
    only later ones depend on are still to come, those before are fixed.
    """
    options = [
        {method: find_ranges(fold.magnitudes, method=method, percentile=percentile) for method in METHODS}
        for fold in folds
    ]
    ranges = [dict(of_fold["percentile"]) for of_fold in options]
    simulation = simulate(graph, ranges[0], work)
    references = [run_reference(graph, fold.held_out) for fold in folds]
    deciding = _deciding_outputs(graph)
    chosen: dict[str, str] = {}
    most = len(graph.spec.outputs) * len(METHODS)
    for done, output in enumerate(graph.spec.outputs):
        tensors = [tensor for tensor, decides in deciding.items() if decides == output]
        if not tensors:
            continue
        noise: dict[str, float] = {}
        for method in METHODS:
            progress("choosing ranges", done * len(METHODS) + len(noise), most)
            runs = [
                Run(
                    simulation,
                    fold.held_out,
                    reference,
                    {**fixed, **{tensor: of_fold[method][tensor] for tensor in tensors}},
                )
                for fold, reference, fixed, of_fold in zip(folds, references, ranges, options, strict=True)
            ]
            noise[method] = measure_noise(runs, [output])[output]
        chosen[output] = min(METHODS, key=lambda method: noise[method])
        for fixed, of_fold in zip(ranges, options, strict=True):
            fixed.update({tensor: of_fold[chosen[output]][tensor] for tensor in tensors})
    progress("choosing ranges", most, most)
    together = functools.reduce(merge_magnitudes, (fold.magnitudes for fold in folds))
    final = {method: find_ranges(together, method=method, percentile=percentile) for method in set(chosen.values())}
    return {tensor: final[chosen[output]][tensor] for tensor, output in deciding.items()}, chosen


def _deciding_outputs(graph: ExportedGraph) -> dict[str, str]:
    """Return, for each tensor that is quantised, the first output that depends on its quantisation."""
    order = list(graph.spec.outputs)
    deciding: dict[str, str] = {}
    for layer in sorted(quantized_layers(graph), key=lambda layer: order.index(layer.output)):
        deciding.setdefault(layer.tensor, layer.output)
    return deciding


def choose_rounding(
    graph: ExportedGraph,
    ranges: Mapping[str, float],
    batches: Sequence[np.ndarray],
    held_out: Sequence[Sample],
    *,
    work: Path,
    progress: Progress = no_progress,
) -> dict[str, bytes]:
    """Return how int8 weights are rounded, by name and as `optq.pack` writes it, from what their layers read in ``batches``.

    Empty when the noise on ``held_out`` images, as a mean over outputs in dB, does not fall.
    """
    layers_of: dict[ir.Value, list[ir.Node]] = {}
    for layer in find_placement(load_graph(graph).graph, frozenset()).weights:
        weight = layer.inputs[1]
        if weight is not None and optq.parts_of(layer)[0] and np.isfinite(constant_of(weight)).all():
            layers_of.setdefault(weight, []).append(layer)
    # A weight that is read along both axes has two scales.
    left = [of for of in layers_of.values() if len({output_channel_axis(layer) for layer in of}) == 1]
    rounding: dict[str, bytes] = {}
    most = len(left)
    while left:
        progress("rounding weights", most - len(left), most)
        sizes = np.cumsum([parts * columns**2 for parts, columns in (optq.parts_of(of[0]) for of in left)])
        some = max(1, int(np.searchsorted(sizes, _MOST_MOMENTS, side="right")))
        rounding |= _round_weights(graph, left[:some], batches)
        left = left[some:]
    progress("rounding weights", most, most)
    references = run_reference(graph, held_out)
    before, after = (
        mean_db(measure_noise([Run(simulation, held_out, references)], graph.spec.outputs))
        for simulation in (simulate(graph, ranges, work), simulate(graph, ranges, work, rounding=rounding))
    )
    return rounding if after < before else {}


def _round_weights(
    graph: ExportedGraph, layers_of: Sequence[Sequence[ir.Node]], batches: Sequence[np.ndarray]
) -> dict[str, bytes]:
    """Round some weights. ``layers_of``: for each of them, the layers that read it."""
    moments: list[np.ndarray | float] = [0.0] * len(layers_of)
    reading: dict[str, list[tuple[int, ir.Node]]] = {}
    for index, layers in enumerate(layers_of):
        for layer in layers:
            reading.setdefault(name_of(layer.inputs[0]), []).append((index, layer))
    tensors = {name: name for name in reading}
    for name, value in _values(_exposing(onnx.load(graph.path), tensors), graph, batches, tensors):
        for index, layer in reading[name]:
            moments[index] += optq.moments_of(layer, value)
    found = {}
    for (layer, *_), of_weight in zip(layers_of, moments, strict=True):
        weight = layer.inputs[1]
        assert weight is not None  # find_placement has checked it
        steps, _ = in_steps(weight, output_channel_axis(layer))
        found[name_of(weight)] = optq.pack(steps, optq.round_weight(layer, steps, np.asarray(of_weight)))
    return found


def correct_biases(
    graph: ExportedGraph,
    ranges: Mapping[str, float],
    batches: Sequence[np.ndarray],
    held_out: Sequence[Sample],
    *,
    rounding: Mapping[str, bytes] | None = None,
    work: Path,
    progress: Progress = no_progress,
) -> dict[str, list[float]]:
    """Return what to add to the bias of each Conv so that its mean over images is that of fp32, by layer and output channel.

    Bias correction (Nagel et al. 2019, Data-free quantization, section 4.2, with the means of real images). All layers are
    corrected at once, a few times over: every correction moves what the layers behind it see. Empty when the noise on
    ``held_out`` images, as a mean over outputs in dB, does not fall.
    """
    results = {layer.name: layer.result for layer in quantized_layers(graph) if layer.op_type == "Conv"}
    if not results:
        return {}
    references = run_reference(graph, held_out)
    expected = _channel_means(_exposing(onnx.load(graph.path), results.values()), graph, batches, results)
    best: dict[str, list[float]] = {}
    shifts: dict[str, np.ndarray] = {name: np.zeros_like(mean) for name, mean in expected.items()}
    plain = simulate(graph, ranges, work, rounding=rounding)
    least = mean_db(measure_noise([Run(plain, held_out, references)], graph.spec.outputs))
    for done in range(_CORRECTIONS):
        progress("correcting biases", done, _CORRECTIONS)
        as_lists = {name: shift.tolist() for name, shift in shifts.items()}
        path = work / "simulation.onnx"
        write_typed_graph(
            graph,
            precision=Precision.INT8,
            path=path,
            ranges=ranges,
            shifts=as_lists,
            rounding=rounding,
            half=False,
        )
        actual = _channel_means(_exposing(onnx.load(path), results.values()), graph, batches, results)
        shifts = {name: shift + expected[name] - actual[name] for name, shift in shifts.items()}
        as_lists = {name: [float(np.float32(v)) for v in shift] for name, shift in shifts.items()}
        simulation = simulate(graph, ranges, work, shifts=as_lists, rounding=rounding)
        noise = mean_db(measure_noise([Run(simulation, held_out, references)], graph.spec.outputs))
        if noise < least:
            best, least = as_lists, noise
    progress("correcting biases", _CORRECTIONS, _CORRECTIONS)
    return best


def _exposing(model: onnx.ModelProto, tensors: Collection[str]) -> onnxruntime.InferenceSession:
    """Return a session whose outputs are these tensors, the same to the last bit for any batch size and number of cores."""
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
    """Return the mean over images and pixels of each NCHW result, by layer name."""
    rows: dict[str, list[np.ndarray]] = {name: [] for name in results}
    for name, value in _values(session, graph, batches, results):
        rows[name].append(value.mean(axis=(2, 3), dtype=np.float64))
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
    """Return the largest |x| of each channel, by tensor."""
    found: dict[str, np.ndarray] = {}
    for name, value in _values(session, graph, batches, {name: name for name in axes}):
        others = tuple(other for other in range(value.ndim) if other != axes[name])
        found[name] = np.maximum(found.get(name, 0.0), np.abs(value).max(axis=others))
    return found


def _values(
    session: onnxruntime.InferenceSession,
    graph: ExportedGraph,
    batches: Sequence[np.ndarray],
    tensors: Mapping[str, str],
) -> Iterator[tuple[str, np.ndarray]]:
    """Yield each key with the value of its tensor on one image, image by image.

    The first axis has length 1, or more where the graph puts parts of an image in the place of images (attention windows).
    Where it does not run along images at all, the whole value comes once.
    """
    for batch in batches:
        for chunk, repeats in chunks(batch, session):
            values = session.run(list(tensors.values()), {graph.input.name: chunk})
            for key, value in zip(tensors, values, strict=True):
                whole = len(value) % len(chunk) != 0
                for of_image in [value] if whole else np.split(value, len(chunk))[::repeats]:
                    yield key, of_image
