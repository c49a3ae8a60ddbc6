"""``python -m benchmarks.ros2``: what the node of ROS 2 costs over preprocessing and engine, and a soak.

The cost: a process sends an image of 640 x 480 over Fast DDS and waits for the map of layer4 of resnet50 in int8. Another
process preprocesses and runs the same image without ROS. They take turns, each with two threads. The difference of their
medians is what ROS adds in all: the image to the node, the node's own work, the map to the reader. The median of the rounds
counts.

The soak: 30 images per second for some time. The node's memory is read from /proc at the begin and the end.

Needs ``make .venv/ros2/.installed``. Messages go through shared memory, so no network is needed. Images are sent reliably:
the shared memory of Fast DDS is smaller than an image by default, and loses parts of some otherwise. Results:
benchmarks/results/ros2.json; a part that is left out keeps its figures.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.common import RESULTS, ROOT, machine, say, timing_bundle

MODEL, STAGE = "resnet50", "layer4"
TARGET_MS = 5.0
THREADS = 2
RATE = 30.0
_WARM = 15.0
"""Seconds after which the first memory is read: the engine and the middleware have allocated what they need."""

PYTHON = Path(sys.prefix) / "ros2" / "bin" / "python"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=12, help="times that each contender is started; 0: no cost")
    parser.add_argument("--frames", type=int, default=60, help="frames of a round")
    parser.add_argument("--seconds", type=float, default=0.0, help="length of the soak; 0: no soak")
    parser.add_argument("--bundle", type=Path, help="a bundle of this network, in the place of one that is built")
    given = parser.parse_args()
    if not PYTHON.exists():
        sys.exit(f"ROS 2 is not installed: make {sys.prefix}/ros2/.installed")
    bundle = given.bundle or timing_bundle(MODEL, f"{MODEL}.ros2", out_indices=(1, 2, 3, 4), input="image")
    path = RESULTS / "ros2.json"
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if given.rounds:
        found["cost"] = {**cost(bundle, given.rounds, given.frames), "machine": machine()}
    if given.seconds:
        found["soak"] = {**soak(bundle, given.seconds), "machine": machine()}
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {path}")
    sys.exit(0 if found.get("cost", {}).get("reached", True) else 1)


def environment() -> dict[str, str]:
    """Return the environment of both processes: messages through shared memory, in a domain of our own."""
    domain = str(1 + os.getpid() % 100)
    return {**os.environ, "PYTHONPATH": str(ROOT), "FASTDDS_BUILTIN_TRANSPORTS": "SHM", "ROS_DOMAIN_ID": domain}


@contextlib.contextmanager
def node(bundle: Path, threads: int = THREADS) -> Iterator[subprocess.Popen[bytes]]:
    """Start the node, active, with one stage."""
    values = {
        "bundle": bundle.resolve(),
        "threads": threads,
        "output": "multi_array",
        "reliability": "reliable",
        "stages": f"[{STAGE}]",
        "autostart": "true",
    }
    given = [word for name, value in values.items() for word in ("-p", f"{name}:={value}")]
    command = [PYTHON, "-m", "edge_backbones.integrations.ros2", "--ros-args", *given]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, env=environment(), stdout=log, stderr=log)
        try:
            yield process
        finally:
            process.send_signal(signal.SIGINT)
            status = process.wait(timeout=60)
            log.seek(0)
            text = log.read().decode()
        if status or "Traceback" in text:
            raise RuntimeError(f"the node ended with {status}: {text}")


def part(name: str, *arguments: str) -> dict[str, Any]:
    """Run a process of ros2_parts to its end, and return what it prints."""
    command = [PYTHON, "-m", "benchmarks.ros2_parts", name, "--stage", STAGE, *arguments]
    done = subprocess.run(command, env=environment(), cwd=ROOT, check=True, stdout=subprocess.PIPE)
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def cost(bundle: Path, rounds: int, frames: int) -> dict[str, Any]:
    """Time frames through ROS and without it, in turns."""
    found = []
    for index in range(rounds):
        without = part("plain", "--bundle", str(bundle), "--threads", str(THREADS), "--frames", str(frames))
        with node(bundle):
            through = part("ask", "--frames", str(frames))
        plain_ms, ros_ms = (statistics.median(one["ms"]) for one in (without, through))
        found.append({"plain_ms": plain_ms, "ros_ms": ros_ms, "cost_ms": ros_ms - plain_ms, "node": through["node"]})
        say(f"round {index + 1}: {plain_ms:.2f} ms without ROS, {ros_ms:.2f} ms through it")
    return {**summary(found), "network": MODEL, "stage": STAGE, "frames": frames, "rounds": found}


def summary(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the medians of rounds, and whether the cost is within its target."""
    medians = {name: statistics.median(one[name] for one in rounds) for name in ("plain_ms", "ros_ms", "cost_ms")}
    # What the node itself does beside preparing and running: an image waits for the worker, and its maps are published.
    own = statistics.median(one["node"]["wait_p50_ms"] + one["node"]["publish_p50_ms"] for one in rounds)
    return {**medians, "in_node_ms": own, "target_ms": TARGET_MS, "reached": medians["cost_ms"] <= TARGET_MS}


def soak(bundle: Path, seconds: float) -> dict[str, Any]:
    """Send 30 images per second to the node, and read its memory meanwhile."""
    with node(bundle) as process:
        command = [PYTHON, "-m", "benchmarks.ros2_parts", "soak", "--stage", STAGE, "--rate", str(RATE)]
        camera = subprocess.Popen(
            [*command, "--seconds", str(seconds)], env=environment(), cwd=ROOT, stdout=subprocess.PIPE
        )
        memory: list[tuple[float, float]] = []
        begin = time.monotonic()
        while camera.poll() is None:
            time.sleep(5)
            passed = time.monotonic() - begin
            if passed >= min(_WARM, seconds / 2):
                memory.append((round(passed, 1), resident_mb(process.pid)))
        assert camera.stdout is not None  # a pipe
        counted = json.loads(camera.stdout.read())
    first, last = memory[0][1], memory[-1][1]
    say(f"{counted['sent']} sent, {counted['came_back']} came back; {first:.1f} MB, {last:.1f} MB at the end")
    figures = {"begin_mb": first, "end_mb": last, "most_mb": max(size for _, size in memory)}
    return {
        "seconds": seconds,
        "rate_hz": RATE,
        **counted,
        **figures,
        "memory_mb": memory[:: max(1, len(memory) // 24)],
    }


def resident_mb(process: int) -> float:
    """Return the resident memory of a process in MB, as the kernel counts it."""
    for line in Path(f"/proc/{process}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return round(int(line.split()[1]) / 1024, 1)
    raise RuntimeError(f"/proc/{process}/status has no VmRSS")


if __name__ == "__main__":
    main()
