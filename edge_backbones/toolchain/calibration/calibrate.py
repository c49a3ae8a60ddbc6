"""The calibration step: find ranges on the calibration set, or read those of another build and check that they fit."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

from edge_backbones.bundle.manifest import CalibrationFile, decode_calibration
from edge_backbones.bundle.reader import Bundle
from edge_backbones.errors import CalibrationError
from edge_backbones.images.config import ImageConfig
from edge_backbones.progress import Progress
from edge_backbones.reading import file_sha256, read_file, why_not
from edge_backbones.spec import Precision
from edge_backbones.toolchain.artifacts import ExportedGraph
from edge_backbones.toolchain.calibration import choose, ranges
from edge_backbones.toolchain.calibration.choose import Fold
from edge_backbones.toolchain.calibration.images import FEWEST_TO_HOLD_OUT, ImageSet, halves, weighted_sample
from edge_backbones.toolchain.calibration.noise import Sample
from edge_backbones.toolchain.calibration.ranges import Magnitudes
from edge_backbones.toolchain.quantize import centre, equalise
from edge_backbones.toolchain.quantize.placement import tensors_to_calibrate

Method = Literal["auto", "max", "percentile", "entropy", "mse"]

_MAX_BYTES = 256 << 20
BATCH = 8  # images in a batch, where the batch of the graph is dynamic
# Pixels of the images that are run again and again: sixteen of 224 x 224. More would be minutes of resnet50.
_PIXELS = 16 * 224 * 224


@dataclass(frozen=True)
class Feed:
    """Calibration images as batches of a graph's size.

    Args:
        images: the calibration set.
        indices: which of its images to calibrate on.
        batch: images in a batch.
        fill: repeat images in a last batch that is smaller, because the graph takes no smaller one.
    """

    images: ImageSet
    indices: list[int]
    batch: int
    fill: bool

    @property
    def enough(self) -> int:
        """How many images are run again and again; all others are run once, to be counted."""
        pixels = int(np.prod(self.images.inputs.shape[1:])) // 3
        return max(FEWEST_TO_HOLD_OUT, _PIXELS // pixels)

    def batches(self, indices: Sequence[int]) -> Iterator[np.ndarray]:
        """Copy these images into batches; the last one may be smaller."""
        return self.images.batches(self.batch, indices)

    def samples(self, weights: Mapping[int, float]) -> list[Sample]:
        """Split images into batches of shape (batch, *input).

        ``weights`` is how many calibration images each image represents, by index. In the samples padding has weight 0.
        """
        figures = np.array(list(weights.values()))
        found = []
        for position, images in enumerate(self.batches(list(weights))):
            filled = (
                np.resize(images, (self.batch, *images.shape[1:])) if self.fill else images
            )  # resize() repeats them
            of_batch = figures[position * self.batch :][: len(images)]
            found.append(Sample(filled, np.pad(of_batch, (0, len(filled) - len(images)))))
        return found

    def furthest(self, magnitudes: Mapping[str, Magnitudes], counted: Sequence[int]) -> Iterable[int]:
        """Yield the image with the largest value of each tensor. ``counted``: indices of the images that were counted."""
        for seen in magnitudes.values():
            if seen.furthest is not None:
                yield counted[seen.furthest]

    def typical(self) -> list[Sample]:
        """Return evenly spaced images that represent all of them."""
        return self.samples(weighted_sample(self.indices, (), self.enough))


@dataclass(frozen=True)
class Calibrated:
    """What the calibration step hands on to the candidates.

    Args:
        file: ranges and what they hold for; None where no precision needs ranges.
        graph: the fp32 graph that the ranges are of, with its channels equalised.
        samples: images to measure noise on.
        excluded: names of the layers that the user leaves in half.
        large: names of the tensors whose values come near what fp16 can hold.
    """

    file: CalibrationFile | None
    graph: ExportedGraph
    samples: Sequence[Sample]
    excluded: frozenset[str]
    large: tuple[str, ...]

    def graph_of(self, precision: Precision, work: Path, excluded: Collection[str] = ()) -> ExportedGraph:
        """Return the graph that a precision is made from: for int8 the one whose tensors are centred, written to ``work``.

        fp8 and the layers of ``excluded``, in half, have their finest steps at 0 and read tensors without a centre.
        """
        centres = {} if self.file is None or not precision.info.is_integer else self.file.centres
        return centred_graph(self.graph, centres, work, excluded)


def calibrate(
    graph: ExportedGraph,
    feed: Feed,
    *,
    method: Method,
    percentile: float,
    config: ImageConfig,
    work: Path,
    progress: Progress,
) -> tuple[CalibrationFile, list[Sample]]:
    """Find the range of every tensor that int8 and fp8 quantise; also return the images that noise was measured on.

    ``auto``: channels are equalised, each output gets its estimator, activations are centred, weights are rounded by what
    layers read and biases are corrected, where held-out images say that it helps. Any other ``method`` is the estimator of
    all tensors. ``work``: a folder for intermediate graphs. Raises CalibrationError, as `ranges.collect_magnitudes` does.
    """
    if method == "auto":
        found = _choose(graph, feed, percentile, work, progress)
    else:
        found = _estimate(graph, feed, method, percentile, progress)
    file = CalibrationFile(
        network_sha256=_sha256(graph),
        data_sha256=feed.images.fingerprint,
        preprocessing=config,
        method=method,
        percentile=percentile,
        chosen=found.chosen,
        images=tuple(feed.images.names[index] for index in feed.indices),
        held_out=sum(int((sample.weights > 0).sum()) for sample in found.samples) if method == "auto" else 0,
        skipped=feed.images.skipped,
        silent=tuple(name for name, seen in found.magnitudes.items() if seen.largest == 0.0),
        factors={name: tuple(values) for name, values in found.factors.items()},
        centres=found.centres,
        ranges=found.ranges,
        largest=ranges.find_ranges(found.magnitudes, method="max"),
        shifts={name: tuple(values) for name, values in found.shifts.items()},
        large=ranges.beyond_half(found.largest),
        rounding=found.rounding,
    )
    return file, found.samples


@dataclass(frozen=True)
class _Found:
    """What calibration images showed.

    Args:
        ranges: the range of each tensor.
        magnitudes: the counts of each tensor over all images.
        largest: the largest |x| of every float tensor of the graph.
        samples: images that noise was measured on, or may be.
        chosen: the estimator of each output, where several were tried.
        factors: what channels are divided by, by tensor.
        centres: what is subtracted from tensors.
        shifts: what is added to biases, by layer.
        rounding: how weights are rounded, by name.
    """

    ranges: dict[str, float]
    magnitudes: dict[str, Magnitudes]
    largest: dict[str, float]
    samples: list[Sample]
    chosen: dict[str, str] = field(default_factory=dict)
    factors: dict[str, list[float]] = field(default_factory=dict)
    centres: dict[str, float] = field(default_factory=dict)
    shifts: dict[str, list[float]] = field(default_factory=dict)
    rounding: dict[str, bytes] = field(default_factory=dict)


def _estimate(graph: ExportedGraph, feed: Feed, method: str, percentile: float, progress: Progress) -> _Found:
    """Apply one estimator to all tensors."""
    largest = dict.fromkeys(ranges.float_tensors(graph.path), 0.0)
    magnitudes = _count(graph, feed, feed.indices, largest, progress, before=0)
    return _Found(
        ranges=ranges.find_ranges(magnitudes, method=method, percentile=percentile),
        magnitudes=magnitudes,
        largest=largest,
        samples=feed.samples(weighted_sample(feed.indices, feed.furthest(magnitudes, feed.indices), feed.enough)),
    )


def _choose(graph: ExportedGraph, feed: Feed, percentile: float, work: Path, progress: Progress) -> _Found:
    """Equalise, choose an estimator for each output, centre, round weights and correct biases, judged on images held out.

    What one half of the images shows is judged on the other half. Fewer images than `FEWEST_TO_HOLD_OUT` are both halves.
    """
    one, other = halves(feed.indices)
    too_few = one == other
    correcting = list(feed.batches(one[: feed.enough]))
    progress("equalising", 0, None)
    judging = feed.samples(weighted_sample(other, (), feed.enough))
    factors = choose.choose_factors(graph, correcting, judging, work=work)
    equalised = equalised_graph(graph, factors, work)

    largest = dict.fromkeys(ranges.float_tensors(equalised.path), 0.0)  # no larger in `graph` than when equalised
    first = _count(equalised, feed, one, largest, progress, before=0)
    second = first if too_few else _count(equalised, feed, other, largest, progress, before=len(one))
    of_one, of_other = (
        feed.samples(weighted_sample(half, feed.furthest(counts, half), feed.enough // 2))
        for half, counts in ((one, first), (other, second))
    )
    folds = [Fold(first, of_other)] if too_few else [Fold(first, of_other), Fold(second, of_one)]
    found, chosen = choose.choose_ranges(equalised, folds, percentile=percentile, work=work, progress=progress)
    progress("centring", 0, None)
    centres, of_centred = choose.choose_centres(equalised, found, correcting, of_other, work=work)
    found |= of_centred
    centred = centred_graph(equalised, centres, work)
    rounding = choose.choose_rounding(centred, found, correcting, of_other, work=work, progress=progress)
    shifts = choose.correct_biases(
        centred, found, correcting, of_other, rounding=rounding, work=work, progress=progress
    )
    return _Found(
        ranges=found,
        magnitudes=first if too_few else ranges.merge_magnitudes(first, second),
        largest=largest,
        samples=of_other if too_few else [*of_one, *of_other],
        chosen=chosen,
        factors=factors,
        centres=centres,
        shifts=shifts,
        rounding=rounding,
    )


def _count(
    graph: ExportedGraph,
    feed: Feed,
    indices: Sequence[int],
    largest: dict[str, float],
    progress: Progress,
    *,
    before: int,
) -> dict[str, Magnitudes]:
    """Count the tensors that are quantised over these images. ``before``: how many images were counted before them."""
    return ranges.collect_magnitudes(
        graph.path,
        tensors_to_calibrate(graph),
        feed.batches(indices),
        largest=largest,
        progress=lambda step, done, _: progress(step, before + done, len(feed.indices)),
    )


def equalised_graph(graph: ExportedGraph, by_tensor: Mapping[str, Sequence[float]], work: Path) -> ExportedGraph:
    """Return the graph that the ranges are of: ``graph`` with these tensors divided by their factors."""
    return equalise.write_equalised_graph(graph, by_tensor, work / "equalised.onnx") if by_tensor else graph


def centred_graph(
    equalised: ExportedGraph, centres: Mapping[str, float], work: Path, excluded: Collection[str] = ()
) -> ExportedGraph:
    """Return the graph that int8 is made from: ``equalised`` with these centres subtracted from what int8 layers read."""
    if not centres:
        return equalised
    return centre.write_centred_graph(equalised, centres, work / "centred.onnx", excluded=excluded)


def read_calibration(path: Path) -> CalibrationFile:
    """Read a calibration.json, or the one in a bundle, whose digest is checked. Raises CalibrationError, BundleError."""
    if Path(path).is_dir():
        bundle = Bundle.open(path)
        if bundle.manifest.calibration is None:
            raise CalibrationError(f"{path} was built without int8 and has no ranges: pass calibration images instead")
        record = bundle.manifest.calibration.file
        return decode_calibration(bundle.read(record), str(bundle.path / record.path))
    try:
        data = read_file(path, limit=_MAX_BYTES)
    except OSError as error:
        raise CalibrationError(f"{path} cannot be read ({why_not(error)}): pass a calibration.json") from error
    return decode_calibration(data, str(path))


def check_fits(
    found: CalibrationFile,
    *,
    graph: ExportedGraph,
    config: ImageConfig,
    images: ImageSet | None,
    method: Method | None,
    percentile: float | None,
) -> None:
    """Raise CalibrationError unless everything that ranges depend on is as it was, naming the field that is not.

    ``images``, ``method`` and ``percentile`` are None where the user asks for nothing.
    """
    here = {
        "network_sha256": _sha256(graph),
        "data_sha256": found.data_sha256 if images is None else images.fingerprint,
        "preprocessing": config,
        "method": method or found.method,
        "percentile": found.percentile if percentile is None else percentile,
    }
    for name, value in here.items():
        there = getattr(found, name)
        if value != there:
            raise CalibrationError(
                f"the calibration does not fit: {name} is {there} there and {value} here; calibrate again with --images"
            )


def notes(images: ImageSet, found: CalibrationFile, *, golden: Sequence[str], synthetic: bool) -> tuple[str, ...]:
    """Say what is unusual about the calibration, in a sentence each. ``golden``: names of the golden images."""
    said = []
    if synthetic:
        said.append(
            "there were ranges but no images: parity was measured, and blocks were weighed, on synthetic images, which are "
            "not typical: pass --images too"
        )
    if images.blank:
        said.append(f"{len(images.blank)} images are of one colour ({images.blank[0]} first): leave them out")
    if len(found.images) < FEWEST_TO_HOLD_OUT:
        chosen = (
            "the ranges were chosen on those that they were counted on"
            if found.held_out
            else "others may reach further"
        )
        said.append(f"only {len(found.images)} images: {chosen}; a few dozen typical ones are better")
    seen = set(golden) & set(found.images)
    if seen:
        said.append(
            f"{len(seen)} of the {len(golden)} golden images were calibrated on too, which flatters parity: pass more "
            "images, or a smaller --golden"
        )
    if found.silent:
        said.append(
            f"{len(found.silent)} tensors were zero on every image ({found.silent[0]} first): dead layers, or images that "
            "are not typical"
        )
    return tuple(said)


def _sha256(graph: ExportedGraph) -> str:
    return file_sha256(graph.path)
