"""Engines that are tried for a bundle: each compiled and measured, int8 and fp8 loosened until they hold their gates.

A precision is one attempt. int8 (or fp8) that is outside its gate is tried again with the noisiest blocks left in half,
as many as the measured noise of each block says (`choose.noise_of_blocks`), until it holds or one block alone is 8 bits;
of those as few as it needs.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from edge_backbones.bundle.golden import GoldenSamples
from edge_backbones.bundle.manifest import BlockNoise, CalibrationFile, Decision, Trial
from edge_backbones.deploy.parity import advice_on_building, excess_noise, measure_engine, require
from edge_backbones.deploy.timing import time_engines
from edge_backbones.engines import select as session
from edge_backbones.engines.base import CompiledEngine
from edge_backbones.engines.openvino.compile import compile_graph
from edge_backbones.engines.promises import DEFAULT_GATES
from edge_backbones.parity_report import Gate, ParityReport
from edge_backbones.progress import Progress
from edge_backbones.spec import Precision
from edge_backbones.toolchain.artifacts import ExportedGraph, TypedGraph
from edge_backbones.toolchain.calibration import noise as choose
from edge_backbones.toolchain.quantize import qdq as quantize

# What the worst golden image needs beyond the mean of the held-out ones, and rounding of the rest to half.
_MARGIN = 1.25
_TIE = 1.03  # latencies within 3 % of each other are equal

SKIPS = "op:Add"
"""Among the blocks of an attempt: the skip branches of all residual additions, in the words of ``--exclude``."""


@dataclass(frozen=True)
class Attempt:
    """One engine and its parity. ``blocks``: those that the gate cost; ``excluded``: all layers that int8 leaves alone.

    ``report`` is of the graph as it is written, which other devices compute: decisions follow it. ``shipped`` is of the
    engine, which rounds more finely where it can (`cpu_graph`). Both have to hold the gate.
    """

    typed: TypedGraph
    engine: CompiledEngine
    report: ParityReport
    shipped: ParityReport
    blocks: tuple[str, ...] = ()
    excluded: tuple[str, ...] = ()
    milliseconds: float | None = None

    @property
    def precision(self) -> Precision:
        return self.typed.precision

    @property
    def passed(self) -> bool:
        return self.report.passed and self.shipped.passed

    def failures(self) -> str:
        return self.report.failures() or self.shipped.failures()


@dataclass(frozen=True)
class Verdict:
    """``chosen``: shipped as engines. ``spare``: shipped as graphs, for devices that weigh them anew. ``decision``: why."""

    chosen: list[Attempt]
    spare: list[Attempt]
    decision: Decision | None


@dataclass(frozen=True)
class Workshop:
    """What every attempt is made with.

    ``equalised``: the graph that ``calibration`` holds ranges of. ``deciding``: images to measure blocks on. ``excluded``:
    layers that stay in half whatever happens. ``large``: tensors that fp16 may not hold.
    """

    graph: ExportedGraph
    equalised: ExportedGraph
    calibration: CalibrationFile | None
    deciding: Sequence[choose.Sample]
    excluded: frozenset[str]
    golden: GoldenSamples
    large: Sequence[str]
    work: Path
    cache: Path | None
    progress: Progress

    def attempt(self, precision: Precision, gate: Gate, *, blocks: Sequence[str] = ()) -> Attempt:
        """Write, compile and measure one typed graph; int8 and fp8 leave ``blocks`` (of `choose.noise_of_blocks`) alone."""
        self.progress(f"typing the {precision} graph", 0, None)
        path = self.work / f"{precision}-{len(blocks)}.onnx"
        graph, ranges, shifts, excluded = self.graph, None, None, frozenset[str]()
        if self.calibration is not None and precision.is_calibrated:
            graph, excluded = self.equalised, self.without(blocks)
            ranges = self.calibration.ranges if precision is Precision.INT8 else self.calibration.largest
            shifts = self.calibration.shifts
        typed = quantize.write_typed_graph(
            graph, precision=precision, path=path, ranges=ranges, shifts=shifts, excluded=excluded, large=self.large
        )
        self.progress(f"compiling {precision}", 0, None)
        engine = compile_graph(path.read_bytes(), precision, cache=self.cache)
        self.progress(f"verifying {precision}", 0, None)
        report = shipped = self.measure(engine, gate)
        if precision is Precision.INT8:
            as_written = compile_graph(path.read_bytes(), precision, cache=self.cache, as_written=True)
            report = self.measure(as_written, gate)
        return Attempt(typed, engine, report, shipped, tuple(blocks), tuple(sorted(excluded)))

    def measure(self, engine: CompiledEngine, gate: Gate) -> ParityReport:
        return measure_engine(engine.key, engine.data, self.graph.spec, self.graph.input, self.golden, gate)

    def without(self, blocks: Sequence[str]) -> frozenset[str]:
        """The layers that stay in half when these blocks do."""
        layers = quantize.quantized_layers(self.equalised)
        meant = {layer.name for layer in layers if layer.block in blocks or f"op:{layer.op_type}" in blocks}
        return self.excluded | meant


def decide(
    shop: Workshop, wanted: Sequence[Precision], gates: Mapping[Precision, Gate], *, auto: bool, fallback: bool
) -> Verdict:
    """What goes into the bundle, and why, where there was something to weigh.

    One engine for each of these precisions, or with ``auto`` the fastest of all. Several are timed side by side. Raises
    ParityError for a precision outside its gate; with ``auto`` for fp32 only.
    """
    tried: list[Attempt] = []
    chosen: list[Attempt] = []
    noise: dict[str, choose.Noise] = {}
    for precision in wanted:
        gate = gates.get(precision, DEFAULT_GATES[precision])
        if precision.is_calibrated:
            of_precision, measured = try_quantized(shop, precision, gate, fallback=fallback, compare=auto)
            noise = noise or measured
        else:
            of_precision = [shop.attempt(precision, gate)]
        if not auto or precision is Precision.FP32:
            require(of_precision[-1].report, advice=advice_on_building)
            require(of_precision[-1].shipped, advice=advice_on_building)
        tried += of_precision
        chosen.append(of_precision[-1])
    if len(tried) > 1:
        positions = [tried.index(attempt) for attempt in chosen]
        tried = timed(tried, shop.progress)
        chosen = [tried[position] for position in positions]
    if auto:
        best, sentence = fastest(tried)
        spare = [a for a in chosen if a.passed and a.precision not in (best.precision, Precision.FP32)]
        return Verdict([best], spare, decision(sentence, tried, noise))
    if len(tried) > len(chosen):
        by_precision = [[a for a in tried if a.precision is one.precision] for one in chosen]
        sentence = "; ".join(loosened(of_precision) for of_precision in by_precision if len(of_precision) > 1)
        return Verdict(chosen, [], decision(sentence, tried, noise))
    return Verdict(chosen, [], None)


def try_quantized(
    shop: Workshop, precision: Precision, gate: Gate, *, fallback: bool, compare: bool
) -> tuple[list[Attempt], dict[str, choose.Noise]]:
    """int8 or fp8 with everything quantised that may be; then without the skip branches; then with ever fewer blocks.

    The last one counts. With ``fallback`` the steps go on until the gate holds; what was measured of each block alone comes
    with them then. With ``compare`` the second is taken anyway: without skips int8 is a good deal more accurate, and on some
    devices as fast.
    """
    assert shop.calibration is not None  # the pipeline calibrates before it asks for either
    layers = quantize.quantized_layers(shop.equalised)
    has_skips = any(layer.op_type == "Add" and layer.name not in shop.excluded for layer in layers)
    attempts = [shop.attempt(precision, gate)]
    out: list[str] = []
    if has_skips and (compare or (fallback and not attempts[-1].passed)):
        out = [SKIPS]
        attempts.append(shop.attempt(precision, gate, blocks=out))
    noise: dict[str, choose.Noise] = {}
    while fallback and not any(attempt.passed for attempt in attempts):
        if not noise:
            noise = choose.noise_of_blocks(
                shop.equalised,
                shop.calibration.ranges if precision is Precision.INT8 else shop.calibration.largest,
                shop.deciding,
                precision=precision,
                excluded=shop.without(out),
                work=shop.work,
                progress=shop.progress,
            )
        left = {block: of_block for block, of_block in noise.items() if block not in out}
        excess = {stage.stage: excess_noise(stage, gate) for stage in attempts[-1].report.stages}
        gate_asks = {output: _MARGIN * times if times > 1 else 1.0 for output, times in excess.items()}
        loudest = choose.blocks_to_exclude(left, gate_asks) or [max(left, key=lambda block: max(left[block].values()))]
        loudest = loudest[: len(left) - 1]  # with nothing quantised it would be fp16
        if not loudest:
            break
        attempts.append(shop.attempt(precision, gate, blocks=[*out, *loudest]))
        if attempts[-1].passed:
            attempts += fewest_blocks(shop, attempts.pop(), gate, least=len(out))
        out = [*out, *loudest]
    return attempts, noise


def fewest_blocks(shop: Workshop, passed: Attempt, gate: Gate, *, least: int) -> list[Attempt]:
    """By bisection: attempts with fewer blocks, the last one inside the gate with the fewest; ``least`` are too few."""
    tried: list[Attempt] = []
    while len(passed.blocks) - least > 1:
        middle = (least + len(passed.blocks)) // 2
        attempt = shop.attempt(passed.precision, gate, blocks=passed.blocks[:middle])
        if attempt.passed:
            tried.append(passed)
            passed = attempt
        else:
            tried.append(attempt)
            least = middle
    return [*tried, passed]


def timed(attempts: Sequence[Attempt], progress: Progress) -> list[Attempt]:
    """The same attempts with their latency on this device."""
    graph = attempts[0].typed
    engines = [
        functools.partial(session.load_engine, a.engine.key, bytearray(a.engine.data), graph.spec, graph.input)
        for a in attempts
    ]
    figures = time_engines(engines, graph.input, progress=progress)
    return [dataclasses.replace(a, milliseconds=figure) for a, figure in zip(attempts, figures, strict=True)]


def fastest(attempts: Sequence[Attempt]) -> tuple[Attempt, str]:
    """The fastest attempt that is inside its gate, and why it is that one in a sentence. One of them must be inside.

    Of those that timing cannot tell apart it is one without rounding to 8 bits, else the most accurate.
    """
    passed = [attempt for attempt in attempts if attempt.passed]
    first = min(passed, key=_latency)
    tied = [a for a in passed if _latency(a) <= _TIE * _latency(first)]
    floats = [a for a in tied if not a.precision.is_calibrated]
    alike = [a for a in tied if a.precision is first.precision]
    # int8 that is not measured to be faster is not shipped.
    best = min(floats, key=_latency) if floats else max(alike, key=_worst_sqnr)
    rest = sorted((a for a in passed if a is not best), key=_latency)
    times = ", ".join(f"{_label(a)} {a.milliseconds:.2f} ms" for a in (best, *rest))
    failed = [a for a in attempts if a.precision not in {p.precision for p in passed}]
    reasons = [f"{_label(a)} is outside its gate ({a.failures()})" for a in failed[-1:]]
    slow = next((a for a in rest if a.precision is Precision.INT8 and best.precision is not Precision.INT8), None)
    if slow is not None and best is first:
        reasons.append(f"{_label(slow)} is {_latency(best) / _latency(slow):.2f}x {_label(best)} here")
    if best is not first:
        gain = _worst_sqnr(best) - _worst_sqnr(first)
        reasons.append(f"{_label(best)} is as fast as {_label(first)} here and {gain:.1f} dB more accurate")
    return best, f"{'; '.join([*reasons, times])}: shipping {_label(best)}"


def loosened(attempts: Sequence[Attempt]) -> str:
    """What the gate of int8 or fp8 cost, in a sentence."""
    first, last = attempts[0], attempts[-1]
    return (
        f"{first.precision} is outside its gate ({first.failures()}): shipping it with {len(last.blocks)} parts in half "
        f"({', '.join(last.blocks[:5])}{', ...' if len(last.blocks) > 5 else ''})"
    )


def decision(sentence: str, attempts: Sequence[Attempt], noise: Mapping[str, choose.Noise]) -> Decision:
    """For the manifest; ``noise`` of each block alone."""
    trials = tuple(
        Trial(
            precision=a.precision,
            blocks=a.blocks,
            cosine=min(stage.cosine for stage in a.report.stages),
            sqnr_db=min(stage.sqnr_db for stage in a.report.stages),
            passed=a.passed,
            milliseconds=a.milliseconds,
        )
        for a in attempts
    )
    loudest_first = sorted(noise.items(), key=lambda item: -max(item[1].values()))
    sensitivity = tuple(
        BlockNoise(
            block=block, sqnr_db={o: round(-10 * math.log10(max(share, 1e-30)), 2) for o, share in of_block.items()}
        )
        for block, of_block in loudest_first
    )
    device_name = attempts[0].engine.key.device_name
    return Decision(sentence=sentence, device_name=device_name, trials=trials, sensitivity=sensitivity)


def _label(attempt: Attempt) -> str:
    blocks = [block for block in attempt.blocks if block != SKIPS]
    without = ["its skip branches"] * (SKIPS in attempt.blocks) + [f"{len(blocks)} blocks"] * bool(blocks)
    return f"{attempt.precision} without {' and '.join(without)}" if without else str(attempt.precision)


def _latency(attempt: Attempt) -> float:
    return math.inf if attempt.milliseconds is None else attempt.milliseconds


def _worst_sqnr(attempt: Attempt) -> float:
    return min(stage.sqnr_db for stage in attempt.report.stages)
