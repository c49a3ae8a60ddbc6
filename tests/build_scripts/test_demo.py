"""The demo: which network it takes, and, from end to end, that int8 sees in photographs what fp32 sees."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from rich.console import Console
from safetensors.torch import save_file
from timm.data import create_transform, resolve_model_data_config

from build_scripts import demo, lite0, top1
from build_scripts.photographs import imagenet_photographs, photographs, photographs_of_things
from edge_backbones import Bundle
from edge_backbones.errors import MissingDependencyError

pytestmark = pytest.mark.filterwarnings("ignore")  # torch and timm warn about themselves

FEW_CROPS = 20  # 16 calibrate, 4 are held out


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, list[str]]:
    """The demo without a hub, as far as its labels: its folder, what it printed, and the names of its commands."""
    folder, printed, commands = tmp_path_factory.mktemp("demo"), io.StringIO(), []
    real = demo.edge_backbones

    def untimed(*arguments: object) -> None:
        commands.append(str(arguments[0]))
        if arguments[0] not in ("bench", "report"):
            real(*arguments)

    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.chdir(folder)
        patch.setattr(demo, "CROPS", FEW_CROPS)
        patch.setattr(demo, "edge_backbones", untimed)
        patch.setattr(demo, "hub_answers", lambda: False)
        patch.setattr(demo, "cached_weights", lambda repository: None)
        demo.main()
    return folder / demo.OUTPUT, printed.getvalue(), commands


def test_without_a_hub_it_draws_trained_features(finished: tuple[Path, str, list[str]]) -> None:
    output, printed, commands = finished
    assert commands == ["build", "run", "bench", "report"]
    source = Bundle.open(output / f"{lite0.NETWORK}.bundle").manifest.source
    assert (source.name, source.weights) == (lite0.NETWORK, "checkpoint")
    assert "random" not in printed
    with Image.open(output / "coffee.png") as picture:
        assert min(picture.size) > 500


def test_int8_sees_what_fp32_sees(finished: tuple[Path, str, list[str]]) -> None:
    _, printed, _ = finished
    same, count = map(int, re.search(r"top-1 agreement fp32/int8: (\d+) of (\d+)\n", printed).groups())
    assert count == len(photographs_of_things()) + len(imagenet_photographs())
    assert same >= 0.9 * count
    assert len(re.findall(r"coffee +espresso +0\.\d\d +espresso +0\.\d\d +yes", printed)) == 1


def test_the_demo_does_without_foolbox(
    finished: tuple[Path, str, list[str]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def absent() -> Any:
        raise MissingDependencyError("photographs of ImageNet", "dev")

    monkeypatch.setattr(demo, "imagenet_photographs", absent)
    choice = demo.Choice(lite0.NETWORK, "", lite0.trained)
    demo.show_labels(choice, finished[0] / f"{lite0.NETWORK}.bundle")
    assert f" of {len(photographs_of_things())}\n" in capsys.readouterr().out


def test_another_engine_is_seen_to_disagree(finished: tuple[Path, str, list[str]]) -> None:
    network = lite0.trained()
    with torch.no_grad():
        network.blocks[0][0].conv_dw.weight.mul_(-1)
    rows = top1.compare(network, finished[0] / f"{lite0.NETWORK}.bundle", photographs())
    assert sum(row.agrees for row in rows) < 0.5 * len(rows)


# ---- which network --------------------------------------------------------------------------------------------------


@pytest.fixture
def in_an_empty_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_hub_that_answers_gives_resnet50(monkeypatch: pytest.MonkeyPatch, in_an_empty_folder: Path) -> None:
    monkeypatch.setattr(demo, "hub_answers", lambda: True)
    monkeypatch.setattr(demo, "cached_weights", lambda repository: None)
    choice = demo.choose()
    assert (choice.name, choice.weights) == ("resnet50", "pretrained")
    assert not list(in_an_empty_folder.iterdir())


def test_a_cache_of_the_hub_gives_resnet50_with_the_cached_weights(
    monkeypatch: pytest.MonkeyPatch, in_an_empty_folder: Path
) -> None:
    cached = timm.create_model("resnet50", pretrained=False).state_dict()
    save_file({name: tensor.contiguous() for name, tensor in cached.items()}, in_an_empty_folder / "model.safetensors")
    monkeypatch.setattr(demo, "hub_answers", lambda: False)
    monkeypatch.setattr(
        demo, "cached_weights", lambda repository: {"file": str(in_an_empty_folder / "model.safetensors")}
    )
    choice = demo.choose()
    assert (choice.name, choice.weights) == ("resnet50", "pretrained")
    network = choice.network()
    assert not network.training
    assert torch.equal(network.state_dict()["fc.weight"], cached["fc.weight"])


# ---- what a network sees --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "index"), [("tf_efficientnet_lite0", 4), ("resnet50", 4), ("mobilenetv3_small_050", 4)]
)
def test_the_head_of_the_last_feature_map_is_the_network(name: str, index: int) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = timm.create_model(name, pretrained=False).eval()
    extractor = timm.create_model(name, pretrained=False, features_only=True, out_indices=(index,)).eval()
    extractor.load_state_dict(network.state_dict(), strict=False)
    images = torch.from_numpy(np.random.default_rng(0).normal(size=(2, 3, 96, 128)).astype(np.float32))
    with torch.inference_mode():
        (last,) = extractor(images)
        torch.testing.assert_close(top1.head(network, last.numpy()), network(images), rtol=1e-4, atol=1e-5)


def test_the_answer_has_a_name_and_a_probability() -> None:
    network = lite0.trained()
    with torch.inference_mode():
        logits = network(create_transform(**resolve_model_data_config(network))(photographs()["coffee"])[None])
    found = top1.answer(logits[0])
    assert (found.index, found.name) == (967, "espresso")
    assert found.probability == pytest.approx(float(logits.softmax(1).max()))


def test_the_table_fits_80_columns_and_says_where_the_answers_differ() -> None:
    espresso, cup = top1.Answer(967, "espresso", 0.954), top1.Answer(968, "cup", 1.0)
    rows = [top1.Comparison("coffee", espresso, espresso), top1.Comparison("motorcycle_left", espresso, cup)]
    console = Console(file=io.StringIO(), width=80, record=True)
    console.print(top1.table(rows, "title"))
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= 80
    assert re.search(r"coffee +espresso +0\.95 +espresso +0\.95 +yes", text)
    assert re.search(r"motorcycle_left +espresso +0\.95 +cup +1\.00 +no", text)
    assert top1.agreement(rows) == "top-1 agreement fp32/int8: 1 of 2"
