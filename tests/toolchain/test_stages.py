"""Test that `stages` shows what a build would keep, for every kind of source, without weights."""

from __future__ import annotations

import json

import pytest
import timm

from edge_backbones.cli import main as cli
from edge_backbones.errors import SourceError
from edge_backbones.toolchain.options import BuildOptions
from edge_backbones.toolchain.stages import list_stages


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "test_convnext"])
def test_every_stage_of_a_timm_network_is_listed_as_timm_has_it(name):
    found = list_stages(name)
    info = timm.create_model(name, features_only=True, pretrained=False).feature_info
    assert list(found.spec.out_features) == list(found.spec.stage_names)
    assert list(found.spec.channels) == info.channels()
    assert [stride for stride, _ in found.spec.strides] == info.reduction()
    assert found.default == len(found.spec.stage_names) - 1


def test_stages_of_transformers_and_of_a_size(tmp_path):
    from transformers import ResNetConfig

    config = ResNetConfig(embedding_size=16, hidden_sizes=[16, 32, 48, 64], depths=[1, 1, 1, 1], layer_type="basic")
    found = list_stages(config, BuildOptions(height=64, width=96))
    assert found.spec.stage_names == ("stem", "stage1", "stage2", "stage3", "stage4")
    assert (found.height, found.width) == (64, 96)
    assert list(found.spec.channels) == [16, 16, 32, 48, 64]


def test_the_command_lists_indices_and_refuses_a_typo(capsys):
    assert cli._run(["stages", "test_resnet", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert [row["index"] for row in said["stages"]] == list(range(len(said["stages"])))
    assert said["default"] == len(said["stages"]) - 1
    assert cli._run(["stages", "test_resnet", "--size", "64"]) == 0
    out = capsys.readouterr().out
    assert "test_resnet at 64 x 64" in out
    assert said["stages"][-1]["stage"] in out
    assert cli._run(["stages", "test_resnt"]) == 1
    assert "test_resnet" in capsys.readouterr().err
    with pytest.raises(SourceError, match="test_resnet"):
        list_stages("test_resnt")
