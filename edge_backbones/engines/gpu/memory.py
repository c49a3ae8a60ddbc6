"""Manage the memory, streams, events and graphs of one GPU.

Together with machine/gpus.py, which finds GPUs, this is all that touches CUDA. It uses cuda-bindings or pycuda. Both
work in the GPU's primary context, which torch, cupy and TensorRT use too, so it does not matter which library comes
first. The context is current only inside ``with memory:``; afterwards the previous context is current again.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib
import sys
import threading
import weakref
from collections.abc import Callable
from types import TracebackType
from typing import Any, Literal, Protocol

from edge_backbones.engines.gpu.streams import StreamKey, stream_key
from edge_backbones.errors import DeviceError, InputError, MissingDependencyError, OutOfMemoryError
from edge_backbones.machine import gpus
from edge_backbones.machine.gpus import checked

MemoryBackend = Literal["cuda-bindings", "pycuda"]

_INVALID_VALUE, _CAPTURES_ELSEWHERE = 1, 906
_HOST = 1  # CU_MEMORYTYPE_HOST
_PORTABLE, _MAPPED, _NON_BLOCKING, _DISABLE_TIMING = 1, 2, 1, 2
# Nobody may wait for a context while one of its streams captures (CUDA programming guide, "Prohibited and Unhandled
# Operations").
_capturing = threading.RLock()


class Backend(Protocol):
    """Do what cuda-bindings and pycuda each do in their own way. Everything else goes to ``driver``.

    ``context``: handle of the GPU's primary context.

    Pointers and streams are ints. ``allocate``, ``free`` and the stream functions need the primary context to be
    current.
    """

    name: MemoryBackend
    driver: Any
    context: int

    @property
    def push(self) -> Callable[[], tuple[Any, ...]]:
        """Make the primary context current in this thread, on top of the current one; return (code, value...)."""
        ...

    @property
    def pop(self) -> Callable[[], tuple[Any, ...]]:
        """Make the context current again that was current before ``push``; return (code, value...)."""
        ...

    def allocate(self, size: int) -> int:
        """Allocate ``size`` bytes of device memory and return the pointer, a multiple of 256. Raises OutOfMemoryError."""
        ...

    def free(self, pointer: int) -> None:
        """Free device memory, after the GPU has finished with it."""
        ...

    def new_stream(self) -> int:
        """Create a stream that does not wait for the default stream."""
        ...

    def free_stream(self, stream: int) -> None:
        """Destroy a stream. Work that is enqueued on it still runs."""
        ...


class CudaBindings:
    """Use NVIDIA's cuda-bindings. ``driver`` is ``cuda.bindings.driver``, or an object with its functions."""

    name: MemoryBackend = "cuda-bindings"

    def __init__(self, gpu: int, driver: Any) -> None:
        self.driver = driver
        self._check(driver.cuInit(0), "cuInit")
        handle = self._check(driver.cuDeviceGet(gpu), "cuDeviceGet of GPU %d", gpu)
        context = self._check(driver.cuDevicePrimaryCtxRetain(handle), "cuDevicePrimaryCtxRetain of GPU %d", gpu)
        self.context = int(context)
        # Every call makes both: they are the driver's own functions, without a step of ours between.
        self.push: Callable[[], tuple[Any, ...]] = functools.partial(driver.cuCtxPushCurrent, context)
        self.pop: Callable[[], tuple[Any, ...]] = driver.cuCtxPopCurrent

    def allocate(self, size: int) -> int:
        """Allocate device memory, as described in `Backend`."""
        return int(self._check(self.driver.cuMemAlloc(size), "cuMemAlloc of %d bytes", size))

    def free(self, pointer: int) -> None:
        """Free device memory, as described in `Backend`."""
        self._check(self.driver.cuMemFree(pointer), "cuMemFree")

    def new_stream(self) -> int:
        """Create a stream, as described in `Backend`."""
        return int(self._check(self.driver.cuStreamCreate(_NON_BLOCKING), "cuStreamCreate"))

    def free_stream(self, stream: int) -> None:
        """Destroy a stream, as described in `Backend`."""
        self._check(self.driver.cuStreamDestroy(stream), "cuStreamDestroy")

    def _check(self, result: Any, what: str, *values: object) -> Any:
        return checked(self.driver, result, what, *values)


class PyCuda:
    """Use pycuda in the primary context, which is pushed and popped around every use.

    It never creates a context of its own. pycuda manages the context, device memory and streams. What it cannot do
    (foreign streams, events on them, graphs) goes to the same driver through ctypes. ``library`` is ``pycuda.driver``.
    """

    name: MemoryBackend = "pycuda"

    def __init__(self, gpu: int, library: Any, driver: Any) -> None:
        self.driver = driver
        self._library = library
        self._held: dict[int, Any] = {}  # keeps pycuda's objects alive, which free their memory when they are collected
        with self._typed("pycuda.driver.init"):
            library.init()
            # Kept for good, because pycuda detaches a primary context in a way that leaves it current.
            self._context = library.Device(gpu).retain_primary_context()
        self.context = int(self._context.handle)

    def push(self) -> tuple[Any, ...]:
        """Make the primary context current, as described in `Backend`."""
        with self._typed("Context.push"):
            self._context.push()
        return (0,)

    def pop(self) -> tuple[Any, ...]:
        """Make the previous context current, as described in `Backend`."""
        with self._typed("Context.pop"):
            self._context.pop()
        return (0,)

    def allocate(self, size: int) -> int:
        """Allocate device memory, as described in `Backend`."""
        with self._typed(f"mem_alloc of {size} bytes"):
            held = self._library.mem_alloc(size)
        self._held[int(held)] = held
        return int(held)

    def free(self, pointer: int) -> None:
        """Free device memory, as described in `Backend`."""
        with self._typed("DeviceAllocation.free"):
            self._held.pop(pointer).free()

    def new_stream(self) -> int:
        """Create a stream, as described in `Backend`."""
        with self._typed("Stream"):
            held = self._library.Stream(_NON_BLOCKING)
        self._held[int(held.handle)] = held
        return int(held.handle)

    def free_stream(self, stream: int) -> None:
        """Destroy a stream, as described in `Backend`."""
        del self._held[stream]  # this destroys the stream, because the context is current

    @contextlib.contextmanager
    def _typed(self, what: str) -> Any:
        """Turn pycuda's errors into DeviceError, or OutOfMemoryError if memory ran out.

        ``what``: the call, for the message.
        """
        try:
            yield
        except self._library.MemoryError as error:
            raise OutOfMemoryError(f"{what} failed: {error}") from error
        except self._library.Error as error:
            raise DeviceError(f"{what} failed: {error}") from error


class GpuMemory:
    """Manage the memory, streams, events and graphs of one GPU. Call its methods inside ``with memory:``.

    Pointers and streams are plain ints, as in CUDA; events and graphs are what the driver's library makes. Streams of other
    libraries work too; 0 is the default stream. If CUDA refuses a call, it raises DeviceError with CUDA's name of the
    error, or OutOfMemoryError if memory ran out. Threads may share it.
    """

    def __init__(self, gpu: int, backend: Backend) -> None:
        driver = backend.driver
        self.gpu = gpu
        self.backend = backend.name
        self._backend = backend
        self._push, self._pop = backend.push, backend.pop
        self._driver = driver
        self._stream_type = getattr(driver, "CUstream", int)
        self._relaxed = driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED
        self._attributes = driver.CUpointer_attribute
        try:
            self._stream_id = driver.cuStreamGetId
        except (AttributeError, DeviceError):  # bindings and drivers before CUDA 12 lack it
            self._stream_id = None
        # CUDA 11's cuGraphInstantiate takes other arguments; the bindings of CUDA 13 have no other name for it.
        self._instantiate = getattr(driver, "cuGraphInstantiateWithFlags", None) or driver.cuGraphInstantiate

    def __enter__(self) -> GpuMemory:
        result = self._push()
        if result[0]:
            self._check(result, "cuCtxPushCurrent")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            result = self._pop()
            if result[0]:
                self._check(result, "cuCtxPopCurrent")
        except DeviceError:
            if error is None:  # otherwise the first error is the one to raise
                raise

    def allocate(self, size: int) -> int:
        """Allocate ``size`` bytes (at least 1) of device memory, aligned to 256 bytes, and return the pointer.

        Raises OutOfMemoryError, which says how much memory is free.
        """
        try:
            return self._backend.allocate(size)
        except OutOfMemoryError as error:
            code, *amounts = self._driver.cuMemGetInfo()
            known = "" if int(code) else f"; {readable(amounts[0])} of {readable(amounts[1])} are free"
            raise OutOfMemoryError(
                f"cuda:{self.gpu} has no {readable(size)} left ({error}){known}: run smaller batches or fewer threads, "
                "or end what else uses this GPU"
            ) from error

    def free(self, pointer: int) -> None:
        """Free device memory, after waiting until the GPU has finished with it."""
        self._backend.free(pointer)

    def pinned(self, size: int) -> ctypes.Array[ctypes.c_ubyte]:
        """Return ``size`` bytes (at least 1) of page-locked host memory, which live as long as the block or a view of it.

        They are not initialised. ``ctypes.addressof`` gives the address, under which the GPU can read and write them too
        where it shares the memory of the CPU. Every context of the process knows the memory.
        """
        flags = _PORTABLE | _MAPPED
        pointer = int(self._check(self._driver.cuMemHostAlloc(size, flags), "cuMemHostAlloc of %d bytes", size))
        block = (ctypes.c_ubyte * size).from_address(pointer)
        weakref.finalize(block, self._free_pinned, pointer).atexit = False
        return block

    def _free_pinned(self, pointer: int) -> None:
        if not sys.is_finalizing():
            # After a fault of the GPU nothing can be freed, and no caller is there to get the error.
            with contextlib.suppress(DeviceError), self:
                self._check(self._driver.cuMemFreeHost(pointer), "cuMemFreeHost")

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
        return self._backend.new_stream()

    def free_stream(self, stream: int) -> None:
        """Destroy a stream. Work that is enqueued on it still runs."""
        self._backend.free_stream(stream)

    def stream_key(self, stream: int) -> StreamKey:
        """Return a key that identifies a stream among all others.

        It is 0 for the default stream, else derived from CUDA's number for the stream. No later stream with the same
        handle gets the same number. Before CUDA 12 the key is the handle, and whoever destroys a stream must wait for
        it first.
        """
        if stream in (0, 1):
            return 0
        if self._stream_id is None:
            return stream_key(stream, threading.get_ident())
        result = self._stream_id(stream)
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
        return int(result[1]) != 0

    def wait(self, stream: int) -> None:
        """Block until all work on a stream is done. An error of an earlier kernel is raised here."""
        self._check(self._driver.cuStreamSynchronize(stream), "waiting for the GPU")

    def wait_for_all(self) -> None:
        """Block until all work on every stream of the context is done."""
        with _capturing:
            self._check(self._driver.cuCtxSynchronize(), "waiting for every stream of the GPU")

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
        return not self._driver.cuEventQuery(event)[0]

    def capture(self, stream: int, enqueue: Callable[[], None]) -> Any:
        """Record what ``enqueue`` puts on a stream as a CUDA graph, and return the graph for ``launch``.

        Nothing of it runs now. The stream must not be a default one. Raises what ``enqueue`` raises, and DeviceError
        for what cannot be captured. The stream stays usable.
        """
        with _capturing:
            # In relaxed mode, this thread's garbage collection or another thread may free memory meanwhile.
            self._check(self._driver.cuStreamBeginCapture(stream, self._relaxed), "cuStreamBeginCapture")
            try:
                enqueue()
            except BaseException:
                code, graph = self._driver.cuStreamEndCapture(stream)  # usually fails, because the capture was aborted
                if not int(code) and int(graph):
                    self._driver.cuGraphDestroy(graph)
                raise
            graph = self._check(self._driver.cuStreamEndCapture(stream), "cuStreamEndCapture")
        try:
            executable = self._check(self._instantiate(graph, 0), "cuGraphInstantiate")
        except DeviceError:
            self._driver.cuGraphDestroy(graph)  # ignore a second error: the first one is raised
            raise
        try:
            self._check(self._driver.cuGraphDestroy(graph), "cuGraphDestroy")
        except DeviceError:
            self._driver.cuGraphExecDestroy(executable)
            raise
        return executable

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
        if context == self._backend.context:
            return ""
        result = self._driver.cuPointerGetAttribute(self._attributes.CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL, pointer)
        on = int(self._check(result, "cuPointerGetAttribute of %#x", pointer))
        if on != self.gpu:
            return f"cuda:{on}"
        # Memory of a pool belongs to no context.
        return (
            f"a context of cuda:{on} that is not its primary one (pycuda.autoprimaryctx makes that)" if context else ""
        )

    def page_locked(self, address: int) -> int | None:
        """Return the GPU's address of page-locked host memory; None for memory of another kind, and where it has none."""
        result = self._driver.cuPointerGetAttribute(self._attributes.CU_POINTER_ATTRIBUTE_MEMORY_TYPE, address)
        if result[0] or int(result[1]) != _HOST:
            return None
        result = self._driver.cuPointerGetAttribute(self._attributes.CU_POINTER_ATTRIBUTE_DEVICE_POINTER, address)
        return None if result[0] else int(result[1])

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


@functools.cache  # keeps the primary context, because arrays of callers may outlive every session
def _opened(gpu: int, backend: MemoryBackend) -> GpuMemory:
    if backend == "cuda-bindings":
        return GpuMemory(gpu, CudaBindings(gpu, _cuda_bindings()))
    return GpuMemory(gpu, PyCuda(gpu, _pycuda(), gpus.CtypesDriver(gpus.load_driver())))


def _cuda_bindings() -> Any:
    for name in ("cuda.bindings.driver", "cuda.cuda"):  # the second name is that of releases before 12.6
        try:
            return importlib.import_module(name)
        except ImportError:
            continue
    # Do not advise the extra: it installs TensorRT too, which is wrong on a Jetson and beside TensorRT-RTX.
    fix = "pip install 'cuda-bindings==12.*', or 13.* where the driver serves CUDA 13 (edge-backbones doctor tells)"
    raise MissingDependencyError("memory on the GPU (cuda-bindings is missing)", "tensorrt", fix=fix)


def _pycuda() -> Any:
    try:
        return importlib.import_module("pycuda.driver")
    except ImportError as error:
        raise MissingDependencyError("memory on the GPU through pycuda", "pycuda") from error


def readable(size: int) -> str:
    """Return a number of bytes as text: ``123.4 MB``."""
    for unit, factor in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if size >= factor:
            return f"{size / factor:.1f} {unit}"
    return f"{size} bytes"
