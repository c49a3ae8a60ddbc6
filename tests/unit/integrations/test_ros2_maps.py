"""Feature maps become messages. The classes are stand-ins with the fields of the .msg files: wheels of ROS 2 hold neither
Isaac's messages nor ours."""

from __future__ import annotations

import array
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from edge_backbones import InputError
from edge_backbones.integrations.ros2.maps import (
    NamedMap,
    as_bytes,
    as_floats,
    feature_maps,
    multi_array,
    picture,
    strides_of,
    tensor_list,
    topics_of,
)

MESSAGES = Path(__file__).parents[3] / "examples" / "ros2" / "edge_backbones_msgs" / "msg"
CODES = {"uint8[]": "B", "uint32[]": "I", "uint64[]": "Q"}


def stand_in(name: str, fields: dict[str, str]) -> type:
    """A class that takes the fields of a message alone, as the classes of rclpy do; arrays have to be array.array."""

    def __init__(self, **values):
        for field, value in values.items():
            setattr(self, field, value)

    def __setattr__(self, field, value):
        kind = fields[field]  # KeyError: there is no such field
        if kind in CODES:
            assert isinstance(value, array.array)
            assert value.typecode == CODES[kind]
        elif kind in ("string", "int32", "uint8"):
            assert isinstance(value, str if kind == "string" else int)
        object.__setattr__(self, field, value)

    return type(name, (), {"__init__": __init__, "__setattr__": __setattr__})


def fields_of(path: Path) -> dict[str, str]:
    lines = (line.partition("#")[0].split() for line in path.read_text().splitlines())
    return {words[1]: words[0] for words in lines if words}


OURS = SimpleNamespace(**{path.stem: stand_in(path.stem, fields_of(path)) for path in MESSAGES.glob("*.msg")})
ISAAC = SimpleNamespace(
    TensorShape=stand_in("TensorShape", {"rank": "uint8", "dims": "uint32[]"}),
    Tensor=stand_in(
        "Tensor",
        {"name": "string", "shape": "TensorShape", "data_type": "int32", "strides": "uint64[]", "data": "uint8[]"},
    ),
    TensorList=stand_in("TensorList", {"header": "Header", "tensors": "Tensor[]"}),
)
STD = SimpleNamespace(
    Float32MultiArray=lambda: SimpleNamespace(layout=SimpleNamespace(dim=[]), data=None),
    MultiArrayDimension=SimpleNamespace,
)


def named(dtype=np.float32, layout="NCHW"):
    values = np.random.default_rng(0).standard_normal((1, 3, 4, 5)).astype(dtype)
    return NamedMap("layer4", values, layout)


def test_the_bytes_are_those_of_the_array_in_c_order():
    values = named().values
    for given in (values, values.transpose(0, 2, 3, 1), values[:, :, ::2], np.asfortranarray(values)):
        assert as_bytes(given) == array.array("B", given.tobytes())
        assert as_floats(given) == array.array("f", given.tobytes())
    half = values.astype(np.float16)
    assert as_bytes(half) == array.array("B", half.tobytes())
    assert as_floats(half) == array.array("f", half.astype(np.float32).tobytes())


@pytest.mark.parametrize("shape", [(1, 3, 4, 5), (1, 7, 9), (2,)])
def test_strides_are_those_of_numpy(shape):
    assert strides_of(shape, 4) == list(np.zeros(shape, np.float32).strides)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_a_tensor_list_holds_float32(dtype):
    given = named(dtype)
    made = tensor_list(ISAAC, "header", [given])
    (tensor,) = made.tensors
    assert (made.header, tensor.name, tensor.data_type) == ("header", "layer4", 9)
    assert (tensor.shape.rank, list(tensor.shape.dims)) == (4, [1, 3, 4, 5])
    assert list(tensor.strides) == [240, 80, 20, 4]
    read = np.frombuffer(tensor.data, np.float32).reshape(tensor.shape.dims)
    np.testing.assert_array_equal(read, given.values.astype(np.float32))


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_our_own_message_keeps_the_dtype(dtype):
    given = [named(dtype), NamedMap("tokens", np.ones((1, 7, 2), dtype), "NLC")]
    made = feature_maps(OURS, "header", given, "an engine")
    assert (made.header, made.engine) == ("header", "an engine")
    for one, (stage, values, layout) in zip(made.maps, given, strict=True):
        assert (one.name, one.layout, one.dtype) == (stage, layout, np.dtype(dtype).name)
        assert list(one.strides) == list(values.strides)
        np.testing.assert_array_equal(np.frombuffer(one.data, one.dtype).reshape(one.shape), values)


def test_a_multi_array_says_its_axes():
    given = named(layout="NHWC")
    made = multi_array(STD, given)
    assert [(one.label, one.size, one.stride) for one in made.layout.dim] == [
        ("N", 1, 60), ("H", 3, 60), ("W", 4, 20), ("C", 5, 5),
    ]  # fmt: skip
    np.testing.assert_array_equal(np.asarray(made.data, np.float32).reshape(1, 3, 4, 5), given.values)


def test_a_picture_is_rgb8():
    pixels = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
    made = picture(SimpleNamespace(Image=SimpleNamespace), "header", pixels)
    assert (made.header, made.height, made.width, made.step, made.encoding) == ("header", 2, 4, 12, "rgb8")
    assert made.data == array.array("B", range(24))


def test_topics_hold_what_ros_allows():
    topics = topics_of(["layer1", "stages.0", "encoder/out", "3.conv"])
    assert list(topics.values()) == ["layer1", "stages_0", "encoder_out", "stage_3_conv"]
    assert all(re.fullmatch(r"[A-Za-z][A-Za-z0-9_]*", topic) for topic in topics.values())
    with pytest.raises(InputError, match="share the topic 'a_b': set the parameter topics to all"):
        topics_of(["a.b", "a_b"])
