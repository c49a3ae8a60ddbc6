"""Describe OpenVINO, whose engines are blobs for CPUs, compiled ahead of time."""

from __future__ import annotations

import numpy as np

from edge_backbones.bundle.manifest import EngineKey, GraphRecord
from edge_backbones.bundle.reader import Bundle
from edge_backbones.engines import compat
from edge_backbones.engines.base import CompiledEngine, CompileOptions, EngineSession, Flavour, LayerTime, LoadOptions
from edge_backbones.engines.openvino import compile as compiler
from edge_backbones.engines.openvino import layer_times, session
from edge_backbones.machine.hosts import Host
from edge_backbones.machine.profiles import DeviceProfile
from edge_backbones.progress import Progress
from edge_backbones.spec import BackboneSpec, InputSpec, Precision


class OpenVino(Flavour):
    """Compile and run blobs. A blob runs only with the release that wrote it, on CPUs with the same instruction sets."""

    name, title, extra, package = "openvino", "OpenVINO", "cpu", "openvino"
    times_layers = True

    def version(self) -> str | None:
        return session.library_version()

    def reasons_against(self, key: EngineKey, host: Host) -> list[str]:
        return compat.against_library(self, key, host) + compat.against_cpu(self, key, host)

    def load(
        self, key: EngineKey, data: bytearray, spec: BackboneSpec, input: InputSpec, options: LoadOptions
    ) -> EngineSession:
        return session.OpenVinoSession(
            data,
            outputs=spec.outputs,
            threads=options.threads,
            input=input,
            spec=spec,
            computes_in=compat.computed_in(key),
        )

    def compile(
        self, bundle: Bundle, graph: GraphRecord, options: CompileOptions, progress: Progress
    ) -> CompiledEngine:
        data = bytes(bundle.read(graph.file))
        return compiler.compile_graph(data, graph.precision, cache=options.cache, rest=options.rest)

    def rests(self, precision: Precision, input: InputSpec) -> tuple[Precision, ...]:
        return compiler.rests(precision, input)

    def time_layers(self, data: bytearray, images: np.ndarray, key: EngineKey | None = None) -> list[LayerTime]:
        return layer_times.time_layers(data, images, "fp32" if key is None else compat.computed_in(key))

    def serves(self, host: Host) -> bool:
        return host.versions.get(self.name) is not None

    def rivals(self, host: Host) -> tuple[str, ...]:
        # It computes 6 convolutions of EfficientNet-Lite0 in int8 there, and 31 on x86-64 (benchmarks/results/aarch64.json).
        return ("onnxruntime",) if compat.is_arm(host) else ()

    def against_profile(self, profile: DeviceProfile, instead: str) -> str:
        if self.name not in profile.flavours:
            return f"openvino runs on CPUs and {profile.name} is a GPU: use flavour {instead}, or the profile cpu"
        return ""


OPENVINO = OpenVino()
