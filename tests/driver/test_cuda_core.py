"""cuda.core on the stand-in for libcuda: what we may build on works there, with and without pools of memory."""

from __future__ import annotations

import gc

import numpy as np
import pytest


def device():
    from cuda.core import Device

    found = Device(0)
    found.set_current()
    return found


def on_host(found):
    """Page-locked memory of the host."""
    from cuda.core import LegacyPinnedMemoryResource

    return LegacyPinnedMemoryResource().allocate(64, stream=found.default_stream)


def read(buffer, stream, found) -> int:
    host = on_host(found)
    buffer.copy_to(host, stream=stream)
    stream.sync()
    values = np.from_dlpack(host)
    assert (values == values[0]).all()
    return int(values[0])


def test_a_device_describes_itself(driver):
    found = device()
    assert found.name == "Stand-in GPU 0"
    assert tuple(found.compute_capability) == (9, 0)
    assert found.properties.integrated in (0, False)


def test_streams_are_ordered_by_events(driver):
    found = device()
    stream, other = found.create_stream(), found.create_stream()
    memory = found.memory_resource
    source, target = memory.allocate(64, stream=stream), memory.allocate(64, stream=stream)
    source.fill(1, stream=stream)
    stream.sync()
    source.fill(2, stream=stream)
    event = stream.record()
    target.copy_from(source, stream=other)
    assert read(target, other, found) == 1
    assert not event.is_done
    other.wait(event)
    target.copy_from(source, stream=other)
    assert read(target, other, found) == 2
    event.sync()
    assert event.is_done


def test_foreign_streams_are_taken_by_handle(driver):
    from cuda.core import Stream

    found = device()
    stream = found.create_stream()
    same = Stream.from_handle(int(stream.handle))
    buffer = found.memory_resource.allocate(64, stream=same)
    buffer.fill(3, stream=same)
    assert read(buffer, stream, found) == 3


def test_times_between_events(driver):
    from cuda.core import EventOptions

    found = device()
    stream = found.create_stream()
    buffer = found.memory_resource.allocate(64, stream=stream)
    driver.delay_us(500)
    first = stream.record(options=EventOptions(timing_enabled=True))
    buffer.fill(1, stream=stream)
    last = stream.record(options=EventOptions(timing_enabled=True))
    last.sync()
    assert last - first == 0.5


@pytest.mark.parametrize("pool", ["of the device", "own"])
def test_a_pool_frees_in_the_order_of_a_stream(driver, pool):
    from cuda.core import DeviceMemoryResource, DeviceMemoryResourceOptions

    found = device()
    stream = found.create_stream()
    memory = found.memory_resource
    if pool == "own":
        memory = DeviceMemoryResource(found, DeviceMemoryResourceOptions(max_size=1 << 20))
    buffer = memory.allocate(1 << 16, stream=stream)
    assert buffer.is_device_accessible
    assert buffer.memory_resource is memory
    assert driver.live_bytes() == 1 << 16
    buffer.close(stream)
    assert driver.live_bytes() == 1 << 16  # its stream has not come to it
    stream.sync()
    assert driver.live_bytes() == 0


@pytest.mark.machine(pools=0)
def test_without_pools_memory_is_allocated_synchronously(driver):
    found = device()
    memory = found.memory_resource
    assert type(memory).__name__ == "_SynchronousMemoryResource"
    stream = found.create_stream()
    buffer = memory.allocate(64, stream=stream)
    buffer.fill(4, stream=stream)
    assert read(buffer, stream, found) == 4
    buffer.close(stream)
    assert driver.live_bytes() == 0


@pytest.mark.machine(memory=1 << 20)
def test_memory_that_runs_out_is_an_error(driver):
    found = device()
    stream = found.create_stream()
    with pytest.raises(Exception, match="CUDA_ERROR_OUT_OF_MEMORY"):
        found.memory_resource.allocate((1 << 20) + 1, stream=stream)


def test_a_graph_is_built_and_launched(driver):
    found = device()
    stream = found.create_stream()
    memory = found.memory_resource
    source, target = memory.allocate(64, stream=stream), memory.allocate(64, stream=stream)
    source.fill(1, stream=stream)
    stream.sync()
    builder = found.create_graph_builder().begin_building()
    source.fill(2, stream=builder)
    target.copy_from(source, stream=builder)
    graph = builder.end_building().complete()
    assert read(source, stream, found) == 1
    graph.upload(stream)
    graph.launch(stream)
    assert read(target, stream, found) == 2
    del graph, builder
    gc.collect()
    assert driver.live("graph") == driver.live("executable") == 0


def test_branches_of_a_graph_are_split_and_joined(driver):
    from cuda.core.graph import GraphBuilder

    found = device()
    stream = found.create_stream()
    memory = found.memory_resource
    first, second = memory.allocate(64, stream=stream), memory.allocate(64, stream=stream)
    left, right = found.create_graph_builder().begin_building().split(2)
    first.fill(1, stream=left)
    second.fill(2, stream=right)
    joined = GraphBuilder.join(left, right)
    second.copy_from(first, stream=joined)
    joined.end_building().complete().launch(stream)
    assert read(second, stream, found) == 1


def test_a_strided_view_crosses_by_dlpack_and_by_the_cuda_array_interface(driver):
    from cuda.core.utils import StridedMemoryView

    from edge_backbones.engines.gpu.arrays import DeviceArray, from_foreign

    found = device()
    stream, other = found.create_stream(), found.create_stream()
    buffer = found.memory_resource.allocate(64, stream=stream)
    asked = []
    array = DeviceArray(
        int(buffer.handle), (4, 4), np.dtype(np.float32), device=0, owner=buffer, synchronize=asked.append,
        stream=int(stream.handle),
    )  # fmt: skip
    view = StridedMemoryView.from_dlpack(array, stream_ptr=int(other.handle))
    assert (view.ptr, view.shape, view.dtype, view.device_id) == (int(buffer.handle), (4, 4), np.float32, 0)
    assert asked == [int(other.handle)]
    before = driver.calls("cuStreamWaitEvent")
    view = StridedMemoryView.from_cuda_array_interface(array, stream_ptr=int(other.handle))
    assert (view.ptr, view.shape) == (int(buffer.handle), (4, 4))
    assert driver.calls("cuStreamWaitEvent") == before + 1  # it makes the other stream wait by itself
    ours = from_foreign(buffer, stream=int(stream.handle))
    assert (ours.pointer, ours.nbytes, ours.device) == (int(buffer.handle), 64, 0)


def test_buffers_go_into_a_session_and_maps_come_out(driver):
    from cuda.core.utils import StridedMemoryView

    from edge_backbones.engines.gpu.dlpack import ForeignArray
    from edge_backbones.testing import pooled
    from tests.driver.machine import DriverMachine

    found = device()
    machine = DriverMachine(driver)
    stream, other = found.create_stream(), found.create_stream()
    images = np.random.default_rng(0).standard_normal((2, 3, 32, 48)).astype(np.float32)
    buffer = found.memory_resource.allocate(images.nbytes, stream=stream)
    stream.sync()
    machine.gpu.bytes_at(int(buffer.handle), images.nbytes)[:] = images.tobytes()
    session = machine.open()
    array = ForeignArray(int(buffer.handle), images.shape, images.dtype, 0, True, owner=buffer)
    maps = session.run_on_device(array, int(stream.handle))
    views = [StridedMemoryView.from_dlpack(feature_map, stream_ptr=int(other.handle)) for feature_map in maps]
    for feature_map, view, expected in zip(maps, views, pooled(images), strict=True):
        assert view.shape == expected.shape
        np.testing.assert_array_equal(machine.gpu.value(feature_map, int(other.handle)), expected)
    session.close()
