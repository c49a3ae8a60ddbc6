"""One relative error for the whole package: against numpy in float64, and never a division by zero."""

from __future__ import annotations

import math

import numpy as np
import pytest

from edge_backbones.difference import relative_error, usual_norm


def arrays(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((2, 3, 4)).astype(np.float32)


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_it_is_the_norm_of_the_difference_over_that_of_the_reference(scale):
    expected, actual = arrays() * np.float32(scale), arrays(1) * np.float32(scale)
    reference = np.linalg.norm(actual.astype(np.float64) - expected) / np.linalg.norm(expected.astype(np.float64))
    assert relative_error(actual, expected) == pytest.approx(reference, rel=1e-12)


def test_of_nothing_only_nothing_is_right():
    zeros = np.zeros((2, 3, 4), np.float32)
    assert relative_error(zeros, zeros) == 0
    assert relative_error(1e-20 * arrays(), zeros) == 1
    assert relative_error(zeros, arrays()) == 1
    assert relative_error(np.zeros((0,)), np.zeros((0,))) == 0


def test_a_usual_map_stands_for_one_that_is_nearly_zero():
    one = arrays() / np.linalg.norm(arrays())
    assert relative_error(1e-3 * one, np.zeros_like(one), usual=2.0) == pytest.approx(5e-4, rel=1e-6)
    assert relative_error(1e-3 * one, 1e-9 * one, usual=2.0) == pytest.approx(5e-4, rel=1e-5)
    assert relative_error(2e-3 * one, 1e-3 * one, usual=2.0) == pytest.approx(1, rel=1e-5)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_or_of_another_shape_is_infinitely_far(bad):
    broken = arrays()
    broken[1, 2, 3] = bad
    assert (
        relative_error(broken, arrays())
        == relative_error(arrays(), broken)
        == relative_error(broken, broken)
        == math.inf
    )
    assert relative_error(arrays()[:1], arrays()) == math.inf


def test_the_usual_norm_is_the_root_mean_square_over_images():
    maps = np.stack([arrays(), np.zeros((2, 3, 4), np.float32), 3 * arrays(1)])
    norms = [np.linalg.norm(one.astype(np.float64)) for one in maps]
    assert usual_norm(maps) == pytest.approx(math.sqrt(sum(n**2 for n in norms) / 3), rel=1e-6)
    assert usual_norm(np.zeros((3, 2))) == usual_norm([]) == 0
