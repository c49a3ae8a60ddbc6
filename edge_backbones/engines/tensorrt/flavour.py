"""Describe TensorRT, TensorRT-RTX and TensorRT's lean runtime, whose engines are plans for NVIDIA GPUs."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Mapping, Sequence

from edge_backbones.bundle import trust
from edge_backbones.bundle.manifest import EngineKey, GraphRecord, decode_calibration
from edge_backbones.bundle.reader import Bundle
from edge_backbones.engines.base import CompiledEngine, CompileOptions, EngineSession, Flavour, LoadOptions
from edge_backbones.engines.refusals import against_rtx_targets
from edge_backbones.engines.tensorrt import compile as compiler
from edge_backbones.engines.tensorrt import library, plans, requests
from edge_backbones.engines.tensorrt.compile import GraphBytes
from edge_backbones.engines.tensorrt.options import PlanOptions
from edge_backbones.engines.tensorrt.requests import PlanFlavour
from edge_backbones.errors import BundleError, CompileError, EngineMismatchError
from edge_backbones.machine import hosts
from edge_backbones.machine.hosts import Host
from edge_backbones.machine.profiles import RTX_ARCHITECTURES, DeviceProfile
from edge_backbones.progress import Progress, no_progress
from edge_backbones.spec import BackboneSpec, InputSpec, Precision


class TensorRt(Flavour):
    """Compile and run plans with TensorRT or TensorRT-RTX, which share one API; ``name`` says which."""

    devices, takes_plan_options = ("cuda",), True

    def __init__(self, name: PlanFlavour, title: str, extra: str) -> None:
        self.name, self.title, self.extra, self.package = name, title, extra, name.replace("_", "-")
        self.has_dla = self.needs_own_gpu = name == "tensorrt"
        self.takes_targets = not self.needs_own_gpu
        self._name: PlanFlavour = name

    def version(self) -> str | None:
        return library.library_version(self._name)

    def install(self, host: Host) -> str:
        return library.FROM_JETPACK if host.jetson and self.name == "tensorrt" else super().install(host)

    def reasons_against(self, key: EngineKey, host: Host) -> list[str]:
        return plans.reasons_against(self, key, host)

    def load(
        self, key: EngineKey, data: bytearray, spec: BackboneSpec, input: InputSpec, options: LoadOptions
    ) -> EngineSession:
        wrong = plans.reasons_in_plan(key, data)
        if wrong:
            raise EngineMismatchError(f"{key.name}: {' and '.join(wrong)}")
        from edge_backbones.engines.registry import this_machine  # imported here, because registry imports this module
        from edge_backbones.engines.tensorrt.session import TensorRtSession

        return TensorRtSession(
            data,
            flavour=plans.library_to_load(key, this_machine(None)),
            input=input,
            outputs=spec.outputs,
            gpu=options.gpu or 0,
            memory=options.memory,
            allow_host_code=options.allow_host_code,
            dla_core=None if key.gpu is None else key.gpu.dla_core,
            weights=options.weights,
            spec=spec,
        )

    def check(self, graph: GraphRecord, input: InputSpec, options: CompileOptions) -> None:
        plan = options.plan or PlanOptions()
        weak = self._is_weak(graph, plan)
        requests.resolve_request(input, graph.precision, self._name, plan, options.gpu, weak=weak)

    def source_graph(self, bundle: Bundle, graph: GraphRecord, options: CompileOptions) -> GraphRecord:
        if self._is_weak(graph, options.plan or PlanOptions()):
            return bundle.manifest.onnx_graph(Precision.FP32) or graph
        return graph

    def compile(
        self, bundle: Bundle, graph: GraphRecord, options: CompileOptions, progress: Progress
    ) -> CompiledEngine:
        options_of_plan = options.plan or PlanOptions()
        weak = self._is_weak(graph, options_of_plan)
        source, ranges = _fp32_graph_and_ranges(bundle, graph.precision) if weak else (graph, None)
        if self.name == "tensorrt" and options_of_plan.timing_cache is None:
            options_of_plan = dataclasses.replace(options_of_plan, timing_cache=_latest_timing_cache(bundle))
        engine = compile_engine(
            functools.partial(bundle.read, source.file),
            source.file.sha256,
            bundle.manifest.input,
            graph.precision,
            flavour=self._name,
            options=options_of_plan,
            gpu=options.gpu,
            weak=weak,
            ranges=ranges,
            progress=progress,
        )
        if not self.takes_targets or options_of_plan.targets or engine.key.gpu is None:
            return engine
        chosen = ", ".join(engine.key.gpu.architectures)
        return dataclasses.replace(
            engine,
            notes=(*engine.notes, f"compiled for {chosen}: no target was given (--target, as in --target sm_89)"),
        )

    def profiler(self, file: str) -> str:
        return f"trtexec --loadEngine={file} --dumpProfile --separateProfileRun" if self.name == "tensorrt" else ""

    def serves(self, host: Host) -> bool:
        version = host.versions.get(self.name) if host.gpu is not None else None
        return version is not None and not library.against_release(self._name, version, jetson=host.jetson)

    def _is_weak(self, graph: GraphRecord, plan: PlanOptions) -> bool:
        """Return whether a plan is compiled from the fp32 graph, with number formats that TensorRT chooses.

        DLA of older releases needs this: it takes no Q/DQ pairs, and runs fp16 where the builder has the FP16 flag.
        """
        is_for_dla = plan.dla_core is not None and graph.precision in (Precision.FP16, Precision.INT8)
        return is_for_dla and requests.has_weak_typing(self._name)


class TensorRtRtx(TensorRt):
    """Compile plans with TensorRT-RTX. It needs no GPU, and serves no Jetson and no datacenter GPU."""

    def serves(self, host: Host) -> bool:
        return host.gpu is not None and host.gpu.architecture in RTX_ARCHITECTURES and super().serves(host)

    def against_profile(self, profile: DeviceProfile, instead: str) -> str:
        if self.name not in profile.flavours and profile.architecture is not None:
            return (
                f"TensorRT-RTX compiles for {', '.join(RTX_ARCHITECTURES)} and {profile.name} is {profile.architecture}: "
                f"use flavour {instead}"
            )
        return super().against_profile(profile, instead)

    def against_targets(self, profile: DeviceProfile, precision: Precision, targets: Sequence[str]) -> list[str]:
        return against_rtx_targets(profile, precision, targets)


class TensorRtLean(Flavour):
    """Run version-compatible plans with TensorRT's lean runtime, which cannot compile."""

    name, title, extra, package = "tensorrt_lean", "TensorRT's lean runtime", "tensorrt", "tensorrt-lean"
    devices, graph_format, only_runs = ("cuda",), None, True
    refusal = "tensorrt_lean runs plans and compiles none: compile with flavour tensorrt and version_compatible=True"

    def version(self) -> str | None:
        return library.library_version("tensorrt_lean")

    def reasons_against(self, key: EngineKey, host: Host) -> list[str]:
        return plans.reasons_against(self, key, host)

    def load(
        self, key: EngineKey, data: bytearray, spec: BackboneSpec, input: InputSpec, options: LoadOptions
    ) -> EngineSession:
        return TENSORRT.load(key, data, spec, input, options)

    def compile(
        self, bundle: Bundle, graph: GraphRecord, options: CompileOptions, progress: Progress
    ) -> CompiledEngine:
        raise CompileError(self.refusal)

    def against_profile(self, profile: DeviceProfile, instead: str) -> str:
        return self.refusal


def compile_engine(
    graph: GraphBytes,
    graph_sha256: str,
    input: InputSpec,
    precision: Precision,
    *,
    flavour: PlanFlavour,
    options: PlanOptions,
    gpu: int = 0,
    weak: bool = False,
    ranges: Mapping[str, float] | None = None,
    progress: Progress = no_progress,
) -> CompiledEngine:
    """Compile ONNX bytes, whose hash is ``graph_sha256``, to an engine: a plan and its key.

    The other parameters are those of :func:`edge_backbones.engines.tensorrt.compile.compile_plan`, which also says what
    it raises.
    """
    plan = compiler.compile_plan(
        graph, input, precision, flavour=flavour, options=options, gpu=gpu, weak=weak, ranges=ranges, progress=progress
    )
    key = EngineKey(
        flavour=flavour,
        library_version=plan.library_version,
        architecture=hosts.this_host({}).architecture,
        cpu_features=(),
        device_name=plan.device_name,
        precision=precision,
        graph_sha256=graph_sha256,
        gpu=plan.gpu,
    )
    notes = (f"memory that the compilation needed: {plan.memory}", *plan.warnings)
    return CompiledEngine(
        plan.data, key, ".plan", from_cache=False, layers=plan.layers, timing_cache=plan.timing_cache, notes=notes
    )


def _fp32_graph_and_ranges(bundle: Bundle, precision: Precision) -> tuple[GraphRecord, Mapping[str, float] | None]:
    """Return the record of the fp32 graph, and for int8 the calibrated ranges. Raises CompileError if one is missing."""
    plain = bundle.manifest.onnx_graph(Precision.FP32)
    if plain is None:
        raise CompileError(
            f"{precision} on this DLA is compiled from the fp32 graph, and {bundle.path} has none: build it with --precision "
            f"{precision} --precision fp32"
        )
    if precision is not Precision.INT8:
        return plain, None
    record = bundle.manifest.calibration
    if record is None:
        raise CompileError(
            f"int8 on this DLA is compiled with calibrated ranges, and {bundle.path} has no calibration: build it with "
            "--precision int8 --precision fp32"
        )
    found = decode_calibration(bundle.read(record.file), str(bundle.path / record.file.path))
    if found.factors:
        raise CompileError(
            "the ranges of this bundle are of an equalised graph, which DLA cannot run: build it with --method max"
        )
    return plain, found.ranges


def _latest_timing_cache(bundle: Bundle) -> bytes | None:
    """Return the kernel times of the latest compilation; None if the bundle has none.

    TensorRT ignores those of another GPU.
    """
    for engine in reversed(trust.known_engines(bundle)):
        if engine.timing_cache is not None:
            with contextlib.suppress(BundleError):  # damaged or removed with its engine; it only saves time
                return bytes(bundle.read(engine.timing_cache))
    return None


TENSORRT = TensorRt("tensorrt", "TensorRT", "tensorrt")
TENSORRT_RTX = TensorRtRtx("tensorrt_rtx", "TensorRT-RTX", "rtx")
TENSORRT_LEAN = TensorRtLean()
