"""Frames of cameras: their shapes, and the conversion from and to RGB against formulas in float64 and against libswscale."""

from __future__ import annotations

import itertools

import av
import numpy as np
import pytest
from av.video.reformatter import ColorRange, Colorspace, Interpolation

from build_scripts.photographs import photographs
from edge_backbones.errors import InputError
from edge_backbones.images.camera import frame_spec, from_rgb, to_rgb
from edge_backbones.spec import FrameSpec, InputSpec, ShapeRange

RANDOM = np.random.default_rng(0)
HEIGHT, WIDTH = 46, 66
PICTURE = RANDOM.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
YUV = list(itertools.product(("nv12", "yuyv"), ("bt601", "bt709"), ("limited", "full")))
# ITU-R BT.601-7 and BT.709-6, table 3: luma and the two differences, from R, G and B in 0..1.
ANALOG = {
    "bt601": ((0.299, 0.587, 0.114), 1.772, 1.402),
    "bt709": ((0.2126, 0.7152, 0.0722), 1.8556, 1.5748),
}
# swscale without its shortcuts: chroma of the pixel itself, exact rounding.
EXACT = Interpolation.POINT | Interpolation.FULL_CHR_H_INT | Interpolation.ACCURATE_RND


def noise(spec: FrameSpec) -> np.ndarray:
    return RANDOM.integers(0, 256, spec.shape, dtype=np.uint8)


def in_float64(frame: np.ndarray, spec: FrameSpec) -> np.ndarray:
    """RGB of every pixel by the formulas of the standards, before rounding."""
    rows, columns = np.indices((spec.height, spec.width))
    if spec.color == "nv12":
        luma = frame[: spec.height, :, 0]
        u, v = (frame[spec.height + rows // 2, columns // 2 * 2 + which, 0] for which in (0, 1))
    else:
        luma = frame[..., 0]
        u, v = (frame[rows, columns // 2 * 2 + which, 1] for which in (0, 1))
    is_full = spec.range == "full"
    y = luma.astype(float) / 255 if is_full else (luma - 16.0) / 219
    cb, cr = ((chroma - 128.0) / (255 if is_full else 224) for chroma in (u, v))
    (red, green, blue), of_blue, of_red = ANALOG[spec.matrix]
    r, b = y + of_red * cr, y + of_blue * cb
    return np.clip(255 * np.stack([r, (y - red * r - blue * b) / green, b], axis=-1), 0, 255)


@pytest.mark.parametrize(("color", "matrix", "range"), YUV)
def test_rgb_of_yuv_is_what_the_standard_says(color, matrix, range):
    spec = frame_spec(HEIGHT, WIDTH, color, matrix, range)
    frame = noise(spec)
    assert np.abs(to_rgb(frame, spec) - in_float64(frame, spec)).max() < 0.56  # half a level and the factors' 2**-14


@pytest.mark.parametrize(("color", "matrix", "range"), YUV)
def test_rgb_of_yuv_is_what_swscale_gives(color, matrix, range):
    for name, photograph in photographs().items():
        picture = np.asarray(photograph)[: photograph.height // 2 * 2, : photograph.width // 2 * 2]
        spec = frame_spec(*picture.shape[:2], color, matrix, range)
        frame = from_rgb(picture, spec)
        packed = av.VideoFrame.from_ndarray(
            frame[..., 0] if color == "nv12" else frame, format="nv12" if color == "nv12" else "yuyv422"
        )
        theirs = packed.reformat(
            format="rgb24",
            src_colorspace={"bt601": Colorspace.ITU601, "bt709": Colorspace.ITU709}[matrix],
            src_color_range={"limited": ColorRange.MPEG, "full": ColorRange.JPEG}[range],
            dst_color_range=ColorRange.JPEG,
            interpolation=EXACT,
        ).to_ndarray()
        assert np.abs(to_rgb(frame, spec).astype(int) - theirs).max() <= 1, name


@pytest.mark.parametrize(("color", "matrix", "range"), YUV)
def test_a_smooth_picture_survives_the_way_there_and_back(color, matrix, range):
    rows, columns = np.indices((HEIGHT, WIDTH))
    picture = np.stack([40 + 2 * rows, 50 + 2 * columns, 200 - rows - columns], axis=-1).astype(np.uint8)
    spec = frame_spec(HEIGHT, WIDTH, color, matrix, range)
    assert np.abs(to_rgb(from_rgb(picture, spec), spec).astype(int) - picture).max() <= 5


def test_a_grey_level_has_its_luma_and_no_colour():
    for level, luma in ((0, 16), (255, 235), (128, 126)):
        spec = frame_spec(4, 6, "nv12")
        frame = from_rgb(np.full((4, 6, 3), level, np.uint8), spec)
        assert frame.shape == (6, 6, 1)
        assert (frame[:4] == luma).all()
        assert (frame[4:] == 128).all()
        assert (to_rgb(frame, spec) == level).all()


def test_bytes_of_nv12_and_yuyv_lie_as_drivers_deliver_them():
    red = np.zeros((2, 4, 3), np.uint8)
    red[..., 0] = 255
    red[:, 2:] = (0, 0, 255)
    nv12 = from_rgb(red, frame_spec(2, 4, "nv12", "bt601", "full"))[..., 0]
    assert nv12.tolist() == [[76, 76, 29, 29], [76, 76, 29, 29], [85, 255, 255, 107]]
    yuyv = from_rgb(red, frame_spec(2, 4, "yuyv", "bt601", "full"))
    assert yuyv.reshape(2, -1).tolist() == [[76, 85, 76, 255, 29, 255, 29, 107]] * 2


def test_bgr_is_rgb_reversed_and_gray_its_luma():
    bgr, gray = (frame_spec(HEIGHT, WIDTH, color) for color in ("bgr", "gray"))
    assert np.array_equal(from_rgb(PICTURE, bgr), PICTURE[..., ::-1])
    assert np.array_equal(to_rgb(PICTURE[..., ::-1], bgr), PICTURE)
    grey = from_rgb(PICTURE, gray)
    assert grey.shape == (HEIGHT, WIDTH, 1)
    assert np.array_equal(to_rgb(grey, gray), grey)
    assert np.array_equal(from_rgb(grey, gray), grey)  # of a network that takes grey


def test_what_is_not_said_is_what_video_players_assume():
    assert frame_spec(720, 1280, "nv12") == FrameSpec(height=720, width=1280, color="nv12", matrix="bt709")
    assert frame_spec(480, 640, "yuyv") == FrameSpec(height=480, width=640, color="yuyv")
    assert frame_spec(480, 640, "nv12", "bt709", "full").range == "full"
    assert str(frame_spec(1080, 1920, "nv12")) == "nv12 frames of 1080x1920 (BT.709, limited range)"
    assert str(frame_spec(480, 640, "bgr")) == "bgr frames of 480x640"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((1081, 1920, "nv12"), "nv12 frames have even sides, got 1081 x 1920"),
        ((1080, 1921, "nv12"), "nv12 frames have even sides, got 1080 x 1921"),
        ((480, 641, "yuyv"), "yuyv frames have even sides, got 480 x 641"),
        ((480, 640, "rgb", "bt709"), "yuv_matrix and yuv_range are of nv12 and yuyv, and color is rgb: leave them out"),
        ((480, 640, "gray", None, "full"), "yuv_matrix and yuv_range are of nv12 and yuyv, and color is gray"),
    ],
)
def test_sizes_and_standards_that_a_format_does_not_have(arguments, message):
    with pytest.raises(InputError, match=message):
        frame_spec(*arguments)


def taking(frame: FrameSpec, **fields: object) -> InputSpec:
    fixed = ShapeRange.fixed
    known = {"name": "frame", "channels": 3, "batch": ShapeRange(min=1, opt=2, max=4), "height": fixed(64)}
    return InputSpec(**{**known, "width": fixed(96), "frame": frame, **fields})


def test_an_engine_takes_frames_of_one_shape_and_maps_are_of_the_networks_size():
    input = taking(frame_spec(1080, 1920, "nv12"))
    assert (input.dtype, input.layout) == ("uint8", "NHWC")
    assert (input.min_shape, input.opt_shape, input.max_shape) == (
        (1, 1620, 1920, 1),
        (2, 1620, 1920, 1),
        (4, 1620, 1920, 1),
    )
    assert input.batch_height_width((3, 1620, 1920, 1)) == (3, 64, 96)
    assert input.of_network == taking(None, name="pixel_values")
    assert input.describe() == (
        "uint8 NHWC (batch, 1620, 1920, 1), nv12 frames of 1080x1920 (BT.709, limited range), with any batch >= 1"
    )
    for shape in ((1, 1080, 1920, 3), (0, 1620, 1920, 1), (1, 64, 96, 3), (1620, 1920, 1), (1, 1620, 1920)):
        with pytest.raises(InputError, match=r"frame of shape .* does not fit: this engine takes uint8 NHWC"):
            input.batch_height_width(shape)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"frame": None}, "an input called frame says what its frames are, and no other does: this is frame"),
        ({"name": "image"}, "an input called frame says what its frames are, and no other does: this is image"),
        ({"height": ShapeRange(min=32, opt=64, max=64)}, "frames are resized to one size"),
        ({"pixel_dtype": "float16"}, "frame is uint8, and pixel_dtype is float16"),
    ],
)
def test_a_manifest_with_an_impossible_input(fields, message):
    with pytest.raises(ValueError, match=message):
        taking(**{"frame": frame_spec(48, 64, "rgb"), **fields})
