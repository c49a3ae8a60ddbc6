"""Compile engines for this machine from the graphs of a finished bundle: numpy and the engine library are enough.

Graphs and engines go to libraries in C++ that nobody has given them to before: all of that happens in a process of its own.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from edge_backbones.bundle import trust
from edge_backbones.bundle.golden import GoldenSamples
from edge_backbones.bundle.manifest import EngineKey, EngineRecord, GraphRecord
from edge_backbones.bundle.reader import Bundle, load_golden
from edge_backbones.bundle.writer import record_bytes
from edge_backbones.deploy.parity import advice_on_building, measure_in_bundle, require
from edge_backbones.deploy.timing import engines_here, time_bundle
from edge_backbones.engines import promises, registry
from edge_backbones.engines import select as session
from edge_backbones.engines.base import ALLOW, CompiledEngine, CompileOptions, Flavour
from edge_backbones.engines.refusals import refusals
from edge_backbones.engines.tensorrt.options import PlanOptions
from edge_backbones.errors import (
    BundleError,
    CompileError,
    EdgeBackbonesError,
    EngineMismatchError,
    InferenceError,
    MissingDependencyError,
)
from edge_backbones.machine import child, hosts
from edge_backbones.machine.profiles import DeviceProfile, load_profile, profile_of
from edge_backbones.machine.system import board_name
from edge_backbones.parity_report import ParityError, ParityReport
from edge_backbones.progress import Progress, no_progress
from edge_backbones.spec import InputSpec, Precision

# Engines by their graphs: the CPU computes fp16, bf16 and fp8 in fp32 and keeps such weights.
_ENGINE_OVER_GRAPH = {
    Precision.FP32: 1.1, Precision.FP16: 2.1, Precision.BF16: 2.1, Precision.INT8: 1.4, Precision.FP8: 3.8,
}  # fmt: skip
_KERNELS = 1 << 20
_FORMS = {"onnx": "ONNX", "torchscript": "TorchScript"}


@dataclass(frozen=True)
class CompileResult:
    """What `compile_bundle` added to a bundle.

    ``engines``: the records of the added engines, as in the manifest. ``notes``: sentences for the user: which
    precisions were
    left out and why, what the engine library reported, which engine runtimes take.
    """

    engines: tuple[EngineRecord, ...]
    notes: tuple[str, ...]


@child.apart(CompileError)
def compile_bundle(
    path: str | Path,
    *,
    precisions: Sequence[Precision | str] | None = None,
    flavour: str = "openvino",
    plan: PlanOptions | None = None,
    profile: str | Path | None = None,
    gpu: int = 0,
    allow_host_code: bool = False,
    resume: bool = False,
    cache: Path | None = None,
    in_process: bool = False,
    progress: Progress = no_progress,
) -> CompileResult:
    """Add engines for this machine to a bundle, compiled from its graphs, each verified before it is added.

    Args:
        path: Folder of the bundle.
        precisions: Graphs to compile; None for every graph that the flavour compiles.
        flavour: Engine library. ``openvino`` for the CPU; ``tensorrt`` for the GPU ``gpu``; ``tensorrt_rtx`` for the
            architectures of ``plan.targets``, which needs no GPU: without one that fits, the engine is added unmeasured, and
            `verify_bundle` on the device has to measure it before a runtime takes it; ``torchscript`` for the frozen module
            of the bundle.
        plan: Options of TensorRT.
        profile: The device that the engines are for (:mod:`edge_backbones.machine.profiles`): what it cannot run is left out,
            and its workspace is the default.
        gpu: Index of the GPU to compile for and measure on.
        allow_host_code: A version-compatible plan may run the code that it carries; ``torchscript`` needs it, because that
            engine is a program, which is run to measure it.
        resume: Leave out what was compiled before for this machine, whatever its settings.
        cache: Folder of compiled CPU engines, None for none.
        in_process: Compile in this process, for a debugger. Otherwise all of it happens in a process of its own, whose death
            is reported as a CompileError that says what it was doing.
        progress: Gets every step, and every note at once.

    Every engine that this machine can run is timed afterwards, side by side: runtimes take the fastest, whatever its
    precision.

    If a precision fails, the bundle is unchanged for it. If none was asked for by name, the others go on, and a note of the
    result has its error; that error is raised when nothing was added and (with ``resume``) nothing was there.

    Raises:
        BundleError: The bundle is damaged or lacks the graph.
        CompileError: The library refused the graph, or its process died.
        ParityError: An engine is outside the gate that the bundle was built with.
        MissingDependencyError: The engine library is not installed.
        InputError: There is no such flavour, precision or profile.
    """
    del in_process  # child.apart has read it
    maker = registry.get(flavour)
    if maker.graph_format is not None and maker.is_program and not allow_host_code:
        raise CompileError(f"a {maker.title} engine is a program, which is measured by running it: {ALLOW}")
    bundle = Bundle.open(path)
    trust.admit(bundle)
    options = CompileOptions(gpu=gpu, plan=plan or PlanOptions(), cache=cache)
    work = _Work(bundle, maker, options, allow_host_code, progress, keeps_going=precisions is None)
    graphs = work.graphs_of(None if precisions is None else [Precision(precision) for precision in precisions])
    if resume:
        graphs = [graph for graph in graphs if not _is_compiled(bundle, graph, maker, options)]
    if profile is not None:
        graphs = work.fit_to_profile(graphs, load_profile(profile))
    if plan is not None and plan.embed_runtime and not allow_host_code:
        raise CompileError(f"a plan with its own runtime is measured by running it: {ALLOW}")
    graphs = work.passing(graphs, lambda graph: maker.check(graph, bundle.manifest.input, work.options))
    if graphs:  # minutes of work would be lost otherwise
        bundle.require_writable(room=0 if maker.graph_is_engine else sum(map(_size_on_disk, graphs)))
    golden = load_golden(bundle)
    work.passing(graphs, lambda graph: work.add(graph, golden))
    on = None if "cpu" in maker.devices else gpu
    bundle, told = time_bundle(work.bundle, on, code=allow_host_code, anew=bool(work.added), progress=progress)
    for text in told:
        work.note(text)
    if work.failed and not work.added and not (resume and engines_here(bundle, on, code=allow_host_code)):
        raise work.failed[0]
    return CompileResult(tuple(e for e in bundle.manifest.engines if e.name in work.added), tuple(work.notes))


class _Work:
    """One call of `compile_bundle`: the bundle as it grows, and what is to be reported at the end.

    ``keeps_going``: whether a graph that a step refuses is noted and left out, or its error raised.
    """

    def __init__(
        self,
        bundle: Bundle,
        maker: Flavour,
        options: CompileOptions,
        allow_host_code: bool,
        progress: Progress,
        *,
        keeps_going: bool,
    ) -> None:
        self.bundle, self.maker, self.options = bundle, maker, options
        self.allow_host_code, self.progress, self.keeps_going = allow_host_code, progress, keeps_going
        self.notes: list[str] = []
        self.failed: list[EdgeBackbonesError] = []
        self.added: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)
        self.progress(text, 0, None)

    def passing(self, graphs: Sequence[GraphRecord], step: Callable[[GraphRecord], None]) -> list[GraphRecord]:
        """Return the graphs that a step does not refuse; note why it refuses others, or raise that."""
        left = []
        for graph in graphs:
            try:
                step(graph)
            except (CompileError, ParityError, EngineMismatchError, InferenceError) as error:
                if not self.keeps_going:
                    raise
                self.failed.append(error)
                self.note(f"leaving {graph.precision} out: {error}")
            else:
                left.append(graph)
        return left

    def graphs_of(self, precisions: Sequence[Precision] | None) -> list[GraphRecord]:
        """Return the bundle's graphs of these precisions; raises BundleError, with the way to build them, if one is
        missing."""
        form = self.maker.graph_format
        if form is None:
            self.maker.compile(
                self.bundle, self.bundle.manifest.graphs[0], self.options, self.progress
            )  # says why it cannot
        held = [graph for graph in self.bundle.manifest.graphs if graph.format == form]
        graphs = [graph for graph in held if precisions is None or graph.precision in precisions]
        lacking = [precision for precision in precisions or () if precision not in {graph.precision for graph in held}]
        if lacking or not graphs:
            names = ", ".join(graph.precision.value for graph in held) or "none"
            asked = ", ".join(precision.value for precision in lacking) or "graph to compile"
            way = session.way_to_build(self.bundle, lacking if form == "onnx" else ())
            raise BundleError(f"{self.bundle.path} has no {asked}; its {_FORMS[str(form)]} graphs: {names}. {way}")
        return graphs

    def fit_to_profile(self, graphs: Sequence[GraphRecord], profile: DeviceProfile) -> list[GraphRecord]:
        """Leave out what a device cannot run, and take its defaults."""
        maker, plan = self.maker, self.options.plan or PlanOptions()
        compiles_for_its_own_gpu = maker.name == "tensorrt"
        if profile.architecture is not None and (compiles_for_its_own_gpu or maker.name not in profile.flavours):
            _refuse_elsewhere(self.bundle, profile, self.options.gpu)
        if plan.workspace is None:
            plan = dataclasses.replace(plan, workspace=profile.defaults.workspace_bytes)
        input = self.bundle.manifest.input
        graphs = self.passing(graphs, lambda graph: _refuse_for(profile, graph, maker.name, plan, input))
        if compiles_for_its_own_gpu and profile.architecture is not None:
            plan = dataclasses.replace(plan, targets=(profile.architecture,))
        self.options = dataclasses.replace(self.options, plan=plan)
        return list(graphs)

    def add(self, graph: GraphRecord, golden: GoldenSamples) -> None:
        """Compile one graph, measure the engine where it runs here, and add it to the bundle."""
        self.progress(f"compiling {graph.precision}", 0, None)
        hint = f"{self.bundle.path / graph.file.path} is hostile, {child.OR_A_FAULT}; another --precision may do"
        child.doing(f"was compiling {graph.precision} for {self.maker.name}", hint)
        engine = self.maker.compile(self.bundle, graph, self.options, self.progress)
        for text in engine.notes:
            self.note(text)
        gpu = None if engine.key.gpu is None else self.options.gpu
        report = ParityReport(
            precision=graph.precision, gate=promises.gate_of(self.bundle.manifest, engine.key), stages=()
        )
        if gpu is None or not registry.reasons_against(engine.key, registry.this_machine(gpu)):
            self.progress(f"verifying {graph.precision}", 0, None)
            child.doing(f"was running the {graph.precision} engine that it had compiled for {self.maker.name}", hint)
            report = measure_in_bundle(
                self.bundle, engine.key, engine.data, golden, report.gate, gpu, code=self.allow_host_code
            )
            require(report, advice=functools.partial(_advice_on_compiling, self.bundle, engine.key))
        record, contents = _engine_record(engine, report, graph, graph_is_engine=self.maker.graph_is_engine)
        if doubt := trust.vouch(self.bundle, record):
            self.note(doubt)
        self.bundle = self.bundle.add_engine(record, contents)
        if report.measured:
            promises.remember(self.bundle.manifest, record, registry.this_machine(gpu))
        self.added.append(record.name)


def _advice_on_compiling(bundle: Bundle, key: EngineKey, report: ParityReport) -> str:
    """Return what helps where a graph held its gate when it was built, and the engine that this machine made of it does
    not."""
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


def _size_on_disk(graph: GraphRecord) -> int:
    """Return about how many bytes the engine of a graph takes."""
    return int(_ENGINE_OVER_GRAPH[graph.precision] * graph.file.size) + _KERNELS


def flavour_here(gpu: int = 0) -> tuple[str, DeviceProfile | None]:
    """Return the flavour that engines for this machine are compiled with when none is named, and this machine's profile.

    The profile is None for a GPU that none describes.
    """
    host = registry.this_machine(gpu)
    flavour = registry.serving(host)
    if "cpu" in flavour.devices or host.gpu is None:
        return flavour.name, load_profile("cpu")
    return flavour.name, profile_of(host.gpu, board=board_name())


def compile_here(
    path: str | Path,
    engine: str | None,
    *,
    gpu: int | None,
    allow_host_code: bool,
    in_process: bool = False,
    progress: Progress = no_progress,
) -> None:
    """Add what ``engine`` (a precision or a flavour; None for every graph) means to a bundle, for the CPU or a GPU.

    For a GPU that is the flavour of `registry.serving`, as for `edge-backbones compile`. Raises as `compile_bundle` does.
    """
    host = registry.this_machine(gpu)
    flavour = engine if engine not in (None, *Precision) else None
    if flavour is None:
        flavour = registry.serving(host).name
        if gpu is not None and "cpu" in registry.get(flavour).devices:  # nothing here compiles for its GPU
            flavour = "tensorrt"  # its refusal says why
    plan = registry.get(flavour).default_options(host).plan
    profile = None
    with contextlib.suppress(MissingDependencyError):  # Python 3.10 reads profiles with the cli extra alone
        profile = profile_here(flavour, () if plan is None else plan.targets, gpu or 0)
    compile_bundle(
        path,
        precisions=(Precision(engine),) if engine in set(Precision) else None,
        plan=plan,
        flavour=flavour,
        profile=None if profile is None else profile.name,
        gpu=gpu or 0,
        allow_host_code=allow_host_code,
        in_process=in_process,
        progress=progress,
    )


def profile_here(flavour: str, targets: Sequence[str] = (), gpu: int = 0) -> DeviceProfile | None:
    """Return the profile of a GPU of this machine, where engines of a flavour are for it; None for a GPU that none describes.

    Engines of TensorRT-RTX are for it when ``targets`` name its architecture: others are compiled here for elsewhere.
    """
    maker = registry.get(flavour)
    if maker.devices != ("cuda",) or maker.graph_format is None:
        return None
    found = hosts.this_host({}, gpu=gpu).gpu
    if found is None or (flavour == "tensorrt_rtx" and found.architecture not in targets):
        return None
    return profile_of(found, board=board_name())


def _is_compiled(bundle: Bundle, graph: GraphRecord, maker: Flavour, options: CompileOptions) -> bool:
    """Return whether the bundle holds an engine of this graph that runs here, whole and measured."""
    source = maker.source_graph(bundle, graph, options)
    host = registry.this_machine(None if "cpu" in maker.devices else options.gpu)
    for engine in trust.known_engines(bundle):
        key = engine.key
        if (key.flavour, key.precision, key.graph_sha256) != (maker.name, graph.precision, source.file.sha256):
            continue
        if not promises.reasons_against(bundle.manifest, engine) and not registry.reasons_against(key, host):
            with contextlib.suppress(BundleError):
                bundle.read(engine.file)
                return True
    return False


def _refuse_elsewhere(bundle: Bundle, profile: DeviceProfile, gpu: int) -> None:
    """Raise CompileError for a GPU that is not here: TensorRT compiles on the GPU that will run the engine."""
    host = hosts.this_host({}, gpu=gpu)
    if host.gpu is not None and host.gpu.architecture == profile.architecture:
        return
    here = f"has {host.gpu.name}, {host.gpu.architecture}" if host.gpu is not None else f"has none ({host.no_gpu})"
    rtx = f"--flavour tensorrt_rtx --target {profile.architecture} --profile {profile.name}"
    raise CompileError(
        f"engines for {profile.name} are compiled on its own GPU, {profile.architecture}, and this machine {here}: copy "
        f"{bundle.path} to the device and run there: edge-backbones compile {bundle.path.name}"
        + (f". For TensorRT-RTX it can be compiled here: {rtx}" if "tensorrt_rtx" in profile.flavours else "")
    )


def _refuse_for(profile: DeviceProfile, graph: GraphRecord, flavour: str, plan: PlanOptions, input: InputSpec) -> None:
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


def _engine_record(
    engine: CompiledEngine, report: ParityReport, graph: GraphRecord, *, graph_is_engine: bool
) -> tuple[EngineRecord, dict[str, bytes]]:
    """Return the record of an engine, and the bytes of its files by path."""
    if graph_is_engine:
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
