"""TensorRtSession over the real CUDA bindings: the driver is a stand-in, and TensorRT is simulated.

Some rules that the session should keep and does not yet are marked as expected failures, with the reason.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import resource

import numpy as np
import pytest

from edge_backbones.engines.gpu.dlpack import Rows
from edge_backbones.errors import EdgeBackbonesError, InputError
from edge_backbones.spec import ShapeRange
from edge_backbones.testing import pooled
from tests.driver.calls import ok
from tests.driver.machine import LAUNCH_FAILED, DriverMachine
from tests.simulated_tensorrt import plan_of, shapes

RANDOM = np.random.default_rng(0)
BACKENDS = pytest.mark.parametrize("backend", ["cuda-bindings", "pycuda"])


def pixels(batch: int) -> np.ndarray:
    return RANDOM.standard_normal((batch, 3, 32, 48)).astype(np.float32)


def check(machine, maps, images, stream) -> None:
    for actual, expected in zip(maps, pooled(images), strict=True):
        np.testing.assert_array_equal(machine.gpu.value(actual, stream), expected)


def done(machine) -> None:
    """Nothing is left, and TensorRT was used by its rules."""
    assert machine.left_over() == {}
    assert machine.gpu.violations == []


# ---- what works


@BACKENDS
def test_host_arrays_go_in_and_out(driver, backend):
    machine = DriverMachine(driver, backend)
    session = machine.open()
    for batch in (1, 2, 4, 3, 1, 2, 4, 1, 6):
        images = pixels(batch)
        if batch <= 4:
            maps = session.run(images)
            for actual, expected in zip(maps, pooled(images), strict=True):
                np.testing.assert_array_equal(actual, expected)
            del maps, actual
    session.close()
    done(machine)


@BACKENDS
def test_arrays_on_the_gpu_are_read_in_place_on_every_stream(driver, backend):
    machine = DriverMachine(driver, backend)
    session = machine.open()
    for stream in (machine.stream, machine.other, 0, machine.stream):
        for batch in (2, 4, 9):
            images = pixels(batch)
            array = machine.gpu.put(images)
            for _ in range(3):
                maps = session.run_on_device(array, stream)
                check(machine, maps, images, stream)
                del maps
    session.close()
    done(machine)


def test_maps_that_another_stream_reads_are_not_written_over(driver):
    machine = DriverMachine(driver)
    session = machine.open()
    frames = [pixels(2) for _ in range(12)]
    arrays = [machine.gpu.put(frame) for frame in frames]
    with machine.memory as memory:
        copies = [[memory.allocate(m.nbytes) for m in pooled(frame)] for frame in frames]
        for array, targets in zip(arrays, copies, strict=True):
            maps = session.run_on_device(array, machine.stream)
            for feature_map, target in zip(maps, targets, strict=True):
                feature_map.__dlpack__(stream=machine.other)
                memory.copy(target, feature_map.pointer, feature_map.nbytes, machine.other)
            del maps, feature_map
        for frame, targets in zip(frames, copies, strict=True):
            for expected, target in zip(pooled(frame), targets, strict=True):
                found = np.empty_like(expected)
                memory.copy_out(found.ctypes.data, target, found.nbytes, machine.other)
                memory.wait(machine.other)
                np.testing.assert_array_equal(found, expected)
                memory.free(target)
    session.close()
    done(machine)


def test_a_graphed_call_reads_what_is_there_when_it_is_launched(driver):
    machine = DriverMachine(driver)
    session = machine.open()
    array = machine.gpu.put(pixels(2))
    call = session.graphed(array, machine.stream)
    for _ in range(3):
        images = pixels(2)
        machine.gpu.bytes_at(array.pointer, images.nbytes)[:] = images.tobytes()
        check(machine, call(), images, machine.stream)
    del call
    session.close()
    done(machine)


# ---- how often a call waits for the whole GPU


def waits(driver) -> int:
    return driver.calls("cuCtxSynchronize") + driver.calls("cuStreamSynchronize") + driver.calls("cuEventSynchronize")


def waits_in_200_calls(driver, count: int, *, foreign: bool, held: bool) -> int:
    """How often 200 calls on ``count`` streams in turn wait, after 200 to warm up.

    ``foreign``: another stream reads the maps. ``held``: until their stream comes again.
    """
    machine = DriverMachine(driver)
    session = machine.open()
    array = machine.gpu.put(pixels(2))
    with machine.memory as memory:
        streams = [memory.new_stream() for _ in range(count)]
    kept: dict[int, list] = {}
    for number in range(400):
        if number == 200:
            driver.reset()
        stream = streams[number % count]
        maps = session.run_on_device(array, stream)
        if foreign:
            for feature_map in maps:
                feature_map.__dlpack__(stream=machine.other)
        kept[stream] = maps if held else []
        maps = feature_map = None
    return waits(driver)


def test_200_calls_on_one_stream_never_wait(driver):
    assert waits_in_200_calls(driver, 1, foreign=False, held=False) == 0


@pytest.mark.parametrize("held", [False, True], ids=["dropped", "held"])
@pytest.mark.parametrize("count", [2, 8])
def test_200_calls_on_a_few_streams_never_wait(driver, count, held):
    assert waits_in_200_calls(driver, count, foreign=False, held=held) == 0


@pytest.mark.parametrize("count", [9, 16])
def test_200_calls_on_many_streams_never_wait(driver, count):
    assert waits_in_200_calls(driver, count, foreign=False, held=False) == 0


@pytest.mark.parametrize("count", [1, 2, 9, 16])
def test_200_calls_whose_maps_another_stream_reads_never_wait(driver, count):
    assert waits_in_200_calls(driver, count, foreign=True, held=False) == 0


# ---- the caller captures


def captured_call(machine, session, array, mode: int):
    from cuda.bindings import driver as cu

    with machine.memory:
        ok(cu.cuStreamBeginCapture(machine.stream, cu.CUstreamCaptureMode(mode)))
        try:
            session.run_on_device(array, machine.stream)
        finally:
            graph = ok(cu.cuStreamEndCapture(machine.stream))
        return graph


def test_a_call_in_a_capture_of_the_caller_keeps_no_later_input(driver):
    machine = DriverMachine(driver)
    session = machine.open()
    array = machine.gpu.put(pixels(2))
    for _ in range(3):
        session.run_on_device(array, machine.stream)
        machine.gpu.value(array, machine.stream)
    with contextlib.suppress(InputError):  # refusing the call is an answer, too
        captured_call(machine, session, array, mode=2)
    for _ in range(100):
        session.run_on_device(array, machine.stream)
        machine.gpu.value(array, machine.stream)
    assert len(session._contexts._inputs) <= 1


def test_a_call_in_a_global_capture_of_the_caller_is_captured_or_refused(driver):
    machine = DriverMachine(driver)
    session = machine.open()
    array = machine.gpu.put(pixels(2))
    session.run_on_device(array, machine.stream)
    machine.gpu.value(array, machine.stream)
    try:
        captured_call(machine, session, array, mode=0)
    except InputError:
        return
    except EdgeBackbonesError as error:
        raise AssertionError(f"the capture was spoilt, and the error does not say by what: {error}") from error


# ---- every native call fails once


def scenario(machine, inputs) -> None:
    """Every kind of call."""
    batch = ShapeRange(min=2, opt=2, max=4)
    data = plan_of(shapes(2, 2, 2), shapes(2, 2, 4))
    session = machine.open(batch, data)
    try:
        for _ in range(3):
            session.run(pixels(2))
            maps = session.run_on_device(inputs[0], machine.stream)
            maps[0].__dlpack__(stream=machine.other)
            del maps
        session.run_on_device(inputs[1], 0)
        session.run_on_device(inputs[2], machine.stream)
        call = session.graphed(inputs[0], machine.stream)
        call()[0].__dlpack__(stream=machine.other)
        del call
        rows = dataclasses.replace(
            inputs[2], contiguous=False, rows=Rows(3, inputs[2].nbytes // 3, inputs[2].nbytes // 3)
        )
        session.run_on_device(rows, machine.stream)
        buffer = session.input_buffer((2, 3, 32, 48))
        session.run(buffer)
        call = session.graphed_on_host(buffer)
        call()
        del call, buffer
    finally:
        session.close()


# What cannot be freed is lost, and so is all when no context can be made current.
LOSES = ("cuMemFree", "cuMemFreeHost", "cuStreamDestroy", "cuEventDestroy", "cuGraphDestroy", "cuGraphExecDestroy")

# After a wait that failed nobody knows what the GPU still does.
WAITS = ("cuEventSynchronize", "cuStreamSynchronize")


def test_every_native_call_may_fail_once_and_nothing_is_leaked(driver):
    from cuda.bindings import driver as cu

    machine = DriverMachine(driver)
    inputs = [machine.gpu.put(pixels(2)), machine.gpu.put(pixels(9), 64), machine.gpu.put(pixels(3))]
    gc.collect()
    gc.freeze()
    before, number, seen = machine.left_over(), 0, set()
    while True:
        number += 1
        driver.fail_at("*", number, LAUNCH_FAILED)
        with contextlib.suppress(EdgeBackbonesError):
            scenario(machine, inputs)
        failed = driver.failed
        if failed in WAITS:
            machine.gpu.violations.clear()
        assert machine.gpu.violations == [], (number, failed, machine.gpu.violations)
        if not failed:
            break
        seen.add(failed)
        driver.fail_at("*", 0, 0)
        with machine.memory:
            ok(cu.cuCtxSynchronize())
        left = {name: count - before.get(name, 0) for name, count in machine.left_over().items()}
        left = {name: count for name, count in left.items() if count}
        if failed in LOSES or failed == "cuCtxPushCurrent":
            before = machine.left_over()  # the next round starts from here
        else:
            assert left == {}, (number, failed, left)
    assert {"cuMemAlloc", "cuMemHostAlloc", "cuStreamCreate", "cuEventRecord", "cuMemcpyHtoDAsync"} <= seen
    assert {"cuMemcpy2DAsync", "set_device_memory", "cuPointerGetAttribute", "cuMemsetD8Async"} <= seen
    assert {"cuStreamWaitEvent", "cuStreamEndCapture", "cuGraphInstantiate", "cuGraphLaunch"} <= seen
    assert {"deserialize_cuda_engine", "create_execution_context", "execute_async_v3"} <= seen
    assert machine.gpu.violations == []


# ---- a long run


def test_memory_is_flat_over_10000_calls(driver):
    machine = DriverMachine(driver)
    session = machine.open()
    array, images = machine.gpu.put(pixels(2)), pixels(2)

    def calls(count: int) -> tuple[dict[str, int], int]:
        for number in range(count):
            session.run_on_device(array, machine.stream)
            if number % 10 == 0:
                session.run(images)
                with machine.memory as memory:
                    memory.wait(machine.stream)
        return machine.left_over(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    first, _ = calls(500)
    _, kilobytes = calls(500)
    driver.reset()
    last, most = calls(9000)
    assert last == first
    assert most - kilobytes < 20_000
    assert driver.calls("cuMemAlloc") == driver.calls("cuMemHostAlloc") == driver.calls("cuEventCreate") == 0
    session.close()
    done(machine)
