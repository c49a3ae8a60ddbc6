"""Check camera frames, and name the Python expression that turns what was passed into a frame."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

import numpy as np

from edge_backbones.errors import InputError
from edge_backbones.reading import in_short

if TYPE_CHECKING:
    from PIL import Image

# By number of channels, the mode of Pillow whose numbers are grey levels or colours: no palette, no single bits.
_MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}


def as_frame(given: object, channels: int) -> Image.Image | np.ndarray:
    """Check a photograph or camera frame; return a picture of Pillow or a uint8 array (rows, columns, channels).

    ``given``: a picture, an array, or anything that numpy turns into one without a change of values (a list, a torch tensor
    on the CPU). An array of two axes is a grey frame if ``channels`` is 1. Raises InputError with what was passed and, if
    there is one, the expression that fixes it.
    """
    pillow = sys.modules.get("PIL.Image")
    if pillow is not None and isinstance(given, pillow.Image):
        return _checked_picture(given, channels)
    wanted = f"a frame is uint8 (rows, columns, {channels})"
    if given is None:
        raise InputError(f"{wanted}, got None: the camera or the file that should give it gave nothing")
    if isinstance(given, (str, bytes, os.PathLike)):
        raise InputError(
            f"{wanted}, got a {type(given).__name__}: pass open_image(path) of edge_backbones.images.decode"
        )
    return as_pixels(as_array(given), channels, "frame" if isinstance(given, np.ndarray) else "np.asarray(frame)")


def as_pixels(frame: np.ndarray, channels: int, code: str) -> np.ndarray:
    """Check the array of a frame as `as_frame` does. ``code``: the Python expression for it in the message's fix."""
    wanted = f"a frame is uint8 (rows, columns, {channels})"
    if frame.dtype == np.uint8 and frame.ndim == 2 and channels == 1:
        frame = frame[..., None]
    if frame.dtype == np.uint8 and frame.ndim == 3 and frame.shape[2] == channels and frame.size:
        return frame
    raise InputError(f"{wanted}, got {frame.dtype} {frame.shape}: {_fix(frame, channels, code)}")


def as_array(given: object) -> np.ndarray:
    """Return ``np.asarray(given)``, of any shape and dtype. Raises InputError if numpy makes no array of it."""
    try:
        return np.asarray(given)
    except Exception as error:  # each library raises its own: for lists of unequal rows, for tensors on a GPU
        raise InputError(f"numpy makes no array of this {type(given).__name__}: {in_short(error)}") from error


def _checked_picture(picture: Image.Image, channels: int) -> Image.Image:
    wanted = _MODES.get(channels)
    if wanted is None:
        raise InputError(f"a picture of Pillow has up to 4 channels, this backbone takes {channels}: pass an array")
    if picture.mode != wanted:
        advice = f'pass picture.convert("{wanted}")'
        if picture.mode.startswith(("I", "F")):
            advice = "scale it to 8 bits yourself, only you know its range"
        raise InputError(f"a picture of {channels} channels has mode {wanted}, got mode {picture.mode}: {advice}")
    if 0 in picture.size:
        raise InputError(f"a picture has pixels, got {picture.size[0]} x {picture.size[1]}: look at what cropped it")
    return picture


def _fix(frame: np.ndarray, channels: int, code: str) -> str:
    """Return advice with the expression that turns this array, called ``code``, into a frame; in words if none exists."""
    shape, known = frame.shape, {1, 2, 3, 4, channels}
    if frame.dtype.kind not in "buif":
        return "its elements are no pixels: decode files with open_image(path) of edge_backbones.images.decode"
    if not frame.size:
        return "it has no pixels, look at what captured or cropped it"
    if len(shape) == 4:
        return f"pass one frame at a time, {code}[0] first"
    if len(shape) == 2:
        code, shape = f"{code}[..., None]", (*shape, 1)
    elif len(shape) == 3 and shape[0] in known and shape[2] not in known:
        code, shape = f"{code}.transpose(1, 2, 0)", (*shape[1:], shape[0])
    if len(shape) != 3:
        return "pass an array of three axes, channels last"
    code, remark = _as_bytes(frame, code)
    made = _with_channels(code, shape[2], channels)
    return f"{remark}pass {made}" if made else f"its last axis is not of {channels} channels, it has {shape[2]}"


def _as_bytes(frame: np.ndarray, code: str) -> tuple[str, str]:
    """Return the expression that turns the values into uint8, and a remark on the values."""
    if frame.dtype == np.uint8:
        return code, ""
    if frame.dtype == np.bool_:
        return f"({code} * np.uint8(255))", ""
    low, high = frame.min(), frame.max()
    if frame.dtype.kind in "iu" and low >= 0 and high <= 255:
        return f"{code}.astype(np.uint8)", ""
    if low >= 0 and high <= 1:
        return f"(255 * {code}).round().astype(np.uint8)", f"its values go from {low:.3g} to {high:.3g}, "
    if low >= 0 and high <= 255:
        return f"{code}.round().astype(np.uint8)", f"its values go from {low:.3g} to {high:.3g}, "
    scaled = f"np.interp({code}, (low, high), (0, 255)).astype(np.uint8)"
    return scaled, f"its values go from {low:.6g} to {high:.6g}, choose the low and high of all your frames and "


def _with_channels(code: str, found: int, wanted: int) -> str | None:
    """Return the expression that turns uint8 into ``wanted`` channels; None if several would do."""
    if found == wanted:
        return code
    if found == 1:
        return f"np.repeat({code}, {wanted}, axis=2)"
    if wanted == 1 and found in (3, 4):
        return f'np.asarray(PIL.Image.fromarray({code}).convert("L"))'
    if (found, wanted) in ((4, 3), (2, 1)):
        return f"{code}[..., :{wanted}]"  # without transparency
    return None
