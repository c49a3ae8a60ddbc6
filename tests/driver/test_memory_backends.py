"""Both memory backends, with the libraries that they are made for, on a driver that keeps CUDA's rules."""

from __future__ import annotations

import gc
import threading

import numpy as np
import pytest

from edge_backbones.errors import DeviceError, OutOfMemoryError
from edge_backbones.machine import gpus
from tests.driver.calls import bytes_of

BACKENDS = pytest.mark.parametrize("backend", ["cuda-bindings", "pycuda"])
LAUNCH_FAILED = 719


def opened(backend):
    from edge_backbones.engines.gpu.memory import open_memory

    return open_memory(0, backend)


def read(memory, pointer, stream, size=64) -> int:
    """The value of every byte, as work on a stream sees it that comes now."""
    found = np.empty(size, np.uint8)
    memory.copy_out(found.ctypes.data, pointer, size, stream)
    memory.wait(stream)
    assert (found == found[0]).all()
    return int(found[0])


def test_the_gpu_is_described_by_the_driver_alone(driver):
    (gpu,) = gpus.find_gpus()
    assert (gpu.name, gpu.architecture, gpu.integrated) == ("Stand-in GPU 0", "sm_90", False)
    assert gpu.driver in ("12.9", "13.0")
    assert (gpu.memory_bytes, gpu.multiprocessors, gpu.bus_address) == (1 << 30, 132, "0000:01:00.0")


@BACKENDS
def test_memory_is_copied_filled_and_freed(driver, backend):
    memory = opened(backend)
    assert memory.backend == backend
    with memory:
        stream = memory.new_stream()
        source, target = memory.allocate(64), memory.allocate(64)
        assert source % 256 == target % 256 == 0
        memory.copy_in(source, bytes_of(7).ctypes.data, 64, stream)
        memory.copy(target, source, 64, stream)
        memory.clear(source, 64, stream)
        assert [read(memory, pointer, stream) for pointer in (source, target)] == [0, 7]
        rows = np.arange(64, dtype=np.uint8).reshape(8, 8)
        memory.copy_in(source, rows.ctypes.data, 64, stream)
        memory.copy_rows(target, source + 16, rows=3, row_bytes=5, pitch=16, stream=stream)
        found = np.empty(15, np.uint8)
        memory.copy_out(found.ctypes.data, target, 15, stream)
        memory.wait(stream)
        assert (found.reshape(3, 5) == rows[2::2, :5]).all()
        memory.free(source)
        memory.free(target)
        memory.free_stream(stream)
    assert driver.left_over() == {}


@BACKENDS
def test_the_context_of_another_library_stays_current(driver, backend):
    from tests.driver.calls import context, ok

    with context() as cu:
        mine = ok(cu.cuCtxGetCurrent())
        memory = opened(backend)
        with memory, memory:
            memory.free(memory.allocate(64))
        assert int(ok(cu.cuCtxGetCurrent())) == int(mine)


@BACKENDS
def test_pinned_memory_lives_as_long_as_a_view(driver, backend):
    memory = opened(backend)
    with memory:
        array = np.frombuffer(memory.pinned(64), np.float32).reshape(2, 8)
        stream, pointer = memory.new_stream(), memory.allocate(64)
        array[:] = 1
        memory.copy_in(pointer, array.ctypes.data, 64, stream)
        array[:] = 2  # too early: the copy is enqueued, and reads page-locked memory when it runs
        assert np.frombuffer(bytes_of(0), np.float32)[0] == 0
        memory.copy_out(array.ctypes.data, pointer, 64, stream)
        array[:] = 3
        memory.wait(stream)
        assert (array == 3).all()
    view = array[1]
    del array
    gc.collect()
    assert driver.live_bytes(host=True) == 64
    del view
    gc.collect()
    assert driver.live_bytes(host=True) == 0


@BACKENDS
def test_events_order_streams(driver, backend):
    memory = opened(backend)
    with memory:
        stream, other, event = memory.new_stream(), memory.new_stream(), memory.new_event()
        source, target = memory.allocate(64), memory.allocate(64)
        memory.copy_in(source, bytes_of(1).ctypes.data, 64, stream)
        memory.wait(stream)
        memory.clear(source, 64, stream)
        memory.record(event, stream)
        memory.copy(target, source, 64, other)
        assert read(memory, target, other) == 1  # nothing made it wait
        assert not memory.happened(event)
        memory.copy_in(source, bytes_of(2).ctypes.data, 64, stream)
        memory.record(event, stream)
        memory.follow(other, event)
        memory.copy(target, source, 64, other)
        assert read(memory, target, other) == 2
        assert memory.happened(event)
        memory.copy_in(source, bytes_of(3).ctypes.data, 64, stream)
        memory.record(event, stream)
        memory.wait_for(event)
        memory.free_event(event)


@BACKENDS
def test_a_graph_replays_and_the_stream_stays_usable_after_an_error(driver, backend):
    memory = opened(backend)
    with memory:
        stream, pointer = memory.new_stream(), memory.allocate(64)
        memory.copy_in(pointer, bytes_of(1).ctypes.data, 64, stream)
        graph = memory.capture(stream, lambda: memory.clear(pointer, 64, stream))
        assert read(memory, pointer, stream) == 1
        memory.launch(graph, stream)
        assert read(memory, pointer, stream) == 0
        memory.free_graph(graph)

        def broken():
            memory.clear(pointer, 64, stream)
            raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            memory.capture(stream, broken)
        with pytest.raises(DeviceError, match="CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED"):
            memory.capture(stream, lambda: memory.wait(stream))
        assert read(memory, pointer, stream) == 0
        memory.free(pointer)
        memory.free_stream(stream)
    assert driver.left_over() == {}


@BACKENDS
def test_memory_may_be_freed_while_a_stream_captures(driver, backend):
    memory = opened(backend)
    with memory:
        stream, pointer = memory.new_stream(), memory.allocate(64)
        graph = memory.capture(stream, lambda: memory.free(pointer))
        memory.free_graph(graph)
        memory.free_stream(stream)
    assert driver.left_over() == {}


@BACKENDS
def test_streams_have_keys_that_are_never_reused(driver, backend):
    memory = opened(backend)
    with memory:
        stream = memory.new_stream()
        key = memory.stream_key(stream)
        memory.free_stream(stream)
        again = memory.new_stream()
        assert again == stream
        assert memory.stream_key(again) not in (key, 0)
        assert memory.stream_key(0) == memory.stream_key(1) == 0
        keys = [memory.stream_key(2)]

        def elsewhere():
            with memory:
                keys.append(memory.stream_key(2))

        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
        assert keys[0] != keys[1]


@BACKENDS
def test_a_pointer_is_found_on_its_gpu(driver, backend):
    memory = opened(backend)
    with memory:
        pointer = memory.allocate(64)
        assert memory.elsewhere(pointer) == memory.elsewhere(pointer + 63) == ""
        assert memory.elsewhere(bytes_of(1).ctypes.data) == "host memory"


@BACKENDS
@pytest.mark.machine(memory=1_000_000)
def test_memory_that_runs_out_is_an_error_with_sizes(driver, backend):
    memory = opened(backend)
    with memory:
        memory.allocate(900_000)
        with pytest.raises(OutOfMemoryError, match=r"cuda:0 has no 200.0 kB left .*100.0 kB of 1.0 MB are free"):
            memory.allocate(200_000)


CALLS = {
    "cuMemAlloc": lambda m, p, s, e, g: m.allocate(64),
    "cuMemFree": lambda m, p, s, e, g: m.free(p),
    "cuMemHostAlloc": lambda m, p, s, e, g: m.pinned(4),
    "cuMemcpyHtoDAsync": lambda m, p, s, e, g: m.copy_in(p, bytes_of(1).ctypes.data, 64, s),
    "cuMemcpyDtoHAsync": lambda m, p, s, e, g: m.copy_out(bytes_of(1).ctypes.data, p, 64, s),
    "cuMemcpyDtoDAsync": lambda m, p, s, e, g: m.copy(p, p, 64, s),
    "cuMemcpy2DAsync": lambda m, p, s, e, g: m.copy_rows(p, p, 2, 8, 16, s),
    "cuMemsetD8Async": lambda m, p, s, e, g: m.clear(p, 64, s),
    "cuStreamSynchronize": lambda m, p, s, e, g: m.wait(s),
    "cuStreamGetId": lambda m, p, s, e, g: m.stream_key(s),
    "cuEventCreate": lambda m, p, s, e, g: m.new_event(),
    "cuEventRecord": lambda m, p, s, e, g: m.record(e, s),
    "cuEventSynchronize": lambda m, p, s, e, g: m.wait_for(e),
    "cuEventDestroy": lambda m, p, s, e, g: m.free_event(e),
    "cuStreamWaitEvent": lambda m, p, s, e, g: m.follow(s, e),
    "cuStreamBeginCapture": lambda m, p, s, e, g: m.capture(s, lambda: None),
    "cuGraphInstantiate": lambda m, p, s, e, g: m.capture(s, lambda: None),
    "cuGraphLaunch": lambda m, p, s, e, g: m.launch(g, s),
    "cuGraphExecDestroy": lambda m, p, s, e, g: m.free_graph(g),
    "cuPointerGetAttribute": lambda m, p, s, e, g: m.elsewhere(p),
    "cuStreamCreate": lambda m, p, s, e, g: m.new_stream(),
    "cuStreamDestroy": lambda m, p, s, e, g: m.free_stream(m.new_stream()),
    "cuStreamEndCapture": lambda m, p, s, e, g: m.capture(s, lambda: None),  # the last: the stand-in goes on capturing
}


@BACKENDS
def test_every_error_of_the_driver_is_raised_with_its_name(driver, backend):
    memory = opened(backend)
    with memory:
        pointer, stream, event = memory.allocate(64), memory.new_stream(), memory.new_event()
        graph = memory.capture(stream, lambda: None)
    for name, call in CALLS.items():
        driver.fail_at(name, 1, LAUNCH_FAILED)
        with memory:
            with pytest.raises(DeviceError, match=r"CUDA_ERROR_LAUNCH_FAILED|launch (failed|failure)") as error:
                call(memory, pointer, stream, event, graph)
            assert driver.failed == name, error.value
    for name in ("cuCtxPushCurrent", "cuCtxPopCurrent"):
        driver.fail_at(name, 1, LAUNCH_FAILED)
        with pytest.raises(DeviceError), memory:
            pass
        assert driver.failed == name
