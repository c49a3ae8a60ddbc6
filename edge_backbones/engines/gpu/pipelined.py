"""Time an engine on a GPU alone: calls that are enqueued one after the other, with inputs and outputs in GPU memory."""

from __future__ import annotations

import contextlib
import time

import numpy as np

from edge_backbones.engines.base import DeviceSession
from edge_backbones.engines.gpu.dlpack import ForeignArray
from edge_backbones.engines.gpu.memory import open_memory
from edge_backbones.engines.gpu.pool import CleanUp
from edge_backbones.errors import DeviceError

PIPELINED = 20  # calls before one wait


class Pipeline:
    """Hold one input in GPU memory and a stream, to time calls of an engine: ``with Pipeline(...) as pipeline:``.

    Args:
        session: The engine.
        images: The input. It is C-contiguous and has the engine's dtype.
        gpu: Index of the engine's GPU.

    Raises:
        MissingDependencyError: Neither cuda-bindings nor pycuda is installed.
        OutOfMemoryError: The input does not fit.
    """

    def __init__(self, session: DeviceSession, images: np.ndarray, gpu: int) -> None:
        self._session = session
        self._memory = open_memory(gpu)
        self._images = images
        self._pointer = self._stream = 0

    def __enter__(self) -> Pipeline:
        images = self._images
        try:
            with self._memory as memory:
                self._pointer = memory.allocate(images.nbytes)
                self._stream = memory.new_stream()
                memory.copy_in(self._pointer, images.ctypes.data, images.nbytes, self._stream)
                memory.wait(self._stream)
        except BaseException:
            with contextlib.suppress(DeviceError):  # the first error is the one to raise
                self.__exit__()
            raise
        self._array = ForeignArray(self._pointer, images.shape, images.dtype, memory.gpu, True, owner=self)
        return self

    def milliseconds(self) -> float:
        """Return the time of a call, of twenty that are enqueued before one wait."""
        started = time.perf_counter()
        for _ in range(PIPELINED):
            self._session.run_on_device(self._array, self._stream)
        with self._memory as memory:
            memory.wait(self._stream)
        return 1e3 * (time.perf_counter() - started) / PIPELINED

    def __exit__(self, *_: object) -> None:
        with self._memory as memory:
            steps = CleanUp()
            if self._stream:
                steps.make(memory.wait, self._stream)
                steps.make(memory.free_stream, self._stream)
            if self._pointer:
                steps.make(memory.free, self._pointer)
            steps.end()
