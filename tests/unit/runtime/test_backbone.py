"""EdgeBackbone: the transformers API, batches of every size, inputs of every kind, threads."""

from __future__ import annotations

import re
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import numpy as np
import pytest

from edge_backbones.bundle.manifest import Source
from edge_backbones.bundle.writer import record_bytes
from edge_backbones.engines import registry
from edge_backbones.engines import select as session
from edge_backbones.engines.base import LoadOptions
from edge_backbones.engines.gpu.arrays import DeviceArray
from edge_backbones.engines.gpu.dlpack import ForeignArray
from edge_backbones.engines.promises import DEFAULT_GATES
from edge_backbones.errors import EngineMismatchError, InferenceError, InputError, IntegrityError
from edge_backbones.machine import hosts
from edge_backbones.runtime.backbone import BackboneOutput, EdgeBackbone
from edge_backbones.spec import ExtraOutput, InputSpec, Precision, ShapeRange
from edge_backbones.testing import SPEC, NumpySession, make_bundle, pooled, pooling_input

RANDOM = np.random.default_rng(0)


def pixels(batch: int, height: int = 32, width: int = 48) -> np.ndarray:
    return RANDOM.standard_normal((batch, 3, height, width)).astype(np.float32)


def over_numpy(batch: ShapeRange | int) -> tuple[EdgeBackbone, NumpySession]:
    engine = NumpySession(pooling_input(batch))
    return EdgeBackbone(SPEC, engine.input, engine), engine


@pytest.fixture(scope="module", params=[2, ShapeRange(min=1, opt=2, max=4)], ids=["static", "dynamic"])
def backbone(request, tmp_path_factory):
    """A real engine."""
    path = tmp_path_factory.mktemp("runtime") / "pool.bundle"
    make_bundle(path, pooling_input(request.param))
    with EdgeBackbone.from_pretrained(path) as opened:
        yield opened


@pytest.mark.parametrize("batch", [1, 2, 3, 4, 9])
def test_every_batch_gives_each_image_its_own_maps(backbone, batch):
    images = pixels(batch)
    maps = backbone(images).feature_maps
    for actual, expected in zip(maps, pooled(images), strict=True):
        assert actual.dtype == np.float32
        assert actual.flags.c_contiguous
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("engine_batch", "batch", "pieces"),
    [
        (4, 4, [4]),
        (4, 1, [4]),
        (4, 9, [4, 4, 4]),
        (ShapeRange(min=1, opt=4, max=8), 5, [5]),
        (ShapeRange(min=1, opt=4, max=8), 17, [8, 8, 1]),
        (ShapeRange(min=3, opt=4, max=8), 2, [3]),
    ],
)
def test_batches_are_filled_and_cut_as_documented(engine_batch, batch, pieces):
    backbone, engine = over_numpy(engine_batch)
    images = pixels(batch)
    maps = backbone(images).feature_maps
    assert engine.batches == pieces
    for actual, expected in zip(maps, pooled(images), strict=True):
        np.testing.assert_array_equal(actual, expected)


def test_results_belong_to_the_caller(backbone):
    first_images, second_images = pixels(2), pixels(2)
    first = backbone(first_images).feature_maps
    kept = [m.copy() for m in first]
    second = backbone(second_images).feature_maps
    for a, b, copy in zip(first, second, kept, strict=True):
        np.testing.assert_array_equal(a, copy)
        assert not np.shares_memory(a, b)
        assert a.flags.writeable


@pytest.mark.parametrize("hold", [lambda m: m, lambda m: m[0, 0], lambda m: memoryview(m), lambda m: np.from_dlpack(m)])
def test_whatever_holds_a_result_keeps_its_values(backbone, hold):
    images = pixels(2)
    held = [hold(feature_map) for feature_map in backbone(images).feature_maps]
    expected = [hold(feature_map) for feature_map in pooled(images)]
    for _ in range(3):
        backbone(pixels(2))
    for actual, wanted in zip(held, expected, strict=True):
        np.testing.assert_allclose(np.asarray(actual), np.asarray(wanted), atol=1e-5)


def test_memory_that_was_let_go_is_used_again(tmp_path):
    make_bundle(tmp_path / "b.bundle", pooling_input(2))
    with EdgeBackbone.from_pretrained(tmp_path / "b.bundle") as opened:
        images = pixels(2)
        addresses = {tuple(m.ctypes.data for m in opened(images).feature_maps) for _ in range(20)}
    assert len(addresses) == 1


def test_the_input_is_not_written_to_and_may_be_read_only(backbone):
    images = pixels(2)
    images.flags.writeable = False
    np.testing.assert_allclose(backbone(images).feature_maps[0], pooled(images)[0], atol=1e-5)


def test_threads_do_not_mix_results(backbone):
    inputs = [pixels(1 + i % 5) for i in range(64)]
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda images: backbone(images).feature_maps, inputs))
    for images, maps in zip(inputs, results, strict=True):
        for actual, expected in zip(maps, pooled(images), strict=True):
            np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


class OnlyDlpack:
    """A tensor of another library: DLPack and nothing else."""

    def __init__(self, array: np.ndarray) -> None:
        self._array = array

    def __dlpack__(self, **options: object) -> object:
        return self._array.__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self._array.__dlpack_device__()


class OnTheGpu(OnlyDlpack):
    def __dlpack__(self, **options: object) -> object:
        raise BufferError("device tensor")


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("wrap", [np.asarray, OnlyDlpack, lambda a: a[::-1][::-1], np.asfortranarray])
def test_any_float_array_of_any_library_and_layout(backbone, dtype, wrap):
    images = pixels(2).astype(dtype)
    maps = backbone(wrap(images)).feature_maps
    np.testing.assert_allclose(maps[0], pooled(images.astype(np.float32))[0], atol=1e-5)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (np.zeros((1, 3, 32, 32), np.float32), "of shape (1, 3, 32, 32) does not fit: this engine takes float32 NCHW"),
        (np.zeros((1, 1, 32, 48), np.float32), "(batch, 3, 32, 48)"),
        (np.zeros((3, 32, 48), np.float32), "of shape (3, 32, 48) does not fit"),
        (np.zeros((0, 3, 32, 48), np.float32), "with any batch >= 1"),
        (np.zeros((1, 3, 32, 48), np.uint8), "of dtype uint8 does not fit: this engine takes float32 NCHW"),
        (np.zeros((1, 3, 32, 48), np.complex64), "of dtype complex64 does not fit"),
        ([[1.0]], "of type list does not fit: pass a numpy array or a DLPack tensor"),
        (OnTheGpu(np.zeros((1, 3, 32, 48), np.float32)), "(device tensor): pass a dense float32 tensor"),
        (np.zeros((1, 3, 32, 48), object), "of dtype object does not fit"),
        (np.ones((2, 2), np.float32).view(np.matrix), "of shape (2, 2) does not fit"),
        (np.full((1, 3, 32, 48), 1e39), "of dtype float64 has values beyond float32, whose largest is 3.4e38"),
        (np.full((1, 3, 32, 48), 1e39, np.longdouble), "has values beyond float32"),
        (np.ma.masked_less(pixels(1), 0), "masked values, and an engine has no mask: pass array.filled(0)"),
    ],
)
def test_what_does_not_fit_is_refused_with_what_would(backbone, value, message):
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        backbone(value)
    assert isinstance(caught.value, InputError)


def test_image_input_takes_uint8_frames_only():
    fixed = ShapeRange.fixed
    spec = InputSpec(name="image", channels=3, batch=fixed(1), height=fixed(32), width=fixed(48))
    backbone = EdgeBackbone(SPEC, spec, NumpySession(spec))
    with pytest.raises(
        InputError, match=r"of dtype float32 does not fit: this engine takes uint8 NHWC \(batch, 32, 48, 3\)"
    ):
        backbone(np.zeros((1, 32, 48, 3), np.float32))


def test_output_behaves_like_the_one_of_transformers():
    backbone, _ = over_numpy(1)
    images = pixels(1)
    output = backbone(images)
    assert isinstance(output, BackboneOutput)
    assert list(output) == ["feature_maps"]
    assert output[0] is output["feature_maps"] is output.feature_maps
    assert output.to_tuple() == (output.feature_maps,)
    assert output[:1] == (output.feature_maps,)
    assert output.hidden_states is None
    assert "hidden_states" not in output
    with pytest.raises(KeyError):
        output["hidden_states"]
    assert len(output) == 1
    (maps,) = backbone(images, return_dict=False)
    assert [m.shape for m in maps] == [m.shape for m in output.feature_maps]
    assert "(1, 3, 8, 12)" in repr(output)


def test_hidden_states_and_attentions_are_refused():
    backbone, _ = over_numpy(1)
    with pytest.raises(ValueError, match="Cannot output attentions"):
        backbone(pixels(1), output_attentions=True)
    with pytest.raises(ValueError, match="Cannot output hidden states"):
        backbone(pixels(1), output_hidden_states=True)


class ManyOutputs:
    """An engine with every kind of output: two maps, their class tokens, and hidden states of which one is a map."""

    spec = msgspec.structs.replace(
        SPEC,
        out_indices=(1, -1),
        layouts=("NCHW", "NLC"),
        extras=(
            ExtraOutput(name="cls_tokens.pool4", layout="NC", channels=3),
            ExtraOutput(name="cls_tokens.pool8", layout="NC", channels=3),
            ExtraOutput(name="hidden_states.0", layout="NLC", channels=3),
        ),
        cls_tokens=("cls_tokens.pool4", "cls_tokens.pool8"),
        hidden_states=("hidden_states.0", "pool4"),
    )

    def run(self, array):
        return [np.full((len(array), 3, *rest), i, np.float32) for i, rest in enumerate([(4, 4), (5,), (), (), (7,)])]

    def close(self):
        pass


def over_many_outputs(**options: int) -> EdgeBackbone:
    config = {"hidden_size": 3, "out_indices": [9], "nested": {"a": [1]}}
    source = Source(library="transformers", name="pool", weights="random", seed=0, options=options, config=config)
    return EdgeBackbone(ManyOutputs.spec, pooling_input(2), ManyOutputs(), source)


def numbers(arrays) -> list[int]:
    return [int(array.flat[0]) for array in arrays]


def test_class_tokens_and_hidden_states_come_with_the_maps():
    backbone = over_many_outputs()
    plain, full = backbone(pixels(2)), backbone(pixels(2), output_hidden_states=True)
    assert list(plain) == ["feature_maps", "cls_tokens"]
    assert list(full) == ["feature_maps", "hidden_states", "cls_tokens"]
    assert numbers(full.feature_maps) == [0, 1]
    assert numbers(full.cls_tokens) == [2, 3]
    assert numbers(full.hidden_states) == [4, 0]
    assert backbone.has_cls_tokens
    assert (backbone.out_indices, backbone.layouts) == ([1, -1], ["NCHW", "NLC"])
    assert list(backbone.run(pixels(2))) == list(ManyOutputs.spec.outputs)
    maps, hidden, tokens = backbone(pixels(2), output_hidden_states=True, return_dict=False)
    assert (numbers(maps), numbers(hidden), numbers(tokens)) == ([0, 1], [4, 0], [2, 3])
    maps, tokens = backbone(pixels(2), return_dict=False)
    assert (numbers(maps), numbers(tokens)) == ([0, 1], [2, 3])


@pytest.mark.parametrize(
    ("asked", "given"),
    [(True, [4, 0]), (1, [None, 0]), (-1, [None, 0]), ([0], [4, None]), ([-1, 0], [4, 0]), ([2, -3], [None, None])],
)
def test_hidden_states_are_selected_by_index(asked, given):
    states = over_many_outputs()(pixels(2), output_hidden_states=asked).hidden_states
    assert [None if state is None else int(state.flat[0]) for state in states] == given


@pytest.mark.parametrize("asked", [False, None, []])
def test_no_hidden_states_are_asked_for(asked):
    assert "hidden_states" not in over_many_outputs()(pixels(2), output_hidden_states=asked)


def test_class_tokens_follow_the_chosen_stages_and_batches_are_cut_for_every_output():
    backbone = over_many_outputs()
    backbone.out_indices = [-1]
    output = backbone(pixels(5), output_hidden_states=True)
    assert numbers(output.feature_maps) == [1]
    assert numbers(output.cls_tokens) == [3]
    assert numbers(output.hidden_states) == [4, 0]
    assert {len(array) for arrays in output.values() for array in arrays} == {5}


def test_the_configuration_is_one_object_whose_stages_are_those_of_the_backbone():
    """As in transformers 5, where the stages that are chosen are the configuration's."""
    backbone = over_many_outputs()
    config = backbone.config
    assert backbone.config is config
    config.out_features = ["pool8"]
    assert (backbone.out_features, backbone.out_indices, backbone.channels) == (["pool8"], [2], [3])
    assert numbers(backbone(pixels(2)).feature_maps) == [1]
    backbone.out_indices = [1, -1]
    assert (config.out_features, config.out_indices, config.channels) == (["pool4", "pool8"], [1, -1], [3, 3])
    config.hidden_size = 5
    config.nested["a"].append(2)
    assert (backbone.config.hidden_size, backbone.config.nested) == (5, {"a": [1, 2]})
    assert over_many_outputs().config.nested == {"a": [1]}
    assert (
        config.to_dict()
        == backbone.to_dict()
        == {
            "hidden_size": 5,
            "nested": {"a": [1, 2]},
            "stage_names": ["pool2", "pool4", "pool8"],
            "out_features": ["pool4", "pool8"],
            "out_indices": [1, -1],
            "channels": [3, 3],
            "num_features": [3, 3, 3],
        }
    )
    with pytest.raises(AttributeError, match="this configuration has no 'depths'"):
        _ = config.depths


@pytest.mark.parametrize(
    ("attribute", "value", "error"),
    [
        ("out_features", ["pool2"], InputError),
        ("out_features", ("pool8",), InputError),
        ("out_indices", [7], InputError),
        ("channels", [1], AttributeError),
        ("stage_names", ["a"], AttributeError),
        ("num_features", [1], AttributeError),
    ],
)
def test_a_configuration_that_cannot_be_followed_is_refused(attribute, value, error):
    backbone = over_many_outputs()
    before = backbone.to_dict()
    with pytest.raises(error):
        setattr(backbone.config, attribute, value)
    assert backbone.to_dict() == before


# ---- values ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("convert", [np.asarray, np.asfortranarray, lambda a: a.astype(np.float64)])
def test_values_that_are_not_finite_are_named_with_their_sample(backbone, convert):
    images = pixels(5)
    images[1, :, 3, 4:6] = np.nan
    images[4, 0, 0, 0] = -np.inf
    images[4, 1, 1, 1] = np.nan
    message = "(6 NaN in sample 1, 1 NaN and 1 infinite in sample 4): replace them, as np.nan_to_num(array, posinf=0"
    with pytest.raises(InputError, match=re.escape(message)):
        backbone(convert(images))
    replaced = np.nan_to_num(images, posinf=0, neginf=0)
    np.testing.assert_allclose(backbone(replaced).feature_maps[0], pooled(replaced)[0], atol=1e-5)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [(0, 0, 0, 0), (1, 2, 31, 47)])
def test_one_value_is_found_wherever_it_is_on_the_shortest_path(value, place):
    backbone, engine = over_numpy(2)
    images = pixels(2)
    assert images.flags.carray
    images[place] = value
    with pytest.raises(InputError, match=f"in sample {place[0]}\\)"):
        backbone(images)
    assert engine.batches == []


@pytest.mark.parametrize("value", [3e19, 3.4e38, -3.4e38, 1e-45])
def test_large_and_tiny_values_are_no_false_alarm(value):
    """The sum of their squares is not finite, and they are."""
    backbone, engine = over_numpy(2)
    images = np.zeros((2, 3, 32, 48), np.float32)
    images[:, :, ::8, ::8] = value
    backbone(images)
    backbone(images.astype(np.float64))
    assert engine.batches == [2, 2]


def test_many_samples_that_are_not_finite_make_one_short_line():
    backbone, _ = over_numpy(2)
    with pytest.raises(InputError) as caught:
        backbone(np.full((9, 3, 32, 48), np.nan, np.float32))
    assert "4608 NaN in sample 2, and more in 6 other samples" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_values_are_not_checked_for_who_says_so_nor_in_frames(tmp_path):
    images = pixels(2)
    images[0, 0, 0, 0] = np.nan
    engine = NumpySession(pooling_input())
    maps = EdgeBackbone(SPEC, engine.input, engine, check_finite=False)(images).feature_maps
    np.testing.assert_array_equal(maps[0], pooled(images)[0])
    bundle = make_bundle(tmp_path / "b.bundle")
    with EdgeBackbone.from_pretrained(bundle.path, check_finite=False) as opened:
        assert np.isnan(opened(images).feature_maps[0][0, 0, 0, 0])
    with EdgeBackbone.from_pretrained(bundle.path) as opened, pytest.raises(InputError, match="1 NaN in sample 0"):
        opened(images)
    fixed = ShapeRange.fixed
    frames = InputSpec(name="image", channels=3, batch=fixed(1), height=fixed(32), width=fixed(48))
    assert not EdgeBackbone(SPEC, frames, NumpySession(frames))._checks_values


@pytest.mark.parametrize(
    "convert",
    [
        lambda a: a.astype(">f4"),
        lambda a: a.astype(">f8"),
        lambda a: a.view(np.memmap),
        lambda a: np.ma.masked_array(a),
        lambda a: np.ma.masked_array(a, mask=False),
        lambda a: np.broadcast_to(a, a.shape),
        lambda a: np.frombuffer(a.tobytes(), np.float32).reshape(a.shape),
        lambda a: np.concatenate([a, a], axis=3)[..., : a.shape[3]],
    ],
)
def test_arrays_in_other_clothes_give_the_same_maps(backbone, convert):
    images = pixels(2)
    maps = backbone(convert(images)).feature_maps
    assert type(maps[0]) is np.ndarray
    np.testing.assert_allclose(maps[0], pooled(images)[0], atol=1e-5)


def test_what_the_engine_is_given_is_a_plain_array():
    seen = []

    class Watching(NumpySession):
        def run(self, array):
            seen.append(type(array))
            return super().run(array)

    backbone = EdgeBackbone(SPEC, pooling_input(), Watching(pooling_input()))
    backbone(np.ma.masked_array(pixels(2)))
    assert seen == [np.ndarray]


@pytest.mark.parametrize("index", [1, [1, 1], np.array([1, 1])])
def test_the_expert_that_was_built_in_is_accepted_and_others_are_not(index):
    backbone = over_many_outputs(dataset_index=1)
    assert len(backbone(pixels(2), dataset_index=index).feature_maps) == 2
    with pytest.raises(InputError, match=r"dataset_index \[0\] does not fit: this bundle was built for 1"):
        backbone.forward_with_filtered_kwargs(pixels(2), dataset_index=np.zeros(2, int))
    assert len(over_many_outputs().forward_with_filtered_kwargs(pixels(2), dataset_index=index).feature_maps) == 2


def test_filtered_kwargs_drop_what_is_not_known():
    backbone, _ = over_numpy(1)
    assert len(backbone.forward_with_filtered_kwargs(pixels(1), bogus=1, return_dict=True).feature_maps) == 2
    assert len(backbone.forward(pixel_values=pixels(1)).feature_maps) == 2
    with pytest.raises(TypeError):
        backbone(pixels(1), bogus=1)


def test_close_releases_the_engine_and_keeps_results(tmp_path):
    make_bundle(tmp_path / "b.bundle")
    backbone = EdgeBackbone.from_pretrained(tmp_path / "b.bundle")
    images = pixels(2)
    maps = backbone(images).feature_maps
    backbone.close()
    backbone.close()
    np.testing.assert_allclose(maps[0], pooled(images)[0], atol=1e-5)
    with pytest.raises(InputError, match="was closed"):
        backbone(images)


def test_a_failing_engine_is_a_typed_error_and_the_next_call_works(tmp_path, monkeypatch):
    make_bundle(tmp_path / "b.bundle")
    with EdgeBackbone.from_pretrained(tmp_path / "b.bundle") as opened:
        with pytest.raises(InferenceError, match=r"OpenVINO failed on float32 \(2, 3, 40, 48\)"):
            opened._engine.run(pixels(2, height=40))  # a shape that the class itself would have refused
        images = pixels(2)
        np.testing.assert_allclose(opened(images).feature_maps[0], pooled(images)[0], atol=1e-5)


def test_threads_are_limited_and_checked(tmp_path):
    make_bundle(tmp_path / "b.bundle")
    with EdgeBackbone.from_pretrained(tmp_path / "b.bundle", threads=1) as backbone:
        assert len(backbone(pixels(1)).feature_maps) == 2
    with pytest.raises(InputError, match="threads must be at least 1, got 0"):
        EdgeBackbone.from_pretrained(tmp_path / "b.bundle", threads=0)


def test_engines_are_chosen_by_precision_flavour_or_name(tmp_path):
    bundle = make_bundle(tmp_path / "b.bundle")
    name = bundle.manifest.engines[0].name
    for engine in (None, "fp32", "openvino", name):
        with EdgeBackbone.from_pretrained(bundle.path, engine=engine) as backbone:
            assert backbone.engine == bundle.manifest.engines[0].name
    with pytest.raises(EngineMismatchError, match=f"has no engine 'int8'; it holds: {re.escape(name)}"):
        EdgeBackbone.from_pretrained(bundle.path, engine="int8")
    with pytest.raises(EngineMismatchError, match=r"runs on cpu, not on cuda.*compile .*on the machine with that GPU"):
        EdgeBackbone.from_pretrained(bundle.path, device="cuda")


def test_fewer_bits_are_preferred_among_engines_that_fit(tmp_path):
    bundle = make_bundle(tmp_path / "b.bundle")
    only = bundle.manifest.engines[0]
    data = bytes(bundle.read(only.file))
    for precision in ("fp16", "int8"):
        key = msgspec.structs.replace(only.key, precision=Precision(precision))
        file = record_bytes(key.path(data, ".blob"), data)
        parity = msgspec.structs.replace(only.parity, precision=key.precision, gate=DEFAULT_GATES[key.precision])
        record = msgspec.structs.replace(only, key=key, file=file, parity=parity)
        bundle = bundle.add_engine(record, {file.path: data})
    host = hosts.this_host(registry.InstalledVersions())
    assert session.choose_engine(bundle, host).key.precision == "int8"
    assert session.choose_engine(bundle, host, "fp16").key.precision == "fp16"


def test_an_engine_of_another_machine_is_passed_over_with_the_reason(tmp_path):
    bundle = make_bundle(tmp_path / "b.bundle")
    host = hosts.Host("aarch64", ("asimd",), "Cortex", {"openvino": "2025.1"})
    with pytest.raises(EngineMismatchError) as caught:
        session.choose_engine(bundle, host)
    message = str(caught.value)
    assert f"Run: edge-backbones compile {bundle.path}" in message
    assert "here 2025.1" in message
    assert "this machine is aarch64" in message


def test_an_engine_file_that_is_not_one_is_refused(tmp_path):
    bundle = make_bundle(tmp_path / "b.bundle")
    only = bundle.manifest.engines[0]
    for garbage in (b"not an engine at all", bytes(bundle.read(only.file))[:500]):
        file = record_bytes(only.file.path, garbage)
        bundle = bundle.add_engine(msgspec.structs.replace(only, file=file), {file.path: garbage})
        with pytest.raises(EngineMismatchError, match="does not load this engine"):
            EdgeBackbone.from_pretrained(bundle.path)


class OnGpu:
    """An array of another library in GPU memory, as the CUDA Array Interface describes it."""

    def __init__(self, shape: tuple[int, ...], typestr: str = "<f4") -> None:
        self.__cuda_array_interface__ = {"version": 3, "shape": shape, "typestr": typestr, "data": (0x1000, False)}


class GpuSession(NumpySession):
    """A session that takes arrays on the GPU; what it is given is recorded."""

    def __init__(self, input: InputSpec) -> None:
        super().__init__(input)
        self.calls: list[tuple[ForeignArray, int]] = []

    def run_on_device(self, array: ForeignArray, stream: int) -> list[DeviceArray]:
        self.calls.append((array, stream))
        batch, channels, height, width = array.shape
        return [
            DeviceArray(k, (batch, channels, height // k, width // k), np.dtype(np.float32), **FRESH) for k in (4, 8)
        ]


FRESH = {"device": 1, "owner": None, "synchronize": None}


def over_gpu() -> tuple[EdgeBackbone, GpuSession]:
    engine = GpuSession(pooling_input(ShapeRange(min=2, opt=2, max=4)))
    return EdgeBackbone(SPEC, engine.input, engine, device="cuda:1"), engine


def test_arrays_on_the_gpu_stay_there():
    backbone, engine = over_gpu()
    assert backbone.device == "cuda:1"
    output = backbone(OnGpu((9, 3, 32, 48)), stream=0x5000)
    assert [m.shape for m in output.feature_maps] == [(9, 3, 8, 12), (9, 3, 4, 6)]
    assert all(isinstance(m, DeviceArray) for m in output.feature_maps)
    ((array, stream),) = engine.calls
    assert (array.pointer, array.shape, array.dtype, stream) == (0x1000, (9, 3, 32, 48), np.float32, 0x5000)
    assert engine.batches == []  # batches are cut and filled where the array is
    backbone.out_features = ["pool8"]
    (only,) = backbone(OnGpu((2, 3, 32, 48))).feature_maps
    assert only.pointer == 8
    assert engine.calls[-1][1] == 0
    assert list(backbone.run(OnGpu((2, 3, 32, 48)), stream=7)) == ["pool4", "pool8"]
    assert backbone.forward_with_filtered_kwargs(OnGpu((2, 3, 32, 48)), stream=9, bogus=1)[0]
    assert [stream for _, stream in engine.calls] == [0x5000, 0, 7, 9]


def test_one_frame_needs_no_batch_axis():
    fixed = ShapeRange.fixed
    input = InputSpec(name="image", channels=3, batch=fixed(1), height=fixed(32), width=fixed(48))
    seen = []

    class Session(NumpySession):
        def run(self, array):
            seen.append(array)
            return pooled(array.transpose(0, 3, 1, 2))

        def run_on_device(self, array, stream):
            seen.append(array)
            return pooled(np.zeros((1, 3, 32, 48)))

    backbone = EdgeBackbone(SPEC, input, Session(input), device="cuda:0")
    frame = np.arange(32 * 48 * 3, dtype=np.uint8).reshape(32, 48, 3)
    (first, _) = backbone(frame).feature_maps
    np.testing.assert_array_equal(first, pooled(frame[None].transpose(0, 3, 1, 2))[0])
    assert np.shares_memory(seen[0], frame)
    backbone(OnGpu((32, 48, 3), "|u1"))
    assert [array.shape for array in seen] == [(1, 32, 48, 3)] * 2
    for wrong in (frame[0], frame.transpose(2, 0, 1)):
        with pytest.raises(InputError, match="does not fit: this engine takes uint8 NHWC"):
            backbone(wrong)
    one = pixels(1)[0]  # normalised pixels are a batch always
    with pytest.raises(InputError, match=r"of shape \(3, 32, 48\) does not fit"):
        over_gpu()[0](one)


def test_frames_in_flight_on_the_cpu_have_memory_of_their_own(backbone):
    frames = [pixels(1 + number % 3) for number in range(24)]
    outputs = list(backbone.map(frames, in_flight=3))
    for output, frame in zip(outputs, frames, strict=True):
        for actual, expected in zip(output.feature_maps, pooled(frame), strict=True):
            np.testing.assert_allclose(actual, expected, atol=1e-5)


def test_a_call_of_the_usual_input_takes_few_steps(backbone):
    """After an inference the caches are cold: every Python call costs, and so does every file that it is in."""
    images, entered = np.zeros(backbone.input.opt_shape, np.float32), []
    for _ in range(3):
        backbone(images)

    def note(frame, event, argument):
        if event == "call":
            entered.append(frame.f_code.co_filename)

    sys.setprofile(note)
    try:
        backbone(images)
    finally:
        sys.setprofile(None)
    ours = {Path(file).name for file in entered if "/edge_backbones/" in file}
    assert ours == {"backbone.py", "session.py"}
    assert len(entered) <= 13, entered


def test_an_input_buffer_on_the_cpu_is_an_ordinary_array(backbone):
    buffer = backbone.input_buffer()
    assert (buffer.shape, buffer.dtype, buffer.any()) == (backbone.input.opt_shape, np.float32, False)
    buffer[:] = images = pixels(len(buffer))
    for actual, expected in zip(backbone(buffer).feature_maps, pooled(images), strict=True):
        np.testing.assert_allclose(actual, expected, atol=1e-5)
    with pytest.raises(InputError, match="does not fit"):
        backbone.input_buffer(width=49)


def test_arrays_of_the_host_come_back_to_the_host_from_an_engine_on_the_gpu():
    backbone, _ = over_gpu()
    images = pixels(5)
    for actual, expected in zip(backbone(images).feature_maps, pooled(images), strict=True):
        np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize(
    ("value", "options", "message"),
    [
        (OnGpu((1, 3, 32, 32)), {}, "of shape (1, 3, 32, 32) does not fit: this engine takes float32 NCHW"),
        (OnGpu((1, 3, 32, 48)), {"stream": "fast"}, "stream 'fast'"),
        (
            np.zeros((2, 3, 32, 48), np.float32),
            {"stream": 0},
            "stream= is for arrays on the GPU, and pixel_values is not",
        ),
    ],
)
def test_what_an_engine_on_the_gpu_cannot_take_is_refused(value, options, message):
    backbone, engine = over_gpu()
    with pytest.raises(InputError, match=re.escape(message)):
        backbone(value, **options)
    assert engine.calls == []


def test_an_array_on_the_gpu_does_not_fit_an_engine_on_the_cpu(backbone):
    with pytest.raises(
        InputError, match="is on a GPU, this engine on cpu takes arrays on the host: open the bundle with"
    ):
        backbone(OnGpu((2, 3, 32, 48)))


@pytest.mark.parametrize("device", ["gpu", "cuda:", "cuda:x", "cuda:-1", "CUDA", "cuda:1 ", 0])
def test_a_device_that_is_not_one_is_refused(tmp_path, device):
    with pytest.raises(InputError, match="device must be 'auto', 'cpu', 'cuda' or 'cuda:<index>', got"):
        EdgeBackbone.from_pretrained(tmp_path, device=device)


@pytest.mark.parametrize(
    ("device", "kind", "index"), [("cpu", "cpu", None), ("cuda", "cuda", 0), ("cuda:3", "cuda", 3)]
)
def test_options_of_the_gpu_reach_the_engine(tmp_path, monkeypatch, device, kind, index):
    bundle = make_bundle(tmp_path / "b.bundle")
    looked, seen = [], []

    def open_session(bundle, engine, options):
        seen.append(options)
        return NumpySession(bundle.manifest.input)

    def choose_engine(bundle, host, engine, **options):
        seen.append(options)
        return bundle.manifest.engines[0]

    monkeypatch.setattr(registry, "this_machine", looked.append)
    monkeypatch.setattr(session, "open_session", open_session)
    monkeypatch.setattr(session, "choose_engine", choose_engine)
    options = {"threads": 3} if index is None else {"memory": "pycuda"}
    options["allow_host_code"] = True
    opened = EdgeBackbone.from_pretrained(bundle.path, device=device, **options)
    assert looked == [index]
    assert seen == [{"device": kind, "allow_host_code": True}, LoadOptions(gpu=index, **options)]
    assert opened.device == ("cpu" if index is None else f"cuda:{index}")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "cuda", "threads": 3}, "threads=3 is for engines on the CPU, and device is cuda"),
        ({"device": "cuda:1", "threads": 1}, "threads=1 is for engines on the CPU, and device is cuda"),
        ({"device": "cpu", "memory": "pycuda"}, "memory='pycuda' is for engines on a GPU, and device is cpu"),
    ],
)
def test_options_of_another_device_are_refused(tmp_path, options, message):
    with pytest.raises(InputError, match=re.escape(message)):
        EdgeBackbone.from_pretrained(make_bundle(tmp_path / "b.bundle").path, **options)


def test_an_engine_is_found_by_the_beginning_of_its_name(tmp_path):
    bundle = make_bundle(tmp_path / "b.bundle")
    (record,) = bundle.manifest.engines
    with EdgeBackbone.from_pretrained(bundle.path, engine=record.name[:-6]) as backbone:
        assert (backbone.engine, backbone.device) == (record.name, "cpu")
    with pytest.raises(EngineMismatchError, match="has no engine 'penvino'; it holds: openvino-"):
        EdgeBackbone.from_pretrained(bundle.path, engine="penvino")


def test_a_bundle_that_others_write_to_is_read_again(tmp_path, monkeypatch):
    """Two writers came between reading the manifest and reading the engine; damage that stays is told."""
    bundle = make_bundle(tmp_path / "pool.bundle")
    (engine,) = bundle.manifest.engines
    file = bundle.path / engine.file.path
    data, writers, read = file.read_bytes(), iter(["first", "second"]), session.open_session

    def while_others_write(opened, record, options):
        writer = next(writers, None)
        if writer is None:
            file.write_bytes(data)
        else:
            file.write_bytes(b"half")
            key = msgspec.structs.replace(engine.key, device_name=writer)
            bundle.add_engine(msgspec.structs.replace(engine, key=key), {})
        return read(opened, record, options)

    monkeypatch.setattr(session, "open_session", while_others_write)
    with EdgeBackbone.from_pretrained(bundle.path) as backbone:
        np.testing.assert_allclose(backbone(image := pixels(2)).feature_maps[0], pooled(image)[0], atol=1e-5)
    assert next(writers, None) is None

    monkeypatch.setattr(session, "open_session", read)
    file.write_bytes(b"half")
    with pytest.raises(IntegrityError, match="has 4 bytes"):
        EdgeBackbone.from_pretrained(bundle.path)
