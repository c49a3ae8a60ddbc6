"""Side by side: every contender alone in its process, alternating, medians.

Machines speed up and slow down within minutes, so a ratio is taken within each round, where contenders ran seconds apart,
and the median of the rounds' ratios counts. On a virtual machine the kernel counts the time that other guests took: only
the calmer half of the rounds counts.
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
    """Median milliseconds per call of every contender, in the calmer half of the rounds, the calmest first.

    ``fastest``: the fastest call of each round: threads that wait for a core touch it least.
    ``stolen_share``: the largest share of machine time that other guests took from a contender in these rounds.
    """

    rounds: dict[str, list[float]]
    fastest: dict[str, list[float]]
    stolen_share: float

    def milliseconds(self, kind: str) -> float:
        return statistics.median(self.rounds[kind])

    def ratio(self, slower: str, faster: str) -> float:
        return _ratio(self.rounds[slower], self.rounds[faster])

    def ratio_of_fastest(self, slower: str, faster: str) -> float:
        return _ratio(self.fastest[slower], self.fastest[faster])


def _ratio(slower: Sequence[float], faster: Sequence[float]) -> float:
    return statistics.median(slow / fast for slow, fast in zip(slower, faster, strict=True))


def measure(bundle: Path, *, kinds: Sequence[str] = tuple(KINDS), rounds: int = 7, threads: int = 2) -> Comparison:
    """Start every contender once a round, in turn; batch 1."""
    found = []
    for _ in range(rounds):
        milliseconds, fastest, stolen = {}, {}, 0.0
        for kind in kinds:
            command = [sys.executable, "-m", "benchmarks.contenders", kind, str(bundle), str(threads)]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            result = json.loads(done.stdout.splitlines()[-1])
            milliseconds[kind] = statistics.median(result["milliseconds"])
            fastest[kind] = min(result["milliseconds"])
            stolen = max(stolen, result["stolen_share"])
        found.append((stolen, milliseconds, fastest))
    calm = sorted(found, key=lambda one: one[0])[: (rounds + 1) // 2]
    medians, least = ({kind: [one[index][kind] for one in calm] for kind in kinds} for index in (1, 2))
    return Comparison(medians, least, calm[-1][0])
