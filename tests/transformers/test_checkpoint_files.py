"""Checkpoint files for a configuration of transformers. References: the backbone, or the model with it, that was saved."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import transformers
from clients import CLIENTS, trained_like
from transformers import CONFIG_MAPPING, AutoBackbone

from build_scripts.architectures import TRANSFORMERS, transformers_config
from edge_backbones.errors import SourceError
from edge_backbones.integrations.clients import find_backbone
from edge_backbones.toolchain.sources.base import SourceOptions
from edge_backbones.toolchain.sources.load import load_source

SMALL = {"embedding_size": 16, "hidden_sizes": [32, 48, 64, 80], "depths": [1, 1, 1, 1]}
OFFERED = [name for name in TRANSFORMERS if name in CONFIG_MAPPING and name != "timm_backbone"]


def load(config: Any, path: Path, size: tuple[int, int] = (64, 96), **options: Any) -> Any:
    return load_source(config, SourceOptions(weights=str(path), img_size=size, **options))


def saved(content: Any, path: Path) -> Path:
    torch.save(content, path)
    return path


def assert_has_weights_of(loaded: Any, net: Any) -> None:
    """Every learned tensor is that of ``net``, the backbone that was saved."""
    state, own = net.state_dict(), dict(loaded.module.net.named_parameters())
    own |= {key: tensor for key, tensor in loaded.module.net.named_buffers() if "running_" in key}
    assert own
    for key, tensor in own.items():
        assert torch.equal(tensor, state[key]), key


def refusal(config: Any, path: Path) -> str:
    with pytest.raises(SourceError) as caught:
        load(config, path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def resnet() -> Any:
    return trained_like(transformers.ResNetBackbone(transformers.ResNetConfig(**SMALL)))


@pytest.mark.parametrize("name", OFFERED)
def test_every_architecture_under_the_prefix_of_a_client(name, tmp_path):
    config = transformers_config(name)
    net = trained_like(AutoBackbone.from_config(copy.deepcopy(config)))
    content = {f"model.backbone.model.{key}": tensor for key, tensor in net.state_dict().items()}
    path = saved({"state_dict": content, "epoch": 1}, tmp_path / "client.ckpt")
    assert_has_weights_of(load(config, path, (TRANSFORMERS[name].height, TRANSFORMERS[name].width)), net)


@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "model.", "backbone.", "encoder.", "student.", "teacher.", "resnet."]
)
def test_prefixes_of_wrappers(prefix, tmp_path):
    net = resnet()
    content = {f"{prefix}{key}": tensor for key, tensor in net.state_dict().items()} | {"head.bias": torch.ones(3)}
    assert_has_weights_of(load(net.config, saved(content, tmp_path / "wrapped.pth")), net)


@pytest.mark.parametrize("wrapped", ["", "module.", "model.", "state_dict.model._orig_mod."])
@pytest.mark.parametrize(
    "kind", ["ResNetForImageClassification", "Dinov2ForImageClassification", "PvtV2ForImageClassification"]
)
def test_the_state_dict_of_a_classifier(kind, wrapped, tmp_path):
    name = {"ResNet": "resnet", "Dinov2": "dinov2", "PvtV2": "pvt_v2"}[kind.partition("For")[0]]
    config = transformers_config(name)
    model = trained_like(getattr(transformers, kind)(copy.deepcopy(config)))
    content = {f"{wrapped}{key}": tensor for key, tensor in model.state_dict().items()}
    loaded = load(
        config, saved(content, tmp_path / "classifier.pth"), (TRANSFORMERS[name].height, TRANSFORMERS[name].width)
    )
    prefix = f"{model.base_model_prefix}."
    inner = {key.removeprefix(prefix): value for key, value in model.state_dict().items()}
    for key, parameter in loaded.module.net.named_parameters():
        assert torch.equal(parameter, inner[key]), key


@pytest.mark.parametrize("name", [name for name in ("detr", "rt_detr", "upernet", "mask_former") if name in CLIENTS])
@pytest.mark.parametrize("wrapped", ["", "module."])
def test_the_state_dict_of_a_client(name, wrapped, tmp_path, client_of):
    client = client_of(name)
    net = find_backbone(client.model).module
    content = {f"{wrapped}{key}": tensor for key, tensor in client.model.state_dict().items()}
    path = saved(content, tmp_path / "client.pth")
    assert_has_weights_of(load(net.config, path, (client.height, client.width)), net)


def test_a_swin_classifier_lacks_the_norms_of_a_backbone(tmp_path):
    """Only the backbone has a norm for each stage: they would be random."""
    config = transformers_config("swin")
    model = transformers.SwinForImageClassification(copy.deepcopy(config))
    assert "hidden_states_norms" in refusal(config, saved(model.state_dict(), tmp_path / "classifier.pth"))


def test_a_refusal_says_what_the_file_holds(tmp_path):
    net = resnet()
    state = {f"module.{key}": v for key, v in transformers_model("swin").state_dict().items()}
    message = refusal(net.config, saved(state, tmp_path / "other.pth"))
    assert "for" in message
    assert "The file's keys begin with 'module.'." in message
    assert f"First keys of the file: {', '.join(list(state)[:5])}, ...; of the network: " in message
    assert message.endswith(f"of the network: {', '.join(list(net.state_dict())[:5])}, ...")


def transformers_model(name: str) -> Any:
    return AutoBackbone.from_config(transformers_config(name))


def test_a_file_of_timm_is_named(tmp_path):
    path = saved(timm.create_model("resnet18").state_dict(), tmp_path / "timm.pth")
    assert "It fits resnet18 of timm." in refusal(transformers.ResNetConfig(**SMALL), path)


def test_a_deeper_network_is_not_cut_to_fit(tmp_path):
    deep = transformers.ResNetBackbone(transformers.ResNetConfig(**{**SMALL, "depths": [1, 1, 2, 1]}))
    message = refusal(transformers.ResNetConfig(**SMALL), saved(deep.state_dict(), tmp_path / "deep.pth"))
    assert "tensors that ResNetBackbone lacks, encoder.stages.2.layers.1." in message


@pytest.mark.parametrize("name", OFFERED)
def test_an_architecture_is_refused_by_another(name, tmp_path):
    path = saved(transformers_model(name).state_dict(), tmp_path / "other.pth")
    for other in ("resnet", "swin", "dinov2"):
        if other not in name:  # the tensors of rf_detr_dinov2 are those of dinov2
            with pytest.raises(SourceError, match=r"other\.pth.*First keys of the file"):
                load(transformers_config(other), path, (TRANSFORMERS[other].height, TRANSFORMERS[other].width))
