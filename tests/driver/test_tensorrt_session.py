"""TensorRtSession over a simulated TensorRT, the real CUDA bindings and the stand-in for the driver."""

from __future__ import annotations

import gc
import sys
import threading
import weakref
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest

from edge_backbones.engines.batching import pieces
from edge_backbones.engines.gpu.arrays import DeviceArray, from_foreign
from edge_backbones.engines.gpu.dlpack import ForeignArray
from edge_backbones.engines.gpu.streams import rounded
from edge_backbones.engines.tensorrt import library as tensorrt_library
from edge_backbones.engines.tensorrt.contexts import IDLE_CONTEXTS
from edge_backbones.errors import (
    EdgeBackbonesError,
    EngineMismatchError,
    InferenceError,
    InputError,
    OutOfMemoryError,
)
from edge_backbones.machine import gpus
from edge_backbones.runtime.backbone import EdgeBackbone
from edge_backbones.spec import ShapeRange
from edge_backbones.testing import SPEC, NumpySession, pooled, pooling_input
from tests.simulated_builder import GRAPH
from tests.simulated_tensorrt import TENSORS, Context, Engine, plan_of, shapes

RANDOM = np.random.default_rng(0)


def pixels(batch: int, height: int = 32, width: int = 48) -> np.ndarray:
    return RANDOM.standard_normal((batch, 3, height, width)).astype(np.float32)


def check(maps, images) -> None:
    for actual, expected in zip(maps, pooled(images), strict=True):
        assert actual.shape == expected.shape
        np.testing.assert_array_equal(actual, expected)


# ---- the host path


def test_host_arrays_go_in_and_out(machine):
    session = machine.open()
    for batch in (1, 2, 4, 3, 1, 2, 4, 1):
        images = pixels(batch)
        maps = session.run(images)
        check(maps, images)
        assert all(m.flags.c_contiguous and m.flags.writeable and m.dtype == np.float32 for m in maps)
    session.close()
    del maps
    assert machine.left_over() == {}


def test_a_loop_over_frames_allocates_nothing(machine):
    session, images = machine.open(), pixels(2)
    first = session.run(images)
    second = session.run(images)  # while the first is held
    del first, second
    before = Counter(machine.gpu.calls)
    addresses = {tuple(m.ctypes.data for m in session.run(images)) for _ in range(20)}
    used = Counter(machine.gpu.calls) - before
    assert len(addresses) == 1
    assert not {name for name in used if "Alloc" in name or "Create" in name or "create" in name}
    assert used["execute_async_v3"] == 20
    assert used["set_tensor_address"] == used["set_input_shape"] == 0


HOLDS = {
    "itself": lambda m: m,
    "part": lambda m: m[0, 0],
    "memoryview": memoryview,
    "DLPack": np.from_dlpack,
    "transposed": lambda m: m.T,
}


@pytest.mark.parametrize("kind", list(HOLDS))
def test_whatever_holds_a_result_keeps_its_values(machine, kind):
    session, images, hold = machine.open(), pixels(2), HOLDS[kind]
    held = [hold(feature_map) for feature_map in session.run(images)]
    expected = [np.array(hold(feature_map)) for feature_map in pooled(images)]
    for _ in range(3):
        session.run(pixels(2))
    session.close()
    for actual, wanted in zip(held, expected, strict=True):
        np.testing.assert_array_equal(np.asarray(actual), wanted)


def test_results_that_pile_up_do_not_fill_page_locked_memory(machine):
    session = machine.open()
    inputs = [pixels(1 + i % 4) for i in range(40)]
    results = [session.run(images) for images in inputs]
    for maps, images in zip(results, inputs, strict=True):
        check(maps, images)
    assert machine.counted("cuMemHostAlloc") <= 1 + 2 * 8 + 2 * 4 * 4


def test_threads_do_not_mix_results_and_share_a_few_contexts(machine):
    session = machine.open()
    inputs = [pixels(1 + i % 4) for i in range(128)]
    with ThreadPoolExecutor(6) as pool:
        results = list(pool.map(session.run, inputs))
    for maps, images in zip(results, inputs, strict=True):
        check(maps, images)
    assert machine.library.made <= IDLE_CONTEXTS + 6
    session.close()
    del results, maps
    assert machine.library.live["context"] == 0


def test_the_tightest_profile_runs_a_shape(machine):
    data = plan_of(shapes(1, 1, 1), shapes(1, 4, 8))
    batch = ShapeRange(min=1, opt=4, max=8)
    session = machine.open(batch, data)
    for count in (1, 5, 1, 8, 5, 5):
        images = pixels(count)
        check(session.run(images), images)
    assert machine.counted("set_optimization_profile_async") == machine.library.made
    with pytest.raises(InputError) as caught:
        session.run(pixels(9))
    assert "(9, 3, 32, 48)" in str(caught.value)
    assert "profile 0: min (1, 3, 32, 48), opt (1, 3, 32, 48), max (1, 3, 32, 48)" in str(caught.value)
    assert "profile 1: min (1, 3, 32, 48), opt (4, 3, 32, 48), max (8, 3, 32, 48)" in str(caught.value)


def test_close_goes_from_contexts_to_the_runtime_and_results_stay(machine):
    session, images = machine.open(), pixels(2)
    maps, on_gpu = session.run(images), session.run_on_device(machine.gpu.put(images), machine.stream)
    session.close()
    session.close()
    assert +machine.library.live == {}
    check(maps, images)
    check([machine.gpu.value(m, machine.stream) for m in on_gpu], images)
    with pytest.raises(InputError, match="this EdgeBackbone was closed"):
        session.run(images)
    with pytest.raises(InputError, match="this EdgeBackbone was closed"):
        session.run_on_device(machine.gpu.put(images), machine.stream)
    del maps, on_gpu
    assert machine.left_over() == {}


def test_a_forked_child_asks_cuda_for_nothing(machine):
    """What runs in the child of a process with a session, while a thread of the parent holds the lock."""
    session, images = machine.open(), pixels(2)
    array = machine.gpu.put(images)
    graphed = session.graphed(array, machine.stream)
    maps, on_gpu = session.run(images), session.run_on_device(array, machine.stream)
    held = threading.Thread(target=session._contexts._lock.acquire)
    held.start()
    held.join()
    references, before = sys.getrefcount(session._contexts), len(machine.gpu.calls)
    session._contexts.abandon()
    for _ in range(2):
        for call in (lambda: session.run(images), lambda: session.run_on_device(array, machine.stream), graphed):
            with pytest.raises(
                InferenceError, match="TensorRT was started in the process that this one was forked from"
            ):
                call()
        session.close()
        session._contexts.abandon()  # and in a child of the child
    contexts = session._contexts
    check(maps, images)
    del on_gpu, graphed, call
    session = None
    gc.collect()
    assert machine.gpu.calls[before:] == []
    assert +machine.library.live != {}
    assert sys.getrefcount(contexts) > references - 2  # kept for good


def test_nothing_of_tensorrt_is_made_under_an_old_driver(machine, monkeypatch):
    monkeypatch.setattr(
        tensorrt_library, "against_driver", lambda flavour, driver: f"too old: {flavour}, CUDA {driver}"
    )
    monkeypatch.setattr(machine.library, "Runtime", lambda *_: pytest.fail("it would be dead"))
    with pytest.raises(EngineMismatchError, match=r"^too old: tensorrt, CUDA 1[23]\.[09]$"):
        machine.open()


def test_close_before_a_context_is_made_is_told(machine, monkeypatch):
    """Another thread closes between the choice of a context and its making."""
    session = machine.open()
    make = session._contexts.new_slot

    def closing(*arguments):
        session.close()
        return make(*arguments)

    monkeypatch.setattr(session._contexts, "new_slot", closing)
    with pytest.raises(InputError, match="this EdgeBackbone was closed"):
        session.run(pixels(2))
    assert machine.left_over() == {}


def test_close_during_a_call_leaves_the_engine_to_it(machine, monkeypatch):
    """Another thread closes while the GPU works: the call ends as it would have, and takes the engine along."""
    session, images = machine.open(), pixels(2)
    wait, closed = machine.memory.wait, []

    def closing(stream):
        if not closed:
            closed.append(True)
            session.close()
        wait(stream)

    monkeypatch.setattr(machine.memory, "wait", closing)
    maps = session.run(images)
    check(maps, images)
    assert closed
    del maps
    assert machine.left_over() == {}  # the fixture sees to it that no engine goes before its contexts


def test_a_session_that_nobody_closed_is_released_when_it_is_collected(machine):
    session = machine.open()
    for _ in range(3):
        session.run(pixels(2))
    del session
    assert machine.left_over() == {}


# ---- the device path


@pytest.mark.parametrize("stream", [0, 1, "own"])
def test_device_arrays_go_in_and_out_and_nothing_waits(machine, stream):
    stream = machine.handle(stream)
    session = machine.open()
    session.run_on_device(machine.gpu.put(pixels(2)), stream)
    before = Counter(machine.gpu.calls)
    batches = [pixels(2), pixels(2), pixels(2)]
    results = [session.run_on_device(machine.gpu.put(images), stream) for images in batches]
    used = Counter(machine.gpu.calls) - before
    assert not [name for name in used if "Synchronize" in name]
    for maps, images in zip(results, batches, strict=True):
        assert [(m.dtype, m.device, m.stream) for m in maps] == [(np.float32, 0, stream)] * 2
        check([machine.gpu.value(m, stream) for m in maps], images)


def test_an_input_is_read_in_place(machine):
    session, images = machine.open(), pixels(3)
    maps = session.run_on_device(machine.gpu.put(images), machine.stream)
    assert not [name for name in machine.gpu.calls if name.startswith("cuMemcpy")]
    check([machine.gpu.value(m, machine.stream) for m in maps], images)


def test_memory_of_results_is_used_again_once_nobody_holds_them(machine):
    session, source = machine.open(), machine.gpu.put(pixels(2))
    for _ in range(2):
        session.run_on_device(source, machine.stream)
    seen = {tuple(m.pointer for m in session.run_on_device(source, machine.stream)) for _ in range(20)}
    assert len(seen) <= 2
    assert machine.counted("cuMemAlloc") <= 6
    held, inputs = [], []
    for _ in range(6):
        inputs.append(pixels(2))
        held.append(session.run_on_device(machine.gpu.put(inputs[-1]), machine.stream))
    for maps, images in zip(held, inputs, strict=True):
        check([machine.gpu.value(m, machine.stream) for m in maps], images)


@pytest.mark.parametrize("stream", [0, "own"])
@pytest.mark.parametrize("engine_first", [True, False])
def test_a_consumer_on_another_stream_waits_and_is_not_overtaken(machine, stream, engine_first):
    stream = machine.handle(stream)
    session, images = machine.open(), pixels(2)
    gpu = machine.gpu
    copies = []
    for _ in range(12):
        maps = session.run_on_device(gpu.put(images), stream)
        # A consumer copies the result on its own stream, and lets go of it before that has run.
        for feature_map in maps:
            taken = from_foreign(feature_map, stream=machine.other)
            copy = gpu.raw(taken.nbytes)
            gpu.cuCtxPushCurrent(0)
            gpu.cuMemcpyDtoDAsync(copy, taken.pointer, taken.nbytes, machine.other)
            gpu.cuCtxPopCurrent()
            copies.append(
                (SimpleNamespace(pointer=copy, shape=taken.shape, dtype=taken.dtype, nbytes=taken.nbytes), images)
            )
            del taken
        del maps, feature_map
        images = pixels(2)
        session.run_on_device(gpu.put(images), stream)
    gpu.drain(
        stream if engine_first else machine.other
    )  # the engine overwrites what it may, or the consumer reads too early
    for i, (copy, source) in enumerate(copies):
        np.testing.assert_array_equal(gpu.value(copy, machine.other), pooled(source)[i % 2])


def test_a_stream_that_gets_the_handle_of_a_destroyed_one_is_another_stream(machine):
    session, gpu = machine.open(), machine.gpu
    copies = []
    for i in range(6):
        images = pixels(2)
        maps = session.run_on_device(gpu.put(images), machine.stream)
        copy = gpu.raw(maps[0].nbytes)
        gpu.cuCtxPushCurrent(0)
        gpu.cuMemcpyDtoDAsync(copy, maps[0].pointer, maps[0].nbytes, machine.stream)
        gpu.cuCtxPopCurrent()
        result = SimpleNamespace(pointer=copy, dtype=maps[0].dtype, shape=maps[0].shape, nbytes=maps[0].nbytes)
        copies.append((result, gpu.recreate(machine.stream) if i else machine.stream, images))
        del maps
    for copy, stream, images in reversed(copies):  # the newest work comes first, where nothing speaks against it
        np.testing.assert_array_equal(gpu.value(copy, stream), pooled(images)[0])


def test_contexts_are_ordered_when_they_change_streams(machine):
    session, gpu = machine.open(), machine.gpu
    streams = [machine.stream, machine.other, 0]
    with machine.memory as memory:
        streams += [memory.new_stream() for _ in range(5)]
    results = []
    for i in range(24):
        images = pixels(1 + i % 4)
        results.append(
            (session.run_on_device(gpu.put(images), streams[i % len(streams)]), streams[i % len(streams)], images)
        )
        if i % 7 == 0:
            check(session.run(images), images)
    for maps, stream, images in reversed(results):
        check([gpu.value(m, stream) for m in maps], images)
    assert machine.library.made <= IDLE_CONTEXTS + 1


@pytest.mark.parametrize(
    ("batch", "count"),
    [
        (ShapeRange(min=1, opt=2, max=4), 11),
        (ShapeRange(min=3, opt=4, max=4), 2),
        (ShapeRange(min=3, opt=4, max=4), 5),
        (ShapeRange.fixed(4), 9),
    ],
)
@pytest.mark.parametrize("stream", [0, "own"])
@pytest.mark.parametrize("offset", [0, 64])
@pytest.mark.parametrize("size", [(32, 48), (8, 8)])
def test_batches_of_every_size_are_cut_filled_and_joined_on_the_gpu(machine, batch, count, stream, offset, size):
    stream = machine.handle(stream)
    height, width = size  # maps of 8 x 8 pixels do not fill 256 bytes: pieces are not aligned
    ranges = {"height": (height,) * 3, "width": (width,) * 3}
    data = plan_of(shapes(batch.min, batch.opt, batch.max, **ranges))
    session = machine.open(batch, data, input=pooling_input(batch, height, width))
    images = pixels(count, height, width)
    for _ in range(3):
        maps = session.run_on_device(machine.gpu.put(images, offset), stream)
        check([machine.gpu.value(m, stream) for m in maps], images)
    assert machine.counted("cuMemcpyHtoDAsync") == machine.counted("cuMemcpyDtoHAsync") == 0
    filled = any(piece.run != piece.count for piece in pieces(count, batch))
    assert machine.counted("cuMemsetD8Async") == (3 if filled else 0)


def test_a_batch_that_fails_on_its_way_has_been_read_when_the_error_comes(machine, monkeypatch):
    batch, make, made = ShapeRange(min=1, opt=2, max=4), Engine.create_execution_context, []
    session = machine.open(batch, plan_of(shapes(1, 1, 1), shapes(1, 2, 4)))

    def fails_at_the_second(engine, *strategy):
        made.append(strategy)
        return make(engine, *strategy) if len(made) == 1 else None

    monkeypatch.setattr(Engine, "create_execution_context", fails_at_the_second)
    with pytest.raises(InferenceError, match="TensorRT made no execution context"):
        session.run_on_device(machine.gpu.put(pixels(5)), machine.stream)
    assert machine.counted("execute_async_v3") == 1
    assert not machine.gpu.streams[machine.stream]


def test_results_that_were_held_in_heaps_are_freed_in_the_end(machine):
    session, source = machine.open(), machine.gpu.put(pixels(2))
    held = [session.run_on_device(source, machine.stream) for _ in range(400)]
    most = len(machine.gpu.memory)
    held.clear()
    images = pixels(2)
    maps = session.run_on_device(machine.gpu.put(images), machine.stream)
    assert most - len(machine.gpu.memory) > 250
    check([machine.gpu.value(m, machine.stream) for m in maps], images)


def test_an_input_is_kept_until_it_has_been_read(machine):
    class Owner:
        pass

    session, gpu = machine.open(), machine.gpu
    array = gpu.put(pixels(2))
    owner = Owner()
    array = ForeignArray(array.pointer, array.shape, array.dtype, 0, True, owner=owner)
    alive = weakref.ref(owner)
    session.run_on_device(array, machine.stream)
    del array, owner
    session.run_on_device(gpu.put(pixels(2)), machine.stream)
    assert alive() is not None
    gpu.drain(machine.stream)
    session.run_on_device(gpu.put(pixels(2)), machine.stream)
    assert alive() is None


def test_a_producer_that_is_not_done_is_waited_for_on_the_gpu(machine):
    session, gpu, images = machine.open(), machine.gpu, pixels(2)
    empty = gpu.put(np.zeros_like(images))
    made = gpu.put(images)
    gpu.cuCtxPushCurrent(0)
    gpu.cuMemcpyDtoDAsync(empty.pointer, made.pointer, images.nbytes, machine.other)
    gpu.cuCtxPopCurrent()
    array = ForeignArray(empty.pointer, images.shape, images.dtype, None, True, object(), machine.other)
    maps = session.run_on_device(array, machine.stream)
    check([gpu.value(m, machine.stream) for m in maps], images)


def test_work_on_the_default_stream_is_ordered_with_the_stream_beside_it(machine):
    session, gpu, images = machine.open(), machine.gpu, pixels(2)
    empty, made = gpu.put(np.zeros_like(images)), gpu.put(images)
    with machine.memory as memory:
        memory.copy(empty.pointer, made.pointer, images.nbytes, 0)
    maps = session.run_on_device(empty, 0)
    for stream in reversed(list(gpu.streams)):
        gpu.drain(stream)
    check([gpu.value(m, 0) for m in maps], images)


def replaced(array: ForeignArray, **fields) -> ForeignArray:
    return ForeignArray(**{name: fields.get(name, getattr(array, name)) for name in ForeignArray.__dataclass_fields__})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": np.dtype(np.float16)}, "of dtype float16 does not fit: cast it to float32 on the GPU"),
        ({"contiguous": False}, "is not in C order, and not rows of it at one pitch: make it"),
        ({"pointer": 0x1234}, "pixel_values is in host memory, this engine runs on cuda:0"),
        ({"shape": (0, 3, 32, 48)}, "does not fit"),
        ({"shape": (2, 3, 64, 48)}, "fits no optimisation profile of this engine"),
    ],
)
def test_device_arrays_that_do_not_fit_are_refused(machine, change, message):
    session, array = machine.open(), machine.gpu.put(pixels(2))
    with pytest.raises(InputError, match=message):
        session.run_on_device(replaced(array, **change), machine.stream)
    images = pixels(2)
    maps = session.run_on_device(machine.gpu.put(images), machine.stream)
    check([machine.gpu.value(m, machine.stream) for m in maps], images)


# ---- CUDA graphs


def test_a_graphed_call_copies_and_allocates_nothing(machine):
    session, gpu, images = machine.open(), machine.gpu, pixels(2)
    array = gpu.put(images)
    call = session.graphed(array, machine.stream)
    check([gpu.value(m, machine.stream) for m in call.outputs], images)
    first = call()
    for _ in range(3):
        images = pixels(2)
        gpu.bytes_at(array.pointer, array.nbytes)[:] = images.tobytes()
        before = len(gpu.calls)
        maps = call()
        made = Counter(gpu.calls[before:])
        assert maps is first
        names = ("cuCtxPushCurrent", "cuStreamIsCapturing", "cuGraphLaunch", "cuEventRecord", "cuCtxPopCurrent")
        assert made == dict.fromkeys(names, 1)
        assert [m.stream for m in maps] == [machine.stream] * 2
        maps[0].order(machine.other)  # a consumer elsewhere waits for this call, not for the first
        check([gpu.value(maps[0], machine.other), gpu.value(maps[1], machine.stream)], images)
    # Another call of the same session, meanwhile, has other memory; and the maps stay when the call is gone.
    other = pixels(2)
    check([gpu.value(m, machine.stream) for m in session.run_on_device(gpu.put(other), machine.stream)], other)
    del call
    gc.collect()
    check([gpu.value(m, machine.stream) for m in first], images)
    again = session.graphed(array, machine.stream)
    session.close()
    with pytest.raises(InputError, match="was closed"):
        again()
    del again, first, maps
    gc.collect()
    assert machine.left_over() == {}
    assert machine.library.live["engine"] == 0


def test_a_replay_inside_the_callers_own_capture_is_refused_and_goes_on_afterwards(machine):
    from cuda.bindings import driver as cu

    session, images = machine.open(), pixels(2)
    call = session.graphed(machine.gpu.put(images), machine.stream)
    with machine.memory as memory:
        for mode in (0, 1, 2):
            cu.cuStreamBeginCapture(machine.stream, cu.CUstreamCaptureMode(mode))
            with pytest.raises(InputError, match="is being captured, and a call cannot be part of"):
                call()
            code, graph = cu.cuStreamEndCapture(machine.stream)
            assert not code
            cu.cuGraphDestroy(graph)
            maps = call()
            maps[0].__dlpack__(stream=machine.other)
            check([machine.gpu.value(m, machine.stream) for m in maps], images)
        memory.wait(machine.other)


def test_a_graphed_call_of_a_backbone_returns_the_chosen_stages(machine):
    session, gpu, images = machine.open(), machine.gpu, pixels(2)
    array = gpu.put(images)
    frame = DeviceArray(
        array.pointer, array.shape, array.dtype, device=0, owner=None, synchronize=None, stream=machine.stream
    )
    with EdgeBackbone(SPEC, pooling_input(ShapeRange(min=1, opt=2, max=4)), session, device="cuda:0") as backbone:
        backbone.out_features = ["pool8"]
        call = backbone.graphed(frame, stream=machine.stream)
        [feature_map] = call().feature_maps
        np.testing.assert_array_equal(gpu.value(feature_map, machine.stream), pooled(images)[1])
        with pytest.raises(InputError, match="stream= is for arrays on the GPU"):
            backbone.graphed(images, stream=machine.stream)
        with pytest.raises(InputError, match="a default stream cannot be captured"):
            backbone.graphed(frame, stream=None)
    on_cpu = EdgeBackbone(SPEC, pooling_input(), NumpySession(pooling_input()))
    with pytest.raises(InputError, match="no CUDA graph on cpu"):
        on_cpu.graphed(frame, stream=machine.stream)


@pytest.mark.parametrize(
    ("change", "stream", "message"),
    [
        ({}, 0, "a default stream cannot be captured: pass another"),
        ({}, 2, "a default stream cannot be captured"),
        ({"pointer": 64}, "own", "is not read in place: .* at a multiple of 256"),
        ({"batch": 5}, "own", "is not read in place: pass a batch that this engine takes"),
        ({"nowhere": True}, "own", "pixel_values is in host memory, this engine runs on cuda:0"),
    ],
)
def test_what_no_graph_can_be_made_of_is_refused(machine, change, stream, message):
    stream = machine.handle(stream)
    session, array = machine.open(), machine.gpu.put(pixels(change.get("batch", 2)), change.get("pointer", 0))
    if "nowhere" in change:
        array = replaced(array, pointer=0x1000)
    with pytest.raises(InputError, match=message):
        session.graphed(array, stream)
    assert machine.library.live["context"] == 0


def test_a_graph_that_tensorrt_does_not_make_is_refused_and_leaves_nothing(machine):
    machine.library.captures_allowed = False
    session, array = machine.open(), machine.gpu.put(pixels(2))
    with pytest.raises(InferenceError, match=r"makes no CUDA graph of this: .*not permitted when stream is capturing"):
        session.graphed(array, machine.stream)
    assert machine.library.live["context"] == 0
    maps = session.run_on_device(array, machine.stream)
    assert [m.shape[0] for m in maps] == [2, 2]


@pytest.mark.machine(version=13000)  # the oldest that TensorRT-RTX here is made for
def test_rtx_is_asked_whether_a_stream_can_be_captured(machine, monkeypatch):
    monkeypatch.setattr(Context, "is_stream_capturable", lambda self, stream: False, raising=False)
    session, array = machine.open(flavour="tensorrt_rtx"), machine.gpu.put(pixels(2))
    with pytest.raises(InferenceError, match=r"no CUDA graph of this: it says that the call cannot be captured"):
        session.graphed(array, machine.stream)
    assert machine.counted("cuStreamBeginCapture") == 0
    assert machine.library.live["context"] == 0


# ---- what goes wrong


def test_without_a_driver_nothing_of_tensorrt_is_touched(machine, monkeypatch):
    monkeypatch.setattr(gpus, "no_gpu_reason", lambda: "no NVIDIA driver (libcuda.so.1 is missing)")
    monkeypatch.setattr(tensorrt_library, "load_library", lambda flavour: pytest.fail("touched"))
    with pytest.raises(EngineMismatchError, match="the tensorrt_lean engine needs an NVIDIA GPU: no NVIDIA driver"):
        machine.open(flavour="tensorrt_lean")


def changed(i: int, j: int, value: str) -> list:
    tensors = [list(row) for row in TENSORS]
    tensors[i][j] = value
    return tensors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gpu": 1}, "there is no cuda:1 here, 1 GPUs are visible"),
        (
            {"data": bytearray(b"\0" * 100)},
            r"tensorrt 11.4.0.1 does not load this plan \(Serialization assertion failed\)",
        ),
        ({"data": plan_of(shapes(1, 2, 4), host_code=True)}, "pass allow_host_code=True"),
        (
            {"data": plan_of(shapes(1, 2, 4), tensors=changed(1, 0, "image"))},
            r"it takes \['image'\], the manifest says",
        ),
        (
            {"data": plan_of(shapes(1, 2, 4), tensors=changed(1, 2, "HALF"))},
            "its input is HALF, the manifest says FLOAT",
        ),
        ({"data": plan_of(shapes(1, 2, 4), tensors=changed(0, 2, "HALF"))}, "it returns pool8 HALF"),
        ({"data": plan_of(shapes(1, 2, 4), tensors=changed(0, 0, "x"))}, r"it returns \['x', 'pool4'\], the manifest"),
        ({"data": plan_of(shapes(1, 2, 3))}, r"no optimisation profile for \[\(4, 3, 32, 48\)\]"),
    ],
)
def test_plans_and_machines_that_do_not_fit_are_refused(machine, options, message):
    with pytest.raises(EngineMismatchError, match=message):
        machine.open(**options)
    assert machine.left_over() == {}


def test_a_runtime_that_cannot_be_made_is_refused(machine):
    machine.library.runtime_is_null = True
    with pytest.raises(EngineMismatchError, match="tensorrt cannot start: numpy_tensorrt_"):
        machine.open()


def test_host_code_runs_only_when_it_is_allowed(machine):
    data = plan_of(shapes(1, 2, 4), host_code=True)
    session = machine.open(data=data, allow_host_code=True, flavour="tensorrt_lean")
    assert machine.library.runtime.host_code is True
    images = pixels(2)
    check(session.run(images), images)
    machine.open().close()
    assert machine.library.runtime.host_code is False


def test_a_plan_without_weights_takes_those_of_its_graph(machine):
    data = plan_of(shapes(1, 2, 4), stripped=True)
    session = machine.open(data=data, weights=bytearray(GRAPH))
    images = pixels(2)
    check(session.run(images), images)
    with pytest.raises(
        EngineMismatchError, match=r"does not take the weights of this graph \(weights of another graph\)"
    ):
        machine.open(data=data, weights=GRAPH + bytes.fromhex("3203 6f7468"))
    start = len(machine.gpu.calls)
    machine.open(data=data, weights=GRAPH).close()
    machine.gpu.fail_at = len(machine.gpu.calls) + machine.gpu.calls[start:].index("Refitter") + 1
    with pytest.raises(EngineMismatchError, match="tensorrt cannot refit this plan"):
        machine.open(data=data, weights=GRAPH)
    machine.gpu.fail_at = None
    del machine.library.OnnxParserRefitter
    with pytest.raises(EngineMismatchError, match="takes no weights from a graph: compile the plan without --strip"):
        machine.open(data=data, weights=GRAPH)


def test_memory_that_ran_out_is_told_with_sizes_and_advice(machine):
    session = machine.open(data=plan_of(shapes(1, 2, 4), scratch=0))
    machine.gpu.size = machine.gpu.used() + 4096
    with pytest.raises(
        OutOfMemoryError, match=r"cuda:0 has no 36.9 kB left .*1.0 kB of .* are free: run smaller batches"
    ):
        session.run(pixels(2))
    machine.gpu.size = 1 << 30
    images = pixels(2)
    check(session.run(images), images)
    no_context = plan_of(shapes(1, 2, 4), no_context="Error Code 2: OutOfMemory (Requested size was 9 bytes.)")
    with pytest.raises(OutOfMemoryError, match=r"TensorRT made no execution context: .*OutOfMemory"):
        machine.open(data=no_context).run(images)


def test_free_results_make_room_before_memory_is_said_to_have_run_out(machine):
    batch = ShapeRange(min=1, opt=2, max=16)
    session = machine.open(batch, plan_of(shapes(1, 2, 16), scratch=0))
    session.run_on_device(machine.gpu.put(pixels(2)), machine.stream)
    source = machine.gpu.put(pixels(16))
    machine.gpu.size = machine.gpu.used() + rounded(16 * 3 * (8 * 12 + 4 * 6) * 4) - 1000
    assert len(session.run_on_device(source, machine.stream)) == 2


def test_outputs_that_tensorrt_cannot_size_are_an_error(machine):
    with pytest.raises(InferenceError, match=r"does not know the shapes of \['pool4'\]"):
        machine.open(data=plan_of(shapes(1, 2, 4), unknown=["pool4"])).run(pixels(2))


def test_a_context_that_failed_is_not_used_again(machine):
    session, images = machine.open(), pixels(2)
    session.run(images)
    machine.gpu.fail_at = len(machine.gpu.calls) + 3
    with pytest.raises(EdgeBackbonesError):
        session.run(images)
    assert machine.library.live["context"] == 0
    check(session.run(images), images)
    assert machine.library.made == 2


def test_an_interrupt_leaves_nothing_that_the_gpu_still_writes_to(machine, monkeypatch):
    session, images = machine.open(), pixels(2)
    wait = machine.memory.wait
    pending = iter([KeyboardInterrupt])

    def interrupted(stream):
        for error in pending:
            raise error
        wait(stream)

    monkeypatch.setattr(machine.memory, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        session.run(images)
    check(session.run(images), images)
    assert machine.library.made == 2
