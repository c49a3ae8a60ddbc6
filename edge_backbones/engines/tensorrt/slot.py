"""Run calls on one execution context, which has a stream and memory of its own."""

from __future__ import annotations

import contextlib
import math
import sys
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from edge_backbones.engines.gpu.dlpack import ForeignArray
from edge_backbones.engines.gpu.pool import Buffer, CleanUp, Lease, Pool, Ready
from edge_backbones.engines.gpu.streams import ALIGNMENT, StreamKey, float32_bytes, is_default, rounded
from edge_backbones.engines.ports import Shape
from edge_backbones.engines.tensorrt.engine import Engine
from edge_backbones.engines.tensorrt.profiles import Profile
from edge_backbones.errors import DeviceError, InferenceError

_HOST_OUTPUTS = 4  # most page-locked sets of outputs per context; callers that hold more get ordinary memory


@dataclass(eq=False)
class _HostOutputs:
    """Hold arrays that a caller gets, and their reference counts while no caller holds them."""

    arrays: list[np.ndarray]
    addresses: list[int]
    unshared: list[int] = field(default_factory=list)

    def references(self) -> list[int]:
        """Return the arrays' current reference counts."""
        return [sys.getrefcount(array) for array in self.arrays]


class Slot:
    """Run calls on one execution context, with its own stream and memory. One thread uses it at a time.

    Its methods need the memory's context to be current (``with memory:``).

    Args:
        engine: Creates the execution context.
        pool: Memory and events of the outputs.
        profile: Optimisation profile of the context.
        largest: Input shape that its memory is made for.
        refusals: None for a context without a CUDA graph. Otherwise the context serves one shape, replays it from the
            second call on, and writes here why it cannot.

    Attributes:
        key: Stream that its last work is ordered on; None if no work is pending.
        ready: Event behind its last work; None if no work is pending.
        shape: Input shape that the context is set to.
        output_shapes: Output shapes for that input shape, in graph order.
        group: Profile and captured shape for which `Contexts` keeps it.
        busy: Whether a call uses it.
        graph: The captured CUDA graph; None while there is none.
        refused: Whether a CUDA graph was wanted and could not be captured.
    """

    def __init__(
        self, engine: Engine, pool: Pool, profile: Profile, largest: Shape, refusals: dict[Shape, str] | None
    ) -> None:
        self._engine = engine
        self._pool = pool
        self._memory = pool.memory
        self._profile = profile
        self._largest = largest
        self._refusals = refusals
        self.refused = False
        self.group: tuple[int, Shape | None] = (profile.index, None)
        self.key: StreamKey | None = None
        self.ready: Ready | None = None
        self.shape: Shape = ()
        self.output_shapes: list[Shape] = []
        self._context: Any = None
        self._stream: int | None = None
        self._fence: int | None = None
        self._work: int | None = None  # a caller's stream that has work of this call, but no event behind it yet
        self.graph: Any = None
        self._warm = False
        self._bound: list[int] = []
        self._own_input: int | None = None
        self._own_outputs: list[int] = []
        self._staging: np.ndarray | None = None
        self._staged: np.ndarray = np.empty(0)
        self._staging_address = 0
        self._host_outputs: dict[Shape, list[_HostOutputs]] = {}
        # Outputs at fixed addresses, for replaying a graph on GPU memory: all of them, and those that nobody holds.
        self._outputs: list[Buffer] = []
        self._at_home: list[Buffer] = []
        self.busy = True
        self._released = False
        try:
            self._open()
        except BaseException:
            with contextlib.suppress(DeviceError):  # the first error is the one to raise
                self.release()
            raise

    def _open(self) -> None:
        """Create the stream and the context, and choose the optimisation profile."""
        self._stream = self._memory.new_stream()
        self._fence = self._memory.new_event()
        self._context = self._engine.new_context()
        if len(self._engine.profiles) > 1:
            done = self._context.set_optimization_profile_async(self._profile.index, int(self._stream))
            self._engine.check(done, f"optimisation profile {self._profile.index}")
            self._memory.wait(self._stream)
        self.set_shape(self._largest)
        self._capacities = [float32_bytes(shape) for shape in self.output_shapes]

    @property
    def stream(self) -> int:
        """Return the handle of its own stream."""
        assert self._stream is not None
        return self._stream

    def set_shape(self, shape: Shape) -> None:
        """Set the input shape of the context, and read the output shapes from it."""
        if shape == self.shape:
            return
        engine = self._engine
        # Do not bind the context to a local name: a traceback would keep it alive.
        engine.check(self._context.set_input_shape(engine.input, shape), f"an input of shape {shape}")
        unknown = self._context.infer_shapes()
        if unknown:
            raise engine.failure(f"TensorRT does not know the shapes of {list(unknown)} for an input of shape {shape}")
        shapes = [tuple(self._context.get_tensor_shape(name)) for name in engine.outputs]
        if any(not s or min(s) < 1 or s[0] != shape[0] for s in shapes):
            raise engine.failure(f"TensorRT gives outputs of shape {shapes} for an input of shape {shape}")
        self.shape, self.output_shapes = shape, shapes

    # -- input and outputs in host memory

    def run(self, array: np.ndarray) -> list[np.ndarray]:
        """Run one batch from host memory, wait for it, and return the outputs as float32 arrays.

        The arrays are in page-locked memory, which is reused once no caller holds them. If callers hold too many, the
        outputs are in ordinary memory.
        """
        memory, stream = self._memory, self.stream
        if array.shape != self.shape:
            self.set_shape(array.shape)
        if self._staged.shape != array.shape:
            self._stage(array)
        self._follow(stream, None)
        self._bind(self._input_pointer(), self._output_pointers())
        outputs = self._outputs_for_host()
        np.copyto(self._staged, array)
        memory.copy_in(self._bound[0], self._staging_address, array.nbytes, stream)
        self._enqueue(stream)
        for address, pointer, output in zip(outputs.addresses, self._bound[1:], outputs.arrays, strict=True):
            memory.copy_out(address, pointer, output.nbytes, stream)
        memory.wait(stream)
        self.key, self.ready = None, None
        return list(outputs.arrays)

    def _stage(self, array: np.ndarray) -> None:
        """Make the page-locked input buffer look like an array of this dtype and shape."""
        if self._staging is None:
            self._staging = self._memory.pinned((self._input_bytes(),), np.uint8)
            self._staging_address = self._staging.ctypes.data
        self._staged = self._staging[: array.nbytes].view(array.dtype).reshape(array.shape)

    def _outputs_for_host(self) -> _HostOutputs:
        """Return output arrays that no caller holds."""
        made = self._host_outputs.setdefault(self.shape, [])
        for outputs in made:
            if outputs.references() == outputs.unshared:
                return outputs
        pinned = sum(map(len, self._host_outputs.values())) < _HOST_OUTPUTS
        if not pinned and not made:  # another shape has all of them
            self._host_outputs = {self.shape: made}
            pinned = True
        arrays = [
            self._memory.pinned(shape, np.float32) if pinned else np.empty(shape, np.float32)
            for shape in self.output_shapes
        ]
        outputs = _HostOutputs(arrays, [array.ctypes.data for array in arrays])
        del arrays
        if pinned:
            made.append(outputs)
            outputs.unshared = outputs.references()
        return outputs

    # -- input and outputs in GPU memory

    def run_on_device(self, pointer: int, count: int, targets: list[int], stream: int, key: StreamKey) -> Ready:
        """Enqueue one batch from GPU memory and return the event behind it.

        Args:
            pointer: Address of the input.
            count: Number of images there. The rest of the batch that was set is filled with zeros.
            targets: Address for each output.
            stream: Stream of the caller.
            key: Key of that stream.
        """
        memory = self._memory
        work = self._begin(stream, key)
        source = pointer
        if count != self.shape[0] or pointer % ALIGNMENT:
            source = self._input_pointer()
            size = count * (self._bytes_of(self.shape) // self.shape[0])
            memory.copy(source, pointer, size, work)
            if count != self.shape[0]:
                memory.clear(source + size, self._bytes_of(self.shape) - size, work)
        direct = [target % ALIGNMENT == 0 for target in targets]
        own = targets if all(direct) else self._output_pointers()
        written = [target if fits else mine for target, fits, mine in zip(targets, direct, own, strict=True)]
        self._bind(source, written)
        self._enqueue(work)
        for target, address, shape in zip(targets, written, self.output_shapes, strict=True):
            if target != address:
                memory.copy(target, address, float32_bytes(shape), work)
        return self._end(work, stream, key)

    def replay(self, array: ForeignArray, stream: int, key: StreamKey) -> Ready:
        """Enqueue a call through fixed inputs and outputs, and return the event behind it.

        From the second call on, it replays a CUDA graph.
        """
        if self.shape != array.shape:
            self.set_shape(array.shape)
        if not self._outputs:
            for shape in self.output_shapes:
                self._outputs.append(self._pool.take(rounded(float32_bytes(shape)), key, stream))
                self._at_home.append(self._outputs[-1])
        for buffer in self._outputs:
            self._pool.order(buffer, key, stream)
        work = self._begin(stream, key)
        self._memory.copy(self._input_pointer(), array.pointer, array.nbytes, work)
        self._bind(self._input_pointer(), [buffer.pointer for buffer in self._outputs])
        self._enqueue(work)
        return self._end(work, stream, key)

    def lease(self, output: int, ready: Ready) -> Lease:
        """Lend one of the fixed outputs to a caller."""
        buffer = self._outputs[output]
        with self._pool.lock:
            self._at_home.remove(buffer)
        return Lease(buffer, ready, self._pool, self._take_home)

    def _take_home(self, buffer: Buffer) -> None:
        """Take a fixed output back; give it to the pool if this context was released."""
        with self._pool.lock:
            if not self._released:
                self._at_home.append(buffer)
                return
        self._pool.give_back(buffer)

    def is_at_home(self) -> bool:
        """Return whether no call uses this context and nobody holds one of its fixed outputs."""
        return not self.busy and len(self._at_home) == len(self._outputs)

    def is_ordered(self, key: StreamKey) -> bool:
        """Return whether work on the stream ``key`` runs after everything that uses the fixed outputs."""
        return all(buffer.follows(key) for buffer in self._outputs)

    def _begin(self, stream: int, key: StreamKey) -> int:
        """Return the stream to work on: the caller's, or its own if the caller's is a default stream.

        The work is ordered behind what is on both streams.
        """
        work = stream
        if is_default(stream):
            work = self.stream
            assert self._fence is not None
            self._memory.record(self._fence, stream)
            self._memory.follow(work, self._fence)
        self._follow(work, key)
        self._work = work
        return work

    def _follow(self, work: int, key: StreamKey | None) -> None:
        """Make a stream wait for the context's last work, unless that is on the same stream."""
        if self.ready is not None and self.key != key:
            self._memory.follow(work, self.ready.event)

    def _end(self, work: int, stream: int, key: StreamKey) -> Ready:
        """Record an event behind the work, make the caller's stream wait for it, and return it."""
        ready = self._pool.new_ready()
        self._memory.record(ready.event, work)
        if work != stream:
            self._memory.follow(stream, ready.event)
        self.key, self.ready, self._work = key, ready, None
        return ready

    # -- for both

    def _bytes_of(self, shape: Shape) -> int:
        """Return how many bytes an input of this shape takes."""
        return math.prod(shape) * self._engine.item_bytes

    def _input_bytes(self) -> int:
        return self._bytes_of(self._largest)

    def _input_pointer(self) -> int:
        """Return its own input memory, which fits the largest shape."""
        if self._own_input is None:
            self._own_input = self._memory.allocate(self._input_bytes())
        return self._own_input

    def _output_pointers(self) -> list[int]:
        """Return its own output memory, which fits the outputs of the largest shape."""
        while len(self._own_outputs) < len(self._capacities):
            self._own_outputs.append(self._memory.allocate(self._capacities[len(self._own_outputs)]))
        for shape, capacity in zip(self.output_shapes, self._capacities, strict=True):
            if float32_bytes(shape) > capacity:
                raise self._engine.failure(f"TensorRT gives an output of shape {shape} for an input of {self.shape}")
        return self._own_outputs

    def _bind(self, source: int, targets: list[int]) -> None:
        """Set the addresses of input and outputs, if they changed."""
        wanted = [source, *targets]
        if wanted == self._bound:
            return
        self._bound = []
        for name, pointer in zip((self._engine.input, *self._engine.outputs), wanted, strict=True):
            self._engine.check(self._context.set_tensor_address(name, int(pointer)), f"an address for {name}")
        self._bound = wanted

    def _enqueue(self, stream: int) -> None:
        """Enqueue one run: the CUDA graph if there is or can be one, otherwise the kernels."""
        if self.graph is None and self._warm and self._refusals is not None:
            self._capture()
        if self.graph is not None:
            self._memory.launch(self.graph, stream)
            return
        self._execute(stream)
        self._warm = True  # the first run of a shape finishes TensorRT's set-up and cannot be captured

    def _execute(self, stream: int) -> None:
        """Enqueue the kernels of one run."""
        self._engine.check(self._context.execute_async_v3(stream), f"to run an input of shape {self.shape}")

    def _capture(self) -> None:
        """Capture one run as a CUDA graph; note the reason if that is not possible."""
        assert self._refusals is not None
        try:
            # TensorRT-RTX has it, because it compiles while it runs.
            ask = getattr(self._context, "is_stream_capturable", None)
            if ask is None or ask(self.stream):
                self.graph = self._memory.capture(self.stream, lambda: self._execute(self.stream))
                return
            reason = "TensorRT says that it cannot be captured"
        except (InferenceError, RuntimeError) as error:
            reason = str(error)
        self._refusals[self.shape] = reason
        self._refusals = None
        self.refused = True

    def release(self) -> None:
        """Wait for the GPU and free everything, even if a step fails. Raises the first error."""
        memory = self._memory
        steps = CleanUp()
        if self.ready is not None:
            steps.make(memory.wait_for, self.ready.event)
        for stream in (self._stream, self._work):
            if stream is not None:
                steps.make(memory.wait, stream)
        if self.graph is not None:
            steps.make(memory.free_graph, self.graph)
        self.graph = self._context = self.ready = None
        with self._pool.lock:
            self._released = True
            for buffer in self._at_home:
                self._pool.give_back(buffer)
            self._at_home = []
        for pointer in [*self._own_outputs, *([] if self._own_input is None else [self._own_input])]:
            steps.make(memory.free, pointer)
        self._own_outputs, self._own_input = [], None
        self._staging, self._host_outputs, self._staged = None, {}, np.empty(0)
        if self._fence is not None:
            steps.make(memory.free_event, self._fence)
        if self._stream is not None:
            steps.make(memory.free_stream, self._stream)
        self._fence = self._stream = None
        steps.end()
