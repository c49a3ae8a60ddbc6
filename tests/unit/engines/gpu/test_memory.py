"""The driver probe over a driver of our own, and the memory over it."""

from __future__ import annotations

import re
import subprocess
import sys
from types import ModuleType, SimpleNamespace

import pytest

from edge_backbones.engines.gpu import memory as cuda
from edge_backbones.errors import DeviceError, InputError, MissingDependencyError
from edge_backbones.installation import pip_install
from edge_backbones.machine import gpus

NAMES = {2: b"CUDA_ERROR_OUT_OF_MEMORY", 100: b"CUDA_ERROR_NO_DEVICE", 719: b"CUDA_ERROR_LAUNCH_FAILED"}


def libcuda(devices=1, *, fails=None, missing=()) -> SimpleNamespace:
    """A libcuda whose functions have C's signatures. ``fails``: codes by symbol."""
    fails = fails or {}
    attributes = {16: 132, 18: 0, 75: 9, 76: 0}
    calls: list[tuple] = []

    def returning(*values):
        def function(*arguments):
            for argument, value in zip(arguments, values, strict=False):
                argument._obj.value = value

        return function

    def name(buffer, size, device):
        buffer.value = f"Fake GPU {device}".encode()[: size - 1]

    def error_name(code, into):
        if code not in NAMES:
            return 1
        into._obj.value = NAMES[code]
        return 0

    def bus_address(into, size, device):
        into.value = f"0000:{device + 1:02x}:00.0".encode()

    def attribute(into, number, device):
        into._obj.value = attributes[number]

    def device(into, ordinal):
        into._obj.value = ordinal

    def end_capture(stream, into):
        into._obj.value = 0xA0

    def stream_id(stream, into):  # the handle comes first, unlike elsewhere
        into._obj.value = stream + 7

    functions = {
        "cuInit": returning(),
        "cuDriverGetVersion": returning(12090),
        "cuDeviceGetCount": returning(devices),
        "cuDeviceGet": device,
        "cuDeviceGetName": name,
        "cuDeviceGetPCIBusId": bus_address,
        "cuDeviceGetAttribute": attribute,
        "cuDeviceTotalMem_v2": returning(80 << 30),
        "cuMemGetInfo_v2": returning(1 << 20, 8 << 30),
        "cuStreamEndCapture": end_capture,
        "cuStreamGetId": stream_id,
        "cuGraphInstantiateWithFlags": returning(0xB0),
        "cuEventCreate": returning(0xE0),
        "cuThreadExchangeStreamCaptureMode": returning(0),
    }

    def make(symbol):
        def call(*arguments):
            calls.append((symbol, arguments))
            if symbol in fails:
                return fails[symbol]
            functions.get(symbol, lambda *_: None)(*arguments)
            return 0

        return call

    symbols = [*functions, *(prototype[0] for prototype in gpus._PROTOTYPES.values())]
    library = SimpleNamespace(**{symbol: make(symbol) for symbol in symbols if symbol not in missing})
    library.cuGetErrorName = error_name
    library.calls = calls
    return library


def test_gpus_are_described_through_the_driver_alone():
    first, second = gpus.find_gpus(lambda: libcuda(2))
    assert first == gpus.Gpu(
        index=0,
        name="Fake GPU 0",
        architecture="sm_90",
        memory_bytes=80 << 30,
        driver="12.9",
        multiprocessors=132,
        integrated=False,
        bus_address="0000:01:00.0",
    )
    assert (second.index, second.name, second.bus_address) == (1, "Fake GPU 1", "0000:02:00.0")
    assert gpus.no_gpu_reason(lambda: libcuda(2)) == ""


def refusing(message):
    def load():
        raise OSError(message)

    return load


@pytest.mark.parametrize(
    ("load", "reason"),
    [
        (
            refusing("libcuda.so.1: cannot open shared object file: No such file or directory"),
            f"no NVIDIA driver ({gpus._LIBRARY} is missing)",
        ),
        (
            refusing("libcuda.so.1: undefined symbol: x"),
            f"no NVIDIA driver ({gpus._LIBRARY} cannot be loaded: libcuda.so.1: undefined symbol: x)",
        ),
        (lambda: libcuda(fails={"cuInit": 100}), "driver present, cuInit failed: CUDA_ERROR_NO_DEVICE"),
        (lambda: libcuda(fails={"cuInit": 803}), "driver present, cuInit failed: CUDA error 803"),
        (
            lambda: libcuda(fails={"cuInit": 3}),
            "driver present, and this process was forked from one that uses CUDA, which cannot be used here: start workers "
            "with the 'spawn' method",
        ),
        (
            lambda: libcuda(fails={"cuDeviceGetCount": 719}),
            "driver present, cuDeviceGetCount failed: CUDA_ERROR_LAUNCH_FAILED",
        ),
        (lambda: libcuda(0), "driver present, no GPU is visible to this process (CUDA_VISIBLE_DEVICES?)"),
    ],
)
def test_no_gpu_has_a_reason(monkeypatch, load, reason):
    monkeypatch.setattr(gpus, "kernel_has_driver", lambda: False)
    assert gpus.no_gpu_reason(load) == reason
    assert gpus.find_gpus(load) == ()


def test_a_container_that_did_not_ask_for_the_gpu_is_told(monkeypatch):
    monkeypatch.setattr(gpus, "kernel_has_driver", lambda: True)
    reason = gpus.no_gpu_reason(refusing("libcuda.so.1: cannot open shared object file: No such file or directory"))
    assert "is missing; the kernel has the driver, which a container sees with docker run --runtime nvidia" in reason


@pytest.mark.parametrize(
    "symbol", ["cuDeviceGet", "cuDeviceGetName", "cuDeviceTotalMem_v2", "cuDeviceGetAttribute", "cuDriverGetVersion"]
)
def test_a_gpu_that_is_counted_and_not_described_is_an_error(symbol):
    with pytest.raises(DeviceError, match=r"cuD\w+.* failed: CUDA_ERROR_LAUNCH_FAILED"):
        gpus.find_gpus(lambda: libcuda(fails={symbol: 719}))


def test_the_probe_of_this_machine_answers_and_imports_no_library_of_cuda():
    code = (
        "import sys; from edge_backbones.machine import gpus; print(bool(gpus.find_gpus()) == (gpus.no_gpu_reason() == ''));"
        "print(not {'cuda', 'pycuda', 'tensorrt'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == ["True", "True"], done.stderr


def test_a_function_that_the_driver_lacks_is_named():
    driver = gpus.CtypesDriver(libcuda(missing=("cuGraphInstantiateWithFlags",)))
    with pytest.raises(DeviceError, match="the NVIDIA driver has no cuGraphInstantiateWithFlags: update the driver"):
        driver.cuGraphInstantiate(1, 0)
    with pytest.raises(AttributeError):
        driver.cuNothing  # noqa: B018


def test_functions_return_code_and_values_as_the_bindings_do():
    driver = gpus.CtypesDriver(libcuda())
    assert driver.cuInit(0) == (0,)
    assert driver.cuMemGetInfo() == (0, 1 << 20, 8 << 30)
    assert driver.cuEventCreate(2) == (0, 0xE0)
    assert driver.cuStreamEndCapture(5) == (0, 0xA0)
    assert driver.cuPointerGetAttribute(9, 0x1000) == (0, 0)


def test_every_function_that_is_used_is_one_of_cuda_bindings():
    from cuda.bindings import driver as bindings

    for name in gpus._PROTOTYPES:
        assert hasattr(bindings, name), name
    assert int(bindings.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED) == 2
    assert int(bindings.CUpointer_attribute.CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL) == 9
    assert not bindings.CUresult.CUDA_SUCCESS
    assert bindings.CUresult.CUDA_ERROR_OUT_OF_MEMORY
    assert int(bindings.CUresult.CUDA_ERROR_OUT_OF_MEMORY) == 2


def over(native=None, **options) -> tuple[cuda.GpuMemory, SimpleNamespace]:
    """Memory over a libcuda, through ctypes."""
    native = native or libcuda(**options)
    return cuda.GpuMemory(0, gpus.CtypesDriver(native)), native


def test_an_old_driver_is_told():
    old = libcuda()
    old.cuDriverGetVersion = lambda into: setattr(into._obj, "value", 11040) or 0
    with pytest.raises(DeviceError, match="serves CUDA 11, and 12 is needed: update the driver"):
        over(old)


def test_the_context_is_current_inside_the_block_alone():
    memory, native = over()
    native.calls.clear()
    with memory, memory:
        pass
    pushed = ["cuCtxPushCurrent_v2", "cuCtxPopCurrent_v2"]
    assert [symbol for symbol, _ in native.calls] == [pushed[0], *pushed, pushed[1]]


@pytest.mark.parametrize(("fails", "is_put_back"), [({}, True), ({"cuThreadExchangeStreamCaptureMode": 719}, False)])
def test_a_call_aside_is_made_in_the_relaxed_mode_if_there_is_one(fails, is_put_back):
    memory, native = over(fails=fails)
    native.calls.clear()
    memory.free(0x100)
    exchange = ["cuThreadExchangeStreamCaptureMode"]
    assert [symbol for symbol, _ in native.calls] == exchange + ["cuMemFree_v2"] + exchange * is_put_back


def test_a_capture_is_what_cuda_is_asked_for():
    memory, native = over()
    with memory:
        memory.copy_in(0x100, 0x200, 8, 0x5000)
        memory.record(0xE0, 0)
        graph = memory.capture(0x5000, lambda: memory.clear(0x100, 8, 0x5000))
        memory.launch(graph, 0x5000)
        symbols = [symbol for symbol, _ in native.calls]
    assert symbols[-7:] == [
        "cuEventRecord",
        "cuStreamBeginCapture_v2",
        "cuMemsetD8Async",
        "cuStreamEndCapture",
        "cuGraphInstantiateWithFlags",
        "cuGraphDestroy",
        "cuGraphLaunch",
    ]
    assert graph == 0xB0


@pytest.mark.parametrize(
    ("symbol", "use"),
    [
        ("cuMemcpyHtoDAsync_v2", lambda m: m.copy_in(1, 2, 3, 4)),
        ("cuMemcpyDtoHAsync_v2", lambda m: m.copy_out(1, 2, 3, 4)),
        ("cuMemcpyDtoDAsync_v2", lambda m: m.copy(1, 2, 3, 4)),
        ("cuMemsetD8Async", lambda m: m.clear(1, 2, 3)),
        ("cuStreamSynchronize", lambda m: m.wait(1)),
        ("cuStreamGetId", lambda m: m.stream_key(5)),
        ("cuEventCreate", lambda m: m.new_event()),
        ("cuEventRecord", lambda m: m.record(1, 2)),
        ("cuEventSynchronize", lambda m: m.wait_for(1)),
        ("cuEventDestroy_v2", lambda m: m.free_event(1)),
        ("cuStreamWaitEvent", lambda m: m.follow(1, 2)),
        ("cuStreamBeginCapture_v2", lambda m: m.capture(5, lambda: None)),
        ("cuStreamEndCapture", lambda m: m.capture(5, lambda: None)),
        ("cuGraphInstantiateWithFlags", lambda m: m.capture(5, lambda: None)),
        ("cuGraphLaunch", lambda m: m.launch(1, 2)),
        ("cuGraphExecDestroy", lambda m: m.free_graph(1)),
        ("cuMemHostAlloc", lambda m: m.pinned(24)),
        ("cuMemAlloc_v2", lambda m: m.allocate(24)),
        ("cuMemFree_v2", lambda m: m.free(24)),
        ("cuStreamCreate", lambda m: m.new_stream()),
        ("cuStreamDestroy_v2", lambda m: m.free_stream(24)),
    ],
)
def test_every_return_of_the_driver_is_checked(symbol, use):
    memory, native = over(fails={symbol: 719})
    with pytest.raises(DeviceError, match="failed: CUDA_ERROR_LAUNCH_FAILED"), memory:
        use(memory)
    assert native.calls[-1][0] == "cuCtxPopCurrent_v2"


def test_a_pointer_that_cuda_does_not_know_has_no_device():
    assert over()[0].elsewhere(0x1000) == ""
    assert over(fails={"cuPointerGetAttribute": 1})[0].elsewhere(0x1000) == "host memory"


def test_streams_are_told_apart_by_their_number():
    memory, native = over()
    assert memory.stream_key(0) == memory.stream_key(1) == 0
    assert memory.stream_key(0x5000) == 1 + 0x5000 + 7
    assert [symbol for symbol, _ in native.calls].count("cuStreamGetId") == 1


def test_a_capture_that_breaks_off_ends_the_capture():
    memory, native = over()

    def broken():
        raise ZeroDivisionError

    with memory, pytest.raises(ZeroDivisionError):
        memory.capture(5, broken)
    assert [symbol for symbol, _ in native.calls][-3:-1] == ["cuStreamEndCapture", "cuGraphDestroy"]


def test_a_module_that_is_missing_is_named_with_its_command(monkeypatch):
    cuda._opened.cache_clear()
    for name in ("cuda", "cuda.bindings", "cuda.bindings.driver", "pycuda", "pycuda.driver"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(
        MissingDependencyError, match=r"cuda-bindings is missing\): pip install 'cuda-bindings==12\.\*'"
    ):
        cuda.open_memory(0)
    with pytest.raises(MissingDependencyError, match=re.escape(pip_install("pycuda"))):
        cuda.open_memory(0, "pycuda")
    with pytest.raises(InputError, match="memory must be 'cuda-bindings' or 'pycuda', got 'cupy'"):
        cuda.open_memory(0, "cupy")


def test_pycuda_is_taken_where_the_bindings_are_not(monkeypatch):
    monkeypatch.setattr(cuda, "_cuda_bindings", lambda: (_ for _ in ()).throw(MissingDependencyError("x", "tensorrt")))
    for name in ("pycuda", "pycuda.driver"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setattr(gpus, "load_driver", libcuda)
    cuda._opened.cache_clear()
    try:
        assert cuda.open_memory(0).backend == "pycuda"
        assert cuda.open_memory(0, "pycuda") is cuda.open_memory(0)
    finally:
        cuda._opened.cache_clear()


@pytest.mark.parametrize(("size", "text"), [(0, "0 bytes"), (999, "999 bytes"), (1500, "1.5 kB"), (10**9, "1.0 GB")])
def test_sizes_are_readable(size, text):
    assert cuda.readable(size) == text
