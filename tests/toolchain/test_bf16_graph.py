"""fp16 and bf16 engines: the number format that they compute in, and what their keys say of it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import msgspec
import networks
import numpy as np
import onnx
import pytest

from edge_backbones.engines import compat
from edge_backbones.engines.openvino import compile as compiler
from edge_backbones.engines.openvino import session
from edge_backbones.engines.openvino.bf16_graph import adapt, round_weights
from edge_backbones.machine import hosts
from edge_backbones.rounding import round_to_bf16
from edge_backbones.spec import FrameSpec, Precision
from edge_backbones.toolchain.export import export_onnx
from edge_backbones.toolchain.prepare import prepare
from edge_backbones.toolchain.quantize.typed_graph import write_typed_graph

NETWORKS = {
    "test_resnet": {"out_indices": (1, 4)},
    "test_efficientnet": {"out_indices": (1, 4)},
    "test_vit": {"img_size": (64, 96)},
}
LAYERS = ("Convolution", "FullyConnected", "MatMul")
needs_units = pytest.mark.skipif(
    not compat.has_units(Precision.BF16, hosts.this_host({}).cpu_features), reason="this CPU has no bf16 instructions"
)


class Case:
    """A network with the statistics of a trained one, its typed graphs, images, and the maps of torch in fp32."""

    def __init__(self, folder: Path, name: str, photographs: list[np.ndarray]) -> None:
        loaded = networks.trained_like(name, **NETWORKS[name])
        exported = export_onnx(prepare(loaded, networks.input_spec(64, 96, batch=(1, 2, 4))), folder / "fp32.onnx")
        self.images = networks.normalised(networks.crops(photographs, 3, 64, 96))
        self.expected = networks.maps_of(loaded.module, self.images)
        self.outputs = exported.spec.outputs
        self.graphs = {
            precision: write_typed_graph(exported, precision=precision, path=folder / f"{precision}.onnx").path
            for precision in (Precision.FP16, Precision.BF16)
        }

    def graph(self, precision: Precision) -> bytes:
        return self.graphs[precision].read_bytes()

    def decibels(self, maps: list[np.ndarray]) -> float:
        return min(
            -20 * float(np.log10(networks.relative(actual, expected)))
            for actual, expected in zip(maps, self.expected, strict=True)
        )

    def run(self, data: bytes, computes_in: str) -> list[np.ndarray]:
        engine = session.OpenVinoSession(bytearray(data), outputs=self.outputs, computes_in=computes_in)
        try:
            return engine.run(self.images)
        finally:
            engine.close()


@pytest.fixture(scope="module", params=list(NETWORKS))
def case(request, tmp_path_factory, photographs) -> Case:
    return Case(tmp_path_factory.mktemp(request.param), request.param, photographs)


@pytest.fixture
def without_units(monkeypatch) -> None:
    """Stand in for a CPU that has AVX-512, and neither bf16 nor fp16."""
    here = hosts.this_host({})
    poorer = dataclasses.replace(here, cpu_features=("avx2", "avx512f", "avx512_vnni"))
    monkeypatch.setattr(hosts, "this_host", lambda versions, **_: dataclasses.replace(poorer, versions=versions))


def formats_of(data: bytes, computes_in: str) -> set[str]:
    """The number formats in which OpenVINO says that a loaded engine runs convolutions and matrix products."""
    openvino = session.load_library()
    tensor = openvino.Tensor(np.frombuffer(data, np.uint8))
    loaded = session.core().import_model(tensor, "CPU", session.settings(1, computes_in))
    about = [node.get_rt_info() for node in loaded.get_runtime_model().get_ops()]
    return {info["runtimePrecision"].value for info in about if info["layerType"].value in LAYERS}


@needs_units
def test_a_bf16_engine_computes_in_bf16_and_returns_float32(case):
    engine = compiler.compile_graph(case.graph(Precision.BF16), Precision.BF16, cache=None)
    assert engine.key.computes_in == "bf16"
    assert formats_of(engine.data, "bf16") == {"bf16"}
    maps = case.run(engine.data, compat.computed_in(engine.key))
    assert {array.dtype.name for array in maps} == {"float32"}
    assert 30 < case.decibels(maps) < 60


@needs_units
def test_the_engine_is_no_worse_than_the_graph_as_it_is_written(case):
    graph = case.graph(Precision.BF16)
    adapted = compiler.compile_graph(graph, Precision.BF16, cache=None)
    as_written = compiler.compile_graph(graph, Precision.BF16, cache=None, as_written=True)
    assert adapted.data != as_written.data
    found = [case.decibels(case.run(one.data, compat.computed_in(one.key))) for one in (adapted, as_written)]
    assert found[0] > found[1] - 0.5


def test_without_instructions_for_it_a_bf16_graph_is_computed_in_fp32(case, without_units):
    """OpenVINO would emulate bf16, which is slower than fp32."""
    engine = compiler.compile_graph(case.graph(Precision.BF16), Precision.BF16, cache=None)
    assert engine.key.computes_in == "fp32"
    assert engine.key.cpu_features == ("avx2", "avx512f", "avx512_vnni")
    assert formats_of(engine.data, "fp32") == {"f32"}
    coarse = compiler.compile_graph(case.graph(Precision.BF16), Precision.BF16, cache=None, as_written=True)
    finer, coarser = (case.decibels(case.run(one.data, "fp32")) for one in (engine, coarse))
    assert finer < 70  # the weights are those of bf16
    assert finer > coarser - 0.5


def test_no_tensor_of_the_adapted_graph_is_bf16(case):
    library = session.load_library()
    model = session.read_model(case.graph(Precision.BF16))
    types = [{port.get_element_type() for node in model.get_ops() for port in node.outputs()}]
    names = [port.get_names() for port in model.outputs]
    adapt(model)
    types.append({port.get_element_type() for node in model.get_ops() for port in node.outputs()})
    assert [library.Type.bf16 in found for found in types] == [True, False]
    assert [port.get_names() for port in model.outputs] == names


@pytest.mark.parametrize(
    ("pixels", "maps"), [("uint8", "FLOAT"), ("FLOAT16", "FLOAT16"), ("FLOAT", "BFLOAT16"), ("FLOAT", "FLOAT16")]
)
def test_inputs_and_outputs_of_an_adapted_graph_keep_their_names_and_values(pixels, maps):
    """Frames are cast at the start, maps at the end, and the casts in between have no reader left."""
    kinds = {"uint8": onnx.TensorProto.UINT8, **dict(onnx.TensorProto.DataType.items())}
    helper, half = onnx.helper, onnx.TensorProto.BFLOAT16
    nodes = [
        helper.make_node("Cast", ["x"], ["x.half"], to=half),
        helper.make_node("Mul", ["x.half", "factor"], ["product"]),
        helper.make_node("Cast", ["product"], ["y.float"], to=onnx.TensorProto.FLOAT),
        helper.make_node("Cast", ["y.float"], ["y"], to=kinds["FLOAT" if maps == "BFLOAT16" else maps]),
    ]
    graph = helper.make_graph(
        nodes,
        "halves",
        [helper.make_tensor_value_info("x", kinds[pixels], [2, 3])],
        [helper.make_tensor_value_info("y", kinds["FLOAT" if maps == "BFLOAT16" else maps], [2, 3])],
        # OpenVINO reads the values of bf16 tensors from raw_data only, where all typed graphs have them.
        [helper.make_tensor("factor", half, [1], np.uint16([0x3FC0]).tobytes(), raw=True)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 22)], ir_version=10)
    engine = compiler.compile_graph(model.SerializeToString(), Precision.BF16, cache=None)
    runs = session.OpenVinoSession(bytearray(engine.data), outputs=["y"], computes_in=compat.computed_in(engine.key))
    images = np.arange(6).reshape(2, 3).astype({"uint8": "uint8", "FLOAT16": "float16"}.get(pixels, "float32"))
    (found,) = runs.run(images)
    assert found.dtype == {"FLOAT16": np.float16}.get(maps, np.float32)
    np.testing.assert_array_equal(found.astype(np.float32), 1.5 * images.astype(np.float32))


def test_an_fp16_engine_never_computes_in_bf16(case):
    """It has to hold a gate of 11 significant bits: where the CPU has no fp16, it computes in fp32."""
    engine = compiler.compile_graph(case.graph(Precision.FP16), Precision.FP16, cache=None)
    assert engine.key.computes_in == ("fp16" if compiler.computes_in(Precision.FP16) is Precision.FP16 else "fp32")
    assert "bf16" not in formats_of(engine.data, compat.computed_in(engine.key))
    assert case.decibels(case.run(engine.data, compat.computed_in(engine.key))) > 60


@pytest.mark.parametrize(
    ("features", "library_has_it", "expected"),
    [
        (("asimd", "asimdhp"), True, "fp16"),
        (("avx512f", "avx512_fp16"), True, "fp16"),
        (("asimd", "asimdhp"), False, "fp32"),
        (("avx512f", "avx512_bf16"), True, "fp32"),
        ((), True, "fp32"),
    ],
)
def test_fp16_is_computed_in_fp16_where_cpu_and_library_have_it(monkeypatch, features, library_has_it, expected):
    here = hosts.this_host({})
    monkeypatch.setattr(hosts, "this_host", lambda versions, **_: dataclasses.replace(here, cpu_features=features))
    monkeypatch.setattr(session, "computes_in_fp16", lambda: library_has_it)
    assert compiler.engine_key(b"graph", Precision.FP16).computes_in == expected


def test_other_engines_do_not_say_what_they_compute_in():
    for precision in (Precision.FP32, Precision.INT8, Precision.FP8):
        key = compiler.engine_key(b"graph", precision)
        assert not isinstance(key.computes_in, str)
        assert compat.computed_in(key) == "fp32"


@needs_units
def test_the_cache_tells_engines_apart_by_what_they_compute_in(case, tmp_path, monkeypatch):
    graph = case.graph(Precision.BF16)
    assert not compiler.compile_graph(graph, Precision.BF16, cache=tmp_path).from_cache
    monkeypatch.setattr(compiler, "computes_in", lambda _: Precision.FP32)
    assert not compiler.compile_graph(graph, Precision.BF16, cache=tmp_path).from_cache
    assert compiler.compile_graph(graph, Precision.BF16, cache=tmp_path).from_cache


def decibels(expected: np.ndarray, found: np.ndarray) -> float:
    return float(10 * np.log10((expected**2).sum() / ((found - expected) ** 2).sum()))


def depthwise_on_one_sided_values(rounded_by: str) -> float:
    """SQNR of a depthwise convolution whose weights are rounded to bf16 and whose pixels are between 0 and 1."""
    random = np.random.default_rng(0)
    weights, images = random.normal(0, 0.3, (32, 1, 3, 3)), random.uniform(0.5, 1, (1, 32, 20, 20)).astype(np.float32)
    weights = weights.astype(np.float16)
    helper, kinds = onnx.helper, onnx.TensorProto
    graph = helper.make_graph(
        [
            helper.make_node("Cast", ["x"], ["half"], to=kinds.FLOAT16),
            helper.make_node("Conv", ["half", "w"], ["z"], group=32, kernel_shape=[3, 3]),
            helper.make_node("Cast", ["z"], ["y"], to=kinds.FLOAT),
        ],
        "depthwise",
        [helper.make_tensor_value_info("x", kinds.FLOAT, images.shape)],
        [helper.make_tensor_value_info("y", kinds.FLOAT, [1, 32, 18, 18])],
        [onnx.numpy_helper.from_array(weights, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    read = session.read_model(model.SerializeToString())

    def run(of: Any, computes_in: str) -> np.ndarray:
        compiled = session.core().compile_model(of, "CPU", session.settings(1, computes_in))
        return np.asarray(compiled([images])[0], np.float64)

    expected = run(read, "fp32")
    if rounded_by == "ours":
        round_weights(read)
    return decibels(expected, run(read, "bf16"))


@needs_units
def test_the_weights_of_a_bf16_rest_keep_their_sums():
    """Otherwise the errors of nine weights would add up, because neighbouring pixels are alike."""
    assert depthwise_on_one_sided_values("ours") > depthwise_on_one_sided_values("OpenVINO") + 3


def test_rounding_a_bf16_rest_leaves_int8_weights_and_everything_else_alone():
    helper, kinds = onnx.helper, onnx.TensorProto
    random = np.random.default_rng(0)
    arrays = {
        "w8": random.integers(-127, 128, (16, 16, 1, 1)).astype(np.int8),
        "s": np.full(16, 0.01, np.float32),
        "b": random.normal(size=16).astype(np.float32),
        "w": random.normal(size=(4, 16, 1, 1)).astype(np.float32),
    }
    graph = helper.make_graph(
        [
            helper.make_node("DequantizeLinear", ["w8", "s"], ["d"], axis=0),
            helper.make_node("Conv", ["x", "d", "b"], ["z"]),
            helper.make_node("Conv", ["z", "w"], ["y"]),
        ],
        "two",
        [helper.make_tensor_value_info("x", kinds.FLOAT, [1, 16, 4, 4])],
        [helper.make_tensor_value_info("y", kinds.FLOAT, [1, 4, 4, 4])],
        [onnx.numpy_helper.from_array(array, name) for name, array in arrays.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    read = session.read_model(model.SerializeToString())
    round_weights(read)
    constants = [node.data for node in read.get_ops() if node.get_type_name() == "Constant"]
    for name in ("w8", "s", "b"):
        assert any(
            array.size == arrays[name].size and (array.ravel() == arrays[name].ravel()).all() for array in constants
        )
    [rounded] = [array for array in constants if array.shape == arrays["w"].shape]
    np.testing.assert_array_equal(rounded, round_to_bf16(arrays["w"].reshape(4, 16)).reshape(rounded.shape))


def test_a_bf16_graph_has_weights_whose_sums_are_kept(case):
    graphs = [onnx.load(case.graphs[precision]).graph for precision in (Precision.FP16, Precision.BF16)]
    arrays = [{tensor.name: tensor for tensor in graph.initializer} for graph in graphs]
    found = 0
    for name, tensor in arrays[1].items():
        if tensor.data_type != onnx.TensorProto.BFLOAT16 or len(tensor.dims) != 4 or np.prod(tensor.dims[1:]) < 9:
            continue
        found += 1
        fine, coarse = (onnx.numpy_helper.to_array(of[name]).astype(np.float64) for of in arrays)
        errors = (coarse - fine).reshape(len(fine), -1)
        assert np.abs(errors.sum(axis=1)).mean() < 0.3 * np.sqrt((errors**2).sum(axis=1)).mean()
    assert found


@pytest.mark.parametrize(
    ("precision", "frame", "units", "expected"),
    [
        (Precision.INT8, None, True, (Precision.BF16,)),
        (Precision.INT8, FrameSpec(height=48, width=64, color="rgb"), True, ()),  # frames are converted in fp32
        (Precision.INT8, None, False, ()),
        (Precision.FP32, None, True, ()),
        (Precision.FP8, None, True, ()),
    ],
)
def test_where_what_is_not_int8_may_be_computed_in_bf16(monkeypatch, precision, frame, units, expected):
    monkeypatch.setattr(compiler, "computes_in", lambda of: of if units else Precision.FP32)
    input = networks.input_spec(32, 32)
    if frame is not None:
        input = msgspec.structs.replace(input, name="frame", frame=frame)
    assert compiler.rests(precision, input) == expected
