"""The simulated TensorRT of tests/simulated_gpu.py on the stand-in for libcuda: everything between is the real thing."""

from __future__ import annotations

import gc
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np

from edge_backbones.engines.gpu.arrays import ForeignArray
from edge_backbones.engines.gpu.memory import MemoryBackend, open_memory
from edge_backbones.engines.tensorrt import library as tensorrt_library
from edge_backbones.engines.tensorrt.session import TensorRtSession
from edge_backbones.machine import gpus
from edge_backbones.spec import ShapeRange
from edge_backbones.testing import SPEC, pooling_input
from tests.driver.standin import StandIn
from tests.simulated_gpu import NumpyTensorRt, plan_of, shapes


class _Captures:
    """The streams that are being captured, as the simulated TensorRT asks for them."""

    def __init__(self, driver: StandIn) -> None:
        self._driver = driver

    def __contains__(self, stream: int) -> bool:
        return self._driver.is_capturing(stream)

    def __setitem__(self, stream: int, broken: None) -> None:
        self._driver.invalidate(stream)


class DriverGpu:
    """What the simulated TensorRT needs of a GPU, from the stand-in. TensorRT's own calls are counted here."""

    def __init__(self, driver: StandIn) -> None:
        self._driver = driver
        self.numbers = itertools.count(1)
        self.violations: list[str] = []
        self.capturing = _Captures(driver)
        self.calls: list[str] = []
        self.fail_at = 0  # number of TensorRT's call that fails; 0 for none
        self.failed = ""
        self.bytes_at = driver.bytes_at

    def native(self, name: str) -> bool:
        self.calls.append(name)
        if len(self.calls) != self.fail_at:
            return False
        self.failed = name
        return True

    def enqueue(self, stream: int, kind: str, run: Callable[[], None]) -> int:
        return self._driver.kernel(stream, run)


class DriverMachine:
    """A GPU of the stand-in with a simulated TensorRT, and sessions on it."""

    def __init__(self, driver: StandIn, memory: MemoryBackend | None = None) -> None:
        self.driver = driver
        self.gpu = DriverGpu(driver)
        self.library = NumpyTensorRt(self.gpu)
        tensorrt_library.load_library = lambda flavour: self.library
        (self.described,) = gpus.find_gpus()
        self._backend = memory
        self.memory = open_memory(0, memory)
        with self.memory as opened:
            self.stream, self.other = opened.new_stream(), opened.new_stream()
        self._put: list[int] = []

    def open(self, batch: ShapeRange | None = None, data: bytearray | None = None, **options: Any) -> TensorRtSession:
        batch = batch or ShapeRange(min=1, opt=2, max=4)
        data = data or plan_of(shapes(batch.min, batch.opt, batch.max))
        options.setdefault("input", pooling_input(batch))
        options.setdefault("memory", self._backend)
        return TensorRtSession(data, **{"flavour": "tensorrt", "outputs": SPEC.outputs, **options})

    def put(self, array: np.ndarray, offset: int = 0) -> ForeignArray:
        """An array on the GPU, that belongs to the test."""
        with self.memory as memory:
            start = memory.allocate(array.nbytes + offset)
            self.write(start + offset, array)
        self._put.append(start)
        return ForeignArray(start + offset, array.shape, array.dtype, 0, True, False, owner=object())

    def write(self, pointer: int, array: np.ndarray) -> None:
        array = np.ascontiguousarray(array)
        with self.memory as memory:
            memory.copy_in(pointer, array.ctypes.data, array.nbytes, self.stream)
            memory.wait(self.stream)

    def value(self, array: Any, stream: int) -> np.ndarray:
        """What work on ``stream`` that comes now reads."""
        found = np.empty(array.shape, array.dtype)
        with self.memory as memory:
            memory.copy_out(found.ctypes.data, array.pointer, found.nbytes, stream)
            memory.wait(stream)
        return found

    def clean_up(self) -> None:
        """Free what the test put on the GPU."""
        with self.memory as memory:
            for stream in (self.stream, self.other):
                memory.wait(stream)
                memory.free_stream(stream)
            for pointer in self._put:
                memory.free(pointer)
        self._put.clear()

    def left_over(self) -> dict[str, int]:
        """What is still allocated, on the driver and of TensorRT."""
        gc.collect()
        live = {name: count for name, count in self.library.live.items() if count}
        return {**self.driver.left_over(), **live}
