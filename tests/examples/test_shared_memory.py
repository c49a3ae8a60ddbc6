"""The example with a C++ camera in shared memory: frames go to Python and maps come back, and either program may die.

The camera's picture of a frame is known, so the map that C++ got is compared with the map of that picture.
"""

from __future__ import annotations

import importlib.util
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from edge_backbones import EdgeBackbone
from edge_backbones.testing import make_bundle, pooling_input
from tests.examples.conftest import ROOT

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="shared memory lies elsewhere on other systems")

SOURCES = ROOT / "examples" / "shared_memory"
HEIGHT, WIDTH = 120, 160
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}


@pytest.fixture(scope="module")
def camera(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The C++ program, built by the CMakeLists.txt beside it."""
    place = Path(sys.executable).parent
    cmake = shutil.which("cmake", path=f"{place}{os.pathsep}{os.environ['PATH']}")
    assert cmake is not None, "the example needs CMake: pip install cmake, and a C++ compiler: apt install g++"
    build = tmp_path_factory.mktemp("camera")
    for command in (["-S", SOURCES, "-B", build, "-DCMAKE_BUILD_TYPE=Release"], ["--build", build]):
        done = subprocess.run([cmake, *map(str, command)], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "warning" not in (done.stdout + done.stderr).lower()
    return build / "camera"


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``frames.bundle``, which takes frames of HEIGHT x WIDTH, and ``pixels.bundle``, which takes tensors."""
    import timm
    import torch

    from edge_backbones import BuildOptions, build_bundle

    folder = tmp_path_factory.mktemp("bundles")
    torch.manual_seed(0)
    net = timm.create_model("test_resnet", features_only=True, out_indices=(2, 4)).eval()
    options = {"precisions": "fp32", "torchscript": False, "golden": 1, "cache": None, "height": 96, "width": 96}
    frames = BuildOptions(**options, input="frame", frame=(HEIGHT, WIDTH), color="rgb")
    build_bundle(net, folder / "frames.bundle", options=frames)
    make_bundle(folder / "pixels.bundle", pooling_input(1))
    return folder


@pytest.fixture(scope="module")
def program() -> ModuleType:
    """backbone.py as a module."""
    spec = importlib.util.spec_from_file_location("shared_memory_backbone", SOURCES / "backbone.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def name() -> Iterator[str]:
    """A name of shared memory that nobody has, which is free again behind the test."""
    made = f"/edge_backbones_test_{secrets.token_hex(4)}"
    yield made
    place_of(made).unlink(missing_ok=True)


def place_of(name: str) -> Path:
    return Path("/dev/shm", name[1:])


Start = Callable[..., subprocess.Popen]


@pytest.fixture
def start() -> Iterator[Start]:
    """Start a program whose output is text; those that still run behind the test are ended."""
    running: list[subprocess.Popen] = []

    def begin(*command: object) -> subprocess.Popen:
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": ENVIRONMENT}
        running.append(subprocess.Popen([str(word) for word in command], **pipes))
        return running[-1]

    yield begin
    for one in running:
        one.kill()
        one.communicate()


def backbone_of(start: Start, bundle: Path, name: str) -> subprocess.Popen:
    return start(sys.executable, SOURCES / "backbone.py", bundle, name)


def until(true: Callable[[], bool], *programs: subprocess.Popen) -> None:
    last = time.monotonic() + 60
    while not true():
        assert all(one.poll() is None for one in programs), [one.communicate() for one in programs]
        assert time.monotonic() < last
        time.sleep(0.005)


def waits(camera: subprocess.Popen) -> None:
    """Read the line that the camera prints once the shared memory is there."""
    assert camera.stdout.readline().startswith("waiting for backbone.py")


def picture(number: int) -> np.ndarray:
    row, column, channel = np.ogrid[:HEIGHT, :WIDTH, :3]
    return ((3 * row + 5 * column + 7 * channel * row + 11 * number) & 255).astype(np.uint8)


@pytest.mark.parametrize("kind", ["frames", "pixels"])
def test_maps_of_frames_in_shared_memory_come_back(camera, bundles, start, name, tmp_path, kind):
    bundle, saved = bundles / f"{kind}.bundle", tmp_path / "map"
    writing = start(camera, name, HEIGHT, WIDTH, "--frames", 20, "--rate", 100, "--save", saved)
    waits(writing)
    reading = backbone_of(start, bundle, name)
    said, errors = writing.communicate(timeout=60)
    assert (writing.returncode, errors) == (0, "")
    *answers, last = said.splitlines()
    assert answers
    assert all("checksum fits, map 1x" in line for line in answers)
    assert last == "the last map is of frame 20 of 20"
    printed, errors = reading.communicate(timeout=60)
    assert (reading.returncode, errors) == (0, "")
    assert int(printed.split()[1]) >= len(answers)  # a map may be replaced before C++ looks
    data = saved.read_bytes()
    number = int.from_bytes(data[:8], "little")
    assert number == 20
    with EdgeBackbone.from_pretrained(bundle) as backbone:
        given = picture(number) if kind == "frames" else backbone.preprocess(picture(number))
        expected = backbone(given).feature_maps[-1]
    np.testing.assert_array_equal(np.frombuffer(data[8:], np.float32).reshape(expected.shape), expected)
    assert not place_of(name).exists()  # the camera removes it


def test_a_map_without_room_is_refused_with_the_option(camera, bundles, start, name):
    writing = start(camera, name, HEIGHT, WIDTH, "--map-bytes", 64)
    waits(writing)
    reading = backbone_of(start, bundles / "frames.bundle", name)
    assert reading.wait(60) == 1
    assert "its place 64: camera --map-bytes 3456" in reading.stderr.read()


def test_the_camera_dies_and_another_one_takes_its_place(camera, bundles, start, name):
    writing = start(camera, name, HEIGHT, WIDTH, "--frames", 100000, "--rate", 100)
    waits(writing)
    reading = backbone_of(start, bundles / "frames.bundle", name)
    writing.stdout.readline()  # the first map
    writing.kill()
    assert reading.wait(60) == 1
    (line,) = reading.stderr.read().splitlines()
    assert line.startswith("backbone.py: the camera died behind frame ")
    assert place_of(name).exists()  # Python leaves to the camera what is the camera's
    late = backbone_of(start, bundles / "frames.bundle", name)
    assert late.wait(60) == 1
    assert "the camera died" in late.stderr.read()
    waits(start(camera, name, HEIGHT, WIDTH))


def test_python_dies_and_the_camera_goes_on(camera, bundles, start, name):
    writing = start(camera, name, HEIGHT, WIDTH, "--frames", 100000, "--rate", 200)
    waits(writing)
    reading = backbone_of(start, bundles / "frames.bundle", name)
    writing.stdout.readline()
    reading.kill()
    reading.wait()
    assert writing.stderr.readline() == "camera: backbone.py is gone; frames go on\n"
    again = backbone_of(start, bundles / "frames.bundle", name)
    while "checksum fits" not in writing.stdout.readline():
        pass
    writing.send_signal(signal.SIGINT)
    assert writing.wait(60) == 130
    assert again.wait(60) == 0
    assert not place_of(name).exists()


def test_a_second_camera_and_a_second_backbone_are_refused(camera, bundles, start, name):
    writing = start(camera, name, HEIGHT, WIDTH, "--frames", 100000)
    waits(writing)
    second = start(camera, name, HEIGHT, WIDTH)
    assert second.wait(60) == 1
    assert "belongs to a camera that runs: choose another name" in second.stderr.read()
    reading = backbone_of(start, bundles / "frames.bundle", name)
    writing.stdout.readline()
    other = backbone_of(start, bundles / "frames.bundle", name)
    assert other.wait(60) == 1
    assert f"another backbone.py reads {name}: end it first" in other.stderr.read()
    assert reading.poll() is None


def header(program: ModuleType, **fields: object) -> np.ndarray:
    """A header that is right, but for ``fields``."""
    pitch = -(-HEIGHT * WIDTH * 3 // 4096) * 4096
    right = {"magic": program.MAGIC, "version": program.VERSION, "slots": program.SLOTS, "channels": 3}
    sizes = {"height": HEIGHT, "width": WIDTH, "frames_offset": 4096, "frame_pitch": pitch, "map_bytes": 4096}
    values = right | sizes | {"map_offset": 4096 + 3 * pitch} | fields
    made = np.zeros((), program.HEADER)
    for key, value in values.items():
        made[key] = value
    return made


def written(name: str, made: np.ndarray, size: int | None = None) -> Path:
    whole = int(made["map_offset"]) + int(made["map_bytes"])
    place_of(name).write_bytes(made.tobytes().ljust(whole if size is None else size, b"\0"))
    return place_of(name)


@pytest.mark.parametrize(
    ("fields", "size", "said"),
    [
        ({}, 0, "has 0 bytes, a header has 152: the camera has not begun"),
        ({"magic": 7}, None, "begins with 0x7, not 0x3153454741424545: it is not of the camera"),
        ({"version": 2}, None, "has version 2 and 3 slots, this program reads 1 and 3: build the camera"),
        ({"slots": 2}, None, "has version 1 and 2 slots"),
        ({"height": 200}, None, r"what its header says needs \d+, for frames \(200, 160, 3\)"),
        ({"width": 0}, None, r"frames \(120, 0, 3\)"),
        ({"frame_pitch": 1 << 40}, None, "what its header says needs"),
        ({}, 8192, "has 8192 bytes, and what its header says needs"),
    ],
)  # fmt: skip
def test_memory_that_is_not_the_cameras_is_refused(program, name, fields, size, said):
    written(name, header(program, **fields), 0 if size == 0 else size)
    if size == 0:
        place_of(name).write_bytes(b"")
    with pytest.raises(program.SegmentError, match=said):
        program.Segment(name)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["high", "640"], "HEIGHT is a whole number up to 16384, got high"),
        (["480", str(2**32 + 1)], "WIDTH is a whole number up to 16384, got 4294967297"),
        (["480", "640", "--frames", "9" * 30], "--frames is a whole number up to "),
        (["480", "640", "--rate", "fast"], "--rate is a number, got fast"),
        (["480", "640", "--frames"], "usage: camera /NAME HEIGHT WIDTH"),
    ],
)
def test_the_camera_refuses_words_that_are_no_numbers(camera, start, name, words, said):
    refused = start(camera, name, *words)
    printed, error = refused.communicate(timeout=60)
    assert (refused.returncode, printed) == (1, "")
    assert error.startswith(f"camera: {said}")
    assert not place_of(name).exists()


def test_without_a_segment_the_message_says_what_to_start(bundles, start, name):
    done = backbone_of(start, bundles / "frames.bundle", name)
    assert done.wait(60) == 1
    (line,) = done.stderr.read().splitlines()
    assert line == f"backbone.py: there is no shared memory {name} (No such file or directory): start the camera first"


# Takes the lock of a byte, as the camera does while it writes, and holds it until stdin ends.
_HOLD = """
import fcntl, sys
file = open(sys.argv[1], "r+b")
fcntl.lockf(file, fcntl.LOCK_EX, 1, int(sys.argv[2]))
print("held", flush=True)
sys.stdin.read()
"""


def test_a_frame_is_the_memory_itself_and_never_torn_or_old(program, name):
    made = header(program, newest=5)
    made["slot"]["number"] = (4, 5, 3)
    place = written(name, made)
    segment = program.Segment(name)
    with segment.frame(after=4) as (number, frame):
        assert number == 5
        raw = np.memmap(place, np.uint8, "r+")
        raw[4096 + int(made["frame_pitch"])] = 77  # the camera's view of the same memory
        raw.flush()
        assert frame[0, 0, 0] == 77
        assert frame.flags.c_contiguous
        assert frame.flags.writeable  # OpenVINO takes no other memory without a copy
    with segment.frame(after=5) as found:
        assert found is None  # nothing newer
    segment.header["slot"]["number"][1] = 0  # a camera that died in the middle of frame 5
    with segment.frame(after=4) as found:
        assert found is None
    segment.header["slot"]["number"][1] = 5
    holder = [sys.executable, "-c", _HOLD, str(place), "1"]
    with subprocess.Popen(holder, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as held:
        assert held.stdout.readline() == "held\n"
        with segment.frame(after=4) as found:
            assert found is None  # the camera writes to it, and Python does not wait
        held.stdin.close()
    with segment.frame(after=4) as found:
        assert found is not None
        busy = [sys.executable, "-c", _HOLD.replace("LOCK_EX", "LOCK_EX | fcntl.LOCK_NB"), str(place), "1"]
        refused = subprocess.run(busy, input="", capture_output=True, text=True, check=False)
        assert "BlockingIOError" in refused.stderr  # and the camera cannot write to what Python reads
