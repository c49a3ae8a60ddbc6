"""``python -m benchmarks.growth [--quick]``: how latency, memory and build time grow, with fitted laws and one picture.

Latency and resident memory of the int8 engine against batch, resolution, kept stages and threads; build time against
calibration images and parameters. Every point is one process with nothing else in it; points take turns over several
rounds, and medians count. Each curve is fitted by least squares with the law that is natural for it: a fixed cost and one
per unit, or a power law (in logarithms). A curve of fewer than three points has no law, since any law passes through two.
Results: benchmarks/results/growth.json and growth.png, of --quick in .cache/bench. ``--redraw`` measures nothing: it fits
and draws the stored points anew.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import CACHE, FEW_IMAGES, RESULTS, machine, photograph_folder, timing_bundle, timing_options
from edge_backbones import cpus

BATCHES = (1, 2, 4, 8, 16, 32)
SIDES = (160, 224, 320, 448, 640)
STAGES = 5
IMAGES = (4, 8, 16, 32)
NETWORKS = ("mobilenetv3_small_050", "mobilenetv3_large_100", "resnet18", "resnet50")
LEAST_POINTS = 3  # any law with two parameters passes through two points, whatever the truth is
_CALLS, _SECONDS = 8, 0.4


@dataclass(frozen=True)
class Curve:
    """A curve to draw and fit: ``law`` in ``variable``, a function of the axis.

    ``per``: the word for one unit of the variable.
    """

    title: str
    x_name: str
    y_name: str
    law: str
    per: str
    variable: str = "x"


VARIABLES = {"x": lambda x: x, "megapixels": lambda x: x**2 / 1e6, "1 / x": lambda x: 1 / x}
CURVES: dict[tuple[str, str], Curve] = {
    ("batch", "milliseconds"): Curve("Latency against batch", "images per call", "ms", "linear", "image"),
    ("batch", "resident_mb"): Curve("Memory against batch", "images per call", "MB", "linear", "image"),
    ("side", "milliseconds"): Curve("Latency against resolution", "pixels per side", "ms", "power", "side"),
    ("side", "resident_mb"): Curve(
        "Memory against resolution", "pixels per side", "MB", "linear", "megapixel", "megapixels"
    ),
    ("stages", "milliseconds"): Curve("Latency against kept stages", "first stages kept", "ms", "linear", "stage"),
    ("stages", "resident_mb"): Curve("Memory against kept stages", "first stages kept", "MB", "linear", "stage"),
    ("threads", "milliseconds"): Curve("Latency against threads", "threads", "ms", "linear", "1 / threads", "1 / x"),
    ("threads", "resident_mb"): Curve("Memory against threads", "threads", "MB", "linear", "thread"),
    ("images", "seconds"): Curve("Build time against calibration images", "images", "s", "linear", "image"),
    ("parameters", "seconds"): Curve("Build time against parameters", "million parameters", "s", "power", "parameters"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few points of a smaller network, once each")
    parser.add_argument("--redraw", action="store_true", help="measure nothing: fit and draw the stored points anew")
    arguments = parser.parse_args()
    path = (CACHE if arguments.quick else RESULTS) / "growth.json"
    found = refit(json.loads(path.read_text(encoding="utf-8"))) if arguments.redraw else measure(quick=arguments.quick)
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    draw(found, path.with_suffix(".png"))
    for curve in found["curves"]:
        print(f"{curve['title']}: {curve['words']}")
    print(f"wrote {path} and {path.with_suffix('.png').name}")


def measure(*, quick: bool = False) -> dict[str, Any]:
    """Measure and fit all curves. Bundles that are up to date are not built again."""
    started = time.perf_counter()
    model = "mobilenetv3_small_100" if quick else "resnet18"
    turns = 1 if quick else 3
    latencies = latency_points(model, quick=quick, cores=cpus.usable())
    points: dict[str, list[dict[str, Any]]] = {}
    for axis, found in [*_in_turn("point", latencies, turns), *_in_turn("build", build_points(model, quick=quick), 1)]:
        points.setdefault(axis, []).append(found)
    return {
        "machine": machine(),
        "model": model,
        "quick": quick,
        "rounds": turns,
        "seconds": round(time.perf_counter() - started, 1),
        "curves": [curve for axis, found in points.items() for curve in curves(axis, found)],
    }


def refit(stored: dict[str, Any]) -> dict[str, Any]:
    """Return stored results with each curve fitted anew to its stored points."""
    fitted = [
        described(curve["axis"], curve["figure"], [(x, y) for x, y in curve["points"]]) for curve in stored["curves"]
    ]
    return {**stored, "curves": fitted}


# ---- Points


def some(values: Sequence[int], quick: bool) -> tuple[int, ...]:
    """Return all values, or for a quick run the first, the middle and the last."""
    return tuple(dict.fromkeys((values[0], values[len(values) // 2], values[-1]))) if quick else tuple(values)


def thread_counts(cores: int) -> tuple[int, ...]:
    """Return the powers of two up to the number of cores, and that number."""
    return tuple(dict.fromkeys([*(2**p for p in range(cores.bit_length()) if 2**p <= cores), cores]))


def latency_points(model: str, *, quick: bool, cores: int) -> list[tuple[str, float | None, dict[str, Any]]]:
    """Build the bundles, and return (axis, x, arguments of `run_point`) for each point."""
    from edge_backbones.spec import ShapeRange

    every, threads = tuple(range(STAGES)), min(2, cores)
    batches = ShapeRange(min=1, opt=1, max=BATCHES[-1])
    sides = ShapeRange(min=SIDES[0], opt=224, max=SIDES[-1])
    by_batch = str(timing_bundle(model, f"{model}.batches", out_indices=every, batch=batches))
    by_side = str(timing_bundle(model, f"{model}.sides", out_indices=every, height=sides, width=sides))
    found: list[tuple[str, float | None, dict[str, Any]]] = []
    for batch in some(BATCHES, quick):
        found.append(("batch", batch, {"bundle": by_batch, "shape": (batch, 3, 224, 224), "threads": threads}))
    for side in some(SIDES, quick):
        found.append(("side", side, {"bundle": by_side, "shape": (1, 3, side, side), "threads": threads}))
    for count in (1, STAGES) if quick else range(1, STAGES + 1):
        bundle = str(timing_bundle(model, f"{model}.{count}_stages", out_indices=every[:count]))
        found.append(("stages", count, {"bundle": bundle, "shape": (1, 3, 224, 224), "threads": threads}))
    for count in thread_counts(cores):
        found.append(("threads", count, {"bundle": by_batch, "shape": (1, 3, 224, 224), "threads": count}))
    return found


def build_points(model: str, *, quick: bool) -> list[tuple[str, float | None, dict[str, Any]]]:
    """Return (axis, x, arguments of `run_build`); x is None if it is known only after the build (parameters)."""
    images, networks = ((IMAGES[0], IMAGES[-1]), ()) if quick else (IMAGES, NETWORKS)
    found: list[tuple[str, float | None, dict[str, Any]]] = []
    found += [("images", count, {"model": model, "images": count}) for count in images]
    found += [("parameters", None, {"model": name, "images": FEW_IMAGES}) for name in networks]
    return found


def _in_turn(
    task: str, points: Sequence[tuple[str, float | None, dict[str, Any]]], turns: int
) -> list[tuple[str, dict[str, Any]]]:
    """Measure all points in rounds, one process at a time, and return the axis and the medians of each.

    Points with the same arguments on two axes are measured once.
    """
    answers: dict[str, list[dict[str, float]]] = {json.dumps(arguments): [] for _, _, arguments in points}
    for _ in range(turns):
        for arguments, found in answers.items():
            command = [sys.executable, "-m", "benchmarks.growth", "--child", task, arguments]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            found.append(json.loads(done.stdout.splitlines()[-1]))
    medians = {
        arguments: {key: statistics.median(answer[key] for answer in found) for key in found[0]}
        for arguments, found in answers.items()
    }
    return [(axis, {"x": x, **medians[json.dumps(arguments)]}) for axis, x, arguments in points]


# ---- One point, alone in its process


def run_point(bundle: str, shape: Sequence[int], threads: int) -> dict[str, float]:
    """Return the median milliseconds of a call, and the resident MB that loading and calling added."""
    import psutil

    from edge_backbones import EdgeBackbone

    images = np.random.default_rng(0).standard_normal(tuple(shape)).astype(np.float32)
    process = psutil.Process()
    before = process.memory_info().rss
    with EdgeBackbone.from_pretrained(bundle, engine="int8", threads=threads) as backbone:
        for _ in range(3):
            backbone(images)
        taken: list[float] = []
        while len(taken) < _CALLS or sum(taken) < 1e3 * _SECONDS:
            start = time.perf_counter()
            backbone(images)
            taken.append(1e3 * (time.perf_counter() - start))
        return {"milliseconds": statistics.median(taken), "resident_mb": (process.memory_info().rss - before) / 1e6}


def run_build(model: str, images: int) -> dict[str, float]:
    """Return the seconds of an int8 build without imports, and the backbone's parameters in millions."""
    import tempfile

    import onnx  # imported before the clock starts
    import onnxscript  # noqa: F401
    import timm  # noqa: F401

    from edge_backbones import build_bundle
    from edge_backbones.engines.onnxruntime.library import onnxruntime  # noqa: F401
    from edge_backbones.engines.openvino.session import load_library
    from edge_backbones.spec import Precision

    load_library()
    folder = photograph_folder(images)
    with tempfile.TemporaryDirectory() as work:
        options = timing_options({"precisions": (Precision.INT8, Precision.FP32)})
        start = time.perf_counter()
        built = build_bundle(model, Path(work) / "timed.bundle", images=folder, options=options).bundle
        seconds = time.perf_counter() - start
        weights = onnx.load(built.path / "graphs" / "fp32.onnx").graph.initializer
        return {"seconds": seconds, "parameters": sum(int(np.prod(weight.dims)) for weight in weights) / 1e6}


# ---- Laws


def fit_linear(x: Sequence[float], y: Sequence[float]) -> dict[str, Any]:
    """Fit ``y = fixed + slope * x``; return it with standard errors (None for two points) and R2."""
    (fixed, slope), errors, r2 = _least_squares(x, y)
    return {
        "law": "linear",
        "fixed": fixed,
        "fixed_error": errors[0],
        "slope": slope,
        "slope_error": errors[1],
        "r2": r2,
    }


def fit_power(x: Sequence[float], y: Sequence[float]) -> dict[str, Any]:
    """Fit ``y = factor * x ** exponent`` by least squares in logarithms; R2 is that of the logarithms."""
    (factor, exponent), errors, r2 = _least_squares(np.log(x), np.log(y))
    return {
        "law": "power",
        "factor": float(np.exp(factor)),
        "exponent": exponent,
        "exponent_error": errors[1],
        "r2": r2,
    }


def _least_squares(
    x: Sequence[float] | np.ndarray, y: Sequence[float] | np.ndarray
) -> tuple[tuple[float, float], tuple[float | None, float | None], float | None]:
    design = np.stack([np.ones(len(x)), np.asarray(x, float)], axis=1)
    values = np.asarray(y, float)
    found = np.linalg.lstsq(design, values, rcond=None)[0]
    left = values - design @ found
    spread = float(((values - values.mean()) ** 2).sum())
    errors: tuple[float | None, float | None] = (None, None)
    if len(x) > 2:
        covariance = float(left @ left) / (len(x) - 2) * np.linalg.inv(design.T @ design)
        errors = (float(covariance[0, 0] ** 0.5), float(covariance[1, 1] ** 0.5))
    r2 = 1 - float(left @ left) / spread if spread and len(x) > 2 else None
    return (float(found[0]), float(found[1])), errors, r2


def curves(axis: str, points: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the curves of an axis that was measured in at least two places: points, fit and the law in words."""
    x_key = "parameters" if axis == "parameters" else "x"
    if len({point[x_key] for point in points}) < 2:
        return []
    return [
        described(axis, figure, [(point[x_key], point[figure]) for point in points])
        for of, figure in CURVES
        if of == axis
    ]


def described(axis: str, figure: str, points: Sequence[tuple[float, float]]) -> dict[str, Any]:
    """Return one curve: its points in order, its fit, None for fewer than LEAST_POINTS, and the law in words."""
    curve, ordered = CURVES[axis, figure], sorted(points)
    fit = None
    if len({x for x, _ in ordered}) >= LEAST_POINTS:
        x = np.array([x for x, _ in ordered], float)
        fit = (fit_power if curve.law == "power" else fit_linear)(VARIABLES[curve.variable](x), [y for _, y in ordered])
    return {
        "axis": axis,
        "figure": figure,
        "title": curve.title,
        "x_name": curve.x_name,
        "y_name": curve.y_name,
        "variable": curve.variable,
        "points": [list(point) for point in ordered],
        "fit": fit,
        "words": words(fit, curve) if fit else without_law(ordered, curve),
    }


def without_law(points: Sequence[tuple[float, float]], curve: Curve) -> str:
    """Say what was measured where a law cannot be told: ``2 points, 12.5 and 7.58 ms: too few for a law``."""
    values = " and ".join(f"{y:.3g}" for _, y in points)
    return f"{len(points)} points, {values} {curve.y_name}: too few for a law"


def words(fit: dict[str, Any], curve: Curve) -> str:
    """Return a fit in words: ``4.1 ms + 7.9 ± 0.1 ms per image, R² 0.999``."""
    r2 = "" if fit["r2"] is None else f", R² {fit['r2']:.3f}"
    if fit["law"] == "power":
        return f"{curve.y_name} ∝ {curve.per}^({_with_error(fit['exponent'], fit['exponent_error'])}){r2}"
    sign = "-" if fit["slope"] < 0 else "+"
    slope = _with_error(abs(fit["slope"]), fit["slope_error"])
    per = (
        f"{slope} {curve.y_name} per {curve.per}" if curve.variable != "1 / x" else f"{slope} {curve.y_name} / threads"
    )
    return f"{fit['fixed']:.3g} {curve.y_name} {sign} {per}{r2}"


def _with_error(value: float, error: float | None) -> str:
    """Format a value to the second digit of its error."""
    if error is None:
        return f"{value:.3g}"
    digits = max(0, 1 - int(np.floor(np.log10(error)))) if error > 0 else 3
    return f"{value:.{min(digits, 4)}f} ± {error:.{min(digits, 4)}f}"


def predict(curve: dict[str, Any], x: np.ndarray) -> np.ndarray:
    """Return the values of the fitted law at ``x``."""
    variable, fit = VARIABLES[curve["variable"]](x), curve["fit"]
    if fit["law"] == "power":
        return np.asarray(fit["factor"] * variable ** fit["exponent"])
    return np.asarray(fit["fixed"] + fit["slope"] * variable)


# ---- The picture


def draw(results: dict[str, Any], path: Path) -> None:
    """Draw one panel per curve: the points, the fitted law as a line, and the law in words.

    A curve without a law has its points alone, and says how many there are.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    found = results["curves"]
    columns = min(2, len(found))  # latency and memory of an axis beside each other
    rows = -(-len(found) // columns)
    figure = Figure(figsize=(4.8 * columns, 2.7 * rows + 0.6), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    threads = min(2, int(results["machine"]["threads"]))
    figure.suptitle(f"How {results['model']} grows: int8, {threads} threads, {results['machine']['cpu']}", fontsize=13)
    for index, curve in enumerate(found):
        axes = figure.add_subplot(rows, columns, index + 1)
        x, y = np.array(curve["points"], float).T
        if curve["fit"] and curve["fit"]["law"] == "power":
            axes.set_xscale("log")
            axes.set_yscale("log")
            heights = np.geomspace(y.min(), y.max(), 4)
            axes.set_yticks(heights, [f"{height:.0f}" if height >= 100 else f"{height:.2g}" for height in heights])
            axes.set_yticks([], minor=True)
            at = np.geomspace(x.min(), x.max(), 100)
        else:
            at = np.linspace(x.min(), x.max(), 100)
            axes.set_ylim(0, 1.15 * max(y.max(), 1e-9))
        if curve["fit"]:
            axes.plot(at, predict(curve, at), color="#8aa4c8", linewidth=2, zorder=1)
        axes.plot(x, y, "o", color="#1f3d6e", markersize=6, zorder=2)
        axes.set_title(f"{curve['title']}\n", fontsize=11, loc="left", fontweight="bold")
        axes.text(0, 1.03, curve["words"], transform=axes.transAxes, fontsize=9, color="#444444")
        axes.set_xlabel(curve["x_name"])
        axes.set_ylabel({"ms": "milliseconds", "s": "seconds", "MB": "resident MB added"}[curve["y_name"]])
        ticks = x if len(x) <= 6 else x[:: len(x) // 6 + 1]
        axes.set_xticks(ticks, [f"{tick:.3g}" for tick in ticks])
        axes.set_xticks([], minor=True)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        print(json.dumps({"point": run_point, "build": run_build}[sys.argv[2]](**json.loads(sys.argv[3]))))
    else:
        main()
