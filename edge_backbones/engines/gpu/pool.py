"""Reuse the GPU memory of feature maps: track who holds it, and which streams may still read it."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from edge_backbones.engines.gpu.memory import GpuMemory
from edge_backbones.engines.gpu.streams import StreamKey, rounded
from edge_backbones.errors import DeviceError, InputError, OutOfMemoryError

_UNUSABLE_BUFFERS = 8  # buffers of one size that other streams may still use before the oldest is taken, behind events
_FREE_BUFFERS = 256  # most outputs that are kept for later calls while nobody holds them
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


def _usable(buffers: Sequence[Buffer], key: StreamKey) -> int:
    """Return the index of the latest buffer that work on a stream may use at once; -1 if there is none."""
    for index in range(len(buffers) - 1, -1, -1):
        if buffers[index].follows(key):
            return index
    return -1


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
        self._returned: list[Buffer] = []  # of the free ones, those whose readers have no event behind them yet
        self._scratch: list[Buffer] = []  # in the order of their last use
        self._events: list[Any] = []
        self._closed = False

    def take(self, size: int, key: StreamKey, stream: int) -> Buffer:
        """Return a buffer of ``size`` bytes for work that is enqueued on a stream from now on. The host never waits.

        Call it inside ``with memory:``. Raises OutOfMemoryError if freeing unused buffers does not help.

        Args:
            size: Bytes, already rounded.
            key: Key of the stream.
            stream: Its handle.
        """
        if self._returned:
            self._mark_reads()
        if self._count > _FREE_BUFFERS:
            self._settle()
        with self.lock:
            same = [] if self._closed else self._free.setdefault(size, [])
            index = _usable(same, key)
            if index < 0 and len(same) >= _UNUSABLE_BUFFERS:
                index = self._oldest(same)
            if index >= 0:
                self._count -= 1
                buffer = same.pop(index)
        if index < 0:
            return self._allocate(size, key, stream)
        if not buffer.follows(key):
            self._order(buffer, key, stream)
        buffer.key, buffer.stream = key, stream  # it belongs to that stream from now on
        return buffer

    def take_scratch(self, size: int, key: StreamKey, stream: int) -> Buffer:
        """Return a buffer of ``size`` bytes or more that is used only until the next call on the same stream.

        Give it back with `give_back_scratch` as soon as the work is enqueued. One buffer serves all calls on a stream, and
        grows to what the largest of them needs. Call it inside ``with memory:``. Raises OutOfMemoryError.
        """
        with self.lock:
            kept = [] if self._closed else self._scratch
            index = _usable(kept, key)
            if index < 0 and len(kept) >= SCRATCH_BUFFERS:
                index = self._oldest(kept)
            buffer = None if index < 0 else kept.pop(index)
        if buffer is not None and buffer.size < size:
            self.memory.free(buffer.pointer)  # waits for what still uses it
            buffer = None
        if buffer is None:
            return self._allocate(rounded(size), key, stream)
        if not buffer.follows(key):
            self._order(buffer, key, stream)
        buffer.key, buffer.stream = key, stream
        return buffer

    def give_back_scratch(self, buffer: Buffer) -> None:
        """Take a buffer of ``take_scratch`` back."""
        with self.lock:
            self._scratch.append(buffer)
        if self._closed:
            self._free_after_close()

    def _allocate(self, size: int, key: StreamKey, stream: int) -> Buffer:
        try:
            pointer = self.memory.allocate(size)
        except OutOfMemoryError:
            if not self._count and not self._scratch:
                raise
            self._release_free()
            pointer = self.memory.allocate(size)
        return Buffer(pointer, size, key, stream)

    def _oldest(self, buffers: Sequence[Buffer]) -> int:
        """Return the index of the oldest buffer that can be used behind events; -1 if there is none.

        If its stream is being captured, an event there would become part of the capture.
        """
        for index, buffer in enumerate(buffers):
            if not buffer.readers and (buffer.key is None or not self._is_captured(buffer.stream)):
                return index
        return -1

    def _is_captured(self, stream: int) -> bool:
        """Return whether a stream is being captured. One that is gone is not; `_mark` then waits for the whole GPU."""
        try:
            return self.memory.is_capturing(stream)
        except DeviceError:
            return False

    def _order(self, buffer: Buffer, key: StreamKey, stream: int) -> None:
        """Make a stream wait for everything that uses a buffer."""
        readers = dict(buffer.readers)
        if buffer.key not in (None, key):
            readers[buffer.key] = buffer.stream
        readers.pop(key, None)
        for ready in [*buffer.after, *self._mark(readers).values()]:
            self.memory.follow(stream, ready.event)
        buffer.readers, buffer.after = {}, []

    def _mark_reads(self) -> None:
        """Record events behind the reads of other streams, for the buffers that were given back since the last call."""
        with self.lock:
            returned, self._returned = [(buffer, buffer.readers) for buffer in self._returned], []
        streams: dict[StreamKey, int] = {}
        for _, readers in returned:
            streams.update((key, s) for key, s in readers.items() if not self._is_captured(s))
        events = self._mark(streams)
        with self.lock:
            for buffer, readers in returned:
                if buffer.readers is not readers:
                    continue  # another thread has settled it meanwhile, and it may have a new holder
                buffer.after += [events[key] for key in readers if key in events]
                buffer.readers = {key: s for key, s in readers.items() if key not in events}
                if buffer.readers:  # its reader is being captured now
                    self._returned.append(buffer)

    def _mark(self, streams: dict[StreamKey, int]) -> dict[StreamKey, Ready]:
        """Record an event on each stream, and return the events. If a stream is gone, wait for the whole GPU instead."""
        events = {}
        try:
            for key, stream in streams.items():
                if self.memory.stream_key(stream) != key:
                    raise DeviceError("this handle means another stream now, or here")
                events[key] = self.new_ready()
                self.memory.record(events[key].event, stream)
        except DeviceError:
            self.memory.wait_for_all()
            return {key: self.new_ready() for key in streams}  # events that nobody recorded have happened
        return events

    def _take_free(self) -> list[Buffer]:
        with self.lock:
            free, self._free, self._count, self._returned = self._free, {}, 0, []
        return [buffer for same in free.values() for buffer in same]

    def _settle(self) -> None:
        """Wait until all streams are past the free buffers, and free those that are unlikely to be used again."""
        settled, surplus = self._take_free(), []
        try:
            self.memory.wait_for_all()
            with self.lock:
                for buffer in settled:
                    buffer.key, buffer.readers, buffer.after = None, {}, []
            surplus, settled = settled[: -_FREE_BUFFERS // 2], settled[-_FREE_BUFFERS // 2 :]
        finally:
            for buffer in settled:
                self.give_back(buffer)
        steps = CleanUp()
        for buffer in surplus:
            steps.make(self.memory.free, buffer.pointer)
        steps.end()

    def _release_free(self) -> None:
        free = self._take_free()
        with self.lock:
            free += self._scratch
            events, self._events, self._scratch = self._events, [], []
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
        with self.lock:
            self._free.setdefault(buffer.size, []).append(buffer)
            self._count += 1
            if buffer.readers:
                self._returned.append(buffer)
        if self._closed:
            self._free_after_close()

    def give_back_event(self, event: Any) -> None:
        """Take an event back that nobody refers to any more."""
        with self.lock:
            self._events.append(event)
        if self._closed:
            self._free_after_close()

    def _free_after_close(self) -> None:
        with contextlib.suppress(DeviceError), self.memory:
            self._release_free()

    def close(self) -> None:
        """Free everything that nobody holds now, and whatever is returned later. Call it inside ``with memory:``."""
        with self.lock:  # a thread that is taking something must not find it freed when garbage collection returns more
            self._closed = True
        self._release_free()
