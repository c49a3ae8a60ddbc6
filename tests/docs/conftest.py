"""What the snippets of the documents find in their folder: photographs, a video, and three bundles of a small network."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from build_scripts.photographs import write_crops
from tests.photographs import quick_timing  # noqa: F401
from tests.videos import make_video


@pytest.fixture(scope="session")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``photographs/``, a video and three bundles of a network that builds quickly."""
    import timm
    import torch

    from edge_backbones import BuildOptions, build_bundle

    folder = tmp_path_factory.mktemp("workshop")
    write_crops(folder / "photographs", 8)
    make_video(folder / "clip.mp4")
    torch.manual_seed(0)
    net = timm.create_model("test_resnet", features_only=True, out_indices=(1, 2, 3, 4)).eval()
    images = folder / "photographs"
    int8 = BuildOptions(height=224, width=224, method="max", torchscript=False)
    build_bundle(net, folder / "resnet18.bundle", images=images, options=int8)
    camera = BuildOptions(height=224, width=224, input="image", precisions="fp32", torchscript=False)
    build_bundle(net, folder / "camera.bundle", options=camera)
    nv12 = BuildOptions(precisions=("fp32",), torchscript=False, input="frame", frame=(1080, 1920), color="nv12")
    build_bundle(net, folder / "nv12.bundle", options=nv12)
    return folder


@pytest.fixture
def workplace(workshop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the workshop, which a snippet may change: the working directory of the test."""
    folder = tmp_path / "work"
    shutil.copytree(workshop, folder)
    monkeypatch.chdir(folder)
    return folder
