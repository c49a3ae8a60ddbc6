"""One contender, alone in its process: ``python -m benchmarks.contenders KIND BUNDLE THREADS`` prints its timings as JSON.

Kinds: ``edge`` (EdgeBackbone on the int8 engine), ``torch`` (timm in eager fp32), ``onnxruntime`` (the fp32 graph of the
bundle), ``graph=FILE`` (any ONNX file of the same network, compiled as the engines of bundles are). All take the same
seeded batch of 1 at the bundle's size and return every stage as numpy arrays or tensors.
"""

from __future__ import annotations

import functools
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from edge_backbones.bundle import Bundle

WARM_UP = 10
CALLS = 40
SECONDS = 2.0  # at least: forty calls of a small network are over before anything can be said of the machine


def edge(bundle: Bundle, threads: int) -> Callable[[np.ndarray], Any]:
    from edge_backbones import EdgeBackbone

    return EdgeBackbone.from_pretrained(bundle.path, engine="int8", threads=threads)


def torch(bundle: Bundle, threads: int) -> Callable[[np.ndarray], Any]:
    import timm
    import torch as library

    library.set_num_threads(threads)
    indices, name = bundle.manifest.backbone.out_indices, bundle.manifest.source.name
    net = timm.create_model(name, features_only=True, out_indices=indices).eval()

    def call(images: np.ndarray) -> Any:
        with library.inference_mode():
            return net(library.from_numpy(images))

    return call


def onnxruntime(bundle: Bundle, threads: int) -> Callable[[np.ndarray], Any]:
    import onnxruntime as library

    options = library.SessionOptions()
    options.intra_op_num_threads = threads
    session = library.InferenceSession(
        bundle.path / "graphs" / "fp32.onnx", options, providers=["CPUExecutionProvider"]
    )
    return lambda images: session.run(None, {bundle.manifest.input.name: images})


def graph(file: Path, bundle: Bundle, threads: int) -> Callable[[np.ndarray], Any]:
    from edge_backbones.build.compile import compile_engine
    from edge_backbones.runtime.openvino import OpenVinoSession
    from edge_backbones.spec import Precision

    engine = compile_engine(file.read_bytes(), Precision.INT8, cache=None)
    return OpenVinoSession(bytearray(engine.data), outputs=bundle.manifest.backbone.outputs, threads=threads).run


KINDS = {"edge": edge, "torch": torch, "onnxruntime": onnxruntime}


def stolen_time() -> tuple[int, int]:
    """Clock ticks that other guests of the host took from this machine, and all ticks (Linux; elsewhere nothing)."""
    try:
        ticks = [int(value) for value in Path("/proc/stat").read_text(encoding="ascii").split("\n", 1)[0].split()[1:9]]
    except OSError:
        return 0, 0
    return ticks[7], sum(ticks)


def main() -> None:
    kind, path, threads = sys.argv[1:]
    bundle = Bundle.open(Path(path))
    make = functools.partial(graph, Path(kind.removeprefix("graph="))) if kind.startswith("graph=") else KINDS[kind]
    call = make(bundle, int(threads))
    images = np.random.default_rng(0).standard_normal(bundle.manifest.input.opt_shape).astype(np.float32)
    for _ in range(WARM_UP):
        call(images)
    milliseconds = []
    stolen, total = stolen_time()
    begin = time.perf_counter()
    while len(milliseconds) < CALLS or time.perf_counter() - begin < SECONDS:
        start = time.perf_counter()
        call(images)
        milliseconds.append(1e3 * (time.perf_counter() - start))
    stolen_after, total_after = stolen_time()
    stolen_share = (stolen_after - stolen) / max(1, total_after - total)
    print(json.dumps({"milliseconds": milliseconds, "stolen_share": stolen_share}))


if __name__ == "__main__":
    main()
