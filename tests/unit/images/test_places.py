"""What the text that a user types names: a file of some kind, a camera, an address, a pipeline."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from edge_backbones.errors import InputError
from edge_backbones.images import places
from edge_backbones.images.places import place_of


@pytest.mark.parametrize(
    ("text", "kind", "is_live"),
    [
        ("0", "camera", True),
        (2, "camera", True),
        ("/dev/video77", "camera", True),
        ("rtsp://camera.local/stream", "url", True),
        ("RTSP://camera.local/stream", "url", True),
        ("udp://127.0.0.1:5000", "url", True),
        ("https://example.com/clip.mp4", "url", False),
        ("file:///clip.mp4", "url", False),
        ("v4l2src device=/dev/video0 ! videoconvert ! appsink", "pipeline", True),
        (
            "rtspsrc location=rtsp://a/b ! decodebin ! videoconvert ! appsink drop=true" + " ! queue" * 60,
            "pipeline",
            True,
        ),
    ],
)
def test_what_does_not_exist_as_a_file_is_told_by_its_text(text, kind, is_live):
    place = place_of(text)
    assert (place.kind, place.is_live) == (kind, is_live)


def test_what_exists_as_a_file_is_that_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("0").mkdir()
    Image.new("RGB", (4, 4)).save("photo.png")
    Path("photo").write_bytes(Path("photo.png").read_bytes())
    Path("a ! b.jpg").write_bytes(b"")
    Path("clip.MP4").write_bytes(b"\0\0\0\x18ftypmp42")
    Path("text").write_bytes(b"nothing")
    assert place_of("0").kind == "folder"  # a folder of that name was run before there were cameras
    assert place_of(0).kind == "camera"
    for image in ("photo.png", "photo", Path("photo"), "a ! b.jpg"):
        assert place_of(image).kind == "image"
    for video in ("clip.MP4", Path("clip.MP4"), "text"):
        assert place_of(video).kind == "video"
    assert place_of("/dev/null").kind == "camera"


def test_a_pipe_is_not_opened_to_see_what_it_is(tmp_path):
    import os

    os.mkfifo(tmp_path / "pipe")
    assert place_of(tmp_path / "pipe").kind == "video"


@pytest.mark.parametrize("text", ["nothing.mp4", "rtsp:/camera", "-1", "1.5", "²"])
def test_what_is_nothing_is_refused(text):
    with pytest.raises(InputError, match="does not exist"):
        place_of(text)


@pytest.mark.parametrize(
    ("address", "name"),
    [
        ("rtsp://admin:s3cret@10.0.0.2:554/stream", "rtsp://10.0.0.2:554/stream"),
        ("rtsp://admin:p@ss@10.0.0.2/stream", "rtsp://10.0.0.2/stream"),
        ("http://cam/mjpg?user=a&password=b&size=2", "http://cam/mjpg?user=a&password=...&size=2"),
        ("http://cam/a?access_token=x", "http://cam/a?access_token=..."),
        ("rtsp://cam/\x1b[31m", "rtsp://cam/\\x1b[31m"),
    ],
)
def test_the_name_of_an_address_has_no_password(address, name):
    place = place_of(address)
    assert place.address == address
    assert place.name == name


def test_a_camera_that_is_not_there_is_told_with_those_that_are(monkeypatch):
    monkeypatch.setattr(places.Path, "glob", lambda self, pattern: iter([Path("/dev/video8"), Path("/dev/video2")]))
    with pytest.raises(
        InputError, match=r"^camera 97 does not exist, there are /dev/video2, /dev/video8.*/dev/video97 is"
    ):
        places.device_of(place_of("97"))
    monkeypatch.setattr(places.Path, "glob", lambda self, pattern: iter([]))
    with pytest.raises(InputError, match="no camera is connected"):
        places.device_of(place_of("/dev/video97"))


def test_a_camera_that_may_not_be_opened_is_told_with_the_group(monkeypatch):
    monkeypatch.setattr(places.os, "access", lambda *_: False)
    with pytest.raises(InputError, match=r"/dev/null may not be opened by this user: sudo usermod -aG video \$USER"):
        places.device_of(place_of("/dev/null"))
