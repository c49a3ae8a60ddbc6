"""Rounding that keeps the sums of rows: against every choice there is, and against the nearest numbers."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from edge_backbones.rounding import round_to_bf16, round_to_int8


def objective(errors: np.ndarray) -> np.ndarray:
    return (errors**2).sum(axis=-1) + errors.sum(axis=-1) ** 2


@pytest.mark.parametrize("seed", range(5))
def test_no_other_choice_of_neighbours_is_better_in_int8(seed):
    rows = np.random.default_rng(seed).uniform(-127, 127, (20, 7))
    found = round_to_int8(rows)
    choices = np.array(list(itertools.product((0, 1), repeat=7)))
    best = objective(np.floor(rows)[:, None] + choices - rows[:, None]).min(axis=1)
    np.testing.assert_allclose(objective(found - rows), best, rtol=1e-9)


@pytest.mark.parametrize("columns", [9, 27, 1000])
def test_the_sums_of_int8_stay_and_the_errors_hardly_grow(columns):
    rows = np.random.default_rng(columns).normal(0, 40, (50, columns)).clip(-127, 127)
    found, nearest = round_to_int8(rows), np.rint(rows)
    assert found.dtype == np.int8
    assert found.min() >= -127
    assert np.abs(found - rows).max() < 1
    assert np.abs((found - rows).sum(axis=1)).max() < 0.75
    assert np.abs((nearest - rows).sum(axis=1)).max() > 1
    assert ((found - rows) ** 2).sum() < 1.2 * ((nearest - rows) ** 2).sum()


def test_a_sum_that_is_further_off_than_all_changes_reach_comes_nearer():
    rows = np.full((2, 3000), 0.3)  # rounded to 0 they lose 900
    assert round_to_int8(rows).sum(axis=1).tolist() == [250, 250]  # every twelfth is changed


def test_integers_stay():
    rows = np.arange(-127.0, 128.0).reshape(5, 51)
    np.testing.assert_array_equal(round_to_int8(rows), rows)


@pytest.mark.parametrize("columns", [9, 27, 1000])
def test_the_sums_of_bf16_stay_and_every_number_is_a_neighbour(columns):
    rows = np.random.default_rng(columns).normal(0, 0.3, (50, columns)).astype(np.float32)
    found = round_to_bf16(rows)
    assert found.dtype == np.float32
    assert not (found.view(np.uint32) & 0xFFFF).any()
    exact = rows.astype(np.float64)
    assert (np.abs(found - exact) < 2.0**-7 * np.abs(exact)).all()
    bits = rows.view(np.uint32)
    nearest = ((bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)).view(np.float32)
    of_found, of_nearest = (np.sqrt(np.mean((values - exact).sum(axis=1) ** 2)) for values in (found, nearest))
    assert of_found < 0.3 * of_nearest
    assert ((found - exact) ** 2).sum() < 1.5 * ((nearest - exact) ** 2).sum()


def test_bf16_numbers_stay():
    rows = np.array([[1.0, -0.5, 0.0, 2.0**-130], [3.0, 1.5, 255.0, -0.0]], np.float32)
    np.testing.assert_array_equal(round_to_bf16(rows), rows)


def test_the_largest_float32_becomes_no_infinity():
    rows = np.full((2, 3), np.finfo(np.float32).max, np.float32)
    assert np.isfinite(round_to_bf16(rows)).all()


def test_nothing_is_rounded_to_nothing():
    assert round_to_int8(np.zeros((0, 4))).shape == (0, 4)
    assert round_to_bf16(np.zeros((4, 0), np.float32)).shape == (4, 0)
