"""What is done with a finished bundle on a device: compile an engine for it, verify, explain.

:func:`compile_bundle` and :func:`verify_bundle` run where numpy and the engine library are all there is. Both, and
:func:`explain_bundle`, give graphs and engines of a bundle to libraries in C++ that nobody has given them to before, so they
do it in a process of its own.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from edge_backbones import child, trust
from edge_backbones.build.artifacts import CompiledEngine, Progress, no_progress
from edge_backbones.build.compile import compile_engine, compile_for_gpu, engine_of_torchscript
from edge_backbones.build.parity import advice_on_building, measure_engine, require, time_engines
from edge_backbones.build.tensorrt import PlanFlavour, PlanOptions, check_plan, has_weak_typing
from edge_backbones.bundle import Bundle, load_golden, read_current, record_bytes
from edge_backbones.errors import (
    BundleError,
    CompileError,
    EdgeBackbonesError,
    EngineMismatchError,
    InferenceError,
    IntegrityError,
    MissingDependencyError,
    ParityError,
)
from edge_backbones.manifest import (
    EngineKey,
    EngineRecord,
    Flavour,
    Gate,
    GraphRecord,
    ParityReport,
    decode_calibration,
)
from edge_backbones.profiles import DeviceProfile, load_profile, profile_of, refusals
from edge_backbones.runtime import compat, promises, session
from edge_backbones.spec import InputSpec, Precision
from edge_backbones.system import board_name

if TYPE_CHECKING:
    from edge_backbones.build.explain import Explanation

# Engines by their graphs: the CPU computes fp16, bf16 and fp8 in fp32 and keeps such weights.
_ENGINE_OVER_GRAPH = {
    Precision.FP32: 1.1, Precision.FP16: 2.1, Precision.BF16: 2.1, Precision.INT8: 1.4, Precision.FP8: 3.8,
}  # fmt: skip
_KERNELS = 1 << 20
_FORMS = {"onnx": "ONNX", "torchscript": "TorchScript"}


_LIBRARY = "or the library has a fault"


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
    the frozen module of the bundle. ``profile``: the device that it is for (:mod:`edge_backbones.profiles`): what it
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
            promises.remember(bundle.manifest, record, _host(None if record.key.gpu is None else device))
        added.append(record.name)

    _passing(graphs, add, failed, note)
    on = None if flavour == "openvino" else device
    bundle, told = _timed(bundle, on, code=allow_host_code, anew=bool(added), progress=progress)
    for text in told:
        note(text)
    if failed and not added and not (resume and _runs_here(bundle, on, code=allow_host_code)):
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
        f"{bundle.path / graph.file.path} is hostile, {_LIBRARY}; another --precision may do",
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
    golden: Mapping[str, np.ndarray],
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
    if engine.key.gpu is None or not compat.reasons_against(engine.key, _host(on)):
        progress(f"verifying {graph.precision}", 0, None)
        child.doing(
            f"was running the {graph.precision} engine that it had compiled for {engine.key.flavour}",
            f"{bundle.path / graph.file.path} is hostile, {_LIBRARY}; another --precision may do",
        )
        report = _measured(bundle, engine.key, engine.data, golden, gate, on, code=code)
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


def _advice_on_verifying(bundle: Bundle, record: EngineRecord) -> str:
    """What helps where an engine in a bundle is outside its gate."""
    key = record.key
    again = f"edge-backbones compile {bundle.path} --flavour {key.flavour} --precision {key.precision}"
    if key.flavour == "torch_tensorrt":
        again = f"edge-backbones build MODEL {bundle.path} --flavour torch_tensorrt --overwrite"
    before = "It held its gate when it was compiled: " if record.parity.measured else ""
    explain = f"; edge-backbones verify {bundle.path} --explain finds the layer" if key.flavour == "openvino" else ""
    compile_it = f"{before}compile it again with {again}"
    return compile_it[0].upper() + compile_it[1:] + explain


def _measured(
    bundle: Bundle,
    key: EngineKey,
    data: bytes | bytearray,
    golden: Mapping[str, np.ndarray],
    gate: Gate,
    device: int | None,
    *,
    code: bool = False,
) -> ParityReport:
    spec, input, weights = bundle.manifest.backbone, bundle.manifest.input, session.weights_of(bundle, key)
    return measure_engine(key, data, spec, input, golden, gate, device=device, allow_host_code=code, weights=weights)


def _host(device: int | None) -> compat.Host:
    return compat.this_host(session.installed_versions(), device=device)


def _runs_here(bundle: Bundle, device: int | None, *, code: bool) -> list[EngineRecord]:
    place, host = "cpu" if device is None else "cuda", _host(device)
    bundle, _ = trust.admit(bundle)
    return [e for e in bundle.manifest.engines if not session.reasons_against(bundle, e, host, device=place, code=code)]


def _timed(
    bundle: Bundle, device: int | None, *, code: bool, anew: bool, progress: Progress
) -> tuple[Bundle, tuple[str, ...]]:
    """The bundle with latencies, and what to note of them: engines that can run here are timed side by side, ``anew`` or
    where one has none. Without them the engines are as good: what fails here is noted, not raised."""

    def timed_of(current: Bundle) -> list[EngineRecord]:
        here = _runs_here(current, device, code=code)
        if len(here) < 2 or not (anew or any(engine.milliseconds is None for engine in here)):
            return []
        engines = [
            functools.partial(session.open_session, current, engine, device=device, allow_host_code=code)
            for engine in here
        ]
        figures = time_engines(engines, current.manifest.input, progress=progress)
        return [msgspec.structs.replace(e, milliseconds=figure) for e, figure in zip(here, figures, strict=True)]

    child.doing("was timing the engines of this machine", f"one of them is hostile, {_LIBRARY}")

    try:
        bundle, timed = read_current(bundle.path, timed_of)
        for engine in timed:
            bundle = bundle.add_engine(engine, {})
    except EdgeBackbonesError as error:  # another process took an engine out, say
        return Bundle.open(bundle.path), (f"not timed: {error}",)
    return bundle, (ranking(timed),) if timed else ()


def _room(graphs: Sequence[GraphRecord], flavour: Flavour) -> int:
    """Bytes that the engines of these graphs take on disk, about."""
    if flavour == "torchscript":  # the graph is the engine
        return 0
    return sum(int(_ENGINE_OVER_GRAPH[graph.precision] * graph.file.size) + _KERNELS for graph in graphs)


def ranking(timed: Sequence[EngineRecord]) -> str:
    """Which of these engines runtimes take, and how much slower the others are, in a sentence."""
    first, *rest = sorted(timed, key=lambda engine: engine.milliseconds or 0)
    alike = len({engine.key.precision for engine in timed}) < len(timed)
    names = {e.name: e.name if alike else e.key.precision.value for e in timed}
    slower = ", ".join(
        f"{names[e.name]} {e.milliseconds:.2f} ms ({(first.milliseconds or 0) / (e.milliseconds or 1):.2f}x)"
        for e in rest
    )
    return f"{names[first.name]} {first.milliseconds:.2f} ms, {slower}: runtimes take {names[first.name]} here"


def flavour_here(device: int = 0) -> tuple[Flavour, DeviceProfile | None]:
    """What engines for this machine are compiled with when nothing is said (`compat.serving_flavour`), and its profile, which
    is None for a GPU that none describes."""
    host = compat.this_host(session.installed_versions(), device=device)
    flavour = compat.serving_flavour(host)
    if flavour == "openvino" or host.gpu is None:
        return flavour, load_profile("cpu")
    return flavour, profile_of(host.gpu, board=board_name())


def profile_here(flavour: Flavour, targets: Sequence[str] = (), device: int = 0) -> DeviceProfile | None:
    """The profile of the GPU ``device``, where engines of a flavour are for it; None for a GPU that none describes.

    Those of TensorRT-RTX are for it when ``targets`` name its architecture: others are compiled here for elsewhere.
    """
    if flavour not in ("tensorrt", "tensorrt_rtx"):
        return None
    gpu = compat.this_host({}, device=device).gpu
    if gpu is None or (flavour == "tensorrt_rtx" and gpu.architecture not in targets):
        return None
    return profile_of(gpu, board=board_name())


def _is_compiled(bundle: Bundle, graph: GraphRecord, flavour: Flavour, plan: PlanOptions, device: int) -> bool:
    """Whether the bundle holds an engine of this graph that runs here, whole and measured."""
    source = graph
    if flavour in ("tensorrt", "tensorrt_rtx") and _is_weak(graph, flavour, plan):
        source = bundle.manifest.onnx_graph(Precision.FP32) or graph
    host = _host(None if flavour == "openvino" else device)
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
    host = compat.this_host({}, device=device)
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


@child.apart(InferenceError)
def verify_bundle(
    path: str | Path,
    *,
    engine: str | None = None,
    device: int = 0,
    allow_host_code: bool = False,
    trusted: trust.Trusted | None = None,
    sigstore: trust.SigstoreIdentity | None = None,
    in_process: bool = False,
    progress: Progress = no_progress,
) -> tuple[ParityReport, ...]:
    """Check every file of a bundle, and measure again every engine that can run here (or just ``engine``).

    An engine that was compiled ahead of time is measured for the first time, and the report is added to the bundle: from
    then on runtimes take it. So is that of an engine whose stored report does not let it run, and which holds its gate. One
    that another process takes out meanwhile is left out. ``device``: the GPU for engines that need one.
    ``allow_host_code``: run programs (TorchScript, which ``engine`` has to name) and the code that a plan may carry.
    ``trusted`` and ``sigstore``: who must have signed, checked before anything runs, as in
    :func:`edge_backbones.trust.admit`; engines that it refuses are passed over, and ``progress`` gets why.

    All of it happens in a process of its own, whose death is an InferenceError that names the engine; with ``in_process`` in
    this one, for a debugger. Raises TrustError (a BundleError) for a bundle that is not signed as asked, BundleError for a
    damaged file, EngineMismatchError when no engine can run here, and when all are measured ParityError for those of which a
    feature map is outside the gate that the bundle was built with.
    """
    del in_process  # child.apart has read it
    progress("checking files", 0, None)
    bundle, _ = read_current(path, Bundle.check_files)
    bundle, refused = trust.admit(bundle, trusted, sigstore=sigstore)
    for name, reason in refused.items():
        progress(f"passing {name} over: it {reason}", 0, None)
    golden = load_golden(bundle)
    reports: list[ParityReport] = []
    advice: dict[int, str] = {}
    for record in _runnable(bundle, engine, device, code=allow_host_code):
        progress(f"verifying {record.key.precision}", 0, None)
        try:
            data = bundle.read(record.file)
        except IntegrityError:
            if record in Bundle.open(path).manifest.engines:
                raise
            continue  # taken out since
        on = None if record.key.gpu is None else device
        gate = promises.gate_of(bundle.manifest, record.key, record.parity.gate)
        _say_what_is_run(bundle, record)
        measured = _measured(bundle, record.key, data, golden, gate, on, code=allow_host_code)
        reports.append(measured)
        advice[id(measured)] = _advice_on_verifying(bundle, record)
        if not measured.passed:
            promises.forget(bundle.manifest, record, _host(on))
            continue
        promises.remember(bundle.manifest, record, _host(on))
        if promises.reasons_against(bundle.manifest, record):
            fresh = msgspec.structs.replace(record, parity=measured)
            if doubt := trust.vouch(bundle, fresh, instead_of=record):
                progress(doubt, 0, None)
            bundle = bundle.add_engine(fresh, {})
            bundle, told = _timed(bundle, on, code=allow_host_code, anew=True, progress=progress)
            for text in told:
                progress(text, 0, None)
    if reports:
        require(*reports, advice=lambda report: advice[id(report)])
    return tuple(reports)


def _say_what_is_run(bundle: Bundle, record: EngineRecord) -> None:
    way = f"take it out with edge-backbones remove {bundle.path} {record.name}, or compile it again"
    child.doing(f"was running {record.name}", f"the engine is hostile or damaged, {_LIBRARY}; {way}")


@child.apart(InferenceError)
def explain_bundle(
    path: str | Path,
    *,
    engine: str | None = None,
    device: int = 0,
    in_process: bool = False,
    progress: Progress = no_progress,
) -> tuple[Explanation, ...]:
    """For every engine that can run here (or just ``engine``) and is outside its gate: where its error is born.

    Needs the libraries of the workstation. Runs in a process of its own, as `verify_bundle` does. Raises BundleError for a
    damaged file or a graph that the bundle lacks, EngineMismatchError when no engine can run here, MissingDependencyError.
    """
    del in_process  # child.apart has read it
    try:
        from edge_backbones.build.explain import explain
    except ModuleNotFoundError as error:
        raise MissingDependencyError(f"explaining an error ({error.name} is not installed)", "build") from error
    bundle, _ = trust.admit(Bundle.open(path))
    bundle.check_files()
    golden, input = load_golden(bundle), bundle.manifest.input
    found = []
    for record in _runnable(bundle, engine, device, code=False):
        progress(f"verifying {record.key.precision}", 0, None)
        precision, gate = record.key.precision, promises.gate_of(bundle.manifest, record.key, record.parity.gate)
        _say_what_is_run(bundle, record)
        on = None if record.key.gpu is None else device
        report = _measured(bundle, record.key, bundle.read(record.file), golden, gate, on)
        if report.passed:
            continue
        if record.key.gpu is not None:
            raise BundleError(
                f"{record.name} is outside its gate ({report.failures()}); where the error is born is found for CPU engines "
                "only: compile this graph for the CPU and explain that engine"
            )
        graph = bundle.manifest.onnx_graph(precision)
        if graph is None:
            raise BundleError(f"{bundle.path} has no {precision} graph, and without it an error cannot be explained")
        fp32 = bundle.manifest.onnx_graph(Precision.FP32)
        plain = None if fp32 is None or precision is Precision.FP32 else bundle.path / fp32.file.path
        typed = bundle.path / graph.file.path
        child.doing(f"was explaining {record.name}", f"{typed} is hostile, {_LIBRARY}")
        found.append(explain(typed, report, golden, input.name, plain=plain, progress=progress))
    return tuple(found)


def _runnable(bundle: Bundle, engine: str | None, device: int, *, code: bool) -> list[EngineRecord]:
    """The engines that ``engine`` means and that can run here; raises EngineMismatchError when there is none."""
    on_gpu = any(record.key.gpu is not None for record in bundle.manifest.engines)
    host = _host(device if on_gpu else None)

    def reasons_against(record: EngineRecord) -> list[str]:
        return [*session.code_reasons(record, engine, code=code), *compat.reasons_against(record.key, host)]

    return session.fitting_engines(bundle, engine, reasons_against)
