"""int8 graphs as the CPU engine takes them: against the same graph with unsigned tensors in ONNX Runtime."""

from __future__ import annotations

from pathlib import Path

import networks
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper
from torch import nn

from edge_backbones.engines.openvino import int8_graph as cpu_graph
from edge_backbones.engines.openvino.compile import compile_graph
from edge_backbones.engines.openvino.session import OpenVinoSession, core, read_model, settings
from edge_backbones.spec import Precision
from edge_backbones.toolchain.calibration.ranges import collect_magnitudes, find_ranges
from edge_backbones.toolchain.export import export_onnx
from edge_backbones.toolchain.prepare import prepare
from edge_backbones.toolchain.quantize.placement import tensors_to_calibrate
from edge_backbones.toolchain.quantize.typed_graph import write_typed_graph


class Residual(nn.Module):
    """A stem with a pooling behind its ReLU, a residual block, and a ReLU6: what is here, ResNets and MobileNets have."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.pool = nn.Conv2d(3, 32, 3, stride=2, padding=1), nn.MaxPool2d(3, 2, 1)
        self.first, self.second = nn.Conv2d(32, 32, 3, padding=1), nn.Conv2d(32, 32, 3, padding=1)
        self.wide, self.last = nn.Conv2d(32, 64, 1), nn.Conv2d(64, 32, 1)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x = self.pool(torch.relu(self.stem(x)))
        x = torch.relu(x + self.second(torch.relu(self.first(x))))
        return (self.last(nn.functional.relu6(self.wide(x))),)


class Signed(nn.Module):
    """Nothing to adapt: a tensor with both signs, and a Concat of one with a ReLU and one without."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(3, 32, 3, padding=1), nn.Conv2d(3, 32, 1)
        self.last, self.end = nn.Conv2d(64, 32, 3, padding=1), nn.Conv2d(32, 32, 1)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (self.end(self.last(torch.cat([torch.relu(self.left(x)), self.right(x)], 1))),)


class PooledFeature(nn.Module):
    """A pooling whose result is a feature map too."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.next = nn.Conv2d(3, 32, 3, padding=1), nn.Conv2d(32, 32, 3, padding=1)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        pooled = nn.functional.max_pool2d(torch.relu(self.stem(x)), 2)
        return pooled, self.next(pooled)


class BoundedAtSix(nn.Module):
    """Two of EfficientNet-Lite0's layers with a ReLU6 between them."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.last = nn.Conv2d(3, 64, 3, padding=1), nn.Conv2d(64, 32, 1)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (self.last(nn.functional.relu6(self.wide(x))),)


class ReluFeature(nn.Module):
    """A ReLU whose result is a feature map too."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.next = nn.Conv2d(3, 32, 3, padding=1), nn.Conv2d(32, 32, 3, padding=1)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        positive = torch.relu(self.stem(x))
        return positive, self.next(positive)


def typed_graph(
    net: nn.Module, folder: Path, images: np.ndarray, *, stages: int = 1, batch=(1, 2, 4), reach: float | None = None
) -> bytes:
    """An int8 graph. ``reach``: the range of every tensor, by default what the images reach."""
    torch.manual_seed(1)
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.15)
    height, width = images.shape[2:]
    loaded = networks.hand_made(net, stages=stages)
    graph = export_onnx(prepare(loaded, networks.input_spec(height, width, batch=batch)), folder / "fp32.onnx")
    ranges = find_ranges(collect_magnitudes(graph.path, tensors_to_calibrate(graph), [images]))
    if reach is not None:
        ranges = dict.fromkeys(ranges, reach)
    write_typed_graph(graph, precision=Precision.INT8, path=folder / "int8.onnx", ranges=ranges)
    return (folder / "int8.onnx").read_bytes()


def with_unsigned_tensors(graph: bytes) -> tuple[onnx.ModelProto, int]:
    """The graph with uint8 Q/DQ pairs behind each ReLU, 255 steps where there were 127, and how many."""
    model = onnx.load_from_string(graph)
    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    makers = {output: node for node in model.graph.node for output in node.output}

    def positive(name: str) -> bool:
        node = makers.get(name)
        if node is not None and node.op_type in ("MaxPool", "Cast"):
            return positive(node.input[0])
        return node is not None and (
            node.op_type == "Relu" or (node.op_type == "Clip" and arrays[node.input[1]].item() == 0)
        )

    unsigned = {
        node.output[0] for node in model.graph.node if node.op_type == "QuantizeLinear" and positive(node.input[0])
    }
    for node in model.graph.node:
        if (node.op_type == "QuantizeLinear" and node.output[0] in unsigned) or (
            node.op_type == "DequantizeLinear" and node.input[0] in unsigned
        ):
            scale = arrays[node.input[1]]
            names = [f"{node.input[0]}/{part}/{node.op_type}" for part in ("scale", "zero")]
            finer = (scale.astype(np.float64) * 127 / 255).astype(scale.dtype)
            for name, value in zip(names, (finer, np.zeros(scale.shape, np.uint8)), strict=True):
                model.graph.initializer.append(numpy_helper.from_array(value, name))
            node.input[1:] = names
    del model.graph.value_info[:]
    return model, len(unsigned)


def run(graph: bytes, images: np.ndarray, *, as_written: bool = False, outputs=("stage0",)) -> list[np.ndarray]:
    engine = compile_graph(graph, Precision.INT8, cache=None, as_written=as_written)
    session = OpenVinoSession(bytearray(engine.data), outputs=outputs)
    try:
        return [array.copy() for array in session.run(images)]
    finally:
        session.close()


def sqnr(reference: np.ndarray, actual: np.ndarray) -> float:
    noise = np.sum((actual.astype(np.float64) - reference) ** 2)
    return float(10 * np.log10(np.sum(reference.astype(np.float64) ** 2) / max(noise, 1e-30)))


@pytest.mark.parametrize("size", [(64, 64), (48, 96)])
@pytest.mark.parametrize("batch", [2, (1, 2, 4)], ids=["static", "dynamic"])
def test_all_levels_are_used_behind_a_relu(photographs, tmp_path, size, batch):
    net, images = Residual(), networks.normalised(networks.crops(photographs, 2, *size))
    graph = typed_graph(net, tmp_path, images, batch=batch)
    finer, count = with_unsigned_tensors(graph)
    assert count == 4
    [expected] = onnxruntime.InferenceSession(finer.SerializeToString(), providers=["CPUExecutionProvider"]).run(
        None, {"pixel_values": images}
    )
    [adapted], [as_written] = run(graph, images), run(graph, images, as_written=True)
    [reference] = networks.maps_of(net, images)
    # Two libraries round some values to different sides: the signed graph differs by 35 dB between them.
    assert sqnr(expected, adapted) > sqnr(expected, as_written) + 4
    assert sqnr(reference, adapted) > sqnr(reference, as_written) + 2
    assert sqnr(reference, adapted) == pytest.approx(sqnr(reference, expected), abs=1)


def kernels(graph: bytes, kind: str, *, adapted: bool = True) -> list[str]:
    """The number formats in which OpenVINO says that it runs nodes of a kind."""
    model = read_model(graph)
    if adapted:
        cpu_graph.adapt(model)
    compiled = core().compile_model(model, "CPU", settings(1))
    about = [node.get_rt_info() for node in compiled.get_runtime_model().get_ops()]
    return [info["runtimePrecision"].value for info in about if info["layerType"].value == kind]


def test_pooling_reads_what_was_rounded_before_it(photographs, tmp_path):
    graph = typed_graph(Residual(), tmp_path, networks.normalised(networks.crops(photographs, 2, 64, 64)), batch=2)
    assert kernels(graph, "Pooling", adapted=False) == ["f32"]
    assert kernels(graph, "Pooling") == ["u8"]
    # i8 and u8 are the format of the input, which AMX kernels tell apart and those of AVX512 do not.
    eight_bits = [[kind in ("i8", "u8") for kind in kernels(graph, "Convolution", adapted=a)] for a in (True, False)]
    assert eight_bits[0] == eight_bits[1]
    assert sum(eight_bits[0]) >= 4


@pytest.mark.parametrize(("net", "stages", "left"), [(Residual, 1, 0), (ReluFeature, 2, 1), (PooledFeature, 2, 1)])
def test_a_relu_that_rounding_does_is_left_out(photographs, tmp_path, net, stages, left):
    images = networks.normalised(networks.crops(photographs, 2, 32, 48))
    module = net()
    graph = typed_graph(module, tmp_path, images, stages=stages)
    model = read_model(graph)
    assert "Relu" in {node.get_type_name() for node in model.get_ops()}
    cpu_graph.adapt(model)
    assert [node.get_type_name() for node in model.get_ops()].count("Relu") == left
    names = [f"stage{index}" for index in range(stages)]
    for found, reference in zip(run(graph, images, outputs=names), networks.maps_of(module, images), strict=True):
        assert sqnr(reference, found) > 25
        assert reference.min() < 0 or found.min() == 0


@pytest.mark.parametrize(("reach", "left"), [(6.0, 0), (3.0, 0), (6.1, 1)], ids=["its bound", "below it", "above it"])
def test_a_relu6_that_rounding_does_is_left_out(photographs, tmp_path, reach, left):
    """Where the levels end above its bound, it still has to cut off what lies between the two."""
    images = networks.normalised(networks.crops(photographs, 2, 32, 48))
    graph = typed_graph(BoundedAtSix(), tmp_path, images, reach=reach)
    model = read_model(graph)
    cpu_graph.adapt(model)
    kinds = [node.get_type_name() for node in model.get_ops()]
    assert kinds.count("Minimum") + kinds.count("Clamp") == left
    levels = [node for node in model.get_ops() if node.get_type_name() == "FakeQuantize"]
    assert any(node.input_value(3).get_node().data.item() == 0 for node in levels)  # unsigned
    finer, count = with_unsigned_tensors(graph)
    assert count == 1
    session = onnxruntime.InferenceSession(finer.SerializeToString(), providers=["CPUExecutionProvider"])
    [expected], [adapted] = session.run(None, {"pixel_values": images}), run(graph, images)
    assert sqnr(expected, adapted) > 35


def test_a_pooled_feature_map_stays_unrounded(photographs, tmp_path):
    images = networks.normalised(networks.crops(photographs, 2, 32, 48))
    net = PooledFeature()
    graph = typed_graph(net, tmp_path, images, stages=2)
    names = ("stage0", "stage1")
    for found, reference in zip(run(graph, images, outputs=names), networks.maps_of(net, images), strict=True):
        assert sqnr(reference, found) > 25
    # The stem reads a rounded image; a map of 8-bit steps would have few values.
    assert len(np.unique(run(graph, images, outputs=names)[0])) > 1000


def test_what_has_both_signs_or_is_joined_is_left_alone(photographs, tmp_path):
    images = networks.normalised(networks.crops(photographs, 2, 32, 48))
    graph = typed_graph(Signed(), tmp_path, images)
    model = read_model(graph)
    before = sorted(node.get_friendly_name() for node in model.get_ops())
    cpu_graph.adapt(model)
    assert sorted(node.get_friendly_name() for node in model.get_ops()) == before
    np.testing.assert_array_equal(run(graph, images), run(graph, images, as_written=True))


def test_both_forms_are_cached_apart(photographs, tmp_path):
    graph = typed_graph(Residual(), tmp_path, networks.normalised(networks.crops(photographs, 2, 32, 32)))
    forms = [compile_graph(graph, Precision.INT8, cache=tmp_path, as_written=form) for form in (False, True)]
    again = [compile_graph(graph, Precision.INT8, cache=tmp_path, as_written=form) for form in (False, True)]
    assert [engine.from_cache for engine in (*forms, *again)] == [False, False, True, True]
    assert [engine.data for engine in again] == [engine.data for engine in forms]
    assert forms[0].data != forms[1].data
