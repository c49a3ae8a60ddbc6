"""Run calls on one execution context, which has a stream of its own and borrows all other memory for each call."""

from __future__ import annotations

import contextlib
import ctypes
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from edge_backbones.engines.gpu.blocks import NO_ARRAYS, Block
from edge_backbones.engines.gpu.dlpack import Rows
from edge_backbones.engines.gpu.pool import Buffer, CleanUp, Pool, Ready
from edge_backbones.engines.gpu.streams import ALIGNMENT, StreamKey, is_default, rounded
from edge_backbones.engines.ports import Shape
from edge_backbones.engines.tensorrt.engine import Engine
from edge_backbones.engines.tensorrt.profiles import Profile
from edge_backbones.errors import DeviceError, InferenceError

_NO_BYTES = (ctypes.c_ubyte * 0)()
_HOST_OUTPUTS = 4  # most page-locked sets of outputs per context; callers that hold more get ordinary memory


class Frames(NamedTuple):
    """Describe images in GPU memory: ``images`` of them at ``pointer``, ``image`` bytes each.

    ``rows``: the rows of all of them, if they are not contiguous.
    """

    pointer: int
    images: int
    image: int
    rows: Rows | None = None


class _HostOutputs(NamedTuple):
    """Hold arrays that a caller gets, their address, and their reference counts while no caller holds them."""

    arrays: list[np.ndarray]
    address: int
    unshared: list[int]


class Slot:
    """Run calls on one execution context. One thread uses it at a time.

    TensorRT's scratch memory, copies of inputs and outputs are taken from the pool for each call and given back when the
    work is enqueued, because the pool knows which stream uses them. So contexts share memory, and a context for small
    shapes takes little of it. Its methods need the memory's context to be current (``with memory:``).

    Args:
        engine: Creates the execution context.
        pool: Memory and events of the calls.
        profile: Optimisation profile of the context.

    Attributes:
        profile: Its optimisation profile.
        pool: Memory and events of the calls.
        stream: Its own stream.
        own_key: Key of that stream.
        key: Stream that its last work is ordered on; None if no work is pending.
        ready: Event behind its last work; None if no work is pending.
        shape: Input shape that the context is set to.
        outputs: Outputs for that input shape, in graph order.
        has_new_shape: Whether it was set to another shape since this was last looked at.
        graph: CUDA graph of the one call that it was made for; None for a context that serves calls.
    """

    def __init__(self, engine: Engine, pool: Pool, profile: Profile) -> None:
        self.profile = profile
        self.pool = pool
        self.stream = 0
        self.key: StreamKey | None = None
        self.ready: Ready | None = None
        self.shape: Shape = ()
        self.outputs = NO_ARRAYS
        self.has_new_shape = False
        self.graph: Any = None
        self._engine = engine
        self._memory = memory = pool.memory
        self._context: Any = None
        self._scratch_size = 0  # bytes that TensorRT needs for the shape
        self._bound: list[int] = []
        self._held: list[Buffer] = []
        self._staging = _NO_BYTES
        self._host_outputs: dict[Shape, list[_HostOutputs]] = {}
        try:
            self.stream = memory.new_stream()
            self.own_key = memory.stream_key(self.stream)
            self._context = memory.aside(engine.new_context)
            if len(engine.profiles) > 1:
                done = self._context.set_optimization_profile_async(profile.index, int(self.stream))
                engine.check(done, f"optimisation profile {profile.index}")
                memory.wait(self.stream)
        except BaseException:
            with contextlib.suppress(DeviceError):  # the first error is the one to raise
                self.release()
            raise

    def set_shape(self, shape: Shape) -> None:
        """Set the input shape of the context, and read the output shapes and the size of the scratch memory from it."""
        if shape == self.shape:
            return
        engine = self._engine
        self.shape = ()
        # Do not bind the context to a local name: a traceback would keep it alive.
        engine.check(self._context.set_input_shape(engine.input, shape), f"an input of shape {shape}")
        unknown = self._context.infer_shapes()
        if unknown:
            raise engine.failure(f"TensorRT does not know the shapes of {list(unknown)} for an input of shape {shape}")
        shapes = [tuple(self._context.get_tensor_shape(name)) for name in engine.outputs]
        if any(not s or min(s) < 1 or s[0] != shape[0] for s in shapes):
            raise engine.failure(f"TensorRT gives outputs of shape {shapes} for an input of shape {shape}")
        self._scratch_size = int(self._context.update_device_memory_size_for_shapes())
        self._bound = []  # the scratch memory is divided anew
        self.has_new_shape = True
        self.shape, self.outputs = shape, Block.of(shapes, engine.output_dtypes)

    # -- input and outputs in host memory

    def run(self, array: np.ndarray) -> list[np.ndarray]:
        """Run one batch from host memory, wait for it, and return the outputs.

        The outputs are in page-locked memory, which is reused once no caller holds them. If callers hold too many, they
        are in ordinary memory. An input in page-locked memory is read there; another is copied to such memory first.
        """
        memory, stream = self._memory, self.stream
        self.set_shape(array.shape)
        address = int(array.__array_interface__["data"][0])
        on_gpu = memory.page_locked(address, array.nbytes)
        if on_gpu is None:
            address = on_gpu = self._stage(array)
        outputs = self._outputs_for_host()
        with _Borrowed(self, self.own_key, stream) as borrowed:
            enqueue = self.on_host(address, on_gpu, array.nbytes, outputs.address, borrowed.take)
            if self.ready is not None:
                memory.follow(stream, self.ready.event)
            enqueue(stream, borrowed.scratch)
            memory.wait(stream)
            borrowed.are_done()
        self.key, self.ready = None, None
        return list(outputs.arrays)

    def on_host(
        self, address: int, on_gpu: int, nbytes: int, results: int, take: Callable[[int], int]
    ) -> Callable[[int, int], None]:
        """Return a function that enqueues a call between page-locked arrays on a stream, with scratch memory at an address.

        Args:
            address: Address of the input.
            on_gpu: The GPU's address of it.
            nbytes: Bytes of the input.
            results: Address of the memory for the outputs.
            take: Returns the address of that many bytes of GPU memory for the call.
        """
        memory, targets = self._memory, self.targets(take(self.outputs.size))
        is_read_there = self._engine.reads_host_memory and not on_gpu % ALIGNMENT
        source = on_gpu if is_read_there else take(rounded(nbytes))

        def enqueue(stream: int, scratch: int) -> None:
            if not is_read_there:
                memory.copy_in(source, address, nbytes, stream)
            self.execute(source, targets, scratch, stream)
            memory.copy_out(results, targets[0], self.outputs.end, stream)

        return enqueue

    def _stage(self, array: np.ndarray) -> int:
        """Copy an array to its page-locked memory, and return the address there, which is the GPU's too."""
        if len(self._staging) < array.nbytes:
            self._staging = _NO_BYTES
            self._staging = self._memory.pinned(array.nbytes)
        np.copyto(np.ndarray(array.shape, array.dtype, buffer=memoryview(self._staging)), array)
        return ctypes.addressof(self._staging)

    def _outputs_for_host(self) -> _HostOutputs:
        """Return output arrays that no caller holds."""
        made = self._host_outputs.setdefault(self.shape, [])
        for outputs in made:
            if list(map(sys.getrefcount, outputs.arrays)) == outputs.unshared:
                return outputs
        is_pinned = sum(map(len, self._host_outputs.values())) < _HOST_OUTPUTS
        if not is_pinned and not made:  # another shape has all of them
            self._host_outputs = {self.shape: made}
            is_pinned = True
        size = self.outputs.end
        block = self._memory.pinned(size) if is_pinned else (ctypes.c_ubyte * size)()
        arrays = self.outputs.arrays(block)
        outputs = _HostOutputs(arrays, ctypes.addressof(block), list(map(sys.getrefcount, arrays)))
        if is_pinned:
            made.append(outputs)
        return outputs

    # -- input and outputs in GPU memory

    def run_on_device(self, frames: Frames, targets: Sequence[int], stream: int, key: StreamKey) -> Ready:
        """Enqueue one batch from GPU memory and return the event behind it.

        Args:
            frames: The images. The rest of the batch that was set is filled with zeros.
            targets: Address for each output.
            stream: Stream of the caller.
            key: Key of that stream.
        """
        with _Borrowed(self, key, stream) as borrowed:
            source, written = frames.pointer, targets
            is_copied = frames.rows is not None or frames.images != self.shape[0] or source % ALIGNMENT != 0
            if is_copied:
                source = borrowed.take(rounded(self.shape[0] * frames.image))
            if any(target % ALIGNMENT for target in targets):
                written = self.targets(borrowed.take(self.outputs.size))

            def enqueue(work: int, scratch: int) -> None:
                if is_copied:
                    self._copy_input(frames, source, work)
                self.execute(source, written, scratch, work)
                if written is not targets:
                    for target, address, part in zip(targets, written, self.outputs.parts, strict=True):
                        self._memory.copy(target, address, part.nbytes, work)

            return self._ordered(enqueue, borrowed.scratch, stream, key)

    def targets(self, block: int) -> list[int]:
        """Return the address of every output in a block of memory."""
        return [block + part.offset for part in self.outputs.parts]

    def _copy_input(self, frames: Frames, to: int, stream: int) -> None:
        """Enqueue copying images to memory for the whole batch, and filling up the rest of it with zeros."""
        memory, rows, size = self._memory, frames.rows, frames.images * frames.image
        if rows is None:
            memory.copy(to, frames.pointer, size, stream)
        else:
            memory.copy_rows(to, frames.pointer, rows.count, rows.nbytes, rows.pitch, stream)
        if frames.images != self.shape[0]:
            memory.clear(to + size, self.shape[0] * frames.image - size, stream)

    def _ordered(self, enqueue: Callable[[int, int], None], scratch: int, stream: int, key: StreamKey) -> Ready:
        """Enqueue work for a caller's stream, and return the event behind it.

        The work runs on that stream, or on its own if that is a default stream, behind what is on both.
        """
        memory, work = self._memory, stream
        if is_default(stream):
            work = self.stream
            self.pool.order(work, stream)
        if self.ready is not None and self.key != key:
            memory.follow(work, self.ready.event)  # its last work is on another stream
        enqueue(work, scratch)
        ready = self.pool.new_ready()
        memory.record(ready.event, work)
        if work != stream:
            memory.follow(stream, ready.event)
        self.key, self.ready = key, ready
        return ready

    # -- for both

    def execute(self, source: int, targets: Sequence[int], scratch: int, stream: int) -> None:
        """Enqueue the kernels of one run. ``scratch``: address of TensorRT's memory; 0 if it needs none."""
        wanted = [scratch, source, *targets]
        if wanted != self._bound:
            self._bind(wanted)
        self._engine.check(self._context.execute_async_v3(stream), "to run an input of shape %s", self.shape)

    def _bind(self, wanted: list[int]) -> None:
        """Set the addresses of scratch memory, input and outputs."""
        bound, self._bound = self._bound or [-1] * len(wanted), []
        for name, pointer, now in zip(("", self._engine.input, *self._engine.outputs), wanted, bound, strict=True):
            if pointer == now:
                continue
            if name:
                self._engine.check(self._context.set_tensor_address(name, int(pointer)), "an address for %s", name)
            elif self._scratch_size:
                self._context.set_device_memory(int(pointer), self._scratch_size)
        self._bound = wanted

    # -- one call as a CUDA graph

    def hold(self, size: int, stream: int, key: StreamKey) -> int:
        """Return the address of ``size`` bytes, already rounded, for work on a stream until this context is released."""
        self._held.append(self.pool.take(size, key, stream))
        return self._held[-1].pointer

    def record(self, enqueue: Callable[[int, int], None], stream: int, key: StreamKey) -> Ready:
        """Run a call once, then capture it as ``graph``; return the event behind the run.

        ``enqueue``: enqueues the call on a stream, with scratch memory at an address. Raises InferenceError if TensorRT
        cannot capture it.
        """
        scratch = self.hold(rounded(self._scratch_size), stream, key) if self._scratch_size else 0
        try:
            # The first run of a shape finishes TensorRT's set-up and cannot be captured.
            ready = self._ordered(enqueue, scratch, stream, key)
        except BaseException:
            self.wait_quietly(stream)
            raise
        # TensorRT-RTX has it, because it compiles while it runs.
        ask = getattr(self._context, "is_stream_capturable", None)
        refusal = "TensorRT makes no CUDA graph of this"
        if ask is not None and not ask(int(self.stream)):
            raise InferenceError(f"{refusal}: it says that the call cannot be captured")
        try:
            self.graph = self._memory.capture(self.stream, lambda: enqueue(self.stream, scratch))
        except (InferenceError, RuntimeError) as error:
            raise InferenceError(f"{refusal}: {error}") from error
        return ready

    def wait_quietly(self, stream: int) -> None:
        """Wait for its own and a caller's stream after an error, because the memory that they use is given back now."""
        for one in (self.stream, stream):
            with contextlib.suppress(DeviceError):  # the error that made it wait is the one to raise
                self._memory.wait(one)

    def release(self) -> None:
        """Wait for the GPU and free everything, even if a step fails. Raises the first error."""
        memory = self._memory
        steps = CleanUp()
        if self.ready is not None:
            steps.make(memory.wait_for, self.ready.event)
        if self.stream:
            steps.make(memory.wait, self.stream)
        if self.graph is not None:
            steps.make(memory.free_graph, self.graph)
        self.graph = self._context = self.ready = None
        for buffer in self._held:
            buffer.key = None  # all its work is done
            self.pool.give_back(buffer)
        self._held, self._staging, self._host_outputs = [], _NO_BYTES, {}
        if self.stream:
            steps.make(memory.free_stream, self.stream)
        self.stream = 0
        steps.end()


class _Borrowed:
    """Memory of the pool for one call, in the order of a stream: TensorRT's scratch memory, and copies.

    Work on the same stream may use it after the block. An error in the block waits for the GPU first.

    ``scratch``: address of the scratch memory; 0 if the context needs none.
    """

    __slots__ = ("_buffers", "_key", "_scratch", "_slot", "_stream", "scratch")

    def __init__(self, slot: Slot, key: StreamKey, stream: int) -> None:
        self._slot, self._key, self._stream = slot, key, stream
        self._buffers: list[Buffer] = []
        self._scratch: Buffer | None = None
        self.scratch = 0

    def __enter__(self) -> _Borrowed:
        slot = self._slot
        if slot._scratch_size:
            self._scratch = slot.pool.take_scratch(slot._scratch_size, self._key, self._stream)
            self.scratch = self._scratch.pointer
        return self

    def take(self, size: int) -> int:
        """Return the address of ``size`` bytes, already rounded."""
        self._buffers.append(self._slot.pool.take(size, self._key, self._stream))
        return self._buffers[-1].pointer

    def are_done(self) -> None:
        """Note that the GPU has finished with everything, so that any stream may use it at once."""
        for buffer in self._buffers:
            buffer.key = None
        if self._scratch is not None:
            self._scratch.key = None

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self._slot.wait_quietly(self._stream)
        if self._scratch is not None:
            self._slot.pool.give_back_scratch(self._scratch)
        for buffer in self._buffers:
            self._slot.pool.give_back(buffer)
