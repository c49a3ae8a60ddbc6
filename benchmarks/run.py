"""``make bench``: every figure with its target, printed and written to benchmarks/results/<machine>.json.

Bundles are built once from seeded random weights (speed does not depend on the values) and kept in .cache/bench. Their
int8 gates are open: these bundles are for timing, and random weights of some architectures do not survive 8 bits.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks import figures, peers, readme_table
from build_scripts.photographs import write_crops
from edge_backbones.bundle import Bundle
from edge_backbones.errors import BundleError
from edge_backbones.runtime.compat import this_host

ROOT = Path(__file__).parents[1]
CACHE = ROOT / ".cache" / "bench"

# Kept stages, and how much faster than torch eager fp32 and ONNX Runtime fp32 the int8 engine has to be.
MODELS: dict[str, tuple[str, float, float]] = {
    "resnet50": ("1,2,3,4", 4.5, 2.3),
    "mobilenetv3_large_100": ("0,1,2,3,4", 5.0, 1.3),
    "convnext_tiny": ("0,1,2,3", 2.6, 2.1),
    "vit_small_patch16_224": ("2,5,8,11", 2.4, 2.3),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7, help="times that every contender is started")
    parser.add_argument(
        "--only",
        choices=(*MODELS, "figures"),
        help="measure the peers of one model, or all else, and keep the other figures",
    )
    parser.add_argument("--rebuild", action="store_true", help="build the bundles again")
    arguments = parser.parse_args()
    photographs = CACHE / "photographs"
    if not photographs.exists():
        write_crops(photographs, 68)
    bundles = {model: build(model, photographs, rebuild=arguments.rebuild) for model in MODELS}

    rows: list[dict[str, Any]] = []
    for model, bundle in bundles.items():
        if arguments.only in (None, model):
            add_peers(rows, model, bundle, arguments.rounds)
    if arguments.only in (None, "figures"):
        add_figures(rows, bundles, photographs)

    path = ROOT / "benchmarks" / "results" / f"{machine_name()}.json"
    if arguments.only is not None:
        again = {row["what"]: row for row in rows}
        before = {row["what"]: row for row in json.loads(path.read_text(encoding="utf-8"))["figures"]}
        rows = list({**before, **again}.values())
    path.write_text(json.dumps({"machine": machine(), "figures": rows}, indent=2) + "\n", encoding="utf-8")
    shown = path.relative_to(ROOT).as_posix()
    readme_table.update(shown)
    print(f"wrote {shown} and the table of README.md")
    sys.exit(0 if all(row["reached"] for row in rows) else 1)


def add_peers(rows: list[dict[str, Any]], model: str, bundle: Path, rounds: int) -> None:
    """How much faster the int8 engine is than its peers."""
    comparison = peers.measure(bundle, rounds=rounds)
    milliseconds = {kind: comparison.milliseconds(kind) for kind in comparison.rounds}
    milliseconds["stolen_share"] = comparison.stolen_share
    for peer, target in zip(("torch", "onnxruntime"), MODELS[model][1:], strict=True):
        ratio = comparison.ratio(peer, "edge")
        add(rows, f"{model}: int8 engine faster than {peer} fp32", ratio, target, "x", at_least=True, **milliseconds)


def add_figures(rows: list[dict[str, Any]], bundles: dict[str, Path], photographs: Path) -> None:
    """Overhead, cold start, import and build."""
    overhead = {model: figures.call_overhead(bundles[model]) for model in ("resnet50", "mobilenetv3_large_100")}
    resnet, mobilenet = overhead["resnet50"], overhead["mobilenetv3_large_100"]
    add(rows, "resnet50: EdgeBackbone over the bare request", resnet["overhead_percent"], 2, "%", **resnet)
    add(
        rows,
        "mobilenetv3_large_100: EdgeBackbone over the bare request",
        mobilenet["overhead_ms"],
        0.1,
        "ms",
        **mobilenet,
    )
    start = figures.cold_start(bundles["resnet50"])
    add(rows, "resnet50: python to first feature maps", start["seconds"], 1.0, "s")
    add(rows, "resnet50: resident memory of that process", start["peak_mb"], 230, "MB")
    add(rows, "import edge_backbones over bare Python", figures.import_cost()["added_ms"], 30, "ms")
    built = figures.resnet50_build(photographs, CACHE / "timed.bundle")
    images = int(built["calibration_images"])
    add(rows, f"resnet50: int8 build with {images} calibration images, after imports", built["seconds"], 120, "s")
    add(rows, "resnet50: resident memory of that build", built["peak_mb"], 4000, "MB")
    calibrated = figures.resnet50_calibration(photographs, bundles["resnet50"])
    add(rows, "resnet50: ranges from 512 calibration images", calibrated["seconds"], 180, "s")
    add(rows, "resnet50: resident memory of that", calibrated["peak_mb"], 2000, "MB")
    seconds = figures.rtx_build(bundles["resnet50"])
    add(rows, "resnet50: int8 plan of TensorRT-RTX for four architectures, no GPU", seconds, 15, "s")


def is_current(bundle: Path) -> bool:
    """Is there a bundle, and of the format of this release?"""
    try:
        Bundle.open(bundle)
    except BundleError:
        return False
    return True


def build(model: str, photographs: Path, *, rebuild: bool) -> Path:
    """A bundle with the int8 engine and the fp32 graph that ONNX Runtime runs."""
    target = CACHE / f"{model}.bundle"
    if rebuild or not is_current(target):
        from edge_backbones import BuildOptions, build_bundle
        from edge_backbones.manifest import Gate
        from edge_backbones.spec import Precision

        print(f"building {target.name}", flush=True)
        indices = tuple(int(index) for index in MODELS[model][0].split(","))
        options = BuildOptions(
            weights="random:0",
            out_indices=indices,
            precisions=(Precision.INT8, Precision.FP32),
            gates={Precision.INT8: Gate()},
            torchscript=False,
        )
        result = build_bundle(model, target, images=photographs, options=options, overwrite=True)
        print(
            "\n".join(f"  {s.stage}: cosine {s.cosine:.4f}, SQNR {s.sqnr_db:.1f} dB" for s in result.reports[0].stages)
        )
    return target


def add(
    rows: list[dict[str, Any]],
    what: str,
    value: float,
    target: float,
    unit: str,
    *,
    at_least: bool = False,
    **raw: float,
) -> None:
    """Record and print one figure beside its target."""
    reached = value >= target if at_least else value <= target
    figure = {"what": what, "value": value, "target": target, "unit": unit, "at_least": at_least, "reached": reached}
    rows.append({**figure, **raw})
    bound = ">=" if at_least else "<="
    print(f"{'ok  ' if reached else 'MISS'} {what}: {value:.2f} {unit} (target {bound} {target:g})", flush=True)


def machine() -> dict[str, Any]:
    host = this_host({})
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    import importlib.metadata

    libraries = ("openvino", "onnxruntime", "torch", "timm", "numpy")
    return {
        "cpu": host.device_name,
        "cpu_features": host.cpu_features,
        "threads": 2,
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in libraries},
        "commit": commit.stdout.strip(),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
    }


def machine_name() -> str:
    host = this_host({})
    return re.sub(
        r"[^a-z0-9]+", "-", f"{host.device_name} {host.cpu_features[-1] if host.cpu_features else ''}".lower()
    ).strip("-")


if __name__ == "__main__":
    main()
