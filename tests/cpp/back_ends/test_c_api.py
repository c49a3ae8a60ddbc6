"""The C functions of edge_backbones.h over OpenVINO: from a program in C99, and from another language."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

import edge_backbones
from edge_backbones import Bundle, EdgeBackbone, ShapeRange
from edge_backbones.testing import make_bundle, pooled, pooling_input
from tests.cpp.back_ends.c_library import InputInfo, Library, Opened, Options, OutputInfo, RefusalError
from tests.cpp_programs import built, configured
from tests.docs.snippets import snippets

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the C++ library is for Linux")
CPP = Path(edge_backbones.__file__).parent / "cpp"
USER = Path(__file__).parent / "user"
PAGE = Path(__file__).parents[3] / "docs" / "how-to" / "cpp-gpu.md"


@pytest.fixture(scope="session")
def project() -> Path:
    return built(USER, "all", "-DCOMPONENT=OpenVINO")


@pytest.fixture(scope="session")
def library(project) -> Library:
    return Library(project / "libedge_backbones_c.so")


@pytest.fixture(scope="session")
def pooling(tmp_path_factory) -> Path:
    """A bundle of average pooling in fp32, for batches of two to four."""
    folder = tmp_path_factory.mktemp("c_api") / "pooling.bundle"
    return make_bundle(folder, pooling_input(ShapeRange(min=2, opt=2, max=4))).path


@pytest.fixture(scope="session")
def camera(tmp_path_factory) -> Path:
    """A bundle that takes uint8 images and returns float16 maps in channels-last memory."""
    import timm
    import torch

    torch.manual_seed(0)
    net = timm.create_model("test_resnet", features_only=True, out_indices=(1, 2, 3)).eval()
    options = edge_backbones.BuildOptions(
        height=64, width=96, precisions=("fp32",), torchscript=False, input="image", maps=("float16", "channels-last")
    )
    folder = tmp_path_factory.mktemp("c_api") / "camera.bundle"
    edge_backbones.build_bundle(net, folder, options=options)
    return folder


@pytest.fixture
def opened(library, pooling):
    backbone = library.open(pooling)
    yield backbone
    backbone.close()


def image(batch: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((batch, 3, 32, 48)).astype(np.float32)


def refusal(function, *arguments, **options) -> str:
    with pytest.raises(RefusalError) as caught:
        function(*arguments, **options)
    return str(caught.value)


def test_the_program_in_c99_runs_a_bundle(project, pooling):
    done = subprocess.run([project / "run_bundle", pooling], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == ["pool4 (2, 3, 8, 12) NCHW, stride 4", "pool8 (2, 3, 4, 6) NCHW, stride 8"]


def test_the_program_in_c99_reports_an_error(project, tmp_path):
    done = subprocess.run([project / "run_bundle", tmp_path], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("BundleError: ") or done.stderr.startswith("IntegrityError: ")
    assert str(tmp_path) in done.stderr


def test_the_program_of_the_page_prints_what_python_computes(project, pooling, tmp_path):
    (code,) = (found.code for found in snippets(PAGE) if "title=features.c" in found.classes)
    (tmp_path / "features.c").write_text(code)
    flags = ["-std=c99", "-Wall", "-Wextra", "-Wpedantic", "-Werror", f"-I{CPP / 'include'}"]
    link = [f"-L{project}", "-ledge_backbones_c", f"-Wl,-rpath,{project}"]
    command = ["cc", *flags, tmp_path / "features.c", "-o", tmp_path / "features", *link]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    done = subprocess.run([tmp_path / "features", pooling], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    takes = Bundle.open(pooling).manifest.input.describe()
    assert done.stdout.splitlines() == [f"takes {takes}", "pool8 has 3 channels, mean 0.5"]


def test_the_project_of_the_page_is_configured(tmp_path):
    (code,) = (
        found.code
        for found in snippets(PAGE)
        if "find_package(edge_backbones REQUIRED COMPONENTS OpenVINO C)" in found.code
    )
    (tmp_path / "CMakeLists.txt").write_text(code)
    (tmp_path / "features.c").write_text("int main(void) { return 0; }\n")
    done = configured(tmp_path, tmp_path / "build")
    assert done.returncode == 0, done.stderr


def test_the_header_is_c_and_cpp(tmp_path):
    for compiler, standard, suffix in (("cc", "c99", "c"), ("c++", "c++17", "cpp")):
        source = tmp_path / f"include.{suffix}"
        source.write_text("#include <edge_backbones/edge_backbones.h>\nint main(void) { return EB_OK; }\n")
        flags = [
            f"-std={standard}",
            "-Wall",
            "-Wextra",
            "-Wpedantic",
            "-Werror",
            "-fsyntax-only",
            f"-I{CPP / 'include'}",
        ]
        done = subprocess.run([compiler, *flags, source], capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("batch", [1, 2, 3, 4, 7])
def test_maps_are_bit_equal_to_pythons(opened, pooling, batch):
    array = image(batch)
    maps = opened.run(array)
    with EdgeBackbone.from_pretrained(pooling) as backbone:
        expected = backbone.run(array)
    assert list(maps) == list(expected)
    for name, found in maps.items():
        assert found.dtype == expected[name].dtype
        np.testing.assert_array_equal(found, expected[name])
    np.testing.assert_allclose(maps["pool4"], pooled(array)[0], atol=1e-5)


def test_images_and_maps_in_other_formats(library, camera):
    array = np.random.default_rng(1).integers(0, 256, (2, 64, 96, 3), np.uint8)
    backbone = library.open(camera, stages=("layer1", "layer3"))
    info = backbone.input()
    assert (info.name, info.layout, info.dtype, list(info.opt_shape[:4])) == (b"image", b"NHWC", 2, [1, 64, 96, 3])
    maps = backbone.run(array)
    with EdgeBackbone.from_pretrained(camera) as python:
        expected = python.run(array)
    assert list(maps) == ["layer1", "layer3"]
    for name, found in maps.items():
        assert found.dtype == np.float16
        assert found.strides[1] == found.itemsize  # channels last
        np.testing.assert_array_equal(found, expected[name])
    backbone.close()


def test_what_a_backbone_says_of_itself(opened, pooling):
    manifest = Bundle.open(pooling).manifest
    assert opened.engine() == (manifest.engines[0].name, "cpu")
    info = opened.input()
    assert (info.name, info.layout, info.dtype, info.axes) == (b"pixel_values", b"NCHW", 0, 4)
    assert info.description.decode() == manifest.input.describe()
    assert list(info.opt_shape) == [2, 3, 32, 48, 0, 0, 0, 0]
    assert (list(info.batch), list(info.height), list(info.width), info.multiple) == ([2, 2, 4], [32] * 3, [48] * 3, 1)
    assert opened.count() == (2, 2)
    first = opened.output(0)
    assert (first.name, first.layout, first.dtype, first.channels) == (b"pool4", b"NCHW", 0, 3)
    assert list(first.stride) == [4, 4]
    assert list(first.shape[: first.axes]) == [2, 3, 8, 12]
    assert list(first.strides[: first.axes]) == [288, 96, 12, 1]
    assert first.bytes == 2 * 288 * 4
    assert list(opened.output(1, (5, 3, 32, 48)).shape[:4]) == [5, 3, 4, 6]


def test_an_output_can_be_left_out(opened):
    maps = opened.run(image(3), leave_out=(0,))
    assert list(maps) == ["pool8"]
    np.testing.assert_allclose(maps["pool8"], pooled(image(3))[1], atol=1e-5)


def test_versions_and_names(library):
    assert library.text("eb_version") == edge_backbones.__version__
    assert library.functions.eb_abi_version() == 1
    assert [library.text("eb_code_name", code) for code in range(11)] == [
        "OK", "BundleError", "ManifestError", "IntegrityError", "EngineMismatchError", "InputError", "InferenceError",
        "MissingDependencyError", "MemoryError", "an internal error", "an internal error",
    ]  # fmt: skip


def test_pointers_that_are_null(library, opened):
    handle, shape = opened.handle, (ctypes.c_int64 * 4)(2, 3, 32, 48)
    pixels, sizes = image(2), (ctypes.c_size_t * 2)(1 << 20, 1 << 20)
    maps = (ctypes.c_void_p * 2)()
    null = "InputError: %s is NULL: pass an address"
    other = ctypes.c_uint64()
    assert refusal(library.call, "eb_open", None, None, ctypes.byref(other)) == null % "path"
    assert refusal(library.call, "eb_open", b"x", None, None) == null % "backbone"
    assert refusal(library.call, "eb_input", handle, None) == null % "info"
    assert (
        refusal(library.call, "eb_output", handle, ctypes.c_size_t(0), None, ctypes.c_size_t(0), None) == null % "info"
    )
    options = Options(stage_count=1)
    assert refusal(library.call, "eb_open", b"x", ctypes.byref(options), ctypes.byref(other)) == null % "stages"
    options = Options(stage_count=1, stages=(ctypes.c_char_p * 1)())
    assert (
        refusal(library.call, "eb_open", b"x", ctypes.byref(options), ctypes.byref(other)) == null % "a name in stages"
    )

    def run(pointer=pixels.ctypes.data, at=shape, outputs=maps, room=sizes) -> None:
        library.call(
            "eb_run", handle, ctypes.c_void_p(pointer), ctypes.c_size_t(pixels.nbytes), at, ctypes.c_size_t(4), outputs, room,
            ctypes.c_size_t(2),
        )  # fmt: skip

    assert refusal(run, pointer=None) == null % "input"
    assert refusal(run, at=None) == null % "input_shape"
    assert refusal(run, outputs=None) == null % "outputs"
    assert refusal(run, room=None) == null % "output_bytes"
    run()
    library.call("eb_output_count", handle, None, None)
    library.call("eb_engine", handle, None, None)


def test_structs_that_are_too_short(library, opened, pooling):
    info = InputInfo()
    info.size -= 8
    said = refusal(library.call, "eb_input", opened.handle, ctypes.byref(info))
    assert said == (
        f"InputError: eb_input_info.size is {info.size}, this library writes {info.size + 8} bytes: set it to "
        "sizeof(eb_input_info)"
    )
    output = OutputInfo()
    output.size = 0
    said = refusal(
        library.call, "eb_output", opened.handle, ctypes.c_size_t(0), None, ctypes.c_size_t(0), ctypes.byref(output)
    )
    assert said.startswith("InputError: eb_output_info.size is 0, this library writes ")
    options = Options()
    options.size = 8
    other = ctypes.c_uint64()
    said = refusal(library.call, "eb_open", str(pooling).encode(), ctypes.byref(options), ctypes.byref(other))
    assert said.startswith("InputError: eb_options.size is 8, this library reads ")
    longer = InputInfo()  # of a program that was compiled with a later header
    longer.size += 64
    buffer = ctypes.create_string_buffer(bytes(longer) + b"\xff" * 64)
    library.call("eb_input", opened.handle, buffer)
    assert InputInfo.from_buffer(buffer).name == b"pixel_values"
    assert InputInfo.from_buffer(buffer).size == longer.size
    assert buffer.raw[ctypes.sizeof(InputInfo) :].rstrip(b"\0") == b"\xff" * 64


def test_memory_and_shapes_that_do_not_fit(opened):
    array = image(2)
    described = opened.outputs(array.shape)
    maps = [np.zeros(info.bytes, np.uint8) for info in described]
    pointers, sizes = [memory.ctypes.data for memory in maps], [info.bytes for info in described]

    def run(pointer=array.ctypes.data, nbytes=array.nbytes, shape=array.shape, to=pointers, room=sizes) -> str:
        return refusal(opened.run_at, pointer, nbytes, shape, to, room)

    assert run(nbytes=array.nbytes - 1) == (
        f"InputError: the memory of pixel_values has {array.nbytes - 1} bytes and needs {array.nbytes}"
    )
    assert run(room=[sizes[0], sizes[1] - 1]) == (
        f"InputError: the memory of pool8 has {sizes[1] - 1} bytes and needs {sizes[1]}"
    )
    assert run(pointer=array.ctypes.data + 2) == (
        "InputError: the memory of pixel_values is not aligned for float32: pass a multiple of 4 bytes"
    )
    assert run(to=[pointers[0] + 1, pointers[1]]).startswith(
        "InputError: the memory of pool4 is not aligned for float32"
    )
    assert run(to=pointers[:1], room=sizes[:1]) == (
        "InputError: output_count is 1, this backbone returns 2: see eb_output_count"
    )
    takes = "this engine takes float32 NCHW (batch, 3, 32, 48) with any batch >= 1"
    for shape in ((2, 3, 32, 40), (0, 3, 32, 48), (-1, 3, 32, 48), (3, 32, 48), (2, 3, 32, 48, 1), ()):
        shown = str(shape)
        assert run(shape=shape) == f"InputError: pixel_values of shape {shown} does not fit: {takes}"
    assert run(shape=(1,) * 9) == "InputError: an input of 9 axes does not fit: it has 4"
    assert run(shape=(1 << 62, 3, 32, 48)).startswith("InputError: a shape has more values than fit into memory")
    assert refusal(opened.output, 2) == ("InputError: there is no output 2: this backbone returns ['pool4', 'pool8']")
    array[1, 2, 3, 4] = np.nan
    assert run().startswith(
        "InputError: pixel_values of shape (2, 3, 32, 48) has values that are not finite (1 NaN in sample 1)"
    )


def test_values_that_are_not_finite_can_be_accepted(library, pooling):
    backbone = library.open(pooling, accept_not_finite=1)
    array = image(2)
    array[0, 0, 0, 0] = np.inf
    assert backbone.run(array)["pool4"][0, 0, 0, 0] == np.inf
    backbone.close()


def test_a_call_on_the_gpu_is_refused_on_the_cpu(opened):
    array = image(2)
    described = opened.outputs()
    maps = [np.zeros(info.bytes, np.uint8) for info in described]
    pointers, sizes = [memory.ctypes.data for memory in maps], [info.bytes for info in described]
    said = refusal(opened.run_at, array.ctypes.data, array.nbytes, array.shape, pointers, sizes, None)
    assert said.startswith("InputError: this engine runs on the CPU and takes no memory of a GPU")
    said = refusal(opened.run_at, array.ctypes.data, array.nbytes, array.shape, [pointers[0], None], sizes, None)
    assert said == "InputError: outputs[1] is NULL: on the GPU every output needs memory"


def test_handles_that_are_none(library, pooling):
    backbone = library.open(pooling)
    backbone.close()
    closed = "InputError: this backbone was closed: open the bundle again"
    for use in (backbone.close, backbone.input, backbone.count, backbone.engine, lambda: backbone.output(0)):
        assert refusal(use) == closed
    assert refusal(backbone.run_at, 16, 4, (1,), [None], [0]) == closed
    for number in (0, 1 << 40):
        assert refusal(Opened(library, ctypes.c_uint64(number)).close) == (
            f"InputError: {number} is no handle of a backbone: pass one that eb_open wrote"
        )
    again = library.open(pooling)
    assert again.handle.value != backbone.handle.value
    again.close()


def test_bundles_and_options_that_cannot_be_opened(library, pooling, tmp_path):
    assert refusal(library.open, tmp_path / "nothing").startswith(("BundleError: ", "IntegrityError: "))
    damaged = tmp_path / "damaged.bundle"
    shutil.copytree(pooling, damaged)
    engine = next((damaged / "engines").iterdir())
    engine.write_bytes(engine.read_bytes()[:-1])
    assert refusal(library.open, damaged).startswith("IntegrityError: ")
    (damaged / "manifest.json").write_text("{}")
    assert refusal(library.open, damaged).startswith("ManifestError: ")
    assert refusal(library.open, pooling, engine="int8").startswith("EngineMismatchError: ")
    assert refusal(library.open, pooling, device="gpu").startswith("InputError: device must be 'auto'")
    assert refusal(library.open, pooling, stages=("pool2",)).startswith("InputError: stages ['pool2'] are not compiled")
    assert refusal(library.open, pooling, threads=-1) == "InputError: threads must be at least 1, got -1"


def test_a_long_error_ends_at_a_character(library, tmp_path):
    said = refusal(library.open, tmp_path / ("ä" * 4000))
    assert 3000 < len(said.encode()) < 4200
    assert "\N{REPLACEMENT CHARACTER}" not in said


def test_threads_share_a_backbone_and_have_errors_of_their_own(library, pooling):
    backbone = library.open(pooling, threads=1)
    wrong: list[str] = []
    start = threading.Barrier(8)

    def work(number: int) -> None:
        start.wait()
        for turn in range(20):
            array = image(1 + (number + turn) % 5, seed=number)
            if number % 2:
                said = refusal(backbone.output, 100 + number)
                if f"no output {100 + number}:" not in said:
                    wrong.append(said)
            elif not np.allclose(backbone.run(array)["pool8"], pooled(array)[1], atol=1e-5):
                wrong.append(f"thread {number}")

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    backbone.close()
    assert not wrong


def test_a_bundle_may_be_closed_while_others_run(library, pooling):
    said: list[str] = []
    for _ in range(5):
        backbone = library.open(pooling)
        running = threading.Event()

        def work(backbone=backbone, running=running) -> None:
            while True:
                try:
                    backbone.run(image(4))
                except RefusalError as error:
                    said.append(str(error))
                    return
                running.set()

        threads = [threading.Thread(target=work) for _ in range(3)]
        for thread in threads:
            thread.start()
        running.wait()
        backbone.close()
        for thread in threads:
            thread.join()
    assert set(said) == {"InputError: this backbone was closed: open the bundle again"}
