"""Turn image messages of ROS 2 into frames, or refuse them with the fix. Nothing here imports ROS."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from edge_backbones.errors import InputError
from edge_backbones.images.decode import decode_bytes
from edge_backbones.reading import shortened
from edge_backbones.spec import Color, InputSpec

if TYPE_CHECKING:
    from PIL import Image

# Encodings of sensor_msgs/image_encodings.hpp: the bytes of a pixel, how many of them are kept, and what they mean.
_ENCODINGS: dict[str, tuple[int, int, Color]] = {
    "rgb8": (3, 3, "rgb"),
    "bgr8": (3, 3, "bgr"),
    "rgba8": (4, 3, "rgb"),
    "bgra8": (4, 3, "bgr"),
    "mono8": (1, 1, "gray"),
    "yuv422_yuy2": (2, 2, "yuyv"),
    "yuyv": (2, 2, "yuyv"),
    "nv12": (1, 1, "nv12"),
}
_TAKEN = ", ".join(_ENCODINGS)
_DEEP = re.compile(r"mono16|(rgb|bgr)a?16|(16|32|64)[USF]C\d*")
_LONGEST_NAME = 40
_DEPTH_FORMAT = "compressedDepth"


class Frame(NamedTuple):
    """One frame of a camera: its pixels, and how they are stored.

    ``pixels``: a uint8 array of the shape that `edge_backbones.spec.FrameSpec` lists for ``color``, which shares the memory
    of its message; or a picture of Pillow, whose colour is "rgb".
    """

    pixels: np.ndarray | Image.Image
    color: Color


def frame_of_image(message: Any) -> Frame:
    """Return the frame of a ``sensor_msgs/Image``, as a view of its data.

    Rows may be padded (``step``). ``is_bigendian`` is not read: a pixel's channels have 8 bits. Raises InputError for an
    encoding that is not taken, and for a size that does not agree with the data.
    """
    encoding = str(message.encoding)
    if encoding not in _ENCODINGS:
        raise InputError(_why_not(encoding))
    size, kept, color = _ENCODINGS[encoding]
    height, width, step = int(message.height), int(message.width), int(message.step)
    rows = _rows(encoding, height, width)
    if step < width * size:
        raise InputError(f"a row of {width} pixels in {encoding} has {width * size} bytes, and step is {step}")
    data = np.frombuffer(message.data, np.uint8)
    if len(data) != rows * step:
        raise InputError(
            f"{width}x{height} in {encoding} with a step of {step} are {rows * step} bytes, and the message has {len(data)}: "
            "look at the camera's driver"
        )
    pixels = data.reshape(rows, step)[:, : width * size].reshape(rows, width, size)
    return Frame(pixels if kept == size else pixels[..., :kept], color)


def _rows(encoding: str, height: int, width: int) -> int:
    """Return the number of rows in the data of an image, which for NV12 are those of luma and then those of colour."""
    if height < 1 or width < 1:
        raise InputError(f"an image has pixels, and this one is {width}x{height}")
    if encoding == "nv12":
        if height % 2 or width % 2:
            raise InputError(f"nv12 images have even sides, got {width}x{height}")
        return height * 3 // 2
    if encoding in ("yuyv", "yuv422_yuy2") and width % 2:
        raise InputError(f"{encoding} images have an even width, got {width}x{height}")
    return height


def _why_not(encoding: str) -> str:
    """Return one line that says why an encoding is not taken, and what to do."""
    name = shortened(encoding, _LONGEST_NAME)
    if encoding.startswith("bayer_"):
        fix = "debayer it first, with image_proc::DebayerNode of the package image_proc"
    elif _DEEP.fullmatch(encoding):
        fix = "it has more than 8 bits a channel, and only you know its range: scale it to mono8 first"
    elif not encoding:
        fix = "set the encoding in the camera's driver"
    else:
        fix = "convert it first, with cv_bridge or in the camera's driver"
    return f"encoding {name!r} is not taken, these are: {_TAKEN}: {fix}"


def frame_of_compressed(message: Any, channels: int) -> Frame:
    """Return the frame of a ``sensor_msgs/CompressedImage``: a picture of Pillow, in RGB, or grey for one channel.

    The data decides on the format, JPEG or PNG or another that Pillow reads. Raises InputError for data that does not
    decode, and for depth images; MissingDependencyError without Pillow.
    """
    if _DEPTH_FORMAT in str(message.format):
        raise InputError(
            f"format {shortened(str(message.format), _LONGEST_NAME)!r} is a depth image, and pictures are taken: subscribe "
            "to the camera's colour image"
        )
    picture = decode_bytes(memoryview(message.data), channels)
    return Frame(picture, "gray" if channels == 1 else "rgb")


def as_input_takes(frame: Frame, input: InputSpec) -> Frame:
    """Check that a frame is one that a bundle takes, and return it; a picture for a graph of frames as an array.

    A graph that takes the camera's frames takes them as they are, and nothing converts or resizes them before. Raises
    InputError with both sides.
    """
    wanted = input.frame
    if wanted is None:
        if input.channels == 1 and frame.color != "gray":
            raise InputError(
                f"the bundle takes grey images, and this one is {frame.color}: publish mono8, or build a bundle of 3 channels"
            )
        return frame
    pixels = frame.pixels if isinstance(frame.pixels, np.ndarray) else np.atleast_3d(np.asarray(frame.pixels))
    if frame.color != wanted.color or pixels.shape != wanted.shape:
        raise InputError(
            f"the bundle takes {wanted} as they are, and this one is {frame.color} of {_size(pixels, frame.color)}: set the "
            "camera to that, or build a bundle with --input image, which takes every size and colour"
        )
    return Frame(pixels, frame.color)


def _size(pixels: np.ndarray, color: Color) -> str:
    rows, columns = pixels.shape[:2]
    return f"{rows * 2 // 3 if color == 'nv12' else rows}x{columns}"
