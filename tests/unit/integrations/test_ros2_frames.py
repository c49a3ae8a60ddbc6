"""Image messages become frames, and what cannot be used is refused with the fix. No ROS: messages are plain objects."""

from __future__ import annotations

import array
import io
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from edge_backbones import InputError
from edge_backbones.integrations.ros2.frames import Frame, as_input_takes, frame_of_compressed, frame_of_image
from edge_backbones.spec import FrameSpec, InputSpec, ShapeRange

ROWS, COLUMNS = 4, 6


def message(encoding, data, *, height=ROWS, width=COLUMNS, step=None):
    rows = np.ascontiguousarray(data)
    return SimpleNamespace(
        encoding=encoding,
        height=height,
        width=width,
        step=rows[0].nbytes if step is None else step,
        is_bigendian=1,
        data=array.array("B", rows.tobytes()),
    )


def pixels(rows=ROWS, channels=3):
    return np.random.default_rng(0).integers(0, 256, (rows, COLUMNS, channels), np.uint8)


@pytest.mark.parametrize(
    ("encoding", "channels", "kept", "color"),
    [
        ("rgb8", 3, 3, "rgb"),
        ("bgr8", 3, 3, "bgr"),
        ("rgba8", 4, 3, "rgb"),
        ("bgra8", 4, 3, "bgr"),
        ("mono8", 1, 1, "gray"),
        ("yuyv", 2, 2, "yuyv"),
        ("yuv422_yuy2", 2, 2, "yuyv"),
    ],
)
@pytest.mark.parametrize("padding", [0, 5])
def test_a_frame_is_a_view_of_the_messages_pixels(encoding, channels, kept, color, padding):
    wanted = pixels(channels=channels)
    rows = np.pad(wanted.reshape(ROWS, -1), ((0, 0), (0, padding)), constant_values=9)
    sent = message(encoding, rows)
    frame = frame_of_image(sent)
    np.testing.assert_array_equal(frame.pixels, wanted[..., :kept])
    assert frame.color == color
    assert np.shares_memory(frame.pixels, np.frombuffer(sent.data, np.uint8))


def test_nv12_has_half_as_many_rows_of_colours_behind_those_of_luma():
    wanted = pixels(rows=ROWS * 3 // 2, channels=1)
    rows = np.pad(wanted[..., 0], ((0, 0), (0, 2)))
    frame = frame_of_image(message("nv12", rows))
    np.testing.assert_array_equal(frame.pixels, wanted)
    assert frame.color == "nv12"


@pytest.mark.parametrize(
    ("encoding", "fix"),
    [
        ("bayer_rggb8", "debayer it first, with image_proc::DebayerNode"),
        ("bayer_gbrg16", "debayer it first"),
        ("mono16", "more than 8 bits a channel"),
        ("16UC1", "more than 8 bits a channel"),
        ("32FC1", "more than 8 bits a channel"),
        ("rgb16", "more than 8 bits a channel"),
        ("bgra16", "more than 8 bits a channel"),
        ("yuv422", "convert it first"),
        ("8UC3", "convert it first"),
        ("", "set the encoding in the camera's driver"),
        ("x" * 500, "convert it first"),
    ],
)
def test_other_encodings_are_refused_with_what_is_taken_and_the_fix(encoding, fix):
    with pytest.raises(InputError) as refused:
        frame_of_image(message(encoding, pixels()))
    said = str(refused.value)
    assert fix in said
    assert "rgb8, bgr8, rgba8, bgra8, mono8, yuv422_yuy2, yuyv, nv12" in said
    assert len(said) < 300
    assert "\n" not in said


@pytest.mark.parametrize(
    ("sent", "said"),
    [
        (message("rgb8", pixels(rows=3)), "6x4 in rgb8 with a step of 18 are 72 bytes, and the message has 54"),
        (message("rgb8", pixels(rows=5)), "are 72 bytes, and the message has 90"),
        (message("nv12", pixels(channels=1)), "6x4 in nv12 with a step of 6 are 36 bytes, and the message has 24"),
        (message("rgb8", pixels(), step=17), "a row of 6 pixels in rgb8 has 18 bytes, and step is 17"),
        (message("rgb8", pixels(), height=0), "this one is 6x0"),
        (message("nv12", pixels(rows=5, channels=1), height=5), "nv12 images have even sides, got 6x5"),
        (message("yuyv", pixels(channels=2), width=5), "yuyv images have an even width, got 5x4"),
    ],
)
def test_sizes_that_do_not_agree_are_refused(sent, said):
    with pytest.raises(InputError, match=said):
        frame_of_image(sent)


def compressed(data, format="jpeg"):
    return SimpleNamespace(data=array.array("B", data), format=format)


def file_of(picture, format, **options):
    file = io.BytesIO()
    picture.save(file, format, **options)
    return file.getvalue()


def test_a_compressed_image_is_decoded_by_what_its_bytes_are():
    picture = Image.fromarray(pixels())
    frame = frame_of_compressed(compressed(file_of(picture, "PNG"), format="jpeg"), 3)
    np.testing.assert_array_equal(np.asarray(frame.pixels), pixels())
    assert frame.color == "rgb"
    grey = frame_of_compressed(compressed(file_of(picture, "JPEG")), 1)
    assert (grey.pixels.mode, grey.color) == ("L", "gray")


def test_compressed_images_that_cannot_be_used_are_refused():
    with pytest.raises(InputError, match=r"^an image of 5 bytes does not decode as an image: it begins with b'12345'"):
        frame_of_compressed(compressed(b"12345"), 3)
    with pytest.raises(InputError, match="it is empty"):
        frame_of_compressed(compressed(b""), 3)
    with pytest.raises(InputError, match="'32FC1; compressedDepth' is a depth image"):
        frame_of_compressed(compressed(b"12345", format="32FC1; compressedDepth"), 3)
    deep = Image.fromarray(pixels(channels=1)[..., 0].astype(np.uint16) * 200)
    with pytest.raises(InputError, match="more than 8 bits"):
        frame_of_compressed(compressed(file_of(deep, "PNG")), 3)


def of_network(channels=3, frame=None):
    one = ShapeRange.fixed(32)
    name = "image" if frame is None else "frame"
    return InputSpec(name=name, channels=channels, batch=ShapeRange.fixed(1), height=one, width=one, frame=frame)


def test_every_frame_fits_a_bundle_that_resizes():
    for color in ("rgb", "bgr", "gray", "nv12", "yuyv"):
        frame = Frame(pixels(), color)
        assert as_input_takes(frame, of_network()) is frame


def test_a_grey_bundle_takes_grey_images_alone():
    grey = Frame(pixels(channels=1), "gray")
    assert as_input_takes(grey, of_network(channels=1)) is grey
    with pytest.raises(InputError, match="the bundle takes grey images, and this one is nv12: publish mono8"):
        as_input_takes(Frame(pixels(channels=1), "nv12"), of_network(channels=1))


def test_a_bundle_of_frames_takes_its_own_size_and_colour_alone():
    input = of_network(frame=FrameSpec(height=ROWS, width=COLUMNS, color="rgb"))
    taken = as_input_takes(Frame(Image.fromarray(pixels()), "rgb"), input)
    np.testing.assert_array_equal(taken.pixels, pixels())
    for frame in (Frame(pixels(), "bgr"), Frame(pixels(rows=3), "rgb")):
        with pytest.raises(InputError, match="the bundle takes rgb frames of 4x6 as they are, and this one is"):
            as_input_takes(frame, input)
