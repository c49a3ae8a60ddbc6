"""What a bundle is fed is what the source's own image processor makes of the same photograph, pixel by pixel."""

from __future__ import annotations

import dataclasses
import json

import msgspec
import numpy as np
import pytest
import timm
import torch
import transformers
from PIL import Image

from build_scripts.processor_table import CASES, NOTED, classes, largest_difference, pictures
from edge_backbones import BuildOptions, Bundle, EdgeBackbone, build_bundle
from edge_backbones.bundle.manifest import Source
from edge_backbones.errors import InputError, SourceError
from edge_backbones.images.config import ImageConfig
from edge_backbones.images.fit import fit
from edge_backbones.spec import InputSpec, Precision, ShapeRange
from edge_backbones.testing import SPEC, NumpySession, pooling_input
from edge_backbones.toolchain.sources import processors
from edge_backbones.toolchain.sources.base import SourceOptions
from edge_backbones.toolchain.sources.load import load_source
from edge_backbones.toolchain.sources.module_source import ModuleSource

FP32 = {"precisions": (Precision.FP32,), "torchscript": False}
MADE = [(case, kind) for case in CASES for kind in classes(case)]
UNUSUAL = {
    "image_mean": [0.1, 0.2, 0.3],
    "image_std": [0.4, 0.5, 0.6],
    "resample": 2,
    "size": {"height": 64, "width": 96},
    "rescale_factor": 1 / 127.5,
}


def resnet(**options):
    torch.manual_seed(0)
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1], out_features=["stage2"], **options
    )
    return transformers.ResNetBackbone(config).eval()


def rt_detr():
    torch.manual_seed(0)
    backbone = transformers.RTDetrResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1], layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )  # fmt: skip
    config = transformers.RTDetrConfig(
        backbone_config=backbone, encoder_in_channels=[16, 24, 32], d_model=32, encoder_hidden_dim=32,
        encoder_attention_heads=2, decoder_attention_heads=2, decoder_layers=1, encoder_ffn_dim=32, decoder_ffn_dim=32,
        num_queries=10, feat_strides=[8, 16, 32], decoder_in_channels=[32, 32, 32],
    )  # fmt: skip
    return transformers.RTDetrForObjectDetection(config).eval()


def saved(tmp_path, model, processor):
    model.save_pretrained(tmp_path / "source")
    processor.save_pretrained(tmp_path / "source")
    return tmp_path / "source"


def loaded(source, **options):
    return load_source(source, SourceOptions(**options))


@pytest.mark.parametrize(
    ("case", "kind"),
    MADE,
    ids=[f"{kind.__name__}-{case.of.partition(',')[0].replace(' ', '_')}" for case, kind in MADE],
)
def test_fit_and_graph_give_the_pixels_of_the_processor(case, kind):
    processor = kind(**case.options)
    found = processors.of_processor(processor, "given")
    pillow = getattr(processor, "backend", "pil") == "pil" and not kind.__name__.endswith("Fast")
    assert not found.differs
    assert largest_difference(processor, found) <= (0.01 if pillow else 1.01)


PREPARED = ("ViT", "ConvNext", "RTDetr", "MobileViT")


@pytest.mark.parametrize(
    ("case", "kind"),
    [made for made in MADE if made[0].name in PREPARED],
    ids=lambda made: getattr(made, "__name__", ""),
)
def test_a_backbone_prepares_photographs_as_the_processor_does(case, kind):
    """By the preprocessing that the bundle records, and by the processor itself."""
    processor = kind(**case.options)
    found = processors.of_processor(processor, "given")
    photographs = list(pictures().values())
    # The fast one of transformers 4.44 makes tensors of torch alone.
    theirs = np.concatenate([processor(images=p, return_tensors="pt")["pixel_values"].numpy() for p in photographs])
    height, width = (ShapeRange.fixed(side) for side in theirs.shape[2:])
    input = InputSpec(name="pixel_values", channels=3, batch=ShapeRange.fixed(1), height=height, width=width)
    backbone = EdgeBackbone(SPEC, input, NumpySession(input), image=found.config)
    std = np.array(found.config.std[::-1] if found.config.channel_order == "bgr" else found.config.std)
    levels = np.abs(backbone.preprocess(photographs) - theirs) * (255 * std)[:, None, None]
    assert levels.max() <= 1.01
    bgr = [np.asarray(photograph)[..., ::-1] for photograph in photographs]
    for given, color in ((photographs, "rgb"), (bgr, "bgr")):
        np.testing.assert_array_equal(backbone.preprocess(given, color=color, processor=processor), theirs)


@pytest.mark.parametrize("case", NOTED, ids=[case.name for case in NOTED])
def test_a_backbone_refuses_to_prepare_what_only_the_processor_can(case):
    record = Source(library="transformers", name="noted", weights="pretrained")
    for kind in classes(case):
        found = processors.of_processor(kind(**case.options), "given")
        backbone = EdgeBackbone(
            SPEC, pooling_input(), NumpySession(pooling_input()), found.written_into(record), image=found.config
        )
        with pytest.raises(
            InputError, match=rf"^{kind.__name__} .*: preprocess\(images, processor=processor\) calls it$"
        ):
            backbone.preprocess(pictures()["landscape"])


def test_every_class_that_a_backbone_comes_with_is_compared():
    """A release of transformers with another class for one of its backbones has to add a case."""
    from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES as names
    from transformers.models.auto.modeling_auto import MODEL_FOR_BACKBONE_MAPPING

    used = set()
    for config in MODEL_FOR_BACKBONE_MAPPING:
        given = names.get(config.model_type) or ()
        used |= {name for name in (given.values() if isinstance(given, dict) else given) if name}
    compared = {f"{case.name}ImageProcessor{end}" for case in (*CASES, *NOTED) for end in ("", "Pil", "Fast")}
    assert used <= compared


@pytest.mark.parametrize("case", NOTED, ids=[case.name for case in NOTED])
def test_a_transform_that_cannot_be_written_down_is_noted_by_name(case):
    for kind in classes(case):
        found = processors.of_processor(kind(**case.options), "given")
        assert all(kind.__name__ in note for note in found.notes)
        assert found.notes


def test_a_client_with_weights_gives_its_features_for_its_own_processor_s_pixels(tmp_path):
    """RT-DETR is trained on pixels in 0..1, without normalisation."""
    model, processor = rt_detr(), transformers.RTDetrImageProcessor(size={"height": 96, "width": 128})
    options = BuildOptions(from_model=True, input="image", **FP32)
    result = build_bundle(saved(tmp_path, model, processor), tmp_path / "b", options=options)
    manifest = result.bundle.manifest
    assert manifest.preprocessing.startswith("preprocessing: both sides to 96x128 (bilinear")
    assert "read from RTDetrImageProcessor in preprocessor_config.json" in manifest.preprocessing
    photograph = pictures()["landscape"]
    pixels = processor(images=photograph, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        expected = model.model.backbone(pixels, torch.ones(1, 96, 128, dtype=torch.bool))
    with EdgeBackbone.from_pretrained(tmp_path / "b") as backbone:
        maps = backbone(fit(photograph, manifest.image, 96, 128)[None]).feature_maps
    for actual, reference in zip(maps, expected, strict=True):
        reference = reference[0].numpy()
        assert np.linalg.norm(actual - reference) < 0.02 * np.linalg.norm(reference)  # of a grey level here and there


@pytest.mark.parametrize("path", ["folder", "from_model", "live", "live client", "config", "processor_config"])
def test_every_path_reads_the_processor_that_was_saved(tmp_path, path):
    processor = transformers.ViTImageProcessor(**UNUSUAL)
    is_client = path in ("from_model", "live client")
    folder = saved(tmp_path, rt_detr() if is_client else resnet(), processor)
    source, options = folder, {}
    if path == "live":
        source = transformers.ResNetBackbone.from_pretrained(str(folder))
    elif path == "live client":
        source = transformers.RTDetrForObjectDetection.from_pretrained(str(folder))
    elif path == "config":
        source, options = folder / "config.json", {"weights": "random:0"}
    elif path == "processor_config":
        content = json.loads((folder / "preprocessor_config.json").read_text())
        (folder / "preprocessor_config.json").unlink()
        (folder / "processor_config.json").write_text(json.dumps({"image_processor": content, "processor_class": "X"}))
    found = loaded(source, from_model=is_client, **options)
    config = found.image_config
    assert np.allclose(config.mean, np.array(UNUSUAL["image_mean"]) / 2, atol=1e-6)
    assert np.allclose(config.std, np.array(UNUSUAL["image_std"]) / 2, atol=1e-6)
    assert (config.crop_mode, config.crop_pct, config.interpolation) == ("squash", 1.0, "bilinear")
    assert (found.height, found.width) == (64, 96)
    name = "processor_config.json" if path == "processor_config" else "preprocessor_config.json"
    assert found.source.preprocessing == f"{type(processor).__name__} in {name}"


@pytest.mark.parametrize("suffix", ["Fast", "Pil", "FeatureExtractor"])
def test_names_of_other_releases_mean_the_same_class(tmp_path, suffix):
    folder = saved(tmp_path, resnet(), transformers.ViTImageProcessor(**UNUSUAL))
    path = folder / "preprocessor_config.json"
    content = json.loads(path.read_text())
    content["image_processor_type"] = f"ViT{suffix}" if suffix == "FeatureExtractor" else f"ViTImageProcessor{suffix}"
    path.write_text(json.dumps(content))
    assert np.allclose(loaded(folder).image_config.mean, [0.05, 0.1, 0.15], atol=1e-6)


def test_a_class_that_this_transformers_lacks_is_taken_by_its_values_and_noted(tmp_path):
    folder = saved(tmp_path, resnet(), transformers.ViTImageProcessor(**UNUSUAL))
    path = folder / "preprocessor_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "image_processor_type": "NewImageProcessor"}))
    found = loaded(folder)
    assert np.allclose(found.image_config.mean, [0.05, 0.1, 0.15], atol=1e-6)
    assert "has no class NewImageProcessor" in found.source.preprocessing_notes[0]


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        '{"image_processor_type": "ViTImageProcessor", "size": "big"}',
        '{"image_processor_type": "ViTImageProcessor", "size": {"height": 1000000, "width": 1000000}}',
        '{"image_processor_type": "ViTImageProcessor", "image_mean": [NaN, NaN, NaN]}',
        '{"image_mean": [0.5], "image_std": [0.0], "do_rescale": true}',
        "[" * 100_000,
    ],
)
def test_a_broken_processor_file_is_named(tmp_path, content):
    folder = saved(tmp_path, resnet(), transformers.ViTImageProcessor())
    (folder / "preprocessor_config.json").write_text(content)
    with pytest.raises(SourceError, match=r"preprocessor_config\.json"):
        loaded(folder)


def test_a_source_that_says_nothing_is_told(tmp_path):
    found = loaded(resnet().config, weights="random:0")
    assert "says nothing of its preprocessing" in found.source.preprocessing_notes[0]
    with pytest.raises(SourceError, match="holds no image processor"):
        loaded(resnet(), image=tmp_path)


@pytest.mark.parametrize("form", ["processor", "folder", "file", "timm", "timm dictionary", "config"])
def test_a_live_model_can_be_given_its_own(tmp_path, form):
    processor = transformers.ViTImageProcessor(**{**UNUSUAL, "rescale_factor": 1 / 255})
    processor.save_pretrained(tmp_path)
    own = ImageConfig(
        mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6), interpolation="bilinear", crop_mode="squash", crop_pct=1.0
    )
    timm_config = {
        "mean": own.mean,
        "std": own.std,
        "interpolation": "bilinear",
        "crop_mode": "squash",
        "crop_pct": 1.0,
    }
    image = {
        "processor": processor,
        "folder": str(tmp_path),
        "file": tmp_path / "preprocessor_config.json",
        "timm": timm.models.PretrainedCfg(**timm_config),
        "timm dictionary": timm_config,
        "config": own,
    }[form]
    for source in (resnet(), ModuleSource(module=resnet().embedder, stage_names=["out"])):
        config = loaded(source, image=image, img_size=(64, 96)).image_config
        assert np.allclose(config.mean, own.mean)
        assert np.allclose(config.std, own.std)
        assert (config.crop_mode, config.interpolation) == ("squash", "bilinear")
    with pytest.raises(SourceError, match="image= takes"):
        loaded(resnet(), image=3)


def test_a_module_source_takes_a_processor():
    source = ModuleSource(
        module=resnet().embedder, stage_names=["out"], image=transformers.ViTImageProcessor(**UNUSUAL)
    )
    assert loaded(source).source.preprocessing.endswith("given")


def test_the_processor_of_a_client_goes_before_timm_s_configuration(tmp_path):
    """DETR with a timm backbone is fed by DetrImageProcessor."""
    config = transformers.DetrConfig(
        use_timm_backbone=True, backbone="resnet18", use_pretrained_backbone=False, d_model=32, encoder_layers=1,
        decoder_layers=1, encoder_ffn_dim=32, decoder_ffn_dim=32, encoder_attention_heads=2, decoder_attention_heads=2,
        num_queries=5,
    )  # fmt: skip
    torch.manual_seed(0)
    processor = transformers.DetrImageProcessor(
        size={"shortest_edge": 80, "longest_edge": 133}, image_mean=[0.1, 0.2, 0.3]
    )
    found = loaded(saved(tmp_path, transformers.DetrForObjectDetection(config), processor), from_model=True)
    assert found.image_config.mean == (0.1, 0.2, 0.3)
    assert (found.image_config.crop_mode, found.height, found.width) == ("pad", 96, 160)


def test_frames_are_refused_where_they_cannot_be_prepared(tmp_path):
    kind = classes(next(case for case in NOTED if case.name == "ZoeDepth"))[0]
    options = BuildOptions(input="image", image=kind(), height=64, width=96, **FP32)
    with pytest.raises(SourceError, match=r"ZoeDepthImageProcessor.* cannot be repeated.*pixel_values"):
        build_bundle(resnet(), tmp_path / "b", options=options)
    result = build_bundle(resnet(), tmp_path / "b", options=dataclasses.replace(options, input="pixel_values"))
    assert any("ZoeDepth" in note for note in result.notes)


def test_channels_are_reversed_in_the_graph(tmp_path):
    """A network that is trained on BGR, with another mean for each channel, from uint8 RGB frames."""
    config = ImageConfig(mean=(0.1, 0.5, 0.8), std=(0.2, 0.4, 0.6), channel_order="bgr")
    module = torch.nn.Conv2d(3, 4, 3, 2)
    source = ModuleSource(module=module, stage_names=["out"], size=(32, 48), image=config)
    build_bundle(source, tmp_path / "b", options=BuildOptions(input="image", **FP32))
    frames = np.random.default_rng(0).integers(0, 256, (2, 32, 48, 3), np.uint8)
    pixels = ((frames / 255 - config.mean) / config.std)[..., ::-1].transpose(0, 3, 1, 2)
    with torch.no_grad():
        expected = module(torch.from_numpy(pixels.copy()).float()).numpy()
    with EdgeBackbone.from_pretrained(tmp_path / "b") as backbone:
        assert np.allclose(backbone(frames).feature_maps[0], expected, atol=1e-4)


def test_the_record_survives_the_manifest(tmp_path):
    processor = transformers.ConvNextImageProcessor(size={"shortest_edge": 64}, crop_pct=0.875)
    build_bundle(resnet(), tmp_path / "b", options=BuildOptions(image=processor, **FP32))
    manifest = Bundle.open(tmp_path / "b").manifest
    assert manifest.image == processors.of_processor(processor, "given").config
    assert msgspec.json.decode(msgspec.json.encode(manifest.image), type=ImageConfig) == manifest.image
    assert "short side to 73, centre 64x64" in manifest.preprocessing


@pytest.mark.parametrize("crop", [224, 211, 256, 320])
@pytest.mark.parametrize("side", range(224, 300, 7))
def test_a_crop_is_of_the_side_that_was_asked_for(crop, side):
    config = ImageConfig(mean=(0.0,), std=(1.0,), crop_pct=processors._share(crop, side))
    assert fit(Image.new("L", (side, side)), config, crop, crop).shape[:2] == (crop, crop)
    assert int(crop / config.crop_pct) == side
