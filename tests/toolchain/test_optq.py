"""Weights that are rounded by what their layers read: results stay nearer to fp32 than with the nearest numbers."""

from __future__ import annotations

import zlib

import networks
import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from torch import nn

from edge_backbones.errors import QuantizationError
from edge_backbones.spec import Precision
from edge_backbones.toolchain.calibration.choose import choose_rounding
from edge_backbones.toolchain.calibration.noise import Sample
from edge_backbones.toolchain.calibration.ranges import collect_magnitudes, find_ranges
from edge_backbones.toolchain.export import export_onnx
from edge_backbones.toolchain.prepare import prepare
from edge_backbones.toolchain.quantize import optq
from edge_backbones.toolchain.quantize.placement import tensors_to_calibrate
from edge_backbones.toolchain.quantize.typed_graph import write_typed_graph


def layer_of(op_type: str, weight: np.ndarray, **attributes) -> ir.Node:
    """A node with a constant weight and nothing around it."""
    tensor = ir.tensor(weight.astype(np.float32), name="weight")
    constant = ir.Value(name="weight", shape=ir.Shape(weight.shape), const_value=tensor)
    return ir.node(op_type, [ir.Value(name="read"), constant], attributes)


def alike(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Values whose channels rise and fall together, and none of which is negative: what a ReLU leaves."""
    mixed = np.tensordot(rng.normal(size=(shape[1], shape[1])), rng.normal(size=shape), (1, 1))
    return np.maximum(np.moveaxis(mixed, 0, 1) + 1, 0).astype(np.float32)


CONVS = {
    "pointwise": ((24, 32, 1, 1), {}),
    "3x3": ((24, 16, 3, 3), {"pads": [1, 1, 1, 1]}),
    "strides": ((8, 16, 3, 5), {"strides": [2, 1], "pads": [1, 0, 2, 3]}),
    "dilations": ((8, 16, 3, 3), {"dilations": [2, 3], "pads": [2, 3, 2, 3]}),
    "groups": ((24, 8, 3, 3), {"group": 4, "pads": [1, 1, 1, 1]}),
    "depthwise": ((32, 1, 5, 5), {"group": 32, "strides": [2, 2], "pads": [2, 2, 2, 2]}),
    "twice as many": ((64, 1, 3, 3), {"group": 32}),
}


def results(weight: np.ndarray, values: np.ndarray, attributes: dict) -> np.ndarray:
    """The reference: torch in float64."""
    top, left, bottom, right = attributes.get("pads", [0, 0, 0, 0])
    padded = nn.functional.pad(torch.from_numpy(values).double(), (left, right, top, bottom))
    convolved = nn.functional.conv2d(
        padded,
        torch.from_numpy(np.asarray(weight, np.float64)),
        stride=attributes.get("strides", 1),
        dilation=attributes.get("dilations", 1),
        groups=attributes.get("group", 1),
    )
    return convolved.numpy()


@pytest.mark.parametrize("kind", CONVS)
@pytest.mark.parametrize("most", [2048, 7])
def test_a_convolution_errs_less_on_what_it_reads(monkeypatch, kind, most):
    monkeypatch.setattr(optq, "_MOST_COLUMNS", most)
    shape, attributes = CONVS[kind]
    rng = np.random.default_rng(0)
    steps = rng.normal(0, 40, shape).clip(-127, 127)
    values = alike(rng, 3, shape[1] * attributes.get("group", 1), 14, 19)
    layer = layer_of("Conv", steps, **attributes)
    parts, columns = optq.parts_of(layer)
    assert columns <= most
    assert parts * columns == attributes.get("group", 1) * np.prod(shape[1:])
    rounded = optq.round_weight(layer, steps, optq.moments_of(layer, values))
    assert rounded.shape == shape
    assert rounded.dtype == np.int8
    exact = results(steps, values, attributes)
    errors = [((results(w, values, attributes) - exact) ** 2).mean() for w in (rounded, np.rint(steps))]
    gain = errors[1] / errors[0]
    assert gain > (1.3 if most > 7 else 1.1), gain
    assert np.abs(rounded - steps).max() < 12  # errors move, and none of them far


@pytest.mark.parametrize("kind", CONVS)
def test_moments_tell_the_squares_of_the_results(kind):
    """w X^T X w^T of each output channel is the sum of its results' squares."""
    shape, attributes = CONVS[kind]
    rng = np.random.default_rng(1)
    weight, values = rng.normal(size=shape), alike(rng, 2, shape[1] * attributes.get("group", 1), 11, 16)
    layer = layer_of("Conv", weight, **attributes)
    moments = optq.moments_of(layer, values)
    groups = attributes.get("group", 1)
    rows = weight.reshape(groups, shape[0] // groups, -1)
    squares = np.einsum("grc,gcd,grd->gr", rows, moments, rows).reshape(-1)
    np.testing.assert_allclose(squares, (results(weight, values, attributes) ** 2).sum((0, 2, 3)), rtol=1e-6)


@pytest.mark.parametrize(("op_type", "axis"), [("MatMul", 1), ("Gemm", 1), ("Gemm", 0)])
def test_a_product_errs_less_on_what_it_reads(op_type, axis):
    rng = np.random.default_rng(2)
    steps = rng.normal(0, 40, (48, 32)).clip(-127, 127)
    values = alike(rng, 2 * 25, 48 if axis == 1 else 32)
    layer = layer_of(op_type, steps, **({"transB": 1 - axis} if op_type == "Gemm" else {}))
    moments = optq.moments_of(layer, values.reshape(2, 25, -1) if op_type == "MatMul" else values)
    np.testing.assert_allclose(moments, values.T.astype(np.float64)[np.newaxis] @ values, rtol=1e-6)
    rounded = optq.round_weight(layer, steps, moments)

    def errors(found: np.ndarray) -> float:
        wrong = found - steps
        return float(((values @ (wrong if axis == 1 else wrong.T)) ** 2).mean())

    assert errors(rounded) < 0.5 * errors(np.rint(steps))


def test_weights_of_silent_or_separate_inputs_are_rounded_to_the_nearest():
    steps = np.random.default_rng(3).normal(0, 40, (8, 32, 1, 1)).clip(-127, 127)
    layer = layer_of("Conv", steps)
    for moments in (np.zeros((1, 32, 32)), 5 * np.eye(32)[np.newaxis]):
        np.testing.assert_array_equal(optq.round_weight(layer, steps, moments), np.rint(steps))


def test_large_images_are_read_here_and_there(monkeypatch):
    """A thousand places of each image are enough, and cost no more however large it is."""
    rng = np.random.default_rng(4)
    layer = layer_of("Conv", rng.normal(size=(8, 8, 3, 3)), pads=[1, 1, 1, 1])
    values = alike(rng, 1, 8, 150, 90)
    some = optq.moments_of(layer, values)
    monkeypatch.setattr(optq, "_POSITIONS", 10**9)
    every = optq.moments_of(layer, values)
    places = every.trace(axis1=1, axis2=2) / some.trace(axis1=1, axis2=2)
    assert 13 < places < 25  # of 13,500, a fourth of the rows and of the columns
    assert networks.relative(some / np.trace(some[0]), every / np.trace(every[0])) < 0.1


def test_what_has_no_patches_in_a_plane_is_left_alone():
    assert optq.parts_of(layer_of("Conv", np.zeros((8, 32, 3)))) == (0, 0)
    assert optq.parts_of(layer_of("Conv", np.zeros((8, 32, 3, 3)), auto_pad="SAME_UPPER")) == (0, 0)
    assert optq.parts_of(layer_of("Conv", np.zeros((8, 32, 3, 3)), auto_pad="NOTSET")) == (1, 288)


def test_rounded_weights_are_packed_and_unpacked():
    rng = np.random.default_rng(5)
    steps = rng.uniform(-127, 127, (64, 96, 3, 3))
    rounded = (np.rint(steps) + rng.choice([-1, 0, 0, 0, 0, 1], steps.shape)).clip(-127, 127).astype(np.int8)
    packed = optq.pack(steps, rounded)
    assert len(packed) < steps.size / 4
    np.testing.assert_array_equal(optq.unpack(steps, packed, "weight"), rounded)
    assert optq.unpack(steps, packed, "weight").dtype == np.int8


@pytest.mark.parametrize(
    "packed",
    [
        b"", b"no zlib", zlib.compress(b"\0" * 5), zlib.compress(b"\0" * 7), zlib.compress(b"\0" * 6)[:-2],
        zlib.compress(b"\0" * 10**8), zlib.compress(b"\x7f" * 6),
    ],
)  # fmt: skip
def test_what_does_not_fit_a_weight_is_refused(packed):
    steps = np.array([[1.2, -3.0, 100.0], [0.0, 9.9, -126.8]])
    with pytest.raises(
        QuantizationError, match="rounds weight 'conv' otherwise than its 6 numbers allow: calibrate again"
    ):
        optq.unpack(steps, packed, "conv")


# ---- whole networks -------------------------------------------------------------------------------------------------


class Case:
    """A network with the statistics of a trained one, its ranges, and images that are held out."""

    def __init__(self, folder, photographs, name: str, indices: tuple[int, ...], height: int, width: int) -> None:
        self.folder = folder
        loaded = networks.trained_like(name, out_indices=indices)
        self.graph = export_onnx(prepare(loaded, networks.input_spec(height, width, batch=2)), folder / "fp32.onnx")
        images = networks.normalised(networks.crops(photographs, 16, height, width))
        self.batches = [images[i : i + 2] for i in range(0, 10, 2)]
        self.held_out = [Sample(images[i : i + 2], np.ones(2)) for i in (10, 12)]
        self.unseen = [images[14:16]]
        counts = collect_magnitudes(self.graph.path, tensors_to_calibrate(self.graph), self.batches)
        self.ranges = find_ranges(counts, method="mse")

    def decibels(self, rounding: dict[str, bytes]) -> list[float]:
        """SQNR of each output on images that neither found nor judged: the typed graph in ONNX Runtime."""
        path = self.folder / "int8.onnx"
        write_typed_graph(
            self.graph, precision=Precision.INT8, path=path, ranges=self.ranges, rounding=rounding, half=False
        )
        found = []
        for file in (self.graph.path, path):
            session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
            runs = [session.run(None, {self.graph.input.name: batch}) for batch in self.unseen]
            found.append([np.concatenate(values) for values in zip(*runs, strict=True)])
        return [-20 * np.log10(networks.relative(a, e)) for e, a in zip(*found, strict=True)]


@pytest.fixture(
    scope="module",
    params=[("test_resnet", (1, 4), 64, 96), ("test_vit", (0, 1), 160, 160), ("efficientnet_b0", (1, 3), 64, 96)],
    ids=lambda param: param[0],
)
def case(request, tmp_path_factory, photographs) -> Case:
    return Case(tmp_path_factory.mktemp("case"), photographs, *request.param)


def test_feature_maps_are_nearer_to_fp32(case):
    rounding = choose_rounding(case.graph, case.ranges, case.batches, case.held_out, work=case.folder)
    assert rounding
    before, after = case.decibels({}), case.decibels(rounding)
    assert np.mean(after) > np.mean(before) + 0.2, (before, after)


def test_neither_batches_nor_memory_change_a_bit(case, monkeypatch):
    from edge_backbones.toolchain.calibration import choose

    one = choose_rounding(case.graph, case.ranges, case.batches, case.held_out, work=case.folder)
    monkeypatch.setattr(choose, "_MOST_MOMENTS", 100_000)
    together = [np.concatenate(case.batches)]
    assert choose_rounding(case.graph, case.ranges, together, case.held_out, work=case.folder) == one


def test_what_does_not_help_is_dropped(tmp_path, photographs):
    """Images of one glaring colour say nothing about photographs."""
    case = Case(tmp_path, photographs, "test_resnet", (1, 4), 64, 96)
    glaring = [np.full_like(batch, 40.0) for batch in case.batches]
    assert choose_rounding(case.graph, case.ranges, glaring, case.held_out, work=tmp_path) == {}


class Tied(nn.Module):
    """A weight that two layers read, along the same axis or along both."""

    def __init__(self, transposed: bool) -> None:
        super().__init__()
        self.transposed = transposed
        self.stem = nn.Conv2d(3, 32, 8, stride=8)
        self.weight = nn.Parameter(torch.randn(32, 32, generator=torch.Generator().manual_seed(0)) / 6)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
        x = self.stem(x).permute(0, 2, 3, 1).relu()
        x = (x @ self.weight).relu()
        x = x @ (self.weight.T if self.transposed else self.weight)
        return (x.permute(0, 3, 1, 2),)


@pytest.mark.parametrize("transposed", [False, True])
def test_a_weight_that_two_layers_read_is_rounded_for_both(tmp_path, photographs, transposed):
    graph = export_onnx(prepare(networks.hand_made(Tied(transposed)), networks.input_spec(64, 96)), tmp_path / "f.onnx")
    images = networks.normalised(networks.crops(photographs, 6, 64, 96))
    ranges = find_ranges(collect_magnitudes(graph.path, tensors_to_calibrate(graph), [images[:4]]), method="max")
    samples = [Sample(images[i : i + 1], np.ones(1)) for i in (4, 5)]
    rounding = choose_rounding(graph, ranges, [images[:4]], samples, work=tmp_path)
    path = tmp_path / "int8.onnx"
    write_typed_graph(graph, precision=Precision.INT8, path=path, ranges=ranges, rounding=rounding, half=False)
    expected, actual = (
        onnxruntime.InferenceSession(one, providers=["CPUExecutionProvider"]).run(
            None, {graph.input.name: images[4:5]}
        )[0]
        for one in (graph.path, path)
    )
    assert networks.relative(actual, expected) < 0.05


class SequenceFirst(nn.Module):
    """A layer that reads tokens before images, as torch's attention does by default."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 8, stride=8)
        self.linear = nn.Linear(32, 32)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
        x = self.stem(x)
        tokens = self.linear(x.flatten(2).permute(2, 0, 1).relu())
        return (tokens.permute(1, 2, 0).reshape(x.shape),)


@pytest.mark.parametrize("batch", [1, 5, 8])  # 96 tokens
def test_tokens_before_images(tmp_path, photographs, batch):
    graph = export_onnx(
        prepare(networks.hand_made(SequenceFirst()), networks.input_spec(64, 96, batch=batch)), tmp_path / "f"
    )
    images = networks.normalised(networks.crops(photographs, 2 * batch, 64, 96))
    ranges = find_ranges(collect_magnitudes(graph.path, tensors_to_calibrate(graph), [images[:batch]]), method="max")
    samples = [Sample(images[batch:], np.ones(batch))]
    rounding = choose_rounding(graph, ranges, [images[:batch]], samples, work=tmp_path)
    assert len(rounding) == 2


def test_a_damaged_calibration_is_refused_before_anything_is_written(case, tmp_path):
    rounding = choose_rounding(case.graph, case.ranges, case.batches, case.held_out, work=case.folder)
    name = next(iter(rounding))
    with pytest.raises(QuantizationError, match="calibrate again with --images"):
        write_typed_graph(
            case.graph,
            precision=Precision.INT8,
            path=tmp_path / "int8.onnx",
            ranges=case.ranges,
            rounding={**rounding, name: rounding[name][:-1]},
        )
    assert list(tmp_path.iterdir()) == []
