"""Compile a typed ONNX graph with OpenVINO for this machine's CPU.

bf16 graphs are computed in bf16 on CPUs with instructions for it, fp16 graphs in fp16 where both the CPU and OpenVINO have
it, and either in fp32 elsewhere. The key of the engine says which (``computes_in``). All other graphs are computed in fp32
where they are not int8.

Engines are cached by content: the same graph, library and CPU give the same engine without compiling again.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from pathlib import Path

import msgspec

from edge_backbones.bundle.manifest import EngineKey
from edge_backbones.engines import compat
from edge_backbones.engines.base import CompiledEngine
from edge_backbones.engines.openvino import bf16_graph, frame_graph, int8_graph, kernel_forms, session
from edge_backbones.errors import MissingDependencyError
from edge_backbones.machine import hosts
from edge_backbones.spec import InputSpec, Precision

CACHE_LIMIT_BYTES = 4 << 30
_ADAPTED = 4  # Raise it if the same graph is adapted in another way: cached engines are those of an earlier way then.


def computes_in(precision: Precision) -> Precision:
    """Return the number format in which this machine computes the floating-point part of a graph."""
    if not precision.info.is_half or not compat.has_units(precision, hosts.this_host({}).cpu_features):
        return Precision.FP32
    return Precision.FP32 if precision is Precision.FP16 and not session.computes_in_fp16() else precision


def rests(precision: Precision, input: InputSpec) -> tuple[Precision, ...]:
    """Return the number formats, besides fp32, in which an int8 engine can compute what is not int8 on this machine.

    None for engines that take camera frames: frames are converted in fp32.
    """
    if precision is not Precision.INT8 or input.frame is not None or computes_in(Precision.BF16) is not Precision.BF16:
        return ()
    return (Precision.BF16,)


def engine_key(
    graph: bytes, precision: Precision, *, as_written: bool = False, rest: Precision | None = None
) -> EngineKey:
    """Return the key of the OpenVINO engine that this machine would compile from a graph.

    ``as_written`` and ``rest``: as for `compile_graph`.

    Raises MissingDependencyError if OpenVINO is not installed.
    """
    version = session.library_version()
    if version is None:
        raise MissingDependencyError("compiling the CPU engine", "cpu")
    if precision.info.is_half and not as_written:
        rest = computes_in(precision)
    return compat.cpu_key("openvino", version, precision, graph, computes_in=None if _takes_frames(graph) else rest)


def compile_graph(
    graph: bytes,
    precision: Precision,
    *,
    cache: Path | None,
    as_written: bool = False,
    rest: Precision | None = None,
) -> CompiledEngine:
    """Compile ONNX bytes for this machine's CPU, or take the engine from ``cache``.

    Args:
        graph: ONNX bytes.
        precision: Precision of the graph.
        cache: Folder of compiled engines, None for no cache.
        as_written: Compile an int8 or bf16 graph as it is, so that the engine rounds as TensorRT does. By default it is
            adapted to the CPU (:mod:`edge_backbones.engines.openvino.int8_graph` and
            :mod:`edge_backbones.engines.openvino.bf16_graph`).
        rest: Number format in which an int8 engine computes what is not int8: bf16, on a CPU with instructions for it.
            None for fp32.

    Returns:
        The compiled engine.

    Raises:
        CompileError: OpenVINO refuses the graph; the message has its words.
        MissingDependencyError: OpenVINO is not installed.
    """
    key = engine_key(graph, precision, as_written=as_written, rest=rest)
    chosen = session.settings(None, compat.computed_in(key))
    name = hashlib.sha256(msgspec.json.encode([key, chosen, as_written, _ADAPTED])).hexdigest()
    if cache is not None and (cached := _read_cached(cache, name)) is not None:
        return CompiledEngine(cached, key, ".blob", from_cache=True)
    model = session.read_model(graph)
    frame_graph.adapt(model)
    if precision is Precision.INT8 and not as_written:
        int8_graph.adapt(model)
        if rest is Precision.BF16:
            bf16_graph.round_weights(model)
    if precision is Precision.BF16 and not as_written and not _takes_frames(graph):
        bf16_graph.adapt(model)
    kernel_forms.adapt(model)
    data = session.compile_model(model, compat.computed_in(key))
    if cache is not None:
        with contextlib.suppress(OSError):  # a cache that cannot be written only costs time
            _write_cached(cache, name, data)
    return CompiledEngine(data, key, ".blob", from_cache=False)


def _takes_frames(graph: bytes) -> bool:
    """Return whether a graph begins with what is done to a camera's frames, in nodes called ``frame/...``.

    That is computed in fp32 whatever the precision. OpenVINO takes one number format for a whole graph, so such a graph is
    computed as it is written. A network with a module called ``frame`` is mistaken for one, and is right all the same.
    """
    return b"frame/" in graph


def _read_cached(cache: Path, name: str) -> bytes | None:
    """Return a cached engine; None if there is none.

    File names hold hashes of key and content, so a damaged engine is noticed, deleted and compiled again.
    """
    with contextlib.suppress(OSError):  # a cache that cannot be read only costs time
        for path in cache.glob(f"{name}-*.blob"):
            data = path.read_bytes()
            if hashlib.sha256(data).hexdigest() == path.stem.partition("-")[2]:
                os.utime(path)
                return data
            path.unlink()
    return None


def _write_cached(cache: Path, name: str, data: bytes) -> None:
    """Add an engine to the cache, and delete the least recently used ones above the size limit."""
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
