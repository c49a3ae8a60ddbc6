"""Turn feature maps into messages of ROS 2. The message classes are passed in: nothing here imports ROS.

Maps are copied once, into an ``array.array``, which rclpy keeps as it is; a list or bytes would be checked or copied value by
value. They are sent in C order, so that readers who ignore strides are right too.
"""

from __future__ import annotations

import array
import re
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from edge_backbones.errors import InputError

Output = Literal["tensor_list", "feature_maps", "multi_array"]

FLOAT32 = 9
"""The number of float32 in the field data_type of Isaac's Tensor.msg. float16 has none there."""


class NamedMap(NamedTuple):
    """The feature map of a stage: an array with a batch axis of 1, and the letters of its axes."""

    stage: str
    values: np.ndarray
    layout: str


def topics_of(stages: Sequence[str]) -> dict[str, str]:
    """Return the last part of each stage's topic. A topic may hold letters, digits and underscores: others become ``_``.

    Raises InputError if two stages would share a topic.
    """
    topics: dict[str, str] = {}
    for stage in stages:
        topic = re.sub(r"[^A-Za-z0-9]+", "_", stage).strip("_")
        topic = topic if topic[:1].isalpha() else f"stage_{topic}"
        if topic in topics.values():
            raise InputError(f"stages {list(stages)} share the topic {topic!r}: set the parameter topics to all")
        topics[stage] = topic
    return topics


def as_bytes(values: np.ndarray) -> array.array[int]:
    """Return the bytes of an array in C order as an ``array.array``, copied once."""
    return _copied(values, "B", values.dtype)


def as_floats(values: np.ndarray) -> array.array[float]:
    """Return the values of an array in C order as an ``array.array`` of float32, copied once."""
    return _copied(values, "f", np.dtype(np.float32))


def _copied(values: np.ndarray, code: str, dtype: np.dtype) -> array.array[Any]:
    made: array.array[Any] = array.array(code)
    if values.flags.c_contiguous and values.dtype == dtype:
        made.frombytes(values.data.cast("B"))
        return made
    # Without a copy in C order, which would then be copied again.
    made.frombytes(bytes(values.size * dtype.itemsize))
    np.frombuffer(made, dtype).reshape(values.shape)[...] = values
    return made


def strides_of(shape: Sequence[int], size: int) -> list[int]:
    """Return the bytes from one element to the next along each axis of an array in C order. ``size``: bytes of an element."""
    strides = [size]
    for length in reversed(shape[1:]):
        strides.append(strides[-1] * length)
    return strides[::-1]


def tensor_list(types: Any, header: Any, maps: Sequence[NamedMap]) -> Any:
    """Return maps as Isaac's ``TensorList``. ``types``: the module isaac_ros_tensor_list_interfaces.msg.

    Maps in float16 become float32: the message has no number for float16.
    """
    tensors = []
    for named in maps:
        shape = [int(size) for size in named.values.shape]
        floats = named.values.astype(np.float32, copy=False)
        tensor = types.Tensor(name=named.stage, data_type=FLOAT32)
        tensor.shape = types.TensorShape(rank=len(shape), dims=array.array("I", shape))
        tensor.strides = array.array("Q", strides_of(shape, floats.itemsize))
        tensor.data = as_bytes(floats)
        tensors.append(tensor)
    return types.TensorList(header=header, tensors=tensors)


def feature_maps(types: Any, header: Any, maps: Sequence[NamedMap], engine: str) -> Any:
    """Return maps as ``FeatureMaps`` of examples/ros2. ``types``: the module edge_backbones_msgs.msg."""
    made = []
    for stage, values, layout in maps:
        shape = [int(size) for size in values.shape]
        one = types.FeatureMap(name=stage, layout=layout, dtype=values.dtype.name)
        one.shape = array.array("I", shape)
        one.strides = array.array("Q", strides_of(shape, values.itemsize))
        one.data = as_bytes(values)
        made.append(one)
    return types.FeatureMaps(header=header, engine=engine, maps=made)


def multi_array(types: Any, named: NamedMap) -> Any:
    """Return a map as ``Float32MultiArray``, which has no header. ``types``: the module std_msgs.msg.

    ``layout.dim`` has the letter of each axis, and as its stride the number of values from that axis on.
    """
    shape = [int(size) for size in named.values.shape]
    message = types.Float32MultiArray()
    for label, size, stride in zip(named.layout, shape, strides_of([1, *shape], 1), strict=False):
        message.layout.dim.append(types.MultiArrayDimension(label=label, size=size, stride=stride))
    message.data = as_floats(named.values)
    return message


def picture(types: Any, header: Any, pixels: np.ndarray) -> Any:
    """Return a uint8 array (rows, columns, 3) as a ``sensor_msgs/Image``. ``types``: the module sensor_msgs.msg."""
    rows, columns = pixels.shape[:2]
    message = types.Image(header=header, height=rows, width=columns, encoding="rgb8", step=columns * 3)
    message.data = as_bytes(pixels)
    return message
