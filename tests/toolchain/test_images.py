"""Preprocessing on the device is timm's evaluation transform, bit for bit."""

from __future__ import annotations

import sys
from pathlib import Path

import msgspec
import networks
import numpy as np
import pytest
import timm
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image
from timm.data import create_transform, resolve_data_config

from edge_backbones.errors import InputError
from edge_backbones.images import resample
from edge_backbones.images.config import ImageConfig
from edge_backbones.images.decode import list_images, open_image
from edge_backbones.images.fit import fit, network_input, to_input
from edge_backbones.runtime.backbone import EdgeBackbone
from edge_backbones.testing import SPEC, NumpySession

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def timm_transform(config: ImageConfig, height: int, width: int):
    return create_transform(
        (len(config.mean), height, width),
        is_training=False,
        interpolation=config.interpolation,
        mean=config.mean,
        std=config.std,
        crop_pct=config.crop_pct,
        crop_mode=config.crop_mode,
    )


def timm_pixels(image: Image.Image, config: ImageConfig, height: int, width: int) -> np.ndarray:
    """timm's transform up to and without ToTensor and Normalize."""
    for step in timm_transform(config, height, width).transforms[:-2]:
        image = step(image)
    return np.atleast_3d(np.asarray(image))


@pytest.fixture(scope="module")
def sources(photographs) -> dict[str, Image.Image]:
    coffee = Image.fromarray(photographs[0])
    return {
        "landscape": coffee,
        "portrait": coffee.transpose(Image.Transpose.ROTATE_90).crop((0, 3, 333, 600)),
        "square": Image.fromarray(photographs[1]),
        "smaller than the target": Image.fromarray(photographs[2][:41, :67]),
        "grey": coffee.convert("L"),
    }


@pytest.mark.parametrize("source", ["landscape", "portrait", "square", "smaller than the target", "grey"])
@pytest.mark.parametrize("size", [(64, 64), (96, 64), (65, 127), (224, 224)])
@pytest.mark.parametrize("crop_mode", ["center", "squash", "border"])
def test_fit_is_timms_evaluation_transform(sources, source, size, crop_mode):
    image = sources[source]
    channels = 1 if source == "grey" else 3
    for crop_pct in (0.875, 0.9, 0.95, 1.0):
        for interpolation in ("bicubic", "bilinear"):
            config = ImageConfig(
                mean=MEAN[:channels],
                std=STD[:channels],
                crop_pct=crop_pct,
                crop_mode=crop_mode,
                interpolation=interpolation,
            )
            if source == "grey" and crop_mode == "border":
                continue  # timm's border fill is a colour: its transform takes no grey image
            pixels = fit(image, config, *size)
            assert pixels.shape == (*size, channels)
            assert pixels.dtype == np.uint8
            np.testing.assert_array_equal(pixels, timm_pixels(image, config, *size), err_msg=str(config))


side = st.integers(8, 200)


@settings(max_examples=150, deadline=None)
@given(
    source=st.tuples(side, side),
    size=st.tuples(st.integers(8, 96), st.integers(8, 96)),
    crop_pct=st.floats(0.5, 1.0),
    crop_mode=st.sampled_from(["center", "squash", "border"]),
)
def test_fit_is_timms_evaluation_transform_at_any_size(source, size, crop_pct, crop_mode):
    assume(max(source) <= 8 * min(source))  # timm's own transform fails on thin strips
    noise = np.random.default_rng(0).integers(0, 256, (*source, 3), dtype=np.uint8)
    config = ImageConfig(mean=MEAN, std=STD, crop_pct=crop_pct, crop_mode=crop_mode)
    image = Image.fromarray(noise)
    np.testing.assert_array_equal(fit(image, config, *size), timm_pixels(image, config, *size))


@pytest.mark.parametrize("frame", [(1080, 1920), (720, 1280), (1200, 1200), (1920, 1080), (230, 4000)])
@pytest.mark.parametrize("content", ["noise", "extremes", "photograph"])
def test_a_camera_frame_is_fitted_as_timm_does(sources, frame, content):
    """Of a million sums some end so close to a half that float32 rounds them to the wrong side."""
    random = np.random.default_rng(0)
    if content == "photograph":
        pixels = np.asarray(sources["landscape"].resize(frame[::-1]))
    else:
        pixels = random.integers(0, 256, (*frame, 3), dtype=np.uint8)
        if content == "extremes":
            pixels = np.where(pixels < 128, 0, 255).astype(np.uint8)
    for crop_pct, size, interpolation in ((0.95, (224, 224), "bicubic"), (0.875, (224, 288), "bilinear")):
        config = ImageConfig(mean=MEAN, std=STD, crop_pct=crop_pct, interpolation=interpolation)
        expected = timm_pixels(Image.fromarray(pixels), config, *size)
        for threads in (1, 2, 3, 8):
            np.testing.assert_array_equal(fit(pixels, config, *size, threads), expected, err_msg=f"{threads} threads")
        np.testing.assert_array_equal(fit(pixels[:, ::-1], config, *size), fit(pixels[:, ::-1].copy(), config, *size))


@settings(max_examples=150, deadline=None)
@given(
    source=st.tuples(st.integers(20, 400), st.integers(20, 400)),
    size=st.tuples(st.integers(8, 96), st.integers(8, 96)),
    crop_pct=st.sampled_from([0.8, 0.875, 0.9, 0.95, 1.0]),
    interpolation=st.sampled_from(["nearest", "box", "bilinear", "hamming", "bicubic", "lanczos"]),
    threads=st.integers(1, 9),
)
def test_every_filter_is_pillows_whatever_the_threads(source, size, crop_pct, interpolation, threads):
    assume(max(source) <= 8 * min(source))  # timm's own transform fails on thin strips
    noise = Image.fromarray(np.random.default_rng(1).integers(0, 256, (*source, 3), dtype=np.uint8))
    config = ImageConfig(mean=MEAN, std=STD, crop_pct=crop_pct, interpolation=interpolation)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(resample, "_BAND_PIXELS", 500)
        found = fit(noise, config, *size, threads)
    np.testing.assert_array_equal(found, timm_pixels(noise, config, *size))


def test_a_large_frame_is_shared_by_threads_and_a_small_one_is_not(monkeypatch):
    pools = []
    pool = resample.ThreadPoolExecutor
    monkeypatch.setattr(resample, "ThreadPoolExecutor", lambda threads: pools.append(threads) or pool(threads))
    config = ImageConfig(mean=MEAN, std=STD)
    for frame, threads, expected in (
        ((1080, 1920), 2, [2]),
        ((1080, 1920), 64, [8]),  # a quarter of a million pixels each
        ((1080, 1920), 1, []),
        ((480, 640), 8, []),
        ((1920, 1080), 2, [2]),
    ):
        pools.clear()
        fit(np.zeros((*frame, 3), np.uint8), config, 224, 224, threads)
        assert pools == expected
    with pytest.raises(InputError, match="threads must be at least 1, got 0"):
        fit(np.zeros((40, 60, 3), np.uint8), config, 32, 32, 0)


def test_camera_frames_need_no_pillow(monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ImportError):
        import PIL  # noqa: F401
    frame = np.full((120, 160, 5), 9, np.uint8)  # of any number of channels
    assert (fit(frame, ImageConfig(mean=(0.5,) * 5, std=(0.5,) * 5), 32, 32) == 9).all()


def test_transparency_is_pillows(sources):
    """Of networks that take as many channels."""
    for mode, channels in (("RGBA", 4), ("LA", 2)):
        config = ImageConfig(mean=(0.5,) * channels, std=(0.5,) * channels)
        image = sources["landscape"].convert(mode)
        expected = np.atleast_3d(np.asarray(image.resize((48, 32), Image.Resampling.BICUBIC)))
        squash = msgspec.structs.replace(config, crop_mode="squash", crop_pct=1.0)
        np.testing.assert_array_equal(fit(image, squash, 32, 48), expected)


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic", "lanczos"])
def test_a_frame_is_fitted_like_the_picture_of_it(sources, interpolation):
    for image in (sources["landscape"], sources["portrait"], sources["grey"]):
        pixels = np.atleast_3d(np.asarray(image))
        channels = pixels.shape[2]
        config = ImageConfig(mean=MEAN[:channels], std=STD[:channels], interpolation=interpolation)
        np.testing.assert_array_equal(fit(pixels, config, 64, 96), timm_pixels(image, config, 64, 96))


@pytest.mark.parametrize("size", [(40, 60), (32, 32)])
def test_the_result_is_memory_of_its_own(size):
    frame = np.zeros((40, 60, 3), np.uint8)
    fitted = fit(frame, ImageConfig(mean=MEAN, std=STD, crop_pct=1.0), *size)
    fitted[...] = 7
    assert not frame.any()


@pytest.mark.parametrize("crop_mode", ["center", "squash", "border"])
@pytest.mark.parametrize("source", [(1, 300), (300, 1)])
def test_a_thin_strip_is_fitted_too(crop_mode, source):
    config = ImageConfig(mean=MEAN, std=STD, crop_mode=crop_mode)
    pixels = fit(Image.fromarray(np.full((*source, 3), 200, np.uint8)), config, 16, 24)
    assert pixels.shape == (16, 24, 3)
    assert 200 in pixels


@pytest.mark.parametrize("size", [(64, 64), (60, 92)])
def test_to_input_is_timms_normalisation(sources, size):
    config = ImageConfig(mean=MEAN, std=STD)
    expected = timm_transform(config, *size)(sources["portrait"]).numpy()
    pixels = fit(sources["portrait"], config, *size)[None]
    values = to_input(pixels, config, networks.input_spec(*size))
    assert values.dtype == np.float32
    assert values.flags["C_CONTIGUOUS"]
    np.testing.assert_allclose(values[0], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "mobilenetv3_small_050", "test_efficientnet"])
def test_a_backbone_prepares_files_pictures_and_tensors_as_timms_transform_does(sources, tmp_path, name):
    """By the data configuration that timm has of the network."""
    loaded = networks.trained_like(name)
    input = networks.input_spec(loaded.height, loaded.width)
    backbone = EdgeBackbone(loaded.spec, input, NumpySession(input), loaded.source, image=loaded.image_config)
    transform = create_transform(**resolve_data_config({}, model=timm.create_model(name)))
    images = [image for kind, image in sources.items() if kind != "grey"]
    expected = np.stack([transform(image).numpy() for image in images])
    frames = [np.asarray(image) for image in images]
    tensors = [torch.from_numpy(frame.copy()) for frame in frames]
    files = [tmp_path / f"{index}.png" for index in range(len(images))]
    for image, file in zip(images, files, strict=True):
        image.save(file)
    for kind in (images, frames, tensors, files):
        found = backbone.preprocess(kind)
        assert (found.dtype, found.shape) == (np.float32, expected.shape)
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)
    np.testing.assert_array_equal(backbone.preprocess([frame[..., ::-1] for frame in frames], color="bgr"), found)


def test_a_tensor_in_the_layout_of_torch_is_refused_and_the_fix_works(sources):
    input = networks.input_spec(64, 64)
    backbone = EdgeBackbone(SPEC, input, NumpySession(input), image=ImageConfig(mean=MEAN, std=STD))
    pixels = np.asarray(sources["landscape"])
    frame = torch.from_numpy(pixels.transpose(2, 0, 1).copy())
    with pytest.raises(InputError, match=r"got uint8 \(3, 400, 600\): pass ") as refused:
        backbone.preprocess(frame)
    fixed = eval(str(refused.value).rpartition(": pass ")[2], {"np": np, "frame": frame})
    np.testing.assert_array_equal(backbone.preprocess(fixed), backbone.preprocess(pixels))


def test_a_camera_frame_stays_as_it_is_and_is_normalised_for_the_bare_network(photographs):
    frames = networks.crops(photographs, 2, 20, 30)
    spec = networks.input_spec(20, 30, name="image")
    np.testing.assert_array_equal(to_input(frames, networks.PLAIN, spec), frames)
    np.testing.assert_allclose(
        network_input(frames, networks.PLAIN, spec), networks.normalised(frames), rtol=0, atol=1e-6
    )


# What a viewer does to the stored pixels, per EXIF 2.3: written with numpy, not with Pillow's own table.
ORIENTATIONS = {
    1: lambda p: p,
    2: lambda p: p[:, ::-1],
    3: lambda p: p[::-1, ::-1],
    4: lambda p: p[::-1],
    5: lambda p: p.transpose(1, 0, 2),
    6: lambda p: np.rot90(p, -1),
    7: lambda p: p[::-1, ::-1].transpose(1, 0, 2),
    8: lambda p: np.rot90(p, 1),
}


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_a_photograph_is_opened_upright(tmp_path: Path, photographs, orientation):
    pixels = photographs[2][:40, :70]
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(pixels).save(tmp_path / "turned.png", exif=exif)
    np.testing.assert_array_equal(np.asarray(open_image(tmp_path / "turned.png")), ORIENTATIONS[orientation](pixels))


@pytest.mark.parametrize(
    ("mode", "channels", "expected"), [("L", 3, "RGB"), ("RGBA", 3, "RGB"), ("P", 3, "RGB"), ("RGB", 1, "L")]
)
def test_colour_modes_are_converted(tmp_path: Path, photographs, mode, channels, expected):
    Image.fromarray(photographs[0][:30, :40]).convert(mode).save(tmp_path / "x.png")
    assert open_image(tmp_path / "x.png", channels).mode == expected


@pytest.mark.parametrize("content", [b"", b"not an image", b"\xff\xd8\xff\xe0 cut off"])
def test_a_file_that_does_not_decode_is_named(tmp_path: Path, content):
    path = tmp_path / "broken.jpg"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"broken\.jpg does not decode"):
        open_image(path)


def test_a_truncated_photograph_is_named(tmp_path: Path, photographs):
    path = tmp_path / "half.jpg"
    Image.fromarray(photographs[0]).save(path)
    path.write_bytes(path.read_bytes()[:4000])
    with pytest.raises(InputError, match=r"half\.jpg does not decode"):
        open_image(path)


def test_image_files_of_other_than_one_or_three_channels_are_refused(tmp_path: Path):
    with pytest.raises(InputError, match="takes 4: pass arrays"):
        open_image(tmp_path / "x.png", channels=4)


def test_images_are_listed_sorted_whatever_the_depth_and_case(tmp_path: Path):
    (tmp_path / "b").mkdir()
    (tmp_path / "folder.jpg").mkdir()
    for name in ("b/1.PNG", "a.jpeg", "notes.txt", "c.webp"):
        (tmp_path / name).touch()
    assert [p.relative_to(tmp_path).as_posix() for p in list_images(tmp_path)] == ["a.jpeg", "b/1.PNG", "c.webp"]


@pytest.mark.parametrize(
    "wrong",
    [
        {"crop_pct": 0.0},
        {"crop_pct": 4.01},
        {"short_edge": 224},
        {"size_multiple": 0},
        {"std": (0.2, 0.2)},
        {"std": (0.2, 0.0, 0.2)},
        {"std": (0.2, float("nan"), 0.2)},
        {"mean": (0.2, float("inf"), 0.2)},
        {"mean": (), "std": ()},
    ],
)
def test_an_impossible_image_config_is_refused(wrong):
    with pytest.raises(ValueError):
        ImageConfig(**{"mean": MEAN, "std": STD, **wrong})
