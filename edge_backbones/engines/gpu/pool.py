"""Reuse the GPU memory of feature maps: track who holds it, and which streams may still read it."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from edge_backbones.engines.gpu.memory import GpuMemory
from edge_backbones.engines.gpu.streams import StreamKey, rounded
from edge_backbones.errors import DeviceError, InputError, OutOfMemoryError

_UNUSABLE_BUFFERS = 8  # buffers of one size that other streams may still use before the oldest is taken, behind events
_FREE_BUFFERS = 256  # most buffers of one size that are kept while nobody holds them
SCRATCH_BUFFERS = 8  # most streams that have scratch memory of their own; more of them take turns


@dataclass(eq=False)
class Buffer:
    """Hold a block of device memory.

    Attributes:
        pointer: Address of the block.
        size: Its bytes.
        key: Stream whose work may still read or write it; None for none.
        stream: Handle of that stream.
        readers: Handles of other streams that it was passed to, by key. Each may read it until an event is recorded there,
            after its holder has let go of it.
        after: Events behind the reads of other streams.
    """

    pointer: int
    size: int
    key: StreamKey | None = None
    stream: int = 0
    readers: dict[StreamKey, int] = field(default_factory=dict)
    after: list[Ready] = field(default_factory=list)

    def follows(self, key: StreamKey) -> bool:
        """Return whether work on the stream ``key`` runs after everything that uses this memory."""
        return (self.key == key or self.key is None) and not self.readers and not self.after


class Ready:
    """Hold an event behind the work of one call. It returns to the pool once no output and no context refers to it."""

    __slots__ = ("_pool", "event")

    def __init__(self, pool: Pool, event: Any) -> None:
        self._pool = pool
        self.event = event

    def __del__(self) -> None:
        if not sys.is_finalizing():
            self._pool.give_back_event(self.event)


class Lease:
    """Hold the memory of one call's outputs for its users.

    The call's DeviceArrays, and whoever took one through DLPack, keep the lease alive. When the last of them is gone, the
    memory goes back to the pool. Garbage collection may do that in any thread.

    Args:
        buffer: Memory of all outputs of the call.
        ready: Event behind the work that writes them.
        pool: Where buffer and event belong.
    """

    __slots__ = ("_pool", "_ready", "buffer")

    def __init__(self, buffer: Buffer, ready: Ready, pool: Pool) -> None:
        self.buffer = buffer
        self._ready = ready
        self._pool = pool

    def order(self, consumer: int) -> None:
        """Make the stream ``consumer`` wait for the outputs. Raises InputError if it is being captured."""
        with self._pool.memory as memory:
            key = memory.stream_key(consumer)
            if key != self.buffer.key:
                if memory.is_capturing(consumer):  # to wait would end the capture
                    raise InputError(
                        f"the stream {consumer:#x} is being captured, and its graph cannot wait for maps of a call outside "
                        "it: pass the maps to that stream before the capture"
                    )
                self.buffer.readers[key] = consumer
                memory.follow(consumer, self._ready.event)

    def __del__(self) -> None:
        if not sys.is_finalizing():
            self._pool.give_back(self.buffer)


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

    Garbage collection gives things back anywhere: while a graph is captured, and while a thread holds the lock of this or
    of another pool. So giving back takes no lock and calls no CUDA, and the next call sorts in what came. After ``close``,
    what is given back is freed. Threads may share the pool.
    """

    def __init__(self, memory: GpuMemory) -> None:
        self.memory = memory
        self.lock = threading.Lock()  # of the two below
        self._free: dict[int, list[Buffer]] = {}  # by size, in the order of their last use
        self._scratch: list[Buffer] = []  # in the same order
        self._back: deque[Buffer] = deque()  # given back since the last call
        self._events: deque[Any] = deque()
        self._closed = False

    def take(self, size: int, key: StreamKey, stream: int) -> Buffer:
        """Return a buffer of ``size`` bytes for work that is enqueued on a stream from now on. The host never waits.

        Call it inside ``with memory:``. Raises OutOfMemoryError if freeing unused buffers does not help.

        Args:
            size: Bytes, already rounded.
            key: Key of the stream.
            stream: Its handle.
        """
        if self._back:
            self._sort_in()
        with self.lock:
            same = self._free.setdefault(size, [])
            buffer = self._choose(same, _UNUSABLE_BUFFERS, key)
        if len(same) > _FREE_BUFFERS:
            self._free_surplus(same)
        if buffer is not None and self._belongs_to(buffer, key, stream):
            return buffer
        return self._allocate(size, key, stream)

    def take_scratch(self, size: int, key: StreamKey, stream: int) -> Buffer:
        """Return a buffer of ``size`` bytes or more that is used only until the next call on the same stream.

        Give it back with `give_back_scratch` as soon as the work is enqueued. One buffer serves all calls on a stream, and
        grows to what the largest of them needs. Call it inside ``with memory:``. Raises OutOfMemoryError.
        """
        with self.lock:
            buffer = self._choose(self._scratch, SCRATCH_BUFFERS, key)
        if buffer is not None and buffer.size < size:
            self.memory.free(buffer.pointer)  # waits for what still uses it
        elif buffer is not None and self._belongs_to(buffer, key, stream):
            return buffer
        return self._allocate(rounded(size), key, stream)

    def give_back_scratch(self, buffer: Buffer) -> None:
        """Take a buffer of ``take_scratch`` back."""
        with self.lock:
            if not self._closed:
                self._scratch.append(buffer)
                return
        self.give_back(buffer)

    def _allocate(self, size: int, key: StreamKey, stream: int) -> Buffer:
        try:
            pointer = self.memory.allocate(size)
        except OutOfMemoryError:
            if not self._release():
                raise
            pointer = self.memory.allocate(size)
        return Buffer(pointer, size, key, stream)

    def _choose(self, buffers: list[Buffer], most: int, key: StreamKey) -> Buffer | None:
        """Take the latest buffer out of a list that work on a stream may use at once.

        If there is none among ``most`` buffers, take the oldest one that can be used behind events. None for none.
        """
        for index in range(len(buffers) - 1, -1, -1):
            if buffers[index].follows(key):
                return buffers.pop(index)
        if len(buffers) >= most:
            for index, buffer in enumerate(buffers):
                # An event on a stream that is captured would become part of the capture.
                if buffer.key is None or not self._is_captured(buffer.stream):
                    return buffers.pop(index)
        return None

    def _free_surplus(self, buffers: list[Buffer]) -> None:
        """Free the oldest ones of a list that is too long, which are unlikely to be used again."""
        kept = _FREE_BUFFERS // 2
        with self.lock:
            surplus, buffers[:] = buffers[:-kept], buffers[-kept:]
        for buffer in surplus:
            self.memory.free(buffer.pointer)

    def _is_captured(self, stream: int) -> bool:
        """Return whether a stream is being captured. One that is gone is not."""
        try:
            return self.memory.is_capturing(stream)
        except DeviceError:
            return False

    def _belongs_to(self, buffer: Buffer, key: StreamKey, stream: int) -> bool:
        """Make a stream wait for everything that uses a buffer, which belongs to it from now on.

        If a stream that uses the buffer is gone, free the buffer, which waits, and return False.
        """
        if not buffer.follows(key):
            if buffer.key not in (None, key):
                buffer.readers[buffer.key] = buffer.stream
            if not self._mark_reads(buffer):
                return False
            for ready in buffer.after:
                self.memory.follow(stream, ready.event)
            buffer.after = []
        buffer.key, buffer.stream = key, stream
        return True

    def _sort_in(self) -> None:
        """Sort in what was given back since the last call, with events behind the reads of other streams."""
        captured = []
        while self._back:
            try:
                buffer = self._back.popleft()
            except IndexError:
                break  # another thread took the last one
            if buffer.readers and any(map(self._is_captured, buffer.readers.values())):
                captured.append(buffer)
            elif not buffer.readers or self._mark_reads(buffer):
                with self.lock:
                    self._free.setdefault(buffer.size, []).append(buffer)
        self._back.extend(captured)

    def _mark_reads(self, buffer: Buffer) -> bool:
        """Record an event behind the reads of every other stream.

        If such a stream is gone, free the buffer, which waits, and return False.
        """
        try:
            for key, stream in buffer.readers.items():
                if self.memory.stream_key(stream) != key:
                    raise DeviceError("this handle means another stream now, or here")
                ready = self.new_ready()
                self.memory.record(ready.event, stream)
                buffer.after.append(ready)
        except DeviceError:
            self.memory.free(buffer.pointer)
            return False
        buffer.readers = {}
        return True

    def new_ready(self) -> Ready:
        """Return an event for the work of one call, new or reused. Call it inside ``with memory:``."""
        try:
            return Ready(self, self._events.pop())
        except IndexError:
            return Ready(self, self.memory.new_event())

    def order(self, stream: int, producer: int) -> None:
        """Make work that is enqueued on a stream from now on wait for what is on ``producer`` now."""
        ready = self.new_ready()
        self.memory.record(ready.event, producer)
        self.memory.follow(stream, ready.event)

    def give_back(self, buffer: Buffer) -> None:
        """Take a buffer back that nobody holds any more."""
        self._back.append(buffer)
        if self._closed:
            self._free_late()

    def give_back_event(self, event: Any) -> None:
        """Take an event back that nobody refers to any more."""
        self._events.append(event)
        if self._closed:
            self._free_late()

    def _free_late(self) -> None:
        with contextlib.suppress(DeviceError), self.memory:
            self._free_all()

    def _free_all(self) -> None:
        """Free what was given back and is not sorted in, and the events."""
        steps = CleanUp()
        with contextlib.suppress(IndexError):  # garbage collection adds some, and other threads take some
            while True:
                steps.make(self.memory.free, self._back.popleft().pointer)
        with contextlib.suppress(IndexError):
            while True:
                steps.make(self.memory.free_event, self._events.popleft())
        steps.end()

    def _release(self) -> bool:
        """Free everything that nobody holds. Returns whether that was any memory."""
        with self.lock:
            for buffers in (*self._free.values(), self._scratch):
                self._back.extend(buffers)
                buffers.clear()
        is_any = bool(self._back)
        self._free_all()
        return is_any

    def close(self) -> None:
        """Free everything that nobody holds now, and whatever is returned later. Call it inside ``with memory:``."""
        with self.lock:
            self._closed = True
        self._release()
