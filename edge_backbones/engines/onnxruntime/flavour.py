"""Describe ONNX Runtime, whose engines are graphs for CPUs. The library compiles a graph each time it loads it."""

from __future__ import annotations

import hashlib

from edge_backbones.bundle.manifest import EngineKey, GraphRecord
from edge_backbones.bundle.reader import Bundle
from edge_backbones.engines import compat
from edge_backbones.engines.base import CompiledEngine, CompileOptions, EngineSession, Flavour, LoadOptions
from edge_backbones.engines.onnxruntime import session
from edge_backbones.errors import MissingDependencyError
from edge_backbones.machine import hosts
from edge_backbones.machine.hosts import Host
from edge_backbones.progress import Progress
from edge_backbones.spec import BackboneSpec, InputSpec


class OnnxRuntime(Flavour):
    """Run fp32 and int8 graphs on any CPU.

    Kernels depend on the CPU, so a parity report holds for the CPU that measured it.
    """

    name, title, extra, package = "onnxruntime", "ONNX Runtime", "onnxruntime", "onnxruntime"
    graph_is_engine = True

    def version(self) -> str | None:
        return session.library_version()

    def reasons_against(self, key: EngineKey, host: Host) -> list[str]:
        return compat.against_library(self, key, host) + compat.against_cpu(self, key, host)

    def load(
        self, key: EngineKey, data: bytearray, spec: BackboneSpec, input: InputSpec, options: LoadOptions
    ) -> EngineSession:
        return session.OnnxRuntimeSession(data, input=input, spec=spec, threads=options.threads)

    def compile(
        self, bundle: Bundle, graph: GraphRecord, options: CompileOptions, progress: Progress
    ) -> CompiledEngine:
        version = self.version()
        if version is None:
            raise MissingDependencyError("the ONNX Runtime engine", self.extra)
        data, host = bytes(bundle.read(graph.file)), hosts.this_host({})
        key = EngineKey(
            flavour=self.name,
            library_version=version,
            architecture=host.architecture,
            cpu_features=host.cpu_features,
            device_name=host.device_name,
            precision=graph.precision,
            graph_sha256=hashlib.sha256(data).hexdigest(),
        )
        return CompiledEngine(data, key, ".onnx", from_cache=False)

    def serves(self, host: Host) -> bool:
        return host.versions.get(self.name) is not None  # registry.serving asks OpenVINO first


ONNXRUNTIME = OnnxRuntime()
