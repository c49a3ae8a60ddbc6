"""Measure the noise that int8 or fp8 adds to each output of a graph, as a whole or for each block alone.

The typed graph is run in ONNX Runtime with fp32 around its Q/DQ pairs: the arithmetic of the int8 graph, without an engine
to compile for every question. Noise is |x - r|^2 / |r|^2 over all images, r from the fp32 graph; -10 log10 of it is SQNR
in dB.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx

from edge_backbones.engines.onnxruntime.library import onnxruntime
from edge_backbones.progress import Progress, no_progress
from edge_backbones.spec import Precision
from edge_backbones.toolchain.artifacts import ExportedGraph
from edge_backbones.toolchain.onnx_runtime import reference_options
from edge_backbones.toolchain.quantize.formats import activation_scale
from edge_backbones.toolchain.quantize.placement import quantized_layers
from edge_backbones.toolchain.quantize.typed_graph import write_typed_graph

Noise = Mapping[str, float]
"""Noise by output of a graph."""


class Sample(NamedTuple):
    """A batch of network inputs, and how many calibration images each of them represents; padding has weight 0."""

    images: np.ndarray
    weights: np.ndarray


class Run(NamedTuple):
    """What noise is measured on: a simulation, images for it, and their fp32 outputs from `run_reference`.

    ``ranges`` replace those that the simulation was made with.
    """

    simulation: onnxruntime.InferenceSession
    samples: Sequence[Sample]
    references: Sequence[Mapping[str, np.ndarray]]
    ranges: Mapping[str, float] = {}


def noise_of_blocks(
    graph: ExportedGraph,
    ranges: Mapping[str, float],
    samples: Sequence[Sample],
    *,
    precision: Precision = Precision.INT8,
    excluded: Collection[str],
    rounding: Mapping[str, bytes] | None = None,
    work: Path,
    progress: Progress = no_progress,
) -> dict[str, Noise]:
    """Measure the noise of every output with one block quantised, for each block. ``excluded`` layers are never quantised.

    The noises of blocks nearly add up to the noise of the whole.
    """
    layers = quantized_layers(graph, precision)
    blocks = list(dict.fromkeys(layer.block for layer in layers if layer.name not in excluded))
    references = run_reference(graph, samples)
    found: dict[str, Noise] = {}
    for done, block in enumerate(blocks):
        progress("measuring blocks", done, len(blocks))
        others = {layer.name for layer in layers if layer.block != block or layer.name in excluded}
        simulation = simulate(graph, ranges, work, precision=precision, excluded=others, rounding=rounding)
        found[block] = measure_noise([Run(simulation, samples, references)], graph.spec.outputs)
    progress("measuring blocks", len(blocks), len(blocks))
    return found


def blocks_to_exclude(noise: Mapping[str, Noise], excess: Noise) -> list[str]:
    """Name the blocks to leave in half so that the noise of every output falls by the factor ``excess`` (1 where it is fine).

    Greedy: the next one is always the block with the largest share of an output that is still too noisy.
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


def run_reference(graph: ExportedGraph, samples: Sequence[Sample]) -> list[dict[str, np.ndarray]]:
    """Run the fp32 graph: its outputs by name, for each sample."""
    session = onnxruntime.InferenceSession(graph.path, reference_options(), providers=["CPUExecutionProvider"])
    outputs = list(graph.spec.outputs)
    found = [session.run(outputs, {graph.input.name: sample.images}) for sample in samples]
    return [dict(zip(outputs, values, strict=True)) for values in found]


def simulate(
    graph: ExportedGraph,
    ranges: Mapping[str, float],
    work: Path,
    *,
    precision: Precision = Precision.INT8,
    excluded: Collection[str] = (),
    shifts: Mapping[str, Sequence[float]] | None = None,
    rounding: Mapping[str, bytes] | None = None,
) -> onnxruntime.InferenceSession:
    """Return a session over the int8 (or fp8) graph with fp32 around its Q/DQ pairs. Ranges may be fed with every run."""
    path = work / "simulation.onnx"
    write_typed_graph(
        graph,
        precision=precision,
        path=path,
        ranges=ranges,
        excluded=excluded,
        shifts=shifts,
        rounding=rounding,
        half=False,
    )
    model = onnx.load(path)
    scales = {activation_scale(tensor, threshold)[0] for tensor, threshold in ranges.items()}
    for initializer in model.graph.initializer:
        if initializer.name in scales:  # an initializer that is an input too is a default
            model.graph.input.append(onnx.helper.make_tensor_value_info(initializer.name, onnx.TensorProto.FLOAT, []))
    onnx.save(model, path)
    return onnxruntime.InferenceSession(path, reference_options(), providers=["CPUExecutionProvider"])


def measure_noise(runs: Sequence[Run], outputs: Sequence[str]) -> Noise:
    """Measure the noise of these outputs over the images of all runs together."""
    noise, signal = dict.fromkeys(outputs, 0.0), dict.fromkeys(outputs, 0.0)
    for simulation, samples, references, ranges in runs:
        known = {value.name for value in simulation.get_overridable_initializers()}
        scales = dict(activation_scale(tensor, threshold) for tensor, threshold in ranges.items())
        feeds = {name: scale for name, scale in scales.items() if name in known}
        for sample, reference in zip(samples, references, strict=True):
            values = simulation.run(list(outputs), {simulation.get_inputs()[0].name: sample.images, **feeds})
            for output, value in zip(outputs, values, strict=True):
                expected = reference[output].astype(np.float64)
                noise[output] += float(sample.weights @ _per_image((value - expected) ** 2))
                signal[output] += float(sample.weights @ _per_image(expected**2))
    return {output: noise[output] / signal[output] if signal[output] else 0.0 for output in outputs}


def mean_db(noise: Noise) -> float:
    """Return the mean noise over outputs, in dB."""
    return float(np.mean([10 * np.log10(max(value, 1e-30)) for value in noise.values()]))


def _per_image(values: np.ndarray) -> np.ndarray:
    sums: np.ndarray = values.reshape(len(values), -1).sum(axis=1)
    return sums
