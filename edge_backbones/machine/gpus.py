"""Find the NVIDIA GPUs of this machine. Needs only the driver, which is called through ctypes."""

from __future__ import annotations

import ctypes
import enum
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from edge_backbones.errors import DeviceError, OutOfMemoryError
from edge_backbones.machine.system import kernel_has_driver

_LIBRARY = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
_OUT_OF_MEMORY, _NOT_INITIALIZED = 2, 3
_FORKED = (  # then cuInit itself returns CUDA_ERROR_NOT_INITIALIZED
    "driver present, and this process was forked from one that uses CUDA, which cannot be used here: "
    "start workers with the 'spawn' method"
)
_MULTIPROCESSORS, _INTEGRATED, _CAPABILITY_MAJOR, _CAPABILITY_MINOR = 16, 18, 75, 76


@dataclass(frozen=True)
class Gpu:
    """One GPU as the driver describes it.

    ``architecture``: ``sm_90`` for compute capability 9.0. ``driver``: the newest CUDA version that the driver supports,
    ``13.0``. ``integrated``: the GPU shares the memory of the CPU, as on Jetson. ``bus_address``: on PCI, ``0000:3b:00.0``;
    empty if the driver does not report it.
    """

    index: int
    name: str
    architecture: str
    memory_bytes: int
    driver: str
    multiprocessors: int
    integrated: bool
    bus_address: str = ""


def load_driver() -> Any:
    """Load the driver's library. Raises OSError if it cannot be loaded."""
    return ctypes.CDLL(_LIBRARY)


def find_gpus(load: Callable[[], Any] = load_driver) -> tuple[Gpu, ...]:
    """Return the GPUs that this process may use (CUDA_VISIBLE_DEVICES applies), empty without a driver or a GPU.

    Starts the driver in this process: processes that are forked afterwards cannot use CUDA. Raises DeviceError if the driver
    counts GPUs but does not describe them.
    """
    driver, count, _ = _probe(load)
    return () if driver is None else tuple(_describe(driver, index) for index in range(count))


def no_gpu_reason(load: Callable[[], Any] = load_driver) -> str:
    """Return why :func:`find_gpus` finds none, as a phrase; empty if there is a GPU."""
    return _probe(load)[2]


def _probe(load: Callable[[], Any]) -> tuple[CtypesDriver | None, int, str]:
    """Start the driver; return it, the number of GPUs, and why there are none."""
    try:
        driver = CtypesDriver(load())
    except OSError as error:
        missing = "No such file" in str(error) or "not find module" in str(error)
        why = f"{_LIBRARY} is missing" if missing else f"{_LIBRARY} cannot be loaded: {error}"
        if kernel_has_driver():
            why += "; the kernel has the driver, which a container sees with docker run --runtime nvidia"
        return None, 0, f"no NVIDIA driver ({why})"
    (code,) = driver.cuInit(0)
    if code == _NOT_INITIALIZED:
        return None, 0, _FORKED
    if code:
        return None, 0, f"driver present, cuInit failed: {error_name(driver, code)}"
    code, count = driver.cuDeviceGetCount()
    if code:
        return None, 0, f"driver present, cuDeviceGetCount failed: {error_name(driver, code)}"
    return driver, count, "" if count else "driver present, no GPU is visible to this process (CUDA_VISIBLE_DEVICES?)"


def _describe(driver: CtypesDriver, index: int) -> Gpu:
    handle = checked(driver, driver.cuDeviceGet(index), "cuDeviceGet of GPU %d", index)

    def attribute(number: int) -> int:
        result = driver.cuDeviceGetAttribute(number, handle)
        return int(checked(driver, result, "cuDeviceGetAttribute %d of GPU %d", number, index))

    version = checked(driver, driver.cuDriverGetVersion(), "cuDriverGetVersion")
    return Gpu(
        index=index,
        name=checked(driver, driver.cuDeviceGetName(handle), "cuDeviceGetName of GPU %d", index),
        architecture=f"sm_{attribute(_CAPABILITY_MAJOR)}{attribute(_CAPABILITY_MINOR)}",
        memory_bytes=checked(driver, driver.cuDeviceTotalMem(handle), "cuDeviceTotalMem of GPU %d", index),
        driver=f"{version // 1000}.{version % 1000 // 10}",
        multiprocessors=attribute(_MULTIPROCESSORS),
        integrated=bool(attribute(_INTEGRATED)),
        bus_address=driver.cuDeviceGetPCIBusId(handle)[1],
    )


def error_name(driver: Any, code: Any) -> str:
    """Return CUDA's name of an error: ``CUDA_ERROR_OUT_OF_MEMORY``."""
    status, name = driver.cuGetErrorName(code)
    if int(status) or name is None:
        return f"CUDA error {int(code)}"
    return name.decode() if isinstance(name, bytes) else str(name)


def checked(driver: Any, result: Any, what: str, *values: object) -> Any:
    """Return the value of a driver call that returned (code, value...); raise DeviceError with CUDA's name of the code."""
    code = int(result[0])
    if code:
        kind = OutOfMemoryError if code == _OUT_OF_MEMORY else DeviceError
        raise kind(f"{what % values} failed: {error_name(driver, result[0])}")
    return result[1] if len(result) > 1 else None


_pointer, _size = ctypes.c_uint64, ctypes.c_size_t
_handle, _int, _unsigned = ctypes.c_void_p, ctypes.c_int, ctypes.c_uint


class _Copy2D(ctypes.Structure):
    """CUDA_MEMCPY2D of cuda.h."""

    _fields_ = (
        ("srcXInBytes", _size),
        ("srcY", _size),
        ("srcMemoryType", _int),
        ("srcHost", _handle),
        ("srcDevice", _pointer),
        ("srcArray", _handle),
        ("srcPitch", _size),
        ("dstXInBytes", _size),
        ("dstY", _size),
        ("dstMemoryType", _int),
        ("dstHost", _handle),
        ("dstDevice", _pointer),
        ("dstArray", _handle),
        ("dstPitch", _size),
        ("WidthInBytes", _size),
        ("Height", _size),
    )


# By function name: the symbol, the types that it returns through pointers, and those of its arguments. cuda-bindings has the
# same names and returns (code, value...) too.
_PROTOTYPES: dict[str, tuple[str, tuple[Any, ...], tuple[Any, ...]]] = {
    "cuInit": ("cuInit", (), (_unsigned,)),
    "cuDriverGetVersion": ("cuDriverGetVersion", (_int,), ()),
    "cuDeviceGetCount": ("cuDeviceGetCount", (_int,), ()),
    "cuDeviceGet": ("cuDeviceGet", (_int,), (_int,)),
    "cuDeviceGetAttribute": ("cuDeviceGetAttribute", (_int,), (_int, _int)),
    "cuDeviceTotalMem": ("cuDeviceTotalMem_v2", (_size,), (_int,)),
    "cuDevicePrimaryCtxRetain": ("cuDevicePrimaryCtxRetain", (_handle,), (_int,)),
    "cuCtxPushCurrent": ("cuCtxPushCurrent_v2", (), (_handle,)),
    "cuCtxPopCurrent": ("cuCtxPopCurrent_v2", (_handle,), ()),
    "cuMemGetInfo": ("cuMemGetInfo_v2", (_size, _size), ()),
    "cuMemAlloc": ("cuMemAlloc_v2", (_pointer,), (_size,)),
    "cuMemFree": ("cuMemFree_v2", (), (_pointer,)),
    "cuMemHostAlloc": ("cuMemHostAlloc", (_handle,), (_size, _unsigned)),
    "cuMemFreeHost": ("cuMemFreeHost", (), (_handle,)),
    "cuMemcpyHtoDAsync": ("cuMemcpyHtoDAsync_v2", (), (_pointer, _handle, _size, _handle)),
    "cuMemcpyDtoHAsync": ("cuMemcpyDtoHAsync_v2", (), (_handle, _pointer, _size, _handle)),
    "cuMemcpyDtoDAsync": ("cuMemcpyDtoDAsync_v2", (), (_pointer, _pointer, _size, _handle)),
    "cuMemcpy2DAsync": ("cuMemcpy2DAsync_v2", (), (ctypes.POINTER(_Copy2D), _handle)),
    "cuMemsetD8Async": ("cuMemsetD8Async", (), (_pointer, ctypes.c_ubyte, _size, _handle)),
    "cuPointerGetAttribute": ("cuPointerGetAttribute", (_pointer,), (_int, _pointer)),  # 4 or 8 bytes
    "cuStreamCreate": ("cuStreamCreate", (_handle,), (_unsigned,)),
    "cuStreamDestroy": ("cuStreamDestroy_v2", (), (_handle,)),
    "cuStreamSynchronize": ("cuStreamSynchronize", (), (_handle,)),
    "cuStreamGetId": ("cuStreamGetId", (ctypes.c_uint64,), (_handle,)),
    "cuStreamWaitEvent": ("cuStreamWaitEvent", (), (_handle, _handle, _unsigned)),
    "cuEventCreate": ("cuEventCreate", (_handle,), (_unsigned,)),
    "cuEventRecord": ("cuEventRecord", (), (_handle, _handle)),
    "cuEventQuery": ("cuEventQuery", (), (_handle,)),
    "cuEventSynchronize": ("cuEventSynchronize", (), (_handle,)),
    "cuEventDestroy": ("cuEventDestroy_v2", (), (_handle,)),
    "cuStreamBeginCapture": ("cuStreamBeginCapture_v2", (), (_handle, _int)),
    "cuStreamIsCapturing": ("cuStreamIsCapturing", (_int,), (_handle,)),
    "cuStreamEndCapture": ("cuStreamEndCapture", (_handle,), (_handle,)),
    "cuGraphInstantiate": ("cuGraphInstantiateWithFlags", (_handle,), (_handle, ctypes.c_uint64)),
    "cuGraphLaunch": ("cuGraphLaunch", (), (_handle, _handle)),
    "cuGraphDestroy": ("cuGraphDestroy", (), (_handle,)),
    "cuGraphExecDestroy": ("cuGraphExecDestroy", (), (_handle,)),
}
# The others return through their first arguments.
_RETURN_LAST = ("cuStreamGetId", "cuStreamIsCapturing", "cuStreamEndCapture")


class CtypesDriver:
    """libcuda with the calling convention of ``cuda.bindings.driver``: every function returns (code, value...).

    It has the functions that `find_gpus` and the engines need. A function is looked up when it is first called,
    because old drivers do not have the newest ones.
    """

    class CUstreamCaptureMode(enum.IntEnum):
        """The enum of that name in ``cuda.bindings.driver``."""

        CU_STREAM_CAPTURE_MODE_RELAXED = 2

    class CUpointer_attribute(enum.IntEnum):
        """The enum of that name in ``cuda.bindings.driver``."""

        CU_POINTER_ATTRIBUTE_CONTEXT = 1
        CU_POINTER_ATTRIBUTE_DEVICE_POINTER = 3
        CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL = 9

    class CUmemorytype(enum.IntEnum):
        """The enum of that name in ``cuda.bindings.driver``."""

        CU_MEMORYTYPE_DEVICE = 2

    CUDA_MEMCPY2D = _Copy2D

    def __init__(self, library: Any) -> None:
        self._library = library

    def __getattr__(self, name: str) -> Callable[..., tuple[Any, ...]]:
        if name not in _PROTOTYPES:
            raise AttributeError(name)
        symbol, returned, taken = _PROTOTYPES[name]
        function = self._function(symbol)
        pointers = [ctypes.POINTER(kind) for kind in returned]
        last = name in _RETURN_LAST
        function.argtypes = [*taken, *pointers] if last else [*pointers, *taken]

        def call(*values: Any) -> tuple[Any, ...]:
            results = [kind() for kind in returned]
            into = [ctypes.byref(result) for result in results]
            code = function(*values, *into) if last else function(*into, *values)
            return (code, *(result.value or 0 for result in results))

        setattr(self, name, call)
        return call

    def _function(self, symbol: str) -> Any:
        try:
            return getattr(self._library, symbol)
        except AttributeError as error:
            raise DeviceError(f"the NVIDIA driver has no {symbol}: update the driver") from error

    def cuThreadExchangeStreamCaptureMode(self, mode: int) -> tuple[int, int]:  # noqa: N802
        """Return (code, the mode that this thread had)."""
        former = ctypes.c_int(int(mode))
        return self._function("cuThreadExchangeStreamCaptureMode")(ctypes.byref(former)), former.value

    # Three functions return text.

    def cuGetErrorName(self, code: int) -> tuple[int, bytes | None]:  # noqa: N802
        """Return (code, the name of the error ``code``)."""
        name = ctypes.c_char_p()
        return self._function("cuGetErrorName")(int(code), ctypes.byref(name)), name.value

    def cuDeviceGetName(self, device: int) -> tuple[int, str]:  # noqa: N802
        """Return (code, the name of a device)."""
        name = ctypes.create_string_buffer(256)
        return self._function("cuDeviceGetName")(name, 256, device), name.value.decode(errors="replace")

    def cuDeviceGetPCIBusId(self, device: int) -> tuple[int, str]:  # noqa: N802
        """Return (code, the PCI address of a device)."""
        address = ctypes.create_string_buffer(32)
        return self._function("cuDeviceGetPCIBusId")(address, 32, device), address.value.decode(errors="replace")
