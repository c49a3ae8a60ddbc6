"""Compile a typed ONNX graph to a plan, with TensorRT from 10.3 on or TensorRT-RTX. It needs neither torch nor onnx.

Networks are strongly typed: the graph defines the number formats. Both libraries and all releases share one path: names
that only some releases have are looked up on the module (see :mod:`edge_backbones.engines.tensorrt.library`), and no
version number decides.

TensorRT times kernels, so it compiles for the GPU of this machine. TensorRT-RTX needs no GPU and compiles for the
architectures in ``targets``.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from edge_backbones.bundle.manifest import GpuKey
from edge_backbones.bundle.onnx_gate import graph_fault
from edge_backbones.engines.gpu.memory import open_memory
from edge_backbones.engines.tensorrt.dla import DlaCoverage, place_on_dla, type_weakly
from edge_backbones.engines.tensorrt.library import logger_of
from edge_backbones.engines.tensorrt.messages import cause, explained, made, null_pointers_explained, refusals_explained
from edge_backbones.engines.tensorrt.needs import Needs, memory_needs, refuse_for_memory
from edge_backbones.engines.tensorrt.options import PlanOptions, Shapes
from edge_backbones.engines.tensorrt.requests import (
    InputShapes,
    PlanFlavour,
    compatibility_level,
    resolve_request,
    shapes_of,
    tiling_level,
)
from edge_backbones.errors import CompileError
from edge_backbones.machine import gpus
from edge_backbones.progress import Progress, no_progress
from edge_backbones.spec import InputSpec, Precision

GraphBytes: TypeAlias = "bytes | bytearray | Callable[[], bytes | bytearray]"


@dataclass(frozen=True)
class Plan:
    """Hold a compiled plan, the facts for its engine key, and what TensorRT reported about it.

    Attributes:
        data: The plan's bytes.
        gpu: GPU part of its engine key.
        library_version: Release that compiled it.
        device_name: GPU that it was compiled on.
        timing_cache: Kernel times, for the next compilation.
        layers: JSON of the engine inspector, if a GPU was there to load the plan.
        coverage: Layers that the DLA core runs, if one was asked for.
        memory: What compiling needed, by estimate.
        warnings: TensorRT's warnings, the latest last.
    """

    data: bytes
    gpu: GpuKey
    library_version: str
    device_name: str
    timing_cache: bytes | None
    layers: str | None
    coverage: DlaCoverage | None
    memory: Needs
    warnings: tuple[str, ...]


def compile_plan(
    graph: GraphBytes,
    input: InputSpec,
    precision: Precision,
    *,
    flavour: PlanFlavour,
    options: PlanOptions | None = None,
    gpu: int = 0,
    weak: bool = False,
    ranges: Mapping[str, float] | None = None,
    progress: Progress = no_progress,
) -> Plan:
    """Compile ONNX bytes to a plan, for the GPU of index ``gpu`` or for ``options.targets``.

    TensorRT's timing needs at most one compilation per process at a time; several are safe, but their kernels are
    chosen by disturbed timings. Ctrl-C (KeyboardInterrupt) ends the compilation at TensorRT's next step.

    Args:
        graph: ONNX bytes, with the number formats of ``precision``; or a function that reads them, so that they need no
            memory while TensorRT builds.
        input: Name, dtype and sizes of the input.
        precision: Precision of the graph.
        flavour: ``tensorrt`` or ``tensorrt_rtx``.
        options: How to compile it; None for the defaults.
        gpu: Index of the GPU.
        weak: Let TensorRT choose the number formats, for a DLA core with a TensorRT that still has weak typing (JetPack 6).
            ``graph`` is then fp32 and ``precision`` fp16 or int8.
        ranges: Thresholds of |x| by tensor name, for ``weak`` int8.
        progress: Gets TensorRT's phases.

    Returns:
        The plan and what TensorRT reported about it.

    Raises:
        CompileError: TensorRT, or a check before it, refuses the graph or an option; the message says how to fix it.
        MissingDependencyError: The library is not installed.
    """
    options = options or PlanOptions()
    library, card, targets, profiles = resolve_request(input, precision, flavour, options, gpu, weak=weak)
    if (ranges is not None) != (weak and precision is Precision.INT8):
        raise CompileError(
            f"ranges are for int8 with weak typing, and this is {precision} {'with' if weak else 'without'} it"
        )

    log = logger_of(library)
    log.clear()
    log.warnings.clear()
    # TensorRT times kernels on the GPU whose context is current. The building thread makes it current too.
    uses_gpu = flavour == "tensorrt" or options.refit or options.strip  # TensorRT-RTX needs it only for these
    current = open_memory(card.index) if uses_gpu and card is not None else contextlib.nullcontext()
    request = _Request(library, flavour, options, card, targets, profiles, input, weak, ranges, progress)
    with current:
        built = _build(request, graph, log, current)
        data = bytes(built.plan)
        built.plan = None  # TensorRT's own copy
        bound_to = None if flavour == "tensorrt_rtx" else card
        return Plan(
            data=data,
            gpu=_gpu_key(options, targets, bound_to, tuple(shapes_of(input, shapes) for shapes in profiles)),
            library_version=str(library.__version__),
            device_name="any GPU of its architectures" if bound_to is None else bound_to.name,
            timing_cache=built.timing_cache,
            layers=_layers_here(request, data, log),
            coverage=built.coverage,
            memory=built.memory,
            warnings=tuple(dict.fromkeys(warning.strip() for warning in log.warnings)),
        )


@dataclass(frozen=True)
class _Request:
    """What a plan is compiled with: the parameters of `compile_plan`, and what they came out to on this machine."""

    library: Any
    flavour: PlanFlavour
    options: PlanOptions
    card: gpus.Gpu | None
    targets: tuple[str, ...]
    profiles: tuple[Shapes, ...]
    input: InputSpec
    weak: bool
    ranges: Mapping[str, float] | None
    progress: Progress


@dataclass
class _Built:
    """What TensorRT's builder left behind. ``plan``: the plan's bytes, in memory of TensorRT."""

    plan: Any
    timing_cache: bytes | None
    coverage: DlaCoverage | None
    memory: Needs


def _build(request: _Request, graph: GraphBytes, log: Any, current: contextlib.AbstractContextManager[Any]) -> _Built:
    """Read the graph and build the plan. The parser, which holds the weights, is gone when this returns."""
    library, options, flavour, card = request.library, request.options, request.flavour, request.card
    builder, network, parser, size = _read_graph(request, graph, log)
    on_gpu = flavour == "tensorrt"  # TensorRT-RTX compiles in host memory
    memory = memory_needs(network, size, request.profiles, options, on_gpu=on_gpu)
    refuse_for_memory(memory, card if on_gpu else None)

    config = made(builder.create_builder_config(), "a configuration", log)
    coverage = None
    with refusals_explained(log):
        _configure(library, builder, config, options, request.targets)
        if request.weak:
            type_weakly(library, network, config, request.ranges)
        if options.dla_core is not None:  # after the number formats are set: DLA runs no fp32
            coverage = place_on_dla(library, network, config, options)
            request.progress(str(coverage), 0, None)
        for number, shapes in enumerate(request.profiles):
            _add_profile(builder, config, request.input, shapes, number, log)
        _read_timing_cache(config, options.timing_cache, flavour)

    log.clear()
    data = _serialized(library, builder, network, config, request.progress, current)
    if data is None:
        raise CompileError(f"{flavour} {library.__version__} cannot compile this graph: {explained(log.last_error())}")
    del parser  # it owns the weights, so it had to live until here
    return _Built(data, _written_timing_cache(config, flavour), coverage, memory)


def _read_graph(request: _Request, graph: GraphBytes, log: Any) -> tuple[Any, Any, Any, int]:
    """Return TensorRT's builder, the network that it reads, the parser, which owns the weights, and the size of the graph.

    The parser copies the weights, so the bytes of the graph are released before anything is built. Raises CompileError if
    this machine lacks the DLA core, or if TensorRT refuses the graph.
    """
    library, options = request.library, request.options
    with null_pointers_explained(log):
        builder = made(library.Builder(log), "a builder", log)
        cores = builder.num_DLA_cores
        if options.dla_core is not None and not 0 <= options.dla_core < cores:
            raise CompileError(f"there is no DLA core {options.dla_core} here, which has {cores}: leave --dla-core out")
        network = made(builder.create_network(_network_flags(library, weak=request.weak)), "a network", log)
        parser = made(library.OnnxParser(network, log), "a parser", log)
    if options.dla_core is not None and hasattr(library.OnnxParserFlag, "ADJUST_FOR_DLA"):
        parser.set_flag(library.OnnxParserFlag.ADJUST_FOR_DLA)
    request.progress("reading the graph", 0, None)
    data = graph() if callable(graph) else graph
    _parse(parser, data, request.flavour, log)
    return builder, network, parser, len(data)


def _parse(parser: Any, graph: bytes | bytearray, flavour: PlanFlavour, log: Any) -> None:
    """Read ONNX bytes into the parser's network. Raises CompileError, which names every node that it refuses."""
    fault = graph_fault(graph)
    if fault is not None:
        raise CompileError(f"this graph is refused: {fault}")
    if not parser.parse(graph):
        causes = dict.fromkeys(
            cause(parser.get_error(index).node_operator(), parser.get_error(index).desc())
            for index in range(parser.num_errors)
        )
        raise CompileError(f"{flavour} cannot read this graph: {'; '.join(causes) or log.last_error()}")


def _gpu_key(
    options: PlanOptions, targets: tuple[str, ...], bound_to: gpus.Gpu | None, profiles: tuple[InputShapes, ...]
) -> GpuKey:
    """Return the GPU part of a plan's key. ``bound_to``: the GPU whose kernels were timed, None for any of ``targets``."""
    return GpuKey(
        architectures=targets,
        hardware_compatibility=options.hardware_compatibility,
        version_compatible=options.version_compatible,
        host_code=options.embed_runtime,
        refittable=options.refit,
        stripped=options.strip,
        dla_core=options.dla_core,
        driver=None if bound_to is None else bound_to.driver,
        multiprocessors=None if bound_to is None else bound_to.multiprocessors,
        profiles=profiles,
    )


# ---- configuration --------------------------------------------------------------------------------------------------


def _network_flags(library: Any, *, weak: bool) -> int:
    """Return the flags of a strongly typed network.

    The values of the flags differ between releases. Releases without STRONGLY_TYPED are always strongly typed.
    """
    flags = library.NetworkDefinitionCreationFlag
    return 0 if weak or not hasattr(flags, "STRONGLY_TYPED") else 1 << int(flags.STRONGLY_TYPED)


def _configure(library: Any, builder: Any, config: Any, options: PlanOptions, targets: Sequence[str]) -> None:
    """Set the options of a plan in TensorRT's builder configuration."""
    config.profiling_verbosity = library.ProfilingVerbosity.DETAILED
    config.clear_flag(library.BuilderFlag.TF32)  # on by default, it would round fp32 convolutions to 10 bits
    if options.workspace is not None:
        config.set_memory_pool_limit(library.MemoryPoolType.WORKSPACE, options.workspace)
    if options.level is not None:
        config.builder_optimization_level = options.level
    if options.tiling != "none" and hasattr(library, "TilingOptimizationLevel"):  # else it was refused
        config.tiling_optimization_level = tiling_level(library, options.tiling)
    if options.hardware_compatibility != "none":
        config.hardware_compatibility_level = compatibility_level(library, options.hardware_compatibility)
    flags = library.BuilderFlag
    wanted = {
        "VERSION_COMPATIBLE": options.version_compatible,
        "EXCLUDE_LEAN_RUNTIME": options.version_compatible and not options.embed_runtime,
        "REFIT": options.refit,
        # A stripped plan gets the weights back that it was compiled with: kernels that depend on them may be chosen.
        "REFIT_IDENTICAL": options.strip and not options.refit,
        "STRIP_PLAN": options.strip,
        "SPARSE_WEIGHTS": options.sparse,
    }
    for name, set_it in wanted.items():
        if set_it:
            config.set_flag(getattr(flags, name))
    if hasattr(library, "ComputeCapability"):
        config.set_flag(library.BuilderFlag.REQUIRE_USER_ALLOCATION)  # a call that allocates cannot be captured
        config.num_compute_capabilities = len(targets)
        for index, target in enumerate(targets):
            capability = getattr(library.ComputeCapability, target.upper().replace("_", ""))
            if not config.set_compute_capability(capability, index):
                raise CompileError(f"TensorRT-RTX {library.__version__} refused the target {target}")


def _add_profile(builder: Any, config: Any, input: InputSpec, shapes: Shapes, number: int, log: Any) -> None:
    """Add one optimisation profile to the configuration."""
    profile = made(builder.create_optimization_profile(), "an optimisation profile", log)
    least, usual, most = shapes_of(input, shapes)
    if profile.set_shape(input.name, least, usual, most) is False or config.add_optimization_profile(profile) != number:
        raise CompileError(f"TensorRT refused the profile {least} to {most}: {log.last_error()}")


def _read_timing_cache(config: Any, data: bytes | None, flavour: PlanFlavour) -> None:
    """Give the kernel times of an earlier compilation to TensorRT, or an empty cache if it does not take them."""
    if flavour == "tensorrt_rtx":  # it would ignore the cache with a warning
        return
    cache = config.create_timing_cache(data or b"")
    # A cache of another GPU or release does no harm, but saves no time.
    if cache is None or not config.set_timing_cache(cache, False):
        empty = config.create_timing_cache(b"")
        if empty is None or not config.set_timing_cache(empty, False):
            raise CompileError("TensorRT refused an empty timing cache: its installation is damaged")


def _written_timing_cache(config: Any, flavour: PlanFlavour) -> bytes | None:
    """Return the kernel times that TensorRT measured; None for TensorRT-RTX."""
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
    """Run TensorRT's builder and return the plan; None if it failed.

    TensorRT works in a thread of its own, so that Ctrl-C reaches this thread at once.
    """
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
        thread.join()  # it uses objects that this function holds
        raise
    if monitor.error is not None:
        raise monitor.error
    if failed:
        raise CompileError(f"the TensorRT builder failed: {failed[0]}") from failed[0]
    return found[0]


def _monitor(library: Any, progress: Progress) -> Any:
    """Return a progress monitor for TensorRT that reports to ``progress`` and can cancel the compilation."""

    class Monitor(library.IProgressMonitor):  # type: ignore[misc,name-defined]
        """Report the outermost phase: TensorRT's phases are nested."""

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
            except BaseException as error:  # an exception must not pass through TensorRT's C++ code
                self.error, self.cancelled = error, True

    return Monitor()


def _layers_here(request: _Request, plan: bytes, log: Any) -> str | None:
    """Return the engine inspector's JSON if the GPU of this machine loads the plan; None without weights or such a GPU."""
    card = request.card
    if card is None or request.options.strip or card.architecture not in request.targets:
        return None
    # The engine is loaded on the GPU whose context is current: this one, and the caller's own context stays as it was.
    with open_memory(card.index):
        return _layers(request.library, plan, log, request.options)


def _layers(library: Any, plan: bytes, log: Any, options: PlanOptions) -> str | None:
    """Return the engine inspector's JSON; None if the library has no inspector or the plan does not load.

    A plan that does not load is reported later, when its parity is measured.
    """
    if not hasattr(library, "EngineInspector"):
        return None
    with null_pointers_explained(log):
        runtime = made(library.Runtime(log), "a runtime", log)
    if options.embed_runtime:  # this process has just compiled that code
        runtime.engine_host_code_allowed = True
    engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        return None
    inspector = made(engine.create_engine_inspector(), "an inspector", log)
    return str(inspector.get_engine_information(library.LayerInformationFormat.JSON))
