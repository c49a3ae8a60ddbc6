"""``python -m benchmarks.first_hour``: how long a newcomer waits for help, for a refusal and, with --demo, for a picture.

Each command runs alone, in a process of its own, ``--turns`` times; the median counts. ``--demo`` clones the repository into
an empty folder and runs ``make demo`` there, from making the environment to the picture: some minutes, and a download of
gigabytes. The exit code is 1 if a target is missed.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.common import ROOT, add
from build_scripts.photographs import write_crops

HELP_SECONDS, REFUSAL_SECONDS, DEMO_SECONDS = 0.6, 1.0, 300.0
PICTURE = Path("demo_output/coffee.png")
REFUSALS = (
    "build resnet18 x.bundle",
    "build resnet18 x.bundle --images nowhere",
    "build resnet18 x.bundle --images empty",
    "build resnet18 there.bundle --images photographs",
    "build resnt18 x.bundle --images photographs",
    "build net.onnx x.bundle --images photographs",
    "build resnet18 x.bundle --images photographs --profile orin-nan",
    "build resnet18 x.bundle --images photographs --weights nothing.pth",
    "build resnet18 x.bundle --precison fp16",
    "build resnet18 x.bundle --precision int3",
    "compile nothing.bundle",
    "compile nothing.bundle --flavour nothing",
    "compile nothing.bundle --sparse --device cpux",
    "verify nothing.bundle",
    "run nothing.bundle photographs",
    "pack nothing.bundle out.bundle",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=5, help="times that each command runs")
    parser.add_argument("--demo", action="store_true", help="run `make demo` in an empty clone too")
    given = parser.parse_args()
    print(f"load average before: {os.getloadavg()[0]:.1f}, on {os.cpu_count()} cores")
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_crops(folder / "photographs", 4)
        (folder / "empty").mkdir()
        (folder / "there.bundle").mkdir()
        (folder / "net.onnx").touch()
        for words, limit in [("--help", HELP_SECONDS), *((words, REFUSAL_SECONDS) for words in REFUSALS)]:
            found = statistics.median(seconds_of(words, folder) for _ in range(given.turns))
            add(rows, f"edge-backbones {words}", found, limit, "s")
        if given.demo:
            add(rows, "make demo, to its picture", seconds_to_picture(folder / "clone"), DEMO_SECONDS, "s")
    sys.exit(0 if all(row["reached"] for row in rows) else 1)


def seconds_of(words: str, folder: Path) -> float:
    """Run a command that succeeds only if it is --help, and return how long it took."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "edge_backbones.cli.main", *words.split()]
    started = time.perf_counter()
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    taken = time.perf_counter() - started
    if (done.returncode == 0) != (words == "--help"):
        raise SystemExit(f"edge-backbones {words}: exit code {done.returncode}\n{done.stderr}")
    return taken


def seconds_to_picture(clone: Path) -> float:
    """Clone the repository, run ``make demo`` and return how long it took until the picture was there."""
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    make = shutil.which("make") or "make"
    started = time.perf_counter()
    with subprocess.Popen(
        [make, "demo"], cwd=clone, env=environment, stdout=subprocess.DEVNULL, start_new_session=True
    ) as process:
        try:
            while not (clone / PICTURE).is_file():
                if process.poll() is not None:
                    raise SystemExit(f"make demo ended with {process.returncode} before there was a picture")
                time.sleep(0.2)
            return time.perf_counter() - started
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # and what make has started


if __name__ == "__main__":
    main()
