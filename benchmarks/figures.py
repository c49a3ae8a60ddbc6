"""The other figures: build time and memory, cold start, import time, overhead of the runtime class."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

_COLD_START = """
import resource, sys
import numpy
from edge_backbones import EdgeBackbone
with EdgeBackbone.from_pretrained(sys.argv[1], threads=2) as backbone:
    maps = backbone(numpy.zeros(backbone.input.opt_shape, numpy.float32)).feature_maps
    assert len(maps) == 4
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""

_BUILD = """
import json, resource, sys, time
import torch, timm, onnx, onnxscript, onnxruntime, openvino
from edge_backbones import BuildOptions, build_bundle
start = time.perf_counter()
options = BuildOptions(weights="random:0", out_indices=(1, 2, 3, 4), golden=4, cache=None)
result = build_bundle("resnet50", sys.argv[2], images=sys.argv[1], options=options, overwrite=True)
print(json.dumps({
    "seconds": time.perf_counter() - start,
    "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    "calibration_images": result.bundle.manifest.calibration.images,
}))
"""


def resnet50_build(photographs: Path, target: Path) -> dict[str, float]:
    """Seconds (imports left out) and peak resident MiB of an int8 build."""
    done = _python(_BUILD, str(photographs), str(target))
    return dict(json.loads(done.splitlines()[-1]))


def cold_start(bundle: Path, repeats: int = 7) -> dict[str, float]:
    """Wall seconds from starting python to the first feature maps, and the peak resident MiB of that process."""
    seconds, peaks = [], []
    for _ in range(repeats):
        start = time.perf_counter()
        peaks.append(float(_python(_COLD_START, str(bundle))))
        seconds.append(time.perf_counter() - start)
    return {"seconds": statistics.median(seconds), "peak_mib": max(peaks)}


def import_cost(repeats: int = 15) -> dict[str, float]:
    """Milliseconds that ``import edge_backbones`` adds to starting a bare Python, alternating, medians."""
    timings: dict[str, list[float]] = {"pass": [], "import edge_backbones": []}
    for _ in range(repeats):
        for code, values in timings.items():
            start = time.perf_counter()
            _python(code)
            values.append(1e3 * (time.perf_counter() - start))
    bare, with_import = (statistics.median(values) for values in timings.values())
    return {"bare_ms": bare, "added_ms": with_import - bare}


def call_overhead(bundle: Path, calls: int = 400) -> dict[str, float]:
    """EdgeBackbone's call against the bare OpenVINO request with the same tensors, call by call in turn.

    The bare request has its input and output tensors set once and only infers: what any caller of OpenVINO pays.
    """
    import openvino

    from edge_backbones import Bundle, EdgeBackbone
    from edge_backbones.runtime.openvino import settings

    opened = Bundle.open(bundle)
    record = next(engine for engine in opened.manifest.engines if engine.key.precision == "int8")
    images = np.random.default_rng(0).standard_normal(opened.manifest.input.opt_shape).astype(np.float32)
    blob = opened.read(record.file)
    bare_model = openvino.Core().import_model(bytes(blob), "CPU", settings(2))
    request = bare_model.create_infer_request()
    request.set_input_tensor(openvino.Tensor(images, shared_memory=True))
    timings: dict[str, list[float]] = {"bare": [], "edge": []}
    with EdgeBackbone.from_pretrained(bundle, engine="int8", threads=2) as backbone:
        contenders = {"bare": lambda: request.infer(share_outputs=True), "edge": lambda: backbone(images)}
        for index in range(calls + 20):
            for name, call in contenders.items():
                start = time.perf_counter()
                result: Any = call()
                elapsed = 1e3 * (time.perf_counter() - start)
                del result
                if index >= 20:
                    timings[name].append(elapsed)
    bare, edge = statistics.median(timings["bare"]), statistics.median(timings["edge"])
    return {
        "bare_ms": bare,
        "edge_ms": edge,
        "overhead_ms": edge - bare,
        "overhead_percent": 100 * (edge - bare) / bare,
    }


def _python(code: str, *arguments: str) -> str:
    done = subprocess.run([sys.executable, "-c", code, *arguments], check=True, capture_output=True, text=True)
    return done.stdout
