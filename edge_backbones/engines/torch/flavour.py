"""Describe the engines that torch runs: TorchScript files, and programs that torch-tensorrt compiled. Both are code."""

from __future__ import annotations

import hashlib

from edge_backbones.bundle.manifest import EngineKey, GpuKey, GraphRecord
from edge_backbones.bundle.reader import Bundle
from edge_backbones.engines import compat
from edge_backbones.engines.base import ALLOW, CompiledEngine, CompileOptions, EngineSession, Flavour, LoadOptions
from edge_backbones.engines.torch import session
from edge_backbones.errors import CompileError, EngineMismatchError, MissingDependencyError
from edge_backbones.machine import hosts
from edge_backbones.machine.gpus import Gpu
from edge_backbones.machine.hosts import Host
from edge_backbones.progress import Progress
from edge_backbones.spec import BackboneSpec, InputSpec, Precision


class _Program(Flavour):
    """Load an engine that is a program, if the caller allows it."""

    is_program = True

    def load(
        self, key: EngineKey, data: bytearray, spec: BackboneSpec, input: InputSpec, options: LoadOptions
    ) -> EngineSession:
        if not options.allow_host_code:
            raise EngineMismatchError(f"{key.name} is a program, and it is run only with {ALLOW}")
        place = "cpu" if options.gpu is None else f"cuda:{options.gpu}"
        return session.TorchScriptSession(
            data,
            input=input,
            outputs=spec.outputs,
            device=place,
            threads=options.threads,
            map_dtype=spec.map_dtype,
        )


class TorchScript(_Program):
    """Run the frozen TorchScript module of a bundle. torch compiles it when it loads it, so it runs on any CPU and GPU."""

    name, title, extra, package, devices = "torchscript", "TorchScript", "build", "torch", ("cpu", "cuda")
    graph_format, graph_is_engine = "torchscript", True

    def version(self) -> str | None:
        return session.library_version()

    def reasons_against(self, key: EngineKey, host: Host) -> list[str]:
        if host.versions.get(self.name) is None:  # any release of torch loads files of older ones
            return compat.against_library(self, key, host)
        return []

    def compile(
        self, bundle: Bundle, graph: GraphRecord, options: CompileOptions, progress: Progress
    ) -> CompiledEngine:
        return engine_of_torchscript(bytes(bundle.read(graph.file)))


class TorchTensorRt(_Program):
    """Run a TorchScript file or exported program with TensorRT engines inside. A build compiles it from the network."""

    name, title, extra, package = "torch_tensorrt", "Torch-TensorRT", "torch-tensorrt", "torch-tensorrt"
    devices, graph_format, needs_own_gpu = ("cuda",), None, True
    refusal = (
        "torch_tensorrt compiles the network itself, which a bundle does not hold: edge-backbones build MODEL BUNDLE "
        "--flavour torch_tensorrt, on a machine with the GPU"
    )

    def version(self) -> str | None:
        return session.torch_tensorrt_version()

    def reasons_against(self, key: EngineKey, host: Host) -> list[str]:
        reasons = compat.against_library(self, key, host)
        if key.architecture != host.architecture:
            reasons.append(f"compiled on {key.architecture}; this machine is {host.architecture}: {self.remedy()}")
        if host.gpu is None or key.gpu is None:
            return [*reasons, compat.no_gpu(host)]
        return [
            *reasons,
            *compat.against_architecture(self, key.gpu, host.gpu),
            *compat.against_driver(key.gpu, host.gpu),
        ]

    def compile(
        self, bundle: Bundle, graph: GraphRecord, options: CompileOptions, progress: Progress
    ) -> CompiledEngine:
        raise CompileError(self.refusal)

    def remedy(self) -> str:
        return "run edge-backbones build MODEL BUNDLE --flavour torch_tensorrt --overwrite here"

    def way_to_compile(self, bundle: object, options: str = "") -> str:
        return f"edge-backbones build MODEL {bundle} --flavour torch_tensorrt --overwrite"


def engine_of_torchscript(module: bytes) -> CompiledEngine:
    """Return a frozen TorchScript module as an engine. Raises MissingDependencyError without torch."""
    version = session.library_version()
    if version is None:
        raise MissingDependencyError("the TorchScript engine", "build")
    key = EngineKey(
        flavour="torchscript",
        library_version=version,
        architecture=hosts.this_host({}).architecture,
        cpu_features=(),
        device_name="any",
        precision=Precision.FP32,
        graph_sha256=hashlib.sha256(module).hexdigest(),
    )
    return CompiledEngine(module, key, ".ts", from_cache=False)


def engine_of_torch_tensorrt(program: bytes, suffix: str, precision: Precision, gpu: Gpu) -> CompiledEngine:
    """Return a program with TensorRT engines inside, compiled on ``gpu``, as an engine."""
    key = EngineKey(
        flavour="torch_tensorrt",
        library_version=session.torch_tensorrt_version() or "unknown",
        architecture=hosts.this_host({}).architecture,
        cpu_features=(),
        device_name=gpu.name,
        precision=precision,
        graph_sha256=hashlib.sha256(program).hexdigest(),
        gpu=GpuKey(architectures=(gpu.architecture,), driver=gpu.driver),
    )
    return CompiledEngine(program, key, suffix, from_cache=False)


TORCHSCRIPT, TORCH_TENSORRT = TorchScript(), TorchTensorRt()
