"""EfficientNet-Lite0 with ImageNet's weights, and the photographs that calibrate and judge it, all from installed packages.

It is calibrated on crops of scikit-image's and scikit-learn's photographs and judged on foolbox's twenty of ImageNet, which
no crop is cut from. Twenty photographs show that something is broken; they do not show a point of accuracy.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config

from benchmarks.common import photograph_folder
from build_scripts import lite0
from build_scripts.photographs import imagenet_photographs

NAME = lite0.NETWORK
STAGES = (1, 2, 3, 4)


def calibration(network: Any, count: int) -> torch.Tensor:
    """Return ``count`` crops of photographs as the network takes them: float32 (count, 3, height, width)."""
    transform = _transform(network)
    crops = []
    for path in sorted(photograph_folder(count).glob("*.png")):
        with Image.open(path) as image:
            crops.append(transform(image.convert("RGB")))
    return torch.stack(crops)


def test_images(network: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Return foolbox's photographs as the network takes them, float32 (count, 3, height, width), and their labels, int64."""
    transform = _transform(network)
    images, labels = zip(*imagenet_photographs().values(), strict=True)
    return torch.stack([transform(image) for image in images]), torch.tensor(labels)


@functools.cache
def trained() -> Any:
    """Return the whole network of timm in eval mode."""
    return lite0.trained()


def _transform(network: Any) -> Any:
    return create_transform(**resolve_model_data_config(network))
