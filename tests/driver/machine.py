"""The simulated TensorRT of tests/simulated_tensorrt.py on the stand-in for libcuda: everything between is the real thing."""

from __future__ import annotations

import gc
import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from edge_backbones.engines.gpu.dlpack import ForeignArray
from edge_backbones.engines.gpu.memory import MemoryBackend, open_memory
from edge_backbones.engines.tensorrt import library as tensorrt_library
from edge_backbones.engines.tensorrt.session import TensorRtSession
from edge_backbones.spec import ShapeRange
from edge_backbones.testing import SPEC, pooling_input
from tests.driver.standin import StandIn
from tests.simulated_tensorrt import NumpyTensorRt, plan_of, shapes

LAUNCH_FAILED = 719


class _Captures:
    """The streams that are being captured, as the simulated TensorRT asks for them."""

    def __init__(self, driver: StandIn) -> None:
        self._driver = driver

    def __contains__(self, stream: int) -> bool:
        return self._driver.is_capturing(stream)

    def __setitem__(self, stream: int, broken: None) -> None:
        self._driver.invalidate(stream)


class _Streams:
    """The streams with their work, as numbers of pieces."""

    def __init__(self, driver: StandIn) -> None:
        self._driver = driver

    def __iter__(self) -> Iterator[int]:
        return iter([0, *reversed(self._driver.streams())])

    def __getitem__(self, stream: int) -> int:
        return self._driver.pending(stream)


class _Blocks:
    """The blocks of memory on the GPU."""

    def __init__(self, driver: StandIn, put_there: list[int]) -> None:
        self._driver, self._put_there = driver, put_there

    def __len__(self) -> int:
        return self._driver.live("device")

    def pop(self, pointer: int) -> None:
        self._put_there.remove(pointer)
        self._driver.free(pointer)


class DriverGpu:
    """What the simulated TensorRT and tests of it need of a GPU, from the stand-in.

    Calls of TensorRT are counted among those of the driver.
    """

    def __init__(self, driver: StandIn) -> None:
        self._driver = driver
        self.numbers = itertools.count(1)
        self.violations: list[str] = []
        self.capturing = _Captures(driver)
        self.put_there: list[int] = []
        self.streams = _Streams(driver)
        self.memory = _Blocks(driver, self.put_there)
        self._gone: dict[int, int] = {}  # events behind the work of streams that were destroyed

    @property
    def calls(self) -> list[str]:
        return self._driver.log()

    @property
    def failed(self) -> str | None:
        return self._driver.failed or None

    @property
    def fail_at(self) -> int | None:
        raise AttributeError("it is only set")

    @fail_at.setter
    def fail_at(self, number: int | None) -> None:
        """Number of the call that fails, from the first one on; None for no call."""
        self._driver.fail_at("*", 0 if number is None else number - self._driver.calls(), LAUNCH_FAILED)

    @property
    def size(self) -> int:
        raise AttributeError("it is only set")

    @size.setter
    def size(self, size: int) -> None:
        self._driver.set_memory(size)

    def used(self) -> int:
        return self._driver.live_bytes()

    def native(self, name: str) -> bool:
        return bool(self._driver.note(name))

    def enqueue(self, stream: int, kind: str, run: Callable[[], None]) -> int:
        return self._driver.kernel(stream, run)

    def bytes_at(self, pointer: int, size: int) -> memoryview:
        return self._driver.bytes_at(pointer, size)

    def put(self, array: np.ndarray, offset: int = 0) -> ForeignArray:
        """An array on the GPU, that belongs to the test."""
        start = self.raw(array.nbytes + offset)
        self.bytes_at(start + offset, array.nbytes)[:] = array.tobytes()
        return ForeignArray(start + offset, array.shape, array.dtype, 0, True, owner=object())

    def raw(self, size: int) -> int:
        self.put_there.append(self._driver.allocate(size))
        return self.put_there[-1]

    def recreate(self, stream: int) -> int:
        """The owner destroys a stream with work pending, and the next stream gets its handle. A name for the old one."""
        with open_memory(0) as memory:
            event = memory.new_event()
            memory.record(event, stream)
            memory.free_stream(stream)
            assert memory.new_stream() == stream
        name = -1 - len(self._gone)
        self._gone[name] = event
        return name

    def drain(self, stream: int) -> None:
        with open_memory(0) as memory:
            if stream in self._gone:
                memory.wait_for(self._gone[stream])
            else:
                self._driver.drain(stream)

    def cuCtxPushCurrent(self, context: int) -> None:
        open_memory(0).__enter__()

    def cuCtxPopCurrent(self) -> None:
        open_memory(0).__exit__(None, None, None)

    def cuMemcpyDtoDAsync(self, to: int, source: int, size: int, stream: int) -> None:
        open_memory(0).copy(to, source, size, stream)

    def value(self, array: Any, stream: int) -> np.ndarray:
        """What work on ``stream`` that comes now would read."""
        self.drain(stream)
        return np.frombuffer(bytes(self.bytes_at(array.pointer, array.nbytes)), array.dtype).reshape(array.shape)


class DriverMachine:
    """A GPU of the stand-in with a simulated TensorRT, and sessions on it."""

    def __init__(self, driver: StandIn, memory: MemoryBackend | None = None) -> None:
        self.driver = driver
        self.gpu = DriverGpu(driver)
        self.library = NumpyTensorRt(self.gpu)
        tensorrt_library.load_library = lambda flavour: self.library
        self._backend = memory
        self.memory = open_memory(0, memory)
        with self.memory as opened:
            self.stream, self.other = opened.new_stream(), opened.new_stream()
        driver.reset()

    def handle(self, stream: int | str) -> int:
        """The handle of a stream: "own" is ``self.stream``, since no test can write down its number."""
        return self.stream if stream == "own" else int(stream)

    def open(self, batch: ShapeRange | None = None, data: bytearray | None = None, **options: Any) -> TensorRtSession:
        batch = batch or ShapeRange(min=1, opt=2, max=4)
        data = data or plan_of(shapes(batch.min, batch.opt, batch.max))
        options.setdefault("input", pooling_input(batch))
        options.setdefault("memory", self._backend)
        return TensorRtSession(data, **{"flavour": "tensorrt", "outputs": SPEC.outputs, **options})

    def counted(self, name: str) -> int:
        return self.driver.calls(name)

    def left_over(self) -> dict[str, int]:
        """What is still allocated, on the driver and of TensorRT, beside what the test put there and its two streams."""
        gc.collect()
        counts = Counter({**self.driver.left_over(), **self.library.live})
        counts.subtract({"device": len(self.gpu.put_there), "stream": 2})
        return {name: count for name, count in counts.items() if count}
