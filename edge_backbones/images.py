"""Photographs to network input, the same way at build time and on the device: files with Pillow, camera frames with numpy.

:func:`fit` repeats the evaluation transform of timm (``timm.data.create_transform(is_training=False)``) bit for bit, so
that a device without torch sees what the network was trained on; a test compares the two.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Literal, NamedTuple

import msgspec
import numpy as np

from edge_backbones.errors import InputError
from edge_backbones.frames import as_frame
from edge_backbones.image_files import IMAGE_SUFFIXES, list_images, open_image
from edge_backbones.spec import InputSpec

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["IMAGE_SUFFIXES", "ImageConfig", "fit", "list_images", "network_input", "open_image", "to_input"]

_BITS = 22
_PIXELS = 8  # of a block: the more, the more of its weights are 0
_ROWS = 128  # that are taken at a time: they stay in the cache, and OpenBLAS leaves them to the thread that asks
_BAND_PIXELS = 250_000  # of the source, for which a thread is worth its start


class ImageConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The network's own preprocessing, as timm's data config has it; ``mean`` and ``std`` are for values in 0..1."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: Literal["nearest", "bilinear", "bicubic", "lanczos", "box", "hamming"] = "bicubic"
    crop_pct: float = 0.875
    crop_mode: Literal["center", "squash", "border"] = "center"

    def __post_init__(self) -> None:
        if len(self.mean) != len(self.std) or not self.mean or min(self.std) <= 0:
            raise ValueError(f"mean {self.mean} and std {self.std} need one value per channel, std above 0")
        if not 0 < self.crop_pct <= 1:
            raise ValueError(f"crop_pct must be in (0, 1], got {self.crop_pct}")


def fit(
    image: Image.Image | np.ndarray, config: ImageConfig, height: int, width: int, threads: int | None = None
) -> np.ndarray:
    """Resize and crop to (height, width): uint8 array (height, width, channels).

    ``image``: a picture of Pillow, or a camera frame as uint8 (rows, columns, channels), grey ones without the last axis
    too. ``threads`` share a large one, by default as many as there are cores; the pixels do not depend on them. Raises
    InputError for what is no frame of as many channels as ``config`` has, with what makes one of it.
    """
    if threads is not None and threads < 1:
        raise InputError(f"threads must be at least 1, got {threads}")
    image = as_frame(image, len(config.mean))
    if isinstance(image, np.ndarray):
        image = image[..., 0] if image.shape[2] == 1 else image
        source_h, source_w = image.shape[:2]
    else:
        source_w, source_h = image.size
    scaled_h, scaled_w = math.floor(height / config.crop_pct), math.floor(width / config.crop_pct)
    if config.crop_mode == "squash":
        size = (scaled_h, scaled_w)
    elif config.crop_mode == "center" and scaled_h == scaled_w:
        short, long = sorted((source_h, source_w))
        other = int(scaled_h * long / short)
        size = (scaled_h, other) if source_h <= source_w else (other, scaled_h)
    else:
        ratios = (source_h / scaled_h, source_w / scaled_w)
        ratio = max(ratios) if config.crop_mode == "border" else min(ratios)
        size = (max(1, round(source_h / ratio)), max(1, round(source_w / ratio)))  # timm fails on a strip
    return _padded(_resized_centre(image, size, (height, width), config, threads), config, height, width)


def _resized_centre(
    image: Image.Image | np.ndarray,
    size: tuple[int, int],
    wanted: tuple[int, int],
    config: ImageConfig,
    threads: int | None,
) -> np.ndarray:
    """The middle ``wanted`` rows and columns of the picture resized to ``size``; all of them where it has fewer."""
    rows, columns = kept = _middle(size[0], wanted[0]), _middle(size[1], wanted[1])
    pixels = np.atleast_3d(np.asarray(image))
    source = pixels.shape[:2]
    if size != source:
        is_plain = isinstance(image, np.ndarray) or image.mode in ("L", "RGB")  # neither a palette nor transparency
        if is_plain and config.interpolation in _FILTERS and _widths_first(source, size):
            return _resample(pixels, size, kept, config.interpolation, threads or os.cpu_count() or 1)
        from PIL import Image

        picture = Image.fromarray(image) if isinstance(image, np.ndarray) else image
        pixels = np.atleast_3d(np.asarray(picture.resize(size[::-1], Image.Resampling[config.interpolation.upper()])))
    return pixels[rows.start : rows.stop, columns.start : columns.stop].copy()


def _middle(length: int, wanted: int) -> range:
    """Where a centre crop lies on a side, rounded as torchvision does; the whole side where it is too short."""
    start = round((length - wanted) / 2.0)
    return range(start, start + wanted) if length > wanted else range(length)


def _widths_first(source: tuple[int, int], size: tuple[int, int]) -> bool:
    """Whether Pillow resizes along the rows first: some releases begin with the other side of a tall picture (Resample.c)."""
    return source[0] - size[0] <= max(0, 2 * (source[1] - size[1]))


def _padded(pixels: np.ndarray, config: ImageConfig, height: int, width: int) -> np.ndarray:
    """With a border where a side is short of (height, width): of the mean colour in border mode, else black."""
    if pixels.shape[:2] == (height, width):
        return np.ascontiguousarray(pixels)
    fill = [round(255 * mean) if config.crop_mode == "border" else 0 for mean in config.mean]
    padded = np.empty((height, width, pixels.shape[2]), np.uint8)
    padded[...] = np.array(fill[: pixels.shape[2]], np.uint8)
    top, left = (height - pixels.shape[0]) // 2, (width - pixels.shape[1]) // 2
    padded[top : top + pixels.shape[0], left : left + pixels.shape[1]] = pixels
    return padded


def to_input(images: np.ndarray, config: ImageConfig, input: InputSpec) -> np.ndarray:
    """uint8 (batch, height, width, channels) to what the graph takes: itself, or normalised float32 NCHW."""
    return np.ascontiguousarray(images) if input.name == "image" else _normalised(images, config)


def network_input(array: np.ndarray, config: ImageConfig, input: InputSpec) -> np.ndarray:
    """An input of the graph as the float32 NCHW that the bare network takes."""
    return _normalised(array, config) if input.name == "image" else array


def _normalised(images: np.ndarray, config: ImageConfig) -> np.ndarray:
    mean, std = np.array(config.mean, np.float32), np.array(config.std, np.float32)
    scaled = (images.astype(np.float32) / np.float32(255) - mean) / std
    return np.ascontiguousarray(scaled.transpose(0, 3, 1, 2))


# ---- Resampling as Pillow's Resample.c does it, bit for bit, of the pixels that a crop keeps and no others
#
# It adds products of pixels and 22-bit weights in integers. In float64 such sums are exact in any order, and BLAS may add:
# neighbouring pixels times a matrix of weights, first along rows, then along columns.


class _Block(NamedTuple):
    """Resized pixels ``place`` along a side: those of the source in ``read`` times ``weights``, (read, place)."""

    read: slice
    weights: np.ndarray
    place: slice


def _resample(
    pixels: np.ndarray, size: tuple[int, int], kept: tuple[range, range], filter: str, threads: int
) -> np.ndarray:
    """The rows and columns ``kept`` of ``pixels`` resized to ``size``: uint8 (rows, columns, channels), like ``pixels``.

    ``filter``: a name of `_FILTERS`. ``threads`` share a large picture, a band of rows each.
    """
    height, width, channels = pixels.shape
    down, across = _blocks(height, size[0], kept[0], filter), _blocks(width, size[1], kept[1], filter)
    resized = np.empty((len(kept[0]), len(kept[1]), channels), np.uint8)
    bands = max(1, min(threads, len(down), height * width // _BAND_PIXELS))
    edges = [len(down) * band // bands for band in range(bands + 1)]

    def make(band: int) -> None:
        _resample_band(pixels, down[edges[band] : edges[band + 1]], across, resized)

    if bands == 1:
        make(0)
    else:
        with ThreadPoolExecutor(bands) as pool:
            list(pool.map(make, range(bands)))
    return resized


def _resample_band(pixels: np.ndarray, down: list[_Block], across: list[_Block], resized: np.ndarray) -> None:
    """The rows of ``resized`` that the blocks ``down`` make. Channels come first in here: each is a matrix."""
    top, bottom = down[0].read.start, max(block.read.stop for block in down)
    left, right = across[0].read.start, max(block.read.stop for block in across)
    planes = pixels[top:bottom, left:right].transpose(2, 0, 1)
    narrow = np.empty((*planes.shape[:2], resized.shape[1]), np.uint8)
    some, sums = (np.empty((len(planes), _ROWS, columns)) for columns in (right - left, resized.shape[1]))
    for start in range(0, bottom - top, _ROWS):
        stop = min(bottom - top, start + _ROWS)
        rows, made = some[:, : stop - start], sums[:, : stop - start]
        rows[...] = planes[:, start:stop]
        for read, weights, place in across:
            np.matmul(rows[..., read.start - left : read.stop - left], weights, out=made[..., place])
        narrow[:, start:stop] = _in_range(made)
    for read, weights, place in down:
        found = weights.T @ narrow[:, read.start - top : read.stop - top].astype(np.float64)
        resized[place] = _in_range(found).transpose(1, 2, 0)


def _in_range(sums: np.ndarray) -> np.ndarray:
    """Round, in place, what is about to be cut to 8 bits; ties go up."""
    sums += 0.5
    return np.clip(sums, 0, 255, out=sums)


@functools.lru_cache(8)  # a camera's frames are all of one size
def _blocks(source: int, size: int, kept: range, filter: str) -> list[_Block]:
    """What makes the pixels ``kept`` of a side of ``source`` pixels resized to ``size``."""
    first, weights = _weights(source, size, kept, filter)
    found = []
    for begin in range(0, len(kept), _PIXELS):
        place = slice(begin, min(len(kept), begin + _PIXELS))
        read = slice(int(first[begin]), min(source, int(first[place][-1]) + weights.shape[1]))
        matrix = np.zeros((source, place.stop - begin))
        for column, (start, of_one) in enumerate(zip(first[place], weights[place], strict=True)):
            matrix[start : start + len(of_one), column] = of_one[: source - start]  # those past the end are 0
        found.append(_Block(read, matrix[read].copy(), place))
    return found


def _weights(source: int, size: int, kept: range, filter: str) -> tuple[np.ndarray, np.ndarray]:
    """For every pixel kept: the first that it reads, and the weights of that and those behind it, step by step as there."""
    shape, support = _FILTERS[filter]
    scale = source / size
    stretch = max(scale, 1.0)
    centres = (np.array(kept) + 0.5) * scale
    first = np.maximum(0, (centres - support * stretch + 0.5).astype(int))
    stop = np.minimum(source, (centres + support * stretch + 0.5).astype(int))
    read = first[:, None] + np.arange((stop - first).max())
    weights = np.where(read < stop[:, None], shape((read - centres[:, None] + 0.5) * (1 / stretch)), 0.0)
    weights /= np.cumsum(weights, axis=1)[:, -1:]  # added one by one, as there
    weights *= 1 << _BITS
    return first, np.trunc(weights + np.copysign(0.5, weights)) / (1 << _BITS)


def _bicubic(x: np.ndarray) -> np.ndarray:
    x, a = np.abs(x), -0.5
    near, far = ((a + 2.0) * x - (a + 3.0)) * x * x + 1, (((x - 5) * x + 8) * x - 4) * a
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))


_FILTERS: dict[str, tuple[Callable[[np.ndarray], np.ndarray], float]] = {
    "box": (lambda x: (x > -0.5) & (x <= 0.5), 0.5),
    "bilinear": (lambda x: 1.0 - np.minimum(np.abs(x), 1.0), 1.0),
    "hamming": (lambda x: (np.abs(x) < 1) * np.sinc(x) * (0.54 + 0.46 * np.cos(np.pi * x)), 1.0),
    "bicubic": (_bicubic, 2.0),
    "lanczos": (lambda x: ((x >= -3) & (x < 3)) * np.sinc(x) * np.sinc(x / 3), 3.0),
}
