"""Describe ONNX Runtime, whose engines are graphs for CPUs. The library compiles a graph each time it loads it.

Engines of earlier releases are graphs of the bundle itself. They load as the others do.
"""

from __future__ import annotations

from edge_backbones.bundle.manifest import EngineKey, GraphRecord
from edge_backbones.bundle.reader import Bundle
from edge_backbones.engines import compat
from edge_backbones.engines.base import CompiledEngine, CompileOptions, EngineSession, Flavour, LoadOptions
from edge_backbones.engines.onnxruntime import compile as compiler
from edge_backbones.engines.onnxruntime import session
from edge_backbones.machine.hosts import Host
from edge_backbones.progress import Progress
from edge_backbones.spec import BackboneSpec, InputSpec


class OnnxRuntime(Flavour):
    """Run graphs on any CPU: int8 layers in integers, everything else in fp32.

    Kernels depend on the CPU, so a parity report holds for the CPU that measured it.
    """

    name, title, extra, package = "onnxruntime", "ONNX Runtime", "onnxruntime", "onnxruntime"

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
        return compiler.compile_graph(bytes(bundle.read(graph.file)), graph.precision)

    def serves(self, host: Host) -> bool:
        return host.versions.get(self.name) is not None  # registry.serving asks OpenVINO first

    def rivals(self, host: Host) -> tuple[str, ...]:
        return ("openvino",) if compat.is_arm(host) else ()


ONNXRUNTIME = OnnxRuntime()
