"""NVIDIA's bindings in tests: calls that check, and memory that is compared."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np


def code_of(result: tuple[Any, ...]) -> str:
    """The name of the code that a function answered, without CUDA_ERROR_."""
    return result[0].name.removeprefix("CUDA_ERROR_")


def ok(result: tuple[Any, ...]) -> Any:
    """What a function answered beside CUDA_SUCCESS."""
    assert code_of(result) == "CUDA_SUCCESS", result
    values = result[1:]
    return values[0] if len(values) == 1 else values


@contextlib.contextmanager
def context() -> Iterator[Any]:
    """Make the primary context of the first GPU current, and give the bindings."""
    from cuda.bindings import driver as cu

    ok(cu.cuInit(0))
    device = ok(cu.cuDeviceGet(0))
    ok(cu.cuCtxPushCurrent(ok(cu.cuDevicePrimaryCtxRetain(device))))
    yield cu
    ok(cu.cuCtxPopCurrent())
    ok(cu.cuDevicePrimaryCtxRelease(device))


def bytes_of(value: int, size: int = 64) -> np.ndarray:
    return np.full(size, value, np.uint8)


class Memory:
    """Memory of 64 bytes on the GPU, with a value."""

    def __init__(self, cu: Any, value: int, size: int = 64) -> None:
        self.cu, self.size = cu, size
        self.pointer = int(ok(cu.cuMemAlloc(size)))
        self.write(value)

    def write(self, value: int) -> None:
        """Write at once, whatever is enqueued on other streams than the default one."""
        ok(self.cu.cuMemcpyHtoD(self.pointer, bytes_of(value, self.size).ctypes.data, self.size))

    def read(self) -> int:
        """Read at once."""
        found = np.empty(self.size, np.uint8)
        ok(self.cu.cuMemcpyDtoH(found.ctypes.data, self.pointer, self.size))
        assert (found == found[0]).all()
        return int(found[0])

    def set(self, value: int, stream: Any) -> None:
        """Enqueue a memset."""
        ok(self.cu.cuMemsetD8Async(self.pointer, value, self.size, stream))

    def copy_from(self, other: Memory, stream: Any) -> None:
        """Enqueue a copy on the GPU."""
        ok(self.cu.cuMemcpyDtoDAsync(self.pointer, other.pointer, self.size, stream))


def two_streams(cu: Any) -> tuple[Any, Any]:
    return ok(cu.cuStreamCreate(1)), ok(cu.cuStreamCreate(1))


def capture_modes(cu: Any) -> SimpleNamespace:
    modes = cu.CUstreamCaptureMode
    return SimpleNamespace(
        everywhere=modes.CU_STREAM_CAPTURE_MODE_GLOBAL,
        thread=modes.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL,
        relaxed=modes.CU_STREAM_CAPTURE_MODE_RELAXED,
    )
