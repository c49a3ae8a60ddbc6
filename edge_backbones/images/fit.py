"""Turn photographs and camera frames into network input, in the same way at build time and on the device.

:func:`fit` repeats the evaluation transform of timm (``timm.data.create_transform(is_training=False)``) bit for bit, so
a device without torch gives the network the pixels that it was trained on. A test compares the two.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from edge_backbones import cpus
from edge_backbones.errors import InputError, needing
from edge_backbones.images.camera import from_rgb, to_rgb
from edge_backbones.images.config import ImageConfig
from edge_backbones.images.frames import as_frame
from edge_backbones.images.resample import FILTERS, Method, resample
from edge_backbones.spec import InputSpec

if TYPE_CHECKING:
    from PIL import Image

_FIRST_PILLOW_BY_COLUMNS = 13


def fit(
    image: Image.Image | np.ndarray, config: ImageConfig, height: int, width: int, threads: int | None = None
) -> np.ndarray:
    """Resize and crop a picture; return a uint8 array (height, width, channels).

    ``image``: a picture of Pillow, or a camera frame as uint8 (rows, columns, channels); a grey frame may lack the last axis.
    ``threads`` share a large picture, by default one per CPU that this process may use; the pixels do not depend on their
    number. Raises InputError for anything else, and for another number of channels than ``config`` has, with the expression
    that fixes it.
    """
    pixels = fit_in_place(image, config, height, width, threads)
    return pixels if pixels.flags.owndata and pixels.flags.writeable else pixels.copy()


def fit_in_place(
    image: Image.Image | np.ndarray, config: ImageConfig, height: int, width: int, threads: int | None = None
) -> np.ndarray:
    """Do what `fit` does, but return a view of ``image``, maybe a read-only one, if it only has to be cropped."""
    if threads is not None and threads < 1:
        raise InputError(f"threads must be at least 1, got {threads}")
    image = as_frame(image, len(config.mean))
    if isinstance(image, np.ndarray):
        image = image[..., 0] if image.shape[2] == 1 else image
        source_h, source_w = image.shape[:2]
    else:
        source_w, source_h = image.size
    placed = placement((source_h, source_w), config, height, width)
    return _padded(_resized_centre(image, placed, config, threads), placed, config, height, width)


class Placement(NamedTuple):
    """How a picture gets the size of the input: it is scaled, a part of it is kept, and that part gets a place.

    ``size``: (rows, columns) that the picture is scaled to. ``rows`` and ``columns``: what is kept of them. ``top`` and
    ``left``: where that goes. What it does not cover is the border.
    """

    size: tuple[int, int]
    rows: range
    columns: range
    top: int
    left: int


def placement(source: tuple[int, int], config: ImageConfig, height: int, width: int) -> Placement:
    """Say where a picture of ``source`` (rows, columns) goes in an input of ``height`` x ``width``."""
    size = _resized_size(source, config, height, width)
    down = config.rounding != "timm"
    rows, columns = _middle(size[0], height, down=down), _middle(size[1], width, down=down)
    if config.crop_mode == "pad":
        return Placement(size, rows, columns, 0, 0)
    up = 1 if config.rounding == "transformers_pil" else 0
    return Placement(size, rows, columns, (height - len(rows) + up) // 2, (width - len(columns) + up) // 2)


def _resized_size(source: tuple[int, int], config: ImageConfig, height: int, width: int) -> tuple[int, int]:
    """Return the (rows, columns) that a picture of ``source`` (rows, columns) is scaled to before the crop or the border."""
    scaled = config.scaled_size(height, width)
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
    """Return the (rows, columns) that ``short_edge`` and ``long_edge`` ask for, with the arithmetic of transformers."""
    short, long = sorted(source)
    if short_edge is None:
        assert long_edge is not None  # one of the two is given
        sides = whole(long_edge * (short / long)), long_edge
    elif long_edge is not None and long / short * short_edge > long_edge:
        exact = long_edge * short / long
        sides = round(exact), int(exact * long / short)
    else:
        sides = short_edge, long if short == short_edge else whole(short_edge * long / short)
    sides = max(1, sides[0]), max(1, sides[1])
    return sides if source[0] <= source[1] else sides[::-1]


def _resized_centre(
    image: Image.Image | np.ndarray, placed: Placement, config: ImageConfig, threads: int | None
) -> np.ndarray:
    """Scale a picture and return the rows and columns of it that are kept."""
    size, rows, columns, _, _ = placed
    pixels = np.atleast_3d(np.asarray(image))
    source = pixels.shape[:2]
    if size != source:
        # Pillow multiplies pictures of other modes by their transparency.
        is_plain = isinstance(image, np.ndarray) or image.mode in ("L", "RGB")
        method = Method.of(config)
        is_pillow = method[1:] == ("antialias", "pillow")
        if config.interpolation in FILTERS and (not is_pillow or (is_plain and _widths_first(source, size))):
            return resample(pixels, size, (rows, columns), method, threads or cpus.usable())
        with needing(f"resizing a frame of {source[0]} x {source[1]} ({config.interpolation})", "images"):
            from PIL import Image

        picture = Image.fromarray(image) if isinstance(image, np.ndarray) else image
        pixels = np.atleast_3d(np.asarray(picture.resize(size[::-1], Image.Resampling[config.interpolation.upper()])))
    return pixels[rows.start : rows.stop, columns.start : columns.stop]


def _middle(length: int, wanted: int, *, down: bool) -> range:
    """Return where a centre crop lies on a side: all of the side if it is too short.

    An odd rest is halved as in transformers (``down``), or as in torchvision and timm.
    """
    start = (length - wanted) // 2 if down else round((length - wanted) / 2.0)
    return range(start, start + wanted) if length > wanted else range(length)


def widths_first(source: tuple[int, int], size: tuple[int, int], config: ImageConfig) -> bool:
    """Return whether pictures are resized along the rows first, from ``source`` to ``size``, both (rows, columns).

    Everything does, but Pillow from release 13 on: for some tall pictures it begins with the columns.
    """
    if (config.sampling, config.arithmetic) != ("antialias", "pillow") or _widths_first(source, size):
        return True
    return int(importlib.metadata.version("Pillow").partition(".")[0]) < _FIRST_PILLOW_BY_COLUMNS


def _widths_first(source: tuple[int, int], size: tuple[int, int]) -> bool:
    """Return whether every release of Pillow resizes along the rows first: for a tall picture some do not (Resample.c)."""
    return source[0] - size[0] <= max(0, 2 * (source[1] - size[1]))


def _padded(pixels: np.ndarray, placed: Placement, config: ImageConfig, height: int, width: int) -> np.ndarray:
    """Add a border of ``config.colours`` where a side is shorter than (height, width)."""
    if pixels.shape[:2] == (height, width):
        return pixels
    padded = np.empty((height, width, pixels.shape[2]), np.uint8)
    padded[...] = np.array(config.colours[: pixels.shape[2]], np.uint8)
    rows, columns = pixels.shape[:2]
    padded[placed.top : placed.top + rows, placed.left : placed.left + columns] = pixels
    return padded


def to_input(images: np.ndarray, config: ImageConfig, input: InputSpec) -> np.ndarray:
    """Turn uint8 (batch, height, width, channels) into the input of the graph: uint8 NHWC, or normalised NCHW.

    Normalised values are float32, or float16 for a graph that takes float16.
    """
    if input.name == "image":
        return np.ascontiguousarray(images)
    return _normalised(images, config).astype(input.dtype, copy=False)


def image_to_input(
    image: Image.Image | np.ndarray, config: ImageConfig, input: InputSpec, threads: int | None = None
) -> np.ndarray:
    """Turn one picture into the input of the graph for one image, without the batch axis. ``image``: as for `fit`.

    Where the graph takes whole frames, the picture is scaled until it covers a frame and the centre is cut out; one of the
    right size stays as it is. The result may be a view of ``image``.
    """
    if input.frame is None:
        pixels = fit_in_place(image, config, input.height.opt, input.width.opt, threads)
        array: np.ndarray = to_input(pixels[None], config, input)[0]
        return array
    covering = ImageConfig(mean=(0.0,) * input.channels, std=(1.0,) * input.channels, crop_pct=1.0)
    return from_rgb(fit_in_place(image, covering, input.frame.height, input.frame.width, threads), input.frame)


def network_input(array: np.ndarray, config: ImageConfig, input: InputSpec) -> np.ndarray:
    """Turn an input of the graph into the normalised float32 NCHW that the network itself takes."""
    if input.name == "pixel_values":
        return array.astype(np.float32, copy=False)
    return _normalised(seen_by_network(array, config, input), config)


def seen_by_network(array: np.ndarray, config: ImageConfig, input: InputSpec) -> np.ndarray:
    """Return the pictures, uint8 (batch, height, width, channels), that are normalised in a graph that takes frames."""
    if input.frame is None:
        return array
    height, width = input.height.opt, input.width.opt
    pictures = []
    for frame in array:
        picture = to_rgb(frame, input.frame)
        colours = np.broadcast_to(picture, (*picture.shape[:2], input.channels))  # the network may want grey thrice
        pictures.append(fit(colours, config, height, width))
    return np.stack(pictures)


def _normalised(images: np.ndarray, config: ImageConfig) -> np.ndarray:
    mean, std = np.array(config.mean, np.float32), np.array(config.std, np.float32)
    scaled = (images.astype(np.float32) / np.float32(255) - mean) / std
    if config.channel_order == "bgr":
        scaled = scaled[..., ::-1]
    return np.ascontiguousarray(scaled.transpose(0, 3, 1, 2))
