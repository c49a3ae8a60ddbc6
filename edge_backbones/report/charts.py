"""Numbers of the report as bars, points and columns: parity, what a build tried, calibrated ranges, comparisons."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from edge_backbones.bench.results import Comparison, Measurement, Ratio
from edge_backbones.bundle.manifest import CalibrationFile, Decision, decode_calibration
from edge_backbones.bundle.reader import Bundle
from edge_backbones.parity_report import ParityReport

_TENSORS_SHOWN = 10
_COLUMNS_SHOWN = 12
_BEST_COSINE = 1 - 1e-9  # the end of the scale of nines, on which 1 itself is infinitely far away

# ---- parity ---------------------------------------------------------------------------------------------------------


class Bar(NamedTuple):
    """The length of a bar and the place of the bound that it has to pass, as shares of the axis from 0 to 1."""

    length: float
    line: float | None = None


class StageBars(NamedTuple):
    """The bars of one stage: its SQNR and its cosine."""

    sqnr: Bar
    cosine: Bar


def chart_parity(report: ParityReport) -> list[StageBars]:
    """Return the bars of every stage of a report, none for one without figures.

    SQNR is on a scale of dB, on which a bound of the relative error is drawn too; cosine is on a scale of nines.
    """
    if not report.measured:
        return []
    gate = report.gate
    asked_db = [gate.min_sqnr_db] if gate.min_sqnr_db is not None else []
    asked_db += [-20 * math.log10(gate.max_relative)] if gate.max_relative else []
    asked_nines = [] if gate.min_cosine is None else [_nines(gate.min_cosine)]
    decibels = _bars([s.sqnr_db if s.finite else 0.0 for s in report.stages], max(asked_db, default=None))
    cosines = _bars([_nines(s.cosine) if s.finite else 0.0 for s in report.stages], max(asked_nines, default=None))
    return [StageBars(sqnr, cosine) for sqnr, cosine in zip(decibels, cosines, strict=True)]


def _nines(cosine: float) -> float:
    """Return how many nines a cosine has: 2 for 0.99, 3 for 0.999."""
    return -math.log10(1 - min(max(cosine, 0.0), _BEST_COSINE))


def _bars(values: Sequence[float], line: float | None = None) -> list[Bar]:
    """Return values and a bound as bars on an axis from 0 to a little more than the largest."""
    end = max([*values, line or 0.0]) * 1.04 or 1.0
    at = None if line is None else max(line, 0.0) / end
    return [Bar(max(value, 0.0) / end, at) for value in values]


# ---- what a build tried, and calibration ----------------------------------------------------------------------------


class TensorRange(NamedTuple):
    """The range of a tensor, and the largest value that calibration saw, None if that is not known.

    ``module`` and ``op``: the module that computes the tensor, and the operator; empty if the graph does not say.
    """

    tensor: str
    module: str
    op: str
    value: float
    largest: float | None


class Calibration(NamedTuple):
    """The calibrated ranges of tensors.

    ``columns``: a histogram, as (low, high, how many ranges lie between). ``widest``: the tensors with the largest ranges.
    ``every``: all of them, in the order of the graph.
    """

    file: CalibrationFile
    columns: list[tuple[float, float, int]]
    widest: list[TensorRange]
    every: list[TensorRange]


class Point(NamedTuple):
    """One trial of a build. ``x`` and ``y`` are between 0 and 1: right is slower, up is more accurate."""

    number: int
    x: float
    y: float
    passed: bool


class Trade(NamedTuple):
    """Trials of a build as points. x spans 0 to ``milliseconds``, y spans ``least_db`` to ``most_db``."""

    points: list[Point]
    milliseconds: float
    least_db: float
    most_db: float


def chart_trials(decision: Decision | None) -> Trade | None:
    """Return the timed trials as accuracy over time, None if fewer than two engines were timed."""
    trials = enumerate(() if decision is None else decision.trials, start=1)
    timed = [(number, trial, trial.milliseconds) for number, trial in trials if trial.milliseconds is not None]
    if len(timed) < 2:
        return None
    slowest = max(milliseconds for *_, milliseconds in timed) or 1.0
    decibels = [trial.sqnr_db for _, trial, _ in timed]
    least, most = min(decibels), max(decibels)
    points = [
        Point(number, milliseconds / slowest, (trial.sqnr_db - least) / ((most - least) or 1.0), trial.passed)
        for number, trial, milliseconds in timed
    ]
    return Trade(points, slowest, least, most)


def chart_calibration(bundle: Bundle, writers: Mapping[str, str]) -> Calibration | None:
    """Return the ranges of a bundle's calibration, None for a bundle without one.

    ``writers``: by tensor, the name of the node that computes it, as in `Layers`.
    """
    record = bundle.manifest.calibration
    if record is None:
        return None
    file = decode_calibration(bundle.read(record.file), str(bundle.path / record.file.path))
    every = [
        TensorRange(
            tensor,
            *_writer_of(tensor, writers),
            file.ranges.get(f"{tensor}.centred", value),
            file.largest.get(tensor),
        )
        for tensor, value in file.ranges.items()
        if tensor.removesuffix(".centred") not in file.centres or not tensor.endswith(".centred")
    ]
    widest = sorted(every, key=lambda one: (-one.value, one.tensor))[:_TENSORS_SHOWN]
    return Calibration(file, _columns([one.value for one in every if 0 < one.value < math.inf]), widest, every)


def _writer_of(tensor: str, writers: Mapping[str, str]) -> tuple[str, str]:
    """Return the module and the operator that compute a tensor; empty for an input or a tensor that the graph lacks."""
    # A typed graph computes in half what it returns in fp32, or the other way round: one of the two is only cast.
    nodes = (writers.get(f"{tensor}.half", "Cast:"), writers.get(tensor, "Cast:"))
    node = next((node for node in nodes if not node.startswith("Cast:")), "")
    module, _, op = node.partition("/")
    return (module, op) if op else ("", module)


def _columns(values: Sequence[float]) -> list[tuple[float, float, int]]:
    """Return a histogram with logarithmic columns: 8, 4, 2 or 1 to an octave, as many as fit on the page."""
    for parts in (8, 4, 2, 1):
        counts = Counter(math.floor(parts * math.log2(value)) for value in values)
        if counts and (parts == 1 or max(counts) - min(counts) < _COLUMNS_SHOWN):
            powers = range(min(counts), max(counts) + 1)
            return [(2 ** (i / parts), 2 ** ((i + 1) / parts), counts[i]) for i in powers]
    return []


# ---- comparisons ----------------------------------------------------------------------------------------------------

# Head, field of a Measurement, digits, and whether a bar is drawn (less is better then).
_COLUMNS = (
    ("median ms", "median_ms", 2, True),
    ("file MB", "file_mb", 1, True),
    ("fastest ms", "fastest_ms", 2, False),
    ("p90 ms", "p90_ms", 2, False),
    ("p99 ms", "p99_ms", 2, False),
    ("jitter", "jitter", 2, False),
    ("images / s", "images_per_second", 1, False),
    ("memory MB", "resident_mb", 0, False),
    ("device MB", "device_mb", 0, False),
    ("load s", "load_s", 2, False),
    ("first call ms", "first_call_ms", 1, False),
    ("J / image", "joules", 3, False),
    ("worst cosine", "worst_cosine", 4, False),
    ("worst SQNR dB", "worst_sqnr_db", 1, False),
)


class Cell(NamedTuple):
    """A figure of one contender, its text, and the length of its bar from 0 to 1, None without a bar."""

    value: float | None
    text: str
    length: float | None


class Peers(NamedTuple):
    """A comparison as a table.

    ``heads``: the columns that any contender has figures for; ``bars`` says which have bars. ``rows``: each contender's
    measurement, how its time compares with this engine's in words, and one cell per column. ``missing``: contenders that did
    not run.
    """

    source: Comparison
    heads: list[str]
    bars: list[bool]
    rows: list[tuple[Measurement, str, list[Cell]]]
    missing: list[Measurement]


def compare_peers(comparison: Comparison) -> Peers:
    """Return the table of a comparison."""
    ran = [m for m in comparison.measurements if not m.missing]
    columns = [column for column in _COLUMNS if any(getattr(m, column[1]) is not None for m in ran)]
    most = {field: max((getattr(m, field) or 0 for m in ran), default=0) for _, field, _, _ in columns}
    ratios = {ratio.name: ratio for ratio in comparison.ratios}
    rows = []
    for measurement in ran:
        cells = []
        for _, field, digits, is_bar in columns:
            value = getattr(measurement, field)
            length = value / most[field] if is_bar and value is not None and most[field] > 0 else None
            cells.append(Cell(value, "" if value is None else f"{value:.{digits}f}", length))
        words = "this engine" if measurement is comparison.measurements[0] else _in_words(ratios.get(measurement.name))
        rows.append((measurement, words, cells))
    missing = [m for m in comparison.measurements if m.missing]
    return Peers(comparison, [head for head, _, _, _ in columns], [drawn for _, _, _, drawn in columns], rows, missing)


def _in_words(ratio: Ratio | None) -> str:
    """Say how a peer's time compares with this engine's: the ratio, its bounds, and which is faster if that is certain."""
    if ratio is None:
        return "not compared"
    figures = f"{ratio.median:.2f} ({ratio.low:.2f} to {ratio.high:.2f})"
    if not ratio.is_ranked:
        return f"{figures}: the machine does not tell which is faster"
    return f"{figures}, {'slower' if ratio.median > 1 else 'faster'} than this engine"
