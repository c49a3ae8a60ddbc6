"""EdgeBackbone.preprocess: every kind of image, by the code that `fit` and `run` use, or refused with a fix that works."""

from __future__ import annotations

import io
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import PIL.Image
import pytest
from PIL import Image

from edge_backbones.bundle.manifest import USE_PROCESSOR, Source
from edge_backbones.engines.gpu.dlpack import ON_GPU
from edge_backbones.errors import InputError, ResourceError
from edge_backbones.images import decode
from edge_backbones.images.config import ImageConfig
from edge_backbones.images.fit import fit, to_input
from edge_backbones.installation import pip_install
from edge_backbones.runtime import preprocess as module
from edge_backbones.runtime.backbone import EdgeBackbone
from edge_backbones.spec import FrameSpec, InputSpec, ShapeRange
from edge_backbones.testing import SPEC, NumpySession, make_bundle, pooling_input

HEIGHT, WIDTH = 32, 48
CONFIG = ImageConfig(mean=(0.1, 0.2, 0.3), std=(0.5, 0.25, 0.75), crop_pct=0.9)
PLAIN = ImageConfig(mean=(0.1, 0.2, 0.3), std=(0.5, 0.25, 0.75), crop_pct=1.0)
GREY_CONFIG = ImageConfig(mean=(0.4,), std=(0.3,), crop_pct=1.0)
RANDOM = np.random.default_rng(0)
FRAME = RANDOM.integers(0, 256, (70, 90, 3), dtype=np.uint8)
EXACT = RANDOM.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)


def taking(name: str = "pixel_values", channels: int = 3, dtype: str = "float32") -> InputSpec:
    fixed = ShapeRange.fixed
    return InputSpec(
        name=name, channels=channels, batch=fixed(1), height=fixed(HEIGHT), width=fixed(WIDTH), pixel_dtype=dtype
    )


def taking_frames(color: str) -> InputSpec:
    spec = FrameSpec(height=40, width=60, color=color)
    return msgspec.structs.replace(taking(), name="frame", frame=spec)


def over(config: ImageConfig | None = CONFIG, input: InputSpec | None = None, **options: Any) -> EdgeBackbone:
    input = input or taking()
    return EdgeBackbone(SPEC, input, NumpySession(input), image=config, **options)


def expected(*frames: np.ndarray, config: ImageConfig = CONFIG, input: InputSpec | None = None) -> np.ndarray:
    return to_input(np.stack([fit(frame, config, HEIGHT, WIDTH) for frame in frames]), config, input or taking())


class OnlyDlpack:
    """A tensor of another library: DLPack and nothing else."""

    device = 1

    def __init__(self, array: np.ndarray) -> None:
        self._array = array

    def __dlpack__(self, **options: object) -> object:
        return self._array.__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.device, 0


class OnTheGpu(OnlyDlpack):
    device = next(iter(ON_GPU))


# ---- what is taken --------------------------------------------------------------------------------------------------


def test_an_exact_frame_is_normalised_as_numpy_does():
    (found,) = over(PLAIN).preprocess(EXACT)
    wanted = (EXACT / 255 - np.array(PLAIN.mean)) / np.array(PLAIN.std)
    assert (found.dtype, found.shape) == (np.float32, (3, HEIGHT, WIDTH))
    assert found.flags.c_contiguous
    np.testing.assert_allclose(found, wanted.transpose(2, 0, 1), rtol=0, atol=1e-6)


@pytest.mark.parametrize("order", ["rgb", "bgr"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_frame_is_prepared_by_the_code_of_run(order, dtype):
    config, input = msgspec.structs.replace(CONFIG, channel_order=order), taking(dtype=dtype)
    found = over(config, input).preprocess(FRAME)
    assert found.dtype == dtype
    np.testing.assert_array_equal(found, expected(FRAME, config=config, input=input))


@pytest.mark.parametrize("frame", [FRAME, EXACT])
def test_a_bundle_that_takes_frames_gets_frames(frame):
    input = taking("image")
    found = over(PLAIN, input).preprocess(frame)
    assert (found.dtype, found.shape) == (np.uint8, (1, HEIGHT, WIDTH, 3))
    np.testing.assert_array_equal(found[0], fit(frame, PLAIN, HEIGHT, WIDTH))


def test_a_frame_that_fits_as_it_is_is_not_copied():
    backbone = over(PLAIN, taking("image"))
    frame = EXACT.copy()
    assert np.shares_memory(backbone.preprocess(frame), frame)
    assert np.shares_memory(backbone.preprocess(OnlyDlpack(frame)), frame)
    assert not np.shares_memory(backbone.preprocess([frame, frame]), frame)
    frame.flags.writeable = False
    assert backbone.preprocess(frame).flags.writeable  # of its own: engines take writable memory only


@pytest.mark.parametrize("make", [list, tuple])
def test_a_list_is_a_batch_whatever_the_sizes(make):
    images = make([FRAME, FRAME[:50, 10:], OnlyDlpack(EXACT)])
    np.testing.assert_array_equal(over().preprocess(images), expected(FRAME, FRAME[:50, 10:], EXACT))


@pytest.mark.parametrize("name", ["pixel_values", "image"])
@pytest.mark.parametrize("frame", [FRAME, EXACT])
def test_bgr_frames_are_reversed(name, frame):
    input = taking(name)
    found = over(PLAIN, input).preprocess(np.ascontiguousarray(frame[..., ::-1]), color="bgr")
    np.testing.assert_array_equal(found, expected(frame, config=PLAIN, input=input))
    assert found.flags.c_contiguous


@pytest.mark.parametrize("frame", [FRAME[..., 0], FRAME[..., :1], EXACT[..., 1]])
@pytest.mark.parametrize("interpolation", ["bicubic", "nearest"])  # here, and by Pillow
def test_grey_frames_become_what_the_network_takes(frame, interpolation):
    grey = msgspec.structs.replace(GREY_CONFIG, interpolation=interpolation)
    colour = msgspec.structs.replace(PLAIN, interpolation=interpolation)
    one, three = frame.reshape(*frame.shape[:2], 1), np.repeat(frame.reshape(*frame.shape[:2], 1), 3, axis=2)
    for name in ("pixel_values", "image"):
        input = taking(name, 1)
        wanted = expected(one, config=grey, input=input)
        for color in ("gray", "rgb"):  # one channel has no order
            np.testing.assert_array_equal(over(grey, input).preprocess(frame, color=color), wanted)
        found = over(colour, taking(name)).preprocess(frame, color="gray")
        np.testing.assert_array_equal(found, expected(three, config=colour, input=taking(name)))


@pytest.mark.parametrize("kind", [str, Path])
@pytest.mark.parametrize("channels", [1, 3])
def test_files_are_read_as_run_reads_them(tmp_path, kind, channels):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(FRAME).save(tmp_path / "turned.png", exif=exif)
    config, input = (CONFIG, taking()) if channels == 3 else (GREY_CONFIG, taking(channels=1))
    pixels = np.asarray(decode.open_image(tmp_path / "turned.png", channels))
    assert pixels.shape[:2] == (90, 70)
    found = over(config, input).preprocess(kind(tmp_path / "turned.png"))
    np.testing.assert_array_equal(found, expected(pixels, config=config, input=input))
    with Image.open(tmp_path / "turned.png") as picture:
        np.testing.assert_array_equal(over(config, input).preprocess(picture), found)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "CMYK", "1"])
def test_pictures_of_pillow_are_converted_as_files_are(mode):
    picture = Image.fromarray(FRAME).convert(mode)
    np.testing.assert_array_equal(over().preprocess(picture), expected(np.asarray(picture.convert("RGB"))))


def test_a_picture_of_as_many_channels_as_the_network_takes_stays_as_it_is():
    config = ImageConfig(mean=(0.5,) * 4, std=(0.5,) * 4)
    picture, input = Image.fromarray(FRAME).convert("RGBA"), taking(channels=4)
    wanted = to_input(fit(picture, config, HEIGHT, WIDTH)[None], config, input)
    np.testing.assert_array_equal(over(config, input).preprocess(picture), wanted)


def test_a_size_that_may_vary_is_the_one_that_run_takes():
    range_ = ShapeRange(min=16, opt=32, max=64)
    input = InputSpec(name="pixel_values", channels=3, batch=range_, height=range_, width=range_)
    assert over(CONFIG, input).preprocess(FRAME).shape == (1, 3, 32, 32)


def test_an_opened_bundle_its_copies_and_the_command_agree(tmp_path, monkeypatch):
    """from_pretrained carries the preprocessing and the number of threads."""
    import copy
    import pickle

    from edge_backbones.cli import run

    bundle = make_bundle(tmp_path / "pool.bundle", pooling_input(1, HEIGHT, WIDTH))
    Image.fromarray(FRAME).save(tmp_path / "photo.png")
    wanted = expected(FRAME, config=bundle.manifest.image)
    used = []
    image_to_input = module.image_to_input
    monkeypatch.setattr(module, "image_to_input", lambda *a: used.append(a[-1]) or image_to_input(*a))
    with EdgeBackbone.from_pretrained(bundle.path, threads=1) as backbone:
        for opened in (backbone, copy.deepcopy(backbone), pickle.loads(pickle.dumps(backbone))):
            np.testing.assert_array_equal(opened.preprocess(tmp_path / "photo.png"), wanted)
        maps = backbone(backbone.preprocess(FRAME)).feature_maps
    assert set(used) == {1}
    run.run(bundle.path, tmp_path / "photo.png", tmp_path / "features", picture=False)
    with np.load(tmp_path / "features" / "photo.npz") as written:
        for stage, feature_map in zip(SPEC.out_features, maps, strict=True):
            np.testing.assert_array_equal(written[stage], feature_map[0])


# ---- what is refused ------------------------------------------------------------------------------------------------

FIXABLE = {
    "CHW": (FRAME.transpose(2, 0, 1), FRAME),
    "RGBA": (np.concatenate([FRAME, FRAME[..., :1]], 2), FRAME),
    "floats to 1": ((FRAME / 255).astype(np.float32), FRAME),
    "floats to 255": (FRAME.astype(np.float32), FRAME),
    "CHW of another library": (OnlyDlpack(FRAME.transpose(2, 0, 1)), FRAME),
    "int64": (FRAME.astype(np.int64), FRAME),
}


@pytest.mark.parametrize("name", FIXABLE)
@pytest.mark.parametrize("color", ["rgb", "bgr"])
def test_the_fix_works_when_it_is_typed(name, color):
    frame, wanted = FIXABLE[name]
    backbone = over()
    with pytest.raises(InputError, match=r"^a frame is uint8 \(rows, columns, 3\), got ") as refused:
        backbone.preprocess(frame, color=color)
    assert "\n" not in str(refused.value)
    (code,) = re.findall(r"pass (.*)$", str(refused.value))
    fixed = eval(code, {"np": np, "frame": frame})
    np.testing.assert_array_equal(backbone.preprocess(fixed, color=color), backbone.preprocess(wanted, color=color))


def test_a_colour_frame_for_a_grey_network_is_refused_and_the_fix_works():
    backbone = over(GREY_CONFIG, taking(channels=1))
    with pytest.raises(InputError, match=r"got uint8 \(70, 90, 3\): pass ") as refused:
        backbone.preprocess(FRAME)
    (code,) = re.findall(r"pass (.*)$", str(refused.value))
    fixed = eval(code, {"np": np, "PIL": PIL, "frame": FRAME})
    np.testing.assert_array_equal(backbone.preprocess(fixed), backbone.preprocess(Image.fromarray(FRAME)))


def test_a_batch_in_one_array_is_refused_and_the_list_of_it_works():
    batch, backbone = np.stack([FRAME, FRAME]), over()
    for given in (batch, OnlyDlpack(batch)):
        with pytest.raises(InputError, match=r"got uint8 \(2, 70, 90, 3\), which is a batch: pass list\(frames\)$"):
            backbone.preprocess(given)
    np.testing.assert_array_equal(backbone.preprocess(list(batch)), expected(FRAME, FRAME))
    ready = backbone.preprocess(FRAME)
    with pytest.raises(InputError, match=r"pass normalised pixel_values to the backbone as they are$"):
        backbone.preprocess(ready)


@pytest.mark.parametrize("color", ["bgr", "gray", "nv12", "yuyv"])
def test_frames_of_the_camera_itself_go_in_as_they_are(color):
    backbone = over(input=taking_frames(color))
    frames = RANDOM.integers(0, 256, (2, *backbone.input.frame.shape), dtype=np.uint8)
    of_another_library = OnlyDlpack(frames[0])
    for given in (frames[0], frames[:1], of_another_library):
        np.testing.assert_array_equal(backbone.preprocess(given, color=color), frames[:1])
    np.testing.assert_array_equal(backbone.preprocess(list(frames), color=color), frames)
    with pytest.raises(InputError, match=r"which is a batch: pass list\(frames\)$"):
        backbone.preprocess(frames, color=color)
    masked = np.ma.MaskedArray(frames[0], mask=frames[0] < 9)
    with pytest.raises(InputError, match=r"masked values, and an engine has no mask: pass array.filled\(0\)"):
        backbone.preprocess(masked, color=color)


@pytest.mark.parametrize("color", ["nv12", "yuyv"])
def test_a_yuv_frame_for_a_grey_network_is_refused_and_the_fix_works(color):
    backbone = over(GREY_CONFIG, taking(channels=1))
    spec = FrameSpec(height=40, width=60, color=color)
    frame = RANDOM.integers(0, 256, spec.shape, dtype=np.uint8)
    with pytest.raises(
        InputError, match=f"^{color} frames have colours, and this backbone takes 1 channel: "
    ) as refused:
        backbone.preprocess(frame, color=color)
    code = re.search(r"pass their luma, (.+), with color='gray'$", str(refused.value))[1]
    luma = frame[:40] if color == "nv12" else frame[..., :1]
    given = eval(code, {"frame": frame})
    np.testing.assert_array_equal(backbone.preprocess(given, color="gray"), backbone.preprocess(luma, color="gray"))
    five = ImageConfig(mean=(0.4,) * 5, std=(0.3,) * 5)
    with pytest.raises(InputError, match=r"takes 5 channels: pass frames \(height, width, 5\) and leave out color="):
        over(five, taking(channels=5)).preprocess(frame, color=color)


def test_the_bytes_of_a_file_are_refused_and_the_fix_works():
    file = io.BytesIO()
    Image.fromarray(FRAME).save(file, "png")
    data, backbone = file.getvalue(), over()
    with pytest.raises(InputError, match=r"got a bytes: pass .* for the bytes of a file$") as refused:
        backbone.preprocess(data)
    (code,) = re.findall(r": pass (.*) for the bytes", str(refused.value))
    np.testing.assert_array_equal(
        backbone.preprocess(eval(code, {"PIL": PIL, "io": io, "data": data})), expected(FRAME)
    )


@pytest.mark.parametrize(
    ("given", "color", "message"),
    [
        (FRAME[..., 0], "rgb", r"got uint8 \(70, 90\): pass color='gray'$"),
        (FRAME[..., :1], "rgb", r"got uint8 \(70, 90, 1\): pass color='gray'$"),
        (FRAME, "gray", r"a frame is uint8 \(rows, columns, 1\), got uint8 \(70, 90, 3\): pass "),
        (FRAME, "BGR", "^color must be 'rgb', 'bgr', 'gray', 'nv12' or 'yuyv', got 'BGR'$"),
        ([], "rgb", "got an empty list: pass one image$"),
        ((), "rgb", "got an empty tuple: pass one image$"),
        (None, "rgb", "got None: the camera or the file that should give it gave nothing$"),
        ([FRAME, FRAME[..., :2]], "rgb", r"^images\[1\]: a frame is uint8 .*its last axis is not of 3 channels"),
        (5, "rgb", "got a int: pass one of these$"),
        (np.float32(1), "rgb", "got a float32: pass one of these$"),
        (iter([FRAME]), "rgb", r": pass list\(images\)$"),
        ({"image": FRAME}, "rgb", r"got a dict: pass list\(images\)$"),
        ([FRAME.tolist()], "rgb", r"got a list: pass numpy\.asarray\(frame, numpy\.uint8\) for numbers$"),
        (np.ma.masked_less(FRAME, 9), "rgb", r"a frame has \d+ masked values"),
        (OnTheGpu(FRAME), "rgb", "this one is on a GPU: copy it to the host first$"),
        (np.zeros((0, 4, 3), np.uint8), "rgb", "it has no pixels"),
        ("no/such.jpg", "rgb", r"^no/such\.jpg cannot be read: No such file"),
        (".", "rgb", r"^\. is a folder, preprocess takes files: pass a list of the files in it$"),
        ("photo.jpg", "bgr", r"color='bgr' is for arrays, and photo\.jpg is a file, .*: leave it out$"),
        (Image.new("RGB", (9, 9)), "bgr", "color='bgr' is for arrays, and this is a picture of Pillow"),
        (Image.new("I;16", (9, 9)), "rgb", "^a picture of Pillow has pixels of more than 8 bits"),
        (Image.new("RGB", (0, 9)), "rgb", "a picture has pixels, got 0 x 9"),
    ],
)
def test_what_is_no_image_is_refused_with_the_reason(given, color, message):
    with pytest.raises(InputError, match=message) as refused:
        over().preprocess(given, color=color)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("channels", "color", "fix"), [(1, "bgr", "with color='gray'"), (5, "gray", "leave out color=")]
)
def test_a_color_that_the_network_has_no_channels_for_is_refused(channels, color, fix):
    config = ImageConfig(mean=(0.5,) * channels, std=(0.5,) * channels)
    with pytest.raises(
        InputError, match=f"color='{color}' does not fit: this backbone takes {channels} channel.*{fix}$"
    ):
        over(config, taking(channels=channels)).preprocess(FRAME, color=color)


def test_a_broken_picture_of_pillow_is_refused(tmp_path):
    Image.fromarray(FRAME).save(tmp_path / "x.jpg")
    content = (tmp_path / "x.jpg").read_bytes()
    picture = Image.open(io.BytesIO(content[: len(content) // 2]))
    with picture, pytest.raises(InputError, match=r"^a picture of Pillow does not decode as an image: "):
        over().preprocess(picture)
    with pytest.raises(InputError, match=r"^a picture of Pillow does not decode as an image: "):
        over().preprocess(picture)  # closed by now


def test_a_backbone_without_preprocessing_says_so():
    with pytest.raises(
        InputError, match=r"not from a bundle .* open one with EdgeBackbone\.from_pretrained, or pass image="
    ):
        over(None).preprocess(FRAME)


def test_preprocessing_that_cannot_be_repeated_is_refused_by_name():
    notes = ("it does not resize", f"OddProcessor turns pictures: {USE_PROCESSOR}")
    source = Source(library="transformers", name="odd", weights="pretrained", preprocessing_notes=notes)
    with pytest.raises(
        InputError, match=r"^OddProcessor turns pictures: prepare .*: preprocess\(images, processor=processor\)"
    ):
        over(source=source).preprocess(FRAME)
    harmless = msgspec.structs.replace(source, preprocessing_notes=notes[:1])
    np.testing.assert_array_equal(over(source=harmless).preprocess(FRAME), expected(FRAME))
    np.testing.assert_array_equal(over(source=source).preprocess(FRAME, processor=processor), expected(FRAME))


def test_a_processor_that_makes_tensors_of_torch_alone_is_asked_for_them():
    asked = []

    def fast(*, images, return_tensors):
        asked.append(return_tensors)
        if return_tensors != "pt":
            raise ValueError("Only returning PyTorch tensors is currently supported.")
        return processor(images=images, return_tensors="np")

    np.testing.assert_array_equal(over().preprocess(FRAME, processor=fast), expected(FRAME))
    assert asked == ["np", "pt"]


def test_a_lack_of_memory_is_told(monkeypatch):
    def fails(*_: object) -> None:
        raise MemoryError("cannot allocate")

    monkeypatch.setattr(module, "image_to_input", fails)
    with pytest.raises(ResourceError, match="preprocessing failed"):
        over().preprocess(FRAME)


# ---- a processor ----------------------------------------------------------------------------------------------------


def processor(images: list[Any], return_tensors: str) -> dict[str, Any]:
    assert return_tensors == "np"
    return {"pixel_values": expected(*(np.asarray(image) for image in images))}


def test_a_processor_is_given_checked_images_and_its_pixels_are_returned(tmp_path):
    Image.fromarray(FRAME).save(tmp_path / "x.png")
    backbone = over(None)  # which needs no preprocessing of its own
    found = backbone.preprocess([tmp_path / "x.png", FRAME], processor=processor)
    np.testing.assert_array_equal(found, expected(FRAME, FRAME))
    found = backbone.preprocess(FRAME[..., ::-1].copy(), color="bgr", processor=processor)
    np.testing.assert_array_equal(found, expected(FRAME))
    unscaled = over(None).preprocess(FRAME, processor=lambda **_: {"pixel_values": EXACT.transpose(2, 0, 1)[None]})
    assert unscaled.dtype == np.float32
    np.testing.assert_array_equal(unscaled[0], EXACT.transpose(2, 0, 1))
    half = over(None, taking(dtype="float16")).preprocess(FRAME, processor=processor)
    assert half.dtype == np.float16


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (np.zeros((1, 3, 9, 9), np.float32), r"pixel_values of shape \(1, 3, 9, 9\) does not fit: this engine takes"),
        (np.zeros((1, 3, HEIGHT, WIDTH), np.int64), "pixel_values of dtype int64 does not fit"),
        (
            None,
            r"function gives no pixel_values for these images \(KeyError: 'pixel_values'\): pass an image processor",
        ),
    ],
)
def test_what_a_processor_makes_is_checked_against_the_engine(made, message):
    def odd(**_: object) -> dict[str, Any]:
        return {} if made is None else {"pixel_values": made}

    with pytest.raises(InputError, match=message):
        over().preprocess(FRAME, processor=odd)


def test_a_processor_for_a_bundle_of_frames_is_refused():
    with pytest.raises(
        InputError, match=r"this bundle takes raw frames and normalises them itself: leave out processor="
    ):
        over(PLAIN, taking("image")).preprocess(FRAME, processor=processor)


# ---- a device -------------------------------------------------------------------------------------------------------

DEVICE = """
import sys
sys.modules.update(dict.fromkeys(("torch", "transformers", "timm", "onnx", "PIL", "openvino")))
import numpy as np
from edge_backbones import EdgeBackbone, ImageConfig, InputSpec, ShapeRange
fixed, from_there = ShapeRange.fixed, set(sys.modules)
# What testing.py has, without OpenVINO.
from edge_backbones import BackboneSpec
SPEC = BackboneSpec(stage_names=("a",), out_features=("a",), out_indices=(0,), channels=(3,), strides=((4, 4),),
    num_features=(3,), layouts=("NCHW",))
taken = InputSpec(name="pixel_values", channels=3, batch=fixed(1), height=fixed(32), width=fixed(48))
image = ImageConfig(mean=(0.1, 0.2, 0.3), std=(0.5, 0.25, 0.75), crop_pct=0.9, interpolation=sys.argv[2])
backbone = EdgeBackbone(SPEC, taken, None, image=image)
assert "edge_backbones.images.decode" not in sys.modules
"""


def on_a_device(code: str, interpolation: str = "bicubic", path: str = "") -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", DEVICE + code, path, interpolation], capture_output=True, text=True
    )


def test_frames_need_numpy_and_msgspec_alone(tmp_path):
    np.save(tmp_path / "frame.npy", FRAME)
    done = on_a_device(
        "np.save(sys.argv[1] + '.made.npy', backbone.preprocess(np.load(sys.argv[1])))",
        path=str(tmp_path / "frame.npy"),
    )
    assert done.returncode == 0, done.stderr
    np.testing.assert_array_equal(np.load(tmp_path / "frame.npy.made.npy"), expected(FRAME))


@pytest.mark.parametrize(
    ("given", "interpolation"), [("'photo.jpg'", "bicubic"), ("np.zeros((70, 90, 3), np.uint8)", "nearest")]
)
def test_what_needs_pillow_names_its_install_command(given, interpolation):
    done = on_a_device(f"backbone.preprocess({given})", interpolation)
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("edge_backbones.errors.MissingDependencyError: "), done.stderr
    assert last.endswith(pip_install("images"))


def test_opening_a_bundle_imports_no_code_of_images(tmp_path):
    make_bundle(tmp_path / "pool.bundle")
    code = (
        "import sys\nfrom edge_backbones import EdgeBackbone\n"
        "EdgeBackbone.from_pretrained(sys.argv[1]).close()\n"
        "loaded = {'PIL', 'edge_backbones.images.fit', 'edge_backbones.images.decode'} & set(sys.modules)\n"
        "assert not loaded, loaded"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "pool.bundle")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# ---- the bytes of files ---------------------------------------------------------------------------------------------


def encoded(picture: np.ndarray, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(picture).save(file, kind, **options)
    return file.getvalue()


@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_the_bytes_of_files_are_prepared_as_the_files_are(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = [encoded(FRAME, exif=exif), encoded(EXACT, "JPEG", exif=exif)]
    files = [tmp_path / "a.png", tmp_path / "b.jpg"]
    for file, content in zip(files, data, strict=True):
        file.write_bytes(content)
    made = module.prepare_encoded(data, CONFIG, taking(), threads=1)
    np.testing.assert_array_equal(made, over().preprocess(files))
    assert made.flags.c_contiguous


@pytest.mark.parametrize(
    ("data", "channels", "said"),
    [
        (b"", 3, r"images\[1\]: an image of 0 bytes does not decode as an image: it is empty"),
        (b"\x89PNG\r\n\x1a\n", 3, r"images\[1\]: an image of 8 bytes does not decode as an image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n", 3, r"images\[1\]: .* no format that is read here does"),
        (encoded(FRAME), 4, r"images\[0\]: cannot be read: image files have 1 or 3 channels, this backbone takes 4"),
    ],
)
def test_bytes_that_are_no_image_are_refused_by_their_place(data, channels, said):
    with pytest.raises(InputError, match=said):
        module.prepare_encoded([encoded(FRAME), data], CONFIG, taking(channels=channels), threads=1)
