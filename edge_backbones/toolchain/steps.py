"""The steps of a build between loading and writing, each a function of what the steps before it returned.

:func:`edge_backbones.toolchain.build.build_bundle` calls them in this order. They import the libraries of the workstation.
"""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import torch

from edge_backbones import cpus
from edge_backbones.bundle.golden import GoldenSamples
from edge_backbones.bundle.manifest import CalibrationFile, Manifest
from edge_backbones.errors import SourceError
from edge_backbones.images.config import ImageConfig
from edge_backbones.images.fit import network_input
from edge_backbones.progress import Progress
from edge_backbones.spec import BackboneSpec, InputSpec
from edge_backbones.toolchain import export
from edge_backbones.toolchain.artifacts import ExportedGraph, LoadedBackbone, PreparedBackbone
from edge_backbones.toolchain.calibration import calibrate, ranges
from edge_backbones.toolchain.calibration.calibrate import BATCH, Calibrated, Feed, read_calibration
from edge_backbones.toolchain.calibration.images import (
    ImageSet,
    ImageSource,
    gather_images,
    golden_frames,
    split_golden,
)
from edge_backbones.toolchain.candidates import CandidateInputs, Verdict, decide
from edge_backbones.toolchain.frame import FrameFront, with_frames
from edge_backbones.toolchain.prepare import prepare, warm_batch_norm
from edge_backbones.toolchain.quantize.placement import quantized_layers, select_layers
from edge_backbones.toolchain.sources.load import load_source

if TYPE_CHECKING:
    from edge_backbones.machine.profiles import DeviceProfile
    from edge_backbones.toolchain.options import BuildOptions

__all__ = [
    "ChosenImages", "calibrate_graph", "choose_images", "collect_notes", "export_network", "load_network",
    "prepare_network", "read_calibration", "record_golden", "try_candidates", "usable_cpus", "with_frames",
]  # fmt: skip

_PERCENTILE = 99.99


@contextlib.contextmanager
def usable_cpus() -> Iterator[None]:
    """Keep torch inside the block to the CPUs that this process may use: torch knows no quotas."""
    before = torch.get_num_threads()
    torch.set_num_threads(min(before, cpus.usable()))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def load_network(
    source: Any, options: BuildOptions, profile: DeviceProfile | None, progress: Progress
) -> LoadedBackbone:
    """Load the network. ``profile`` is of the device that the bundle is for."""
    progress("loading the network", 0, None)
    loaded = load_source(source, options.source_options(profile))
    if options.input != "pixel_values" and loaded.image_differs:
        raise SourceError(
            f"{loaded.image_differs}: build it for pixel_values and prepare them with the processor, or say what is "
            "done to frames with image=ImageConfig(...)"
        )
    return dataclasses.replace(loaded, spec=with_formats(loaded.spec, options))


def with_formats(spec: BackboneSpec, options: BuildOptions) -> BackboneSpec:
    """Return a backbone whose engines return maps of the dtype and in the memory that the options ask for.

    Where no output is NCHW, all of them lie in channels-last memory already, or have no such memory: nothing changes.
    """
    spec = msgspec.structs.replace(spec, channels_last="channels-last" in options.maps)
    return msgspec.structs.replace(
        spec,
        map_dtype="float16" if "float16" in options.maps else "float32",
        channels_last=any(output.is_reordered for output in spec.described_outputs),
    )


@dataclass(frozen=True)
class ChosenImages:
    """The images of a build, as network inputs on disk.

    ``images``: inputs of the network itself. ``calibrating`` and ``golden``: indices of the images to calibrate on and of
    those that parity is measured on. ``golden_inputs``: the latter as the engines take them. ``synthetic``: the user passed
    no images.
    """

    images: ImageSet
    calibrating: list[int]
    golden: list[int]
    golden_inputs: np.ndarray
    synthetic: bool

    @property
    def golden_names(self) -> tuple[str, ...]:
        """Names of the golden images."""
        return tuple(self.images.names[index] for index in self.golden)


def choose_images(
    images: ImageSource,
    loaded: LoadedBackbone,
    input: InputSpec,
    options: BuildOptions,
    work: Path,
    progress: Progress,
) -> ChosenImages:
    """Read and preprocess every image, and choose which are calibrated on and which are golden.

    Where engines take frames, each image becomes a frame first, and its input is what the network sees of it. Frames are
    large: only the golden ones are kept, and are read again for that.
    """
    config = loaded.image_config
    if input.frame is not None and isinstance(images, Iterator):
        images = list(images)  # they are read twice
    found = gather_images(images, input=input, config=config, spool=work / "images", progress=progress)
    calibrating, golden = split_golden(len(found.names), options.golden)
    if input.frame is None:
        golden_inputs = found.take(golden)
    else:
        golden_inputs = golden_frames(images, [found.names[index] for index in golden], input=input, config=config)
    return ChosenImages(found, calibrating, golden, golden_inputs, synthetic=images is None)


def prepare_network(
    loaded: LoadedBackbone, input: InputSpec, chosen: ChosenImages, progress: Progress
) -> tuple[LoadedBackbone, PreparedBackbone]:
    """Fold the network. Random weights get batch-norm statistics first: the reference changes with them.

    ``input``: that of the network itself.
    """
    if loaded.source.weights == "random":
        progress("warming batch norm", 0, None)
        indices = chosen.calibrating
        if len(indices) % BATCH == 1 and len(indices) > 1:
            indices = indices[:-1]  # the statistics of a last batch of one image mislead
        batches = chosen.images.batches(BATCH, indices)
        loaded = warm_batch_norm(loaded, (network_input(batch, loaded.image_config, input) for batch in batches))
    progress("folding batch norm", 0, None)
    return loaded, prepare(loaded, input)


@dataclass(frozen=True)
class Exported:
    """What the network was exported to.

    ``graph``: the fp32 graph of the network itself. ``front``: what goes in front of it where engines take frames.
    ``script``: the TorchScript module of both, where it is wanted.
    """

    graph: ExportedGraph
    front: FrameFront | None
    script: Path | None


def export_network(
    network: PreparedBackbone,
    prepared: PreparedBackbone,
    config: ImageConfig,
    options: BuildOptions,
    work: Path,
    progress: Progress,
) -> Exported:
    """Write the fp32 ONNX graph, and the TorchScript module where it is wanted, into ``work``.

    ``prepared``: ``network`` as `with_frames` returns it.
    """
    progress("exporting", 0, None)
    graph = export.export_onnx(network, work / "fp32.onnx")
    front = None if prepared.input.frame is None else export.export_front(config, prepared.input)
    script = None
    if options.torchscript:
        script = work / "fp32.ts"
        export.export_torchscript(prepared, script)
    return Exported(graph, front, script)


def record_golden(
    loaded: LoadedBackbone,
    prepared: PreparedBackbone,
    exported: Exported,
    chosen: ChosenImages,
    work: Path,
    progress: Progress,
) -> GoldenSamples:
    """Run the network as it was loaded on the golden images, and check what was exported against its feature maps."""
    progress("recording golden samples", 0, None)
    cases = export.golden_cases(chosen.golden_inputs, prepared.input)
    golden = export.golden_samples(loaded, prepared.input, cases)
    export.check_range(golden, prepared.spec)
    whole = exported.graph
    if exported.front is not None:
        path = work / "fp32-of-frames.onnx"
        shutil.copyfile(whole.path, path)
        exported.front.put_before(path)
        whole = ExportedGraph(path, prepared.spec, prepared.input)
    export.check_onnx(whole, golden)
    if exported.script is not None:
        export.check_torchscript(exported.script, prepared, golden)
    return golden


def calibrate_graph(
    graph: ExportedGraph,
    config: ImageConfig,
    chosen: ChosenImages,
    reused: CalibrationFile | None,
    options: BuildOptions,
    work: Path,
    progress: Progress,
) -> Calibrated:
    """Find the ranges that the precisions need, or check that ``reused`` fits; also find what fp16 cannot hold."""
    batches = graph.input.batch
    size = batches.max if batches.is_fixed else min(BATCH, batches.max)
    feed = Feed(chosen.images, chosen.calibrating, size, fill=batches.is_fixed)
    if not options.needs_ranges:
        large = _find_beyond_half(graph, feed, options, progress)
        return Calibrated(file=None, graph=graph, samples=(), excluded=frozenset(), large=large)

    excluded = select_layers(quantized_layers(graph), options.exclude)
    if reused is not None:
        given = None if chosen.synthetic else chosen.images
        calibrate.check_fits(
            reused, graph=graph, config=config, images=given, method=options.method, percentile=options.percentile
        )
        file, samples = reused, feed.typical()
    else:
        file, samples = calibrate.calibrate(
            graph,
            feed,
            method=options.method or "auto",
            percentile=_PERCENTILE if options.percentile is None else options.percentile,
            config=config,
            work=work,
            progress=progress,
        )
    equalised = calibrate.equalised_graph(graph, file.factors, work)
    large = _find_beyond_half(graph, feed, options, progress) if file.large is None else file.large
    return Calibrated(file=file, graph=equalised, samples=samples, excluded=excluded, large=large)


def _find_beyond_half(graph: ExportedGraph, feed: Feed, options: BuildOptions, progress: Progress) -> tuple[str, ...]:
    """Name the tensors whose values come near what fp16 can hold, where a precision has fp16 in its graph."""
    if all(precision.info.rest.info.has_range_of_fp32 for precision in options.wanted):
        return ()
    return ranges.tensors_beyond_half(graph.path, feed.batches(feed.indices), progress=progress)


def try_candidates(
    exported: Exported,
    calibrated: Calibrated,
    golden: GoldenSamples,
    options: BuildOptions,
    work: Path,
    progress: Progress,
) -> Verdict:
    """Compile and measure engines until every wanted precision holds its gate, and choose what is shipped."""
    inputs = CandidateInputs(
        graph=exported.graph,
        calibrated=calibrated,
        golden=golden,
        front=exported.front,
        work=work,
        cache=options.cache,
        progress=progress,
    )
    return decide(inputs, options.wanted, options.gates, auto=options.precisions == "auto", fallback=options.fallback)


def collect_notes(
    loaded: LoadedBackbone,
    golden: GoldenSamples,
    calibrated: Calibrated,
    verdict: Verdict,
    manifest: Manifest,
    chosen: ChosenImages,
) -> tuple[str, ...]:
    """Say what else the user should know, in a sentence each."""
    notes = list(loaded.source.preprocessing_notes)
    notes += [] if verdict.decision is None else [verdict.decision.sentence]
    for stage in export.zero_stages(golden, manifest.backbone.outputs):
        notes.append(
            f"{stage} is zero everywhere in the reference, on every golden image (a branch that is dead or not yet "
            "trained): parity only shows that the engine gives zeros too"
        )
    if calibrated.file is not None:
        names = manifest.golden.images
        notes += calibrate.notes(chosen.images, calibrated.file, golden=names, synthetic=chosen.synthetic)
    if large := calibrated.large:
        notes.append(f"{len(large)} tensors come near what fp16 can hold ({large[0]} first): they stay in fp32")
    return tuple(notes)
