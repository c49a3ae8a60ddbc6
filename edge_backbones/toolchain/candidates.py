"""Try candidates for a bundle: compile and measure each, and exclude layers from int8 and fp8 until they hold their gates.

fp32, fp16 and bf16 have one candidate. With ``auto`` these are weighed against each other:

- fp32;
- bf16, if the CPU has instructions for it. Elsewhere it is not built: it would be fp32 with coarser weights.
- fp16, if the CPU and OpenVINO have it. Elsewhere it is fp32 in disguise, which cannot win: its graph is built and measured
  for other devices, and it is not timed.
- int8, and int8 without its skip branches; on a CPU with instructions for bf16 both once more with a bf16 rest, which is what
  is not int8, if they hold the gate with an fp32 rest.

If int8 or fp8 misses its gate, the noisiest blocks stay in half, as many as the measured noise of each block asks for
(`noise_of_blocks`), until the gate holds or a single block is left. Then a bisection finds the fewest blocks that suffice.
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
from edge_backbones.engines.compat import computed_in
from edge_backbones.engines.openvino.compile import compile_graph, computes_in, rests
from edge_backbones.engines.promises import DEFAULT_GATES
from edge_backbones.errors import QuantizationError
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
        report: parity of an int8 graph as it is written, which other devices compute; otherwise that of the engine.
            Decisions follow it.
        shipped: parity of the engine, which in int8 rounds more finely where it can (see `int8_graph`). Both have to hold
            the gate.
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
            calibrated.graph_of(precision, inputs.work, excluded),
            precision=precision,
            path=path,
            ranges=ranges_of(calibrated, precision),
            shifts=None if calibrated.file is None else calibrated.file.shifts,
            rounding=None if calibrated.file is None else calibrated.file.rounding,
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
    if (
        precision is Precision.INT8
    ):  # the engine rounds more finely than the graph as it is written: see `compile_graph`
        as_written = compile_graph(path.read_bytes(), precision, cache=inputs.cache, as_written=True)
        report = _measure(inputs, as_written, gate)
    return Candidate(typed, engine, report, shipped, tuple(blocks), tuple(sorted(excluded)))


def _measure(inputs: CandidateInputs, engine: CompiledEngine, gate: Gate) -> ParityReport:
    return measure_engine(engine.key, engine.data, inputs.graph.spec, inputs.input, inputs.golden, gate)


def with_bf16_rest(inputs: CandidateInputs, candidate: Candidate, gate: Gate) -> Candidate:
    """Return an int8 candidate whose engine computes in bf16 what is not int8. The graph is the same."""
    inputs.progress("compiling int8 with a bf16 rest", 0, None)
    graph = candidate.typed.path.read_bytes()
    engine = compile_graph(graph, Precision.INT8, cache=inputs.cache, rest=Precision.BF16)
    return dataclasses.replace(candidate, engine=engine, shipped=_measure(inputs, engine, gate))


def with_fastest_rest(inputs: CandidateInputs, candidate: Candidate, gate: Gate) -> Candidate:
    """Return an int8 candidate with a bf16 rest if that is faster here and inside the gate; otherwise itself."""
    if not candidate.passed or not rests(candidate.precision, inputs.input):
        return candidate
    other = with_bf16_rest(inputs, candidate, gate)
    if not other.passed:
        return candidate
    here, there = timed([candidate, other], inputs.progress)
    return other if _latency(there) < _latency(here) else candidate


def can_win(precision: Precision) -> bool:
    """Return whether an engine of a precision may be faster than fp32 on this CPU.

    fp16 and bf16 may not where the CPU computes them in fp32.
    """
    return not precision.info.is_half or computes_in(precision) is precision


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

    Each precision becomes an engine, or with ``auto`` the fastest of all candidates does (bf16 among them, where `can_win`
    says so). Several candidates are timed side by side. ``fallback``: exclude blocks from int8 and fp8 until the gate holds.
    Raises ParityError for a precision outside its gate; with ``auto`` for fp32 only.
    """
    tried: list[Candidate] = []
    chosen: list[Candidate] = []
    noise: dict[str, Noise] = {}
    weighs_bf16 = auto and can_win(Precision.BF16)
    for precision in wanted:
        gate = gates.get(precision, DEFAULT_GATES[precision])
        if precision.is_calibrated:
            of_precision, measured = try_quantized(inputs, precision, gate, fallback=fallback, compare=auto)
            noise = noise or measured
        else:
            of_precision = [make_candidate(inputs, precision, gate)]
        if not auto and precision is Precision.INT8:
            of_precision[-1] = with_fastest_rest(inputs, of_precision[-1], gate)
        if not auto or precision is Precision.FP32:
            require(of_precision[-1].report, advice=advice_on_building)
            require(of_precision[-1].shipped, advice=advice_on_building)
        tried += of_precision
        chosen.append(of_precision[-1])
        if weighs_bf16 and precision is Precision.INT8 and inputs.front is None:  # frames are converted in fp32
            tried += [with_bf16_rest(inputs, candidate, gate) for candidate in of_precision if candidate.passed]
        if weighs_bf16 and precision is Precision.FP16:
            of_bf16 = bf16_candidates(inputs, gates.get(Precision.BF16, DEFAULT_GATES[Precision.BF16]))
            tried += of_bf16
            chosen += of_bf16
    if len(tried) > 1:
        positions = [tried.index(candidate) for candidate in chosen]
        weighed = [candidate for candidate in tried if not auto or can_win(candidate.precision)]
        times = iter(timed(weighed, inputs.progress))
        tried = [next(times) if candidate in weighed else candidate for candidate in tried]
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


def bf16_candidates(inputs: CandidateInputs, gate: Gate) -> list[Candidate]:
    """Return the bf16 candidate; none for a network that has operators without bf16."""
    try:
        return [make_candidate(inputs, Precision.BF16, gate)]
    except QuantizationError:
        return []


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
                inputs.calibrated.graph_of(precision, inputs.work),
                ranges_of(inputs.calibrated, precision),
                inputs.calibrated.samples,
                precision=precision,
                excluded=layers_in_half(inputs.calibrated, out),
                rounding=None if inputs.calibrated.file is None else inputs.calibrated.file.rounding,
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

    Candidates that were not timed cannot win. Of candidates that timing cannot tell apart it is one without rounding to 8
    bits, else the most accurate.
    """
    holding = {candidate.precision for candidate in candidates if candidate.passed}
    failed = [candidate for candidate in candidates if candidate.precision not in holding]
    candidates = [candidate for candidate in candidates if candidate.milliseconds is not None]
    passed = [candidate for candidate in candidates if candidate.passed]
    first = min(passed, key=_latency)
    tied = [c for c in passed if _latency(c) <= _TIE * _latency(first)]
    floats = [c for c in tied if not c.precision.is_calibrated]
    alike = [c for c in tied if c.precision is first.precision]
    # int8 is shipped only where it is measured to be faster, and so is bf16 beside fp32.
    best = max(floats or alike, key=lambda c: (_worst_sqnr(c), _worst_sqnr_shipped(c)))
    rest = sorted((c for c in passed if c is not best), key=_latency)
    times = ", ".join(f"{_label(c)} {c.milliseconds:.2f} ms" for c in (best, *rest))
    reasons = [f"{_label(c)} is outside its gate ({c.failures()})" for c in failed[-1:]]
    slow = next((c for c in rest if c.precision.is_calibrated and not best.precision.is_calibrated), None)
    if slow is not None and best is first:
        reasons.append(f"{_label(slow)} is {_latency(best) / _latency(slow):.2f}x {_label(best)} here")
    if best is not first:
        gain = _worst_sqnr(best) - _worst_sqnr(first)
        reasons.append(f"{_label(best)} is as fast as {_label(first)} here and {gain:.1f} dB more accurate")
    if cost := cost_of_gate(candidates, best):
        reasons.append(cost)
    return best, f"{'; '.join([*reasons, times])}: shipping {_label(best)}"


def cost_of_gate(candidates: Sequence[Candidate], best: Candidate) -> str:
    """Say how much time a gate costs: the latency of ``best`` over that of the fastest candidate outside its gate.

    Empty if none outside is faster. Latencies within 3 % are equal.
    """
    outside = [candidate for candidate in candidates if not candidate.passed]
    fastest_outside = min(outside, key=_latency, default=None)
    if fastest_outside is None or not _TIE * _latency(fastest_outside) < _latency(best) < math.inf:
        return ""
    times = f"the gate cost {_latency(best) / _latency(fastest_outside):.2f}x"
    if best.precision is fastest_outside.precision and best.blocks:
        return f"{times}: {_not_quantised(best)} computed in {_format_of_rest(best)}"
    return f"{times}: {_label(fastest_outside)} {_latency(fastest_outside):.2f} ms is outside"


def _not_quantised(candidate: Candidate) -> str:
    """Say which blocks of a candidate are not quantised, with the verb."""
    count = len([block for block in candidate.blocks if block != SKIPS])
    parts = ["skip branches"] * (SKIPS in candidate.blocks) + [f"{count} block{'s' * (count > 1)}"] * bool(count)
    return f"{' and '.join(parts)} {'is' if parts == ['1 block'] else 'are'}"


def _format_of_rest(candidate: Candidate) -> str:
    """Return the number format in which this CPU computes what an int8 or fp8 engine does not quantise."""
    return computed_in(candidate.engine.key)


def loosened(candidates: Sequence[Candidate]) -> str:
    """Say in a sentence which blocks stay in fp16 so that int8 or fp8 holds its gate."""
    first, last = candidates[0], candidates[-1]
    count = len(last.blocks)
    return (
        f"all-{first.precision} missed its gate ({first.failures()}); with {count} block{'s' * (count > 1)} in fp16 "
        f"({', '.join(last.blocks[:5])}{', ...' if count > 5 else ''}) it passes"
        + (f"; {cost}" if (cost := cost_of_gate(candidates, last)) else "")
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
            computes_in=c.engine.key.computes_in,
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
    name = f"{candidate.precision} without {' and '.join(without)}" if without else str(candidate.precision)
    has_rest = candidate.precision is Precision.INT8 and _format_of_rest(candidate) != Precision.FP32
    return f"{name} with a {_format_of_rest(candidate)} rest" if has_rest else name


def _latency(candidate: Candidate) -> float:
    return math.inf if candidate.milliseconds is None else candidate.milliseconds


def _worst_sqnr(candidate: Candidate) -> float:
    return min(stage.sqnr_db for stage in candidate.report.stages)


def _worst_sqnr_shipped(candidate: Candidate) -> float:
    return min(stage.sqnr_db for stage in candidate.shipped.stages)
