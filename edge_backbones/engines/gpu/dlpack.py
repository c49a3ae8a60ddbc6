"""Read and write DLPack capsules, with numpy and ctypes alone, and describe the arrays of other libraries.

Nothing here calls CUDA, and nothing reads what a pointer points to.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from edge_backbones.engines.forks import keep_for_good
from edge_backbones.errors import InputError

CUDA, CUDA_HOST, _CUDA_MANAGED = 2, 3, 13  # DLDeviceType
ON_GPU = (CUDA, _CUDA_MANAGED)
_NEWEST_DLPACK = (1, 3)
_READ_ONLY = 1  # DLPACK_FLAG_BITMASK_READ_ONLY

_DTYPES = {  # by DLDataTypeCode and bits
    **{(0, bits): np.dtype(f"int{bits}") for bits in (8, 16, 32, 64)},
    **{(1, bits): np.dtype(f"uint{bits}") for bits in (8, 16, 32, 64)},
    **{(2, bits): np.dtype(f"float{bits}") for bits in (16, 32, 64)},
    (6, 8): np.dtype(bool),
}
_CODE_OF_KIND = {dtype.kind: code for (code, _), dtype in _DTYPES.items()}
_KNOWN_DTYPES = frozenset(_DTYPES.values())
_TYPE_CODES = {  # DLDataTypeCode; the newer ones have their width in the name
    0: "int",
    1: "uint",
    2: "float",
    3: "opaque",
    4: "bfloat",
    5: "complex",
    6: "bool",
    7: "float8_e3m4",
    8: "float8_e4m3",
    9: "float8_e4m3b11fnuz",
    10: "float8_e4m3fn",
    11: "float8_e4m3fnuz",
    12: "float8_e5m2",
    13: "float8_e5m2fnuz",
    14: "float8_e8m0fnu",
    15: "float6_e2m3fn",
    16: "float6_e3m2fn",
    17: "float4_e2m1fn",
}
_CAST = "cast it to float32, float16 or uint8 first"

# What other libraries raise to refuse an export. Anything else is a defect of theirs and goes through as it is.
REFUSALS = (BufferError, RuntimeError, TypeError, ValueError, AssertionError)


@dataclass(frozen=True)
class Rows:
    """Describe memory that is not contiguous: ``count`` rows of ``nbytes`` bytes, which begin ``pitch`` bytes apart."""

    count: int
    nbytes: int
    pitch: int


@dataclass(frozen=True, eq=False)
class ForeignArray:
    """Another library's array, to be read in place while ``owner`` is held.

    Aliasing: it is the other library's memory; later writes of that library are seen, and ``read_only`` forbids ours.

    Ownership: dropping ``owner`` gives the memory back (a DLPack deleter is called once, by the thread that drops it
    last). A library that recycles memory by stream order, as torch does, may then overwrite it while work on another
    stream still reads: hold ``owner`` until that work is done.

    Threads: it never changes; the rules for the memory are the other library's.
    """

    pointer: int  # of the first element; may be 0 when there are no elements
    shape: tuple[int, ...]
    dtype: np.dtype
    device: int | None  # None: not said (CUDA Array Interface), or reached by every device (managed memory)
    contiguous: bool  # in C order
    read_only: bool
    owner: object
    producer_stream: int | None = None  # not None: the reader's stream has to wait for this one first
    rows: Rows | None = None  # if it is not contiguous, and no more than its rows are apart

    @property
    def nbytes(self) -> int:
        """Bytes of all elements."""
        return math.prod(self.shape) * self.dtype.itemsize


def kind_of(values: object) -> str:
    """Return the type of an object, for a message."""
    return f"type {type(values).__module__}.{type(values).__qualname__}"


def check_dtype(dtype: np.dtype, said: object) -> None:
    """Raise InputError for a dtype that numpy and DLPack do not share. ``said``: its name in the message."""
    if dtype not in _KNOWN_DTYPES:
        raise InputError(f"dtype {said} of an array on a GPU does not fit: {_CAST}")


def check_memory(pointer: int, shape: Sequence[int]) -> None:
    """Raise InputError for a negative size, and for a null pointer to something."""
    if any(extent < 0 for extent in shape):
        raise InputError(f"shape {tuple(shape)} of an array on a GPU does not fit: sizes are 0 or more")
    if pointer == 0 and 0 not in shape:
        raise InputError(f"a null pointer does not fit shape {tuple(shape)}: the array was freed, or never allocated")


def is_c_contiguous(shape: Sequence[int], strides: Sequence[int], step: int) -> bool:
    """``strides`` and ``step``, the distance of neighbours, in one unit. Axes of one element may have any stride."""
    if 0 in shape:
        return True
    for extent, stride in zip(reversed(shape), reversed(strides), strict=True):
        if extent != 1 and stride != step:
            return False
        step *= extent
    return True


def c_strides(shape: Sequence[int]) -> tuple[int, ...]:
    """Return the strides of C order, in elements."""
    strides, step = [], 1
    for extent in reversed(shape):
        strides.append(step)
        step *= extent
    return tuple(reversed(strides))


def rows_of(shape: Sequence[int], strides: Sequence[int], itemsize: int) -> Rows | None:
    """Return an array as rows that begin at one distance, as frames of cameras and decoders lie; None if it is not so.

    ``strides``: in elements.
    """
    axis, nbytes = len(shape), 1
    while axis and (shape[axis - 1] == 1 or strides[axis - 1] == nbytes):
        axis -= 1
        nbytes *= shape[axis]
    outer = [(extent, stride) for extent, stride in zip(shape[:axis], strides[:axis], strict=True) if extent != 1]
    if not outer or 0 in shape:
        return None
    count, pitch = outer[-1]
    if pitch < nbytes:
        return None
    for extent, stride in reversed(outer[:-1]):
        if stride != count * pitch:
            return None
        count *= extent
    return Rows(count, nbytes * itemsize, pitch * itemsize)


# ---- DLPack: the structures of dlpack.h, and CPython's capsules


class _Device(ctypes.Structure):
    _fields_ = (("type", ctypes.c_int32), ("id", ctypes.c_int32))


class _DataType(ctypes.Structure):
    _fields_ = (("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16))


class _Tensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device", _Device),
        ("ndim", ctypes.c_int32),
        ("dtype", _DataType),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


class _Managed(ctypes.Structure):
    _fields_ = (("tensor", _Tensor), ("context", ctypes.c_void_p), ("deleter", ctypes.c_void_p))


class _ManagedVersioned(ctypes.Structure):
    _fields_ = (
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("context", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
        ("flags", ctypes.c_uint64),
        ("tensor", _Tensor),
    )


# Called without the GIL: DLPack has deleters take it themselves, and one that waits for another thread must not hold it.
_Deleter = ctypes.CFUNCTYPE(None, ctypes.c_void_p)

# Function objects of our own: argument types set on ctypes.pythonapi's would hold for every library in the process.
_capsule_name = ctypes.PYFUNCTYPE(ctypes.c_char_p, ctypes.py_object)(("PyCapsule_GetName", ctypes.pythonapi))
_capsule_pointer = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(
    ("PyCapsule_GetPointer", ctypes.pythonapi)
)
_rename_capsule = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.py_object, ctypes.c_char_p)(
    ("PyCapsule_SetName", ctypes.pythonapi)
)

_LEGACY_NAME, _VERSIONED_NAME = b"dltensor", b"dltensor_versioned"
_USED = {_LEGACY_NAME: b"used_dltensor", _VERSIONED_NAME: b"used_dltensor_versioned"}
for _name in _USED.values():
    keep_for_good(_name)  # a capsule holds the characters alone, and a producer may keep it until the process ends


class _Lent:
    """What a producer lent; given back once, when nobody holds this any more."""

    __slots__ = ("_address", "_deleter")

    def __init__(self, address: int, deleter: int | None) -> None:
        self._address = address
        self._deleter = _Deleter(deleter) if deleter else None

    def __del__(self) -> None:
        if self._deleter is not None:
            self._deleter(self._address)


class _OneElement(bytearray):
    """Host memory of one element, which an array of any shape with strides of 0 may read."""

    owner: object = None


def dlpack_device(values: Any) -> tuple[int, int] | None:
    """Return what DLPack says of where an array is, as (device type, index); None for an array without DLPack."""
    if not hasattr(values, "__dlpack__") or not hasattr(values, "__dlpack_device__"):
        return None
    try:
        kind, index = values.__dlpack_device__()
        return int(kind), int(index)
    except REFUSALS as error:
        raise InputError(
            f"{kind_of(values)} does not say where it is ({error}): pass a dense array on a GPU or the CPU"
        ) from error


def ask_for_capsule(values: Any, stream: int | None) -> Any:
    """``values.__dlpack__`` in the newest form that its library knows; ``stream`` None is for host arrays."""
    wait: dict[str, Any] = {} if stream is None else {"stream": stream}
    # dl_device is left out: absent, it asks for the device where the array is, which old and new libraries agree on.
    forms: tuple[dict[str, Any], ...] = (
        {"max_version": _NEWEST_DLPACK, "copy": False},
        {"max_version": _NEWEST_DLPACK},
        {},
    )
    for form in forms:
        try:
            return values.__dlpack__(**wait, **form)
        except REFUSALS as error:
            if isinstance(error, TypeError) and form:
                continue  # a keyword that came with a later edition of the standard
            raise InputError(
                f"{kind_of(values)} cannot be read through DLPack ({error}): pass a detached array of the current device"
            ) from error
    raise AssertionError("the last form returns or raises")


def _managed(capsule: Any) -> tuple[bytes, _Managed | _ManagedVersioned]:
    """Name and contents of a capsule, which have to be read while it lives."""
    try:
        name = _capsule_name(capsule)
    except ValueError as error:
        raise InputError(f"{kind_of(capsule)} does not fit: __dlpack__ has to return a capsule") from error
    if name not in _USED:
        taken = " (it was taken before: a capsule is taken once)" if name in _USED.values() else ""
        raise InputError(f"a capsule named {name!r}{taken} does not fit: DLPack has {' and '.join(map(repr, _USED))}")
    address = _capsule_pointer(capsule, name)
    return name, (_Managed if name == _LEGACY_NAME else _ManagedVersioned).from_address(address)


def read_capsule(capsule: Any, device_types: Sequence[int]) -> ForeignArray:
    """Take what a capsule holds. One that is refused is left as it is: it gives back itself what nobody took."""
    name, managed = _managed(capsule)
    flags = 0
    if isinstance(managed, _ManagedVersioned):
        if managed.major != _NEWEST_DLPACK[0]:
            raise InputError(
                f"DLPack {managed.major}.{managed.minor} does not fit: the layout of {_NEWEST_DLPACK[0]}.x is known; "
                "an older release of the library that made the array may write it"
            )
        flags = managed.flags
    tensor = managed.tensor
    if tensor.device.type not in device_types:
        raise InputError(
            f"DLPack device ({tensor.device.type}, {tensor.device.id}) does not fit: expected one of type "
            f"{' or '.join(map(str, device_types))}"
        )
    dtype = _read_dtype(tensor.dtype)
    if tensor.ndim < 0 or (tensor.ndim > 0 and not tensor.shape):
        raise InputError(f"a DLPack tensor of {tensor.ndim} axes without a shape does not fit: the array is damaged")
    shape = tuple(tensor.shape[: tensor.ndim]) if tensor.ndim else ()
    pointer = (tensor.data or 0) + tensor.byte_offset
    check_memory(pointer, shape)
    # Null strides are those of C order; DLPack 1.2 forbade them.
    strides = tensor.strides[: tensor.ndim] if tensor.strides else ()
    contiguous = not strides or is_c_contiguous(shape, strides, 1)
    device = tensor.device.id if tensor.device.type == CUDA else None
    address, deleter = ctypes.addressof(managed), managed.deleter
    _rename_capsule(capsule, _USED[name])
    return ForeignArray(
        pointer=pointer,
        shape=shape,
        dtype=dtype,
        device=device,
        contiguous=contiguous,
        read_only=bool(flags & _READ_ONLY),
        owner=_Lent(address, deleter),
        rows=None if contiguous else rows_of(shape, strides, dtype.itemsize),
    )


def _read_dtype(dtype: _DataType) -> np.dtype:
    known = _DTYPES.get((dtype.code, dtype.bits))
    if known is None or dtype.lanes != 1:
        raise InputError(f"dtype {_name_of(dtype)} of an array on a GPU does not fit: {_CAST}")
    return known


def _name_of(dtype: _DataType) -> str:
    name = _TYPE_CODES.get(dtype.code, f"of code {dtype.code}, bits: ")
    width = "" if "_" in name else str(dtype.bits)
    return name + width + (f" in {dtype.lanes} lanes" if dtype.lanes != 1 else "")


def make_capsule(
    pointer: int,
    shape: tuple[int, ...],
    dtype: np.dtype,
    owner: object,
    *,
    device: tuple[int, int],
    versioned: bool,
    strides: Sequence[int] | None = None,
) -> object:
    """A DLPack capsule that keeps ``owner``. ``strides``: in elements; None for those of C order.

    numpy (1.24 or newer) makes it, of one element that is seen many times, and what it is to describe is written into it.
    So its deleter is C: it may be called by a thread that Python does not know, while an exception is on its way (a
    consumer that fails drops its capsule just then, and a ctypes callback would lose the exception), and after the
    interpreter has ended.
    """
    memory = _OneElement(dtype.itemsize)
    memory.owner = owner
    # Unsigned: not every numpy exports bool.
    array: Any = np.ndarray(shape, f"u{dtype.itemsize}", memory, strides=(0,) * len(shape))
    try:
        capsule = array.__dlpack__(max_version=(1, 0)) if versioned else array.__dlpack__()
    except TypeError:  # numpy before 2.1 writes the older form, which consumers have to take as well
        capsule = array.__dlpack__()
    tensor = _managed(capsule)[1].tensor
    tensor.data = pointer or None
    tensor.device.type, tensor.device.id = device
    tensor.dtype.code = _CODE_OF_KIND[dtype.kind]
    if tensor.strides:  # null where the array has at most one element, which any strides fit
        for axis, stride in enumerate(c_strides(shape) if strides is None else strides):
            tensor.strides[axis] = stride
    return capsule
