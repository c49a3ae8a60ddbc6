"""Lend the execution contexts of one engine to calls, so that threads never mix outputs.

A context is created when no idle one suits a call, and is kept for later calls.
"""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from typing import Any

from edge_backbones.engines import forks
from edge_backbones.engines.gpu.memory import GpuMemory
from edge_backbones.engines.gpu.pool import CleanUp, Pool, Ready
from edge_backbones.engines.gpu.streams import StreamKey
from edge_backbones.engines.ports import Shape
from edge_backbones.engines.tensorrt.engine import Engine
from edge_backbones.engines.tensorrt.profiles import Profile
from edge_backbones.engines.tensorrt.slot import Slot
from edge_backbones.errors import DeviceError, InputError

IDLE_CONTEXTS = 8  # idle contexts of one profile, from which on none is made for another shape or stream
MOST_CONTEXTS = 32  # most contexts of one engine that calls use at once; further threads wait for one


class Contexts:
    """Create the execution contexts of one engine, lend them to calls and keep them in between. Threads may share it.

    Attributes:
        pool: Memory and events of the calls.
        closed: Whether ``close`` was called, or this is a forked child.
    """

    def __init__(self, engine: Engine, memory: GpuMemory) -> None:
        self.pool = Pool(memory)
        self.closed = False
        self._is_abandoned = False
        self._engine = engine
        self._memory = memory
        self._lock = threading.Lock()  # of the three below
        self._returned = threading.Condition(self._lock)
        self._idle: dict[int, list[Slot]] = {}  # by profile, in the order of their last use
        self._lendable = 0  # number of contexts for calls, lent or idle
        # Garbage collection ends graphed calls while any lock is held, so these need none.
        self._alive: list[None] = []  # one entry for every context, with those of graphed calls
        self._retired: deque[Slot] = deque()  # contexts of graphed calls that could not be released
        self._inputs: deque[tuple[Ready, object]] = deque()
        forks.abandon_in_children(self)

    def take(self, profile: Profile, shape: Shape, key: StreamKey | None) -> Slot:
        """Return a context for work on the stream ``key``, created if no idle one suits it.

        It is one that is set to ``shape`` already and has no work pending on another stream, if there is one. Call it
        inside ``with memory:``, and give the context back with `give_back` or `discard`. Raises InputError after
        ``close``.

        Args:
            profile: Optimisation profile that holds ``shape``.
            shape: Shape of the input.
            key: Stream of the work; None for the context's own stream, if possible without pending work.
        """
        replaced: Slot | None = None
        with self._lock:
            while True:
                self.require_open()
                idle = self._idle.setdefault(profile.index, [])
                for slot in reversed(idle):
                    if slot.shape == shape and (slot.key is None or slot.key == key):
                        idle.remove(slot)
                        return slot
                if idle and (len(idle) >= IDLE_CONTEXTS or self._lendable >= MOST_CONTEXTS):
                    slot = next((slot for slot in idle if slot.shape == shape), idle[0])
                    idle.remove(slot)
                    return slot
                if self._lendable < MOST_CONTEXTS:
                    self._lendable += 1
                    break
                other = next((slots for slots in self._idle.values() if slots), None)
                if other is not None:
                    replaced = other.pop(0)
                    break
                self._returned.wait()
        try:
            if replaced is not None:
                self._release(replaced)  # without the lock, because it waits for the GPU
            return self.new_slot(profile)
        except BaseException:
            with self._lock:
                self._lendable -= 1
                self._returned.notify()
            raise

    def new_slot(self, profile: Profile) -> Slot:
        """Create a context that belongs to the caller, who ends it with `retire`."""
        self._alive.append(None)
        try:
            self.require_open()
            return Slot(self._engine, self.pool, profile)
        except BaseException as error:
            self._ended()
            if isinstance(error, RuntimeError):  # the bindings raise it if C++ returns False
                raise self._engine.failure(f"TensorRT made no execution context ({error})") from error
            raise

    def _ended(self) -> None:
        """Note that a context is gone. After ``close``, the last one to go closes the engine."""
        self._alive.pop()
        self._close_unused()

    def _close_unused(self) -> None:
        if self.closed and not self._alive:
            self._engine.close()

    def give_back(self, slot: Slot) -> None:
        """Keep a context for the next call; discard it instead after ``close``."""
        kernels = self._engine.kernels if slot.has_new_shape else None
        slot.has_new_shape = False
        with self._lock:
            is_kept = not self.closed
            if is_kept:
                self._idle[slot.profile.index].append(slot)
                if self._lendable >= MOST_CONTEXTS:  # otherwise nobody waits
                    self._returned.notify()
        if not is_kept:
            self.discard(slot)
        if kernels is not None:
            kernels.save_soon()

    def failure(self, array: Any, error: BaseException) -> BaseException:
        """Return the error for what a call raised: InferenceError for a RuntimeError of TensorRT's bindings."""
        if not isinstance(error, RuntimeError):
            return error
        failure = self._engine.failure(f"TensorRT failed on {array.dtype} {array.shape} ({error})")
        failure.__cause__ = error
        return failure

    def discard(self, slot: Slot) -> None:
        """Release a context of a call for good: after an error its state is unknown."""
        with self._lock:
            self._lendable -= 1
            self._returned.notify()
        self._release(slot)

    def _release(self, slot: Slot) -> None:
        """Release a context. Errors of the release are ignored, because an earlier error is being reported."""
        with contextlib.suppress(DeviceError):
            slot.release()
        self._ended()

    def retire(self, slot: Slot) -> None:
        """Release a context that belonged to a graphed call.

        If CUDA is not usable, it is kept until ``close``; in a forked child, forever.
        """
        if self._is_abandoned:
            forks.keep_for_good(slot)
            return
        self._retired.append(slot)
        with contextlib.suppress(DeviceError), self._memory:
            self._release(self._retired.pop())

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

    def require_open(self) -> None:
        """Raise InputError after ``close``, and another error in a forked child."""
        if self.closed:
            closed = InputError("this EdgeBackbone was closed: open the bundle again")
            raise forks.refusal("TensorRT") if self._is_abandoned else closed

    def abandon(self) -> None:
        """Keep everything native and refuse calls in a forked child, as described in `forks.Inherited`."""
        forks.keep_for_good(self)
        self._lock = threading.Lock()  # a thread that does not exist here may hold the old one
        self.pool.lock = threading.Lock()
        self._returned = threading.Condition(self._lock)
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
                self._idle = {}
                self._returned.notify_all()
            with contextlib.suppress(IndexError):
                while True:
                    slots.append(self._retired.popleft())
            for slot in slots:
                steps.make(slot.release)
                self._ended()
            with contextlib.suppress(IndexError):  # there are no more; calls that still run add and take some
                while True:
                    ready, owner = self._inputs.popleft()
                    steps.make(self._memory.wait_for, ready.event)
                    del owner  # not before: the GPU read its memory until now
            steps.make(self.pool.close)
            self._close_unused()  # otherwise the last running call does
        steps.end()


def capture_refusal(stream: int) -> InputError:
    """Return the error for a call while the caller captures a CUDA graph.

    The memory of a call is reused in the order of its stream, which a graph that is launched later would not keep.
    """
    return InputError(
        f"the stream {stream:#x} is being captured, and a call cannot be part of another library's CUDA graph: end the "
        "capture first, or record the call alone with backbone.graphed(array, stream=stream)"
    )


def close_quietly(contexts: Contexts) -> None:
    """Close contexts and ignore errors of the GPU, for use in finalizers."""
    with contextlib.suppress(DeviceError):
        contexts.close()
