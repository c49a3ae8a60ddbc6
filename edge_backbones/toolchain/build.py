"""Where the steps meet: a bundle is built on a workstation. What is done with it on a device is in device.py.

:func:`build_bundle` needs torch, and imports it when called.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import importlib.metadata
import platform
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import msgspec
import numpy as np

import edge_backbones
from edge_backbones.bundle import golden as golden_file
from edge_backbones.bundle.manifest import (
    CalibrationFile,
    CalibrationRecord,
    EngineRecord,
    GoldenRecord,
    GraphRecord,
    Manifest,
    Provenance,
)
from edge_backbones.bundle.reader import Bundle, new_bundle, record_file, write_manifest
from edge_backbones.deploy.parity import advice_on_building, measure_engine, require
from edge_backbones.engines import promises
from edge_backbones.engines import select as session
from edge_backbones.engines.base import CompiledEngine
from edge_backbones.engines.compile import engine_of_torch_tensorrt, engine_of_torchscript
from edge_backbones.engines.promises import DEFAULT_GATES
from edge_backbones.errors import (
    CalibrationError,
    CompileError,
    InputError,
    MissingDependencyError,
    SourceError,
)
from edge_backbones.images.fit import network_input
from edge_backbones.machine import gpus, profiles
from edge_backbones.machine.system import default_cache
from edge_backbones.parity_report import Gate, ParityReport
from edge_backbones.progress import Progress, no_progress
from edge_backbones.spec import InputSpec, Precision, ShapeRange
from edge_backbones.toolchain.artifacts import ExportedGraph, LoadedBackbone, PreparedBackbone

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedConfig

    from edge_backbones.machine.profiles import DeviceProfile
    from edge_backbones.toolchain.calibration.calibrate import Method
    from edge_backbones.toolchain.calibration.images import ImageSource
    from edge_backbones.toolchain.sources.base import SourceOptions
    from edge_backbones.toolchain.sources.module_source import ModuleSource

METHODS = ("auto", "max", "percentile", "entropy", "mse")
PROGRAMS = ("torchscript", "exported_program")
_AUTO = (Precision.FP32, Precision.FP16, Precision.INT8)  # a CPU computes bf16 and fp8 in fp32
OF_CALIBRATED = ("method", "percentile", "calibration", "exclude")
"""Options that mean nothing to other precisions."""

_PERCENTILE = 99.99


@dataclass(frozen=True, kw_only=True)
class BuildOptions:
    """What to build.

    The network: ``weights``, ``num_channels``, ``output_stride``, ``out_indices``, ``out_features``, ``hidden_states``,
    ``dataset_index`` and ``image`` (its preprocessing) as in :class:`edge_backbones.toolchain.sources.base.SourceOptions`;
    ``from_model``: the source is a whole model, of which the backbone is taken. The input: ``input`` is ``"pixel_values"``
    (float NCHW) or ``"image"`` (uint8 NHWC, preprocessing in the graph); ``batch``, ``height`` and ``width`` are sizes or
    ranges. None: the batch of ``profile``, 1 without one; the size that the network's preprocessing makes, else the network's
    own, else that of ``profile``.

    The engines: ``precisions`` (or their names), one graph and one engine each, of which runtimes take the fastest; or
    ``"auto"``: the fastest
    of fp32, fp16 and int8 on this machine that is inside its gate, with the graphs of int8 and fp16, so that
    `compile_bundle` can weigh them again on another device. ``gates`` replace the default gate of a precision. ``golden``:
    images that parity is measured on. ``torchscript``: also write graphs/fp32.ts. ``flavours``: engines for libtorch beside
    those of OpenVINO: that module itself, or the network compiled by torch-tensorrt for this machine's GPU (fp32, fp16 or
    bf16 as in ``precisions``, fp16 where they have none of these), as what ``program`` says. ``profile``: the device that the
    bundle is for (:mod:`edge_backbones.machine.profiles`): what it cannot run is refused before it is built, and sizes that nobody
    asked for are those that suit it.
    ``cache``: folder of compiled engines, None for no cache.

    int8: ``method`` is the range estimator, ``"auto"`` for the one that leaves each feature map the least noise on
    images that it has not seen, with channels equalised and biases corrected where that helps; ``percentile`` is
    what that estimator keeps, 99.99 by default.
    ``calibration``: a calibration.json, or the bundle with it, whose ranges are used instead. ``exclude``: layers to leave
    in half, as in :func:`edge_backbones.toolchain.quantize.qdq.select_layers`. ``fallback``: where the gate fails, leave the
    noisiest blocks in half instead of giving up.
    """

    weights: str = "pretrained"
    from_model: bool = False
    num_channels: int | None = None
    output_stride: int | None = None
    out_indices: tuple[int, ...] | None = None
    out_features: tuple[str, ...] | None = None
    hidden_states: bool = False
    dataset_index: int = 0
    image: Any = None
    input: str = "pixel_values"
    batch: int | ShapeRange | None = None
    height: int | ShapeRange | None = None
    width: int | ShapeRange | None = None
    precisions: tuple[Precision | str, ...] | Literal["auto"] = (Precision.INT8,)
    method: Method | None = None
    percentile: float | None = None
    calibration: Path | None = None
    exclude: tuple[str, ...] = ()
    fallback: bool = True
    gates: Mapping[Precision, Gate] = field(default_factory=dict)
    profile: str | Path | None = None
    golden: int = 4
    torchscript: bool = True
    flavours: tuple[Literal["torchscript", "torch_tensorrt"], ...] = ()
    program: Literal["torchscript", "exported_program"] = "torchscript"
    cache: Path | None = field(default_factory=default_cache)

    def __post_init__(self) -> None:
        if self.input not in ("pixel_values", "image"):
            raise InputError(f"input must be 'pixel_values' or 'image', got {self.input!r}")
        if self.precisions != "auto":
            object.__setattr__(self, "precisions", _as_precisions(self.precisions))
        object.__setattr__(self, "gates", dict(zip(_as_precisions(self.gates), self.gates.values(), strict=True)))
        if self.precisions != "auto" and (not self.precisions or len(set(self.precisions)) != len(self.precisions)):
            raise InputError(
                f"precisions must be 'auto' or at least one of {', '.join(Precision)}, each once; got {self.precisions}"
            )
        if self.method not in (None, *METHODS) or not (self.percentile is None or 0 < self.percentile <= 100):
            raise InputError(
                f"method must be {', '.join(METHODS)} and percentile in (0, 100]; got {self.method!r} and {self.percentile}"
            )
        if self.percentile is not None and self.method not in (None, "auto", "percentile"):
            raise InputError(
                f"percentile is {self.percentile}, which method {self.method} does not read: leave one out"
            )
        for option in OF_CALIBRATED:
            if not self.needs_ranges and getattr(self, option) not in (None, ()):
                raise InputError(
                    f"{option} is of int8 and fp8, and {', '.join(self.wanted)} is what is built: leave {option} out, or "
                    "add --precision int8"
                )
        for size in (self.batch, self.height, self.width):
            if isinstance(size, int) and size < 1:
                raise InputError(f"batch, height and width must be at least 1, got {size}")
        if "torchscript" in self.flavours and not self.torchscript:
            raise InputError("flavour torchscript is the file graphs/fp32.ts: leave torchscript=True")
        if self.program not in PROGRAMS:
            raise InputError(f"program must be {' or '.join(PROGRAMS)}, got {self.program!r}")
        if self.program != PROGRAMS[0] and "torch_tensorrt" not in self.flavours:
            raise InputError(
                f"program {self.program} is of flavour torch_tensorrt, which is not built: add it, or leave it"
            )
        for precision, gate in self.gates.items():
            if not promises.refuses_zeros(gate):
                raise InputError(
                    f"the gate of {precision} asks for {gate}, which a map of zeros passes: give it a bound such as "
                    "Gate(min_cosine=0.9)"
                )
        if self.golden < 1:
            raise InputError(f"golden must be at least 1 image, got {self.golden}")
        if (self.height is None) != (self.width is None):
            raise InputError(f"height and width go together, got {self.height} and {self.width}")

    @property
    def wanted(self) -> tuple[Precision, ...]:
        """The precisions that are tried."""
        return _AUTO if self.precisions == "auto" else _as_precisions(self.precisions)

    @property
    def needs_ranges(self) -> bool:
        return any(precision.is_calibrated for precision in self.wanted)

    def source_options(self, profile: DeviceProfile | None = None) -> SourceOptions:
        """The part that says how to make the network; ``profile``: of the device that it is for."""
        from edge_backbones.toolchain.sources.base import SourceOptions

        return SourceOptions(
            **({} if profile is None else {"default_size": profile.defaults.size}),
            weights=self.weights,
            num_channels=self.num_channels,
            img_size=_opt_size(self),
            output_stride=self.output_stride,
            out_indices=self.out_indices,
            out_features=self.out_features,
            hidden_states=self.hidden_states,
            dataset_index=self.dataset_index,
            image=self.image,
        )


def _as_precisions(names: Iterable[Precision | str]) -> tuple[Precision, ...]:
    """Return number formats by their names; raises InputError for a name that is none."""
    try:
        return tuple(Precision(name) for name in names)
    except ValueError as error:
        raise InputError(f"{error}: choose among {', '.join(Precision)}") from None


@dataclass(frozen=True)
class BuildResult:
    """A finished bundle, the parity of each engine, why files were skipped, by name, and what else the user should know."""

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
    ``images``: photographs for calibration and parity (see :data:`edge_backbones.toolchain.calibration.images.ImageSource`); int8
    needs them, fp32 and fp16 fall back on synthetic images (noise with the spectrum of photographs). Random weights get
    their batch-norm statistics from them.

    Nothing appears at ``target`` unless every stage of every engine is inside its gate; with ``overwrite`` the old
    bundle stays until then. Raises SourceError, ExportError, CalibrationError, QuantizationError, CompileError,
    ParityError (with the report), BundleError, InputError, MissingDependencyError.
    """
    options = options or BuildOptions()
    if "torch_tensorrt" in options.flavours and not gpus.find_gpus():
        raise CompileError(f"torch_tensorrt compiles on the GPU that will run the engine: {gpus.no_gpu_reason()}")
    if images is None and options.needs_ranges and options.calibration is None:
        raise CalibrationError("int8 needs calibration images: pass a folder of photographs (--images FOLDER)")
    progress("loading libraries", 0, None)
    try:
        from edge_backbones.toolchain import candidates as attempts
        from edge_backbones.toolchain import export, prepare
        from edge_backbones.toolchain.calibration import calibrate, ranges
        from edge_backbones.toolchain.calibration import images as calibration
        from edge_backbones.toolchain.quantize import qdq as quantize
        from edge_backbones.toolchain.sources.load import load_source
    except ModuleNotFoundError as error:
        raise MissingDependencyError(f"building a bundle ({error.name} is not installed)", "build") from error
    profile = None if options.profile is None else profiles.load_profile(options.profile)
    reused = None if options.calibration is None else calibrate.read_calibration(options.calibration)

    with new_bundle(target, overwrite=overwrite) as folder, _work_folder(folder) as work_name:
        work = Path(work_name)
        progress("loading the network", 0, None)
        loaded = load_source(
            source,
            options.source_options(profile),
            from_model=options.from_model,
        )
        if options.input == "image" and loaded.image_differs:
            raise SourceError(
                f"{loaded.image_differs}: build it for pixel_values and prepare them with the processor, or say what is "
                "done to frames with image=ImageConfig(...)"
            )
        input = _input_spec(options, loaded, profile)
        if profile is not None:
            _refuse_for(profile, options, input)
        image_set = calibration.gather_images(
            images, input=input, config=loaded.image_config, spool=work / "images", progress=progress
        )
        calibrating, golden_indices = calibration.split(len(image_set.names), options.golden)

        if loaded.source.weights == "random":
            progress("warming batch norm", 0, None)
            alone = len(calibrating) % calibrate.BATCH == 1 and len(calibrating) > 1  # statistics of one image mislead
            batches = image_set.batches(calibrate.BATCH, calibrating[:-1] if alone else calibrating)
            loaded = prepare.warm_batch_norm(
                loaded, (network_input(batch, loaded.image_config, input) for batch in batches)
            )

        progress("folding batch norm", 0, None)
        prepared = prepare.prepare(loaded, input)

        progress("exporting", 0, None)
        graph = export.export_onnx(prepared, work / "fp32.onnx")
        (folder / "graphs").mkdir()
        if options.torchscript:
            export.export_torchscript(prepared, folder / "graphs" / "fp32.ts")

        progress("recording golden samples", 0, None)
        golden = export.golden_samples(loaded, input, _golden_cases(image_set.take(golden_indices), input))
        export.check_onnx(graph, golden)
        if options.torchscript:
            export.check_torchscript(folder / "graphs" / "fp32.ts", prepared, golden)
        golden_file.write(folder / "golden.npz", golden)

        batch = input.batch.max if input.batch.is_fixed else min(calibrate.BATCH, input.batch.max)
        feed = calibrate.Feed(image_set, calibrating, batch, fill=input.batch.is_fixed)
        found, deciding, excluded = None, feed.typical(), frozenset[str]()
        large: tuple[str, ...] | None = None
        if options.needs_ranges:
            excluded = quantize.select_layers(quantize.quantized_layers(graph), options.exclude)
            method, config = options.method, loaded.image_config
            if reused is None:
                found, deciding = calibrate.calibrate(
                    graph,
                    feed,
                    method=method or "auto",
                    percentile=_PERCENTILE if options.percentile is None else options.percentile,
                    config=config,
                    work=work,
                    progress=progress,
                )
            else:
                given = None if images is None else image_set
                calibrate.check_fits(
                    reused, graph=graph, config=config, images=given, method=method, percentile=options.percentile
                )
                found = reused
            (folder / "calibration.json").write_bytes(msgspec.json.format(msgspec.json.encode(found), indent=1) + b"\n")
            large = found.large
        if large is None and set(options.wanted) - {Precision.FP32, Precision.BF16}:
            large = ranges.tensors_beyond_half(graph.path, feed.batches(calibrating), progress=progress)
        large = large or ()
        equalised = graph if found is None else calibrate.equalised_graph(graph, found.factors, work)
        shop = attempts.Workshop(
            graph, equalised, found, deciding, excluded, golden, large, work, options.cache, progress
        )

        verdict = attempts.decide(
            shop, options.wanted, options.gates, auto=options.precisions == "auto", fallback=options.fallback
        )

        graphs, engines = [], []
        (folder / "engines").mkdir()
        for attempt in (*verdict.chosen, *verdict.spare):
            path = f"graphs/{attempt.precision}.onnx"
            shutil.move(attempt.typed.path, folder / path)
            graphs.append(
                GraphRecord(
                    format="onnx",
                    precision=attempt.precision,
                    file=record_file(folder, path),
                    opset=quantize.BF16_OPSET if attempt.precision is Precision.BF16 else export.OPSET,
                    excluded=attempt.excluded,
                    gate=options.gates.get(attempt.precision),
                )
            )
        for attempt in verdict.chosen:
            path = attempt.engine.key.path(attempt.engine.data, attempt.engine.suffix)
            (folder / path).write_bytes(attempt.engine.data)
            engines.append(
                EngineRecord(
                    key=attempt.engine.key,
                    file=record_file(folder, path),
                    parity=attempt.shipped,
                    milliseconds=attempt.milliseconds if len(verdict.chosen) > 1 else None,
                )
            )
        if options.torchscript:
            file = record_file(folder, "graphs/fp32.ts")
            gate = options.gates.get(Precision.FP32)
            graphs.append(GraphRecord(format="torchscript", precision=Precision.FP32, file=file, gate=gate))
            if "torchscript" in options.flavours:
                module = engine_of_torchscript((folder / file.path).read_bytes())
                parity = _measured(module, graph, golden, options)
                engines.append(EngineRecord(key=module.key, file=file, parity=parity))

        if "torch_tensorrt" in options.flavours:
            for engine in _torch_tensorrt_engines(prepared, options, progress):
                report = _measured(engine, graph, golden, options)
                path = engine.key.path(engine.data, engine.suffix)
                (folder / path).write_bytes(engine.data)
                engines.append(EngineRecord(key=engine.key, file=record_file(folder, path), parity=report))

        manifest = Manifest(
            schema_version=6,
            backbone=prepared.spec,
            input=input,
            image=loaded.image_config,
            source=loaded.source,
            graphs=tuple(graphs),
            engines=tuple(engines),
            golden=GoldenRecord(
                file=record_file(folder, "golden.npz"),
                cases=tuple(sorted({key.partition("/")[0] for key in golden})),
                images=tuple(image_set.names[i] for i in golden_indices),
            ),
            calibration=None if found is None else _calibration_record(folder, found, reused=found is reused),
            decision=verdict.decision,
            provenance=_provenance(),
        )
        write_manifest(folder, manifest)
        progress("writing the bundle", 0, None)
        reasons = image_set.reasons
        notes = list(loaded.source.preprocessing_notes)
        notes += [] if verdict.decision is None else [verdict.decision.sentence]
        for stage in export.zero_stages(golden, prepared.spec.outputs):
            notes.append(
                f"{stage} is zero everywhere in the reference, on every golden image (a branch that is dead or not yet "
                "trained): parity only shows that the engine gives zeros too"
            )
        if found is not None:
            notes += calibrate.notes(image_set, found, golden=manifest.golden.images, synthetic=images is None)
        if large:
            notes.append(f"{len(large)} tensors come near what fp16 can hold ({large[0]} first): they stay in fp32")
        del image_set, feed
    bundle = Bundle.open(target)
    for record in bundle.manifest.engines:
        host = session.this_machine(None if record.key.gpu is None else 0)
        promises.remember(bundle.manifest, record, host)
    return BuildResult(bundle, tuple(e.parity for e in engines), reasons, tuple(notes))


def _refuse_for(profile: DeviceProfile, options: BuildOptions, input: InputSpec) -> None:
    """Raise CompileError for what the device cannot run, before images are read, and anything is calibrated or compiled."""
    reasons = [
        reason
        for precision in options.wanted
        for reason in profiles.refusals(profile, precision=precision, flavour=profile.flavours[0], input=input)
    ]
    for flavour in options.flavours:
        reasons += profiles.refusals(profile, precision=Precision.FP16, flavour=flavour, input=input)
    if reasons:
        raise CompileError("; ".join(dict.fromkeys(reasons)))


def _torch_tensorrt_engines(
    prepared: PreparedBackbone, options: BuildOptions, progress: Progress
) -> Iterator[CompiledEngine]:
    from edge_backbones.toolchain import torch_tensorrt

    found = gpus.find_gpus()
    half = [p for p in options.wanted if p in (Precision.FP32, Precision.FP16, Precision.BF16)]
    for precision in half or [Precision.FP16]:
        progress(f"compiling {precision} with torch_tensorrt", 0, None)
        program = torch_tensorrt.compile_torch_tensorrt(
            prepared.module,
            prepared.input,
            precision=precision,
            output_format=options.program,
            device=f"cuda:{found[0].index}",
        )
        yield engine_of_torch_tensorrt(program, torch_tensorrt.SUFFIXES[options.program], precision, found[0])


def _measured(
    engine: CompiledEngine, graph: ExportedGraph, golden: Mapping[str, np.ndarray], options: BuildOptions
) -> ParityReport:
    """The parity of an engine that no graph of another precision was tried for; raises ParityError outside its gate."""
    precision = engine.key.precision
    gate = options.gates.get(precision, DEFAULT_GATES[precision])
    on = None if engine.key.gpu is None else 0
    # The program was made here, of the network that the user gave.
    report = measure_engine(
        engine.key, engine.data, graph.spec, graph.input, golden, gate, device=on, allow_host_code=True
    )
    library = {"torchscript": "torch", "torch_tensorrt": "torch-tensorrt"}.get(engine.key.flavour, engine.key.flavour)
    return require(report, advice=functools.partial(advice_on_building, library=library))


def _work_folder(folder: Path) -> tempfile.TemporaryDirectory[str]:
    # Images stay mapped after an error, and some file systems keep such a file: that must not hide the error.
    return tempfile.TemporaryDirectory(dir=folder, ignore_cleanup_errors=True)


def _opt_size(options: BuildOptions) -> tuple[int, int] | None:
    if options.height is None or options.width is None:
        return None
    return _as_range(options.height).opt, _as_range(options.width).opt


def _as_range(size: int | ShapeRange) -> ShapeRange:
    return size if isinstance(size, ShapeRange) else ShapeRange.fixed(size)


def _input_spec(options: BuildOptions, loaded: LoadedBackbone, profile: DeviceProfile | None) -> InputSpec:
    """The graph's input; axes of variable size go in steps of the deepest kept stride."""
    batch = options.batch or (1 if profile is None else profile.defaults.batch)
    heights, widths = _as_range(options.height or loaded.height), _as_range(options.width or loaded.width)
    step = 1 if heights.is_fixed and widths.is_fixed else max(n for stride in loaded.spec.strides for n in stride)
    for axis, sizes in (("height", heights), ("width", widths)):
        if not sizes.is_fixed and any(size % step for size in (sizes.min, sizes.opt, sizes.max)):
            raise SourceError(
                f"{axis} {sizes.min}:{sizes.opt}:{sizes.max} must be multiples of {step}, the deepest stride"
            )
    return InputSpec(
        name="image" if options.input == "image" else "pixel_values",
        channels=loaded.channels_in,
        batch=_as_range(batch),
        height=heights,
        width=widths,
        size_multiple=step,
    )


def _golden_cases(images: np.ndarray, input: InputSpec) -> dict[str, np.ndarray]:
    """The images at opt size, and for an input of variable size cropped or mirrored to the smallest and the largest."""
    cases = {"opt": images}
    if not (input.height.is_fixed and input.width.is_fixed):
        cases["min"] = _resized(images, input, input.height.min, input.width.min)
        cases["max"] = _resized(images, input, input.height.max, input.width.max)
    return cases


def _resized(images: np.ndarray, input: InputSpec, height: int, width: int) -> np.ndarray:
    axes = (2, 3) if input.layout == "NCHW" else (1, 2)
    padding = [(0, 0)] * 4
    for axis, size in zip(axes, (height, width), strict=True):
        images = images.take(range(min(size, images.shape[axis])), axis=axis)
        padding[axis] = (0, size - images.shape[axis])
    return np.ascontiguousarray(np.pad(images, padding, mode="symmetric"))


def _calibration_record(folder: Path, found: CalibrationFile, *, reused: bool) -> CalibrationRecord:
    return CalibrationRecord(
        file=record_file(folder, "calibration.json"),
        method=found.method,
        percentile=found.percentile,
        chosen=found.chosen,
        images=len(found.images),
        held_out=found.held_out,
        skipped=found.skipped,
        reused=reused,
    )


def _provenance() -> Provenance:
    versions = {"python": platform.python_version(), "edge_backbones": edge_backbones.__version__}
    for library in ("numpy", "torch", "timm", "transformers", "onnx", "onnxscript", "onnxruntime", "openvino"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[library] = importlib.metadata.version(library)
    created = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    return Provenance(created=created, versions=versions)
