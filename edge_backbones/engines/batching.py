"""Batches that an engine does not take as they are: split into pieces, the last one filled up."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from edge_backbones.spec import ShapeRange


@dataclass(frozen=True)
class Piece:
    """Images ``start`` to ``start + count`` of a batch, run as a batch of ``run``: the rest is filling."""

    start: int
    count: int
    run: int


def pieces(count: int, batch: ShapeRange) -> list[Piece]:
    """How a batch of ``count`` (at least 1) is run by an engine that takes ``batch``: as few pieces as there can be."""
    starts = range(0, count, batch.max)
    counts = [min(batch.max, count - start) for start in starts]
    return [Piece(start, n, max(n, batch.min)) for start, n in zip(starts, counts, strict=True)]


def run_in_pieces(
    run: Callable[[np.ndarray], list[np.ndarray]], array: np.ndarray, batch: ShapeRange
) -> list[np.ndarray]:
    """Run an array of any batch >= 1 through an engine that takes batches of ``batch``.

    Return every output, joined along the batch. Images that fill a piece up are zeros, and their outputs are left out.
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
