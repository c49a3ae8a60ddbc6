"""Lend the execution contexts of one engine to calls, so that threads never mix outputs.

A context is created when a call finds none idle, and is kept for later calls.
"""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from types import TracebackType
from typing import Any

from edge_backbones.engines import forks
from edge_backbones.engines.gpu.memory import GpuMemory
from edge_backbones.engines.gpu.pool import CleanUp, Pool, Ready
from edge_backbones.engines.gpu.streams import StreamKey
from edge_backbones.engines.ports import Shape
from edge_backbones.engines.tensorrt.engine import Engine
from edge_backbones.engines.tensorrt.profiles import Profile
from edge_backbones.engines.tensorrt.slot import Slot
from edge_backbones.errors import (
    DeviceError,
    EdgeBackbonesError,
    InferenceError,
    InputError,
)

_IDLE_STREAMS = 4  # most idle contexts of one profile on different streams; then one of them changes its stream
_GRAPH_SHAPES = 8  # most shapes with contexts of their own for CUDA graphs
_GRAPH_OUTPUTS = 3  # contexts with a graph per shape; callers can hold the outputs of this many calls


class Contexts:
    """Create the execution contexts of one engine, lend them to calls and keep them in between. Threads may share it.

    Attributes:
        pool: Memory and events of the outputs.
        refusals: Why an input shape has no CUDA graph, by shape.
        closed: Whether ``close`` was called, or this is a forked child.
    """

    def __init__(self, engine: Engine, memory: GpuMemory) -> None:
        self.pool = Pool(memory)
        self.refusals: dict[Shape, str] = {}
        self.closed = False
        self._is_abandoned = False
        self._engine = engine
        self._memory = memory
        self._lock = self.pool.lock
        self._idle: dict[tuple[int, Shape | None], list[Slot]] = {}
        self._captured: dict[Shape, list[Slot]] = {}
        self._graph_shapes: set[Shape] = set()
        self._alive = 0  # number of contexts, including lent ones
        self._inputs: deque[tuple[Ready, object]] = deque()
        forks.abandon_in_children(self)

    def take(self, profile: Profile, shape: Shape, key: StreamKey | None, *, graphs: bool = False) -> Slot:
        """Return a context for work on the stream ``key``, created if none is idle.

        Call it inside ``with memory:``, and give the context back with `give_back` or `discard`. Raises InputError
        after ``close``.

        Args:
            profile: Optimisation profile that holds ``shape``.
            shape: Shape of the input.
            key: Stream of the work; None for the context's own stream, if possible without pending work.
            graphs: Replay the shape as a CUDA graph, if it may have one.
        """
        with self._lock:
            if self.closed:
                raise self.refusal()
            captures = graphs and self._may_capture(shape)
            group = (profile.index, shape if captures else None)
            idle = self._idle.setdefault(group, [])
            slot = next((s for s in reversed(idle) if s.key in (None, key)), None)
            if slot is None and len(idle) >= _IDLE_STREAMS:
                slot = idle[0]
            if slot is not None:
                idle.remove(slot)
                return slot
        slot = self.new_slot(profile, shape if captures else None)
        slot.group = group
        return slot

    def take_captured(self, profile: Profile, shape: Shape, key: StreamKey) -> Slot | None:
        """Return a context that captures a graph and whose fixed outputs nobody holds; None if there is none to spare."""
        with self._lock:
            if self.closed:
                raise self.refusal()
            if not self._may_capture(shape):
                return None
            slots = self._captured.setdefault(shape, [])
            home = [slot for slot in slots if slot.is_at_home()]
            ordered = [slot for slot in home if slot.is_ordered(key)]
            if not ordered and len(slots) < _GRAPH_OUTPUTS:
                home = []
            for slot in (ordered or home)[:1]:
                slot.busy = True
                return slot
            if len(slots) >= _GRAPH_OUTPUTS:
                return None
        slot = self.new_slot(profile, shape)
        slot.group = (-1, shape)
        with self._lock:
            slots.append(slot)
        return slot

    def _may_capture(self, shape: Shape) -> bool:
        """Return whether a shape may have contexts of its own for CUDA graphs. Only the first few shapes may."""
        if shape in self.refusals:
            return False
        if shape not in self._graph_shapes and len(self._graph_shapes) < _GRAPH_SHAPES:
            self._graph_shapes.add(shape)
        return shape in self._graph_shapes

    def new_slot(self, profile: Profile, captured: Shape | None) -> Slot:
        """Create a context.

        ``captured``: the one shape that it serves with a CUDA graph; None for any shape of the profile.
        """
        refusals = None if captured is None else self.refusals
        with self._lock:
            if self.closed:
                raise self.refusal()
            self._alive += 1
        try:
            return Slot(self._engine, self.pool, profile, captured or profile.max, refusals)
        except BaseException as error:
            self._ended()
            if isinstance(error, RuntimeError):  # the bindings raise it if C++ returns False
                raise self._engine.failure(f"TensorRT made no execution context ({error})") from error
            raise

    def _ended(self) -> None:
        """Note that a context is gone. After ``close``, the last one to go closes the engine."""
        with self._lock:
            self._alive -= 1
            last = self.closed and not self._alive
        if last:
            self._engine.close()

    def give_back(self, slot: Slot) -> None:
        """Keep a context for the next call.

        It is discarded instead after ``close``, or if the CUDA graph that it was created for cannot be captured.
        """
        with self._lock:
            slot.busy = False
            if not self.closed and not slot.refused:
                if slot.group[0] >= 0:
                    self._idle[slot.group].append(slot)
                return
        self.discard(slot)

    def failure(self, array: Any, error: RuntimeError) -> InferenceError:
        """Return the error for a RuntimeError of TensorRT's bindings."""
        return self._engine.failure(f"TensorRT failed on {array.dtype} {array.shape} ({error})")

    def discard(self, slot: Slot) -> None:
        """Release a context for good. Errors of the release are ignored, because an earlier error is being reported."""
        with self._lock:
            for slots in self._captured.values():
                if slot in slots:
                    slots.remove(slot)
        with contextlib.suppress(DeviceError):  # an earlier error is being reported
            slot.release()
        self._ended()

    def retire(self, slot: Slot) -> None:
        """Discard a context that belonged to a graphed call.

        If CUDA is not usable, it is kept until ``close``; in a forked child, forever.
        """
        if self._is_abandoned:
            forks.keep_for_good(slot)
            return
        left = [slot]
        with contextlib.suppress(DeviceError), self._memory:
            self.discard(left.pop())
        with self._lock:
            self._idle.setdefault((-1, None), []).extend(left)

    def order(self, stream: int, producer: int) -> None:
        """Make ``stream`` wait for the work that is on ``producer`` now."""
        ready = self.pool.new_ready()
        self._memory.record(ready.event, producer)
        self._memory.follow(stream, ready.event)

    def reading(self, ready: Ready, owner: object) -> None:
        """Keep the owner of an input alive until the GPU has read it, because its library may not know this stream."""
        self._inputs.append((ready, owner))

    def forget_inputs(self) -> None:
        """Release the inputs that the GPU has read."""
        while self._inputs:
            try:
                ready, owner = self._inputs.popleft()
            except IndexError:
                return  # another thread took the last one
            if not self._memory.happened(ready.event):
                self._inputs.appendleft((ready, owner))
                return

    def refusal(self) -> EdgeBackbonesError:
        """Return the error for a call after ``close`` or in a forked child."""
        if self._is_abandoned:
            return forks.refusal("TensorRT")
        return InputError("this EdgeBackbone was closed: open the bundle again")

    def abandon(self) -> None:
        """Keep everything native and refuse calls in a forked child, as described in `forks.Inherited`."""
        forks.keep_for_good(self)
        self.pool.lock = self._lock = threading.RLock()  # a thread that does not exist here may hold the old one
        self._is_abandoned = self._is_abandoned or not self.closed
        self.closed = True

    def close(self) -> None:
        """Wait for the GPU, release all idle contexts and free the memory. Raises the first error after all steps.

        A call in another thread finishes first, and then releases its context and the engine.
        """
        if self.closed:  # a forked child must not call CUDA
            return
        steps = CleanUp()
        with self._memory:
            with self._lock:
                if self.closed:
                    return
                self.closed = True
                slots = [slot for idle in self._idle.values() for slot in idle]
                slots += [slot for captured in self._captured.values() for slot in captured if not slot.busy]
                self._idle.clear()
                self._captured.clear()

            for slot in slots:
                steps.make(slot.release)
                self._ended()
            for ready, _ in self._inputs:
                steps.make(self._memory.wait_for, ready.event)
            self._inputs.clear()
            steps.make(self.pool.close)
            with self._lock:
                unused = not self._alive  # otherwise the last running call closes the engine
            if unused:
                self._engine.close()
        steps.end()


class Lent:
    """Give a context back after one call, or discard it after an error, because its state is then unknown."""

    __slots__ = ("_array", "_contexts", "_slot")

    def __init__(self, contexts: Contexts, slot: Slot, array: Any) -> None:
        self._contexts = contexts
        self._slot = slot
        self._array = array

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self._contexts.give_back(self._slot)
            return
        self._contexts.discard(self._slot)
        if isinstance(error, RuntimeError):
            raise self._contexts.failure(self._array, error) from error


def close_quietly(contexts: Contexts) -> None:
    """Close contexts and ignore errors of the GPU, for use in finalizers."""
    with contextlib.suppress(DeviceError):
        contexts.close()
