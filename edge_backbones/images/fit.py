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
from edge_backbones.images.decode import IMAGE_SUFFIXES, list_images, open_image
from edge_backbones.images.frames import as_frame
from edge_backbones.spec import InputSpec

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["IMAGE_SUFFIXES", "ImageConfig", "fit", "list_images", "network_input", "open_image", "to_input"]

_BITS = 22
_PIXELS = 8  # of a block: the more, the more of its weights are 0
_ROWS = 128  # that are taken at a time: they stay in the cache, and OpenBLAS leaves them to the thread that asks
_BAND_PIXELS = 250_000  # of the source, for which a thread is worth its start
_MOST_EDGE = 1 << 20
_MOST_PIXEL = 1e6  # of mean, std and 1 / std: pixels lie in 0..1, in 0..255 for who scales them so
_LEAST_CROP = 0.01
_MOST_CROP = 4.0  # crop_pct above 1: the picture is smaller than its crop, and gets a border


class ImageConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The network's own preprocessing: how a picture gets the size of the input, and how pixels are normalised.

    ``mean`` and ``std``: one value per channel of the picture (RGB for three), for pixels scaled to 0..1. A processor that
    scales pixels otherwise is stored with ``mean`` and ``std`` changed to match. ``channel_order``: ``bgr`` for a network
    that takes the channels reversed; they are reversed last, after normalisation.

    ``crop_mode``, for an input of height x width:

    - ``center``: scale the picture until it covers the input divided by ``crop_pct``, and cut out the centre.
    - ``squash``: scale both sides to the input divided by ``crop_pct``, whatever their ratio, and cut out the centre.
    - ``border``: scale the picture until it fits inside, and put it in the centre.
    - ``pad``: scale the picture until it fits inside, and put it in the top left corner, as detection models do.

    ``short_edge`` and ``long_edge``, for ``border`` and ``pad``: the sides that the processor scales to, in pixels: the short
    side to ``short_edge``, unless the long side would get longer than ``long_edge``. A picture that is then larger than the
    input is scaled until it fits inside. Without them the picture always fills the input. ``size_multiple``: scaled sides
    are rounded up to a multiple of it. ``fill``: colour of what the picture leaves free.

    ``sampling``: with ``antialias`` the filter grows as a picture gets smaller, as in Pillow. Without it the filter keeps
    its width: pixels lie at the ``centres`` of their cells, or the outermost ones at the ``corners`` (torch's
    ``align_corners``), and ``bicubic`` is that of torch and OpenCV (a = -0.75). ``arithmetic``: the library whose integers
    are repeated bit for bit, which differ by a grey level or two, or ``float`` for one that rounds only once, at the end.
    ``rounding``: the library whose rules round scaled sides and the position of crops and borders.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    channel_order: Literal["rgb", "bgr"] = "rgb"
    interpolation: Literal["nearest", "bilinear", "bicubic", "lanczos", "box", "hamming"] = "bicubic"
    sampling: Literal["antialias", "centres", "corners"] = "antialias"
    arithmetic: Literal["pillow", "torchvision", "float"] = "pillow"
    crop_pct: float = 0.875
    crop_mode: Literal["center", "squash", "border", "pad"] = "center"
    short_edge: int | None = None
    long_edge: int | None = None
    size_multiple: int = 1
    fill: Literal["black", "mean"] | None = None
    rounding: Literal["timm", "transformers", "transformers_pil", "paddle"] = "timm"

    def __post_init__(self) -> None:
        finite = all(math.isfinite(value) for value in (*self.mean, *self.std))
        if len(self.mean) != len(self.std) or not self.mean or not finite or min(self.std) <= 0:
            raise ValueError(f"mean {self.mean} and std {self.std} need one finite value per channel, std above 0")
        if not (
            max(map(abs, self.mean)) <= _MOST_PIXEL and 1 / _MOST_PIXEL <= min(self.std) <= max(self.std) <= _MOST_PIXEL
        ):
            raise ValueError(f"mean {self.mean} and std {self.std} are not of pixels in 0..1")
        if not _LEAST_CROP <= self.crop_pct <= _MOST_CROP:
            raise ValueError(f"crop_pct must be in [{_LEAST_CROP}, {_MOST_CROP}], got {self.crop_pct}")
        edges = (1 if edge is None else edge for edge in (self.short_edge, self.long_edge, self.size_multiple))
        if not all(1 <= edge <= _MOST_EDGE for edge in edges):
            raise ValueError(
                f"short_edge, long_edge and size_multiple must be 1 to {_MOST_EDGE}, "
                f"got {self.short_edge}, {self.long_edge} and {self.size_multiple}"
            )
        if (self.short_edge or self.long_edge) and self.crop_mode not in ("border", "pad"):
            raise ValueError(f"short_edge and long_edge are for crop_mode border and pad, not {self.crop_mode}")

    @property
    def colours(self) -> tuple[int, ...]:
        """The colour of what the picture leaves free, 0..255 per channel: by default the mean around a whole picture, which
        normalisation makes 0, and black around one that is too small for its crop."""
        fill = self.fill or ("mean" if self.crop_mode in ("border", "pad") else "black")
        return tuple(round(min(1.0, max(0.0, mean)) * 255) if fill == "mean" else 0 for mean in self.mean)

    def describe(self, height: int, width: int) -> str:
        """What is done to a picture for an input of height x width, in one line."""
        size, scaled = f"{height}x{width}", self._scaled(height, width)
        edges = [
            f"{name} side to {'at most ' if name == 'long' and self.short_edge else ''}{edge}"
            for name, edge in (("short", self.short_edge), ("long", self.long_edge))
            if edge is not None
        ]
        if self.size_multiple > 1:
            edges.append(f"sides up to multiples of {self.size_multiple}")
        inside = f"{', '.join(edges)}, inside {size}" if edges else f"scaled to fit inside {size}"
        if self.crop_mode == "squash":
            how = f"both sides to {'x'.join(map(str, scaled))}"
        elif self.crop_mode == "center":
            how = (
                f"short side to {min(scaled)}" if scaled[0] == scaled[1] else f"scaled to cover {scaled[0]}x{scaled[1]}"
            )
        else:
            how = f"{inside}, {'in the top left corner' if self.crop_mode == 'pad' else 'in the centre'}"
        if self.crop_mode in ("squash", "center") and (scaled != (height, width) or self.crop_mode == "center"):
            how += f", centre {size}"
        plain = {"antialias": "", "centres": " without antialiasing", "corners": " with aligned corners"}[self.sampling]
        arithmetic = {"pillow": "", "torchvision": " of torchvision", "float": " in floating point"}[self.arithmetic]
        filter = f"{self.interpolation}{plain}{arithmetic}"
        mean, std = (" ".join(f"{value:.4g}" for value in values) for values in (self.mean, self.std))
        order = (
            {"rgb": "RGB", "bgr": "BGR"}[self.channel_order] if len(self.mean) == 3 else f"{len(self.mean)} channels"
        )
        return f"{how} ({filter}), {order}, mean {mean}, std {std} of pixels in 0..1"

    def _scaled(self, height: int, width: int) -> tuple[int, int]:
        return math.floor(height / self.crop_pct), math.floor(width / self.crop_pct)


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
    size = _resized_size((source_h, source_w), config, height, width)
    return _padded(_resized_centre(image, size, (height, width), config, threads), config, height, width)


def _resized_size(source: tuple[int, int], config: ImageConfig, height: int, width: int) -> tuple[int, int]:
    """(rows, columns) that a picture of ``source`` (rows, columns) is scaled to, before it is cropped or padded."""
    scaled = config._scaled(height, width)
    if config.crop_mode == "squash":
        return scaled
    rows, columns = source
    cut = config.rounding.startswith("transformers")
    whole: Callable[[float], int] = int if cut else round
    if config.short_edge is not None or config.long_edge is not None:
        size = _by_edges(source, config.short_edge, config.long_edge, whole)
        rows, columns = (-(-side // config.size_multiple) * config.size_multiple for side in size)
        if rows <= height and columns <= width:
            return rows, columns
        scaled = height, width
    elif config.crop_mode == "center" and scaled[0] == scaled[1]:
        short, long = sorted(source)
        other = (round if config.rounding == "paddle" else int)(scaled[0] * long / short)
        return (scaled[0], other) if rows <= columns else (other, scaled[0])
    if cut and config.crop_mode != "center":
        scale = min(scaled[0] / rows, scaled[1] / columns)
        return max(1, int(rows * scale)), max(1, int(columns * scale))
    ratios = (rows / scaled[0], columns / scaled[1])
    ratio = min(ratios) if config.crop_mode == "center" else max(ratios)
    return max(1, whole(rows / ratio)), max(1, whole(columns / ratio))  # timm fails on a strip


def _by_edges(
    source: tuple[int, int], short_edge: int | None, long_edge: int | None, whole: Callable[[float], int]
) -> tuple[int, int]:
    """(rows, columns) with the sides that are asked for, in the order of transformers' own arithmetic."""
    short, long = sorted(source)
    if short_edge is None:
        assert long_edge is not None  # one of the two is asked for
        sides = whole(long_edge * (short / long)), long_edge
    elif long_edge is not None and long / short * short_edge > long_edge:
        exact = long_edge * short / long
        sides = round(exact), int(exact * long / short)
    else:
        sides = short_edge, long if short == short_edge else whole(short_edge * long / short)
    sides = max(1, sides[0]), max(1, sides[1])
    return sides if source[0] <= source[1] else sides[::-1]


def _resized_centre(
    image: Image.Image | np.ndarray,
    size: tuple[int, int],
    wanted: tuple[int, int],
    config: ImageConfig,
    threads: int | None,
) -> np.ndarray:
    """The middle ``wanted`` rows and columns of the picture resized to ``size``; all of them where it has fewer."""
    down = config.rounding != "timm"
    rows, columns = kept = _middle(size[0], wanted[0], down=down), _middle(size[1], wanted[1], down=down)
    pixels = np.atleast_3d(np.asarray(image))
    source = pixels.shape[:2]
    if size != source:
        is_plain = isinstance(image, np.ndarray) or image.mode in ("L", "RGB")  # Pillow multiplies by transparency
        method = _Method(config.interpolation, config.sampling, config.arithmetic)
        is_pillow = method[1:] == ("antialias", "pillow")
        if config.interpolation in _FILTERS and (not is_pillow or (is_plain and _widths_first(source, size))):
            return _resample(pixels, size, kept, method, threads or os.cpu_count() or 1)
        from PIL import Image

        picture = Image.fromarray(image) if isinstance(image, np.ndarray) else image
        pixels = np.atleast_3d(np.asarray(picture.resize(size[::-1], Image.Resampling[config.interpolation.upper()])))
    return pixels[rows.start : rows.stop, columns.start : columns.stop].copy()


def _middle(length: int, wanted: int, *, down: bool) -> range:
    """Where a centre crop lies on a side; the whole side where it is too short. An odd rest is halved as in transformers
    (``down``), or as in torchvision and timm."""
    start = (length - wanted) // 2 if down else round((length - wanted) / 2.0)
    return range(start, start + wanted) if length > wanted else range(length)


def _widths_first(source: tuple[int, int], size: tuple[int, int]) -> bool:
    """Whether Pillow resizes along the rows first: some releases begin with the other side of a tall picture (Resample.c)."""
    return source[0] - size[0] <= max(0, 2 * (source[1] - size[1]))


def _padded(pixels: np.ndarray, config: ImageConfig, height: int, width: int) -> np.ndarray:
    """With a border of ``config.colours`` where a side is short of (height, width)."""
    if pixels.shape[:2] == (height, width):
        return np.ascontiguousarray(pixels)
    padded = np.empty((height, width, pixels.shape[2]), np.uint8)
    padded[...] = np.array(config.colours[: pixels.shape[2]], np.uint8)
    up = 1 if config.rounding == "transformers_pil" else 0
    top, left = (height - pixels.shape[0] + up) // 2, (width - pixels.shape[1] + up) // 2
    if config.crop_mode == "pad":
        top = left = 0
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
    if config.channel_order == "bgr":
        scaled = scaled[..., ::-1]
    return np.ascontiguousarray(scaled.transpose(0, 3, 1, 2))


# ---- Resampling as Pillow's Resample.c and torchvision do it, bit for bit, of the pixels that a crop keeps and no others
#
# They add products of pixels and integer weights. In float64 such sums are exact in any order, and BLAS may add: neighbouring
# pixels times a matrix of weights, first along rows, then along columns.


class _Method(NamedTuple):
    """See ImageConfig."""

    filter: str
    sampling: str
    arithmetic: str


class _Block(NamedTuple):
    """Resized pixels ``place`` along a side: those of the source in ``read`` times ``weights``, (read, place)."""

    read: slice
    weights: np.ndarray
    place: slice


def _resample(
    pixels: np.ndarray, size: tuple[int, int], kept: tuple[range, range], method: _Method, threads: int
) -> np.ndarray:
    """The rows and columns ``kept`` of ``pixels`` resized to ``size``: uint8 (rows, columns, channels), like ``pixels``.

    ``threads`` share a large picture, a band of rows each.
    """
    height, width, channels = pixels.shape
    down, across = _blocks(height, size[0], kept[0], method), _blocks(width, size[1], kept[1], method)
    resized = np.empty((len(kept[0]), len(kept[1]), channels), np.uint8)
    between = np.float64 if method.arithmetic == "float" else np.uint8
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
    pixels: np.ndarray, down: list[_Block], across: list[_Block], resized: np.ndarray, *, between: type
) -> None:
    """The rows of ``resized`` that the blocks ``down`` make; ``between``: dtype of what is resized along the rows only.

    Channels come first in here: each is a matrix.
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
    """Round, in place, what is about to be cut to 8 bits; ties go up."""
    sums += 0.5
    return np.clip(sums, 0, 255, out=sums)


@functools.lru_cache(8)  # a camera's frames are all of one size
def _blocks(source: int, size: int, kept: range, method: _Method) -> list[_Block]:
    """What makes the pixels ``kept`` of a side of ``source`` pixels resized to ``size``."""
    first, weights = _weights(source, size, kept, method)
    found = []
    for begin in range(0, len(kept), _PIXELS):
        place = slice(begin, min(len(kept), begin + _PIXELS))
        read = slice(int(first[begin]), min(source, int(first[place][-1]) + weights.shape[1]))
        matrix = np.zeros((source, place.stop - begin))
        for column, (start, of_one) in enumerate(zip(first[place], weights[place], strict=True)):
            matrix[start : start + len(of_one), column] = of_one[: source - start]  # those past the end are 0
        found.append(_Block(read, matrix[read].copy(), place))
    return found


def _weights(source: int, size: int, kept: range, method: _Method) -> tuple[np.ndarray, np.ndarray]:
    """For every pixel kept: the first that it reads, and the weights of that and those behind it; integers / 2**bits, but for
    ``float``."""
    taps = _grown_weights if method.sampling == "antialias" else _plain_weights
    first, weights = taps(source, size, kept, method)
    if method.arithmetic == "float":
        return first, weights
    bits = _BITS
    if method.arithmetic == "torchvision":  # as many bits as fit into an int16, of the weights of the whole side
        largest = float(taps(source, size, range(size), method)[1].max())
        bits = next(bits for bits in range(_BITS) if int(0.5 + largest * (1 << (bits + 1))) >= 1 << 15)
    weights = weights * (1 << bits)
    return first, np.trunc(weights + np.copysign(0.5, weights)) / (1 << bits)


def _grown_weights(source: int, size: int, kept: range, method: _Method) -> tuple[np.ndarray, np.ndarray]:
    """Of a filter that grows as the picture gets smaller, and is cut off at the border."""
    shape, support = _FILTERS[method.filter]
    scale = source / size
    stretch = max(scale, 1.0)
    centres = (np.array(kept) + 0.5) * scale
    first = np.maximum(0, (centres - support * stretch + 0.5).astype(int))
    stop = np.minimum(source, (centres + support * stretch + 0.5).astype(int))
    read = first[:, None] + np.arange((stop - first).max())
    weights = np.where(read < stop[:, None], shape((read - centres[:, None] + 0.5) * (1 / stretch)), 0.0)
    return first, weights / np.cumsum(weights, axis=1)[:, -1:]  # added one by one, as there


def _plain_weights(source: int, size: int, kept: range, method: _Method) -> tuple[np.ndarray, np.ndarray]:
    """Of a filter as wide as it is, which reads the pixel at the border in place of those beyond it."""
    shape, support = _FILTERS[method.filter]
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


_FILTERS: dict[str, tuple[Callable[[np.ndarray], np.ndarray], float]] = {
    "box": (lambda x: (x > -0.5) & (x <= 0.5), 0.5),
    "bilinear": (lambda x: 1.0 - np.minimum(np.abs(x), 1.0), 1.0),
    "hamming": (lambda x: (np.abs(x) < 1) * np.sinc(x) * (0.54 + 0.46 * np.cos(np.pi * x)), 1.0),
    "bicubic": (_bicubic, 2.0),
    "lanczos": (lambda x: ((x >= -3) & (x < 3)) * np.sinc(x) * np.sinc(x / 3), 3.0),
}
