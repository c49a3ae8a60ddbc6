"""What threads, captures of other libraries and errors do at the worst moment of a call."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable

import numpy as np
import pytest

from edge_backbones.engines.tensorrt import contexts as contexts_module
from edge_backbones.engines.tensorrt import session as session_module
from edge_backbones.errors import InputError
from edge_backbones.spec import ShapeRange
from edge_backbones.testing import pooled
from tests.driver.machine import DriverMachine
from tests.simulated_tensorrt import Context, plan_of, shapes

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
    del array
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
    with machine.memory as memory:
        graph = memory.capture(
            machine.other, lambda: pytest.raises(InputError, session.run_on_device, array, machine.stream)
        )
        memory.free_graph(graph)
    check(machine, session.run_on_device(array, machine.stream), images, machine.stream)
