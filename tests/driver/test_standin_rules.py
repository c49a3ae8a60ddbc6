"""The stand-in for libcuda keeps CUDA's rules, asked through NVIDIA's bindings."""

from __future__ import annotations

import ctypes
import threading

import numpy as np
import pytest

from tests.driver.calls import Memory, bytes_of, capture_modes, code_of, context, ok, two_streams

# ---- start and devices


def test_the_device_is_the_one_that_was_asked_for(driver):
    with context() as cu:
        attributes = cu.CUdevice_attribute
        device = ok(cu.cuCtxGetDevice())
        asked = {
            attributes.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: 9,
            attributes.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: 0,
            attributes.CU_DEVICE_ATTRIBUTE_INTEGRATED: 0,
            attributes.CU_DEVICE_ATTRIBUTE_UNIFIED_ADDRESSING: 1,
            attributes.CU_DEVICE_ATTRIBUTE_MEMORY_POOLS_SUPPORTED: 1,
        }
        assert {name: ok(cu.cuDeviceGetAttribute(name, device)) for name in asked} == asked
        assert ok(cu.cuDeviceGetCount()) == 1
        assert ok(cu.cuDeviceGetName(40, device)).strip(b"\0 ") == b"Stand-in GPU 0"
        assert code_of(cu.cuDeviceGet(1)) == "INVALID_DEVICE"


@pytest.mark.machine(integrated=1, pools=0, capability=87, memory=1 << 20, devices=2)
def test_a_jetson_shares_its_memory_and_has_no_pools(driver):
    from edge_backbones.machine import gpus

    first, second = gpus.find_gpus()
    assert (first.architecture, first.integrated, first.memory_bytes) == ("sm_87", True, 1 << 20)
    assert (second.index, second.bus_address) == (1, "0000:02:00.0")
    with context() as cu:
        ok(cu.cuMemHostAlloc(1 << 19, 0))
        assert ok(cu.cuMemGetInfo()) == (1 << 19, 1 << 20)
        assert code_of(cu.cuMemAllocAsync(64, 0)) == "NOT_SUPPORTED"
        assert code_of(cu.cuDeviceGetDefaultMemPool(0)) == "NOT_SUPPORTED"


@pytest.mark.machine(devices=0)
def test_a_machine_without_a_gpu(driver):
    from edge_backbones.machine import gpus

    assert gpus.no_gpu_reason() == "driver present, cuInit failed: CUDA_ERROR_NO_DEVICE"


def test_nothing_works_before_cuinit_or_without_a_context(driver):
    from cuda.bindings import driver as cu

    assert code_of(cu.cuDeviceGetCount()) == "NOT_INITIALIZED"
    ok(cu.cuInit(0))
    assert code_of(cu.cuMemAlloc(64)) == "INVALID_CONTEXT"
    assert code_of(cu.cuCtxPopCurrent()) == "INVALID_CONTEXT"
    primary = ok(cu.cuDevicePrimaryCtxRetain(0))
    ok(cu.cuCtxSetCurrent(primary))
    ok(cu.cuMemAlloc(64))
    ok(cu.cuDevicePrimaryCtxRelease(0))
    assert code_of(cu.cuMemAlloc(64)) == "CONTEXT_IS_DESTROYED"
    assert driver.live_bytes() == 0


def test_a_thread_has_a_stack_of_contexts_of_its_own(driver):
    with context() as cu:
        seen = []
        thread = threading.Thread(target=lambda: seen.append(int(ok(cu.cuCtxGetCurrent()))))
        thread.start()
        thread.join()
        assert seen == [0]
        ok(cu.cuCtxSetCurrent(0))
        ok(cu.cuCtxPushCurrent(ok(cu.cuDevicePrimaryCtxRetain(0))))


# ---- memory


@pytest.mark.machine(memory=1 << 20)
def test_memory_has_a_budget(driver):
    with context() as cu:
        pointer = ok(cu.cuMemAlloc((1 << 20) - 1000))
        assert ok(cu.cuMemGetInfo()) == (1000, 1 << 20)
        assert code_of(cu.cuMemAlloc(1001)) == "OUT_OF_MEMORY"
        ok(cu.cuMemHostAlloc(1 << 20, 1))  # is not the GPU's
        ok(cu.cuMemFree(pointer))
        ok(cu.cuMemAlloc(1 << 20))
        assert code_of(cu.cuMemAlloc(0)) == "INVALID_VALUE"


def test_memory_that_was_freed_is_reported(driver):
    with context() as cu:
        memory = Memory(cu, 1)
        ok(cu.cuMemFree(memory.pointer))
        assert code_of(cu.cuMemcpyHtoD(memory.pointer, bytes_of(1).ctypes.data, 64)) == "INVALID_VALUE"
        assert "is not allocated" in driver.take_violations()[0]
        assert code_of(cu.cuMemFree(memory.pointer)) == "INVALID_VALUE"
        assert "is not the start of memory" in driver.take_violations()[0]
        assert int(ok(cu.cuMemAlloc(64))) != memory.pointer  # no address is given out twice


def test_a_copy_that_ends_behind_its_memory_is_reported(driver):
    with context() as cu:
        memory = Memory(cu, 1)
        assert code_of(cu.cuMemcpyHtoD(memory.pointer + 1, bytes_of(1).ctypes.data, 64)) == "INVALID_VALUE"
        assert code_of(cu.cuMemsetD8Async(memory.pointer, 0, 65, 0)) == "INVALID_VALUE"
        assert all("end behind their 64 bytes" in text for text in driver.take_violations())


def test_a_kernel_that_writes_behind_its_memory_is_reported(driver):
    with context() as cu:
        memory = Memory(cu, 1)
        driver.kernel(0, lambda: ctypes.memset(memory.pointer + 64, 0, 1))
        ok(cu.cuCtxSynchronize())
        assert driver.take_violations() == [f"something wrote behind the 64 bytes at {memory.pointer:#x}"]
        driver.kernel(0, lambda: ctypes.memset(memory.pointer + 64, 0xA5, 1))
        ok(cu.cuCtxSynchronize())


def test_page_locked_memory_that_is_freed_under_a_copy_loses_the_gpu(driver):
    with context() as cu:
        memory, stream = Memory(cu, 1), ok(cu.cuStreamCreate(1))
        pinned = ok(cu.cuMemHostAlloc(64, 1))
        ok(cu.cuMemcpyHtoDAsync(memory.pointer, pinned, 64, stream))
        ok(cu.cuMemFreeHost(pinned))
        assert code_of(cu.cuStreamSynchronize(stream)) == "ILLEGAL_ADDRESS"
        assert code_of(cu.cuMemAlloc(64)) == "ILLEGAL_ADDRESS"  # as it stays on a real GPU
        assert "was freed before the work ran" in driver.take_violations()[0]
        ok(cu.cuMemAlloc(64))


def test_pointers_have_attributes(driver):
    with context() as cu:
        names = cu.CUpointer_attribute
        pointer, pinned = int(ok(cu.cuMemAlloc(64))), int(ok(cu.cuMemHostAlloc(64, 0)))
        ordinal, kind = names.CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL, names.CU_POINTER_ATTRIBUTE_MEMORY_TYPE
        assert ok(cu.cuPointerGetAttribute(ordinal, pointer + 63)) == 0
        assert code_of(cu.cuPointerGetAttribute(ordinal, pointer + 64)) == "INVALID_VALUE"
        assert code_of(cu.cuPointerGetAttribute(ordinal, bytes_of(1).ctypes.data)) == "INVALID_VALUE"
        assert [int(ok(cu.cuPointerGetAttribute(kind, p))) for p in (pointer, pinned)] == [2, 1]
        assert int(ok(cu.cuMemHostGetDevicePointer(pinned, 0))) == pinned
        assert [int(value) for value in ok(cu.cuMemGetAddressRange(pointer + 5))] == [pointer, 64]


def test_rows_are_copied_with_a_pitch(driver):
    with context() as cu:
        source, target = np.arange(40, dtype=np.uint8).reshape(4, 10), np.zeros((4, 6), np.uint8)
        pointer = ok(cu.cuMemAlloc(4 * 16))
        there = cu.CUDA_MEMCPY2D()
        there.srcMemoryType, there.dstMemoryType = cu.CUmemorytype(1), cu.CUmemorytype(2)
        there.srcHost, there.srcPitch, there.srcXInBytes = source.ctypes.data, 10, 2
        there.dstDevice, there.dstPitch = pointer, 16
        there.WidthInBytes, there.Height = 6, 4
        ok(cu.cuMemcpy2DAsync(there, 0))
        back = cu.CUDA_MEMCPY2D()
        back.srcMemoryType, back.dstMemoryType = cu.CUmemorytype(2), cu.CUmemorytype(1)
        back.srcDevice, back.srcPitch = pointer, 16
        back.dstHost, back.dstPitch, back.WidthInBytes, back.Height = target.ctypes.data, 6, 6, 4
        ok(cu.cuMemcpy2D(back))
        np.testing.assert_array_equal(target, source[:, 2:8])
        back.Height = 5
        assert code_of(cu.cuMemcpy2D(back)) == "INVALID_VALUE"
        driver.take_violations()


def test_fills_have_elements_of_one_two_and_four_bytes(driver):
    with context() as cu:
        pointer, found = ok(cu.cuMemAlloc(8)), np.zeros(8, np.uint8)
        for fill, value, count, expected in (
            (cu.cuMemsetD8, 7, 8, [7] * 8),
            (cu.cuMemsetD16, 0x0201, 4, [1, 2] * 4),
            (cu.cuMemsetD32, 0x04030201, 2, [1, 2, 3, 4] * 2),
        ):
            ok(fill(pointer, value, count))
            ok(cu.cuMemcpyDtoH(found.ctypes.data, pointer, 8))
            assert found.tolist() == expected


# ---- streams and events


def test_work_waits_until_somebody_waits_for_it(driver):
    with context() as cu:
        memory, (stream, other) = Memory(cu, 1), two_streams(cu)
        memory.set(2, stream)
        assert memory.read() == 1
        ok(cu.cuStreamSynchronize(other))
        assert memory.read() == 1
        ok(cu.cuStreamSynchronize(stream))
        assert memory.read() == 2


def test_streams_are_ordered_by_events_alone(driver):
    with context() as cu:
        source, target, (stream, other) = Memory(cu, 1), Memory(cu, 0), two_streams(cu)
        source.set(2, stream)
        target.copy_from(source, other)  # without a wait
        ok(cu.cuStreamSynchronize(other))
        assert target.read() == 1
        event = ok(cu.cuEventCreate(2))
        source.set(3, stream)
        ok(cu.cuEventRecord(event, stream))
        source.set(4, stream)  # behind the event
        ok(cu.cuStreamWaitEvent(other, event, 0))
        target.copy_from(source, other)
        ok(cu.cuStreamSynchronize(other))
        assert target.read() == 3


def test_a_wait_is_for_the_record_that_was_there_when_it_was_made(driver):
    with context() as cu:
        source, target, (stream, other) = Memory(cu, 1), Memory(cu, 0), two_streams(cu)
        event = ok(cu.cuEventCreate(2))
        ok(cu.cuEventRecord(event, stream))
        ok(cu.cuStreamWaitEvent(other, event, 0))
        source.set(2, stream)
        ok(cu.cuEventRecord(event, stream))  # later than the wait
        target.copy_from(source, other)
        ok(cu.cuStreamSynchronize(other))
        assert target.read() == 1


def test_the_default_stream_and_blocking_streams_wait_for_each_other(driver):
    with context() as cu:
        source, target = Memory(cu, 1), Memory(cu, 0)
        blocking, free = ok(cu.cuStreamCreate(0)), ok(cu.cuStreamCreate(1))
        source.set(2, blocking)
        target.copy_from(source, 0)
        assert target.read() == 2
        source.set(3, 0)
        target.copy_from(source, blocking)
        ok(cu.cuStreamSynchronize(blocking))
        assert target.read() == 3
        source.set(4, free)
        target.copy_from(source, 0)
        assert target.read() == 3


def test_every_thread_has_a_default_stream(driver):
    with context() as cu:
        memory, primary = Memory(cu, 1), ok(cu.cuCtxGetCurrent())
        memory.set(2, 2)
        ids = [ok(cu.cuStreamGetId(2))]

        def elsewhere():
            ok(cu.cuCtxPushCurrent(primary))
            ids.append(ok(cu.cuStreamGetId(2)))
            ok(cu.cuStreamSynchronize(2))

        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
        assert len(set(ids)) == 2
        assert driver.violations() == []


def test_asking_often_enough_sees_the_end(driver):
    with context() as cu:
        memory, stream, event = Memory(cu, 1), ok(cu.cuStreamCreate(1)), ok(cu.cuEventCreate(2))
        assert code_of(cu.cuEventQuery(event)) == "CUDA_SUCCESS"  # it was never recorded
        memory.set(2, stream)
        memory.set(3, stream)
        ok(cu.cuEventRecord(event, stream))
        memory.set(4, stream)
        assert [code_of(cu.cuEventQuery(event)) for _ in range(4)] == ["NOT_READY"] * 3 + ["CUDA_SUCCESS"]
        assert memory.read() == 3
        assert [code_of(cu.cuStreamQuery(stream)) for _ in range(2)] == ["NOT_READY", "CUDA_SUCCESS"]


def test_work_of_a_stream_that_was_destroyed_still_runs(driver):
    with context() as cu:
        memory, stream = Memory(cu, 1), ok(cu.cuStreamCreate(1))
        number = ok(cu.cuStreamGetId(stream))
        memory.set(2, stream)
        ok(cu.cuStreamDestroy(stream))
        again = ok(cu.cuStreamCreate(1))
        assert int(again) == int(stream)  # the handle is given out again, the number is not
        assert ok(cu.cuStreamGetId(again)) != number
        ok(cu.cuStreamSynchronize(again))
        assert memory.read() == 1
        ok(cu.cuCtxSynchronize())
        assert memory.read() == 2


def test_a_stream_that_does_not_exist_is_reported(driver):
    with context() as cu:
        stream = ok(cu.cuStreamCreate(1))
        ok(cu.cuStreamDestroy(stream))
        assert code_of(cu.cuStreamSynchronize(stream)) == "INVALID_HANDLE"
        assert code_of(cu.cuStreamDestroy(stream)) == "INVALID_HANDLE"
        assert len(driver.take_violations()) == 2


def test_pageable_memory_is_read_at_once_and_page_locked_memory_is_not(driver):
    with context() as cu:
        memory, stream = Memory(cu, 1), ok(cu.cuStreamCreate(1))
        pageable = bytes_of(2)
        ok(cu.cuMemcpyHtoDAsync(memory.pointer, pageable.ctypes.data, 64, stream))
        pageable[:] = 3
        ok(cu.cuStreamSynchronize(stream))
        assert memory.read() == 2
        pinned = int(ok(cu.cuMemHostAlloc(64, 0)))
        ctypes.memset(pinned, 4, 64)
        ok(cu.cuMemcpyHtoDAsync(memory.pointer, pinned, 64, stream))
        ctypes.memset(pinned, 5, 64)
        ok(cu.cuMemcpyDtoHAsync(pageable.ctypes.data, memory.pointer, 64, stream))
        assert (pageable == 5).all()  # a copy to pageable memory is over when the call returns


def test_times_between_events_are_simulated(driver):
    with context() as cu:
        memory, stream = Memory(cu, 1), ok(cu.cuStreamCreate(1))
        first, last = ok(cu.cuEventCreate(0)), ok(cu.cuEventCreate(0))
        driver.delay_us(2000)
        ok(cu.cuEventRecord(first, stream))
        memory.set(2, stream)
        memory.set(3, stream)
        ok(cu.cuEventRecord(last, stream))
        assert code_of(cu.cuEventElapsedTime(first, last)) == "NOT_READY"
        ok(cu.cuEventSynchronize(last))
        assert ok(cu.cuEventElapsedTime(first, last)) == 4.0
        silent = ok(cu.cuEventCreate(2))
        ok(cu.cuEventRecord(silent, stream))
        assert code_of(cu.cuEventElapsedTime(first, silent)) == "INVALID_HANDLE"


def test_a_queue_has_an_end(driver):
    with context() as cu:
        memory, stream = Memory(cu, 1), ok(cu.cuStreamCreate(1))
        for _ in range(5000):
            memory.set(2, stream)
        assert driver.pending(int(stream)) == 1024


def test_threads_may_wait_for_one_stream(driver):
    with context() as cu:
        memory, stream, primary = Memory(cu, 0), ok(cu.cuStreamCreate(1)), ok(cu.cuCtxGetCurrent())
        count = []
        for _ in range(200):
            driver.kernel(int(stream), lambda: count.append(len(count)))
        memory.set(9, stream)

        def wait():
            ok(cu.cuCtxPushCurrent(primary))
            ok(cu.cuStreamSynchronize(stream))
            assert len(count) == 200

        threads = [threading.Thread(target=wait) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert count == list(range(200))
        assert memory.read() == 9


def test_a_host_function_may_not_call_cuda(driver):
    with context() as cu:
        answers = []
        function = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(lambda _: answers.append(code_of(cu.cuCtxSynchronize())))
        ok(cu.cuLaunchHostFunc(0, cu.CUhostFn(ctypes.cast(function, ctypes.c_void_p).value), 0))
        ok(cu.cuCtxSynchronize())
        assert answers == ["NOT_PERMITTED"]


# ---- pools


def test_memory_of_a_pool_is_allocated_and_freed_in_the_order_of_streams(driver):
    with context() as cu:
        stream, other = two_streams(cu)
        pointer = ok(cu.cuMemAllocAsync(64, stream))
        ok(cu.cuMemsetD8Async(pointer, 1, 64, other))  # without a wait
        ok(cu.cuStreamSynchronize(stream))
        ok(cu.cuMemsetD8Async(pointer, 1, 64, other))
        assert driver.violations() == []
        ok(cu.cuMemFreeAsync(pointer, stream))
        ok(cu.cuStreamSynchronize(stream))
        assert code_of(cu.cuStreamSynchronize(other)) == "ILLEGAL_ADDRESS"
        assert "was freed before the work ran" in driver.take_violations()[0]


def test_memory_of_a_pool_is_not_there_for_another_stream(driver):
    with context() as cu:
        stream, other = two_streams(cu)
        pointer = ok(cu.cuMemAllocAsync(64, stream))
        ok(cu.cuMemsetD8Async(pointer, 1, 64, other))
        assert code_of(cu.cuStreamSynchronize(other)) == "ILLEGAL_ADDRESS"
        assert "before its stream came to the allocation" in driver.take_violations()[0]


@pytest.mark.machine(memory=1 << 20)
def test_a_pool_keeps_what_its_threshold_says(driver):
    with context() as cu:
        pool, stream = ok(cu.cuDeviceGetDefaultMemPool(0)), ok(cu.cuStreamCreate(1))
        names = cu.CUmemPool_attribute
        used, reserved = names.CU_MEMPOOL_ATTR_USED_MEM_CURRENT, names.CU_MEMPOOL_ATTR_RESERVED_MEM_CURRENT
        for threshold, kept in ((0, 0), (1 << 18, 1 << 18)):
            ok(cu.cuMemPoolSetAttribute(pool, names.CU_MEMPOOL_ATTR_RELEASE_THRESHOLD, cu.cuuint64_t(threshold)))
            pointer = ok(cu.cuMemAllocAsync(1 << 19, stream))
            assert code_of(cu.cuMemAllocAsync(1 << 20, stream)) == "OUT_OF_MEMORY"
            ok(cu.cuMemFreeAsync(pointer, stream))
            ok(cu.cuStreamSynchronize(stream))
            assert [int(ok(cu.cuMemPoolGetAttribute(pool, name))) for name in (used, reserved)] == [0, kept]
            assert ok(cu.cuMemGetInfo())[0] == (1 << 20) - kept


# ---- what tests ask for


def test_a_call_fails_when_a_test_says_so(driver):
    with context() as cu:
        driver.reset()
        driver.fail_at("cuMemAlloc", 2, 719)
        ok(cu.cuMemAlloc(64))
        assert code_of(cu.cuMemAlloc(64)) == "LAUNCH_FAILED"
        assert driver.failed == "cuMemAlloc"
        ok(cu.cuMemAlloc(64))
        assert (driver.calls("cuMemAlloc"), driver.calls()) == (3, 3)
        driver.fail_at("*", 1, 2)
        assert code_of(cu.cuEventCreate(0)) == "OUT_OF_MEMORY"


def test_eager_work_runs_at_once(driver):
    with context() as cu:
        memory, stream = Memory(cu, 1), ok(cu.cuStreamCreate(1))
        driver.set_eager(True)
        memory.set(2, stream)
        assert memory.read() == 2
        assert driver.pending(int(stream)) == 0


# ---- capture


def begin(cu, stream, mode="relaxed"):
    ok(cu.cuStreamBeginCapture(stream, getattr(capture_modes(cu), mode)))


def launched(cu, graph, stream):
    executable = ok(cu.cuGraphInstantiate(graph, 0))
    ok(cu.cuGraphLaunch(executable, stream))
    ok(cu.cuStreamSynchronize(stream))
    return executable


def test_captured_work_runs_when_the_graph_is_launched(driver):
    with context() as cu:
        memory, stream = Memory(cu, 1), ok(cu.cuStreamCreate(1))
        begin(cu, stream)
        memory.set(2, stream)
        assert int(ok(cu.cuStreamIsCapturing(stream))) == 1
        graph = ok(cu.cuStreamEndCapture(stream))
        ok(cu.cuStreamSynchronize(stream))
        assert memory.read() == 1
        executable = launched(cu, graph, stream)
        assert memory.read() == 2
        ok(cu.cuGraphDestroy(graph))
        memory.write(1)
        ok(cu.cuGraphLaunch(executable, stream))
        ok(cu.cuGraphExecDestroy(executable))  # what was launched still runs
        ok(cu.cuStreamSynchronize(stream))
        assert memory.read() == 2


def test_a_captured_event_may_not_be_asked(driver):
    with context() as cu:
        stream, event = ok(cu.cuStreamCreate(1)), ok(cu.cuEventCreate(2))
        begin(cu, stream)
        ok(cu.cuEventRecord(event, stream))
        ok(cu.cuStreamEndCapture(stream))
        assert code_of(cu.cuEventQuery(event)) == "CAPTURED_EVENT"
        assert code_of(cu.cuEventSynchronize(event)) == "CAPTURED_EVENT"
        assert code_of(cu.cuStreamWaitEvent(stream, event, 0)) == "CAPTURED_EVENT"
        ok(cu.cuEventRecord(event, stream))
        ok(cu.cuEventSynchronize(event))


@pytest.mark.parametrize("call", ["cuStreamSynchronize", "cuStreamQuery", "cuCtxSynchronize"])
def test_a_wait_spoils_a_capture_in_every_mode(driver, call):
    with context() as cu:
        memory, stream = Memory(cu, 1), ok(cu.cuStreamCreate(1))
        begin(cu, stream)
        arguments = () if call == "cuCtxSynchronize" else (stream,)
        assert code_of(getattr(cu, call)(*arguments)) == "STREAM_CAPTURE_UNSUPPORTED"
        assert int(ok(cu.cuStreamIsCapturing(stream))) == 2
        assert code_of(cu.cuMemsetD8Async(memory.pointer, 0, 64, stream)) == "STREAM_CAPTURE_INVALIDATED"
        assert code_of(cu.cuStreamEndCapture(stream)) == "STREAM_CAPTURE_INVALIDATED"
        memory.set(3, stream)
        ok(cu.cuStreamSynchronize(stream))
        assert memory.read() == 3
        assert driver.left_over().get("graph", 0) == 0


@pytest.mark.parametrize(("mode", "refused"), [("everywhere", True), ("thread", True), ("relaxed", False)])
@pytest.mark.parametrize("call", ["cuMemAlloc", "cuMemFree", "cuMemHostAlloc", "cuEventQuery"])
def test_unsafe_calls_spoil_a_capture_that_is_not_relaxed(driver, mode, refused, call):
    with context() as cu:
        stream, event, pointer = ok(cu.cuStreamCreate(1)), ok(cu.cuEventCreate(2)), ok(cu.cuMemAlloc(64))
        begin(cu, stream, mode)
        arguments = {"cuMemAlloc": (64,), "cuMemFree": (pointer,), "cuMemHostAlloc": (64, 0), "cuEventQuery": (event,)}
        code = code_of(getattr(cu, call)(*arguments[call]))
        assert code == ("STREAM_CAPTURE_UNSUPPORTED" if refused else "CUDA_SUCCESS")
        ended = code_of(cu.cuStreamEndCapture(stream))
        assert ended == ("STREAM_CAPTURE_INVALIDATED" if refused else "CUDA_SUCCESS")


@pytest.mark.parametrize(("mode", "refused"), [("everywhere", True), ("thread", False), ("relaxed", False)])
def test_a_capture_concerns_other_threads_only_in_global_mode(driver, mode, refused):
    with context() as cu:
        stream, primary, answers = ok(cu.cuStreamCreate(1)), ok(cu.cuCtxGetCurrent()), []
        begin(cu, stream, mode)

        def elsewhere():
            ok(cu.cuCtxPushCurrent(primary))
            answers.append(code_of(cu.cuMemAlloc(64)))

        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
        assert answers == ["STREAM_CAPTURE_UNSUPPORTED" if refused else "CUDA_SUCCESS"]


def test_the_default_stream_spoils_the_capture_of_a_blocking_stream(driver):
    with context() as cu:
        memory, blocking, free = Memory(cu, 1), ok(cu.cuStreamCreate(0)), ok(cu.cuStreamCreate(1))
        assert code_of(cu.cuStreamBeginCapture(0, capture_modes(cu).relaxed)) == "STREAM_CAPTURE_UNSUPPORTED"
        begin(cu, free)
        memory.set(2, 0)
        ok(cu.cuStreamEndCapture(free))
        begin(cu, blocking)
        assert code_of(cu.cuMemsetD8Async(memory.pointer, 0, 64, 0)) == "STREAM_CAPTURE_IMPLICIT"
        assert code_of(cu.cuStreamEndCapture(blocking)) == "STREAM_CAPTURE_INVALIDATED"


def test_a_capture_may_not_wait_for_work_outside(driver):
    with context() as cu:
        (stream, other), event = two_streams(cu), ok(cu.cuEventCreate(2))
        ok(cu.cuEventRecord(event, other))
        begin(cu, stream)
        assert code_of(cu.cuStreamWaitEvent(stream, event, 0)) == "STREAM_CAPTURE_ISOLATION"


def test_a_capture_spreads_by_events_and_has_to_be_joined(driver):
    with context() as cu:
        first, second, (stream, other) = Memory(cu, 1), Memory(cu, 0), two_streams(cu)
        fork, join = ok(cu.cuEventCreate(2)), ok(cu.cuEventCreate(2))
        for joined in (False, True):
            begin(cu, stream)
            first.set(2, stream)
            ok(cu.cuEventRecord(fork, stream))
            ok(cu.cuStreamWaitEvent(other, fork, 0))
            second.copy_from(first, other)
            assert code_of(cu.cuStreamEndCapture(other)) == "STREAM_CAPTURE_UNMATCHED" if not joined else True
            if joined:
                ok(cu.cuEventRecord(join, other))
                ok(cu.cuStreamWaitEvent(stream, join, 0))
                launched(cu, ok(cu.cuStreamEndCapture(stream)), stream)
                assert second.read() == 2
            else:
                assert code_of(cu.cuStreamEndCapture(stream)) == "STREAM_CAPTURE_INVALIDATED"
            assert int(ok(cu.cuStreamIsCapturing(other))) == 0
        begin(cu, stream)
        ok(cu.cuEventRecord(fork, stream))
        ok(cu.cuStreamWaitEvent(other, fork, 0))
        second.set(3, other)
        assert code_of(cu.cuStreamEndCapture(stream)) == "STREAM_CAPTURE_UNJOINED"


def test_branches_of_a_graph_that_do_not_wait_for_each_other_run_in_the_worse_order(driver):
    with context() as cu:
        first, second, (stream, other) = Memory(cu, 1), Memory(cu, 0), two_streams(cu)
        fork, join = ok(cu.cuEventCreate(2)), ok(cu.cuEventCreate(2))
        begin(cu, stream)
        ok(cu.cuEventRecord(fork, stream))
        ok(cu.cuStreamWaitEvent(other, fork, 0))
        first.set(2, stream)
        second.copy_from(first, other)
        ok(cu.cuEventRecord(join, other))
        ok(cu.cuStreamWaitEvent(stream, join, 0))
        launched(cu, ok(cu.cuStreamEndCapture(stream)), stream)
        assert second.read() == 1


def test_launches_of_one_graph_are_ordered(driver):
    with context() as cu:
        first, second, (stream, other) = Memory(cu, 1), Memory(cu, 0), two_streams(cu)
        begin(cu, stream)
        second.copy_from(first, stream)
        executable = ok(cu.cuGraphInstantiate(ok(cu.cuStreamEndCapture(stream)), 0))
        first.set(5, stream)
        ok(cu.cuGraphLaunch(executable, stream))
        ok(cu.cuGraphLaunch(executable, other))
        ok(cu.cuStreamSynchronize(other))
        assert second.read() == 5
