"""An engine for machines without TensorRT: TensorRT's Python API, as our session uses it, over two kernels.

Its network is the pooling backbone of edge_backbones.testing. What it enqueues is real work on the stream that it is given,
so that sessions, leases, events, graphs and page-locked memory meet a real driver. Maps of ``pool8`` are made from those of
``pool4``, which lie in the scratch memory of the execution context: two calls in one context at the same time would give
wrong values.

Where a session is tested, every call also checks on the GPU that it began behind the end of the one before it in the same
context. ``faults`` has what was wrong, once the context is gone.

It keeps these rules of TensorRT: addresses are multiples of 256, a shape is inside the profile, every tensor has an address,
the first run for a shape cannot be captured, and what is wrong is logged and answered by None or False.
"""

from __future__ import annotations

import contextlib
import ctypes
import enum
import json
import math
import sys
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any
from unittest import mock

from benchmarks.gpu_kernels import kernels
from edge_backbones.engines.tensorrt import library as tensorrt_library
from edge_backbones.errors import DeviceError
from edge_backbones.machine import gpus
from edge_backbones.spec import InputSpec

NAME = "stand-in"
INPUT, MIDDLE, LAST = "pixel_values", "pool4", "pool8"
_ALIGNMENT = 256
_MAGIC = "pooling plan of the stand-in"
_OUT_OF_MEMORY = 2

__version__ = "11.4.0"

faults: list[str] = []
_checks = False  # whether contexts that are created now check the order of their calls


def plan_of(*inputs: InputSpec) -> bytes:
    """Return a plan with an optimisation profile for each input."""
    profiles = [(input.min_shape, input.opt_shape, input.max_shape) for input in inputs]
    return json.dumps({"magic": _MAGIC, "profiles": profiles}).encode()


@contextlib.contextmanager
def in_place_of_tensorrt() -> Iterator[None]:
    """Let sessions that are opened inside take this library for every flavour."""
    with mock.patch.object(tensorrt_library, "load_library", return_value=sys.modules[__name__]):
        yield


def check_turns(on: bool) -> None:
    """Let contexts that are created from now on check the order of their calls, which takes two kernels more."""
    global _checks
    _checks = on


class ILogger:
    """What a logger derives from."""

    class Severity(enum.Enum):
        INTERNAL_ERROR = 0
        ERROR = 1
        WARNING = 2


class ExecutionContextAllocationStrategy(enum.Enum):
    STATIC = 0
    ON_PROFILE_CHANGE = 1
    USER_MANAGED = 2


class Runtime:
    def __init__(self, logger: Any) -> None:
        self.logger = logger
        self.engine_host_code_allowed = False

    def deserialize_cuda_engine(self, data: bytes | bytearray) -> Engine | None:
        try:
            plan = json.loads(bytes(data))
            if plan["magic"] != _MAGIC:
                raise ValueError("no plan of the stand-in")
        except (ValueError, TypeError, KeyError) as error:
            _say(self.logger, f"Serialization assertion failed: {error}")
            return None
        return Engine(self.logger, [tuple(map(tuple, profile)) for profile in plan["profiles"]])


class Engine:
    def __init__(self, logger: Any, profiles: Sequence[tuple[tuple[int, ...], ...]]) -> None:
        self.logger = logger
        self._profiles = list(profiles)
        self._tensors = ((LAST, "OUTPUT"), (INPUT, "INPUT"), (MIDDLE, "OUTPUT"))  # outputs in another order than ours

    @property
    def num_io_tensors(self) -> int:
        return len(self._tensors)

    @property
    def num_optimization_profiles(self) -> int:
        return len(self._profiles)

    @property
    def device_memory_size_v2(self) -> int:
        return max(_scratch(largest) for _, _, largest in self._profiles)

    def get_device_memory_size_for_profile_v2(self, profile: int) -> int:
        return _scratch(self._profiles[profile][2])

    def get_tensor_name(self, index: int) -> str:
        return self._tensors[index][0]

    def get_tensor_mode(self, name: str) -> Any:
        return SimpleNamespace(name=dict(self._tensors)[name])

    def get_tensor_dtype(self, name: str) -> Any:
        return SimpleNamespace(name="FLOAT")

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        bounds = [(low, high) for low, _, high in self._profiles]
        fixed = bounds[0][0] if len(bounds) == 1 and bounds[0][0] == bounds[0][1] else (-1, 3, -1, -1)
        return _shape_of(name, fixed)

    def get_tensor_profile_shape(self, name: str, profile: int) -> tuple[tuple[int, ...], ...]:
        return self._profiles[profile]

    def create_execution_context(
        self, strategy: ExecutionContextAllocationStrategy = ExecutionContextAllocationStrategy.STATIC
    ) -> Context | None:
        sizes = {
            ExecutionContextAllocationStrategy.STATIC: self.device_memory_size_v2,
            ExecutionContextAllocationStrategy.ON_PROFILE_CHANGE: self.get_device_memory_size_for_profile_v2(0),
            ExecutionContextAllocationStrategy.USER_MANAGED: 0,
        }
        try:
            return Context(self, strategy, sizes[strategy])
        except DeviceError as error:
            _say(self.logger, str(error))
            return None


class Context:
    def __init__(self, engine: Engine, strategy: ExecutionContextAllocationStrategy, scratch: int) -> None:
        self.engine = engine
        self._strategy = strategy
        self._profile = 0
        self._shape: tuple[int, ...] = ()
        self._addresses: dict[str, int] = {}
        self._scratch = _Scratch(scratch)
        self._warm: set[tuple[int, ...]] = set()
        self._turns = _Turns(_Scratch(8)) if _checks else None

    def set_optimization_profile_async(self, profile: int, stream: int) -> bool:
        if not 0 <= profile < self.engine.num_optimization_profiles:
            return self._refuse(f"there is no optimisation profile {profile}")
        self._profile, self._shape = profile, ()
        if self._strategy is ExecutionContextAllocationStrategy.ON_PROFILE_CHANGE:
            try:
                self._scratch = _Scratch(self.engine.get_device_memory_size_for_profile_v2(profile))
            except DeviceError as error:
                return self._refuse(str(error))
        return True

    def set_input_shape(self, name: str, shape: Sequence[int]) -> bool:
        low, _, high = self.engine.get_tensor_profile_shape(INPUT, self._profile)
        if name != INPUT or not all(a <= b <= c for a, b, c in zip(low, shape, high, strict=True)):
            return self._refuse(f"{name} of shape {tuple(shape)} is outside optimisation profile {self._profile}")
        self._shape = tuple(shape)
        return True

    def infer_shapes(self) -> list[str]:
        return [] if self._shape else [INPUT]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return _shape_of(name, self._shape)

    def update_device_memory_size_for_shapes(self) -> int:
        return _scratch(self._shape)

    def set_device_memory(self, pointer: int, size: int) -> None:
        if self._strategy is not ExecutionContextAllocationStrategy.USER_MANAGED:
            raise RuntimeError("this context has memory of its own")
        self._scratch = _Scratch.of_caller(pointer, size)

    def set_tensor_address(self, name: str, pointer: int) -> bool:
        if pointer % _ALIGNMENT:
            return self._refuse(f"{pointer:#x} for {name} is no multiple of {_ALIGNMENT}")
        self._addresses[name] = pointer
        return True

    def execute_async_v3(self, stream: int) -> bool:
        unbound = {INPUT, MIDDLE, LAST} - {name for name, pointer in self._addresses.items() if pointer}
        if unbound or not self._shape:
            return self._refuse(f"no address for {sorted(unbound)}" if unbound else f"no shape for {INPUT}")
        if self._scratch.size < _scratch(self._shape) or not self._scratch.pointer:
            return self._refuse(f"{self._scratch.size} bytes of scratch memory, and {_scratch(self._shape)} are needed")
        gpu = kernels()
        captured = (self._turns is not None or self._shape not in self._warm) and gpu.is_capturing(stream)
        if self._shape not in self._warm and captured:
            return self._refuse("operation not permitted when stream is capturing")
        turns = None if captured else self._turns  # a graph would replay the numbers
        middle = _shape_of(MIDDLE, self._shape)
        try:
            if turns is not None:
                turns.take(stream)
            gpu.pool(self._addresses[INPUT], self._addresses[MIDDLE], self._shape, 4, stream)
            gpu.pool(self._addresses[INPUT], self._scratch.pointer, self._shape, 4, stream)
            gpu.pool(self._scratch.pointer, self._addresses[LAST], middle, 2, stream)
            if turns is not None:
                turns.take(stream)
        except DeviceError as error:
            return self._refuse(str(error))
        self._warm.add(self._shape)
        return True

    def _refuse(self, why: str) -> bool:
        _say(self.engine.logger, why)
        return False


class _Turns:
    """Two numbers on the GPU: whose turn it is, and whether somebody was out of turn."""

    def __init__(self, memory: _Scratch) -> None:
        self._memory = memory
        self._next = 0
        memory.clear()

    def take(self, stream: int) -> None:
        """Enqueue a check that all turns before this one are over."""
        kernels().turn(self._memory.pointer, self._next, stream)
        self._next += 1

    def __del__(self) -> None:
        if not sys.is_finalizing() and self._memory.read()[1]:
            faults.append("a call began in an execution context before the one before it had ended")


class _Scratch:
    """Device memory that is freed when it is collected, as TensorRT frees that of a context."""

    def __init__(self, size: int = 0) -> None:
        self.size, self.pointer, self._context = size, 0, ctypes.c_void_p()
        self._is_own = size > 0
        if self._is_own:
            self._library = gpus.load_driver()
            driver, pointer = gpus.CtypesDriver(self._library), ctypes.c_uint64()
            self._library.cuCtxGetCurrent(ctypes.byref(self._context))
            code = self._library.cuMemAlloc_v2(ctypes.byref(pointer), ctypes.c_size_t(size))
            if code:
                self._is_own = False
                # The words by which TensorRT says that memory ran out.
                prefix = "Out of memory: " if code == _OUT_OF_MEMORY else ""
                raise DeviceError(f"{prefix}cuMemAlloc of {size} bytes failed: {gpus.error_name(driver, code)}")
            self.pointer = pointer.value

    def clear(self) -> None:
        """Set its bytes to zero, and wait."""
        self._library.cuMemcpyHtoD_v2(ctypes.c_uint64(self.pointer), bytes(self.size), ctypes.c_size_t(self.size))
        self._library.cuStreamSynchronize(None)  # a copy from pageable memory may be under way when the call returns

    def read(self) -> tuple[int, ...]:
        """Return its uint32 numbers. Work that writes them must be done."""
        values = (ctypes.c_uint32 * (self.size // 4))()
        self._library.cuCtxPushCurrent_v2(self._context)
        self._library.cuMemcpyDtoH_v2(values, ctypes.c_uint64(self.pointer), ctypes.c_size_t(self.size))
        self._library.cuCtxPopCurrent_v2(ctypes.byref(ctypes.c_void_p()))
        return tuple(values)

    @classmethod
    def of_caller(cls, pointer: int, size: int) -> _Scratch:
        """Return memory that belongs to someone else."""
        made = cls()
        made.pointer, made.size = pointer, size
        return made

    def __del__(self) -> None:
        if self._is_own and not sys.is_finalizing():
            self._library.cuCtxPushCurrent_v2(self._context)
            self._library.cuMemFree_v2(ctypes.c_uint64(self.pointer))
            self._library.cuCtxPopCurrent_v2(ctypes.byref(ctypes.c_void_p()))


def _scratch(shape: Sequence[int]) -> int:
    """Return the bytes of scratch memory that an input shape takes."""
    return 4 * math.prod(_shape_of(MIDDLE, shape))


def _shape_of(name: str, shape: Sequence[int]) -> tuple[int, ...]:
    """Return the shape of a tensor for a shape of the input; unknown extents (-1) stay unknown."""
    side = {MIDDLE: 4, LAST: 8}.get(name, 1)
    return (*shape[:2], *(extent if extent == -1 else extent // side for extent in shape[2:]))


def _say(logger: Any, text: str) -> None:
    logger.log(ILogger.Severity.ERROR, text)
