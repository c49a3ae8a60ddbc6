"""Resize pictures as Pillow's Resample.c and torchvision do, bit for bit, but only the pixels that a crop keeps.

Both add products of pixels and integer weights. In float64 such sums are exact in any order, so BLAS may compute them:
neighbouring pixels times a matrix of weights, first along rows, then along columns.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from edge_backbones.images.config import ImageConfig

_BITS = 22
_PIXELS = 8  # resized pixels in a block; a larger block has more weights that are 0
_ROWS = 128  # rows in one product: they stay in the cache, and OpenBLAS starts no threads for them
_BAND_PIXELS = 250_000  # pixels of the source for which a thread is worth its start


class Method(NamedTuple):
    """The fields of ImageConfig that decide how pixels are computed."""

    filter: str
    sampling: str
    arithmetic: str

    @classmethod
    def of(cls, config: ImageConfig) -> Method:
        """Return the method that a network was trained with."""
        return cls(config.interpolation, config.sampling, config.arithmetic)

    @property
    def rounds_between(self) -> bool:
        """Return whether the picture is rounded to whole grey levels when only its rows are resized."""
        return self.arithmetic != "float"


class Block(NamedTuple):
    """The resized pixels ``place`` along a side: the source pixels ``read`` times ``weights``, of shape (read, place)."""

    read: slice
    weights: np.ndarray
    place: slice


def resample(
    pixels: np.ndarray, size: tuple[int, int], kept: tuple[range, range], method: Method, threads: int
) -> np.ndarray:
    """Resize ``pixels`` to ``size`` (rows, columns) and return the rows and columns ``kept`` of the result.

    Both are uint8 (rows, columns, channels). ``threads`` share a large picture, a band of rows each; the pixels do not depend
    on their number.
    """
    height, width, channels = pixels.shape
    down, across = blocks(height, size[0], kept[0], method), blocks(width, size[1], kept[1], method)
    resized = np.empty((len(kept[0]), len(kept[1]), channels), np.uint8)
    between = np.uint8 if method.rounds_between else np.float64
    bands = max(1, min(threads, len(down), height * width // _BAND_PIXELS))
    edges = [len(down) * band // bands for band in range(bands + 1)]

    def make(band: int) -> None:
        _resample_band(pixels, down[edges[band] : edges[band + 1]], across, resized, between=between)

    if bands == 1:
        make(0)
    else:
        with ThreadPoolExecutor(bands) as pool:
            list(pool.map(make, range(bands)))
    return resized


def _resample_band(
    pixels: np.ndarray, down: list[Block], across: list[Block], resized: np.ndarray, *, between: type
) -> None:
    """Compute the rows of ``resized`` that the blocks ``down`` stand for.

    ``between``: the dtype of the picture that is resized along the rows only. Channels come first here: each is a matrix.
    """
    top, bottom = down[0].read.start, max(block.read.stop for block in down)
    left, right = across[0].read.start, max(block.read.stop for block in across)
    planes = pixels[top:bottom, left:right].transpose(2, 0, 1)
    narrow = np.empty((*planes.shape[:2], resized.shape[1]), between)
    some, sums = (np.empty((len(planes), _ROWS, columns)) for columns in (right - left, resized.shape[1]))
    for start in range(0, bottom - top, _ROWS):
        stop = min(bottom - top, start + _ROWS)
        rows, made = some[:, : stop - start], sums[:, : stop - start]
        rows[...] = planes[:, start:stop]
        for read, weights, place in across:
            np.matmul(rows[..., read.start - left : read.stop - left], weights, out=made[..., place])
        narrow[:, start:stop] = made if between is np.float64 else _in_range(made)
    for read, weights, place in down:
        found = weights.T @ narrow[:, read.start - top : read.stop - top].astype(np.float64, copy=False)
        resized[place] = _in_range(found).transpose(1, 2, 0)


def _in_range(sums: np.ndarray) -> np.ndarray:
    """Round sums in place and clip them to 0..255, before a cast to uint8 cuts them off. Ties are rounded up."""
    sums += 0.5
    return np.clip(sums, 0, 255, out=sums)


@functools.lru_cache(8)  # all frames of a camera have one size
def blocks(source: int, size: int, kept: range, method: Method, pixels: int = _PIXELS) -> list[Block]:
    """Return the blocks that resize a side of ``source`` pixels to ``size``, for the pixels ``kept`` of it.

    Each makes ``pixels`` resized pixels. The weights are float64, and exact in float32 unless the arithmetic is ``float``.
    """
    first, weights = _weights(source, size, kept, method)
    found = []
    for begin in range(0, len(kept), pixels):
        place = slice(begin, min(len(kept), begin + pixels))
        read = slice(int(first[begin]), min(source, int(first[place][-1]) + weights.shape[1]))
        matrix = np.zeros((source, place.stop - begin))
        for column, (start, of_one) in enumerate(zip(first[place], weights[place], strict=True)):
            matrix[start : start + len(of_one), column] = of_one[: source - start]  # weights past the end are 0
        found.append(Block(read, matrix[read].copy(), place))
    return found


def _weights(source: int, size: int, kept: range, method: Method) -> tuple[np.ndarray, np.ndarray]:
    """Return for each pixel kept the first source pixel that it reads, and the weights from there on: (kept, taps).

    The weights are integers / 2**bits, except for the arithmetic ``float``.
    """
    if method.filter == "nearest":
        # Pillow adds up the steps one by one (ImagingScaleAffine): between two pixels its rounding errors decide.
        steps = np.full(kept.stop, source / size)
        steps[0] *= 0.5
        read = np.minimum(source - 1, np.cumsum(steps)[kept.start :].astype(int))
        return read, np.ones((len(kept), 1))
    taps = _grown_weights if method.sampling == "antialias" else _plain_weights
    first, weights = taps(source, size, kept, method)
    if method.arithmetic == "float":
        return first, weights
    bits = _BITS
    if method.arithmetic == "torchvision":  # the largest weight of the whole side has to fit into an int16
        largest = float(taps(source, size, range(size), method)[1].max())
        bits = next(bits for bits in range(_BITS) if int(0.5 + largest * (1 << (bits + 1))) >= 1 << 15)
    weights = weights * (1 << bits)
    return first, np.trunc(weights + np.copysign(0.5, weights)) / (1 << bits)


def _grown_weights(source: int, size: int, kept: range, method: Method) -> tuple[np.ndarray, np.ndarray]:
    """Return the weights of a filter that grows as the picture shrinks and is cut off at the border."""
    shape, support = FILTERS[method.filter]
    scale = source / size
    stretch = max(scale, 1.0)
    centres = (np.array(kept) + 0.5) * scale
    first = np.maximum(0, (centres - support * stretch + 0.5).astype(int))
    stop = np.minimum(source, (centres + support * stretch + 0.5).astype(int))
    read = first[:, None] + np.arange((stop - first).max())
    weights = np.where(read < stop[:, None], shape((read - centres[:, None] + 0.5) * (1 / stretch)), 0.0)
    return first, weights / np.cumsum(weights, axis=1)[:, -1:]  # summed one by one, as Pillow does


def _plain_weights(source: int, size: int, kept: range, method: Method) -> tuple[np.ndarray, np.ndarray]:
    """Return the weights of a filter of constant width, which reads the border pixel in place of pixels beyond it."""
    shape, support = FILTERS[method.filter]
    if method.filter == "bicubic":
        shape = functools.partial(_bicubic, a=-0.75)
    half = math.ceil(support)
    if method.sampling == "corners":
        centres = np.array(kept) * ((source - 1) / max(1, size - 1))
    else:
        centres = (np.array(kept) + 0.5) * (source / size) - 0.5
    taps = np.floor(centres).astype(int)[:, None] + np.arange(1 - half, half + 1)
    found = shape(taps - centres[:, None])
    taps = np.clip(taps, 0, source - 1)
    weights = np.zeros(taps.shape)
    for tap, weight in zip(taps.T, found.T, strict=True):
        weights[np.arange(len(kept)), tap - taps[:, 0]] += weight
    return taps[:, 0], weights / weights.sum(axis=1, keepdims=True)


def _bicubic(x: np.ndarray, a: float = -0.5) -> np.ndarray:
    x = np.abs(x)
    near, far = ((a + 2.0) * x - (a + 3.0)) * x * x + 1, (((x - 5) * x + 8) * x - 4) * a
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))


FILTERS: dict[str, tuple[Callable[[np.ndarray], np.ndarray], float]] = {
    "box": (lambda x: (x > -0.5) & (x <= 0.5), 0.5),
    "bilinear": (lambda x: 1.0 - np.minimum(np.abs(x), 1.0), 1.0),
    "hamming": (lambda x: (np.abs(x) < 1) * np.sinc(x) * (0.54 + 0.46 * np.cos(np.pi * x)), 1.0),
    "bicubic": (_bicubic, 2.0),
    "lanczos": (lambda x: ((x >= -3) & (x < 3)) * np.sinc(x) * np.sinc(x / 3), 3.0),
}
