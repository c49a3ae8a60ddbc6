"""What a benchmark found, as typed structs with JSON in and out. Times are milliseconds of one call of a whole batch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import msgspec

from edge_backbones.errors import InputError
from edge_backbones.reading import read_file, refusing

FEWEST_TURNS = 6  # below, the largest and the smallest ratio do not hold the median with 95 % confidence


_MAX_BYTES = 64 << 20
_Figure = Annotated[float, msgspec.Meta(ge=-1e15, le=1e15)]
_Amount = Annotated[float, msgspec.Meta(ge=0, le=1e15)]
_Quotient = Annotated[float, msgspec.Meta(gt=0, le=1e15)]


class _Strict(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    pass


class Machine(_Strict, frozen=True):
    """Where it was measured. ``settings``: what decides its speed, where it can be read (governor, clocks)."""

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
    """One contender. ``missing`` is not empty for one that did not run, and the figures are None: its message, or the command
    that installs it.

    ``turns``: the median of each turn, in the order of the turns, which all contenders of a run share. ``jitter``: the middle
    80 % of the calls, as a share of the median. ``resident_mb`` and ``device_mb``: what loading and the first call added to a
    process with Python and numpy. ``joules``: per image, where the machine has a meter.
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
    """How many times the first contender's time another one takes, turn by turn. ``low`` to ``high``: where the median of the
    turns lies with 95 % confidence (order statistics), if there were ``turns`` enough to say that: six. Where there were not,
    or 1 is inside, the machine does not tell which is faster."""

    name: str
    median: _Quotient
    low: _Quotient
    high: _Quotient
    turns: Annotated[int, msgspec.Meta(ge=0, le=1 << 50)] | None = None

    @property
    def is_sure(self) -> bool:
        return self.turns is None or self.turns >= FEWEST_TURNS

    @property
    def is_ranked(self) -> bool:
        return self.is_sure and not self.low <= 1 <= self.high


class Comparison(_Strict, frozen=True):
    """A bundle's engine, always the first measurement, beside its peers."""

    bundle: str
    engine: str
    precision: str
    input_shape: tuple[int, ...]
    threads: int
    device: str
    date: str
    machine: Machine
    measurements: tuple[Measurement, ...]
    ratios: tuple[Ratio, ...]


def ratio_of(name: str, theirs: Sequence[float], ours: Sequence[float]) -> Ratio:
    """From medians of turns that were taken side by side, at least one of each."""
    ratios = sorted(their / our for their, our in zip(theirs, ours, strict=True))
    low, high = median_bounds(len(ratios))
    return Ratio(name=name, median=_median(ratios), low=ratios[low], high=ratios[high], turns=len(ratios))


def median_bounds(count: int) -> tuple[int, int]:
    """Indices into ``count`` sorted values between which their population's median lies with at least 95 % confidence; all of
    them where they are too few (fewer than six) to say that. Binomial order statistics: no distribution is assumed."""
    low = 0
    below = 0.5**count  # that so many or fewer of the values lie below the median
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
    """Indented JSON."""
    return msgspec.json.format(msgspec.json.encode(comparison), indent=1) + b"\n"


def decode(data: bytes, source: str) -> Comparison:
    """Parse what `encode` wrote; raises InputError naming ``source``."""
    with refusing(lambda why: InputError(f"{source} is not a result of edge-backbones bench: {why}")):
        return msgspec.json.decode(data, type=Comparison)


def read(path: Path) -> Comparison:
    """A file that `encode` wrote; raises InputError naming it."""
    try:
        data = read_file(path, limit=_MAX_BYTES)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from error
    return decode(data, str(path))


def regressions(now: Comparison, before: Comparison) -> list[str]:
    """Where the engine lost ground to a peer beyond noise, a phrase each: the bounds of then and now do not overlap.

    Raises InputError for results of another network, input, number of threads or kind of device: they say nothing here.
    """
    for what in ("bundle", "precision", "input_shape", "threads", "device"):
        here, there = getattr(now, what), getattr(before, what)
        if here != there:
            raise InputError(f"the results differ in {what}: {here} now, {there} then; compare like with like")
    earlier = {ratio.name: ratio for ratio in before.ratios}
    return [
        f"{ratio.name} takes {ratio.median:.2f} times our time ({ratio.low:.2f} to {ratio.high:.2f}), "
        f"{then.median:.2f} ({then.low:.2f} to {then.high:.2f}) on {before.date}"
        for ratio in now.ratios
        if (then := earlier.get(ratio.name)) is not None and ratio.is_sure and then.is_sure and ratio.high < then.low
    ]
