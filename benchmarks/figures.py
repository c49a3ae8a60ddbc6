"""The other figures: build time and memory, cold start, import time, overhead of the runtime class."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

_COLD_START = """
import sys
import numpy
from edge_backbones import EdgeBackbone
with EdgeBackbone.from_pretrained(sys.argv[1], threads=2) as backbone:
    maps = backbone(numpy.zeros(backbone.input.opt_shape, numpy.float32)).feature_maps
    assert len(maps) == 4
print(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])
"""

_BUILD = """
import json, sys, time
import torch, timm, onnx, onnxscript
from edge_backbones.engines.onnxruntime.library import onnxruntime
from edge_backbones.engines.openvino.session import load_library
from edge_backbones import BuildOptions, build_bundle
load_library()
start = time.perf_counter()
options = BuildOptions(weights="random:0", out_indices=(1, 2, 3, 4), golden=4, cache=None)
result = build_bundle("resnet50", sys.argv[2], images=sys.argv[1], options=options, overwrite=True)
print(json.dumps({
    "seconds": time.perf_counter() - start,
    "peak_mb": int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) * 1024 / 1e6,
    "calibration_images": result.bundle.manifest.calibration.images,
}))
"""


_CALIBRATE = """
import json, sys, tempfile, time
from pathlib import Path
from edge_backbones import Bundle
from edge_backbones.toolchain.artifacts import ExportedGraph, no_progress
from edge_backbones.toolchain.calibration.calibrate import Feed, calibrate
from edge_backbones.toolchain.calibration.images import gather_images
manifest = Bundle.open(sys.argv[2]).manifest
graph = ExportedGraph(Path(sys.argv[2]) / "graphs" / "fp32.onnx", manifest.backbone, manifest.input)
with tempfile.TemporaryDirectory() as folder:
    work, config = Path(folder), manifest.image
    images = gather_images(sys.argv[1], input=manifest.input, config=config, spool=work / "images")
    feed = Feed(images, list(range(len(images.names))), manifest.input.batch.max, fill=manifest.input.batch.is_fixed)
    start = time.perf_counter()
    calibrate(graph, feed, method="auto", percentile=99.99, config=config, work=work, progress=no_progress)
    print(json.dumps({
        "seconds": time.perf_counter() - start,
        "peak_mb": int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) * 1024 / 1e6,
    }))
"""


def resnet50_calibration(photographs: Path, bundle: Path) -> dict[str, float]:
    """Return seconds and peak resident MB of calibration by ``auto``, without reading the photographs."""
    return dict(json.loads(_python(_CALIBRATE, str(photographs), str(bundle)).splitlines()[-1]))


def resnet50_build(photographs: Path, target: Path) -> dict[str, float]:
    """Return seconds (without imports) and peak resident MB of an int8 build."""
    done = _python(_BUILD, str(photographs), str(target))
    return dict(json.loads(done.splitlines()[-1]))


def rtx_build(bundle: Path, repeats: int = 5) -> float:
    """Return the median seconds of compiling the int8 graph with TensorRT-RTX for every architecture it knows."""
    from edge_backbones import Bundle
    from edge_backbones.engines.tensorrt.compile import compile_plan
    from edge_backbones.spec import Precision

    graph, input = (bundle / "graphs" / "int8.onnx").read_bytes(), Bundle.open(bundle).manifest.input
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        compile_plan(graph, input, Precision.INT8, flavour="tensorrt_rtx")
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def cold_start(bundle: Path, repeats: int = 7) -> dict[str, float]:
    """Return the seconds from starting Python to the first feature maps, and the peak resident MB."""
    seconds, peaks = [], []
    for _ in range(repeats):
        start = time.perf_counter()
        peaks.append(int(_python(_COLD_START, str(bundle))) * 1024 / 1e6)
        seconds.append(time.perf_counter() - start)
    return {"seconds": statistics.median(seconds), "peak_mb": max(peaks)}


def import_cost(repeats: int = 15) -> dict[str, float]:
    """Return the median milliseconds that ``import edge_backbones`` adds to starting Python."""
    timings: dict[str, list[float]] = {"pass": [], "import edge_backbones": []}
    for _ in range(repeats):
        for code, values in timings.items():
            start = time.perf_counter()
            _python(code)
            values.append(1e3 * (time.perf_counter() - start))
    bare, with_import = (statistics.median(values) for values in timings.values())
    return {"bare_ms": bare, "added_ms": with_import - bare}


def call_overhead(bundle: Path, calls: int = 1000) -> dict[str, float]:
    """EdgeBackbone's call against ``InferRequest.infer()`` on the same compiled model, call by call in turn.

    That request has its input tensor set once, writes into its own output tensors and shares them (no copies).
    The overhead is the median of the differences within each turn.
    """
    from edge_backbones import EdgeBackbone
    from edge_backbones.engines.openvino.session import load_library

    with EdgeBackbone.from_pretrained(bundle, engine="int8", threads=2) as backbone:
        images = np.random.default_rng(0).standard_normal(backbone.input.opt_shape).astype(np.float32)
        request = backbone._engine._loaded.model.create_infer_request()  # type: ignore[attr-defined]
        request.set_input_tensor(load_library().Tensor(images, shared_memory=True))
        contenders: list[Callable[[], Any]] = [lambda: request.infer(share_outputs=True), lambda: backbone(images)]
        timings = np.array([_in_turn(contenders, reverse=bool(index % 2)) for index in range(calls + 20)])[20:]
    bare = float(np.median(timings[:, 0]))
    overhead = float(np.median(timings[:, 1] - timings[:, 0]))
    return {"bare_ms": bare, "overhead_ms": overhead, "overhead_percent": 100 * overhead / bare}


def _in_turn(contenders: Sequence[Callable[[], Any]], *, reverse: bool) -> list[float]:
    """Return the milliseconds of one call each. The order alternates, because the second finds warmer caches."""
    milliseconds = [0.0] * len(contenders)
    order = range(len(contenders))
    for index in reversed(order) if reverse else order:
        start = time.perf_counter()
        result = contenders[index]()
        milliseconds[index] = 1e3 * (time.perf_counter() - start)
        del result
    return milliseconds


def _python(code: str, *arguments: str) -> str:
    done = subprocess.run([sys.executable, "-c", code, *arguments], check=True, stdout=subprocess.PIPE, text=True)
    return done.stdout
