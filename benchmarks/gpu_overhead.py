"""Host time and memory of a call that only enqueues: the library alone, our session, and EdgeBackbone."""

from __future__ import annotations

import contextlib
import statistics
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import gpu_standin
from benchmarks.gpu_common import (
    PIPELINED,
    pooling_input,
    pooling_module,
    pooling_onnx,
    require_tensorrt,
    require_torch,
)
from edge_backbones.engines.gpu import memory as cuda


def overhead(device: int, flavour: str, bundles: str | None = None) -> Iterator[dict[str, Any]]:
    """Return host microseconds per call that only enqueues: the library alone, our session, and EdgeBackbone.

    The backbone is pooling: the GPU finishes a call before the next one, so only the host is timed.
    """
    if flavour == "torchscript":
        require_torch()
        yield _torchscript_overhead(device)
        return
    with contextlib.ExitStack() as stack:
        if flavour == gpu_standin.NAME:
            stack.enter_context(gpu_standin.in_place_of_tensorrt())
            flavour, plan = "tensorrt", gpu_standin.plan_of(pooling_input())
        else:
            require_tensorrt(flavour)
            plan = _compiled(device, flavour, None if bundles is None else Path(bundles))
        found: dict[str, Any] = {}
        for name, measure in (("call", _call_overhead), ("graphed", _graphed_overhead)):
            with _Plan(device, flavour, plan) as opened:
                found[name] = measure(opened)
            yield found  # what there is, should the next one not end


def _compiled(device: int, flavour: Any, bundles: Path | None) -> bytes:
    from edge_backbones.engines.tensorrt.compile import compile_plan
    from edge_backbones.spec import Precision

    return compile_plan(pooling_onnx(bundles), pooling_input(), Precision.FP32, flavour=flavour, gpu=device).data


def must(result: Any, what: str, log: Any) -> Any:
    """Return the result of a TensorRT call; raise an error for None or False, which is how it fails."""
    if result is None or result is False:
        raise RuntimeError(f"TensorRT refused {what}: {log.last_error()}")
    return result


class _Plan:
    """A plan twice: as TensorRT alone runs it, and as an EdgeBackbone. Use it in a ``with`` statement."""

    def __init__(self, device: int, flavour: Any, plan: bytes) -> None:
        from edge_backbones import EdgeBackbone
        from edge_backbones.engines.tensorrt.library import load_library, logger_of
        from edge_backbones.engines.tensorrt.session import TensorRtSession
        from edge_backbones.testing import SPEC

        input = pooling_input()
        self.memory = cuda.open_memory(device)
        self.array, self.stream = on_device(self.memory, np.random.default_rng(0).random(input.opt_shape, np.float32))
        library = load_library(flavour)
        with self.memory as memory:
            self._log = log = logger_of(library)
            self._runtime = library.Runtime(log)
            self._engine = must(self._runtime.deserialize_cuda_engine(plan), "its own plan", log)
            self._context = must(self._engine.create_execution_context(), "an execution context", log)
            must(self._context.set_input_shape(input.name, input.opt_shape), "the shape", log)
            must(self._context.set_tensor_address(input.name, self.array.pointer), "the input's address", log)
            for name in SPEC.outputs:
                buffer = memory.allocate(4 * int(np.prod(tuple(self._context.get_tensor_shape(name)))))
                must(self._context.set_tensor_address(name, buffer), "an output's address", log)
            self.bare()
            memory.wait(self.stream)
        self.session = TensorRtSession(bytearray(plan), flavour=flavour, input=input, outputs=SPEC.outputs, gpu=device)
        self.backbone = EdgeBackbone(SPEC, input, self.session, device=f"cuda:{device}")

    def bare(self) -> None:
        """Enqueue one call of TensorRT alone."""
        must(self._context.execute_async_v3(self.stream), "to run", self._log)

    def wait(self) -> None:
        """Wait for the GPU."""
        with self.memory:
            self.memory.wait(self.stream)

    def __enter__(self) -> _Plan:
        return self

    def __exit__(self, *_: object) -> None:
        self.backbone.close()
        with self.memory:  # what TensorRT frees belongs to this context
            self._context = self._engine = self._runtime = None


def _call_overhead(plan: _Plan) -> dict[str, Any]:
    """Time the usual call, on arrays of the GPU."""
    from edge_backbones.engines.gpu.arrays import from_foreign

    array, stream = plan.array, plan.stream
    foreign = from_foreign(array, stream=stream)
    with plan.memory:
        alone = microseconds(plan.bare, plan.wait)
    through_backbone = microseconds(lambda: plan.backbone(array, stream=stream), plan.wait)
    host = np.random.default_rng(0).random(array.shape, np.float32)
    return {
        "bare_us": alone,
        "session_us": microseconds(lambda: plan.session.run_on_device(foreign, stream), plan.wait),
        "backbone_us": through_backbone,
        "overhead_us": through_backbone - alone,
        "target_us": 20,
        "device_arrays": host_allocations(lambda: plan.backbone(array, stream=stream), plan.wait),
        "host_arrays": host_allocations(lambda: plan.backbone(host), plan.wait),
    }


def _graphed_overhead(plan: _Plan) -> dict[str, Any]:
    """Time the call that a loop over frames makes, as a CUDA graph between buffers that stay."""
    memory, stream = plan.memory, plan.stream
    with memory:
        captured = memory.capture(stream, plan.bare)
        alone = microseconds(lambda: memory.launch(captured, stream), plan.wait)
        memory.free_graph(captured)
    graphed = plan.backbone.graphed(plan.array, stream=stream)
    through_backbone = microseconds(graphed, plan.wait)
    return {
        "bare_us": alone,
        "backbone_us": through_backbone,
        "overhead_us": through_backbone - alone,
        "target_us": 5,
        "device_arrays": host_allocations(graphed, plan.wait),
    }


def _torchscript_overhead(device: int) -> dict[str, Any]:
    import torch

    from edge_backbones import EdgeBackbone
    from edge_backbones.engines.gpu.arrays import from_foreign
    from edge_backbones.engines.torch.session import TorchScriptSession
    from edge_backbones.spec import Precision
    from edge_backbones.testing import SPEC
    from edge_backbones.toolchain.trace import trace_torchscript

    input = pooling_input()
    data = trace_torchscript(pooling_module(), input, Precision.FP32)
    session = TorchScriptSession(data, input=input, outputs=SPEC.outputs, device=f"cuda:{device}")
    backbone = EdgeBackbone(SPEC, input, session, device=f"cuda:{device}")
    pixels = torch.rand(input.opt_shape, device=f"cuda:{device}")
    queue_ = torch.cuda.Stream(device)
    stream = queue_.cuda_stream
    torch.cuda.synchronize(device)
    module = session._module

    def bare() -> Any:
        with torch.inference_mode():
            return module(pixels)

    def wait() -> None:
        queue_.synchronize()

    with torch.cuda.stream(queue_):
        alone = microseconds(bare, wait)
        foreign = from_foreign(pixels, stream=stream)
        through_session = microseconds(lambda: session.run_on_device(foreign, stream), wait)
        through_backbone = microseconds(lambda: backbone(pixels, stream=stream), wait)
        held = host_allocations(lambda: backbone(pixels, stream=stream), wait)
    return {
        "bare_us": alone,
        "session_us": through_session,
        "backbone_us": through_backbone,
        "overhead_us": through_backbone - alone,
        "device_arrays": held,
    }


def microseconds(call: Callable[[], Any], wait: Callable[[], None], rows: int = 60) -> float:
    """Return the median host time of a call that only enqueues, over rows too short to fill the queue."""
    for _ in range(50):
        call()
    wait()
    found = []
    for _ in range(rows):
        start = time.perf_counter()
        for _ in range(PIPELINED):
            call()
        found.append(1e6 * (time.perf_counter() - start) / PIPELINED)
        wait()
    return statistics.median(found)


def host_allocations(call: Callable[[], Any], wait: Callable[[], None], calls: int = 200) -> dict[str, float]:
    """Return the bytes of Python and numpy memory that a call leaves behind, and the most that one holds."""
    for _ in range(50):
        call()
    wait()
    tracemalloc.start()
    try:
        for _ in range(20):
            call()
        wait()
        before, _ = tracemalloc.get_traced_memory()
        peaks = []
        for _ in range(calls):
            at_start, _ = tracemalloc.get_traced_memory()
            tracemalloc.reset_peak()
            call()
            peaks.append(tracemalloc.get_traced_memory()[1] - at_start)
        wait()
        after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    return {"kept_bytes_per_call": (after - before) / calls, "largest_bytes_in_a_call": float(statistics.median(peaks))}


def on_device(memory: cuda.GpuMemory, values: np.ndarray) -> tuple[Any, int]:
    """Return a copy on the GPU, which lives as long as the process, and a stream."""
    from edge_backbones.engines.gpu.arrays import DeviceArray

    values = np.ascontiguousarray(values)
    with memory:
        pointer, stream = memory.allocate(values.nbytes), memory.new_stream()
        memory.copy_in(pointer, values.ctypes.data, values.nbytes, stream)
        memory.wait(stream)
    return DeviceArray(
        pointer, values.shape, values.dtype, device=memory.gpu, owner=None, synchronize=None, stream=stream
    ), stream
