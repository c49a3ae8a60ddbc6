"""Build a bundle on a workstation: the steps of the toolchain meet here. What devices do with it is in ``deploy``.

:func:`build_bundle` needs torch, and imports it when called.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from edge_backbones.bundle.golden import GoldenSamples
from edge_backbones.bundle.reader import Bundle
from edge_backbones.bundle.writer import new_bundle
from edge_backbones.deploy.compile import compile_bundle
from edge_backbones.deploy.parity import advice_on_building, measure_engine, require
from edge_backbones.engines import promises, registry
from edge_backbones.engines.base import CompiledEngine, LoadOptions
from edge_backbones.engines.promises import DEFAULT_GATES
from edge_backbones.engines.refusals import refusals
from edge_backbones.engines.torch.flavour import engine_of_torch_tensorrt, engine_of_torchscript
from edge_backbones.errors import (
    CompileError,
    EdgeBackbonesError,
    SourceError,
    needing,
)
from edge_backbones.machine import gpus, profiles
from edge_backbones.parity_report import ParityReport
from edge_backbones.progress import Progress, no_progress
from edge_backbones.spec import InputSpec, Precision
from edge_backbones.toolchain.artifacts import LoadedBackbone, MeasuredEngine, PreparedBackbone
from edge_backbones.toolchain.early import check_build
from edge_backbones.toolchain.options import BuildOptions, as_range
from edge_backbones.toolchain.write_bundle import write_bundle

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedConfig

    from edge_backbones.machine.profiles import DeviceProfile
    from edge_backbones.toolchain.calibration.images import ImageSource
    from edge_backbones.toolchain.sources.module_source import ModuleSource


@dataclass(frozen=True)
class BuildResult:
    """A finished bundle and what the user should know of it.

    Args:
        bundle: the bundle, opened.
        reports: the parity of each engine.
        reasons: why image files were skipped, by name.
        notes: other remarks, a sentence each.
    """

    bundle: Bundle
    reports: tuple[ParityReport, ...]
    reasons: Mapping[str, str]
    notes: tuple[str, ...]

    @property
    def skipped(self) -> tuple[str, ...]:
        """Names of the image files that were not read."""
        return tuple(self.reasons)


def build_bundle(
    source: str | Path | PreTrainedConfig | nn.Module | ModuleSource | LoadedBackbone,
    target: str | Path,
    *,
    images: ImageSource = None,
    options: BuildOptions | None = None,
    overwrite: bool = False,
    progress: Progress = no_progress,
) -> BuildResult:
    """Turn a backbone into a verified bundle for this machine's CPU.

    ``source``: a timm name, a hub id, a ``save_pretrained`` folder, a configuration of transformers, a live backbone, or
    a plain module with a description: see :func:`edge_backbones.toolchain.sources.load.load_source`. It is not changed.
    ``images``: photographs for calibration and parity (see :data:`edge_backbones.toolchain.calibration.images.ImageSource`);
    int8 needs them, fp32 and fp16 fall back on synthetic images (noise with the spectrum of photographs). Random weights
    get their batch-norm statistics from them.

    Nothing appears at ``target`` unless every stage of every engine is inside its gate; with ``overwrite`` the old
    bundle stays until then. Raises SourceError, ExportError, CalibrationError, QuantizationError, CompileError,
    ParityError (with the report), BundleError, InputError, MissingDependencyError.
    """
    options = options or BuildOptions()
    check_build(source, target, images, options, overwrite=overwrite)
    profile = None if options.profile is None else profiles.load_profile(options.profile)
    progress("loading libraries", 0, None)
    with needing("building a bundle", "build"):
        from edge_backbones.toolchain import steps
    reused = None if options.calibration is None else steps.read_calibration(options.calibration)

    with new_bundle(target, overwrite=overwrite) as folder, _work_folder(folder) as work_name, steps.usable_cpus():
        work = Path(work_name)
        loaded = steps.load_network(source, options, profile, progress)
        input = _input_spec(options, loaded, profile)
        _refuse_for(profile, options, input)
        chosen = steps.choose_images(images, loaded, input, options, work, progress)
        loaded, network = steps.prepare_network(loaded, input.of_network, chosen, progress)
        prepared = steps.with_frames(network, loaded.image_config, input)
        exported = steps.export_network(network, prepared, loaded.image_config, options, work, progress)
        golden = steps.record_golden(loaded, prepared, exported, chosen, work, progress)
        graph, config = exported.graph, loaded.image_config
        calibrated = steps.calibrate_graph(graph, config, chosen, reused, options, work, progress)
        verdict = steps.try_candidates(exported, calibrated, golden, options, work, progress)
        torch_engines = _compile_torch_engines(prepared, exported.script, golden, options, progress)
        manifest = write_bundle(
            folder,
            loaded=loaded,
            prepared=prepared,
            golden=golden,
            golden_names=chosen.golden_names,
            verdict=verdict,
            script=exported.script,
            torch_engines=torch_engines,
            calibration=calibrated.file,
            reused=reused is not None,
            gates=options.gates,
            progress=progress,
        )
        notes = steps.collect_notes(loaded, golden, calibrated, verdict, manifest, chosen)
        reasons = chosen.images.reasons
        del chosen  # some file systems do not delete a file that is mapped
    bundle = Bundle.open(target)
    _remember_measured(bundle)
    bundle, more = _add_rivals(bundle, progress)
    return BuildResult(bundle, tuple(record.parity for record in bundle.manifest.engines), reasons, (*notes, *more))


# ---- checks ---------------------------------------------------------------------------------------------------------


def _refuse_for(profile: DeviceProfile | None, options: BuildOptions, input: InputSpec) -> None:
    """Raise CompileError for what the device cannot run, before images are read and anything is calibrated or compiled."""
    if profile is None:
        return
    reasons = [
        reason
        for precision in options.wanted
        for reason in refusals(profile, precision=precision, flavour=profile.flavours[0], input=input)
    ]
    for flavour in options.flavours:
        reasons += refusals(profile, precision=Precision.FP16, flavour=flavour, input=input)
    if reasons:
        raise CompileError("; ".join(dict.fromkeys(reasons)))


# ---- engines for libtorch -------------------------------------------------------------------------------------------


def _compile_torch_engines(
    prepared: PreparedBackbone,
    script: Path | None,
    golden: GoldenSamples,
    options: BuildOptions,
    progress: Progress,
) -> list[MeasuredEngine]:
    """Make and measure the engines for libtorch that ``options.flavours`` asks for."""
    engines: list[CompiledEngine] = []
    if "torchscript" in options.flavours and script is not None:
        engines.append(engine_of_torchscript(script.read_bytes()))
    if "torch_tensorrt" in options.flavours:
        engines += _torch_tensorrt_engines(prepared, options, progress)
    return [MeasuredEngine(engine, _measure(engine, prepared, golden, options)) for engine in engines]


def _torch_tensorrt_engines(
    prepared: PreparedBackbone, options: BuildOptions, progress: Progress
) -> Iterator[CompiledEngine]:
    """Compile the network for this machine's first GPU in each wanted precision that torch has, in fp16 if none is wanted."""
    from edge_backbones.toolchain import torch_tensorrt

    found = gpus.find_gpus()
    wanted = [precision for precision in options.wanted if precision.info.torch_type is not None]
    for precision in wanted or [Precision.FP16]:
        progress(f"compiling {precision} with torch_tensorrt", 0, None)
        program = torch_tensorrt.compile_torch_tensorrt(
            prepared.module,
            prepared.input,
            precision=precision,
            output_format=options.program,
            device=f"cuda:{found[0].index}",
            spec=prepared.spec,
        )
        yield engine_of_torch_tensorrt(program, torch_tensorrt.SUFFIXES[options.program], precision, found[0])


def _measure(
    engine: CompiledEngine, prepared: PreparedBackbone, golden: GoldenSamples, options: BuildOptions
) -> ParityReport:
    """Measure the parity of an engine that is no candidate; raises ParityError outside its gate."""
    precision = engine.key.precision
    gate = options.gates.get(precision, DEFAULT_GATES[precision])
    # Host code is allowed: the program was made here, of the network that the user gave.
    load = LoadOptions(gpu=None if engine.key.gpu is None else 0, allow_host_code=True)
    report = measure_engine(engine.key, engine.data, prepared.spec, prepared.input, golden, gate, options=load)
    library = registry.get(engine.key.flavour).package
    return require(report, advice=functools.partial(advice_on_building, library=library))


def _remember_measured(bundle: Bundle) -> None:
    """Note on this machine that each engine was measured here and held its gate."""
    for record in bundle.manifest.engines:
        host = registry.this_machine(None if record.key.gpu is None else 0)
        promises.remember(bundle.manifest, record, host)


def _add_rivals(bundle: Bundle, progress: Progress) -> tuple[Bundle, tuple[str, ...]]:
    """Add engines of libraries that may be faster than OpenVINO on this CPU (`Flavour.rivals`), and time all of them.

    Returns the bundle and sentences for the user. The bundle is finished without them, so an error becomes a note.
    """
    rivals = registry.get("openvino").rivals(registry.this_machine(None))
    built = [engine.key.precision for engine in bundle.manifest.engines if engine.key.flavour == "openvino"]
    if not rivals or not built:
        return bundle, ()
    try:
        notes = compile_bundle(bundle.path, precisions=built, rivals=rivals, resume=True, progress=progress).notes
    except EdgeBackbonesError as error:
        notes = (f"no engines of {' and '.join(rivals)} were added: {error}",)
    return Bundle.open(bundle.path), notes


def _work_folder(folder: Path) -> tempfile.TemporaryDirectory[str]:
    # Images stay mapped after an error, and some file systems keep such a file: that must not hide the error.
    return tempfile.TemporaryDirectory(dir=folder, ignore_cleanup_errors=True)


# ---- the input ------------------------------------------------------------------------------------------------------


def _input_spec(options: BuildOptions, loaded: LoadedBackbone, profile: DeviceProfile | None) -> InputSpec:
    """Settle the graph's input. Axes of variable size go in steps of the deepest kept stride.

    Raises SourceError for a range that is not in multiples of it.
    """
    batch = options.batch or (1 if profile is None else profile.defaults.batch)
    heights, widths = as_range(options.height or loaded.height), as_range(options.width or loaded.width)
    step = 1 if heights.is_fixed and widths.is_fixed else max(n for stride in loaded.spec.strides for n in stride)
    for axis, sizes in (("height", heights), ("width", widths)):
        if not sizes.is_fixed and any(size % step for size in (sizes.min, sizes.opt, sizes.max)):
            raise SourceError(
                f"{axis} {sizes.min}:{sizes.opt}:{sizes.max} must be multiples of {step}, the deepest stride"
            )
    frame = options.frame_spec
    if frame is not None and not frame.suits(loaded.channels_in):
        advice = "take gray frames (--color gray)" if loaded.channels_in == 1 else "build it for pixel_values"
        raise SourceError(f"this network takes {loaded.channels_in} channels, and not {frame.color} frames: {advice}")
    return InputSpec(
        name=options.input,
        channels=loaded.channels_in,
        batch=as_range(batch),
        height=heights,
        width=widths,
        size_multiple=step,
        pixel_dtype=options.pixels,
        frame=frame,
    )
