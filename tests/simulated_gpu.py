"""A TensorRT and a GPU in Python that keep the rules of the real ones, for tests of what runs on them.

The GPU runs nothing before somebody waits for it: whoever reads too early, writes over what is still to be read or frees
what is still in use gets a wrong value or a line in ``violations``. The network is average pooling.
"""

from __future__ import annotations

import ctypes
import enum
import gc
import itertools
import json
import math
import threading
import weakref
from collections import Counter, deque
from types import SimpleNamespace

import numpy as np

from edge_backbones.engines.gpu import memory as cuda
from edge_backbones.engines.gpu.dlpack import ForeignArray
from edge_backbones.engines.tensorrt import compile as tensorrt_compile
from edge_backbones.engines.tensorrt import library as tensorrt_library
from edge_backbones.engines.tensorrt import session as tensorrt_session
from edge_backbones.engines.tensorrt.session import TensorRtSession
from edge_backbones.machine import gpus, hosts
from edge_backbones.spec import ShapeRange
from edge_backbones.testing import SPEC, pooled, pooling_input
from tests.simulated_builder import GRAPH

STREAM, OTHER = 0x9001, 0x9002  # of callers
SILENT = ("cuMemFreeHost", "cuEventDestroy", "cuEventQuery", "cuCtxPushCurrent", "cuCtxPopCurrent")
FREES = ("cuMemFree", "cuMemFreeHost", "cuStreamDestroy", "cuEventDestroy", "cuGraphDestroy", "cuGraphExecDestroy")


class Mark:
    """One record of an event: done once its stream has come to it."""

    def __init__(self, stream) -> None:
        self.stream, self.done = stream, False


class NumpyGpu:
    """A GPU with the functions of ``cuda.bindings.driver``, over bytes. Streams are queues that run when waited for."""

    class CUstreamCaptureMode(enum.IntEnum):
        CU_STREAM_CAPTURE_MODE_RELAXED = 2

    class CUpointer_attribute(enum.IntEnum):
        CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL = 9

    def __init__(self, memory=1 << 30) -> None:
        self.lock = threading.RLock()
        self.numbers = itertools.count(1)
        self.memory: dict[int, bytearray] = {}
        self.host: dict[int, ctypes.Array] = {}
        self.streams: dict[int, deque] = {0: deque(), STREAM: deque(), OTHER: deque()}
        self.generations: Counter[int] = Counter()  # of streams whose handle was given out again
        self.events: dict[int, Mark | None] = {}
        self.graphs: dict[int, list] = {}
        self.executables: dict[int, list] = {}
        self.capturing: dict[int, list | None] = {}
        self.contexts = threading.local()
        self.size, self.other_device = memory, set()
        self.calls: list[str] = []
        self.fail_at: int | None = None  # number of the native call, of CUDA's or TensorRT's, that fails
        self.failed: str | None = None
        self.fail_names: dict[str, int] = {}
        self.violations: list[str] = []

    # -- what the tests use

    def recreate(self, stream) -> int:
        """The owner destroys a stream with work pending, and the next stream gets its handle. Where the work is now."""
        with self.lock:
            old = next(self.numbers)
            self.streams[old], self.streams[stream] = self.streams[stream], deque()
            for mark in (what for _, what, _ in self.streams[old] if isinstance(what, Mark) and what.stream == stream):
                mark.stream = old
            self.generations[stream] += 1
            return old

    def put(self, array: np.ndarray, offset: int = 0) -> ForeignArray:
        pointer = self.raw(array.nbytes + offset) + offset
        self.bytes_at(pointer, array.nbytes)[:] = array.tobytes()
        return ForeignArray(pointer, array.shape, array.dtype, 0, True, False, owner=object())

    def raw(self, size: int) -> int:
        pointer = 0x70_0000_0000 + next(self.numbers) * (1 << 30)
        self.memory[pointer] = bytearray(b"\xee" * size)
        return pointer

    def value(self, array, stream) -> np.ndarray:
        """What work on ``stream`` that comes now would read."""
        self.drain(stream)
        return np.frombuffer(bytes(self.bytes_at(array.pointer, array.nbytes)), array.dtype).reshape(array.shape)

    def bytes_at(self, pointer: int, size: int) -> memoryview:
        for start, block in self.memory.items():
            if start <= pointer < start + len(block):
                if pointer + size > start + len(block):
                    self.violations.append(f"{size} bytes at {pointer:#x} end behind their memory")
                return memoryview(block)[pointer - start : pointer - start + size]
        self.violations.append(f"{size} bytes at {pointer:#x} are not allocated")
        return memoryview(bytearray(size))

    def drain(self, stream) -> None:
        with self.lock:
            queue = self.streams[0 if stream == 1 else stream]
            while queue:
                self.step(queue)

    def step(self, queue) -> None:
        kind, what, _ = queue[0]
        if kind == "wait":
            while not what.done:
                assert self.streams[what.stream], "a wait for work that nobody enqueued"
                self.step(self.streams[what.stream])
            if queue and queue[0][1] is what:
                queue.popleft()
        elif kind == "mark":
            queue.popleft()
            what.done = True
        else:
            queue.popleft()
            what()

    def native(self, name: str) -> bool:
        """Count a native call; is it the one that fails?"""
        with self.lock:
            self.calls.append(name)
            if self.fail_at == len(self.calls):
                self.failed = name
                return True
            return False

    # -- the driver

    def code(self, name: str, *, context=True) -> int:
        if self.native(name):
            return 719
        if context and not self.stack():
            self.violations.append(f"{name} without a current context")
        return self.fail_names.get(name, 0)

    def stack(self) -> list:
        if not hasattr(self.contexts, "stack"):
            self.contexts.stack = []
        return self.contexts.stack

    def enqueue(self, stream, kind, what, host=None) -> int:
        stream = 0 if stream == 1 else stream
        with self.lock:
            if stream not in self.streams:
                self.violations.append(f"work on stream {stream:#x}, which does not exist")
                return 400
            if stream in self.capturing:
                if self.capturing[stream] is not None:
                    self.capturing[stream].append((kind, what, host))
                return 0
            self.streams[stream].append((kind, what, host))
        return 0

    def cuInit(self, flags):
        return (self.code("cuInit", context=False),)

    def cuDeviceGet(self, ordinal):
        return self.code("cuDeviceGet", context=False), ordinal

    def cuDevicePrimaryCtxRetain(self, device):
        return self.code("cuDevicePrimaryCtxRetain", context=False), 0xC0

    def cuCtxPushCurrent(self, context):
        code = self.code("cuCtxPushCurrent", context=False)
        if not code:
            self.stack().append(context)
        return (code,)

    def cuCtxPopCurrent(self):
        code = self.code("cuCtxPopCurrent")
        return code, self.stack().pop()  # a context that cannot be popped would end every later test

    def cuGetErrorName(self, code):
        return 0, {2: b"CUDA_ERROR_OUT_OF_MEMORY", 719: b"CUDA_ERROR_LAUNCH_FAILED"}.get(int(code), b"CUDA_ERROR_X")

    def cuMemGetInfo(self):
        return self.code("cuMemGetInfo"), self.size - self.used(), self.size

    def used(self) -> int:
        return sum(map(len, self.memory.values()))

    def cuMemAlloc(self, size):
        with self.lock:
            code = self.code("cuMemAlloc") or (2 if self.used() + size > self.size else 0)
            return (code, 0) if code else (0, self.raw(size))

    def cuMemFree(self, pointer):
        with self.lock:
            code = self.code("cuMemFree")
            if not code:
                for stream in list(self.streams):
                    self.drain(stream)
                if self.memory.pop(pointer, None) is None:
                    self.violations.append("device memory freed twice")
            return (code,)

    def cuMemHostAlloc(self, size, flags):
        code = self.code("cuMemHostAlloc")
        if code:
            return code, 0
        block = ctypes.create_string_buffer(size)
        self.host[ctypes.addressof(block)] = block
        return 0, ctypes.addressof(block)

    def cuMemFreeHost(self, pointer):
        code = self.code("cuMemFreeHost")
        if not code:
            with self.lock:
                block = self.host.pop(pointer)
                end = pointer + len(block)
                if any(h and pointer <= h < end for queue in self.streams.values() for _, _, h in queue):
                    self.violations.append("page-locked memory freed while a copy from or to it is enqueued")
        return (code,)

    def cuMemcpyHtoDAsync(self, to, source, size, stream):
        def run():
            self.bytes_at(to, size)[:] = ctypes.string_at(source, size)

        return (self.code("cuMemcpyHtoDAsync") or self.enqueue(stream, "copy", run, source),)

    def cuMemcpyDtoHAsync(self, to, source, size, stream):
        def run():
            ctypes.memmove(to, bytes(self.bytes_at(source, size)), size)

        return (self.code("cuMemcpyDtoHAsync") or self.enqueue(stream, "copy", run, to),)

    def cuMemcpyDtoDAsync(self, to, source, size, stream):
        def run():
            self.bytes_at(to, size)[:] = bytes(self.bytes_at(source, size))

        return (self.code("cuMemcpyDtoDAsync") or self.enqueue(stream, "copy", run),)

    def cuMemsetD8Async(self, pointer, value, size, stream):
        def run():
            self.bytes_at(pointer, size)[:] = bytes([value]) * size

        return (self.code("cuMemsetD8Async") or self.enqueue(stream, "set", run),)

    def cuPointerGetAttribute(self, attribute, pointer):
        code = self.code("cuPointerGetAttribute")
        if code:
            return code, None
        if pointer in self.other_device:
            return 0, 1
        known = any(start <= pointer < start + len(block) for start, block in self.memory.items())
        return (0, 0) if known else (1, None)

    def cuStreamCreate(self, flags):
        code = self.code("cuStreamCreate")
        if code:
            return code, 0
        assert flags == 1
        stream = 0x5000 + next(self.numbers)
        self.streams[stream] = deque()
        return 0, stream

    def cuStreamDestroy(self, stream):
        code = self.code("cuStreamDestroy")
        if not code:
            self.drain(stream)
            del self.streams[stream]
        return (code,)

    def cuStreamGetId(self, stream):
        code = self.code("cuStreamGetId")
        return code, 0 if code else (self.generations[stream] << 32) + stream

    def cuStreamIsCapturing(self, stream):
        return self.code("cuStreamIsCapturing"), int(stream in self.capturing)

    def cuStreamSynchronize(self, stream):
        code = self.code("cuStreamSynchronize")
        if not code:
            self.drain(stream)
        return (code,)

    def cuCtxSynchronize(self):
        code = self.code("cuCtxSynchronize")
        if self.capturing:
            self.violations.append("the context was waited for while a stream of it captures")
        if not code:
            for stream in list(self.streams):
                self.drain(stream)
        return (code,)

    def cuEventCreate(self, flags):
        code = self.code("cuEventCreate")
        if code:
            return code, 0
        event = 0xE000 + next(self.numbers)
        self.events[event] = None
        return 0, event

    def cuEventDestroy(self, event):
        code = self.code("cuEventDestroy")
        if not code and event not in self.events:
            self.violations.append("event destroyed twice")
        if not code:
            self.events.pop(event, None)
        return (code,)

    def cuEventRecord(self, event, stream):
        code = self.code("cuEventRecord")
        if not code:
            mark = self.events[event] = Mark(0 if stream == 1 else stream)
            code = self.enqueue(stream, "mark", mark)
        return (code,)

    def cuStreamWaitEvent(self, stream, event, flags):
        code = self.code("cuStreamWaitEvent")
        if not code and self.events[event] is not None:
            code = self.enqueue(stream, "wait", self.events[event])
        return (code,)

    def cuEventSynchronize(self, event):
        code, mark = self.code("cuEventSynchronize"), self.events[event]
        if not code and mark is not None:
            with self.lock:
                while not mark.done:
                    self.step(self.streams[mark.stream])
        return (code,)

    def cuEventQuery(self, event):
        mark = self.events[event]
        return (self.code("cuEventQuery") or (0 if mark is None or mark.done else 600),)

    def cuStreamBeginCapture(self, stream, mode):
        code = self.code("cuStreamBeginCapture")
        if not code:
            assert stream > 2
            assert mode == 2
            self.capturing[stream] = []
        return (code,)

    def cuStreamEndCapture(self, stream):
        code = self.code("cuStreamEndCapture")
        captured = self.capturing.pop(stream, None)
        if code or captured is None:
            return code or 901, 0
        graph = 0xA000 + next(self.numbers)
        self.graphs[graph] = captured
        return 0, graph

    def cuGraphInstantiate(self, graph, flags):
        code = self.code("cuGraphInstantiate")
        if code:
            return code, 0
        executable = 0xB000 + next(self.numbers)
        self.executables[executable] = self.graphs[graph]
        return 0, executable

    def cuGraphDestroy(self, graph):
        code = self.code("cuGraphDestroy")
        if not code:
            del self.graphs[graph]
        return (code,)

    def cuGraphExecDestroy(self, graph):
        code = self.code("cuGraphExecDestroy")
        if not code:
            del self.executables[graph]
        return (code,)

    def cuGraphLaunch(self, graph, stream):
        code = self.code("cuGraphLaunch")
        if not code:
            for kind, what, host in self.executables[graph]:
                self.enqueue(stream, kind, what, host)
        return (code,)


class Words(enum.Enum):
    INPUT = 1
    OUTPUT = 2
    FLOAT = 3
    HALF = 4
    UINT8 = 5


class NumpyTensorRt:
    """The parts of the tensorrt module that we use; a plan is JSON. What is destroyed when is checked by ``__del__``."""

    numbers = itertools.count()

    class ILogger:
        class Severity(enum.Enum):
            INTERNAL_ERROR = 0
            ERROR = 1
            WARNING = 2

        def __init__(self) -> None:
            pass

    class ExecutionContextAllocationStrategy(enum.Enum):
        STATIC = 0
        ON_PROFILE_CHANGE = 1

    __version__ = "11.4.0.1"

    def __init__(self, gpu: NumpyGpu) -> None:
        self.__name__ = f"numpy_tensorrt_{next(self.numbers)}"
        self.gpu = gpu
        self.live: Counter[str] = Counter()
        self.contexts: list[Context] = []
        self.made = 0
        self.runtime_is_null = False
        self.runtime = SimpleNamespace(host_code=None)
        self.captures_allowed = True
        self.log_of_failure = "a reason of its own"
        self.strategies: list = []
        self.read_plan = json.loads
        library = self

        class Runtime:
            def __init__(self, logger):
                if library.runtime_is_null or gpu.native("Runtime"):
                    raise TypeError("pybind11::init(): factory function returned nullptr")
                self.engine_host_code_allowed = False
                self.children: list = []
                library.logger = logger
                library.live["runtime"] += 1

            def deserialize_cuda_engine(self, data):
                library.runtime.host_code = self.engine_host_code_allowed
                try:
                    spec = library.read_plan(bytes(data))
                except ValueError:
                    library.say("Serialization assertion failed")
                    return None
                if spec.get("host_code") and not self.engine_host_code_allowed:
                    library.say("the plan has host code, which is not allowed")
                    return None
                if gpu.native("deserialize_cuda_engine"):
                    library.say()
                    return None
                return Engine(library, spec, self.children)

            def __del__(self):
                if not hasattr(self, "children"):
                    return  # it was never made
                if any(child() is not None for child in self.children):
                    gpu.violations.append("the runtime was destroyed before its engine")
                library.live["runtime"] -= 1

        class Refitter:
            def __init__(self, engine, logger):
                if gpu.native("Refitter"):
                    raise TypeError("pybind11::init(): factory function returned nullptr")
                self.engine, self.given = engine, False

            def refit_cuda_engine(self):
                self.engine.spec.pop("stripped")
                return self.given and not gpu.native("refit_cuda_engine")

        class OnnxParserRefitter:
            def __init__(self, refitter, logger):
                self.refitter = refitter

            def refit_from_bytes(self, graph):
                self.refitter.given = graph == GRAPH
                if not self.refitter.given:
                    library.say("weights of another graph")
                return self.refitter.given

        self.Runtime, self.Refitter, self.OnnxParserRefitter = Runtime, Refitter, OnnxParserRefitter

    def say(self, text=None) -> None:
        self.logger.log(self.ILogger.Severity.ERROR, text or self.log_of_failure)


class Engine:
    device_memory_size_v2 = 1_000_000

    def __init__(self, library, spec, siblings) -> None:
        self.library, self.spec, self.children = library, spec, []
        siblings.append(weakref.ref(self))
        library.live["engine"] += 1

    @property
    def num_io_tensors(self):
        return len(self.spec["tensors"])

    @property
    def num_optimization_profiles(self):
        return len(self.spec["profiles"])

    def get_tensor_name(self, i):
        return self.spec["tensors"][i][0]

    def get_tensor_mode(self, name):
        return Words[next(mode for n, mode, _ in self.spec["tensors"] if n == name)]

    def get_tensor_dtype(self, name):
        return Words[next(dtype for n, _, dtype in self.spec["tensors"] if n == name)]

    def get_tensor_shape(self, name):
        low, _, high = self.spec["profiles"][0]
        shape = tuple(a if a == b and len(self.spec["profiles"]) == 1 else -1 for a, b in zip(low, high, strict=True))
        k = {"pool4": 4, "pool8": 8}.get(name, 1)
        return (*shape[:2], *(size if size == -1 else size // k for size in shape[2:]))

    def get_tensor_profile_shape(self, name, profile):
        assert self.get_tensor_mode(name) is Words.INPUT, "profiles are those of inputs"
        return [list(shape) for shape in self.spec["profiles"][profile]]

    def create_execution_context(self, *strategy):
        self.library.strategies.append(strategy)
        if self.library.gpu.native("create_execution_context") or self.spec.get("no_context"):
            self.library.say(self.spec.get("no_context"))
            return None
        context = Context(self.library, self.spec)
        self.children.append(weakref.ref(context))
        return context

    def __del__(self):
        if any(child() is not None for child in self.children):
            self.library.gpu.violations.append("the engine was destroyed before its contexts")
        self.library.live["engine"] -= 1


class Context:
    def __init__(self, library, spec) -> None:
        self.library, self.spec, self.gpu = library, spec, library.gpu
        self.profile, self.shape = 0, None
        self.addresses: dict[str, int] = {}
        self.pending: list[int] = []  # work that is enqueued and not done, in order
        self.first = True
        library.live["context"] += 1
        library.made += 1

    def fails(self, name) -> bool:
        if self.gpu.native(name):
            self.library.say()
            return True
        return False

    def set_optimization_profile_async(self, profile, stream):
        assert type(profile) is int
        if self.fails("set_optimization_profile_async"):
            del self  # C++ leaves no frame in the traceback
            raise RuntimeError("Error in set optimization profile async.")
        self.profile = profile
        return True

    def set_input_shape(self, name, shape):
        low, _, high = self.spec["profiles"][self.profile]
        if not all(a <= b <= c for a, b, c in zip(low, shape, high, strict=True)):
            self.library.say(f"{shape} is outside the profile")
            return False
        if self.fails("set_input_shape"):
            return False
        self.shape = tuple(shape)
        return True

    def infer_shapes(self):
        if self.fails("infer_shapes"):
            del self
            raise RuntimeError("infer_shapes error code: -1")
        return self.spec.get("unknown", [])

    def get_tensor_shape(self, name):
        batch, channels, height, width = self.shape
        k = {"pool4": 4, "pool8": 8}[name]
        return (batch, channels, height // k, width // k)

    def set_tensor_address(self, name, pointer):
        assert type(pointer) is int
        if pointer % 256 or self.fails("set_tensor_address"):
            return False
        self.addresses[name] = pointer
        return True

    def execute_async_v3(self, stream):
        if stream in (0, 1, 2):
            self.gpu.violations.append("TensorRT was run on a default stream")
        if self.fails("execute_async_v3"):
            return False
        if stream in self.gpu.capturing and (self.first or not self.library.captures_allowed):
            self.gpu.capturing[stream] = None
            self.library.say("operation not permitted when stream is capturing")
            return False
        self.first = False
        addresses, shape, pending, gpu = dict(self.addresses), self.shape, self.pending, self.gpu
        captured = stream in gpu.capturing
        number, gain = next(gpu.numbers), self.spec.get("gain", 1)

        def run():
            if not captured and pending.pop(0) != number:
                gpu.violations.append("a context was used by two streams at the same time")
            source = gpu.bytes_at(addresses["pixel_values"], 4 * math.prod(shape))
            values = np.frombuffer(bytes(source), np.float32).reshape(shape) * np.float32(gain)
            for name, result in zip(("pool4", "pool8"), pooled(values), strict=True):
                gpu.bytes_at(addresses[name], result.nbytes)[:] = result.tobytes()

        if not captured:
            pending.append(number)
        return gpu.enqueue(stream, "run", run) == 0

    def __del__(self):
        if self.pending:
            self.gpu.violations.append("a context was destroyed while the GPU works in it")
        self.library.live["context"] -= 1


TENSORS = [["pool8", "OUTPUT", "FLOAT"], ["pixel_values", "INPUT", "FLOAT"], ["pool4", "OUTPUT", "FLOAT"]]


def shapes(*batches: int, height=(32, 32, 32), width=(48, 48, 48)) -> list:
    return [[b, 3, h, w] for b, h, w in zip(batches, height, width, strict=True)]


def plan_of(*profiles, **more) -> bytearray:
    return bytearray(json.dumps({"tensors": TENSORS, "profiles": list(profiles), **more}).encode())


class Machine:
    """A fake GPU with a fake TensorRT, and sessions on it."""

    def __init__(self, monkeypatch) -> None:
        self.gpu = NumpyGpu()
        self.library = NumpyTensorRt(self.gpu)
        self.described = gpus.Gpu(0, "Numpy GPU", "sm_90", 1 << 30, "13.0", 1, False)
        self.memory = cuda.GpuMemory(0, cuda.CudaBindings(0, self.gpu))
        for module in (gpus, hosts):
            monkeypatch.setattr(module, "no_gpu_reason", lambda: "")
            monkeypatch.setattr(module, "find_gpus", lambda: (self.described,))
        for module in (tensorrt_compile, tensorrt_session):
            monkeypatch.setattr(module, "open_memory", lambda gpu, backend=None: self.memory)
        monkeypatch.setattr(tensorrt_library, "load_library", lambda flavour: self.library)

    def open(self, batch=None, data=None, **options) -> TensorRtSession:
        batch = batch or ShapeRange(min=1, opt=2, max=4)
        data = data or plan_of(shapes(batch.min, batch.opt, batch.max))
        options.setdefault("input", pooling_input(batch))
        return TensorRtSession(data, **{"flavour": "tensorrt", "outputs": SPEC.outputs, **options})

    def counted(self, name: str) -> int:
        return self.gpu.calls.count(name)

    def left_over(self) -> dict[str, int]:
        """What is still allocated, beside what the tests put there."""
        gc.collect()
        gpu = self.gpu
        counts = {"host": len(gpu.host), "events": len(gpu.events), "streams": len(gpu.streams) - 3}
        counts |= {"graphs": len(gpu.graphs) + len(gpu.executables), "device": len(gpu.memory)}
        return {name: count for name, count in {**counts, **self.library.live}.items() if count}
