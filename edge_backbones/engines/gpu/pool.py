"""Reuse the GPU memory of feature maps: track who holds it, and which streams may still read it."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from edge_backbones.engines.gpu.memory import GpuMemory
from edge_backbones.engines.gpu.streams import StreamKey
from edge_backbones.errors import DeviceError, OutOfMemoryError

_UNUSABLE_BUFFERS = 8  # buffers of one size that other streams may still use before the oldest is taken, behind events
_FREE_BUFFERS = 256  # most outputs that are kept for later calls while nobody holds them


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
        return not self.readers and not self.after and self.key in (None, key)


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
            key = memory.stream_key(consumer)
            if key != self.buffer.key:
                self.buffer.readers[key] = consumer
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
        self._returned: list[Buffer] = []  # of the free ones, those whose readers have no event behind them yet
        self._events: list[int] = []
        self._closed = False

    def take(self, size: int, key: StreamKey, stream: int) -> Buffer:
        """Return a buffer of ``size`` bytes for work that is enqueued on a stream from now on. The host never waits.

        Call it inside ``with memory:``. Raises OutOfMemoryError if freeing unused buffers does not help.

        Args:
            size: Bytes, already rounded.
            key: Key of the stream.
            stream: Its handle.
        """
        self._mark_reads()
        with self.lock:
            same = self._free.get(size, []) if self._count <= _FREE_BUFFERS else []
            found = next((i for i in range(len(same) - 1, -1, -1) if same[i].follows(key)), None)
            if found is None and len(same) >= _UNUSABLE_BUFFERS:
                found = next((i for i, buffer in enumerate(same) if not buffer.readers), None)
            buffer = None if found is None else same.pop(found)
            self._count -= buffer is not None
            settle = self._count > _FREE_BUFFERS
        if buffer is not None:
            self.order(buffer, key, stream)
            return buffer
        if settle:
            self._settle()
            return self.take(size, key, stream)
        try:
            pointer = self.memory.allocate(size)
        except OutOfMemoryError:
            if not self._count:
                raise
            self._release_free()
            pointer = self.memory.allocate(size)
        return Buffer(pointer, size, key, stream)

    def order(self, buffer: Buffer, key: StreamKey, stream: int) -> None:
        """Make a stream wait for everything that uses a buffer, which belongs to that stream from then on."""
        if not buffer.follows(key):
            readers = dict(buffer.readers)
            if buffer.key not in (None, key):
                readers[buffer.key] = buffer.stream
            readers.pop(key, None)
            for ready in [*buffer.after, *self._mark(readers).values()]:
                self.memory.follow(stream, ready.event)
        buffer.key, buffer.stream, buffer.readers, buffer.after = key, stream, {}, []

    def _mark_reads(self) -> None:
        """Record events behind the reads of other streams, for the buffers that were given back since the last call."""
        with self.lock:
            returned, self._returned = self._returned, []
        streams: dict[StreamKey, int] = {}
        for buffer in returned:
            streams.update((key, s) for key, s in buffer.readers.items() if not self.memory.is_capturing(s))
        events = self._mark(streams)
        for buffer in returned:
            buffer.after += [events[key] for key in buffer.readers if key in events]
            buffer.readers = {key: s for key, s in buffer.readers.items() if key not in events}
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
            for buffer in settled:
                buffer.key, buffer.readers, buffer.after = None, {}, []
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
            if buffer.readers:
                self._returned.append(buffer)

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
