"""Time engines side by side, because a machine may be faster or slower than it was a minute ago."""

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
from edge_backbones.engines import registry, select
from edge_backbones.engines.base import EngineSession, LoadOptions
from edge_backbones.errors import EdgeBackbonesError
from edge_backbones.machine import child
from edge_backbones.machine.devices import Place
from edge_backbones.progress import Progress, no_progress
from edge_backbones.spec import InputSpec

_ROUNDS = 7
_WARM_UP, _CALLS, _SECONDS = 3, 10, 0.25  # one turn takes at least this many calls and at least this long


def time_engines(
    engines: Sequence[Callable[[], EngineSession]], input: InputSpec, *, progress: Progress = no_progress
) -> list[float]:
    """Return the median milliseconds of a call of each engine, from host memory to host memory.

    Calls have the opt batch and size. The engines take turns with one loaded at a time, because idle thread pools slow
    each other down. Each figure is the median over the engine's turns. ``engines``: functions that load one each.
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
    progress("timing", _ROUNDS, _ROUNDS)
    return [statistics.median(medians) for medians in turns]


def _one_turn(load: Callable[[], EngineSession], images: np.ndarray) -> float:
    """Load an engine, warm it up, and return the median milliseconds of its calls."""
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
        figures = time_engines(engines, current.manifest.input, progress=progress)
        return [msgspec.structs.replace(e, milliseconds=figure) for e, figure in zip(here, figures, strict=True)]

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
    first, *rest = sorted(timed, key=lambda engine: engine.milliseconds or 0)
    alike = len({engine.key.precision for engine in timed}) < len(timed)
    names = {e.name: e.name if alike else e.key.precision.value for e in timed}
    slower = ", ".join(
        f"{names[e.name]} {e.milliseconds:.2f} ms ({(first.milliseconds or 0) / (e.milliseconds or 1):.2f}x)"
        for e in rest
    )
    return f"{names[first.name]} {first.milliseconds:.2f} ms, {slower}: runtimes take {names[first.name]} here"
