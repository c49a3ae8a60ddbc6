"""What the GPU tests share: which libraries are here, and the pooling backbone as an engine of every kind."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks import gpu_common, gpu_standin, gpu_tasks
from benchmarks.gpu_kernels import on_standin
from benchmarks.gpu_needs import is_installed
from edge_backbones.engines.gpu import memory as cuda
from edge_backbones.machine import gpus

ROOT = Path(__file__).parents[2]
STAND_IN = gpu_standin.NAME
# Those whose session is TensorRtSession. The stand-in takes TensorRT's place, so that it is tested without TensorRT too.
TENSORRT = (STAND_IN, *gpu_common.TENSORRT)
KINDS = ("torchscript", *TENSORRT, "torch_tensorrt")
BACKENDS = ("cuda-bindings", "pycuda")
_NEEDS = {
    "cuda-bindings": ("cuda.bindings.driver",),
    "pycuda": ("pycuda.driver",),
    "torchscript": ("torch", "msgspec"),
    "torch_tensorrt": ("torch_tensorrt", "torch", "msgspec"),
    STAND_IN: ("msgspec",),
    "tensorrt": ("tensorrt", "msgspec"),
    "tensorrt_rtx": ("tensorrt_rtx_bindings", "msgspec"),
}


def missing(*names: str) -> str:
    """Which of these libraries (or of what a kind of engine needs) is not installed, as a phrase; empty if none."""
    for module in (module for name in names for module in _NEEDS.get(name, (name,))):
        if not is_installed(module):
            return f"{module.split('.')[0]} is not installed"
        if module == "torch" and gpu_common.why_no_torch():
            return gpu_common.why_no_torch()
        if on_standin() and module in ("cupy", "tensorrt", "tensorrt_rtx_bindings"):
            return f"the driver is a stand-in, which {module} cannot use"
    return ""


def needs(*names: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(bool(missing(*names)), reason=missing(*names) or "everything is there")


def each(names: tuple[str, ...]) -> list:
    """Parameters: those that are installed, and the others as skipped with the reason."""
    return [pytest.param(name, marks=needs(name)) for name in names]


@functools.cache
def rtx_refusal(device: int) -> str:
    """What TensorRT-RTX says against this GPU; empty when it takes it."""
    return gpu_tasks.rtx_refusal(next(gpu_tasks.rtx_answer(device)))


@functools.cache
def pooling_file(kind: str, device: int) -> bytes:
    """The pooling backbone as a plan or a TorchScript file."""
    from edge_backbones.spec import Precision

    input = gpu_common.pooling_input(512)
    if kind == STAND_IN:
        return gpu_standin.plan_of(input)
    if kind == "torchscript":
        from edge_backbones.toolchain.trace import trace_torchscript

        return trace_torchscript(gpu_common.pooling_module(), input, Precision.FP32)
    if kind == "torch_tensorrt":
        from edge_backbones.toolchain.torch_tensorrt import compile_torch_tensorrt

        return compile_torch_tensorrt(gpu_common.pooling_module(), input, device=f"cuda:{device}")
    from edge_backbones.engines.tensorrt.compile import compile_plan

    return compile_plan(gpu_common.pooling_onnx(), input, Precision.FP32, flavour=kind, gpu=device).data


def open_session(kind: str, device: int, *, compiled_on: int | None = None, **options):
    """A session of the pooling backbone: 1 to 32 images of 32 to 512 pixels in steps of 8."""
    from edge_backbones.testing import SPEC

    home = device if compiled_on is None else compiled_on
    if kind == "tensorrt_rtx" and rtx_refusal(home):
        pytest.skip(rtx_refusal(home))
    input = gpu_common.pooling_input(512)
    data = pooling_file(kind, home)
    if kind in TENSORRT:
        return open_plan(kind, device, data, **options)
    from edge_backbones.engines.torch.session import TorchScriptSession

    return TorchScriptSession(data, input=input, outputs=SPEC.outputs, device=f"cuda:{device}", **options)


def open_plan(kind: str, device: int, data: bytes, **options):
    """A session of a plan of the pooling backbone."""
    from edge_backbones.engines.tensorrt.session import TensorRtSession
    from edge_backbones.testing import SPEC

    options.setdefault("input", gpu_common.pooling_input(512))
    flavour, place = kind, contextlib.nullcontext()
    if kind == STAND_IN:
        flavour, place = "tensorrt", gpu_standin.in_place_of_tensorrt()
        gpu_standin.check_turns(True)
    with place:
        return TensorRtSession(bytearray(data), flavour=flavour, outputs=SPEC.outputs, gpu=device, **options)


def open_backbone(kind: str, device: int, **options):
    return backbone_of(open_session(kind, device, **options), device)


def backbone_of(session, device: int):
    """An EdgeBackbone over a session of the pooling backbone."""
    from edge_backbones import EdgeBackbone
    from edge_backbones.testing import SPEC

    return EdgeBackbone(SPEC, gpu_common.pooling_input(512), session, device=f"cuda:{device}")


def pictures(batch: int, height: int = 64, width: int = 96, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random((batch, 3, height, width), np.float32)


def assert_pooled(maps, images: np.ndarray) -> None:
    """Numpy maps, or DeviceArrays, are those of the pooling backbone."""
    from edge_backbones.testing import pooled

    for actual, expected in zip(maps, pooled(images), strict=True):
        if not isinstance(actual, np.ndarray):
            actual = to_host(actual)
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)


def to_host(array, stream: int = 0) -> np.ndarray:
    """A copy of an array on a GPU that is in C order, made on ``stream`` once the array is there."""
    from edge_backbones.engines.gpu.arrays import from_foreign

    found = from_foreign(array, stream=stream or 1)
    values = np.empty(found.shape, found.dtype)
    with cuda.open_memory(array.device if isinstance(array.device, int) else array.device.index) as memory:
        memory.copy_out(values.ctypes.data, found.pointer, values.nbytes, stream)
        memory.wait(stream)
    return values


class Context:
    """Calls of the driver that the package has no use for."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL("libcuda.so.1")

    def current(self) -> int:
        handle = ctypes.c_void_p()
        assert self._library.cuCtxGetCurrent(ctypes.byref(handle)) == 0
        return handle.value or 0


def wait_for_all() -> None:
    """Wait for every stream of the context that is current."""
    assert gpus.load_driver().cuCtxSynchronize() == 0


def free_bytes(memory: cuda.GpuMemory) -> int:
    """Device memory that nobody has, of any process, once the GPU is idle."""
    gc.collect()
    driver = gpus.CtypesDriver(gpus.load_driver())
    with memory:
        wait_for_all()
        code, free, _ = driver.cuMemGetInfo()
    assert code == 0
    return free


def resident_bytes() -> int:
    """Memory of this process that is in RAM."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * 4096


def device_slack(integrated: bool) -> int:
    """How much less device memory may be free afterwards though nothing leaked.

    On a Jetson, what the driver counts is the memory of the system: other processes and the page cache move it too.
    """
    return 64 << 20 if integrated else 2 << 20


def is_integrated(gpu: int) -> bool:
    return gpus.find_gpus()[gpu].integrated


def many_calls(gpu: int) -> int:
    """How many calls a leak is looked for in. A Jetson, and kernels in numpy, take many times as long for each."""
    return 1_000 if is_integrated(gpu) or on_standin() else 10_000


def many_threads(gpu: int) -> int:
    """How many threads call one engine. Each takes memory for the largest batch, which is the system's on a Jetson."""
    return 3 if is_integrated(gpu) else 8


def assert_flat(memory: cuda.GpuMemory, action, calls: int, *, host_slack: int = 8 << 20) -> None:
    """``calls`` calls of ``action`` leave neither device memory nor host memory behind, once it is warm."""
    slack = device_slack(is_integrated(memory.gpu))
    for _ in range(calls // 10):
        action()
    device_before, host_before = free_bytes(memory), resident_bytes()
    for _ in range(calls):
        action()
    device_after, host_after = free_bytes(memory), resident_bytes()
    assert device_before - device_after <= slack, f"{device_before - device_after} bytes of device memory are gone"
    assert host_after - host_before <= host_slack, f"{host_after - host_before} bytes of host memory are gone"


def run_python(code: str, *, before: tuple[str, ...] = (), seconds: float = 120) -> subprocess.CompletedProcess:
    """A child process from the repository root; its output is text."""
    longest = seconds * max((gpu_common.patience(gpu) for gpu in gpus.find_gpus()), default=1.0)
    return subprocess.run(
        [*before, sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=longest, check=False
    )
