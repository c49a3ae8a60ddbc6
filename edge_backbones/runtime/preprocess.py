"""Turn photographs and camera frames into the input of an opened bundle, for `EdgeBackbone.preprocess`."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast, get_args

import numpy as np

from edge_backbones.engines.gpu.arrays import is_on_gpu
from edge_backbones.errors import InputError, first_line, lack_told
from edge_backbones.images.camera import frame_spec, to_rgb
from edge_backbones.images.config import ImageConfig
from edge_backbones.images.decode import as_decoded, decode_bytes, open_image, shown
from edge_backbones.images.fit import image_to_input
from edge_backbones.images.frames import as_frame, as_pixels
from edge_backbones.runtime.inputs import batched, from_dlpack, host_array, refuse_masked
from edge_backbones.spec import YUV_COLORS, Color, FrameSpec, InputSpec

if TYPE_CHECKING:
    from PIL import Image

_COLORS = get_args(Color)
_CHANNELS_OF_RGB = 3


@lack_told("preprocessing")
def prepare(images: Any, config: ImageConfig, input: InputSpec, *, color: str, threads: int | None) -> np.ndarray:
    """Return one image, or a list of them, as the input of an engine: `EdgeBackbone.preprocess` without a processor."""

    def prepared(given: Any) -> np.ndarray:
        own = _own_frame(given, input, color)
        return image_to_input(_opened(given, input, color), config, input, threads) if own is None else own

    return _batch(_each(images, prepared, color))


@lack_told("preprocessing")
def prepare_encoded(
    images: Sequence[bytes], config: ImageConfig, input: InputSpec, *, threads: int | None
) -> np.ndarray:
    """Return the bytes of image files as the input of an engine, as `prepare` does with the files."""

    def prepared(data: bytes) -> np.ndarray:
        return image_to_input(decode_bytes(data, input.channels), config, input, threads)

    return _batch(_each(list(images), prepared, "rgb"))


def _batch(inputs: Sequence[np.ndarray]) -> np.ndarray:
    batch = inputs[0][np.newaxis] if len(inputs) == 1 else np.stack(inputs)
    return np.require(batch, requirements=("C", "W"))


@lack_told("preprocessing")
def process(images: Any, processor: Callable[..., Any], input: InputSpec, *, color: str) -> np.ndarray:
    """Return what an image processor makes of one image or a list of them, checked against what the engine takes."""
    name = type(processor).__name__
    if input.name != "pixel_values":
        raise InputError(
            f"{name} normalises, and this bundle takes raw frames and normalises them itself: leave out processor="
        )
    opened = _each(images, lambda given: _opened(given, input, color), color)
    # torch takes no array with negative strides, which reversed channels have, and warns of one that is read-only.
    opened = [
        np.require(image, requirements=("C", "W")) if isinstance(image, np.ndarray) else image for image in opened
    ]
    try:
        made = _made(processor, opened)
    except Exception as error:  # foreign code raises whatever it likes
        raise InputError(
            f"{name} gives no pixel_values for these images ({first_line(error, typed=True)}): pass an image processor "
            "of transformers, or leave out processor="
        ) from error
    if made.dtype == np.uint8:  # of a processor that does not rescale: a float holds every value
        made = made.astype(input.dtype)
    values = host_array(made, input)
    input.batch_height_width(values.shape)
    return values


def _made(processor: Callable[..., Any], images: Sequence[Any]) -> np.ndarray:
    """Return what a processor makes of images. Some fast ones of transformers 4 make tensors of torch alone."""
    try:
        made = processor(images=images, return_tensors="np")
    except ValueError:
        made = processor(images=images, return_tensors="pt")
    return np.asarray(made["pixel_values"])


def _each(images: Any, function: Callable[[Any], Any], color: str) -> list[Any]:
    """Return ``function`` of one image or of each image of a list. An error names the image of the list."""
    if color not in _COLORS:
        raise InputError(f"color must be {', '.join(map(repr, _COLORS[:-1]))} or {_COLORS[-1]!r}, got {color!r}")
    if not isinstance(images, (list, tuple)):
        return [function(images)]
    if not images:
        raise InputError(f"preprocess takes at least one image, got an empty {type(images).__name__}: pass one image")
    made = []
    for index, image in enumerate(images):
        try:
            made.append(function(image))
        except InputError as error:
            raise InputError(f"images[{index}]: {error}") from error
    return made


def _own_frame(given: Any, input: InputSpec, color: str) -> np.ndarray | None:
    """Return an array that is a frame as the graph takes it, with its three axes; None for anything else."""
    is_array = isinstance(given, np.ndarray) or hasattr(given, "__dlpack__")
    if input.frame is None or color != input.frame.color or not is_array:
        return None
    frame = _array(given, input.channels)
    if frame.dtype != np.uint8 or batched(frame.shape, input) != (1, *input.frame.shape):
        return None
    return frame.reshape(input.frame.shape)


def _opened(given: Any, input: InputSpec, color: str) -> Image.Image | np.ndarray:
    """Return an image as a picture of Pillow, or as a uint8 array (height, width, channels)."""
    channels = input.channels
    if isinstance(given, (str, os.PathLike)):
        path = Path(os.fsdecode(given))
        _refuse_color(color, f"{shown(path)} is a file")
        if path.is_dir():
            raise InputError(f"{shown(path)} is a folder, preprocess takes files: pass a list of the files in it")
        return open_image(path, channels)
    pillow = sys.modules.get("PIL.Image")
    if pillow is not None and isinstance(given, pillow.Image):
        _refuse_color(color, "this is a picture of Pillow")
        return as_decoded(given, channels) if channels in (1, 3) else given  # `fit` checks other pictures
    frame = _array(given, channels)
    code = "frame" if isinstance(given, np.ndarray) else "np.from_dlpack(frame)"
    if color in YUV_COLORS:
        return to_rgb(*_yuv_frame(frame, color, input))
    return _coloured(frame, channels, color, code)


def _yuv_frame(frame: np.ndarray, color: str, input: InputSpec) -> tuple[np.ndarray, FrameSpec]:
    """Return a nv12 or yuyv frame with its three axes, and what it is. The standard is the bundle's, where that has one."""
    shape = (*frame.shape, 1) if frame.ndim == 2 else frame.shape
    fits = frame.dtype == np.uint8 and len(shape) == 3
    if color == "nv12":
        wanted = "(height * 3 / 2, width), rows of luma and then rows of U and V"
        fits = fits and shape[2] == 1 and shape[0] % 3 == 0 and shape[1] % 2 == 0
    else:
        wanted, fits = "(height, width, 2), luma and then U or V", fits and shape[2] == 2 and shape[1] % 2 == 0
    if not fits or 0 in shape:
        advice = ", which is a batch: pass list(frames)" if frame.ndim == 4 else ""
        raise InputError(f"{color} frames are uint8 {wanted}, with even sides, got {frame.dtype} {frame.shape}{advice}")
    if input.channels == 1:
        luma = f"frame[:{shape[0] * 2 // 3}]" if color == "nv12" else "frame[..., 0]"
        raise InputError(
            f"{color} frames have colours, and this backbone takes 1 channel: pass their luma, {luma}, with color='gray'"
        )
    if input.channels != _CHANNELS_OF_RGB:
        raise InputError(
            f"{color} frames have 3 colours, and this backbone takes {input.channels} channels: pass frames (height, width, "
            f"{input.channels}) and leave out color="
        )
    height, known = (shape[0] * 2 // 3 if color == "nv12" else shape[0]), input.frame
    standard = (known.matrix, known.range) if known is not None and known.color == color else (None, None)
    return frame.reshape(shape), frame_spec(height, shape[1], cast("Color", color), *standard)


def _refuse_color(color: str, what: str) -> None:
    if color != "rgb":
        raise InputError(f"color={color!r} is for arrays, and {what}, which knows its colours: leave it out")


def _array(given: object, channels: int) -> np.ndarray:
    """Return a frame of any library as a numpy array over the same memory; raise InputError for anything else."""
    if given is None:
        as_frame(given, channels)  # has the words for it
    if not isinstance(given, np.ndarray):
        if not hasattr(given, "__dlpack__"):
            raise InputError(
                "preprocess takes a path, a picture of Pillow, a uint8 array (height, width, channels), or a list of "
                f"these, got a {type(given).__name__}: {_advice(given)}"
            )
        if is_on_gpu(given):
            raise InputError("preprocess takes frames on the CPU, and this one is on a GPU: copy it to the host first")
        return from_dlpack(given, "a frame", "uint8")
    refuse_masked(given, "a frame")
    return given


def _advice(given: object) -> str:
    if isinstance(given, (bytes, bytearray, memoryview)):
        return "pass PIL.Image.open(io.BytesIO(data)) for the bytes of a file"
    if isinstance(given, Sequence):
        return "pass numpy.asarray(frame, numpy.uint8) for numbers"
    if hasattr(given, "__iter__"):
        return "pass list(images)"
    return "pass one of these"


def _coloured(frame: np.ndarray, channels: int, color: str, code: str) -> np.ndarray:
    """Return a frame with the channels that the network's own preprocessing begins with: RGB, or grey.

    The result is a view of ``frame``, whose channels are in the order of ``color``. ``code``: as for `as_pixels`.
    """
    if frame.ndim == 4:
        advice = (
            "pass list(frames)"
            if frame.dtype == np.uint8
            else "pass normalised pixel_values to the backbone as they are"
        )
        raise InputError(
            f"a frame is uint8 (height, width, {channels}), got {frame.dtype} {frame.shape}, which is a batch: {advice}"
        )
    if color != "rgb" and channels != 3 and (color, channels) != ("gray", 1):
        raise InputError(
            f"color={color!r} does not fit: this backbone takes {channels} channel{'s' * (channels > 1)}: pass frames "
            f"(height, width, {channels}){' with color=' + repr('gray') if channels == 1 else ' and leave out color='}"
        )
    is_grey = frame.dtype == np.uint8 and (frame.ndim == 2 or (frame.ndim == 3 and frame.shape[2] == 1))
    if is_grey and color == "rgb" and channels == 3:
        raise InputError(f"a frame is uint8 (height, width, 3), got uint8 {frame.shape}: pass color='gray'")
    if color == "gray":
        grey = as_pixels(frame, 1, code)
        return grey if channels == 1 else np.broadcast_to(grey, (*grey.shape[:2], 3))
    checked = as_pixels(frame, channels, code)
    return checked[..., ::-1] if color == "bgr" else checked
