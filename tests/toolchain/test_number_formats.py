"""bf16 and fp8 graphs, and what fp16 must not touch."""

from __future__ import annotations

import math
from pathlib import Path

import networks
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, numpy_helper
from onnx.reference import ReferenceEvaluator
from torch import nn

from edge_backbones.engines.compat import computed_in
from edge_backbones.engines.openvino.compile import compile_graph
from edge_backbones.engines.openvino.session import OpenVinoSession
from edge_backbones.errors import CalibrationError
from edge_backbones.spec import Precision
from edge_backbones.toolchain.build import build_bundle
from edge_backbones.toolchain.calibration.ranges import collect_magnitudes, find_ranges, tensors_beyond_half
from edge_backbones.toolchain.export import export_onnx
from edge_backbones.toolchain.options import BuildOptions
from edge_backbones.toolchain.prepare import prepare
from edge_backbones.toolchain.quantize.placement import quantized_layers, tensors_to_calibrate
from edge_backbones.toolchain.quantize.typed_graph import write_typed_graph

NETWORKS = {
    "test_resnet": {"out_indices": (1, 4)},
    "test_efficientnet": {"out_indices": (1, 4)},
    "test_vit": {"img_size": (64, 96)},
}


class Case:
    def __init__(self, folder: Path, name: str, photographs: list[np.ndarray]) -> None:
        loaded = networks.trained_like(name, **NETWORKS[name])
        self.graph = export_onnx(prepare(loaded, networks.input_spec(64, 96, batch=(1, 2, 4))), folder / "fp32.onnx")
        self.images = networks.normalised(networks.crops(photographs, 3, 64, 96))
        self.expected = networks.maps_of(loaded.module, self.images)
        magnitudes = collect_magnitudes(self.graph.path, tensors_to_calibrate(self.graph), [self.images])
        self.ranges = find_ranges(magnitudes, method="max")


@pytest.fixture(scope="module", params=list(NETWORKS))
def case(request, tmp_path_factory, photographs) -> Case:
    return Case(tmp_path_factory.mktemp(request.param), request.param, photographs)


def of_engine(path: Path, precision: Precision, outputs, images: np.ndarray) -> list[np.ndarray]:
    engine = compile_graph(path.read_bytes(), precision, cache=None)
    session = OpenVinoSession(bytearray(engine.data), outputs=outputs, computes_in=computed_in(engine.key))
    try:
        return session.run(images)
    finally:
        session.close()


def of_onnxruntime(path: Path, images: np.ndarray) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"]).run(
        None, {"pixel_values": images}
    )


def test_bf16_rounds_to_eight_bits(case, tmp_path):
    typed = write_typed_graph(case.graph, precision=Precision.BF16, path=tmp_path / "bf16.onnx")
    model = onnx.load(typed.path)
    onnx.checker.check_model(model, full_check=True)
    layers = {layer.name for layer in quantized_layers(case.graph) if layer.weighted}
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    source = {t.name: numpy_helper.to_array(t) for t in onnx.load(case.graph.path).graph.initializer}
    seen = 0
    for node in model.graph.node:
        if node.name in layers:
            weight = stored[node.input[1]]
            assert weight.data_type == TensorProto.BFLOAT16
            exact = source[weight.name.removesuffix(".half")]
            rounded = torch.from_numpy(exact.copy()).bfloat16().float().numpy()  # an independent rounding
            found = numpy_helper.to_array(weight).astype(np.float32)
            # Some weights are rounded the other way, which keeps the sums of channels: see edge_backbones/rounding.py.
            assert (found == rounded).mean() > 0.5
            assert (np.abs(found - exact) <= 2.0**-7 * np.abs(exact)).all()
            seen += 1
    assert seen > 5
    assert {output.type.tensor_type.elem_type for output in model.graph.output} == {TensorProto.FLOAT}
    maps = of_engine(typed.path, typed.precision, typed.spec.outputs, case.images)
    for actual, expected in zip(maps, case.expected, strict=True):
        assert 1e-4 < networks.relative(actual, expected) < 2e-2


def test_bf16_keeps_norms_and_softmax_in_float(tmp_path, photographs):
    case = Case(tmp_path, "test_vit", photographs)
    typed = write_typed_graph(case.graph, precision=Precision.BF16, path=tmp_path / "bf16.onnx")
    model = onnx.shape_inference.infer_shapes(onnx.load(typed.path), strict_mode=True)
    types = {value.name: value.type.tensor_type.elem_type for value in model.graph.value_info}
    kinds: dict[str, set[int]] = {}
    for node in model.graph.node:
        kinds.setdefault(node.op_type, set()).update(types[name] for name in node.output if name in types)
    assert kinds["LayerNormalization"] == kinds["Softmax"] == {TensorProto.FLOAT}
    assert kinds["MatMul"] == {TensorProto.BFLOAT16}


class Unfolding(nn.Module):
    """A transposed convolution (LowFormer) and a sum of overlapping patches (VOLO), which becomes another one."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.up = nn.Conv2d(3, 16, 4, stride=4), nn.ConvTranspose2d(16, 16, 4, stride=2, padding=1)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x = self.up(self.stem(x))
        size = tuple(x.shape[2:])
        patches = nn.functional.unfold(x, 3, padding=1, stride=2)
        return (torch.relu(nn.functional.fold(patches, size, 3, padding=1, stride=2)),)


@pytest.mark.parametrize(("precision", "expected"), [("bf16", TensorProto.FLOAT), ("fp16", TensorProto.FLOAT16)])
def test_bf16_keeps_transposed_convolutions_in_float(precision, expected, tmp_path, photographs):
    net = Unfolding()
    exported = export_onnx(prepare(networks.hand_made(net), networks.input_spec(64, 96)), tmp_path / "fp32.onnx")
    typed = write_typed_graph(exported, precision=Precision(precision), path=tmp_path / "typed.onnx")
    model = onnx.shape_inference.infer_shapes(onnx.load(typed.path), strict_mode=True)
    types = {value.name: value.type.tensor_type.elem_type for value in model.graph.value_info}
    found = [types[node.output[0]] for node in model.graph.node if node.op_type == "ConvTranspose"]
    assert found == [expected, expected]
    images = networks.normalised(networks.crops(photographs, 1, 64, 96))
    [actual] = of_engine(typed.path, typed.precision, typed.spec.outputs, images)
    assert networks.relative(actual, networks.maps_of(net, images)[0]) < 2e-2


def test_fp8_has_three_bits_after_the_point(case, tmp_path):
    typed = write_typed_graph(case.graph, precision=Precision.FP8, path=tmp_path / "fp8.onnx", ranges=case.ranges)
    model = onnx.load(typed.path)
    onnx.checker.check_model(model, full_check=True)
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    source = {t.name: numpy_helper.to_array(t) for t in onnx.load(case.graph.path).graph.initializer}
    weights = 0
    for node in model.graph.node:
        if node.op_type != "DequantizeLinear" or node.input[0] not in stored:
            continue
        tensor = stored[node.input[0]]
        assert tensor.data_type == TensorProto.FLOAT8E4M3FN
        name, _, axis = tensor.name.removesuffix(".fp8").rpartition(".axis")
        exact = np.moveaxis(source[name].astype(np.float64), int(axis), 0)
        scale = numpy_helper.to_array(stored[node.input[1]]).astype(np.float64)
        values = np.moveaxis(numpy_helper.to_array(tensor).astype(np.float64), int(axis), 0)
        scaled = values * scale.reshape(-1, *[1] * (exact.ndim - 1))
        # Half a step: 2**-4 of the value, and of the smallest normal (2**-6) below it.
        allowed = 2.0**-4 * np.maximum(np.abs(exact), 2.0**-6 * scale.reshape(-1, *[1] * (exact.ndim - 1)))
        assert (np.abs(scaled - exact) <= allowed * 1.001).all()
        weights += 1
    assert weights > 5
    zero_points = {stored[n.input[2]].data_type for n in model.graph.node if n.op_type == "QuantizeLinear"}
    assert zero_points == {TensorProto.FLOAT8E4M3FN}
    reference = of_onnxruntime(typed.path, case.images)
    maps = of_engine(typed.path, typed.precision, typed.spec.outputs, case.images)
    for actual, other, expected in zip(maps, reference, case.expected, strict=True):
        assert 5e-3 < networks.relative(actual, expected) < 0.12
        # Two engines round some values to other neighbours, no more: independent errors would differ by 1.4 times.
        assert networks.relative(actual, other) < networks.relative(actual, expected)


# Networks, and which of their convolutions TensorRT has no fp8 kernels for, by its documentation on quantized types.
WITHOUT_KERNEL = {
    "test_resnet": "the stem",
    "test_efficientnet": "the stem, depthwise layers, channels of squeeze-excite",
    "test_convnext": "the stem, depthwise kernels of 7x7",
    "test_vit": "the patches of 16x16",
    "resnext26ts": "groups",
}


def convolutions_of(path: Path) -> dict[str, tuple[bool, str]]:
    """Return by name whether a Conv reads quantised operands, and what fp8 kernels of TensorRT lack for it."""
    graph = onnx.load(path).graph
    maker = {name: node for node in graph.node for name in node.output}
    shapes = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    found = {}
    for node in graph.node:
        if node.op_type != "Conv":
            continue
        makers = [maker.get(name) for name in node.input[:2]]
        pairs = [made is not None and made.op_type == "DequantizeLinear" for made in makers]
        assert pairs[0] == pairs[1], node.name  # both operands or none
        weight = node.input[1]
        while weight not in shapes:  # behind a DequantizeLinear or a Cast
            weight = maker[weight].input[0]
        outputs, inputs, *kernel = shapes[weight]
        group = next((attribute.i for attribute in node.attribute if attribute.name == "group"), 1)
        against = [f"group {group}"] * (group != 1) + [f"kernel {kernel}"] * (math.prod(kernel) > 32)
        against += [f"{size} channels" for size in (outputs, inputs * group) if size % 16]
        found[node.name] = (pairs[0], ", ".join(against))
    return found


@pytest.mark.parametrize("name", list(WITHOUT_KERNEL))
def test_fp8_is_for_convolutions_that_tensorrt_has_kernels_for(name, tmp_path):
    loaded = networks.trained_like(name, **({"img_size": (64, 96)} if name == "test_vit" else {}))
    graph = export_onnx(prepare(loaded, networks.input_spec(64, 96)), tmp_path / "fp32.onnx")
    ranges = dict.fromkeys(tensors_to_calibrate(graph), 3.0)
    files = {
        precision: write_typed_graph(
            graph, precision=precision, path=tmp_path / f"{precision}.onnx", ranges=ranges
        ).path
        for precision in (Precision.INT8, Precision.FP8)
    }
    fp8, int8 = convolutions_of(files[Precision.FP8]), convolutions_of(files[Precision.INT8])
    assert any(against for _, against in fp8.values()), "this network proves nothing"
    assert {node: against for node, (quantised, against) in fp8.items() if quantised and against} == {}
    # Whatever has a kernel and gains from int8 is quantised in fp8 too; int8 asks for no multiple of 16.
    assert {node for node, (quantised, _) in fp8.items() if quantised} == {
        node for node, (quantised, against) in int8.items() if quantised and not against
    }
    named = {layer.name for layer in quantized_layers(graph, Precision.FP8)}
    assert named <= {layer.name for layer in quantized_layers(graph)}
    assert {node for node, (quantised, _) in fp8.items() if quantised} <= named


@pytest.mark.parametrize(
    ("shape", "groups", "quantised"),
    [
        ((16, 16, 4, 8), 1, True),
        ((16, 16, 1, 1), 1, True),
        ((48, 32, 3, 3), 1, True),
        ((16, 16, 3, 11), 1, False),  # 33 weights
        ((16, 16, 7, 7), 1, False),
        ((24, 16, 1, 1), 1, False),
        ((16, 24, 1, 1), 1, False),
        ((32, 16, 3, 3), 2, False),
        ((16, 1, 3, 3), 16, False),
    ],
)
def test_the_limits_of_fp8_convolutions(tmp_path, shape, groups, quantised):
    """A residual Add behind the convolution keeps its skip in half too, when the convolution is left out."""

    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            outputs, inputs, *kernel = shape
            self.stem = nn.Conv2d(3, inputs * groups, 3, padding=1)
            self.wide = nn.Conv2d(inputs * groups, outputs, 1)
            self.conv = nn.Conv2d(inputs * groups, outputs, kernel, groups=groups)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
            x = torch.relu(self.stem(x))
            return (self.conv(x) + torch.relu(self.wide(x[:, :, shape[2] - 1 :, shape[3] - 1 :])),)

    graph = export_onnx(prepare(networks.hand_made(Residual()), networks.input_spec(32, 48)), tmp_path / "fp32.onnx")
    fp8 = {layer.name: layer.op_type for layer in quantized_layers(graph, Precision.FP8)}
    assert ("conv/Conv" in fp8) == quantised
    assert ("Add" in fp8.values()) == quantised
    assert "stem/Conv" not in fp8  # three channels


# ---- values beyond fp16 ---------------------------------------------------------------------------------------------


class Loud(nn.Module):
    """Activations of about a million between two convolutions, back at one behind them."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.first, self.second, self.third = (nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3))
        with torch.no_grad():
            for conv, scale in ((self.first, 2e5), (self.second, 1e-6), (self.third, 1.0)):
                conv.weight.copy_(scale * torch.randn(conv.weight.shape, generator=generator))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
        return (self.third(torch.relu(self.second(torch.relu(self.first(x))))),)


@pytest.fixture(scope="module")
def loud(tmp_path_factory, photographs):
    loaded = networks.hand_made(Loud())
    folder = tmp_path_factory.mktemp("loud")
    graph = export_onnx(prepare(loaded, networks.input_spec(64, 96, batch=2)), folder / "fp32.onnx")
    images = networks.normalised(networks.crops(photographs, 2, 64, 96))
    return loaded, graph, images


def test_fp16_leaves_values_that_it_cannot_hold_in_fp32(loud, tmp_path):
    loaded, graph, images = loud
    large = tensors_beyond_half(graph.path, [images])
    assert 2 <= len(large) <= 3  # what the first convolution and its relu write
    (expected,) = networks.maps_of(loaded.module, images)
    assert np.abs(expected).max() < 1e4
    naive = write_typed_graph(graph, precision=Precision.FP16, path=tmp_path / "naive.onnx")
    with np.errstate(all="ignore"):
        (broken,) = ReferenceEvaluator(onnx.load(naive.path)).run(None, {"pixel_values": images})
    assert not np.isfinite(broken).all()  # else there was nothing to save
    typed = write_typed_graph(graph, precision=Precision.FP16, path=tmp_path / "fp16.onnx", large=large)
    # numpy, whose fp16 is fp16: engines for the CPU compute half in fp32.
    (actual,) = ReferenceEvaluator(onnx.load(typed.path)).run(None, {"pixel_values": images})
    assert networks.relative(actual, expected) < 5e-3
    convolutions = [node for node in onnx.load(typed.path).graph.node if node.op_type == "Conv"]
    assert [node.input[1].endswith(".half") for node in convolutions] == [False, False, True]


def test_only_what_is_near_the_limit_is_named(loud, tmp_path):
    _, graph, images = loud
    assert tensors_beyond_half(graph.path, [1e-3 * images, 1e-4 * images]) == ()
    assert tensors_beyond_half(graph.path, [1e-3 * images, images]) == tensors_beyond_half(graph.path, [images])
    images = images.copy()
    images[1, 0, 3, 4] = np.inf
    with pytest.raises(CalibrationError, match=r"holds .*check the calibration images"):
        tensors_beyond_half(graph.path, [images])


def test_a_build_keeps_them_in_fp32_and_says_so(loud, photographs, tmp_path):
    loaded, _, _ = loud
    result = build_bundle(
        loaded,
        tmp_path / "loud.bundle",
        images=networks.crops(photographs, 4, 64, 96),
        options=BuildOptions(precisions=(Precision.FP16,), cache=None, golden=2, torchscript=False),
    )
    assert any("come near what fp16 can hold" in note for note in result.notes)
    graph = onnx.load(result.bundle.path / "graphs" / "fp16.onnx").graph
    convolutions = [node for node in graph.node if node.op_type == "Conv"]
    assert [node.input[1].endswith(".half") for node in convolutions] == [False, False, True]


# ---- bundles --------------------------------------------------------------------------------------------------------


def test_every_format_in_one_bundle(photograph_folder, tmp_path):
    result = build_bundle(
        "test_resnet",
        tmp_path / "all.bundle",
        images=photograph_folder,
        options=BuildOptions(
            weights="random:0",
            cache=None,
            height=64,
            width=96,
            precisions=tuple(Precision),
            exclude=("layer1",),
            torchscript=False,
        ),
    )
    manifest = result.bundle.manifest
    assert [engine.key.precision for engine in manifest.engines] == list(Precision)
    sqnr = {report.precision: min(stage.sqnr_db for stage in report.stages) for report in result.reports}
    assert sqnr["fp32"] > sqnr["fp16"] > sqnr["bf16"] > sqnr["fp8"]
    assert sqnr["int8"] > sqnr["fp8"]  # of one scale per tensor int8 has more steps, fp8 more range
    for graph in manifest.graphs:
        opsets = {o.version for o in onnx.load(result.bundle.path / graph.file.path).opset_import if o.domain == ""}
        assert opsets == {graph.opset}
        assert bool(graph.excluded) == (graph.precision in ("int8", "fp8"))
