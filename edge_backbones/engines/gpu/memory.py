"""The memory, streams, events and graphs of one GPU. With machine/gpu.py, which finds GPUs, all that touches CUDA.

This takes cuda-bindings or pycuda. Both work in the GPU's
primary context, which is the one of torch, cupy and TensorRT, so it does not matter who came first; the context is current
only inside ``with memory:`` and what was current before is current again afterwards.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib
import math
import sys
import threading
import weakref
from collections.abc import Callable
from types import TracebackType
from typing import Any, Literal, Protocol

import numpy as np

from edge_backbones.engines.gpu.streams import StreamKey, stream_key
from edge_backbones.errors import DeviceError, InputError, MissingDependencyError, OutOfMemoryError
from edge_backbones.machine import gpus
from edge_backbones.machine.gpus import checked

MemoryBackend = Literal["cuda-bindings", "pycuda"]

_INVALID_VALUE = 1
_PORTABLE, _NON_BLOCKING, _DISABLE_TIMING = 1, 1, 2
# While a stream captures, its context must not be waited for (CUDA programming guide, "Prohibited and Unhandled Operations").
_capturing = threading.RLock()


class Backend(Protocol):
    """What cuda-bindings and pycuda do each in their own way; ``driver`` is called for everything else."""

    name: MemoryBackend
    driver: Any

    def push(self) -> None:
        """Make the primary context current in this thread, over what is current now."""
        ...

    def pop(self) -> None:
        """Make current again what was current before ``push``."""
        ...

    def allocate(self, size: int) -> int:
        """Device memory of ``size`` bytes: its pointer, a multiple of 256."""
        ...

    def free(self, pointer: int) -> None:
        """Give device memory back, once the GPU has done with it."""
        ...

    def new_stream(self) -> int:
        """A stream that does not wait for the default stream."""
        ...

    def free_stream(self, stream: int) -> None: ...


class CudaBindings:
    """NVIDIA's cuda-bindings. ``driver`` is ``cuda.bindings.driver``, or what has its functions."""

    name: MemoryBackend = "cuda-bindings"

    def __init__(self, gpu: int, driver: Any) -> None:
        self.driver = driver
        self._check(driver.cuInit(0), "cuInit")
        handle = self._check(driver.cuDeviceGet(gpu), "cuDeviceGet of GPU %d", gpu)
        self._context = self._check(driver.cuDevicePrimaryCtxRetain(handle), "cuDevicePrimaryCtxRetain of GPU %d", gpu)

    def push(self) -> None:
        self._check(self.driver.cuCtxPushCurrent(self._context), "cuCtxPushCurrent")

    def pop(self) -> None:
        self._check(self.driver.cuCtxPopCurrent(), "cuCtxPopCurrent")

    def allocate(self, size: int) -> int:
        return int(self._check(self.driver.cuMemAlloc(size), "cuMemAlloc of %d bytes", size))

    def free(self, pointer: int) -> None:
        self._check(self.driver.cuMemFree(pointer), "cuMemFree")

    def new_stream(self) -> int:
        return int(self._check(self.driver.cuStreamCreate(_NON_BLOCKING), "cuStreamCreate"))

    def free_stream(self, stream: int) -> None:
        self._check(self.driver.cuStreamDestroy(stream), "cuStreamDestroy")

    def _check(self, result: Any, what: str, *values: object) -> Any:
        return checked(self.driver, result, what, *values)


class PyCuda:
    """pycuda in the primary context, pushed and popped around every use: it never makes a context of its own.

    Context, device memory and streams are pycuda's. What it cannot do (streams of others, events on them, graphs) goes to
    the same driver through ctypes. ``library`` is ``pycuda.driver``.
    """

    name: MemoryBackend = "pycuda"

    def __init__(self, gpu: int, library: Any, driver: Any) -> None:
        self.driver = driver
        self._library = library
        self._held: dict[int, Any] = {}  # pycuda frees what nobody holds
        with self._typed("pycuda.driver.init"):
            library.init()
            # Kept for good: pycuda detaches a primary context in a way that leaves it current.
            self._context = library.Device(gpu).retain_primary_context()

    def push(self) -> None:
        with self._typed("Context.push"):
            self._context.push()

    def pop(self) -> None:
        with self._typed("Context.pop"):
            self._context.pop()

    def allocate(self, size: int) -> int:
        with self._typed(f"mem_alloc of {size} bytes"):
            held = self._library.mem_alloc(size)
        self._held[int(held)] = held
        return int(held)

    def free(self, pointer: int) -> None:
        with self._typed("DeviceAllocation.free"):
            self._held.pop(pointer).free()

    def new_stream(self) -> int:
        with self._typed("Stream"):
            held = self._library.Stream(_NON_BLOCKING)
        self._held[int(held.handle)] = held
        return int(held.handle)

    def free_stream(self, stream: int) -> None:
        del self._held[stream]  # which destroys it: the context is current

    @contextlib.contextmanager
    def _typed(self, what: str) -> Any:
        try:
            yield
        except self._library.MemoryError as error:
            raise OutOfMemoryError(f"{what} failed: {error}") from error
        except self._library.Error as error:
            raise DeviceError(f"{what} failed: {error}") from error


class Memory:
    """Memory, streams, events and graphs of one GPU. Everything but entering is called inside ``with memory:``.

    Pointers, streams and events are plain ints, as CUDA has them; streams of others do too, 0 is the default stream. Every
    refusal of CUDA is a DeviceError with CUDA's name for it, OutOfMemoryError where memory ran out. Threads may share it.
    """

    def __init__(self, gpu: int, backend: Backend) -> None:
        driver = backend.driver
        self.gpu = gpu
        self.backend = backend.name
        self._backend = backend
        self._driver = driver
        self._relaxed = driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED
        self._ordinal = driver.CUpointer_attribute.CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL
        try:
            self._stream_id = driver.cuStreamGetId
        except (AttributeError, DeviceError):  # bindings and drivers before CUDA 12
            self._stream_id = None
        # CUDA 11's cuGraphInstantiate takes other arguments, and the bindings of 13 have it alone.
        self._instantiate = getattr(driver, "cuGraphInstantiateWithFlags", None) or driver.cuGraphInstantiate

    def __enter__(self) -> Memory:
        self._backend.push()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._backend.pop()
        except DeviceError:
            if error is None:  # else the first failure is the one to tell
                raise

    def allocate(self, size: int) -> int:
        """Device memory of ``size`` bytes (at least 1), aligned to 256."""
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
        """Give device memory back; waits until the GPU has done with it."""
        self._backend.free(pointer)

    def pinned(self, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        """An uninitialised array in page-locked host memory, which lives as long as it or a view of it does."""
        size = max(1, math.prod(shape) * np.dtype(dtype).itemsize)
        pointer = int(self._check(self._driver.cuMemHostAlloc(size, _PORTABLE), "cuMemHostAlloc of %d bytes", size))
        block = (ctypes.c_ubyte * size).from_address(pointer)
        # Not an array underneath: numpy would make it, and not the array that is returned, the base of further views.
        weakref.finalize(block, self._free_pinned, pointer).atexit = False
        return np.ndarray(shape, dtype, buffer=block)

    def _free_pinned(self, pointer: int) -> None:
        if not sys.is_finalizing():
            with (
                contextlib.suppress(DeviceError),
                self,
            ):  # after a fault of the GPU nothing can be freed, nor anyone told
                self._check(self._driver.cuMemFreeHost(pointer), "cuMemFreeHost")

    def copy_in(self, to: int, source: int, size: int, stream: int) -> None:
        """Host to device, enqueued; the host memory must stay until the stream is past it."""
        self._check(self._driver.cuMemcpyHtoDAsync(to, source, size, stream), "copying %d bytes to the GPU", size)

    def copy_out(self, to: int, source: int, size: int, stream: int) -> None:
        """Device to host, enqueued."""
        self._check(self._driver.cuMemcpyDtoHAsync(to, source, size, stream), "copying %d bytes from the GPU", size)

    def copy(self, to: int, source: int, size: int, stream: int) -> None:
        """Device to device, enqueued."""
        self._check(self._driver.cuMemcpyDtoDAsync(to, source, size, stream), "copying %d bytes on the GPU", size)

    def clear(self, pointer: int, size: int, stream: int) -> None:
        """Set device memory to zero, enqueued."""
        self._check(self._driver.cuMemsetD8Async(pointer, 0, size, stream), "clearing %d bytes on the GPU", size)

    def new_stream(self) -> int:
        """A stream that runs beside the default stream."""
        return self._backend.new_stream()

    def free_stream(self, stream: int) -> None:
        """Give a stream back; what is enqueued on it still runs."""
        self._backend.free_stream(stream)

    def stream_key(self, stream: int) -> StreamKey:
        """What tells a stream from every other: 0 for the default stream, else CUDA's number, which no later stream with the
        same handle gets. Before CUDA 12 it is the handle, and whoever destroys a stream first has to wait for it."""
        if stream in (0, 1):
            return 0
        if self._stream_id is None:
            return stream_key(stream, threading.get_ident())
        return 1 + int(self._check(self._stream_id(stream), "cuStreamGetId of %#x", stream))

    def wait(self, stream: int) -> None:
        """Block until everything on a stream is done; a fault of an earlier kernel comes up here."""
        self._check(self._driver.cuStreamSynchronize(stream), "waiting for the GPU")

    def wait_for_all(self) -> None:
        """Block until every stream of the context is done."""
        with _capturing:
            self._check(self._driver.cuCtxSynchronize(), "waiting for every stream of the GPU")

    def new_event(self) -> int:
        return int(self._check(self._driver.cuEventCreate(_DISABLE_TIMING), "cuEventCreate"))

    def free_event(self, event: int) -> None:
        self._check(self._driver.cuEventDestroy(event), "cuEventDestroy")

    def record(self, event: int, stream: int) -> None:
        """Let an event stand for what is on a stream now."""
        self._check(self._driver.cuEventRecord(event, stream), "cuEventRecord")

    def follow(self, stream: int, event: int) -> None:
        """Let what is enqueued on a stream from now on run after an event; nothing blocks here."""
        self._check(self._driver.cuStreamWaitEvent(stream, event, 0), "cuStreamWaitEvent")

    def wait_for(self, event: int) -> None:
        """Block until an event has happened."""
        self._check(self._driver.cuEventSynchronize(event), "cuEventSynchronize")

    def happened(self, event: int) -> bool:
        """Has an event happened? A fault of the GPU is not told here."""
        return not int(self._driver.cuEventQuery(event)[0])

    def capture(self, stream: int, enqueue: Callable[[], None]) -> Any:
        """What ``enqueue`` puts on a stream, as a graph to launch; nothing of it runs now. The stream is not a default one.

        Raises what ``enqueue`` raises, and DeviceError for what cannot be captured; the stream is usable afterwards.
        """
        with _capturing:
            # Relaxed: memory that is freed meanwhile, by this thread's garbage collection or another thread, breaks nothing.
            self._check(self._driver.cuStreamBeginCapture(stream, self._relaxed), "cuStreamBeginCapture")
            try:
                enqueue()
            except BaseException:
                code, graph = self._driver.cuStreamEndCapture(
                    stream
                )  # which fails as a rule: the capture was broken off
                if not int(code) and int(graph):
                    self._driver.cuGraphDestroy(graph)
                raise
            graph = self._check(self._driver.cuStreamEndCapture(stream), "cuStreamEndCapture")
        try:
            executable = self._check(self._instantiate(graph, 0), "cuGraphInstantiate")
        except DeviceError:
            self._driver.cuGraphDestroy(graph)  # the failure to tell is the first
            raise
        try:
            self._check(self._driver.cuGraphDestroy(graph), "cuGraphDestroy")
        except DeviceError:
            self._driver.cuGraphExecDestroy(executable)
            raise
        return executable

    def launch(self, graph: Any, stream: int) -> None:
        """Enqueue a graph."""
        self._check(self._driver.cuGraphLaunch(graph, stream), "cuGraphLaunch")

    def free_graph(self, graph: Any) -> None:
        self._check(self._driver.cuGraphExecDestroy(graph), "cuGraphExecDestroy")

    def gpu_of(self, pointer: int) -> int | None:
        """Index of the GPU on which a pointer is valid; None for memory that CUDA does not know."""
        result = self._driver.cuPointerGetAttribute(self._ordinal, pointer)
        if int(result[0]) == _INVALID_VALUE:
            return None
        return int(self._check(result, "cuPointerGetAttribute of %#x", pointer))

    def _check(self, result: Any, what: str, *values: object) -> Any:
        if result[0]:
            checked(self._driver, result, what, *values)
        return result[1] if len(result) > 1 else None


def open_memory(gpu: int, backend: MemoryBackend | None = None) -> Memory:
    """The memory of one GPU, the same object for every caller; without ``backend`` cuda-bindings, else pycuda.

    Raises MissingDependencyError with the command that installs it, DeviceError when CUDA refuses.
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


@functools.cache  # the primary context stays retained: what callers hold may outlive every session
def _opened(gpu: int, backend: MemoryBackend) -> Memory:
    if backend == "cuda-bindings":
        return Memory(gpu, CudaBindings(gpu, _cuda_bindings()))
    return Memory(gpu, PyCuda(gpu, _pycuda(), gpus.CtypesDriver(gpus.load_driver())))


def _cuda_bindings() -> Any:
    for name in ("cuda.bindings.driver", "cuda.cuda"):  # the second: before 12.6
        try:
            return importlib.import_module(name)
        except ImportError:
            continue
    # Not the extra, which brings TensorRT too: on a Jetson, and beside TensorRT-RTX, that is the wrong one.
    fix = "pip install 'cuda-bindings==12.*', or 13.* where the driver serves CUDA 13 (edge-backbones doctor tells)"
    raise MissingDependencyError("memory on the GPU (cuda-bindings is missing)", "tensorrt", fix=fix)


def _pycuda() -> Any:
    try:
        return importlib.import_module("pycuda.driver")
    except ImportError as error:
        raise MissingDependencyError("memory on the GPU through pycuda", "pycuda") from error


def readable(size: int) -> str:
    """Bytes for a message: ``123.4 MB``."""
    for unit, factor in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if size >= factor:
            return f"{size / factor:.1f} {unit}"
    return f"{size} bytes"
