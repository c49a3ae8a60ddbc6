"""DeviceArray and ForeignArray against torch and cupy on a real GPU: the same memory on both sides, and the right order."""

from __future__ import annotations

import gc
import weakref

import gpu_engines
import numpy as np
import pytest

from edge_backbones.engines.gpu import memory as cuda
from edge_backbones.engines.gpu.arrays import DeviceArray, from_foreign, is_on_gpu, stream_pointer
from edge_backbones.errors import InputError

BUSY = 200_000_000  # clock cycles: about a tenth of a second


class Owner:
    pass


@pytest.fixture
def memory(gpu):
    return cuda.open_memory(gpu)


@pytest.fixture
def made(memory):
    """A DeviceArray over memory of ours with known values, and the values."""
    values = np.random.default_rng(0).random((2, 3, 4), np.float32)
    with memory:
        pointer = memory.allocate(values.nbytes)
        memory.copy_in(pointer, values.ctypes.data, values.nbytes, 0)
        memory.wait(0)
    owner = Owner()
    yield (
        DeviceArray(pointer, values.shape, values.dtype, device=memory.gpu, owner=owner, synchronize=None),
        values,
    )
    with memory:
        gpu_engines.wait_for_all()
        memory.free(pointer)


@gpu_engines.needs("torch")
def test_torch_reads_ours_in_place(made):
    import torch

    array, values = made
    tensor = torch.from_dlpack(array)
    assert tensor.data_ptr() == array.pointer
    assert tensor.device == torch.device("cuda", array.device)
    assert np.array_equal(tensor.cpu().numpy(), values)
    tensor += 1  # and writes to it
    again = torch.as_tensor(array, device=tensor.device)  # through the CUDA Array Interface
    assert again.data_ptr() == array.pointer
    assert np.array_equal(again.cpu().numpy(), values + 1)


@gpu_engines.needs("torch")
def test_torch_keeps_ours_alive(memory):
    import torch

    with memory:
        pointer = memory.allocate(1024)
    owner = Owner()
    alive = weakref.ref(owner)
    array = DeviceArray(pointer, (256,), np.float32, device=memory.gpu, owner=owner, synchronize=None)
    tensor = torch.from_dlpack(array)
    del array, owner
    gc.collect()
    assert alive() is not None
    tensor.zero_()
    torch.cuda.synchronize()
    del tensor
    gc.collect()
    assert alive() is None
    with memory:
        memory.free(pointer)


@gpu_engines.needs("torch")
def test_a_consumer_on_another_stream_is_made_to_wait(memory, made):
    import torch

    array, values = made
    producer, consumer = torch.cuda.Stream(array.device), torch.cuda.Stream(array.device)
    asked = []
    with memory:
        event = memory.new_event()

    def synchronize(stream):
        asked.append(stream)
        with memory:
            memory.follow(stream, event)

    late = np.full_like(values, 7)
    with torch.cuda.stream(producer):
        torch.cuda._sleep(BUSY)
        source = torch.from_numpy(late).pin_memory().to(array.device, non_blocking=True)
        with memory:
            memory.copy(array.pointer, source.data_ptr(), late.nbytes, producer.cuda_stream)
            memory.record(event, producer.cuda_stream)
            assert not memory.happened(event)
    ordered = DeviceArray(
        array.pointer,
        array.shape,
        array.dtype,
        device=array.device,
        owner=array,
        stream=producer.cuda_stream,
        synchronize=synchronize,
    )
    with torch.cuda.stream(consumer):
        seen = torch.from_dlpack(ordered).clone()
    assert asked == [consumer.cuda_stream]
    assert np.array_equal(seen.cpu().numpy(), late)
    with torch.cuda.stream(producer):
        torch.from_dlpack(ordered)
    assert asked == [consumer.cuda_stream]  # the producer's own stream needs no waiting
    with memory:
        memory.free_event(event)


@gpu_engines.needs("torch")
def test_ours_reads_torch_in_place(gpu):
    import torch

    tensor = torch.rand(2, 3, 4, device=f"cuda:{gpu}")
    assert is_on_gpu(tensor)
    found = from_foreign(tensor, stream=0)
    assert found.pointer == tensor.data_ptr()
    assert (found.shape, found.dtype, found.device, found.contiguous) == ((2, 3, 4), np.float32, gpu, True)
    turned = from_foreign(tensor.permute(0, 2, 1), stream=0)
    assert not turned.contiguous
    assert turned.pointer == tensor.data_ptr()
    for dtype in (torch.uint8, torch.float16, torch.int64, torch.bool):
        assert from_foreign(tensor.to(dtype), stream=0).dtype == np.dtype(str(dtype).removeprefix("torch."))


@gpu_engines.needs("torch")
def test_torch_waits_for_its_own_work_before_ours_reads(memory, gpu):
    import torch

    mine = torch.cuda.Stream(gpu)
    expected = torch.arange(1024, dtype=torch.float32)
    tensor = torch.zeros(1024, device=f"cuda:{gpu}")
    source = expected.to(tensor.device)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream(gpu)):
        torch.cuda._sleep(BUSY)
        tensor.copy_(source)
        found = from_foreign(tensor, stream=mine.cuda_stream)
    back = np.empty(1024, np.float32)
    with memory:
        memory.copy_out(back.ctypes.data, found.pointer, back.nbytes, mine.cuda_stream)
        memory.wait(mine.cuda_stream)
    assert np.array_equal(back, expected.numpy())


@gpu_engines.needs("torch")
def test_memory_of_torch_is_kept_while_ours_reads(gpu):
    import torch

    torch.cuda.empty_cache()  # so that there is one block for it, and no other
    tensor = torch.rand(1024, 1024, device=f"cuda:{gpu}")
    pointer = tensor.data_ptr()
    found = from_foreign(tensor, stream=0)
    del tensor
    gc.collect()
    assert torch.rand(1024, 1024, device=f"cuda:{gpu}").data_ptr() != pointer  # not given away
    del found
    gc.collect()
    assert torch.rand(1024, 1024, device=f"cuda:{gpu}").data_ptr() == pointer


@gpu_engines.needs("torch")
def test_what_does_not_fit_is_refused(gpu):
    import torch

    place = f"cuda:{gpu}"
    with pytest.raises(InputError, match="bfloat"):
        from_foreign(torch.zeros(4, device=place, dtype=torch.bfloat16), stream=0)
    with pytest.raises(InputError):
        from_foreign(torch.zeros(4, device=place, requires_grad=True), stream=0)
    with pytest.raises(InputError, match="copy it to a GPU"):
        from_foreign(torch.zeros(4), stream=0)
    assert not is_on_gpu(torch.zeros(4))


@gpu_engines.needs("torch")
def test_streams_of_torch(gpu):
    import torch

    stream = torch.cuda.Stream(gpu)
    assert stream_pointer(stream) == stream.cuda_stream != 0
    assert stream_pointer(torch.cuda.default_stream(gpu)) == 0


@gpu_engines.needs("cupy")
def test_cupy_both_ways(made):
    import cupy

    array, values = made
    with cupy.cuda.Device(array.device):
        for theirs in (cupy.from_dlpack(array), cupy.asarray(array)):
            assert theirs.data.ptr == array.pointer
            assert np.array_equal(cupy.asnumpy(theirs), values)
        mine = cupy.arange(12, dtype=np.float32).reshape(3, 4)
        found = from_foreign(mine, stream=0)
        assert (found.pointer, found.shape, found.contiguous) == (mine.data.ptr, (3, 4), True)
        stream = cupy.cuda.Stream(non_blocking=True)
        assert stream_pointer(stream) == stream.ptr
