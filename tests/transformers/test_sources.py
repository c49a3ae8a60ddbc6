"""Every kind of source gives the network that it stands for, and is not changed. References are the source's own forward."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import importlib
import json
import math
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import huggingface_hub.utils
import numpy as np
import pytest
import timm
import torch
import transformers
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AutoBackbone,
    Dinov2Config,
    ResNetBackbone,
    ResNetConfig,
    ResNetForImageClassification,
    SwinConfig,
    TimmBackbone,
    TimmBackboneConfig,
)
from transformers.utils import logging

from build_scripts.architectures import TRANSFORMERS, transformers_config
from edge_backbones import BuildOptions, build_bundle
from edge_backbones.errors import HubUnreachableError, InputError, MissingDependencyError, SourceError
from edge_backbones.runtime.backbone import EdgeBackbone
from edge_backbones.spec import Precision
from edge_backbones.toolchain.artifacts import LoadedBackbone
from edge_backbones.toolchain.sources import base as common
from edge_backbones.toolchain.sources.base import SourceOptions
from edge_backbones.toolchain.sources.load import load_source
from edge_backbones.toolchain.sources.module_source import ModuleSource

HEIGHT, WIDTH = 64, 96
OFFERED = [name for name in TRANSFORMERS if name in CONFIG_MAPPING]
SMALL = {"embedding_size": 16, "hidden_sizes": [32, 48, 64, 80], "depths": [1, 1, 1, 1]}
ROUNDING = 1e-5  # relative; attention is written in two ways
FORMATS = {2: "NC", 3: "NLC", 4: "NCHW"}


def load(source: Any, *, size: tuple[int, int] | None = (HEIGHT, WIDTH), **options: Any):
    return load_source(source, SourceOptions(img_size=size, **options))


def pixels(height: int = HEIGHT, width: int = WIDTH, *, batch: int = 2, channels: int = 3) -> torch.Tensor:
    """Coarse patches and some noise: the images of a batch differ in more than what an average removes."""
    generator = torch.Generator().manual_seed(height + width + batch)
    coarse = nn.functional.interpolate(torch.randn(batch, channels, 4, 5, generator=generator), size=(height, width))
    return coarse + 0.5 * torch.randn(batch, channels, height, width, generator=generator)


def trained(net: nn.Module, seed: int = 0) -> nn.Module:
    """Numbers as training leaves them, in eval mode: nothing is 0 or 1, activations keep their size, positions matter."""
    generator = torch.Generator().manual_seed(seed)

    def normal(tensor: torch.Tensor, mean: float = 0.0) -> torch.Tensor:
        return mean + torch.randn(tensor.shape, generator=generator)

    with torch.no_grad():
        for name, tensor in net.named_parameters():
            if "position_emb" in name or "pos_embed" in name:
                tensor.copy_(normal(tensor))
            elif tensor.ndim > 1:
                tensor.copy_(normal(tensor) / math.sqrt(tensor[0].numel()))
            else:
                tensor.copy_(0.2 * normal(tensor, 0.0 if name.endswith("bias") else 4.0))
        for norm in net.modules():
            if isinstance(getattr(norm, "running_var", None), torch.Tensor):  # frozen norms too
                norm.running_mean.copy_(0.3 * normal(norm.running_mean))
                norm.running_var.copy_(torch.rand(norm.running_var.shape, generator=generator) + 0.5)
                norm.weight.copy_(0.3 * normal(norm.weight, 3.0))
                norm.bias.copy_(0.3 * normal(norm.bias))
    return net.eval()


def made(config: Any, seed: int = 0) -> Any:
    """The backbone that transformers makes of a configuration, as if trained, in eval mode."""
    if config.model_type == "timm_backbone":
        config.use_pretrained_backbone = False  # 4.44 would download in the constructor
    return trained(AutoBackbone.from_config(copy.deepcopy(config)), seed)


def resnet(**changes: Any) -> Any:
    return made(ResNetConfig(**{**SMALL, "out_indices": [1, -1], **changes}))


def timm_config(name: str, **arguments: Any) -> TimmBackboneConfig:
    config = TimmBackboneConfig(backbone=name, **arguments)
    config.use_pretrained_backbone = False
    return config


def maps(net: nn.Module, images: torch.Tensor, **arguments: Any) -> tuple[torch.Tensor, ...]:
    """What a user of the backbone gets."""
    with torch.no_grad():
        output = net(images, **arguments)
    return tuple(getattr(output, "feature_maps", output))


def outputs(loaded: LoadedBackbone, images: torch.Tensor) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        return dict(zip(loaded.spec.outputs, loaded.module(images), strict=True))


def assert_same(actual: Any, expected: Any) -> None:
    for one, reference in zip(actual, expected, strict=True):
        assert one.shape == reference.shape
        assert one.dtype == torch.float32
        error = float(torch.linalg.norm((one - reference).double()) / torch.linalg.norm(reference.double()))
        assert error < ROUNDING


def assert_gives(loaded: LoadedBackbone, expected: tuple[torch.Tensor, ...], images: torch.Tensor) -> None:
    """The maps are those, and the spec says of them what they are."""
    assert_same(list(outputs(loaded, images).values())[: len(expected)], expected)
    spec = loaded.spec
    assert spec.channels == tuple(m.shape[axes.index("C")] for m, axes in zip(expected, spec.layouts, strict=True))
    assert [len(axes) for axes in spec.layouts] == [m.ndim for m in expected]
    assert spec.out_features == tuple(spec.stage_names[i] for i in spec.out_indices)
    assert not any(module.training for module in loaded.module.modules())


def snapshot(net: Any) -> dict[str, Any]:
    """Everything of a module that loading could change."""

    def bytes_of(tensor: torch.Tensor) -> Any:
        content = tensor.detach().contiguous().view(-1).view(torch.uint8).numpy()
        return tensor.dtype, tensor.device, tuple(tensor.shape), hashlib.sha256(content).hexdigest(), tensor.data_ptr()

    seen: dict[str, Any] = {name: bytes_of(tensor) for name, tensor in net.state_dict().items()}
    seen["modules"] = [(name, type(module), module.training) for name, module in net.named_modules()]
    seen["gradients"] = [parameter.requires_grad for parameter in net.parameters()]
    seen["stages"] = [list(getattr(net, name, None) or []) for name in ("out_features", "out_indices", "stage_names")]
    seen["config"] = copy.deepcopy(net.config.to_dict()) if hasattr(net, "config") else None
    return seen


@contextlib.contextmanager
def refused(kind: type[Exception], words: str) -> Iterator[None]:
    """The message has these words, and is one line."""
    with pytest.raises(kind, match=words) as caught:
        yield
    assert "\n" not in str(caught.value)


# ---- live backbones -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OFFERED)
def test_a_live_backbone_of_every_architecture(name):
    size = TRANSFORMERS[name].height, TRANSFORMERS[name].width
    net, images = made(transformers_config(name)), pixels(*size)
    expected = maps(net, images)
    net.train()
    before = snapshot(net)
    loaded = load(net, size=size)
    assert_gives(loaded, expected, images)
    assert snapshot(net) == before
    assert loaded.spec.out_features == tuple(net.out_features)
    assert loaded.spec.out_indices == tuple(net.out_indices)
    assert loaded.spec.stage_names == tuple(net.stage_names)
    assert len(loaded.spec.num_features) == len(net.stage_names)
    assert loaded.source.weights == "module"
    assert (loaded.height, loaded.width) == size


def test_a_live_backbone_is_copied():
    net, images = resnet(), pixels()
    expected = maps(net, images)
    loaded = load(net)
    with torch.no_grad():
        for tensor in net.state_dict().values():
            tensor.zero_()
    net.out_features = ["stem"]
    assert_gives(loaded, expected, images)


@pytest.mark.parametrize("selection", [{"out_indices": (0, -1)}, {"out_features": ("stage2", "stage3")}])
def test_other_stages_of_a_live_backbone(selection):
    net, images = resnet(), pixels()
    before = snapshot(net)
    loaded = load(net, **selection)
    assert snapshot(net) == before
    for name, value in selection.items():
        setattr(net, name, list(value))
    assert_gives(loaded, maps(net, images), images)
    assert loaded.spec.out_indices == selection.get("out_indices", (2, 3))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_live_backbone_in_another_number_format(dtype):
    net, images = resnet().to(dtype), pixels()
    before = snapshot(net)
    loaded = load(net)
    assert snapshot(net) == before
    assert_gives(loaded, maps(copy.deepcopy(net).float(), images), images)


def test_the_default_size_is_the_configurations():
    assert (load(resnet(), size=None).height, load(resnet(), size=None).width) == (224, 224)
    loaded = load(made(transformers_config("swin")), size=None)
    assert (loaded.height, loaded.width) == (128, 160)


def test_a_number_of_channels_is_the_configurations():
    net, images = resnet(num_channels=5), pixels(channels=5)
    loaded = load(net)
    assert loaded.channels_in == len(loaded.image_config.mean) == len(loaded.image_config.std) == 5
    assert_gives(loaded, maps(net, images), images)


@pytest.mark.parametrize("reshaped", [True, False])
def test_tokens_stay_tokens(reshaped):
    arguments = {**TRANSFORMERS["dinov2"].arguments, "reshape_hidden_states": reshaped}
    net, images = made(Dinov2Config(**arguments)), pixels(56, 84)
    loaded = load(net, size=(56, 84))
    assert_gives(loaded, maps(net, images), images)
    assert loaded.spec.layouts == ("NCHW" if reshaped else "NLC",) * 4
    assert loaded.spec.strides == ((14, 14),) * 4


# ---- hidden states, class tokens, experts ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", [n for n in ("resnet", "swin", "dinov2", "focalnet", "pvt_v2", "vitdet") if n in OFFERED]
)
def test_hidden_states_are_those_of_the_backbone(name):
    size = TRANSFORMERS[name].height, TRANSFORMERS[name].width
    net, images = made(transformers_config(name)), pixels(*size)
    with torch.no_grad():
        expected = net(images, output_hidden_states=True)
    loaded = load(net, size=size, hidden_states=True)
    results = outputs(loaded, images)
    assert_same([results[feature] for feature in loaded.spec.out_features], expected.feature_maps)
    assert_same([results[output] for output in loaded.spec.hidden_states], expected.hidden_states)
    for extra in loaded.spec.extras:
        assert FORMATS[results[extra.name].ndim] == extra.layout
        assert results[extra.name].shape[extra.layout.index("C")] == extra.channels
    assert not load(net, size=size).spec.hidden_states


def test_hidden_states_of_timm_are_the_stages_up_to_the_last_kept_one():
    net = trained(timm.create_model("test_resnet", features_only=True, out_indices=(0, 1, 2, 3)))
    images = pixels()
    loaded = load(net, hidden_states=True, out_indices=(1, 3))
    results = outputs(loaded, images)
    assert_same([results[name] for name in loaded.spec.hidden_states], maps(net, images))
    assert_same([results[name] for name in loaded.spec.out_features], [maps(net, images)[i] for i in (1, 3)])


def test_hidden_states_that_are_no_tensors_are_refused():
    with refused(SourceError, "returns a tuple for each hidden state.*without hidden states"):
        load(made(transformers_config("maskformer-swin")), size=(128, 160), hidden_states=True)


if {"dinov3_vit", "sapiens2"}.issubset(OFFERED):

    @pytest.mark.parametrize("name", ["dinov3_vit", "sapiens2"])
    def test_class_tokens_come_with_the_maps(name):
        config = transformers_config(name)
        config.return_class_token = True
        size = TRANSFORMERS[name].height, TRANSFORMERS[name].width
        net, images = made(config), pixels(*size)
        with torch.no_grad():
            expected = net(images)
        loaded = load(net, size=size)
        results = outputs(loaded, images)
        assert_gives(loaded, expected.feature_maps, images)
        assert loaded.spec.cls_tokens == tuple(f"cls_tokens.{feature}" for feature in loaded.spec.out_features)
        assert_same([results[output] for output in loaded.spec.cls_tokens], expected.cls_tokens)
        config.return_class_token = False
        assert not load(made(config), size=size).spec.cls_tokens


EXPERTS = {**TRANSFORMERS["vitpose_backbone"].arguments, "num_experts": 3, "part_features": 16}


if "vitpose_backbone" in OFFERED:

    def test_an_expert_is_chosen_by_dataset_index():
        net, images = made(CONFIG_MAPPING["vitpose_backbone"](**EXPERTS)), pixels(96, 64)
        expected = [maps(net, images, dataset_index=torch.tensor([index, index])) for index in range(3)]
        assert float((expected[0][-1] - expected[2][-1]).abs().max()) > 0.01
        for index in (0, 2):
            loaded = load(net, size=(96, 64), dataset_index=index)
            assert_gives(loaded, expected[index], images)
            assert loaded.source.options["dataset_index"] == index
        for index in (3, -1):
            with refused(InputError, f"dataset_index must be below 3, got {index}"):
                load(net, size=(96, 64), dataset_index=index)


# ---- configurations -------------------------------------------------------------------------------------------------


def own_network(config: Any, loaded: LoadedBackbone, prefix: str = "") -> Any:
    """What transformers makes of the configuration, with the weights that were drawn."""
    net = AutoBackbone.from_config(copy.deepcopy(config))
    state = {prefix + name.removeprefix("net."): tensor for name, tensor in loaded.module.state_dict().items()}
    missing = net.load_state_dict(state, strict=False).missing_keys
    assert not [name for name in missing if not name.endswith("num_batches_tracked")]  # a frozen norm does not count
    return net.eval()


@pytest.mark.parametrize("name", ["resnet", "swin", "dinov2", "maskformer-swin"])
def test_a_configuration_becomes_the_network_that_transformers_makes_of_it(name):
    config = transformers_config(name)
    before = copy.deepcopy(config.to_dict())
    size = TRANSFORMERS[name].height, TRANSFORMERS[name].width
    loaded = load(config, weights="random:3", size=size)
    assert config.to_dict() == before
    assert_gives(loaded, maps(own_network(config, loaded), pixels(*size)), pixels(*size))
    assert (loaded.source.weights, loaded.source.seed, loaded.source.name) == ("random", 3, config.model_type)
    assert_same(
        outputs(load(config, weights="random:3", size=size), pixels(*size)).values(),
        outputs(loaded, pixels(*size)).values(),
    )


def test_stages_are_chosen_before_the_network_is_made():
    """swin has a norm for each chosen stage."""
    config = transformers_config("swin")
    before = copy.deepcopy(config.to_dict())
    loaded = load(config, weights="random:0", size=(128, 160), out_indices=(2, -1))
    assert config.to_dict() == before
    assert loaded.spec.out_indices == (2, -1)
    chosen = SwinConfig(**{**TRANSFORMERS["swin"].arguments, "out_indices": [2, -1]})
    assert_gives(loaded, maps(own_network(chosen, loaded), pixels(128, 160)), pixels(128, 160))


def test_negative_indices_of_a_configuration_are_kept():
    loaded = load(ResNetConfig(**SMALL, out_indices=[-3, -1]), weights="random:0")
    assert loaded.spec.out_indices == (-3, -1)
    assert loaded.spec.out_features == ("stage2", "stage4")
    assert loaded.source.config["out_indices"] == [-3, -1]


def test_a_client_models_configuration_means_its_backbone():
    config = transformers.UperNetConfig(backbone_config=ResNetConfig(**SMALL, out_indices=[1, 2]))
    before = copy.deepcopy(config.to_dict())
    loaded = load(config, weights="random:0")
    assert config.to_dict() == before
    assert_gives(loaded, maps(own_network(config.backbone_config, loaded), pixels()), pixels())


def test_a_configuration_file(tmp_path):
    ResNetConfig(**SMALL, out_indices=[2]).save_pretrained(tmp_path)
    loaded = load(str(tmp_path / "config.json"), weights="random:0")
    assert loaded.spec.out_features == ("stage2",)


@pytest.mark.parametrize("number_format", ["float16", "bfloat16"])
def test_the_number_format_of_a_configuration_is_not_ours(number_format):
    config = ResNetConfig(**SMALL, torch_dtype=number_format)
    loaded = load(config, weights="random:0")
    assert {parameter.dtype for parameter in loaded.module.parameters()} == {torch.float32}
    json.dumps(loaded.source.config)


class OwnConfig(transformers.PretrainedConfig):
    model_type = "own"


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (lambda: transformers.ViTConfig(), r"ViTConfig is not a backbone of transformers .*beit, bit"),
        (lambda: OwnConfig(), "OwnConfig is not a backbone of transformers"),
        (lambda: {"model_type": "resnet"}, "a dict is no source: pass a name, a folder, a configuration, or a module"),
        (lambda: ResNetBackbone, "a type is no source"),
        (lambda: None, "a NoneType is no source"),
        (lambda: ResNetConfig(**SMALL, hidden_act="nope"), "cannot make a resnet backbone of this configuration"),
        (lambda: ResNetConfig(**{**SMALL, "depths": [1]}), "resnet"),
    ],
)
def test_what_is_no_backbones_configuration_is_refused(config, words):
    with refused(SourceError, words):
        load(config(), weights="random:0")


def test_a_configuration_has_no_weights():
    with refused(SourceError, "has no weights: pass the folder or the hub id.*--weights model.safetensors.*random:0"):
        load(ResNetConfig(**SMALL))


def test_options_that_do_not_apply_are_refused():
    config, net = ResNetConfig(**SMALL), resnet()
    with refused(SourceError, "output_stride is an option of timm"):
        load(config, weights="random:0", output_stride=8)
    with refused(SourceError, "takes 3 channels, not 4: set num_channels in its configuration"):
        load(config, weights="random:0", num_channels=4)
    with refused(SourceError, "takes 3 channels, not 4"):
        load(net, num_channels=4)
    with refused(SourceError, "output_stride"):
        load(net, output_stride=8)
    with refused(InputError, "dataset_index"):
        load(net, dataset_index=1)
    with refused(SourceError, "a live ResNetBackbone has weights of its own: leave --weights out"):
        load(net, weights="random:0")
    with refused(InputError, "valid indices"):
        load(config, weights="random:0", out_indices=(5,))
    with refused(InputError, "same order"):
        load(net, out_features=("stage3", "stage1"))
    with refused(SourceError, "random weights need a seed"):
        load(config, weights="random")


def test_stages_that_an_architecture_does_not_return_are_refused():
    with refused(SourceError, "stem"):
        load(transformers_config("maskformer-swin"), weights="random:0", size=(128, 160), out_features=("stem",))
    net = made(transformers_config("swin"))  # a live swin has norms for its own stages only
    before = snapshot(net)
    with refused(SourceError, r"SwinBackbone with the stages \['stem'\] does not run"):
        load(net, size=(128, 160), out_features=("stem",))
    assert snapshot(net) == before


def test_a_size_that_the_network_does_not_take_is_refused():
    with refused(SourceError, r"SwinBackbone|ResNetBackbone|does not run on images of 1x1"):
        load(transformers_config("dinov2"), weights="random:0", size=(1, 1))


def test_an_architecture_whose_library_is_missing_is_refused(monkeypatch):
    def absent() -> bool:
        return False

    backends = transformers.utils.import_utils.BACKENDS_MAPPING
    monkeypatch.setitem(backends, "natten", (absent, "{0} requires the natten library"))
    with refused(SourceError, "dinat needs a library that is not installed: .*natten"):
        load(transformers.DinatConfig(embed_dim=16, depths=[1, 1], num_heads=[1, 2]), weights="random:0")

    def needs_more(*_: Any, **__: Any) -> None:
        raise ImportError("\nResNetBackbone requires the wonder library but it was not found.\npip install wonder")

    monkeypatch.setattr(ResNetBackbone, "__init__", needs_more)
    with refused(SourceError, "resnet needs a library that is not installed: ResNetBackbone requires the wonder"):
        load(ResNetConfig(**SMALL), weights="random:0")


def test_without_transformers_the_extra_is_named(monkeypatch):
    config = ResNetConfig(**SMALL)
    module = "edge_backbones.toolchain.sources.transformers"
    monkeypatch.delattr(sys.modules["edge_backbones.toolchain.sources"], "transformers")
    monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with refused(MissingDependencyError, "a backbone of transformers .*transformers is not installed.*pip install"):
        load(config, weights="random:0")
    assert load("test_resnet", weights="random:0").spec.stage_names[0] == "act1"


# ---- timm inside of transformers ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "arguments", "images"),
    [
        ("test_resnet", {"out_indices": [1, -1]}, pixels()),
        ("test_resnet", {"out_indices": [2], "num_channels": 1}, pixels(channels=1)),
        ("resnet10t", {"out_indices": [1, 3], "freeze_batch_norm_2d": True}, pixels()),
        ("test_vit", {"out_indices": [0, -1]}, pixels(160, 160)),
        ("swin_tiny_patch4_window7_224", {"out_indices": [0, 1]}, pixels(224, 224, batch=1)),
        ("mambaout_femto", {"out_indices": [0, 1]}, pixels()),
    ],
)
def test_a_timm_backbone_configuration(name, arguments, images):
    config = timm_config(name, **arguments)
    before = copy.deepcopy(config.__dict__)
    loaded = load(config, weights="random:0", size=tuple(images.shape[2:]))
    assert config.__dict__ == before
    assert_gives(loaded, maps(own_network(config, loaded, "_backbone."), images), images)
    assert loaded.spec.out_indices == tuple(arguments["out_indices"])
    channels_last = name.startswith(("swin", "mambaout"))
    assert loaded.spec.layouts == ("NHWC" if channels_last else "NCHW",) * len(arguments["out_indices"])
    assert loaded.channels_in == images.shape[1]


if "output_stride" in timm_config("test_resnet").to_dict():

    def test_the_output_stride_of_a_timm_backbone_configuration():
        config = timm_config("resnet10t", out_indices=[-1], output_stride=16)
        loaded = load(config, weights="random:0")
        assert_gives(loaded, maps(own_network(config, loaded, "_backbone."), pixels()), pixels())
        assert loaded.spec.strides == ((16, 16),)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("test_resnet", {"out_indices": [1, -1]}),
        ("test_resnet", {"out_indices": [-2, -1], "num_channels": 4}),
        ("mambaout_femto", {"out_indices": [0, 1]}),
        ("test_efficientnet", {"out_indices": [1, -1], "freeze_batch_norm_2d": True}),
    ],
)
@pytest.mark.parametrize("saved", [False, True])
def test_a_live_timm_backbone_and_its_folder(name, arguments, saved, tmp_path):
    config = timm_config(name, **arguments)
    net = trained(TimmBackbone(config))
    images = pixels(channels=config.num_channels)
    expected = maps(net, images)
    net.save_pretrained(tmp_path)
    net.train()
    before = snapshot(net)
    loaded = load(tmp_path if saved else net)
    assert snapshot(net) == before
    assert_gives(loaded, expected, images)
    assert loaded.channels_in == config.num_channels
    assert loaded.spec.out_indices == tuple(arguments["out_indices"])
    assert loaded.spec.stage_names == tuple(net.stage_names)
    assert loaded.spec.layouts[0] == ("NHWC" if name.startswith("mambaout") else "NCHW")


def test_a_timm_backbone_that_cannot_be_made_is_refused():
    config = timm_config("resnet81")
    with refused(SourceError, "timm has no model 'resnet81'.*resnet18"):
        load(config, weights="random:0")
    with refused(SourceError, "features_only=False makes no backbone"):
        load(timm_config("test_resnet", features_only=False), weights="random:0")
    with refused(SourceError, "backbone is not set in the config"):
        load(timm_config(None), weights="random:0")
    net = TimmBackbone(timm_config("test_resnet", out_indices=[1, 3]))
    with refused(SourceError, r"returns the stages \['layer1', 'layer3'\] and not \['layer2'\]"):
        load(net, out_indices=(2,))
    with refused(SourceError, "hidden states need a module that returns every stage"):
        load(net, hidden_states=True)
    with refused(SourceError, "channels"):
        load(net, num_channels=4)
    with refused(SourceError, "output_stride"):
        load(net, output_stride=8)


# ---- modules of timm ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("out_indices", [(3, 1), (-1, 0)])
@pytest.mark.parametrize("feature_class", ["list", "dict"])
def test_stages_of_a_feature_extractor_are_named_right_whatever_order_they_were_asked_in(feature_class, out_indices):
    """Most return them in the network's order, and claim the channels of the other."""
    net = timm.create_model("test_resnet", features_only=True, out_indices=out_indices, feature_cls=feature_class)
    net, images = trained(net), pixels()
    whole = timm.create_model("test_resnet")
    state = {key.removeprefix("body.").removeprefix("model."): tensor for key, tensor in net.state_dict().items()}
    whole.load_state_dict({**whole.state_dict(), **state})
    with torch.no_grad():
        every = whole.eval().forward_intermediates(images, intermediates_only=True)
    net.train()
    before = snapshot(net)
    loaded = load(net)
    assert snapshot(net) == before
    assert loaded.spec.out_indices == tuple(sorted(index % 5 for index in out_indices))
    assert_gives(loaded, tuple(every[index] for index in loaded.spec.out_indices), images)
    assert loaded.spec.strides == tuple((2 ** (index + 1),) * 2 for index in loaded.spec.out_indices)


@pytest.mark.parametrize(("feature_class", "name"), [("hook", "FeatureHookNet"), ("getter", "FeatureGetterNet")])
def test_extractors_that_mix_up_their_order_are_refused(feature_class, name):
    """They return maps as asked or as they come, and their metadata does not say which."""
    net = timm.create_model("test_vit", features_only=True, out_indices=(3, 1), feature_cls=feature_class)
    with refused(SourceError, rf"a {name} with out_indices out of order: create it with \(1, 3\)"):
        load(net)
    ordered = timm.create_model("test_vit", features_only=True, out_indices=(1, 3), feature_cls=feature_class)
    assert load(ordered).spec.out_indices == (1, 3)


def test_a_whole_timm_network():
    net, images = trained(timm.create_model("test_efficientnet")), pixels()
    with torch.no_grad():
        expected = net.forward_intermediates(images, indices=[1, 4], intermediates_only=True)
    net.train()
    before = snapshot(net)
    loaded = load(net, out_indices=(1, -1))
    assert snapshot(net) == before
    assert_gives(loaded, tuple(expected), images)
    assert loaded.spec.out_indices == (1, -1)


def small_vit(**changes: Any) -> VisionTransformer:
    arguments = {"img_size": (64, 96), "patch_size": 16, "embed_dim": 48, "depth": 3, "num_heads": 3, "num_classes": 0}
    return trained(VisionTransformer(**{**arguments, **changes}))


def test_the_size_and_channels_of_a_live_timm_network_are_its_own():
    net, images = small_vit(in_chans=4), pixels(channels=4)
    with torch.no_grad():
        expected = net.forward_intermediates(images, indices=[0, 2], intermediates_only=True)
    loaded = load(net, size=None, out_indices=(0, 2))
    assert (loaded.channels_in, loaded.height, loaded.width) == (4, 64, 96)
    assert len(loaded.image_config.mean) == 4
    assert_gives(loaded, tuple(expected), images)
    with refused(SourceError, "channels"):
        load(net, num_channels=3)


def test_a_timm_family_that_works_in_nhwc():
    net = timm.create_model("swin_tiny_patch4_window7_224", features_only=True, out_indices=(0, 1), img_size=(64, 96))
    expected = maps(trained(net), pixels())
    assert [m.shape[-1] for m in expected] == [96, 192]
    loaded = load(net, size=None)
    assert (loaded.height, loaded.width) == (64, 96)
    assert_gives(loaded, tuple(m.permute(0, 3, 1, 2) for m in expected), pixels())
    assert loaded.spec.layouts == ("NCHW", "NCHW")


def test_timm_modules_that_cannot_be_used_are_refused():
    with refused(SourceError, "output_stride"):
        load(timm.create_model("test_resnet", features_only=True), output_stride=8)
    with refused((SourceError, InputError), "dataset_index"):  # type: ignore[arg-type]
        load(timm.create_model("test_resnet", features_only=True), dataset_index=1)


# ---- plain modules --------------------------------------------------------------------------------------------------


class Pyramid(nn.Module):
    """Two maps and tokens, of five channels."""

    def __init__(self, form: Callable[..., Any] = lambda *maps: maps) -> None:
        super().__init__()
        self.form = form
        self.first = nn.Conv2d(5, 8, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.second = nn.Conv2d(8, 16, 3, stride=2, padding=1)

    def forward(self, x: torch.Tensor) -> Any:
        first = self.norm(self.first(x)).relu()
        second = self.second(first)
        return self.form(first, second, second.flatten(2).transpose(1, 2))


def plain(module: nn.Module, **changes: Any) -> ModuleSource:
    described = {"stage_names": ["fine", "coarse", "tokens"], "layouts": ["NCHW", "NCHW", "NLC"], "num_channels": 5}
    return ModuleSource(module=module, size=(HEIGHT, WIDTH), **{**described, **changes})


@pytest.mark.parametrize("form", [lambda *m: m, lambda *m: list(m), lambda a, b, c: {"a": a, "b": b, "c": c}])
def test_a_plain_module_with_a_description(form):
    net, images = trained(Pyramid(form)), pixels(channels=5)
    with torch.no_grad():
        result = net(images)
    expected = tuple(result.values()) if isinstance(result, dict) else tuple(result)
    net.train()
    before = snapshot(net)
    loaded = load(plain(net), size=None)
    assert_gives(loaded, expected, images)
    assert loaded.spec.layouts == ("NCHW", "NCHW", "NLC")
    assert (loaded.channels_in, loaded.height, loaded.width) == (5, HEIGHT, WIDTH)
    assert len(loaded.image_config.mean) == len(loaded.image_config.std) == 5
    one = load(plain(net), size=None, out_indices=(-2,))
    assert_gives(one, expected[1:2], images)
    assert (one.spec.out_features, one.spec.out_indices) == (("coarse",), (-2,))
    assert snapshot(net) == before


@pytest.mark.parametrize(
    ("changes", "options", "words"),
    [
        ({"stage_names": ["fine", "coarse"], "layouts": None}, {}, "returns .*not NCHW, NCHW"),
        ({"layouts": ["NCHW", "NLC", "NLC"]}, {}, "returns .*not NCHW, NLC, NLC"),
        ({"layouts": ["NCHW", "NCWH", "NLC"]}, {}, "NCWH"),
        ({"stage_names": ["fine", "fine", "tokens"]}, {}, "must name every output once"),
        ({"stage_names": []}, {}, "must name every output once"),
        ({"num_channels": 3}, {}, "does not run on images of 64x96 .*RuntimeError"),
        ({}, {"weights": "random:0"}, "not for a plain module"),
        ({}, {"output_stride": 8}, "not for a plain module"),
        ({}, {"hidden_states": True}, "not for a plain module"),
        ({}, {"num_channels": 3}, "channels"),
        ({}, {"dataset_index": 1}, "dataset_index"),
        ({}, {"from_model": True}, "from_model"),
    ],
)
def test_a_wrong_description_of_a_plain_module_is_refused(changes, options, words):
    net = Pyramid()
    before = snapshot(net)
    with refused((SourceError, InputError), words):  # type: ignore[arg-type]
        load(plain(net, **changes), size=None, **options)
    assert snapshot(net) == before


def test_modules_that_cannot_be_loaded_are_refused():
    with refused(SourceError, r"a Pyramid is no backbone: .*from_model=True.*ModuleSource\(module=..., stage_names"):
        load(Pyramid())
    with torch.device("meta"):
        empty = ResNetBackbone(ResNetConfig(**SMALL))
    for source in (empty, plain(empty)):
        with refused(SourceError, "ResNetBackbone is on the meta device and has no weights: load them first"):
            load(source)
    net = Pyramid()
    net.cached = (i for i in range(3))
    with refused(SourceError, "this Pyramid cannot be copied"):
        load(plain(net), size=None)


# ---- checkpoints of a configuration ---------------------------------------------------------------------------------


def classifier() -> Any:
    return trained(ResNetForImageClassification(ResNetConfig(**SMALL, num_labels=4)))


def hidden_states(model: Any, images: torch.Tensor, indices: tuple[int, ...]) -> tuple[torch.Tensor, ...]:
    """ResNet's maps are its hidden states: a classifier computes them too."""
    with torch.no_grad():
        states = model(images, output_hidden_states=True).hidden_states
    return tuple(states[i] for i in indices)


def write(state: dict[str, torch.Tensor], path: Path) -> Path:
    if path.suffix == ".safetensors":
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, path, metadata={"format": "pt"})
    else:
        torch.save(state, path)
    return path


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("kind", ["backbone", "classifier"])
def test_a_checkpoint_with_a_configuration(kind, suffix, tmp_path):
    model = resnet() if kind == "backbone" else classifier()
    images = pixels()
    expected = maps(model, images) if kind == "backbone" else hidden_states(model, images, (1, 4))
    path = write(model.state_dict(), tmp_path / f"trained{suffix}")
    loaded = load(ResNetConfig(**SMALL, out_indices=[1, -1]), weights=str(path))
    assert_gives(loaded, expected, images)
    assert (loaded.source.weights, len(loaded.source.weights_sha256)) == ("checkpoint", 64)


class CreatesAFile:
    """Runs code when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_a_checkpoint_that_does_not_fit_is_refused(tmp_path):
    config, state = ResNetConfig(**SMALL), resnet().state_dict()
    first = next(iter(state))

    def refusal(content: dict[str, Any], words: str) -> None:
        with refused(SourceError, rf"weights\.pth.*{words}"):
            load(config, weights=str(write(content, tmp_path / "weights.pth")))

    refusal({name: tensor for name, tensor in state.items() if name != first}, "no fitting weights for 1 tensors")
    refusal({**state, first: torch.zeros(3, 3)}, "")
    refusal({f"other.{name}": tensor for name, tensor in state.items()}, "no fitting weights")
    refusal({"epoch": 3, "optimizer": [1, 2]}, "cannot be read as a checkpoint")
    with refused(SourceError, "neither 'pretrained', 'random:SEED' nor a file that exists"):
        load(config, weights=str(tmp_path / "nothing.safetensors"))
    (tmp_path / "cut.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{")
    with refused(SourceError, r"cut\.safetensors cannot be read as a checkpoint"):
        load(config, weights=str(tmp_path / "cut.safetensors"))


# ---- folders --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["resnet", "swin", "dinov2", "pvt_v2"])
def test_a_folder_of_a_backbone(name, tmp_path):
    size = TRANSFORMERS[name].height, TRANSFORMERS[name].width
    net, images = made(transformers_config(name)), pixels(*size)
    net.save_pretrained(tmp_path / "saved")
    loaded = load(tmp_path / "saved", size=size)
    assert_gives(loaded, maps(net, images), images)
    assert loaded.spec.out_indices == tuple(net.out_indices)
    assert (loaded.source.library, loaded.source.name, loaded.source.weights) == ("transformers", "saved", "pretrained")
    assert str(tmp_path) not in json.dumps(loaded.source.config)


def test_a_folder_is_loaded_without_a_word(tmp_path, capfd):
    """transformers has bars and a report of its own, and users may have switched them off."""
    classifier().save_pretrained(tmp_path)
    capfd.readouterr()
    for switch, shown in ((logging.disable_progress_bar, False), (logging.enable_progress_bar, True)):
        switch()
        load(tmp_path)
        assert logging.is_progress_bar_enabled() is shown
    assert capfd.readouterr() == ("", "")


def test_a_folder_by_a_relative_path_that_is_also_a_name_of_timm(tmp_path, monkeypatch):
    net = resnet()
    net.save_pretrained(tmp_path / "resnet18")
    monkeypatch.chdir(tmp_path)
    assert_gives(load("resnet18"), maps(net, pixels()), pixels())
    assert_gives(load("./resnet18"), maps(net, pixels()), pixels())


def test_other_stages_than_the_folders_own(tmp_path):
    net = resnet()
    net.save_pretrained(tmp_path)
    net.out_indices = [0, 2]
    loaded = load(tmp_path, out_features=("stem", "stage2"))
    assert_gives(loaded, maps(net, pixels()), pixels())
    assert_gives(load(tmp_path, out_indices=(0, -3)), maps(net, pixels()), pixels())


@pytest.mark.parametrize("form", ["safetensors", "sharded", "bin", "half", "bfloat16"])
def test_a_classifiers_folder_is_a_backbone(form, tmp_path):
    model = classifier()
    if form in ("half", "bfloat16"):
        model = model.half() if form == "half" else model.bfloat16()
    model.save_pretrained(tmp_path, **({"max_shard_size": "100KB"} if form == "sharded" else {}))
    if form == "sharded":
        assert len(list(tmp_path.glob("*.safetensors"))) > 1
    if form == "bin":
        (tmp_path / "model.safetensors").unlink()
        torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    loaded = load(tmp_path, out_indices=(1, -1))
    assert_gives(loaded, hidden_states(model.float(), pixels(), (1, 4)), pixels())


@pytest.mark.parametrize(
    ("content", "mean", "interpolation"),
    [
        ({"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6], "resample": 2}, (0.1, 0.2, 0.3), "bilinear"),
        ({"do_normalize": False, "resample": 3}, (0.0, 0.0, 0.0), "bicubic"),
        (None, (0.485, 0.456, 0.406), None),
    ],
)
def test_the_preprocessing_of_a_folder(content, mean, interpolation, tmp_path):
    resnet().save_pretrained(tmp_path)
    if content is not None:
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(content))
    config = load(tmp_path).image_config
    assert config.mean == mean
    assert interpolation in (None, config.interpolation)
    assert config.std == ((0.4, 0.5, 0.6) if content and "image_std" in content else config.std)


def test_a_folders_configuration_with_other_weights(tmp_path):
    resnet().save_pretrained(tmp_path / "backbone")
    model = classifier()
    path = write(model.state_dict(), tmp_path / "fine_tuned.safetensors")
    loaded = load(tmp_path / "backbone", weights=str(path))
    assert_gives(loaded, hidden_states(model, pixels(), (1, 4)), pixels())
    assert load(tmp_path / "backbone", weights="random:0").source.weights == "random"


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ("{", "is not a model.s configuration: Expecting"),
        ("[]", "is not a model.s configuration: it holds a list"),
        ('{"model_type": "nope"}', "does not read .*nope"),
        ('{"model_type": "vit"}', "ViTConfig is not a backbone"),
        ('{"model_type": "resnet"}', "cannot be loaded as ResNetBackbone"),  # no weights
        ('{"architecture": "test_resnet"}', "no weights: .*beside"),
        ('{"architecture": "resnet81"}', "resnet81|no weights"),
        (None, "has no config.json: pass a folder that save_pretrained wrote"),
    ],
)
def test_a_folder_that_is_no_backbone_is_refused(config, words, tmp_path):
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    with refused(SourceError, words):
        load(tmp_path)


def test_paths_that_are_no_folder_are_refused(tmp_path):
    with refused(SourceError, "does not exist"):
        load(tmp_path / "nothing")
    with refused(SourceError, "does not exist"):
        load("./nothing")
    path = write(resnet().state_dict(), tmp_path / "model.safetensors")
    with refused(SourceError, r"model\.safetensors is a file"):
        load(path)


def test_a_folder_whose_weights_do_not_fit_is_refused(tmp_path):
    net = resnet()
    net.save_pretrained(tmp_path)
    state = net.state_dict()
    name = "encoder.stages.1.layers.0.layer.0.convolution.weight"
    write({key: tensor for key, tensor in state.items() if key != name}, tmp_path / "model.safetensors")
    with refused(SourceError, rf"no fitting weights for 1 tensors of ResNetBackbone, {name} first"):
        load(tmp_path)
    write({**state, name: torch.zeros(3, 4, 1, 1)}, tmp_path / "model.safetensors")
    with refused(SourceError, "ResNetBackbone"):
        load(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{")
    with refused(SourceError, "cannot be loaded as ResNetBackbone"):
        load(tmp_path)


@pytest.mark.parametrize("kind", ["checkpoint", "folder", "client", "timm"])
def test_a_pickle_with_code_is_refused_and_not_run(kind, tmp_path):
    evidence, folder = tmp_path / "executed", tmp_path / "folder"
    resnet().save_pretrained(folder)
    (folder / "model.safetensors").unlink()
    path = write({"embedder.embedder.convolution.weight": CreatesAFile(evidence)}, folder / "pytorch_model.bin")
    source: Any = folder
    if kind == "checkpoint":
        source = ResNetConfig(**SMALL)
    if kind == "timm":
        (folder / "config.json").write_text('{"architecture": "test_resnet"}')
    if kind == "client":
        detr().config.save_pretrained(folder)
        content = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**content, "architectures": ["DetrForObjectDetection"]}))
    with refused(SourceError, "pytorch_model|folder"):
        load(source, from_model=kind == "client", weights=str(path) if kind == "checkpoint" else "pretrained")
    assert not evidence.exists()
    torch.load(path, weights_only=False)
    assert evidence.exists()  # the file would have done it


@pytest.mark.parametrize("from_model", [False, True])
def test_code_in_a_folder_is_not_run_and_not_asked_about(from_model, tmp_path, monkeypatch):
    evidence, questions = tmp_path / "executed", []

    def yes(question: str = "") -> str:
        questions.append(question)
        return "y"

    monkeypatch.setattr("builtins.input", yes)
    code = {"AutoConfig": "own.OwnConfig", "AutoModel": "own.OwnModel", "AutoBackbone": "own.OwnModel"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "wonder", "auto_map": code}))
    (tmp_path / "own.py").write_text(
        f"import pathlib, transformers\npathlib.Path({str(evidence)!r}).touch()\n"
        "class OwnConfig(transformers.PretrainedConfig):\n    model_type = 'wonder'\n"
    )
    with refused(SourceError, "does not read"):
        load(tmp_path, from_model=from_model)
    assert not questions
    assert not evidence.exists()


# ---- the model hub --------------------------------------------------------------------------------------------------


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, Path], None]:
    """A machine without network; called with a hub id and a folder it puts that folder into the hub's cache."""
    cache = tmp_path / "hub"
    cache.mkdir()
    monkeypatch.setattr(common, "hub_answers", lambda: False)
    download = importlib.import_module("huggingface_hub._snapshot_download")
    # Older releases import the setting by its name.
    monkeypatch.setattr(
        download if hasattr(download, "HF_HUB_CACHE") else huggingface_hub.constants, "HF_HUB_CACHE", cache
    )

    def put(repository: str, folder: Path) -> None:
        stored, commit = cache / ("models--" + repository.replace("/", "--")), "0123456789" * 4
        (stored / "refs").mkdir(parents=True)
        (stored / "refs" / "main").write_text(commit)
        shutil.copytree(folder, stored / "snapshots" / commit)

    return put


@pytest.mark.parametrize("prefix", ["", "hf-hub:"])
@pytest.mark.parametrize("form", ["safetensors", "sharded", "bin"])
def test_a_hub_id_from_the_cache(prefix, form, hub_cache, tmp_path):
    net = resnet()
    net.save_pretrained(tmp_path / "saved", **({"max_shard_size": "100KB"} if form == "sharded" else {}))
    if form == "bin":
        (tmp_path / "saved" / "model.safetensors").unlink()
        torch.save(net.state_dict(), tmp_path / "saved" / "pytorch_model.bin")
    hub_cache("someone/resnet-small", tmp_path / "saved")
    loaded = load(f"{prefix}someone/resnet-small")
    assert_gives(loaded, maps(net, pixels()), pixels())
    assert (loaded.source.library, loaded.source.name) == ("transformers", "resnet-small")


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_a_hub_id_of_a_timm_model(suffix, hub_cache, tmp_path):
    net = trained(timm.create_model("test_resnet", num_classes=5))
    with torch.no_grad():
        expected = net.forward_intermediates(pixels(), indices=[1, 4], intermediates_only=True)
    mean = [0.1, 0.2, 0.3]
    config = {
        "architecture": "test_resnet",
        "num_classes": 5,
        "pretrained_cfg": {"mean": mean, "input_size": [3, 96, 128]},
    }
    saved = tmp_path / "saved"
    saved.mkdir()
    (saved / "config.json").write_text(json.dumps(config))
    write(net.state_dict(), saved / f"{'model' if suffix == '.safetensors' else 'pytorch_model'}{suffix}")
    hub_cache("someone/own-resnet", saved)
    loaded = load("someone/own-resnet", size=None, out_indices=(1, -1))
    assert_gives(loaded, tuple(expected), pixels())
    assert loaded.image_config.mean == tuple(mean)
    assert (loaded.height, loaded.width) == (96, 128)


def test_a_hub_id_of_a_client_model(hub_cache, tmp_path):
    model = detr()
    model.save_pretrained(tmp_path / "saved")
    hub_cache("someone/detr-small", tmp_path / "saved")
    loaded = load("someone/detr-small", from_model=True)
    assert_gives(loaded, maps(part_of(model), pixels()), pixels())
    assert loaded.source.name.startswith("detr-small:model.backbone.")


def test_a_hub_id_that_is_nowhere_to_be_had(hub_cache, tmp_path):
    advice = "the model hub does not answer and .*someone/unknown.*connect once, or pass the folder of a local copy"
    with refused(HubUnreachableError, advice):
        load("someone/unknown")
    ResNetConfig(**SMALL).save_pretrained(tmp_path / "config_only")
    hub_cache("someone/unknown", tmp_path / "config_only")
    with refused(HubUnreachableError, advice):
        load("someone/unknown")


def test_no_network_is_found_out_by_one_request(monkeypatch, tmp_path):
    requests = []

    def unreachable() -> Any:
        requests.append(1)
        raise ConnectionError("no route to host")

    monkeypatch.setattr(huggingface_hub, "get_session", unreachable)
    with refused(HubUnreachableError, "the model hub does not answer and someone/unknown is not in its cache"):
        load("someone/unknown")
    assert len(requests) == 1


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("RepositoryNotFoundError", "the model hub has no 'someone/unknown', or it is private"),
        ("GatedRepoError", "the model hub .*'someone/unknown'.*(private|access|gated)"),
        (None, "someone/unknown on the model hub has no config.json with weights"),
    ],
)
def test_what_the_hub_does_not_have(kind, words, monkeypatch, tmp_path):
    def download(*_: Any, **__: Any) -> str:
        if kind is None:
            return str(tmp_path)
        family = getattr(huggingface_hub.utils, kind)
        error = family.__new__(family)
        error.args = ("404 Client Error.\nRequest id",)
        raise error

    monkeypatch.setattr(common, "hub_answers", lambda: True)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(SourceError, match=words) as caught:
        load("someone/unknown")
    assert not isinstance(caught.value, HubUnreachableError)
    assert "\n" not in str(caught.value)


# ---- the backbone inside a model ------------------------------------------------------------------------------------


def detr(**changes: Any) -> Any:
    config = ResNetConfig(**SMALL, out_features=["stage2", "stage3", "stage4"])
    arguments = {"backbone_config": config, "use_timm_backbone": False, "backbone": None}
    small = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "num_queries": 4}
    small |= {f"{part}_attention_heads": 2 for part in ("encoder", "decoder")}
    small |= {f"{part}_ffn_dim": 16 for part in ("encoder", "decoder")}
    arguments = {**arguments, **small, "use_pretrained_backbone": False, **changes}
    return trained(transformers.DetrForObjectDetection(transformers.DetrConfig(**arguments)))


def detr_over_timm() -> Any:
    return detr(backbone_config=None, use_timm_backbone=True, backbone="resnet10t")


def rt_detr() -> Any:
    config = transformers.RTDetrResNetConfig(**SMALL, out_features=["stage2", "stage3", "stage4"])
    return trained(
        transformers.RTDetrForObjectDetection(
            transformers.RTDetrConfig(
                backbone_config=config,
                encoder_hidden_dim=16,
                encoder_in_channels=[48, 64, 80],
                encoder_ffn_dim=16,
                encoder_attention_heads=2,
                d_model=16,
                decoder_in_channels=[16, 16, 16],
                decoder_ffn_dim=16,
                decoder_layers=1,
                decoder_attention_heads=2,
                num_queries=4,
                num_denoising=0,
            )
        )
    )


def mask2former() -> Any:
    config = SwinConfig(**TRANSFORMERS["swin"].arguments)
    small = {"feature_size": 32, "mask_feature_size": 32, "hidden_dim": 32, "encoder_feedforward_dim": 16}
    small |= {
        "encoder_layers": 1,
        "decoder_layers": 2,
        "num_attention_heads": 2,
        "dim_feedforward": 16,
        "num_queries": 4,
    }
    configuration = transformers.Mask2FormerConfig(backbone_config=config, **small)
    return trained(transformers.Mask2FormerForUniversalSegmentation(configuration))


def upernet() -> Any:
    config = transformers.ConvNextConfig(**TRANSFORMERS["convnext"].arguments)
    configuration = transformers.UperNetConfig(backbone_config=config, hidden_size=16, auxiliary_in_channels=128)
    return trained(transformers.UperNetForSemanticSegmentation(configuration))


def depth_anything() -> Any:
    config = Dinov2Config(**TRANSFORMERS["dinov2"].arguments, reshape_hidden_states=False)
    configuration = transformers.DepthAnythingConfig(
        backbone_config=config,
        reassemble_hidden_size=64,
        neck_hidden_sizes=[8, 8, 8, 8],
        fusion_hidden_size=8,
        patch_size=14,
    )
    return trained(transformers.DepthAnythingForDepthEstimation(configuration))


CLIENTS = {
    detr: (HEIGHT, WIDTH),
    detr_over_timm: (HEIGHT, WIDTH),
    rt_detr: (HEIGHT, WIDTH),
    mask2former: (128, 160),
    upernet: (96, 128),
    depth_anything: (56, 84),
}
PLACES = ("model.backbone.model", "model.backbone.conv_encoder.model", "model.pixel_level_module.encoder", "backbone")


def part_of(model: Any) -> Any:
    """The backbone in a model, by the places where the releases have it."""
    modules = dict(model.named_modules())
    return next(modules[place] for place in PLACES if place in modules)


@pytest.mark.parametrize("client", CLIENTS)
def test_the_backbone_inside_a_model(client):
    size = CLIENTS[client]
    model, images = client(), pixels(*size)
    expected = maps(part_of(model), images)
    model.train()
    before = snapshot(model)
    loaded = load(model, from_model=True, size=size)
    assert snapshot(model) == before
    assert_gives(loaded, expected, images)


@pytest.mark.parametrize("client", [detr, detr_over_timm, mask2former])
def test_the_backbone_inside_a_saved_model(client, tmp_path):
    size = CLIENTS[client]
    model, images = client(), pixels(*size)
    model.save_pretrained(tmp_path / "saved")
    loaded = load(tmp_path / "saved", from_model=True, size=size)
    assert_gives(loaded, maps(part_of(model), images), images)
    assert loaded.source.weights == "pretrained"
    assert loaded.source.name.startswith("saved:")


def test_other_stages_of_a_backbone_inside_a_model():
    model = detr()
    part = copy.deepcopy(part_of(model))
    loaded = load(model, from_model=True, out_indices=(0, -1))
    part.out_indices = [0, -1]
    assert_gives(loaded, maps(part, pixels()), pixels())


def test_models_that_do_not_hold_one_backbone_are_refused(tmp_path):
    model = detr()
    with refused(SourceError, "DetrForObjectDetection is no backbone: .*from_model=True"):
        load(model)
    with refused(SourceError, "no backbone was found inside this ResNetForImageClassification"):
        load(classifier(), from_model=True)
    two = nn.ModuleDict({"left": resnet(), "right": resnet()})
    with refused(SourceError, r"holds several backbones \(left, right\): pass the part with one"):
        load(two, from_model=True)
    with refused(SourceError, "from_model"):
        load("test_resnet", weights="random:0", from_model=True)
    model.save_pretrained(tmp_path)
    with refused(SourceError, "from_model|from-model"):
        load(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**content, "architectures": ["WonderForDetection"]}))
    with refused(SourceError, "is a WonderForDetection, which transformers .* does not have"):
        load(tmp_path, from_model=True)


# ---- bundles --------------------------------------------------------------------------------------------------------


def test_bundles_of_live_modules_and_folders(tmp_path):
    """From a source to an engine's outputs, against the source's own forward."""
    options = BuildOptions(precisions=(Precision.FP32,), height=64, width=96, torchscript=False, golden=1, cache=None)
    net, model = resnet(), detr()
    model.save_pretrained(tmp_path / "detr")
    sources = {
        "live": (net, net),
        "client": (tmp_path / "detr", part_of(model)),
        "plain": (plain(trained(Pyramid())),) * 2,
    }
    for name, (source, reference) in sources.items():
        channels = 5 if name == "plain" else 3
        images = pixels(batch=3, channels=channels)
        expected = maps(reference.module if name == "plain" else reference, images)
        changed = BuildOptions(**{**vars(options), "from_model": name == "client"})
        result = build_bundle(source, tmp_path / f"{name}.bundle", options=changed)
        with EdgeBackbone.from_pretrained(result.bundle.path) as backbone:
            actual = backbone(images.numpy()).feature_maps
        assert len(actual) == len(expected)
        for one, wanted in zip(actual, expected, strict=True):
            assert one.shape == wanted.shape
            assert np.linalg.norm(one - wanted.numpy()) <= 1e-3 * np.linalg.norm(wanted.numpy())
