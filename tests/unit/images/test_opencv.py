"""Frames by OpenCV, where PyAV is missing: real files with the real library, cameras and pipelines with a stand-in."""

from __future__ import annotations

import importlib.machinery
import itertools
import sys
import types

import cv2
import numpy as np
import pytest

from edge_backbones.errors import InputError
from edge_backbones.images import opencv, sources
from edge_backbones.images.sources import frames
from tests.videos import BLUE, RED, make_video, number_of, picture, turned, wait_for

PIPELINE = "videotestsrc ! videoconvert ! video/x-raw,format=BGR ! appsink"


@pytest.fixture
def without_pyav(monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return make_video(tmp_path_factory.mktemp("clips") / "clip.mp4", colorspace=6)


@pytest.mark.usefixtures("without_pyav")
@pytest.mark.parametrize(
    ("every", "limit", "expected"), [(1, None, list(range(10))), (3, None, [0, 3, 6, 9]), (4, 2, [0, 4])]
)
def test_a_video_is_read_by_opencv_where_pyav_is_missing(clip, every, limit, expected):
    with frames(clip, every=every, limit=limit) as source:
        assert (source.is_live, source.rate, source.count) == (False, 10, 10)
        given = list(source)
    assert [frame.number for frame in given] == expected
    assert [number_of(frame.pixels) for frame in given] == expected
    np.testing.assert_allclose([frame.seconds for frame in given], np.array(expected) / 10, atol=0.002)
    pixels = given[0].pixels
    assert (pixels.dtype, pixels.shape, pixels.flags.c_contiguous) == (np.uint8, (48, 64, 3), True)
    assert np.abs(pixels[10, 10].astype(int) - RED).max() <= 10
    assert np.abs(pixels[10, 50].astype(int) - BLUE).max() <= 10


@pytest.mark.usefixtures("without_pyav")
def test_grey_and_turned_videos(clip, tmp_path):
    (grey, *_) = frames(clip, color="gray")
    assert grey.pixels.shape == (48, 64)
    (plain, *_) = frames(clip)
    (upright, *_) = frames(turned(clip, (0, 1, -1, 0), tmp_path / "turned.mp4"))
    np.testing.assert_array_equal(upright.pixels, np.rot90(plain.pixels, -1))


@pytest.mark.usefixtures("without_pyav")
def test_what_opencv_cannot_read_is_refused_in_one_line(tmp_path, capfd):
    (tmp_path / "empty.mp4").touch()
    with pytest.raises(InputError, match=r"empty.mp4 is no image, and no video that can be read: it is empty"):
        frames(tmp_path / "empty.mp4")
    (tmp_path / "words.mp4").write_text("no video")
    with pytest.raises(InputError, match=r"words.mp4 is no image, and no video that OpenCV can read.*pip install av"):
        frames(tmp_path / "words.mp4")
    with pytest.raises(InputError, match=r"rtsp://127.0.0.1:9/x cannot be opened, or did not answer within 10 s") as no:
        frames("rtsp://user:secret@127.0.0.1:9/x")
    assert "secret" not in str(no.value)
    assert capfd.readouterr() == ("", "")


def test_a_pipeline_needs_an_opencv_with_gstreamer():
    """Pip's OpenCV has none: this is the real library."""
    assert not cv2.videoio_registry.hasBackend(cv2.CAP_GSTREAMER)
    with pytest.raises(
        InputError, match=r"this OpenCV .* cannot run GStreamer pipelines. .*apt install python3-opencv"
    ):
        frames(PIPELINE)


class Capture:
    """cv2.VideoCapture of a camera that gives one frame after the other."""

    opened: tuple = ()
    frames: object = ()
    works = True

    def __init__(self, *arguments):
        type(self).opened = arguments
        self._frames = iter(type(self).frames)
        self.released = False

    def isOpened(self):
        return self.works

    def get(self, _):
        return -1.0

    def grab(self):
        self._frame = next(self._frames, None)
        return self._frame is not None

    def retrieve(self):
        return True, self._frame

    def release(self):
        self.released = True


@pytest.fixture
def camera(monkeypatch):
    """An OpenCV that has GStreamer and a camera."""
    fake = types.ModuleType("cv2")
    fake.__dict__.update({name: getattr(cv2, name) for name in dir(cv2) if name.startswith(("CAP_", "COLOR_"))})
    fake.__spec__ = importlib.machinery.ModuleSpec("cv2", None)
    fake.__version__, fake.utils, fake.cvtColor = "4.8.0", cv2.utils, cv2.cvtColor
    fake.videoio_registry = types.SimpleNamespace(hasBackend=lambda _: True)
    fake.VideoCapture = type("Capture", (Capture,), {})
    monkeypatch.setitem(sys.modules, "cv2", fake)
    monkeypatch.setitem(sys.modules, "av", None)
    monkeypatch.setattr(opencv, "device_of", lambda place: f"/dev/video{place.address}")
    return fake.VideoCapture


def bgr(number: int) -> np.ndarray:
    return np.ascontiguousarray(picture(number)[..., ::-1])


def test_a_camera_gives_rgb_with_the_time_of_this_machine(camera):
    camera.frames = [bgr(0)]
    with frames(0) as source:
        assert source.is_live
        (given,) = source
    assert camera.opened == ("/dev/video0", cv2.CAP_V4L2)
    np.testing.assert_array_equal(given.pixels, picture(0))
    assert (given.number, given.seconds) == (0, 0.0)


def test_a_camera_keeps_the_newest_frame(camera):
    camera.frames = map(bgr, range(30))
    with frames(0) as source:
        wait_for(lambda: source._ended)
        (given,) = source
        assert number_of(given.pixels) == given.number == 29
        assert source.dropped == 29


def test_a_camera_of_another_system_is_opened_by_its_number(camera, monkeypatch):
    monkeypatch.setattr(sources.sys, "platform", "darwin")
    camera.frames = [bgr(0)]
    assert len(list(frames(3))) == 1
    assert camera.opened == (3, cv2.CAP_ANY)


def test_a_camera_that_never_ends_is_closed(camera):
    camera.frames = map(bgr, itertools.repeat(0))
    with frames(0, limit=2) as source:
        assert len(list(source)) == 2
    wait_for(lambda: not source._thread.is_alive())


@pytest.mark.parametrize(("shape", "color"), [((48, 64), "rgb"), ((48, 64, 1), "gray"), ((48, 64), "gray")])
def test_a_pipeline_may_give_grey(camera, shape, color):
    camera.frames = [np.full(shape, 90, np.uint8)]
    (given,) = frames(PIPELINE, color=color)
    assert camera.opened == (PIPELINE, cv2.CAP_GSTREAMER)
    assert given.pixels.shape == ((48, 64, 3) if color == "rgb" else (48, 64))
    assert (given.pixels == 90).all()


def test_a_pipeline_of_another_format_is_told_how_to_end(camera):
    camera.frames = [np.zeros((72, 64, 2), np.uint8)]
    with pytest.raises(InputError, match=r"gives frames of uint8 \(72, 64, 2\): end it with ! videoconvert"):
        list(frames(PIPELINE))


def test_a_pipeline_without_appsink_gives_nothing(camera):
    with pytest.raises(InputError, match="the pipeline has no appsink"):
        frames("videotestsrc ! fakesink")


@pytest.mark.parametrize(
    ("source", "said"),
    [
        (0, "camera 0 cannot be opened by OpenCV: another program uses it"),
        (PIPELINE, "GStreamer cannot run the pipeline: gst-launch-1.0 videotestsrc .* ! fakesink says why"),
    ],
)
def test_what_does_not_open_is_told(camera, source, said):
    camera.works = False
    with pytest.raises(InputError, match=said):
        frames(source)
