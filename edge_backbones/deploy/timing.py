"""Time engines side by side, because a machine may be faster or slower than it was a minute ago."""

from __future__ import annotations

import contextlib
import functools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import msgspec
import numpy as np

from edge_backbones.bundle import trust
from edge_backbones.bundle.manifest import EngineRecord
from edge_backbones.bundle.reader import Bundle, read_current
from edge_backbones.engines import registry, select
from edge_backbones.engines.base import DeviceSession, EngineSession, LoadOptions
from edge_backbones.engines.gpu.pipelined import PIPELINED, Pipeline
from edge_backbones.errors import EdgeBackbonesError, MissingDependencyError
from edge_backbones.machine import child
from edge_backbones.machine.devices import Place
from edge_backbones.progress import Progress, no_progress
from edge_backbones.spec import InputSpec

_ROUNDS = 7
_WARM_UP, _CALLS, _SECONDS = 3, 10, 0.25  # one turn takes at least this many calls and at least this long


class Times(NamedTuple):
    """Hold the median milliseconds of a call of one engine.

    Attributes:
        call: From host memory to host memory.
        pipelined: Of twenty calls that are enqueued before one wait, with inputs and outputs in GPU memory; None for an
            engine that takes no arrays on a GPU.
    """

    call: float
    pipelined: float | None


def time_engines(
    engines: Sequence[Callable[[], EngineSession]],
    input: InputSpec,
    *,
    gpu: int | None = None,
    progress: Progress = no_progress,
) -> list[Times]:
    """Return how long a call of each engine takes.

    Calls have the opt batch and size. The engines take turns with one loaded at a time, because idle thread pools slow
    each other down. Each figure is the median over the engine's turns.

    Args:
        engines: Functions that load one engine each.
        input: Input that they take.
        gpu: Index of their GPU; None for the CPU.
        progress: Gets every round.
    """
    random = np.random.default_rng(0)
    images = random.integers(0, 256, input.opt_shape).astype(input.dtype)
    if input.dtype != "uint8":
        images = (images / 128 - 1).astype(input.dtype)
    turns: list[list[Times]] = [[] for _ in engines]
    for done in range(_ROUNDS):
        progress("timing", done, _ROUNDS)
        for engine, found in zip(engines, turns, strict=True):
            found.append(_one_turn(engine, images, gpu))
    progress("timing", _ROUNDS, _ROUNDS)
    return [_median_of(found) for found in turns]


def _median_of(turns: Sequence[Times]) -> Times:
    pipelined = [times.pipelined for times in turns if times.pipelined is not None]
    return Times(
        statistics.median(times.call for times in turns),
        statistics.median(pipelined) if len(pipelined) == len(turns) else None,
    )


def _one_turn(load: Callable[[], EngineSession], images: np.ndarray, gpu: int | None) -> Times:
    """Load an engine, warm it up, and return the medians of its calls."""
    session = load()

    def call() -> float:
        started = time.perf_counter()
        session.run(images)
        return 1e3 * (time.perf_counter() - started)

    try:
        latency, pipelined = _median_time(call), None
        if gpu is not None and isinstance(session, DeviceSession):
            # Without a library for GPU memory there are no arrays on the GPU, and no time that could be better.
            with contextlib.suppress(MissingDependencyError), Pipeline(session, images, gpu) as pipeline:
                pipelined = _median_time(pipeline.milliseconds, times=PIPELINED)
    finally:
        session.close()
    return Times(latency, pipelined)


def _median_time(measure: Callable[[], float], times: int = 1) -> float:
    """Warm up, then return the median of what ``measure`` returns. ``times``: calls of the engine in one measurement."""
    for _ in range(-(-_WARM_UP // times)):
        measure()
    taken: list[float] = []
    while len(taken) * times < _CALLS or len(taken) < 3 or times * sum(taken) < 1e3 * _SECONDS:
        taken.append(measure())
    return statistics.median(taken)


def engines_here(bundle: Bundle, gpu: int | None, *, code: bool) -> list[EngineRecord]:
    """Return the trusted engines of a bundle that run on this machine's CPU, or on the GPU of index ``gpu``."""
    place: Place = "cpu" if gpu is None else "cuda"
    host = registry.this_machine(gpu)
    bundle, _ = trust.admit(bundle)
    return [e for e in bundle.manifest.engines if not select.reasons_against(bundle, e, host, device=place, code=code)]


def time_bundle(
    bundle: Bundle, gpu: int | None, *, code: bool, anew: bool, progress: Progress
) -> tuple[Bundle, tuple[str, ...]]:
    """Time the engines that run here side by side, and store their latencies in the bundle.

    Failures are noted, not raised, because engines without latencies work as well.

    Args:
        bundle: The bundle.
        gpu: Index of the GPU, None for the CPU.
        code: Allow engines that are programs, and runtimes inside plans.
        anew: Time them even if all have latencies.
        progress: Gets every round.

    Returns:
        The bundle with latencies, and sentences for the user.
    """

    def timed_of(current: Bundle) -> list[EngineRecord]:
        here = engines_here(current, gpu, code=code)
        if len(here) < 2 or not (anew or any(engine.milliseconds is None for engine in here)):
            return []
        engines = [
            functools.partial(select.open_session, current, engine, LoadOptions(gpu=gpu, allow_host_code=code))
            for engine in here
        ]
        found = time_engines(engines, current.manifest.input, gpu=gpu, progress=progress)
        return [
            msgspec.structs.replace(engine, milliseconds=times.call, pipelined_milliseconds=times.pipelined)
            for engine, times in zip(here, found, strict=True)
        ]

    child.doing("was timing the engines of this machine", f"one of them is hostile, {child.OR_A_FAULT}")

    try:
        bundle, timed = read_current(bundle.path, timed_of)
        for engine in timed:
            bundle = bundle.add_engine(engine, {})
    except EdgeBackbonesError as error:  # for example because another process removed an engine
        return Bundle.open(bundle.path), (f"not timed: {error}",)
    return bundle, (ranking(timed),) if timed else ()


def ranking(timed: Sequence[EngineRecord]) -> str:
    """Return a sentence with the engine that runtimes choose here, and how much slower the others are."""
    times = select.comparable_times(timed)
    first, *rest = sorted(timed, key=lambda engine: times[engine.name])
    alike = len({engine.key.precision for engine in timed}) < len(timed)
    names = {e.name: e.name if alike else e.key.precision.value for e in timed}
    best = times[first.name]
    slower = ", ".join(f"{names[e.name]} {times[e.name]:.2f} ms ({best / times[e.name]:.2f}x)" for e in rest)
    on_gpu = " (on the GPU, without copies)" if best == first.pipelined_milliseconds else ""
    return f"{names[first.name]} {best:.2f} ms{on_gpu}, {slower}: runtimes take {names[first.name]} here"
