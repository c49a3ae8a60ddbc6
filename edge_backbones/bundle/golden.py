"""golden.npz: a zip file of plain arrays, exactly those that the manifest promises, stored as `numpy.savez` stores them.

It is read here and not by numpy: a zip file can hold a thousand times its size, and its arrays pickles.
"""

from __future__ import annotations

import io
import re
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from edge_backbones.errors import InputError
from edge_backbones.reading import shortened
from edge_backbones.spec import BackboneSpec, InputSpec

_HEADER = re.compile(rb"\{'descr': '(<f4|\|u1)', 'fortran_order': False, 'shape': \(([0-9, ]*)\), \} *\n")
_MOST_AXES = 8
_CHANNEL_AXIS = {"NCHW": 1, "NHWC": 3, "NLC": 2, "NC": 1}


def write(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write ``<case>/<input or output>``: float32 or uint8 arrays, one entry of the first axis per image."""
    contents = io.BytesIO()  # zipfile hides a full disk behind errors of its own
    np.savez(contents, **{name: np.ascontiguousarray(array) for name, array in arrays.items()})  # type: ignore[arg-type]
    path.write_bytes(contents.getbuffer())


def decode(
    data: bytes | bytearray, cases: Sequence[str], input: InputSpec, backbone: BackboneSpec
) -> dict[str, np.ndarray]:
    """The arrays as ``<case>/<input or output>``: inputs as ``input`` says, maps float32 with the channels of ``backbone``.

    Raises ValueError with a phrase for anything else in the file, or anything missing.
    """
    channels = dict(zip(backbone.out_features, zip(backbone.layouts, backbone.channels, strict=True), strict=True))
    channels |= {extra.name: (extra.layout, extra.channels) for extra in backbone.extras}
    names = (input.name, *backbone.outputs)
    members = _members(data, {f"{case}/{name}" for case in cases for name in names})
    missing = [f"{case}/{name}" for case in cases for name in names if f"{case}/{name}" not in members]
    if missing:
        raise ValueError(f"it lacks {shortened(', '.join(missing), 120)}")
    arrays = {}
    for case in cases:
        images = _array(members[f"{case}/{input.name}"], f"{case}/{input.name}", input.dtype)
        try:
            input.batch_height_width(images.shape)
        except InputError as error:
            raise ValueError(f"{case}/{error}") from error
        arrays[f"{case}/{input.name}"] = images
        for name in backbone.outputs:
            key, (layout, count) = f"{case}/{name}", channels[name]
            values = arrays[key] = _array(members[key], key, "float32")
            fits = values.ndim == len(layout) and values.shape[_CHANNEL_AXIS[layout]] == count
            if not fits or len(values) != len(images) or not values.size:
                what = f"{layout} with {count} channels, and {len(images)} images"
                raise ValueError(f"{shortened(key, 80)} has shape {values.shape}, and the backbone returns {what}")
    return arrays


def _members(data: bytes | bytearray, wanted: set[str]) -> dict[str, memoryview]:
    """The files in a zip file by name, without .npy: each must be wanted, be there once, and be stored as it is."""
    found: dict[str, memoryview] = {}
    position = 0
    while data[position : position + 4] == b"PK\3\4":
        flags, method, packed, size, name_length, extra_length = struct.unpack_from("<6xHH8xIIHH", data, position)
        begin = position + 30
        name = str(data[begin : begin + name_length], "utf-8").removesuffix(".npy")
        begin += name_length
        if size == 0xFFFFFFFF:  # what numpy writes: the sizes are in an extra field
            kind, _, size, packed = struct.unpack_from("<HHQQ", data, begin)
            if kind != 1:
                raise ValueError(f"{shortened(name, 80)} has no size")
        begin += extra_length
        if name not in wanted or name in found:
            raise ValueError(f"{shortened(name, 80)!r} is in it twice, or is not promised")
        if method or flags & ~0x800 or packed != size or size > len(data) - begin:
            raise ValueError(f"{shortened(name, 80)} is compressed, encrypted or cut off")
        found[name] = memoryview(data)[begin : begin + size]
        position = begin + size
    if data[position : position + 4] != b"PK\1\2":
        raise ValueError(f"it is not an .npz: no file begins at byte {position}")
    return found


def _array(member: memoryview, name: str, dtype: str) -> np.ndarray:
    """An array of .npy, version 1.0, little-endian and row-major, of as many bytes as its shape asks for."""
    (length,) = struct.unpack_from("<H", member, 8)
    header = _HEADER.fullmatch(bytes(member[10 : 10 + length]))
    if bytes(member[:8]) != b"\x93NUMPY\1\0" or header is None:
        raise ValueError(f"{shortened(name, 80)} is not a plain array")
    sizes = [int(size) for size in header.group(2).split(b",") if size.strip()]
    found = np.dtype(header.group(1).decode())
    if found != np.dtype(dtype):
        raise ValueError(f"{shortened(name, 80)} is {found}, and has to be {dtype}")
    count = 1
    for size in sizes[:_MOST_AXES]:
        count *= size
    values = member[10 + length :]
    if len(sizes) > _MOST_AXES or len(values) != count * found.itemsize:
        raise ValueError(f"{shortened(name, 80)} has {len(values)} bytes, and its shape {tuple(sizes)} asks for others")
    return np.frombuffer(values, found).reshape(sizes).copy()  # in the file it may lie at any address
