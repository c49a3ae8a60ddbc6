"""Norms and attention in the form that OpenVINO has kernels for: against numpy in float64, networks against torch in fp32."""

from __future__ import annotations

import networks
import numpy as np
import openvino
import pytest
from openvino import opset13 as ops

from edge_backbones.engines.openvino import int8_graph, kernel_forms
from edge_backbones.engines.openvino.compile import compile_graph
from edge_backbones.engines.openvino.session import OpenVinoSession, core, read_model, settings
from edge_backbones.spec import Precision
from edge_backbones.toolchain.calibration.ranges import collect_magnitudes, find_ranges
from edge_backbones.toolchain.export import export_onnx
from edge_backbones.toolchain.prepare import prepare
from edge_backbones.toolchain.quantize.placement import tensors_to_calibrate
from edge_backbones.toolchain.quantize.typed_graph import write_typed_graph

EPSILON = 1e-5


def norm_model(shape: list[int], axes: np.ndarray | None, *, affine: bool) -> openvino.Model:
    """A norm as OpenVINO reads ONNX's: ``axes`` None is the last one, given as a range from -1 to 0."""
    x = ops.parameter(shape, np.float32, name="x")
    chosen = ops.range(np.int64(-1), np.int64(0), np.int64(1), "i64") if axes is None else ops.constant(axes)
    found = ops.mvn(x, chosen, True, EPSILON, "inside_sqrt")
    if affine:
        found = ops.add(ops.multiply(found, np.linspace(0.5, 2, 8, dtype=np.float32)), np.float32(0.25))
    found.output(0).set_names({"map"})
    return openvino.Model([found], [x], "norm")


def run(model: openvino.Model, *inputs: np.ndarray) -> np.ndarray:
    compiled = core().compile_model(model, "CPU", settings(1))
    return compiled(list(inputs))["map"].astype(np.float64)


def axes_of_norms(model: openvino.Model) -> list[int]:
    return [len(node.output(0).partial_shape) for node in model.get_ops() if node.get_type_name() == "MVN"]


@pytest.mark.parametrize("axes", [None, np.array([-1]), np.array([3])], ids=["range", "from the end", "from the begin"])
@pytest.mark.parametrize("affine", [True, False], ids=["scaled", "bare"])
@pytest.mark.parametrize(
    ("shape", "sizes"),
    [([2, 3, 5, 8], [(2, 3, 5)]), ([-1, 3, 5, 8], [(1, 3, 5), (4, 3, 5)]), ([-1, -1, -1, 8], [(2, 3, 5), (1, 7, 1)])],
    ids=["fixed", "any batch", "any size"],
)
def test_a_norm_of_four_axes_sees_three(shape, sizes, affine, axes):
    model = norm_model(shape, axes, affine=affine)
    kernel_forms.adapt(model)
    assert axes_of_norms(model) == [3]
    assert list(model.output("map").partial_shape) == list(openvino.PartialShape(shape))
    draw = np.random.default_rng(0)
    for size in sizes:
        x = draw.normal(3, 2, (*size, 8)).astype(np.float32)
        values = x.astype(np.float64)
        expected = (values - values.mean(-1, keepdims=True)) / np.sqrt(values.var(-1, keepdims=True) + EPSILON)
        if affine:
            expected = expected * np.linspace(0.5, 2, 8) + 0.25
        np.testing.assert_allclose(run(model, x), expected, atol=2e-5)


def test_a_norm_of_five_axes_sees_three():
    model = norm_model([-1, 2, 3, 4, 8], None, affine=True)
    kernel_forms.adapt(model)
    assert axes_of_norms(model) == [3]
    assert list(model.output("map").partial_shape)[1:] == [2, 3, 4, 8]


@pytest.mark.parametrize(
    ("shape", "axes"),
    [([2, 15, 8], None), ([2, 3, 5, 8], np.array([2, 3])), ([2, 8, 3, 5], np.array([1])), ([2, 3, 5, -1], None)],
    ids=["three axes", "over two", "over channels in the middle", "over any number"],
)
def test_other_norms_stay(shape, axes):
    model = norm_model(shape, axes, affine=False)
    before = [node.get_friendly_name() for node in model.get_ordered_ops()]
    kernel_forms.adapt(model)
    assert [node.get_friendly_name() for node in model.get_ordered_ops()] == before


def mask_model(
    images: int | None, *, mask_shape=(1, 4, 1, 5, 5), back=(-1, 2, 5, 5), swapped=False, read_twice=False
) -> openvino.Model:
    """Products of 4 windows of each image with 2 heads of 5 x 5, a mask of the windows, and twice the sum."""
    x = ops.parameter([-1 if images is None else 4 * images, 2, 5, 5], np.float32, name="x")
    mask = np.random.default_rng(1).normal(size=mask_shape).astype(np.float32)
    split = ops.reshape(x, np.array([-1, 4, 2, 5, 5]), special_zero=False)
    added = ops.add(ops.constant(mask), split) if swapped else ops.add(split, ops.constant(mask))
    found = ops.reshape(added, np.array(back), special_zero=False)
    found.output(0).set_names({"map"})
    more = [ops.relu(added)] if read_twice else []
    return openvino.Model([found, *more], [x], "mask")


def additions(model: openvino.Model) -> list[int]:
    return [len(node.output(0).partial_shape) for node in model.get_ops() if node.get_type_name() == "Add"]


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("mask_shape", [(1, 4, 1, 5, 5), (1, 4, 2, 5, 5), (1, 4, 1, 1, 5), (1, 1, 1, 5, 5)])
def test_a_mask_of_windows_is_added_in_place(swapped, mask_shape):
    models = [mask_model(1, swapped=swapped, mask_shape=mask_shape) for _ in range(2)]
    kernel_forms.adapt(models[0])
    assert [additions(model) for model in models] == [[4], [5]]
    x = np.random.default_rng(0).normal(size=(4, 2, 5, 5)).astype(np.float32)
    mask = np.random.default_rng(1).normal(size=mask_shape).astype(np.float32)
    expected = (x.reshape(1, 4, 2, 5, 5) + mask).reshape(x.shape)
    for model in models:
        np.testing.assert_array_equal(run(model, x), expected)


@pytest.mark.parametrize(
    "options",
    [
        {"images": None},
        {"images": 3},
        {"images": 1, "mask_shape": (2, 5, 5)},
        {"images": 1, "back": (-1, 1, 5, 5)},
        {"images": 1, "read_twice": True},
    ],
    ids=["any batch", "three images", "fewer axes", "another shape", "read twice"],
)
def test_other_additions_stay(options):
    model = mask_model(**options)
    kernel_forms.adapt(model)
    assert additions(model) == [5]


@pytest.mark.parametrize("batch", [1, 2, (1, 2, 4)], ids=["one image", "two", "any number"])
def test_windows_with_masks_in_a_whole_network(batch, photographs, tmp_path):
    loaded = networks.trained_like("swin_tiny_patch4_window7_224", out_indices=(0, 1), img_size=(112, 56))
    count = batch[-1] if isinstance(batch, tuple) else batch
    images = networks.normalised(networks.crops(photographs, count, 112, 56))
    expected = networks.maps_of(loaded.module, images)
    exported = export_onnx(prepare(loaded, networks.input_spec(112, 56, batch=batch)), tmp_path / "fp32.onnx")
    ranges = find_ranges(collect_magnitudes(exported.path, tensors_to_calibrate(exported), [images[:1]]))
    int8 = write_typed_graph(exported, precision=Precision.INT8, path=tmp_path / "int8.onnx", ranges=ranges)
    fp32 = exported.path.read_bytes()

    model = read_model(fp32)
    assert {3, 4} <= set(axes_of_norms(model))
    kernel_forms.adapt(model)
    assert set(axes_of_norms(model)) == {3}
    assert (5 in additions(model)) == (batch != 1)

    session = OpenVinoSession(
        bytearray(compile_graph(fp32, Precision.FP32, cache=None).data), outputs=exported.spec.outputs
    )
    try:
        for found, reference in zip(session.run(images), expected, strict=True):
            np.testing.assert_allclose(found, reference, atol=1e-4 * float(np.abs(reference).max()))
    finally:
        session.close()

    model = read_model(int8.path.read_bytes())
    assert keys_transposed_before_rounding(model) > 0
    int8_graph.adapt(model)
    assert keys_transposed_before_rounding(model) == 0


@pytest.mark.parametrize(
    ("order", "swaps"),
    [([0, 1, 3, 2], True), ([1, 0], True), ([0, 1], False), ([0], False), ([0, 2, 3, 1], False), ([3, 2, 1, 0], False)],
)
def test_a_transpose_of_keys_swaps_the_last_two_axes(order, swaps):
    x = ops.parameter([2, 3, 4, 5][: len(order)], np.float32)
    assert int8_graph._swaps_last_axes(ops.transpose(x, np.array(order))) == swaps
    assert not int8_graph._swaps_last_axes(ops.transpose(x, ops.parameter([len(order)], np.int64)))


def keys_transposed_before_rounding(model: openvino.Model) -> int:
    """Count the rounded tensors that a Transpose of the last two axes gives."""
    count = 0
    for node in model.get_ops():
        if node.get_type_name() != "FakeQuantize":
            continue
        source = node.input_value(0).get_node()
        while source.get_type_name() == "Convert":
            source = source.input_value(0).get_node()
        if source.get_type_name() == "Transpose":
            *_, second, first = (int(axis) for axis in np.ravel(source.input_value(1).get_node().data))
            count += second > first
    return count
