"""``python -m benchmarks.int8_graphs --modelopt PYTHON``: the int8 graphs of large networks against others, and in TensorRT.

Two questions of the placement of Q/DQ pairs. Is OpenVINO as fast on our graph as on that of ModelOpt, which places them for
TensorRT too? Both are compiled alike. First each alone in its process, in turns, and every round starts new processes: one is
some percent faster than another of the same graph for as long as it lives (where its memory lies, we suppose), and from turn
to turn the machine changes its pace. Then, to see less than that, call by call in one process on one thread, where no pools
of threads disturb each other, loaded anew for every round, with our own graph a second time to show what is noise. Last, the
kernels that OpenVINO runs of either are compared: where they are the same, what differs is chance. And does TensorRT-RTX
compile our graphs for every architecture that has the format (no GPU is needed for that)? Results:
benchmarks/results/int8_graphs.json.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import accuracy_peers, readme_table
from benchmarks.common import CACHE, RESULTS, machine
from benchmarks.networks import bundle_of, images_of
from edge_backbones import Bundle
from edge_backbones.bench.compare import CompareOptions, measure
from edge_backbones.bench.contender import Task
from edge_backbones.bench.results import ratio_of
from edge_backbones.engines.openvino import int8_graph as cpu_graph
from edge_backbones.engines.openvino import session as openvino
from edge_backbones.engines.openvino.compile import compile_graph
from edge_backbones.engines.openvino.session import OpenVinoSession
from edge_backbones.engines.tensorrt.compile import compile_plan
from edge_backbones.engines.tensorrt.options import PlanOptions
from edge_backbones.errors import CompileError
from edge_backbones.spec import Precision
from edge_backbones.toolchain.artifacts import ExportedGraph, TypedGraph
from edge_backbones.toolchain.calibration import calibrate
from edge_backbones.toolchain.calibration.images import gather_images
from edge_backbones.toolchain.quantize.typed_graph import write_typed_graph

STORED = RESULTS / "int8_graphs.json"
MODELS = ("resnet50", "mobilenetv3_large_100", "convnext_tiny", "vit_small_patch16_224")
CALIBRATION = 16
THREADS = (2, 1)  # two wait for each other, and on a busy machine that is most of what a median shows
_WARM_UP, _CALLS = 3, 30
TARGETS = {
    Precision.INT8: ("SM80", "SM86", "SM89", "SM120"),
    Precision.BF16: ("SM80", "SM86", "SM89", "SM120"),
    Precision.FP8: ("SM89", "SM120"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--modelopt", default=sys.executable, help="Python that has ModelOpt")
    parser.add_argument("--rounds", type=int, default=12, help="times that either graph is started, an even number")
    parser.add_argument("--only", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--skip", choices=("speed", "targets"), help="keep the figures that there are of it")
    arguments = parser.parse_args()
    if arguments.rounds < 2 or arguments.rounds % 2:
        parser.error(
            f"--rounds must be even, got {arguments.rounds}: either graph is loaded first as often as the other"
        )
    found = json.loads(STORED.read_text(encoding="utf-8"))["networks"] if STORED.exists() else {}
    for model in arguments.only:
        bundle = bundle_of(model)
        figures = found.setdefault(model, {})
        if arguments.skip != "speed":
            theirs = modelopt_graph(model, bundle, arguments.modelopt)
            figures["speed"] = {str(threads): speed(bundle, theirs, threads, arguments.rounds) for threads in THREADS}
            figures["call_by_call"] = call_by_call(bundle, theirs, arguments.rounds)
            figures["kernels"] = compared_kernels(bundle, theirs)
        if arguments.skip != "targets":
            figures["targets"] = targets(bundle)
        print(model, json.dumps(figures), flush=True)
        STORED.write_text(json.dumps({"machine": machine(), "networks": found}, indent=1) + "\n", encoding="utf-8")
    readme_table.update()
    print(f"wrote {STORED} and benchmarks/README.md")


def modelopt_graph(model: str, bundle: Path, python: str) -> Path:
    """Return ModelOpt's int8 graph of the bundle's fp32 graph, with ModelOpt's own ranges."""
    theirs = CACHE / f"{bundle.stem}.modelopt.onnx"
    if not theirs.exists():
        manifest = Bundle.open(bundle).manifest
        with tempfile.TemporaryDirectory() as folder:
            npz, spool = Path(folder) / "images.npz", Path(folder) / "images"
            images = gather_images(images_of(model), input=manifest.input, config=manifest.image, spool=spool)
            np.savez(npz, calibration=images.take(range(CALIBRATION)), test=images.take([0]))
            graph = bundle / "graphs" / "fp32.onnx"
            command = [python, accuracy_peers.__file__, "modelopt max", str(graph), str(npz), str(theirs)]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return theirs


def speed(bundle: Path, theirs: Path, threads: int, rounds: int) -> dict[str, Any]:
    """Return the time of ModelOpt's graph over ours, each alone in its process; every round starts new processes.

    Turns are short and many, because a machine's speed changes within seconds: a ratio is taken of turns that follow
    each other, and the median of a round counts. The graph that is loaded second is about a percent faster, so each is
    second in every other round, and the geometric mean of two rounds counts.
    """
    files = {"ours": bundle / "graphs" / "int8.onnx", "modelopt": theirs}
    tasks = {
        name: Task(peer="graph", bundle=str(bundle), threads=threads, file=str(file)) for name, file in files.items()
    }
    milliseconds: dict[str, list[float | None]] = {name: [] for name in tasks}
    ratios: list[float] = []
    for number in range(rounds):
        order = list(tasks) if number % 2 else list(reversed(tasks))
        found = measure({name: tasks[name] for name in order}, CompareOptions(turns=20, calls=4, seconds=0.1))
        if found["modelopt"].missing:
            raise SystemExit(f"ModelOpt's graph does not run: {found['modelopt'].missing}")
        turns = zip(found["modelopt"].turns, found["ours"].turns, strict=True)
        ratios.append(statistics.median(their / our for their, our in turns))
        for name, one in found.items():
            milliseconds[name].append(one.median_ms)
    both_orders = [math.sqrt(first * second) for first, second in zip(ratios[::2], ratios[1::2], strict=True)]
    ratio = ratio_of("modelopt", both_orders, [1.0] * len(both_orders))
    return {
        "modelopt_over_ours": round(ratio.median, 3),
        "bounds": [round(ratio.low, 3), round(ratio.high, 3)],
        "rounds": [round(value, 3) for value in ratios],
        "ours_ms": milliseconds["ours"],
        "modelopt_ms": milliseconds["modelopt"],
    }


def call_by_call(bundle: Path, theirs: Path, rounds: int) -> dict[str, Any]:
    """Return the time over ours of ModelOpt's graph and of our own again: medians over rounds, with bounds."""
    ours = bundle / "graphs" / "int8.onnx"
    files = {"ours": ours, "modelopt": theirs, "ours again": ours}
    blobs = {name: compile_graph(file.read_bytes(), Precision.INT8, cache=None).data for name, file in files.items()}
    manifest = Bundle.open(bundle).manifest
    image = np.random.default_rng(0).standard_normal(manifest.input.opt_shape).astype(np.float32)
    medians: dict[str, list[float]] = {name: [] for name in files}
    for begin in range(rounds):
        order = [list(files)[(begin + index) % len(files)] for index in range(len(files))]
        sessions = {
            name: OpenVinoSession(bytearray(blobs[name]), outputs=manifest.backbone.outputs, threads=1)
            for name in order
        }
        taken: dict[str, list[float]] = {name: [] for name in files}
        for call in range(_WARM_UP + _CALLS):
            for name in order[call % len(order) :] + order[: call % len(order)]:
                started = time.perf_counter()
                sessions[name].run(image)
                taken[name].append(time.perf_counter() - started)
        for name, session in sessions.items():
            medians[name].append(statistics.median(taken[name][_WARM_UP:]))
            session.close()
    found = {name: ratio_of(name, medians[name], medians["ours"]) for name in ("modelopt", "ours again")}
    return {
        f"{name.replace(' ', '_')}_over_ours": {
            "median": round(ratio.median, 3),
            "bounds": [round(ratio.low, 3), round(ratio.high, 3)],
        }
        for name, ratio in found.items()
    }


def compared_kernels(bundle: Path, theirs: Path) -> dict[str, int]:
    """Return how many nodes OpenVINO runs of each graph, and how many have no counterpart in the other."""
    ours, others = (kernels(file) for file in (bundle / "graphs" / "int8.onnx", theirs))
    return {
        "ours": ours.total(),
        "modelopt": others.total(),
        "ours_only": (ours - others).total(),
        "modelopt_only": (others - ours).total(),
    }


def kernels(file: Path) -> Counter[tuple[str, ...]]:
    """Return the nodes that OpenVINO runs, except constants: implementation, formats, layouts and shapes."""
    model = openvino.read_model(file.read_bytes())
    cpu_graph.adapt(model)
    nodes = openvino.core().compile_model(model, "CPU", openvino.settings(1)).get_runtime_model().get_ops()
    found: Counter[tuple[str, ...]] = Counter()
    for node in nodes:
        about = node.get_rt_info()
        kind = about["layerType"].value
        if kind not in ("Const", "Input", "Output"):
            said = (about[name].value for name in ("primitiveType", "outputPrecisions", "outputLayouts"))
            shapes = (str(port.get_partial_shape()) for port in (*node.inputs(), *node.outputs()))
            found[(kind, *said, *shapes)] += 1
    return found


def targets(bundle: Path) -> dict[str, dict[str, str]]:
    """Return, for each precision and architecture, the size of the plan or TensorRT-RTX's message."""
    opened = Bundle.open(bundle)
    record = opened.manifest.calibration
    assert record is not None  # benchmarks.run builds int8
    found = calibrate.read_calibration(bundle)
    graph = ExportedGraph(bundle / "graphs" / "fp32.onnx", opened.manifest.backbone, opened.manifest.input)
    answers: dict[str, dict[str, str]] = {}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        equalised = calibrate.equalised_graph(graph, found.factors, work)
        for precision, architectures in TARGETS.items():
            path = work / f"{precision}.onnx"
            ranges = found.largest if precision is Precision.FP8 else found.ranges
            source = graph if precision is Precision.BF16 else equalised
            if precision is Precision.INT8:
                source = calibrate.centred_graph(equalised, found.centres, work)
            typed = write_typed_graph(
                source, precision=precision, path=path, ranges=ranges, shifts=found.shifts, rounding=found.rounding
            )
            answers[precision.value] = {name: compile_for(typed, name) for name in architectures}
    return answers


def compile_for(graph: TypedGraph, architecture: str) -> str:
    """Compile a graph for one architecture with TensorRT-RTX; return the plan's size, or its message."""
    started = time.perf_counter()
    target = f"sm_{architecture.removeprefix('SM')}"
    try:
        plan = compile_plan(
            graph.path.read_bytes(),
            graph.input,
            graph.precision,
            flavour="tensorrt_rtx",
            options=PlanOptions(targets=(target,)),
        )
    except CompileError as error:
        return str(error)
    return f"{len(plan.data) / 1e6:.1f} MB, {time.perf_counter() - started:.0f} s"


if __name__ == "__main__":
    main()
