"""From images to calibration.json, or from the calibration.json of another build: the ranges, and what they hold for."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from edge_backbones.bundle.manifest import CalibrationFile, decode_calibration
from edge_backbones.bundle.reader import Bundle, record_file
from edge_backbones.errors import CalibrationError
from edge_backbones.images.fit import ImageConfig
from edge_backbones.progress import Progress
from edge_backbones.reading import read_file
from edge_backbones.toolchain.artifacts import ExportedGraph
from edge_backbones.toolchain.calibration import noise as choose
from edge_backbones.toolchain.calibration import ranges
from edge_backbones.toolchain.calibration.images import FEWEST_TO_HOLD_OUT, ImageSet, halves, stand_ins
from edge_backbones.toolchain.calibration.noise import Fold, Sample
from edge_backbones.toolchain.calibration.ranges import Magnitudes
from edge_backbones.toolchain.quantize import equalise
from edge_backbones.toolchain.quantize.placement import tensors_to_calibrate

Method = Literal["auto", "max", "percentile", "entropy", "mse"]

_MAX_BYTES = 256 << 20
BATCH = 8  # of a graph whose batch is dynamic
# Pixels of the images that are run again and again: sixteen of 224 x 224. More would be minutes of resnet50.
_PIXELS = 16 * 224 * 224


@dataclass(frozen=True)
class Feed:
    """Calibration images as batches of a graph's size. ``fill``: the graph takes no smaller batch."""

    images: ImageSet
    indices: list[int]
    batch: int
    fill: bool

    @property
    def enough(self) -> int:
        """How many images are run more than once."""
        pixels = int(np.prod(self.images.inputs.shape[1:])) // 3
        return max(FEWEST_TO_HOLD_OUT, _PIXELS // pixels)

    def batches(self, indices: Sequence[int]) -> Iterator[np.ndarray]:
        return self.images.batches(self.batch, indices)

    def samples(self, weights: Mapping[int, float]) -> list[Sample]:
        """What images stand for, in batches; an image that only fills a batch stands for none."""
        figures = np.array(list(weights.values()))
        found = []
        for position, images in enumerate(self.batches(list(weights))):
            filled = np.resize(images, (self.batch, *images.shape[1:])) if self.fill else images  # repeats them
            of_batch = figures[position * self.batch :][: len(images)]
            found.append(Sample(filled, np.pad(of_batch, (0, len(filled) - len(images)))))
        return found

    def furthest(self, magnitudes: Mapping[str, Magnitudes], counted: Sequence[int]) -> Iterable[int]:
        """For each tensor, the image with its largest value, of those that were counted."""
        for seen in magnitudes.values():
            if seen.furthest is not None:
                yield counted[seen.furthest]

    def typical(self) -> list[Sample]:
        """A sample of all images."""
        return self.samples(stand_ins(self.indices, (), self.enough))


@dataclass(frozen=True)
class Calibrated:
    """What the calibration hands on to the candidates.

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
    """Count activations over the images and find where to clip them; also the images that decisions were made on.

    ``auto``: channels are equalised, each output gets its estimator and biases are corrected, where images that were
    not counted for it say that it helps. Raises CalibrationError, as `ranges.collect_magnitudes` does.
    """
    one, other = halves(feed.indices)
    correcting = list(feed.batches(one[: feed.enough])) if method == "auto" else []
    by_tensor: dict[str, list[float]] = {}
    if method == "auto":
        progress("equalising", 0, None)
        judging = feed.samples(stand_ins(other, (), feed.enough))
        by_tensor = choose.choose_factors(graph, correcting, judging, work=work)
    equalised = equalised_graph(graph, by_tensor, work)
    tensors = tensors_to_calibrate(equalised)
    largest = dict.fromkeys(ranges.float_tensors(equalised.path), 0.0)  # what is equalised is no larger in `graph`

    def count(indices: Sequence[int], before: int) -> dict[str, Magnitudes]:
        return ranges.collect_magnitudes(
            equalised.path,
            tensors,
            feed.batches(indices),
            largest=largest,
            progress=lambda step, done, _: progress(step, before + done, len(feed.indices)),
        )

    chosen: dict[str, str] = {}
    shifts: dict[str, list[float]] = {}
    if method == "auto":
        too_few = one == other
        first = count(one, 0)
        second = first if too_few else count(other, len(one))
        magnitudes = first if too_few else ranges.merge_magnitudes(first, second)
        of_one, of_other = (
            feed.samples(stand_ins(half, feed.furthest(counts, half), feed.enough // 2))
            for half, counts in ((one, first), (other, second))
        )
        folds = [Fold(first, of_other)] if too_few else [Fold(first, of_other), Fold(second, of_one)]
        deciding = of_other if too_few else [*of_one, *of_other]
        found, chosen = choose.choose_ranges(equalised, folds, percentile=percentile, work=work, progress=progress)
        shifts = choose.correct_biases(equalised, found, correcting, of_other, work=work, progress=progress)
    else:
        magnitudes = count(feed.indices, 0)
        deciding = feed.samples(stand_ins(feed.indices, feed.furthest(magnitudes, feed.indices), feed.enough))
        found = ranges.find_ranges(magnitudes, method=method, percentile=percentile)
    file = CalibrationFile(
        network_sha256=_sha256(graph),
        data_sha256=feed.images.fingerprint,
        preprocessing=config,
        method=method,
        percentile=percentile,
        chosen=chosen,
        images=tuple(feed.images.names[index] for index in feed.indices),
        held_out=sum(int((sample.weights > 0).sum()) for sample in deciding) if method == "auto" else 0,
        skipped=feed.images.skipped,
        silent=tuple(name for name, seen in magnitudes.items() if seen.largest == 0.0),
        factors={name: tuple(values) for name, values in by_tensor.items()},
        ranges=found,
        largest=ranges.find_ranges(magnitudes, method="max"),
        shifts={name: tuple(values) for name, values in shifts.items()},
        large=ranges.beyond_half(largest),
    )
    return file, deciding


def equalised_graph(graph: ExportedGraph, by_tensor: Mapping[str, Sequence[float]], work: Path) -> ExportedGraph:
    """The graph that the ranges are of."""
    return equalise.write_equalised_graph(graph, by_tensor, work / "equalised.onnx") if by_tensor else graph


def read_calibration(path: Path) -> CalibrationFile:
    """A calibration.json, or the one in a bundle, whose digest is checked. Raises CalibrationError, BundleError."""
    if Path(path).is_dir():
        bundle = Bundle.open(path)
        if bundle.manifest.calibration is None:
            raise CalibrationError(f"{path} was built without int8 and has no ranges: pass calibration images instead")
        record = bundle.manifest.calibration.file
        return decode_calibration(bundle.read(record), str(bundle.path / record.path))
    try:
        data = read_file(path, limit=_MAX_BYTES)
    except OSError as error:
        raise CalibrationError(f"{path} cannot be read ({error.strerror or error}): pass a calibration.json") from error
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
    """Raise CalibrationError unless everything that ranges depend on is what it was, with the field that is not.

    ``images``, ``method`` and ``percentile`` are None where nothing was asked for.
    """
    here = {
        "network_sha256": _sha256(graph),
        "data_sha256": found.data_sha256 if images is None else images.fingerprint,
        "preprocessing": config,
        "method": method or found.method,
        "percentile": found.percentile if percentile is None else percentile,
    }
    for field, value in here.items():
        there = getattr(found, field)
        if value != there:
            raise CalibrationError(
                f"the calibration does not fit: {field} is {there} there and {value} here; calibrate again with --images"
            )


def notes(images: ImageSet, found: CalibrationFile, *, golden: Sequence[str], synthetic: bool) -> tuple[str, ...]:
    """What is unusual about the calibration, in a sentence each. ``golden``: names of the images parity is measured on."""
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
    return record_file(graph.path.parent, graph.path.name).sha256
