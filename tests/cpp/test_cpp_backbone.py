"""Backbones in C++ return what EdgeBackbone returns, bit for bit, in every form of input and output."""

from __future__ import annotations

import numpy as np
import pytest

from edge_backbones import Bundle, EdgeBackbone
from edge_backbones.engines import select
from tests.cpp.conftest import maps_of

NETWORKS = ("mobilenet", "resnet", "vit")
FORMS = ("dynamic", "image", "nv12", "half")


def some_input(backbone: EdgeBackbone, *shape: int, seed: int = 0) -> np.ndarray:
    input = backbone.input
    draw = np.random.default_rng(seed)
    shape = shape or input.opt_shape
    if input.dtype == "uint8":
        return draw.integers(0, 256, shape, np.uint8)
    return draw.standard_normal(shape).astype(input.dtype)


def assert_same(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert list(found) == list(expected)
    for name, values in expected.items():
        assert found[name].dtype == values.dtype
        np.testing.assert_array_equal(found[name], values, err_msg=name)


@pytest.mark.parametrize("name", [*NETWORKS, *FORMS])
def test_maps_are_those_of_python(name, bundles, ask, call):
    path = bundles / f"{name}.bundle"
    requests, expected = [], []
    for precision in ("int8", "fp32") if name in NETWORKS else ("fp32",):
        with EdgeBackbone.from_pretrained(path, engine=precision) as backbone:
            sizes = backbone.input.opt_shape
            for batch in (1, 3):
                array = some_input(backbone, batch, *sizes[1:], seed=batch)
                modes = ("maps", "in_place", "row_major") if batch == 3 else ("maps", "threads")
                calls = [call(array, mode) for mode in modes]
                requests.append({"bundle": str(path), "options": {"engine": precision}, "calls": calls})
                expected.append(backbone.run(array))
    for request, maps in zip(requests, expected, strict=True):
        (answer,) = ask(request)
        assert "refusal" not in answer, answer
        for result in answer["results"]:
            assert_same(maps_of(result), maps)


def test_maps_in_channels_last_memory_keep_their_strides(bundles, ask, call):
    path = bundles / "half.bundle"
    with EdgeBackbone.from_pretrained(path) as backbone:
        array = some_input(backbone)
        maps = backbone.run(array)
    (answer,) = ask({"bundle": str(path), "calls": [call(array)]})
    for one in answer["results"][0]["maps"]:
        expected = maps[one["name"]]
        assert one["dtype"] == "float16"
        assert one["strides"] == [step // 2 for step in expected.strides]


@pytest.mark.parametrize("size", [(64, 96), (128, 32), (32, 32)])
def test_sizes_may_vary_and_need_not_be_square(size, bundles, ask, call):
    path = bundles / "dynamic.bundle"
    with EdgeBackbone.from_pretrained(path) as backbone:
        arrays = [some_input(backbone, batch, 3, *size) for batch in (1, 3, 4)]
        expected = [backbone.run(array) for array in arrays]
    (answer,) = ask({"bundle": str(path), "calls": [call(array, "in_place") for array in arrays]})
    for result, maps in zip(answer["results"], expected, strict=True):
        assert_same(maps_of(result), maps)


def test_inputs_may_have_strides_and_no_batch_axis(bundles, ask, call):
    path = bundles / "mobilenet.bundle"
    with EdgeBackbone.from_pretrained(path) as backbone:
        wide = some_input(backbone, 2, 3, 64, 100)
        view = wide[..., :96]
        expected = backbone.run(view)
    with EdgeBackbone.from_pretrained(bundles / "nv12.bundle") as backbone:
        frame = some_input(backbone)
        of_frame = backbone.run(frame)
    with EdgeBackbone.from_pretrained(bundles / "image.bundle") as backbone:
        image = some_input(backbone)
        of_image = backbone.run(image)
    answers = ask(
        {"bundle": str(path), "calls": [call(view)]},
        {"bundle": str(bundles / "nv12.bundle"), "calls": [call(frame[0, :, :, 0].copy()), call(frame[0].copy())]},
        {"bundle": str(bundles / "image.bundle"), "calls": [call(image[0].copy())]},
    )
    strided, framed, imaged = ([maps_of(result) for result in answer["results"]] for answer in answers)
    for found, maps in ((strided, expected), (framed, of_frame), (imaged, of_image)):
        for one in found:
            assert_same(one, maps)


def test_a_description_is_that_of_python(bundles, ask):
    for name in (*NETWORKS, *FORMS):
        path = bundles / f"{name}.bundle"
        (answer,) = ask({"bundle": str(path)})
        with EdgeBackbone.from_pretrained(path) as backbone:
            assert answer["description"] == {
                "engine": backbone.engine,
                "device": backbone.device,
                "passed_over": dict(backbone.passed_over),
                "out_features": backbone.out_features,
                "out_indices": list(backbone.out_indices),
                "channels": list(backbone.channels),
                "strides": [list(stride) for stride in backbone.strides],
                "stage_names": backbone.stage_names,
                "opt_shape": list(backbone.input.opt_shape),
                "input": backbone.input.describe(),
            }


def test_a_stage_may_be_chosen(bundles, ask, call):
    path = bundles / "mobilenet.bundle"
    with EdgeBackbone.from_pretrained(path) as backbone:
        array = some_input(backbone)
        maps = backbone.run(array)
        last = backbone.out_features[-1]
    (answer,) = ask(
        {"bundle": str(path), "options": {"stages": [last]}, "calls": [call(array), call(array, "in_place")]}
    )
    assert answer["description"]["out_features"] == [last]
    for result in answer["results"]:
        assert_same(maps_of(result), {last: maps[last]})


@pytest.mark.parametrize("name", NETWORKS)
def test_parity_is_that_of_the_manifest(name, bundles, ask):
    path = bundles / f"{name}.bundle"
    (answer,) = ask({"bundle": str(path), "parity": True})
    bundle = Bundle.open(path)
    assert len(answer["parity"]) == len(bundle.manifest.engines) == 2
    for engine in bundle.manifest.engines:
        for stage in engine.parity.stages:
            cosine, sqnr_db, max_abs, relative, finite, passed = answer["parity"][engine.name][stage.stage]
            assert cosine == pytest.approx(stage.cosine, abs=1e-6)
            assert sqnr_db == pytest.approx(stage.sqnr_db, abs=1e-3)
            assert (max_abs, relative) == pytest.approx((stage.max_abs, stage.relative), rel=1e-4)
            assert (finite, passed) == (True, True)


def test_threads_may_be_limited(bundles, ask, call):
    path = bundles / "resnet.bundle"
    with EdgeBackbone.from_pretrained(path, threads=1) as backbone:
        array = some_input(backbone)
        expected = backbone.run(array)
    (answer,) = ask({"bundle": str(path), "options": {"threads": 1}, "calls": [call(array)]})
    assert_same(maps_of(answer["results"][0]), expected)


@pytest.mark.parametrize("name", ["resnet", "dynamic"])  # dynamic: the child asks for a shape, which runs the engine
def test_a_forked_child_is_refused_and_ends(name, bundles, ask):
    (answer,) = ask({"bundle": str(bundles / f"{name}.bundle"), "fork": True})
    assert answer["child"] == 42


def test_engines_are_listed_by_the_names_that_python_gives(bundles, ask):
    path = bundles / "resnet.bundle"
    bundle = Bundle.open(path)
    for engine in bundle.manifest.engines:
        assert select.full_name(bundle, engine.name[:-2]) == engine.name
        (answer,) = ask({"bundle": str(path), "options": {"engine": engine.name[:-2]}})
        assert answer["description"]["engine"] == engine.name
