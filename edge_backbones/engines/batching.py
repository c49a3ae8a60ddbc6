"""Split a batch that an engine does not take into pieces that it takes, and fill up the last one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from edge_backbones.spec import ShapeRange


@dataclass(frozen=True)
class Piece:
    """Describe one piece of a batch.

    Images ``start`` to ``start + count`` run as a batch of size ``run``; the rest of that batch is filling.
    """

    start: int
    count: int
    run: int


def pieces(count: int, batch: ShapeRange) -> list[Piece]:
    """Return the fewest pieces in which an engine that takes ``batch`` can run ``count`` images (at least 1)."""
    starts = range(0, count, batch.max)
    counts = [min(batch.max, count - start) for start in starts]
    return [Piece(start, n, max(n, batch.min)) for start, n in zip(starts, counts, strict=True)]


def run_in_pieces(
    run: Callable[[np.ndarray], list[np.ndarray]], array: np.ndarray, batch: ShapeRange
) -> list[np.ndarray]:
    """Run an array of any batch size from 1 through an engine that takes ``batch``.

    Returns every output, joined along the batch axis. Filling images are zeros, and their outputs are dropped. If one
    piece is enough, the outputs are views of what ``run`` returned.
    """
    ran = []
    for piece in pieces(len(array), batch):
        images = array[piece.start : piece.start + piece.count]
        if piece.run > piece.count:
            filled = np.zeros((piece.run, *array.shape[1:]), array.dtype)
            filled[: piece.count] = images
            images = filled
        ran.append([output[: piece.count] for output in run(images)])
    return ran[0] if len(ran) == 1 else [np.concatenate(outputs) for outputs in zip(*ran, strict=True)]
