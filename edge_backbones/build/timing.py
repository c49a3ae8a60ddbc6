"""How long engines take on this device: side by side, because a machine is not as fast now as it was a minute ago."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import numpy as np

from edge_backbones.build.artifacts import Progress, no_progress
from edge_backbones.runtime.session import EngineSession
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
