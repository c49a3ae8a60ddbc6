"""A TensorRT in Python that keeps the rules of the real one, for tests of what runs on it. The network is average pooling.

Its kernels run on the GPU of the stand-in for libcuda (tests/driver): not before somebody waits for them. Whoever reads too
early, writes over what is still to be read or frees what is still in use gets a wrong value or a line in ``violations``.
"""

from __future__ import annotations

import enum
import itertools
import json
import math
import weakref
from collections import Counter
from types import SimpleNamespace

import numpy as np

from edge_backbones.testing import pooled
from tests.simulated_builder import GRAPH


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
        USER_MANAGED = 2

    __version__ = "11.4.0.1"

    def __init__(self, gpu, *, rtx=False) -> None:
        self.__name__ = f"numpy_tensorrt_{next(self.numbers)}"
        if rtx:
            self.DynamicShapesKernelSpecializationStrategy = SimpleNamespace(EAGER="eager")
        self.gpu = gpu
        self.live: Counter[str] = Counter()
        self.contexts: weakref.WeakSet[Context] = weakref.WeakSet()
        self.made = 0
        self.runtime_is_null = False
        self.runtime = SimpleNamespace(host_code=None)
        self.captures_allowed = True
        self.log_of_failure = "a reason of its own"
        self.compiled: Counter[str] = Counter()  # kernels, by shape, that TensorRT-RTX had in no cache
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

    @staticmethod
    def moved(shape, spec):
        """The shape of an output, whose channels may come last."""
        return (shape[0], *shape[2:], shape[1]) if spec.get("channels_last") else tuple(shape)

    def say(self, text=None) -> None:
        self.logger.log(self.ILogger.Severity.ERROR, text or self.log_of_failure)


class Engine:
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
        shape = (*shape[:2], *(size if size == -1 else size // k for size in shape[2:]))
        return shape if k == 1 else self.library.moved(shape, self.spec)

    def get_tensor_profile_shape(self, name, profile):
        assert self.get_tensor_mode(name) is Words.INPUT, "profiles are those of inputs"
        return [list(shape) for shape in self.spec["profiles"][profile]]

    def create_runtime_config(self):
        return RuntimeConfig(self.library)

    def create_execution_context(self, options):
        strategies = self.library.ExecutionContextAllocationStrategy
        is_config = isinstance(options, RuntimeConfig)
        assert (options.strategy if is_config else options) is strategies.USER_MANAGED
        if self.library.gpu.native("create_execution_context") or self.spec.get("no_context"):
            self.library.say(self.spec.get("no_context"))
            return None
        context = Context(self.library, self.spec, options.cache if is_config else None)
        self.children.append(weakref.ref(context))
        return context

    def __del__(self):
        if any(child() is not None for child in self.children):
            self.library.gpu.violations.append("the engine was destroyed before its contexts")
        self.library.live["engine"] -= 1


class RuntimeCache:
    """What TensorRT-RTX compiled, as text: one shape on each line."""

    def __init__(self, library) -> None:
        self.library, self.shapes = library, set()

    def deserialize(self, blob) -> bool:
        if not bytes(blob).startswith(b"kernels\n"):
            return False
        self.shapes = set(bytes(blob).decode().splitlines()[1:])
        return True

    def serialize(self):
        return memoryview("\n".join(["kernels", *sorted(self.shapes)]).encode())

    def need(self, shape) -> None:
        if str(shape) not in self.shapes:
            self.library.compiled[str(shape)] += 1
        self.shapes.add(str(shape))


class RuntimeConfig:
    """TensorRT-RTX's options of an execution context."""

    dynamic_shapes_kernel_specialization_strategy = None

    def __init__(self, library) -> None:
        self.library, self.strategy, self.cache = library, None, None

    def set_execution_context_allocation_strategy(self, strategy) -> None:
        self.strategy = strategy

    def create_runtime_cache(self):
        return RuntimeCache(self.library)

    def set_runtime_cache(self, cache) -> bool:
        self.cache = cache
        return True


class Context:
    """An execution context whose scratch memory is managed by its user.

    A run is two kernels: the first writes to the scratch memory, the second finds out whether it is still as it was.
    """

    def __init__(self, library, spec, cache) -> None:
        self.library, self.spec, self.gpu, self.cache = library, spec, library.gpu, cache
        self.scratch = (0, 0)
        self.profile, self.shape = 0, None
        self.addresses: dict[str, int] = {}
        self.pending: list[int] = []  # work that is enqueued and not done, in order
        self.first = True
        library.live["context"] += 1
        library.made += 1
        library.contexts.add(self)

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
        self.scratch = (0, 0)  # divided anew
        if self.cache is not None:
            self.cache.need(self.shape)
        return True

    def scratch_size(self) -> int:
        return self.spec.get("scratch", 8) * math.prod(self.shape)

    def update_device_memory_size_for_shapes(self) -> int:
        if self.gpu.native("update_device_memory_size_for_shapes"):
            del self  # C++ leaves no frame in the traceback
            raise RuntimeError("update_device_memory_size_for_shapes failed")
        return self.scratch_size()

    def set_device_memory(self, pointer, size) -> None:
        assert type(pointer) is int
        if self.gpu.native("set_device_memory"):
            del self
            raise RuntimeError("set_device_memory failed")
        if pointer % 256 or size < self.scratch_size():
            self.gpu.violations.append(f"{size} bytes of scratch memory at {pointer:#x}")
        self.scratch = pointer, size

    def infer_shapes(self):
        if self.fails("infer_shapes"):
            del self
            raise RuntimeError("infer_shapes error code: -1")
        return self.spec.get("unknown", [])

    def get_tensor_shape(self, name):
        batch, channels, height, width = self.shape
        k = {"pool4": 4, "pool8": 8}[name]
        shape = batch, channels, height // k, width // k
        return self.library.moved(shape, self.spec)

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
        number, gain, scratch = next(gpu.numbers), self.spec.get("gain", 1), self.scratch
        mark, spec = number.to_bytes(8, "little") * 2, self.spec  # not the context itself: a kernel does not keep it
        if scratch[1] < self.scratch_size():
            gpu.violations.append("a context ran without its scratch memory")

        def begin():
            if scratch[1]:
                gpu.bytes_at(scratch[0], 16)[:] = gpu.bytes_at(scratch[0] + scratch[1] - 16, 16)[:] = mark

        def run():
            if not captured and pending.pop(0) != number:
                gpu.violations.append("a context was used by two streams at the same time")
            if scratch[1] and gpu.bytes_at(scratch[0], 16) != mark:
                gpu.violations.append("scratch memory was used by two runs at the same time")
            source = gpu.bytes_at(addresses["pixel_values"], 4 * math.prod(shape))
            values = np.frombuffer(bytes(source), np.float32).reshape(shape) * np.float32(gain)
            for name, result in zip(("pool4", "pool8"), pooled(values), strict=True):
                if spec.get("channels_last"):
                    result = result.transpose(0, 2, 3, 1)
                if [name, "OUTPUT", "HALF"] in spec["tensors"]:
                    result = result.astype(np.float16)
                gpu.bytes_at(addresses[name], result.nbytes)[:] = result.tobytes()

        if not captured:
            pending.append(number)
        return gpu.enqueue(stream, "run", begin) == 0 and gpu.enqueue(stream, "run", run) == 0

    def __del__(self):
        if self.pending:
            self.gpu.violations.append("a context was destroyed while the GPU works in it")
        self.library.live["context"] -= 1


TENSORS = [["pool8", "OUTPUT", "FLOAT"], ["pixel_values", "INPUT", "FLOAT"], ["pool4", "OUTPUT", "FLOAT"]]


def shapes(*batches: int, height=(32, 32, 32), width=(48, 48, 48)) -> list:
    return [[b, 3, h, w] for b, h, w in zip(batches, height, width, strict=True)]


def plan_of(*profiles, **more) -> bytearray:
    return bytearray(json.dumps({"tensors": TENSORS, "profiles": list(profiles), **more}).encode())
