"""What a GPU session decides: profiles, pieces, sizes, streams."""

from __future__ import annotations

import math
import re

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_backbones.engines.batching import Piece, pieces
from edge_backbones.engines.gpu.streams import ALIGNMENT, is_default, rounded
from edge_backbones.engines.ports import Tensor, mismatches
from edge_backbones.engines.tensorrt.profiles import (
    Profile,
    choose_profile,
    says_host_code,
    says_out_of_memory,
    uncovered,
)
from edge_backbones.errors import InputError
from edge_backbones.spec import InputSpec, ShapeRange
from edge_backbones.testing import SPEC, pooling_input

ONE = Profile(0, (1, 3, 32, 32), (1, 3, 32, 32), (1, 3, 64, 64))
MANY = Profile(1, (1, 3, 32, 32), (8, 3, 32, 32), (16, 3, 64, 64))


@st.composite
def ranges(draw) -> ShapeRange:
    low, middle, high = sorted(draw(st.tuples(*[st.integers(1, 40)] * 3)))
    return ShapeRange(min=low, opt=middle, max=high)


def test_the_tightest_profile_that_holds_a_shape_is_chosen():
    assert choose_profile([MANY, ONE], (1, 3, 32, 32)) is ONE
    assert choose_profile([ONE, MANY], (2, 3, 32, 32)) is MANY
    twin = Profile(2, MANY.min, (2, 3, 32, 32), MANY.max)
    assert choose_profile([MANY, twin], (2, 3, 32, 32)) is twin
    assert choose_profile([MANY, twin], (8, 3, 32, 32)) is MANY


@pytest.mark.parametrize("shape", [(17, 3, 32, 32), (1, 3, 96, 32), (1, 1, 32, 32), (3, 32, 32)])
def test_a_shape_outside_every_profile_is_told_min_opt_and_max_of_each(shape):
    with pytest.raises(InputError) as caught:
        choose_profile([ONE, MANY], shape)
    for part in (str(shape), "profile 0: min (1, 3, 32, 32), opt (1, 3, 32, 32), max (1, 3, 64, 64)", "profile 1: min"):
        assert part in str(caught.value)


@given(st.lists(st.tuples(ranges(), ranges()), min_size=1, max_size=5), st.integers(1, 40), st.integers(1, 40))
def test_a_chosen_profile_holds_the_shape_and_none_that_does_is_smaller(drawn, batch, size):
    profiles = [Profile(i, (b.min, s.min), (b.opt, s.opt), (b.max, s.max)) for i, (b, s) in enumerate(drawn)]
    fitting = [p for p, (b, s) in zip(profiles, drawn, strict=True) if batch in b and size in s]
    if not fitting:
        with pytest.raises(InputError, match=re.escape(str((batch, size)))):
            choose_profile(profiles, (batch, size))
        return
    chosen = choose_profile(profiles, (batch, size))
    assert chosen in fitting
    assert math.prod(chosen.max) == min(math.prod(p.max) for p in fitting)


@given(st.integers(1, 200), ranges())
def test_pieces_cover_a_batch_once_in_order_and_each_can_be_run(count, batch):
    found = pieces(count, batch)
    assert [i for piece in found for i in range(piece.start, piece.start + piece.count)] == list(range(count))
    assert all(piece.count <= piece.run and piece.run in batch for piece in found)
    assert len(found) == math.ceil(count / batch.max)
    assert all(piece.count == piece.run for piece in found[:-1])


def test_pieces_by_example():
    assert pieces(2, ShapeRange(min=3, opt=4, max=8)) == [Piece(0, 2, 3)]
    assert pieces(9, ShapeRange.fixed(4)) == [Piece(0, 4, 4), Piece(4, 4, 4), Piece(8, 1, 4)]


RIGHT = [Tensor("pixel_values", "INPUT", "FLOAT"), Tensor("a", "OUTPUT", "FLOAT"), Tensor("b", "OUTPUT", "FLOAT")]


@pytest.mark.parametrize(
    ("tensors", "phrase"),
    [
        (RIGHT, None),
        ([RIGHT[2], RIGHT[0], RIGHT[1]], None),
        (RIGHT[1:], "it takes [], the manifest says ['pixel_values']"),
        ([Tensor("image", "INPUT", "FLOAT"), *RIGHT[1:]], "it takes ['image']"),
        ([*RIGHT, Tensor("mask", "INPUT", "FLOAT")], "it takes ['pixel_values', 'mask']"),
        ([Tensor("pixel_values", "INPUT", "HALF"), *RIGHT[1:]], "its input is HALF, the manifest says FLOAT"),
        (RIGHT[:2], "it returns ['a'], the manifest promises ['a', 'b']"),
        ([*RIGHT[:2], Tensor("b", "OUTPUT", "BF16")], "it returns b BF16, the manifest promises FLOAT"),
    ],
)
def test_a_plan_is_held_against_the_manifest(tensors, phrase):
    found = mismatches(tensors, pooling_input(2), ["a", "b"])
    assert not found if phrase is None else any(phrase in reason for reason in found), found


@pytest.mark.parametrize(
    ("changes", "output", "phrase"),
    [
        ({}, Tensor("pool8", "OUTPUT", "FLOAT", (2, 3, 4, 6)), None),
        ({}, Tensor("pool8", "OUTPUT", "HALF", (2, 3, 4, 6)), "it returns pool8 HALF, the manifest promises FLOAT"),
        ({}, Tensor("pool8", "OUTPUT", "FLOAT", (2, 4, 6, 3)), "the manifest promises NCHW with 3 channels"),
        ({"channels_last": True}, Tensor("pool8", "OUTPUT", "FLOAT", (2, 4, 6, 3)), None),
        (
            {"channels_last": True},
            Tensor("pool8", "OUTPUT", "FLOAT", (2, 3, 4, 6)),
            "pool8 has shape (2, 3, 4, 6), the manifest promises NHWC with 3 channels and batch 2",
        ),
        ({"map_dtype": "float16"}, Tensor("pool8", "OUTPUT", "HALF", (2, 3, 4, 6)), None),
        (
            {"map_dtype": "float16"},
            Tensor("pool8", "OUTPUT", "FLOAT", (2, 3, 4, 6)),
            "it returns pool8 FLOAT, the manifest promises HALF",
        ),
    ],
)
def test_layout_and_dtype_of_the_maps_are_those_of_the_manifest(changes, output, phrase):
    spec = msgspec.structs.replace(SPEC, **changes)
    dtype = "HALF" if spec.map_dtype == "float16" else "FLOAT"
    shape = (2, 8, 12, 3) if spec.channels_last else (2, 3, 8, 12)
    tensors = [RIGHT[0], Tensor("pool4", "OUTPUT", dtype, shape), output]
    found = mismatches(tensors, pooling_input(2), SPEC.outputs, spec)
    assert not found if phrase is None else any(phrase in reason for reason in found), found


def test_float16_pixels_are_half():
    spec = msgspec.structs.replace(pooling_input(2), pixel_dtype="float16")
    assert mismatches([Tensor("pixel_values", "INPUT", "HALF")], spec, []) == []
    assert "its input is FLOAT, the manifest says HALF" in mismatches(
        [Tensor("pixel_values", "INPUT", "FLOAT")], spec, []
    )


def test_a_camera_frame_is_uint8():
    fixed = ShapeRange.fixed
    spec = InputSpec(name="image", channels=3, batch=fixed(1), height=fixed(32), width=fixed(48))
    assert mismatches([Tensor("image", "INPUT", "UINT8")], spec, []) == []
    assert "its input is FLOAT, the manifest says UINT8" in mismatches([Tensor("image", "INPUT", "FLOAT")], spec, [])


def test_sizes_of_the_manifest_that_no_profile_holds_are_named():
    spec = pooling_input(ShapeRange(min=1, opt=2, max=8))
    whole = Profile(0, (1, 3, 32, 48), (2, 3, 32, 48), (8, 3, 32, 48))
    small = Profile(0, (1, 3, 32, 48), (2, 3, 32, 48), (4, 3, 32, 48))
    assert uncovered([whole], spec) == []
    assert uncovered([small], spec) == [(5, 3, 32, 48), (8, 3, 32, 48)]
    only = [Profile(i, *((size, 3, 32, 48),) * 3) for i, size in enumerate((1, 2, 8))]
    assert uncovered(only, spec) == [(3, 3, 32, 48)]  # a hole between them


def test_mixed_corners_and_steps_count():
    sizes = ShapeRange(min=64, opt=64, max=128)
    spec = msgspec.structs.replace(
        pooling_input(ShapeRange(min=1, opt=1, max=4)), height=sizes, width=sizes, size_multiple=32
    )
    small, large = (
        Profile(i, *((b, 3, n, n) for b in (1, 1, most))) for i, (n, most) in enumerate(((64, 4), (128, 4)))
    )
    missing = uncovered([small, large], spec)
    assert (1, 3, 64, 128) in missing
    assert (1, 3, 96, 96) in missing
    assert all(shape[2] % 32 == shape[3] % 32 == 0 for shape in missing)
    assert uncovered([Profile(0, (1, 3, 64, 64), (1, 3, 64, 64), (4, 3, 128, 128))], spec) == []


@given(st.integers(1, 1 << 40))
def test_a_size_grows_by_an_eighth_or_one_alignment_at_most(size):
    allocated = rounded(size)
    assert size <= allocated <= size + max(ALIGNMENT, size // 8)
    assert allocated % ALIGNMENT == 0
    assert rounded(allocated) == allocated


def test_handles_up_to_2_are_default_streams():
    assert [is_default(stream) for stream in (0, 1, 2, 3)] == [True, True, True, False]


@pytest.mark.parametrize(
    ("log", "memory", "host_code"),
    [
        ("Error Code 2: OutOfMemory (Requested size was 123 bytes.)", True, False),
        ("Cuda Runtime (out of memory)", True, False),
        ("engine host code is not allowed", False, True),
        ("setEngineHostCodeAllowed must be called", False, True),
        ("The engine plan file is not version-compatible", False, True),
        ("Serialization assertion stdVersionRead == kSERIALIZATION_VERSION failed", False, False),
    ],
)
def test_reasons_are_read_off_the_log(log, memory, host_code):
    assert (says_out_of_memory(log), says_host_code(log)) == (memory, host_code)
