"""Side by side: every contender alone in its process, alternating, medians over all rounds."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.contenders import KINDS


def measure(
    bundle: Path, *, kinds: Sequence[str] = tuple(KINDS), rounds: int = 3, threads: int = 2
) -> dict[str, float]:
    """Median milliseconds per call of each contender; batch 1."""
    timings: dict[str, list[float]] = {kind: [] for kind in kinds}
    for _ in range(rounds):
        for kind in kinds:
            command = [sys.executable, "-m", "benchmarks.contenders", kind, str(bundle), str(threads)]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            timings[kind] += json.loads(done.stdout.splitlines()[-1])
    return {kind: statistics.median(values) for kind, values in timings.items()}
