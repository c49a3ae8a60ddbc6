"""The accuracy benchmark: a network with ImageNet's weights, judged on photographs, beside results that stay as they are."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import accuracy, accuracy_peers, common, imagenet, readme_table
from build_scripts.photographs import imagenet_photographs

pytestmark = pytest.mark.filterwarnings("ignore")  # torch and timm warn about themselves

FEW = 8


@pytest.fixture
def few_crops(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(accuracy, "CALIBRATION", FEW)
    monkeypatch.setattr(common, "CACHE", tmp_path / "cache")


def test_the_case_of_imagenet_is_foolbox_s_photographs(few_crops: None) -> None:
    case = accuracy.load_case(imagenet.NAME, 0)
    assert case.calibration.shape == (FEW, 3, 224, 224)
    assert case.test.shape == (20, 3, 224, 224)
    assert case.labels.tolist() == [one.label for one in imagenet_photographs().values()]
    with torch.inference_mode():
        assert int((case.net(case.test).argmax(1) == case.labels).sum()) >= 17


def test_the_case_of_a_network_trained_on_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    net = torch.nn.Identity()
    monkeypatch.setattr(accuracy.digits, "trained", lambda name, seed: net)
    case = accuracy.load_case("resnet18", 2)
    assert (case.net, case.trained_on, len(case.labels)) == (net, "digits", 597)
    assert case.calibration.shape == (accuracy.CALIBRATION, 3, 32, 32)


def test_chosen_variants_are_measured_and_stored_beside_the_others(
    few_crops: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    out = tmp_path / "accuracy.json"
    out.write_text(accuracy.STORED.read_text(encoding="utf-8"), encoding="utf-8")
    before = json.loads(out.read_text(encoding="utf-8"))
    del before["networks"][imagenet.NAME], before["runs"][imagenet.NAME], before["summary"][imagenet.NAME]
    out.write_text(json.dumps(before), encoding="utf-8")
    names = ["--only", imagenet.NAME, "--variants", "int8 max"]
    monkeypatch.setattr(sys, "argv", ["accuracy", *names, "--out", str(out)])
    accuracy.main()
    after = json.loads(out.read_text(encoding="utf-8"))
    (run,) = after["runs"].pop(imagenet.NAME).values()
    assert list(run) == ["fp32", "int8 max"]
    assert run["fp32"]["agreement"] == 1
    assert 0.9 <= run["int8 max"]["agreement"] <= 1
    assert 10 < min(run["int8 max"]["sqnr_db"].values()) < 40 < min(run["fp32"]["sqnr_db"].values())
    network = after["networks"].pop(imagenet.NAME)
    assert (network["trained_on"], network["images"]) == ("ImageNet", 20)
    assert network["machine"].keys() == common.machine().keys()
    assert after["summary"].pop(imagenet.NAME).keys() == run.keys()
    assert after == before


def test_the_pages_count_photographs_and_keep_networks_of_each_data_set_apart() -> None:
    def variant(top1: float, agreement: float) -> dict[str, Any]:
        return {
            key: {"mean": mean} for key, mean in (("top1", top1), ("agreement", agreement), ("mean_sqnr_db", 22.04))
        }

    variants = {
        "fp32": variant(0.9, 1),
        "int8 within its gate": variant(0.85, 0.95),
        "auto": variant(0.9, 1),
        "nncf": variant(0, 0),
    }
    results = {
        "networks": {
            "lite0": {"trained_on": "ImageNet", "images": 20},
            "resnet18": {"trained_on": "digits", "images": 597},
        },
        "summary": {"lite0": variants, "resnet18": variants},
        "runs": {"lite0": {"0": {}}, "resnet18": {"0": {"auto": {"shipped": "int8"}}}},
    }
    rows = readme_table._accuracy(results)
    assert "| lite0 | 20 | 18 | 17 | 19 | 22.0 dB | 22.0 dB (NNCF) |" in rows
    assert [row.split(" | ")[0] for row in rows if row.startswith(("| lite0", "| resnet18"))] == [
        "| resnet18",
        "| lite0",
    ]


def test_a_peer_is_asked_with_the_same_images(few_crops: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A peer that answers with maps of zeros, in place of another tool: it must be judged as such."""
    script = tmp_path / "peer.py"
    script.write_text(
        "import sys, numpy as np, onnx\n"
        "kind, graph, images, out = sys.argv[1:]\n"
        "data = np.load(images)\n"
        f"assert data['calibration'].shape == ({FEW}, 3, 224, 224)\n"
        "maps = {}\n"
        "for o in onnx.load(graph).graph.output:\n"
        "    sizes = [d.dim_value for d in o.type.tensor_type.shape.dim][1:]\n"
        "    maps[o.name] = np.zeros((len(data['test']), *sizes), np.float32)\n"
        "np.savez(out, **maps)\n"
    )
    monkeypatch.setattr(accuracy_peers, "__file__", str(script))
    case = accuracy.load_case(imagenet.NAME, 0)
    found = accuracy.measure("lite0", case, ["nncf"], {})
    assert list(found) == ["fp32", "nncf"]
    assert found["nncf"]["agreement"] <= 0.2
    assert np.allclose(list(found["nncf"]["sqnr_db"].values()), 0, atol=1e-3)
