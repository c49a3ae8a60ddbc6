"""The driver probe over a driver of our own, and both memory backends over libraries that keep CUDA's rules."""

from __future__ import annotations

import ctypes
import gc
import re
import subprocess
import sys
import threading
from types import ModuleType, SimpleNamespace

import pytest

from edge_backbones.engines.gpu import memory as cuda
from edge_backbones.errors import DeviceError, InputError, MissingDependencyError, OutOfMemoryError
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
        driver.cuGraphInstantiateWithFlags(1, 0)
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
        if name != "cuGraphInstantiateWithFlags":  # renamed in CUDA 12
            assert hasattr(bindings, name), name
    assert int(bindings.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED) == 2
    assert int(bindings.CUpointer_attribute.CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL) == 9
    assert not bindings.CUresult.CUDA_SUCCESS
    assert bindings.CUresult.CUDA_ERROR_OUT_OF_MEMORY
    assert int(bindings.CUresult.CUDA_ERROR_OUT_OF_MEMORY) == 2


class Library:
    """What pycuda.driver has of what we use, with its rules: a stack of contexts per thread, whatever else is current."""

    class Error(Exception):
        pass

    class MemoryError(Error):
        pass

    def __init__(self) -> None:
        self.stacks = threading.local()
        self.live: set[int] = set()
        self.contexts_made = 0
        self.fail: str | None = None
        library = self

        class Context:
            handle = 0

            def push(self):
                library.refuse("push")
                library.stack().append(self)

            def pop(self):
                library.refuse("pop")
                assert library.stack().pop() is self

        class Device:
            def __init__(self, index):
                library.refuse("device")
                self.index = index

            def retain_primary_context(self):
                library.contexts_made += 1
                return Context()

        class Allocation:
            def __init__(self, size):
                library.active()
                library.refuse("alloc")
                self.block = ctypes.create_string_buffer(size)
                self.pointer = ctypes.addressof(self.block)
                library.live.add(self.pointer)

            def __int__(self):
                return self.pointer

            def free(self):
                library.active()
                library.refuse("free")
                library.live.remove(self.pointer)

        class Stream:
            def __init__(self, flags):
                library.active()
                assert flags == 1  # CU_STREAM_NON_BLOCKING
                self.handle = 0x5000
                library.live.add(self.handle)

            def __del__(self):
                library.live.discard(self.handle)

        self.Device, self.mem_alloc, self.Stream = Device, Allocation, Stream

    def init(self):
        self.refuse("init")

    def stack(self):
        if not hasattr(self.stacks, "value"):
            self.stacks.value = []
        return self.stacks.value

    def active(self):
        assert self.stack(), "no currently active context"

    def refuse(self, what):
        if self.fail == what:
            raise (self.MemoryError if what == "alloc" else self.Error)(f"cu{what} failed: invalid")


def over_pycuda(**options) -> tuple[cuda.GpuMemory, Library, SimpleNamespace]:
    library, native = Library(), libcuda(**options)
    return cuda.GpuMemory(0, cuda.PyCuda(0, library, gpus.CtypesDriver(native))), library, native


def test_pycuda_works_in_the_primary_context_and_leaves_what_was_current():
    memory, library, _ = over_pycuda()
    assert library.contexts_made == 1
    assert library.stack() == []
    library.stack().append("another library's context")
    with memory:
        pointer, stream = memory.allocate(64), memory.new_stream()
        with memory:
            assert len(library.stack()) == 3
    assert library.stack() == ["another library's context"]
    assert library.live == {pointer, stream}

    def elsewhere():
        with memory:
            memory.free(pointer)
            memory.free_stream(stream)
        assert library.stack() == []

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    gc.collect()
    assert library.live == set()


@pytest.mark.parametrize(
    ("fail", "error", "message"),
    [
        (
            "alloc",
            OutOfMemoryError,
            r"cuda:0 has no 1.0 MB left \(mem_alloc of 1000000 bytes failed.*1.0 MB of 8.6 GB are free",
        ),
        ("push", DeviceError, "Context.push failed"),
        ("free", DeviceError, "DeviceAllocation.free failed"),
        ("pop", DeviceError, "Context.pop failed"),
    ],
)
def test_what_pycuda_raises_becomes_ours(fail, error, message):
    memory, library, _ = over_pycuda()
    with memory:
        pointer = memory.allocate(16)
    library.fail = fail
    with pytest.raises(error, match=message), memory:
        memory.allocate(1_000_000) if fail == "alloc" else memory.free(pointer)


def test_pycuda_that_cannot_start_is_a_device_error():
    library = Library()
    library.fail = "init"
    with pytest.raises(DeviceError, match=r"pycuda.driver.init failed: cuinit"):
        cuda.PyCuda(0, library, None)


def test_what_pycuda_lacks_goes_to_the_driver():
    memory, _, native = over_pycuda()
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
        ("cuCtxSynchronize", lambda m: m.wait_for_all()),
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
    ],
)
def test_every_return_of_the_driver_is_checked(symbol, use):
    memory, library, _ = over_pycuda(fails={symbol: 719})
    with pytest.raises(DeviceError, match="failed: CUDA_ERROR_LAUNCH_FAILED"), memory:
        use(memory)
    assert library.stack() == []


def test_a_pointer_that_cuda_does_not_know_has_no_device():
    assert over_pycuda()[0].elsewhere(0x1000) == ""
    assert over_pycuda(fails={"cuPointerGetAttribute": 1})[0].elsewhere(0x1000) == "host memory"


def test_streams_are_told_apart_by_their_number_where_cuda_has_one():
    memory, _, native = over_pycuda()
    assert memory.stream_key(0) == memory.stream_key(1) == 0
    assert memory.stream_key(0x5000) == 1 + 0x5000 + 7
    assert [symbol for symbol, _ in native.calls].count("cuStreamGetId") == 1
    before_cuda_12 = over_pycuda(missing=("cuStreamGetId",))[0]
    assert before_cuda_12.stream_key(0x5000) == 0x5000
    assert before_cuda_12.stream_key(2) == (2, threading.get_ident())


def test_a_capture_that_breaks_off_ends_the_capture():
    memory, _, native = over_pycuda()

    def broken():
        raise ZeroDivisionError

    with memory, pytest.raises(ZeroDivisionError):
        memory.capture(5, broken)
    assert [symbol for symbol, _ in native.calls][-2:] == ["cuStreamEndCapture", "cuGraphDestroy"]


def test_a_module_that_is_missing_is_named_with_its_command(monkeypatch):
    cuda._opened.cache_clear()
    for name in ("cuda", "cuda.bindings", "cuda.bindings.driver", "cuda.cuda", "pycuda", "pycuda.driver"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(
        MissingDependencyError, match=r"cuda-bindings is missing\): pip install 'cuda-bindings==12\.\*'"
    ):
        cuda.open_memory(0)
    with pytest.raises(MissingDependencyError, match=re.escape(pip_install("pycuda"))):
        cuda.open_memory(0, "pycuda")
    with pytest.raises(InputError, match="memory must be 'cuda-bindings' or 'pycuda', got 'cupy'"):
        cuda.open_memory(0, "cupy")


@pytest.mark.parametrize("module", ["cuda.bindings.driver", "cuda.cuda"])
def test_both_names_of_the_bindings_are_tried(monkeypatch, module):
    for name in ("cuda", "cuda.bindings", "cuda.bindings.driver", "cuda.cuda"):
        monkeypatch.setitem(sys.modules, name, None)
    parts = module.split(".")
    for i in range(1, len(parts) + 1):
        monkeypatch.setitem(sys.modules, ".".join(parts[:i]), ModuleType(".".join(parts[:i])))
    assert cuda._cuda_bindings() is sys.modules[module]


def test_pycuda_is_taken_where_the_bindings_are_not(monkeypatch):
    library, native = Library(), libcuda()
    monkeypatch.setattr(cuda, "_cuda_bindings", lambda: (_ for _ in ()).throw(MissingDependencyError("x", "tensorrt")))
    monkeypatch.setattr(cuda, "_pycuda", lambda: library)
    monkeypatch.setattr(gpus, "load_driver", lambda: native)
    cuda._opened.cache_clear()
    try:
        assert cuda.open_memory(0).backend == "pycuda"
        assert cuda.open_memory(0, "pycuda") is cuda.open_memory(0)
    finally:
        cuda._opened.cache_clear()


@pytest.mark.parametrize(("size", "text"), [(0, "0 bytes"), (999, "999 bytes"), (1500, "1.5 kB"), (10**9, "1.0 GB")])
def test_sizes_are_readable(size, text):
    assert cuda.readable(size) == text
