"""Golden samples: images and the fp32 reference of every engine output, kept as golden.npz.

The file is a zip of plain arrays, stored as `numpy.savez` stores them, exactly the ones that the manifest promises. It is
not read by numpy: a zip file can unpack to a thousand times its size, and its arrays can hold pickles.
"""

from __future__ import annotations

import io
import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from edge_backbones.errors import InputError
from edge_backbones.reading import shortened
from edge_backbones.spec import BackboneSpec, InputSpec

_HEADER = re.compile(rb"\{'descr': '(<f4|<f2|\|u1)', 'fortran_order': False, 'shape': \(([0-9, ]*)\), \} *\n")
_MOST_AXES = 8


@dataclass(frozen=True)
class GoldenSamples:
    """Images and the fp32 reference of every engine output for them, by case.

    A case is a size of image: ``opt`` always exists, ``min`` and ``max`` where the size of the input varies. ``inputs``: by
    case, a batch of images as the engine takes them, called ``input_name``. ``outputs``: by case and output name, float32 in
    the layout that callers see, one entry of the first axis per image. Arrays are not copied.
    """

    input_name: str
    inputs: Mapping[str, np.ndarray]
    outputs: Mapping[str, Mapping[str, np.ndarray]]

    @property
    def cases(self) -> tuple[str, ...]:
        """Return the names of the cases, sorted."""
        return tuple(sorted(self.inputs))

    def encode(self) -> bytes:
        """Return the bytes of golden.npz."""
        arrays: dict[str, np.ndarray] = {}
        for case, images in self.inputs.items():
            arrays[_key(case, self.input_name)] = np.ascontiguousarray(images)
            for name, values in self.outputs[case].items():
                arrays[_key(case, name)] = np.ascontiguousarray(values)
        contents = io.BytesIO()  # in memory: zipfile would hide a full disk behind errors of its own
        np.savez(contents, **arrays)  # type: ignore[arg-type]
        return contents.getvalue()

    @classmethod
    def decode(
        cls, data: bytes | bytearray, cases: Sequence[str], input: InputSpec, backbone: BackboneSpec
    ) -> GoldenSamples:
        """Read golden.npz: images that fit ``input``, maps with the layout and the channels that ``backbone`` names.

        Raises ValueError with a phrase if an array is missing, has another dtype or shape, or is not promised.
        """
        channels = {output.name: (output.layout, output.channels) for output in backbone.described_outputs}
        names = (input.name, *backbone.outputs)
        members = _members(data, {_key(case, name) for case in cases for name in names})
        missing = [_key(case, name) for case in cases for name in names if _key(case, name) not in members]
        if missing:
            raise ValueError(f"it lacks {shortened(', '.join(missing), 120)}")
        inputs: dict[str, np.ndarray] = {}
        outputs: dict[str, dict[str, np.ndarray]] = {}
        for case in cases:
            key = _key(case, input.name)
            images = inputs[case] = _array(members[key], key, input.dtype)
            try:
                input.batch_height_width(images.shape)
            except InputError as error:
                raise ValueError(f"{case}/{error}") from error
            outputs[case] = {}
            for name in backbone.outputs:
                key, (layout, count) = _key(case, name), channels[name]
                values = outputs[case][name] = _array(members[key], key, "float32")
                fits = values.ndim == len(layout) and values.shape[layout.index("C")] == count
                if not fits or len(values) != len(images) or not values.size:
                    what = f"{layout} with {count} channels, and {len(images)} images"
                    raise ValueError(f"{shortened(key, 80)} has shape {values.shape}, and the backbone returns {what}")
        return cls(input.name, inputs, outputs)


def full_batches(count: int, batch: int) -> Iterator[np.ndarray]:
    """Yield the indices of ``count`` images in batches of exactly ``batch``; the last one is filled from the beginning."""
    for start in range(0, count, batch):
        yield np.arange(start, start + batch) % count


def _key(case: str, name: str) -> str:
    """Return the name of an array in golden.npz."""
    return f"{case}/{name}"


def _members(data: bytes | bytearray, wanted: set[str]) -> dict[str, memoryview]:
    """Return the files in a zip file by name, without .npy.

    Raises ValueError unless each is in ``wanted``, occurs once, and is stored uncompressed.
    """
    found: dict[str, memoryview] = {}
    position = 0
    while data[position : position + 4] == b"PK\3\4":
        flags, method, packed, size, name_length, extra_length = struct.unpack_from("<6xHH8xIIHH", data, position)
        begin = position + 30
        name = str(data[begin : begin + name_length], "utf-8").removesuffix(".npy")
        begin += name_length
        if size == 0xFFFFFFFF:  # numpy writes the sizes into an extra field
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
    """Return the array in an .npy file of version 1.0, little-endian, row-major, with as many bytes as its shape needs."""
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
    return np.frombuffer(values, found).reshape(sizes).copy()  # a copy is aligned, the bytes in the file may not be
