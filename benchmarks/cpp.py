"""``python -m benchmarks.cpp``: how long a call, a load and a start take in C++ and in Python, for the same engine.

Processes of both languages run by turns. A start is the time from the creation of a process to its first feature maps, as a
parent sees it. A load is `from_pretrained` alone: in Python it imports OpenVINO, which a program in C++ is linked with. Most
of both is OpenVINO's import_model. Results: benchmarks/results/cpp.json. The aims: a call takes at most 1.02 times as long as
in Python, and a start at most half as long.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.common import RESULTS, ROOT, machine, timing_bundle
from edge_backbones import get_cmake_dir

MODELS = {"mobilenetv3_large_100": (0, 1, 2, 3, 4), "resnet50": (1, 2, 3, 4)}
MOST_CALL, MOST_START = 1.02, 0.5
_PYTHON = """
import json, sys, time
begun = time.perf_counter()
import numpy as np
from edge_backbones import EdgeBackbone
imported = time.perf_counter()
backbone = EdgeBackbone.from_pretrained(sys.argv[1], engine=sys.argv[2], device="cpu")
load = time.perf_counter() - imported
pixels = np.random.default_rng(0).uniform(-1, 1, backbone.input.opt_shape).astype(np.float32)
backbone(pixels)
print("first", flush=True)
for _ in range(int(sys.argv[4])):
    backbone(pixels)
calls = []
for _ in range(int(sys.argv[3])):
    start = time.perf_counter()
    maps = backbone(pixels)
    calls.append(time.perf_counter() - start)
print(json.dumps({"load": load, "calls": calls}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15, help="processes of each language")
    parser.add_argument("--calls", type=int, default=100, help="calls that each process times")
    parser.add_argument(
        "--bundle", type=Path, action="append", help="measure this bundle, and store nothing; repeatable"
    )
    arguments = parser.parse_args()
    bundles = arguments.bundle or [
        timing_bundle(model, f"cpp.{model}", out_indices=stages, precisions=("int8", "fp32"))
        for model, stages in MODELS.items()
    ]
    with tempfile.TemporaryDirectory() as folder:
        program = build_program(Path(folder))
        rows = [
            measure(program, bundle, engine, arguments.rounds, arguments.calls)
            for bundle in bundles
            for engine in ("int8", "fp32")
        ]
    for row in rows:
        print(json.dumps(row))
    if not arguments.bundle:
        path = RESULTS / "cpp.json"
        path.write_text(json.dumps({"machine": machine(), "figures": rows}, indent=1) + "\n", encoding="utf-8")
        print(f"wrote {path.relative_to(ROOT).as_posix()}")
    sys.exit(0 if all(reached for row in rows for reached in row["reached"].values()) else 1)


def build_program(folder: Path) -> Path:
    """Compile the C++ half, as a user would: a Release build."""
    source = ROOT / "benchmarks" / "cpp_programs"
    options = [
        "-DCMAKE_BUILD_TYPE=Release",
        f"-Dedge_backbones_DIR={get_cmake_dir()}",
        f"-Dedge_backbones_SITE_PACKAGES={sysconfig.get_path('purelib')}",
    ]
    cmake = str(Path(sys.executable).with_name("cmake"))
    subprocess.run([cmake, "-S", source, "-B", folder, *options], check=True, stdout=subprocess.DEVNULL)
    subprocess.run([cmake, "--build", folder], check=True, stdout=subprocess.DEVNULL)
    return folder / "call"


def measure(program: Path, bundle: Path, engine: str, rounds: int, calls: int) -> dict[str, Any]:
    """Return medians in milliseconds of both languages, and the ratios C++ / Python with 95 % bounds."""
    words = [str(bundle), engine, str(calls), "10"]
    commands = {"cpp": [str(program), *words], "python": [sys.executable, "-c", _PYTHON, *words]}
    found: dict[str, list[dict[str, float]]] = {name: [] for name in commands}
    for number in range(rounds + 1):
        for name in sorted(commands, reverse=bool(number % 2)):
            taken = run_once(commands[name])
            if number:  # the first turn only brings files into memory
                found[name].append(taken)
    row: dict[str, Any] = {"bundle": bundle.name, "engine": engine, "processes": rounds, "calls": calls}
    for what in ("call", "load", "start"):
        times = {name: [1e3 * one[what] for one in turns] for name, turns in found.items()}
        for name, values in times.items():
            row[f"{what}_{name}_ms"] = round(statistics.median(values), 4)
        row[f"{what}_ratio"] = ratio_with_bounds(times["cpp"], times["python"])
    most = {"call": MOST_CALL, "start": MOST_START}
    row["reached"] = {what: row[f"{what}_ratio"][0] <= limit for what, limit in most.items()}
    return row


def run_once(command: list[str]) -> dict[str, float]:
    """Run one process; return the seconds of its start, its load and its median call."""
    begun = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdout is not None
        first = process.stdout.readline()
        start = time.perf_counter() - begun
        rest = process.stdout.read()
    assert first == "first\n", rest
    assert process.returncode == 0
    told = json.loads(rest)
    return {"start": start, "load": told["load"], "call": statistics.median(told["calls"])}


def ratio_with_bounds(ours: list[float], theirs: list[float]) -> list[float]:
    """Return the median of the ratios of each turn, and the 95 % bounds of that median (bootstrap)."""
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    draw = random.Random(0)
    medians = sorted(statistics.median(draw.choices(ratios, k=len(ratios))) for _ in range(2000))
    return [round(value, 3) for value in (statistics.median(ratios), medians[50], medians[-51])]


if __name__ == "__main__":
    main()
