"""The relative error between two arrays, which every step, parity measurement and client uses."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np

_WEAK = 1e-4
"""A map below this share of its stage's usual norm (a black frame) is no reference: rounding errors are as large."""


def relative_error(actual: np.ndarray, expected: np.ndarray, *, usual: float = 0.0) -> float:
    """Return ``|actual - expected| / |expected|`` (Frobenius norms, in float64); never divides by zero.

    ``usual``: the norm that such a map has on most images, from `usual_norm`. It stands for ``|expected|`` where that is
    (nearly) zero. Where both are zero the error is 0 for zeros and 1 for anything else. Other shapes, and values that are
    not finite on either side, are infinitely far.
    """
    if actual.shape != expected.shape or not (np.isfinite(actual).all() and np.isfinite(expected).all()):
        return math.inf
    reference = expected.astype(np.float64).ravel()
    noise = float(np.linalg.norm(actual.astype(np.float64).ravel() - reference))
    scale = reference_norm(float(np.linalg.norm(reference)), usual)
    return noise / scale if scale else float(noise > 0)


def reference_norm(norm: float, usual: float) -> float:
    """Return the norm that an error is divided by: that of the map itself, or ``usual`` where the map is (nearly) zero."""
    return usual if norm < _WEAK * usual else norm


def usual_norm(maps: Iterable[np.ndarray]) -> float:
    """Return the root mean square of the norms of one stage's maps, one per image; 0 for a stage that is zero everywhere."""
    squares = [float(np.linalg.norm(one.astype(np.float64))) ** 2 for one in maps]
    return math.sqrt(sum(squares) / len(squares)) if squares else 0.0
