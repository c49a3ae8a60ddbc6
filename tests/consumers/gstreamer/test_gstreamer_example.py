"""The example runs on pipelines of the real GStreamer, and its maps are those of the same frames."""

from __future__ import annotations

import itertools
import json
import re
import signal
import subprocess
import sys
import time

import av
import numpy as np
import pytest

from edge_backbones import EdgeBackbone
from edge_backbones.integrations.deepstream import export_deepstream
from edge_backbones.testing import make_bundle
from tests.consumers.gstreamer.conftest import EXAMPLE, HEIGHT, WIDTH
from tests.plans import with_plan

FRAMES = 4
RATE = 10
BALL = f"videotestsrc num-buffers={FRAMES} pattern=ball ! video/x-raw,width={WIDTH},height={HEIGHT},framerate={RATE}/1"


def maps_of(folder):
    """Return what the example wrote: the maps of each frame, by its time in ns."""
    found = {}
    for path in sorted(folder.glob("*.npz")):
        with np.load(path) as file:
            found[int(path.stem)] = dict(file)
    return found


def check_maps(bundle, frames, color, written):
    """Compare written maps with those of frames, one after the other at RATE."""
    assert list(written) == [number * 1_000_000_000 // RATE for number in range(len(frames))]
    with EdgeBackbone.from_pretrained(bundle) as backbone:
        for frame, found in zip(frames, written.values(), strict=True):
            maps = backbone(backbone.preprocess(frame, color=color)).feature_maps
            assert list(found) == list(backbone.out_features)
            for expected, actual in zip(maps, found.values(), strict=True):
                np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize("format", ["RGB", "I420", "NV12", "BGRx"])
def test_maps_are_those_of_the_same_frames_whatever_the_source_delivers(example, launch, folder, tmp_path, format):
    source = BALL.replace("video/x-raw", f"video/x-raw,format={format}")
    launch(f"{source} ! videoconvert ! video/x-raw,format=RGB ! multifilesink location={tmp_path}/%d.raw")
    done = example("rgb.bundle", source, "fakesink", "--every-frame", "--maps", tmp_path / "maps")
    assert (done.returncode, done.stdout) == (0, f"{FRAMES} frames\n"), done.stderr
    pitch = -(-WIDTH * 3 // 4) * 4
    assert pitch != WIDTH * 3
    rows = [np.fromfile(tmp_path / f"{number}.raw", np.uint8).reshape(HEIGHT, pitch) for number in range(FRAMES)]
    frames = [row[:, : WIDTH * 3].reshape(HEIGHT, WIDTH, 3) for row in rows]
    assert any((one != other).any() for one, other in itertools.pairwise(frames))
    check_maps(folder / "rgb.bundle", frames, "rgb", maps_of(tmp_path / "maps"))


def test_frames_of_nv12_go_in_as_they_come(example, launch, folder, tmp_path):
    source = BALL.replace("video/x-raw", "video/x-raw,format=NV12")
    launch(f"{source} ! multifilesink location={tmp_path}/%d.raw")
    done = example("nv12.bundle", source, "fakesink", "--every-frame", "--maps", tmp_path / "maps")
    assert (done.returncode, done.stdout) == (0, f"{FRAMES} frames\n"), done.stderr
    shape = HEIGHT * 3 // 2, WIDTH + 2
    frames = [np.fromfile(tmp_path / f"{number}.raw", np.uint8).reshape(shape)[:, :WIDTH] for number in range(FRAMES)]
    check_maps(folder / "nv12.bundle", frames, "nv12", maps_of(tmp_path / "maps"))


def test_frames_may_change_their_size(example, launch, folder, tmp_path):
    small = BALL.replace(f"width={WIDTH},height={HEIGHT}", "width=121,height=60")
    source = f"{BALL} ! both. {small} ! both. concat name=both"
    for number, one in enumerate((BALL, small)):
        launch(f"{one} ! videoconvert ! video/x-raw,format=RGB ! multifilesink location={tmp_path}/{number}_%d.raw")
    done = example("rgb.bundle", source, "fakesink", "--every-frame", "--maps", tmp_path / "maps")
    assert (done.returncode, done.stdout) == (0, f"{2 * FRAMES} frames\n"), done.stderr
    frames = []
    for number, (width, height) in enumerate(((WIDTH, HEIGHT), (121, 60))):
        for index in range(FRAMES):
            rows = np.fromfile(tmp_path / f"{number}_{index}.raw", np.uint8).reshape(height, -1)
            frames.append(rows[:, : width * 3].reshape(height, width, 3))
    written = maps_of(tmp_path / "maps")
    # Both begin at 0 s, and the second ones replaced the maps of the first.
    check_maps(folder / "rgb.bundle", frames[FRAMES:], "rgb", written)


def test_pictures_have_the_times_of_their_frames(example, tmp_path):
    file = tmp_path / "maps.webm"
    done = example("rgb.bundle", BALL, f"vp8enc deadline=1 ! webmmux ! filesink location={file}", "--every-frame")
    assert done.returncode == 0, done.stderr
    with av.open(str(file)) as container:
        pictures = list(container.decode(video=0))
    assert [round(picture.time, 3) for picture in pictures] == [number / RATE for number in range(FRAMES)]
    assert len(np.unique(pictures[0].to_ndarray(format="rgb24").reshape(-1, 3), axis=0)) > 100


def test_of_a_camera_only_the_newest_frame_is_taken(example):
    live = BALL.replace("videotestsrc", "videotestsrc is-live=true").replace(f"framerate={RATE}/1", "framerate=200/1")
    done = example("rgb.bundle", live.replace(f"num-buffers={FRAMES}", "num-buffers=100"), "fakesink")
    assert done.returncode == 0, done.stderr
    assert 1 <= int(done.stdout.split()[0]) < 100


@pytest.mark.parametrize(
    ("bundle", "source", "sink", "reason"),
    [
        ("rgb", "v4l2src device=/dev/video99", "fakesink", r"v4l2src0: Cannot identify device '/dev/video99'.*No such"),
        ("rgb", "nosuchelement", "fakesink", r"GStreamer cannot make a pipeline of .*: no element \"nosuchelement\""),
        ("rgb", "audiotestsrc", "fakesink", r"could not link audiotestsrc0 to videoconvert0"),
        ("rgb", "filesrc location=/nothing ! decodebin", "fakesink", r"filesrc0: .*No such file \"/nothing\""),
        ("rgb", BALL, "filesink location=/nothing/a", r"filesink0: Could not open file \"/nothing/a\" for writing"),
        ("rgb", BALL, "nosuchsink", r"no element \"nosuchsink\""),
        ("rgb", "videotestsrc num-buffers=0", "fakesink", "the pipeline ended without a frame"),
        ("rgb", f"{BALL} ! identity error-after=2", "fakesink", r"identity0: .*Failed after iterations"),
        ("rgb", BALL, "identity error-after=2 ! fakesink", r"identity0: .*Failed after iterations"),
        (
            "nv12",
            BALL.replace(f"width={WIDTH}", "width=320"),
            "fakesink",
            r"frames of 90x320, and this bundle takes nv12 frames of 90x234 .*: end the pipeline in ! videoscale ! "
            r"video/x-raw,width=234,height=90",
        ),
        (
            "nv12",
            BALL.replace("video/x-raw", "video/x-raw,format=NV12,colorimetry=bt709"),
            "fakesink",
            r"colours of bt709, limited range, and this bundle takes nv12 frames of 90x234 \(BT.601, limited range\)",
        ),
        ("no", BALL, "fakesink", r"no.bundle is not a bundle"),
    ],
)  # fmt: skip
def test_a_refusal_is_one_line_with_the_reason(example, bundle, source, sink, reason):
    done = example(f"{bundle}.bundle", source, sink, "--every-frame")
    assert done.returncode == 1
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("gstreamer.py: ")
    assert re.search(reason, line), line


@pytest.mark.parametrize(
    "fix",
    ["videoscale ! video/x-raw,width=234,height=90", "videoconvert ! video/x-raw,format=NV12,colorimetry=2:4:16:4"],
)
def test_the_fix_of_a_refusal_works(example, fix):
    source = BALL.replace(f"width={WIDTH}", "width=320") if "videoscale" in fix else BALL
    colours = "video/x-raw,format=NV12,colorimetry=bt709" if "colorimetry" in fix else "video/x-raw"
    done = example("nv12.bundle", f"{source.replace('video/x-raw', colours)} ! {fix}", "fakesink", "--every-frame")
    assert (done.returncode, done.stdout) == (0, f"{FRAMES} frames\n"), done.stderr


def test_ctrl_c_leaves_a_complete_file(python, environment, folder, tmp_path):
    live = BALL.replace("videotestsrc", "videotestsrc is-live=true").replace(f"num-buffers={FRAMES}", "num-buffers=-1")
    sink = f"vp8enc deadline=1 ! webmmux ! filesink location={tmp_path / 'maps.webm'}"
    command = [python, EXAMPLE, folder / "rgb.bundle", live, sink, "--maps", tmp_path]
    with subprocess.Popen(list(map(str, command)), env=environment, stderr=subprocess.PIPE, text=True) as running:
        last = time.monotonic() + 60
        while len(list(tmp_path.glob("*.npz"))) < 3:
            assert running.poll() is None, running.communicate()
            assert time.monotonic() < last
            time.sleep(0.05)
        running.send_signal(signal.SIGINT)
        said = running.communicate(timeout=60)[1]
    assert (running.returncode, said) == (130, "")
    with av.open(str(tmp_path / "maps.webm")) as container:
        assert container.duration  # which the muxer writes at the end
        assert len(list(container.decode(video=0))) >= 2


def test_a_buffer_is_mapped_at_its_own_pitch_without_a_copy(in_python):
    printed = in_python("""
import numpy as np
import gstreamer as example
from gi.repository import Gst, GstVideo

Gst.init(None)

def buffer_of(bytes_, format, offsets, strides, width, height):
    buffer = Gst.Buffer.new_allocate(None, len(bytes_), None)
    buffer.fill(0, bytes_.tobytes())
    flags, format_ = GstVideo.VideoFrameFlags.NONE, GstVideo.VideoFormat.from_string(format)
    GstVideo.buffer_add_video_meta_full(buffer, flags, format_, width, height, len(strides), offsets, strides)
    caps = Gst.Caps.from_string(f"video/x-raw,format={format},width={width},height={height},framerate=1/1")
    return buffer, GstVideo.VideoInfo.new_from_caps(caps)

def address(buffer):
    ok, memory = buffer.map(Gst.MapFlags.READ)
    try:
        return np.frombuffer(memory.data, np.uint8).ctypes.data
    finally:
        buffer.unmap(memory)

bytes_ = np.random.default_rng(0).integers(0, 256, 4096, np.uint8)

rgb = bytes_[16 : 16 + 8 * 40].reshape(8, 40)[:, :30].reshape(8, 10, 3)
buffer, info = buffer_of(bytes_, "RGB", [16, 0, 0, 0], [40, 0, 0, 0], 10, 8)
with example.pixels_of(buffer, info) as frame:
    np.testing.assert_array_equal(frame, rgb)
    assert frame.ctypes.data == address(buffer) + 16

luma = bytes_[: 8 * 32].reshape(8, 32)[:, :10]
for apart in (0, 100):
    start = 8 * 32 + apart
    chroma = bytes_[start : start + 4 * 32].reshape(4, 32)[:, :10]
    buffer, info = buffer_of(bytes_, "NV12", [0, start, 0, 0], [32, 32, 0, 0], 10, 8)
    with example.pixels_of(buffer, info) as frame:
        np.testing.assert_array_equal(frame[..., 0], np.concatenate([luma, chroma]))
        assert (frame.ctypes.data == address(buffer)) == (apart == 0)

buffer, info = buffer_of(bytes_, "YUY2", [0, 0, 0, 0], [64, 0, 0, 0], 10, 8)
with example.pixels_of(buffer, info) as frame:
    np.testing.assert_array_equal(frame, bytes_[: 8 * 64].reshape(8, 64)[:, :20].reshape(8, 10, 2))
print("done")
""")
    assert printed == "done\n"


def test_exceptions_in_libraries_that_are_loaded_later_do_not_end_the_process(in_python, folder):
    # Without the line about libgcc_s this aborts: reading the shapes of an engine ends in an exception in C++.
    printed = in_python(
        "import sys, gstreamer; gstreamer.Gst.init(None); "
        "print(gstreamer.EdgeBackbone.from_pretrained(sys.argv[1]).device)",
        folder / "rgb.bundle",
    )
    assert printed == "cpu\n"


def test_a_python_without_the_bindings_says_what_to_install(tmp_path):
    blocked = f"import sys, runpy; sys.modules['gi'] = None; runpy.run_path({str(EXAMPLE)!r}, run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", blocked], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert "cannot use GStreamer" in line
    assert "apt install python3-gi" in line
    assert "--system-site-packages" in line


def test_a_folder_for_maps_that_cannot_be_is_one_line(example, tmp_path):
    (tmp_path / "file").touch()
    done = example("rgb.bundle", "videotestsrc num-buffers=1", "fakesink", "--maps", tmp_path / "file")
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line == f"gstreamer.py: [Errno 17] File exists: '{tmp_path / 'file'}'"


def test_glib_reads_the_file_that_deepstream_gets(in_python, tmp_path):
    """nvinfer reads its configuration with this parser of GLib, which knows no comment behind a value."""
    bundle = with_plan(make_bundle(tmp_path / "net.bundle"))
    written = export_deepstream(bundle.path, tmp_path / "out")
    printed = in_python(
        """
import json, sys
from gi.repository import GLib
file = GLib.KeyFile()
file.load_from_file(sys.argv[1], GLib.KeyFileFlags.NONE)
def get(kind, key):
    found = getattr(file, f"get_{kind}")("property", key)
    return found[0] if isinstance(found, tuple) else found
print(json.dumps({
    "groups": list(file.get_groups()[0]),
    "plan": get("string", "model-engine-file"),
    "dims": list(get("integer_list", "infer-dims")),
    "names": list(get("string_list", "output-blob-names")),
    "scale": get("double", "net-scale-factor"),
    "offsets": list(get("double_list", "offsets")),
    "type": get("integer", "network-type"),
}))
""",
        written.config,
    )
    input, image = bundle.manifest.input, bundle.manifest.image
    assert json.loads(printed) == {
        "groups": ["property"],
        "plan": written.plan.name,
        "dims": [3, input.height.opt, input.width.opt],
        "names": list(bundle.manifest.backbone.outputs),
        "scale": 1 / (255 * image.std[0]),
        "offsets": [255 * mean for mean in image.mean],
        "type": 100,
    }
