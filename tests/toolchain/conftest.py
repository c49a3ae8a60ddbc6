"""Bundles that are built once for the whole run: treat them as read-only, or take ``copy_of``."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from edge_backbones.spec import Precision, ShapeRange
from edge_backbones.toolchain.build import BuildResult, build_bundle
from edge_backbones.toolchain.options import BuildOptions
from tests.photographs import photograph_folder, photographs, quick_timing

__all__ = ["photograph_folder", "photographs", "quick_timing"]  # fixtures that are shared with other suites

FP32 = {"weights": "random:0", "precisions": (Precision.FP32,), "cache": None}


@pytest.fixture(scope="session")
def cnn(photograph_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> BuildResult:
    """test_efficientnet, batch 2, 64 x 96, two of its five stages."""
    return build_bundle(
        "test_efficientnet",
        tmp_path_factory.mktemp("cnn") / "cnn.bundle",
        images=photograph_folder,
        options=BuildOptions(**FP32, batch=2, height=64, width=96, out_indices=(1, -2), golden=3),
    )


@pytest.fixture(scope="session")
def vit(photograph_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> BuildResult:
    """test_vit on camera frames, batch 1, 64 x 96."""
    return build_bundle(
        "test_vit",
        tmp_path_factory.mktemp("vit") / "vit.bundle",
        images=photograph_folder,
        options=BuildOptions(**FP32, input="image", height=64, width=96, out_indices=(-3, -1), torchscript=False),
    )


@pytest.fixture(scope="session")
def dynamic(photograph_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> BuildResult:
    """test_resnet with a batch of 2 to 4 images of 64 to 128 pixels in steps of 32."""
    size = ShapeRange(min=64, opt=96, max=128)
    return build_bundle(
        "test_resnet",
        tmp_path_factory.mktemp("dynamic") / "dynamic.bundle",
        images=photograph_folder,
        options=BuildOptions(
            **FP32,
            batch=ShapeRange(min=2, opt=2, max=4),
            height=size,
            width=size,
            out_indices=(2, 4),
            torchscript=False,
        ),
    )


@pytest.fixture
def copy_of(tmp_path: Path) -> Callable[[BuildResult], Path]:
    """A copy of a built bundle that a test may change."""

    def copied(result: BuildResult) -> Path:
        return Path(shutil.copytree(result.bundle.path, tmp_path / result.bundle.path.name))

    return copied
