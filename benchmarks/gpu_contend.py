"""Time contenders side by side: each alone in its process, started once, waiting while another is timed, in turns.

Ratios are taken within a round, and the median of the rounds counts.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.gpu_common import MissingError
from benchmarks.gpu_processes import Child, ChildError, PartFailedError, PartSlowError, SlowChildError
from benchmarks.gpu_targets import contender_name

ROUNDS = 7
SECONDS_PER_TURN = 0.6
_ANSWER = 60.0  # longest time of a turn
_SHARE_OF_ROUNDS = 0.25  # of the time, which contenders may not take to get ready


@dataclass
class _Heat:
    """What came of the contenders, by name."""

    ready: dict[str, dict[str, Any]] = field(default_factory=dict)
    turns: dict[str, list[dict[str, float]]] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)

    def figures(self) -> dict[str, Any]:
        """Return them for the document. Rounds that are not whole do not count."""
        whole = min((len(turn) for turn in self.turns.values()), default=0)
        kept = {name: turn[:whole] for name, turn in self.turns.items() if whole and name not in self.failed}
        return {
            "rounds": whole,
            "contenders": {name: {**self.ready[name], **medians(turn)} for name, turn in kept.items()},
            "not_run": self.missing,
            "failed": self.failed,
            "times_faster_than": ratios(kept),
        }


def compare(
    device: int | str, model: str, batch: int, kinds: Sequence[dict[str, Any]], seconds: float, rounds: int = ROUNDS
) -> dict[str, Any]:
    """Return the figures of contenders.

    Raises:
        PartFailedError: A contender failed; the figures have the others.
        MissingError: None of them can run here.
        PartSlowError: There was no time for a round, or a contender did not get ready.
    """
    heat, end = _Heat(), time.monotonic() + seconds
    latest = end - _SHARE_OF_ROUNDS * seconds
    slow = ""
    with contextlib.ExitStack() as stack:
        children: dict[str, Child] = {}
        for kind in kinds:
            name, start = contender_name(kind), time.monotonic()
            try:
                if start >= latest:
                    raise SlowChildError("it was not started, because the time was nearly over")
                child = stack.enter_context(Child("contend", device=device, model=model, batch=batch, **kind))
                facts = child.read(latest - start)
                heat.ready[name] = {**facts, "ready_s": round(time.monotonic() - start, 1)}
                children[name] = child
            except SlowChildError as error:
                slow = slow or f"{name}: {error}"
                heat.missing[name] = str(error)
            except MissingError as error:
                heat.missing[name] = str(error)
            except ChildError as error:
                heat.failed[name] = str(error)
        _take_turns(heat, children, end, rounds)
    figures = heat.figures()
    if heat.failed:
        raise PartFailedError("; ".join(f"{name}: {why}" for name, why in heat.failed.items()), figures)
    if not children and not slow:
        raise MissingError("; ".join(f"{name}: {why}" for name, why in heat.missing.items()))
    if slow or not figures["rounds"]:
        raise PartSlowError(slow or f"no round ended within {seconds:.0f} s", figures)
    return figures


def _take_turns(heat: _Heat, children: dict[str, Child], end: float, rounds: int) -> None:
    """Time all contenders once a round, until one fails or a further round might not end in time."""
    heat.turns = {name: [] for name in children}
    longest = 2 * SECONDS_PER_TURN * len(children)
    for _ in range(rounds):
        start = time.monotonic()
        if end - start < longest or heat.failed.keys() & children.keys():
            return
        for name, child in children.items():
            try:
                answer = child.ask({"seconds": SECONDS_PER_TURN}, min(_ANSWER, end - time.monotonic()))
                heat.turns[name].append(answer)
            except ChildError as error:
                heat.failed[name] = str(error)
                break
        longest = max(longest, time.monotonic() - start)


def medians(turns: Sequence[dict[str, float]]) -> dict[str, float]:
    """Return the median of each figure over the rounds."""
    return {key: statistics.median(turn[key] for turn in turns) for key in turns[0]} if turns else {}


def ratios(turns: dict[str, list[dict[str, float]]]) -> dict[str, dict[str, dict[str, float]]]:
    """Return how many times faster each contender is than each other: medians of the ratios within a round."""

    def ratio(fast: str, slow: str, key: str) -> float:
        return statistics.median(b[key] / a[key] for a, b in zip(turns[fast], turns[slow], strict=True))

    keys = ("latency_ms", "pipelined_ms")
    return {
        fast: {slow: {key: ratio(fast, slow, key) for key in keys} for slow in turns if slow != fast} for fast in turns
    }
