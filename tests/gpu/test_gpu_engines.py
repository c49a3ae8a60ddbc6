"""Every kind of engine on a real GPU, over a backbone whose values are known: streams, threads, graphs, leaks, bad input.

Tests that take ``arrays`` run twice: with arrays and streams of our own, and with torch's.
"""

from __future__ import annotations

import contextlib
import gc
import sys
import tracemalloc
from concurrent.futures import ThreadPoolExecutor

import gpu_arrays
import gpu_engines
import numpy as np
import pytest
from gpu_engines import assert_pooled, open_backbone, pictures

from benchmarks import gpu_common, gpu_standin
from benchmarks.gpu_kernels import on_standin
from edge_backbones.engines.gpu import memory as cuda
from edge_backbones.engines.gpu.arrays import DeviceArray
from edge_backbones.errors import EngineMismatchError, InputError, OutOfMemoryError
from edge_backbones.machine import gpus


@pytest.fixture(params=gpu_engines.each(gpu_engines.KINDS))
def kind(request):
    return request.param


@pytest.fixture(params=gpu_engines.each(gpu_engines.TENSORRT))
def tensorrt(request):
    return request.param


@pytest.fixture
def backbone(kind, gpu):
    with open_backbone(kind, gpu) as opened:
        yield opened


@pytest.fixture(params=["ours", pytest.param("torch", marks=gpu_engines.needs("torch"))])
def arrays(request, gpu):
    opened = gpu_arrays.open_arrays(request.param, gpu)
    yield opened
    opened.close()


@pytest.fixture
def torch(gpu):
    if gpu_engines.missing("torch"):
        pytest.skip(gpu_engines.missing("torch"))
    import torch

    torch.cuda.synchronize(gpu)
    return torch


@pytest.mark.parametrize("shape", [(1, 64, 64), (2, 64, 96), (5, 128, 32), (32, 256, 512), (32, 512, 64)])
def test_numpy_in_and_out(backbone, shape):
    images = pictures(*shape)
    before = images.copy()
    assert_pooled(backbone(images).feature_maps, images)
    assert np.array_equal(images, before)


def test_more_images_than_the_engine_takes(backbone):
    images = pictures(71)
    assert_pooled(backbone(images).feature_maps, images)


def test_results_stay_as_they_are(backbone):
    batches = [pictures(2, seed=seed) for seed in range(8)]
    kept = [backbone(images).feature_maps for images in batches]
    for images, maps in zip(batches, kept, strict=True):
        assert_pooled(maps, images)


@pytest.mark.parametrize("batch", [1, 2, 32, 40])
def test_arrays_on_the_gpu(backbone, arrays, batch):
    images = pictures(batch)
    pixels = arrays.put(images)
    maps = backbone(pixels).feature_maps
    assert all(isinstance(feature_map, DeviceArray) for feature_map in maps)
    assert_pooled(maps, images)
    assert np.array_equal(arrays.to_host(pixels), images)


def test_torch_takes_maps_without_a_copy(backbone, torch, gpu):
    pixels = torch.from_numpy(pictures(2)).to(f"cuda:{gpu}")
    for feature_map in backbone(pixels).feature_maps:
        tensor = torch.from_dlpack(feature_map)
        assert tensor.data_ptr() == feature_map.pointer
        assert tensor.is_cuda


class Wrapped:
    """A stream by protocol, as cuda.core has it."""

    def __init__(self, stream):
        self.stream = stream

    def __cuda_stream__(self):
        return 0, getattr(self.stream, "cuda_stream", self.stream)


@pytest.mark.parametrize(
    "as_given", [lambda s: s, lambda s: getattr(s, "cuda_stream", s), Wrapped], ids=["stream", "int", "protocol"]
)
def test_a_call_is_in_the_order_of_its_stream(backbone, arrays, as_given):
    """Input that comes late, and is overwritten right behind the call; output that another stream reads."""
    images, other = pictures(4, 256, 256), pictures(4, 256, 256, seed=1)
    late, after = arrays.put(images), arrays.put(other)
    work, reading = arrays.new_stream(), arrays.new_stream()
    for _ in range(3):  # with buffers warm too
        pixels = arrays.put(np.zeros_like(images))
        arrays.keep_busy(work)
        arrays.copy(pixels, late, work)
        maps = backbone(pixels, stream=as_given(work)).feature_maps
        arrays.copy(pixels, after, work)
        seen = [arrays.seen_from(feature_map, reading) for feature_map in maps]
        assert_pooled([arrays.to_host(values, reading) for values in seen], images)
        assert_pooled(maps, images)


def test_memory_that_another_stream_reads_is_not_written_over(backbone, arrays):
    """Maps are let go of while another stream still has to read them, and later calls want their memory."""
    batches = [pictures(2, seed=seed) for seed in range(20)]  # more than the pool keeps unused for one size
    given = [arrays.put(images) for images in batches]
    work, reading = arrays.new_stream(), arrays.new_stream()
    backbone(given[0], stream=work)
    arrays.wait()
    arrays.keep_busy(reading, 200)
    seen = []
    for pixels in given:
        maps = backbone(pixels, stream=work).feature_maps
        seen.append([arrays.seen_from(feature_map, reading) for feature_map in maps])
        del maps
    arrays.finish(work)
    for values, images in zip(seen, batches, strict=True):
        assert_pooled([arrays.to_host(value, reading) for value in values], images)


def test_a_call_only_enqueues(backbone, arrays):
    images = pictures(2)
    pixels, work = arrays.put(images), arrays.new_stream()
    for _ in range(5):
        backbone(pixels, stream=work)
    arrays.wait()
    arrays.keep_busy(work, 1000)
    maps = backbone(pixels, stream=work).feature_maps
    assert arrays.is_busy(work)  # the call came back while the stream was still asleep
    assert_pooled(maps, images)


def test_the_default_stream(backbone, arrays):
    images = pictures(4)
    late, pixels = arrays.put(images), arrays.put(np.zeros_like(images))
    backbone(late)
    arrays.keep_busy(0)
    arrays.copy(pixels, late, 0)
    maps = backbone(pixels).feature_maps
    arrays.clear(pixels, 0)
    assert_pooled(maps, images)


def test_threads_never_mix_outputs(backbone, gpu):
    def work(seed):
        images = pictures(1 + seed % 5, 64 + 8 * (seed % 3), 96, seed)
        for _ in range(40):
            assert_pooled(backbone(images).feature_maps, images)
        return True

    with ThreadPoolExecutor(gpu_engines.many_threads(gpu)) as pool:
        assert all(pool.map(work, range(16)))


def test_threads_with_streams_never_mix_outputs(backbone, gpu):
    arrays = gpu_arrays.open_arrays("ours", gpu)

    def work(seed):
        images = pictures(1 + seed % 5, seed=seed)
        pixels, stream = arrays.put(images), arrays.new_stream()
        for _ in range(40):
            maps = backbone(pixels, stream=stream).feature_maps
            assert_pooled([arrays.to_host(feature_map, stream) for feature_map in maps], images)
        return True

    with ThreadPoolExecutor(gpu_engines.many_threads(gpu)) as pool:
        assert all(pool.map(work, range(16)))
    backbone.close()
    arrays.close()


def test_many_calls_leave_nothing_behind(kind, gpu):
    memory = cuda.open_memory(gpu)
    images = pictures(2)
    with open_backbone(kind, gpu) as backbone:
        gpu_engines.assert_flat(memory, lambda: backbone(images), gpu_engines.many_calls(gpu))


def test_many_calls_on_the_gpu_leave_nothing_behind(backbone, arrays, gpu):
    memory = cuda.open_memory(gpu)
    pixels, stream = arrays.put(pictures(2)), arrays.new_stream()

    def once():
        for feature_map in backbone(pixels, stream=stream).feature_maps:
            feature_map.__dlpack__(stream=1)  # the reader waits, and lets go of it

    gpu_engines.assert_flat(memory, once, gpu_engines.many_calls(gpu))


def test_opening_and_closing_leaves_nothing_behind(kind, gpu):
    memory = cuda.open_memory(gpu)
    images = pictures(2)

    def once():
        with open_backbone(kind, gpu) as backbone:
            backbone(images)

    once()
    gpu_engines.assert_flat(memory, once, 30, host_slack=32 << 20)


def fill(memory: cuda.GpuMemory) -> list[int]:
    """Take all device memory but crumbs, which the driver may need to load a kernel."""
    taken, size = [], 1 << 34
    while size >= 16 << 20:
        try:
            taken.append(memory.allocate(size))
        except OutOfMemoryError:
            size //= 2
    return taken


def test_out_of_memory_is_typed_and_the_process_lives(kind, gpu):
    if gpu_engines.is_integrated(gpu):
        pytest.skip("this GPU has the memory of the system: taking all of it would end other processes")
    memory = cuda.open_memory(gpu)
    small, large = pictures(2), pictures(32, 512, 512)
    with open_backbone(kind, gpu) as backbone:
        if (
            kind not in gpu_engines.TENSORRT
        ):  # a session of TensorRT has memory for its largest shape from the first call on
            backbone(small)
        gpu_engines.free_bytes(memory)  # waits for the GPU
        if "torch" in sys.modules and not gpu_engines.missing("torch"):
            sys.modules["torch"].cuda.empty_cache()
        with memory:
            taken = fill(memory)
        try:
            with pytest.raises(OutOfMemoryError):
                backbone(large)
        finally:
            with memory:
                for pointer in taken:
                    memory.free(pointer)
        assert_pooled(backbone(small).feature_maps, small)
        assert_pooled(backbone(large).feature_maps, large)


def test_wrong_input(backbone, arrays):
    good = pictures(2)
    for give in (lambda values: values, arrays.put):
        for wrong in (good[:, :, :60], good[:, :2], good[0]):  # 60 is no multiple of 8
            with pytest.raises(InputError, match="does not fit"):
                backbone(give(np.ascontiguousarray(wrong)))
    with pytest.raises(InputError):
        backbone(good[:0])
    pixels = arrays.put(good)
    with pytest.raises(InputError, match="float16"):
        backbone(arrays.put(good.astype(np.float16)))
    with pytest.raises(InputError, match="stream"):
        backbone(good, stream=arrays.new_stream())
    with pytest.raises(InputError):
        backbone(pixels, stream="a stream")
    assert_pooled(backbone(pixels).feature_maps, good)  # and goes on


def test_wrong_tensors_of_torch(backbone, torch, gpu):
    pixels = torch.from_numpy(pictures(2)).to(f"cuda:{gpu}")
    with pytest.raises(InputError):
        backbone(pixels[:0])
    with pytest.raises(InputError, match="C order"):
        backbone(pixels.permute(0, 1, 3, 2))


def test_a_gpu_that_is_not_there(kind, gpu):
    with pytest.raises(EngineMismatchError, match="smaller index"):
        gpu_engines.open_session(kind, len(gpus.find_gpus()), compiled_on=gpu)


def test_an_engine_on_the_cpu_names_the_way_out(arrays):
    from edge_backbones import EdgeBackbone
    from edge_backbones.testing import SPEC, NumpySession, pooling_input

    backbone = EdgeBackbone(SPEC, pooling_input(), NumpySession(pooling_input()))
    with pytest.raises(InputError, match="device='cuda'"):
        backbone(arrays.put(pictures(2, 32, 48)))


def test_closed(kind, arrays, gpu):
    images = pictures(2)
    pixels = arrays.put(images)
    backbone = open_backbone(kind, gpu)
    from_host, on_gpu = backbone(images).feature_maps, backbone(pixels).feature_maps
    backbone.close()
    backbone.close()
    with pytest.raises(InputError, match="closed"):
        backbone(images)
    with pytest.raises(InputError, match="closed"):
        backbone(pixels)
    assert_pooled(from_host, images)  # what was returned stays
    assert_pooled(on_gpu, images)


# ---- TensorRT alone


@pytest.mark.parametrize("memory", gpu_engines.each(gpu_engines.BACKENDS))
def test_a_graphed_call_reads_and_writes_in_place(tensorrt, arrays, gpu, memory):
    """Frames written into one buffer, on the stream of the call; maps that are the same memory every time."""
    with open_backbone(tensorrt, gpu, memory=memory) as backbone:
        work, reading = arrays.new_stream(), arrays.new_stream()
        pixels = arrays.put(np.zeros_like(pictures(2)))
        call = backbone.graphed(pixels, stream=work)
        for seed in range(20):
            images = pictures(2, seed=seed)
            arrays.copy(pixels, arrays.put(images), work)
            maps = call().feature_maps
            seen = [arrays.seen_from(feature_map, work) for feature_map in maps]
            elsewhere = [arrays.seen_from(feature_map, reading) for feature_map in maps]
            assert_pooled([arrays.to_host(values, work) for values in seen], images)
            assert_pooled([arrays.to_host(values, reading) for values in elsewhere], images)
        with pytest.raises(InputError, match="a default stream cannot be captured"):
            backbone.graphed(pixels, stream=None)


def test_a_graphed_call_on_page_locked_memory(tensorrt, gpu):
    """Frames written into one buffer of the host; the copies are part of the graph."""
    with open_backbone(tensorrt, gpu) as backbone:
        buffer = backbone.input_buffer(2, height=64, width=96)
        call = backbone.graphed(buffer)
        addresses = set()
        for seed in range(20):
            buffer[:] = pictures(2, seed=seed)
            maps = call().feature_maps
            assert_pooled(maps, buffer)
            addresses.add(tuple(feature_map.ctypes.data for feature_map in maps))
        assert len(addresses) == 1
        gpu_engines.assert_flat(cuda.open_memory(gpu), call, gpu_engines.many_calls(gpu))
        with pytest.raises(InputError, match=r"backbone\.input_buffer"):
            backbone.graphed(pictures(2))


def test_frames_in_page_locked_memory(tensorrt, gpu):
    """Whole buffers and parts of them, in turn with arrays in other memory; results stay as they are."""
    with open_backbone(tensorrt, gpu) as backbone:
        buffer, kept = backbone.input_buffer(4, height=64, width=96), []
        for seed in range(6):
            buffer[:] = pictures(4, seed=seed)
            for images in (buffer, buffer[1:3], buffer[3:], pictures(2, seed=seed)):
                kept.append((backbone(images).feature_maps, images.copy()))
        for maps, images in kept:
            assert_pooled(maps, images)


class Rows:
    """The first columns of an array on a GPU, as a camera's driver gives them."""

    def __init__(self, array, columns):
        *outer, width = array.shape
        rows = [4 * width * int(np.prod(outer[i + 1 :])) for i in range(len(outer))]
        given = {"shape": (*outer, columns), "typestr": "<f4", "data": (array.pointer, False), "version": 3}
        self.__cuda_array_interface__ = {**given, "strides": (*rows, 4), "stream": None}
        self.owner = array


@pytest.mark.parametrize("columns", [96, 64])
def test_frames_whose_rows_lie_apart(tensorrt, gpu, columns):
    images = pictures(2, 64, 128)
    arrays = gpu_arrays.open_arrays("ours", gpu)
    pixels = Rows(arrays.put(images), columns)
    with open_backbone(tensorrt, gpu) as backbone:
        for stream in (0, arrays.new_stream(), 0):
            maps = backbone(pixels, stream=stream).feature_maps
            assert_pooled([arrays.to_host(feature_map, stream) for feature_map in maps], images[..., :columns])
    arrays.close()


def test_a_graphed_call_gives_what_a_plain_one_gives(tensorrt, arrays, gpu):
    with open_backbone(tensorrt, gpu) as backbone:
        stream = arrays.new_stream()
        for shape in ((1, 64, 64), (2, 64, 96), (32, 256, 128)):
            pixels = arrays.put(pictures(*shape))
            plain = [
                arrays.to_host(feature_map, stream) for feature_map in backbone(pixels, stream=stream).feature_maps
            ]
            call = backbone.graphed(pixels, stream=stream)
            for _ in range(3):
                replayed = [arrays.to_host(feature_map, stream) for feature_map in call().feature_maps]
                assert all(map(np.array_equal, replayed, plain))


def test_graphed_calls_in_threads(tensorrt, gpu):
    arrays = gpu_arrays.open_arrays("ours", gpu)
    with open_backbone(tensorrt, gpu) as backbone:

        def work(seed):
            images, stream = pictures(1 + seed % 3, seed=seed), arrays.new_stream()
            call = backbone.graphed(arrays.put(images), stream=stream)
            for _ in range(30):
                maps = call().feature_maps
                assert_pooled([arrays.to_host(feature_map, stream) for feature_map in maps], images)
            return True

        with ThreadPoolExecutor(gpu_engines.many_threads(gpu)) as pool:
            assert all(pool.map(work, range(12)))
    arrays.close()


def test_graphed_calls_leave_nothing_behind(tensorrt, arrays, gpu):
    with open_backbone(tensorrt, gpu) as backbone:
        pixels, stream = arrays.put(pictures(2)), arrays.new_stream()
        call = backbone.graphed(pixels, stream=stream)
        gpu_engines.assert_flat(cuda.open_memory(gpu), call, gpu_engines.many_calls(gpu))

        def once():
            backbone.graphed(pixels, stream=stream)()

        once()
        gpu_engines.assert_flat(cuda.open_memory(gpu), once, 100)


def test_a_call_inside_the_callers_own_capture_is_refused(tensorrt, arrays, gpu):
    images = pictures(2)
    with open_backbone(tensorrt, gpu) as backbone:
        pixels, stream = arrays.put(images), arrays.new_stream()
        handle = getattr(stream, "cuda_stream", stream)
        backbone(pixels, stream=stream)
        captures = pytest.raises(InputError, match="is being captured")
        with arrays.current(stream), cuda.open_memory(gpu) as memory, captures:
            memory.capture(handle, lambda: backbone(pixels, stream=stream))
        assert_pooled(backbone(pixels, stream=stream).feature_maps, images)


def test_many_streams_take_turns(tensorrt, arrays, gpu):
    """More streams than there are contexts that are kept: every one gets its own values."""
    with open_backbone(tensorrt, gpu) as backbone:
        work = [(arrays.new_stream(), pictures(1 + seed % 4, seed=seed)) for seed in range(12)]
        given = [(stream, arrays.put(images), images) for stream, images in work]
        for _ in range(3):
            for number, (stream, _, _) in enumerate(given):  # the streams come to their work in another order
                arrays.keep_busy(stream, 5 * (len(given) - number))
            kept = [(backbone(pixels, stream=stream).feature_maps, stream, images) for stream, pixels, images in given]
            for maps, stream, images in reversed(kept):
                assert_pooled([arrays.to_host(feature_map, stream) for feature_map in maps], images)


def test_a_plan_with_two_profiles(arrays, gpu):
    """Small and large batches in turn, which change the profile of a context or take another one."""
    small, large = (gpu_common.pooling_input(512, batch) for batch in ((1, 1, 1), (2, 8, 32)))
    plan = gpu_standin.plan_of(small, large)
    session = gpu_engines.open_plan(gpu_engines.STAND_IN, gpu, plan)
    with gpu_engines.backbone_of(session, gpu) as backbone:
        stream = arrays.new_stream()
        for batch in (1, 8, 1, 32, 2, 1, 33):
            images = pictures(batch)
            assert_pooled(backbone(images).feature_maps, images)
            maps = backbone(arrays.put(images), stream=stream).feature_maps
            assert_pooled([arrays.to_host(feature_map, stream) for feature_map in maps], images)


@pytest.mark.parametrize("memory", gpu_engines.each(gpu_engines.BACKENDS))
def test_many_calls_with_either_library(tensorrt, gpu, memory):
    images = pictures(2)
    with open_backbone(tensorrt, gpu, memory=memory) as backbone:
        gpu_engines.assert_flat(cuda.open_memory(gpu), lambda: backbone(images), gpu_engines.many_calls(gpu))


@pytest.mark.skipif(on_standin(), reason="the kernels of the stand-in driver are numpy, which allocates")
def test_no_host_memory_is_allocated_per_call(tensorrt, gpu):
    images = pictures(8, 512, 512)  # maps of 1.5 MB and 0.4 MB
    with open_backbone(tensorrt, gpu) as backbone:
        for _ in range(20):
            backbone(images)
        gc.collect()
        tracemalloc.start()
        try:
            for _ in range(5):
                backbone(images)
            before, _ = tracemalloc.get_traced_memory()
            tracemalloc.reset_peak()
            for _ in range(200):
                backbone(images)
            after, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    assert after - before < 4096
    assert peak - before < 64 << 10  # Python's own small objects, and no array


def test_a_damaged_plan(tensorrt, gpu):
    open_backbone(tensorrt, gpu).close()  # skips where this GPU is refused
    plan = gpu_engines.pooling_file(tensorrt, gpu)
    noise = np.random.default_rng(0).bytes(len(plan))
    for damaged in (b"", plan[: len(plan) // 2], noise):
        with pytest.raises(EngineMismatchError):
            gpu_engines.open_plan(tensorrt, gpu, damaged)


def test_a_shape_outside_every_profile_lists_all_three(tensorrt, gpu):
    three = r"min \(1, 3, 32, 32\), opt \(2, 3, 64, 64\), max \(32, 3, 512, 512\)"
    with contextlib.closing(gpu_engines.open_session(tensorrt, gpu)) as session, pytest.raises(InputError, match=three):
        session.run(np.zeros((2, 3, 1024, 64), np.float32))
