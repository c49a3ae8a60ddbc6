"""Small networks with the statistics of trained ones, and the specs that go with them. Untouched batch norm (mean 0,
variance 1) would hide a wrong fold, so every batch norm here is randomised."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from edge_backbones.bundle.manifest import Source
from edge_backbones.images.config import ImageConfig
from edge_backbones.spec import BackboneSpec, InputSpec, ShapeRange
from edge_backbones.toolchain.artifacts import LoadedBackbone
from edge_backbones.toolchain.sources.base import SourceOptions
from edge_backbones.toolchain.sources.timm import load_timm
from tests.photographs import crops  # noqa: F401

PLAIN = ImageConfig(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))


def randomise_batch_norm(module: nn.Module, seed: int = 0) -> None:
    """Statistics and affine parameters as training leaves them: all different, some scales negative."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for norm in module.modules():
            if isinstance(norm, nn.modules.batchnorm._BatchNorm) and norm.track_running_stats:
                norm.running_mean.normal_(0, 0.3, generator=generator)
                norm.running_var.uniform_(0.5, 2, generator=generator)
                norm.weight.uniform_(-0.3, 1.4, generator=generator)
                norm.bias.normal_(0, 0.3, generator=generator)


def trained_like(name: str, **options: Any) -> LoadedBackbone:
    """A timm backbone with seeded weights and randomised batch norm."""
    loaded = load_timm(name, SourceOptions(**{"weights": "random:0", **options}))
    randomise_batch_norm(loaded.module)
    return loaded


def hand_made(module: nn.Module, *, stages: int = 1) -> LoadedBackbone:
    """A plain module that returns a tuple of ``stages`` maps, as a loaded backbone; batch norm is randomised."""
    randomise_batch_norm(module)
    names = tuple(f"stage{i}" for i in range(stages))
    return LoadedBackbone(
        module=module.eval(),
        source=Source(library="timm", name="hand made", weights="random", seed=0),
        image_config=PLAIN,
        channels_in=3,
        height=64,
        width=96,
        spec=BackboneSpec(
            stage_names=names,
            out_features=names,
            out_indices=tuple(range(stages)),
            channels=(1,) * stages,
            strides=((1, 1),) * stages,
            num_features=(1,) * stages,
            layouts=("NCHW",) * stages,
        ),
    )


def sizes(spec: int | tuple[int, int, int]) -> ShapeRange:
    return ShapeRange.fixed(spec) if isinstance(spec, int) else ShapeRange(min=spec[0], opt=spec[1], max=spec[2])


def input_spec(
    height: int | tuple[int, int, int],
    width: int | tuple[int, int, int],
    *,
    batch: int | tuple[int, int, int] = 1,
    name: str = "pixel_values",
    channels: int = 3,
    size_multiple: int = 1,
) -> InputSpec:
    """Fixed sizes are integers, ranges are (min, opt, max)."""
    return InputSpec(
        name="image" if name == "image" else "pixel_values",
        channels=channels,
        batch=sizes(batch),
        height=sizes(height),
        width=sizes(width),
        size_multiple=size_multiple,
    )


def normalised(images: np.ndarray, config: ImageConfig = PLAIN) -> np.ndarray:
    """uint8 NHWC to network input, in float64 and one step at a time: the reference for the quick ways."""
    scaled = images.astype(np.float64) / 255.0
    channels = [(scaled[..., c] - config.mean[c]) / config.std[c] for c in range(len(config.mean))]
    return np.stack(channels, axis=1).astype(np.float32)


def maps_of(module: nn.Module, pixel_values: np.ndarray) -> list[np.ndarray]:
    with torch.no_grad():
        return [feature_map.numpy() for feature_map in module(torch.from_numpy(pixel_values))]


def relative(actual: np.ndarray, expected: np.ndarray) -> float:
    """Frobenius norm of the difference over that of the reference, in float64."""
    assert actual.shape == expected.shape
    difference = actual.astype(np.float64) - expected.astype(np.float64)
    return float(np.linalg.norm(difference) / np.linalg.norm(expected.astype(np.float64)))
