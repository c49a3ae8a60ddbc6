"""Videos that are written: every picture, its colours and its time; playable also if the process ends in the middle."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import av
import numpy as np
import pytest

from edge_backbones.errors import InputError, MissingDependencyError
from edge_backbones.images import video_file
from edge_backbones.images.sources import frames
from edge_backbones.images.video_file import VideoFile, check_name
from tests.videos import BLUE, RED, number_of, picture


@pytest.mark.parametrize("encoder", [None, "mpeg4"])
@pytest.mark.parametrize("suffix", [".mp4", ".mov", ".mkv", ".webm"])
def test_a_video_has_every_picture_at_its_time(tmp_path, monkeypatch, suffix, encoder):
    if encoder and suffix != ".webm":
        monkeypatch.setitem(video_file._ENCODERS, suffix, ("no_such_encoder", encoder))
    path = tmp_path / "new" / f"a{suffix}"
    times = [0.0, 0.1, 0.25, 0.3, 1.0, 1.1, 1.2, 1.3, 1.4, 1.5]
    check_name(path)
    with VideoFile(path, 10) as video:
        for number, seconds in enumerate(times):
            video.add(picture(number, 97, 129), seconds)
    assert video.count == 10
    given = list(frames(path))
    assert [number_of(frame.pixels) for frame in given] == list(range(10))
    np.testing.assert_allclose([frame.seconds for frame in given], times, atol=0.002)
    assert given[0].pixels.shape == (96, 128, 3)
    assert np.abs(given[9].pixels[20, 20].astype(int) - RED).max() <= 14
    assert np.abs(given[9].pixels[20, 100].astype(int) - BLUE).max() <= 14
    with av.open(str(path)) as container:
        first = next(container.decode(video=0))
        assert first.time == pytest.approx(0, abs=0.002)
        assert (first.colorspace, first.color_range) == (1, 1) or encoder == "mpeg4"


def test_times_that_stand_still_or_go_back_are_moved_on(tmp_path):
    with VideoFile(tmp_path / "a.mp4", None) as video:
        for number, seconds in enumerate([0.0, 0.0, 0.5, 0.2]):
            video.add(picture(number), seconds)
    given = list(frames(tmp_path / "a.mp4"))
    assert [number_of(frame.pixels) for frame in given] == [0, 1, 2, 3]
    assert [frame.seconds for frame in given] == pytest.approx([0, 0.001, 0.5, 0.501], abs=1e-4)


def test_pictures_of_another_size_are_resized(tmp_path):
    with VideoFile(tmp_path / "a.mkv", 10) as video:
        video.add(picture(0), 0)
        video.add(picture(1, 480, 640), 0.1)
    assert [frame.pixels.shape for frame in frames(tmp_path / "a.mkv")] == [(48, 64, 3)] * 2


def test_an_mp4_that_was_never_closed_can_be_played(tmp_path):
    video = VideoFile(tmp_path / "a.mp4", 10)
    for number in range(40):
        video.add(picture(number), number / 10)
    for number in range(40, 120):
        video.add(picture(number % 40), number / 10)
    shutil.copy(tmp_path / "a.mp4", tmp_path / "killed.mp4")
    video.close()
    numbers = [number_of(frame.pixels) for frame in frames(tmp_path / "killed.mp4")]
    assert numbers[:40] == list(range(40))
    assert len(list(frames(tmp_path / "a.mp4"))) == 120


def test_nothing_is_written_without_pictures(tmp_path):
    with VideoFile(tmp_path / "a.mp4", 10):
        pass
    assert list(tmp_path.iterdir()) == []


def test_names_that_are_no_video_are_refused(monkeypatch):
    with pytest.raises(InputError, match=r"a.gif: .gif is no kind of video that is written here: use one of .mp4 .mov"):
        check_name(Path("a.gif"))
    with pytest.raises(InputError, match=r"a: a name without a suffix is no kind of video"):
        check_name(Path("a"))
    monkeypatch.setitem(video_file._ENCODERS, ".mp4", ("nothing", "at_all"))
    with pytest.raises(InputError, match=r"a.MP4: this PyAV has no encoder for it \(of nothing, at_all\)"):
        check_name(Path("a.MP4"))
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(MissingDependencyError, match=r"writing video .* needs the 'video' extra: pip install"):
        check_name(Path("a.mp4"))


def test_a_file_that_cannot_be_written_is_told(tmp_path):
    (tmp_path / "a.mp4").mkdir()
    with pytest.raises(InputError, match=r"a.mp4 cannot be written: "):
        VideoFile(tmp_path / "a.mp4", 10).add(picture(0), 0)
