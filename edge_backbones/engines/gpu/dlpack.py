"""Describe arrays in GPU memory, and read and write their DLPack capsules.

numpy does the work: it describes memory that it does not touch, and it reads, checks and writes capsules. It does so for
memory of the CPU alone, so where an array is, is read and written here. Nothing here calls CUDA, and nothing reads what a
pointer points to.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from edge_backbones.errors import InputError

CUDA, CUDA_HOST, _CPU, _CUDA_MANAGED = 2, 3, 1, 13  # DLDeviceType
ON_GPU = (CUDA, _CUDA_MANAGED)
_BOOL = 6  # DLDataTypeCode

_KNOWN_DTYPES = frozenset(map(np.dtype, ("?", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8")))
# numpy before 2.1 reads and writes the older form alone, which every library has.
_VERSION: dict[str, Any] = {"max_version": (1, 0)} if np.lib.NumpyVersion(np.__version__) >= "2.1.0" else {}

# What other libraries raise to refuse an export. Anything else is a defect of theirs and goes through as it is.
REFUSALS = (BufferError, RuntimeError, TypeError, ValueError, AssertionError)


@dataclass(frozen=True)
class Rows:
    """Describe memory that is not contiguous: ``count`` rows of ``nbytes`` bytes, which begin ``pitch`` bytes apart."""

    count: int
    nbytes: int
    pitch: int


@dataclass(eq=False)  # not frozen: every call makes one, and that would take a microsecond
class ForeignArray:
    """Another library's array, to be read in place while ``owner`` is held. Nothing here ever writes to it.

    Aliasing: it is the other library's memory, and later writes of that library are seen.

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
    owner: object
    producer_stream: int | None = None  # not None: the reader's stream has to wait for this one first
    rows: Rows | None = None  # if it is not contiguous, and no more than its rows are apart

    @classmethod
    def described(
        cls, array: np.ndarray, pointer: int, device: int | None, owner: object, producer_stream: int | None = None
    ) -> ForeignArray:
        """Return the array at ``pointer`` that numpy's ``array`` describes. Raises InputError if it cannot be taken."""
        shape, dtype, contiguous = array.shape, array.dtype, array.flags.c_contiguous
        check_dtype(dtype)
        check_memory(pointer, shape)
        rows = None if contiguous else _rows_of(shape, array.strides, dtype.itemsize)
        return cls(pointer, shape, dtype, device, contiguous, owner, producer_stream, rows)

    @property
    def nbytes(self) -> int:
        """Bytes of all elements."""
        return math.prod(self.shape) * self.dtype.itemsize


def kind_of(values: object) -> str:
    """Return the type of an object, for a message."""
    return f"type {type(values).__module__}.{type(values).__qualname__}"


def check_dtype(dtype: np.dtype) -> None:
    """Raise InputError for a dtype that numpy and DLPack do not share."""
    if dtype not in _KNOWN_DTYPES:
        raise InputError(f"dtype {dtype} of an array on a GPU does not fit: cast it to float32, float16 or uint8 first")


def check_memory(pointer: int, shape: Sequence[int]) -> None:
    """Raise InputError for a negative size, and for a null pointer to something."""
    if any(extent < 0 for extent in shape):
        raise InputError(f"shape {tuple(shape)} of an array on a GPU does not fit: sizes are 0 or more")
    if pointer == 0 and 0 not in shape:
        raise InputError(f"a null pointer does not fit shape {tuple(shape)}: the array was freed, or never allocated")


def _rows_of(shape: Sequence[int], strides: Sequence[int], itemsize: int) -> Rows | None:
    """Return an array as rows that begin at one distance, as frames of cameras and decoders lie; None if it is not so."""
    axis, nbytes = len(shape), itemsize
    while axis and (shape[axis - 1] == 1 or strides[axis - 1] == nbytes):
        axis -= 1
        nbytes *= shape[axis]
    outer = [(extent, stride) for extent, stride in zip(shape[:axis], strides[:axis], strict=True) if extent != 1]
    count, pitch = outer[-1]  # there is one, because the array is not contiguous
    if pitch < nbytes:
        return None
    for extent, stride in reversed(outer[:-1]):
        if stride != count * pitch:
            return None
        count *= extent
    return Rows(count, nbytes, pitch)


class _Memory:
    """Tell numpy of memory that it must not touch. ``owner`` keeps the memory."""

    def __init__(self, interface: dict[str, Any], owner: object) -> None:
        self.__array_interface__ = interface
        self.owner = owner


def over(
    pointer: int, shape: tuple[int, ...], typestr: str, strides: tuple[int, ...] | None, owner: object
) -> np.ndarray:
    """Return a numpy array that describes memory of a GPU and holds ``owner``. Its values must not be read.

    ``strides``: in bytes; None for C order. Raises TypeError and ValueError for what is no array.
    """
    # numpy takes a null pointer for no array. The caller checks whether the pointer fits.
    described = {"version": 3, "shape": shape, "typestr": typestr, "strides": strides, "data": (pointer or 256, False)}
    return np.asarray(_Memory(described, owner))


# ---- DLPack


class _Tensor(ctypes.Structure):
    """DLTensor of dlpack.h."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_index", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.c_void_p),
        ("strides", ctypes.c_void_p),
        ("byte_offset", ctypes.c_uint64),
    )


# Where it is in what a capsule holds. DLManagedTensorVersioned has a version, two pointers and flags in front of it.
_TENSOR_AT = {b"dltensor": 0, b"dltensor_versioned": 32}

# Function objects of our own: argument types set on ctypes.pythonapi's would hold for every library in the process.
_capsule_name = ctypes.PYFUNCTYPE(ctypes.c_char_p, ctypes.py_object)(("PyCapsule_GetName", ctypes.pythonapi))
_capsule_pointer = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(
    ("PyCapsule_GetPointer", ctypes.pythonapi)
)


class _Lent:
    """Pass a capsule to numpy."""

    def __init__(self, capsule: object) -> None:
        self._capsule = capsule

    def __dlpack__(self, **_: object) -> object:
        return self._capsule

    def __dlpack_device__(self) -> tuple[int, int]:
        return _CPU, 0


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


def read(values: Any, stream: int | None, device_types: Sequence[int]) -> ForeignArray:
    """Take an array of another library through DLPack. A refused capsule gives back itself what nobody took.

    ``stream``: the stream that the other library makes wait for the values; None for arrays on the host.
    """
    try:
        try:
            capsule = values.__dlpack__(stream=stream, **_VERSION)
        except TypeError:  # it does not know max_version, which came with a later edition of the standard
            capsule = values.__dlpack__(stream=stream)
    except REFUSALS as error:
        raise _refusal(values, error) from error
    tensor = _tensor_in(capsule)
    kind, index = tensor.device_type, tensor.device_index
    if kind not in device_types:
        raise InputError(
            f"DLPack device ({kind}, {index}) does not fit: expected one of type {' or '.join(map(str, device_types))}"
        )
    if tensor.ndim < 0 or (tensor.ndim and not tensor.shape):
        raise InputError(f"a DLPack tensor of {tensor.ndim} axes without a shape does not fit: the array is damaged")
    tensor.device_type, tensor.device_index = _CPU, 0
    try:
        array: np.ndarray = np.from_dlpack(_Lent(capsule))  # type: ignore[arg-type]  # numpy does not ask for a device
    except REFUSALS as error:
        raise _refusal(values, error) from error
    finally:
        tensor.device_type, tensor.device_index = kind, index
    pointer = (tensor.data or 0) + tensor.byte_offset
    # The base is the capsule of numpy that gives the memory back; the array itself would show its values when printed.
    return ForeignArray.described(array, pointer, index if kind == CUDA else None, array.base)


def _refusal(values: Any, error: BaseException) -> InputError:
    return InputError(
        f"{kind_of(values)} of dtype {getattr(values, 'dtype', 'unknown')} cannot be read through DLPack ({error}): pass a "
        "detached array of float32, float16 or uint8 on the current device"
    )


def _tensor_in(capsule: Any) -> _Tensor:
    """Return the tensor in a capsule, which has to be read while the capsule or what took it lives."""
    try:
        name = _capsule_name(capsule)
    except ValueError as error:
        raise InputError(f"{kind_of(capsule)} does not fit: __dlpack__ has to return a capsule") from error
    if name not in _TENSOR_AT:
        taken = " (it was taken before: a capsule is taken once)" if (name or b"").startswith(b"used_dltensor") else ""
        raise InputError(
            f"a capsule named {name!r}{taken} does not fit: DLPack has {' and '.join(map(repr, _TENSOR_AT))}"
        )
    return _Tensor.from_address(_capsule_pointer(capsule, name) + _TENSOR_AT[name])


def make_capsule(
    pointer: int,
    shape: tuple[int, ...],
    dtype: np.dtype,
    owner: object,
    *,
    device: tuple[int, int],
    versioned: bool,
    strides: tuple[int, ...] | None = None,
) -> object:
    """A DLPack capsule that keeps ``owner``. ``strides``: in bytes; None for C order.

    numpy (1.24 or newer) makes it, so its deleter is C: it may be called by a thread that Python does not know, while an
    exception is on its way (a consumer that fails drops its capsule just then, and a ctypes callback would lose the
    exception), and after the interpreter has ended.
    """
    is_bool = dtype.kind == "b"  # which not every numpy exports
    array: Any = over(pointer, shape, "|u1" if is_bool else dtype.str, strides, owner)
    capsule = array.__dlpack__(**_VERSION) if versioned else array.__dlpack__()
    tensor = _tensor_in(capsule)
    tensor.data = pointer or None
    tensor.device_type, tensor.device_index = device
    if is_bool:
        tensor.code = _BOOL
    return capsule
