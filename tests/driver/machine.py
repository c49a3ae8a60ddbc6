"""The simulated TensorRT of tests/simulated_gpu.py on the stand-in for libcuda: everything between is the real thing."""

from __future__ import annotations

import gc
import itertools
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np

from edge_backbones.engines.gpu.arrays import ForeignArray
from edge_backbones.engines.gpu.memory import MemoryBackend, open_memory
from edge_backbones.engines.tensorrt import library as tensorrt_library
from edge_backbones.engines.tensorrt.session import TensorRtSession
from edge_backbones.spec import ShapeRange
from edge_backbones.testing import SPEC, pooling_input
from tests.driver.standin import StandIn
from tests.simulated_gpu import NumpyTensorRt, plan_of, shapes

LAUNCH_FAILED = 719


class _Captures:
    """The streams that are being captured, as the simulated TensorRT asks for them."""

    def __init__(self, driver: StandIn) -> None:
        self._driver = driver

    def __contains__(self, stream: int) -> bool:
        return self._driver.is_capturing(stream)

    def __setitem__(self, stream: int, broken: None) -> None:
        self._driver.invalidate(stream)


class DriverGpu:
    """What the simulated TensorRT and tests of it need of a GPU, from the stand-in.

    It has the names of ``NumpyGpu``. Calls of TensorRT are counted among those of the driver.
    """

    def __init__(self, driver: StandIn) -> None:
        self._driver = driver
        self.numbers = itertools.count(1)
        self.violations: list[str] = []
        self.capturing = _Captures(driver)
        self.put_there: list[int] = []

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
        start = self._driver.allocate(array.nbytes + offset)
        self.put_there.append(start)
        self.bytes_at(start + offset, array.nbytes)[:] = array.tobytes()
        return ForeignArray(start + offset, array.shape, array.dtype, 0, True, False, owner=object())

    def drain(self, stream: int) -> None:
        with open_memory(0):
            self._driver.drain(stream)

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
