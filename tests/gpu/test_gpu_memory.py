"""engines/gpu/memory.py on a real GPU, with both libraries that manage memory there. Needs no engine and no torch."""

from __future__ import annotations

import gc
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor

import gpu_engines
import numpy as np
import pytest

from benchmarks.gpu_kernels import kernels, on_standin
from edge_backbones.engines.gpu import memory as cuda
from edge_backbones.errors import DeviceError, OutOfMemoryError
from edge_backbones.machine import gpus


@pytest.fixture(params=gpu_engines.each(gpu_engines.BACKENDS))
def memory(request, gpu):
    return cuda.open_memory(gpu, request.param)


@pytest.fixture
def stream(memory):
    with memory:
        made = memory.new_stream()
    yield made
    with memory:
        memory.wait(made)
        memory.free_stream(made)


class Buffers:
    """Device memory that is given back at the end of a test."""

    def __init__(self, memory):
        self.memory = memory
        self.pointers = []

    def new(self, size):
        self.pointers.append(self.memory.allocate(size))
        return self.pointers[-1]

    def filled(self, values, stream):
        pointer = self.new(values.nbytes)
        self.memory.copy_in(pointer, values.ctypes.data, values.nbytes, stream)
        self.memory.wait(stream)
        return pointer

    def read(self, pointer, like, stream):
        values = np.empty_like(like)
        self.memory.copy_out(values.ctypes.data, pointer, values.nbytes, stream)
        self.memory.wait(stream)
        return values


@pytest.fixture
def buffers(memory):
    made = Buffers(memory)
    yield made
    with memory:
        gpu_engines.wait_for_all()
        for pointer in made.pointers:
            memory.free(pointer)


def noise(size, seed=0):
    return np.random.default_rng(seed).integers(0, 256, size, np.uint8)


def test_the_gpu_is_described(gpu):
    found = gpus.find_gpus()[gpu]
    assert found.index == gpu
    assert found.name
    assert found.memory_bytes >= 1 << 30
    assert found.multiprocessors > 0
    assert tuple(map(int, found.driver.split("."))) >= (11, 0)
    major = int(found.architecture.removeprefix("sm_")) // 10
    assert 5 <= major <= 20
    if gpus.no_gpu_reason() == "":
        assert len(gpus.find_gpus()) == len({one.index for one in gpus.find_gpus()})


@pytest.mark.skipif(gpu_engines.missing("torch") != "", reason=gpu_engines.missing("torch") or "torch is here")
def test_torch_describes_the_same_gpu(gpu):
    import torch

    theirs = torch.cuda.get_device_properties(gpu)
    ours = gpus.find_gpus()[gpu]
    assert ours.name == theirs.name
    assert ours.architecture == f"sm_{theirs.major}{theirs.minor}"
    assert ours.multiprocessors == theirs.multi_processor_count
    assert abs(ours.memory_bytes - theirs.total_memory) < 1 << 30


@pytest.mark.parametrize("size", [1, 3, 4096, (1 << 20) + 1, 64 << 20])
@pytest.mark.parametrize("pinned", [False, True])
def test_there_and_back(memory, stream, buffers, size, pinned):
    values = noise(size)
    with memory:
        if pinned:
            locked = np.frombuffer(memory.pinned(values.nbytes), np.uint8)
            locked[:] = values
            values = locked
        there = buffers.filled(values, stream)
        assert there % 256 == 0
        assert memory.elsewhere(there) == ""
        other = buffers.new(size)
        memory.copy(other, there, size, stream)
        assert np.array_equal(buffers.read(other, values, stream), values)
        memory.clear(other, size, stream)
        assert not buffers.read(other, values, stream).any()
        assert np.array_equal(buffers.read(there, values, stream), values)


def test_clearing_touches_no_neighbour(memory, stream, buffers):
    values = noise(4096)
    with memory:
        there = buffers.filled(values, stream)
        memory.clear(there + 100, 50, stream)
        values[100:150] = 0
        assert np.array_equal(buffers.read(there, values, stream), values)


def test_host_memory_is_on_no_gpu(memory):
    values = noise(4096)
    with memory:
        assert memory.elsewhere(values.ctypes.data) == "host memory"


def test_the_default_stream_is_stream_0(memory, buffers):
    values = noise(1 << 20)
    with memory:
        there = buffers.filled(values, 0)
        assert np.array_equal(buffers.read(there, values, 0), values)


def test_rows_that_lie_apart(memory, stream, buffers):
    """A camera's frame, whose rows are padded."""
    values = noise(50 * 256).reshape(50, 256)
    with memory:
        there, target = buffers.filled(values, stream), buffers.new(50 * 100)
        memory.copy_rows(target, there + 3, 50, 100, 256, stream)
        assert np.array_equal(buffers.read(target, np.empty((50, 100), np.uint8), stream), values[:, 3:103])


def test_page_locked_memory_is_known_and_lives_with_its_views(memory, stream, buffers):
    values = noise(4096)
    with memory:
        block = memory.pinned(4096)
        array = np.frombuffer(block, np.uint8)
        array[:] = values
        on_gpu = memory.page_locked(array.ctypes.data, 4096)
        assert on_gpu is not None
        assert memory.page_locked(values.ctypes.data, 4096) is None
        there = buffers.new(4096)
        part = array[1000:]
        del block, array
        gc.collect()
        memory.copy(there, on_gpu, 4096, stream)  # the GPU reads it under this address
        assert np.array_equal(buffers.read(there, values, stream), values)
    assert np.array_equal(part, values[1000:])


@pytest.mark.parametrize("what", ["allocate", "pin", "ask", "wait for an event", "wait for a stream"])
def test_a_global_capture_of_another_thread_goes_on(memory, stream, what):
    """As torch.cuda.graph makes one: another thread that allocates or asks would break it off."""

    def work() -> None:
        with memory:
            event = memory.new_event()
            memory.record(event, stream)
            if what == "allocate":
                memory.free(memory.allocate(4096))
            elif what == "pin":
                memory.pinned(4096)
            elif what == "ask":
                memory.happened(event)
            elif what == "wait for an event":
                memory.wait_for(event)
            else:
                memory.wait(stream)
            memory.free_event(event)

    driver = gpus.CtypesDriver(gpus.load_driver())
    with memory:
        captured = memory.new_stream()
        assert driver.cuStreamBeginCapture(captured, 0) == (0,)
        with ThreadPoolExecutor(1) as thread:
            done = thread.submit(work)
        code, graph = driver.cuStreamEndCapture(captured)
        memory.free_stream(captured)
        done.result()
        assert code == 0
        assert driver.cuGraphDestroy(graph) == (0,)


def test_more_than_there_is(memory, gpu):
    free = gpu_engines.free_bytes(memory)
    with memory:
        with pytest.raises(OutOfMemoryError, match=f"cuda:{gpu} has no .* left .* are free"):
            memory.allocate(1 << 46)
        pointer = memory.allocate(1 << 20)  # and the process lives
        memory.free(pointer)
    assert free - gpu_engines.free_bytes(memory) <= gpu_engines.device_slack(gpu_engines.is_integrated(gpu))


def test_memory_comes_back(memory, gpu):
    """On a Jetson other processes take and give back memory meanwhile, and a large block could end one of them."""
    integrated = gpu_engines.is_integrated(gpu)
    size, slack = (256 << 20 if integrated else 512 << 20), gpu_engines.device_slack(integrated)
    free = gpu_engines.free_bytes(memory)
    with memory:
        pointer = memory.allocate(size)
        memory.clear(pointer, size, 0)
    assert free - gpu_engines.free_bytes(memory) >= size - slack
    with memory:
        memory.free(pointer)
    assert free - gpu_engines.free_bytes(memory) <= slack


def test_a_refusal_is_typed_and_harms_nothing(memory, stream, buffers):
    values = noise(1 << 16)
    with memory:
        there = buffers.filled(values, stream)
        with pytest.raises(DeviceError, match=r"(?i)invalid"):
            memory.allocate(0)
        assert np.array_equal(buffers.read(there, values, stream), values)


BEYOND_THE_END = """
import numpy as np
from edge_backbones.errors import DeviceError
from edge_backbones.engines.gpu import memory as cuda
with cuda.open_memory({gpu}, {backend!r}) as memory:
    first, second = memory.allocate(1 << 20), memory.allocate(1 << 20)
    try:
        memory.copy(first, second, 1 << 40, 0)
        memory.wait(0)
    except DeviceError as error:
        print(error)
"""


@pytest.mark.parametrize("backend", gpu_engines.each(gpu_engines.BACKENDS))
def test_a_copy_beyond_the_end_is_a_device_error(gpu, backend):
    """In a process of its own: a GPU that faulted stays so for the process."""
    done = gpu_engines.run_python(BEYOND_THE_END.format(gpu=gpu, backend=backend))
    assert done.returncode == 0, done.stderr
    assert "CUDA_ERROR" in done.stdout


def test_the_kernels_of_the_stand_in_engine_compute_what_they_should(memory, stream, buffers):
    for side, shape in ((4, (2, 3, 32, 48)), (8, (1, 3, 64, 40)), (2, (1, 1, 2, 2)), (1, (5, 7, 3, 11))):
        values = np.random.default_rng(side).standard_normal(shape).astype(np.float32)
        batch, channels, height, width = shape
        patches = values.reshape(batch, channels, height // side, side, width // side, side)
        expected = patches.mean(axis=(3, 5), dtype=np.float64).astype(np.float32)
        with memory:
            source = buffers.filled(values, stream)
            guard = np.full(expected.size + 1000, 7, np.float32)
            target = buffers.filled(guard, stream)
            kernels().pool(source, target, shape, side, stream)
            found = buffers.read(target, guard, stream)
        np.testing.assert_allclose(found[: expected.size], expected.ravel(), rtol=1e-5, atol=1e-6)
        assert (found[expected.size :] == 7).all()  # and write nothing behind it


def test_an_event_orders_two_streams(memory, stream, buffers):
    values = noise(1 << 20)
    with memory:
        second, event = memory.new_stream(), memory.new_event()
        source = buffers.filled(values, stream)
        between, target = buffers.new(values.nbytes), buffers.new(values.nbytes)
        memory.clear(between, values.nbytes, stream)
        memory.clear(target, values.nbytes, stream)
        memory.wait(stream)
        kernels().spin(200, stream)
        memory.copy(between, source, values.nbytes, stream)
        memory.record(event, stream)
        assert not memory.happened(event)
        memory.follow(second, event)
        memory.copy(target, between, values.nbytes, second)
        assert np.array_equal(buffers.read(target, values, second), values)
        assert memory.happened(event)
        memory.wait_for(event)
        memory.free_event(event)
        memory.free_stream(second)


def test_a_graph_replays_what_was_captured(memory, stream, buffers):
    values, more = noise(1 << 20), noise(1 << 20, seed=1)
    with memory:
        source, target = buffers.filled(values, stream), buffers.new(values.nbytes)
        memory.clear(target, values.nbytes, stream)

        def work():
            memory.copy(target, source, values.nbytes, stream)
            memory.clear(target, 128, stream)

        graph = memory.capture(stream, work)
        assert not buffers.read(target, values, stream).any()  # captured, not run
        for pixels in (values, more):
            memory.copy_in(source, pixels.ctypes.data, pixels.nbytes, stream)
            memory.launch(graph, stream)
            expected = pixels.copy()
            expected[:128] = 0
            assert np.array_equal(buffers.read(target, values, stream), expected)
        # On another stream than it was captured on.
        other = memory.new_stream()
        memory.clear(target, values.nbytes, other)
        memory.launch(graph, other)
        assert np.array_equal(buffers.read(target, values, other), expected)
        memory.free_graph(graph)
        memory.free_stream(other)


def test_a_broken_capture_leaves_the_stream_usable(memory, stream, buffers):
    values = noise(1 << 16)
    with memory:
        there = buffers.filled(values, stream)

        def fails():
            memory.clear(there, 16, stream)
            raise RuntimeError("in the middle")

        with pytest.raises(RuntimeError, match="in the middle"):
            memory.capture(stream, fails)
        with pytest.raises(DeviceError, match="CUDA_ERROR_STREAM_CAPTURE"):
            memory.capture(stream, lambda: memory.wait(stream))  # waiting cannot be captured
        assert np.array_equal(buffers.read(there, values, stream), values)
        memory.free_graph(memory.capture(stream, lambda: memory.clear(there, 16, stream)))


def test_memory_may_be_allocated_while_a_graph_is_captured(memory, stream, buffers):
    with memory:
        there = buffers.new(1 << 16)

        def work():
            memory.clear(there, 16, stream)
            buffers.new(1 << 16)

        graph = memory.capture(stream, work)
        memory.launch(graph, stream)
        memory.wait(stream)
        memory.free_graph(graph)


def test_the_context_is_current_only_inside(memory):
    driver = gpu_engines.Context()
    seen = {}

    def in_a_thread():
        seen["before"] = driver.current()
        with memory:
            seen["inside"] = driver.current()
            with memory:
                seen["deeper"] = driver.current()
            seen["again"] = driver.current()
        seen["after"] = driver.current()

    thread = threading.Thread(target=in_a_thread)
    thread.start()
    thread.join()
    assert seen["before"] == seen["after"] == 0
    assert seen["inside"] == seen["deeper"] == seen["again"] != 0


def test_both_libraries_share_the_primary_context(gpu):
    reason = gpu_engines.missing(*gpu_engines.BACKENDS)
    if reason:
        pytest.skip(reason)
    driver, current = gpu_engines.Context(), set()
    values = noise(4096)
    pointers = []
    for backend in gpu_engines.BACKENDS:
        with cuda.open_memory(gpu, backend) as memory:
            current.add(driver.current())
            pointers.append(memory.allocate(4096))
    assert len(current) == 1
    first, second = (cuda.open_memory(gpu, backend) for backend in gpu_engines.BACKENDS)
    with first:
        first.copy_in(pointers[1], values.ctypes.data, 4096, 0)  # memory of the other
        first.wait(0)
    with second:
        back = np.empty_like(values)
        second.copy(pointers[0], pointers[1], 4096, 0)
        second.copy_out(back.ctypes.data, pointers[0], 4096, 0)
        second.wait(0)
        second.free(pointers[1])
    with first:
        first.free(pointers[0])
    assert np.array_equal(back, values)


def test_threads(memory):
    def work(seed):
        values = noise(1 << 20, seed)
        back = np.empty_like(values)
        with memory:
            stream = memory.new_stream()
            for _ in range(20):
                pointer = memory.allocate(values.nbytes)
                memory.copy_in(pointer, values.ctypes.data, values.nbytes, stream)
                memory.copy_out(back.ctypes.data, pointer, values.nbytes, stream)
                memory.wait(stream)
                memory.free(pointer)
                if not np.array_equal(back, values):
                    return False
            memory.free_stream(stream)
        return True

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(16)))


def test_many_rounds_leave_nothing_behind(memory, gpu):
    values = noise(64 << 10)

    def once():
        with memory:
            stream, event = memory.new_stream(), memory.new_event()
            pointer = memory.allocate(values.nbytes)
            locked = np.frombuffer(memory.pinned(values.nbytes), np.uint8)
            memory.copy_in(pointer, values.ctypes.data, values.nbytes, stream)
            memory.copy_out(locked.ctypes.data, pointer, values.nbytes, stream)
            memory.record(event, stream)
            memory.wait_for(event)
            memory.free(pointer)
            memory.free_event(event)
            memory.free_stream(stream)

    gpu_engines.assert_flat(memory, once, gpu_engines.many_calls(gpu))


def test_graphs_leave_nothing_behind(memory, stream, buffers, gpu):
    with memory:
        there = buffers.new(1 << 16)

    def once():
        with memory:
            graph = memory.capture(stream, lambda: memory.clear(there, 1 << 16, stream))
            memory.launch(graph, stream)
            memory.wait(stream)
            memory.free_graph(graph)

    gpu_engines.assert_flat(memory, once, gpu_engines.many_calls(gpu) // 5)


COPY_PATHS = """
import numpy as np
from edge_backbones.engines.gpu import memory as cuda
memory = cuda.open_memory({gpu}, {backend!r})
values = np.random.default_rng(0).integers(0, 256, 100_003, np.uint8)
with memory:
    stream, event = memory.new_stream(), memory.new_event()
    first, second = memory.allocate(values.nbytes), memory.allocate(values.nbytes)
    locked = np.frombuffer(memory.pinned(values.nbytes), np.uint8)
    locked[:] = values
    memory.copy_in(first, locked.ctypes.data, values.nbytes, stream)
    memory.copy(second, first, values.nbytes, stream)
    memory.record(event, stream)
    other = memory.new_stream()
    memory.follow(other, event)
    graph = memory.capture(other, lambda: memory.clear(first, 1000, other))
    memory.launch(graph, other)
    back = np.empty_like(values)
    memory.copy_out(back.ctypes.data, second, values.nbytes, other)
    memory.wait(other)
    assert np.array_equal(back, values)
    {planted}
    memory.free_graph(graph)
    memory.free(first)
    memory.free(second)
    memory.free_event(event)
    memory.free_stream(stream)
    memory.free_stream(other)
print("copied")
"""
PLANTED = """
    from contextlib import suppress
    with suppress(Exception):
        memory.allocate(0)
"""


@pytest.mark.parametrize("backend", gpu_engines.each(gpu_engines.BACKENDS))
def test_compute_sanitizer_finds_nothing_on_the_copy_paths(gpu, backend):
    if on_standin():
        pytest.skip("the driver is a stand-in, which compute-sanitizer cannot use")
    try:
        subprocess.run(["compute-sanitizer", "--version"], capture_output=True, check=True)
    except OSError:
        pytest.skip("compute-sanitizer is not installed")
    watched = ("compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "9")
    clean = COPY_PATHS.format(gpu=gpu, backend=backend, planted="")
    done = gpu_engines.run_python(clean, before=watched)
    if "Device not supported" in done.stdout:
        pytest.skip("compute-sanitizer says of this machine: Device not supported")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert "copied" in done.stdout
    assert "ERROR SUMMARY: 0 errors" in done.stdout
    # It does look: an error that the program swallows is told.
    done = gpu_engines.run_python(
        COPY_PATHS.format(gpu=gpu, backend=backend, planted=PLANTED.strip("\n ")), before=watched
    )
    assert done.returncode == 9, done.stdout[-3000:] + done.stderr[-1000:]
