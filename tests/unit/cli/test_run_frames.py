"""``run`` on videos and streams: what is written, how it ends, and every refusal in one line."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest
import zarr
from PIL import Image

from edge_backbones.bundle.manifest import USE_PROCESSOR
from edge_backbones.bundle.writer import write_manifest
from edge_backbones.cli import main as cli
from edge_backbones.cli import map_files, streams
from edge_backbones.cli import run as running
from edge_backbones.errors import InferenceError
from edge_backbones.images import pyav
from edge_backbones.images.sources import frames
from edge_backbones.runtime.backbone import EdgeBackbone
from edge_backbones.testing import make_bundle, pooled, pooling_input
from tests.videos import make_video, number_of, picture, served, wait_for


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("bundles") / "pool.bundle", pooling_input(1)).path


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    return make_video(tmp_path_factory.mktemp("clips") / "clip.mp4")


@pytest.fixture(scope="module")
def stream(tmp_path_factory) -> bytes:
    path = tmp_path_factory.mktemp("streams") / "clip.ts"
    return make_video(path, 40, format="mpegts", start=100, g="5", bf="0").read_bytes()


@pytest.fixture
def quick_pictures(monkeypatch) -> list[str]:
    """Draw the photograph alone, which takes no time; return the titles."""
    titles: list[str] = []

    def draw(photograph, maps, *, title, views):
        titles.append(title)
        return photograph

    monkeypatch.setattr(running, "draw_frame", draw)
    return titles


def run(capsys, *arguments: object) -> tuple[int, str, str]:
    code = cli._run(["run", *map(str, arguments)])
    said = capsys.readouterr()
    return code, said.out, said.err


def refused(capsys, *arguments: object, code: int = 1) -> str:
    found, out, err = run(capsys, *arguments)
    assert (found, out) == (code, ""), err
    *steps, line = err.strip().splitlines()
    assert steps in ([], ["running"], ["connecting"])
    assert line.startswith("edge-backbones: ")
    return line


def listed(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "frames.jsonl").read_text().splitlines()]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_video_gives_a_file_for_each_frame_and_an_index(bundle, clip, tmp_path, capsys):
    code, out, err = run(capsys, bundle, clip, "-o", tmp_path / "out")
    assert code == 0, err
    assert err == "running\n"
    first, second, third = out.splitlines()
    assert first.startswith(f"{clip}: 10 frames in ")
    assert first.endswith(" per second)")
    assert second == (
        f"{tmp_path}/out/frame_00000000.npz to {tmp_path}/out/frame_00000009.npz: pool4 3x8x12, pool8 3x4x6"
    )
    assert third == f"{tmp_path}/out/frames.jsonl: the number and the time of each frame"
    expected = [f"frame_{number:08}.npz" for number in range(10)]
    assert names(tmp_path / "out") == [*expected, "frames.jsonl"]
    assert listed(tmp_path / "out") == [
        {"frame": number, "seconds": number / 10, "features": name} for number, name in enumerate(expected)
    ]
    with EdgeBackbone.from_pretrained(bundle) as backbone:
        for frame, name in zip(frames(clip), expected, strict=True):
            maps = pooled(backbone.preprocess(frame.pixels))
            with np.load(tmp_path / "out" / name) as features:
                assert features.files == ["pool4", "pool8"]
                for stage, wanted in zip(features.files, maps, strict=True):
                    np.testing.assert_allclose(features[stage], wanted[0], atol=1e-5)


def test_zarr_has_the_same_maps_in_a_folder_for_each_frame(bundle, clip, tmp_path, capsys):
    assert run(capsys, bundle, clip, "-o", tmp_path / "npz", "--max", 2)[0] == 0
    code, _out, err = run(capsys, bundle, clip, "-o", tmp_path / "zarr", "--max", 2, "--format", "zarr")
    assert code == 0, err
    assert names(tmp_path / "zarr") == ["frame_00000000.zarr", "frame_00000001.zarr", "frames.jsonl"]
    for number in (0, 1):
        group = zarr.open_group(str(tmp_path / "zarr" / f"frame_{number:08}.zarr"), mode="r")
        with np.load(tmp_path / "npz" / f"frame_{number:08}.npz") as features:
            assert sorted(group.array_keys()) == sorted(features.files)
            for stage in features.files:
                np.testing.assert_array_equal(group[stage][:], features[stage])


def test_an_image_may_be_written_as_zarr(bundle, tmp_path, capsys):
    Image.fromarray(picture(3)).save(tmp_path / "photo.png")
    code, _out, err = run(capsys, bundle, tmp_path / "photo.png", "-o", tmp_path / "out", "--format", "zarr")
    assert code == 0, err
    assert names(tmp_path / "out") == ["photo.png", "photo.zarr"]
    assert zarr.open_group(str(tmp_path / "out" / "photo.zarr"), mode="r")["pool4"].shape == (3, 8, 12)
    assert run(capsys, bundle, tmp_path / "photo.png", "-o", tmp_path / "out", "--format", "zarr")[0] == 0  # again
    assert names(tmp_path / "out") == ["photo.png", "photo.zarr"]


def test_every_and_max_and_json(bundle, clip, tmp_path, capsys):
    code, out, err = run(capsys, bundle, clip, "-o", tmp_path / "out", "--every", 3, "--max", 3, "--json")
    assert (code, err) == (0, "")
    summary = json.loads(out)
    assert summary.pop("seconds") > 0
    assert summary.pop("frames_per_second") > 0
    assert summary == {
        "source": str(clip),
        "frames": 3,
        "skipped": 0,
        "dropped": 0,
        "shapes": {"pool4": [3, 8, 12], "pool8": [3, 4, 6]},
        "first": f"{tmp_path}/out/frame_00000000.npz",
        "last": f"{tmp_path}/out/frame_00000006.npz",
        "index": f"{tmp_path}/out/frames.jsonl",
        "video": None,
        "interrupted": False,
    }
    assert [(entry["frame"], entry["seconds"]) for entry in listed(tmp_path / "out")] == [(0, 0.0), (3, 0.3), (6, 0.6)]


def test_every_and_max_work_with_a_folder(bundle, tmp_path, capsys):
    folder = tmp_path / "in"
    folder.mkdir()
    for number in range(6):
        Image.fromarray(picture(number)).save(folder / f"{number}.png")
    (folder / "2.png").write_bytes(b"broken")
    arguments = (bundle, folder, "--no-picture", "-o")
    assert run(capsys, *arguments, tmp_path / "a", "--every", 2)[0] == 0
    assert names(tmp_path / "a") == ["0.npz", "4.npz"]
    assert run(capsys, *arguments, tmp_path / "b", "--max", 3)[0] == 0
    assert names(tmp_path / "b") == ["0.npz", "1.npz", "3.npz"]


def test_the_pictures_become_a_video(bundle, clip, tmp_path, capsys, quick_pictures):
    video = tmp_path / "maps.mp4"
    code, out, err = run(capsys, bundle, clip, "-o", tmp_path / "out", "--every", 2, "--video", video)
    assert code == 0, err
    assert out.splitlines()[-1] == f"{video}: their pictures"
    assert quick_pictures == [f"pool.bundle: clip.mp4, {seconds:.2f} s" for seconds in (0, 0.2, 0.4, 0.6, 0.8)]
    given = list(frames(video))
    assert [number_of(frame.pixels) for frame in given] == [0, 2, 4, 6, 8]
    assert [frame.seconds for frame in given] == pytest.approx([0, 0.2, 0.4, 0.6, 0.8], abs=0.002)


def test_a_video_of_real_pictures_without_feature_maps(bundle, clip, tmp_path, capsys):
    video = tmp_path / "maps.mkv"
    code, out, err = run(
        capsys, bundle, clip, "-o", tmp_path / "out", "--max", 2, "--video", video, "--format", "none", "--json"
    )
    assert code == 0, err
    assert not (tmp_path / "out").exists()
    assert json.loads(out)["video"] == str(video)
    assert json.loads(out)["index"] is None
    first, _second = frames(video)
    assert first.pixels.shape[1] > 800
    assert (first.pixels > 200).mean() > 0.2


def test_a_grey_backbone_gets_grey_frames(bundle, clip, monkeypatch):
    asked = []
    request = streams.Request(str(clip), True, Path("out"), "none", None, 1, 2, False, "x")

    class Grey:
        class input:
            channels = 1

        out_features = ("a",)

        def map(self, inputs, in_flight):
            for array in inputs:
                asked.append(array.shape)
                yield type("Output", (), {"feature_maps": (array[None],)})

    streams.run_frames(request, Grey(), lambda frame, color: frame, None, None, as_json=True)
    assert asked == [(48, 64)] * 2


def test_a_bundle_that_cannot_repeat_its_processor_warns_and_runs(clip, tmp_path, capsys):
    import msgspec

    made = make_bundle(tmp_path / "odd.bundle", pooling_input(1))
    source = msgspec.structs.replace(
        made.manifest.source, preprocessing_notes=(f"OddProcessor turns pictures: {USE_PROCESSOR}",)
    )
    write_manifest(made.path, msgspec.structs.replace(made.manifest, source=source))
    code, _, err = run(capsys, made.path, clip, "-o", tmp_path / "out", "--max", 1)
    assert code == 0
    assert "not what the network gives after its own processor: OddProcessor turns pictures" in err


def test_an_earlier_run_is_replaced_on_request_and_nothing_else(bundle, clip, tmp_path, capsys, quick_pictures):
    out, video = tmp_path / "out", tmp_path / "maps.mp4"
    assert run(capsys, bundle, clip, "-o", out, "--video", video)[0] == 0
    (out / "notes.txt").write_text("mine")
    (out / "photo.npz").write_text("mine")
    before = video.read_bytes()
    said = refused(capsys, bundle, clip, "-o", out)
    assert f"{out} holds 11 files of an earlier run: choose another folder with --out, or replace them with" in said
    said = refused(capsys, bundle, clip, "-o", tmp_path / "new", "--video", video)
    assert f"{video} exists: choose another file with --video, or replace it with --overwrite" in said
    (tmp_path / "broken.mp4").write_bytes(b"nothing")
    refused(capsys, bundle, tmp_path / "broken.mp4", "-o", out, "--video", video, "--overwrite")
    assert (len(names(out)), video.read_bytes()) == (13, before)  # what cannot be read costs nothing
    arguments = ("-o", out, "--video", video, "--overwrite", "--max", 2, "--format", "zarr")
    assert run(capsys, bundle, clip, *arguments)[0] == 0
    assert names(out) == ["frame_00000000.zarr", "frame_00000001.zarr", "frames.jsonl", "notes.txt", "photo.npz"]
    assert len(list(frames(video))) == 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--every", 0), "--every"),
        (("--max", 0), "--max"),
        (("--format", "hdf5"), "--format"),
        (("--every", "a"), "--every"),
    ],
)
def test_values_that_no_source_takes_are_usage_errors(bundle, clip, capsys, arguments, said):
    code, out, err = run(capsys, bundle, clip, *arguments)
    assert (code, out) == (2, "")
    assert said in err


def test_what_makes_no_sense_is_refused(bundle, clip, tmp_path, capsys):
    Image.fromarray(picture(0)).save(tmp_path / "photo.png")
    out = ("-o", tmp_path / "out")
    for arguments, said in [
        ((clip, "--format", "none"), "--format none writes no feature maps and --video is not given"),
        ((clip, "--video", tmp_path / "a.gif"), ".gif is no kind of video that is written here: use one of .mp4"),
        ((clip, "--video", clip), f"{clip} is the source and would be overwritten"),
        ((clip, "--video", clip, "--overwrite"), f"{clip} is the source and would be overwritten"),
        ((clip, "--video", tmp_path), f"{tmp_path} is a folder: --video takes a file"),
        (
            (tmp_path, "--video", "a.mp4"),
            f"--video is for a video or a camera, and {tmp_path} is a folder: leave it out",
        ),
        ((tmp_path / "photo.png", "--video", "a.mp4"), "photo.png is an image: leave it out"),
        ((tmp_path / "photo.png", "--format", "none", "--no-picture"), "leave nothing to write"),
        ((tmp_path / "nothing.mp4",), f"{tmp_path}/nothing.mp4 does not exist"),
        (("98",), "camera 98 does not exist, "),
        (("/dev/video98",), "/dev/video98 does not exist, "),
        (("rtsp://me:secret@127.0.0.1:9/x",), "rtsp://127.0.0.1:9/x cannot be opened (Connection refused)"),
        (("videotestsrc ! videoconvert ! appsink",), "cannot run GStreamer pipelines"),
    ]:
        assert said in refused(capsys, bundle, *arguments, *out)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("missing", "arguments", "said"),
    [
        (("av", "cv2"), (), "as a video (PyAV is not installed) needs the 'video' extra: pip install"),
        (("av",), ("--video", "a.mp4"), "writing video (av is not installed) needs the 'video' extra: pip install"),
        (("zarr",), ("--format", "zarr"), "writing Zarr (zarr is not installed) needs the 'zarr' extra: pip install"),
    ],
)
def test_a_missing_library_is_named_with_its_command(
    bundle, clip, tmp_path, capsys, monkeypatch, missing, arguments, said
):
    for name in missing:
        monkeypatch.setitem(sys.modules, name, None)
    assert said in refused(capsys, bundle, clip, "-o", tmp_path / "out", *arguments)


def test_without_pyav_opencv_gives_the_same_files(bundle, tmp_path, capsys, monkeypatch):
    clip = make_video(tmp_path / "clip.mp4", colorspace=6)
    assert run(capsys, bundle, clip, "-o", tmp_path / "pyav", "--every", 4)[0] == 0
    monkeypatch.setitem(sys.modules, "av", None)
    assert run(capsys, bundle, clip, "-o", tmp_path / "opencv", "--every", 4)[0] == 0
    assert names(tmp_path / "opencv") == names(tmp_path / "pyav")
    for name in names(tmp_path / "pyav")[:-1]:
        with np.load(tmp_path / "pyav" / name) as ours, np.load(tmp_path / "opencv" / name) as other:
            for stage in ours.files:
                np.testing.assert_allclose(ours[stage], other[stage], atol=0.1)


def test_damaged_frames_are_counted_in_the_summary(bundle, tmp_path, capsys):
    path = make_video(tmp_path / "a.avi", codec="mjpeg", pixels="yuvj420p", color_range=2, colorspace=5)
    data = bytearray(path.read_bytes())
    starts = [at for at in range(len(data)) if data[at : at + 3] == b"\xff\xd8\xff"]
    for number in (4, 6):
        data[starts[number] + 2 : starts[number] + 600] = b"\xff" * 598
    path.write_bytes(data)
    code, out, err = run(capsys, bundle, path, "-o", tmp_path / "out")
    assert code == 0, err
    assert out.splitlines()[0].endswith("; 2 damaged, skipped")
    assert [entry["frame"] for entry in listed(tmp_path / "out")] == [0, 1, 2, 3, 5, 7, 8, 9]
    for number in range(10):
        data[starts[number] + 2 : starts[number] + 600] = b"\xff" * 598
    path.write_bytes(data)
    assert "a.avi: none of its 10 frames decodes" in refused(capsys, bundle, path, "-o", tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_an_error_in_the_middle_keeps_what_was_written(bundle, clip, tmp_path, capsys, monkeypatch, quick_pictures):
    calls = []
    call = EdgeBackbone.__call__

    def fail(self, *arguments, **options):
        calls.append(1)
        if len(calls) == 4:
            raise InferenceError("the device is gone")
        return call(self, *arguments, **options)

    monkeypatch.setattr(EdgeBackbone, "__call__", fail)
    video = tmp_path / "maps.mp4"
    code, out, err = run(capsys, bundle, clip, "-o", tmp_path / "out", "--video", video)
    assert code == 1
    assert err.splitlines()[-1] == "edge-backbones: the device is gone"
    assert out.startswith(f"{clip}: 3 frames in ")
    assert [entry["frame"] for entry in listed(tmp_path / "out")] == [0, 1, 2]
    assert len(list(frames(video))) == 3
    calls.clear()
    code, out, err = run(capsys, bundle, clip, "-o", tmp_path / "again", "--json")
    assert (code, err) == (1, "")
    assert json.loads(out)["message"] == "the device is gone"  # one document


def test_a_stream_that_falls_silent_ends_with_its_frames_and_the_reason(bundle, stream, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(pyav, "TIMEOUT", 0.5)
    with served(stream, hold=True) as address:
        code, out, err = run(capsys, bundle, address, "-o", tmp_path / "out")
    assert code == 1
    assert err.splitlines()[-1].startswith(f"edge-backbones: {address} has sent nothing for")
    assert out.startswith(f"{address}: {len(listed(tmp_path / 'out'))} frame")
    assert "came too fast, dropped" in out


def test_a_live_stream_is_counted_and_ends(bundle, stream, tmp_path, capsys):
    with served(stream, pieces=40, pause=0.02) as address:
        code, out, err = run(capsys, bundle, address, "-o", tmp_path / "out", "--json")
    assert (code, err) == (0, "")
    summary = json.loads(out)
    assert 0 < summary["frames"] <= 40
    assert summary["frames"] + summary["dropped"] + summary["skipped"] <= 40
    numbers = [entry["frame"] for entry in listed(tmp_path / "out")]
    assert len(numbers) == summary["frames"]
    assert numbers == sorted(set(numbers))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("form", ["text", "json"])
def test_an_interrupt_leaves_whole_files_a_video_and_a_summary(bundle, stream, tmp_path, number, form):
    out, video = tmp_path / "out", tmp_path / "maps.mp4"
    with served(stream * 50, pieces=50 * 40, pause=0.02) as address:
        command = [sys.executable, "-m", "edge_backbones.cli.main", "run", bundle, address, "-o", out, "--video", video]
        process = subprocess.Popen(
            [*map(str, command), *(["--json"] if form == "json" else [])],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        try:
            wait_for(lambda: (out / "frames.jsonl").exists() and len(listed(out)) >= 3, 60)
            process.send_signal(number)
            said, errors = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    assert errors.splitlines()[-1] == "interrupted: no bundle was changed"
    count = len(listed(out))
    assert count >= 3
    assert names(out) == [*(entry["features"] for entry in listed(out)), "frames.jsonl"]
    for entry in listed(out):
        with np.load(out / entry["features"]) as features:
            assert features["pool4"].shape == (3, 8, 12)
    with av.open(str(video)) as container:
        assert sum(1 for _ in container.decode(video=0)) == count
    if form == "json":
        assert (json.loads(said)["interrupted"], json.loads(said)["frames"]) == (True, count)
    else:
        assert said.startswith(f"{address}: {count} frames in ")


def test_an_empty_name_is_refused(bundle, capsys):
    assert refused(capsys, bundle, "") == (
        "edge-backbones: the source is an empty name: pass the path of an image or a video, the number of a camera, or an "
        "address"
    )


def test_a_full_disk_ends_it_with_what_was_written(bundle, clip, tmp_path, capsys, monkeypatch):
    save, saved = map_files._save_npz, []

    def fail(path, maps):
        if len(saved) == 2:
            raise OSError(28, "No space left on device")
        saved.append(path)
        save(path, maps)

    monkeypatch.setattr(map_files, "_save_npz", fail)
    code, out, err = run(capsys, bundle, clip, "-o", tmp_path / "out")
    assert code == 1
    assert err.splitlines()[-1] == (
        f"edge-backbones: {tmp_path}/out/frame_00000002.npz cannot be written (its disk is full): choose another folder "
        "with --out"
    )
    assert out.startswith(f"{clip}: 2 frames in ")
    assert len(listed(tmp_path / "out")) == 2


@pytest.mark.parametrize(("place", "written"), [("_save_npz", "photo.npz"), ("draw_feature_maps", "photo.png")])
def test_a_full_disk_is_told_of_an_image_too(place, written, bundle, tmp_path, capsys, monkeypatch):
    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(map_files if place == "_save_npz" else running, place, fail)
    Image.fromarray(picture(3)).save(tmp_path / "photo.png")
    line = refused(capsys, bundle, tmp_path / "photo.png", "-o", tmp_path / "out")
    assert f"{tmp_path}/out/{written} cannot be written (its disk is full): choose another folder with --out" in line


def test_a_second_interrupt_ends_at_once():
    class Source:
        stopped = 0

        def stop(self):
            self.stopped += 1

    source = Source()
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), streams._Stop(source) as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop.asked
        assert source.stopped == 1
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before
