"""Try candidates for a bundle: compile and measure each, and exclude layers from int8 and fp8 until they hold their gates.

fp32, fp16 and bf16 have one candidate. If int8 or fp8 misses its gate, the noisiest blocks stay in half, as many as the
measured noise of each block asks for (`noise_of_blocks`), until the gate holds or a single block is left. Then a bisection
finds the fewest blocks that suffice.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from edge_backbones.bundle.golden import GoldenSamples
from edge_backbones.bundle.manifest import BlockNoise, Decision, Trial
from edge_backbones.deploy.parity import advice_on_building, excess_noise, measure_engine, require
from edge_backbones.deploy.timing import time_engines
from edge_backbones.engines import select as session
from edge_backbones.engines.base import CompiledEngine
from edge_backbones.engines.openvino.compile import compile_graph
from edge_backbones.engines.promises import DEFAULT_GATES
from edge_backbones.parity_report import Gate, ParityReport
from edge_backbones.progress import Progress
from edge_backbones.spec import InputSpec, Precision
from edge_backbones.toolchain.artifacts import ExportedGraph, TypedGraph
from edge_backbones.toolchain.calibration.calibrate import Calibrated
from edge_backbones.toolchain.calibration.noise import Noise, blocks_to_exclude, noise_of_blocks
from edge_backbones.toolchain.frame import FrameFront
from edge_backbones.toolchain.quantize.placement import quantized_layers
from edge_backbones.toolchain.quantize.typed_graph import write_typed_graph

# The worst golden image needs this much more than the mean of the held-out images; the rest is rounded to half too.
_MARGIN = 1.25
_TIE = 1.03  # latencies within 3 % of each other are equal

SKIPS = "op:Add"
"""Among the blocks of a candidate: the skip branches of all residual additions, in the words of ``--exclude``."""


@dataclass(frozen=True)
class Candidate:
    """One engine, its graph and its parity.

    Args:
        typed: the graph that the engine was compiled from.
        engine: the engine.
        report: parity of the graph as it is written, which other devices compute. Decisions follow it.
        shipped: parity of the engine, which rounds more finely where it can (see `int8_graph` and `bf16_graph`). Both have to
            hold the gate.
        blocks: the blocks that stay in half so that the gate holds.
        excluded: all layers that int8 or fp8 leaves in half.
        milliseconds: the latency, where several candidates were timed.
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
        """The precision of the graph."""
        return self.typed.precision

    @property
    def passed(self) -> bool:
        """Whether the graph and the engine hold the gate."""
        return self.report.passed and self.shipped.passed

    def failures(self) -> str:
        """Say which stages are outside the gate."""
        return self.report.failures() or self.shipped.failures()


@dataclass(frozen=True)
class Verdict:
    """What goes into the bundle.

    Args:
        chosen: candidates that are shipped as engines.
        spare: candidates whose graphs are shipped too, so that other devices can weigh them again.
        decision: why, where there was something to weigh.
    """

    chosen: list[Candidate]
    spare: list[Candidate]
    decision: Decision | None


@dataclass(frozen=True)
class CandidateInputs:
    """What every candidate of a build is made from: the graphs, the golden samples, and where to work."""

    graph: ExportedGraph
    calibrated: Calibrated
    golden: GoldenSamples
    front: FrameFront | None
    work: Path
    cache: Path | None
    progress: Progress

    @property
    def input(self) -> InputSpec:
        """What the engines take."""
        return self.graph.input if self.front is None else self.front.input


def make_candidate(
    inputs: CandidateInputs, precision: Precision, gate: Gate, *, blocks: Sequence[str] = ()
) -> Candidate:
    """Write, compile and measure one typed graph. int8 and fp8 leave ``blocks`` (of `noise_of_blocks`) in half."""
    calibrated = inputs.calibrated
    inputs.progress(f"typing the {precision} graph", 0, None)
    path = inputs.work / f"{precision}-{len(blocks)}.onnx"
    if precision.is_calibrated:
        excluded = layers_in_half(calibrated, blocks)
        typed = write_typed_graph(
            calibrated.graph,
            precision=precision,
            path=path,
            ranges=ranges_of(calibrated, precision),
            shifts=None if calibrated.file is None else calibrated.file.shifts,
            excluded=excluded,
            large=calibrated.large,
        )
    else:
        excluded = frozenset[str]()
        typed = write_typed_graph(inputs.graph, precision=precision, path=path, large=calibrated.large)
    if inputs.front is not None:
        inputs.front.put_before(path)
        typed = dataclasses.replace(typed, input=inputs.front.input)
    inputs.progress(f"compiling {precision}", 0, None)
    engine = compile_graph(path.read_bytes(), precision, cache=inputs.cache)
    inputs.progress(f"verifying {precision}", 0, None)
    report = shipped = _measure(inputs, engine, gate)
    if precision in (Precision.INT8, Precision.BF16):  # the engine is of an adapted graph: see `compile_graph`
        as_written = compile_graph(path.read_bytes(), precision, cache=inputs.cache, as_written=True)
        report = _measure(inputs, as_written, gate)
    return Candidate(typed, engine, report, shipped, tuple(blocks), tuple(sorted(excluded)))


def _measure(inputs: CandidateInputs, engine: CompiledEngine, gate: Gate) -> ParityReport:
    return measure_engine(engine.key, engine.data, inputs.graph.spec, inputs.input, inputs.golden, gate)


def ranges_of(calibrated: Calibrated, precision: Precision) -> Mapping[str, float]:
    """Return the range of each tensor: in int8 what the estimators chose, in fp8 the largest |x|, since fp8 need not clip."""
    assert calibrated.file is not None  # a build calibrates before it tries int8 or fp8
    return calibrated.file.ranges if precision.info.is_integer else calibrated.file.largest


def layers_in_half(calibrated: Calibrated, blocks: Sequence[str]) -> frozenset[str]:
    """Name the layers that stay in half when these blocks do, including those that the user excluded."""
    layers = quantized_layers(calibrated.graph)
    meant = {layer.name for layer in layers if layer.block in blocks or f"op:{layer.op_type}" in blocks}
    return calibrated.excluded | meant


def decide(
    inputs: CandidateInputs, wanted: Sequence[Precision], gates: Mapping[Precision, Gate], *, auto: bool, fallback: bool
) -> Verdict:
    """Try every wanted precision and decide what goes into the bundle, and why, where there was something to weigh.

    Each precision becomes an engine, or with ``auto`` the fastest of all candidates does. Several candidates are timed side
    by side. ``fallback``: exclude blocks from int8 and fp8 until the gate holds. Raises ParityError for a precision outside
    its gate; with ``auto`` for fp32 only.
    """
    tried: list[Candidate] = []
    chosen: list[Candidate] = []
    noise: dict[str, Noise] = {}
    for precision in wanted:
        gate = gates.get(precision, DEFAULT_GATES[precision])
        if precision.is_calibrated:
            of_precision, measured = try_quantized(inputs, precision, gate, fallback=fallback, compare=auto)
            noise = noise or measured
        else:
            of_precision = [make_candidate(inputs, precision, gate)]
        if not auto or precision is Precision.FP32:
            require(of_precision[-1].report, advice=advice_on_building)
            require(of_precision[-1].shipped, advice=advice_on_building)
        tried += of_precision
        chosen.append(of_precision[-1])
    if len(tried) > 1:
        positions = [tried.index(candidate) for candidate in chosen]
        tried = timed(tried, inputs.progress)
        chosen = [tried[position] for position in positions]
    if auto:
        best, sentence = fastest(tried)
        spare = [c for c in chosen if c.passed and c.precision not in (best.precision, Precision.FP32)]
        return Verdict([best], spare, decision(sentence, tried, noise))
    if len(tried) > len(chosen):
        by_precision = [[c for c in tried if c.precision is one.precision] for one in chosen]
        sentence = "; ".join(loosened(of_precision) for of_precision in by_precision if len(of_precision) > 1)
        return Verdict(chosen, [], decision(sentence, tried, noise))
    return Verdict(chosen, [], None)


def try_quantized(
    inputs: CandidateInputs, precision: Precision, gate: Gate, *, fallback: bool, compare: bool
) -> tuple[list[Candidate], dict[str, Noise]]:
    """Try int8 or fp8 with everything quantised that may be, then without the skip branches, then with ever fewer blocks.

    The last candidate counts. With ``fallback`` this goes on until one holds the gate; the noise of each block alone is
    returned too then. With ``compare`` the candidate without skip branches is made in any case: it is more accurate by a good
    deal, and on some devices as fast.
    """
    layers = quantized_layers(inputs.calibrated.graph, precision)
    has_skips = any(layer.op_type == "Add" and layer.name not in inputs.calibrated.excluded for layer in layers)
    candidates = [make_candidate(inputs, precision, gate)]
    out: list[str] = []
    if has_skips and (compare or (fallback and not candidates[-1].passed)):
        out = [SKIPS]
        candidates.append(make_candidate(inputs, precision, gate, blocks=out))
    noise: dict[str, Noise] = {}
    while fallback and not any(candidate.passed for candidate in candidates):
        if not noise:
            noise = noise_of_blocks(
                inputs.calibrated.graph,
                ranges_of(inputs.calibrated, precision),
                inputs.calibrated.samples,
                precision=precision,
                excluded=layers_in_half(inputs.calibrated, out),
                work=inputs.work,
                progress=inputs.progress,
            )
        left = {block: of_block for block, of_block in noise.items() if block not in out}
        if not left:  # fp8 may quantise nothing at all
            break
        excess = {stage.stage: excess_noise(stage, gate) for stage in candidates[-1].report.stages}
        gate_asks = {output: _MARGIN * times if times > 1 else 1.0 for output, times in excess.items()}
        loudest = blocks_to_exclude(left, gate_asks) or [max(left, key=lambda block: max(left[block].values()))]
        loudest = loudest[: len(left) - 1]  # with nothing quantised it would be fp16
        if not loudest:
            break
        candidates.append(make_candidate(inputs, precision, gate, blocks=[*out, *loudest]))
        if candidates[-1].passed:
            candidates += fewest_blocks(inputs, candidates.pop(), gate, least=len(out))
        out = [*out, *loudest]
    return candidates, noise


def fewest_blocks(inputs: CandidateInputs, passed: Candidate, gate: Gate, *, least: int) -> list[Candidate]:
    """Find by bisection the fewest blocks that must stay in half. ``least`` blocks are known to be too few.

    Returns all candidates that were made; the last one is the one inside the gate with the fewest blocks.
    """
    tried: list[Candidate] = []
    while len(passed.blocks) - least > 1:
        middle = (least + len(passed.blocks)) // 2
        candidate = make_candidate(inputs, passed.precision, gate, blocks=passed.blocks[:middle])
        if candidate.passed:
            tried.append(passed)
            passed = candidate
        else:
            tried.append(candidate)
            least = middle
    return [*tried, passed]


def timed(candidates: Sequence[Candidate], progress: Progress) -> list[Candidate]:
    """Return the same candidates with their latency on this device."""
    graph = candidates[0].typed
    engines = [
        functools.partial(session.load_engine, c.engine.key, bytearray(c.engine.data), graph.spec, graph.input)
        for c in candidates
    ]
    found = time_engines(engines, graph.input, progress=progress)
    return [dataclasses.replace(c, milliseconds=times.call) for c, times in zip(candidates, found, strict=True)]


def fastest(candidates: Sequence[Candidate]) -> tuple[Candidate, str]:
    """Return the fastest candidate inside its gate and a sentence that says why. At least one must be inside.

    Of candidates that timing cannot tell apart it is one without rounding to 8 bits, else the most accurate.
    """
    passed = [candidate for candidate in candidates if candidate.passed]
    first = min(passed, key=_latency)
    tied = [c for c in passed if _latency(c) <= _TIE * _latency(first)]
    floats = [c for c in tied if not c.precision.is_calibrated]
    alike = [c for c in tied if c.precision is first.precision]
    # int8 is shipped only where it is measured to be faster.
    best = min(floats, key=_latency) if floats else max(alike, key=_worst_sqnr)
    rest = sorted((c for c in passed if c is not best), key=_latency)
    times = ", ".join(f"{_label(c)} {c.milliseconds:.2f} ms" for c in (best, *rest))
    failed = [c for c in candidates if c.precision not in {p.precision for p in passed}]
    reasons = [f"{_label(c)} is outside its gate ({c.failures()})" for c in failed[-1:]]
    slow = next((c for c in rest if c.precision.is_calibrated and not best.precision.is_calibrated), None)
    if slow is not None and best is first:
        reasons.append(f"{_label(slow)} is {_latency(best) / _latency(slow):.2f}x {_label(best)} here")
    if best is not first:
        gain = _worst_sqnr(best) - _worst_sqnr(first)
        reasons.append(f"{_label(best)} is as fast as {_label(first)} here and {gain:.1f} dB more accurate")
    return best, f"{'; '.join([*reasons, times])}: shipping {_label(best)}"


def loosened(candidates: Sequence[Candidate]) -> str:
    """Say in a sentence which blocks stay in fp16 so that int8 or fp8 holds its gate."""
    first, last = candidates[0], candidates[-1]
    count = len(last.blocks)
    return (
        f"all-{first.precision} missed its gate ({first.failures()}); with {count} block{'s' * (count > 1)} in fp16 "
        f"({', '.join(last.blocks[:5])}{', ...' if count > 5 else ''}) it passes"
    )


def decision(sentence: str, candidates: Sequence[Candidate], noise: Mapping[str, Noise]) -> Decision:
    """Return the record of the decision for the manifest. ``noise`` is that of each block alone."""
    trials = tuple(
        Trial(
            precision=c.precision,
            blocks=c.blocks,
            cosine=min(stage.cosine for stage in c.report.stages),
            sqnr_db=min(stage.sqnr_db for stage in c.report.stages),
            passed=c.passed,
            milliseconds=c.milliseconds,
        )
        for c in candidates
    )
    loudest_first = sorted(noise.items(), key=lambda item: -max(item[1].values()))
    sensitivity = tuple(
        BlockNoise(
            block=block, sqnr_db={o: round(-10 * math.log10(max(share, 1e-30)), 2) for o, share in of_block.items()}
        )
        for block, of_block in loudest_first
    )
    device_name = candidates[0].engine.key.device_name
    return Decision(sentence=sentence, device_name=device_name, trials=trials, sensitivity=sensitivity)


def _label(candidate: Candidate) -> str:
    blocks = [block for block in candidate.blocks if block != SKIPS]
    without = ["its skip branches"] * (SKIPS in candidate.blocks) + [
        f"{len(blocks)} block{'s' * (len(blocks) > 1)}"
    ] * bool(blocks)
    return f"{candidate.precision} without {' and '.join(without)}" if without else str(candidate.precision)


def _latency(candidate: Candidate) -> float:
    return math.inf if candidate.milliseconds is None else candidate.milliseconds


def _worst_sqnr(candidate: Candidate) -> float:
    return min(stage.sqnr_db for stage in candidate.report.stages)
