"""Engines for this machine, compiled from the graphs of a finished bundle: numpy and the engine library are enough.

Graphs and engines go to libraries in C++ that nobody has given them to before: all of that happens in a process of its own.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

import msgspec

from edge_backbones.bundle import trust
from edge_backbones.bundle.golden import GoldenSamples
from edge_backbones.bundle.manifest import EngineKey, EngineRecord, Flavour, GraphRecord, decode_calibration
from edge_backbones.bundle.reader import Bundle, load_golden
from edge_backbones.bundle.writer import record_bytes
from edge_backbones.deploy.parity import advice_on_building, measure_in_bundle, require
from edge_backbones.deploy.timing import engines_here, time_bundle
from edge_backbones.engines import compat, promises
from edge_backbones.engines import select as session
from edge_backbones.engines.base import CompiledEngine
from edge_backbones.engines.compile import compile_engine, compile_for_gpu, engine_of_torchscript
from edge_backbones.engines.tensorrt.compile import PlanFlavour, PlanOptions, check_plan, has_weak_typing
from edge_backbones.errors import (
    BundleError,
    CompileError,
    EdgeBackbonesError,
    EngineMismatchError,
    InferenceError,
    MissingDependencyError,
)
from edge_backbones.machine import child, hosts
from edge_backbones.machine.profiles import DeviceProfile, load_profile, profile_of, refusals
from edge_backbones.machine.system import board_name
from edge_backbones.parity_report import ParityError, ParityReport
from edge_backbones.progress import Progress, no_progress
from edge_backbones.spec import InputSpec, Precision

if TYPE_CHECKING:
    pass

# Engines by their graphs: the CPU computes fp16, bf16 and fp8 in fp32 and keeps such weights.
_ENGINE_OVER_GRAPH = {
    Precision.FP32: 1.1, Precision.FP16: 2.1, Precision.BF16: 2.1, Precision.INT8: 1.4, Precision.FP8: 3.8,
}  # fmt: skip
_KERNELS = 1 << 20
_FORMS = {"onnx": "ONNX", "torchscript": "TorchScript"}


@dataclass(frozen=True)
class CompileResult:
    """The engines that `compile_bundle` added, as the manifest has them, and what else the user should know, a sentence each:
    which precisions were left out and why, what the engine library said, which engine runtimes take."""

    engines: tuple[EngineRecord, ...]
    notes: tuple[str, ...]


@child.apart(CompileError)
def compile_bundle(
    path: str | Path,
    *,
    precisions: tuple[Precision, ...] | None = None,
    flavour: Flavour = "openvino",
    plan: PlanOptions | None = None,
    profile: str | Path | None = None,
    device: int = 0,
    allow_host_code: bool = False,
    resume: bool = False,
    cache: Path | None = None,
    in_process: bool = False,
    progress: Progress = no_progress,
) -> CompileResult:
    """Add engines for this machine to a bundle, from its graphs, each verified before it is added.

    ``precisions``: None for every ONNX graph of the bundle. ``flavour``: ``openvino`` for the CPU; ``tensorrt`` for the GPU
    ``device``; ``tensorrt_rtx`` for the architectures of ``plan.targets``, no GPU needed: without one that fits, the engine
    is added unmeasured, and `verify_bundle` on the device has to measure it before a runtime takes it; ``torchscript``:
    the frozen module of the bundle. ``profile``: the device that it is for (:mod:`edge_backbones.machine.profiles`): what it
    cannot run is left out, and its workspace is the default. ``allow_host_code``: a version-compatible plan may run
    the code that it carries, and ``torchscript`` needs it: that engine is a program, which is run to measure it. ``resume``:
    leave out what was compiled before for this machine, whatever its settings.

    All of it happens in a process of its own, whose death is a CompileError that says what it was doing; with ``in_process``
    in this one, for a debugger.

    Every engine that this machine can run is timed then, side by side: runtimes take the fastest, whatever its precision.

    The bundle is unchanged for a precision that fails: its gate is the one the bundle was built with. Where none was asked
    for by name the others go on, and a note of the result has its error, which is raised when nothing was added and (with
    ``resume``) nothing was there. ``progress`` gets every note at once. Raises BundleError, CompileError, ParityError,
    MissingDependencyError.
    """
    del in_process  # child.apart has read it
    if flavour == "torchscript" and not allow_host_code:
        raise CompileError(
            "a TorchScript engine is a program, which is measured by running it: allow_host_code=True (--allow-host-code)"
        )
    if flavour == "torch_tensorrt":
        raise CompileError(
            "torch_tensorrt compiles the network itself, which a bundle does not hold: edge-backbones build MODEL BUNDLE "
            "--flavour torch_tensorrt, on a machine with the GPU"
        )
    bundle = Bundle.open(path)
    trust.admit(bundle)
    form = "torchscript" if flavour == "torchscript" else "onnx"
    held = [g for g in bundle.manifest.graphs if g.format == form]
    graphs = [g for g in held if precisions is None or g.precision in precisions]
    lacking = [precision for precision in precisions or () if precision not in {g.precision for g in held}]
    if lacking or not graphs:
        names = ", ".join(g.precision.value for g in held) or "none"
        asked = ", ".join(p.value for p in lacking) or "graph to compile"
        way = session.way_to_build(bundle, lacking if form == "onnx" else ())
        raise BundleError(f"{bundle.path} has no {asked}; its {_FORMS[form]} graphs: {names}. {way}")
    if resume:
        graphs = [graph for graph in graphs if not _is_compiled(bundle, graph, flavour, plan or PlanOptions(), device)]
    golden, input = load_golden(bundle), bundle.manifest.input
    options = plan or PlanOptions()
    notes: list[str] = []

    def note(text: str) -> None:
        notes.append(text)
        progress(text, 0, None)

    failed: list[EdgeBackbonesError] | None = [] if precisions is None else None
    if profile is not None:
        described = load_profile(profile)
        if described.architecture is not None and (flavour == "tensorrt" or flavour not in described.flavours):
            _refuse_elsewhere(bundle, described, device)
        if options.workspace is None:
            options = dataclasses.replace(options, workspace=described.defaults.workspace_bytes)
        allowed = functools.partial(_refuse_for, described, flavour=flavour, plan=options, input=input)
        graphs = _passing(graphs, allowed, failed, note)
        if flavour == "tensorrt" and described.architecture is not None:  # TensorRT compiles for the GPU at hand
            options = dataclasses.replace(options, targets=(described.architecture,))
    if options.embed_runtime and not allow_host_code:
        raise CompileError(
            "a plan with its own runtime is measured by running it: allow_host_code=True (--allow-host-code)"
        )
    if flavour in ("tensorrt", "tensorrt_rtx"):
        served = functools.partial(_refuse_plan, flavour=flavour, plan=options, input=input, device=device)
        graphs = _passing(graphs, served, failed, note)
    if graphs:  # minutes of work would be lost otherwise
        bundle.require_writable(room=_room(graphs, flavour))
    added: list[str] = []

    def add(graph: GraphRecord) -> None:
        nonlocal bundle
        engine = _compiled(bundle, graph, flavour, options, device, cache=cache, progress=progress)
        for text in engine.notes:
            note(text)
        report = _passed(bundle, graph, golden, engine, device, code=allow_host_code, progress=progress)
        record, contents = _engine_record(engine, report, graph)
        if told := trust.vouch(bundle, record):
            note(told)
        bundle = bundle.add_engine(record, contents)
        if report.measured:
            promises.remember(bundle.manifest, record, session.this_machine(None if record.key.gpu is None else device))
        added.append(record.name)

    _passing(graphs, add, failed, note)
    on = None if flavour == "openvino" else device
    bundle, told = time_bundle(bundle, on, code=allow_host_code, anew=bool(added), progress=progress)
    for text in told:
        note(text)
    if failed and not added and not (resume and engines_here(bundle, on, code=allow_host_code)):
        raise failed[0]
    return CompileResult(tuple(e for e in bundle.manifest.engines if e.name in added), tuple(notes))


def _passing(
    graphs: Sequence[GraphRecord],
    step: Callable[[GraphRecord], None],
    failed: list[EdgeBackbonesError] | None,
    note: Callable[[str], None],
) -> list[GraphRecord]:
    """The graphs that a step does not refuse. Why it refuses others is noted, and put into ``failed`` or raised."""
    left = []
    for graph in graphs:
        try:
            step(graph)
        except (CompileError, ParityError, EngineMismatchError, InferenceError) as error:
            if failed is None:
                raise
            failed.append(error)
            note(f"leaving {graph.precision} out: {error}")
        else:
            left.append(graph)
    return left


def _compiled(
    bundle: Bundle,
    graph: GraphRecord,
    flavour: Flavour,
    options: PlanOptions,
    device: int,
    *,
    cache: Path | None,
    progress: Progress,
) -> CompiledEngine:
    """One engine of this graph."""
    progress(f"compiling {graph.precision}", 0, None)
    child.doing(
        f"was compiling {graph.precision} for {flavour}",
        f"{bundle.path / graph.file.path} is hostile, {child.OR_A_FAULT}; another --precision may do",
    )
    if flavour == "openvino":
        return compile_engine(bytes(bundle.read(graph.file)), graph.precision, cache=cache)
    if flavour == "torchscript":
        return engine_of_torchscript(bytes(bundle.read(graph.file)))
    assert flavour != "torch_tensorrt"  # compile_bundle refuses it
    source, ranges = _graph_for_gpu(bundle, graph, flavour, options)
    measured = options.timing_cache
    if flavour == "tensorrt" and measured is None:  # what earlier compilations have measured
        measured = _latest_timing_cache(bundle)
    return compile_for_gpu(
        source,
        bundle.manifest.input,
        graph.precision,
        flavour=flavour,
        options=dataclasses.replace(options, timing_cache=measured),
        device=device,
        ranges=ranges,
        progress=progress,
    )


def _passed(
    bundle: Bundle,
    graph: GraphRecord,
    golden: GoldenSamples,
    engine: CompiledEngine,
    device: int,
    *,
    code: bool,
    progress: Progress,
) -> ParityReport:
    """The parity of a new engine where it runs here, a report without figures where it does not; raises ParityError."""
    gate = promises.gate_of(bundle.manifest, engine.key)
    report = ParityReport(precision=graph.precision, gate=gate, stages=())
    on = None if engine.key.gpu is None else device
    if engine.key.gpu is None or not compat.reasons_against(engine.key, session.this_machine(on)):
        progress(f"verifying {graph.precision}", 0, None)
        child.doing(
            f"was running the {graph.precision} engine that it had compiled for {engine.key.flavour}",
            f"{bundle.path / graph.file.path} is hostile, {child.OR_A_FAULT}; another --precision may do",
        )
        report = measure_in_bundle(bundle, engine.key, engine.data, golden, gate, on, code=code)
        require(report, advice=functools.partial(_advice_on_compiling, bundle, engine.key))
    return report


def _advice_on_compiling(bundle: Bundle, key: EngineKey, report: ParityReport) -> str:
    """What helps where a graph held its gate when it was built, and the engine that this machine made of it does not."""
    others = [g.precision.value for g in bundle.manifest.graphs if g.format == "onnx" and g.precision != key.precision]
    instead = f"compile another graph of this bundle (--precision {others[0]})" if others else ""
    if report.precision is Precision.FP32:
        library = f"{key.flavour} {key.library_version}"
        way = f"Its graph held when it was built, and {library} computes it wrongly: install another release"
    elif report.precision.is_calibrated:
        way = (
            f"{report.precision} rounds otherwise here than where the bundle was built: build it with --precision fp16"
        )
    else:
        way = advice_on_building(report).replace("choose", "build the bundle with")
    return ", or ".join(filter(None, (way, instead)))


def _room(graphs: Sequence[GraphRecord], flavour: Flavour) -> int:
    """Bytes that the engines of these graphs take on disk, about."""
    if flavour == "torchscript":  # the graph is the engine
        return 0
    return sum(int(_ENGINE_OVER_GRAPH[graph.precision] * graph.file.size) + _KERNELS for graph in graphs)


def flavour_here(device: int = 0) -> tuple[Flavour, DeviceProfile | None]:
    """What engines for this machine are compiled with when nothing is said (`compat.serving_flavour`), and its profile, which
    is None for a GPU that none describes."""
    host = session.this_machine(device)
    flavour = compat.serving_flavour(host)
    if flavour == "openvino" or host.gpu is None:
        return flavour, load_profile("cpu")
    return flavour, profile_of(host.gpu, board=board_name())


def compile_here(
    path: str | Path,
    engine: str | None,
    *,
    device: int | None,
    allow_host_code: bool,
    in_process: bool = False,
    progress: Progress = no_progress,
) -> None:
    """Add what ``engine`` (a precision or a flavour; None for every graph) means to a bundle, for the CPU or GPU ``device``.

    On a GPU that is the flavour of `compat.serving_flavour`, as for `edge-backbones compile`. Raises as `compile_bundle`.
    """
    host = session.this_machine(device)
    flavour = cast("Flavour | None", engine if engine not in (None, *Precision) else None)
    if flavour is None:
        flavour = "openvino" if device is None else compat.serving_flavour(host)
        if (
            flavour == "openvino" and device is not None
        ):  # nothing here compiles for its GPU: TensorRT's refusal says why
            flavour = "tensorrt"
    targets = (host.gpu.architecture,) if host.gpu is not None and flavour == "tensorrt_rtx" else ()
    profile = None
    with contextlib.suppress(MissingDependencyError):  # Python 3.10 reads profiles with the cli extra alone
        profile = profile_here(flavour, targets, device or 0)
    compile_bundle(
        path,
        precisions=(Precision(engine),) if engine in set(Precision) else None,
        plan=PlanOptions(targets=targets),
        flavour=flavour,
        profile=None if profile is None else profile.name,
        device=device or 0,
        allow_host_code=allow_host_code,
        in_process=in_process,
        progress=progress,
    )


def profile_here(flavour: Flavour, targets: Sequence[str] = (), device: int = 0) -> DeviceProfile | None:
    """The profile of the GPU ``device``, where engines of a flavour are for it; None for a GPU that none describes.

    Those of TensorRT-RTX are for it when ``targets`` name its architecture: others are compiled here for elsewhere.
    """
    if flavour not in ("tensorrt", "tensorrt_rtx"):
        return None
    gpu = hosts.this_host({}, device=device).gpu
    if gpu is None or (flavour == "tensorrt_rtx" and gpu.architecture not in targets):
        return None
    return profile_of(gpu, board=board_name())


def _is_compiled(bundle: Bundle, graph: GraphRecord, flavour: Flavour, plan: PlanOptions, device: int) -> bool:
    """Whether the bundle holds an engine of this graph that runs here, whole and measured."""
    source = graph
    if flavour in ("tensorrt", "tensorrt_rtx") and _is_weak(graph, flavour, plan):
        source = bundle.manifest.onnx_graph(Precision.FP32) or graph
    host = session.this_machine(None if flavour == "openvino" else device)
    for engine in trust.known_engines(bundle):
        key = engine.key
        if (key.flavour, key.precision, key.graph_sha256) != (flavour, graph.precision, source.file.sha256):
            continue
        if not promises.reasons_against(bundle.manifest, engine) and not compat.reasons_against(key, host):
            with contextlib.suppress(BundleError):
                bundle.read(engine.file)
                return True
    return False


def _refuse_elsewhere(bundle: Bundle, profile: DeviceProfile, device: int) -> None:
    """Raise CompileError for a GPU that is not here: TensorRT compiles on the GPU that will run the engine."""
    host = hosts.this_host({}, device=device)
    if host.gpu is not None and host.gpu.architecture == profile.architecture:
        return
    here = f"has {host.gpu.name}, {host.gpu.architecture}" if host.gpu is not None else f"has none ({host.no_gpu})"
    rtx = f"--flavour tensorrt_rtx --target {profile.architecture} --profile {profile.name}"
    raise CompileError(
        f"engines for {profile.name} are compiled on its own GPU, {profile.architecture}, and this machine {here}: copy "
        f"{bundle.path} to the device and run there: edge-backbones compile {bundle.path.name}"
        + (f". For TensorRT-RTX it can be compiled here: {rtx}" if "tensorrt_rtx" in profile.flavours else "")
    )


def _refuse_plan(graph: GraphRecord, *, flavour: PlanFlavour, plan: PlanOptions, input: InputSpec, device: int) -> None:
    weak = _is_weak(graph, flavour, plan)
    check_plan(input, graph.precision, flavour=flavour, options=plan, device=device, weak=weak)


def _refuse_for(
    profile: DeviceProfile, graph: GraphRecord, *, flavour: Flavour, plan: PlanOptions, input: InputSpec
) -> None:
    """Raise CompileError for what the device cannot run, before minutes have gone into it."""
    sizes = [
        msgspec.structs.replace(input, batch=shapes.batch, height=shapes.height, width=shapes.width)
        for shapes in plan.profiles
    ]
    reasons = [
        reason
        for of_profile in sizes or [input]
        for reason in refusals(
            profile,
            precision=graph.precision,
            flavour=flavour,
            input=of_profile,
            dla_core=plan.dla_core,
            targets=plan.targets,
        )
    ]
    if reasons:
        raise CompileError("; ".join(dict.fromkeys(reasons)))


def _is_weak(graph: GraphRecord, flavour: PlanFlavour, plan: PlanOptions) -> bool:
    """int8 on the DLA of a TensorRT that takes no Q/DQ pairs there: compiled from the fp32 graph and the ranges."""
    return plan.dla_core is not None and graph.precision is Precision.INT8 and has_weak_typing(flavour)


def _graph_for_gpu(
    bundle: Bundle, graph: GraphRecord, flavour: PlanFlavour, plan: PlanOptions
) -> tuple[bytes, Mapping[str, float] | None]:
    """The typed graph, or the fp32 graph and its ranges."""
    if not _is_weak(graph, flavour, plan):
        return bytes(bundle.read(graph.file)), None
    plain, record = bundle.manifest.onnx_graph(Precision.FP32), bundle.manifest.calibration
    if plain is None or record is None:
        raise CompileError(
            f"int8 on this DLA is compiled from the fp32 graph and calibrated ranges, and {bundle.path} has no "
            f"{'fp32 graph' if plain is None else 'calibration'}: build it with --precision int8 --precision fp32"
        )
    found = decode_calibration(bundle.read(record.file), str(bundle.path / record.file.path))
    if found.factors:
        raise CompileError(
            "the ranges of this bundle are of an equalised graph, which DLA cannot run: build it with --method max"
        )
    return bytes(bundle.read(plain.file)), found.ranges


def _latest_timing_cache(bundle: Bundle) -> bytes | None:
    """What an earlier compilation measured; TensorRT itself leaves what another GPU measured."""
    for engine in reversed(trust.known_engines(bundle)):
        if engine.timing_cache is not None:
            with contextlib.suppress(BundleError):  # damaged, or gone with its engine: it only saves time
                return bytes(bundle.read(engine.timing_cache))
    return None


def _engine_record(
    engine: CompiledEngine, report: ParityReport, graph: GraphRecord
) -> tuple[EngineRecord, dict[str, bytes]]:
    """The record of an engine, and the bytes of its files by path."""
    if engine.key.flavour == "torchscript":  # the graph is the engine
        return EngineRecord(key=engine.key, file=graph.file, parity=report), {}
    path = engine.key.path(engine.data, engine.suffix)
    stem = path.removesuffix(engine.suffix)
    contents = {path: engine.data}
    if engine.layers is not None:
        contents[f"{stem}.layers.json"] = engine.layers.encode()
    if engine.timing_cache is not None:
        contents[f"{stem}.cache"] = engine.timing_cache
    records = {name: record_bytes(name, data) for name, data in contents.items()}
    record = EngineRecord(
        key=engine.key,
        file=records[path],
        parity=report,
        layers=records.get(f"{stem}.layers.json"),
        timing_cache=records.get(f"{stem}.cache"),
    )
    return record, contents
