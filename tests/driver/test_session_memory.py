"""How much memory calls take, where it lies and how often it is copied: contexts, scratch memory, inputs and outputs."""

from __future__ import annotations

import ctypes
import threading
from collections import Counter

import msgspec
import numpy as np
import pytest

from edge_backbones.deploy.timing import time_engines
from edge_backbones.engines.gpu.arrays import DeviceArray
from edge_backbones.engines.gpu.dlpack import CUDA_HOST, ForeignArray, Rows, make_capsule
from edge_backbones.engines.gpu.pipelined import Pipeline
from edge_backbones.engines.tensorrt import contexts as contexts_module
from edge_backbones.engines.tensorrt import kernels as kernels_module
from edge_backbones.engines.tensorrt.contexts import IDLE_CONTEXTS
from edge_backbones.errors import DeviceError, EngineMismatchError, InputError, OutOfMemoryError
from edge_backbones.runtime.backbone import EdgeBackbone
from edge_backbones.spec import ShapeRange
from edge_backbones.testing import SPEC, pooled, pooling_input
from tests.driver.machine import DriverMachine
from tests.simulated_tensorrt import TENSORS, Context, NumpyTensorRt, plan_of, shapes

RANDOM = np.random.default_rng(0)
IMAGE = 3 * 32 * 48
MAPS = 3 * (8 * 12 + 4 * 6) * 4  # bytes of one image's


def pixels(batch: int, height: int = 32, width: int = 48) -> np.ndarray:
    return RANDOM.standard_normal((batch, 3, height, width)).astype(np.float32)


def check(machine: DriverMachine, maps, images, stream: int) -> None:
    for actual, expected in zip(maps, pooled(images), strict=True):
        np.testing.assert_array_equal(machine.gpu.value(actual, stream), expected)


# ---- contexts and scratch memory


def test_a_context_takes_scratch_memory_for_the_shape_that_it_runs(machine):
    scratch = 1000  # bytes for each value of the input
    session = machine.open(ShapeRange(min=1, opt=1, max=64), plan_of(shapes(1, 1, 64), scratch=scratch))
    session.run(pixels(1))
    assert machine.gpu.used() < 1.2 * scratch * IMAGE + 100_000
    session.run(pixels(4))
    assert machine.gpu.used() < 1.2 * 4 * scratch * IMAGE + 200_000  # one block, which has grown
    session.run(pixels(1))
    assert machine.gpu.used() < 1.2 * 4 * scratch * IMAGE + 200_000


def test_contexts_on_one_stream_share_scratch_memory_and_streams_do_not(machine):
    scratch = 1000
    session = machine.open(data=plan_of(shapes(1, 2, 4), scratch=scratch))
    inputs = [pixels(batch) for batch in (4, 1, 2, 3)]
    arrays = [machine.gpu.put(images) for images in inputs]
    put_there = sum(images.nbytes for images in inputs)
    for stream, blocks in ((machine.stream, 1), (machine.other, 2)):
        for _ in range(3):
            results = [session.run_on_device(array, stream) for array in arrays]
            for maps, images in zip(results, inputs, strict=True):
                check(machine, maps, images, stream)
            del results, maps
        used = machine.gpu.used() - put_there
        assert blocks * 4 * scratch * IMAGE <= used < blocks * 1.2 * 4 * scratch * IMAGE + 400_000
    assert machine.library.made == 8  # four shapes on two streams


def test_scratch_memory_is_not_shared_by_threads_on_one_stream(machine):
    """Two calls that are enqueued at once on one stream would mix their kernels."""
    session, inside, go_on = machine.open(), threading.Event(), threading.Event()
    execute, images = Context.execute_async_v3, pixels(2)
    array = machine.gpu.put(images)

    def slowly(context, stream):
        if not inside.is_set():
            inside.set()
            assert go_on.wait(10)
        return execute(context, stream)

    Context.execute_async_v3 = slowly
    found = []
    thread = threading.Thread(target=lambda: found.append(session.run_on_device(array, machine.stream)))
    thread.start()
    assert inside.wait(10)
    found.append(session.run_on_device(array, machine.stream))
    go_on.set()
    thread.join()
    for maps in found:
        check(machine, maps, images, machine.stream)
    pointers = {context.scratch[0] for context in machine.library.contexts}
    assert len(pointers) == 2


def test_batches_that_alternate_keep_a_context_each(machine):
    session = machine.open()
    arrays = [machine.gpu.put(pixels(batch)) for batch in (1, 4)]
    for number in range(20):
        if number == 4:
            machine.driver.reset()
        session.run_on_device(arrays[number % 2], machine.stream)
    assert machine.counted("set_input_shape") == machine.counted("set_tensor_address") == 0
    assert machine.library.made == 2


def test_many_shapes_take_turns_on_a_few_contexts(machine):
    batch = ShapeRange(min=1, opt=2, max=40)
    session = machine.open(batch)
    for count in [*range(1, 41)] * 2:
        images = pixels(count)
        check(machine, session.run_on_device(machine.gpu.put(images), machine.stream), images, machine.stream)
    assert machine.library.made == IDLE_CONTEXTS


def test_more_threads_than_contexts_wait_for_one(machine, monkeypatch):
    monkeypatch.setattr(contexts_module, "MOST_CONTEXTS", 2)
    session, results = machine.open(), {}
    inputs = [pixels(1 + number % 4) for number in range(24)]
    barrier = threading.Barrier(6)

    def calls(first: int) -> None:
        barrier.wait(10)
        for number in range(first, 24, 6):
            results[number] = session.run(inputs[number])

    threads = [threading.Thread(target=calls, args=(first,)) for first in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for number, images in enumerate(inputs):
        for actual, expected in zip(results[number], pooled(images), strict=True):
            np.testing.assert_array_equal(actual, expected)
    assert machine.library.live["context"] <= 2
    session.close()


def test_a_profile_gets_a_context_when_another_has_all(machine, monkeypatch):
    monkeypatch.setattr(contexts_module, "MOST_CONTEXTS", 1)
    session = machine.open(ShapeRange(min=1, opt=2, max=4), plan_of(shapes(1, 1, 1), shapes(2, 2, 4)))
    for batch in (1, 2, 1, 4):
        images = pixels(batch)
        for actual, expected in zip(session.run(images), pooled(images), strict=True):
            np.testing.assert_array_equal(actual, expected)
    assert machine.library.live["context"] == 1
    session.close()


# ---- outputs


def test_the_outputs_of_a_call_are_one_block_and_one_copy(machine):
    session, images = machine.open(), pixels(3)
    maps = session.run_on_device(machine.gpu.put(images), machine.stream)
    distance = maps[1].pointer - maps[0].pointer
    assert maps[0].nbytes <= distance < maps[0].nbytes + 256
    assert maps[1].pointer % 256 == 0
    machine.driver.reset()
    session.run(images)
    assert machine.counted("cuMemcpyDtoHAsync") == machine.counted("cuMemcpyHtoDAsync") == 1


@pytest.mark.parametrize("count", [1, 2, 9, 16])
def test_200_steady_calls_allocate_nothing(machine, count):
    session, array = machine.open(), machine.gpu.put(pixels(2))
    with machine.memory as memory:
        streams = [memory.new_stream() for _ in range(count)]
    machine.driver.set_eager(True)  # the GPU keeps up: events come back
    for number in range(400):
        if number == 200:
            machine.driver.reset()
        maps = session.run_on_device(array, streams[number % count])
        maps[0].__dlpack__(stream=machine.other)
        del maps
    made = Counter(machine.driver.log())
    for word in ("Alloc", "Create", "Synchronize", "Free"):
        assert [name for name in made if word in name] == []


HALVES = [["pool8", "OUTPUT", "HALF"], ["pixel_values", "INPUT", "FLOAT"], ["pool4", "OUTPUT", "HALF"]]


@pytest.mark.parametrize("count", [2, 9])
@pytest.mark.parametrize(("dtype", "last"), [("float16", False), ("float16", True), ("float32", True)])
def test_maps_in_other_formats_are_what_they_are_on_the_host_and_on_the_gpu(machine, dtype, last, count):
    spec = msgspec.structs.replace(SPEC, map_dtype=dtype, channels_last=last)
    input = pooling_input(ShapeRange(min=1, opt=2, max=4))
    plan = plan_of(shapes(1, 2, 4), channels_last=last, tensors=HALVES if dtype == "float16" else TENSORS)
    images = pixels(count)
    wanted = [feature_map.astype(dtype) for feature_map in pooled(images)]
    with EdgeBackbone(spec, input, machine.open(data=plan, spec=spec), device="cuda:0") as backbone:
        for actual, expected in zip(backbone(images).feature_maps, wanted, strict=True):
            assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape)
            np.testing.assert_array_equal(actual, expected)
            assert actual.transpose(0, 2, 3, 1).flags.c_contiguous == last
        array = device_array(machine, images)
        for actual, expected in zip(backbone(array, stream=machine.stream).feature_maps, wanted, strict=True):
            assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape)
            found = machine.gpu.value(actual, machine.stream)  # in the order of the memory
            moved = expected.transpose(0, 2, 3, 1) if last else expected
            np.testing.assert_array_equal(found.reshape(moved.shape), moved)
            strides = actual.__cuda_array_interface__["strides"]
            if last:
                _, channels, height, width = expected.shape
                in_elements = (height * width * channels, 1, width * channels, channels)
                assert strides == tuple(stride * expected.itemsize for stride in in_elements)
            else:
                assert strides is None
        del actual
    with pytest.raises(EngineMismatchError, match="the plan is not the one of this manifest"):
        machine.open(data=plan, spec=SPEC)


# ---- inputs


def at_pitch(machine: DriverMachine, images: np.ndarray, pitch: int, offset: int = 0) -> ForeignArray:
    """Images on the GPU whose rows begin ``pitch`` bytes apart."""
    row = images.shape[-1] * images.itemsize
    rows = images.size // images.shape[-1]
    array = machine.gpu.put(np.full(rows * pitch + offset, 0xEE, np.uint8))
    memory = machine.gpu.bytes_at(array.pointer, rows * pitch + offset)
    for number, line in enumerate(images.reshape(rows, -1)):
        start = offset + number * pitch
        memory[start : start + row] = line.tobytes()
    return ForeignArray(
        array.pointer + offset,
        images.shape,
        images.dtype,
        0,
        contiguous=False,
        owner=object(),
        rows=Rows(rows, row, pitch),
    )


@pytest.mark.parametrize("stream", [0, "own"])
@pytest.mark.parametrize("count", [1, 3, 9])
def test_rows_at_a_pitch_are_copied_on_the_gpu(machine, count, stream):
    stream, images = machine.handle(stream), pixels(count)
    session = machine.open()
    array = at_pitch(machine, images, 256, offset=64)
    check(machine, session.run_on_device(array, stream), images, stream)
    assert machine.counted("cuMemcpy2DAsync") == (3 if count == 9 else 1)  # one for each piece of the batch
    with pytest.raises(InputError, match=r"is not read in place: .* in C order"):
        session.graphed(array, machine.stream)


def test_an_input_buffer_saves_a_copy_on_the_host(machine, monkeypatch):
    session = machine.open()
    copied = []
    monkeypatch.setattr(np, "copyto", lambda to, array: copied.append(array.shape) or to.__setitem__(..., array))
    buffer = session.input_buffer((4, 3, 32, 48))
    assert (buffer.dtype, buffer.flags.c_contiguous, buffer.flags.writeable, buffer.any()) == ("f4", True, True, False)
    for count, part in ((4, buffer), (2, buffer[:2]), (2, buffer[1:3]), (1, buffer[3:])):
        images = pixels(count)
        part[:] = images
        for actual, expected in zip(session.run(part), pooled(images), strict=True):
            np.testing.assert_array_equal(actual, expected)
    assert copied == []
    for other in (pixels(2), buffer[:, :, ::-1].copy()):
        session.run(other)
    assert len(copied) == 2
    assert machine.counted("cuMemcpyHtoDAsync") == 6
    del buffer, part, actual
    session.close()
    assert machine.left_over() == {}


@pytest.mark.machine(integrated=1)
def test_an_integrated_gpu_reads_an_input_buffer_in_place(machine):
    session = machine.open()
    buffer = session.input_buffer((2, 3, 32, 48))
    for _ in range(3):
        buffer[:] = images = pixels(2)
        for actual, expected in zip(session.run(buffer), pooled(images), strict=True):
            np.testing.assert_array_equal(actual, expected)
    assert machine.counted("cuMemcpyHtoDAsync") == 0
    assert machine.counted("cuMemcpyDtoHAsync") == 3
    for given in (buffer[1:], pixels(1)):  # another array is copied once, on the host
        for actual, expected in zip(session.run(given), pooled(given), strict=True):
            np.testing.assert_array_equal(actual, expected)
    assert machine.counted("cuMemcpyHtoDAsync") == 0
    crooked = session.input_buffer((1, 3, 32, 49))[:].reshape(-1)[1 : 1 + IMAGE].reshape(1, 3, 32, 48)
    crooked[:] = images = pixels(1)  # at no multiple of 256: it is copied to the GPU
    for actual, expected in zip(session.run(crooked), pooled(images), strict=True):
        np.testing.assert_array_equal(actual, expected)
    assert machine.counted("cuMemcpyHtoDAsync") == 1


def test_page_locked_memory_of_another_library_is_read_without_a_copy(machine, monkeypatch):
    """That of cuda-bindings itself here, through DLPack, where it is memory of the CPU."""
    session, images = machine.open(), pixels(2)
    monkeypatch.setattr(np, "copyto", lambda *_: pytest.fail("copied"))
    with machine.memory as memory:
        block = memory.pinned(images.nbytes)

    class Pinned:
        def __dlpack_device__(self) -> tuple[int, int]:
            return CUDA_HOST, 0

        def __dlpack__(self, **_) -> object:
            address, device = ctypes.addressof(block), self.__dlpack_device__()
            return make_capsule(address, images.shape, images.dtype, block, device=device, versioned=True)

    np.frombuffer(block, np.float32).reshape(images.shape)[:] = images
    with EdgeBackbone(SPEC, pooling_input(ShapeRange(min=1, opt=2, max=4)), session, device="cuda:0") as backbone:
        for actual, expected in zip(backbone(Pinned()).feature_maps, pooled(images), strict=True):
            np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize("integrated", [0, 1])
def test_a_graphed_call_on_the_host_has_its_copies_in_the_graph(driver, integrated):
    machine = DriverMachine(driver)
    session = machine.open()
    session._contexts._engine.reads_host_memory = bool(integrated)
    buffer = session.input_buffer((2, 3, 32, 48))
    call = session.graphed_on_host(buffer)
    first = call.outputs
    for _ in range(3):
        buffer[:] = images = pixels(2)
        driver.reset()
        maps = call()
        assert maps is first
        made = Counter(driver.log())
        assert made == dict.fromkeys(("cuCtxPushCurrent", "cuGraphLaunch", "cuStreamSynchronize", "cuCtxPopCurrent"), 1)
        for actual, expected in zip(maps, pooled(images), strict=True):
            np.testing.assert_array_equal(actual, expected)
    for wrong in (pixels(2), buffer[:, ::2]):
        with pytest.raises(InputError, match=r"cannot be recorded: fill an array of backbone.input_buffer\(batch\)"):
            session.graphed_on_host(wrong)
    session.close()
    with pytest.raises(InputError, match="was closed"):
        call()
    for actual, expected in zip(first, pooled(images), strict=True):
        np.testing.assert_array_equal(actual, expected)
    del call, first, maps, buffer, wrong, actual
    assert machine.left_over() == {}


def test_a_backbone_gives_input_buffers_and_records_calls_on_them(machine):
    session, input = machine.open(), pooling_input(ShapeRange(min=1, opt=2, max=4))
    with EdgeBackbone(SPEC, input, session, device="cuda:0") as backbone:
        assert backbone.input_buffer().shape == (2, 3, 32, 48)
        buffer = backbone.input_buffer(3)
        buffer[:] = images = pixels(3)
        call = backbone.graphed(buffer)
        for actual, expected in zip(call().feature_maps, pooled(images), strict=True):
            np.testing.assert_array_equal(actual, expected)
        for actual, expected in zip(backbone(buffer).feature_maps, pooled(images), strict=True):
            np.testing.assert_array_equal(actual, expected)
        assert machine.counted("cuMemcpyHtoDAsync") == 3  # a run, a capture and a call
        with pytest.raises(InputError, match=r"shape \(3, 3, 64, 48\) does not fit"):
            backbone.input_buffer(3, height=64)


def test_a_stream_of_cuda_core_is_taken(machine):
    from cuda.core import Device

    session, images = machine.open(), pixels(2)
    Device(0).set_current()
    stream = Device(0).create_stream()
    with EdgeBackbone(SPEC, pooling_input(ShapeRange(min=1, opt=2, max=4)), session, device="cuda:0") as backbone:
        maps = backbone(device_array(machine, images), stream=stream).feature_maps
        stream.sync()
        for actual, expected in zip(maps, pooled(images), strict=True):
            assert actual.stream == int(stream.handle)
            found = bytes(machine.gpu.bytes_at(actual.pointer, actual.nbytes))  # without another wait
            np.testing.assert_array_equal(np.frombuffer(found, np.float32).reshape(actual.shape), expected)


# ---- frames in flight


def test_frames_in_flight_share_a_few_contexts_and_their_memory(machine):
    session, input = machine.open(), pooling_input(ShapeRange(min=1, opt=2, max=4))
    frames = [pixels(2) for _ in range(60)]
    with EdgeBackbone(SPEC, input, session, device="cuda:0") as backbone:
        for output, frame in zip(backbone.map(frames, in_flight=3), frames, strict=True):
            for actual, expected in zip(output.feature_maps, pooled(frame), strict=True):
                np.testing.assert_array_equal(actual, expected)
            del output, actual
        made = Counter(machine.driver.log())
        assert made["create_execution_context"] == made["cuStreamCreate"] == machine.library.made <= 3
        assert made["cuMemAlloc"] <= 3 * 3  # input, outputs and scratch memory of each
        assert made["cuStreamSynchronize"] == 60  # each call waits for itself, in a thread of its own
        arrays = [device_array(machine, frame) for frame in frames[:5]]
        for output, frame in zip(backbone.map(arrays, stream=machine.stream), frames, strict=False):
            check(machine, output.feature_maps, frame, machine.stream)
    assert machine.library.live["context"] == 0


def device_array(machine: DriverMachine, frame: np.ndarray) -> DeviceArray:
    array = machine.gpu.put(frame)
    return DeviceArray(array.pointer, array.shape, array.dtype, device=0, owner=None, synchronize=None)


# ---- timing


@pytest.mark.parametrize("backend", ["cuda-bindings", "pycuda"])
def test_engines_are_timed_on_the_gpu_without_copies(driver, backend):
    machine = DriverMachine(driver, backend)
    session, images = machine.open(), pixels(2)
    before = machine.left_over()
    with Pipeline(session, images, 0) as pipeline:
        for _ in range(3):
            driver.reset()
            assert pipeline.milliseconds() > 0
            assert driver.calls("execute_async_v3") == 20
            assert driver.calls("cuStreamSynchronize") == 1
            assert [name for name in driver.log() if "HtoD" in name or "DtoH" in name] == []
    times = time_engines([machine.open, machine.open], pooling_input(ShapeRange(min=1, opt=2, max=4)), gpu=0)
    assert all(one.pipelined > 0 and one.call > 0 for one in times)
    session.close()
    assert {name: machine.left_over().get(name, 0) for name in before} == dict.fromkeys(before, 0)
    assert machine.left_over() == {}


def test_an_input_that_does_not_fit_leaves_nothing_behind(machine):
    session, images = machine.open(), pixels(2)
    machine.gpu.size = machine.gpu.used() + 1000
    with pytest.raises(OutOfMemoryError), Pipeline(session, images, 0):
        pytest.fail("it fitted")
    machine.gpu.size = 1 << 30
    machine.driver.fail_at("cuStreamCreate", 1, 719)
    with pytest.raises(DeviceError), Pipeline(session, images, 0):
        pytest.fail("it has a stream")
    session.close()
    assert machine.left_over() == {}


# ---- kernels that TensorRT-RTX compiles


@pytest.mark.machine(version=13000)
def test_kernels_of_rtx_are_kept_for_the_next_process(machine, tmp_path, monkeypatch):
    monkeypatch.setattr(kernels_module.runtime_cache, "default_cache", lambda: tmp_path)
    images = pixels(2)
    for number in range(3):
        machine.library = NumpyTensorRt(machine.gpu, rtx=True)
        session = machine.open(flavour="tensorrt_rtx")
        for actual, expected in zip(session.run(images), pooled(images), strict=True):
            np.testing.assert_array_equal(actual, expected)
        session.close()
        assert machine.library.compiled == ({"(2, 3, 32, 48)": 1} if number == 0 else {})
    (file,) = tmp_path.rglob("*.rtxcache")
    file.write_bytes(b"damaged")
    machine.library = NumpyTensorRt(machine.gpu, rtx=True)
    session = machine.open(flavour="tensorrt_rtx")
    with pytest.warns(RuntimeWarning, match=r"was deleted: it is damaged. TensorRT-RTX compiles its kernels again"):
        session.run(images)
    assert machine.library.compiled == {"(2, 3, 32, 48)": 1}
    assert file.read_bytes() != b"damaged"  # written after the first call, since a robot is switched off and not closed
    session.close()
