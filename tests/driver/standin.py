"""What tests ask the stand-in for libcuda, and tell it."""

from __future__ import annotations

import contextlib
import ctypes
import itertools
from collections.abc import Callable
from typing import Any

_HANDLE, _SIZE, _TEXT = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p
_KERNEL = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
_PROTOTYPES = {
    "calls": (_SIZE, [_TEXT]),
    "call": (_TEXT, [_SIZE]),
    "note": (ctypes.c_int, [_TEXT]),
    "reset": (None, []),
    "fail_at": (None, [_TEXT, ctypes.c_long, ctypes.c_int]),
    "failed": (_TEXT, []),
    "violations": (_SIZE, []),
    "violation": (_TEXT, [_SIZE]),
    "live": (_SIZE, [_TEXT]),
    "live_bytes": (_SIZE, [ctypes.c_int]),
    "range_is_known": (ctypes.c_int, [ctypes.c_uint64, _SIZE]),
    "allocate": (ctypes.c_uint64, [_SIZE]),
    "free": (None, [ctypes.c_uint64]),
    "drain": (None, [_HANDLE]),
    "set_memory": (None, [_SIZE]),
    "set_eager": (None, [ctypes.c_int]),
    "delay_us": (None, [ctypes.c_double]),
    "streams": (_SIZE, [ctypes.POINTER(_HANDLE), _SIZE]),
    "pending": (_SIZE, [_HANDLE]),
    "kernel": (ctypes.c_int, [_HANDLE, _KERNEL, ctypes.c_void_p]),
    "invalidate": (None, [_HANDLE]),
    "is_capturing": (ctypes.c_int, [_HANDLE]),
}


class StandIn:
    """The stand-in that this process has loaded as libcuda.so.1."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL("libcuda.so.1")
        for name, (returned, taken) in _PROTOTYPES.items():
            function = getattr(self._library, f"standin_{name}")
            function.restype, function.argtypes = returned, taken
        self._kernels: dict[int, Any] = {}  # those that may still run
        self._numbers = itertools.count()
        self._finished: list[int] = []  # and those that cannot

    def calls(self, name: str = "*") -> int:
        """How often a function was called since the last reset, by its name without _v2; by default all together."""
        return self._library.standin_calls(name.encode())

    def log(self) -> list[str]:
        """The names of all calls since the last reset, in order."""
        return [self._library.standin_call(i).decode() for i in range(self.calls())]

    def note(self, name: str) -> int:
        """Count a call of another library among those of the driver; returns an error that it should fail with, or 0."""
        return self._library.standin_note(name.encode())

    def reset(self) -> None:
        """Forget calls, violations, failures to come, and that the GPU was lost."""
        self._library.standin_reset()

    def fail_at(self, name: str, nth: int, code: int) -> None:
        """Let the ``nth`` next call of a function (of any, for "*") answer with an error; 0 for none."""
        self._library.standin_fail_at(name.encode(), nth, code)

    @property
    def failed(self) -> str:
        """The function that ``fail_at`` let fail; empty for none."""
        return self._library.standin_failed().decode()

    def violations(self) -> list[str]:
        """What broke a rule that the real driver does not check."""
        return [self._library.standin_violation(i).decode() for i in range(self._library.standin_violations())]

    def take_violations(self) -> list[str]:
        """The violations that a test made on purpose; they are forgotten."""
        found = self.violations()
        self.reset()
        return found

    def live(self, what: str) -> int:
        """How many exist of "stream", "event", "graph", "executable", "pool", "context", "user object", and of blocks of
        memory: "device", "host"."""
        return self._library.standin_live(what.encode())

    def live_bytes(self, *, host: bool = False) -> int:
        """Bytes that are allocated on devices, or page-locked ones of the host."""
        return self._library.standin_live_bytes(host)

    def left_over(self) -> dict[str, int]:
        """What exists, by kind; kinds of which there is nothing are left out."""
        kinds = ("stream", "event", "graph", "executable", "user object", "device", "host")
        counts = {what: self.live(what) for what in kinds}
        return {name: count for name, count in counts.items() if count}

    def allocate(self, size: int) -> int:
        """Memory of the first GPU that belongs to the test; it is no call of the driver."""
        return self._library.standin_allocate(size)

    def free(self, pointer: int) -> None:
        """Free memory of ``allocate``."""
        self._library.standin_free(pointer)

    def drain(self, stream: int) -> None:
        """Let the work of a stream run; it is no call of the driver. A context has to be current."""
        self._library.standin_drain(stream)

    def set_memory(self, size: int) -> None:
        """Change how much memory each GPU has."""
        self._library.standin_set_memory(size)

    def set_eager(self, eager: bool) -> None:
        """Run work as soon as it is enqueued, or as late as possible."""
        self._library.standin_set_eager(eager)

    def delay_us(self, microseconds: float) -> None:
        """Set the simulated time that each piece of work takes."""
        self._library.standin_delay_us(microseconds)

    def streams(self) -> list[int]:
        """The handles of the streams that exist, the newest first."""
        handles = (_HANDLE * self._library.standin_streams(None, 0))()
        self._library.standin_streams(handles, len(handles))
        return list(handles)

    def pending(self, stream: int) -> int:
        """Number of pieces of work in the queue of a stream."""
        return self._library.standin_pending(stream)

    def kernel(self, stream: int, function: Callable[[], None]) -> int:
        """Enqueue a function in the place of a kernel; returns the code. A captured one runs at every launch."""
        with contextlib.suppress(IndexError):  # threads share the list
            while True:
                del self._kernels[self._finished.pop()]
        number, captured = next(self._numbers), self.is_capturing(stream)

        def run(_: object) -> None:
            function()
            if not captured:
                self._finished.append(number)

        self._kernels[number] = _KERNEL(run)
        return self._library.standin_kernel(stream, self._kernels[number], None)

    def is_capturing(self, stream: int) -> bool:
        """Is a stream captured? It does not count as a call."""
        return bool(self._library.standin_is_capturing(stream))

    def invalidate(self, stream: int) -> None:
        """Spoil the capture of a stream, as work does that cannot be captured."""
        self._library.standin_invalidate(stream)

    def bytes_at(self, pointer: int, size: int) -> memoryview:
        """Give the memory of a device, for kernels and tests; a range that is not allocated is a violation, and zeros."""
        if not self._library.standin_range_is_known(pointer, size):
            return memoryview(bytearray(size))
        return memoryview((ctypes.c_ubyte * size).from_address(pointer)).cast("B")
