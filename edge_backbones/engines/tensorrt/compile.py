"""A typed ONNX graph becomes a plan: TensorRT from 10.3 on and TensorRT-RTX, on one path. No torch, no onnx.

Networks are strongly typed: number formats come from the graph. What a release has is looked for on its module, so that
names which came or went (see :mod:`edge_backbones.engines.tensorrt.library`) decide nothing by version number.

TensorRT times kernels: it compiles for the GPU of this machine. TensorRT-RTX needs none and compiles for the
architectures it is told (``targets``).
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from edge_backbones.bundle.manifest import GpuKey
from edge_backbones.bundle.onnx_gate import graph_fault
from edge_backbones.engines.gpu.memory import open_memory
from edge_backbones.engines.tensorrt.dla import DlaCoverage, place_on_dla, quantise_implicitly
from edge_backbones.engines.tensorrt.library import logger_of
from edge_backbones.engines.tensorrt.messages import cause, explained, made, null_pointers_explained, refusals_explained
from edge_backbones.engines.tensorrt.options import PlanOptions, Shapes
from edge_backbones.engines.tensorrt.requests import PlanFlavour, compatibility_level, resolve_request, shapes_of
from edge_backbones.errors import CompileError
from edge_backbones.machine import gpus
from edge_backbones.machine.system import gib, read_system
from edge_backbones.progress import Progress, no_progress
from edge_backbones.spec import InputSpec, Precision


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
    gpu: int = 0,
    ranges: Mapping[str, float] | None = None,
    progress: Progress = no_progress,
) -> Plan:
    """Compile ONNX bytes, whose number formats are those of ``precision``, for the GPU of index ``gpu`` or
    ``options.targets``.

    ``progress`` gets TensorRT's phases; Ctrl-C (KeyboardInterrupt) ends the compilation at its next step. ``ranges``: |x|
    thresholds by tensor, with an fp32 graph, ``precision`` int8 and a DLA core of a TensorRT that still has weak typing
    (JetPack 6): its DLA takes no Q/DQ pairs.

    Raises CompileError with TensorRT's words and a way out, MissingDependencyError. One compilation per process at a time is
    what TensorRT's timing needs; more are safe.
    """
    options = options or PlanOptions()
    library, card, targets, profiles = resolve_request(input, precision, flavour, options, gpu, weak=ranges is not None)

    log = logger_of(library)
    log.clear()
    log.warnings.clear()
    # TensorRT times kernels on the GPU whose context is current, in the thread that builds too.
    times = flavour == "tensorrt" or options.refit or options.strip  # TensorRT-RTX needs the GPU for these alone
    current = open_memory(card.index) if times and card is not None else contextlib.nullcontext()
    with current:
        with null_pointers_explained(log):
            builder = made(library.Builder(log), "a builder", log)
            cores = builder.num_DLA_cores
            if options.dla_core is not None and not 0 <= options.dla_core < cores:
                raise CompileError(
                    f"there is no DLA core {options.dla_core} here, which has {cores}: leave --dla-core out"
                )
            network = made(builder.create_network(_network_flags(library, weak=ranges is not None)), "a network", log)
            parser = made(library.OnnxParser(network, log), "a parser", log)  # owns the weights: it stays until the end
        if options.dla_core is not None and hasattr(library.OnnxParserFlag, "ADJUST_FOR_DLA"):
            parser.set_flag(library.OnnxParserFlag.ADJUST_FOR_DLA)
        progress("reading the graph", 0, None)
        fault = graph_fault(graph)
        if fault is not None:
            raise CompileError(f"this graph is given to no library: {fault}")
        if not parser.parse(graph):
            causes = dict.fromkeys(
                cause(parser.get_error(index).node_operator(), parser.get_error(index).desc())
                for index in range(parser.num_errors)
            )
            raise CompileError(f"{flavour} cannot read this graph: {'; '.join(causes) or log.last_error()}")
        estimate = least_memory(network, profiles, options)
        if card is not None and flavour == "tensorrt":  # TensorRT-RTX compiles in the memory of this machine
            _refuse_for_memory(estimate, card)

        config = made(builder.create_builder_config(), "a configuration", log)
        coverage = None
        with refusals_explained(log):
            _configure(library, builder, config, options, targets)
            if ranges is not None:
                quantise_implicitly(library, network, config, ranges)
            if options.dla_core is not None:  # behind the number formats: a DLA core runs nothing in fp32
                coverage = place_on_dla(library, builder, network, config, options)
                progress(str(coverage), 0, None)
            for number, shapes in enumerate(profiles):
                _add_profile(builder, config, input, shapes, number, log)
            _read_timing_cache(config, options.timing_cache, flavour)

        log.clear()
        data = _serialized(library, builder, network, config, progress, current)
        if data is None:
            raise CompileError(
                f"{flavour} {library.__version__} cannot compile this graph: {explained(log.last_error())}"
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
            driver=None if card is None or flavour == "tensorrt_rtx" else card.driver,
            multiprocessors=None if card is None or flavour == "tensorrt_rtx" else card.multiprocessors,
            profiles=tuple(shapes_of(input, shapes) for shapes in profiles),
        )
        return Plan(
            data=compiled,
            gpu=key,
            library_version=str(library.__version__),
            device_name="any GPU of its architectures" if flavour == "tensorrt_rtx" or card is None else card.name,
            timing_cache=_written_timing_cache(config, flavour),
            layers=None if card is None or options.strip else _layers(library, compiled, log, options),
            coverage=coverage,
            memory_estimate=estimate,
            warnings=tuple(dict.fromkeys(warning.strip() for warning in log.warnings)),
        )


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


# ---- configuration --------------------------------------------------------------------------------------------------


def _network_flags(library: Any, *, weak: bool) -> int:
    """Values of these members differ between releases; some have no STRONGLY_TYPED to choose, being it always."""
    flags = library.NetworkDefinitionCreationFlag
    return 0 if weak or not hasattr(flags, "STRONGLY_TYPED") else 1 << int(flags.STRONGLY_TYPED)


def _configure(library: Any, builder: Any, config: Any, options: PlanOptions, targets: Sequence[str]) -> None:
    config.profiling_verbosity = library.ProfilingVerbosity.DETAILED
    config.clear_flag(library.BuilderFlag.TF32)  # set by default: fp32 convolutions would be rounded to 10 bits
    if options.workspace is not None:
        config.set_memory_pool_limit(library.MemoryPoolType.WORKSPACE, options.workspace)
    if options.level is not None:
        config.builder_optimization_level = options.level
    if options.hardware_compatibility != "none":
        config.hardware_compatibility_level = compatibility_level(library, options.hardware_compatibility)
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


def _add_profile(builder: Any, config: Any, input: InputSpec, shapes: Shapes, number: int, log: Any) -> None:
    profile = made(builder.create_optimization_profile(), "an optimisation profile", log)
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
    with null_pointers_explained(log):
        runtime = made(library.Runtime(log), "a runtime", log)
    if options.embed_runtime:  # code that this very call has made
        runtime.engine_host_code_allowed = True
    engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        return None
    inspector = made(engine.create_engine_inspector(), "an inspector", log)
    return str(inspector.get_engine_information(library.LayerInformationFormat.JSON))
