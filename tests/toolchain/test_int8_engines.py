"""int8 graphs through the real engine, in the forms that the engine library once computed wrong: against ONNX Runtime."""

from __future__ import annotations

from pathlib import Path

import networks
import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn

from edge_backbones.engines.openvino.compile import compile_graph
from edge_backbones.engines.openvino.session import OpenVinoSession
from edge_backbones.spec import Precision
from edge_backbones.toolchain.artifacts import TypedGraph
from edge_backbones.toolchain.calibration.ranges import collect_magnitudes, find_ranges
from edge_backbones.toolchain.export import export_onnx
from edge_backbones.toolchain.prepare import prepare
from edge_backbones.toolchain.quantize.placement import tensors_to_calibrate
from edge_backbones.toolchain.quantize.typed_graph import write_typed_graph


class Joined(nn.Module):
    """A Concat of branches in front of a convolution, with or without a Relu between."""

    def __init__(self, relu: bool) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(3, 32, 3, padding=1), nn.Conv2d(3, 32, 1)
        self.last, self.relu = nn.Conv2d(64, 32, 3, padding=1), relu

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        joined = torch.cat([self.left(x), torch.cat([self.right(x)], 1)], 1)
        return (self.last(torch.relu(joined) if self.relu else joined),)


class ReadTwice(nn.Module):
    """A convolution without bias whose result two nodes read."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 32, 3, padding=1)
        self.second = nn.Conv2d(32, 32, 3, padding=1, bias=False)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y = self.second(self.first(x))
        return (y + torch.sigmoid(y),)


def sqnr(reference: np.ndarray, actual: np.ndarray) -> float:
    noise = np.sum((actual.astype(np.float64) - reference) ** 2)
    return float(10 * np.log10(np.sum(reference.astype(np.float64) ** 2) / max(noise, 1e-30)))


@pytest.mark.parametrize("net", [Joined(False), Joined(True), ReadTwice()], ids=["concat", "concat relu", "no bias"])
@pytest.mark.parametrize("batch", [2, (1, 2, 4)], ids=["static", "dynamic"])
def test_the_engine_computes_what_the_int8_graph_says(net, batch, photographs, tmp_path: Path):
    torch.manual_seed(0)
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.1)
    loaded = networks.hand_made(net)
    input = networks.input_spec(32, 48, batch=batch)
    graph = export_onnx(prepare(loaded, input), tmp_path / "fp32.onnx")
    images = networks.normalised(networks.crops(photographs, 2, 32, 48))
    ranges = find_ranges(collect_magnitudes(graph.path, tensors_to_calibrate(graph), [images]))
    typed = write_typed_graph(graph, precision=Precision.INT8, path=tmp_path / "int8.onnx", ranges=ranges)
    assert isinstance(typed, TypedGraph)
    expected = onnxruntime.InferenceSession(typed.path, providers=["CPUExecutionProvider"]).run(
        None, {"pixel_values": images}
    )[0]
    compiled = compile_graph(typed.path.read_bytes(), Precision.INT8, cache=None, as_written=True)
    engine = OpenVinoSession(bytearray(compiled.data), outputs=("stage0",))
    (actual,) = engine.run(images)
    (reference,) = networks.maps_of(net, images)
    assert sqnr(reference, expected) > 20
    assert sqnr(expected, actual) > 25


def test_fold_becomes_a_node_that_tensorrt_has(photographs, tmp_path: Path):
    class Folding(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 1)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
            y = self.conv(x)
            patches = nn.functional.unfold(y, 3, padding=1, stride=2)
            return (nn.functional.fold(patches, tuple(x.shape[2:]), 3, padding=1, stride=2),)

    net = Folding()
    graph = export_onnx(
        prepare(networks.hand_made(net), networks.input_spec(32, 48, batch=(1, 2, 4))), tmp_path / "fp32.onnx"
    )
    session = onnxruntime.InferenceSession(graph.path, providers=["CPUExecutionProvider"])
    images = networks.normalised(networks.crops(photographs, 3, 32, 48))
    assert networks.relative(session.run(None, {"pixel_values": images})[0], networks.maps_of(net, images)[0]) < 1e-5
    import onnx

    assert "Col2Im" not in {node.op_type for node in onnx.load(graph.path).graph.node}
