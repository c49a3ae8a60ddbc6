"""The first screen of the report: is the bundle good, is it fast, how large is it on the device."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import Literal, NamedTuple

from edge_backbones.bench.results import PEERS_IN_FP32, Comparison, Measurement, Ratio
from edge_backbones.bundle.manifest import Decision, EngineRecord, Manifest, Trial
from edge_backbones.engines import registry, select
from edge_backbones.parity_report import StageParity
from edge_backbones.report.words import megabytes, signs
from edge_backbones.spec import Precision

_EXACT_DB = 250  # what is written for no difference at all is above
_TINY = 1e6  # of a smaller share than one in so many the page says only that it is smaller


class Verdict(NamedTuple):
    """Whether the engines hold their accuracy gates; ``commands`` are what to type about it."""

    kind: Literal["good", "bad", "open"]
    word: str
    sentence: str
    commands: tuple[str, ...] = ()


class Tile(NamedTuple):
    """One figure of the first screen: its name, its value with unit, and what it means.

    ``value`` is the figure as a number, None without one. ``commands`` are what to type to measure it.
    """

    name: str
    text: str
    value: float | None
    meaning: str
    aside: str = ""
    commands: tuple[str, ...] = ()


class Summary(NamedTuple):
    """The first screen. ``engine``: the engine whose figures it shows, None for a bundle without one."""

    verdict: Verdict
    engine: EngineRecord | None
    tiles: tuple[Tile, ...]


def summarise(
    manifest: Manifest,
    name: str,
    *,
    shown: EngineRecord | None,
    comparisons: Sequence[Comparison],
    manifest_bytes: int,
) -> Summary:
    """Return the first screen of a bundle.

    ``name``: of its folder, for commands. ``shown``: the engine that runs on the machine that writes the page, if one does.
    ``manifest_bytes``: size of manifest.json.
    """
    engine = _headline(manifest.engines, shown)
    if engine is None:
        whole = sum(file.size for file in manifest.files()) + manifest_bytes
        size = Tile("size of the folder", megabytes(whole), whole, "Graphs and golden samples, no engine.")
        return Summary(_verdict(manifest, name), None, (size,))
    tiles = (_accuracy(engine), _speed(manifest, engine, name, comparisons), _size(manifest, engine, manifest_bytes))
    return Summary(_verdict(manifest, name), engine, tiles)


def label(engine: EngineRecord) -> str:
    """Name an engine for people by what it computes in and with: ``int8 for OpenVINO``."""
    return f"{engine.key.precision} for {registry.title_of(engine.key.flavour)}"


def needs_of_device(manifest: Manifest, engine: EngineRecord) -> tuple[list[str], int]:
    """Return the files beside manifest.json that a device needs to run an engine, and their bytes.

    A plan without weights needs its graph too, which holds them.
    """
    files = {engine.file.path: engine.file.size}
    if engine.key.gpu is not None and engine.key.gpu.stripped:
        graphs = (g for g in manifest.graphs if g.file.sha256 == engine.key.graph_sha256)
        files.update({graph.file.path: graph.file.size for graph in graphs})
    return list(files), sum(files.values())


def _headline(engines: Sequence[EngineRecord], shown: EngineRecord | None) -> EngineRecord | None:
    """Return the engine that the first screen is about.

    One that fails its gate comes first, then the one that runs here, then the fastest that was timed, then any that was
    measured.
    """
    failing = [engine for engine in engines if engine.parity.measured and not engine.parity.passed]
    if failing:
        return failing[0]
    if shown is not None and shown.parity.measured:
        return shown
    measured = [engine for engine in engines if engine.parity.measured]
    timed = [engine for engine in measured if engine.milliseconds is not None]
    if timed:
        times = select.comparable_times(timed)
        return min(timed, key=lambda engine: times[engine.name])
    return next(iter(measured), shown or next(iter(engines), None))


def _verdict(manifest: Manifest, name: str) -> Verdict:
    """Say whether the engines hold their gates."""
    engines = manifest.engines
    if not engines:
        return Verdict(
            "open", "No engine yet", "Compile one on the device:", (f"edge-backbones compile {shlex.quote(name)}",)
        )
    measured = [engine for engine in engines if engine.parity.measured]
    waiting = [engine for engine in engines if not engine.parity.measured]
    failing = [engine for engine in measured if not engine.parity.passed]
    verify = (f"edge-backbones verify {shlex.quote(name)}",) if waiting else ()
    later = ""
    if waiting:
        whose = label(waiting[0]) if len(waiting) == 1 else f"{len(waiting)} of {len(engines)} engines"
        on = "its device" if len(waiting) == 1 else "their devices"
        later = f"Not measured yet: {whose}. On {on}, run:"
    if failing:
        worst = worst_stage(failing[0])
        whose = label(failing[0]) if len(failing) == 1 else f"{len(failing)} of {len(engines)} engines"
        verb = "is outside its accuracy gate" if len(failing) == 1 else "are outside their accuracy gates"
        which = "" if len(failing) == 1 else f"{label(failing[0])}: "
        figure = _figure(worst)
        sentence = (
            f"{whose} {verb}. {which}{worst.stage} has {figure}; the gate asks for {signs(failing[0].parity.gate)}."
        )
        if failing[0].key.gpu is None:  # where an error begins is found for CPU engines
            sentence += " To find the layer where the error begins:"
            return Verdict("bad", "Fail", sentence, (f"edge-backbones verify {shlex.quote(name)} --explain",))
        return Verdict("bad", "Fail", f"{sentence} {later}".strip(), verify)
    if not measured:
        return Verdict("open", "Not measured yet", later.removeprefix("Not measured yet: "), verify)
    every = (
        f"{label(measured[0])} holds its accuracy gate on every output."
        if len(measured) == 1
        else f"All {len(measured)} measured engines hold their accuracy gates on every output."
        if waiting
        else f"All {len(measured)} engines hold their accuracy gates on every output."
    )
    return Verdict("good", "Pass", f"{every} {later}".strip(), verify)


# ---- accuracy -------------------------------------------------------------------------------------------------------


def worst_stage(engine: EngineRecord) -> StageParity:
    """Return the output of a measured engine that fails, or else that is furthest from fp32."""
    return min(engine.parity.stages, key=lambda stage: (stage.finite, stage.passed, stage.sqnr_db))


def decibels_in_words(sqnr_db: float) -> str:
    """Say what an SQNR means: the error's energy beside the signal's, and its size.

    SQNR is 10 log10 of (energy of the signal / energy of the error), so the root mean square of the error is
    10 ** (-SQNR / 20) of the signal's.
    """
    if sqnr_db >= _EXACT_DB:
        return "There is no difference from fp32."
    if sqnr_db <= 0:
        return "The error is as large as the signal, or larger."
    ratio, percent = 10 ** (sqnr_db / 10), 100 * 10 ** (-sqnr_db / 20)
    if ratio >= _TINY:
        return f"The error has less than 1/1,000,000 of the signal's energy, and {percent:.1g} % of its size (RMS)."
    shown = f"{ratio:.1f}" if ratio < 10 else f"{float(f'{ratio:.2g}'):,.0f}"
    size = f"{percent:.0f}" if percent >= 9.95 else f"{percent:#.2g}"
    return f"The error has 1/{shown} of the signal's energy, and {size} % of its size (RMS)."


def _figure(stage: StageParity) -> str:
    return f"{stage.sqnr_db:.1f} dB" if stage.finite else "values that are not finite"


def _accuracy(engine: EngineRecord) -> Tile:
    """Return the figure of an engine's worst output."""
    if not engine.parity.measured:
        return Tile("accuracy", "not measured", None, f"{label(engine)} was compiled without its device.")
    worst = worst_stage(engine)
    name = f"{'worst ' if len(engine.parity.stages) > 1 else ''}stage: {worst.stage}"
    if not worst.finite:
        return Tile(name, "not finite", None, "The output has infinite values or NaN.")
    text = "exact" if worst.sqnr_db >= _EXACT_DB else f"{worst.sqnr_db:.1f} dB"
    aside = f"Gate: {signs(engine.parity.gate)}. It bounds the feature maps: try your task's own metric too."
    meaning = f"SQNR against fp32. {decibels_in_words(worst.sqnr_db)}"
    return Tile(name, text, worst.sqnr_db, meaning, aside)


# ---- speed ----------------------------------------------------------------------------------------------------------


def _speed(manifest: Manifest, engine: EngineRecord, name: str, comparisons: Sequence[Comparison]) -> Tile:
    """Return the latency of an engine and how it compares with fp32 of the same library, from the best source there is."""
    batch = manifest.input.batch.opt
    title = f"time of one call, batch {batch}"
    for comparison in comparisons:
        if comparison.engine == engine.name and comparison.measurements[0].median_ms is not None:
            return _speed_of_comparison(title, engine, comparison, comparison.measurements[0].median_ms)
    commands = _commands_to_time(manifest, engine, name)
    milliseconds, baseline = stored_times(manifest, engine)
    if milliseconds is None:
        beside = "other libraries" if engine.key.precision is Precision.FP32 else "fp32"
        on = "" if engine.key.gpu is None else ", on its device"
        meaning = f"The bundle holds no time of {label(engine)}. To measure it beside {beside}{on}:"
        return Tile(title, "not timed", None, meaning, commands=commands)
    text = f"{milliseconds:.2f} ms"
    how = "with the threads that the library chose" if engine.key.gpu is None else "from host memory to host memory"
    where = f"Timed on {engine.key.device_name}, {how}."
    if engine.pipelined_milliseconds is not None:
        where += (
            f" Calls with arrays on the GPU, one after the other, take {engine.pipelined_milliseconds:.2f} ms each."
        )
    if engine.key.precision is Precision.FP32:
        return Tile(title, text, milliseconds, "This engine is the fp32 one.", where)
    if baseline is None:
        meaning = f"fp32 of {registry.title_of(engine.key.flavour)} was not timed beside it. To compare:"
        return Tile(title, text, milliseconds, meaning, where, commands)
    library = registry.title_of(engine.key.flavour)
    return Tile(title, text, milliseconds, _times_as_fast(baseline / milliseconds, library, baseline), where)


def _speed_of_comparison(title: str, engine: EngineRecord, comparison: Comparison, milliseconds: float) -> Tile:
    """Return the speed that ``edge-backbones bench`` measured, beside the bundle's fp32 engine if that took part."""
    ratios = {ratio.name: ratio for ratio in comparison.ratios if ratio.name in PEERS_IN_FP32}
    of_library = ("fp32", engine.key.flavour, f"{engine.key.flavour}-f32")
    ratio = next((ratios[name] for name in (*of_library, *ratios) if name in ratios), None)
    threads = f"{comparison.threads} {'thread' if comparison.threads == 1 else 'threads'}"
    where = f"Timed by bench on {comparison.machine.name}, {threads}, {comparison.date}."
    if ratio is None:
        return Tile(title, f"{milliseconds:.2f} ms", milliseconds, "No fp32 peer ran beside it.", where)
    peer = next(m for m in comparison.measurements if m.name == ratio.name)
    return Tile(title, f"{milliseconds:.2f} ms", milliseconds, _ratio_in_words(ratio, peer), where)


def _ratio_in_words(ratio: Ratio, peer: Measurement) -> str:
    if not ratio.is_ranked:
        return f"A tie with fp32 ({peer.what}): {ratio.median:.2f}x ({ratio.low:.2f} to {ratio.high:.2f})."
    return f"{ratio.median:.2f}x as fast as fp32 ({peer.what}), {ratio.low:.2f}x to {ratio.high:.2f}x with 95 % confidence."


def _times_as_fast(times: float, library: str, baseline: float) -> str:
    slower = " It is slower." if times < 1 else ""
    return f"{times:.2f}x as fast as fp32 of {library} ({baseline:.2f} ms).{slower}"


def stored_times(manifest: Manifest, engine: EngineRecord) -> tuple[float | None, float | None]:
    """Return the milliseconds that a bundle holds for an engine and for fp32 of the same library and device.

    A lone engine was timed beside no other: its time is that of its trial in the build.
    """
    key = engine.key
    alike = [
        other
        for other in manifest.engines
        if (other.key.flavour, other.key.device_name) == (key.flavour, key.device_name)
    ]
    base = next((other.milliseconds for other in alike if other.key.precision is Precision.FP32), None)
    if engine.milliseconds is not None:
        return engine.milliseconds, base
    decision = manifest.decision
    if decision is None or decision.device_name != key.device_name or len(manifest.engines) > 1:
        return None, None
    shipped = shipped_trial(decision, engine, manifest)
    fp32 = next((t.milliseconds for t in decision.trials if t.precision is Precision.FP32), None)
    return (None, None) if shipped is None else (shipped.milliseconds, fp32)


def shipped_trial(decision: Decision, engine: EngineRecord, manifest: Manifest) -> Trial | None:
    """Return the trial of a build that became an engine: of its precision, passed, its blocks among the excluded layers.

    Of several the one that names the engine's number format, then the one with most blocks, since a graph without them
    would exclude fewer layers.
    """
    graph = manifest.onnx_graph(engine.key.precision)
    trials = [
        trial
        for trial in decision.trials
        if trial.precision is engine.key.precision
        and trial.passed
        and all(any(is_meant(layer, block) for layer in (graph.excluded if graph else ())) for block in trial.blocks)
    ]
    return max(trials, key=lambda trial: (trial.computes_in == engine.key.computes_in, len(trial.blocks)), default=None)


def is_meant(layer: str, block: str) -> bool:
    """Return whether a layer (``layer1.0.conv1/Conv``) is in a block of a trial: a module, or all of a type (``op:Add``)."""
    kind, _, op = block.partition(":")
    path, _, op_type = layer.partition("/")
    if kind == "op":
        return op_type.partition("#")[0] == op
    return path == block or path.startswith(f"{block}.") or layer == block


def _commands_to_time(manifest: Manifest, engine: EngineRecord, name: str) -> tuple[str, ...]:
    """Return the commands that time an engine beside fp32 and show it on this page."""
    bundle, results = shlex.quote(name), shlex.quote(f"{name.removesuffix('.bundle')}.bench.json")
    device = "" if engine.key.gpu is None else " --device cuda"
    one = ""
    if len(manifest.engines) > 1:
        keys = [other.key for other in manifest.engines]
        meant = [engine.key.precision.value, engine.key.flavour]
        alike = [
            sum(key.precision is engine.key.precision for key in keys),
            sum(key.flavour == meant[1] for key in keys),
        ]
        one = f" --engine {next((word for word, count in zip(meant, alike, strict=True) if count == 1), engine.name)}"
    return (
        f"edge-backbones bench {bundle}{one}{device} --out {results}",
        f"edge-backbones report {bundle} --bench {results}",
    )


# ---- size -----------------------------------------------------------------------------------------------------------


def _size(manifest: Manifest, engine: EngineRecord, manifest_bytes: int) -> Tile:
    """Return what a device needs of the bundle, against the whole folder."""
    files, needed = needs_of_device(manifest, engine)
    whole = sum({file.path: file.size for file in manifest.files()}.values()) + manifest_bytes
    what = (
        "The engine and manifest.json"
        if len(files) == 1
        else "The engine, the graph with its weights and manifest.json"
    )
    meaning = f"{what}; the whole folder has {megabytes(whole)}."
    aside = "The rest is for compiling and verifying."
    return Tile("size on the device", megabytes(needed + manifest_bytes), needed + manifest_bytes, meaning, aside)
