"""``python -m benchmarks.threads``: how fast engines are under CPU limits, and beside other engines of their process.

Every contender is alone in a process of its own, and takes turns with the others. Times are means over the calls of a turn,
because a quota stops few calls for long; figures are ratios of two contenders of one round, and the median round counts.

- Limits: ``threads=None`` against ``threads=1`` in a cgroup with a quota of one CPU, and with an affinity mask of one.
- Rounding: two threads against one under a quota of 1.5 CPUs.
- Several engines, called in turn by one thread or together by two, against each of them alone.

``--before DIR`` times another checkout too, which has this file. Cgroups need root. Results: benchmarks/results/threads.json.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import RESULTS, ROOT, machine, say, timing_bundle
from edge_backbones.bench.results import ratio_of

MODELS = {"resnet50": "R", "mobilenetv3_large_100": "M"}
STAGES = (1, 2, 3, 4)
_WARM_UP, _SECONDS = 5, 0.6

Task = dict[str, Any]
"""What a process does. ``engines``: (bundle, engine) of each. ``threads``: as in from_pretrained. ``together``: one thread
for each engine instead of calls in turn. ``quota``: CPUs of its cgroup. ``cpus``: size of its affinity mask."""
Turn = dict[str, list[float]]
"""``mean`` and ``p99``: milliseconds of a call of each engine."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="times that each contender is started")
    parser.add_argument("--before", type=Path, help="another checkout, to time its package too")
    given = parser.parse_args()
    found = measure(tasks(bundles()), given.rounds, given.before)
    path = RESULTS / "threads.json"
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    from benchmarks import readme_table

    readme_table.update()
    print(f"wrote {path}")
    sys.exit(0 if all(row["reached"] for row in found["figures"]) else 1)


def bundles() -> dict[str, list[tuple[str, str]]]:
    """Build the bundles if they are not there; return (bundle, engine) by model and library, in int8."""
    from edge_backbones import compile_bundle

    found = {}
    for model, letter in MODELS.items():
        path = timing_bundle(model, f"{model}.threads", precisions=("int8",), out_indices=STAGES)
        compile_bundle(path, precisions=("int8",), flavour="onnxruntime")
        found[f"{letter} OpenVINO"] = [(str(path), "openvino")]
        found[f"{letter} ONNX Runtime"] = [(str(path), "onnxruntime")]
    return found


def tasks(engines: Mapping[str, list[tuple[str, str]]]) -> dict[str, Task]:
    """Return the contenders by name."""
    found: dict[str, Task] = {name: {"engines": one} for name, one in engines.items()}
    for name in ("R OpenVINO", "M OpenVINO", "M ONNX Runtime"):
        for limit in ({"quota": 1.0}, {"cpus": 1}):
            for threads in (None, 1):
                found[f"{name} {limit} {threads}"] = {"engines": engines[name], "threads": threads, **limit}
    for name in ("R OpenVINO", "M OpenVINO"):
        for threads in (1, 2):
            found[f"{name} rounding {threads}"] = {"engines": engines[name], "threads": threads, "quota": 1.5}
    for first, second, together in PAIRS:
        found[f"{first} + {second} {together}"] = {"engines": engines[first] + engines[second], "together": together}
    found["R OpenVINO threads=1"] = {"engines": engines["R OpenVINO"], "threads": 1}
    found["2 R OpenVINO threads=1"] = {"engines": 2 * engines["R OpenVINO"], "threads": 1, "together": True}
    return found


PAIRS = (
    ("R OpenVINO", "M OpenVINO", False),
    ("R OpenVINO", "M ONNX Runtime", False),
    ("M OpenVINO", "R ONNX Runtime", False),
    ("R ONNX Runtime", "M ONNX Runtime", False),
    ("R OpenVINO", "R OpenVINO", True),
    ("R OpenVINO", "M OpenVINO", True),
    ("R ONNX Runtime", "R ONNX Runtime", True),
    ("R OpenVINO", "R ONNX Runtime", True),
)


def measure(contenders: Mapping[str, Task], rounds: int, before: Path | None) -> dict[str, Any]:
    """Let every contender take a turn in each round, with this package and with the one in ``before``."""
    why_not = cgroups_missing()
    if why_not:
        say(f"no figures of quotas: no cgroup can be made here ({why_not})")
    wanted = {name: task for name, task in contenders.items() if not (why_not and "quota" in task)}
    trees = {"now": ROOT, **({} if before is None else {"before": before.resolve()})}
    turns: dict[str, dict[str, list[Turn]]] = {tree: {name: [] for name in wanted} for tree in trees}
    for index in range(rounds):
        say(f"round {index + 1} of {rounds}")
        for name, task in wanted.items():
            for tree in list(trees) if index % 2 else reversed(trees):
                turns[tree][name].append(take_turn(task, trees[tree]))
    rows = figures(turns["now"])
    older = {row["what"]: row for row in figures(turns["before"])} if before else {}
    for row in rows:
        if row["what"] in older:
            row["before"] = older[row["what"]]["value"]
    if before:
        rows += [
            figure(f"{name} alone: time of a call over that before", turns["now"][name], turns["before"][name], 1.01)
            for name in wanted
            if len(wanted[name]) == 1
        ]
    for row in rows:
        print(row)
    medians = {name: statistics.median(sum(turn["mean"]) for turn in of) for name, of in turns["now"].items()}
    return {"machine": machine(), "no_cgroups": why_not, "figures": rows, "mean_ms": medians}


def figures(turns: Mapping[str, Sequence[Turn]]) -> list[dict[str, Any]]:
    """Return the figures of one package's turns. Those whose contenders did not run are left out."""
    rows = []
    for name in ("R OpenVINO", "M OpenVINO", "M ONNX Runtime"):
        for limit, words in (({"quota": 1.0}, "a quota of 1 CPU"), ({"cpus": 1}, "an affinity mask of 1 CPU")):
            if limited := turns.get(f"{name} {limit} None"):
                what = f"{name} with {words}: time with threads=None over threads=1"
                rows.append(figure(what, limited, turns[f"{name} {limit} 1"], 1.05))
    for name in ("R OpenVINO", "M OpenVINO"):
        if two := turns.get(f"{name} rounding 2"):
            for key, words in (("mean", "mean time"), ("p99", "time of the slowest 1 %")):
                what = f"{name} with a quota of 1.5 CPUs: {words} with threads=2 over threads=1"
                rows.append(figure(what, two, turns[f"{name} rounding 1"], None, key))
    for first, second, together in PAIRS:
        both = turns[f"{first} + {second} {together}"]
        alone = list(zip(turns[first], turns[second], strict=True))
        if together:  # the work per second of each is a share of what it does alone; the shares add up to 1
            ours = [shares(turn, a, b) for turn, (a, b) in zip(both, alone, strict=True)]
            rows.append(
                ratio(f"{first} and {second} at the same time: time of the work over that alone", ours, None, 1.1)
            )
        else:
            sums = [a["mean"][0] + b["mean"][0] for a, b in alone]
            what = f"{first} and {second} in turn: time of both calls over that alone"
            rows.append(ratio(what, [sum(turn["mean"]) for turn in both], sums, 1.1))
    pair, single = turns["2 R OpenVINO threads=1"], turns["R OpenVINO threads=1"]
    what = "2 R OpenVINO with threads=1 at the same time: time of a call over that alone"
    means = [statistics.mean(turn["mean"]) for turn in pair]
    return [*rows, ratio(what, means, [turn["mean"][0] for turn in single], 1.1)]


def shares(both: Turn, first: Turn, second: Turn) -> float:
    """Return how many times as long two engines take together for what each alone does in its share of the time."""
    return 1 / (first["mean"][0] / both["mean"][0] + second["mean"][0] / both["mean"][1])


def figure(
    what: str, ours: Sequence[Turn], theirs: Sequence[Turn], target: float | None, key: str = "mean"
) -> dict[str, Any]:
    return ratio(what, [sum(turn[key]) for turn in ours], [sum(turn[key]) for turn in theirs], target)


def ratio(what: str, ours: Sequence[float], theirs: Sequence[float] | None, target: float | None) -> dict[str, Any]:
    """Return a row of the results: the median ratio with its bounds. ``target``: the most that it may be, if anything."""
    found = ratio_of(what, ours, theirs or [1.0] * len(ours))
    names = {letter: model for model, letter in MODELS.items()}
    what = " ".join(names.get(word, word) for word in what.split(" "))
    reached = target is None or found.median <= target
    return {
        "what": what, "value": found.median, "low": found.low, "high": found.high, "target": target, "reached": reached,
    }  # fmt: skip


def take_turn(task: Task, tree: Path) -> Turn:
    """Run a contender in a process of its own, with the package of ``tree``."""
    command = [sys.executable, "-m", "benchmarks.threads", "--child", json.dumps(task)]
    env = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "OMP_NUM_THREADS")}
    done = subprocess.run(command, cwd=tree, env=env, check=True, stdout=subprocess.PIPE, text=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


# ---- cgroups


def cgroups_missing() -> str:
    """Return why no cgroup with a quota can be made here; empty if it can."""
    try:
        make_group(f"edge_backbones_{os.getpid()}", 1.0).rmdir()
    except OSError as error:
        return str(error)
    return ""


def make_group(name: str, quota: float, period: int = 100_000) -> Path:
    """Make a cgroup with a quota of CPU time, in this process's group (v1) or in the root group (v2)."""
    groups = dict(line.split(":", 2)[1:] for line in Path("/proc/self/cgroup").read_text().splitlines())
    root = Path("/sys/fs/cgroup")
    v1 = (root / "cpu").exists()
    folder = root / "cpu" / groups.get("cpu", groups.get("cpu,cpuacct", "/")).lstrip("/") / name if v1 else root / name
    folder.mkdir()
    limit = str(round(quota * period))
    try:
        if v1:
            (folder / "cpu.cfs_period_us").write_text(str(period))
            (folder / "cpu.cfs_quota_us").write_text(limit)
        else:
            (folder / "cpu.max").write_text(f"{limit} {period}")
    except OSError:
        folder.rmdir()
        raise
    return folder


# ---- one contender, alone in its process


def child_main(described: str) -> None:
    """Enter the limits, then call the engines and print a `Turn` as JSON."""
    task: Task = json.loads(described)
    group = None
    if "quota" in task:
        group = make_group(f"edge_backbones_{os.getpid()}", task["quota"])
        (group / "cgroup.procs").write_text(str(os.getpid()))
    if "cpus" in task:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: task["cpus"]])
    try:
        print(json.dumps(_called(task)))
    finally:
        if group is not None:
            (group.parent / "cgroup.procs").write_text(str(os.getpid()))
            group.rmdir()


def _called(task: Task) -> Turn:
    from edge_backbones import EdgeBackbone

    opened = [EdgeBackbone.from_pretrained(p, engine=e, threads=task.get("threads")) for p, e in task["engines"]]
    inputs = [np.random.default_rng(0).standard_normal(b.input.opt_shape).astype(b.input.dtype) for b in opened]
    seconds: list[list[float]] = [[] for _ in opened]

    def call(which: int) -> None:
        start = time.perf_counter()
        opened[which](inputs[which])
        seconds[which].append(time.perf_counter() - start)

    def repeat(which: Sequence[int], until: float) -> None:
        while time.perf_counter() < until:
            for one in which:
                call(one)

    every = range(len(opened))
    for _ in range(_WARM_UP):
        for which in every:
            call(which)
    for rows in seconds:
        rows.clear()
    turns = [[which] for which in every] if task.get("together") else [list(every)]
    until = time.perf_counter() + _SECONDS
    workers = [threading.Thread(target=repeat, args=(which, until)) for which in turns]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return {
        "mean": [1e3 * statistics.fmean(rows) for rows in seconds],
        "p99": [1e3 * sorted(rows)[int(0.99 * len(rows))] for rows in seconds],
    }


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child_main(sys.argv[2])
    else:
        main()
