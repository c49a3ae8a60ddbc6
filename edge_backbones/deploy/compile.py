"""Compile engines for this machine from the graphs of a finished bundle. It needs numpy and the engine library alone.

Graphs and engines go to C++ libraries that may crash on them, so all of it happens in a child process.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import msgspec

from edge_backbones.bundle import trust
from edge_backbones.bundle.golden import GoldenSamples
from edge_backbones.bundle.manifest import EngineKey, EngineRecord, GraphRecord
from edge_backbones.bundle.reader import Bundle, load_golden
from edge_backbones.bundle.writer import record_bytes
from edge_backbones.deploy.parity import advice_on_building, measure_in_bundle, require
from edge_backbones.deploy.timing import engines_here, time_bundle, time_engines
from edge_backbones.engines import promises, registry, select
from edge_backbones.engines.base import ALLOW, CompiledEngine, CompileOptions, Flavour
from edge_backbones.engines.refusals import refusals
from edge_backbones.engines.tensorrt.options import PlanOptions
from edge_backbones.errors import (
    BundleError,
    CompileError,
    EdgeBackbonesError,
    EngineMismatchError,
    InferenceError,
    InputError,
    MissingDependencyError,
)
from edge_backbones.machine import child, hosts
from edge_backbones.machine.profiles import DeviceProfile, load_profile, profile_of
from edge_backbones.machine.system import board_name
from edge_backbones.parity_report import ParityError, ParityReport
from edge_backbones.progress import Progress, no_progress
from edge_backbones.spec import InputSpec, Precision, precisions_of

# Size of an engine divided by the size of its graph. Engines for the CPU store the weights of fp16, bf16 and fp8 in fp32.
_ENGINE_OVER_GRAPH = {
    Precision.FP32: 1.1, Precision.FP16: 2.1, Precision.BF16: 2.1, Precision.INT8: 1.4, Precision.FP8: 3.8,
}  # fmt: skip
_KERNEL_BYTES = 1 << 20
_REFUSALS = (CompileError, ParityError, EngineMismatchError, InferenceError)
_FORMS = {"onnx": "ONNX", "torchscript": "TorchScript"}


@dataclass(frozen=True)
class CompileResult:
    """Hold what `compile_bundle` added to a bundle.

    Attributes:
        engines: Records of the added engines, as in the manifest.
        notes: Sentences for the user: which precisions were left out and why, what the engine library reported, which
            engine runtimes choose.
    """

    engines: tuple[EngineRecord, ...]
    notes: tuple[str, ...]


@child.apart(CompileError)
def compile_bundle(
    path: str | Path,
    *,
    precisions: Sequence[Precision | str] | None = None,
    flavour: str = "openvino",
    rivals: Sequence[str] = (),
    plan: PlanOptions | None = None,
    profile: str | Path | None = None,
    gpu: int = 0,
    allow_host_code: bool = False,
    resume: bool = False,
    cache: Path | None = None,
    in_process: bool = False,
    progress: Progress = no_progress,
) -> CompileResult:
    """Compile engines for this machine from a bundle's graphs, and add those that hold their accuracy gate.

    Every engine that this machine can run is timed afterwards, side by side. Runtimes choose the fastest, whatever its
    precision.

    If a precision fails, nothing is added for it. If the caller named no precisions, the others go on, and a note of
    the result holds its error. That error is raised if nothing was added and (with ``resume``) the bundle had no engine
    for this machine before.

    Args:
        path: Folder of the bundle.
        precisions: Precisions whose graphs are compiled; None for every graph that the flavour compiles.
        flavour: Engine library. ``openvino`` compiles for the CPU, ``tensorrt`` for the GPU of index ``gpu``.
            ``tensorrt_rtx`` compiles for the architectures in ``plan.targets`` and needs no GPU: if none here fits, the
            engine is added unmeasured, and runtimes choose it only after `verify_bundle` has measured it on the device.
            ``torchscript`` takes the bundle's frozen module.
        rivals: Libraries whose engines are compiled too, because nobody knows which library is the fastest here
            (`Flavour.rivals`). The graphs that one of them refuses are left out, with a note. One that is not installed
            is left out, and a note says how to install it.
        plan: Options of TensorRT.
        profile: Device that the engines are for (:mod:`edge_backbones.machine.profiles`). What the device cannot run is
            left out, and its workspace is the default.
        gpu: Index of the GPU to compile and measure on.
        allow_host_code: Run engines that are programs: ``torchscript``, and the runtime that a version-compatible plan
            may carry. Compiling them needs this, because they are measured by running them.
        resume: Leave out graphs that already have an engine for this machine, whatever its settings.
        cache: Folder of compiled CPU engines; None for no cache.
        in_process: Compile in this process, for a debugger. By default a child process does all of it, and if it dies,
            the CompileError says what it was doing.
        progress: Gets every step, and every note as soon as it is known.

    Returns:
        The records of the added engines, and notes for the user.

    Raises:
        BundleError: The bundle is damaged or lacks a graph.
        CompileError: The library refused the graph, or the child process died.
        ParityError: An engine is outside the gate that the bundle was built with.
        MissingDependencyError: The engine library is not installed.
        InputError: There is no such flavour, precision or profile.
    """
    del in_process  # the decorator child.apart has read it
    makers = [registry.get(name) for name in (flavour, *rivals)]
    for maker in makers:
        _refuse_maker(maker, plan, allow_host_code=allow_host_code)
    bundle = Bundle.open(path)
    trust.admit(bundle)
    options = CompileOptions(gpu=gpu, plan=plan or PlanOptions(), cache=cache)
    noted = (*_REFUSALS, MissingDependencyError) if rivals else _REFUSALS if precisions is None else ()
    work = _Work(bundle, options, allow_host_code, progress, noted)
    described = None if profile is None else load_profile(profile)
    jobs: list[_Job] = []
    for maker in _installed(makers, work.note):
        found = work.jobs_of(maker, None if precisions is None else precisions_of(precisions))
        if resume:
            found = [job for job in found if not _is_compiled(bundle, job.graph, maker, options)]
        jobs += found if described is None else work.fit_to_profile(maker, found, described)
    if plan is not None and plan.embed_runtime and not allow_host_code:
        raise CompileError(
            f"a plan with its own runtime is measured by running it: if you trust the bundle, pass {ALLOW}"
        )
    jobs = work.passing(jobs, lambda job: job.maker.check(job.graph, bundle.manifest.input, work.options))
    if jobs:  # otherwise minutes of compiling would be lost at the end
        bundle.require_writable(room=sum(_size_on_disk(job.graph) for job in jobs if not job.maker.graph_is_engine))
    golden = load_golden(bundle)
    work.passing(jobs, lambda job: work.add(job, golden))
    on = None if "cpu" in makers[0].devices else gpu
    bundle, notes = time_bundle(work.bundle, on, code=allow_host_code, anew=bool(work.added), progress=progress)
    for text in notes:
        work.note(text)
    added = tuple(engine for engine in bundle.manifest.engines if engine.name in work.added)
    there = [*added, *(engines_here(bundle, on, code=allow_host_code) if resume else ())]
    lost = [error for job, error in work.failed if job.graph.precision not in {e.key.precision for e in there}]
    if lost and (precisions is not None or not there):
        raise lost[0]
    return CompileResult(added, tuple(work.notes))


def _refuse_maker(maker: Flavour, plan: PlanOptions | None, *, allow_host_code: bool) -> None:
    """Raise an error for a library that compiles no graph, or not with these options."""
    if maker.refusal:
        raise CompileError(maker.refusal)
    if maker.is_program and not allow_host_code:
        raise CompileError(
            f"a {maker.title} engine is a program, which is measured by running it: if you trust the bundle, pass {ALLOW}"
        )
    if plan is not None and not maker.takes_plan_options and (changed := plan.changed()):
        raise InputError(
            f"{' and '.join(changed)}: {maker.title} has no such option: leave it out, or compile with TensorRT "
            "(flavour tensorrt)"
        )


def _installed(makers: Sequence[Flavour], note: Callable[[str], None]) -> Sequence[Flavour]:
    """Return the libraries that are installed, and note how to install the others; the first library if none is."""
    here = [maker for maker in makers if maker.version() is not None] or makers[:1]
    for maker in makers:
        if maker not in here:
            way = maker.install(registry.this_machine(None))
            note(f"{maker.title} may be faster on this CPU, and is not installed: {way}, then compile again")
    return here


class _Job(NamedTuple):
    """Hold a graph, and the library that is to compile it."""

    maker: Flavour
    graph: GraphRecord


class _Work:
    """Hold the state of one call of `compile_bundle`: the bundle as it grows, and what is reported at the end.

    ``noted``: errors after which a job is left out, with a note. All others are raised.
    """

    def __init__(
        self,
        bundle: Bundle,
        options: CompileOptions,
        allow_host_code: bool,
        progress: Progress,
        noted: tuple[type[EdgeBackbonesError], ...],
    ) -> None:
        self.bundle, self.options, self.noted = bundle, options, noted
        self.allow_host_code, self.progress = allow_host_code, progress
        self.notes: list[str] = []
        self.failed: list[tuple[_Job, EdgeBackbonesError]] = []
        self.added: list[str] = []

    def note(self, text: str) -> None:
        """Add a sentence to the result, and show it at once."""
        self.notes.append(text)
        self.progress(text, 0, None)

    def passing(self, jobs: Sequence[_Job], step: Callable[[_Job], None]) -> list[_Job]:
        """Return the jobs that ``step`` accepts.

        If it refuses one, note its error or raise it, as ``noted`` says.
        """
        left = []
        compares = len({job.maker.name for job in jobs}) > 1
        for job in jobs:
            try:
                step(job)
            except self.noted as error:
                self.failed.append((job, error))
                library = f" for {job.maker.title}" if compares else ""
                self.note(f"leaving {job.graph.precision} out{library}: {error}")
            else:
                left.append(job)
        return left

    def jobs_of(self, maker: Flavour, precisions: Sequence[Precision] | None) -> list[_Job]:
        """Return jobs for the bundle's graphs of these precisions; None for all that the flavour compiles.

        Raises BundleError, with the command that builds them, if one is missing.
        """
        form = maker.graph_format
        held = [graph for graph in self.bundle.manifest.graphs if graph.format == form]
        graphs = [graph for graph in held if precisions is None or graph.precision in precisions]
        lacking = [precision for precision in precisions or () if precision not in {graph.precision for graph in held}]
        if lacking or not graphs:
            names = ", ".join(graph.precision.value for graph in held) or "none"
            asked = ", ".join(precision.value for precision in lacking) or "graph to compile"
            way = select.way_to_build(self.bundle, lacking if form == "onnx" else ())
            if not self.bundle.manifest.graphs:
                way = "Compile in the bundle that it was packed of, or pack that one again with --graphs"
            raise BundleError(
                f"{self.bundle.path} has no {asked}; its {_FORMS.get(str(form), 'other')} graphs: {names}. {way}"
            )
        return [_Job(maker, graph) for graph in graphs]

    def fit_to_profile(self, maker: Flavour, jobs: Sequence[_Job], profile: DeviceProfile) -> list[_Job]:
        """Return the jobs whose engines a device can run, and take the device's default options."""
        plan = self.options.plan or PlanOptions()
        if profile.architecture is not None and (maker.needs_own_gpu or maker.name not in profile.flavours):
            _refuse_elsewhere(self.bundle, profile, self.options.gpu)
        if plan.workspace is None:
            plan = dataclasses.replace(plan, workspace=profile.defaults.workspace_bytes)
        input = self.bundle.manifest.input
        left = self.passing(jobs, lambda job: _refuse_for(profile, job.graph, maker.name, plan, input))
        if maker.needs_own_gpu and profile.architecture is not None:
            plan = dataclasses.replace(plan, targets=(profile.architecture,))
        self.options = dataclasses.replace(self.options, plan=plan)
        return left

    def add(self, job: _Job, golden: GoldenSamples) -> None:
        """Compile one graph, measure the engine if it runs here, and add it to the bundle.

        Where the library has several ways to compute what is not int8, the fastest engine that holds its gate is added.
        """
        graph = job.graph
        found = [self._measured(job, golden)]
        for rest in job.maker.rests(graph.precision, self.bundle.manifest.input):
            with contextlib.suppress(*_REFUSALS):
                found.append(self._measured(job, golden, rest))
        engine, report = self._fastest(found)
        record, contents = _engine_record(engine, report, graph)
        if doubt := trust.vouch(self.bundle, record):
            self.note(doubt)
        self.bundle = self.bundle.add_engine(record, contents)
        held = {other.name for other in self.bundle.manifest.engines}
        for slower in {other.key.name for other, _ in found} & held - {record.name}:  # an earlier compile's choice
            self.bundle = self.bundle.remove_engine(slower)
        if report.measured:
            gpu = None if engine.key.gpu is None else self.options.gpu
            promises.remember(self.bundle.manifest, record, registry.this_machine(gpu))
        self.added.append(record.name)

    def _measured(
        self, job: _Job, golden: GoldenSamples, rest: Precision | None = None
    ) -> tuple[CompiledEngine, ParityReport]:
        """Compile a graph, and return the engine and its parity, which is empty if this machine cannot run the engine.

        ``rest``: as in `CompileOptions`. Raises ParityError if the engine is outside its gate.
        """
        maker, graph = job
        what = f"{graph.precision}{'' if rest is None else f' with a {rest} rest'}"
        self.progress(f"compiling {what}", 0, None)
        hint = f"{self.bundle.path / graph.file.path} is hostile, {child.OR_A_FAULT}; another --precision may do"
        child.doing(f"was compiling {what} for {maker.name}", hint)
        engine = maker.compile(self.bundle, graph, dataclasses.replace(self.options, rest=rest), self.progress)
        for text in engine.notes:
            self.note(text)
        gpu = None if engine.key.gpu is None else self.options.gpu
        report = ParityReport(
            precision=graph.precision, gate=promises.gate_of(self.bundle.manifest, engine.key), stages=()
        )
        if gpu is None or not registry.reasons_against(engine.key, registry.this_machine(gpu)):
            self.progress(f"verifying {what}", 0, None)
            child.doing(f"was running the {what} engine that it had compiled for {maker.name}", hint)
            report = measure_in_bundle(
                self.bundle, engine.key, engine.data, golden, report.gate, gpu, code=self.allow_host_code
            )
            require(report, advice=functools.partial(_advice_on_compiling, self.bundle, engine.key))
        return engine, report

    def _fastest(self, found: Sequence[tuple[CompiledEngine, ParityReport]]) -> tuple[CompiledEngine, ParityReport]:
        """Return the engine that takes the least time here, timed side by side, and its parity."""
        if len(found) == 1:
            return found[0]
        manifest = self.bundle.manifest
        engines = [
            functools.partial(select.load_engine, engine.key, bytearray(engine.data), manifest.backbone, manifest.input)
            for engine, _ in found
        ]
        times = time_engines(engines, manifest.input, progress=self.progress)
        return min(zip(found, times, strict=True), key=lambda one: one[1].call)[0]


def _advice_on_compiling(bundle: Bundle, key: EngineKey, report: ParityReport) -> str:
    """Return advice for an engine outside its gate whose graph was inside when the bundle was built."""
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
    """Return roughly how many bytes the engine of a graph takes on disk."""
    return int(_ENGINE_OVER_GRAPH[graph.precision] * graph.file.size) + _KERNEL_BYTES


def flavour_here(gpu: int = 0) -> tuple[str, DeviceProfile | None]:
    """Return the flavour that compiles for this machine by default, and this machine's profile.

    The profile is None if no profile describes the GPU.
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
    """Compile the engines that ``engine`` asks for, and add them to a bundle.

    The flavour is the one of `registry.serving`, with its rivals, as for ``edge-backbones compile``. Raises what
    `compile_bundle` raises.

    Args:
        path: Folder of the bundle.
        engine: A precision, a flavour, or None for every graph.
        gpu: Index of the GPU, None for the CPU.
        allow_host_code: As for `compile_bundle`.
        in_process: As for `compile_bundle`.
        progress: As for `compile_bundle`.
    """
    host = registry.this_machine(gpu)
    flavour = engine if engine not in (None, *Precision) else None
    if flavour is None:
        flavour = registry.serving(host).name
        if gpu is not None and "cpu" in registry.get(flavour).devices:
            flavour = "tensorrt"  # no library here compiles for the GPU, and the error of TensorRT says why
    maker = registry.get(flavour)
    rivals = () if flavour == engine else maker.rivals(host)
    targets = (host.gpu.architecture,) if maker.takes_targets and host.gpu is not None else ()
    profile = None
    with contextlib.suppress(MissingDependencyError):  # Python 3.10 reads profiles only with the cli extra
        profile = profile_here(flavour, targets, gpu or 0)
    compile_bundle(
        path,
        precisions=(Precision(engine),) if engine in set(Precision) else None,
        plan=PlanOptions(targets=targets),
        flavour=flavour,
        rivals=rivals,
        profile=None if profile is None else profile.name,
        gpu=gpu or 0,
        allow_host_code=allow_host_code,
        in_process=in_process,
        progress=progress,
    )


def profile_here(flavour: str, targets: Sequence[str] = (), gpu: int = 0) -> DeviceProfile | None:
    """Return the profile of this machine's GPU if engines of a flavour would be for it; None otherwise.

    It is also None if no profile describes the GPU. Engines of TensorRT-RTX are for this GPU only if ``targets`` names
    its architecture; otherwise they are compiled here for another machine.
    """
    maker = registry.get(flavour)
    if maker.devices != ("cuda",) or maker.graph_format is None:
        return None
    found = hosts.this_host({}, gpu=gpu).gpu
    if found is None or (maker.takes_targets and found.architecture not in targets):
        return None
    return profile_of(found, board=board_name())


def _is_compiled(bundle: Bundle, graph: GraphRecord, maker: Flavour, options: CompileOptions) -> bool:
    """Return whether the bundle already holds a measured, undamaged engine of this graph that runs here."""
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
    """Raise CompileError if the profile's GPU is not in this machine.

    TensorRT compiles on the GPU that will run the engine.
    """
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
    """Raise CompileError, before any compilation, for a graph that the device cannot run."""
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
    engine: CompiledEngine, report: ParityReport, graph: GraphRecord
) -> tuple[EngineRecord, dict[str, bytes]]:
    """Return the manifest record of an engine, and the contents of its new files by path.

    An engine that is the graph itself needs no file of its own.
    """
    if hashlib.sha256(engine.data).hexdigest() == graph.file.sha256:
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
