"""Build a bundle on a workstation: the steps of the toolchain meet here. What devices do with it is in ``deploy``.

:func:`build_bundle` needs torch, and imports it when called.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

from edge_backbones.bundle.golden import GoldenSamples
from edge_backbones.bundle.reader import Bundle
from edge_backbones.bundle.writer import new_bundle
from edge_backbones.deploy.parity import advice_on_building, measure_engine, require
from edge_backbones.engines import promises, registry
from edge_backbones.engines.base import CompiledEngine, LoadOptions
from edge_backbones.engines.promises import DEFAULT_GATES
from edge_backbones.engines.refusals import refusals
from edge_backbones.engines.torch.flavour import engine_of_torch_tensorrt, engine_of_torchscript
from edge_backbones.errors import (
    CalibrationError,
    CompileError,
    InputError,
    SourceError,
    needing,
)
from edge_backbones.machine import gpus, profiles
from edge_backbones.machine.system import default_cache
from edge_backbones.option import Option
from edge_backbones.parity_report import Gate, ParityReport
from edge_backbones.progress import Progress, no_progress
from edge_backbones.spec import InputSpec, Precision, ShapeRange, precisions_of
from edge_backbones.toolchain.artifacts import ExportedGraph, LoadedBackbone, MeasuredEngine, PreparedBackbone
from edge_backbones.toolchain.write_bundle import write_bundle

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedConfig

    from edge_backbones.machine.profiles import DeviceProfile
    from edge_backbones.toolchain.calibration.images import ImageSource
    from edge_backbones.toolchain.sources.base import SourceOptions
    from edge_backbones.toolchain.sources.module_source import ModuleSource

Method = Literal["auto", "max", "percentile", "entropy", "mse"]
METHODS = get_args(Method)
PROGRAMS = ("torchscript", "exported_program")
_AUTO = (Precision.FP32, Precision.FP16, Precision.INT8)  # a CPU computes bf16 and fp8 in fp32
OF_CALIBRATED = ("method", "percentile", "calibration", "exclude")
"""Options that mean nothing to other precisions."""


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
    bundle is for (:mod:`edge_backbones.machine.profiles`): what it cannot run is refused before it is built, and sizes
    that nobody
    asked for are those that suit it.
    ``cache``: folder of compiled engines, None for no cache.

    int8: ``method`` is the range estimator, ``"auto"`` for the one that leaves each feature map the least noise on
    images that it has not seen, with channels equalised and biases corrected where that helps; ``percentile`` is
    what that estimator keeps, 99.99 by default.
    ``calibration``: a calibration.json, or the bundle with it, whose ranges are used instead. ``exclude``: layers to leave
    in half, as in :func:`edge_backbones.toolchain.quantize.placement.select_layers`. ``fallback``: where the gate fails,
    leave the
    noisiest blocks in half instead of giving up.
    """

    weights: Annotated[
        str,
        Option(
            "Where the weights come from: pretrained, random:SEED, or a checkpoint file (.safetensors, or .pth / .ckpt "
            "without code). Prefixes of names such as module. or backbone. are removed. Of a training checkpoint the EMA "
            "weights are preferred, then those of a teacher.",
            group="Network",
        ),
    ] = "pretrained"
    from_model: Annotated[
        bool, Option("The model is a whole one, such as DETR: take the backbone inside it.", group="Network")
    ] = False
    num_channels: Annotated[
        int | None, Option("How many channels the input has. By default as the network has.", group="Network", least=1)
    ] = None
    output_stride: Annotated[
        int | None,
        Option(
            "Dilate the last stages so that no stride is larger than this: 8 or 16. Only some networks of timm can.",
            group="Network",
        ),
    ] = None
    out_indices: Annotated[
        tuple[int, ...] | None,
        Option("Which stages to keep, by index, such as 1,2,3,4 or -2,-1. By default the last one."),
    ] = None
    out_features: Annotated[tuple[str, ...] | None, Option("Which stages to keep, by name, such as layer1,layer4.")] = (
        None
    )
    hidden_states: Annotated[
        bool, Option("Return every hidden state too, for output_hidden_states=True.", group="Network")
    ] = False
    dataset_index: Annotated[
        int, Option("Which expert to take of a ViTPose network that has several.", group="Network", least=0)
    ] = 0
    image: Annotated[
        Any,
        Option(
            "The preprocessing, for a model that comes with none: the folder of an image processor of transformers, or its "
            "preprocessor_config.json.",
            group="Network",
        ),
    ] = None
    input: Annotated[
        Literal["pixel_values", "image"],
        Option(
            "What the engine takes. pixel_values: float NCHW, normalised. image: uint8 NHWC camera frames, which the graph "
            "preprocesses.",
            group="Input",
        ),
    ] = "pixel_values"
    batch: Annotated[
        int | ShapeRange | None,
        Option(
            "How many images one call takes: a number, or a range MIN:OPT:MAX. By default what suits the device of the "
            "profile, else 1.",
            group="Input",
        ),
    ] = None
    height: int | ShapeRange | None = None
    width: int | ShapeRange | None = None
    precisions: Annotated[
        tuple[Precision | str, ...] | Literal["auto"],
        Option(
            "Number format of the engine. Repeat for one engine each. auto: the fastest of fp32, fp16 and int8 on this "
            "machine that passes its accuracy gate. By default int8."
        ),
    ] = (Precision.INT8,)
    method: Annotated[
        Method | None,
        Option(
            "How to find the range of values of each tensor. auto, the default, takes for each stage the method that leaves "
            "it the least noise.",
            group="int8 and fp8",
        ),
    ] = None
    percentile: Annotated[
        float | None,
        Option(
            "How many percent of a tensor's values method percentile keeps inside the range. By default 99.99.",
            group="int8 and fp8",
        ),
    ] = None
    calibration: Annotated[
        Path | None,
        Option(
            "Take the ranges from this calibration.json, or from the bundle that holds it, instead of calibrating. It must "
            "be of the same network.",
            group="int8 and fp8",
        ),
    ] = None
    exclude: Annotated[
        tuple[str, ...],
        Option(
            "Layers to leave in fp16: a module (blocks.0), a pattern (*.mlp.fc2), op:Add or stage:layer4. Repeat for "
            "several.",
            group="int8 and fp8",
        ),
    ] = ()
    fallback: Annotated[
        bool,
        Option(
            "If int8 or fp8 misses the accuracy gate, leave the noisiest blocks in fp16 until it passes.",
            group="int8 and fp8",
        ),
    ] = True
    gates: Mapping[Precision, Gate] = field(default_factory=dict)
    profile: Annotated[
        str | Path | None,
        Option(
            "The device that the bundle is for: a name that `edge-backbones profiles` lists, or a .toml file. What it cannot "
            "run is refused, and its usual batch is the default."
        ),
    ] = None
    golden: Annotated[int, Option("How many images the accuracy of each engine is measured on.", least=1)] = 4
    torchscript: Annotated[
        bool, Option("Write the network as a TorchScript program too, for libtorch.", group="Engines for libtorch")
    ] = True
    flavours: Annotated[
        tuple[Literal["torchscript", "torch_tensorrt"], ...],
        Option(
            "Engines for libtorch to make besides those of OpenVINO. Repeat for both. Engines of TensorRT are made by "
            "`edge-backbones compile`.",
            group="Engines for libtorch",
        ),
    ] = ()
    program: Annotated[
        Literal["torchscript", "exported_program"],
        Option(
            "What torch_tensorrt writes: a program for torch.jit.load, or one for torch.export.load.",
            group="Engines for libtorch",
        ),
    ] = "torchscript"
    cache: Path | None = field(default_factory=default_cache)

    def __post_init__(self) -> None:
        if self.input not in ("pixel_values", "image"):
            raise InputError(f"input must be 'pixel_values' or 'image', got {self.input!r}")
        for option in ("out_features", "exclude", "flavours"):  # one name stands for a tuple of it
            if isinstance(value := getattr(self, option), str):
                object.__setattr__(self, option, (value,))
        if unknown := set(self.flavours) - {"torchscript", "torch_tensorrt"}:
            raise InputError(
                f"flavours are torchscript and torch_tensorrt, got {', '.join(sorted(unknown))}: edge-backbones compile "
                "adds engines of other libraries to a finished bundle"
            )
        if self.precisions != "auto":
            object.__setattr__(self, "precisions", precisions_of(self.precisions))
        object.__setattr__(self, "gates", dict(zip(precisions_of(self.gates), self.gates.values(), strict=True)))
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
        return _AUTO if self.precisions == "auto" else precisions_of(self.precisions)

    @property
    def needs_ranges(self) -> bool:
        """Whether a wanted precision needs ranges, which are found on calibration images."""
        return any(precision.is_calibrated for precision in self.wanted)

    def source_options(self, profile: DeviceProfile | None = None) -> SourceOptions:
        """The part that says how to make the network; ``profile``: of the device that it is for."""
        from edge_backbones.toolchain.sources.base import SourceOptions

        return SourceOptions(
            **({} if profile is None else {"default_size": profile.defaults.size}),
            weights=self.weights,
            from_model=self.from_model,
            num_channels=self.num_channels,
            img_size=_opt_size(self),
            output_stride=self.output_stride,
            out_indices=self.out_indices,
            out_features=self.out_features,
            hidden_states=self.hidden_states,
            dataset_index=self.dataset_index,
            image=self.image,
        )


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
    _check_before_loading(options, images)
    progress("loading libraries", 0, None)
    with needing("building a bundle", "build"):
        from edge_backbones.toolchain import steps
    profile = None if options.profile is None else profiles.load_profile(options.profile)
    reused = None if options.calibration is None else steps.read_calibration(options.calibration)

    with new_bundle(target, overwrite=overwrite) as folder, _work_folder(folder) as work_name:
        work = Path(work_name)
        loaded = steps.load_network(source, options, profile, progress)
        input = _input_spec(options, loaded, profile)
        _refuse_for(profile, options, input)
        chosen = steps.choose_images(images, loaded, input, options, work, progress)
        loaded, prepared = steps.prepare_network(loaded, input, chosen, progress)
        graph, script = steps.export_network(prepared, options, work, progress)
        golden = steps.record_golden(loaded, prepared, graph, script, chosen, progress)
        calibrated = steps.calibrate_graph(graph, loaded.image_config, chosen, reused, options, work, progress)
        verdict = steps.try_candidates(graph, calibrated, golden, options, work, progress)
        torch_engines = _compile_torch_engines(prepared, graph, script, golden, options, progress)
        manifest = write_bundle(
            folder,
            loaded=loaded,
            prepared=prepared,
            golden=golden,
            golden_names=chosen.golden_names,
            verdict=verdict,
            script=script,
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
    return BuildResult(bundle, tuple(record.parity for record in manifest.engines), reasons, notes)


# ---- checks ---------------------------------------------------------------------------------------------------------


def _check_before_loading(options: BuildOptions, images: ImageSource) -> None:
    """Refuse a build that cannot succeed, before libraries take seconds to load."""
    if "torch_tensorrt" in options.flavours and not gpus.find_gpus():
        raise CompileError(f"torch_tensorrt compiles on the GPU that will run the engine: {gpus.no_gpu_reason()}")
    if images is None and options.needs_ranges and options.calibration is None:
        raise CalibrationError("int8 needs calibration images: pass a folder of photographs (--images FOLDER)")


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
    graph: ExportedGraph,
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
    return [MeasuredEngine(engine, _measure(engine, graph, golden, options)) for engine in engines]


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
        )
        yield engine_of_torch_tensorrt(program, torch_tensorrt.SUFFIXES[options.program], precision, found[0])


def _measure(
    engine: CompiledEngine, graph: ExportedGraph, golden: GoldenSamples, options: BuildOptions
) -> ParityReport:
    """Measure the parity of an engine that is no candidate; raises ParityError outside its gate."""
    precision = engine.key.precision
    gate = options.gates.get(precision, DEFAULT_GATES[precision])
    # Host code is allowed: the program was made here, of the network that the user gave.
    load = LoadOptions(gpu=None if engine.key.gpu is None else 0, allow_host_code=True)
    report = measure_engine(engine.key, engine.data, graph.spec, graph.input, golden, gate, options=load)
    library = registry.get(engine.key.flavour).package
    return require(report, advice=functools.partial(advice_on_building, library=library))


def _remember_measured(bundle: Bundle) -> None:
    """Note on this machine that each engine was measured here and held its gate."""
    for record in bundle.manifest.engines:
        host = registry.this_machine(None if record.key.gpu is None else 0)
        promises.remember(bundle.manifest, record, host)


def _work_folder(folder: Path) -> tempfile.TemporaryDirectory[str]:
    # Images stay mapped after an error, and some file systems keep such a file: that must not hide the error.
    return tempfile.TemporaryDirectory(dir=folder, ignore_cleanup_errors=True)


# ---- the input ------------------------------------------------------------------------------------------------------


def _opt_size(options: BuildOptions) -> tuple[int, int] | None:
    """Return the (height, width) that the user asks for, None where the user leaves it open."""
    if options.height is None or options.width is None:
        return None
    return _as_range(options.height).opt, _as_range(options.width).opt


def _as_range(size: int | ShapeRange) -> ShapeRange:
    return size if isinstance(size, ShapeRange) else ShapeRange.fixed(size)


def _input_spec(options: BuildOptions, loaded: LoadedBackbone, profile: DeviceProfile | None) -> InputSpec:
    """Settle the graph's input. Axes of variable size go in steps of the deepest kept stride.

    Raises SourceError for a range that is not in multiples of it.
    """
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
