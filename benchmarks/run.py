"""``make bench``: every figure with its target, printed and written to benchmarks/results/<machine>.json.

The networks and their bundles are those of benchmarks/networks.py.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from benchmarks import camera, end_to_end, figures, growth, networks, readme_table, roofline
from benchmarks.common import CACHE, RESULTS, ROOT, add, machine, machine_name, photograph_folder, say
from edge_backbones.bench.compare import CompareOptions, compare, measure, read_images
from edge_backbones.bench.contender import Task
from edge_backbones.bench.results import Comparison, Ratio, ratio_of, regressions
from edge_backbones.bundle.reader import Bundle
from edge_backbones.engines.openvino.compile import computes_in
from edge_backbones.errors import InputError
from edge_backbones.spec import Precision

MODELS = tuple(networks.STAGES)
QUICK = ("mobilenetv3_large_100", "efficientnet_b0")
TARGETS = {"torch": 3.5, "torch-compile": 2.0, "onnxruntime": 2.0}  # of the geometric means
OPENVINO_PEERS = ("openvino", "nncf", "nncf-f32")  # the fastest of them is the peer to be ahead of
BEST_PEER, BEST_PEER_MEAN, DECIBELS_AHEAD = 1.0, 1.05, 2.0
BF16, BF16_SQNR_DB = 1.6, 25.0
CHANNELS_LAST = 1.04
PEERS = ("bf16", "fp32", "torch", "torch-compile", "torchscript", "onnxruntime", "openvino-f32", *OPENVINO_PEERS)
PARTS = ("figures", "channels_last", "growth", "end_to_end", "camera")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=15, help="turns of every contender")
    parser.add_argument(
        "--only", nargs="+", choices=(*MODELS, *PARTS), help="measure these, and keep the other figures"
    )
    parser.add_argument("--quick", action="store_true", help="two networks and the short figures; nothing is stored")
    parser.add_argument("--nncf", help="Python that has NNCF; without one it is listed as absent")
    parser.add_argument("--rebuild", action="store_true", help="build the bundles again")
    arguments = parser.parse_args()
    path = RESULTS / f"{machine_name()}.json"
    stored = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}  # what --only does not measure stays
    wanted = arguments.only or ([*QUICK, *PARTS] if arguments.quick else [*MODELS, *PARTS])

    of_figures = {"figures": ("resnet50", "mobilenetv3_large_100"), "channels_last": ("resnet50",)}
    needed = [m for m in MODELS if m in wanted or any(m in of_figures.get(part, ()) for part in wanted)]
    if arguments.quick:
        needed = [m for m in needed if m in QUICK]
    bundles = {model: networks.bundle_of(model, rebuild=arguments.rebuild) for model in needed}

    comparisons: dict[str, Comparison] = {}
    for model in (m for m in MODELS if m in wanted):
        comparisons[model] = compare_model(model, bundles[model], arguments)
        show(comparisons[model], stored.get("comparisons", {}).get(model))
    rooflines = roofline_of(comparisons, bundles)
    rows: list[dict[str, Any]] = []
    for model, comparison in comparisons.items():
        add_best_peer(rows, model, comparison)
        add_bf16(rows, model, comparison)
    if "channels_last" in wanted and not arguments.quick:
        say("maps in channels-last memory")
        add_channels_last(rows, bundles["resnet50"], arguments)
    if "figures" in wanted:
        say("overhead, cold start, build")
        add_figures(rows, bundles, quick=arguments.quick)
    if "end_to_end" in wanted:
        say("camera frames to feature maps")
        add_end_to_end(rows, quick=arguments.quick)
    if "camera" in wanted:
        say("whole frames of a camera")
        add_camera(rows, quick=arguments.quick)
    if "growth" in wanted:
        say("growth")
        laws = growth.measure(quick=arguments.quick)
        if not arguments.quick:
            growth.draw(laws, RESULTS / "growth.png")
            (RESULTS / "growth.json").write_text(json.dumps(laws, indent=1) + "\n", encoding="utf-8")
    if arguments.quick:
        add_means(rows, comparisons)
        say("done")
        sys.exit(0 if all(row["reached"] for row in rows) else 1)

    everybody = {**stored.get("comparisons", {}), **{m: msgspec.to_builtins(c) for m, c in comparisons.items()}}
    add_means(rows, {m: msgspec.convert(everybody[m], Comparison) for m in MODELS if m in everybody})
    again = {row["what"]: row for row in rows}
    before = {row["what"]: row for row in stored.get("figures", ()) if arguments.only}
    results = {
        "machine": machine(),
        "comparisons": {m: everybody[m] for m in MODELS if m in everybody},
        "rooflines": {**stored.get("rooflines", {}), **rooflines},
        "figures": list({**before, **again}.values()),
    }
    path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    say("done")
    shown = path.relative_to(ROOT).as_posix()
    readme_table.update(shown)
    print(f"wrote {shown} and the tables of README.md and benchmarks/README.md")
    sys.exit(0 if all(row["reached"] for row in rows) else 1)


def compare_model(model: str, bundle: Path, arguments: argparse.Namespace) -> Comparison:
    """Compare the engine that the runtime takes with every peer: batch 1, two threads."""
    say(f"comparing {model}")
    options = CompareOptions(
        vs=PEERS,
        allow_host_code=True,  # the bundle is built here
        threads=2,
        turns=7 if arguments.quick else arguments.turns,
        seconds=0.4,  # short: a machine changes its pace, and contenders of one turn should meet the same
        calls=4,
        images=read_images(networks.images_of(model), Bundle.open(bundle)),
        pythons={} if arguments.nncf is None else {"nncf": arguments.nncf},
        repository=ROOT,
    )
    return compare(bundle, options)


def show(comparison: Comparison, stored: dict[str, Any] | None) -> None:
    """Print one line per contender, and what was lost against the stored results."""
    ratios = {ratio.name: ratio for ratio in comparison.ratios}
    for m in comparison.measurements:
        ratio = ratios.get(m.name)
        told = "" if ratio is None else f", {ratio.median:.2f} times ours ({ratio.low:.2f} to {ratio.high:.2f})"
        quality = "" if m.worst_sqnr_db is None else f", SQNR {m.worst_sqnr_db:.1f} dB"
        print(f"  {m.name}: {m.missing or f'{m.median_ms:.2f} ms{told}{quality}'}", flush=True)
    if stored is not None:
        try:
            lost = regressions(comparison, msgspec.convert(stored, Comparison))
        except (InputError, msgspec.ValidationError) as error:  # what was measured is kept all the same
            print(f"  not compared with the stored results: {error}", flush=True)
        else:
            print("".join(f"  LOST {phrase}\n" for phrase in lost), end="", flush=True)


def roofline_of(comparisons: Mapping[str, Comparison], bundles: Mapping[str, Path]) -> dict[str, Any]:
    """Return what share of this machine's ceilings OpenVINO reaches with each graph of a bundle."""
    if not comparisons:
        return {}
    ceilings = roofline.measure_ceilings(2)
    found: dict[str, Any] = {}
    for model, comparison in comparisons.items():
        batch = comparison.input_shape[0]
        measured = {m.name: m.median_ms for m in comparison.measurements}
        of_model = found.setdefault(model, {})
        for precision, name in {comparison.precision: "edge", "fp32": "fp32"}.items():
            if (milliseconds := measured[name]) is None or precision == "bf16":
                continue  # that contender failed, and its line says so; the ceilings are of int8 and fp32 alone
            work = roofline.count_graph(bundles[model] / "graphs" / f"{precision}.onnx", comparison.input_shape)
            reached = roofline.roofline(work, ceilings, milliseconds, batch)
            of_model[precision] = {"work": msgspec.to_builtins(work), "ceilings": msgspec.to_builtins(ceilings)}
            of_model[precision] |= msgspec.to_builtins(reached)
            percent = 100 * reached.fraction
            print(f"{model} {precision}: {percent:.0f} % of the roofline, bound by {reached.bound}", flush=True)
    return found


def add_best_peer(rows: list[dict[str, Any]], model: str, comparison: Comparison) -> None:
    """Add the time of the fastest peer of OpenVINO's over ours, turn by turn, and by how much our SQNR is above NNCF's."""
    ran = {m.name: m for m in comparison.measurements if not m.missing}
    peers = [ran[name] for name in OPENVINO_PEERS if name in ran]
    if not peers:
        return
    ours = ran["edge"]
    fastest = min(peers, key=lambda m: m.median_ms or math.inf)
    ratio = ratio_of(fastest.name, fastest.turns, ours.turns)
    what = f"{model}: the fastest of OpenVINO and NNCF over ours"
    add(rows, what, ratio.median, BEST_PEER, "x", at_least=True, low=ratio.low, high=ratio.high)
    theirs = [ran[name].worst_sqnr_db for name in ("nncf", "nncf-f32") if name in ran]
    if ours.worst_sqnr_db is not None and None not in theirs and theirs:
        ahead = ours.worst_sqnr_db - max(value for value in theirs if value is not None)
        add(rows, f"{model}: SQNR of the worst map, ours over NNCF's", ahead, DECIBELS_AHEAD, "dB", at_least=True)


def add_bf16(rows: list[dict[str, Any]], model: str, comparison: Comparison) -> None:
    """Add the time of our fp32 engine over that of bf16, where this CPU has instructions for bf16."""
    ran = {m.name: m for m in comparison.measurements if not m.missing}
    if "bf16" not in ran or "fp32" not in ran or computes_in(Precision.BF16) is not Precision.BF16:
        return
    ratio = ratio_of("fp32", ran["fp32"].turns, ran["bf16"].turns)
    what = f"{model}: our fp32 engine over our bf16 engine"
    add(rows, what, ratio.median, BF16, "x", at_least=True, low=ratio.low, high=ratio.high)
    if (decibels := ran["bf16"].worst_sqnr_db) is not None:
        add(rows, f"{model}: SQNR of the worst map in bf16", decibels, BF16_SQNR_DB, "dB", at_least=True)


def add_channels_last(rows: list[dict[str, Any]], bundle: Path, arguments: argparse.Namespace) -> None:
    """Add the time of resnet50's int8 engine over that of one whose maps lie in channels-last memory."""
    other = networks.channels_last_bundle_of("resnet50", rebuild=arguments.rebuild)
    tasks = {
        name: Task(peer="edge", bundle=str(path), engine=int8_engine(path), threads=2)
        for name, path in (("channels-last", other), ("nchw", bundle))
    }
    measured = measure(tasks, CompareOptions(turns=2 * arguments.turns, calls=4, seconds=0.4))
    ratio = ratio_of("nchw", measured["nchw"].turns, measured["channels-last"].turns)
    what = "resnet50: int8 with NCHW maps over channels-last maps"
    add(rows, what, ratio.median, CHANNELS_LAST, "x", at_least=True, low=ratio.low, high=ratio.high)


def int8_engine(bundle: Path) -> str:
    """Return the name of a bundle's int8 engine."""
    return next(e.name for e in Bundle.open(bundle).manifest.engines if e.key.precision is Precision.INT8)


def add_means(rows: list[dict[str, Any]], comparisons: Mapping[str, Comparison]) -> None:
    """Add the geometric means, over the networks, of a peer's time over ours.

    ``low`` and ``high`` are the means of the bounds of the networks, which lie further apart than the bounds of the
    mean. Targets count only for all networks.
    """
    targets = {**TARGETS, "the fastest of OpenVINO and NNCF": BEST_PEER_MEAN}
    for peer, target in targets.items():
        found = [ratio for c in comparisons.values() if (ratio := ratio_to(peer, c)) is not None]
        if found:
            bounds = {
                name: math.exp(statistics.mean(math.log(getattr(ratio, name)) for ratio in found))
                for name in ("median", "low", "high")
            }
            what = f"{peer}: its time over ours, geometric mean of {len(found)} networks"
            if len(found) == len(MODELS):
                add(rows, what, bounds.pop("median"), target, "x", at_least=True, **bounds)
            else:
                print(
                    f"     {what}: {bounds['median']:.2f} x ({bounds['low']:.2f} to {bounds['high']:.2f})", flush=True
                )


def ratio_to(peer: str, comparison: Comparison) -> Ratio | None:
    """Return the ratio to a peer, or to the fastest of OpenVINO's; None if it did not run."""
    ratios = [
        ratio
        for ratio in comparison.ratios
        if ratio.name == peer or (peer not in PEERS and ratio.name in OPENVINO_PEERS)
    ]
    return min(ratios, key=lambda ratio: ratio.median, default=None)


def add_end_to_end(rows: list[dict[str, Any]], *, quick: bool) -> None:
    """Add the figures from a camera frame to feature maps: our preprocessing against timm's transforms."""
    models = [model for model in end_to_end.MODELS if not quick or model in QUICK]
    found = end_to_end.measure(rounds=3 if quick else 7, models=models)
    if not quick:
        (RESULTS / "end_to_end.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    for model, figure in found["models"].items():
        add(
            rows,
            f"{model}: 1080p frame to feature maps, timm's transforms over ours",
            figure["ratio"],
            1.3,
            "x",
            at_least=True,
        )


def add_camera(rows: list[dict[str, Any]], *, quick: bool) -> None:
    """Add the figures of graphs that take whole frames of a camera."""
    found = camera.measure(rounds=3 if quick else 7)
    if not quick:
        (RESULTS / "camera.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    what = {
        "rgb": "1080p RGB frame, preprocessing in the graph over fit and engine",
        "nv12": "1080p NV12 frame, preprocessing in the graph over conversion, fit and engine",
        "jpeg": "1080p JPEG frames, a loop over backbone.map",
    }
    for name, figure in found["comparisons"].items():
        bounds = {"low": figure["ratio_low"], "high": figure["ratio_high"]}
        said, at_least = f"{camera.MODEL}: {what[name]}", figure["bound"] == "at least"
        add(rows, said, figure["ratio"], figure["target"], "x", at_least=at_least, **bounds)
    for size, seconds in found["rtx_seconds"].items():
        add(rows, f"{camera.MODEL}: int8 plan of TensorRT-RTX for {size} RGB frames", seconds, camera.RTX_TARGET, "s")


def add_figures(rows: list[dict[str, Any]], bundles: dict[str, Path], *, quick: bool) -> None:
    """Add overhead, cold start, import time and build time."""
    mobilenet = figures.call_overhead(bundles["mobilenetv3_large_100"])
    add(
        rows,
        "mobilenetv3_large_100: EdgeBackbone over the bare request",
        mobilenet["overhead_ms"],
        0.1,
        "ms",
        **mobilenet,
    )
    add(rows, "import edge_backbones over bare Python", figures.import_cost()["added_ms"], 30, "ms")
    if quick:
        return
    resnet = figures.call_overhead(bundles["resnet50"])
    add(rows, "resnet50: EdgeBackbone over the bare request", resnet["overhead_percent"], 2, "%", **resnet)
    start = figures.cold_start(bundles["resnet50"])
    add(rows, "resnet50: python to first feature maps", start["seconds"], 1.0, "s")
    add(rows, "resnet50: resident memory of that process", start["peak_mb"], 230, "MB")
    photographs = photograph_folder(64 + 4)
    built = figures.resnet50_build(photographs, CACHE / "timed.bundle")
    images = int(built["calibration_images"])
    add(rows, f"resnet50: int8 build with {images} calibration images, after imports", built["seconds"], 120, "s")
    add(rows, "resnet50: resident memory of that build", built["peak_mb"], 4000, "MB")
    calibrated = figures.resnet50_calibration(photograph_folder(512), bundles["resnet50"])
    add(rows, "resnet50: calibration by auto on 512 images", calibrated["seconds"], 180, "s")
    add(rows, "resnet50: resident memory of that", calibrated["peak_mb"], 2000, "MB")
    seconds = figures.rtx_build(bundles["resnet50"])
    add(rows, "resnet50: int8 plan of TensorRT-RTX for four architectures, no GPU", seconds, 15, "s")


if __name__ == "__main__":
    main()
