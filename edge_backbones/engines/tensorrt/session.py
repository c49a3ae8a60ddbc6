"""Run plans with TensorRT, TensorRT-RTX or the lean runtime, without torch.

Every call borrows an execution context (contexts.py), and memory in the order of its stream (pool.py). This module decides
which profile and which pieces a call uses.
"""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from edge_backbones.engines import exits
from edge_backbones.engines.batching import Piece, pieces
from edge_backbones.engines.gpu.arrays import DeviceArray
from edge_backbones.engines.gpu.blocks import NO_ARRAYS, Block
from edge_backbones.engines.gpu.dlpack import ForeignArray, Rows
from edge_backbones.engines.gpu.memory import MemoryBackend, open_memory
from edge_backbones.engines.gpu.pool import Buffer, Lease, Ready
from edge_backbones.engines.gpu.streams import ALIGNMENT, StreamKey, is_default
from edge_backbones.engines.ports import Shape
from edge_backbones.engines.tensorrt import library as tensorrt_library
from edge_backbones.engines.tensorrt.contexts import Contexts, capture_refusal, close_quietly
from edge_backbones.engines.tensorrt.engine import load as load_engine
from edge_backbones.engines.tensorrt.graphed import GraphedCall, HostGraphedCall, device_arrays
from edge_backbones.engines.tensorrt.kernels import Kernels
from edge_backbones.engines.tensorrt.library import TensorRtFlavour
from edge_backbones.engines.tensorrt.profiles import Profile, choose_profile
from edge_backbones.engines.tensorrt.slot import Frames
from edge_backbones.errors import DeviceError, EngineMismatchError, InputError
from edge_backbones.machine import gpus
from edge_backbones.spec import BackboneSpec, InputSpec

_KNOWN_SHAPES = 1024


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
        kernels = Kernels(plan, str(library.__version__), found[gpu]) if flavour == "tensorrt_rtx" else None
        with exits.calls, device_memory:
            engine = load_engine(library, plan, flavour, input, outputs, allow_host_code, dla_core, weights, spec)
            engine.kernels, engine.reads_host_memory = kernels, found[gpu].integrated
            self._contexts = Contexts(engine, device_memory)
            self._finalizer = weakref.finalize(self, close_quietly, self._contexts)
        self._input = input
        self._dtype = np.dtype(input.dtype)
        self._memory = device_memory
        self._gpu = gpu
        self._profile = functools.lru_cache(_KNOWN_SHAPES)(functools.partial(choose_profile, engine.profiles))
        self._routes: dict[Shape, _Route] = {}

    @property
    def gpu(self) -> int:
        """Return the index of the GPU."""
        return self._gpu

    def input_buffer(self, shape: Shape) -> np.ndarray:
        """Return an array of zeros in page-locked memory, which ``run`` and ``graphed_on_host`` read without a copy.

        On a GPU that shares the memory of the CPU, the engine reads the array itself.
        """
        self._contexts.require_open()
        with self._memory as memory:
            block = memory.pinned(int(np.prod(shape)) * self._dtype.itemsize)
        array = np.ndarray(shape, self._dtype, buffer=memoryview(block))
        array[:] = 0
        return array

    def run(self, array: np.ndarray) -> list[np.ndarray]:
        """Return the outputs as described in `EngineSession`.

        The arrays are in page-locked memory, which is reused once nobody holds them.
        """
        self._contexts.require_open()
        profile = self._profile(array.shape)
        with exits.calls, self._memory:
            slot = self._contexts.take(profile, array.shape, None)
            try:
                outputs = slot.run(array)
            except BaseException as error:
                self._contexts.discard(slot)
                raise self._contexts.failure(array, error)  # noqa: B904
            self._contexts.give_back(slot)
            return outputs

    def run_on_device(self, array: ForeignArray, stream: int) -> list[DeviceArray]:
        """Enqueue one call on ``stream`` and return its outputs without waiting.

        The outputs are new arrays on the same GPU, in graph order, in one block of memory. ``array`` has any batch size
        from 1 and the input's dtype, and is on this GPU in C order, or with rows at a pitch. It is read in place and kept
        alive until then: nothing may write to it until ``stream`` is past this call. It is copied on the GPU first if it
        does not start at a multiple of 256, has rows at a pitch, or is filled up to the smallest batch.

        The outputs are valid for work on ``stream``; DLPack makes other streams wait. A later call on ``stream`` reuses
        their memory once nobody holds any of them. To read them on another stream without DLPack, hold them until that
        work is done.

        ``stream`` 0 is the default stream, on which TensorRT would block. The work then runs on another stream and is
        ordered by events.

        Raises InputError for an array that does not fit, OutOfMemoryError and InferenceError.
        """
        route = self._route(array)
        contexts = self._contexts
        with exits.calls, self._memory as memory:
            self._require_usable(array, stream)
            contexts.forget_inputs()
            key = memory.stream_key(stream)
            producer = array.producer_stream
            if producer is not None and memory.stream_key(producer) != key:
                if memory.is_capturing(producer):
                    raise capture_refusal(producer)
                contexts.pool.order(stream, producer)
            block, ready = self._enqueue(array, route, stream, key)
            contexts.reading(ready, array.owner)
            return device_arrays(Lease(block, ready, contexts.pool), route.outputs, self._gpu, stream)

    def _enqueue(self, array: ForeignArray, route: _Route, stream: int, key: StreamKey) -> tuple[Buffer, Ready]:
        """Enqueue an array piece by piece; return the memory of the outputs, and the event behind the last piece."""
        contexts, pool = self._contexts, self._contexts.pool
        block: Buffer | None = None
        try:
            for piece, profile, shape in route.parts:
                slot = contexts.take(profile, shape, key)
                try:
                    if slot.shape != shape:
                        slot.set_shape(shape)
                    if block is None:
                        if not route.outputs.parts:
                            route.set_outputs(array.shape[0], slot.outputs)
                        block = pool.take(route.outputs.size, key, stream)
                    start = block.pointer
                    targets = [start + offset + piece.start * image for offset, image in route.targets]
                    ready = slot.run_on_device(route.frames(array, piece), targets, stream, key)
                except BaseException as error:
                    contexts.discard(slot)
                    raise contexts.failure(array, error)  # noqa: B904
                contexts.give_back(slot)
        except BaseException:
            if block is not None:
                with contextlib.suppress(DeviceError):
                    self._memory.wait(stream)  # enqueued pieces still read the input, and nothing else keeps it alive
                pool.give_back(block)
            raise
        assert block is not None  # there is a piece
        return block, ready

    def graphed(self, array: ForeignArray, stream: int) -> GraphedCall:
        """Record a call on the memory of ``array`` as a CUDA graph, as described in `EdgeBackbone.graphed`.

        Raises InputError if the array cannot be read in place or ``stream`` is a default one.
        """
        route = self._route(array)
        if not route.is_exact or array.pointer % ALIGNMENT or not array.contiguous:
            raise InputError(
                f"{self._input.name} of shape {array.shape} at {array.pointer:#x} is not read in place: pass a batch that "
                f"this engine takes, in C order, at a multiple of {ALIGNMENT}"
            )
        if is_default(stream):
            raise InputError("a default stream cannot be captured: pass another")
        with exits.calls, self._memory as memory:
            self._require_usable(array, stream)
            return GraphedCall(self._contexts, array, route.parts[0][1], stream, memory.stream_key(stream))

    def graphed_on_host(self, array: np.ndarray) -> HostGraphedCall:
        """Record a call on page-locked memory, with its copies, as a CUDA graph, as described in `EdgeBackbone.graphed`.

        Raises InputError if ``array`` is in other memory, of another dtype, or no batch that the engine takes.
        """
        self._contexts.require_open()
        with exits.calls, self._memory as memory:
            address = array.__array_interface__["data"][0]
            is_fitting = array.dtype == self._dtype and array.flags.c_contiguous and array.shape[0] in self._input.batch
            on_gpu = memory.page_locked(address, array.nbytes) if is_fitting else None
            if on_gpu is None:
                raise InputError(
                    f"{self._input.name} of {array.dtype} and shape {array.shape} in this memory cannot be recorded: fill "
                    "an array of backbone.input_buffer(batch), with a batch that this engine takes, and pass that"
                )
            return HostGraphedCall(self._contexts, array, on_gpu, self._profile(array.shape))

    def close(self) -> None:
        """Wait for the GPU, then release contexts, engine and runtime, in this order. Closing twice is fine.

        Returned arrays stay valid. A call in another thread finishes first.
        """
        self._contexts.close()
        self._finalizer.detach()

    def _require_usable(self, array: ForeignArray, stream: int) -> None:
        """Raise InputError if an array is not in the memory of this GPU, or if the caller captures a CUDA graph."""
        where = self._memory.elsewhere(array.pointer)
        if where:
            raise InputError(
                f"{self._input.name} is in {where}, this engine runs on cuda:{self._gpu}: copy it there first"
            )
        if self._memory.is_capturing(stream):
            raise capture_refusal(stream)

    def _route(self, array: ForeignArray) -> _Route:
        """Return how an array is run. Raises InputError if it cannot be."""
        self._contexts.require_open()
        shape = array.shape
        if array.dtype != self._dtype:
            raise InputError(
                f"{self._input.name} of dtype {array.dtype} does not fit: cast it to {self._dtype} on the GPU, which this "
                "engine takes"
            )
        if not array.contiguous and (array.rows is None or array.rows.count % shape[0]):
            raise InputError(
                f"{self._input.name} of shape {shape} is not in C order, and not rows of it at one pitch: make it "
                "contiguous on the GPU first"
            )
        route = self._routes.get(shape)
        return self._new_route(shape, array.nbytes) if route is None else route

    def _new_route(self, shape: Shape, nbytes: int) -> _Route:
        if not shape or shape[0] < 1:
            raise InputError(
                f"{self._input.name} of shape {shape} does not fit: this engine takes {self._input.describe()}"
            )
        runs = [(piece, (piece.run, *shape[1:])) for piece in pieces(shape[0], self._input.batch)]
        route = _Route([(piece, self._profile(run), run) for piece, run in runs], nbytes // shape[0])
        if len(self._routes) < _KNOWN_SHAPES:
            self._routes[shape] = route
        return route


@dataclass
class _Route:
    """Describe how arrays of one shape run on the GPU.

    Attributes:
        parts: Every piece, with its profile and shape.
        image: Bytes of one image of the input.
        outputs: Outputs of the whole batch; empty until a context has reported their shapes.
        targets: Offset of each output, and bytes of one image in it.
    """

    parts: list[tuple[Piece, Profile, Shape]]
    image: int
    outputs: Block = NO_ARRAYS
    targets: tuple[tuple[int, int], ...] = ()

    @property
    def is_exact(self) -> bool:
        """Return whether the engine takes the batch without splitting or filling."""
        return len(self.parts) == 1 and self.parts[0][0].run == self.parts[0][0].count

    def set_outputs(self, count: int, first: Block) -> None:
        """Derive the outputs of the whole batch from those of one piece. ``count``: images in the batch."""
        last = self.parts[-1][0]
        images = tuple(part.nbytes // part.shape[0] for part in first.parts)
        outputs = Block.of(
            [(count, *part.shape[1:]) for part in first.parts],
            [part.dtype for part in first.parts],
            [(last.start + last.run) * image for image in images],  # the filling of the last piece is written too
        )
        self.targets = tuple((part.offset, image) for part, image in zip(outputs.parts, images, strict=True))
        self.outputs = outputs  # last: another thread that finds it reads the targets too

    def frames(self, array: ForeignArray, piece: Piece) -> Frames:
        """Return where the images of a piece are."""
        if array.contiguous or array.rows is None:
            return Frames(array.pointer + piece.start * self.image, piece.count, self.image)
        each = array.rows.count // array.shape[0]  # rows of one image
        rows = Rows(piece.count * each, array.rows.nbytes, array.rows.pitch)
        return Frames(array.pointer + piece.start * each * rows.pitch, piece.count, self.image, rows)
