"""Which layers int8 and fp8 leave in half because nothing goes around them."""

from __future__ import annotations

from pathlib import Path

import networks
import pytest
import torch
from torch import nn

from edge_backbones.spec import Precision
from edge_backbones.toolchain.artifacts import ExportedGraph
from edge_backbones.toolchain.export import export_onnx
from edge_backbones.toolchain.prepare import prepare
from edge_backbones.toolchain.quantize.placement import quantized_layers


class Stage(nn.Module):
    """A residual block over (batch, positions, channels)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm, self.wide, self.narrow = nn.LayerNorm(channels), nn.Linear(channels, 256), nn.Linear(256, channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.narrow(nn.functional.gelu(self.wide(self.norm(x))))


class Merging(nn.Module):
    """Two stages with a merging between them, as in Swin; each ends in a map. ``around``: a second path past the merging."""

    def __init__(self, *, around: bool = False) -> None:
        super().__init__()
        self.stem, self.around = nn.Conv2d(3, 32, 4, stride=4), around
        self.one, self.norm, self.merge, self.two = Stage(32), nn.LayerNorm(32), nn.Linear(32, 48), Stage(48)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x = self.stem(x)
        batch, _, height, width = x.shape
        first = self.one(x.flatten(2).transpose(1, 2))
        merged = self.merge(self.norm(first))
        if self.around:
            merged = merged + nn.functional.pad(first, (0, 16))
        second = self.two(merged)
        return tuple(x.transpose(1, 2).reshape(batch, -1, height, width) for x in (first, second))


class Chain(nn.Module):
    """Nothing but products with weights, one behind another."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.layers = nn.Conv2d(3, 32, 4, stride=4), nn.ModuleList(nn.Linear(32, 32) for _ in range(4))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x = self.stem(x).permute(0, 2, 3, 1)
        for layer in self.layers:
            x = torch.relu(layer(x))
        return (x.permute(0, 3, 1, 2),)


def exported(net: nn.Module, folder: Path, *, stages: int, batch: int | tuple[int, int, int] = 1) -> ExportedGraph:
    loaded = networks.hand_made(net, stages=stages)
    return export_onnx(prepare(loaded, networks.input_spec(64, 96, batch=batch)), folder / "fp32.onnx")


@pytest.mark.parametrize("precision", [Precision.INT8, Precision.FP8])
@pytest.mark.parametrize("batch", [1, (1, 2, 4)], ids=["one image", "any number"])
def test_a_product_that_everything_passes_through_stays_in_half(batch, precision, tmp_path):
    graph = exported(Merging(), tmp_path, stages=2, batch=batch)
    names = {layer.name for layer in quantized_layers(graph, precision) if layer.op_type == "MatMul"}
    assert names == {f"{stage}.{layer}/MatMul" for stage in ("one", "two") for layer in ("wide", "narrow")}


def test_a_product_with_a_path_around_it_is_quantised(tmp_path):
    graph = exported(Merging(around=True), tmp_path, stages=2)
    assert "merge/MatMul" in {layer.name for layer in quantized_layers(graph)}


def test_a_network_without_branches_is_quantised(tmp_path):
    graph = exported(Chain(), tmp_path, stages=1)
    assert {f"layers.{index}/MatMul" for index in range(4)} <= {layer.name for layer in quantized_layers(graph)}
