"""Results of a benchmark as typed structs, and their JSON. Times are milliseconds per call of a whole batch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

import msgspec

from edge_backbones.errors import InputError
from edge_backbones.reading import read_file, refusing, why_not

FEWEST_TURNS = 6  # of fewer, even the largest and smallest ratio do not enclose the median with 95 % confidence
PEERS_IN_FP32 = frozenset({"torch", "torch-compile", "torchscript", "onnxruntime", "openvino-f32", "fp32"})
"""Contenders that run the network in fp32."""

_MAX_BYTES = 64 << 20
_Figure = Annotated[float, msgspec.Meta(ge=-1e15, le=1e15)]
_Amount = Annotated[float, msgspec.Meta(ge=0, le=1e15)]
_Quotient = Annotated[float, msgspec.Meta(gt=0, le=1e15)]


class _Strict(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    pass


class MeasuredMachine(_Strict, frozen=True):
    """The machine that was measured. ``settings``: what decides its speed and can be read (governor, clocks)."""

    name: str
    architecture: str
    cpu_features: tuple[str, ...]
    cores: Annotated[int, msgspec.Meta(ge=0, le=1 << 20)]
    memory_bytes: Annotated[int, msgspec.Meta(ge=0, le=1 << 60)]
    system: str
    python: str
    gpu: str | None
    settings: dict[str, str]
    commit: str | None


class Measurement(_Strict, frozen=True):
    """The figures of one contender.

    ``missing``: for a contender that did not run, its message or the command that installs it; its figures are then None.
    ``turns``: the median of each turn, in order; all contenders of a run took the same turns. ``jitter``: p90 - p10 of the
    calls, divided by their median. ``resident_mb`` and ``device_mb``: the memory that loading and the first call added to a
    process with Python and numpy. ``joules``: per image; None without a meter.
    """

    name: str
    what: str
    versions: dict[str, str] = {}
    missing: str = ""
    turns: tuple[_Amount, ...] = ()
    median_ms: _Amount | None = None
    fastest_ms: _Amount | None = None
    p90_ms: _Amount | None = None
    p99_ms: _Amount | None = None
    jitter: _Amount | None = None
    calls: Annotated[int, msgspec.Meta(ge=0, le=1 << 50)] = 0
    images_per_second: _Amount | None = None
    load_s: _Amount | None = None
    first_call_ms: _Amount | None = None
    resident_mb: _Figure | None = None
    device_mb: _Figure | None = None
    file_mb: _Amount | None = None
    joules: _Figure | None = None
    worst_cosine: _Figure | None = None
    worst_sqnr_db: _Figure | None = None


class Ratio(_Strict, frozen=True):
    """A contender's time divided by the first contender's, over the turns.

    ``low`` to ``high``: 95 % confidence interval of the median (order statistics). It needs at least six ``turns``. With
    fewer, or with 1 inside the interval, nothing says which of the two is faster.
    """

    name: str
    median: _Quotient
    low: _Quotient
    high: _Quotient
    turns: Annotated[int, msgspec.Meta(ge=0, le=1 << 50)] | None = None

    @property
    def is_sure(self) -> bool:
        """Whether there were enough turns for the confidence interval."""
        return self.turns is None or self.turns >= FEWEST_TURNS

    @property
    def is_ranked(self) -> bool:
        """Whether the result says which of the two is faster."""
        return self.is_sure and not self.low <= 1 <= self.high


class Comparison(_Strict, frozen=True):
    """A bundle's engine, which is the first measurement, and its peers."""

    bundle: str
    engine: str
    precision: str
    input_shape: tuple[int, ...]
    threads: int
    device: str
    date: str
    machine: MeasuredMachine
    measurements: tuple[Measurement, ...]
    ratios: tuple[Ratio, ...]


def ratio_of(name: str, theirs: Sequence[float], ours: Sequence[float]) -> Ratio:
    """Return the ratio of two contenders from the medians of the turns that they took side by side, at least one."""
    ratios = sorted(their / our for their, our in zip(theirs, ours, strict=True))
    low, high = median_bounds(len(ratios))
    return Ratio(name=name, median=_median(ratios), low=ratios[low], high=ratios[high], turns=len(ratios))


def median_bounds(count: int) -> tuple[int, int]:
    """Return the indices of the two of ``count`` sorted samples that enclose the true median with 95 % confidence.

    Binomial order statistics assume no distribution. Fewer than six samples cannot reach 95 %: the indices are then those
    of the smallest and the largest.
    """
    low = 0
    below = 0.5**count  # probability that at most ``low`` samples lie below the median
    while low + 1 < count - 1 - (low + 1):
        more = below + math.comb(count, low + 1) * 0.5**count
        if 2 * more > 0.05:
            break
        low, below = low + 1, more
    return low, count - 1 - low


def _median(values: Sequence[float]) -> float:
    middle = len(values) // 2
    return values[middle] if len(values) % 2 else (values[middle - 1] + values[middle]) / 2


def encode(comparison: Comparison) -> bytes:
    """Return a comparison as indented JSON."""
    return msgspec.json.format(msgspec.json.encode(comparison), indent=1) + b"\n"


def decode(data: bytes, source: str) -> Comparison:
    """Parse what `encode` wrote. Raises InputError that names ``source``."""
    with refusing(lambda why: InputError(f"{source} is not a result of edge-backbones bench: {why}")):
        return msgspec.json.decode(data, type=Comparison)


def read(path: Path) -> Comparison:
    """Read a file that `encode` wrote. Raises InputError that names it."""
    try:
        data = read_file(path, limit=_MAX_BYTES)
    except OSError as error:
        raise InputError(
            f"{path} cannot be read: {why_not(error)}. It should be a file that edge-backbones bench wrote with --out"
        ) from error
    return decode(data, str(path))


def refuse_unlike(before: Comparison, peers: Iterable[str], **now: Any) -> None:
    """Raise InputError if results of today cannot be compared with earlier ones.

    Args:
        before: The earlier results.
        peers: Names of today's peers; one of them has to be in the earlier results, with bounds that mean something.
        now: Fields of `Comparison` that are known of today's.
    """
    for what, here in now.items():
        there = getattr(before, what)
        if here != there:
            raise InputError(f"the results differ in {what}: {here} now, {there} then; compare like with like")
    sure = [ratio.name for ratio in before.ratios if ratio.is_sure]
    if not set(sure) & set(peers):
        held = ", ".join(sure) or f"none, each with fewer than {FEWEST_TURNS} turns"
        raise InputError(
            f"nothing can be compared: the peers are {', '.join(peers) or 'none'} now, and those of {before.date} that count "
            f"are {held}"
        )


def regressions(now: Comparison, before: Comparison) -> list[str]:
    """Return one phrase for each peer that the engine lost ground to: the confidence intervals of then and now are disjoint.

    Raises InputError if the results are of different networks, inputs, numbers of threads or kinds of device, or have no
    peer in common whose bounds mean something.
    """
    like = {what: getattr(now, what) for what in ("bundle", "precision", "input_shape", "threads", "device")}
    refuse_unlike(before, [ratio.name for ratio in now.ratios if ratio.is_sure], **like)
    earlier = {ratio.name: ratio for ratio in before.ratios}
    return [
        f"{ratio.name} takes {ratio.median:.2f} times our time ({ratio.low:.2f} to {ratio.high:.2f}), "
        f"{then.median:.2f} ({then.low:.2f} to {then.high:.2f}) on {before.date}"
        for ratio in now.ratios
        if (then := earlier.get(ratio.name)) is not None and ratio.is_sure and then.is_sure and ratio.high < then.low
    ]
