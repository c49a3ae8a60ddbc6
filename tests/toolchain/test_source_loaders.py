"""Sources of other packages: an entry point gives a loader, and it makes the backbone."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from edge_backbones.engines.onnxruntime.library import onnxruntime
from edge_backbones.errors import SourceError
from edge_backbones.spec import InputSpec, ShapeRange
from edge_backbones.toolchain.export import export_onnx
from edge_backbones.toolchain.prepare import prepare
from edge_backbones.toolchain.sources.base import SourceOptions
from edge_backbones.toolchain.sources.load import ENTRY_POINTS, LOADERS, load_source

MADE_UP = """
import torch
from torch import nn

from edge_backbones.bundle.manifest import Source
from edge_backbones.images.config import ImageConfig
from edge_backbones.spec import BackboneSpec
from edge_backbones.toolchain.artifacts import LoadedBackbone

IMPORTED = True


class Halving(nn.Module):
    def __init__(self, channels, width):
        super().__init__()
        self.conv = nn.Conv2d(channels, width, 2, stride=2)

    def forward(self, pixel_values):
        return (torch.relu(self.conv(pixel_values)),)


class Loader:
    def matches(self, source):
        return isinstance(source, str) and source.startswith("made-up:")

    def load(self, source, options):
        width = int(source.partition(":")[2])
        channels = options.num_channels or 3
        height, width_of_image = options.img_size or (32, 48)
        return LoadedBackbone(
            module=Halving(channels, width).eval(),
            source=Source(library="torch", name=source, weights="module"),
            image_config=ImageConfig(mean=(0.5,) * channels, std=(0.5,) * channels),
            channels_in=channels,
            height=height,
            width=width_of_image,
            spec=BackboneSpec(
                stage_names=("half",),
                out_features=("half",),
                out_indices=(0,),
                channels=(width,),
                strides=((2, 2),),
                num_features=(width,),
                layouts=("NCHW",),
            ),
        )


loader = Loader()


class Careless:
    def matches(self, source):
        return source == "careless"

    def load(self, source, options):
        return source
"""


def install(folder: Path, monkeypatch: pytest.MonkeyPatch, entry: str, *, code: str = MADE_UP) -> None:
    """Put an installed package with one entry point on the path: what pip leaves behind."""
    (folder / "made_up_source.py").write_text(code)
    info = folder / "made_up_source-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: made-up-source\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{ENTRY_POINTS}]\nmade-up = {entry}\n")
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, "made_up_source", raising=False)


@pytest.mark.parametrize("entry", ["made_up_source:Loader", "made_up_source:loader"])
def test_a_registered_loader_makes_a_backbone_that_is_exported(entry, tmp_path, monkeypatch):
    install(tmp_path, monkeypatch, entry)
    loaded = load_source("made-up:8", SourceOptions(num_channels=1))
    assert (loaded.source.name, loaded.channels_in, loaded.spec.channels) == ("made-up:8", 1, (8,))
    fixed = ShapeRange.fixed
    input = InputSpec(name="pixel_values", channels=1, batch=fixed(1), height=fixed(32), width=fixed(48))
    graph = export_onnx(prepare(loaded, input), tmp_path / "fp32.onnx")
    image = np.random.default_rng(0).standard_normal((1, 1, 32, 48), np.float32)
    session = onnxruntime.InferenceSession(graph.path, providers=["CPUExecutionProvider"])
    with torch.no_grad():
        expected = loaded.module(torch.from_numpy(image))[0].numpy()
    np.testing.assert_allclose(session.run(["half"], {"pixel_values": image})[0], expected, rtol=1e-4, atol=1e-5)


def test_our_own_loaders_are_asked_first_and_no_other_is_imported_for_them(tmp_path, monkeypatch):
    install(tmp_path, monkeypatch, "made_up_source:Loader", code="raise RuntimeError('imported')")
    assert load_source("test_resnet", SourceOptions(weights="random:0")).source.library == "timm"


def test_a_loader_that_is_broken_is_named(tmp_path, monkeypatch):
    install(tmp_path, monkeypatch, "made_up_source:Loader", code="raise RuntimeError('no wonder')")
    with pytest.raises(SourceError, match=r"source made-up \(made_up_source:Loader\) cannot be imported: .*no wonder"):
        load_source("made-up:8", SourceOptions())


def test_a_loader_that_returns_something_else_is_named(tmp_path, monkeypatch):
    install(tmp_path, monkeypatch, "made_up_source:Careless")
    with pytest.raises(SourceError, match="source made-up returned a str, not a LoadedBackbone"):
        load_source("careless", SourceOptions())


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("made-up:8", "timm has no model 'made-up:8'"),
        ("resnet1", "timm has no model 'resnet1'. Near names: resnet"),
        ("./nowhere", "nowhere does not exist"),
        (7, "a int is no source"),
    ],
)
def test_without_a_loader_the_refusals_are_the_usual_ones(source, words):
    with pytest.raises(SourceError, match=re.escape(words)):
        load_source(source, SourceOptions())


def test_what_no_loader_of_ours_knows_is_left_to_others(tmp_path):
    for source in (None, 7, b"", "", "~", "a\0b", tmp_path, tmp_path / "x.json", object(), []):
        assert [loader.matches(source) for loader in LOADERS].count(True) == 0, source
