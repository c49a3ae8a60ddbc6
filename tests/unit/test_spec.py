"""Stage selection by transformers' rules, and shapes against an input spec."""

from __future__ import annotations

import re

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_backbones.errors import InputError
from edge_backbones.spec import (
    BackboneSpec,
    ExtraOutput,
    FrameSpec,
    InputSpec,
    Precision,
    ShapeRange,
    align_stages,
    measured_stride,
)

NAMES = ["stem", "stage1", "stage2", "stage3", "stage4"]


# What transformers itself answers is compared row by row in tests/transformers/test_rules.py; this is what every
# machine without torch must answer.
@pytest.mark.parametrize(
    ("out_features", "out_indices", "expected"),
    [
        (None, None, (("stage4",), (4,))),
        (None, (1, 2), (("stage1", "stage2"), (1, 2))),
        (None, [-1], (("stage4",), (-1,))),
        (None, [0, -1], (("stem", "stage4"), (0, -1))),
        (None, [np.int64(1), True], None),
        (None, [np.int64(1), np.int32(-1)], (("stage1", "stage4"), (1, -1))),
        (None, [], ((), ())),
        (["stage1", "stage3"], None, (("stage1", "stage3"), (1, 3))),
        (["stage4"], [-1], (("stage4",), (-1,))),
    ],
)
def test_selections_keep_their_indices_as_given(out_features, out_indices, expected):
    if expected is None:
        with pytest.raises(InputError, match="duplicates"):
            align_stages(NAMES, out_features, out_indices)
    else:
        assert align_stages(NAMES, out_features, out_indices) == expected


@pytest.mark.parametrize(
    ("out_features", "out_indices", "message"),
    [
        (None, [2, 1], "out_indices must be in the same order as stage_names, expected [1, 2] got [2, 1]"),
        (None, [4, -1], "out_indices must not contain any duplicates, got [4, -1](equivalent to (4, 4)))"),
        (None, [-6], f"out_indices must be valid indices for stage_names {NAMES}, got [-6]"),
        (None, ["a"], f"out_indices must be valid indices for stage_names {NAMES}, got ['a']"),
        (None, [1.0], f"out_indices must be valid indices for stage_names {NAMES}, got [1.0]"),
        (None, 3, "out_indices must be a list, got <class 'int'>"),
        (None, "stage1", "out_indices must be a list, got <class 'str'>"),
        ("stage1", None, "out_features must be a list got <class 'str'>"),
        (("stage1",), None, "out_features must be a list got <class 'tuple'>"),
        (["stage1"], [2], "out_features and out_indices should correspond to the same stages if both are set"),
    ],
)
def test_refused_selections(out_features, out_indices, message):
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        align_stages(NAMES, out_features, out_indices)
    assert isinstance(caught.value, InputError)


@given(st.sets(st.integers(0, 7), min_size=1), st.data())
def test_any_ordered_subset_is_its_own_selection(chosen, data):
    names = [f"s{i}" for i in range(8)]
    indices = sorted(chosen)
    signed = [i - 8 if data.draw(st.booleans()) else i for i in indices]
    assert align_stages(names, None, signed) == (tuple(names[i] for i in indices), tuple(signed))
    assert align_stages(names, [names[i] for i in indices], None)[1] == tuple(indices)


@pytest.mark.parametrize("sizes", [(0, 1, 2), (2, 1, 3), (1, 3, 2)])
def test_shape_range_needs_order(sizes):
    with pytest.raises(ValueError, match="1 <= min <= opt <= max"):
        ShapeRange(min=sizes[0], opt=sizes[1], max=sizes[2])


FIXED = ShapeRange.fixed
PIXELS = InputSpec(name="pixel_values", channels=3, batch=FIXED(2), height=FIXED(64), width=FIXED(96))
FRAMES = InputSpec(
    name="image",
    channels=3,
    batch=ShapeRange(min=1, opt=2, max=4),
    height=ShapeRange(min=32, opt=64, max=128),
    width=FIXED(96),
    size_multiple=32,
)


@pytest.mark.parametrize(
    ("spec", "shape", "expected"),
    [
        (PIXELS, (7, 3, 64, 96), (7, 64, 96)),
        (FRAMES, (1, 128, 96, 3), (1, 128, 96)),
        (msgspec.structs.replace(FRAMES, width=FIXED(100)), (1, 64, 100, 3), (1, 64, 100)),
    ],
)
def test_fitting_shapes_are_split(spec, shape, expected):
    assert spec.batch_height_width(shape) == expected


@pytest.mark.parametrize(
    ("spec", "shape"),
    [
        (PIXELS, (3, 64, 96)),
        (PIXELS, (1, 4, 64, 96)),
        (PIXELS, (1, 3, 96, 64)),
        (PIXELS, (0, 3, 64, 96)),
        (PIXELS, (1, 64, 96, 3)),
        (FRAMES, (1, 48, 96, 3)),
        (FRAMES, (1, 160, 96, 3)),
        (FRAMES, (1, 3, 64, 96)),
        (msgspec.structs.replace(FRAMES, height=FIXED(64), width=ShapeRange(min=32, opt=64, max=128)), (1, 64, 97, 3)),
    ],
)
def test_other_shapes_are_refused_with_what_fits(spec, shape):
    with pytest.raises(
        InputError, match=re.escape(f"of shape {shape} does not fit: this engine takes {spec.describe()}")
    ):
        spec.batch_height_width(shape)


def test_describe_names_dtype_layout_and_sizes():
    assert PIXELS.describe() == "float32 NCHW (batch, 3, 64, 96) with any batch >= 1"
    assert FRAMES.describe() == ("uint8 NHWC (batch, 32..128, 96, 3) with any batch >= 1, height in multiples of 32")


def test_pixels_may_be_float16_and_frames_may_not():
    half = msgspec.structs.replace(PIXELS, pixel_dtype="float16")
    assert (PIXELS.dtype, half.dtype, FRAMES.dtype) == ("float32", "float16", "uint8")
    assert half.describe() == "float16 NCHW (batch, 3, 64, 96) with any batch >= 1"
    with pytest.raises(ValueError, match="image is uint8, and pixel_dtype is float16"):
        InputSpec(name="image", channels=3, batch=FIXED(1), height=FIXED(8), width=FIXED(8), pixel_dtype="float16")


@pytest.mark.parametrize(("color", "channels"), [("rgb", 1), ("nv12", 1), ("gray", 5), ("yuyv", 4)])
def test_frames_and_channels_that_do_not_agree_are_refused(color, channels):
    frame = FrameSpec(height=40, width=60, color=color)
    fields = {"batch": FIXED(1), "height": FIXED(8), "width": FIXED(8), "frame": frame}
    with pytest.raises(ValueError, match=f"{color} frames do not become {channels} channels"):
        InputSpec(name="frame", channels=channels, **fields)
    InputSpec(name="frame", channels=3, **fields)


def test_outputs_are_described_as_callers_see_them_and_as_engines_return_them():
    fields = {
        "stage_names": ("a", "b", "c"),
        "out_features": ("a", "b", "c"),
        "out_indices": (0, 1, 2),
        "channels": (4, 8, 16),
        "strides": ((2, 2), (4, 8), (8, 8)),
        "num_features": (4, 8, 16),
        "layouts": ("NCHW", "NHWC", "NLC"),
        "extras": (ExtraOutput(name="d", layout="NCHW", channels=5), ExtraOutput(name="e", layout="NC", channels=6)),
    }
    plain = BackboneSpec(**fields)
    assert [output.name for output in plain.described_outputs] == list(plain.outputs)
    assert not any(output.is_reordered for output in plain.described_outputs)
    assert {output.dtype for output in plain.described_outputs} == {"float32"}
    assert plain.describe_maps() == "float32, channels-first memory"
    other = BackboneSpec(**fields, map_dtype="float16", channels_last=True)
    assert other.describe_maps() == "float16, channels-last memory"
    assert other.described_outputs == (
        ("a", "NCHW", "NHWC", 4, (2, 2), "float16"),
        ("b", "NHWC", "NHWC", 8, (4, 8), "float16"),
        ("c", "NLC", "NLC", 16, (8, 8), "float16"),
        ("d", "NCHW", "NHWC", 5, None, "float16"),
        ("e", "NC", "NC", 6, None, "float16"),
    )
    assert [output.is_reordered for output in other.described_outputs] == [True, False, False, True, False]


def test_backbone_spec_refuses_stages_that_do_not_agree():
    good = {
        "stage_names": ("a", "b"),
        "out_features": ("b",),
        "out_indices": (1,),
        "channels": (8,),
        "strides": ((2, 2),),
        "num_features": (4, 8),
        "layouts": ("NCHW",),
    }
    BackboneSpec(**good)
    for field, value in {
        "out_indices": (0,),
        "channels": (8, 8),
        "strides": (),
        "num_features": (8,),
        "out_features": (),
        "layouts": ("NCHW", "NHWC"),
        "cls_tokens": ("b", "b"),
        "hidden_states": ("a",),
        "extras": (ExtraOutput(name="b", layout="NC", channels=8),),
    }.items():
        with pytest.raises(ValueError):
            BackboneSpec(**{**good, field: value})
    extra = ExtraOutput(name="hidden_states.0", layout="NLC", channels=4)
    assert BackboneSpec(**good, extras=(extra,), hidden_states=(extra.name, "b")).outputs == ("b", "hidden_states.0")


@pytest.mark.parametrize(
    ("pixels", "cells", "claimed", "stride"),
    [
        (224, 7, None, 32),
        (224, 7, 32, 32),
        (225, 8, 32, 32),  # padding
        (299, 8, 32, 32),  # convolutions without padding, as in inception
        (224, 14, 32, 16),  # the claim is wrong
        (8, 16, None, 1),
    ],
)
def test_a_stride_is_the_claimed_one_where_it_explains_the_map(pixels, cells, claimed, stride):
    assert measured_stride(pixels, cells, claimed) == stride


@pytest.mark.parametrize(("name", "axes"), [("pixel_values", (2, 3)), ("image", (1, 2))])
def test_size_axes_are_those_of_height_and_width(name, axes):
    size = ShapeRange.fixed(8)
    input = InputSpec(name=name, channels=3, batch=size, height=size, width=ShapeRange.fixed(16))
    assert input.size_axes == axes
    assert [input.opt_shape[axis] for axis in axes] == [8, 16]


@pytest.mark.parametrize("precision", Precision)
def test_every_precision_has_a_row_that_agrees_with_itself(precision):
    info = precision.info
    assert info.is_calibrated is precision.is_calibrated is (info.bits == 8)
    assert info.rest is (Precision.FP16 if info.is_calibrated else precision)
    assert info.is_half is (info.bits == 16)
    assert (info.torch_type is None) is info.is_calibrated
    if precision is Precision.BF16:  # numpy has no bf16: fp32 with 16 bits of the fraction left out
        assert info.largest == np.array([0x7F7F0000], np.uint32).view(np.float32)[0]
    elif info.torch_type is not None:
        assert info.largest == float(np.finfo(info.torch_type).max)
    else:
        assert info.largest == {Precision.INT8: 2**7 - 1, Precision.FP8: 1.75 * 2**8}[precision]
