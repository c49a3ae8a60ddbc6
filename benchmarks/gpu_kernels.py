"""Kernels on a GPU without a compiler and without another library: average pooling, a wait, and a check of the order of work.

The driver compiles them from PTX, its portable assembly. On the stand-in for libcuda of tests/driver, which has no kernels,
Python functions take their place, in the order of the same streams.
"""

from __future__ import annotations

import ctypes
import functools
import threading
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from edge_backbones.errors import DeviceError
from edge_backbones.machine import gpus

_THREADS = 256  # in a block
_CAPTURING = 1

# pool: a thread writes one value of the target: the sum of side x side values of the source, times scale. All planes of the
# target lie below each other, as one matrix of `columns` columns. spin: one thread waits. turn: one thread checks that the
# first number at `place` is `mine`, notes in the second one if not, and leaves the next number.
PTX = """
.version 6.0
.target sm_50
.address_size 64

.visible .entry pool(
    .param .u64 source, .param .u64 target, .param .u32 columns, .param .u32 total, .param .u32 side, .param .f32 scale)
{
    .reg .pred %p<2>;
    .reg .f32 %f<4>;
    .reg .b32 %r<16>;
    .reg .b64 %a<4>;

    ld.param.u64 %a1, [source];
    ld.param.u64 %a2, [target];
    ld.param.u32 %r1, [columns];
    ld.param.u32 %r2, [total];
    ld.param.u32 %r3, [side];
    ld.param.f32 %f3, [scale];
    cvta.to.global.u64 %a1, %a1;
    cvta.to.global.u64 %a2, %a2;
    mov.u32 %r4, %ctaid.x;
    mov.u32 %r5, %ntid.x;
    mov.u32 %r6, %tid.x;
    mad.lo.u32 %r7, %r4, %r5, %r6;      // number of the value that this thread writes
    setp.ge.u32 %p1, %r7, %r2;
    @%p1 bra DONE;
    div.u32 %r8, %r7, %r1;              // its row
    mul.lo.u32 %r9, %r8, %r1;
    sub.u32 %r9, %r7, %r9;              // its column
    mul.lo.u32 %r10, %r1, %r3;          // values in a row of the source
    mul.lo.u32 %r11, %r8, %r3;
    mul.lo.u32 %r11, %r11, %r10;
    mul.lo.u32 %r12, %r9, %r3;
    add.u32 %r11, %r11, %r12;           // first value of its patch
    mov.f32 %f1, 0f00000000;
    mov.u32 %r13, 0;
ROW:
    mov.u32 %r14, 0;
VALUE:
    add.u32 %r15, %r11, %r14;
    mul.wide.u32 %a3, %r15, 4;
    add.u64 %a3, %a1, %a3;
    ld.global.f32 %f2, [%a3];
    add.f32 %f1, %f1, %f2;
    add.u32 %r14, %r14, 1;
    setp.lt.u32 %p1, %r14, %r3;
    @%p1 bra VALUE;
    add.u32 %r11, %r11, %r10;
    add.u32 %r13, %r13, 1;
    setp.lt.u32 %p1, %r13, %r3;
    @%p1 bra ROW;
    mul.f32 %f1, %f1, %f3;
    mul.wide.u32 %a3, %r7, 4;
    add.u64 %a3, %a2, %a3;
    st.global.f32 [%a3], %f1;
DONE:
    ret;
}

.visible .entry spin(.param .u64 nanoseconds)
{
    .reg .pred %p<2>;
    .reg .b64 %t<4>;

    ld.param.u64 %t1, [nanoseconds];
    mov.u64 %t2, %globaltimer;
AGAIN:
    mov.u64 %t3, %globaltimer;
    sub.u64 %t3, %t3, %t2;
    setp.lt.u64 %p1, %t3, %t1;
    @%p1 bra AGAIN;
    ret;
}

.visible .entry turn(.param .u64 place, .param .u32 mine)
{
    .reg .pred %p<2>;
    .reg .b32 %r<4>;
    .reg .b64 %a<2>;

    ld.param.u64 %a1, [place];
    ld.param.u32 %r1, [mine];
    cvta.to.global.u64 %a1, %a1;
    ld.volatile.global.u32 %r2, [%a1];
    setp.eq.u32 %p1, %r2, %r1;
    @%p1 bra NEXT;
    mov.u32 %r3, 1;
    st.volatile.global.u32 [%a1+4], %r3;
NEXT:
    add.u32 %r3, %r1, 1;
    st.volatile.global.u32 [%a1], %r3;
    ret;
}
"""


class Kernels(Protocol):
    """Enqueue work on a stream. The primary context has to be current: call it inside ``with memory:``."""

    def pool(self, source: int, target: int, shape: Sequence[int], side: int, stream: int) -> None:
        """Enqueue average pooling of float32 NCHW: ``shape`` of the source, ``side`` pixels of a window and of its step."""
        ...

    def spin(self, milliseconds: float, stream: int) -> None:
        """Enqueue a wait."""
        ...

    def turn(self, place: int, mine: int, stream: int) -> None:
        """Enqueue a check that the uint32 at ``place`` is ``mine``, and set it to the next number; note a fault behind it."""
        ...

    def is_capturing(self, stream: int) -> bool:
        """Return whether a stream is captured as a graph."""
        ...


@functools.cache
def on_standin() -> bool:
    """Return whether libcuda is the stand-in of tests/driver, which no other library can use."""
    try:
        return hasattr(gpus.load_driver(), "standin_kernel")
    except OSError:
        return False


@functools.cache
def kernels() -> Kernels:
    """Return the kernels of this process."""
    return StandInKernels() if on_standin() else DriverKernels()


class DriverKernels:
    """The kernels, compiled by the driver."""

    def __init__(self) -> None:
        self._library = gpus.load_driver()
        self._driver = gpus.CtypesDriver(self._library)
        self._functions: dict[tuple[int, str], ctypes.c_void_p] = {}
        self._lock = threading.Lock()

    def pool(self, source: int, target: int, shape: Sequence[int], side: int, stream: int) -> None:
        batch, channels, height, width = shape
        columns, total = width // side, batch * channels * (height // side) * (width // side)
        values = (
            ctypes.c_uint64(source),
            ctypes.c_uint64(target),
            ctypes.c_uint32(columns),
            ctypes.c_uint32(total),
            ctypes.c_uint32(side),
            ctypes.c_float(1 / side**2),
        )
        self._launch("pool", -(-total // _THREADS), _THREADS, stream, values)

    def spin(self, milliseconds: float, stream: int) -> None:
        self._launch("spin", 1, 1, stream, (ctypes.c_uint64(int(1e6 * milliseconds)),))

    def turn(self, place: int, mine: int, stream: int) -> None:
        self._launch("turn", 1, 1, stream, (ctypes.c_uint64(place), ctypes.c_uint32(mine)))

    def is_capturing(self, stream: int) -> bool:
        found = self._driver.cuStreamIsCapturing(stream)
        return bool(gpus.checked(self._driver, found, "cuStreamIsCapturing") == _CAPTURING)

    def _launch(self, name: str, blocks: int, threads: int, stream: int, values: Sequence[Any]) -> None:
        parameters = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
        self._call(
            "cuLaunchKernel",
            self._function(name),
            *(ctypes.c_uint(size) for size in (blocks, 1, 1, threads, 1, 1, 0)),
            ctypes.c_void_p(stream),
            parameters,
            None,
        )

    def _function(self, name: str) -> ctypes.c_void_p:
        """Return a kernel in the current context. It is loaded once and kept, as long as the process runs."""
        context = ctypes.c_void_p()
        self._call("cuCtxGetCurrent", ctypes.byref(context))
        key = (context.value or 0, name)
        with self._lock:
            if key not in self._functions:
                module, function = ctypes.c_void_p(), ctypes.c_void_p()
                self._call("cuModuleLoadData", ctypes.byref(module), PTX.encode())
                self._call("cuModuleGetFunction", ctypes.byref(function), module, name.encode())
                self._functions[key] = function
            return self._functions[key]

    def _call(self, name: str, *arguments: Any) -> None:
        code = getattr(self._library, name)(*arguments)
        if code:
            raise DeviceError(f"{name} failed: {gpus.error_name(self._driver, code)}")


class StandInKernels:
    """The kernels in numpy, as work of the stand-in for libcuda."""

    def __init__(self) -> None:
        from tests.driver.standin import StandIn

        self._driver = StandIn()

    def pool(self, source: int, target: int, shape: Sequence[int], side: int, stream: int) -> None:
        batch, channels, height, width = shape
        rows, columns = batch * channels * (height // side), width // side

        def run() -> None:
            values = np.frombuffer(self._driver.bytes_at(source, 4 * rows * columns * side**2), np.float32)
            means = values.reshape(rows, side, columns, side).mean(axis=(1, 3), dtype=np.float32)
            self._driver.bytes_at(target, means.nbytes)[:] = means.tobytes()

        self._enqueue("pool", stream, run)

    def spin(self, milliseconds: float, stream: int) -> None:
        self._enqueue("spin", stream, lambda: None)  # all work there is as late as it can be

    def turn(self, place: int, mine: int, stream: int) -> None:
        def run() -> None:
            numbers = np.frombuffer(self._driver.bytes_at(place, 8), np.uint32)
            numbers[1] |= numbers[0] != mine
            numbers[0] = mine + 1

        self._enqueue("turn", stream, run)

    def is_capturing(self, stream: int) -> bool:
        return self._driver.is_capturing(stream)

    def _enqueue(self, name: str, stream: int, run: Any) -> None:
        code = self._driver.kernel(stream, run)
        if code:
            raise DeviceError(f"{name} failed: CUDA error {code}")
