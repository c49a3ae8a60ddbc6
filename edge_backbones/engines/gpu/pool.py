"""Reuse the GPU memory of feature maps: track who holds it, and which streams may still read it."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from edge_backbones.engines.gpu.memory import GpuMemory
from edge_backbones.engines.gpu.streams import StreamKey
from edge_backbones.errors import DeviceError, OutOfMemoryError

_UNUSABLE_BUFFERS = 8  # wait for the GPU once other streams may still read this many buffers of one size
_FREE_BUFFERS = 256  # most outputs that are kept for later calls while nobody holds them


@dataclass(eq=False)
class Buffer:
    """Hold a block of device memory.

    ``key``: the stream whose work may still read or write it, None for none. ``foreign``: another stream reads it too,
    so it is free only after a wait for the whole GPU.
    """

    pointer: int
    size: int
    key: StreamKey | None = None
    foreign: bool = False

    def follows(self, key: StreamKey) -> bool:
        """Return whether work on the stream ``key`` runs after everything that uses this memory."""
        return not self.foreign and self.key in (None, key)


class Ready:
    """Hold an event behind the work of one call. It returns to the pool once no output and no context refers to it."""

    __slots__ = ("_pool", "event")

    def __init__(self, pool: Pool, event: int) -> None:
        self._pool = pool
        self.event = event

    def __del__(self) -> None:
        if not sys.is_finalizing():
            self._pool.give_back_event(self.event)


class Lease:
    """Hold one output for its user.

    A DeviceArray, and whoever took it through DLPack, keep the lease alive. When the last of them is gone, the memory
    is given back.

    Args:
        buffer: The output's memory.
        ready: Event behind the work that writes it.
        pool: Where the event belongs.
        give_back: Takes the buffer back. Garbage collection may call it in any thread.
    """

    __slots__ = ("_give_back", "_pool", "_ready", "buffer")

    def __init__(self, buffer: Buffer, ready: Ready, pool: Pool, give_back: Callable[[Buffer], None]) -> None:
        self.buffer = buffer
        self._ready = ready
        self._pool = pool
        self._give_back = give_back

    def order(self, consumer: int) -> None:
        """Make the stream ``consumer`` wait for this output."""
        with self._pool.memory as memory:
            if memory.stream_key(consumer) != self.buffer.key:
                self.buffer.foreign = True
                memory.follow(consumer, self._ready.event)

    def __del__(self) -> None:
        if not sys.is_finalizing():
            self._give_back(self.buffer)


class CleanUp:
    """Run every clean-up step even if an earlier one failed; `end` raises the first error."""

    def __init__(self) -> None:
        self._first: DeviceError | None = None

    def make(self, step: Callable[..., None], *arguments: Any) -> None:
        """Run ``step``, and remember its DeviceError."""
        try:
            step(*arguments)
        except DeviceError as error:
            self._first = self._first or error

    def end(self) -> None:
        """Raise the first error, if there was one."""
        if self._first is not None:
            raise self._first


class Pool:
    """Keep device memory and events between calls. Work that runs after their last use gets them again.

    Returning something only notes it, because garbage collection may return it anywhere, even while a graph is
    captured. After ``close``, what is returned is freed. Threads may share the pool.
    """

    def __init__(self, memory: GpuMemory) -> None:
        self.memory = memory
        # Reentrant, because garbage collection may return something while this thread holds the lock.
        self.lock = threading.RLock()
        self._free: dict[int, list[Buffer]] = {}
        self._count = 0  # number of free buffers
        self._events: list[int] = []
        self._closed = False

    def take(self, size: int, key: StreamKey) -> Buffer:
        """Return a buffer of ``size`` bytes for work on the stream ``key``.

        ``size`` is already rounded. Call it inside ``with memory:``. Raises OutOfMemoryError if freeing unused buffers
        does not help.
        """
        with self.lock:
            same = self._free.get(size, []) if self._count <= _FREE_BUFFERS else []
            for i in range(len(same) - 1, -1, -1):
                if same[i].follows(key):
                    self._count -= 1
                    buffer = same.pop(i)
                    buffer.key = key
                    return buffer
            settle = len(same) >= _UNUSABLE_BUFFERS or self._count > _FREE_BUFFERS
        if settle:
            self._settle()
            return self.take(size, key)
        try:
            pointer = self.memory.allocate(size)
        except OutOfMemoryError:
            if not self._count:
                raise
            self._release_free()
            pointer = self.memory.allocate(size)
        return Buffer(pointer, size, key)

    def _take_free(self) -> list[Buffer]:
        with self.lock:
            free, self._free, self._count = self._free, {}, 0
        return [buffer for same in free.values() for buffer in same]

    def _settle(self) -> None:
        """Wait until all streams are past the free buffers, and free those that are unlikely to be used again."""
        settled, surplus = self._take_free(), []
        try:
            self.memory.wait_for_all()
            for buffer in settled:
                buffer.key, buffer.foreign = None, False
            surplus, settled = settled[: -_FREE_BUFFERS // 2], settled[-_FREE_BUFFERS // 2 :]
        finally:
            for buffer in settled:
                self._keep(buffer)
        steps = CleanUp()
        for buffer in surplus:
            steps.make(self.memory.free, buffer.pointer)
        steps.end()

    def _keep(self, buffer: Buffer) -> None:
        with self.lock:
            self._free.setdefault(buffer.size, []).append(buffer)
            self._count += 1

    def _release_free(self) -> None:
        free = self._take_free()
        with self.lock:
            events, self._events = self._events, []
        steps = CleanUp()
        for buffer in free:
            steps.make(self.memory.free, buffer.pointer)
        for event in events:
            steps.make(self.memory.free_event, event)
        steps.end()

    def new_ready(self) -> Ready:
        """Return an event for the work of one call, new or reused. Call it inside ``with memory:``."""
        with self.lock:
            event = self._events.pop() if self._events else None
        return Ready(self, self.memory.new_event() if event is None else event)

    def give_back(self, buffer: Buffer) -> None:
        """Take a buffer back that nobody holds any more."""
        self._keep(buffer)
        self._after_close()

    def give_back_event(self, event: int) -> None:
        """Take an event back that nobody refers to any more."""
        with self.lock:
            self._events.append(event)
        self._after_close()

    def _after_close(self) -> None:
        if self._closed:
            with contextlib.suppress(DeviceError), self.memory:
                self._release_free()

    def close(self) -> None:
        """Free everything that nobody holds now, and whatever is returned later. Call it inside ``with memory:``."""
        self._closed = True
        self._release_free()
