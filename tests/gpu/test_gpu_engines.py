"""Every kind of engine on a real GPU, over a backbone whose values are known: streams, threads, graphs, leaks, bad input."""

from __future__ import annotations

import contextlib
import gc
import tracemalloc
from concurrent.futures import ThreadPoolExecutor

import gpu_engines
import numpy as np
import pytest
from gpu_engines import assert_pooled, open_backbone, pictures

from edge_backbones.engines.gpu import memory as cuda
from edge_backbones.errors import InputError, OutOfMemoryError
from edge_backbones.machine import gpus

BUSY = 100_000_000  # clock cycles
TENSORRT = ("tensorrt", "tensorrt_rtx")


@pytest.fixture(params=gpu_engines.each(gpu_engines.KINDS))
def kind(request):
    return request.param


@pytest.fixture(params=gpu_engines.each(TENSORRT))
def tensorrt(request):
    return request.param


@pytest.fixture
def backbone(kind, gpu):
    with open_backbone(kind, gpu) as opened:
        yield opened


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
def test_arrays_on_the_gpu(backbone, torch, gpu, batch):
    images = pictures(batch)
    pixels = torch.from_numpy(images).to(f"cuda:{gpu}")
    maps = backbone(pixels).feature_maps
    for feature_map in maps:
        tensor = torch.from_dlpack(feature_map)
        assert tensor.data_ptr() == feature_map.pointer  # no copy
        assert tensor.is_cuda
    assert_pooled(maps, images)
    assert np.array_equal(pixels.cpu().numpy(), images)


class Wrapped:
    """A stream by protocol, as cuda.core has it."""

    def __init__(self, stream):
        self.stream = stream

    def __cuda_stream__(self):
        return 0, self.stream.cuda_stream


@pytest.mark.parametrize("as_given", [lambda s: s, lambda s: s.cuda_stream, Wrapped], ids=["torch", "int", "protocol"])
def test_a_call_is_in_the_order_of_its_stream(backbone, torch, gpu, as_given):
    """Input that comes late, and is overwritten right behind the call; output that another stream reads."""
    images, other = pictures(4, 256, 256), pictures(4, 256, 256, seed=1)
    place = torch.device("cuda", gpu)
    late, after = torch.from_numpy(images).to(place), torch.from_numpy(other).to(place)
    for _ in range(3):  # with graphs and buffers warm too
        pixels = torch.zeros_like(late)
        work, reading = torch.cuda.Stream(place), torch.cuda.Stream(place)
        torch.cuda.synchronize(place)
        with torch.cuda.stream(work):
            torch.cuda._sleep(BUSY)
            pixels.copy_(late)
            maps = backbone(pixels, stream=as_given(work)).feature_maps
            pixels.copy_(after)
        with torch.cuda.stream(reading):
            seen = [torch.from_dlpack(feature_map).clone() for feature_map in maps]
        reading.synchronize()
        assert_pooled([tensor.cpu().numpy() for tensor in seen], images)
        assert_pooled(maps, images)


def test_a_call_only_enqueues(backbone, torch, gpu):
    pixels = torch.from_numpy(pictures(2)).to(f"cuda:{gpu}")
    work = torch.cuda.Stream(gpu)
    for _ in range(5):
        backbone(pixels, stream=work)
    torch.cuda.synchronize(gpu)
    with torch.cuda.stream(work):
        torch.cuda._sleep(10 * BUSY)
        maps = backbone(pixels, stream=work).feature_maps
        done = torch.cuda.Event()
        done.record(work)
    assert not done.query()  # the call came back while the stream was still asleep
    assert_pooled(maps, pictures(2))


def test_the_default_stream(backbone, torch, gpu):
    images = pictures(4)
    late = torch.from_numpy(images).to(f"cuda:{gpu}")
    pixels = torch.zeros_like(late)
    torch.cuda.synchronize(gpu)
    torch.cuda._sleep(BUSY)
    pixels.copy_(late)
    maps = backbone(pixels).feature_maps
    pixels.zero_()
    assert_pooled(maps, images)


def test_threads_never_mix_outputs(backbone):
    def work(seed):
        images = pictures(1 + seed % 5, 64 + 8 * (seed % 3), 96, seed)
        for _ in range(40):
            assert_pooled(backbone(images).feature_maps, images)
        return True

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(16)))


def test_threads_with_streams_never_mix_outputs(backbone, torch, gpu):
    def work(seed):
        images = pictures(1 + seed % 5, seed=seed)
        stream = torch.cuda.Stream(gpu)
        with torch.cuda.stream(stream):
            pixels = torch.from_numpy(images).to(f"cuda:{gpu}")
            for _ in range(40):
                maps = backbone(pixels, stream=stream).feature_maps
                assert_pooled(maps, images)
        return True

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(16)))


def test_ten_thousand_calls_leave_nothing_behind(kind, gpu):
    memory = cuda.open_memory(gpu)
    images = pictures(2)
    with open_backbone(kind, gpu) as backbone:
        gpu_engines.assert_flat(memory, lambda: backbone(images), 10_000)


def test_ten_thousand_calls_on_the_gpu_leave_nothing_behind(backbone, torch, gpu):
    memory = cuda.open_memory(gpu)
    pixels = torch.from_numpy(pictures(2)).to(f"cuda:{gpu}")
    stream = torch.cuda.Stream(gpu)
    torch.cuda.synchronize(gpu)

    def once():
        for feature_map in backbone(pixels, stream=stream).feature_maps:
            torch.from_dlpack(feature_map)

    gpu_engines.assert_flat(memory, once, 10_000)


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


def test_out_of_memory_is_typed_and_the_process_lives(kind, torch, gpu):
    if gpu_engines.is_integrated(gpu):
        pytest.skip("this GPU has the memory of the system: taking all of it would end other processes")
    memory = cuda.open_memory(gpu)
    small, large = pictures(2), pictures(32, 512, 512)
    with open_backbone(kind, gpu) as backbone:
        if kind not in TENSORRT:  # a session of TensorRT has memory for its largest shape from the first call on
            backbone(small)
        torch.cuda.synchronize(gpu)
        torch.cuda.empty_cache()
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


def test_wrong_input(backbone, torch, gpu):
    place = f"cuda:{gpu}"
    good = pictures(2)
    for values in (good, torch.from_numpy(good).to(place)):
        with pytest.raises(InputError, match="does not fit"):
            backbone(values[:, :, :60])  # no multiple of 8
        with pytest.raises(InputError, match="does not fit"):
            backbone(values[:, :2])
        with pytest.raises(InputError, match="does not fit"):
            backbone(values[0])
        with pytest.raises(InputError):
            backbone(values[:0])
    pixels = torch.from_numpy(good).to(place)
    with pytest.raises(InputError, match="float16"):
        backbone(pixels.half())
    with pytest.raises(InputError, match="C order"):
        backbone(pixels.permute(0, 1, 3, 2))
    with pytest.raises(InputError, match="stream"):
        backbone(good, stream=torch.cuda.Stream(gpu))
    with pytest.raises(InputError):
        backbone(pixels, stream="a stream")
    assert_pooled(backbone(pixels).feature_maps, good)  # and goes on


def test_a_gpu_that_is_not_there(kind, gpu):
    from edge_backbones.errors import EngineMismatchError

    with pytest.raises(EngineMismatchError, match="smaller index"):
        gpu_engines.open_session(kind, len(gpus.find_gpus()), compiled_on=gpu)


def test_an_engine_on_the_cpu_names_the_way_out(torch, gpu):
    from edge_backbones import EdgeBackbone
    from edge_backbones.testing import SPEC, NumpySession, pooling_input

    backbone = EdgeBackbone(SPEC, pooling_input(), NumpySession(pooling_input()))
    with pytest.raises(InputError, match="device='cuda'"):
        backbone(torch.zeros(2, 3, 32, 48, device=f"cuda:{gpu}"))


def test_closed(kind, torch, gpu):
    images = pictures(2)
    pixels = torch.from_numpy(images).to(f"cuda:{gpu}")
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
def test_graphs_replay_what_a_plain_enqueue_gives(tensorrt, gpu, memory):
    shapes = [(1, 64, 64), (2, 64, 96), (32, 256, 128)]
    with (
        open_backbone(tensorrt, gpu, memory=memory) as plain,
        open_backbone(tensorrt, gpu, memory=memory, cuda_graphs=True) as replayed,
    ):
        for turn in range(4):  # the first call is plain, the second captures, later ones replay
            for shape in shapes:
                images = pictures(*shape, seed=turn)
                for actual, expected in zip(replayed(images).feature_maps, plain(images).feature_maps, strict=True):
                    assert np.array_equal(actual, expected)
                assert_pooled(replayed(images).feature_maps, images)
        assert replayed._engine.graph_refusals == {}


def test_graphs_on_the_gpu(tensorrt, torch, gpu):
    stream = torch.cuda.Stream(gpu)
    with open_backbone(tensorrt, gpu, cuda_graphs=True) as backbone, torch.cuda.stream(stream):
        kept = []
        for seed in range(12):
            images = pictures(2, seed=seed)
            maps = backbone(torch.from_numpy(images).to(f"cuda:{gpu}"), stream=stream).feature_maps
            kept.append((maps, images))  # more results than there are captured contexts
        for maps, images in kept:
            assert_pooled(maps, images)
        assert backbone._engine.graph_refusals == {}


def test_a_graphed_call_reads_and_writes_in_place(tensorrt, torch, gpu):
    """Frames written into one buffer, on the stream of the call; maps that are the same memory every time."""
    with open_backbone(tensorrt, gpu) as backbone:
        place, work = torch.device("cuda", gpu), torch.cuda.Stream(gpu)
        pixels = torch.zeros(pictures(2).shape, device=place)
        torch.cuda.synchronize(place)
        call = backbone.graphed(pixels, stream=work)
        for seed in range(20):
            images = pictures(2, seed=seed)
            frame = torch.from_numpy(images).to(place)
            torch.cuda.synchronize(place)
            with torch.cuda.stream(work):
                pixels.copy_(frame, non_blocking=True)
                maps = call().feature_maps
                seen = [torch.from_dlpack(feature_map).clone() for feature_map in maps]
            reading = torch.cuda.Stream(gpu)
            with torch.cuda.stream(reading):
                elsewhere = [torch.from_dlpack(feature_map).clone() for feature_map in maps]
            torch.cuda.synchronize(place)
            assert_pooled([tensor.cpu().numpy() for tensor in seen], images)
            assert_pooled([tensor.cpu().numpy() for tensor in elsewhere], images)
        with pytest.raises(InputError, match="a default stream cannot be captured"):
            backbone.graphed(pixels, stream=None)


def test_graphs_with_threads(tensorrt, gpu):
    with open_backbone(tensorrt, gpu, cuda_graphs=True) as backbone:

        def work(seed):
            images = pictures(1 + seed % 3, seed=seed)
            for _ in range(30):
                assert_pooled(backbone(images).feature_maps, images)
            return True

        with ThreadPoolExecutor(6) as pool:
            assert all(pool.map(work, range(12)))


@pytest.mark.parametrize("memory", gpu_engines.each(gpu_engines.BACKENDS))
@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_ten_thousand_calls_with_either_library(tensorrt, gpu, memory, cuda_graphs):
    images = pictures(2)
    with open_backbone(tensorrt, gpu, memory=memory, cuda_graphs=cuda_graphs) as backbone:
        gpu_engines.assert_flat(cuda.open_memory(gpu), lambda: backbone(images), 10_000)


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
    from benchmarks import gpu_common
    from edge_backbones.engines.tensorrt.session import TensorRtSession
    from edge_backbones.errors import EngineMismatchError
    from edge_backbones.testing import SPEC

    open_backbone(tensorrt, gpu).close()  # skips where this GPU is refused
    plan = gpu_engines.pooling_file(tensorrt, gpu)
    noise = np.random.default_rng(0).bytes(len(plan))
    for damaged in (b"", plan[: len(plan) // 2], noise):
        with pytest.raises(EngineMismatchError):
            TensorRtSession(
                bytearray(damaged),
                flavour=tensorrt,
                input=gpu_common.pooling_input(512),
                outputs=SPEC.outputs,
                gpu=gpu,
            )


def test_a_shape_outside_every_profile_lists_all_three(tensorrt, gpu):
    three = r"min \(1, 3, 32, 32\), opt \(2, 3, 64, 64\), max \(32, 3, 512, 512\)"
    with contextlib.closing(gpu_engines.open_session(tensorrt, gpu)) as session, pytest.raises(InputError, match=three):
        session.run(np.zeros((2, 3, 1024, 64), np.float32))
