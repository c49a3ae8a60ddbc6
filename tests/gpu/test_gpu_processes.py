"""Who comes first does not matter: torch before us, after us or not at all, with both libraries for GPU memory.

Each case is a process of its own, because a context that was made cannot be unmade.
"""

from __future__ import annotations

import gpu_engines
import pytest

OURS = """
import sys
sys.path.insert(0, "tests/gpu")
import numpy as np
from edge_backbones.engines.gpu import memory as cuda

def ours():
    memory = cuda.open_memory({gpu}, {backend!r})
    values = np.random.default_rng(0).random(1 << 20, np.float32)
    back = np.empty_like(values)
    with memory:
        pointer = memory.allocate(values.nbytes)
        memory.copy_in(pointer, values.ctypes.data, values.nbytes, 0)
        memory.copy_out(back.ctypes.data, pointer, values.nbytes, 0)
        memory.wait(0)
        memory.free(pointer)
    assert np.array_equal(back, values)

def engine(kind):
    import gpu_engines
    options = {{}} if kind == "torchscript" else {{"memory": {backend!r}}}
    images = gpu_engines.pictures(2)
    with gpu_engines.open_backbone(kind, {gpu}, **options) as backbone:
        gpu_engines.assert_pooled(backbone(images).feature_maps, images)
"""
TORCH = """
def theirs():
    import torch
    torch.manual_seed(0)
    a = torch.rand(512, 512, device="cuda:{gpu}", dtype=torch.float64)
    torch.testing.assert_close((a @ a).cpu(), a.cpu() @ a.cpu())
    net = torch.nn.Conv2d(3, 8, 3).to(a.device)
    assert torch.isfinite(net(torch.rand(1, 3, 32, 32, device=a.device))).all()
    torch.cuda.synchronize()
"""
AUTOINIT = """
import pycuda.autoinit  # the host program's own context, which is not the primary one
import pycuda.driver
held = pycuda.autoinit.context.handle
"""


def run(gpu, backend, *code):
    done = gpu_engines.run_python("\n".join(code).format(gpu=gpu, backend=backend))
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.split()[-1] == "fine"


@pytest.fixture(params=gpu_engines.each(gpu_engines.BACKENDS))
def backend(request):
    return request.param


@pytest.fixture(params=["memory alone", *gpu_engines.each(gpu_engines.KINDS)])
def work(request, gpu):
    """What we do in a case: copies, or an engine too."""
    if request.param == "memory alone":
        return "ours()"
    if request.param == "tensorrt_rtx" and gpu_engines.rtx_refusal(gpu):
        pytest.skip(gpu_engines.rtx_refusal(gpu))
    return f'ours(); engine("{request.param}")'


def test_no_torch(gpu, backend):
    run(gpu, backend, OURS, "ours(); ours()", "assert 'torch' not in sys.modules", "print('fine')")


@pytest.mark.parametrize("kind", gpu_engines.each(("tensorrt", "tensorrt_rtx")))
def test_no_torch_with_an_engine(gpu, backend, kind):
    if kind == "tensorrt_rtx" and gpu_engines.rtx_refusal(gpu):
        pytest.skip(gpu_engines.rtx_refusal(gpu))
    run(gpu, backend, OURS, f'ours(); engine("{kind}"); ours()', "assert 'torch' not in sys.modules", "print('fine')")


@gpu_engines.needs("torch")
def test_torch_first(gpu, backend, work):
    run(gpu, backend, OURS, TORCH, f"theirs(); {work}; theirs(); {work}", "print('fine')")


@gpu_engines.needs("torch")
def test_torch_last(gpu, backend, work):
    run(gpu, backend, OURS, TORCH, f"{work}; theirs(); {work}; theirs()", "print('fine')")


@gpu_engines.needs("pycuda")
def test_a_program_with_its_own_context(gpu, backend):
    """pycuda.autoinit in the host program: its context is current before and after us, and its memory is whole."""
    run(
        gpu,
        backend,
        AUTOINIT,
        OURS,
        "import gpu_engines",
        "driver = gpu_engines.Context()",
        "before = driver.current()",
        "values = np.arange(1024, dtype=np.float32)",
        "theirs = pycuda.driver.to_device(values)",
        "ours()",
        "assert driver.current() == before != 0",
        "assert np.array_equal(pycuda.driver.from_device(theirs, values.shape, values.dtype), values)",
        "print('fine')",
    )


@pytest.mark.parametrize("kind", gpu_engines.each(gpu_engines.KINDS))
def test_a_process_that_closes_nothing_ends_quietly(gpu, backend, kind):
    """Sessions, arrays and pinned memory that live when Python ends: no crash, no message."""
    if kind == "tensorrt_rtx" and gpu_engines.rtx_refusal(gpu):
        pytest.skip(gpu_engines.rtx_refusal(gpu))
    options = "" if kind not in ("tensorrt", "tensorrt_rtx") else f", memory='{backend}'"
    code = [
        OURS,
        "import gpu_engines",
        f"backbone = gpu_engines.open_backbone('{kind}', {gpu}{options})",
        "kept = backbone(gpu_engines.pictures(2)).feature_maps",
        "memory = cuda.open_memory({gpu}, {backend!r})",
        "memory.__enter__(); locked = memory.pinned(4000); memory.__exit__(None, None, None)",
        "print('fine')",
    ]
    done = gpu_engines.run_python("\n".join(code).format(gpu=gpu, backend=backend))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert "Error" not in done.stderr
