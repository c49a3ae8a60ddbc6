"""Graphs as ONNX Runtime gets them: against fp32 torch, against the graph as written, and what ONNX Runtime makes of them."""

from __future__ import annotations

import collections
import dataclasses
import sys
from pathlib import Path

import networks
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from test_int8_graph import PooledFeature, ReluFeature, Residual, Signed, sqnr, typed_graph
from torch import nn

from edge_backbones.engines.onnxruntime.compile import compile_graph, rewrite
from edge_backbones.errors import CompileError, MissingDependencyError
from edge_backbones.spec import Precision
from edge_backbones.toolchain.export import export_onnx
from edge_backbones.toolchain.prepare import prepare
from edge_backbones.toolchain.quantize.typed_graph import write_typed_graph


class LinearBottleneck(nn.Module):
    """Residual Adds without a ReLU behind them, and a ReLU6: what MobileNetV2 has."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.wide = nn.Conv2d(3, 32, 3, padding=1), nn.Conv2d(32, 64, 1)
        self.narrow, self.last = nn.Conv2d(64, 32, 1), nn.Conv2d(32, 32, 3, padding=1)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x = self.stem(x)
        return (torch.relu(self.last(x + self.narrow(nn.functional.relu6(self.wide(x))))),)


class Pointwise(nn.Module):
    """1x1 convolutions around a GELU and behind a LayerNorm over channels: what ConvNeXt has."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 32, 4, stride=4), nn.LayerNorm(32)
        self.wide, self.narrow = nn.Conv2d(32, 64, 1), nn.Conv2d(64, 32, 1, bias=False)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x = self.stem(x)
        inner = self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return (x + self.narrow(nn.functional.gelu(self.wide(inner))),)


class Attention(nn.Module):
    """A head of attention over pixels, with products of two activations, and linear layers with biases."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 8, stride=8)
        self.query, self.key, self.value, self.out = (nn.Linear(32, 32) for _ in range(4))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        maps = self.stem(x)
        tokens = maps.flatten(2).transpose(1, 2)
        weights = torch.softmax(self.query(tokens) @ self.key(tokens).transpose(1, 2) / 32, -1)
        result = self.out(weights @ self.value(tokens))
        return (maps + result.transpose(1, 2).reshape(maps.shape),)


@dataclasses.dataclass
class Ran:
    outputs: list[np.ndarray]
    kernels: collections.Counter[str]
    names: list[str]


def run(graph: bytes, images: np.ndarray, folder: Path) -> Ran:
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(folder / "optimised.onnx")
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    optimised = onnx.load(folder / "optimised.onnx")
    names = [port.name for port in (*session.get_inputs(), *session.get_outputs())]
    outputs = session.run(None, {"pixel_values": images})
    return Ran(outputs, collections.Counter(node.op_type for node in optimised.graph.node), names)


INTEGERS = ("QLinearConv", "QLinearAdd", "MatMulIntegerToFloat", "QLinearMatMul")
CASES = {  # how many of each kernel there are
    Residual: (3, 1, 1, 0),  # of 5: int8 leaves the stem out, and the last layer's result is a feature map
    LinearBottleneck: (2, 1, 0, 0),
    Pointwise: (0, 0, 2, 0),
    Attention: (0, 0, 5, 1),
}


@pytest.mark.parametrize("size", [(64, 64), (48, 96)])
@pytest.mark.parametrize("net", CASES, ids=lambda net: net.__name__)
def test_layers_become_integer_kernels(photographs, tmp_path, net, size):
    module, images = net(), networks.normalised(networks.crops(photographs, 3, *size))
    graph = typed_graph(module, tmp_path, images, batch=3 if net is Attention else (1, 2, 4))
    adapted, as_written = run(rewrite(graph, Precision.INT8), images, tmp_path), run(graph, images, tmp_path)
    assert adapted.names == as_written.names == ["pixel_values", "stage0"]
    assert tuple(adapted.kernels[kind] for kind in INTEGERS) == CASES[net]
    assert "Gemm" not in adapted.kernels
    [reference] = networks.maps_of(module, images)
    assert adapted.outputs[0].shape == reference.shape
    assert sqnr(reference, adapted.outputs[0]) > max(
        20, sqnr(reference, as_written.outputs[0]) - 3.5
    )  # a branch is rounded too


@pytest.mark.parametrize("net", [ReluFeature, PooledFeature])
def test_feature_maps_are_not_rounded(photographs, tmp_path, net):
    images = networks.normalised(networks.crops(photographs, 2, 32, 48))
    module = net()
    found = run(rewrite(typed_graph(module, tmp_path, images, stages=2), Precision.INT8), images, tmp_path)
    for reference, actual in zip(networks.maps_of(module, images), found.outputs, strict=True):
        assert sqnr(reference, actual) > 25
        assert len(np.unique(actual)) > 1000  # 8-bit steps would be 256 at most
    assert found.outputs[0].min() == networks.maps_of(module, images)[0].min()


def test_parts_of_a_concat_keep_one_scale(photographs, tmp_path):
    images = networks.normalised(networks.crops(photographs, 2, 32, 48))
    module = Signed()
    graph = typed_graph(module, tmp_path, images)
    [found], [as_written] = (run(g, images, tmp_path).outputs for g in (rewrite(graph, Precision.INT8), graph))
    [reference] = networks.maps_of(module, images)
    assert sqnr(reference, found) > sqnr(reference, as_written) - 1


@pytest.mark.parametrize("factor", [1, 20])
def test_what_a_branch_contributes_is_not_clipped(photographs, tmp_path, factor):
    """A branch may be much larger than the sum, where the skip branch takes most of it away."""
    images = networks.normalised(networks.crops(photographs, 2, 64, 64))

    class Opposed(Residual):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
            x = self.pool(torch.relu(self.stem(x))) * factor
            x = torch.relu(x + self.second(x))
            return (self.last(nn.functional.relu6(self.wide(x))),)

    module = Opposed()
    graph = typed_graph(module, tmp_path, images)
    adapted = run(rewrite(graph, Precision.INT8), images, tmp_path)
    assert adapted.kernels["QLinearAdd"] == 1
    [as_written], [reference] = run(graph, images, tmp_path).outputs, networks.maps_of(module, images)
    assert sqnr(reference, adapted.outputs[0]) > sqnr(reference, as_written) - 2


@pytest.mark.parametrize("precision", [Precision.FP16, Precision.BF16])
def test_half_precision_is_computed_in_float(photographs, tmp_path, precision):
    images = networks.normalised(networks.crops(photographs, 2, 48, 96))
    module = Pointwise()
    nn.init.normal_(module.stem.weight, std=0.1)
    loaded = networks.hand_made(module)
    graph = export_onnx(prepare(loaded, networks.input_spec(48, 96, batch=(1, 2, 4))), tmp_path / "fp32.onnx")
    write_typed_graph(graph, precision=precision, path=tmp_path / "half.onnx")
    data = (tmp_path / "half.onnx").read_bytes()
    rewritten = rewrite(data, precision)
    model = onnx.load_from_string(rewritten)
    halves = {TensorProto.FLOAT16, TensorProto.BFLOAT16}
    stored = {tensor.name for tensor in model.graph.initializer if tensor.data_type in halves}
    assert stored
    readers = [node for node in model.graph.node if stored & set(node.input)]
    assert {node.op_type for node in readers} == {"Cast"}  # which is done once, when the graph is loaded
    assert len(rewritten) < 1.3 * len(data)
    found = run(rewritten, images, tmp_path)
    assert "Cast" not in found.kernels
    assert found.names == ["pixel_values", "stage0"]
    [reference] = networks.maps_of(module, images)
    assert np.linalg.norm(found.outputs[0] - reference) < 2e-2 * np.linalg.norm(reference)
    assert sqnr(reference, found.outputs[0]) > (55 if precision is Precision.FP16 else 38)


def test_rewriting_gives_the_same_bytes_again(photographs, tmp_path):
    images = networks.normalised(networks.crops(photographs, 2, 32, 32))
    graph = typed_graph(Residual(), tmp_path, images)
    engine = compile_graph(graph, Precision.INT8)
    assert engine.data == rewrite(graph, Precision.INT8)
    assert engine.key.graph_sha256 != compile_graph(engine.data, Precision.FP32).key.graph_sha256
    assert compile_graph(graph, Precision.FP32).data == graph  # left as it is


def hand_written(*, axis: int = 0, zero: int = 0, scales: int = 2, named_inputs: int = 3) -> bytes:
    """A stranger's int8 Conv, with two output channels, whose weights have any axis, zero point and number of scales."""
    weight = np.arange(-36, 36, dtype=np.int8).reshape(2, 2, 3, 6)[..., :3].copy()
    arrays = {
        "scale": np.float32(0.05),
        "zero": np.int8(0),
        "weight": weight,
        "scales": np.array([0.1, 0.3], np.float32)[:scales],
        "zeros": np.full(scales, zero, np.int8),
    }
    nodes = [
        helper.make_node("QuantizeLinear", ["pixel_values", "scale", "zero"][:named_inputs], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["x"]),
        helper.make_node("DequantizeLinear", ["weight", "scales", "zeros"], ["w"], axis=axis),
        helper.make_node("Conv", ["x", "w"], ["y"], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["y"], ["z"]),
        helper.make_node("QuantizeLinear", ["z", "scale", "zero"], ["r"]),
        helper.make_node("DequantizeLinear", ["r", "scale", "zero"], ["stage0"]),
    ]
    ports = [helper.make_tensor_value_info(n, TensorProto.FLOAT, (1, 2, 5, 7)) for n in ("pixel_values", "stage0")]
    tensors = [numpy_helper.from_array(np.asarray(array), name) for name, array in arrays.items()]
    graph = helper.make_graph(nodes, "stranger", ports[:1], ports[1:], tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9).SerializeToString()


@pytest.mark.parametrize("odd", [{}, {"axis": 1}, {"zero": 3}, {"zero": 3, "axis": 1}, {"scales": 1}])
def test_a_strangers_weights_keep_their_values(tmp_path, odd):
    # The images lie on the levels, so that it does not matter whether they are rounded.
    graph, images = (
        hand_written(**odd),
        (0.05 * np.random.default_rng(0).integers(-120, 121, (1, 2, 5, 7))).astype(np.float32),
    )
    [found], [as_written] = (run(g, images, tmp_path).outputs for g in (rewrite(graph, Precision.INT8), graph))
    assert np.abs(found - as_written).max() < 0.06  # one level of the result


def test_a_strangers_odd_graph_is_refused(tmp_path):
    with pytest.raises(CompileError, match="this graph is refused: it is not an ONNX model"):
        rewrite(b"", Precision.INT8)
    branch = helper.make_graph([], "branch", [], [helper.make_tensor_value_info("x", TensorProto.FLOAT, (1,))])
    node = helper.make_node("If", ["c"], ["y"], then_branch=branch, else_branch=branch)
    port = helper.make_tensor_value_info("c", TensorProto.BOOL, ())
    control = helper.make_model(helper.make_graph([node], "g", [port], [port])).SerializeToString()
    with pytest.raises(CompileError, match="it has functions or control flow"):
        rewrite(control, Precision.INT8)
    with pytest.raises(
        CompileError, match=r"the int8 graph cannot be rewritten for ONNX Runtime .*: build the bundle again"
    ):
        rewrite(hand_written(named_inputs=1), Precision.INT8)


@pytest.mark.parametrize("library", ["onnx", "onnx_ir"])
def test_a_missing_library_is_named_with_its_install_command(monkeypatch, library):
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(MissingDependencyError, match=rf"{library} is not installed.*edge-backbones\[onnxruntime\]"):
        compile_graph(hand_written(), Precision.INT8)
    compile_graph(hand_written(), Precision.FP32)  # which is not rewritten
