"""A typed ONNX graph becomes a plan: TensorRT from 10.3 on and TensorRT-RTX, on one path. No torch, no onnx.

Networks are strongly typed: number formats come from the graph. What a release has is looked for on its module, so that
names which came or went (see :mod:`edge_backbones.engines.tensorrt.library`) decide nothing by version number.

TensorRT times kernels: it compiles for the GPU of this machine. TensorRT-RTX needs none and compiles for the
architectures it is told (``targets``).
"""

from __future__ import annotations

import contextlib
import re
import struct
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import msgspec
import numpy as np

from edge_backbones.bundle.manifest import GpuKey
from edge_backbones.bundle.onnx_gate import graph_fault
from edge_backbones.engines import ports as plan
from edge_backbones.engines.gpu import memory as cuda
from edge_backbones.engines.tensorrt.library import against_driver, against_release, load_library, logger_of
from edge_backbones.errors import CompileError, InputError
from edge_backbones.machine import gpus
from edge_backbones.machine.profiles import FIRST_ARCHITECTURE, against_dla
from edge_backbones.machine.system import gib, is_jetson, read_system
from edge_backbones.option import Option
from edge_backbones.progress import Progress, no_progress
from edge_backbones.spec import InputSpec, Precision, ShapeRange

PlanFlavour = Literal["tensorrt", "tensorrt_rtx"]

_RTX_DEFAULT = ("sm_80", "sm_86", "sm_89", "sm_120")


@dataclass(frozen=True, kw_only=True)
class Shapes:
    """One optimisation profile: the sizes that its kernels are chosen for."""

    batch: ShapeRange
    height: ShapeRange
    width: ShapeRange


@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """How a plan is compiled. ``None`` and ``False`` leave a setting to TensorRT.

    ``profiles``: input sizes, each inside those of the graph; none means one profile with all of them. ``targets``:
    architectures for TensorRT-RTX (``sm_89``). ``workspace``: bytes of scratch memory that a kernel may ask for. ``level``:
    builder optimisation level, 0 to 5. ``hardware_compatibility``: ``ampere_plus`` (any GPU since Ampere, slower) or
    ``same_compute_capability``. ``version_compatible``: newer releases and the lean runtime run it; ``embed_runtime``
    carries a lean runtime inside, which is code that a device has to allow. ``refit``: weights can be replaced later;
    ``strip``: the plan is written without them. ``sparse``: use 2:4 sparse weights. ``dla_core``: compile for this core of
    the deep-learning accelerator; ``gpu_fallback``: layers that it cannot run go to the GPU. ``timing_cache``: what an
    earlier compilation measured.
    """

    profiles: Annotated[
        tuple[Shapes, ...],
        Option(
            "Input sizes to choose kernels for, as BATCHxHEIGHTxWIDTH; each is a number or MIN:OPT:MAX, as in 1x224x224 or "
            "1:4:8x224x224. Repeat for several optimisation profiles. By default one profile with every size of the graph.",
            group="TensorRT: speed",
        ),
    ] = ()
    targets: Annotated[
        tuple[str, ...],
        Option(
            "GPU architecture to compile for with tensorrt_rtx, such as sm_89. Repeat for several.",
            group="TensorRT: which GPUs run the plan",
        ),
    ] = ()
    workspace: Annotated[
        int | None, Option("How much scratch memory a kernel may use.", group="TensorRT: speed", least=1)
    ] = None
    level: Annotated[
        int | None,
        Option(
            "How long to search for fast kernels: 0 is shortest, 5 longest.", group="TensorRT: speed", least=0, most=5
        ),
    ] = None
    hardware_compatibility: Annotated[
        Literal["none", "ampere_plus", "same_compute_capability"],
        Option(
            "Which other GPUs may run the plan, more slowly: any since Ampere, or those of the same compute capability.",
            group="TensorRT: which GPUs run the plan",
        ),
    ] = "none"
    version_compatible: Annotated[
        bool,
        Option("Let the lean runtime of the same release run the plan too.", group="TensorRT: which GPUs run the plan"),
    ] = False
    embed_runtime: Annotated[
        bool,
        Option(
            "Put the lean runtime into the plan, so that newer releases of TensorRT run it. That runtime is code, which a "
            "device has to allow.",
            group="TensorRT: which GPUs run the plan",
        ),
    ] = False
    refit: Annotated[bool, Option("Make a plan whose weights can be replaced later.", group="TensorRT: weights")] = (
        False
    )
    strip: Annotated[
        bool,
        Option("Write the plan without its weights. They are put in later, by refitting.", group="TensorRT: weights"),
    ] = False
    sparse: Annotated[
        bool, Option("Use kernels for 2:4 sparse weights, where the network has such.", group="TensorRT: weights")
    ] = False
    dla_core: Annotated[
        int | None,
        Option("Compile for this core of the DLA, the deep-learning accelerator.", group="DLA of a Jetson", least=0),
    ] = None
    gpu_fallback: Annotated[
        bool, Option("Run the layers that the DLA cannot run on the GPU.", group="DLA of a Jetson")
    ] = True
    timing_cache: Annotated[
        bytes | None,
        Option("Kernel timings of an earlier compilation, to save time: its .cache file.", group="TensorRT: speed"),
    ] = None

    def __post_init__(self) -> None:
        for target in self.targets:
            if not re.fullmatch(r"sm_\d{2,3}", target):
                raise InputError(f"target {target!r} is not an architecture: write sm_89 for compute capability 8.9")
        if self.level is not None and not 0 <= self.level <= 5:
            raise InputError(f"builder level must be 0 to 5, got {self.level}")
        if self.workspace is not None and not 1 <= self.workspace < 1 << 63:
            raise InputError(f"workspace must be at least 1 byte and below 2**63, got {self.workspace}")
        if self.embed_runtime and not self.version_compatible:
            raise InputError("embed_runtime is for version-compatible plans: set version_compatible=True too")


@dataclass(frozen=True)
class DlaCoverage:
    """Which layers a DLA core runs, asked before anything is compiled."""

    layers: int
    refused: tuple[str, ...]

    def __str__(self) -> str:
        some = f" ({', '.join(self.refused[:5])}{', ...' if len(self.refused) > 5 else ''})" if self.refused else ""
        return f"DLA runs {self.layers - len(self.refused)} of {self.layers} layers; the GPU {len(self.refused)}{some}"


@dataclass(frozen=True)
class Plan:
    """A compiled plan, what its key must say, and what TensorRT told about it.

    ``timing_cache``: to be given to the next compilation. ``layers``: the engine inspector's JSON, where a GPU was there to
    load the plan. ``memory_estimate``: bytes, see :func:`least_memory`. ``warnings``: TensorRT's own, the latest last.
    """

    data: bytes
    gpu: GpuKey
    library_version: str
    device_name: str
    timing_cache: bytes | None
    layers: str | None
    coverage: DlaCoverage | None
    memory_estimate: int
    warnings: tuple[str, ...]


def compile_plan(
    graph: bytes,
    input: InputSpec,
    precision: Precision,
    *,
    flavour: PlanFlavour,
    options: PlanOptions | None = None,
    device: int = 0,
    ranges: Mapping[str, float] | None = None,
    progress: Progress = no_progress,
) -> Plan:
    """Compile ONNX bytes, whose number formats are those of ``precision``, for the GPU ``device`` or ``options.targets``.

    ``progress`` gets TensorRT's phases; Ctrl-C (KeyboardInterrupt) ends the compilation at its next step. ``ranges``: |x|
    thresholds by tensor, with an fp32 graph, ``precision`` int8 and a DLA core of a TensorRT that still has weak typing
    (JetPack 6): its DLA takes no Q/DQ pairs.

    Raises CompileError with TensorRT's words and a way out, MissingDependencyError. One compilation per process at a time is
    what TensorRT's timing needs; more are safe.
    """
    options = options or PlanOptions()
    library, gpu, targets, profiles = _agreed(input, precision, flavour, options, device, weak=ranges is not None)

    log = logger_of(library)
    log.clear()
    log.warnings.clear()
    # TensorRT times kernels on the GPU whose context is current, in the thread that builds too.
    times = flavour == "tensorrt" or options.refit or options.strip  # TensorRT-RTX needs the GPU for these alone
    current = cuda.open_memory(gpu.index) if times and gpu is not None else contextlib.nullcontext()
    with current:
        with _null_pointers_explained(log):
            builder = _made(library.Builder(log), "a builder", log)
            cores = builder.num_DLA_cores
            if options.dla_core is not None and not 0 <= options.dla_core < cores:
                raise CompileError(
                    f"there is no DLA core {options.dla_core} here, which has {cores}: leave --dla-core out"
                )
            network = _made(builder.create_network(_network_flags(library, weak=ranges is not None)), "a network", log)
            parser = _made(
                library.OnnxParser(network, log), "a parser", log
            )  # owns the weights: it stays until the end
        if options.dla_core is not None and hasattr(library.OnnxParserFlag, "ADJUST_FOR_DLA"):
            parser.set_flag(library.OnnxParserFlag.ADJUST_FOR_DLA)
        progress("reading the graph", 0, None)
        fault = graph_fault(graph)
        if fault is not None:
            raise CompileError(f"this graph is given to no library: {fault}")
        if not parser.parse(graph):
            causes = dict.fromkeys(
                _cause(parser.get_error(index).node_operator(), parser.get_error(index).desc())
                for index in range(parser.num_errors)
            )
            raise CompileError(f"{flavour} cannot read this graph: {'; '.join(causes) or log.last_error()}")
        estimate = least_memory(network, profiles, options)
        if gpu is not None and flavour == "tensorrt":  # TensorRT-RTX compiles in the memory of this machine
            _refuse_for_memory(estimate, gpu)

        config = _made(builder.create_builder_config(), "a configuration", log)
        coverage = None
        with _refusals_explained(log):
            _configure(library, builder, config, options, targets)
            if ranges is not None:
                _quantise_implicitly(library, network, config, ranges)
            if options.dla_core is not None:  # behind the number formats: a DLA core runs nothing in fp32
                coverage = _place_on_dla(library, builder, network, config, options)
                progress(str(coverage), 0, None)
            for number, shapes in enumerate(profiles):
                _add_profile(builder, config, input, shapes, number, log)
            _read_timing_cache(config, options.timing_cache, flavour)

        log.clear()
        data = _serialized(library, builder, network, config, progress, current)
        if data is None:
            raise CompileError(
                f"{flavour} {library.__version__} cannot compile this graph: {_explained(log.last_error())}"
            )
        compiled = bytes(data)
        key = GpuKey(
            architectures=targets,
            hardware_compatibility=options.hardware_compatibility,
            version_compatible=options.version_compatible,
            host_code=options.embed_runtime,
            refittable=options.refit or options.strip,
            stripped=options.strip,
            dla_core=options.dla_core,
            driver=None if gpu is None or flavour == "tensorrt_rtx" else gpu.driver,
            multiprocessors=None if gpu is None or flavour == "tensorrt_rtx" else gpu.multiprocessors,
            profiles=tuple(shapes_of(input, shapes) for shapes in profiles),
        )
        return Plan(
            data=compiled,
            gpu=key,
            library_version=str(library.__version__),
            device_name="any GPU of its architectures" if flavour == "tensorrt_rtx" or gpu is None else gpu.name,
            timing_cache=_written_timing_cache(config, flavour),
            layers=None if gpu is None or options.strip else _layers(library, compiled, log, options),
            coverage=coverage,
            memory_estimate=estimate,
            warnings=tuple(dict.fromkeys(warning.strip() for warning in log.warnings)),
        )


def check_plan(
    input: InputSpec,
    precision: Precision,
    *,
    flavour: PlanFlavour,
    options: PlanOptions,
    device: int = 0,
    weak: bool = False,
) -> None:
    """Raise CompileError for what `compile_plan` would refuse before it compiles."""
    _agreed(input, precision, flavour, options, device, weak=weak)


def has_weak_typing(flavour: PlanFlavour) -> bool:
    """Does this library still choose number formats itself? TensorRT 10 does, and DLA on JetPack 6 needs it."""
    return hasattr(load_library(flavour).BuilderFlag, "INT8")


def shapes_of(input: InputSpec, shapes: Shapes) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Input shapes (min, opt, max) of one optimisation profile."""
    sizes = (shapes.batch, shapes.height, shapes.width)
    least, usual, most = (input.shape(*(getattr(size, which) for size in sizes)) for which in ("min", "opt", "max"))
    return least, usual, most


def least_memory(network: Any, profiles: Sequence[Shapes], options: PlanOptions) -> int:
    """Bytes that compiling needs at least: weights of the network and of the plan, the workspace, the widest layer.

    An axis of variable size counts with the largest batch where it comes first and with 1 elsewhere: a lower bound, to tell
    the hopeless before minutes have gone, and no promise.
    """
    batch = max(shapes.batch.max for shapes in profiles)
    weights, widest = 0, 0
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        outputs = [layer.get_output(i) for i in range(layer.num_outputs)]
        inputs = [layer.get_input(i) for i in range(layer.num_inputs)]
        bytes_out = sum(_tensor_bytes(tensor, batch) for tensor in outputs)
        if layer.type.name == "CONSTANT":
            weights += bytes_out
        else:
            widest = max(widest, bytes_out + sum(_tensor_bytes(tensor, batch) for tensor in inputs))
    return 2 * weights + widest + (options.workspace or 0)


def _refuse_for_memory(estimate: int, gpu: gpus.Gpu) -> None:
    """Raise CompileError for what cannot fit. A Jetson's GPU has what the CPU leaves."""
    memory = read_system().memory if gpu.integrated else None
    room = gpu.memory_bytes if memory is None else min(gpu.memory_bytes, memory.available)
    if estimate > room:
        has = "has" if memory is None else "has, beside what runs,"
        raise CompileError(
            f"this compilation needs {gib(estimate)} at least and {gpu.name} {has} {gib(room)}: choose a smaller batch or "
            "size, a smaller workspace, or end what else runs"
        )


def _tensor_bytes(tensor: Any, batch: int) -> int:
    if tensor is None or len(tensor.shape) < 0:
        return 0
    sizes = [(batch if axis == 0 else 1) if size < 0 else size for axis, size in enumerate(tensor.shape)]
    return int(np.prod(sizes, dtype=np.int64)) * max(1, int(tensor.dtype.itemsize))


# ---- what is asked for, against what there is -----------------------------------------------------------------------


def _agreed(
    input: InputSpec, precision: Precision, flavour: PlanFlavour, options: PlanOptions, device: int, *, weak: bool
) -> tuple[Any, gpus.Gpu | None, tuple[str, ...], tuple[Shapes, ...]]:
    """The library, the GPU, the architectures and the profiles, if all of it goes together."""
    gpu = _gpu(flavour, device)
    if gpu is not None and flavour == "tensorrt" and (old := against_driver(flavour, gpu.driver)):
        raise CompileError(old)
    library = load_library(flavour)
    version = str(library.__version__)
    if old := against_release(
        flavour, version, jetson=is_jetson()
    ):  # JetPack 6.0 has 8.6, which lacks names used below
        raise CompileError(f"{flavour} {version} is too old: {old}")
    targets = _targets(library, flavour, precision, options, gpu)
    profiles = _profiles(input, options)
    _refuse(library, flavour, options, input, profiles, precision, gpu, weak=weak)
    return library, gpu, targets, profiles


def _gpu(flavour: PlanFlavour, device: int) -> gpus.Gpu | None:
    found = gpus.find_gpus()
    if 0 <= device < len(found):
        return found[device]
    if flavour == "tensorrt":  # without a driver its Builder ends the process
        reason = gpus.no_gpu_reason() or f"this machine has {len(found)} GPUs, device {device} is none of them"
        raise CompileError(f"TensorRT compiles on the GPU that will run the plan: {reason}")
    return None


def _targets(
    library: Any, flavour: PlanFlavour, precision: Precision, options: PlanOptions, gpu: gpus.Gpu | None
) -> tuple[str, ...]:
    if flavour == "tensorrt":
        assert gpu is not None  # _gpu raises
        if options.targets not in ((), (gpu.architecture,)):
            raise CompileError(
                f"TensorRT compiles for the GPU at hand, {gpu.architecture} here, not for {', '.join(options.targets)}: "
                "copy the bundle to that device and run edge-backbones compile there"
            )
        targets: tuple[str, ...] = (gpu.architecture,)
    else:
        known = _rtx_architectures(library)
        targets = options.targets or tuple(t for t in _RTX_DEFAULT if _has(t, precision) and t in known)
        unknown = [target for target in targets if target not in known]
        if unknown:
            raise CompileError(
                f"TensorRT-RTX {library.__version__} does not compile for {', '.join(unknown)}; it knows {', '.join(known)}. "
                "Jetson and datacenter GPUs need TensorRT (--flavour tensorrt), on the device itself"
            )
    old = [target for target in targets if not _has(target, precision)]
    if old:
        raise CompileError(
            f"{', '.join(old)} has no {precision}, which came with sm_{FIRST_ARCHITECTURE[precision]}: leave it out, or "
            "compile int8 or fp16"
        )
    return targets


def _rtx_architectures(library: Any) -> tuple[str, ...]:
    names = [name for name in library.ComputeCapability.__members__ if re.fullmatch(r"SM\d+", name)]
    return tuple(f"sm_{name.removeprefix('SM')}" for name in names)


def _has(architecture: str, precision: Precision) -> bool:
    return int(architecture.removeprefix("sm_")) >= FIRST_ARCHITECTURE.get(precision, 0)


def _profiles(input: InputSpec, options: PlanOptions) -> tuple[Shapes, ...]:
    whole = Shapes(batch=input.batch, height=input.height, width=input.width)
    for shapes in options.profiles:
        for axis in ("batch", "height", "width"):
            inner, outer = getattr(shapes, axis), getattr(whole, axis)
            if not outer.min <= inner.min <= inner.max <= outer.max:
                raise CompileError(
                    f"a profile asks for {axis} {inner}, the graph has {outer}: build the bundle for more sizes"
                )
    profiles = options.profiles or (whole,)
    numbered = [plan.Profile(number, *shapes_of(input, shapes)) for number, shapes in enumerate(profiles)]
    missing = plan.uncovered(numbered, input)
    if missing:
        raise CompileError(
            f"no profile holds {missing[0]}, and the bundle promises {input.min_shape} to {input.max_shape}: add a profile "
            "for it, or build a bundle with fewer sizes"
        )
    return profiles


def _refuse(
    library: Any,
    flavour: PlanFlavour,
    options: PlanOptions,
    input: InputSpec,
    profiles: Sequence[Shapes],
    precision: Precision,
    gpu: gpus.Gpu | None,
    *,
    weak: bool,
) -> None:
    """Raise CompileError for what this library lacks or would ignore."""
    name = f"{flavour} {library.__version__}"
    if flavour == "tensorrt_rtx":
        ignored = {
            "version compatibility": options.version_compatible,
            "hardware compatibility": options.hardware_compatibility != "none",
            "sparse weights": options.sparse,
            "a DLA core": options.dla_core is not None,
            "a timing cache": options.timing_cache is not None,
        }
        asked = [what for what, wanted in ignored.items() if wanted]
        if asked:
            raise CompileError(
                f"{name} has no {' and no '.join(asked)}: leave it out, or use TensorRT (--flavour tensorrt)"
            )
        if (options.refit or options.strip) and not gpus.find_gpus():
            raise CompileError(
                f"{name} compiles refittable and stripped plans on a machine with a GPU only ({gpus.no_gpu_reason()})"
            )
    if options.hardware_compatibility != "none" and _compatibility(library, options.hardware_compatibility) is None:
        raise CompileError(
            f"{name} has no hardware compatibility {options.hardware_compatibility!r}: use a newer release"
        )
    if options.hardware_compatibility != "none" and gpu is not None and gpu.integrated:
        raise CompileError(
            f"TensorRT has no hardware compatibility on JetPack ({gpu.name}): leave it out, and compile on each device"
        )
    if (
        options.hardware_compatibility == "ampere_plus"
        and gpu is not None
        and not _has(gpu.architecture, Precision.BF16)
    ):
        raise CompileError(
            f"hardware compatibility ampere_plus begins with sm_80, and {gpu.name} is {gpu.architecture}: leave it out"
        )
    if options.dla_core is not None:
        for shapes in profiles:
            sizes = {"batch": shapes.batch, "height": shapes.height, "width": shapes.width}
            if reasons := against_dla(precision, msgspec.structs.replace(input, **sizes)):
                raise CompileError("; ".join(reasons))
    if weak and options.strip:
        raise CompileError(
            "a stripped plan takes its weights from the graph of its precision, which int8 on this DLA has not"
        )
    if weak and (options.dla_core is None or precision is not Precision.INT8):
        raise CompileError("weak typing with ranges is for int8 on a DLA core; every other plan takes a typed graph")


# ---- configuration --------------------------------------------------------------------------------------------------


def _network_flags(library: Any, *, weak: bool) -> int:
    """Values of these members differ between releases; some have no STRONGLY_TYPED to choose, being it always."""
    flags = library.NetworkDefinitionCreationFlag
    return 0 if weak or not hasattr(flags, "STRONGLY_TYPED") else 1 << int(flags.STRONGLY_TYPED)


def _compatibility(library: Any, wanted: str) -> Any:
    return getattr(library.HardwareCompatibilityLevel, wanted.upper(), None)


def _configure(library: Any, builder: Any, config: Any, options: PlanOptions, targets: Sequence[str]) -> None:
    config.profiling_verbosity = library.ProfilingVerbosity.DETAILED
    config.clear_flag(library.BuilderFlag.TF32)  # set by default: fp32 convolutions would be rounded to 10 bits
    if options.workspace is not None:
        config.set_memory_pool_limit(library.MemoryPoolType.WORKSPACE, options.workspace)
    if options.level is not None:
        config.builder_optimization_level = options.level
    if options.hardware_compatibility != "none":
        config.hardware_compatibility_level = _compatibility(library, options.hardware_compatibility)
    flags = library.BuilderFlag
    wanted = {
        "VERSION_COMPATIBLE": options.version_compatible,
        "EXCLUDE_LEAN_RUNTIME": options.version_compatible and not options.embed_runtime,
        "REFIT": options.refit or options.strip,
        "STRIP_PLAN": options.strip,
        "SPARSE_WEIGHTS": options.sparse,
    }
    for name, set_it in wanted.items():
        if set_it:
            config.set_flag(getattr(flags, name))
    if hasattr(library, "ComputeCapability"):
        config.set_flag(library.BuilderFlag.REQUIRE_USER_ALLOCATION)  # no graph captures a call that allocates
        config.num_compute_capabilities = len(targets)
        for index, target in enumerate(targets):
            capability = getattr(library.ComputeCapability, target.upper().replace("_", ""))
            if not config.set_compute_capability(capability, index):
                raise CompileError(f"TensorRT-RTX {library.__version__} refused the target {target}")


def _place_on_dla(library: Any, builder: Any, network: Any, config: Any, options: PlanOptions) -> DlaCoverage:
    core = options.dla_core
    assert core is not None  # the caller asks for DLA
    config.default_device_type = library.DeviceType.DLA
    config.DLA_core = core
    if options.gpu_fallback:
        config.set_flag(library.BuilderFlag.GPU_FALLBACK)
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    computing = [layer for layer in layers if layer.type.name not in ("CONSTANT", "SHAPE")]
    refused = tuple(layer.name for layer in computing if not config.can_run_on_DLA(layer))
    coverage = DlaCoverage(len(computing), refused)
    if refused and not options.gpu_fallback:
        raise CompileError(f"{coverage}: allow them there (gpu_fallback=True), or leave --dla-core out")
    return coverage


def _quantise_implicitly(library: Any, network: Any, config: Any, ranges: Mapping[str, float]) -> None:
    """Weak typing: a tensor with a scale may be computed in int8, everything else in fp16."""
    if not hasattr(library.BuilderFlag, "INT8"):
        raise CompileError(f"TensorRT {library.__version__} has no weak typing left: compile the typed int8 graph")
    config.set_flag(library.BuilderFlag.INT8)
    config.set_flag(library.BuilderFlag.FP16)
    tensors = [network.get_input(index) for index in range(network.num_inputs)]
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        tensors += [layer.get_output(i) for i in range(layer.num_outputs)]
    known = {tensor.name: ranges[tensor.name] for tensor in tensors if ranges.get(tensor.name, 0) > 0}
    if not known:
        raise CompileError("none of the calibrated tensors is in this graph: calibrate again for it")
    config.int8_calibrator = _calibrator(library, calibration_cache(str(library.__version__), known))


def calibration_cache(version: str, ranges: Mapping[str, float]) -> bytes:
    """What TensorRT of this version would have written after calibrating: range / 127 of each tensor, as the hexadecimal
    digits of a big-endian float32. TensorRT leaves a table of another version or algorithm unread."""
    major, minor, patch = map(int, version.split(".")[:3])
    lines = [f"TRT-{major * 10000 + minor * 100 + patch}-EntropyCalibration2"]
    lines += [f"{name}: {struct.pack('>f', value / 127).hex()}" for name, value in ranges.items()]
    return "\n".join([*lines, ""]).encode()


def _calibrator(library: Any, cache: bytes) -> Any:
    class Calibrator(library.IInt8EntropyCalibrator2):  # type: ignore[misc,name-defined]
        """The kind that DLA takes."""

        def get_batch_size(self) -> int:
            return 1

        def get_batch(self, names: Sequence[str]) -> None:
            return None

        def read_calibration_cache(self) -> bytes:
            return cache

        def write_calibration_cache(self, cache: bytes) -> None:
            pass

    return Calibrator()


def _add_profile(builder: Any, config: Any, input: InputSpec, shapes: Shapes, number: int, log: Any) -> None:
    profile = _made(builder.create_optimization_profile(), "an optimisation profile", log)
    least, usual, most = shapes_of(input, shapes)
    if profile.set_shape(input.name, least, usual, most) is False or config.add_optimization_profile(profile) != number:
        raise CompileError(f"TensorRT refused the profile {least} to {most}: {log.last_error()}")


def _read_timing_cache(config: Any, data: bytes | None, flavour: PlanFlavour) -> None:
    if flavour == "tensorrt_rtx":  # there it does nothing and says so with a warning
        return
    cache = config.create_timing_cache(data or b"")
    # One of another GPU or release only saves no time.
    if cache is None or not config.set_timing_cache(cache, False):
        empty = config.create_timing_cache(b"")
        if empty is None or not config.set_timing_cache(empty, False):
            raise CompileError("TensorRT refused an empty timing cache: its installation is damaged")


def _written_timing_cache(config: Any, flavour: PlanFlavour) -> bytes | None:
    if flavour == "tensorrt_rtx":
        return None
    cache = config.get_timing_cache()
    data = None if cache is None else cache.serialize()
    return None if data is None else bytes(data)


# ---- the build itself -----------------------------------------------------------------------------------------------


def _serialized(
    library: Any,
    builder: Any,
    network: Any,
    config: Any,
    progress: Progress,
    current: contextlib.AbstractContextManager[Any],
) -> Any:
    """The plan, or None. TensorRT works in a thread of its own, so that Ctrl-C reaches this one at once."""
    monitor = _monitor(library, progress)
    config.progress_monitor = monitor
    found: list[Any] = []
    failed: list[BaseException] = []

    def work() -> None:
        try:
            with current:
                found.append(builder.build_serialized_network(network, config))
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=work, name="TensorRT builder")
    thread.start()
    try:
        while thread.is_alive():
            thread.join(0.1)
    except BaseException:
        monitor.cancelled = True
        thread.join()  # it uses what this function holds
        raise
    if monitor.error is not None:
        raise monitor.error
    if failed:
        raise CompileError(f"the TensorRT builder failed: {failed[0]}") from failed[0]
    return found[0]


def _monitor(library: Any, progress: Progress) -> Any:
    class Monitor(library.IProgressMonitor):  # type: ignore[misc,name-defined]
        """Phases lie inside each other: the outermost is the one that is shown."""

        def __init__(self) -> None:
            super().__init__()
            self.cancelled = False
            self.error: BaseException | None = None
            self._steps: dict[str, int] = {}
            self._outer: dict[str, str] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self._steps[phase_name] = num_steps
            if parent_phase:
                self._outer[phase_name] = parent_phase
            self._show(phase_name, 0)

        def step_complete(self, phase_name: str, step: int) -> bool:
            self._show(phase_name, step + 1)
            return not self.cancelled

        def phase_finish(self, phase_name: str) -> None:
            self._show(phase_name, self._steps.get(phase_name, 0))
            self._steps.pop(phase_name, None)
            self._outer.pop(phase_name, None)

        def _show(self, phase: str, step: int) -> None:
            if phase in self._outer or self.error is not None:
                return
            try:
                progress(f"compiling: {phase.lower()}", step, self._steps.get(phase))
            except BaseException as error:  # an exception must not travel through TensorRT
                self.error, self.cancelled = error, True

    return Monitor()


def _layers(library: Any, plan: bytes, log: Any, options: PlanOptions) -> str | None:
    """What the engine inspector says, as JSON; None for a library without one, and where the plan does not load: parity
    says why, and raises."""
    if not hasattr(library, "EngineInspector"):
        return None
    with _null_pointers_explained(log):
        runtime = _made(library.Runtime(log), "a runtime", log)
    if options.embed_runtime:  # code that this very call has made
        runtime.engine_host_code_allowed = True
    engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        return None
    inspector = _made(engine.create_engine_inspector(), "an inspector", log)
    return str(inspector.get_engine_information(library.LayerInformationFormat.JSON))


def _made(thing: Any, what: str, log: Any) -> Any:
    if thing is None:
        raise CompileError(f"TensorRT did not make {what}: {log.last_error()}")
    return thing


@contextlib.contextmanager
def _null_pointers_explained(log: Any) -> Iterator[None]:
    """A constructor of TensorRT that fails is a TypeError of pybind, for the null pointer it got; the log has the reason."""
    try:
        yield
    except TypeError as error:
        raise CompileError(f"TensorRT did not start: {log.last_error()} ({error})") from error


@contextlib.contextmanager
def _refusals_explained(log: Any) -> Iterator[None]:
    """What the bindings raise for a setting that they do not take."""
    try:
        yield
    except (TypeError, ValueError, OverflowError, AttributeError) as error:
        words = " ".join(str(error).split())
        raise CompileError(f"TensorRT does not take a setting of this plan ({words}): {log.last_error()}") from error


_IN_A_LAYER = re.compile(r"Error Code \d+: [\w ]+ \((.*?)\.? In \S+ at /", re.DOTALL)
_CONDITION = re.compile(r"^Assertion failed: .*?: (?=\S)|^.* && (?=\")", re.DOTALL)


def _cause(operation: str, text: str) -> str:
    """Why the parser refused a node, in its own words, without the conditions in C++ and the frames around them.

    Its text for an operation that it has no importer for is ``false``, or that there is no plugin of that name.
    """
    if text.strip() in ("", "false") or "Plugin not found" in text:
        return f"no layer for {operation or 'a node'}"
    found = _IN_A_LAYER.search(text)  # the layer that it made of the node says more than the node itself
    said = found.group(1) if found else _CONDITION.sub("", text.strip().splitlines()[0]).strip('"')
    return f"{operation}: {said}".removeprefix(": ").rstrip(".")


_WAYS_OUT: tuple[tuple[str, str], ...] = (
    (r"HW-specific datatypes", "this architecture lacks a number format of the graph: leave the target out"),
    (r"libnvinfer_lean", "this installation has no lean runtime: leave version compatibility out"),
    (
        r"(?i)out ?of ?memory|OutOfMemory|memory allocation fail",
        "choose a smaller workspace, batch or size, or add swap",
    ),
    (r"(?i)no optimization profile", "the graph has sizes that no profile fixes"),
    (r"(?i)insufficient workspace|workspace.*(smaller|too small|exceeds)", "allow more workspace"),
    (
        r"(?i)cuda ?error|CUDA initialization|CUDA_SUCCESS",
        "the GPU or its driver did not answer: run edge-backbones doctor",
    ),
)


def _explained(message: str) -> str:
    """TensorRT's words, with a way out where one is known."""
    ways = [way for pattern, way in _WAYS_OUT if re.search(pattern, message)]
    return f"{message} ({ways[0]})" if ways else message
