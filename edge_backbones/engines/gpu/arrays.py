"""Arrays in GPU memory that cross the borders of libraries without a copy, with numpy and ctypes alone.

Two standards are followed in both directions: *DLPack* 1.3 (capsules named ``dltensor`` and ``dltensor_versioned``, with
the Python calls of the array API standard) and the *CUDA Array Interface*, version 3 (``__cuda_array_interface__``).
Nothing here calls CUDA, and nothing reads what a pointer points to.

A stream is an int, as in both standards: 1 is the legacy default stream, 2 the calling thread's own default stream, and
anything above is a pointer. In this package 0 is the legacy default stream too; other libraries are given 1, because the
standards tell them to refuse 0.
"""

from __future__ import annotations

import ctypes
import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any

import numpy as np

from edge_backbones.engines.forks import keep_for_good
from edge_backbones.errors import InputError

_CPU, _CUDA, _CUDA_MANAGED = 1, 2, 13  # DLDeviceType
_ON_GPU = (_CUDA, _CUDA_MANAGED)
_NEWEST_DLPACK = (1, 3)
_READ_ONLY = 1  # DLPACK_FLAG_BITMASK_READ_ONLY
_NEWEST_INTERFACE = 3
_LEGACY, _PER_THREAD, _DO_NOT_WAIT = 1, 2, -1

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
_REFUSALS = (BufferError, RuntimeError, TypeError, ValueError, AssertionError)


@dataclass(frozen=True, eq=False, repr=False)
class DeviceArray:
    """A C-contiguous array in the memory of GPU ``device``, as the engine's outputs are: read it in place, or copy it.

    >>> maps = backbone(frame_on_gpu, stream=stream).feature_maps           # doctest: +SKIP
    >>> tensor = torch.from_dlpack(maps[0])                                 # or cupy.from_dlpack, cupy.asarray, jax

    Aliasing: every consumer, and every other DeviceArray made with this pointer, sees and writes the same memory.

    Ownership: ``owner`` keeps the memory, and is kept for as long as this array or anything that took it through DLPack
    lives. What reads ``pointer`` or ``__cuda_array_interface__`` has to hold the array, as the CUDA Array Interface says.
    ``owner`` may be let go of by a thread that never ran Python before, or by none when the process ends first.

    Streams: the values are those at the end of the work that was enqueued on ``stream``. ``synchronize(consumer)`` makes
    the stream ``consumer`` wait for that work, and is called before an array goes to another stream through DLPack. None
    says that the values are there already, for every stream.

    Threads: the array never changes, and may be exported from several threads at once if ``synchronize`` may be.

    Raises InputError for a dtype that is not bool or an int, uint or float that numpy and DLPack share, for a negative
    size, and for a null pointer to something.
    """

    pointer: int
    shape: tuple[int, ...]
    dtype: np.dtype
    _: KW_ONLY
    device: int
    owner: object
    synchronize: Callable[[int], None] | None
    stream: int = 0

    @classmethod
    def of_engine(
        cls, pointer: int, shape: tuple[int, ...], dtype: np.dtype, device: int, owner: Any, stream: int
    ) -> DeviceArray:
        """An output of an engine, without the checks, which every call would pay for. ``owner.order`` is its synchronize."""
        array = object.__new__(cls)
        array.__dict__.update(
            pointer=pointer,
            shape=shape,
            dtype=dtype,
            device=device,
            owner=owner,
            synchronize=owner.order,
            stream=stream,
        )
        return array

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", tuple(operator.index(extent) for extent in self.shape))
        # Both standards want null where there is nothing.
        object.__setattr__(self, "pointer", 0 if 0 in self.shape else operator.index(self.pointer))
        object.__setattr__(self, "dtype", np.dtype(self.dtype))
        _check_dtype(self.dtype, self.dtype)
        _check_memory(self.pointer, self.shape)

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of all elements."""
        return math.prod(self.shape) * self.dtype.itemsize

    def __len__(self) -> int:
        if not self.shape:
            raise TypeError("len() of an array without axes")
        return self.shape[0]

    def __repr__(self) -> str:
        return f"DeviceArray(shape={self.shape}, dtype={self.dtype}, device={self.device})"

    def order(self, consumer: int) -> None:
        """Make the stream ``consumer`` (as DLPack has it; -1 does not wait) wait for the values."""
        # Every thread has a per-thread default stream of its own: two of them are not the same stream.
        same = consumer == (self.stream or _LEGACY) != _PER_THREAD
        if self.synchronize is not None and not same and consumer != _DO_NOT_WAIT:
            self.synchronize(consumer)

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        """CUDA Array Interface, version 3: a consumer makes its stream wait for the one under ``stream``."""
        return {
            "version": 3,
            "shape": self.shape,
            "typestr": self.dtype.str,
            "data": (self.pointer, False),
            "strides": None,
            "stream": None if self.synchronize is None else self.stream or _LEGACY,
        }

    def __dlpack_device__(self) -> tuple[int, int]:
        """``(kDLCUDA, device)``."""
        return _CUDA, self.device

    def __dlpack__(
        self,
        *,
        stream: int | None = None,
        max_version: tuple[int, int] | None = None,
        dl_device: tuple[int, int] | None = None,
        copy: bool | None = None,
    ) -> object:
        """A DLPack capsule, after the consumer's ``stream`` was made to wait for the values.

        ``stream``: None or 1 for the legacy default stream, 2 for this thread's default stream, a pointer, or -1 not to
        wait. Raises an InputError that is a BufferError too for what would need a copy: ``copy=True`` or another device.
        """
        if copy:
            raise _ExportRefusedError(
                f"{self!r} with copy=True does not fit: it is passed without a copy; copy what you get"
            )
        if dl_device is not None and tuple(map(int, dl_device)) != self.__dlpack_device__():
            raise _ExportRefusedError(
                f"DLPack device {tuple(map(int, dl_device))} does not fit: {self!r} is on {self.__dlpack_device__()}; "
                "take it there and copy it"
            )
        self.order(_consumer_stream(stream))
        return _make_capsule(
            self.pointer,
            self.shape,
            self.dtype,
            self.owner,
            device=self.__dlpack_device__(),
            versioned=max_version is not None and max_version[0] >= 1,
        )

    def __array__(self, dtype: object = None, copy: object = None) -> np.ndarray:
        # Without this numpy would make an array of one Python object of it.
        raise InputError(
            f"{self!r} is not on the host: copy it, as torch.from_dlpack(array).cpu() or cupy.asnumpy(array) do"
        )


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

    @property
    def nbytes(self) -> int:
        """Bytes of all elements."""
        return math.prod(self.shape) * self.dtype.itemsize


def is_on_gpu(values: Any) -> bool:
    """Is this an array in GPU memory, by what DLPack says of it, or else by having ``__cuda_array_interface__``?

    Raises InputError for an array that refuses to say.
    """
    device = _dlpack_device(values)
    return _interface(values) is not None if device is None else device[0] in _ON_GPU


def from_foreign(values: Any, *, stream: int) -> ForeignArray:
    """An array of another library, over the same GPU memory, for work on ``stream``.

    Through DLPack where ``values`` has it: the other library has then made ``stream`` wait for the values (-1: asked it
    not to). Else through the CUDA Array Interface, where ``producer_stream`` of the result is still to be waited for.
    Any strides are taken; ``contiguous`` says whether they are those of C order.

    Raises InputError for host arrays, dtypes that numpy lacks (bfloat16, float8), masks, and what the other library
    refuses to export, such as a torch tensor that requires grad.
    """
    if type(values) is DeviceArray:  # a frame's maps, into the next engine: without a capsule
        values.order(_consumer_stream(stream))
        return ForeignArray(values.pointer, values.shape, values.dtype, values.device, True, False, values.owner)
    refuse_views(values)
    device = _dlpack_device(values)
    if device is not None:
        if device[0] not in _ON_GPU:
            raise InputError(f"{_kind(values)} on DLPack device {device} does not fit: copy it to a GPU, (2, n)")
        return _read_capsule(_ask_for_capsule(values, _consumer_stream(stream)), _ON_GPU)
    interface = _interface(values)
    if interface is None:
        raise InputError(
            f"{_kind(values)} does not fit: pass an array on a GPU that has __dlpack__ or __cuda_array_interface__"
        )
    return _read_interface(values, interface)


def refuse_views(values: Any) -> None:
    """Raise InputError for a tensor of torch whose values are not those of its memory, which is all that DLPack passes."""
    for question, name, fix in (
        ("is_neg", "negative view", "resolve_neg"),
        ("is_conj", "conjugate view", "resolve_conj"),
        ("_is_zerotensor", "zero tensor without memory", "clone"),
    ):
        if getattr(values, question, bool)():
            raise InputError(f"{_kind(values)} is a {name}, which DLPack cannot pass: pass tensor.{fix}()")


def stream_pointer(stream: Any) -> int:
    """The CUDA stream that an object stands for, as an int: 0 is the legacy default stream, and what None gives.

    Takes an int; whatever has ``__cuda_stream__()`` (cuda.core) or ``__int__`` (cuda.bindings, numba); and the streams
    of torch (``.cuda_stream``), cupy (``.ptr``) and pycuda (``.handle``). Hold the object while the stream is in use.
    Raises InputError for anything else.
    """
    if type(stream) is int and stream >= 0:  # what a loop over frames passes
        return stream
    if stream is None:
        return 0
    if hasattr(stream, "__cuda_stream__"):
        said = stream.__cuda_stream__() if callable(stream.__cuda_stream__) else stream.__cuda_stream__
        if not isinstance(said, tuple) or len(said) != 2 or said[0] != 0:
            raise InputError(
                f"stream of {_kind(stream)} does not fit: its __cuda_stream__ is {said!r}, not (0, pointer)"
            )
        candidates = [said[1]]
    else:
        candidates = [stream, *(getattr(stream, name, None) for name in ("cuda_stream", "ptr", "handle"))]
    pointers = (_integer(candidate) for candidate in candidates)
    pointer = next((value for value in pointers if value is not None), None)
    if pointer is None or pointer < 0:
        raise InputError(
            f"stream {stream!r} of {_kind(stream)} does not fit: pass a pointer (an int, 0 or more), an object with "
            "__cuda_stream__(), or a stream of torch, cupy or pycuda"
        )
    return pointer


class _ExportRefusedError(InputError, BufferError):
    """The array API standard asks for BufferError: consumers catch it."""


def _kind(values: object) -> str:
    return f"type {type(values).__module__}.{type(values).__qualname__}"


def _integer(value: Any) -> int | None:
    if isinstance(value, ctypes.c_void_p):  # numba's handle
        return value.value or 0
    try:
        if hasattr(type(value), "__index__") and not isinstance(value, bool):
            return operator.index(value)
        if hasattr(type(value), "__int__") and not hasattr(type(value), "__float__"):
            return int(value)
    except TypeError:
        pass
    return None


def _consumer_stream(stream: Any) -> int:
    """A stream as ``__dlpack__`` is given it; 0, which producers must refuse, is what this package calls the legacy one."""
    pointer = _LEGACY if stream is None else _integer(stream)
    if pointer is None or pointer < _DO_NOT_WAIT:
        raise _ExportRefusedError(
            f"stream {stream!r} does not fit: DLPack takes 1 (legacy), 2 (per thread), a pointer, or -1 not to wait"
        )
    return pointer or _LEGACY


def _check_dtype(dtype: np.dtype, said: object) -> None:
    if dtype not in _KNOWN_DTYPES:
        raise InputError(f"dtype {said} of an array on a GPU does not fit: {_CAST}")


def _check_memory(pointer: int, shape: Sequence[int]) -> None:
    if any(extent < 0 for extent in shape):
        raise InputError(f"shape {tuple(shape)} of an array on a GPU does not fit: sizes are 0 or more")
    if pointer == 0 and 0 not in shape:
        raise InputError(f"a null pointer does not fit shape {tuple(shape)}: the array was freed, or never allocated")


def _is_c_contiguous(shape: Sequence[int], strides: Sequence[int], step: int) -> bool:
    """``strides`` and ``step``, the distance of neighbours, in one unit. Axes of one element may have any stride."""
    if 0 in shape:
        return True
    for extent, stride in zip(reversed(shape), reversed(strides), strict=True):
        if extent != 1 and stride != step:
            return False
        step *= extent
    return True


# ---- CUDA Array Interface


def _interface(values: Any) -> dict[str, Any] | None:
    try:
        interface: dict[str, Any] = values.__cuda_array_interface__
    except AttributeError:
        return None
    except _REFUSALS as error:
        raise InputError(
            f"{_kind(values)} refuses the CUDA Array Interface ({error}): pass a detached array"
        ) from error
    return interface


def _read_interface(values: Any, interface: dict[str, Any]) -> ForeignArray:
    try:
        version = operator.index(interface["version"])
        shape = tuple(operator.index(extent) for extent in interface["shape"])
        typestr = str(interface["typestr"])
        pointer, read_only = interface["data"]
        pointer = int(pointer or 0)
        strides = interface.get("strides")
        strides = None if strides is None else tuple(operator.index(stride) for stride in strides)
        stream = interface.get("stream")
        stream = None if stream is None else operator.index(stream)
        dtype = np.dtype(typestr)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{_kind(values)} has a __cuda_array_interface__ that is not one ({type(error).__name__}: {error}): {interface!r}"
        ) from error
    if not 0 <= version <= _NEWEST_INTERFACE:
        raise InputError(
            f"CUDA Array Interface version {version} of {_kind(values)} does not fit: up to {_NEWEST_INTERFACE} is known"
        )
    if interface.get("mask") is not None:
        raise InputError(f"{_kind(values)} with a mask does not fit: fill the masked elements and pass the plain array")
    if stream is not None and stream < _LEGACY:
        raise InputError(
            f"stream {stream} in the CUDA Array Interface of {_kind(values)} does not fit: the standard has 1 (legacy), "
            "2 (per thread), a pointer, or None"
        )
    _check_dtype(dtype, typestr)
    _check_memory(pointer, shape)
    if strides is not None and len(strides) != len(shape):
        raise InputError(f"{_kind(values)} has {len(strides)} strides for {len(shape)} axes: both must be as many")
    return ForeignArray(
        pointer=pointer,
        shape=shape,
        dtype=dtype,
        device=None,
        contiguous=strides is None or _is_c_contiguous(shape, strides, dtype.itemsize),
        read_only=bool(read_only),
        owner=values,
        producer_stream=stream,
    )


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


def _dlpack_device(values: Any) -> tuple[int, int] | None:
    if not hasattr(values, "__dlpack__") or not hasattr(values, "__dlpack_device__"):
        return None
    try:
        kind, index = values.__dlpack_device__()
        return int(kind), int(index)
    except _REFUSALS as error:
        raise InputError(
            f"{_kind(values)} does not say where it is ({error}): pass a dense array on a GPU or the CPU"
        ) from error


def _ask_for_capsule(values: Any, stream: int | None) -> Any:
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
        except _REFUSALS as error:
            if isinstance(error, TypeError) and form:
                continue  # a keyword that came with a later edition of the standard
            raise InputError(
                f"{_kind(values)} cannot be read through DLPack ({error}): pass a detached array of the current device"
            ) from error
    raise AssertionError("the last form returns or raises")


def _managed(capsule: Any) -> tuple[bytes, _Managed | _ManagedVersioned]:
    """Name and contents of a capsule, which have to be read while it lives."""
    try:
        name = _capsule_name(capsule)
    except ValueError as error:
        raise InputError(f"{_kind(capsule)} does not fit: __dlpack__ has to return a capsule") from error
    if name not in _USED:
        taken = " (it was taken before: a capsule is taken once)" if name in _USED.values() else ""
        raise InputError(f"a capsule named {name!r}{taken} does not fit: DLPack has {' and '.join(map(repr, _USED))}")
    address = _capsule_pointer(capsule, name)
    return name, (_Managed if name == _LEGACY_NAME else _ManagedVersioned).from_address(address)


def _read_capsule(capsule: Any, device_types: Sequence[int]) -> ForeignArray:
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
    _check_memory(pointer, shape)
    # Null strides are those of C order; DLPack 1.2 forbade them.
    contiguous = not tensor.strides or _is_c_contiguous(shape, tensor.strides[: tensor.ndim], 1)
    device = tensor.device.id if tensor.device.type == _CUDA else None
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


def _make_capsule(
    pointer: int,
    shape: tuple[int, ...],
    dtype: np.dtype,
    owner: object,
    *,
    device: tuple[int, int],
    versioned: bool,
) -> object:
    """A DLPack capsule that keeps ``owner``.

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
        step = 1
        for axis in reversed(range(len(shape))):
            tensor.strides[axis] = step
            step *= shape[axis]
    return capsule
