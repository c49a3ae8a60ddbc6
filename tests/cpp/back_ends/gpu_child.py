"""Run a bundle with a plan over the stand-ins for CUDA and TensorRT, through the C functions, in a process of its own.

    python -m tests.cpp.back_ends.gpu_child LIBRARY CUDART BUNDLE

The stand-in for libcuda.so.1 must not be in the process of other tests.
"""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

import numpy as np

from edge_backbones.testing import pooled
from tests.cpp.back_ends.c_library import Library, Opened, RefusalError

_TO_DEVICE, _FROM_DEVICE = 1, 2


class Gpu:
    """Memory and streams of the GPU that the stand-in for the CUDA runtime has."""

    def __init__(self, path: str) -> None:
        self._library = ctypes.CDLL(path)

    def call(self, name: str, *arguments: object) -> None:
        code = getattr(self._library, name)(*arguments)
        assert code == 0, (name, code)

    def new_stream(self) -> ctypes.c_void_p:
        stream = ctypes.c_void_p()
        self.call("cudaStreamCreateWithFlags", ctypes.byref(stream), 1)
        return stream

    def allocate(self, size: int) -> int:
        pointer = ctypes.c_void_p()
        self.call("cudaMalloc", ctypes.byref(pointer), ctypes.c_size_t(size))
        assert pointer.value is not None
        return pointer.value

    def copy(self, to: int, source: int, size: int, kind: int, stream: ctypes.c_void_p) -> None:
        self.call("cudaMemcpyAsync", ctypes.c_void_p(to), ctypes.c_void_p(source), ctypes.c_size_t(size), kind, stream)


def image(batch: int) -> np.ndarray:
    return np.random.default_rng(batch).standard_normal((batch, 3, 32, 48)).astype(np.float32)


def refusal(backbone: Opened, *arguments: object) -> str:
    """Return why a call is refused."""
    try:
        backbone.run_at(*arguments)
    except RefusalError as error:
        return str(error)
    raise AssertionError("the call was not refused")


def check_host_calls(backbone: Opened) -> None:
    for batch in (1, 2, 3, 9):
        maps = backbone.run(image(batch))
        for found, expected in zip(maps.values(), pooled(image(batch)), strict=True):
            np.testing.assert_allclose(found, expected, atol=1e-6)


def check_device_call(backbone: Opened, gpu: Gpu) -> None:
    array, stream = image(3), gpu.new_stream()
    described = backbone.outputs(array.shape)
    source = gpu.allocate(array.nbytes)
    targets = [gpu.allocate(info.bytes) for info in described]
    sizes = [info.bytes for info in described]
    gpu.copy(source, array.ctypes.data, array.nbytes, _TO_DEVICE, stream)
    backbone.run_at(source, array.nbytes, array.shape, targets, sizes, stream)
    for target, info, expected in zip(targets, described, pooled(array), strict=True):
        found = np.empty(info.shape[:4], np.float32)
        gpu.copy(found.ctypes.data, target, info.bytes, _FROM_DEVICE, stream)
        gpu.call("cudaStreamSynchronize", stream)
        np.testing.assert_allclose(found, expected, atol=1e-6)
    many = image(5)
    said = refusal(backbone, source, many.nbytes, many.shape, targets, [1 << 20] * 2, stream)
    assert said == "InputError: a batch of 5 on the GPU does not fit: this engine takes 1..4 in one call", said


def main() -> None:
    library, gpu = Library(Path(sys.argv[1])), Gpu(sys.argv[2])
    backbone = library.open(sys.argv[3], device=sys.argv[4])
    name, device = backbone.engine()
    check_host_calls(backbone)
    check_device_call(backbone, gpu)
    backbone.close()
    part = library.open(sys.argv[3], device=sys.argv[4], stages=("pool8",))
    assert list(part.run(image(2))) == ["pool8"]
    said = refusal(part, 256, 1, (1, 3, 32, 48), [256], [1], ctypes.c_void_p())
    assert "open the bundle without a choice of stages" in said, said
    part.close()
    print(name, device)


if __name__ == "__main__":
    try:
        main()
    except RefusalError as error:
        sys.exit(str(error))
