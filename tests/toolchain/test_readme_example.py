"""The Python example of the README, run as it stands."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image
from transformers import DetrConfig, DetrForObjectDetection, TimmBackboneConfig

from build_scripts.photographs import write_crops
from edge_backbones import BuildOptions, build_bundle
from edge_backbones.spec import Precision

README = Path(__file__).parents[2] / "README.md"


def python_examples() -> list[str]:
    return re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)


def test_the_python_example_runs_and_prints_what_it_says(tmp_path, monkeypatch, capsys):
    code = python_examples()[0]
    assert len(code.strip().splitlines()) <= 11
    write_crops(tmp_path / "photographs", 12)
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})  # the point of the test
    assert capsys.readouterr().out.splitlines() == [
        "layer1 (2, 64, 56, 56)",
        "layer2 (2, 128, 28, 28)",
        "layer3 (2, 256, 14, 14)",
        "layer4 (2, 512, 7, 7)",
    ]


def test_the_example_with_a_camera_takes_its_frames_as_they_come(tmp_path, monkeypatch):
    (code,) = (example for example in python_examples() if "for frame in frames" in example)
    torch.manual_seed(0)
    net = timm.create_model("test_resnet", features_only=True).eval()
    options = BuildOptions(input="image", precisions=(Precision.FP32,), torchscript=False)
    build_bundle(net, tmp_path / "camera.bundle", options=options)
    monkeypatch.chdir(tmp_path)
    frame = np.random.default_rng(0).integers(0, 256, (1080, 1920, 3), dtype=np.uint8)
    found: dict[str, Any] = {"frames": [frame]}
    exec(compile(code, "README.md", "exec"), found)
    transform = timm.data.create_transform(
        **timm.data.resolve_data_config(pretrained_cfg=timm.get_pretrained_cfg("test_resnet").to_dict())
    )
    with torch.no_grad():
        expected = net(transform(Image.fromarray(frame))[None])
    assert len(found["feature_maps"]) == len(expected) > 1
    for one, of_torch in zip(found["feature_maps"], expected, strict=True):
        np.testing.assert_allclose(one, of_torch.numpy(), rtol=1e-4, atol=1e-5)


def test_the_example_with_a_whole_model_runs_on_a_small_one(tmp_path, monkeypatch):
    (code,) = (example for example in python_examples() if "replace_backbone" in example)
    code = code.replace("height=800, width=1088", "height=96, width=128")
    assert "height=96" in code
    torch.manual_seed(0)
    sizes = dict.fromkeys(("d_model", "encoder_ffn_dim", "decoder_ffn_dim"), 32)
    layers = dict.fromkeys(("encoder_layers", "decoder_layers"), 1)
    heads = dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 2)
    backbone = TimmBackboneConfig(backbone="test_resnet", out_indices=[1, 2, 3, 4])
    model = DetrForObjectDetection(DetrConfig(backbone_config=backbone, num_queries=5, **sizes, **layers, **heads))
    monkeypatch.setattr(DetrForObjectDetection, "from_pretrained", lambda name: model)
    write_crops(tmp_path / "photographs", 12)
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})
    assert not any("backbone" in name for name, _ in model.named_parameters())
    with torch.no_grad():
        logits = model(torch.randn(1, 3, 96, 128)).logits
    assert logits.shape == (1, 5, model.config.num_labels + 1)
    assert torch.isfinite(logits).all()
