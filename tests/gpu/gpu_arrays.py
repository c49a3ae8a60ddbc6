"""Arrays, streams and work of a caller on the GPU, by the package's own means and by torch, for the same tests."""

from __future__ import annotations

import contextlib

import gpu_engines
import numpy as np

from benchmarks.gpu_kernels import kernels
from edge_backbones.engines.gpu import memory as cuda
from edge_backbones.engines.gpu.arrays import DeviceArray, from_foreign

WAYS = ("ours", "torch")


class Ours:
    """With DeviceArrays and plain handles; it needs no other library."""

    def __init__(self, gpu: int) -> None:
        self.memory = cuda.open_memory(gpu)
        self._pointers: list[int] = []
        self._streams: list[int] = []

    def new_stream(self) -> int:
        """A stream that does not wait for the default stream."""
        with self.memory as memory:
            self._streams.append(memory.new_stream())
        return self._streams[-1]

    def put(self, values: np.ndarray) -> DeviceArray:
        """A copy on the GPU, which is there when this returns."""
        with self.memory as memory:
            pointer = memory.allocate(values.nbytes)
            self._pointers.append(pointer)
            memory.copy_in(pointer, values.ctypes.data, values.nbytes, 0)
            memory.wait(0)
        return DeviceArray(pointer, values.shape, values.dtype, device=self.memory.gpu, owner=None, synchronize=None)

    def copy(self, target: DeviceArray, source: DeviceArray, stream: int) -> None:
        """Enqueue a copy."""
        with self.memory as memory:
            memory.copy(target.pointer, source.pointer, target.nbytes, stream)

    def clear(self, target: DeviceArray, stream: int) -> None:
        """Enqueue setting all values to zero."""
        with self.memory as memory:
            memory.clear(target.pointer, target.nbytes, stream)

    def keep_busy(self, stream: int, milliseconds: float = 100) -> None:
        """Enqueue a wait."""
        with self.memory:
            kernels().spin(milliseconds, stream)

    def is_busy(self, stream: int) -> bool:
        """Is work on a stream not done?"""
        with self.memory as memory:
            event = memory.new_event()
            memory.record(event, stream)
            busy = not memory.happened(event)
            memory.free_event(event)
        return busy

    def seen_from(self, array: DeviceArray, stream: int):
        """A copy that is enqueued on ``stream`` now, as another library would make it; the array is let go of."""
        found = from_foreign(array, stream=stream or 1)
        with self.memory as memory:
            pointer = memory.allocate(array.nbytes)
            self._pointers.append(pointer)
            memory.copy(pointer, found.pointer, array.nbytes, stream)
        return DeviceArray(pointer, array.shape, array.dtype, device=self.memory.gpu, owner=None, synchronize=None)

    def to_host(self, array: DeviceArray, stream: int = 0) -> np.ndarray:
        """The values, once ``stream`` has come to where it is now."""
        return gpu_engines.to_host(array, stream)

    def current(self, stream: int):
        """A block in which the library works on a stream; there is no library here."""
        return contextlib.nullcontext()

    def finish(self, stream: int) -> None:
        """Wait for a stream."""
        with self.memory as memory:
            memory.wait(stream)

    def wait(self) -> None:
        """Wait for everything on the GPU."""
        with self.memory:
            gpu_engines.wait_for_all()

    def close(self) -> None:
        """Free everything."""
        with self.memory as memory:
            gpu_engines.wait_for_all()
            for pointer in self._pointers:
                memory.free(pointer)
            for stream in self._streams:
                memory.free_stream(stream)


class Torch:
    """With torch's tensors and streams."""

    def __init__(self, gpu: int) -> None:
        import torch

        self._torch, self._place = torch, torch.device("cuda", gpu)
        torch.cuda.synchronize(gpu)

    def new_stream(self):
        return self._torch.cuda.Stream(self._place)

    def _on(self, stream):
        return self._torch.cuda.stream(stream or self._torch.cuda.default_stream(self._place))

    def put(self, values: np.ndarray):
        tensor = self._torch.from_numpy(values).to(self._place)
        self.wait()
        return tensor

    def copy(self, target, source, stream) -> None:
        with self._on(stream):
            target.copy_(source, non_blocking=True)

    def clear(self, target, stream) -> None:
        with self._on(stream):
            target.zero_()

    def keep_busy(self, stream, milliseconds: float = 100) -> None:
        with self._on(stream):
            self._torch.cuda._sleep(int(1e6 * milliseconds))  # clock cycles: at most 2.5 times as many in a millisecond

    def is_busy(self, stream) -> bool:
        with self._on(stream):
            event = self._torch.cuda.Event()
            event.record()
        return not event.query()

    def seen_from(self, array, stream):
        with self._on(stream):
            return self._torch.from_dlpack(array).clone()

    def to_host(self, array, stream=0) -> np.ndarray:
        with self._on(stream):
            return self._torch.from_dlpack(array).cpu().numpy()

    def current(self, stream):
        return self._on(stream)

    def finish(self, stream) -> None:
        stream.synchronize()

    def wait(self) -> None:
        self._torch.cuda.synchronize(self._place)

    def close(self) -> None:
        self.wait()


def open_arrays(way: str, gpu: int) -> Ours | Torch:
    """The caller's side, in one of the ways."""
    return Ours(gpu) if way == "ours" else Torch(gpu)
