"""How fast engines are: side by side, because a machine is not as fast now as a minute ago."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Sequence

import msgspec
import numpy as np

from edge_backbones.bundle import trust
from edge_backbones.bundle.manifest import EngineRecord
from edge_backbones.bundle.reader import Bundle, read_current
from edge_backbones.engines import registry
from edge_backbones.engines import select as session
from edge_backbones.engines.base import EngineSession, LoadOptions
from edge_backbones.errors import EdgeBackbonesError
from edge_backbones.machine import child
from edge_backbones.progress import Progress, no_progress
from edge_backbones.spec import InputSpec

_ROUNDS = 7
_WARM_UP, _CALLS, _SECONDS = 3, 10, 0.25  # of one turn: at least so many calls, and for at least so long


def time_engines(
    engines: Sequence[Callable[[], EngineSession]], input: InputSpec, *, progress: Progress = no_progress
) -> list[float]:
    """Median milliseconds of a call at opt batch and size, for each engine (what loads it), host memory to host memory.

    The engines take turns, one loaded at a time (thread pools that wait side by side slow each other), and each figure
    is the median of its turns.
    """
    random = np.random.default_rng(0)
    images = random.integers(0, 256, input.opt_shape).astype(input.dtype)
    if input.dtype != "uint8":
        images = (images / 128 - 1).astype(input.dtype)
    turns: list[list[float]] = [[] for _ in engines]
    for done in range(_ROUNDS):
        progress("timing", done, _ROUNDS)
        for engine, medians in zip(engines, turns, strict=True):
            medians.append(_one_turn(engine, images))
    return [statistics.median(medians) for medians in turns]


def _one_turn(load: Callable[[], EngineSession], images: np.ndarray) -> float:
    session = load()
    try:
        for _ in range(_WARM_UP):
            session.run(images)
        taken: list[float] = []
        while len(taken) < _CALLS or sum(taken) < 1e3 * _SECONDS:
            started = time.perf_counter()
            session.run(images)
            taken.append(1e3 * (time.perf_counter() - started))
    finally:
        session.close()
    return statistics.median(taken)


def engines_here(bundle: Bundle, gpu: int | None, *, code: bool) -> list[EngineRecord]:
    place, host = "cpu" if gpu is None else "cuda", registry.this_machine(gpu)
    bundle, _ = trust.admit(bundle)
    return [e for e in bundle.manifest.engines if not session.reasons_against(bundle, e, host, device=place, code=code)]


def time_bundle(
    bundle: Bundle, gpu: int | None, *, code: bool, anew: bool, progress: Progress
) -> tuple[Bundle, tuple[str, ...]]:
    """The bundle with latencies, and what to note of them: engines that can run here are timed side by side, ``anew`` or
    where one has none. Without them the engines are as good: what fails here is noted, not raised."""

    def timed_of(current: Bundle) -> list[EngineRecord]:
        here = engines_here(current, gpu, code=code)
        if len(here) < 2 or not (anew or any(engine.milliseconds is None for engine in here)):
            return []
        engines = [
            functools.partial(session.open_session, current, engine, LoadOptions(gpu=gpu, allow_host_code=code))
            for engine in here
        ]
        figures = time_engines(engines, current.manifest.input, progress=progress)
        return [msgspec.structs.replace(e, milliseconds=figure) for e, figure in zip(here, figures, strict=True)]

    child.doing("was timing the engines of this machine", f"one of them is hostile, {child.OR_A_FAULT}")

    try:
        bundle, timed = read_current(bundle.path, timed_of)
        for engine in timed:
            bundle = bundle.add_engine(engine, {})
    except EdgeBackbonesError as error:  # another process took an engine out, say
        return Bundle.open(bundle.path), (f"not timed: {error}",)
    return bundle, (ranking(timed),) if timed else ()


def ranking(timed: Sequence[EngineRecord]) -> str:
    """Which of these engines runtimes take, and how much slower the others are, in a sentence."""
    first, *rest = sorted(timed, key=lambda engine: engine.milliseconds or 0)
    alike = len({engine.key.precision for engine in timed}) < len(timed)
    names = {e.name: e.name if alike else e.key.precision.value for e in timed}
    slower = ", ".join(
        f"{names[e.name]} {e.milliseconds:.2f} ms ({(first.milliseconds or 0) / (e.milliseconds or 1):.2f}x)"
        for e in rest
    )
    return f"{names[first.name]} {first.milliseconds:.2f} ms, {slower}: runtimes take {names[first.name]} here"
