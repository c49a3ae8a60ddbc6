"""``python -m benchmarks.call_cost``: microseconds of Python in a call that only enqueues, on a machine without a GPU.

CUDA and TensorRT are stood in for by functions that return at once, so that what is left is our own code between a caller and
the driver: a lower bound of what a call costs on a GPU, where ``make gpu`` measures it. Each figure is the median of 60
rounds of 100 calls.

``--bindings`` keeps the real cuda-bindings and the libcuda.so.1 that they find, and stands in for TensorRT alone. Without a
GPU, take the stand-in for libcuda: ``python -m tests.driver.build FOLDER``, then ``LD_LIBRARY_PATH=FOLDER STANDIN_EAGER=1``.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np

from benchmarks.gpu_common import pooling_input
from edge_backbones import EdgeBackbone
from edge_backbones.engines.gpu import memory as cuda
from edge_backbones.engines.gpu.arrays import DeviceArray
from edge_backbones.engines.tensorrt import library as tensorrt_library
from edge_backbones.engines.tensorrt import session as tensorrt_session
from edge_backbones.engines.tensorrt.session import TensorRtSession
from edge_backbones.machine import gpus
from edge_backbones.spec import InputSpec
from edge_backbones.testing import SPEC


class FreeDriver:
    """The functions of ``cuda.bindings.driver``, which return at once.

    Each returns (code, value); the value is a new pointer where one is asked for.
    """

    CUstreamCaptureMode = SimpleNamespace(CU_STREAM_CAPTURE_MODE_RELAXED=2)
    CUpointer_attribute = SimpleNamespace(
        CU_POINTER_ATTRIBUTE_CONTEXT=1,
        CU_POINTER_ATTRIBUTE_DEVICE_POINTER=3,
        CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL=9,
    )

    def __init__(self) -> None:
        self._next = 1 << 20
        self._host: list[Any] = []
        made = ("cuMemAlloc", "cuStreamCreate", "cuEventCreate")
        known = ("cuDeviceGet", "cuDevicePrimaryCtxRetain", "cuStreamGetId")
        known += ("cuStreamIsCapturing", "cuStreamEndCapture", "cuGraphInstantiate")
        known += ("cuThreadExchangeStreamCaptureMode",)
        for name in made:
            setattr(self, name, self._make)
        for name in known:
            setattr(self, name, lambda *_: (0, 0))

    def cuDriverGetVersion(self) -> tuple[int, int]:  # noqa: N802
        """Return the release of CUDA."""
        return 0, 13000

    def cuPointerGetAttribute(self, attribute: int, pointer: int) -> tuple[int, int]:  # noqa: N802
        """Return that a pointer is page-locked memory of the first GPU."""
        return 0, {1: 0, 3: pointer, 9: 0}[attribute]

    def cuMemHostAlloc(self, size: int, flags: int) -> tuple[int, int]:  # noqa: N802
        """Return real memory, because input and output arrays are made over it."""
        self._host.append(ctypes.create_string_buffer(size))
        return 0, ctypes.addressof(self._host[-1])

    def _make(self, *_: Any) -> tuple[int, int]:
        self._next += 1 << 24
        return 0, self._next

    def __getattr__(self, name: str) -> Callable[..., tuple[int]]:
        def done(*_: Any) -> tuple[int]:
            return (0,)

        setattr(self, name, done)
        return done


def free_tensorrt(input: InputSpec) -> Any:
    """Return a TensorRT library whose engine is the pooling backbone and whose calls return at once."""

    class Context:
        shape: tuple[int, ...] = ()

        def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
            self.shape = shape
            return True

        def get_tensor_shape(self, name: str) -> tuple[int, ...]:
            batch, channels, height, width = self.shape
            k = {"pool4": 4, "pool8": 8}[name]
            return batch, channels, height // k, width // k

        def infer_shapes(self) -> list[str]:
            return []

        def set_tensor_address(self, name: str, pointer: int) -> bool:
            return True

        def update_device_memory_size_for_shapes(self) -> int:
            return 1 << 20

        def set_device_memory(self, pointer: int, size: int) -> None:
            pass

        def execute_async_v3(self, stream: int) -> bool:
            return True

    names = [input.name, *SPEC.outputs]
    engine = SimpleNamespace(
        num_io_tensors=len(names),
        num_optimization_profiles=1,
        get_tensor_name=names.__getitem__,
        get_tensor_mode=lambda name: SimpleNamespace(name="INPUT" if name == input.name else "OUTPUT"),
        get_tensor_dtype=lambda name: SimpleNamespace(name="FLOAT"),
        get_tensor_shape=lambda name: (-1, 3, -1, -1),
        get_tensor_profile_shape=lambda name, profile: (input.min_shape, input.opt_shape, input.max_shape),
        create_execution_context=lambda *_: Context(),
    )
    runtime = SimpleNamespace(deserialize_cuda_engine=lambda data: engine)
    return SimpleNamespace(
        __name__="free_tensorrt",
        __version__="11.4",
        Runtime=lambda log: runtime,
        ExecutionContextAllocationStrategy=SimpleNamespace(USER_MANAGED=2),
    )


@contextlib.contextmanager
def free_gpu() -> Iterator[cuda.GpuMemory]:
    """Stand in for the driver, and give memory on it."""
    memory = cuda.GpuMemory(0, FreeDriver())
    gpu = gpus.Gpu(0, "none", "sm_90", 1 << 34, "13.0", 1, False)
    with (
        mock.patch.multiple(gpus, find_gpus=lambda: (gpu,), no_gpu_reason=lambda: ""),
        mock.patch.object(tensorrt_session, "open_memory", return_value=memory),
    ):
        yield memory


@contextlib.contextmanager
def real_bindings() -> Iterator[cuda.GpuMemory]:
    """Memory through the real bindings."""
    yield cuda.open_memory(0, "cuda-bindings")


def measure(*, bindings: bool = False) -> dict[str, float]:
    """Return the microseconds of each kind of call. ``bindings``: through the real cuda-bindings."""
    input, found = pooling_input(), {}
    log = SimpleNamespace(clear=lambda: None, last_error=lambda: "")
    with (
        real_bindings() if bindings else free_gpu() as memory,
        mock.patch.multiple(
            tensorrt_library,
            load_library=lambda _: free_tensorrt(input),
            logger_of=lambda _: log,
            against_driver=lambda *_: "",
        ),
    ):
        with memory:
            stream, pointer = memory.new_stream(), memory.allocate(4 * math.prod(input.opt_shape))
        session = TensorRtSession(bytearray(b"a plan"), flavour="tensorrt", input=input, outputs=SPEC.outputs)
        frame = DeviceArray(
            pointer, input.opt_shape, np.dtype(np.float32), device=0, owner=None, synchronize=None, stream=stream
        )
        with EdgeBackbone(SPEC, input, session, device="cuda:0") as backbone:
            found["backbone(array on the GPU)"] = microseconds(lambda: backbone(frame, stream=stream))
            found["backbone.graphed(array on the GPU)()"] = microseconds(backbone.graphed(frame, stream=stream))
            buffer = backbone.input_buffer()
            found["backbone(array of input_buffer)"] = microseconds(lambda: backbone(buffer))
            found["backbone.graphed(array of input_buffer)()"] = microseconds(backbone.graphed(buffer))
    return found


def microseconds(call: Callable[[], Any], rounds: int = 60, calls: int = 100) -> float:
    """Return the median time of a call, after 200 that warm up."""
    for _ in range(200):
        call()
    taken = []
    for _ in range(rounds):
        start = time.perf_counter()
        for _ in range(calls):
            call()
        taken.append((time.perf_counter() - start) / calls)
    return 1e6 * statistics.median(taken)


if __name__ == "__main__":
    for name, value in measure(bindings="--bindings" in sys.argv[1:]).items():
        print(f"{name}: {value:.1f} us")
