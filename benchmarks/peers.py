"""Side by side: every contender alone in its process, alternating, medians.

Machines speed up and slow down within minutes, so a ratio is taken within each round, where contenders ran seconds apart,
and the median of the rounds' ratios counts.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.contenders import KINDS


@dataclass(frozen=True)
class Comparison:
    """Median milliseconds per call of every contender in every round, in the same order."""

    rounds: dict[str, list[float]]

    def milliseconds(self, kind: str) -> float:
        return statistics.median(self.rounds[kind])

    def ratio(self, slower: str, faster: str) -> float:
        pairs = zip(self.rounds[slower], self.rounds[faster], strict=True)
        return statistics.median(slow / fast for slow, fast in pairs)


def measure(bundle: Path, *, kinds: Sequence[str] = tuple(KINDS), rounds: int = 7, threads: int = 2) -> Comparison:
    """Start every contender once a round, in turn; batch 1."""
    found: dict[str, list[float]] = {kind: [] for kind in kinds}
    for _ in range(rounds):
        for kind in kinds:
            command = [sys.executable, "-m", "benchmarks.contenders", kind, str(bundle), str(threads)]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            found[kind].append(statistics.median(json.loads(done.stdout.splitlines()[-1])))
    return Comparison(found)
