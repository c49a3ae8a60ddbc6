"""The example that shows what is wrong in a photograph: gravel in a brick wall, with ImageNet's weights."""

from __future__ import annotations

import re

import numpy as np
from PIL import Image

from build_scripts.samples import DEFECT, PIECE
from edge_backbones import EdgeBackbone
from examples.anomaly import averaged, describe, distances_to

SEEN = 224
RESIZED = 256  # pixels of a side before the middle is cut out
CELL = 8


def test_the_maximum_lies_on_the_defect_and_the_picture_is_red_there(place, typed):
    assert PIECE == RESIZED
    lines = typed("anomaly")
    row, column = map(int, re.match(r"farthest from good: cell (\d+), (\d+) of 28 x 28", lines[0]).groups())
    border = (RESIZED - SEEN) // 2
    left, upper, right, lower = (end - border for end in DEFECT)
    assert upper <= CELL * row + CELL / 2 <= lower
    assert left <= CELL * column + CELL / 2 <= right
    distance, usual = map(float, re.match(r"its distance: (.*); among good .* at most (.*)", lines[1]).groups())
    assert distance > 1.1 * usual
    with Image.open(place / "samples" / "heat.png") as picture:
        pixels = np.asarray(picture).astype(int)
    assert pixels.shape == (SEEN, SEEN, 3)
    redness = pixels[..., 0] - pixels[..., 1]  # the wall is grey
    inside = np.zeros((SEEN, SEEN), bool)
    inside[upper - 2 * CELL : lower + 2 * CELL, left - 2 * CELL : right + 2 * CELL] = True
    assert redness[upper:lower, left:right].max() > 100
    assert redness[~inside].mean() < 0.05 * redness[upper:lower, left:right].mean()


def test_a_good_piece_is_near_to_the_memory(place):
    good = sorted((place / "samples" / "good").iterdir())
    with EdgeBackbone.from_pretrained(place / "samples" / "features.bundle") as backbone:
        cells = describe(backbone, [*good, place / "samples" / "defect.png"])
    worst = [distances_to(cells[:15], piece).max() for piece in cells]
    assert max(worst[15:-1]) < worst[-1]
    assert max(worst[:15]) < 0.01 * worst[-1]  # they are in the memory


def test_distances_are_those_to_the_nearest():
    random = np.random.default_rng(0)
    memory, piece = random.normal(size=(3, 4, 5, 6)), random.normal(size=(2, 7, 6))
    pairs = np.linalg.norm(piece[:, :, None] - memory.reshape(-1, 6), axis=-1)
    np.testing.assert_allclose(distances_to(memory, piece), pairs.min(axis=-1))


def test_cells_are_averaged_with_their_neighbours():
    maps = np.zeros((1, 1, 4, 5))
    maps[0, 0, 2, 2] = 9
    expected = np.zeros((4, 5))
    expected[1:4, 1:4] = 1
    np.testing.assert_allclose(averaged(maps)[0, 0], expected)
    np.testing.assert_allclose(averaged(np.full((2, 3, 4, 4), 2.5)), 2.5)
