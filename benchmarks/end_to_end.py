"""``python -m benchmarks.end_to_end``: a camera frame to feature maps, our preprocessing against timm's, one network.

Ours: :func:`edge_backbones.images.fit.fit` and an engine that takes uint8 frames, normalisation inside. Theirs: the transform
that timm makes of the network's own configuration, and the same network's int8 engine for normalised floats. The frame is
a photograph, enlarged to 1080 x 1920 pixels and decoded already. Both get the same number of threads, each alone in its
process, in turn; ratios are of one round, and their median counts. Results: benchmarks/results/end_to_end.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import RESULTS, machine, timing_bundle
from edge_backbones import cpus
from edge_backbones.bench.compare import calm_turns
from edge_backbones.bench.contender import stolen_ticks
from edge_backbones.bench.results import ratio_of
from edge_backbones.bundle.reader import Bundle
from edge_backbones.deploy.parity import compare as compare_maps
from edge_backbones.images.fit import fit
from edge_backbones.parity_report import Gate

MODELS: dict[str, tuple[int, ...]] = {
    "resnet50": (1, 2, 3, 4),
    "mobilenetv3_large_100": (0, 1, 2, 3, 4),
    "convnext_tiny": (0, 1, 2, 3),
}
FRAME = (1080, 1920)
TARGET = 1.3
KINDS = {"timm": "pixel_values", "ours": "image"}
_WARM_UP, _CALLS, _SECONDS = 5, 20, 1.5

Step = Callable[[np.ndarray], np.ndarray]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7, help="times that either is started")
    found = measure(rounds=parser.parse_args().rounds)
    path = RESULTS / "end_to_end.json"
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {path}")
    sys.exit(0 if all(figures["reached"] for figures in found["models"].values()) else 1)


def measure(rounds: int = 7, models: Sequence[str] = tuple(MODELS)) -> dict[str, Any]:
    """Return, for each model, timm's time over ours: in total and for each step."""
    threads = min(2, cpus.usable())
    found = {}
    for model in models:
        bundles = {kind: _bundle(model, input) for kind, input in KINDS.items()}
        found[model] = compare(bundles, rounds, threads)
        print(model, json.dumps({key: value for key, value in found[model].items() if key != "rounds"}), flush=True)
    return {"machine": {**machine(), "threads": threads}, "frame": FRAME, "target": TARGET, "models": found}


def _bundle(model: str, input: str) -> Path:
    """Return a bundle of the network. Those of one model differ only in where frames are normalised."""
    return timing_bundle(model, f"{model}.{input}", input=input, out_indices=MODELS[model])


def compare(bundles: dict[str, Path], rounds: int, threads: int) -> dict[str, Any]:
    """Time both contenders in turn, and compare the feature maps of their last turns."""
    taken: list[dict[str, dict[str, float]]] = []
    with tempfile.TemporaryDirectory() as folder:
        for index in range(rounds):
            kinds = list(bundles) if index % 2 else list(reversed(bundles))
            taken.append({kind: _one_turn(kind, bundles[kind], threads, Path(folder)) for kind in kinds})
        maps = {kind: np.load(Path(folder) / f"{kind}.npz") for kind in KINDS}
        stages = Bundle.open(bundles["ours"]).manifest.backbone.out_features
        cosines = [compare_maps(stage, maps["timm"][stage], maps["ours"][stage], Gate()).cosine for stage in stages]
    return {**summary(taken), "worst_cosine": min(cosines), "rounds": taken}


def _one_turn(kind: str, bundle: Path, threads: int, folder: Path) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.end_to_end", "--child", kind, str(bundle), str(threads), str(folder)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def summary(rounds: Sequence[dict[str, dict[str, float]]]) -> dict[str, Any]:
    """Return medians and ratios of the calmer rounds, each a dictionary of figures for ``timm`` and ``ours``."""
    stolen = [max(kind["stolen_share"] for kind in one.values()) for one in rounds]
    calm = [rounds[index] for index in calm_turns(stolen)]
    figures = ("frame_ms", "preprocessing_ms", "engine_ms")
    ratio = {
        name: ratio_of(name, [one["timm"][name] for one in calm], [one["ours"][name] for one in calm])
        for name in figures
    }
    return {
        **{kind: {name: statistics.median(one[kind][name] for one in calm) for name in figures} for kind in KINDS},
        "ratio": ratio["frame_ms"].median,
        "ratio_low": ratio["frame_ms"].low,
        "ratio_high": ratio["frame_ms"].high,
        "preprocessing_ratio": ratio["preprocessing_ms"].median,
        "engine_ratio": ratio["engine_ms"].median,
        "reached": ratio["frame_ms"].median >= TARGET,
    }


# ---- One of the two, alone in its process


def child_main(kind: str, path: str, threads: str, folder: str) -> None:
    """Print the medians of a turn as JSON, and write the feature maps to ``folder``."""
    from edge_backbones import EdgeBackbone

    bundle = Bundle.open(Path(path))
    preprocess = {"timm": timm_transform, "ours": our_transform}[kind](bundle, int(threads))
    image = frame()
    rows = []
    with EdgeBackbone.from_pretrained(path, engine="int8", threads=int(threads)) as backbone:
        maps = backbone(preprocess(image)).feature_maps
        np.savez(Path(folder) / f"{kind}.npz", **dict(zip(backbone.out_features, maps, strict=True)))
        for _ in range(_WARM_UP):
            backbone(preprocess(image))
        stolen, total = stolen_ticks()
        begin = time.perf_counter()
        while len(rows) < _CALLS or time.perf_counter() - begin < _SECONDS:
            start = time.perf_counter()
            ready = preprocess(image)
            between = time.perf_counter()
            backbone(ready)
            rows.append((time.perf_counter() - start, between - start, time.perf_counter() - between))
        stolen_after, total_after = stolen_ticks()
    medians = 1e3 * np.median(rows, axis=0)
    figures = dict(zip(("frame_ms", "preprocessing_ms", "engine_ms"), medians.tolist(), strict=True))
    print(json.dumps({**figures, "stolen_share": (stolen_after - stolen) / max(1, total_after - total)}))


def frame() -> np.ndarray:
    """Return the middle of a photograph, enlarged: uint8 (1080, 1920, 3)."""
    from PIL import Image, ImageOps

    from build_scripts.photographs import photographs

    return np.array(ImageOps.fit(photographs()["china"], FRAME[::-1], Image.Resampling.BICUBIC))


def our_transform(bundle: Bundle, threads: int) -> Step:
    """Return a function from a frame to uint8 (1, height, width, 3); the graph normalises it."""
    image, input = bundle.manifest.image, bundle.manifest.input
    return lambda pixels: fit(pixels, image, input.height.opt, input.width.opt, threads)[None]


def timm_transform(bundle: Bundle, threads: int) -> Step:
    """Return timm's own transform: from a frame to float32 (1, 3, height, width)."""
    import timm
    import torch
    from PIL import Image

    torch.set_num_threads(threads)
    config = timm.data.resolve_data_config(
        pretrained_cfg=timm.get_pretrained_cfg(bundle.manifest.source.name).to_dict()
    )
    transform = timm.data.create_transform(**config, is_training=False)
    return lambda pixels: transform(Image.fromarray(pixels))[None].numpy()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child_main(*sys.argv[2:])
    else:
        main()
