"""Frames of videos and streams: the right pixels, upright, in order, with their times; and what happens to the others."""

from __future__ import annotations

import os
import sys
import threading
from types import SimpleNamespace

import av
import numpy as np
import pytest

from edge_backbones.errors import InputError, MissingDependencyError
from edge_backbones.images import pyav, sources
from edge_backbones.images.places import Place, Taken
from edge_backbones.images.sources import Frames, frames
from tests.videos import BLUE, RED, level, make_video, number_of, picture, served, turned, wait_for


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return make_video(tmp_path_factory.mktemp("clips") / "clip.mp4")


@pytest.fixture(scope="module")
def stream(tmp_path_factory) -> bytes:
    """A video as it is sent: 40 frames of an MPEG transport stream, which begins at another time than 0."""
    path = tmp_path_factory.mktemp("streams") / "clip.ts"
    return make_video(path, 40, format="mpegts", start=100, g="5", bf="0").read_bytes()


def close_to(pixels: np.ndarray, expected: tuple[int, int, int] | int, within: int = 8) -> bool:
    return bool((np.abs(pixels.astype(int) - expected) <= within).all())


def test_a_video_gives_every_frame_in_order_with_its_time(clip):
    with frames(clip) as source:
        assert (source.is_live, source.rate, source.count) == (False, 10, 10)
        given = list(source)
    assert [frame.number for frame in given] == list(range(10))
    assert [number_of(frame.pixels) for frame in given] == list(range(10))
    np.testing.assert_allclose([frame.seconds for frame in given], np.arange(10) / 10, atol=1e-6)
    first = given[0].pixels
    assert (first.dtype, first.shape) == (np.uint8, (48, 64, 3))
    assert first.flags.c_contiguous
    assert first.flags.writeable
    assert close_to(first[10, 10], RED)
    assert close_to(first[10, 50], BLUE)
    assert (source.skipped, source.dropped) == (0, 0)


@pytest.mark.parametrize(
    ("name", "codec", "pixels"),
    [
        ("a.mp4", "libx264", "yuv420p"),
        ("a.mp4", "libx264", "yuv444p"),
        ("a.mkv", "libx265", "yuv420p10le"),
        ("a.mkv", "libx264", "yuv422p10le"),
        ("a.avi", "mpeg4", "yuv420p"),
        ("a.webm", "libvpx-vp9", "yuv420p"),
        ("a.mkv", "ffv1", "yuv420p"),
        ("a.mkv", "ffv1", "gbrp10le"),
        ("a.mkv", "ffv1", "bgr0"),
        ("a.mkv", "mjpeg", "yuvj420p"),
        ("a.mov", "qtrle", "rgb24"),
        ("a.mov", "prores_ks", "yuv422p10le"),
        ("a b:c.mp4", "libx264", "yuv420p"),
        ("ä.ts", "libx264", "yuv420p"),
    ],
)
def test_codecs_and_pixel_formats_give_the_same_colours(tmp_path, name, codec, pixels):
    colours = {"color_range": 2, "colorspace": 5} if pixels == "yuvj420p" else {}
    if codec == "mpeg4":  # which does not say its matrix: it is read as BT.601, as FFmpeg and OpenCV do
        colours = {"colorspace": 6}
    quiet = {"x265-params": "log-level=none"} if codec == "libx265" else {}
    path = make_video(tmp_path / name, codec=codec, pixels=pixels, **colours, **quiet)
    given = list(frames(path))
    assert [number_of(frame.pixels) for frame in given] == list(range(10))
    assert close_to(given[3].pixels[10, 10], RED, 12)
    assert close_to(given[3].pixels[10, 50], BLUE, 12)


@pytest.mark.parametrize("color_range", [1, 2])
@pytest.mark.parametrize("colorspace", [1, 5, 6, 9])
def test_a_video_is_converted_with_its_own_matrix_and_range(tmp_path, colorspace, color_range):
    """Computed from the definition: a wrong matrix or range is off by more than ten levels."""
    red, blue = {1: (0.2126, 0.0722), 5: (0.299, 0.114), 6: (0.299, 0.114), 9: (0.2627, 0.0593)}[colorspace]
    r, g, b = (value / 255 for value in RED)
    luma = red * r + (1 - red - blue) * g + blue * b
    both = np.array([(b - luma) / (2 * (1 - blue)), (r - luma) / (2 * (1 - red))])
    scale, zero, chroma = (219, 16, 224) if color_range == 1 else (255, 0, 255)
    planes = [round(zero + scale * luma), *np.rint(128 + chroma * both).astype(int)]
    yuv = np.concatenate(
        [np.full(size, value, np.uint8) for size, value in zip((48 * 64, 768, 768), planes, strict=True)]
    )
    path = tmp_path / "a.mkv"
    with av.open(str(path), "w") as container:
        made = container.add_stream("ffv1", rate=10)
        made.height, made.width, made.pix_fmt = 48, 64, "yuv420p"
        made.codec_context.colorspace, made.codec_context.color_range = colorspace, color_range
        container.mux(made.encode(av.VideoFrame.from_ndarray(yuv.reshape(72, 64), format="yuv420p")))
        container.mux(made.encode())
    (frame,) = frames(path)
    assert close_to(frame.pixels, RED, 3), frame.pixels[0, 0]


@pytest.mark.parametrize(("format", "dtype", "unit"), [("gray", np.uint8, 1), ("gray10le", np.uint16, 1023 / 255)])
def test_grey_videos_give_grey(tmp_path, format, dtype, unit):
    path = tmp_path / "grey.mkv"
    with av.open(str(path), "w") as container:
        made = container.add_stream("ffv1", rate=10)
        made.height, made.width, made.pix_fmt = 48, 64, format
        made.codec_context.color_range = 2
        frame = av.VideoFrame(64, 48, format)
        values = np.full((48, frame.planes[0].line_size // np.dtype(dtype).itemsize), round(100 * unit), dtype)
        frame.planes[0].update(values.tobytes())
        container.mux(made.encode(frame))
        container.mux(made.encode())
    (given,) = frames(path)
    assert close_to(given.pixels, 100, 1)
    (given,) = frames(path, color="gray")
    assert given.pixels.shape == (48, 64)
    assert close_to(given.pixels, 100, 1)


def test_grey_frames_of_a_colour_video(clip):
    given = list(frames(clip, color="gray"))
    assert given[0].pixels.shape == (48, 64)
    assert given[0].pixels.flags.c_contiguous
    assert abs(int(given[5].pixels[40, 30]) - level(5)) <= 4
    luma = 0.299 * RED[0] + 0.587 * RED[1] + 0.114 * RED[2]
    assert close_to(given[0].pixels[10, 10], round(luma), 8)


@pytest.mark.parametrize(
    ("matrix", "expected"),
    [
        ((0, 1, -1, 0), lambda pixels: np.rot90(pixels, -1)),
        ((-1, 0, 0, -1), lambda pixels: np.rot90(pixels, 2)),
        ((0, -1, 1, 0), lambda pixels: np.rot90(pixels, 1)),
        ((-1, 0, 0, 1), lambda pixels: pixels[:, ::-1]),
        ((1, 0, 0, -1), lambda pixels: pixels[::-1]),
        ((0, 1, 1, 0), lambda pixels: pixels.transpose(1, 0, 2)),
    ],
)
def test_a_video_of_a_telephone_is_turned_upright(clip, tmp_path, matrix, expected):
    (plain, *_), (given, *_) = frames(clip), frames(turned(clip, matrix, tmp_path / "turned.mp4"))
    np.testing.assert_array_equal(given.pixels, expected(plain.pixels))
    assert given.pixels.flags.c_contiguous


def test_sizes_may_change_within_a_stream(tmp_path):
    parts = [make_video(tmp_path / f"{i}.ts", 5, size=size, start=i) for i, size in enumerate([(48, 64), (96, 80)])]
    both = tmp_path / "both.ts"
    both.write_bytes(b"".join(part.read_bytes() for part in parts))
    given = list(frames(both))
    assert {frame.pixels.shape for frame in given} == {(48, 64, 3), (96, 80, 3)}
    assert [number_of(frame.pixels) for frame in given] == [0, 1, 2, 3, 4] * 2


@pytest.mark.parametrize(
    ("every", "limit", "expected"), [(3, None, [0, 3, 6, 9]), (1, 2, [0, 1]), (4, 2, [0, 4]), (100, None, [0])]
)
def test_every_and_limit(clip, every, limit, expected):
    with frames(clip, every=every, limit=limit) as source:
        given = list(source)
        assert list(source) == []
    assert [frame.number for frame in given] == expected
    assert [number_of(frame.pixels) for frame in given] == expected
    np.testing.assert_allclose([frame.seconds for frame in given], np.array(expected) / 10, atol=1e-6)


@pytest.mark.parametrize("options", [{"every": 0}, {"limit": 0}, {"every": -2}, {"every": 2.5}, {"limit": "3"}])
def test_every_and_limit_are_at_least_1(clip, options):
    with pytest.raises(InputError, match="must be a whole number, 1 or more, got"):
        frames(clip, **options)


def test_the_colour_is_one_of_two(clip):
    with pytest.raises(InputError, match="color must be 'rgb' or 'gray', got 'bgr'"):
        frames(clip, color="bgr")


def test_images_are_for_preprocess(tmp_path):
    with pytest.raises(InputError, match=r"is a folder: backbone.preprocess takes the paths of images"):
        frames(tmp_path)


@pytest.mark.parametrize(
    ("name", "codec", "options"),
    [("a.ts", "libx264", {"bf": "0"}), ("a.mp4", "libx264", {"bf": "2"}), ("a.mkv", "mpeg4", {"b": "2M"})],
)
def test_damaged_frames_and_those_predicted_from_them_are_skipped_and_counted(tmp_path, name, codec, options):
    """3,000 bytes in the middle are noise. What is given equals a frame of the whole video."""
    path = tmp_path / name
    noise = np.random.default_rng(0)
    scene = noise.integers(60, 200, (60, 80, 3), np.uint8).repeat(8, 0).repeat(8, 1)
    with av.open(str(path), "w") as container:
        made = container.add_stream(codec, rate=10, options={"g": "10", **options})
        made.height, made.width, made.pix_fmt = 400, 560, "yuv420p"
        for number in range(40):
            view = np.ascontiguousarray(scene[number : number + 400, 2 * number : 2 * number + 560])
            container.mux(made.encode(av.VideoFrame.from_ndarray(view)))
        container.mux(made.encode())
    whole = [frame.pixels.astype(int) for frame in frames(path)]
    assert len(whole) == 40
    damaged = bytearray(path.read_bytes())
    middle = len(damaged) // 2
    damaged[middle : middle + 3000] = noise.integers(0, 256, 3000, np.uint8).tobytes()
    path.write_bytes(damaged)
    with frames(path) as source:
        given = list(source)
    assert 0 < source.skipped <= 20
    assert source.skipped + len(given) in range(38, 41)  # a packet may be lost without a trace
    for frame in given:
        assert min(np.abs(frame.pixels[::7, ::9] - other[::7, ::9]).max() for other in whole) <= 2
    assert given[-1].seconds == pytest.approx(3.9, abs=0.01)


def test_a_frame_that_the_decoder_refuses_is_skipped_and_counted(tmp_path):
    """The head of one JPEG among ten."""
    path = make_video(tmp_path / "a.avi", codec="mjpeg", pixels="yuvj420p", color_range=2, colorspace=5)
    data = bytearray(path.read_bytes())
    starts = [at for at in range(len(data)) if data[at : at + 3] == b"\xff\xd8\xff"]
    assert len(starts) == 10
    data[starts[4] + 2 : starts[4] + 600] = b"\xff" * 598
    path.write_bytes(data)
    with frames(path) as source:
        given = list(source)
    assert source.skipped == 1
    assert [number_of(frame.pixels) for frame in given] == [0, 1, 2, 3, 5, 6, 7, 8, 9]
    assert [frame.number for frame in given] == [0, 1, 2, 3, 5, 6, 7, 8, 9]


def test_a_cut_file_gives_what_it_holds(tmp_path):
    whole = make_video(tmp_path / "whole.mkv", 40, g="5", bf="0").read_bytes()
    path = tmp_path / "cut.mkv"
    path.write_bytes(whole[: len(whole) * 2 // 3])
    numbers = [number_of(frame.pixels) for frame in frames(path)]
    assert numbers == list(range(len(numbers)))
    assert 10 < len(numbers) < 40


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("empty.mp4", b"", "is no image, and no video that can be read"),
        ("notes.txt", b"only words, and no video at all\n" * 50, "is no image, and no video that can be read"),
        ("cut.mp4", None, "a recording that was cut off"),
    ],
)
def test_a_file_that_is_no_video_is_refused(clip, tmp_path, name, content, said):
    path = tmp_path / name
    path.write_bytes(clip.read_bytes()[:600] if content is None else content)
    with pytest.raises(InputError, match=said) as refused:
        frames(path)
    assert str(path) in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_file_of_sound_has_no_video(tmp_path):
    path = tmp_path / "sound.wav"
    with av.open(str(path), "w") as container:
        made = container.add_stream("pcm_s16le", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), layout="mono")
        frame.sample_rate = 8000
        container.mux(made.encode(frame))
    with pytest.raises(InputError, match=r"sound.wav has no video, only audio: pass another file"):
        frames(path)


def test_a_live_source_keeps_the_newest_frame(stream):
    with served(stream, hold=True) as address, frames(address) as source:
        assert source.is_live
        wait_for(lambda: source.dropped >= 30)
        before = threading.active_count()
        given = next(source)
        assert number_of(given.pixels) == given.number
        assert given.number >= 30
        assert len(source._ready) <= 1
        assert given.seconds == pytest.approx(given.number / 10, abs=0.011)
        assert threading.active_count() == before


def test_a_live_source_counts_the_frames_that_it_passes_over(stream):
    with served(stream, pieces=40, pause=0.02) as address, frames(address, every=4) as source:
        numbers = [frame.number for frame in source]
    assert numbers
    assert not [number for number in numbers if number % 4]
    assert len(numbers) + source.dropped <= 10


def test_a_file_is_read_ahead_only_so_far(clip):
    with frames(clip) as source:
        wait_for(lambda: len(source._ready) == 2)
        assert source._thread.is_alive()
        assert source.dropped == 0
        assert len(list(source)) == 10
    assert not source._thread.is_alive()


def test_leaving_early_ends_the_reader(clip):
    with frames(clip) as source:
        next(source)
    assert not source._thread.is_alive()
    assert list(source) == []


def test_stop_ends_the_iteration(clip):
    with frames(clip) as source:
        next(source)
        source.stop()
        assert list(source) == []


@pytest.mark.parametrize("address", ["rtsp://user:secret@127.0.0.1:9/x", "http://127.0.0.1:9/x", "tcp://127.0.0.1:9"])
def test_a_server_that_refuses_is_told_without_the_password(address):
    with pytest.raises(InputError, match=r"127\.0\.0\.1:9.* cannot be opened \(Connection refused\)") as refused:
        frames(address)
    assert "secret" not in str(refused.value)


@pytest.mark.parametrize("scheme", ["rtsp", "http", "tcp"])
def test_a_server_that_does_not_answer_is_given_up(monkeypatch, scheme):
    monkeypatch.setattr(pyav, "TIMEOUT", 0.3)
    with (
        served(b"", hold=True) as address,
        pytest.raises(InputError, match=r"did not answer within 0 s: look at the address"),
    ):
        frames(address.replace("tcp", scheme) + "/x")


def test_a_stream_that_falls_silent_is_given_up_behind_its_frames(monkeypatch, stream):
    monkeypatch.setattr(pyav, "TIMEOUT", 0.5)
    given = 0
    with (
        served(stream, hold=True) as address,
        frames(address) as source,
        pytest.raises(InputError, match="has sent nothing for 0 s"),
    ):
        for _ in source:
            given += 1
    assert given


def test_a_reader_that_hangs_is_given_up(monkeypatch):
    """A driver of a camera that waits in the kernel, where no timeout of a library reaches."""
    hanging = threading.Event()

    class Reader:
        is_live, rate, count = True, None, None

        def read(self, every):
            yield Taken(0, 0.0, lambda: picture(0))
            hanging.wait(60)

        def close(self):
            pass

    monkeypatch.setattr(sources, "_open", lambda *_: Reader())
    monkeypatch.setattr(sources, "TIMEOUT", -1.5)
    with (
        Frames(Place("camera", "0", "camera 0"), 1, None, "rgb") as source,
        pytest.raises(InputError, match="camera 0 has sent no frame"),
    ):
        for frame in source:
            assert number_of(frame.pixels) == 0
    hanging.set()


def test_pixels_that_do_not_convert_are_told(clip, monkeypatch):
    def fail(*_, **__):
        raise ValueError("no such conversion")

    monkeypatch.setattr(av.video.reformatter, "VideoReformatter", lambda: SimpleNamespace(reformat=fail))
    with pytest.raises(
        InputError, match=r"clip.mp4 has pixels of the format yuv420p, which do not convert to rgb24 \(no such"
    ):
        list(frames(clip))


def test_a_name_that_is_not_utf8_and_odd_metadata_are_read(clip, tmp_path):
    path = tmp_path / os.fsdecode(b"caf\xe9.mkv")
    with av.open(str(tmp_path / "a.mkv"), "w") as container:
        made = container.add_stream("libx264", rate=10)
        made.height, made.width, made.pix_fmt = 48, 64, "yuv420p"
        container.metadata["title"] = "Caf####"
        container.mux(made.encode(av.VideoFrame.from_ndarray(picture(0))))
        container.mux(made.encode())
    path.write_bytes((tmp_path / "a.mkv").read_bytes().replace(b"Caf####", b"Caf\xe9\xe9\xe9\xe9"))
    assert len(list(frames(path))) == 1
    with frames(path) as source:
        assert source.place.name.endswith("caf\\udce9.mkv")


def test_an_unknown_scheme_is_told():
    with pytest.raises(InputError, match=r"this PyAV knows no webrtc://, use rtsp, rtmp, http, udp or tcp"):
        frames("webrtc://127.0.0.1/x")


def test_without_any_library_the_install_command_is_named(clip, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(
        MissingDependencyError, match=r"PyAV is not installed\) needs the 'video' extra: pip install"
    ) as no:
        frames(clip)
    assert no.value.extra == "video"
    with pytest.raises(MissingDependencyError, match=r"a GStreamer pipeline: .*apt install python3-opencv"):
        frames("videotestsrc ! appsink")
