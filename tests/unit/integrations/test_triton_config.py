"""config.pbtxt: golden texts, whatever the names are, and what a batch of Triton's is for each backend."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_backbones.bundle.golden import GoldenSamples
from edge_backbones.integrations.triton_config import (
    Batch,
    Instances,
    Tensor,
    Word,
    batch_of,
    ensemble_config,
    input_tensor,
    model_config,
    picture_tensor,
    quoted,
    render,
    to_engine_layout,
    warmups,
)
from edge_backbones.spec import FrameSpec, InputSpec, OutputSpec, ShapeRange
from edge_backbones.testing import pooling_input

INPUT = Tensor("pixel_values", "TYPE_FP32", (3, 32, 48))
OUTPUT = Tensor("pool4", "TYPE_FP32", (3, 8, 12))


def test_the_configuration_of_a_network_reads_as_follows():
    config = model_config(
        "pool", "python", Batch(4), [INPUT], [OUTPUT], instances=Instances(2, on_gpu=True, gpu=1),
        parameters={"bundle": "bundle"}, warmup=warmups(pooling_input(2), golden(pooling_input(2)), Batch(4))[0],
    )  # fmt: skip
    assert render(config) == (
        'name: "pool"\nbackend: "python"\ndefault_model_filename: "model.py"\nmax_batch_size: 4\n'
        'input {\n  name: "pixel_values"\n  data_type: TYPE_FP32\n  dims: [3, 32, 48]\n}\n'
        'output {\n  name: "pool4"\n  data_type: TYPE_FP32\n  dims: [3, 8, 12]\n}\n'
        "version_policy {\n  latest {\n    num_versions: 1\n  }\n}\nresponse_cache {\n  enable: false\n}\n"
        "instance_group {\n  count: 2\n  kind: KIND_GPU\n  gpus: [1]\n}\ndynamic_batching { }\n"
        'parameters {\n  key: "bundle"\n  value {\n    string_value: "bundle"\n  }\n}\n'
        'model_warmup {\n  name: "golden opt"\n  batch_size: 2\n  inputs {\n    key: "pixel_values"\n    value {\n'
        '      data_type: TYPE_FP32\n      dims: [3, 32, 48]\n      input_data_file: "golden_opt"\n    }\n  }\n}\n'
    )


def test_the_configuration_of_a_plan_reads_as_follows():
    config = model_config(
        "pool", "tensorrt", Batch(0, 1), [INPUT], [OUTPUT],
        instances=Instances(1, on_gpu=True, profiles=2, dla_core=0), parameters={},
    )  # fmt: skip
    assert render(config) == (
        'name: "pool"\nplatform: "tensorrt_plan"\ndefault_model_filename: "model.plan"\nmax_batch_size: 0\n'
        'input {\n  name: "pixel_values"\n  data_type: TYPE_FP32\n  dims: [1, 3, 32, 48]\n}\n'
        'output {\n  name: "pool4"\n  data_type: TYPE_FP32\n  dims: [1, 3, 8, 12]\n}\n'
        "version_policy {\n  latest {\n    num_versions: 1\n  }\n}\nresponse_cache {\n  enable: false\n}\n"
        'instance_group {\n  count: 1\n  kind: KIND_GPU\n  profile: ["0", "1"]\n'
        "  secondary_devices {\n    kind: KIND_NVDLA\n    device_id: 0\n  }\n}\n"
    )


def test_an_ensemble_has_two_steps_and_no_tensor_of_one_name_that_means_two_things():
    image = Tensor("image", "TYPE_UINT8", (32, 48, 3))
    config = ensemble_config("both", "before", "network", Batch(2), picture_tensor("rgb", 3), image, [OUTPUT])
    first, second = config["ensemble_scheduling"]["step"]
    (given_by_first,), (taken_by_second,) = first["output_map"], second["input_map"]
    assert given_by_first["key"] == taken_by_second["key"] == "image"
    assert given_by_first["value"] == taken_by_second["value"]
    assert given_by_first["value"] not in {"image", "photograph", "pool4"}
    assert first["input_map"] == [{"key": "photograph", "value": "photograph"}]
    assert "instance_group" not in config


@given(st.text(alphabet=st.characters(exclude_categories=["Cs"])))
def test_a_text_comes_back_from_its_literal(text):
    literal = quoted(text)
    assert literal.isascii()
    assert literal.isprintable()
    inner = re.fullmatch(r'"((?:[^"\\]|\\.)*)"', literal)
    assert inner
    unescaped = re.sub(
        rb"\\([0-7]{3}|.)",
        lambda found: bytes([int(found[1], 8)]) if len(found[1]) == 3 else found[1],
        inner[1].encode(),
    )
    assert unescaped.decode() == text


@given(st.lists(st.integers(-1, 1 << 24), min_size=1, max_size=8), st.booleans())
def test_numbers_and_flags(dims, flag):
    assert (
        render({"dims": dims, "enable": flag}) == f"dims: [{', '.join(map(str, dims))}]\nenable: {str(flag).lower()}\n"
    )


def test_what_is_empty_is_left_out_and_an_empty_message_stays():
    assert render({"parameters": [], "dynamic_batching": {}, "kind": Word("KIND_CPU")}) == (
        "dynamic_batching { }\nkind: KIND_CPU\n"
    )


VARYING = ShapeRange(min=1, opt=2, max=8)


@pytest.mark.parametrize(
    ("backend", "batch", "asked", "expected"),
    [
        ("python", VARYING, None, Batch(8)),
        ("python", VARYING, 32, Batch(32)),
        ("python", 1, None, Batch(1)),
        ("tensorrt", VARYING, None, Batch(8)),
        ("tensorrt", VARYING, 4, Batch(4)),
        ("tensorrt", 1, None, Batch(0, 1)),
        ("onnxruntime", 4, None, Batch(0, 4)),
        ("onnxruntime", VARYING, None, Batch(8)),
        ("openvino", VARYING, None, Batch(0, -1)),
        ("openvino", 2, None, Batch(0, 2)),
    ],
)
def test_the_batch_of_each_backend(backend, batch, asked, expected):
    assert batch_of(backend, pooling_input(batch), asked) == expected


@pytest.mark.parametrize(("most", "batches"), [(1, False), (2, True)])
def test_batches_are_joined_where_there_can_be_any(most, batches):
    config = model_config("x", "python", Batch(most), [INPUT], [OUTPUT], instances=Instances(1, False), parameters={})
    assert ("dynamic_batching" in config) == batches


def varied(**given_sizes: object) -> InputSpec:
    sizes = {"height": ShapeRange(min=32, opt=64, max=96), "width": ShapeRange.fixed(48), "size_multiple": 32}
    return InputSpec(name="pixel_values", channels=3, batch=ShapeRange.fixed(1), **{**sizes, **given_sizes})


def test_inputs():
    assert input_tensor(pooling_input()) == INPUT
    assert input_tensor(varied()) == Tensor("pixel_values", "TYPE_FP32", (3, -1, 48))
    assert input_tensor(varied(pixel_dtype="float16")).data_type == "TYPE_FP16"
    image = InputSpec(name="image", channels=1, batch=VARYING, height=VARYING, width=ShapeRange.fixed(48))
    assert input_tensor(image) == Tensor("image", "TYPE_UINT8", (-1, 48, 1))
    frame = FrameSpec(height=1080, width=1920, color="nv12")
    fixed = ShapeRange.fixed(224)
    frames = InputSpec(name="frame", channels=3, batch=VARYING, height=fixed, width=fixed, frame=frame)
    assert input_tensor(frames) == Tensor("frame", "TYPE_UINT8", (1620, 1920, 1))
    assert picture_tensor("encoded", 3) == Tensor("photograph", "TYPE_STRING", (1,))
    assert picture_tensor("rgb", 1) == Tensor("photograph", "TYPE_UINT8", (-1, -1, 1))


@pytest.mark.parametrize(
    ("layout", "engine_layout", "axes"),
    [("NCHW", "NHWC", (0, 2, 3, 1)), ("NHWC", "NHWC", (0, 1, 2, 3)), ("NLC", "NLC", (0, 1, 2)), ("NC", "NC", (0, 1))],
)
def test_maps_go_back_into_the_layout_of_the_engine(layout, engine_layout, axes):
    output = OutputSpec("x", layout, engine_layout, 3, None, "float32")
    assert to_engine_layout(output) == axes
    values = np.zeros([{"N": 2, "C": 3, "H": 5, "W": 7, "L": 11}[axis] for axis in layout])
    assert values.transpose(axes).shape == tuple({"N": 2, "C": 3, "H": 5, "W": 7, "L": 11}[a] for a in engine_layout)


def golden(input: InputSpec, images: int = 3) -> GoldenSamples:
    inputs = {"opt": np.random.default_rng(0).standard_normal((images, *input.opt_shape[1:])).astype(input.dtype)}
    return GoldenSamples(input.name, inputs, {"opt": {}})


@pytest.mark.parametrize(
    ("batch", "range_", "dims", "times", "chosen"),
    [
        (Batch(4), VARYING, [3, 32, 48], 2, [0]),
        (Batch(1), 1, [3, 32, 48], 1, [0]),
        (Batch(0, 5), 5, [5, 3, 32, 48], 1, [0, 1, 2, 0, 1]),
        (Batch(0), VARYING, [2, 3, 32, 48], 1, [0, 1]),
    ],
)
def test_a_warm_up_is_of_the_golden_samples(batch, range_, dims, times, chosen):
    input = pooling_input(range_)
    samples = golden(input)
    (message,), files = warmups(input, samples, batch)
    (entry,) = message["inputs"]
    assert message["batch_size"] == times
    assert (entry["key"], entry["value"]["dims"]) == ("pixel_values", dims)
    assert files == {"golden_opt": samples.inputs["opt"][chosen].tobytes()}
    assert len(files["golden_opt"]) == 4 * int(np.prod(dims))
