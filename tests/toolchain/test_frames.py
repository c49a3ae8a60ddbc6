"""What people pass for a frame is taken where it is clear what they mean, else refused with an expression that works."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from PIL import Image

from edge_backbones.errors import InputError
from edge_backbones.images.config import ImageConfig
from edge_backbones.images.fit import fit
from edge_backbones.images.frames import as_frame


def config(channels: int) -> ImageConfig:
    return ImageConfig(mean=(0.5,) * channels, std=(0.5,) * channels)


PIXELS = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
GREY = PIXELS[..., 0]
CHW = PIXELS.transpose(2, 0, 1)
RGBA = np.concatenate([PIXELS, PIXELS[..., :1]], 2)
UNIT = PIXELS.astype(np.float32) / 255
LUMA = np.asarray(Image.fromarray(PIXELS).convert("L"))
MASK = GREY > 128

FIXABLE = {
    "CHW": (CHW, PIXELS),
    "CHW for grey": (GREY[None], GREY[..., None]),
    "RGBA": (RGBA, PIXELS),
    "CHW and RGBA": (RGBA.transpose(2, 0, 1), PIXELS),
    "grey and transparency": (RGBA[..., 2:], PIXELS[..., 2:3]),
    "grey for colour": (GREY, np.repeat(GREY[..., None], 3, 2)),
    "grey with its axis for colour": (GREY[..., None], np.repeat(GREY[..., None], 3, 2)),
    "colour for grey": (PIXELS, LUMA[..., None]),
    "CHW colour for grey": (CHW, LUMA[..., None]),
    "floats to 1": (UNIT, PIXELS),
    "float16 to 1": (np.round(UNIT).astype(np.float16), np.round(UNIT).astype(np.uint8) * 255),
    "floats to 255": (PIXELS.astype(np.float64), PIXELS),
    "CHW floats to 1, RGBA": (RGBA.transpose(2, 0, 1).astype(np.float32) / 255, PIXELS),
    "int64": (PIXELS.astype(np.int64), PIXELS),
    "uint16 within 8 bits": (PIXELS.astype(np.uint16), PIXELS),
    "bool": (MASK, MASK[..., None].astype(np.uint8) * 255),
    "bool for colour": (MASK, np.repeat(MASK[..., None], 3, 2).astype(np.uint8) * 255),
    "list of numbers": (PIXELS.tolist(), PIXELS),
    "tensor CHW": (torch.from_numpy(CHW.copy()), PIXELS),
    "tensor CHW to 1": (torch.from_numpy((CHW / 255).astype(np.float32)), PIXELS),
}


@pytest.mark.parametrize("name", FIXABLE)
def test_the_fix_works_when_it_is_typed(name):
    frame, wanted = FIXABLE[name]
    channels = wanted.shape[2]
    with pytest.raises(InputError, match=rf"^a frame is uint8 \(rows, columns, {channels}\), got ") as refused:
        fit(frame, config(channels), 32, 32)
    assert "\n" not in str(refused.value)
    (code,) = re.findall(r"pass (.*)$", str(refused.value))
    fixed = eval(code, {"np": np, "PIL": PIL, "frame": frame})
    np.testing.assert_array_equal(as_frame(fixed, channels), wanted)
    np.testing.assert_array_equal(fit(fixed, config(channels), 32, 32), fit(wanted, config(channels), 32, 32))


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.float32])
def test_values_of_an_unknown_range_are_scaled_by_who_knows_it(dtype):
    frame = np.random.default_rng(0).integers(400, 30_000, (40, 50)).astype(dtype)
    with pytest.raises(InputError, match=r"go from 4\d\d to 29[\d.]+(e\+\d+)?, choose the low and high") as refused:
        fit(frame, config(1), 32, 32)
    (code,) = re.findall(r"pass (.*)$", str(refused.value))
    fixed = eval(code, {"np": np, "frame": frame, "low": 1000, "high": 25_000})
    wanted = np.clip((frame.astype(float) - 1000) / 24_000 * 255, 0, 255)
    assert np.abs(as_frame(fixed, 1)[..., 0] - wanted).max() <= 1


@pytest.mark.parametrize(
    ("frame", "reason"),
    [
        (np.zeros((0, 50, 3), np.uint8), r"got uint8 \(0, 50, 3\): it has no pixels"),
        (np.zeros((40, 0, 3), np.uint8), r"got uint8 \(40, 0, 3\): it has no pixels"),
        (np.zeros((0, 0), np.uint8), r"got uint8 \(0, 0\): it has no pixels"),
        (PIXELS[None], r"got uint8 \(1, 40, 50, 3\): pass one frame at a time, frame\[0\] first"),
        (PIXELS[None, None], "three axes, channels last"),
        (np.zeros(5, np.uint8), "three axes, channels last"),
        (np.zeros((40, 50, 7), np.uint8), "its last axis is not of 3 channels, it has 7"),
        (RGBA[..., :2], "its last axis is not of 3 channels, it has 2"),
        (PIXELS.astype(np.complex64), "its elements are no pixels"),
        (np.array(["a"]), "its elements are no pixels"),
        ([object()], "its elements are no pixels"),
        (None, "got None: the camera or the file that should give it gave nothing"),
        ("photo.jpg", r"got a str: pass open_image\(path\)"),
        (Path("photo.jpg"), r"got a PosixPath: pass open_image\(path\)"),
        (b"\xff\xd8", r"got a bytes: pass open_image\(path\)"),
        ([[1, 2], [3]], "numpy makes no array of this list: .*inhomogeneous"),
        (torch.zeros(40, 50, 3, requires_grad=True), r"no array of this Tensor: .*tensor\.detach\(\)\.numpy\(\)"),
        (np.full((40, 50, 3), np.nan, np.float32), "its values go from nan to nan"),
    ],
)
def test_what_is_no_frame_is_refused_with_the_reason(frame, reason):
    with pytest.raises(InputError, match=reason):
        fit(frame, config(3), 32, 32)


def test_what_is_clear_is_taken():
    np.testing.assert_array_equal(fit(GREY, config(1), 32, 32), fit(GREY[..., None], config(1), 32, 32))
    np.testing.assert_array_equal(fit(torch.from_numpy(PIXELS), config(3), 32, 32), fit(PIXELS, config(3), 32, 32))
    assert as_frame(PIXELS, 3) is PIXELS
    assert as_frame(PIXELS[:, ::-1], 3).base is PIXELS
    assert fit(np.zeros((3, 50, 3), np.uint8), config(3), 8, 8).shape == (8, 8, 3)  # three rows


@pytest.mark.parametrize("mode", ["1", "P", "L", "LA", "RGBA", "CMYK", "YCbCr", "HSV"])
def test_a_picture_of_another_mode_is_refused_and_the_fix_works(mode):
    picture = Image.fromarray(PIXELS).convert(mode)
    for channels in (1, 3):
        if (mode, channels) == ("L", 1):
            continue
        with pytest.raises(InputError, match=f"got mode {mode}: pass ") as refused:
            fit(picture, config(channels), 32, 32)
        (code,) = re.findall(r"pass (.*)$", str(refused.value))
        assert fit(eval(code, {"picture": picture}), config(channels), 32, 32).shape == (32, 32, channels)


def test_a_picture_that_is_none_is_refused():
    with pytest.raises(InputError, match=r"got mode I;16: scale it to 8 bits yourself"):
        fit(Image.new("I;16", (20, 10)), config(1), 32, 32)
    with pytest.raises(InputError, match="a picture has pixels, got 0 x 10"):
        fit(Image.new("RGB", (0, 10)), config(3), 32, 32)
    with pytest.raises(InputError, match="up to 4 channels, this backbone takes 5: pass an array"):
        fit(Image.new("RGB", (20, 10)), config(5), 32, 32)
