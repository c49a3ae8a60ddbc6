"""Run plans with TensorRT, TensorRT-RTX or the lean runtime, without torch.

Every call borrows an execution context (contexts.py), which has a stream and memory of its own. This module decides
which profile, which pieces and which memory a call uses.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from edge_backbones.engines import exits
from edge_backbones.engines.batching import Piece, pieces
from edge_backbones.engines.gpu.arrays import DeviceArray
from edge_backbones.engines.gpu.dlpack import ForeignArray
from edge_backbones.engines.gpu.memory import MemoryBackend, open_memory
from edge_backbones.engines.gpu.pool import Buffer, Lease
from edge_backbones.engines.gpu.streams import ALIGNMENT, StreamKey, float32_bytes, is_default, rounded
from edge_backbones.engines.ports import Shape
from edge_backbones.engines.tensorrt import library as tensorrt_library
from edge_backbones.engines.tensorrt.contexts import Contexts, Lent, close_quietly
from edge_backbones.engines.tensorrt.engine import load as load_engine
from edge_backbones.engines.tensorrt.library import TensorRtFlavour
from edge_backbones.engines.tensorrt.profiles import Profile, choose_profile
from edge_backbones.errors import (
    DeviceError,
    EngineMismatchError,
    InferenceError,
    InputError,
)
from edge_backbones.machine import gpus
from edge_backbones.spec import BackboneSpec, InputSpec

_KNOWN_SHAPES = 1024
_FLOAT32 = np.dtype(np.float32)


class TensorRtSession:
    """Run a loaded plan on one GPU. Threads may share it: every call borrows an execution context of its own.

    A session that is not closed is released when it is collected.

    Args:
        plan: The plan's bytes.
        flavour: Library that loads the plan.
        input: Input in the manifest.
        outputs: Names of the outputs in the manifest.
        gpu: Index of the GPU.
        memory: Library that manages GPU memory; None for the first that is installed.
        cuda_graphs: Replay each input shape as a CUDA graph.
        allow_host_code: Allow the runtime that a plan may carry.
        dla_core: DLA core that the plan runs on.
        weights: ONNX graph with the weights of a plan without weights.
        spec: Outputs in the manifest, to compare their shapes with the plan's.

    Raises:
        EngineMismatchError: This machine or this plan cannot do what the manifest says.
        MissingDependencyError: A library is not installed.
        OutOfMemoryError: The plan does not fit into the GPU's memory.
    """

    def __init__(
        self,
        plan: bytearray,
        *,
        flavour: TensorRtFlavour,
        input: InputSpec,
        outputs: Sequence[str],
        gpu: int = 0,
        memory: MemoryBackend | None = None,
        cuda_graphs: bool = False,
        allow_host_code: bool = False,
        dla_core: int | None = None,
        weights: bytes | bytearray | None = None,
        spec: BackboneSpec | None = None,
    ) -> None:
        # Check this before creating anything of TensorRT: without a driver, the lean runtime ends the process.
        reason = gpus.no_gpu_reason()
        if reason:
            raise EngineMismatchError(f"the {flavour} engine needs an NVIDIA GPU: {reason}")
        found = gpus.find_gpus()
        if not 0 <= gpu < len(found):
            raise EngineMismatchError(
                f"there is no cuda:{gpu} here, {len(found)} GPUs are visible: pass a smaller index"
            )
        old = tensorrt_library.against_driver(flavour, found[gpu].driver)
        if old:
            raise EngineMismatchError(old)
        library = tensorrt_library.load_library(flavour)
        device_memory = open_memory(gpu, memory)
        with exits.calls, device_memory:
            engine = load_engine(library, plan, flavour, input, outputs, allow_host_code, dla_core, weights, spec)
            self._contexts = Contexts(engine, device_memory)
            self._finalizer = weakref.finalize(self, close_quietly, self._contexts)
        self._input = input
        self._dtype = np.dtype(input.dtype)
        self._memory = device_memory
        self._profiles = engine.profiles
        self._chosen: dict[Shape, Profile] = {}
        self._routes: dict[Shape, _Route] = {}
        self._cuda_graphs = cuda_graphs

    @property
    def gpu(self) -> int:
        """Return the index of the GPU."""
        return self._memory.gpu

    @property
    def graph_refusals(self) -> dict[Shape, str]:
        """Return why an input shape is not replayed as a CUDA graph, by shape. It is empty without ``cuda_graphs``."""
        return dict(self._contexts.refusals)

    def run(self, array: np.ndarray) -> list[np.ndarray]:
        """Return the outputs as described in `EngineSession`.

        The arrays are in page-locked memory, which is reused once nobody holds them.
        """
        if self._contexts.closed:
            raise self._contexts.refusal()
        profile = self._profile(array.shape)
        with exits.calls, self._memory:
            slot = self._contexts.take(profile, array.shape, None, graphs=self._cuda_graphs)
            with Lent(self._contexts, slot, array):
                return slot.run(array)

    def run_on_device(self, array: ForeignArray, stream: int) -> list[DeviceArray]:
        """Enqueue one call on ``stream`` and return its outputs without waiting.

        The outputs are new float32 arrays on the same GPU, in graph order. ``array`` has any batch size from 1 and the
        input's dtype, and is in C order on this GPU. It is read in place and kept alive until then: nothing may write
        to it until ``stream`` is past this call. It is copied on the GPU first if it does not start at a multiple of
        256, is filled up to the smallest batch, or goes through a CUDA graph.

        The outputs are valid for work on ``stream``; DLPack makes other streams wait. A later call on ``stream`` reuses
        their memory once nobody holds them. To read them on another stream without DLPack, hold them until that work is
        done.

        ``stream`` 0 is the default stream, on which TensorRT would block. The work then runs on another stream and is
        ordered by events.

        Raises InputError for an array that does not fit, OutOfMemoryError and InferenceError.
        """
        route = self._route(array)
        contexts = self._contexts
        with exits.calls, self._memory as memory:
            self._require_here(array.pointer)
            self._refuse_capture(stream)
            contexts.forget_inputs()
            key = memory.stream_key(stream)
            producer = array.producer_stream
            if producer is not None and memory.stream_key(producer) != key:
                contexts.order(stream, producer)
            if self._cuda_graphs and route.exact:
                slot = contexts.take_captured(route.parts[0][1], array.shape, key)
                if slot is not None:
                    with Lent(contexts, slot, array):
                        ready = slot.replay(array, stream, key)
                        contexts.reading(ready, array.owner)
                        return [
                            _device_array(slot.lease(i, ready), shape, memory.gpu, stream)
                            for i, shape in enumerate(slot.output_shapes)
                        ]
            return self._run_pieces(array, route, stream, key)

    def _run_pieces(self, array: ForeignArray, route: _Route, stream: int, key: StreamKey) -> list[DeviceArray]:
        """Enqueue an array piece by piece into shared outputs."""
        contexts, pool = self._contexts, self._contexts.pool
        buffers: list[Buffer] = []
        try:
            for piece, profile, shape in route.parts:
                slot = contexts.take(profile, shape, key)
                with Lent(contexts, slot, array):
                    slot.set_shape(shape)
                    if not route.outputs:
                        route.set_outputs(array.shape[0], slot.output_shapes)
                    if not buffers:
                        for output in route.outputs:
                            buffers.append(pool.take(output.size, key, stream))
                    targets = [
                        buffer.pointer + piece.start * output.image
                        for buffer, output in zip(buffers, route.outputs, strict=True)
                    ]
                    source = array.pointer + piece.start * route.image
                    ready = slot.run_on_device(source, piece.count, targets, stream, key)
        except BaseException:
            with contextlib.suppress(DeviceError):
                self._memory.wait(stream)  # enqueued pieces still read the input, and nothing else keeps it alive
            for buffer in buffers:
                pool.give_back(buffer)
            raise
        contexts.reading(ready, array.owner)
        leases = [Lease(buffer, ready, pool, pool.give_back) for buffer in buffers]
        return [
            _device_array(lease, output.shape, self._memory.gpu, stream)
            for lease, output in zip(leases, route.outputs, strict=True)
        ]

    def graphed(self, array: ForeignArray, stream: int) -> GraphedCall:
        """Record a call on the memory of ``array`` as a CUDA graph, as described in `EdgeBackbone.graphed`.

        Raises InputError if the array cannot be read in place or ``stream`` is a default one.
        """
        route = self._route(array)
        if not route.exact or array.pointer % ALIGNMENT:
            raise InputError(
                f"{self._input.name} of shape {array.shape} at {array.pointer:#x} is not read in place: pass a batch that "
                f"this engine takes, at a multiple of {ALIGNMENT}"
            )
        if is_default(stream):
            raise InputError("a default stream cannot be captured: pass another")
        with self._memory as memory:
            self._require_here(array.pointer)
            self._refuse_capture(stream)
            return GraphedCall(self._contexts, array, route.parts[0][1], stream, memory.stream_key(stream))

    def close(self) -> None:
        """Wait for the GPU, then release contexts, engine and runtime, in this order. Closing twice is fine.

        Returned arrays stay valid. A call in another thread finishes first.
        """
        self._contexts.close()
        self._finalizer.detach()

    def _require_here(self, pointer: int) -> None:
        """Raise InputError if a pointer is not in the memory of this GPU."""
        on, gpu = self._memory.gpu_of(pointer), self._memory.gpu
        if on != gpu:
            where = "host memory" if on is None else f"cuda:{on}"
            raise InputError(f"{self._input.name} is in {where}, this engine runs on cuda:{gpu}: copy it there first")

    def _refuse_capture(self, stream: int) -> None:
        """Raise InputError if the caller captures a CUDA graph: the memory of a call would be reused behind its back."""
        if self._memory.is_capturing(stream):
            raise InputError(
                f"the stream {stream:#x} is being captured, and a call cannot be part of another library's CUDA graph: end "
                "the capture first, or record the call alone with backbone.graphed(array, stream=stream)"
            )

    def _route(self, array: ForeignArray) -> _Route:
        """Return how an array is run. Raises InputError if it cannot be."""
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
            runs = [(piece, (piece.run, *shape[1:])) for piece in pieces(shape[0], self._input.batch)]
            parts = [(piece, self._profile(run), run) for piece, run in runs]
            route = _Route(parts, array.nbytes // shape[0])
            if len(self._routes) < _KNOWN_SHAPES:
                self._routes[shape] = route
        return route

    def _profile(self, shape: Shape) -> Profile:
        """Return the optimisation profile for a shape."""
        profile = self._chosen.get(shape)
        if profile is None:
            profile = choose_profile(self._profiles, shape)
            if len(self._chosen) < _KNOWN_SHAPES:
                self._chosen[shape] = profile
        return profile


class GraphedCall:
    """Replay one call as a CUDA graph: from one input address into the same ``outputs`` every time.

    One thread at a time may call it.

    Args:
        contexts: Creates the context of the call.
        array: The input, which must stay where it is.
        profile: Optimisation profile that holds its shape.
        stream: Stream of the call, not a default one.
        key: Key of that stream.

    Raises:
        InferenceError: TensorRT cannot capture the call.
    """

    def __init__(self, contexts: Contexts, array: ForeignArray, profile: Profile, stream: int, key: StreamKey) -> None:
        slot = contexts.new_slot(profile, array.shape)
        self._finalizer = weakref.finalize(self, contexts.retire, slot)
        pool, memory = contexts.pool, contexts.pool.memory
        buffers: list[Buffer] = []
        try:
            for shape in slot.output_shapes:
                buffers.append(pool.take(rounded(float32_bytes(shape)), key, stream))
            for _ in range(2):  # the second run of a context is captured
                targets = [buffer.pointer for buffer in buffers]
                ready = slot.run_on_device(array.pointer, array.shape[0], targets, stream, key)
            if slot.graph is None:
                raise InferenceError(f"TensorRT makes no CUDA graph of this: {contexts.refusals[array.shape]}")
        except BaseException as error:
            self._finalizer()  # waits for the GPU
            for buffer in buffers:
                pool.give_back(buffer)
            if isinstance(error, RuntimeError):
                raise contexts.failure(array, error) from error
            raise
        self.outputs = [
            _device_array(Lease(buffer, ready, pool, pool.give_back), shape, memory.gpu, stream)
            for buffer, shape in zip(buffers, slot.output_shapes, strict=True)
        ]
        self._contexts, self._memory, self._stream = contexts, memory, stream
        self._graph, self._ready, self._owner = slot.graph, ready, array.owner

    def __call__(self) -> list[DeviceArray]:
        """Enqueue the graph on its stream. Raises InputError after the session was closed."""
        if self._contexts.closed:
            raise self._contexts.refusal()
        with self._memory as memory:
            memory.launch(self._graph, self._stream)
            memory.record(self._ready.event, self._stream)
        return self.outputs


class _Output(NamedTuple):
    """Describe one output of a whole batch.

    ``size`` bytes hold it with the filling of the last piece; ``image`` bytes hold one image's part.
    """

    shape: Shape
    size: int
    image: int


@dataclass
class _Route:
    """Describe how arrays of one shape run on the GPU: the pieces, each with profile and shape, and the outputs.

    ``image``: bytes of one image of the input. ``outputs``: empty until a context has reported the shapes.
    """

    parts: list[tuple[Piece, Profile, Shape]]
    image: int
    outputs: tuple[_Output, ...] = ()

    @property
    def exact(self) -> bool:
        """Return whether the engine takes the batch without splitting or filling."""
        return len(self.parts) == 1 and self.parts[0][0].run == self.parts[0][0].count

    def set_outputs(self, count: int, shapes: Sequence[Shape]) -> None:
        """Derive the outputs of the whole batch from those of one piece. ``count``: images in the batch."""
        last = self.parts[-1][0]
        images = [float32_bytes(shape[1:]) for shape in shapes]
        self.outputs = tuple(
            _Output((count, *shape[1:]), rounded((last.start + last.run) * image), image)
            for shape, image in zip(shapes, images, strict=True)
        )


def _device_array(lease: Lease, shape: Shape, gpu: int, stream: int) -> DeviceArray:
    return DeviceArray.of_engine(lease.buffer.pointer, shape, _FLOAT32, gpu, lease, stream)
