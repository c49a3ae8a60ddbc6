"""Typed graphs: run by ONNX Runtime against the fp32 graph, and looked at node by node with the onnx protobufs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import networks
import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from edge_backbones.errors import QuantizationError
from edge_backbones.spec import BackboneSpec, Precision
from edge_backbones.toolchain.artifacts import ExportedGraph, TypedGraph
from edge_backbones.toolchain.calibration.ranges import collect_magnitudes, find_ranges
from edge_backbones.toolchain.export import export_onnx
from edge_backbones.toolchain.prepare import prepare, warm_batch_norm
from edge_backbones.toolchain.quantize.placement import tensors_to_calibrate
from edge_backbones.toolchain.quantize.typed_graph import write_typed_graph
from edge_backbones.toolchain.sources.base import SourceOptions
from edge_backbones.toolchain.sources.timm import load_timm

HEIGHT, WIDTH = 64, 96

# A residual CNN with projected skips, a mobile one with squeeze-excite, a transformer on camera frames, and a CNN with
# layer norm; batch 1, 2 and dynamic.
NETWORKS = {
    "test_resnet": networks.input_spec(HEIGHT, WIDTH, batch=2),
    "test_efficientnet": networks.input_spec(HEIGHT, WIDTH, batch=1),
    "test_vit": networks.input_spec(HEIGHT, WIDTH, name="image"),
    "test_convnext": networks.input_spec(HEIGHT, WIDTH, batch=(2, 2, 4)),
}

# The gate of a bundle, except where random weights forbid it: an untrained mobile network amplifies any error from layer
# to layer (noise of 1 % on its input, 40 dB, leaves 6 dB at the end of mobilenetv3_large_100), a trained one does not.
LEAST_INT8_SQNR = {"test_resnet": 15.0, "test_efficientnet": 11.0, "test_vit": 15.0, "test_convnext": 15.0}


@dataclass(frozen=True)
class Case:
    """One network as a graph, its ranges, its typed graphs, and images that calibration did not see."""

    name: str
    graph: ExportedGraph
    ranges: dict[str, float]
    typed: dict[Precision, TypedGraph]
    held_out: np.ndarray


@pytest.fixture(scope="module", params=list(NETWORKS))
def case(
    request: pytest.FixtureRequest, photographs: list[np.ndarray], tmp_path_factory: pytest.TempPathFactory
) -> Case:
    folder, input = tmp_path_factory.mktemp(request.param), NETWORKS[request.param]
    images = networks.crops(photographs, 40, HEIGHT, WIDTH)
    loaded = load_timm(request.param, SourceOptions(weights="random:0", img_size=(HEIGHT, WIDTH)))
    for module in loaded.module.modules():
        if isinstance(module, nn.BatchNorm2d) and not module.weight.any():
            nn.init.constant_(module.weight, 0.3)  # timm starts residual branches at 0: nothing would flow through them
    loaded = warm_batch_norm(loaded, [networks.normalised(images, loaded.image_config)])
    if input.name == "pixel_values":
        images = networks.normalised(images, loaded.image_config)
    graph = export_onnx(prepare(loaded, input), folder / "fp32.onnx")
    ranges = find_ranges(collect_magnitudes(graph.path, tensors_to_calibrate(graph), [images[:32]]))
    typed = {
        precision: write_typed_graph(graph, precision=precision, path=folder / f"typed.{precision}", ranges=ranges)
        for precision in Precision
    }
    return Case(request.param, graph, ranges, typed, images[32:])


def run(path: Path, images: np.ndarray, batch: int) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    results = [session.run(None, {name: images[i : i + batch]}) for i in range(0, len(images), batch)]
    return [np.concatenate(maps) for maps in zip(*results, strict=True)]


def sqnr(expected: np.ndarray, actual: np.ndarray) -> float:
    noise = np.sum((actual.astype(np.float64) - expected) ** 2)
    return float(10 * np.log10(np.sum(expected.astype(np.float64) ** 2) / noise))


class Nodes:
    """Who makes and who reads a tensor of an ONNX file, and what its constants hold."""

    def __init__(self, path: Path) -> None:
        self.model = onnx.load(path)
        self.all = list(self.model.graph.node)
        self.maker = {output: node for node in self.all for output in node.output}
        self.readers = Counter(name for node in self.all for name in node.input)
        self.constants = {tensor.name: tensor for tensor in self.model.graph.initializer}
        inferred = onnx.shape_inference.infer_shapes(self.model, strict_mode=True, data_prop=True).graph
        values = [*inferred.value_info, *inferred.input, *inferred.output]
        self.types = {value.name: value.type.tensor_type.elem_type for value in values}
        self.types.update({name: tensor.data_type for name, tensor in self.constants.items()})

    def of(self, *op_types: str) -> list[onnx.NodeProto]:
        return [node for node in self.all if node.op_type in op_types]

    def made_by(self, tensor: str) -> str:
        return self.maker[tensor].op_type if tensor in self.maker else ""

    def array(self, name: str) -> np.ndarray:
        return numpy_helper.to_array(self.constants[name])

    def dequantized_inputs(self, node: onnx.NodeProto) -> list[int]:
        return [index for index, name in enumerate(node.input) if self.made_by(name) == "DequantizeLinear"]


# ---- real networks --------------------------------------------------------------------------------------------------


def test_feature_maps_stay_close(case: Case) -> None:
    batch = case.graph.input.batch.opt
    expected = run(case.graph.path, case.held_out, batch)
    for precision, least in (
        (Precision.FP32, 200.0),
        (Precision.FP16, 45.0),
        (Precision.INT8, LEAST_INT8_SQNR[case.name]),
    ):
        for name, want, got in zip(
            case.graph.spec.out_features, expected, run(case.typed[precision].path, case.held_out, batch), strict=True
        ):
            assert got.dtype == np.float32
            found = np.inf if np.array_equal(want, got) else sqnr(want, got)
            assert found >= least, f"{name} {precision}"


def test_the_files_are_valid_and_keep_their_inputs_and_outputs(case: Case) -> None:
    before = onnx.load(case.graph.path).graph
    for typed in case.typed.values():
        onnx.checker.check_model(typed.path, full_check=True)
        after = onnx.load(typed.path).graph
        assert [(v.name, v.type) for v in after.input] == [(v.name, v.type) for v in before.input]
        assert [(v.name, v.type) for v in after.output] == [(v.name, v.type) for v in before.output]
        assert tuple(v.name for v in after.output) == case.graph.spec.out_features
        names = [node.name for node in after.node]
        assert len(set(names)) == len(names)
        assert all(names)


def test_the_same_input_gives_the_same_bytes(case: Case, tmp_path: Path) -> None:
    for precision, typed in case.typed.items():
        again = write_typed_graph(case.graph, precision=precision, path=tmp_path / "again", ranges=case.ranges)
        assert again.path.read_bytes() == typed.path.read_bytes()
    assert case.typed[Precision.FP32].path.read_bytes() == case.graph.path.read_bytes()


def test_the_files_shrink(case: Case) -> None:
    size = {precision: typed.path.stat().st_size for precision, typed in case.typed.items()}
    names = sum(len(node.SerializeToString()) for node in onnx.load(case.typed[Precision.INT8].path).graph.node)
    assert size[Precision.FP16] < 0.5 * size[Precision.FP32] + 2 * names
    assert size[Precision.INT8] < size[Precision.FP16] + 2 * names


def test_quantisation_is_symmetric_and_signed_with_half_scales(case: Case) -> None:
    nodes = Nodes(case.typed[Precision.INT8].path)
    assert nodes.of("QuantizeLinear")
    for node in nodes.of("QuantizeLinear", "DequantizeLinear"):
        scale = nodes.array(node.input[1])
        assert scale.dtype == np.float16
        assert (scale > 0).all()
        if len(node.input) > 2:
            zero_point = nodes.array(node.input[2])
            assert zero_point.dtype == np.int8
            assert not zero_point.any()
        else:  # without one, the type of the integers says it
            assert nodes.types[node.input[0]] == TensorProto.INT8  # never int32: TensorRT refuses it


def test_activations_are_quantised_once_and_per_tensor(case: Case) -> None:
    nodes = Nodes(case.typed[Precision.INT8].path)
    quantized = [node.input[0] for node in nodes.of("QuantizeLinear")]
    assert len(set(quantized)) == len(quantized) == len(case.ranges) == len(tensors_to_calibrate(case.graph))
    scales = sorted(float(nodes.array(node.input[1])) * 127 for node in nodes.of("QuantizeLinear"))
    # Rounded up to fp16, which is 2**-10 at most.
    for scale, threshold in zip(scales, sorted(case.ranges.values()), strict=True):
        assert threshold <= scale <= threshold * (1 + 2**-10)


def test_weights_are_stored_as_int8_per_output_channel(case: Case) -> None:
    nodes, before = Nodes(case.typed[Precision.INT8].path), Nodes(case.graph.path)
    stored = [node for node in nodes.of("DequantizeLinear") if node.input[0] in nodes.constants]
    assert len(stored) >= 5
    for node in stored:
        integers, scales = nodes.array(node.input[0]), nodes.array(node.input[1]).astype(np.float64)
        axis = helper.get_node_attr_value(node, "axis")
        weight = before.array(node.input[0].split(".axis")[0]).astype(np.float64)
        assert integers.dtype == np.int8
        assert integers.min() >= -127
        assert scales.shape == (weight.shape[axis],)
        scales = scales.reshape([-1 if k == axis else 1 for k in range(weight.ndim)])
        errors = integers * scales - weight
        assert (np.abs(errors) < scales).all()
        others = tuple(k for k in range(weight.ndim) if k != axis)
        assert (np.abs(errors.sum(axis=others)) < 0.75 * scales.ravel()).all()  # see edge_backbones/rounding.py
        largest = np.abs(integers).max(axis=tuple(k for k in range(weight.ndim) if k != axis))
        assert (largest >= 100).all()  # 127 up to the rounding of the scale


def test_every_layer_that_gains_is_quantised_and_no_other(case: Case) -> None:
    nodes, before = Nodes(case.typed[Precision.INT8].path), Nodes(case.graph.path)
    inferred = onnx.shape_inference.infer_shapes(onnx.load(case.graph.path)).graph.value_info
    sizes = {value.name: [axis.dim_value for axis in value.type.tensor_type.shape.dim] for value in inferred}
    seen = set()
    for node in before.of("Conv", "Gemm", "MatMul"):
        [after] = [other for other in nodes.all if other.name == node.name]
        weight = before.array(node.input[1]) if node.input[1] in before.constants else None
        if weight is None:
            expected = [0, 1] if sizes[node.input[0]][-1] >= 16 else []  # attention
        elif node.op_type == "Conv":
            channels = weight.shape[1]
            expected = [0, 1] if channels >= 16 or (channels > 1 and np.prod(weight.shape[1:]) >= 32) else []
        else:
            expected = [0, 1] if weight.shape[0] >= 16 else []
        assert nodes.dequantized_inputs(after) == expected, node.name
        seen.add((node.op_type, bool(expected)))
    assert any(quantized for _, quantized in seen)


def test_outputs_are_never_read_through_a_dequantize(case: Case) -> None:
    nodes = Nodes(case.typed[Precision.INT8].path)
    for name in case.graph.spec.out_features:
        node = nodes.maker[name]
        while node.op_type in ("Cast", "Identity", "Transpose", "Reshape"):
            node = nodes.maker[node.input[0]]
        assert node.op_type not in ("DequantizeLinear", "QuantizeLinear")


def test_residual_adds_read_one_quantised_branch_behind_a_conv(case: Case) -> None:
    nodes = Nodes(case.typed[Precision.INT8].path)
    for add in nodes.of("Add"):
        ends_in_conv = [nodes.made_by(name) == "Conv" and nodes.readers[name] == 1 for name in add.input]
        if any(ends_in_conv) and not any(name in nodes.constants for name in add.input):
            [skip] = nodes.dequantized_inputs(add)
            assert ends_in_conv[1 - skip]
        else:
            assert nodes.dequantized_inputs(add) == []


@pytest.mark.parametrize("precision", [Precision.FP16, Precision.INT8])
def test_wide_range_nodes_compute_in_float(case: Case, precision: Precision) -> None:
    nodes = Nodes(case.typed[precision].path)
    for node in nodes.of("LayerNormalization", "Softmax", "ReduceMean"):
        assert nodes.types[node.input[0]] == nodes.types[node.output[0]] == TensorProto.FLOAT
    for node in nodes.of("Conv", "MatMul", "Gelu", "HardSwish", "Relu", "MaxPool"):
        assert nodes.types[node.output[0]] == TensorProto.FLOAT16
    tensors = [*nodes.model.graph.input, *nodes.model.graph.output]
    casts = [(node.input[0], nodes.types[node.output[0]]) for node in nodes.of("Cast")]
    assert len(set(casts)) == len(casts)  # a tensor is cast once, however many readers
    assert TensorProto.FLOAT16 not in {value.type.tensor_type.elem_type for value in tensors}


# ---- graphs made by hand: one rule each -----------------------------------------------------------------------------

HandMade = Callable[..., ExportedGraph]


@pytest.fixture
def hand_made(tmp_path: Path) -> HandMade:
    """A graph of `pixel_values` (1, 32, 6, 10) from nodes and constants, with the given outputs."""

    def make(
        nodes: list[onnx.NodeProto],
        constants: dict[str, np.ndarray],
        outputs: tuple[str, ...] = ("stage0",),
        opset: int = 20,
    ) -> ExportedGraph:
        shape = (1, 32, 6, 10)
        graph = helper.make_graph(
            nodes,
            "hand_made",
            [helper.make_tensor_value_info("pixel_values", TensorProto.FLOAT, shape)],
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
            [numpy_helper.from_array(array, name) for name, array in constants.items()],
        )
        for index, node in enumerate(graph.node):
            node.name = node.name or f"node_{index}"
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
        path = tmp_path / "fp32.onnx"
        onnx.save(onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True), path)
        count = len(outputs)
        spec = BackboneSpec(
            stage_names=outputs,
            out_features=outputs,
            out_indices=tuple(range(count)),
            channels=(32,) * count,
            strides=((1, 1),) * count,
            num_features=(32,) * count,
            layouts=("NCHW",) * count,
        )
        return ExportedGraph(path, spec, networks.input_spec(6, 10, channels=32))

    return make


def weight(*shape: int, seed: int = 0, scale: float = 0.1) -> np.ndarray:
    return (scale * np.random.default_rng(seed).standard_normal(shape)).astype(np.float32)


def conv(input: str, weight: str, output: str) -> onnx.NodeProto:
    return helper.make_node("Conv", [input, weight], [output])


def int8(graph: ExportedGraph, **ranges: float) -> Nodes:
    found = dict.fromkeys(tensors_to_calibrate(graph), 1.0) | ranges
    typed = write_typed_graph(graph, precision=Precision.INT8, path=graph.path.with_name("int8.onnx"), ranges=found)
    onnx.checker.check_model(typed.path, full_check=True)
    return Nodes(typed.path)


def fp16(graph: ExportedGraph) -> Nodes:
    typed = write_typed_graph(graph, precision=Precision.FP16, path=graph.path.with_name("fp16.onnx"))
    onnx.checker.check_model(typed.path, full_check=True)
    return Nodes(typed.path)


CONV = [conv("pixel_values", "w", "stage0")]


def test_a_projected_skip_is_the_branch_with_fewer_layers(hand_made: HandMade) -> None:
    for order in (["main", "skip"], ["skip", "main"]):
        graph = hand_made(
            [
                conv("pixel_values", "w0", "stem"),
                conv("stem", "w1", "first"),
                conv("first", "w2", "main"),
                conv("stem", "w3", "skip"),
                helper.make_node("Add", order, ["stage0"]),
            ],
            {f"w{i}": weight(32, 32, 1, 1, seed=i) for i in range(4)},
        )
        assert tensors_to_calibrate(graph) == ("pixel_values", "stem", "first", "skip")
        nodes = int8(graph)
        assert nodes.dequantized_inputs(nodes.of("Add")[0]) == [order.index("skip")]


def test_a_conv_that_others_read_too_is_no_branch_to_fuse(hand_made: HandMade) -> None:
    layers = [conv("pixel_values", "w", "branch"), helper.make_node("Add", ["branch", "pixel_values"], ["stage1"])]
    constants = {"w": weight(32, 32, 1, 1)}
    assert int8(hand_made(layers, constants, ("stage1",))).dequantized_inputs(
        Nodes(hand_made(layers, constants, ("stage1",)).path.with_name("int8.onnx")).of("Add")[0]
    ) == [1]
    also_an_output = hand_made(layers, constants, ("branch", "stage1"))
    nodes = int8(also_an_output)
    assert nodes.dequantized_inputs(nodes.of("Add")[0]) == []


def test_an_output_that_is_read_on_stays_the_unquantised_tensor(hand_made: HandMade) -> None:
    layers = [
        conv("pixel_values", "w", "c"),
        helper.make_node("Relu", ["c"], ["stage0"]),
        conv("stage0", "w", "stage1"),
    ]
    nodes = int8(hand_made(layers, {"w": weight(32, 32, 1, 1)}, ("stage0", "stage1")))
    assert nodes.made_by(nodes.maker["stage0"].input[0]) == "Relu"
    assert nodes.of("QuantizeLinear")[1].input[0] == nodes.maker["stage0"].input[0]
    assert (
        len([n for n in nodes.of("DequantizeLinear") if n.input[0] in nodes.constants]) == 1
    )  # tied weights, one copy


@pytest.mark.parametrize(("trans_b", "axis"), [(0, 1), (1, 0)])
def test_gemm_weights_are_scaled_along_their_outputs(hand_made: HandMade, trans_b: int, axis: int) -> None:
    matrix = weight(32, 48) if trans_b == 0 else weight(48, 32)
    layers = [
        helper.make_node("GlobalMaxPool", ["pixel_values"], ["pooled"]),
        helper.make_node("Flatten", ["pooled"], ["flat"]),
        helper.make_node("Gemm", ["flat", "w"], ["stage0"], transB=trans_b),
    ]
    nodes = int8(hand_made(layers, {"w": matrix}))
    [stored] = [node for node in nodes.of("DequantizeLinear") if node.input[0] in nodes.constants]
    assert helper.get_node_attr_value(stored, "axis") == axis
    assert nodes.array(stored.input[1]).shape == (48,)


def test_weights_near_zero_keep_their_scale(hand_made: HandMade) -> None:
    values = weight(32, 32, 1, 1)
    values[3] = 0.0
    values[5] *= 1e-4  # a scale of 1e-7, among the subnormal numbers of fp16
    values[7] *= 1e-9  # below them
    nodes = int8(hand_made(CONV, {"w": values}))
    [stored] = [node for node in nodes.of("DequantizeLinear") if node.input[0] in nodes.constants]
    scales, integers = nodes.array(stored.input[1]).astype(np.float64), nodes.array(stored.input[0])
    assert scales[3] == 1.0
    assert not integers[3].any()
    assert np.abs(values[5]).max() / 127 <= scales[5] < 2 * np.abs(values[5]).max() / 127 + 2.0**-24
    assert scales[7] == 2.0**-24
    assert np.abs(integers.astype(int)).max() == 127


@pytest.mark.parametrize("threshold", [1e-6, 0.0123, 1.0, 700.0, 65504.0 * 127])
def test_an_activation_scale_never_clips_its_range(hand_made: HandMade, threshold: float) -> None:
    nodes = int8(hand_made(CONV, {"w": weight(32, 32, 1, 1)}), pixel_values=threshold)
    scale = float(nodes.array(nodes.of("QuantizeLinear")[0].input[1]))
    assert threshold / 127 <= scale <= threshold / 127 * (1 + 2**-10) + 2.0**-24


def test_an_epsilon_between_two_reductions_stays_float(hand_made: HandMade) -> None:
    layers = [
        conv("pixel_values", "w", "c"),
        helper.make_node("ReduceMean", ["c", "axis"], ["mean"]),
        helper.make_node("Add", ["mean", "offset"], ["shifted"]),
        helper.make_node("Sqrt", ["shifted"], ["root"]),
        helper.make_node("Div", ["c", "root"], ["normed"]),
        helper.make_node("Mul", ["normed", "gain"], ["stage0"]),
    ]
    gain = np.full((1,), 0.5, dtype=np.float32)
    constants = {"w": weight(32, 32, 1, 1), "axis": np.array([1]), "offset": 2 * gain, "gain": gain}
    nodes = fp16(hand_made(layers, constants))
    kept = {node.op_type for node in nodes.all if nodes.types[node.output[0]] == TensorProto.FLOAT} - {"Cast"}
    assert kept == {"ReduceMean", "Add", "Sqrt", "Div"}


@pytest.mark.parametrize(
    ("constant", "kept"), [(-1e9, True), (-np.inf, False), (1e-6, True), (0.0, False), (3.0, False)]
)
def test_a_constant_that_half_cannot_hold_keeps_its_node_in_float(
    hand_made: HandMade, constant: float, kept: bool
) -> None:
    layers = [conv("pixel_values", "w", "c"), helper.make_node("Add", ["c", "mask"], ["stage0"])]
    nodes = fp16(hand_made(layers, {"w": weight(32, 32, 1, 1), "mask": np.full((10,), constant, dtype=np.float32)}))
    assert nodes.types[nodes.of("Add")[0].input[1]] == (TensorProto.FLOAT if kept else TensorProto.FLOAT16)


def test_the_scales_of_resize_stay_float(hand_made: HandMade) -> None:
    layers = [conv("pixel_values", "w", "c"), helper.make_node("Resize", ["c", "", "scales"], ["stage0"])]
    nodes = fp16(hand_made(layers, {"w": weight(32, 32, 1, 1), "scales": np.array([1, 1, 2, 2], dtype=np.float32)}))
    [resize] = nodes.of("Resize")
    assert nodes.types[resize.input[0]] == TensorProto.FLOAT16
    assert nodes.types[resize.input[2]] == TensorProto.FLOAT


def test_missing_and_useless_ranges_are_refused(hand_made: HandMade, tmp_path: Path) -> None:
    graph = hand_made([conv("pixel_values", "w", "c"), conv("c", "w", "stage0")], {"w": weight(32, 32, 1, 1)})
    path = tmp_path / "int8.onnx"
    with pytest.raises(QuantizationError, match="range for 2 more tensors, 'c' first; collect them"):
        write_typed_graph(graph, precision=Precision.INT8, path=path)
    for bad in (0.0, -1.0, float("nan"), float("inf"), 1e9):
        with pytest.raises(QuantizationError, match=r"range of 'c' is .* calibrate again"):
            write_typed_graph(graph, precision=Precision.INT8, path=path, ranges={"pixel_values": 1.0, "c": bad})
    assert not path.exists()


def test_damaged_and_enormous_weights_are_refused(hand_made: HandMade) -> None:
    for value, message in (
        (np.nan, "holds nan"),
        (np.inf, "holds inf"),
        (1e9, r"'w' holds 1e\+09, .* 8\.32e\+06: .* fp32"),
    ):
        values = weight(32, 32, 1, 1)
        values[4, 2] = value
        with pytest.raises(QuantizationError, match=message):
            int8(hand_made(CONV, {"w": values}))


def test_an_old_opset_is_refused_for_int8_only(hand_made: HandMade) -> None:
    graph = hand_made(CONV, {"w": weight(32, 32, 1, 1)}, opset=17)
    assert fp16(graph).of("Conv")
    with pytest.raises(QuantizationError, match="opset 17, fp16 scales need 19; export it with opset 20"):
        int8(graph)


def test_control_flow_is_refused(hand_made: HandMade) -> None:
    branch = helper.make_graph(
        [helper.make_node("Relu", ["c"], ["r"])],
        "branch",
        [],
        [helper.make_tensor_value_info("r", TensorProto.FLOAT, None)],
    )
    choose = helper.make_node("If", ["flag"], ["stage0"], then_branch=branch, else_branch=branch)
    graph = hand_made([conv("pixel_values", "w", "c"), choose], {"w": weight(32, 32, 1, 1), "flag": np.array(True)})
    with pytest.raises(QuantizationError, match="without control flow"):
        fp16(graph)
