"""Maps in channels-last memory and float16: what callers see of what an engine returns. No torch is needed."""

from __future__ import annotations

import re
import types

import msgspec
import numpy as np
import pytest

from edge_backbones.engines.gpu.arrays import DeviceArray
from edge_backbones.errors import InputError
from edge_backbones.runtime import backbone as runtime
from edge_backbones.runtime.backbone import EdgeBackbone
from edge_backbones.runtime.inputs import half_is_finite, host_array
from edge_backbones.runtime.views import as_callers_see, reordered_outputs
from edge_backbones.spec import BackboneSpec, ExtraOutput, ShapeRange
from edge_backbones.testing import SPEC, pooled, pooling_input

LAST = msgspec.structs.replace(SPEC, channels_last=True)
HALF = msgspec.structs.replace(SPEC, map_dtype="float16")
BOTH = msgspec.structs.replace(LAST, map_dtype="float16")
RANDOM = np.random.default_rng(0)


class Session:
    """A pooling engine with the outputs of a spec, in the engine's own layout and dtype."""

    def __init__(self, spec: BackboneSpec, batch: ShapeRange | int = 2, pixels: str = "float32") -> None:
        self.spec = spec
        self.input = msgspec.structs.replace(pooling_input(batch), pixel_dtype=pixels)
        self.returned: list[np.ndarray] = []
        self.given: np.ndarray | None = None

    def run(self, array: np.ndarray) -> list[np.ndarray]:
        assert len(array) in self.input.batch
        assert array.dtype == self.input.dtype
        self.given = array
        maps = [m.astype(self.spec.map_dtype) for m in pooled(array.astype(np.float32))]
        if self.spec.channels_last:
            maps = [np.ascontiguousarray(m.transpose(0, 2, 3, 1)) for m in maps]
        self.returned = maps
        return maps

    def close(self) -> None:
        pass


def images(count: int = 2) -> np.ndarray:
    return RANDOM.standard_normal((count, 3, 32, 48)).astype(np.float32)


@pytest.mark.parametrize("spec", [SPEC, LAST, HALF, BOTH], ids=["default", "channels-last", "float16", "both"])
@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_callers_see_nchw_whatever_lies_in_memory(spec, count):
    session = Session(spec, ShapeRange(min=2, opt=2, max=3))
    backbone = EdgeBackbone(spec, session.input, session)
    assert (backbone.map_dtype, backbone.channels_last) == (spec.map_dtype, spec.channels_last)
    assert backbone.layouts == ["NCHW", "NCHW"]
    values = images(count)
    maps, by_name = backbone(values).feature_maps, backbone.run(values)
    for name, actual, expected in zip(spec.out_features, maps, pooled(values), strict=True):
        assert actual.shape == expected.shape
        assert actual.dtype == spec.map_dtype
        np.testing.assert_array_equal(actual, expected.astype(spec.map_dtype))
        np.testing.assert_array_equal(by_name[name], actual)
        last = actual.transpose(0, 2, 3, 1)
        assert (last if spec.channels_last else actual).flags.c_contiguous
        assert actual.flags.writeable
    if count in (2, 3):  # the engine's own memory: no copy was made
        for shown, own in zip(by_name.values(), session.returned, strict=True):
            assert np.shares_memory(shown, own)


def test_only_nchw_outputs_are_moved():
    extras = (
        ExtraOutput(name="hidden", layout="NCHW", channels=3),
        ExtraOutput(name="tokens", layout="NLC", channels=3),
        ExtraOutput(name="class", layout="NC", channels=3),
    )
    spec = msgspec.structs.replace(LAST, layouts=("NHWC", "NCHW"), extras=extras)
    assert reordered_outputs(spec) == (False, True, True, False, False)
    assert reordered_outputs(msgspec.structs.replace(spec, channels_last=False)) == ()
    arrays = [np.zeros((1, *range(2, 2 + len(axes)))) for axes in ("HWC", "HWC", "HWC", "LC", "C")]
    seen = as_callers_see(arrays, reordered_outputs(spec))
    assert [a.shape for a in seen] == [(1, 2, 3, 4), (1, 4, 2, 3), (1, 4, 2, 3), (1, 2, 3), (1, 2)]


def test_an_array_on_the_gpu_makes_its_own_view():
    array = DeviceArray(4096, (2, 8, 12, 3), np.dtype(np.float16), device=0, owner=None, synchronize=None)
    view, same = as_callers_see([array, array], (True, False))
    assert same is array
    assert (view.pointer, view.shape, view.dtype) == (4096, (2, 3, 8, 12), np.float16)
    own = np.zeros((2, 8, 12, 3), np.float16).transpose(0, 3, 1, 2)
    assert view.strides == tuple(stride // own.itemsize for stride in own.strides)


class GpuSession(Session):
    """The same, called with arrays that pretend to be on a GPU."""

    def run_on_device(self, array: np.ndarray, stream: int) -> list[np.ndarray]:
        return self.run(array)

    def graphed(self, array: np.ndarray, stream: int) -> GpuSession:
        self.outputs = [np.zeros_like(m) for m in self.run(array)]
        self.input_memory = array
        return self

    def graphed_on_host(self, array: np.ndarray) -> GpuSession:
        return self.graphed(array, 0)

    def input_buffer(self, shape: tuple[int, ...]) -> np.ndarray:
        return np.zeros(shape, self.input.dtype)

    def __call__(self) -> list[np.ndarray]:
        for output, values in zip(self.outputs, self.run(self.input_memory), strict=True):
            output[...] = values
        return self.outputs


def test_calls_on_the_gpu_return_views_too(monkeypatch):
    monkeypatch.setattr(runtime, "is_on_gpu", lambda values: True)
    monkeypatch.setattr(runtime, "stream_pointer", lambda stream: 7)
    monkeypatch.setattr(runtime, "from_foreign", lambda values, stream: np.asarray(values.values))
    session = GpuSession(LAST)
    backbone = EdgeBackbone(LAST, session.input, session, device="cuda:0")
    holder = types.SimpleNamespace(values=images())
    for actual, expected in zip(backbone(holder, stream=7).feature_maps, pooled(holder.values), strict=True):
        np.testing.assert_array_equal(actual, expected)
    buffer = backbone.input_buffer()
    for memory, given, stream in ((holder.values, holder, 7), (buffer, buffer, None)):
        replay = backbone.graphed(given, stream=stream)
        for _ in range(2):
            memory[...] = images()
            maps = replay().feature_maps
            for actual, expected in zip(maps, pooled(memory), strict=True):
                np.testing.assert_array_equal(actual, expected)
            assert replay().feature_maps is maps


# ---- float16 input


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_float16_input_takes_every_float(dtype, count):
    session = Session(SPEC, 2, "float16")
    backbone = EdgeBackbone(SPEC, session.input, session)
    values = images(count).astype(dtype)
    maps = backbone(values).feature_maps
    rounded = values.astype(np.float16).astype(np.float32)
    for actual, expected in zip(maps, pooled(rounded), strict=True):
        np.testing.assert_array_equal(actual, expected)
    if dtype == np.float16 and count == 2:
        assert session.given is values  # not copied


@pytest.mark.parametrize("value", [1e5, -1e5, 65520.0])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_what_float16_cannot_hold_is_refused(value, dtype):
    session = Session(SPEC, 2, "float16")
    values = images().astype(dtype)
    values[1, 2, 3, 4] = value
    message = (
        f"of dtype {np.dtype(dtype)} has values beyond float16, whose largest is 65504, and this engine takes float16"
    )
    with pytest.raises(InputError, match=re.escape(message)):
        EdgeBackbone(SPEC, session.input, session)(values)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_nan_and_infinity_are_found_in_float16_input(value, count, dtype):
    session = Session(SPEC, 2, "float16")
    values = images(count).astype(dtype)
    values[1, 2, 3, 4] = value
    with pytest.raises(InputError, match="has values that are not finite"):
        EdgeBackbone(SPEC, session.input, session)(values)
    maps = EdgeBackbone(SPEC, session.input, session, check_finite=False)(values).feature_maps
    assert not np.isfinite(maps[0]).all()


def test_every_bit_pattern_of_half_is_judged_as_numpy_judges_it():
    every = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    assert [half_is_finite(every[i : i + 1]) for i in range(len(every))] == np.isfinite(every).tolist()
    assert half_is_finite(np.array([65504, -65504, 0, -0.0, 6e-8], np.float16))


def test_small_values_are_rounded_and_integers_refused():
    spec = msgspec.structs.replace(pooling_input(2), pixel_dtype="float16")
    assert host_array(np.full((2, 3, 32, 48), 1e-9, np.float32), spec).max() == 0
    with pytest.raises(InputError, match="of dtype uint8 does not fit: this engine takes float16 NCHW"):
        host_array(np.zeros((2, 3, 32, 48), np.uint8), spec)
