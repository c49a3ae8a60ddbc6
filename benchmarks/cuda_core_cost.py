"""``python -m benchmarks.cuda_core_cost``: what NVIDIA's cuda.core would cost in the place of cuda-bindings alone.

It needs cuda-bindings, cuda-core and a libcuda.so.1. Without a GPU, take the stand-in for libcuda: ``python -m
tests.driver.build FOLDER``, then ``LD_LIBRARY_PATH=FOLDER STANDIN_EAGER=1``.

Opening: processes that import the package and make GPU memory, a stream and an event usable, without and with cuda.core, in
turns. Calls: the median of 60 rounds of 100 in one process.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
from typing import Any

import numpy as np

from benchmarks.call_cost import microseconds
from edge_backbones.engines.gpu.arrays import DeviceArray, from_foreign
from edge_backbones.engines.gpu.memory import open_memory

_OPEN = """
import resource, time
started = time.perf_counter()
import edge_backbones.engines.tensorrt.session
from edge_backbones.engines.gpu.memory import open_memory
{more}
with open_memory(0, "cuda-bindings") as memory:
    memory.new_stream(), memory.new_event(), memory.allocate(1 << 20)
print(time.perf_counter() - started, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""
_CORE = "import cuda.core; device = cuda.core.Device(0); device.set_current(); device.create_stream()"


class Foreign:
    """An array of another library, which has DLPack and nothing else."""

    def __init__(self, array: DeviceArray) -> None:
        self._array = array

    def __dlpack__(self, **options: Any) -> object:
        return self._array.__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self._array.__dlpack_device__()


def opening(turns: int = 15) -> dict[str, tuple[float, float]]:
    """Return seconds and megabytes of a process that opens the GPU, with cuda-bindings alone and with cuda.core."""
    found: dict[str, list[tuple[float, float]]] = {"cuda-bindings": [], "cuda.core too": []}
    for _ in range(turns):
        for name, more in (("cuda-bindings", ""), ("cuda.core too", _CORE)):
            done = subprocess.run(
                [sys.executable, "-c", _OPEN.format(more=more)], capture_output=True, text=True, check=True
            )
            seconds, megabytes = map(float, done.stdout.split())
            found[name].append((seconds, megabytes))
    return {
        name: (statistics.median(row[0] for row in rows), statistics.median(row[1] for row in rows))
        for name, rows in found.items()
    }


def calls() -> dict[str, tuple[float, float]]:
    """Return microseconds of the same step through cuda-bindings and through cuda.core."""
    from cuda import core  # only this benchmark needs it
    from cuda.core.utils import StridedMemoryView

    memory = open_memory(0, "cuda-bindings")
    with memory:
        stream, event, pointer = memory.new_stream(), memory.new_event(), memory.allocate(1 << 20)
        device = core.Device(0)
        device.set_current()
        own = device.create_stream()
        own_event = own.record()
        shape = (2, 3, 224, 224)
        frame = DeviceArray(pointer, shape, np.dtype(np.float32), device=0, owner=None, synchronize=None)
        other = Foreign(frame)

        def allocate() -> None:
            memory.free(memory.allocate(1 << 20))

        def view() -> Any:
            """Read what a call has to know of an array. A view reads it when it is first asked."""
            found = StridedMemoryView.from_dlpack(other, stream_ptr=stream)
            return found.ptr, found.shape, found.strides, found.dtype

        return {
            "record an event": (
                microseconds(lambda: memory.record(event, stream)),
                microseconds(lambda: own.record(own_event)),
            ),
            "wait for an event on a stream": (
                microseconds(lambda: memory.follow(stream, event)),
                microseconds(lambda: own.wait(own_event)),
            ),
            "take a caller's stream": (
                microseconds(lambda: memory.stream_key(stream)),
                microseconds(lambda: core.Stream.from_handle(stream)),
            ),
            "allocate and free": (
                microseconds(allocate),
                microseconds(lambda: device.allocate(1 << 20, stream=own).close(own)),
            ),
            "make an array and read it through DLPack": (
                microseconds(lambda: from_foreign(other, stream=stream)),
                microseconds(view),
            ),
        }


if __name__ == "__main__":
    for name, (seconds, megabytes) in opening().items():
        print(f"opening with {name}: {seconds:.3f} s, {megabytes:.0f} MB")
    for name, (bindings, core_) in calls().items():
        print(f"{name}: cuda-bindings {bindings:.2f} us, cuda.core {core_:.2f} us")
