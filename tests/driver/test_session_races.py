"""What threads, captures of other libraries and errors do at the worst moment of a call."""

from __future__ import annotations

import threading
from collections.abc import Callable

import numpy as np
import pytest

from edge_backbones.engines.tensorrt import session as session_module
from edge_backbones.errors import InputError
from edge_backbones.testing import pooled
from tests.driver.machine import DriverMachine

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
