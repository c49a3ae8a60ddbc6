"""Record one call as a CUDA graph and replay it: on arrays in GPU memory, or from and to page-locked host memory."""

from __future__ import annotations

import ctypes
import weakref

import numpy as np

from edge_backbones.engines import exits
from edge_backbones.engines.gpu.arrays import DeviceArray
from edge_backbones.engines.gpu.blocks import Block
from edge_backbones.engines.gpu.dlpack import ForeignArray
from edge_backbones.engines.gpu.pool import Lease
from edge_backbones.engines.gpu.streams import StreamKey
from edge_backbones.engines.tensorrt.contexts import Contexts, capture_refusal
from edge_backbones.engines.tensorrt.profiles import Profile


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
        slot, pool = contexts.new_slot(profile), contexts.pool
        self._finalizer = weakref.finalize(self, contexts.retire, slot)
        block = None
        try:
            slot.set_shape(array.shape)
            block = pool.take(slot.outputs.size, key, stream)
            source, targets = array.pointer, slot.targets(block.pointer)
            ready = slot.record(lambda work, scratch: slot.execute(source, targets, scratch, work), stream, key)
        except BaseException as error:
            self._finalizer()  # waits for the GPU
            if block is not None:
                pool.give_back(block)
            raise contexts.failure(array, error)  # noqa: B904
        self.outputs = device_arrays(Lease(block, ready, pool), slot.outputs, pool.memory.gpu, stream)
        self._contexts, self._memory, self._stream = contexts, pool.memory, pool.memory.handle(stream)
        self._graph, self._ready, self._owner = slot.graph, ready, array.owner

    def __call__(self) -> list[DeviceArray]:
        """Enqueue the graph on its stream. Raises InputError after the session was closed, and if the stream is captured."""
        self._contexts.require_open()
        # Closing leaves the graph and its memory to this object, and an exit does not wait: nothing of TensorRT runs here.
        with self._memory as memory:
            if memory.is_capturing(self._stream):
                raise capture_refusal(int(self._stream))
            memory.launch(self._graph, self._stream)
            memory.record(self._ready.event, self._stream)
        return self.outputs


class HostGraphedCall:
    """Replay one call as a CUDA graph, with the copies to and from the GPU in it.

    It reads the page-locked memory of ``array``, waits for the GPU, and returns the same ``outputs`` in page-locked memory
    every time. One thread at a time may call it.

    Args:
        contexts: Creates the context of the call.
        array: The input in page-locked memory, which must stay where it is.
        on_gpu: The GPU's address of it.
        profile: Optimisation profile that holds its shape.

    Raises:
        InferenceError: TensorRT cannot capture the call.
    """

    def __init__(self, contexts: Contexts, array: np.ndarray, on_gpu: int, profile: Profile) -> None:
        slot, memory = contexts.new_slot(profile), contexts.pool.memory
        self._finalizer = weakref.finalize(self, contexts.retire, slot)
        try:
            slot.set_shape(array.shape)
            results = memory.pinned(slot.outputs.end)
            stream, key, results_at = slot.stream, slot.own_key, ctypes.addressof(results)
            address = int(array.__array_interface__["data"][0])
            call = slot.on_host(address, on_gpu, array.nbytes, results_at, lambda size: slot.hold(size, stream, key))
            slot.record(call, stream, key)
            memory.wait(slot.stream)
        except BaseException as error:
            self._finalizer()  # waits for the GPU
            raise contexts.failure(array, error)  # noqa: B904
        self.outputs = slot.outputs.arrays(results)
        self._contexts, self._memory, self._slot, self._array = contexts, memory, slot, array

    def __call__(self) -> list[np.ndarray]:
        """Run the graph and wait for it. Raises InputError after the session was closed."""
        self._contexts.require_open()
        with exits.calls, self._memory as memory:
            memory.launch(self._slot.graph, self._slot.stream)
            memory.wait(self._slot.stream)
        return self.outputs


def device_arrays(lease: Lease, outputs: Block, gpu: int, stream: int) -> list[DeviceArray]:
    """Return the outputs of a call as arrays over the memory of a lease."""
    start = lease.buffer.pointer
    shared = {"device": gpu, "owner": lease, "synchronize": lease.order, "stream": stream}
    return [
        DeviceArray.unchecked(pointer=start + part.offset, shape=part.shape, dtype=part.dtype, **shared)
        for part in outputs.parts
    ]
