"""Photographs to network input, the same way at build time and on the device, with Pillow and numpy alone.

:func:`fit` repeats the evaluation transform of timm (``timm.data.create_transform(is_training=False)``) bit for bit, so
that a device without torch sees what the network was trained on; a test compares the two.
"""

from __future__ import annotations

import math
import os
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import msgspec
import numpy as np

from edge_backbones.errors import InputError, MissingDependencyError
from edge_backbones.spec import InputSpec

if TYPE_CHECKING:
    from PIL import Image

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm", ".pgm"})

# A thread is worth its start for this many pixels of the source: a fifth of a millisecond against two.
_BAND_PIXELS = 250_000
# Filters that end at 0, and where: a neighbour that rounding adds or leaves out at their edge has no weight.
_TAPERED = {"BILINEAR": 1, "HAMMING": 1, "BICUBIC": 2, "LANCZOS": 3}


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


def list_images(folder: Path) -> list[Path]:
    """Image files under a folder, by name, sorted; whether they decode is not known yet."""
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file())


def open_image(path: Path, channels: int = 3) -> Image.Image:
    """Decode a file upright (EXIF) as RGB, or as grey for one channel. Raises InputError naming the file."""
    try:
        from PIL import Image, ImageOps
    except ImportError as error:
        raise MissingDependencyError("reading image files", "images") from error
    if channels not in (1, 3):
        raise InputError(f"image files have 1 or 3 channels, this backbone takes {channels}: pass arrays instead")
    try:
        with Image.open(path) as image:
            if image.mode.startswith(("I", "F")):
                raise InputError(
                    f"{path} has {image.mode} pixels of more than 8 bits: scale it to 8 bits per channel first"
                )
            return ImageOps.exif_transpose(image).convert("RGB" if channels == 3 else "L")
    except InputError:
        raise
    except Exception as error:  # Pillow's decoders raise whatever a broken file makes them trip over
        raise InputError(f"{path} does not decode as an image: {error}") from error


def fit(
    image: Image.Image | np.ndarray, config: ImageConfig, height: int, width: int, threads: int | None = None
) -> np.ndarray:
    """Resize and crop to (height, width): uint8 array (height, width, channels).

    ``image``: a picture of Pillow, or a camera frame as uint8 (rows, columns, channels). ``threads`` share a large one, by
    default as many as there are cores; the pixels do not depend on them. Raises InputError for an array that is no frame.
    """
    from PIL import Image

    if threads is not None and threads < 1:
        raise InputError(f"threads must be at least 1, got {threads}")
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3:
            raise InputError(f"a frame is uint8 (rows, columns, channels), got {image.dtype} {image.shape}")
        image = image[..., 0] if image.shape[2] == 1 else image
        source_h, source_w = image.shape[:2]
    else:
        source_w, source_h = image.size
    resample = Image.Resampling[config.interpolation.upper()]
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
    source = (source_h, source_w)
    return _padded(_resized_centre(image, source, size, (height, width), resample, threads), config, height, width)


def _resized_centre(
    image: Image.Image | np.ndarray,
    source: tuple[int, int],
    size: tuple[int, int],
    wanted: tuple[int, int],
    resample: Image.Resampling,
    threads: int | None,
) -> np.ndarray:
    """The middle ``wanted`` rows and columns of the picture resized to ``size``; all of them where it has fewer.

    Pillow lets other threads run while it resizes: each makes a band of rows.
    """
    from PIL import Image

    if size == source:
        top, left = _middle(size[0], wanted[0]).start, _middle(size[1], wanted[1]).start
        return np.atleast_3d(np.array(image))[top : top + wanted[0], left : left + wanted[1]]
    bands = max(1, min(threads or os.cpu_count() or 1, source[0] * source[1] // _BAND_PIXELS))
    support = _TAPERED.get(resample.name)
    whole = [0, size[0]], (0, size[1])
    edges, (first, last) = whole if support is None else _split(size, source, wanted, bands, support)

    def resized(start: int, stop: int) -> np.ndarray:
        rows, columns = range(source[0]), range(source[1])
        if isinstance(image, np.ndarray):  # Pillow copies what it takes: no more than this band reads
            rows, columns = _read_by(((start, stop), (first, last)), size, source, support or 0)
            part = Image.fromarray(image[rows.start : rows.stop, columns.start : columns.stop])
        else:
            part = image
        box = (
            first * source[1] / size[1] - columns.start,
            start * source[0] / size[0] - rows.start,
            last * source[1] / size[1] - columns.start,
            stop * source[0] / size[0] - rows.start,
        )
        return np.atleast_3d(np.array(part.resize((last - first, stop - start), resample, box)))

    if not isinstance(image, np.ndarray):
        image.load()  # here, before every thread does
    if len(edges) == 2:
        pixels = resized(*edges)
    else:
        with ThreadPoolExecutor(len(edges) - 1) as pool:
            pixels = np.concatenate(list(pool.map(resized, edges, edges[1:])))
    rows, columns = _middle(size[0], wanted[0]), _middle(size[1], wanted[1])
    return pixels[rows.start - edges[0] : rows.stop - edges[0], columns.start - first : columns.stop - first]


def _split(
    size: tuple[int, int], source: tuple[int, int], wanted: tuple[int, int], bands: int, support: int
) -> tuple[list[int], tuple[int, int]]:
    """Rows of the resized picture at which bands begin and end, and its first and one past its last column that are made:
    no more than the crop keeps, but for what it takes to begin and end where :func:`_exact_step` says.

    Fewer bands, or all of it in one piece, where Pillow could begin with one side in a part and with the other in the whole:
    it rounds in between.
    """
    rows, columns = (_middle(*sides) for sides in zip(size, wanted, strict=True))
    step, column_step = (_exact_step(*sides) for sides in zip(size, source, strict=True))
    first = columns.start // column_step * column_step
    last = min(size[1], -(-columns.stop // column_step) * column_step)
    begin, steps = rows.start // step, -(-rows.stop // step) - rows.start // step
    for count in range(min(bands, steps), 0, -1):
        edges = [min(size[0], (begin + steps * band // count) * step) for band in range(count + 1)]
        resized = [(size, source)]
        for start, stop in pairwise(edges):
            rows_read, columns_read = _read_by(((start, stop), (first, last)), size, source, support)
            part = (stop - start, last - first)
            resized += [(part, source), (part, (len(rows_read), len(columns_read)))]
        if all(_widths_first(of, to) for to, of in resized):
            return edges, (first, last)
    return [0, size[0]], (0, size[1])


def _read_by(
    part: tuple[tuple[int, int], tuple[int, int]], size: tuple[int, int], source: tuple[int, int], support: int
) -> tuple[range, range]:
    """Rows and columns of the source that the filter reads for a part of the resized picture."""
    found = []
    for (start, stop), of, read in zip(part, size, source, strict=True):
        margin = support * max(1.0, read / of) + 1
        found.append(
            range(max(0, math.floor(start * read / of - margin)), min(read, math.ceil(stop * read / of + margin)))
        )
    return found[0], found[1]


def _middle(length: int, wanted: int) -> range:
    """Where a centre crop lies on a side, rounded as torchvision does; the whole side where it is too short."""
    start = round((length - wanted) / 2.0)
    return range(start, start + wanted) if length > wanted else range(length)


def _exact_step(length: int, source: int) -> int:
    """Resized pixels from one place to the next where a part can begin: Pillow takes the box of a part as float32, and there
    it is exact, a whole pixel of the source or a binary fraction of one."""
    step = denominator = length // math.gcd(length, source)
    while step % 2 == 0 and source * (2 * denominator // step) < 1 << 24:
        step //= 2
    return step


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
