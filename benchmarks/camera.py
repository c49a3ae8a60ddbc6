"""``python -m benchmarks.camera``: a camera's 1080p frame to maps of resnet50 in int8, preprocessed in the graph or in numpy.

Three comparisons, each contender alone in its process, in turn, with the same number of threads:

- RGB: `fit` in numpy and an engine for frames of the network's size, against an engine for whole frames.
- NV12: conversion, `fit` and that engine, against an engine for whole frames.
- JPEG, as USB cameras deliver 1080p: Pillow decodes, an engine for whole frames; a loop against ``backbone.map``.

Ratios are of one round, and their median counts. TensorRT-RTX compiles the graphs of 1080p and of 4K too, which needs no GPU.
Results: benchmarks/results/camera.json.
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import RESULTS, machine, timing_bundle
from benchmarks.end_to_end import FRAME, frame
from benchmarks.figures import rtx_build
from edge_backbones import cpus
from edge_backbones.bench.compare import calm_turns
from edge_backbones.bench.contender import stolen_ticks
from edge_backbones.bench.results import ratio_of
from edge_backbones.bundle.reader import Bundle
from edge_backbones.deploy.parity import compare as compare_maps
from edge_backbones.images.camera import frame_spec, from_rgb, to_rgb
from edge_backbones.images.fit import fit
from edge_backbones.parity_report import Gate

MODEL, STAGES = "resnet50", (1, 2, 3, 4)
BUNDLES: dict[str, dict[str, Any]] = {
    "image": {"input": "image"},
    "rgb": {"input": "frame", "frame": FRAME},
    "nv12": {"input": "frame", "frame": FRAME, "color": "nv12"},
}
# Each comparison: the one that users have without it, the one that is offered, and what the ratio of their times has to be.
COMPARISONS = {
    "rgb": ("fit rgb", "graph rgb", "at most", 1.25),
    "nv12": ("fit nv12", "graph nv12", "at most", 1.0),
    "jpeg": ("map jpeg", "loop jpeg", "at least", 1.15),
}
FRAME_4K = (2160, 3840)
RTX_TARGET = 15.0
"""Seconds that TensorRT-RTX may take to compile a graph that takes frames."""
_WARM_UP, _CALLS, _SECONDS, _FRAMES = 5, 20, 1.5, 24

Call = Callable[[np.ndarray], Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7, help="times that each contender is started")
    found = measure(rounds=parser.parse_args().rounds)
    path = RESULTS / "camera.json"
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {path}")
    reached = [one["reached"] for one in found["comparisons"].values()]
    sys.exit(0 if all(reached) and max(found["rtx_seconds"].values()) <= RTX_TARGET else 1)


def measure(rounds: int = 7) -> dict[str, Any]:
    """Return for each comparison the medians of both contenders, the ratio of the second to the first, and its bounds."""
    threads = min(2, cpus.usable())
    bundles = {
        name: timing_bundle(MODEL, f"{MODEL}.camera-{name}", out_indices=STAGES, **options)
        for name, options in BUNDLES.items()
    }
    comparisons = {}
    for name in COMPARISONS:
        comparisons[name] = compare(name, bundles, rounds, threads)
        print(name, json.dumps({k: v for k, v in comparisons[name].items() if k != "rounds"}), flush=True)
    return {
        "machine": {**machine(), "threads": threads},
        "model": MODEL,
        "frame": FRAME,
        "comparisons": comparisons,
        "rtx_seconds": rtx_seconds(bundles["rgb"]),
    }


def rtx_seconds(of_1080p: Path) -> dict[str, float]:
    """Return the seconds that TensorRT-RTX compiles the int8 graph for RGB frames of each size, for every architecture."""
    options = {**BUNDLES["rgb"], "frame": FRAME_4K}
    of_4k = timing_bundle(MODEL, f"{MODEL}.camera-4k", out_indices=STAGES, **options)
    return {"1080p": rtx_build(of_1080p, repeats=3), "4K": rtx_build(of_4k, repeats=3)}


def compare(name: str, bundles: Mapping[str, Path], rounds: int, threads: int) -> dict[str, Any]:
    """Time both contenders of a comparison in turn, and compare the feature maps of their last turns."""
    first, second, bound, target = COMPARISONS[name]
    taken: list[dict[str, dict[str, float]]] = []
    with tempfile.TemporaryDirectory() as folder:
        for index in range(rounds):
            order = (first, second) if index % 2 else (second, first)
            taken.append({kind: _one_turn(kind, bundles, threads, Path(folder)) for kind in order})
        maps = {kind: np.load(Path(folder) / f"{kind}.npz") for kind in (first, second)}
        cosines = [compare_maps(s, maps[first][s], maps[second][s], Gate()).cosine for s in maps[first].files]
    return {**summary(name, taken), "worst_cosine": min(cosines), "bound": bound, "target": target, "rounds": taken}


def summary(name: str, rounds: Sequence[dict[str, dict[str, float]]]) -> dict[str, Any]:
    """Return medians and the ratio of the calmer rounds."""
    first, second, bound, target = COMPARISONS[name]
    stolen = [max(kind["stolen_share"] for kind in one.values()) for one in rounds]
    calm = [rounds[index] for index in calm_turns(stolen)]
    times = {kind: [one[kind]["frame_ms"] for one in calm] for kind in (first, second)}
    ratio = ratio_of(second, times[second], times[first])
    return {
        **{kind: statistics.median(of_kind) for kind, of_kind in times.items()},
        "ratio": ratio.median,
        "ratio_low": ratio.low,
        "ratio_high": ratio.high,
        "reached": ratio.median <= target if bound == "at most" else ratio.median >= target,
    }


def _one_turn(kind: str, bundles: Mapping[str, Path], threads: int, folder: Path) -> dict[str, float]:
    how, color = kind.split()
    bundle = bundles["image" if how == "fit" else "rgb" if color == "jpeg" else color]
    command = [sys.executable, "-m", "benchmarks.camera", "--child", kind, str(bundle), str(threads), str(folder)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


# ---- one contender, alone in its process


def child_main(kind: str, path: str, threads: str, folder: str) -> None:
    """Print the milliseconds per frame of a turn as JSON, and write the feature maps of a frame to ``folder``."""
    from edge_backbones import EdgeBackbone

    with EdgeBackbone.from_pretrained(path, engine="int8", threads=int(threads)) as backbone:
        run, pixels = _run_of(kind, backbone, Path(path), int(threads))
        maps = run(pixels).feature_maps
        np.savez(Path(folder) / f"{kind}.npz", **dict(zip(backbone.out_features, maps, strict=True)))
        for _ in range(_WARM_UP):
            run(pixels)
        stolen, total = stolen_ticks()
        begin = time.perf_counter()
        rows = []
        while len(rows) < _CALLS or time.perf_counter() - begin < _SECONDS:
            start = time.perf_counter()
            if kind.endswith("jpeg"):
                _stream(kind, backbone)
                rows += [(time.perf_counter() - start) / _FRAMES] * _FRAMES
            else:
                run(pixels)
                rows.append(time.perf_counter() - start)
        stolen_after, total_after = stolen_ticks()
    share = (stolen_after - stolen) / max(1, total_after - total)
    print(json.dumps({"frame_ms": 1e3 * statistics.median(rows), "stolen_share": share}))


def _run_of(kind: str, backbone: Any, bundle: Path, threads: int) -> tuple[Call, np.ndarray]:
    """Return a function from a frame as this camera delivers it to the output, and such a frame."""
    how, color = kind.split()
    picture = frame()
    spec = frame_spec(*FRAME, "nv12" if color == "nv12" else "rgb")
    if how != "fit":
        return backbone, from_rgb(picture, spec)
    image = Bundle.open(bundle).manifest.image
    height, width = backbone.input.height.opt, backbone.input.width.opt

    def fitted(given: np.ndarray) -> Any:
        return backbone(fit(to_rgb(given, spec), image, height, width, threads)[None])

    return fitted, from_rgb(picture, spec)


def _stream(kind: str, backbone: Any) -> None:
    """Run the frames of a stream, one after another or with two in flight."""
    if kind == "map jpeg":
        for _ in backbone.map(_decoded()):
            pass
    else:
        for pixels in _decoded():
            backbone(pixels)


_JPEGS: list[bytes] = []


def _decoded() -> Iterator[np.ndarray]:
    """Yield the frames of a USB camera: JPEG files that Pillow decodes."""
    from PIL import Image

    if not _JPEGS:
        picture = frame()
        for number in range(_FRAMES):
            file = io.BytesIO()
            Image.fromarray(np.roll(picture, (3 * number, 5 * number), (0, 1))).save(file, "JPEG", quality=90)
            _JPEGS.append(file.getvalue())
    for data in _JPEGS:
        yield np.asarray(Image.open(io.BytesIO(data)))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child_main(*sys.argv[2:])
    else:
        main()
