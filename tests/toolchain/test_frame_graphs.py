"""The preprocessing inside a graph: from a camera's frame to the pixels and the maps that `fit` and the network give."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

import av
import networks
import numpy as np
import onnxruntime
import openvino
import pytest
import torch
from av.video.reformatter import ColorRange, Colorspace, Interpolation
from msgspec import structs
from PIL import Image

from build_scripts.photographs import photographs, photographs_of_things
from edge_backbones import (
    BuildOptions,
    EdgeBackbone,
    InputError,
    build_bundle,
    compile_bundle,
    verify_bundle,
)
from edge_backbones.bench.compare import read_images
from edge_backbones.bundle.reader import Bundle, load_golden
from edge_backbones.cli import main as cli
from edge_backbones.difference import relative_error
from edge_backbones.engines.openvino import frame_graph
from edge_backbones.errors import SourceError
from edge_backbones.images.camera import frame_spec, from_rgb, to_rgb
from edge_backbones.images.config import ImageConfig
from edge_backbones.images.fit import fit, image_to_input, network_input
from edge_backbones.report.page import write_report
from edge_backbones.spec import YUV_COLORS, FrameSpec, InputSpec, ShapeRange
from edge_backbones.toolchain.artifacts import LoadedBackbone
from edge_backbones.toolchain.export import export_front
from edge_backbones.toolchain.frame import FromFrame

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
COLORS = ("rgb", "bgr", "gray", "nv12", "yuyv")
EXACT_SWSCALE = Interpolation.POINT | Interpolation.FULL_CHR_H_INT | Interpolation.ACCURATE_RND


def config(**fields: object) -> ImageConfig:
    return ImageConfig(**{"mean": MEAN, "std": STD, **fields})


# What the networks of timm and transformers are trained with, and the corners of it.
CONFIGS = {
    "timm": config(),
    "squash, bilinear": config(crop_mode="squash", interpolation="bilinear", crop_pct=1.0),
    "squash and crop, lanczos": config(crop_mode="squash", interpolation="lanczos", crop_pct=0.9),
    "border": config(crop_mode="border", interpolation="bilinear"),
    "border of black": config(crop_mode="border", fill="black", channel_order="bgr"),
    "pad as detection does": config(crop_mode="pad", short_edge=80, long_edge=100, size_multiple=4),
    "crop larger than the picture": config(crop_pct=1.5),
    "transformers, torchvision": config(arithmetic="torchvision", rounding="transformers", interpolation="bilinear"),
    "without antialiasing": config(sampling="centres", interpolation="bilinear"),
    "caffe's channels": config(channel_order="bgr", mean=(0.1, 0.2, 0.3)),
    "box": config(interpolation="box"),
    "nearest": config(interpolation="nearest", crop_pct=1.0),
}
IN_FLOAT = config(arithmetic="float", sampling="corners", interpolation="bilinear")


def taking(frame: FrameSpec, height: int = 64, width: int = 96, channels: int = 3, batch: int = 1) -> InputSpec:
    fixed = ShapeRange.fixed
    return InputSpec(
        name="frame", channels=channels, batch=fixed(batch), height=fixed(height), width=fixed(width), frame=frame
    )


def eight_photographs() -> dict[str, Image.Image]:
    """Landscape and portrait."""
    found = photographs_of_things()
    chosen = {name: found[name] for name in sorted(found)[:8]}
    return {n: p.transpose(Image.Transpose.ROTATE_90) if i % 2 else p for i, (n, p) in enumerate(chosen.items())}


def even(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture)[: picture.height // 2 * 2, : picture.width // 2 * 2]


def levels(pixel_values: np.ndarray, of: ImageConfig) -> np.ndarray:
    """Grey levels of normalised pixels, in the order of the network's channels."""
    mean, std = (np.array(v)[:: -1 if of.channel_order == "bgr" else 1, None, None] for v in (of.mean, of.std))
    return 255 * (pixel_values * std + mean)


def fronts(of: ImageConfig, input: InputSpec):
    """The part of a graph that takes frames, in torch, OpenVINO and ONNX Runtime."""
    model = export_front(of, input).model.SerializeToString()
    module = FromFrame(None, of, input).eval()
    core = openvino.Core()
    compiled = core.compile_model(core.read_model(model), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    session = onnxruntime.InferenceSession(model)
    return {
        "torch": lambda frames: module(torch.from_numpy(frames)).numpy(),
        "openvino": lambda frames: compiled(frames)[0],
        "onnxruntime": lambda frames: session.run(None, {"frame": frames})[0],
    }


@pytest.mark.parametrize("color", COLORS)
def test_eight_photographs_become_the_networks_own_pixels(color):
    of = CONFIGS["timm"]
    for name, photograph in eight_photographs().items():
        picture = even(photograph)
        spec = frame_spec(*picture.shape[:2], color)
        frame = from_rgb(picture, spec).copy()
        wanted = fit(np.broadcast_to(to_rgb(frame, spec), picture.shape), of, 224, 224).transpose(2, 0, 1)
        module = FromFrame(None, of, taking(spec, 224, 224)).eval()
        off = np.abs(levels(module(torch.from_numpy(frame[None])).numpy()[0], of) - wanted)
        assert off.max() < 1e-3, name  # the same levels; the rest is the rounding of the normalised values


@pytest.mark.parametrize(("matrix", "range"), list(itertools.product(("bt601", "bt709"), ("limited", "full"))))
@pytest.mark.parametrize("color", YUV_COLORS)
def test_yuv_frames_differ_by_two_levels_at_most_from_converting_them_first_with_swscale(color, matrix, range):
    of = CONFIGS["timm"]
    for name, photograph in eight_photographs().items():
        picture = even(photograph)
        spec = frame_spec(*picture.shape[:2], color, matrix, range)
        frame = from_rgb(picture, spec).copy()
        packed = frame[..., 0] if color == "nv12" else frame
        theirs = av.VideoFrame.from_ndarray(packed, format={"nv12": "nv12", "yuyv": "yuyv422"}[color]).reformat(
            format="rgb24",
            src_colorspace={"bt601": Colorspace.ITU601, "bt709": Colorspace.ITU709}[matrix],
            src_color_range={"limited": ColorRange.MPEG, "full": ColorRange.JPEG}[range],
            dst_color_range=ColorRange.JPEG,
            interpolation=EXACT_SWSCALE,
        )
        wanted = fit(theirs.to_ndarray(), of, 224, 224).transpose(2, 0, 1)
        module = FromFrame(None, of, taking(spec, 224, 224)).eval()
        off = np.abs(levels(module(torch.from_numpy(frame[None])).numpy()[0], of) - wanted)
        assert off.max() < 2 + 1e-3, name
        assert off.mean() < 0.1, name


@pytest.mark.parametrize("size", [(120, 160), (161, 90), (64, 96), (40, 50)], ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_every_way_to_preprocess_is_repeated_to_the_last_bit(name, size):
    of = CONFIGS[name]
    frames = np.random.default_rng(0).integers(0, 256, (2, *size, 3), dtype=np.uint8)
    input = taking(frame_spec(*size, "rgb"), batch=2)
    wanted = network_input(frames, of, input)
    for library, run in fronts(of, input).items():
        np.testing.assert_allclose(levels(run(frames), of), levels(wanted, of), atol=1e-3, err_msg=library)


def test_arithmetic_in_floating_point_is_repeated_to_a_level():
    frames = np.random.default_rng(0).integers(0, 256, (2, 120, 160, 3), dtype=np.uint8)
    input = taking(frame_spec(120, 160, "rgb"), batch=2)
    wanted = levels(network_input(frames, IN_FLOAT, input), IN_FLOAT)
    for library, run in fronts(IN_FLOAT, input).items():
        off = np.abs(levels(run(frames), IN_FLOAT) - wanted)
        assert off.max() < 1 + 1e-3, library
        assert (off > 0.5).mean() < 5e-3, library  # ties: of aligned corners there are many


@pytest.mark.parametrize("of", [config(), config(channel_order="bgr"), config(crop_mode="border")], ids=str)
@pytest.mark.parametrize("color", COLORS)
def test_colours_orders_and_borders_together(of, color):
    spec = frame_spec(90, 122, color)
    frames = np.random.default_rng(1).integers(0, 256, (3, *spec.shape), dtype=np.uint8)
    input = taking(spec, 48, 80, batch=3)
    for library, run in fronts(of, input).items():
        np.testing.assert_allclose(
            levels(run(frames), of), levels(network_input(frames, of, input), of), atol=1e-3, err_msg=library
        )


def test_a_network_that_takes_grey():
    of = ImageConfig(mean=(0.4,), std=(0.3,), crop_mode="border")
    spec = frame_spec(90, 122, "gray")
    frames = np.random.default_rng(1).integers(0, 256, (1, *spec.shape), dtype=np.uint8)
    input = taking(spec, 48, 80, channels=1)
    for library, run in fronts(of, input).items():
        np.testing.assert_allclose(run(frames), network_input(frames, of, input), atol=1e-5, err_msg=library)


def test_most_of_a_large_frame_is_not_read():
    """Of 4K, the crop's rows and columns alone; and each resized pixel is multiplied with its neighbourhood only."""
    module = FromFrame(None, config(), taking(frame_spec(2160, 3840, "rgb"), 224, 224))
    across, down = module.resize.across, module.resize.down
    products = sum(one.weights.numel() for one in across) * 2160 + sum(one.weights.numel() for one in down) * 224
    assert products < 0.2 * (224 * 3840 * 2160 + 224 * 2160 * 224)
    assert module.planes._columns.stop - module.planes._columns.start < 2200


# ---- whole bundles

OPTIONS = {"cache": None, "height": 64, "width": 96}


@pytest.fixture(scope="module")
def network() -> LoadedBackbone:
    """Two stages of test_resnet, which no build changes: random weights would get other statistics from other images."""
    loaded = networks.trained_like("test_resnet", img_size=(64, 96), out_indices=(1, 4))
    return dataclasses.replace(loaded, source=structs.replace(loaded.source, weights="module"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The photographs as files of other sizes than the frames."""
    path = tmp_path_factory.mktemp("photographs")
    for name, photograph in photographs().items():
        for part in range(2):
            width = photograph.width // 2
            photograph.crop((part * width, 0, (part + 1) * width, photograph.height)).save(path / f"{name}{part}.png")
    return path


@pytest.fixture(scope="module")
def plain(network: LoadedBackbone, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle that takes pixel_values, in fp32 and int8."""
    options = BuildOptions(**OPTIONS, precisions=("fp32", "int8"), torchscript=False)
    return build_bundle(
        network, tmp_path_factory.mktemp("plain") / "b.bundle", images=folder, options=options
    ).bundle.path


@pytest.fixture(scope="module", params=("bgr", "gray", "nv12"))
def of_frames(request, network, plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same network for frames, with the same ranges."""
    options = BuildOptions(
        **OPTIONS,
        input="frame",
        frame=(240, 360),
        color=request.param,
        precisions=("fp32", "int8"),
        calibration=plain,
        flavours=("torchscript",),
    )
    return build_bundle(network, tmp_path_factory.mktemp("frames") / "b.bundle", options=options).bundle.path


def frames_of(spec: FrameSpec) -> np.ndarray:
    """Photographs as this camera would deliver them."""
    pictures = [np.asarray(p.resize((spec.width, spec.height))) for p in photographs().values()]
    return np.stack([from_rgb(picture, spec) for picture in pictures])


def test_maps_of_frames_are_those_of_fit_and_the_plain_bundle(plain, of_frames):
    spec = Bundle.open(of_frames).manifest.input.frame
    frames = frames_of(spec)
    for engine in ("fp32", "int8"):
        with (
            EdgeBackbone.from_pretrained(plain, engine=engine) as fitted,
            EdgeBackbone.from_pretrained(of_frames, engine=engine) as whole,
        ):
            for frame in frames:
                seen = fitted.preprocess(np.broadcast_to(to_rgb(frame, spec), (spec.height, spec.width, 3)))
                for wanted, got in zip(fitted(seen).feature_maps, whole(frame).feature_maps, strict=True):
                    cosine = np.vdot(wanted, got) / np.linalg.norm(wanted) / np.linalg.norm(got)
                    assert cosine >= 0.999
                    assert engine == "int8" or relative_error(got, wanted) <= 1e-3


def test_a_frame_goes_in_as_it_comes(of_frames):
    spec = Bundle.open(of_frames).manifest.input.frame
    frames = frames_of(spec)
    with EdgeBackbone.from_pretrained(of_frames, engine="fp32", device="cpu") as backbone:
        assert backbone.input.frame == spec
        wanted = backbone(frames).feature_maps
        assert [m.shape[2:] for m in wanted] == [(16, 24), (2, 3)]
        one = backbone(frames[1])
        assert all(np.allclose(w[1:2], g, rtol=1e-5, atol=1e-6) for w, g in zip(wanted, one.feature_maps, strict=True))
        if spec.shape[2] == 1:
            for given in (frames[1, ..., 0], frames[..., 0]):
                again = backbone(given).feature_maps
                assert np.allclose(wanted[1][1], again[1][-len(frames) :][0 if len(again[1]) == 1 else 1], atol=1e-6)
        pitched = np.zeros((spec.shape[0], spec.shape[1] + 32, spec.shape[2]), np.uint8)[:, : spec.shape[1]]
        pitched[...] = frames[1]
        assert np.array_equal(one.feature_maps[0], backbone(pitched).feature_maps[0])
        with pytest.raises(InputError, match=r"frame of shape .* does not fit: this engine takes uint8 NHWC"):
            backbone(frames[1, 2:])
        with pytest.raises(InputError, match="frame of dtype float32 does not fit"):
            backbone(frames[1].astype(np.float32))
        mapped = list(backbone.map(frames))
        assert np.array_equal(mapped[1].feature_maps[0], one.feature_maps[0])


def test_preprocess_makes_frames_of_anything(of_frames, tmp_path):
    spec = Bundle.open(of_frames).manifest.input.frame
    picture = photographs()["coffee"].resize((spec.width, spec.height))
    pixels = np.asarray(picture)
    with EdgeBackbone.from_pretrained(of_frames, engine="fp32", device="cpu") as backbone:
        frame = from_rgb(pixels, spec)
        picture.save(tmp_path / "coffee.png")
        for given in (pixels, picture, tmp_path / "coffee.png"):
            assert np.array_equal(backbone.preprocess(given), frame[None])
        assert np.array_equal(backbone.preprocess(pixels[..., ::-1], color="bgr"), frame[None])
        own = np.ascontiguousarray(frame)
        assert np.shares_memory(backbone.preprocess(own, color=spec.color), own)
        large = backbone.preprocess(picture.resize((800, 450)))
        assert large.shape == (1, *spec.shape)
        assert backbone.preprocess([pixels, picture]).shape == (2, *spec.shape)
        with pytest.raises(InputError, match="takes raw frames and normalises them itself: leave out processor="):
            backbone.preprocess(pixels, processor=lambda **_: None)


def test_what_else_is_done_with_a_bundle(of_frames, folder, tmp_path):
    bundle = Bundle.open(of_frames)
    manifest = bundle.manifest
    assert f"preprocessing in the graph, of {manifest.input.frame}: " in manifest.preprocessing
    assert load_golden(bundle).inputs["opt"].shape == (4, *manifest.input.frame.shape)
    assert {record.key.flavour for record in manifest.engines} == {"openvino", "torchscript"}
    assert all(report.passed for report in verify_bundle(of_frames, allow_host_code=True))
    write_report(of_frames, tmp_path / "page.html")
    assert manifest.input.frame.color in (tmp_path / "page.html").read_text()
    assert read_images(folder, bundle, 2).shape == (2, *manifest.input.frame.shape)


def test_other_flavours_take_the_same_graph(of_frames):
    compile_bundle(of_frames, flavour="onnxruntime", precisions=("fp32",))
    spec = Bundle.open(of_frames).manifest.input.frame
    frame = frames_of(spec)[0]
    with (
        EdgeBackbone.from_pretrained(of_frames, engine="onnxruntime") as one,
        EdgeBackbone.from_pretrained(of_frames, engine="openvino") as other,
    ):
        found = zip(one(frame).feature_maps, other(frame).feature_maps, strict=True)
        assert all(np.vdot(a, b) / np.linalg.norm(a) / np.linalg.norm(b) > 0.99 for a, b in found)


def test_calibration_sees_what_the_camera_sees(network, folder, tmp_path):
    """Images become frames first: of a tall picture a wide camera sees the middle."""
    options = BuildOptions(
        **OPTIONS, input="frame", frame=(120, 320), color="nv12", precisions=("int8",), torchscript=False, golden=2
    )
    built = build_bundle(network, tmp_path / "b.bundle", images=folder, options=options)
    golden = load_golden(built.bundle).inputs["opt"]
    spec = options.frame_spec
    first = Image.open(folder / built.bundle.manifest.golden.images[0]).convert("RGB")
    input = built.bundle.manifest.input
    assert np.array_equal(golden[0], image_to_input(first, built.bundle.manifest.image, input))
    assert built.bundle.manifest.calibration.images == len(list(folder.iterdir())) - len(golden)
    assert spec == input.frame


@pytest.mark.parametrize("kind", ["frames", "pictures", "iterator", "none"])
def test_images_of_every_kind(kind, network, tmp_path):
    options = BuildOptions(
        **OPTIONS, input="frame", frame=(120, 160), color="yuyv", precisions=("fp32",), torchscript=False
    )
    pictures = [np.asarray(p) for p in photographs().values()]
    images = {
        "frames": frames_of(options.frame_spec),
        "pictures": pictures,
        "iterator": iter(pictures),
        "none": None,
    }[kind]
    built = build_bundle(network, tmp_path / "b.bundle", images=images, options=options)
    golden = load_golden(built.bundle).inputs["opt"]
    assert golden.shape[1:] == (120, 160, 2)
    assert kind != "frames" or any(np.array_equal(golden[0], frame) for frame in images)


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"input": "frame"}, InputError, r"add frame=\(1080, 1920\) \(--frame 1080x1920\)"),
        ({"frame": (48, 64)}, InputError, "frame is of input frame, and input is pixel_values: add input='frame'"),
        ({"color": "bgr", "yuv_range": "full"}, InputError, "color and yuv_range are of input frame"),
        ({"input": "frame", "frame": (48, 0)}, InputError, r"frame is the \(height, width\) .*, got \(48, 0\)"),
        ({"input": "frame", "frame": (48, 64), "color": "i420"}, InputError, "color must be rgb or bgr .* got 'i420'"),
        ({"input": "frame", "frame": (47, 64), "color": "nv12"}, InputError, "nv12 frames have even sides"),
        (
            {"input": "frame", "frame": (48, 64), "yuv_matrix": "bt709"},
            InputError,
            "of nv12 and yuyv, and color is rgb",
        ),
        ({"input": "frame", "frame": (48, 64), "pixels": "float16"}, InputError, "input is frame, which is uint8"),
        (
            {"input": "frame", "frame": (48, 64), "height": ShapeRange(min=64, opt=64, max=96), "width": 64},
            InputError,
            "frames are resized to one size, and height is 64..96",
        ),
        ({"input": "images"}, InputError, "input must be 'pixel_values', 'image' or 'frame', got 'images'"),
    ],
)
def test_options_that_mean_nothing(fields, error, message):
    with pytest.raises(error, match=message):
        BuildOptions(**fields)


@pytest.mark.parametrize(
    ("channels", "color", "message"),
    [
        (1, "rgb", r"this network takes 1 channels, and not rgb frames: take gray frames \(--color gray\)"),
        (1, "nv12", "this network takes 1 channels, and not nv12 frames: take gray frames"),
        (5, "rgb", "this network takes 5 channels, and not rgb frames: build it for pixel_values"),
    ],
)
def test_a_network_of_other_channels(channels, color, message, tmp_path):
    options = BuildOptions(
        **OPTIONS,
        weights="random:0",
        num_channels=channels,
        input="frame",
        frame=(48, 64),
        color=color,
        precisions=("fp32",),
    )
    with pytest.raises(SourceError, match=message):
        build_bundle("test_resnet", tmp_path / "b.bundle", options=options)
    assert not (tmp_path / "b.bundle").exists()


# ---- the command line


def test_build_and_run_from_the_command_line(folder, tmp_path, capsys):
    bundle, photo = tmp_path / "b.bundle", sorted(folder.iterdir())[0]
    options = ["--weights", "random:0", "--precision", "fp32", "--no-torchscript", "--no-report", "--size", "64x96"]
    frame = [
        "--input",
        "frame",
        "--frame",
        "120x160",
        "--color",
        "nv12",
        "--yuv-matrix",
        "bt709",
        "--yuv-range",
        "full",
    ]
    assert cli._run(["build", "test_resnet", str(bundle), *options, *frame]) == 0
    spec = Bundle.open(bundle).manifest.input.frame
    assert spec == frame_spec(120, 160, "nv12", "bt709", "full")
    assert "preprocessing in the graph, of nv12 frames of 120x160 (BT.709, full range)" in capsys.readouterr().err
    assert cli._run(["run", str(bundle), str(photo), "-o", str(tmp_path / "out")]) == 0
    with np.load(tmp_path / "out" / f"{photo.stem}.npz") as written, EdgeBackbone.from_pretrained(bundle) as backbone:
        maps = backbone(backbone.preprocess(photo)).feature_maps
        assert np.array_equal(written[backbone.out_features[-1]], maps[-1][0])
    with Image.open(tmp_path / "out" / f"{photo.stem}.png") as picture:
        assert picture.size[0] > 1000


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        (["--input", "frame"], "add frame=(1080, 1920) (--frame 1080x1920)"),
        (["--input", "frame", "--frame", "720x1280:720x1280:1080x1920"], "build a bundle for each size of frames"),
        (["--input", "frame", "--frame", "720"], "'720' is not one size HxW, as 1080x1920"),
        (["--frame", "720x1280"], "add input='frame' (--input frame)"),
        (["--input", "frame", "--frame", "721x1280", "--color", "nv12"], "nv12 frames have even sides, got 721 x 1280"),
        (["--input", "frame", "--frame", "720x1280", "--size", "32x32:64x64:96x96"], "frames are resized to one size"),
    ],
)
def test_what_is_typed_wrong_is_a_usage_error(typed, message, tmp_path, capsys):
    assert cli._run(["build", "test_resnet", str(tmp_path / "b.bundle"), "--precision", "fp32", *typed]) == 2
    said = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert message in said


# ---- what OpenVINO gets


@pytest.mark.parametrize("color", COLORS)
def test_openvino_cuts_out_what_is_read_before_bytes_become_floats(color):
    of, spec = CONFIGS["timm"], frame_spec(120, 320, color)
    input = taking(spec)
    core = openvino.Core()
    bytes_of_graph = export_front(of, input).model.SerializeToString()
    model, adapted = core.read_model(bytes_of_graph), core.read_model(bytes_of_graph)
    frame_graph.adapt(adapted)

    def floats(of_model: openvino.Model) -> int:
        """How many bytes of the frame are converted."""
        conversions = [node for node in of_model.get_ops() if node.get_type_name() == "Convert"]
        return sum(
            int(np.prod(node.output(0).shape))
            for node in conversions
            if node.input(0).get_element_type() == openvino.Type.u8 and node.output(0).get_target_inputs()
        )

    assert floats(adapted) < 0.8 * floats(model)
    frame = np.random.default_rng(0).integers(0, 256, (1, *spec.shape), dtype=np.uint8)
    settings = {"INFERENCE_PRECISION_HINT": "f32"}
    before, after = (core.compile_model(one, "CPU", settings)(frame)[0] for one in (model, adapted))
    assert np.array_equal(before, after)
