"""``python -m benchmarks.matrix``: how much of two cores the build matrix uses, and what a run costs that has nothing to do.

Six models in two precisions are built with ``--jobs 2`` on two cores, and once more with nothing changed. Its wall clock is
divided by what two processes would take that never wait and never disturb each other, for two kinds of such processes: one
for each cell, as whoever types a command per bundle has them (half of the sum of such commands, one at a time on one core),
and two that import their libraries once and build half of the cells each (that start and half of the sum of the cells, by
``--jobs 1`` on one core). To tell waiting from disturbance, which is the machine's (cores share caches, memory and often
more), half of the models are also built on either core at the same time, by commands that know nothing of each other: that
ratio is stored and has no target. Folders are empty and engines not cached. Gates are open: weights are random. Results:
benchmarks/results/matrix.json.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks import readme_table
from benchmarks.common import RESULTS, ROOT, add, machine, photograph_folder, say

MODELS = (
    "resnet18",
    "resnet34",
    "mobilenetv3_small_100",
    "mobilenetv3_large_100",
    "efficientnet_b0",
    "convnext_atto",
)
PRECISIONS = ("fp16", "int8")
PHOTOGRAPHS = 8 + 4  # to calibrate on, and golden
RATIO, SECONDS = 1.15, 5
_OPTIONS = '{ weights = "random:0", method = "max", gates = { int8 = {}, fp16 = {} } }'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", choices=MODELS, help="these models; nothing is stored")
    arguments = parser.parse_args()
    found = measure(arguments.only or MODELS)
    if not arguments.only:
        path = RESULTS / "matrix.json"
        path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        readme_table.update()
        print(f"wrote {path.relative_to(ROOT).as_posix()} and the table of benchmarks/README.md")
    sys.exit(0 if all(row["reached"] for row in found["figures"]) else 1)


def measure(models: Sequence[str]) -> dict[str, Any]:
    """Time every run in a folder of its own. A first run, which does not count, brings the libraries into memory."""
    cores = sorted(os.sched_getaffinity(0))[:2]
    if len(cores) < 2:
        sys.exit("this takes two cores")
    with tempfile.TemporaryDirectory() as work:
        run(Path(work) / "warm-up", models[:1], cores[:1])
        say("a command for each cell, one at a time on one core")
        commands = {}
        for cell in ((model, precision) for model in models for precision in PRECISIONS):
            _, commands[".".join(cell)] = run(Path(work) / ".".join(cell), cell[:1], cores[:1], cell[1:])
        say("one cell at a time on one core")
        alone, alone_wall = run(Path(work) / "alone", models, cores[:1])
        say("one at a time on either core")
        with ThreadPoolExecutor(2) as pool:
            halves = [
                pool.submit(run, Path(work) / f"half{core}", models[start::2], [core])
                for start, core in enumerate(cores)
                if models[start::2]
            ]
        beside = {name: seconds for half in halves for name, seconds in half.result()[0].items()}
        say("two at a time on two cores")
        together, wall = run(Path(work) / "together", models, cores)
        say("again, with nothing changed")
        _, again = run(Path(work) / "together", models, cores, status="there")
    start = alone_wall - sum(alone.values())
    ideals = {
        "a process for each cell": sum(commands.values()) / 2,
        "two that import once": start + sum(alone.values()) / 2,
        "two that import once, side by side": start + sum(beside.values()) / 2,
    }
    rows: list[dict[str, Any]] = []
    what = f"{len(alone)} cells of a build matrix on 2 cores: time over that of two ideal processes"
    for kind in list(ideals)[:2]:
        add(rows, f"{what}, {kind}", wall / ideals[kind], RATIO, "x")
    add(rows, "the same again, with nothing changed", again, SECONDS, "s")
    print(f"     {wall:.1f} s; ideals: " + ", ".join(f"{kind} {seconds:.1f} s" for kind, seconds in ideals.items()))
    return {
        "machine": machine(),
        "commands_alone_s": commands,
        "cells_alone_s": alone,
        "cells_beside_s": beside,
        "cells_together_s": together,
        "start_s": start,
        "wall_s": wall,
        "ideals_s": ideals,
        "ratios": {kind: wall / seconds for kind, seconds in ideals.items()},
        "again_s": again,
        "figures": rows,
    }


def run(
    folder: Path,
    models: Sequence[str],
    cores: Sequence[int],
    precisions: Sequence[str] = PRECISIONS,
    *,
    status: str = "made",
) -> tuple[dict[str, float], float]:
    """Return the seconds of each cell and of the command, on these cores. Every cell must end with ``status``."""
    folder.mkdir(exist_ok=True)
    photographs = json.dumps(str(photograph_folder(PHOTOGRAPHS)))
    lines = ['out = "bundles"', f"images = {photographs}", f"precisions = {json.dumps(precisions)}"]
    lines += [f'[[models]]\nsource = "{model}"\noptions = {_OPTIONS}' for model in models]
    (folder / "matrix.toml").write_text("\n".join([*lines, '[[devices]]\nprofile = "cpu"', ""]), encoding="utf-8")
    command = [sys.executable, "-m", "build_scripts.build_matrix", str(folder / "matrix.toml")]
    begin = time.perf_counter()
    done = subprocess.run(
        [*command, "--json", f"--jobs={len(cores)}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "XDG_CACHE_HOME": str(folder / "cache")},
        preexec_fn=lambda: os.sched_setaffinity(0, cores),
    )
    seconds = time.perf_counter() - begin
    endings = json.loads(done.stdout or "{}")
    wrong = {name: ending for name, ending in endings.items() if ending["status"] != status}
    if len(endings) != len(precisions) * len(models) or wrong:
        sys.exit(f"not every cell is {status}: {wrong}\n{done.stderr}")
    return {name: ending["seconds"] for name, ending in endings.items()}, seconds


if __name__ == "__main__":
    main()
