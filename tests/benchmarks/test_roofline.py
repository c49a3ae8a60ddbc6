"""Operations and bytes of graphs, counted by hand and by torch; what follows from them and a machine's ceilings."""

from __future__ import annotations

import msgspec
import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import roofline as module
from benchmarks.roofline import Ceilings, Roofline, Work, count_graph, measure_ceilings, roofline
from edge_backbones.engines.openvino.session import core, settings
from edge_backbones.errors import InputError
from edge_backbones.parity_report import Gate
from edge_backbones.spec import Precision, ShapeRange
from edge_backbones.toolchain.build import build_bundle
from edge_backbones.toolchain.export import export_onnx
from edge_backbones.toolchain.options import BuildOptions
from edge_backbones.toolchain.prepare import prepare
from tests.toolchain import networks


def write(path, nodes, input_shape, outputs=("y",), constants=None, dtype=TensorProto.FLOAT):
    """A graph with the input x; ``constants``: arrays by name."""
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", dtype, input_shape)],
        [helper.make_tensor_value_info(name, dtype, None) for name in outputs],
        [numpy_helper.from_array(value, name) for name, value in (constants or {}).items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return path


def zeros(*shape, dtype=np.float32):
    return np.zeros(shape, dtype)


# ---- counted by hand


def test_a_convolution_with_groups_stride_and_dilation(tmp_path):
    node = helper.make_node(
        "Conv",
        ["x", "w", "b"],
        ["y"],
        group=2,
        strides=[2, 1],
        dilations=[2, 2],
        pads=[2, 2, 2, 2],
        kernel_shape=[3, 3],
    )
    path = write(tmp_path / "g.onnx", [node], [1, 8, 16, 12], constants={"w": zeros(6, 4, 3, 3), "b": zeros(6)})
    # Rows: (16 + 4 - 5) // 2 + 1 = 8; columns: 12 + 4 - 5 + 1 = 12.
    assert count_graph(path, (1, 8, 16, 12)) == Work(
        operations={"fp32": 2 * (6 * 8 * 12) * (4 * 3 * 3)},
        activation_bytes=4 * (8 * 16 * 12 + 6 * 8 * 12),
        weight_bytes=4 * (6 * 4 * 3 * 3 + 6),
    )


@pytest.mark.parametrize(("trans_a", "x", "w"), [(0, (5, 7), (3, 7)), (1, (7, 5), (3, 7))])
def test_a_transposed_gemm(tmp_path, trans_a, x, w):
    node = helper.make_node("Gemm", ["x", "w", "b"], ["y"], transA=trans_a, transB=1)
    work = count_graph(write(tmp_path / "g.onnx", [node], x, constants={"w": zeros(*w), "b": zeros(3)}), x)
    assert work.operations == {"fp32": 2 * 5 * 3 * 7 / x[0]}
    assert work.weight_bytes == 4 * (21 + 3)


def test_matrices_in_a_batch_that_is_free(tmp_path):
    """Attention: both operands are activations, seen through views; the batch is not in the graph."""
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["q"]),
        helper.make_node("Transpose", ["q"], ["k"], perm=[0, 2, 1]),
        helper.make_node("MatMul", ["q", "k"], ["y"]),
    ]
    path = write(tmp_path / "g.onnx", nodes, ["batch", 10, 6], constants={"w": zeros(6, 4)})
    for batch in (1, 3):
        work = count_graph(path, (batch, 10, 6))
        assert work.operations == {"fp32": 2 * 10 * 6 * 4 + 2 * 10 * 4 * 10}
        # x, q written, q read once by the second product although it is both operands, y.
        assert work.activation_bytes == 4 * (60 + 40 + 40 + 100)
        assert work.weight_bytes == 4 * 24


def test_formats_are_those_of_the_tensors_that_are_stored(tmp_path):
    """int8 convolution, Relu, Q: one byte each way. Then half: a depthwise one reads the same 8 bits in half."""
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["x.int8"]),
        helper.make_node("DequantizeLinear", ["x.int8", "s", "z"], ["x.back"]),
        helper.make_node("DequantizeLinear", ["w.int8", "s", "z"], ["w"]),
        helper.make_node("Conv", ["x.back", "w"], ["a"]),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("QuantizeLinear", ["b", "s", "z"], ["b.int8"]),
        helper.make_node("DequantizeLinear", ["b.int8", "s", "z"], ["b.back"]),
        helper.make_node("Conv", ["b.back", "v"], ["y"], group=4),
    ]
    half = np.float16
    constants = {
        "s": np.array(0.1, half),
        "z": np.array(0, np.int8),
        "w.int8": zeros(4, 2, 1, 1, dtype=np.int8),
        "v": zeros(4, 1, 1, 1, dtype=half),
    }
    path = write(tmp_path / "g.onnx", nodes, [1, 2, 5, 5], constants=constants, dtype=TensorProto.FLOAT16)
    work = count_graph(path, (1, 2, 5, 5))
    assert work.operations == {"int8": 2 * 100 * 2, "fp16": 2 * 100}
    assert work.activation_bytes == 50 + 100 + 100 + 2 * 100
    assert work.weight_bytes == 8 + 2 * 4


def test_a_weight_that_is_shared_is_read_once(tmp_path):
    nodes = [helper.make_node("MatMul", ["x", "w"], ["a"]), helper.make_node("MatMul", ["a", "w"], ["y"])]
    assert (
        count_graph(write(tmp_path / "g.onnx", nodes, [3, 4], constants={"w": zeros(4, 4)}), (3, 4)).weight_bytes == 64
    )


# ---- what cannot be counted


def test_graphs_that_are_refused(tmp_path):
    path = write(
        tmp_path / "fixed.onnx", [helper.make_node("MatMul", ["x", "w"], ["y"])], [1, 4], constants={"w": zeros(4, 4)}
    )
    with pytest.raises(InputError, match=r"fixed\.onnx is fixed to 1 where the input of \(2, 4\) has 2"):
        count_graph(path, (2, 4))
    with pytest.raises(InputError, match="does not take one input of 3 axes"):
        count_graph(path, (1, 4, 4))
    nodes = [
        helper.make_node("NonZero", ["x"], ["where"]),  # as many as there are
        helper.make_node("Cast", ["where"], ["f"], to=TensorProto.FLOAT),
        helper.make_node("MatMul", ["w", "f"], ["y"]),
    ]
    path = write(tmp_path / "values.onnx", nodes, [1, 4], constants={"w": zeros(2, 2)})
    with pytest.raises(InputError, match=r"the shape of .* stays unknown in values\.onnx"):
        count_graph(path, (1, 4))
    path = write(
        tmp_path / "wrong.onnx",
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        ["n", "m"],
        constants={"w": zeros(4, 4)},
    )
    with pytest.raises(InputError, match=r"no shapes in wrong\.onnx for an input of \(1, 5\): .*MatMul"):
        count_graph(path, (1, 5))


# ---- against torch


@pytest.mark.parametrize(
    ("name", "options"),
    [("resnet18", {}), ("mobilenetv3_small_100", {}), ("vit_tiny_patch16_224", {"img_size": (64, 96)})],
)
def test_torch_counts_the_same(tmp_path, name, options):
    spec = networks.input_spec(64, 96, batch=2)
    prepared = prepare(networks.trained_like(name, **options), spec)
    graph = export_onnx(prepared, tmp_path / "g.onnx")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        prepared.module(torch.zeros(2, 3, 64, 96))
    work = count_graph(graph.path, (2, 3, 64, 96))
    assert work.operations == {"fp32": counter.get_total_flops() / 2}
    assert work.weight_bytes <= 4 * sum(p.numel() for p in prepared.module.parameters())


def test_a_free_batch_and_size_counts_like_a_fixed_one(tmp_path):
    loaded = networks.trained_like("test_resnet", out_indices=(1, 4))
    free = export_onnx(
        prepare(loaded, networks.input_spec((64, 96, 160), (32, 64, 128), batch=(1, 2, 8), size_multiple=32)),
        tmp_path / "free.onnx",
    )
    fixed = export_onnx(prepare(loaded, networks.input_spec(96, 64, batch=4)), tmp_path / "fixed.onnx")
    assert count_graph(free.path, (4, 3, 96, 64)) == count_graph(fixed.path, (4, 3, 96, 64))
    small = count_graph(free.path, (1, 3, 64, 32))
    assert small.operations["fp32"] * 3 == count_graph(free.path, (1, 3, 96, 64)).operations["fp32"]


@pytest.mark.parametrize("name", ["test_vit", "test_efficientnet"])
def test_a_camera_frame_of_a_free_batch(tmp_path, name):
    """uint8 NHWC in: the graph's own preprocessing is no matrix operation, and attention's shapes follow the batch."""
    loaded = networks.trained_like(name, **({"img_size": (64, 96)} if "vit" in name else {}))
    prepared = prepare(loaded, networks.input_spec(64, 96, batch=(1, 2, 8), name="image"))
    graph = export_onnx(prepared, tmp_path / "g.onnx")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        loaded.module(torch.zeros(3, 3, 64, 96))
    assert count_graph(graph.path, (3, 64, 96, 3)).operations == {"fp32": counter.get_total_flops() / 3}


# ---- a real bundle


@pytest.fixture(scope="module")
def bundle(photograph_folder, tmp_path_factory):
    options = BuildOptions(
        weights="random:0",
        precisions=(Precision.FP32, Precision.INT8),
        gates={Precision.INT8: Gate(min_cosine=1e-6)},
        batch=ShapeRange(min=1, opt=1, max=4),
        height=64,
        width=96,
        torchscript=False,
        cache=None,
        golden=2,
    )
    target = tmp_path_factory.mktemp("roofline") / "net.bundle"
    return build_bundle("test_efficientnet", target, images=photograph_folder, options=options).bundle


def test_the_int8_share_of_a_bundle(bundle):
    """Every convolution whose operands both come out of a DequantizeLinear, found here without the counter."""
    path = bundle.path / "graphs" / "int8.onnx"
    model = onnx.load(path)
    producers = {name: node.op_type for node in model.graph.node for name in node.output}
    convolutions = [node for node in model.graph.node if node.op_type == "Conv"]
    quantised = {n.output[0] for n in convolutions if all(producers.get(i) == "DequantizeLinear" for i in n.input[:2])}
    assert 0 < len(quantised) < len(convolutions)

    whole = count_graph(bundle.path / "graphs" / "fp32.onnx", (2, 3, 64, 96))
    work = count_graph(path, (2, 3, 64, 96))
    assert work.operations.keys() == {"int8", "fp16"}
    assert sum(work.operations.values()) == whole.operations["fp32"]
    shapes = {
        v.name: v for v in onnx.shape_inference.infer_shapes(fixed_batch(model, 2), data_prop=True).graph.value_info
    }
    expected = 0
    for node in convolutions:
        if node.output[0] in quantised:
            weight = next(n for n in model.graph.node if node.input[1] in n.output).input[0]
            dims = next(t.dims for t in model.graph.initializer if t.name == weight)
            size = np.prod([d.dim_value for d in shapes[node.output[0]].type.tensor_type.shape.dim])
            expected += 2 * int(size) * int(np.prod(dims[1:]))
    assert work.operations["int8"] == expected / 2
    assert work.weight_bytes < whole.weight_bytes / 2
    assert work.activation_bytes < whole.activation_bytes / 2


def fixed_batch(model, batch):
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = batch
    del model.graph.value_info[:]
    return model


# ---- ceilings and what follows


def test_ceilings_are_measured(monkeypatch):
    monkeypatch.setattr(module, "_SIDE", 64)
    monkeypatch.setattr(module, "_COPIED", 1 << 20)
    found = measure_ceilings(1)
    assert found.threads == 1
    assert found.operations_per_second.keys() == {"fp32", "int8"}
    assert min(*found.operations_per_second.values(), found.bytes_per_second) > 0


def test_the_large_product_is_compiled_in_its_format(tmp_path):
    """The Q/DQ pairs are merged into 8-bit products: what OpenVINO says that it runs."""
    for kind, expected in (("fp32", "f32"), ("int8", "i8")):
        graph = module.product_graph(kind, 64, 3)
        (tmp_path / "g.onnx").write_bytes(graph)
        assert count_graph(tmp_path / "g.onnx", (64, 64)).operations == {kind: 2 * 3 * 64**3 / 64}
        compiled = core().compile_model(core().read_model(graph, b""), "CPU", settings(1))
        ran = [op.get_rt_info() for op in compiled.get_runtime_model().get_ops()]
        products = [info["runtimePrecision"].value for info in ran if info["layerType"].value == "FullyConnected"]
        assert products == [expected] * 3


def test_what_binds_and_what_is_reached():
    ceilings = Ceilings(threads=2, operations_per_second={"fp32": 1e9, "int8": 4e9}, bytes_per_second=1e9)
    work = Work(operations={"int8": 4e6, "fp16": 1e6}, activation_bytes=2e5, weight_bytes=800_000)
    found = roofline(work, ceilings, 4.0, 1)
    assert (found.operations_ms, found.bytes_ms) == (pytest.approx(2), pytest.approx(1))
    assert (found.bound, found.attainable_ms, found.fraction) == ("operations", pytest.approx(2), pytest.approx(0.5))
    assert found.operations_per_second == pytest.approx(5e6 / 4e-3)
    many = roofline(work, ceilings, 16.0, 4)  # weights are read once for all
    assert (many.operations_ms, many.bytes_ms) == (pytest.approx(8), pytest.approx(1.6))
    heavy = roofline(Work(operations={"fp32": 1e6}, activation_bytes=0, weight_bytes=5_000_000), ceilings, 5.0, 1)
    assert (heavy.bound, heavy.fraction) == ("bytes", pytest.approx(1))
    assert msgspec.json.decode(msgspec.json.encode(found), type=Roofline) == found
    with pytest.raises(InputError, match="no ceiling was measured for fp8 operations, only for fp32, int8"):
        roofline(Work(operations={"fp8": 1.0}, activation_bytes=0, weight_bytes=0), ceilings, 1.0, 1)
