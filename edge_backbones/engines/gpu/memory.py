"""Manage the memory, streams, events and graphs of one GPU.

Together with machine/gpus.py, which finds GPUs, this is all that touches CUDA. It calls the driver through cuda-bindings, or
through ctypes for programs that use pycuda. It works in the GPU's primary context, which torch, cupy, pycuda and TensorRT use
too, so it does not matter which library comes first. The context is current only inside ``with memory:``; afterwards the
previous context is current again.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib
import sys
import weakref
from collections.abc import Callable
from types import TracebackType
from typing import Any, Literal

from edge_backbones.engines.gpu.streams import StreamKey
from edge_backbones.errors import DeviceError, InputError, MissingDependencyError, OutOfMemoryError, needing
from edge_backbones.machine import gpus
from edge_backbones.machine.gpus import checked

MemoryBackend = Literal["cuda-bindings", "pycuda"]

_INVALID_VALUE, _CAPTURES_ELSEWHERE = 1, 906
_PORTABLE, _MAPPED, _NON_BLOCKING, _DISABLE_TIMING = 1, 2, 1, 2
_FIRST_CUDA = 12000


class GpuMemory:
    """Manage the memory, streams, events and graphs of one GPU. Call its methods inside ``with memory:``.

    Pointers and streams are plain ints, as in CUDA; events and graphs are what the driver's library makes. Streams of other
    libraries work too; 0 is the default stream. If CUDA refuses a call, it raises DeviceError with CUDA's name of the
    error, or OutOfMemoryError if memory ran out. Threads may share it.

    Args:
        gpu: Index of the GPU.
        driver: ``cuda.bindings.driver``, or an object with its functions.
        backend: Name of the library that ``driver`` is for.

    Raises:
        DeviceError: CUDA cannot use the GPU.
    """

    def __init__(self, gpu: int, driver: Any, backend: MemoryBackend = "cuda-bindings") -> None:
        self.gpu = gpu
        self.backend = backend
        self._driver = driver
        self._check(driver.cuInit(0), "cuInit")
        version = self._check(driver.cuDriverGetVersion(), "cuDriverGetVersion")
        if version < _FIRST_CUDA:
            raise DeviceError(f"the NVIDIA driver serves CUDA {version // 1000}, and 12 is needed: update the driver")
        device = self._check(driver.cuDeviceGet(gpu), "cuDeviceGet of GPU %d", gpu)
        # Kept for good, because arrays of callers may outlive every session.
        context = self._check(driver.cuDevicePrimaryCtxRetain(device), "cuDevicePrimaryCtxRetain of GPU %d", gpu)
        self._context = int(context)
        # Every call makes both: they are the driver's own functions, without a step of ours between.
        self._push: Callable[[], tuple[Any, ...]] = functools.partial(driver.cuCtxPushCurrent, context)
        self._pop: Callable[[], tuple[Any, ...]] = driver.cuCtxPopCurrent
        self._stream_type = getattr(driver, "CUstream", int)
        self._exchange = driver.cuThreadExchangeStreamCaptureMode
        self._relaxed = driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED
        self._attributes = driver.CUpointer_attribute

    def __enter__(self) -> GpuMemory:
        result = self._push()
        if result[0]:
            self._check(result, "cuCtxPushCurrent")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        result = self._pop()
        if result[0] and error is None:  # otherwise the first error is the one to raise
            self._check(result, "cuCtxPopCurrent")

    def aside(self, call: Callable[..., Any], *arguments: Any) -> Any:
        """Make a call that allocates, frees or asks, whatever graph another library captures meanwhile.

        CUDA refuses such a call while another thread captures in its global mode, which is torch's, and breaks that capture
        off. The relaxed mode of this thread allows it.
        """
        code, mode = self._exchange(self._relaxed)
        try:
            return call(*arguments)
        finally:
            if not code:
                self._exchange(mode)

    def allocate(self, size: int) -> int:
        """Allocate ``size`` bytes (at least 1) of device memory, aligned to 256 bytes, and return the pointer.

        Raises OutOfMemoryError, which says how much memory is free.
        """
        try:
            return int(self._check(self.aside(self._driver.cuMemAlloc, size), "cuMemAlloc of %d bytes", size))
        except OutOfMemoryError as error:
            code, *amounts = self._driver.cuMemGetInfo()
            known = "" if int(code) else f"; {readable(amounts[0])} of {readable(amounts[1])} are free"
            raise OutOfMemoryError(
                f"cuda:{self.gpu} has no {readable(size)} left ({error}){known}: run smaller batches or fewer threads, "
                "or end what else uses this GPU"
            ) from error

    def free(self, pointer: int) -> None:
        """Free device memory, after waiting until the GPU has finished with it."""
        self._check(self.aside(self._driver.cuMemFree, pointer), "cuMemFree")

    def pinned(self, size: int) -> ctypes.Array[ctypes.c_ubyte]:
        """Return ``size`` bytes (at least 1) of page-locked host memory, which live as long as the block or a view of it.

        They are not initialised. ``ctypes.addressof`` gives the address, under which the GPU can read and write them too
        where it shares the memory of the CPU. Every context of the process knows the memory.
        """
        made = self.aside(self._driver.cuMemHostAlloc, size, _PORTABLE | _MAPPED)
        pointer = int(self._check(made, "cuMemHostAlloc of %d bytes", size))
        block = (ctypes.c_ubyte * size).from_address(pointer)
        weakref.finalize(block, self._free_pinned, pointer).atexit = False
        return block

    def _free_pinned(self, pointer: int) -> None:
        if not sys.is_finalizing():
            # After a fault of the GPU nothing can be freed, and no caller is there to get the error.
            with contextlib.suppress(DeviceError), self:
                self._check(self.aside(self._driver.cuMemFreeHost, pointer), "cuMemFreeHost")

    def copy_in(self, to: int, source: int, size: int, stream: int) -> None:
        """Enqueue a copy from host to device. The host memory must stay until the stream is past the copy."""
        self._check(self._driver.cuMemcpyHtoDAsync(to, source, size, stream), "copying %d bytes to the GPU", size)

    def copy_out(self, to: int, source: int, size: int, stream: int) -> None:
        """Enqueue a copy from device to host. The host memory must stay until the stream is past the copy."""
        self._check(self._driver.cuMemcpyDtoHAsync(to, source, size, stream), "copying %d bytes from the GPU", size)

    def copy(self, to: int, source: int, size: int, stream: int) -> None:
        """Enqueue a copy from device to device."""
        self._check(self._driver.cuMemcpyDtoDAsync(to, source, size, stream), "copying %d bytes on the GPU", size)

    def copy_rows(self, to: int, source: int, rows: int, row_bytes: int, pitch: int, stream: int) -> None:
        """Enqueue a copy from device to device of rows that begin ``pitch`` bytes apart, and lie end to end afterwards."""
        plan, driver = self._driver.CUDA_MEMCPY2D(), self._driver
        plan.srcMemoryType = plan.dstMemoryType = driver.CUmemorytype.CU_MEMORYTYPE_DEVICE
        plan.srcDevice, plan.srcPitch = source, pitch
        plan.dstDevice, plan.dstPitch = to, row_bytes
        plan.WidthInBytes, plan.Height = row_bytes, rows
        self._check(driver.cuMemcpy2DAsync(plan, stream), "copying %d rows of %d bytes on the GPU", rows, row_bytes)

    def clear(self, pointer: int, size: int, stream: int) -> None:
        """Enqueue setting ``size`` bytes of device memory to zero."""
        self._check(self._driver.cuMemsetD8Async(pointer, 0, size, stream), "clearing %d bytes on the GPU", size)

    def new_stream(self) -> int:
        """Create a stream that runs beside the default stream, and return its handle."""
        return int(self._check(self._driver.cuStreamCreate(_NON_BLOCKING), "cuStreamCreate"))

    def free_stream(self, stream: int) -> None:
        """Destroy a stream. Work that is enqueued on it still runs."""
        self._check(self._driver.cuStreamDestroy(stream), "cuStreamDestroy")

    def stream_key(self, stream: int) -> StreamKey:
        """Return a key that identifies a stream among all others.

        It is 0 for the default stream, else derived from CUDA's number for the stream. No later stream with the same
        handle gets the same number.
        """
        if stream in (0, 1):
            return 0
        result = self._driver.cuStreamGetId(stream)
        if result[0]:
            self._check(result, "cuStreamGetId of %#x", stream)
        return 1 + int(result[1])

    def is_capturing(self, stream: int) -> bool:
        """Return whether work that is enqueued on a stream is captured, or refused because another stream captures."""
        result = self._driver.cuStreamIsCapturing(stream)
        if result[0]:
            if int(result[0]) == _CAPTURES_ELSEWHERE:
                return True
            self._check(result, "cuStreamIsCapturing of %#x", stream)
        return bool(result[1])

    def wait(self, stream: int) -> None:
        """Block until all work on a stream is done. An error of an earlier kernel is raised here."""
        self._check(self._driver.cuStreamSynchronize(stream), "waiting for the GPU")

    def handle(self, stream: int) -> Any:
        """Return a stream as the driver's library passes it on fastest, for a loop that uses it often."""
        return self._stream_type(stream)

    def new_event(self) -> Any:
        """Create an event without timing."""
        return self._check(self._driver.cuEventCreate(_DISABLE_TIMING), "cuEventCreate")

    def free_event(self, event: Any) -> None:
        """Destroy an event."""
        self._check(self._driver.cuEventDestroy(event), "cuEventDestroy")

    def record(self, event: Any, stream: int) -> None:
        """Record an event behind the work that is on a stream now."""
        result = self._driver.cuEventRecord(event, stream)
        if result[0]:
            self._check(result, "cuEventRecord")

    def follow(self, stream: int, event: Any) -> None:
        """Make work that is enqueued on a stream from now on wait for an event. Nothing blocks here."""
        self._check(self._driver.cuStreamWaitEvent(stream, event, 0), "cuStreamWaitEvent")

    def wait_for(self, event: Any) -> None:
        """Block until an event has happened."""
        self._check(self._driver.cuEventSynchronize(event), "cuEventSynchronize")

    def happened(self, event: Any) -> bool:
        """Return whether an event has happened. It does not raise an error of the GPU."""
        return not self.aside(self._driver.cuEventQuery, event)[0]

    def capture(self, stream: int, enqueue: Callable[[], None]) -> Any:
        """Record what ``enqueue`` puts on a stream as a CUDA graph, and return the graph for ``launch``.

        Nothing of it runs now. The stream must not be a default one. Raises what ``enqueue`` raises, and DeviceError
        for what cannot be captured. The stream stays usable.
        """
        # In relaxed mode, this thread's garbage collection or another thread may free memory meanwhile.
        self._check(self._driver.cuStreamBeginCapture(stream, self._relaxed), "cuStreamBeginCapture")
        try:
            try:
                enqueue()
            finally:  # it usually fails if the capture was aborted
                ended = self._driver.cuStreamEndCapture(stream)
            graph = self._check(ended, "cuStreamEndCapture")
            return self._check(self._driver.cuGraphInstantiate(graph, 0), "cuGraphInstantiate")
        finally:
            if not ended[0] and int(ended[1]):
                self._driver.cuGraphDestroy(ended[1])

    def launch(self, graph: Any, stream: int) -> None:
        """Enqueue a graph on a stream."""
        result = self._driver.cuGraphLaunch(graph, stream)
        if result[0]:
            self._check(result, "cuGraphLaunch")

    def free_graph(self, graph: Any) -> None:
        """Destroy a graph."""
        self._check(self._driver.cuGraphExecDestroy(graph), "cuGraphExecDestroy")

    def elsewhere(self, pointer: int) -> str:
        """Return where memory is that kernels of this GPU cannot use, as a phrase; empty if they can use it."""
        result = self._driver.cuPointerGetAttribute(self._attributes.CU_POINTER_ATTRIBUTE_CONTEXT, pointer)
        if result[0]:
            if int(result[0]) == _INVALID_VALUE:
                return "host memory"
            self._check(result, "cuPointerGetAttribute of %#x", pointer)
        context = int(result[1])
        if context == self._context:
            return ""
        result = self._driver.cuPointerGetAttribute(self._attributes.CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL, pointer)
        on = int(self._check(result, "cuPointerGetAttribute of %#x", pointer))
        if on != self.gpu:
            return f"cuda:{on}"
        # Memory of a pool belongs to no context.
        return (
            f"a context of cuda:{on} that is not its primary one (pycuda.autoprimaryctx makes that)" if context else ""
        )

    def page_locked(self, address: int, size: int) -> int | None:
        """Return the GPU's address of ``size`` bytes of page-locked host memory; None for memory that it does not reach.

        Memory of which a library has page-locked only the beginning is not reached.
        """
        attribute, last = self._attributes.CU_POINTER_ATTRIBUTE_DEVICE_POINTER, address + size - 1
        start = self._driver.cuPointerGetAttribute(attribute, address)
        if start[0]:
            return None
        end = self._driver.cuPointerGetAttribute(attribute, last)
        return int(start[1]) if not end[0] and int(end[1]) - int(start[1]) == last - address else None

    def _check(self, result: Any, what: str, *values: object) -> Any:
        if result[0]:
            checked(self._driver, result, what, *values)
        return result[1] if len(result) > 1 else None


def open_memory(gpu: int, backend: MemoryBackend | None = None) -> GpuMemory:
    """Return the memory of the GPU with index ``gpu``, the same object for every caller.

    ``backend``: None for cuda-bindings, or pycuda if that is missing. Raises MissingDependencyError, with the command
    that installs the library, and DeviceError if CUDA refuses.
    """
    if backend not in (None, "cuda-bindings", "pycuda"):
        raise InputError(f"memory must be 'cuda-bindings' or 'pycuda', got {backend!r}")
    if backend is not None:
        return _opened(gpu, backend)
    try:
        return _opened(gpu, "cuda-bindings")
    except MissingDependencyError as error:
        try:
            return _opened(gpu, "pycuda")
        except MissingDependencyError:
            raise error from None


@functools.cache
def _opened(gpu: int, backend: MemoryBackend) -> GpuMemory:
    return GpuMemory(gpu, _cuda_bindings() if backend == "cuda-bindings" else _pycuda(), backend)


def _cuda_bindings() -> Any:
    try:
        return importlib.import_module("cuda.bindings.driver")
    except ImportError as error:
        # Do not advise the extra: it installs TensorRT too, which is wrong on a Jetson and beside TensorRT-RTX.
        fix = "pip install 'cuda-bindings==12.*', or 13.* where the driver serves CUDA 13 (edge-backbones doctor tells)"
        raise MissingDependencyError("memory on the GPU (cuda-bindings is missing)", "tensorrt", fix=fix) from error


def _pycuda() -> Any:
    """Return the driver for a program that uses pycuda, which lacks functions for the streams of other libraries."""
    with needing("memory on the GPU through pycuda", "pycuda"):
        importlib.import_module("pycuda.driver")
    return gpus.CtypesDriver(gpus.load_driver())


def readable(size: int) -> str:
    """Return a number of bytes as text: ``123.4 MB``."""
    for unit, factor in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if size >= factor:
            return f"{size / factor:.1f} {unit}"
    return f"{size} bytes"
