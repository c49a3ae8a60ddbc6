"""TensorRT at run time: the full library, TensorRT-RTX or the lean runtime, over plans; no torch.

A plan is run by execution contexts. Each has a stream and memory of its own and is used by one thread at a time, so that
threads never mix outputs; they are made when a call finds none idle, and kept. What is decided (which profile, which pieces,
which memory) is decided in plan.py.
"""

from __future__ import annotations

import contextlib
import math
import sys
import threading
import weakref
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np

from edge_backbones.bundle.onnx_gate import graph_fault
from edge_backbones.engines import exits, forks
from edge_backbones.engines import ports as plan
from edge_backbones.engines.gpu import memory as cuda
from edge_backbones.engines.gpu.arrays import DeviceArray, ForeignArray
from edge_backbones.engines.gpu.pool import Attempts, Buffer, Lease, Pool, Ready
from edge_backbones.engines.ports import Profile, Shape, StreamKey
from edge_backbones.engines.tensorrt import library as tensorrt_library
from edge_backbones.engines.tensorrt.library import TensorRtFlavour
from edge_backbones.errors import (
    DeviceError,
    EdgeBackbonesError,
    EngineMismatchError,
    InferenceError,
    InputError,
    OutOfMemoryError,
)
from edge_backbones.machine import gpus
from edge_backbones.spec import BackboneSpec, InputSpec

_IDLE_STREAMS = 4  # idle contexts of one profile, each behind another stream, before one changes its stream
_HOST_OUTPUTS = 4  # pinned sets of outputs per context; a caller who holds more gets ordinary memory
_GRAPH_SHAPES = 8  # shapes that get contexts of their own to be captured in
_GRAPH_OUTPUTS = 3  # captured contexts per shape on the device path: results of so many calls can be held at once
_KNOWN_SHAPES = 1024
_FLOAT32 = np.dtype(np.float32)


class TensorRtSession:
    """A loaded plan on one GPU. Threads may share it: every call borrows an execution context of its own.

    ``weights``: the ONNX graph of a plan that was written without weights, which are taken from there. ``spec``: what a
    manifest says of the outputs, whose shapes are then compared with the plan's.
    ``graph_refusals``: with ``cuda_graphs``, why an input shape is enqueued and not replayed, by shape.

    Raises EngineMismatchError where this machine or this plan cannot do what the manifest promises, MissingDependencyError
    without the libraries, OutOfMemoryError. A session that is not closed is released when it is collected.
    """

    def __init__(
        self,
        plan: bytearray,
        *,
        flavour: TensorRtFlavour,
        input: InputSpec,
        outputs: Sequence[str],
        device: int = 0,
        memory: cuda.MemoryBackend | None = None,
        cuda_graphs: bool = False,
        allow_host_code: bool = False,
        dla_core: int | None = None,
        weights: bytes | bytearray | None = None,
        spec: BackboneSpec | None = None,
    ) -> None:
        # Before anything of TensorRT is made: without a driver the lean runtime ends the process.
        reason = gpus.no_gpu_reason()
        if reason:
            raise EngineMismatchError(f"the {flavour} engine needs an NVIDIA GPU: {reason}")
        found = gpus.find_gpus()
        if not 0 <= device < len(found):
            raise EngineMismatchError(
                f"there is no cuda:{device} here, {len(found)} GPUs are visible: pass a smaller index"
            )
        old = tensorrt_library.against_driver(flavour, found[device].driver)
        if old:
            raise EngineMismatchError(old)
        library = tensorrt_library.load_library(flavour)
        gpu = cuda.open_memory(device, memory)
        with exits.calls, gpu:
            engine = _load(library, plan, flavour, input, outputs, allow_host_code, dla_core, weights, spec)
            self._contexts = _Contexts(engine, gpu)
            self._finalizer = weakref.finalize(self, _close_quietly, self._contexts)
        self._input = input
        self._dtype = np.dtype(input.dtype)
        self._memory = gpu
        self._profiles = engine.profiles
        self._chosen: dict[Shape, Profile] = {}
        self._routes: dict[Shape, _Route] = {}
        self._cuda_graphs = cuda_graphs

    @property
    def device(self) -> int:
        return self._memory.device

    @property
    def graph_refusals(self) -> dict[Shape, str]:
        return dict(self._contexts.refusals)

    def run(self, array: np.ndarray) -> list[np.ndarray]:
        """As EngineSession has it; the arrays are in page-locked memory, which is used again once nobody holds them."""
        if self._contexts.closed:
            raise self._contexts.refusal()
        profile = self._profile(array.shape)
        with exits.calls, self._memory:
            slot = self._contexts.take(profile, array.shape, None, graphs=self._cuda_graphs)
            with _Lent(self._contexts, slot, array):
                return slot.run(array)

    def run_on_device(self, array: ForeignArray, stream: int) -> list[DeviceArray]:
        """Every output, in graph order, as new float32 arrays on the same GPU; enqueued on ``stream``, nothing waits.

        ``array``: of any batch from 1, the input's dtype, in C order, on this GPU. It is read in place: nothing may write
        to it until ``stream`` is past this call, and it is kept alive until then. It is copied on the GPU first where it
        does not start at a multiple of 256, is filled up to the smallest batch, or goes through a CUDA graph.

        The outputs are valid for work on ``stream``; DLPack makes other streams wait. Their memory is used again by a later
        call on ``stream`` once nobody holds them. Who reads them on another stream without DLPack has to hold them until
        that work is done.

        ``stream``: 0 is the default stream, on which TensorRT would block: it runs beside it and is ordered by events.
        """
        route = self._route(array)
        contexts = self._contexts
        with exits.calls, self._memory as memory:
            self._require_here(array.pointer)
            contexts.forget_inputs()
            key = memory.stream_key(stream)
            producer = array.producer_stream
            if producer is not None and memory.stream_key(producer) != key:
                contexts.order(stream, producer)
            if self._cuda_graphs and route.exact:
                slot = contexts.take_captured(route.parts[0][1], array.shape, key)
                if slot is not None:
                    with _Lent(contexts, slot, array):
                        ready = slot.replay(array, stream, key)
                        contexts.reading(ready, array.owner)
                        return [
                            _device_array(slot.lease(i, ready), shape, memory.device, stream)
                            for i, shape in enumerate(slot.output_shapes)
                        ]
            return self._run_pieces(array, route, stream, key)

    def _run_pieces(self, array: ForeignArray, route: _Route, stream: int, key: StreamKey) -> list[DeviceArray]:
        contexts, pool = self._contexts, self._contexts.pool
        buffers: list[Buffer] = []
        try:
            for piece, profile, shape in route.parts:
                slot = contexts.take(profile, shape, key)
                with _Lent(contexts, slot, array):
                    slot.set_shape(shape)
                    if not route.outputs:
                        route.set_outputs(array.shape[0], slot.output_shapes)
                    if not buffers:
                        for output in route.outputs:
                            buffers.append(pool.take(output.size, key))
                    targets = [
                        buffer.pointer + piece.start * output.image
                        for buffer, output in zip(buffers, route.outputs, strict=True)
                    ]
                    source = array.pointer + piece.start * route.image
                    ready = slot.run_on_device(source, piece.count, targets, stream, key)
        except BaseException:
            with contextlib.suppress(DeviceError):
                self._memory.wait(stream)  # pieces that are enqueued read the input, which nobody keeps for them
            for buffer in buffers:
                pool.give_back(buffer)
            raise
        contexts.reading(ready, array.owner)
        leases = [Lease(buffer, ready, pool, pool.give_back) for buffer in buffers]
        return [
            _device_array(lease, output.shape, self._memory.device, stream)
            for lease, output in zip(leases, route.outputs, strict=True)
        ]

    def graphed(self, array: ForeignArray, stream: int) -> GraphedCall:
        """See EdgeBackbone.graphed."""
        route = self._route(array)
        if not route.exact or array.pointer % plan.ALIGNMENT:
            raise InputError(
                f"{self._input.name} of shape {array.shape} at {array.pointer:#x} is not read in place: pass a batch that "
                f"this engine takes, at a multiple of {plan.ALIGNMENT}"
            )
        if plan.is_default(stream):
            raise InputError("a default stream cannot be captured: pass another")
        with self._memory as memory:
            self._require_here(array.pointer)
            return GraphedCall(self._contexts, array, route.parts[0][1], stream, memory.stream_key(stream))

    def close(self) -> None:
        """Release contexts, engine and runtime, in this order, after the GPU has done with them. Closing twice is fine.

        Arrays that were returned stay valid. A call that is running in another thread finishes first in that thread.
        """
        self._contexts.close()
        self._finalizer.detach()

    def _require_here(self, pointer: int) -> None:
        on, device = self._memory.device_of(pointer), self._memory.device
        if on != device:
            where = "host memory" if on is None else f"cuda:{on}"
            raise InputError(
                f"{self._input.name} is in {where}, this engine runs on cuda:{device}: copy it there first"
            )

    def _route(self, array: ForeignArray) -> _Route:
        """How an array is run; InputError for one that cannot be."""
        if self._contexts.closed:
            raise self._contexts.refusal()
        name, shape = self._input.name, array.shape
        if array.dtype != self._dtype:
            raise InputError(
                f"{name} of dtype {array.dtype} does not fit: cast it to {self._dtype} on the GPU, which this engine takes"
            )
        if not array.contiguous:
            raise InputError(f"{name} of shape {shape} is not in C order: make it contiguous on the GPU first")
        route = self._routes.get(shape)
        if route is None:
            if not shape or shape[0] < 1:
                raise InputError(f"{name} of shape {shape} does not fit: this engine takes {self._input.describe()}")
            runs = [(piece, (piece.run, *shape[1:])) for piece in plan.pieces(shape[0], self._input.batch)]
            parts = [(piece, self._profile(run), run) for piece, run in runs]
            route = _Route(parts, array.nbytes // shape[0])
            if len(self._routes) < _KNOWN_SHAPES:
                self._routes[shape] = route
        return route

    def _profile(self, shape: Shape) -> Profile:
        profile = self._chosen.get(shape)
        if profile is None:
            profile = plan.choose_profile(self._profiles, shape)
            if len(self._chosen) < _KNOWN_SHAPES:
                self._chosen[shape] = profile
        return profile


class GraphedCall:
    """One input, where it lies, into the same ``outputs`` every time."""

    def __init__(self, contexts: _Contexts, array: ForeignArray, profile: Profile, stream: int, key: StreamKey) -> None:
        slot = contexts.new_slot(profile, array.shape)
        self._finalizer = weakref.finalize(self, contexts.retire, slot)
        pool, memory = contexts.pool, contexts.pool.memory
        buffers: list[Buffer] = []
        try:
            for shape in slot.output_shapes:
                buffers.append(pool.take(plan.rounded(plan.float32_bytes(shape)), key))
            for _ in range(2):  # the second enqueue of a context is captured
                targets = [buffer.pointer for buffer in buffers]
                ready = slot.run_on_device(array.pointer, array.shape[0], targets, stream, key)
            if slot.graph is None:
                raise InferenceError(f"TensorRT makes no CUDA graph of this: {contexts.refusals[array.shape]}")
        except BaseException as error:
            self._finalizer()  # which waits for the GPU
            for buffer in buffers:
                pool.give_back(buffer)
            if isinstance(error, RuntimeError):
                raise contexts.failure(array, error) from error
            raise
        self.outputs = [
            _device_array(Lease(buffer, ready, pool, pool.give_back), shape, memory.device, stream)
            for buffer, shape in zip(buffers, slot.output_shapes, strict=True)
        ]
        self._contexts, self._memory, self._stream = contexts, memory, stream
        self._graph, self._ready, self._owner = slot.graph, ready, array.owner

    def __call__(self) -> list[DeviceArray]:
        if self._contexts.closed:
            raise self._contexts.refusal()
        with self._memory as memory:
            memory.launch(self._graph, self._stream)
            memory.record(self._ready.event, self._stream)
        return self.outputs


class _Output(NamedTuple):
    """One output of a whole batch: ``size`` bytes hold it and the last filling, ``image`` bytes are one image's."""

    shape: Shape
    size: int
    image: int


@dataclass
class _Route:
    """How arrays of one shape are run on the GPU: pieces, each with its profile and shape; and what comes out.

    ``image``: bytes of one image of the input. ``outputs`` are known once a context was told the shape.
    """

    parts: list[tuple[plan.Piece, Profile, Shape]]
    image: int
    outputs: tuple[_Output, ...] = ()

    @property
    def exact(self) -> bool:
        """Is the batch one that the engine takes as it is?"""
        return len(self.parts) == 1 and self.parts[0][0].run == self.parts[0][0].count

    def set_outputs(self, count: int, shapes: Sequence[Shape]) -> None:
        last = self.parts[-1][0]
        images = [plan.float32_bytes(shape[1:]) for shape in shapes]
        self.outputs = tuple(
            _Output((count, *shape[1:]), plan.rounded((last.start + last.run) * image), image)
            for shape, image in zip(shapes, images, strict=True)
        )


def _device_array(lease: Lease, shape: Shape, device: int, stream: int) -> DeviceArray:
    return DeviceArray.of_engine(lease.buffer.pointer, shape, _FLOAT32, device, lease, stream)


# ---- The engine


@dataclass
class _Engine:
    """A deserialised plan. ``runtime`` and ``handle`` are dropped by ``close``, after every context."""

    library: Any
    logger: Any
    runtime: Any
    handle: Any
    input: str
    item_bytes: int
    outputs: tuple[str, ...]
    profiles: tuple[Profile, ...]

    def new_context(self) -> Any:
        """An execution context whose memory is that of its profile, where TensorRT can do so. TensorRT-RTX would begin with
        spare kernels and compile others meanwhile, which nobody has measured."""
        self.logger.clear()
        strategies = getattr(self.library, "ExecutionContextAllocationStrategy", None)
        on_change = getattr(strategies, "ON_PROFILE_CHANGE", None)
        chosen = [on_change] if on_change is not None and len(self.profiles) > 1 else []
        if hasattr(self.library, "DynamicShapesKernelSpecializationStrategy"):
            config = self.handle.create_runtime_config()
            config.dynamic_shapes_kernel_specialization_strategy = (
                self.library.DynamicShapesKernelSpecializationStrategy.EAGER
            )
            for strategy in chosen:
                config.set_execution_context_allocation_strategy(strategy)
            chosen = [config]
        context = self.handle.create_execution_context(*chosen)
        if context is None:
            needed = int(self.handle.device_memory_size_v2)
            raise self.failure(f"TensorRT made no execution context, which takes {cuda.readable(needed)} of its own")
        return context

    def check(self, done: Any, what: str) -> None:
        """TensorRT says that something failed by returning False, and why in its log."""
        if not done:
            raise self.failure(f"TensorRT refused {what}")

    def failure(self, what: str) -> InferenceError:
        log = self.logger.last_error()
        if plan.says_out_of_memory(log):
            return OutOfMemoryError(
                f"{what}: {log}. Run smaller batches or fewer threads, or end what else uses this GPU"
            )
        return InferenceError(f"{what}: {log}")

    def close(self) -> None:
        self.handle = None
        self.runtime = None


def _load(
    library: Any,
    data: bytearray,
    flavour: TensorRtFlavour,
    input: InputSpec,
    outputs: Sequence[str],
    allow_host_code: bool,
    dla_core: int | None,
    weights: bytes | bytearray | None,
    spec: BackboneSpec | None,
) -> _Engine:
    logger = tensorrt_library.logger_of(library)
    logger.clear()
    try:
        runtime = library.Runtime(logger)
    except TypeError as error:  # what pybind11 makes of a null pointer
        raise EngineMismatchError(f"{flavour} cannot start: {logger.last_error()}") from error
    if allow_host_code:
        if not hasattr(runtime, "engine_host_code_allowed"):
            raise EngineMismatchError(f"allow_host_code: {flavour} {library.__version__} runs no plan with host code")
        runtime.engine_host_code_allowed = True
    if dla_core is not None:
        runtime.DLA_core = dla_core
    engine = runtime.deserialize_cuda_engine(data)
    if engine is None:
        log = logger.last_error()
        if plan.says_out_of_memory(log):
            raise OutOfMemoryError(f"the plan does not fit into the memory of this GPU: {log}")
        hint = "run edge-backbones compile on this machine"
        if not allow_host_code and (flavour == "tensorrt_lean" or plan.says_host_code(log)):
            hint = f"if the plan carries a lean runtime and you trust it, pass allow_host_code=True; else {hint}"
        raise EngineMismatchError(f"{flavour} {library.__version__} does not load this plan ({log}): {hint}")
    try:
        if weights is not None:
            _refit(library, engine, weights, flavour)
        profiles = _agreed_profiles(engine, input, outputs, spec)
    except BaseException:
        engine = None  # before its runtime
        raise
    item_bytes = np.dtype(input.dtype).itemsize
    return _Engine(library, logger, runtime, engine, input.name, item_bytes, tuple(outputs), profiles)


def _refit(library: Any, engine: Any, graph: bytes | bytearray, flavour: TensorRtFlavour) -> None:
    """Give a plan that was written without weights those of its ONNX graph."""
    logger = tensorrt_library.logger_of(library)
    fault = graph_fault(graph)
    if fault is not None:
        raise EngineMismatchError(f"the graph with the weights is given to no library: {fault}")
    if not hasattr(library, "OnnxParserRefitter"):
        raise EngineMismatchError(f"{flavour} takes no weights from a graph: compile the plan without --strip")
    try:
        refitter = library.Refitter(engine, logger)
        parser = library.OnnxParserRefitter(refitter, logger)
    except TypeError as error:  # what pybind11 makes of a null pointer
        raise EngineMismatchError(f"{flavour} cannot refit this plan: {logger.last_error()}") from error
    if not parser.refit_from_bytes(bytes(graph)) or not refitter.refit_cuda_engine():
        raise EngineMismatchError(
            f"{flavour} does not take the weights of this graph ({logger.last_error()}): compile the plan again"
        )


def _agreed_profiles(
    engine: Any, input: InputSpec, outputs: Sequence[str], spec: BackboneSpec | None
) -> tuple[Profile, ...]:
    """The optimisation profiles of an engine that is the one of the manifest; EngineMismatchError for another."""
    names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
    tensors = [
        plan.Tensor(
            name,
            engine.get_tensor_mode(name).name,
            engine.get_tensor_dtype(name).name,
            tuple(engine.get_tensor_shape(name)),
        )
        for name in names
    ]
    wrong = plan.mismatches(tensors, input, outputs, spec)
    if wrong:
        raise EngineMismatchError(f"the plan is not the one of this manifest: {'; '.join(wrong)}. Build it again")
    profiles = _profiles(engine, input.name)
    missing = plan.uncovered(profiles, input)
    if missing:
        raise EngineMismatchError(
            f"the plan has no optimisation profile for {missing}, which the manifest promises "
            f"({'; '.join(map(str, profiles))}): compile it again"
        )
    return profiles


def _profiles(engine: Any, input: str) -> tuple[Profile, ...]:
    shape = tuple(engine.get_tensor_shape(input))
    if -1 not in shape:
        return (Profile(0, shape, shape, shape),)
    bounds = [engine.get_tensor_profile_shape(input, i) for i in range(engine.num_optimization_profiles)]
    return tuple(Profile(i, *(tuple(bound) for bound in bounds[i])) for i in range(len(bounds)))


# ---- Execution contexts


@dataclass(eq=False)
class _HostOutputs:
    """Arrays that a caller is given, and their reference counts while no caller has them."""

    arrays: list[np.ndarray]
    addresses: list[int]
    unshared: list[int] = field(default_factory=list)

    def references(self) -> list[int]:
        return [sys.getrefcount(array) for array in self.arrays]


class _Slot:
    """An execution context, the stream and the memory that it works in. One thread uses it at a time.

    ``key`` and ``ready``: the stream that its last work is behind, None when there is none; and the event of that work.
    ``largest``: the shape that its memory is made for. ``refusals``: not None if it serves one shape and is replayed as a
    CUDA graph from the second call on; why it is not, is written there.
    """

    def __init__(
        self, engine: _Engine, pool: Pool, profile: Profile, largest: Shape, refusals: dict[Shape, str] | None
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
        self._work: int | None = None  # a caller's stream with work of ours behind which there is no event yet
        self.graph: Any = None
        self._warm = False
        self._bound: list[int] = []
        self._own_input: int | None = None
        self._own_outputs: list[int] = []
        self._staging: np.ndarray | None = None
        self._staged: np.ndarray = np.empty(0)
        self._staging_address = 0
        self._host_outputs: dict[Shape, list[_HostOutputs]] = {}
        # Of a captured context on the device path, whose addresses are fixed: its outputs, and those that nobody holds.
        self._outputs: list[Buffer] = []
        self._at_home: list[Buffer] = []
        self.busy = True
        self._released = False
        try:
            self._open()
        except BaseException:
            with contextlib.suppress(DeviceError):  # the first failure is the one to tell
                self.release()
            raise

    def _open(self) -> None:
        self._stream = self._memory.new_stream()
        self._fence = self._memory.new_event()
        self._context = self._engine.new_context()
        if len(self._engine.profiles) > 1:
            done = self._context.set_optimization_profile_async(self._profile.index, int(self._stream))
            self._engine.check(done, f"optimisation profile {self._profile.index}")
            self._memory.wait(self._stream)
        self.set_shape(self._largest)
        self._capacities = [plan.float32_bytes(shape) for shape in self.output_shapes]

    @property
    def stream(self) -> int:
        assert self._stream is not None
        return self._stream

    def set_shape(self, shape: Shape) -> None:
        """Tell the context the shape of the input, and ask it for those of the outputs."""
        if shape == self.shape:
            return
        engine = self._engine
        # No local name for the context: a traceback would keep it alive.
        engine.check(self._context.set_input_shape(engine.input, shape), f"an input of shape {shape}")
        unknown = self._context.infer_shapes()
        if unknown:
            raise engine.failure(f"TensorRT does not know the shapes of {list(unknown)} for an input of shape {shape}")
        shapes = [tuple(self._context.get_tensor_shape(name)) for name in engine.outputs]
        if any(not s or min(s) < 1 or s[0] != shape[0] for s in shapes):
            raise engine.failure(f"TensorRT gives outputs of shape {shapes} for an input of shape {shape}")
        self.shape, self.output_shapes = shape, shapes

    # -- from and to the host

    def run(self, array: np.ndarray) -> list[np.ndarray]:
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
        if self._staging is None:
            self._staging = self._memory.pinned((self._input_bytes(),), np.uint8)
            self._staging_address = self._staging.ctypes.data
        self._staged = self._staging[: array.nbytes].view(array.dtype).reshape(array.shape)

    def _outputs_for_host(self) -> _HostOutputs:
        made = self._host_outputs.setdefault(self.shape, [])
        for outputs in made:
            if outputs.references() == outputs.unshared:
                return outputs
        pinned = sum(map(len, self._host_outputs.values())) < _HOST_OUTPUTS
        if not pinned and not made:  # another shape has them all
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

    # -- on the GPU

    def run_on_device(self, pointer: int, count: int, targets: list[int], stream: int, key: StreamKey) -> Ready:
        """Enqueue ``count`` images at ``pointer``, filled up with zeros to the batch that was set, into ``targets``."""
        memory = self._memory
        work = self._begin(stream, key)
        source = pointer
        if count != self.shape[0] or pointer % plan.ALIGNMENT:
            source = self._input_pointer()
            size = count * (self._bytes_of(self.shape) // self.shape[0])
            memory.copy(source, pointer, size, work)
            if count != self.shape[0]:
                memory.clear(source + size, self._bytes_of(self.shape) - size, work)
        direct = [target % plan.ALIGNMENT == 0 for target in targets]
        own = targets if all(direct) else self._output_pointers()
        written = [target if fits else mine for target, fits, mine in zip(targets, direct, own, strict=True)]
        self._bind(source, written)
        self._enqueue(work)
        for target, address, shape in zip(targets, written, self.output_shapes, strict=True):
            if target != address:
                memory.copy(target, address, plan.float32_bytes(shape), work)
        return self._end(work, stream, key)

    def replay(self, array: ForeignArray, stream: int, key: StreamKey) -> Ready:
        """Enqueue through the fixed input and outputs of a context that captures."""
        if self.shape != array.shape:
            self.set_shape(array.shape)
        if not self._outputs:
            for shape in self.output_shapes:
                self._outputs.append(self._pool.take(plan.rounded(plan.float32_bytes(shape)), key))
                self._at_home.append(self._outputs[-1])
        elif not all(buffer.follows(key) for buffer in self._outputs):
            self._memory.wait_for_all()
        for buffer in self._outputs:
            buffer.key, buffer.foreign = key, False
        work = self._begin(stream, key)
        self._memory.copy(self._input_pointer(), array.pointer, array.nbytes, work)
        self._bind(self._input_pointer(), [buffer.pointer for buffer in self._outputs])
        self._enqueue(work)
        return self._end(work, stream, key)

    def lease(self, output: int, ready: Ready) -> Lease:
        buffer = self._outputs[output]
        with self._pool.lock:
            self._at_home.remove(buffer)
        return Lease(buffer, ready, self._pool, self._take_home)

    def _take_home(self, buffer: Buffer) -> None:
        with self._pool.lock:
            if not self._released:
                self._at_home.append(buffer)
                return
        self._pool.give_back(buffer)

    def is_at_home(self) -> bool:
        """Does nobody use this context or hold one of its fixed outputs?"""
        return not self.busy and len(self._at_home) == len(self._outputs)

    def is_ordered(self, key: StreamKey) -> bool:
        return all(buffer.follows(key) for buffer in self._outputs)

    def _begin(self, stream: int, key: StreamKey) -> int:
        """The stream to work on: the caller's, or beside a default stream the own one, behind what is on both."""
        work = stream
        if plan.is_default(stream):
            work = self.stream
            assert self._fence is not None
            self._memory.record(self._fence, stream)
            self._memory.follow(work, self._fence)
        self._follow(work, key)
        self._work = work
        return work

    def _follow(self, work: int, key: StreamKey | None) -> None:
        if self.ready is not None and self.key != key:
            self._memory.follow(work, self.ready.event)

    def _end(self, work: int, stream: int, key: StreamKey) -> Ready:
        ready = self._pool.new_ready()
        self._memory.record(ready.event, work)
        if work != stream:
            self._memory.follow(stream, ready.event)
        self.key, self.ready, self._work = key, ready, None
        return ready

    # -- both

    def _bytes_of(self, shape: Shape) -> int:
        return math.prod(shape) * self._engine.item_bytes

    def _input_bytes(self) -> int:
        return self._bytes_of(self._largest)

    def _input_pointer(self) -> int:
        if self._own_input is None:
            self._own_input = self._memory.allocate(self._input_bytes())
        return self._own_input

    def _output_pointers(self) -> list[int]:
        while len(self._own_outputs) < len(self._capacities):
            self._own_outputs.append(self._memory.allocate(self._capacities[len(self._own_outputs)]))
        for shape, capacity in zip(self.output_shapes, self._capacities, strict=True):
            if plan.float32_bytes(shape) > capacity:
                raise self._engine.failure(f"TensorRT gives an output of shape {shape} for an input of {self.shape}")
        return self._own_outputs

    def _bind(self, source: int, targets: list[int]) -> None:
        wanted = [source, *targets]
        if wanted == self._bound:
            return
        self._bound = []
        for name, pointer in zip((self._engine.input, *self._engine.outputs), wanted, strict=True):
            self._engine.check(self._context.set_tensor_address(name, int(pointer)), f"an address for {name}")
        self._bound = wanted

    def _enqueue(self, stream: int) -> None:
        if self.graph is None and self._warm and self._refusals is not None:
            self._capture()
        if self.graph is not None:
            self._memory.launch(self.graph, stream)
            return
        self._execute(stream)
        self._warm = True  # TensorRT does what is left to do in the first enqueue of a shape: that one is not captured

    def _execute(self, stream: int) -> None:
        self._engine.check(self._context.execute_async_v3(stream), f"to run an input of shape {self.shape}")

    def _capture(self) -> None:
        assert self._refusals is not None
        try:
            ask = getattr(self._context, "is_stream_capturable", None)  # TensorRT-RTX, which compiles while it runs
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
        """Wait for the GPU and give everything back; what fails does not keep the rest. Raises the first failure."""
        memory = self._memory
        attempts = Attempts()
        if self.ready is not None:
            attempts.make(memory.wait_for, self.ready.event)
        for stream in (self._stream, self._work):
            if stream is not None:
                attempts.make(memory.wait, stream)
        if self.graph is not None:
            attempts.make(memory.free_graph, self.graph)
        self.graph = self._context = self.ready = None
        with self._pool.lock:
            self._released = True
            for buffer in self._at_home:
                self._pool.give_back(buffer)
            self._at_home = []
        for pointer in [*self._own_outputs, *([] if self._own_input is None else [self._own_input])]:
            attempts.make(memory.free, pointer)
        self._own_outputs, self._own_input = [], None
        self._staging, self._host_outputs, self._staged = None, {}, np.empty(0)
        if self._fence is not None:
            attempts.make(memory.free_event, self._fence)
        if self._stream is not None:
            attempts.make(memory.free_stream, self._stream)
        self._fence = self._stream = None
        attempts.end()


class _Contexts:
    """The execution contexts of one engine: lent to calls, kept between them. Threads may share it."""

    def __init__(self, engine: _Engine, memory: cuda.Memory) -> None:
        self.pool = Pool(memory)
        self.refusals: dict[Shape, str] = {}
        self.closed = False
        self._is_abandoned = False
        self._engine = engine
        self._memory = memory
        self._lock = self.pool.lock
        self._idle: dict[tuple[int, Shape | None], list[_Slot]] = {}
        self._captured: dict[Shape, list[_Slot]] = {}
        self._graph_shapes: set[Shape] = set()
        self._alive = 0  # contexts, lent ones too
        self._inputs: deque[tuple[Ready, object]] = deque()
        forks.abandon_in_children(self)

    def take(self, profile: Profile, shape: Shape, key: StreamKey | None, *, graphs: bool = False) -> _Slot:
        """A context for work on the stream ``key``; None: on the context's own, nothing pending where that is possible."""
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

    def take_captured(self, profile: Profile, shape: Shape, key: StreamKey) -> _Slot | None:
        """A context that captures and whose fixed outputs nobody holds; None when callers hold those of all."""
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
        if shape in self.refusals:
            return False
        if shape not in self._graph_shapes and len(self._graph_shapes) < _GRAPH_SHAPES:
            self._graph_shapes.add(shape)
        return shape in self._graph_shapes

    def new_slot(self, profile: Profile, captured: Shape | None) -> _Slot:
        refusals = None if captured is None else self.refusals
        with self._lock:
            if self.closed:
                raise self.refusal()
            self._alive += 1
        try:
            return _Slot(self._engine, self.pool, profile, captured or profile.max, refusals)
        except BaseException as error:
            self._ended()
            if isinstance(error, RuntimeError):  # what the bindings raise where C++ returns False
                raise self._engine.failure(f"TensorRT made no execution context ({error})") from error
            raise

    def _ended(self) -> None:
        """A context is gone; with the last of them, after ``close``, the engine that it was made by."""
        with self._lock:
            self._alive -= 1
            last = self.closed and not self._alive
        if last:
            self._engine.close()

    def give_back(self, slot: _Slot) -> None:
        """Keep a context for the next call; not after ``close``, and not one that was made for a graph that cannot be."""
        with self._lock:
            slot.busy = False
            if not self.closed and not slot.refused:
                if slot.group[0] >= 0:
                    self._idle[slot.group].append(slot)
                return
        self.discard(slot)

    def failure(self, array: Any, error: RuntimeError) -> InferenceError:
        return self._engine.failure(f"TensorRT failed on {array.dtype} {array.shape} ({error})")

    def discard(self, slot: _Slot) -> None:
        with self._lock:
            for slots in self._captured.values():
                if slot in slots:
                    slots.remove(slot)
        with contextlib.suppress(DeviceError):  # a failure before this one is being told
            slot.release()
        self._ended()

    def retire(self, slot: _Slot) -> None:
        """Give a context up; where CUDA cannot be asked whether it is done with it, when all is closed."""
        if self._is_abandoned:
            forks.keep_for_good(slot)
            return
        left = [slot]
        with contextlib.suppress(DeviceError), self._memory:
            self.discard(left.pop())
        with self._lock:
            self._idle.setdefault((-1, None), []).extend(left)

    def order(self, stream: int, producer: int) -> None:
        """Let ``stream`` wait for what is on ``producer`` now."""
        ready = self.pool.new_ready()
        self._memory.record(ready.event, producer)
        self._memory.follow(stream, ready.event)

    def reading(self, ready: Ready, owner: object) -> None:
        """Keep an input alive until the GPU has read it: its library may know nothing of this stream."""
        self._inputs.append((ready, owner))

    def forget_inputs(self) -> None:
        """Let go of the inputs that have been read."""
        while self._inputs:
            try:
                ready, owner = self._inputs.popleft()
            except IndexError:
                return  # another thread was faster
            if not self._memory.happened(ready.event):
                self._inputs.appendleft((ready, owner))
                return

    def refusal(self) -> EdgeBackbonesError:
        """The error for a call after ``close``, or in a forked child."""
        if self._is_abandoned:
            return forks.refusal("TensorRT")
        return InputError("this EdgeBackbone was closed: open the bundle again")

    def abandon(self) -> None:
        """See forks.Inherited."""
        forks.keep_for_good(self)
        self.pool.lock = self._lock = threading.RLock()  # a thread that does not exist here may hold the other
        self._is_abandoned = self._is_abandoned or not self.closed
        self.closed = True

    def close(self) -> None:
        if self.closed:  # in a forked child CUDA is not to be asked for anything
            return
        attempts = Attempts()
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
                attempts.make(slot.release)
                self._ended()
            for ready, _ in self._inputs:
                attempts.make(self._memory.wait_for, ready.event)
            self._inputs.clear()
            attempts.make(self.pool.close)
            with self._lock:
                unused = not self._alive  # a call that runs in another thread ends it
            if unused:
                self._engine.close()
        attempts.end()


class _Lent:
    """A context for the time of one call; after an error it is thrown away, because its state is not known."""

    __slots__ = ("_array", "_contexts", "_slot")

    def __init__(self, contexts: _Contexts, slot: _Slot, array: Any) -> None:
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


def _close_quietly(contexts: _Contexts) -> None:
    with contextlib.suppress(DeviceError):
        contexts.close()
