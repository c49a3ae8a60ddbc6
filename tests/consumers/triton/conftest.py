"""Bundles of a small network, as Triton serves them."""

from __future__ import annotations

from pathlib import Path

import pytest

from build_scripts.photographs import write_crops
from edge_backbones import BuildOptions, Bundle, ShapeRange, build_bundle
from tests.photographs import quick_timing  # noqa: F401


@pytest.fixture(scope="session")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photographs")
    write_crops(folder, 6)
    return folder


@pytest.fixture(scope="session")
def bundles(tmp_path_factory: pytest.TempPathFactory, photographs: Path) -> dict[str, Bundle]:
    """net: batches 1 to 4, int8 and fp32. camera: one uint8 image, float16 maps in channels-last memory. sizes: heights and
    widths that vary, a batch of 2. frames: NV12 frames of a camera."""
    import timm
    import torch

    folder = tmp_path_factory.mktemp("bundles")
    torch.manual_seed(0)
    net = timm.create_model("test_resnet", features_only=True, out_indices=(1, 2, 3, 4)).eval()
    common = {"torchscript": False, "precisions": "fp32", "height": 64, "width": 96}
    options = {
        "net": {"batch": ShapeRange(min=1, opt=2, max=4), "precisions": ("int8", "fp32"), "method": "max"},
        "camera": {"input": "image", "maps": ("float16", "channels-last"), "batch": 1},
        "sizes": {
            "height": ShapeRange(min=64, opt=96, max=128), "width": ShapeRange(min=96, opt=128, max=160), "batch": 2,
        },
        "frames": {"input": "frame", "frame": (120, 160), "color": "nv12"},
    }  # fmt: skip
    for name, own in options.items():
        images = photographs if "int8" in own.get("precisions", ()) else None
        build_bundle(net, folder / f"{name}.bundle", images=images, options=BuildOptions(**{**common, **own}))
    return {name: Bundle.open(folder / f"{name}.bundle") for name in options}
