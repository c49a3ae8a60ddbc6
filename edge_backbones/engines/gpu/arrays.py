"""Arrays in GPU memory that cross the borders of libraries without a copy.

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
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from typing import Any

import numpy as np

from edge_backbones.engines.gpu.dlpack import (
    CUDA,
    ON_GPU,
    REFUSALS,
    ForeignArray,
    check_dtype,
    check_memory,
    dlpack_device,
    kind_of,
    make_capsule,
    over,
    read,
)
from edge_backbones.errors import InputError

_NEWEST_INTERFACE = 3
_LEGACY, _PER_THREAD, _DO_NOT_WAIT = 1, 2, -1


@dataclass(frozen=True, eq=False, repr=False)
class DeviceArray:
    """An array in the memory of GPU ``device``, as the engine's outputs are: read it in place, or copy it.

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

    Memory: in C order, unless ``strides`` says otherwise (in elements, one for each axis, as in DLPack).

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
    strides: tuple[int, ...] | None = None

    @classmethod
    def unchecked(cls, **attributes: Any) -> DeviceArray:
        """Return an array with these attributes, without the checks, which every call would pay for."""
        array = object.__new__(cls)
        array.__dict__.update(attributes)
        return array

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", tuple(operator.index(extent) for extent in self.shape))
        # Both standards want null where there is nothing.
        object.__setattr__(self, "pointer", 0 if 0 in self.shape else operator.index(self.pointer))
        object.__setattr__(self, "dtype", np.dtype(self.dtype))
        check_dtype(self.dtype)
        check_memory(self.pointer, self.shape)

    def channels_first(self) -> DeviceArray:
        """Return an array of shape (N, H, W, C) as (N, C, H, W) over the same memory: torch's channels_last format."""
        batch, height, width, channels = self.shape
        strides = (height * width * channels, 1, width * channels, channels)
        return self.unchecked(**{**self.__dict__, "shape": (batch, channels, height, width), "strides": strides})

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of all elements."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def _byte_strides(self) -> tuple[int, ...] | None:
        """``strides`` in bytes."""
        return self.strides and tuple(stride * self.dtype.itemsize for stride in self.strides)

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
            "strides": self._byte_strides,
            "stream": None if self.synchronize is None else self.stream or _LEGACY,
        }

    def __dlpack_device__(self) -> tuple[int, int]:
        """``(kDLCUDA, device)``."""
        return CUDA, self.device

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
        return make_capsule(
            self.pointer,
            self.shape,
            self.dtype,
            self.owner,
            device=self.__dlpack_device__(),
            versioned=max_version is not None and max_version[0] >= 1,
            strides=self._byte_strides,
        )

    def __array__(self, dtype: object = None, copy: object = None) -> np.ndarray:
        # Without this numpy would make an array of one Python object of it.
        raise InputError(
            f"{self!r} is not on the host: copy it, as torch.from_dlpack(array).cpu() or cupy.asnumpy(array) do"
        )


def is_on_gpu(values: Any) -> bool:
    """Is this an array in GPU memory, by what DLPack says of it, or else by having ``__cuda_array_interface__``?

    Raises InputError for an array that refuses to say.
    """
    if type(values) is DeviceArray:
        return True
    device = dlpack_device(values)
    return _interface(values) is not None if device is None else device[0] in ON_GPU


def from_foreign(values: Any, *, stream: int) -> ForeignArray:
    """An array of another library, over the same GPU memory, for work on ``stream``.

    Through DLPack where ``values`` has it: the other library has then made ``stream`` wait for the values (-1: asked it
    not to). Else through the CUDA Array Interface, where ``producer_stream`` of the result is still to be waited for.
    Any strides are taken; ``contiguous`` says whether they are those of C order.

    Raises InputError for host arrays, dtypes that numpy lacks (bfloat16, float8), masks, and what the other library
    refuses to export, such as a torch tensor that requires grad.
    """
    if type(values) is DeviceArray:  # a frame's maps, into the next engine: without a capsule
        values.order(stream or _LEGACY)
        if values.strides is not None:
            array = over(values.pointer, values.shape, values.dtype.str, values._byte_strides, values.owner)
            return ForeignArray.described(array, values.pointer, values.device, values.owner)
        return ForeignArray(values.pointer, values.shape, values.dtype, values.device, True, values.owner)
    refuse_views(values)
    device = dlpack_device(values)
    if device is not None:
        if device[0] not in ON_GPU:
            raise InputError(f"{kind_of(values)} on DLPack device {device} does not fit: copy it to a GPU, (2, n)")
        return read(values, _consumer_stream(stream), ON_GPU)
    interface = _interface(values)
    if interface is None:
        raise InputError(
            f"{kind_of(values)} does not fit: pass an array on a GPU that has __dlpack__ or __cuda_array_interface__"
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
            raise InputError(f"{kind_of(values)} is a {name}, which DLPack cannot pass: pass tensor.{fix}()")


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
                f"stream of {kind_of(stream)} does not fit: its __cuda_stream__ is {said!r}, not (0, pointer)"
            )
        candidates = [said[1]]
    else:
        candidates = [stream, *(getattr(stream, name, None) for name in ("cuda_stream", "ptr", "handle"))]
    pointers = (_integer(candidate) for candidate in candidates)
    pointer = next((value for value in pointers if value is not None), None)
    if pointer is None or pointer < 0:
        raise InputError(
            f"stream {stream!r} of {kind_of(stream)} does not fit: pass a pointer (an int, 0 or more), an object with "
            "__cuda_stream__(), or a stream of torch, cupy or pycuda"
        )
    return pointer


class _ExportRefusedError(InputError, BufferError):
    """The array API standard asks for BufferError: consumers catch it."""


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


# ---- CUDA Array Interface


def _interface(values: Any) -> dict[str, Any] | None:
    try:
        interface: dict[str, Any] = values.__cuda_array_interface__
    except AttributeError:
        return None
    except REFUSALS as error:
        raise InputError(
            f"{kind_of(values)} refuses the CUDA Array Interface ({error}): pass a detached array"
        ) from error
    return interface


def _read_interface(values: Any, interface: dict[str, Any]) -> ForeignArray:
    try:
        version, stream = operator.index(interface["version"]), interface.get("stream")
        stream = None if stream is None else operator.index(stream)
        pointer, _ = interface["data"]
        pointer = int(pointer or 0)
        array = over(pointer, tuple(interface["shape"]), interface["typestr"], interface.get("strides"), values)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{kind_of(values)} has a __cuda_array_interface__ that is not one ({type(error).__name__}: {error}): "
            f"{interface!r}"
        ) from error
    if not 0 <= version <= _NEWEST_INTERFACE:
        raise InputError(
            f"CUDA Array Interface version {version} of {kind_of(values)} does not fit: up to {_NEWEST_INTERFACE} is known"
        )
    if interface.get("mask") is not None:
        raise InputError(
            f"{kind_of(values)} with a mask does not fit: fill the masked elements and pass the plain array"
        )
    if stream is not None and stream < _LEGACY:
        raise InputError(
            f"stream {stream} in the CUDA Array Interface of {kind_of(values)} does not fit: the standard has 1 (legacy), "
            "2 (per thread), a pointer, or None"
        )
    return ForeignArray.described(array, pointer, None, values, stream)
