"""Engines that are tried for a bundle: each compiled and measured, int8 loosened until its gate holds, the best kept.

A precision is one attempt. int8 that is outside its gate is tried again with the noisiest blocks left in half, as many as
the measured noise of each block says (`choose.noise_of_blocks`), until it holds or no block is left.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edge_backbones.build import choose, quantize
from edge_backbones.build.artifacts import CompiledEngine, ExportedGraph, Progress, TypedGraph
from edge_backbones.build.compile import compile_engine
from edge_backbones.build.parity import measure_engine
from edge_backbones.build.timing import time_engines
from edge_backbones.manifest import Decision, Gate, ParityReport, StageParity, Trial
from edge_backbones.spec import Precision

# What the worst golden image needs beyond the mean of the held-out ones, and rounding of the rest to half.
_MARGIN = 1.25


@dataclass(frozen=True)
class Attempt:
    """One engine and its parity. ``blocks``: those that the gate cost; ``excluded``: all layers that int8 leaves alone."""

    typed: TypedGraph
    engine: CompiledEngine
    report: ParityReport
    blocks: tuple[str, ...] = ()
    excluded: tuple[str, ...] = ()
    milliseconds: float | None = None

    @property
    def precision(self) -> Precision:
        return self.typed.precision


@dataclass(frozen=True)
class Workshop:
    """What every attempt is made with. ``large``: tensors that fp16 may not hold."""

    graph: ExportedGraph
    golden: Mapping[str, np.ndarray]
    large: Sequence[str]
    work: Path
    cache: Path | None
    progress: Progress

    def attempt(
        self,
        precision: Precision,
        gate: Gate,
        *,
        ranges: Mapping[str, float] | None = None,
        shifts: Mapping[str, Sequence[float]] | None = None,
        blocks: Sequence[str] = (),
        excluded: frozenset[str] = frozenset(),
    ) -> Attempt:
        """Write, compile and measure one typed graph."""
        self.progress(f"typing the {precision} graph", 0, None)
        path = self.work / f"{precision}-{len(blocks)}.onnx"
        typed = quantize.write_typed_graph(
            self.graph,
            precision=precision,
            path=path,
            ranges=ranges,
            shifts=shifts,
            excluded=excluded,
            large=self.large,
        )
        self.progress(f"compiling {precision}", 0, None)
        engine = compile_engine(path.read_bytes(), precision, cache=self.cache)
        self.progress(f"verifying {precision}", 0, None)
        report = measure_engine(engine.data, self.graph.spec, self.graph.input, self.golden, precision, gate)
        return Attempt(typed, engine, report, tuple(blocks), tuple(sorted(excluded)))


def try_int8(
    shop: Workshop,
    gate: Gate,
    *,
    ranges: Mapping[str, float],
    shifts: Mapping[str, Sequence[float]],
    excluded: frozenset[str],
    held_out: Callable[[], Sequence[np.ndarray]],
    fallback: bool,
) -> list[Attempt]:
    """int8 with everything quantised that may be, then, with ``fallback``, with ever fewer blocks; the last one counts.

    ``excluded``: layers that stay in half whatever happens. ``held_out``: batches to measure blocks on, asked for once.
    """
    attempts = [shop.attempt(Precision.INT8, gate, ranges=ranges, shifts=shifts, excluded=excluded)]
    layers = quantize.quantized_layers(shop.graph)
    noise: dict[str, choose.Noise] = {}
    out: list[str] = []
    while fallback and not attempts[-1].report.passed:
        if not noise:
            noise = choose.noise_of_blocks(
                shop.graph, ranges, held_out(), excluded=excluded, work=shop.work, progress=shop.progress
            )
        left = {block: of_block for block, of_block in noise.items() if block not in out}
        if not left:
            break
        gate_asks = {stage.stage: _MARGIN * _excess(stage, gate) for stage in attempts[-1].report.stages}
        out += choose.blocks_to_exclude(left, gate_asks) or [next(iter(left))]
        without = excluded | {layer.name for layer in layers if layer.block in out}
        attempts.append(shop.attempt(Precision.INT8, gate, ranges=ranges, shifts=shifts, blocks=out, excluded=without))
    return attempts


def timed(attempts: Sequence[Attempt], progress: Progress) -> list[Attempt]:
    """The same attempts with their latency on this device."""
    if not attempts:
        return []
    graph = attempts[0].typed
    figures = time_engines([a.engine.data for a in attempts], graph.spec.outputs, graph.input, progress=progress)
    return [dataclasses.replace(a, milliseconds=figure) for a, figure in zip(attempts, figures, strict=True)]


def fastest(attempts: Sequence[Attempt]) -> tuple[Attempt, str]:
    """The fastest attempt that is inside its gate, and why it is that one in a sentence. One of them must be inside."""
    passed = [attempt for attempt in attempts if attempt.report.passed]
    best = min(passed, key=lambda attempt: attempt.milliseconds or math.inf)
    rest = sorted((a for a in passed if a is not best), key=lambda attempt: attempt.milliseconds or math.inf)
    times = ", ".join(f"{_label(a)} {a.milliseconds:.2f} ms" for a in (best, *rest))
    failed = [a for a in attempts if a.precision not in {p.precision for p in passed}]
    reasons = [f"{_label(a)} is outside its gate ({a.report.failures()})" for a in failed[-1:]]
    slow = next((a for a in rest if a.precision is Precision.INT8 and best.precision is not Precision.INT8), None)
    if slow is not None:
        ratio = (best.milliseconds or 0.0) / (slow.milliseconds or math.inf)
        reasons.append(f"{_label(slow)} is {ratio:.2f}x {_label(best)} here")
    return best, f"{'; '.join([*reasons, times])}: shipping {_label(best)}"


def loosened(attempts: Sequence[Attempt]) -> str:
    """What the gate of int8 cost, in a sentence."""
    first, last = attempts[0], attempts[-1]
    return (
        f"int8 is outside its gate ({first.report.failures()}): shipping it with {len(last.blocks)} blocks in half "
        f"({', '.join(last.blocks[:5])}{', ...' if len(last.blocks) > 5 else ''})"
    )


def decision(sentence: str, attempts: Sequence[Attempt]) -> Decision:
    """For the manifest."""
    trials = tuple(
        Trial(
            precision=a.precision,
            blocks=a.blocks,
            cosine=min(stage.cosine for stage in a.report.stages),
            sqnr_db=min(stage.sqnr_db for stage in a.report.stages),
            passed=a.report.passed,
            milliseconds=a.milliseconds,
        )
        for a in attempts
    )
    return Decision(sentence=sentence, device_name=attempts[0].engine.key.device_name, trials=trials)


def _label(attempt: Attempt) -> str:
    without = f" without {len(attempt.blocks)} blocks" if attempt.blocks else ""
    return f"{attempt.precision}{without}"


def _excess(stage: StageParity, gate: Gate) -> float:
    """How many times more noise an output has than its gate allows; noise across the signal has cosine 1/sqrt(1 + n)."""
    if not stage.finite:
        return math.inf
    asked = [1.0]
    if gate.min_sqnr_db is not None:
        asked.append(10 ** ((gate.min_sqnr_db - stage.sqnr_db) / 10))
    if gate.max_relative is not None:
        asked.append(_ratio(stage.relative**2, gate.max_relative**2))
    if gate.min_cosine is not None:
        asked.append(_ratio(_across(stage.cosine), _across(gate.min_cosine)))
    return max(asked)


def _across(cosine: float) -> float:
    return 1 / cosine**2 - 1 if cosine > 0 else math.inf


def _ratio(measured: float, allowed: float) -> float:
    if measured <= 0 or measured == allowed:
        return 1.0
    return measured / allowed if allowed > 0 else math.inf
