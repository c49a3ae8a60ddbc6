"""What threads, captures of other libraries and errors do at the worst moment of a call."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable

import numpy as np
import pytest

from edge_backbones.engines.gpu import pool as pool_module
from edge_backbones.engines.gpu.arrays import from_foreign
from edge_backbones.engines.gpu.pipelined import Pipeline
from edge_backbones.engines.gpu.pool import Buffer, Pool
from edge_backbones.engines.tensorrt import contexts as contexts_module
from edge_backbones.engines.tensorrt import kernels as kernels_module
from edge_backbones.engines.tensorrt import session as session_module
from edge_backbones.errors import DeviceError, InputError
from edge_backbones.spec import ShapeRange
from edge_backbones.testing import pooled
from tests.driver.calls import ok
from tests.driver.machine import DriverMachine
from tests.simulated_tensorrt import Context, NumpyTensorRt, RuntimeCache, plan_of, shapes

RANDOM = np.random.default_rng(0)


def pixels(batch: int) -> np.ndarray:
    return RANDOM.standard_normal((batch, 3, 32, 48)).astype(np.float32)


def check(machine: DriverMachine, maps, images, stream: int) -> None:
    for actual, expected in zip(maps, pooled(images), strict=True):
        np.testing.assert_array_equal(machine.gpu.value(actual, stream), expected)


def in_thread(call: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=call)
    thread.start()
    return thread


def test_a_recorded_call_on_the_host_takes_the_dtype_of_the_engine_only(machine):
    session = machine.open()
    buffer = session.input_buffer((2, 3, 32, 48))
    for dtype in (np.int32, np.uint32):
        with pytest.raises(InputError, match=f"pixel_values of {np.dtype(dtype)} .* cannot be recorded: fill an array"):
            session.graphed_on_host(buffer.view(dtype))
    session.close()


def test_a_shape_that_two_threads_run_first_at_once(machine, monkeypatch):
    """The second thread calls while the first one writes down where the outputs lie."""
    session, images = machine.open(), pixels(2)
    array = machine.gpu.put(images)
    found = []

    def write(route, name, value) -> None:
        object.__setattr__(route, name, value)
        if name == "outputs" and value.parts and not found:
            found.append(None)
            in_thread(lambda: found.append(session.run_on_device(array, machine.stream))).join(30)

    monkeypatch.setattr(session_module._Route, "__setattr__", write)
    found.append(session.run_on_device(array, machine.stream))
    assert len(found) == 3
    for maps in found[1:]:
        check(machine, maps, images, machine.stream)


def test_a_call_that_ends_while_another_thread_closes(machine, monkeypatch):
    """Closing waits for the reads of inputs, and the call adds one to them meanwhile."""
    session, images = machine.open(), pixels(2)
    array = machine.gpu.put(images)
    session.run_on_device(array, machine.stream)
    begun, go_on = threading.Event(), threading.Event()
    execute, wait_for = Context.execute_async_v3, machine.memory.wait_for

    def slowly(context, stream):
        begun.set()
        assert go_on.wait(30)
        return execute(context, stream)

    monkeypatch.setattr(Context, "execute_async_v3", slowly)
    results = []
    thread = in_thread(lambda: results.append(session.run_on_device(array, machine.stream)))
    assert begun.wait(30)
    waiting = session._contexts._inputs[0][0].event

    def wait(event) -> None:
        wait_for(event)
        if event is waiting:
            go_on.set()
            thread.join(30)

    monkeypatch.setattr(machine.memory, "wait_for", wait)
    session.close()
    thread.join(30)
    check(machine, results.pop(), images, machine.stream)
    assert not session._contexts._inputs
    assert machine.left_over() == {}


def test_nobody_waits_for_the_gpu_with_the_lock_of_the_contexts(machine, monkeypatch):
    """What the GPU waits for, such as a host function, may give outputs back."""
    monkeypatch.setattr(contexts_module, "MOST_CONTEXTS", 1)
    session = machine.open(ShapeRange(min=1, opt=2, max=4), plan_of(shapes(1, 1, 1), shapes(2, 2, 4)))
    maps = session.run_on_device(machine.gpu.put(pixels(2)), machine.stream)
    wait_for, released = machine.memory.wait_for, []

    def wait(event) -> None:
        if maps:
            thread = in_thread(maps.clear)
            thread.join(5)
            released.append(not thread.is_alive())
        wait_for(event)

    monkeypatch.setattr(machine.memory, "wait_for", wait)
    images = pixels(1)
    other = session.run_on_device(machine.gpu.put(images), machine.stream)
    assert released == [True]
    check(machine, other, images, machine.stream)
    assert machine.library.live["context"] == 1
    session.close()


def test_a_producer_that_is_captured_is_refused(machine):
    """An event of its stream would make the stream of the call part of the capture."""
    session, images = machine.open(), pixels(2)
    array = dataclasses.replace(machine.gpu.put(images), producer_stream=machine.other)

    def call() -> None:
        with pytest.raises(InputError, match="is being captured"):
            session.run_on_device(array, machine.stream)

    with machine.memory as memory:
        memory.free_graph(memory.capture(machine.other, call))
    check(machine, session.run_on_device(array, machine.stream), images, machine.stream)


@pytest.mark.parametrize("what", ["scratch", "outputs"])
def test_memory_of_a_stream_that_is_captured_now_is_left_alone(machine, what, monkeypatch):
    """An event recorded there would be part of the capture, and so would the call that waits for it."""
    monkeypatch.setattr(pool_module, "SCRATCH_BUFFERS" if what == "outputs" else "_UNUSABLE_BUFFERS", 100)
    session, images = machine.open(), pixels(2)
    array = machine.gpu.put(images)
    with machine.memory as memory:
        streams = [memory.new_stream() for _ in range(9)]
        for stream in streams[:8]:
            session.run_on_device(array, stream)
        found = []
        graph = memory.capture(streams[0], lambda: found.append(session.run_on_device(array, streams[8])))
        memory.free_graph(graph)
    check(machine, found.pop(), images, streams[8])


@pytest.mark.parametrize("take", ["take", "take_scratch"])
def test_outputs_that_come_back_while_another_thread_closes(machine, take, monkeypatch):
    """Garbage collection gives them back in the middle of a call, which already knows the memory that it takes."""
    with machine.memory as memory:
        pool = Pool(memory)
        other = Buffer(memory.allocate(256), 256)
        buffer = (
            pool.take_scratch(256, 5, machine.stream) if take == "take_scratch" else pool.take(256, 5, machine.stream)
        )
        (pool.give_back_scratch if take == "take_scratch" else pool.give_back)(buffer)
        choose, threads = pool._choose, []

        def close() -> None:
            with machine.memory:
                pool.close()

        def find(*arguments) -> Buffer | None:
            found = choose(*arguments)
            threads.append(in_thread(close))
            threads[0].join(0.5)
            pool.give_back(other)
            return found

        monkeypatch.setattr(pool, "_choose", find)
        taken = getattr(pool, take)(256, 5, machine.stream)
        threads[0].join(30)
        memory.clear(taken.pointer, 256, machine.stream)
        memory.wait(machine.stream)
        pool.give_back(taken)
    assert machine.left_over() == {}


def test_results_and_recorded_calls_are_let_go_while_other_threads_hold_the_locks(machine):
    """Garbage collection lets them go anywhere, in a thread that holds the lock of another engine as well."""
    session, array = machine.open(), machine.gpu.put(pixels(2))
    held = [session.run_on_device(array, machine.stream), session.graphed(array, machine.stream)]
    session.graphed_on_host(session.input_buffer((2, 3, 32, 48)))
    contexts = session._contexts
    with contexts.pool.lock, contexts._lock:
        thread = in_thread(held.clear)
        thread.join(10)
        is_stuck = thread.is_alive()
    thread.join(30)
    assert not is_stuck
    session.close()
    held = [session]
    del session
    assert not machine.library.live["context"]
    assert machine.left_over() == {}


@pytest.mark.parametrize("here", [True, False])
@pytest.mark.parametrize("what", ["first", "later", "host", "many", "graphed", "close"])
def test_a_capture_of_another_library_goes_on(machine, what, here, monkeypatch):
    """In CUDA's global mode, which is torch's, a thread breaks the captures of all others off by allocating or asking."""
    from cuda.bindings import driver as cu

    monkeypatch.setattr(pool_module, "_FREE_BUFFERS", 8)
    session, images = machine.open(), pixels(2)
    array = machine.gpu.put(images)

    def call() -> None:
        if what == "host":
            session.run(images)
        elif what == "graphed":
            session.graphed(array, machine.stream)()
        elif what == "close":
            session.close()
        elif what == "many":
            held = [session.run_on_device(array, machine.stream) for _ in range(20)]
            held.clear()
            session.run_on_device(array, machine.stream)
        else:
            check(machine, session.run_on_device(array, machine.stream), images, machine.stream)

    if what in ("later", "close"):
        call() if what == "later" else session.run_on_device(array, machine.stream)
    with machine.memory:
        ok(cu.cuStreamBeginCapture(machine.other, cu.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_GLOBAL))
        call() if here else in_thread(call).join(30)
        graph = ok(cu.cuStreamEndCapture(machine.other))
        ok(cu.cuGraphDestroy(graph))
    if what == "close":
        assert machine.left_over() == {}


def test_a_replay_that_has_begun_when_another_thread_closes(machine, monkeypatch):
    session, images = machine.open(), pixels(2)
    call = session.graphed(machine.gpu.put(images), machine.stream)
    launch = machine.memory.launch

    def slowly(graph, stream) -> None:
        in_thread(session.close).join(30)
        launch(graph, stream)

    monkeypatch.setattr(machine.memory, "launch", slowly)
    check(machine, call(), images, machine.stream)
    with pytest.raises(InputError, match="was closed"):
        call()
    del call
    assert machine.left_over() == {}


def test_memory_runs_out_in_a_thread_while_another_frees_what_is_left_over(machine, monkeypatch):
    monkeypatch.setattr(pool_module, "_FREE_BUFFERS", 4)
    with machine.memory as memory:
        pool = Pool(memory)
        for buffer in [pool.take(256, 5, machine.stream) for _ in range(12)]:
            pool.give_back(buffer)
        free = pool._free_surplus

        def release() -> None:
            with machine.memory:
                pool._release()

        def late(buffers) -> None:
            in_thread(release).join(30)
            free(buffers)

        monkeypatch.setattr(pool, "_free_surplus", late)
        pool.give_back(pool.take(256, 5, machine.stream))
        pool.close()
    assert machine.left_over() == {}


def test_a_reader_whose_stream_is_gone_makes_the_next_call_wait(machine):
    session, images = machine.open(), pixels(2)
    array = machine.gpu.put(images)
    with machine.memory as memory:
        gone = memory.new_stream()
        session.run_on_device(array, machine.stream)[0].__dlpack__(stream=gone)
        memory.wait(gone)
        memory.free_stream(gone)
    check(machine, session.run_on_device(array, machine.stream), images, machine.stream)
    assert all("does not exist" in violation for violation in machine.driver.take_violations())


def test_page_locked_memory_that_this_gpu_cannot_address_is_copied(machine):
    session, images = machine.open(), pixels(2)
    buffer = session.input_buffer(images.shape)
    buffer[:] = images
    machine.driver.fail_at("cuPointerGetAttribute", 2, 1)
    for actual, expected in zip(session.run(buffer), pooled(images), strict=True):
        np.testing.assert_array_equal(actual, expected)
    assert machine.driver.failed == "cuPointerGetAttribute"


def test_memory_of_which_the_beginning_is_page_locked_is_copied(machine):
    """A copy across the end of such memory is refused, and a kernel that reads on there crashes."""
    from cuda.bindings import driver as cu

    session, images = machine.open(), pixels(2)
    with machine.memory:
        ok(cu.cuMemHostRegister(images.ctypes.data, images.nbytes // 2, 0))
        found = session.run(images)
        with pytest.raises(InputError, match="in this memory cannot be recorded"):
            session.graphed_on_host(images)
        ok(cu.cuMemHostUnregister(images.ctypes.data))
    for actual, expected in zip(found, pooled(images), strict=True):
        np.testing.assert_array_equal(actual, expected)


def test_an_input_that_is_not_copied_for_timing_leaves_no_stream_behind(machine):
    session, images = machine.open(), pixels(2)
    machine.driver.fail_at("cuMemcpyHtoDAsync", 1, 719)
    with pytest.raises(DeviceError), Pipeline(session, images, 0):
        pytest.fail("it was copied")
    machine.driver.reset()
    session.close()
    assert machine.left_over() == {}


@pytest.mark.machine(version=13000)
def test_contexts_that_are_made_at_once_share_one_cache_of_kernels(machine, tmp_path, monkeypatch):
    monkeypatch.setattr(kernels_module.runtime_cache, "default_cache", lambda: tmp_path)
    machine.library = NumpyTensorRt(machine.gpu, rtx=True)
    session, images = machine.open(flavour="tensorrt_rtx"), pixels(2)
    read, threads = kernels_module.runtime_cache.read, []

    def slowly(path):
        if not threads:
            threads.append(in_thread(lambda: session.run(pixels(1))))
            threads[0].join(1)
        return read(path)

    monkeypatch.setattr(kernels_module.runtime_cache, "read", slowly)
    session.run(images)
    threads[0].join(30)
    assert len({id(context.cache) for context in machine.library.contexts}) == 1
    session.close()


@pytest.mark.machine(version=13000)
def test_a_cache_of_kernels_that_is_not_serialised_fails_no_call(machine, tmp_path, monkeypatch):
    monkeypatch.setattr(kernels_module.runtime_cache, "default_cache", lambda: tmp_path)
    monkeypatch.setattr(RuntimeCache, "serialize", lambda cache: None)
    machine.library = NumpyTensorRt(machine.gpu, rtx=True)
    session, images = machine.open(flavour="tensorrt_rtx"), pixels(2)
    for actual, expected in zip(session.run(images), pooled(images), strict=True):
        np.testing.assert_array_equal(actual, expected)
    session.close()
    assert machine.library.live["context"] == 0


@pytest.mark.machine(version=13000)
def test_ctrl_c_while_kernels_are_written_loses_no_context(machine, tmp_path, monkeypatch):
    monkeypatch.setattr(kernels_module.runtime_cache, "default_cache", lambda: tmp_path)
    machine.library = NumpyTensorRt(machine.gpu, rtx=True)
    session, images = machine.open(flavour="tensorrt_rtx"), pixels(2)

    def interrupted(cache):
        monkeypatch.undo()
        raise KeyboardInterrupt

    monkeypatch.setattr(RuntimeCache, "serialize", interrupted)
    with pytest.raises(KeyboardInterrupt):
        session.run(images)
    session.run(images)
    assert machine.library.made == 1
    session.close()
    assert machine.left_over() == {}


def test_maps_are_not_passed_to_a_stream_that_is_captured(machine):
    """Its graph cannot wait for them, and trying would end the capture."""
    session, images = machine.open(), pixels(2)
    feature_map = session.run_on_device(machine.gpu.put(images), machine.stream)[0]

    def export() -> None:
        for consume in (
            lambda: from_foreign(feature_map, stream=machine.other),
            lambda: feature_map.__dlpack__(stream=machine.other),
        ):
            with pytest.raises(InputError, match=r"is being captured, .* before the capture"):
                consume()

    with machine.memory as memory:
        memory.free_graph(memory.capture(machine.other, export))
    feature_map.__dlpack__(stream=machine.other)
    np.testing.assert_array_equal(machine.gpu.value(feature_map, machine.other), pooled(images)[0])
