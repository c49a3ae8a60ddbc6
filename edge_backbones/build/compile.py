"""A typed graph becomes an engine of one flavour. Runs on the device: numpy, msgspec and the engine library only.

Engines are cached by content: the same graph, library and CPU give the same engine without compiling again.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import msgspec

from edge_backbones.build import cpu_graph, tensorrt
from edge_backbones.build.artifacts import CompiledEngine, Progress, no_progress
from edge_backbones.errors import MissingDependencyError
from edge_backbones.manifest import EngineKey, GpuKey
from edge_backbones.runtime import compat, cuda, openvino, torchscript
from edge_backbones.spec import InputSpec, Precision
from edge_backbones.system import gib

CACHE_LIMIT_BYTES = 4 << 30


def default_cache() -> Path:
    """Where compiled engines are kept between builds: ``edge_backbones`` in the user's cache folder, at most 4 GiB.

    This package writes to the bundle, to the files that a command names (``run``: features/, ``verify --explain``:
    explanation.png, ``build`` and ``report``: <bundle>.report.html), to hidden files beside these while it writes, and here.
    Opening and running an engine writes nothing at all. ``bench`` has files in the system's folder for temporary ones.

    Libraries of the workstation have places of their own: huggingface_hub keeps what it was asked to download (HF_HOME),
    matplotlib a list of fonts (``matplotlib`` in the cache and configuration folders), torch an empty folder for its compiler
    (``torchinductor_<user>`` beside temporary files). The telemetry of OpenVINO and ONNX Runtime, which writes too, is off.
    """
    home = Path.home()
    if sys.platform == "darwin":
        return home / "Library" / "Caches" / "edge_backbones"
    return Path(os.environ.get("XDG_CACHE_HOME") or home / ".cache") / "edge_backbones"


def engine_key(graph: bytes, precision: Precision) -> EngineKey:
    """The key of the OpenVINO engine that this machine would make of a graph."""
    version = openvino.library_version()
    if version is None:
        raise MissingDependencyError("compiling the CPU engine", "cpu")
    host = compat.this_host({"openvino": version})
    return EngineKey(
        flavour="openvino",
        library_version=version,
        architecture=host.architecture,
        cpu_features=host.cpu_features,
        device_name=host.device_name,
        precision=precision,
        graph_sha256=hashlib.sha256(graph).hexdigest(),
    )


def compile_engine(
    graph: bytes, precision: Precision, *, cache: Path | None, as_written: bool = False
) -> CompiledEngine:
    """Compile ONNX bytes for this machine's CPU, or take the engine from ``cache``.

    An int8 graph is adapted to the CPU (:mod:`edge_backbones.build.cpu_graph`) unless ``as_written``: then the engine rounds
    as TensorRT does. Raises CompileError with the library's words, MissingDependencyError where OpenVINO is not installed.
    """
    key = engine_key(graph, precision)
    name = hashlib.sha256(msgspec.json.encode([key, openvino.settings(None), as_written])).hexdigest()
    if cache is not None and (cached := _read_cached(cache, name)) is not None:
        return CompiledEngine(cached, key, ".blob", from_cache=True)
    model = openvino.read_model(graph)
    if precision is Precision.INT8 and not as_written:
        cpu_graph.adapt(model)
    data = openvino.compile_model(model)
    if cache is not None:
        with contextlib.suppress(OSError):  # a cache that cannot be written only costs time
            _write_cached(cache, name, data)
    return CompiledEngine(data, key, ".blob", from_cache=False)


def compile_for_gpu(
    graph: bytes,
    input: InputSpec,
    precision: Precision,
    *,
    flavour: tensorrt.PlanFlavour,
    options: tensorrt.PlanOptions,
    device: int = 0,
    ranges: Mapping[str, float] | None = None,
    progress: Progress = no_progress,
) -> CompiledEngine:
    """Compile ONNX bytes to a plan of TensorRT or TensorRT-RTX: see :func:`edge_backbones.build.tensorrt.compile_plan`."""
    plan = tensorrt.compile_plan(
        graph, input, precision, flavour=flavour, options=options, device=device, ranges=ranges, progress=progress
    )
    host = compat.this_host({})
    key = EngineKey(
        flavour=flavour,
        library_version=plan.library_version,
        architecture=host.architecture,
        cpu_features=(),
        device_name=plan.device_name,
        precision=precision,
        graph_sha256=hashlib.sha256(graph).hexdigest(),
        gpu=plan.gpu,
    )
    notes = [f"memory that the compilation needed: {gib(plan.memory_estimate)} at least", *plan.warnings]
    return CompiledEngine(
        plan.data,
        key,
        ".plan",
        from_cache=False,
        layers=plan.layers,
        timing_cache=plan.timing_cache,
        notes=tuple(notes),
    )


def engine_of_torchscript(module: bytes) -> CompiledEngine:
    """The frozen TorchScript module as an engine: torch compiles it where it runs."""
    version = torchscript.library_version()
    if version is None:
        raise MissingDependencyError("the TorchScript engine", "build")
    host = compat.this_host({})
    key = EngineKey(
        flavour="torchscript",
        library_version=version,
        architecture=host.architecture,
        cpu_features=(),
        device_name="any",
        precision=Precision.FP32,
        graph_sha256=hashlib.sha256(module).hexdigest(),
    )
    return CompiledEngine(module, key, ".ts", from_cache=False)


def engine_of_torch_tensorrt(program: bytes, suffix: str, precision: Precision, gpu: cuda.Gpu) -> CompiledEngine:
    """A program with TensorRT engines inside, as it was compiled on this GPU."""
    key = EngineKey(
        flavour="torch_tensorrt",
        library_version=torchscript.torch_tensorrt_version() or "unknown",
        architecture=compat.this_host({}).architecture,
        cpu_features=(),
        device_name=gpu.name,
        precision=precision,
        graph_sha256=hashlib.sha256(program).hexdigest(),
        gpu=GpuKey(architectures=(gpu.architecture,), driver=gpu.driver),
    )
    return CompiledEngine(program, key, suffix, from_cache=False)


def _read_cached(cache: Path, name: str) -> bytes | None:
    """File names are key-content hashes, so that a damaged engine is noticed and made again."""
    with contextlib.suppress(OSError):  # a cache that cannot be read only costs time
        for path in cache.glob(f"{name}-*.blob"):
            data = path.read_bytes()
            if hashlib.sha256(data).hexdigest() == path.stem.partition("-")[2]:
                os.utime(path)
                return data
            path.unlink()
    return None


def _write_cached(cache: Path, name: str, data: bytes) -> None:
    cache.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=cache, suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.replace(temporary, cache / f"{name}-{hashlib.sha256(data).hexdigest()}.blob")
    except OSError:
        os.unlink(temporary)
        raise
    by_age = sorted(cache.glob("*.blob"), key=lambda path: path.stat().st_mtime, reverse=True)
    total = 0
    for path in by_age:
        total += path.stat().st_size
        if total > CACHE_LIMIT_BYTES:
            path.unlink(missing_ok=True)
