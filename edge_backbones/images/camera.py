"""Make the frames of a camera from RGB, and RGB from its frames: orders of colours, NV12 and YUYV.

U and V are those of the pixels that share them, without interpolation, and every pixel is rounded once. libswscale does the
same with ``SWS_POINT | SWS_FULL_CHR_H_INT | SWS_ACCURATE_RND``; a test compares the two. Its default is several grey levels
off for limited range.
"""

from __future__ import annotations

import numpy as np

from edge_backbones.errors import InputError
from edge_backbones.spec import YUV_COLORS, Color, FrameSpec, Matrix, Range

_LUMA = {
    "bt601": (0.299, 0.114),
    "bt709": (0.2126, 0.0722),
}  # the shares of red and blue in luma (ITU-R BT.601, BT.709)
_HD_ROWS = 720
_FINE = 1 << 13
_GREY = (0.299, 0.587, 0.114)


def frame_spec(
    height: int,
    width: int,
    color: Color,
    matrix: Matrix | None = None,
    range: Range | None = None,
) -> FrameSpec:
    """Describe frames. What is None of nv12 and yuyv becomes what video players assume.

    That is limited range, and BT.709 for 720 rows or more, else BT.601. Raises InputError for sizes that the format does not
    have, and for a matrix or range of another format.
    """
    if color not in YUV_COLORS and (matrix or range):
        raise InputError(
            f"yuv_matrix and yuv_range are of {' and '.join(YUV_COLORS)}, and color is {color}: leave them out"
        )
    if color in YUV_COLORS and matrix is None:
        matrix = "bt709" if height >= _HD_ROWS else "bt601"
    try:
        return FrameSpec(height=height, width=width, color=color, matrix=matrix or "bt601", range=range or "limited")
    except ValueError as error:
        raise InputError(str(error)) from None


def yuv_to_rgb(spec: FrameSpec) -> tuple[float, np.ndarray, np.ndarray]:
    """Return the factor of luma, the (3, 2) factors of U and V, and three values to add. Their sum is RGB in 0..255.

    Each value is ``luma * factor + factors @ (U, V) + added``, rounded and clipped. All are multiples of 2**-13, so that
    float32 adds them without an error.
    """
    red, blue = _LUMA[spec.matrix]
    green = 1 - red - blue
    luma, chroma, black = (255 / 219, 255 / 224, 16) if spec.range == "limited" else (1.0, 1.0, 0)
    to_red, to_blue = 2 * (1 - red) * chroma, 2 * (1 - blue) * chroma
    factors = np.array([[0, to_red], [-to_blue * blue / green, -to_red * red / green], [to_blue, 0]])
    luma, factors = float(np.rint(luma * _FINE) / _FINE), np.rint(factors * _FINE) / _FINE
    return luma, factors, -black * luma - 128 * factors.sum(axis=1)


def planes(frame: np.ndarray, spec: FrameSpec) -> tuple[np.ndarray, np.ndarray]:
    """Return views of a nv12 or yuyv frame: luma (height, width), and U and V (height or half of it, width / 2, 2)."""
    if spec.color == "nv12":
        luma, chroma = frame[: spec.height, :, 0], frame[spec.height :, :, 0]
    else:
        luma, chroma = frame[..., 0], frame[..., 1]
    return luma, chroma.reshape(-1, spec.width // 2, 2)


def to_rgb(frame: np.ndarray, spec: FrameSpec) -> np.ndarray:
    """Return the picture of a frame, uint8 (height, width, 3), or (height, width, 1) for gray. It may be a view.

    ``frame``: of the shape and dtype that ``spec`` says.
    """
    if spec.color not in YUV_COLORS:
        return frame[..., ::-1] if spec.color == "bgr" else frame
    luma, chroma = planes(frame, spec)
    factor, factors, added = yuv_to_rgb(spec)
    bright = luma.astype(np.float32) * np.float32(factor)
    picture = np.empty((spec.height, spec.width, 3), np.uint8)
    for channel in range(3):
        shares = chroma @ factors[channel].astype(np.float32) + np.float32(added[channel] + 0.5)
        pairs = np.repeat(shares, 2, axis=1)
        rows = bright.reshape(len(pairs), -1, spec.width) + pairs[:, None]
        picture[..., channel] = np.clip(rows, 0, 255, out=rows).reshape(spec.height, spec.width)
    return picture


def from_rgb(picture: np.ndarray, spec: FrameSpec) -> np.ndarray:
    """Return a picture, uint8 (height, width, 3), as a camera would deliver it. A grey one has one channel.

    Pixels that share U and V get the mean of theirs. The result may be a view of ``picture``.
    """
    if spec.color == "rgb" or picture.shape[2] == 1:
        return picture
    if spec.color == "bgr":
        return picture[..., ::-1]
    if spec.color == "gray":
        grey: np.ndarray = _bytes(picture @ np.array(_GREY, np.float32))[..., None]
        return grey
    red, blue = _LUMA[spec.matrix]
    luma = picture @ np.array([red, 1 - red - blue, blue], np.float32)
    levels, swing, black = (219, 224, 16) if spec.range == "limited" else (255, 255, 0)
    bytes_of_luma = _bytes(luma * np.float32(levels / 255) + black)
    tall = 2 if spec.color == "nv12" else 1
    shared = [  # of U and V
        (picture[..., channel] - luma).reshape(-1, tall, spec.width // 2, 2).mean(axis=(1, 3))
        * np.float32(swing / 255 / most)
        for channel, most in ((2, 2 * (1 - blue)), (0, 2 * (1 - red)))
    ]
    bytes_of_colour = _bytes(np.stack(shared, axis=-1) + 128).reshape(-1, spec.width)
    if spec.color == "nv12":
        return np.concatenate([bytes_of_luma, bytes_of_colour])[..., None]
    return np.stack([bytes_of_luma, bytes_of_colour], axis=-1)


def _bytes(values: np.ndarray) -> np.ndarray:
    levels: np.ndarray = np.clip(np.rint(values, out=values), 0, 255, out=values).astype(np.uint8)
    return levels
