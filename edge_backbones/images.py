"""Photographs to network input, the same way at build time and on the device, with Pillow and numpy alone.

:func:`fit` repeats the evaluation transform of timm (``timm.data.create_transform(is_training=False)``) bit for bit, so
that a device without torch sees what the network was trained on; a test compares the two.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import msgspec
import numpy as np

from edge_backbones.errors import InputError, MissingDependencyError
from edge_backbones.spec import InputSpec

if TYPE_CHECKING:
    from PIL import Image

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm", ".pgm"})


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


def fit(image: Image.Image | np.ndarray, config: ImageConfig, height: int, width: int) -> np.ndarray:
    """Resize and crop to (height, width): uint8 array (height, width, channels). ``image``: a picture of Pillow, or a camera
    frame as uint8 (rows, columns, channels)."""
    from PIL import Image

    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3:
            raise InputError(f"a frame is uint8 (rows, columns, channels), got {image.dtype} {image.shape}")
        image = Image.fromarray(image[..., 0] if image.shape[2] == 1 else image)
    resample = Image.Resampling[config.interpolation.upper()]
    scaled_h, scaled_w = math.floor(height / config.crop_pct), math.floor(width / config.crop_pct)
    source_w, source_h = image.size
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
    first, last = 0, size[1]
    if size != (source_h, source_w):
        first, last = _columns(size, (source_h, source_w), width)
        box = (first * source_w / size[1], 0, last * source_w / size[1], source_h)
        image = image.resize((last - first, size[0]), resample, box)
    pixels = np.atleast_3d(np.asarray(image))
    if last - first < size[1]:
        left = round((size[1] - width) / 2.0) - first
        pixels = pixels[:, left : left + width]
    return _centre_crop(pixels, config, height, width)


def _columns(size: tuple[int, int], source: tuple[int, int], wanted: int) -> tuple[int, int]:
    """First and one past the last column of the resized image that are made: those that the crop keeps, and as many more as
    there are up to columns that begin with a whole pixel of the source, which Pillow's float32 box has exactly.

    All of them where the box would be tall: by its shape Pillow chooses the axis that it resizes first, and it rounds in
    between.
    """
    (_, width), (source_h, source_w) = size, source
    step = width // math.gcd(width, source_w)
    left = round((width - wanted) / 2.0)
    first, last = left // step * step, min(width, -(-(left + wanted) // step) * step)
    if width <= wanted or (last - first) * source_w < source_h * width:
        return 0, width
    return first, last


def _centre_crop(pixels: np.ndarray, config: ImageConfig, height: int, width: int) -> np.ndarray:
    """Crop around the centre; a side that is too short is padded first (with the mean colour in border mode)."""
    short_h, short_w = max(height - pixels.shape[0], 0), max(width - pixels.shape[1], 0)
    if short_h or short_w:
        fill = [round(255 * mean) if config.crop_mode == "border" else 0 for mean in config.mean]
        padded = np.empty((pixels.shape[0] + short_h, pixels.shape[1] + short_w, pixels.shape[2]), np.uint8)
        padded[...] = np.array(fill[: pixels.shape[2]], np.uint8)
        top, left = short_h // 2, short_w // 2
        padded[top : top + pixels.shape[0], left : left + pixels.shape[1]] = pixels
        pixels = padded
    top, left = round((pixels.shape[0] - height) / 2.0), round((pixels.shape[1] - width) / 2.0)
    return np.ascontiguousarray(pixels[top : top + height, left : left + width])


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
