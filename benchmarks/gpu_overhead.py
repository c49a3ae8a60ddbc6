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

from benchmarks.gpu_common import PIPELINED, pooling_input, pooling_module, pooling_onnx, require_tensorrt
from edge_backbones.engines.gpu import memory as cuda


def overhead(device: int, flavour: str, bundles: str | None = None) -> Iterator[dict[str, Any]]:
    """Return host microseconds per call that only enqueues: the library alone, our session, and EdgeBackbone.

    The backbone is pooling: the GPU finishes a call before the next one, so only the host is timed.
    """
    if flavour == "torchscript":
        yield _torchscript_overhead(device)
        return
    require_tensorrt(flavour)
    graph = pooling_onnx(None if bundles is None else Path(bundles))
    yield {
        f"cuda_graphs_{'on' if graphs else 'off'}": _plan_overhead(device, flavour, graph, graphs)
        for graphs in (False, True)
    }


def must(result: Any, what: str, log: Any) -> Any:
    """Return the result of a TensorRT call; raise an error for None or False, which is how it fails."""
    if result is None or result is False:
        raise RuntimeError(f"TensorRT refused {what}: {log.last_error()}")
    return result


def _plan_overhead(device: int, flavour: Any, graph: bytes, cuda_graphs: bool) -> dict[str, Any]:
    from edge_backbones import EdgeBackbone
    from edge_backbones.engines.gpu.arrays import from_foreign
    from edge_backbones.engines.tensorrt.compile import compile_plan as build
    from edge_backbones.engines.tensorrt.library import load_library, logger_of
    from edge_backbones.engines.tensorrt.session import TensorRtSession
    from edge_backbones.spec import Precision
    from edge_backbones.testing import SPEC

    input = pooling_input()
    plan = build(graph, input, Precision.FP32, flavour=flavour, gpu=device)
    memory = cuda.open_memory(device)
    array, stream = on_device(memory, np.random.default_rng(0).random(input.opt_shape, np.float32))
    library = load_library(flavour)
    with memory:
        runtime = library.Runtime(logger_of(library))
        engine = must(runtime.deserialize_cuda_engine(plan.data), "its own plan", logger_of(library))
        log = logger_of(library)
        context = must(engine.create_execution_context(), "an execution context", log)
        must(context.set_input_shape(input.name, input.opt_shape), "the shape", log)
        must(context.set_tensor_address(input.name, array.pointer), "the input's address", log)
        for name in SPEC.outputs:
            buffer = memory.allocate(4 * int(np.prod(tuple(context.get_tensor_shape(name)))))
            must(context.set_tensor_address(name, buffer), "an output's address", log)

        def bare() -> None:
            must(context.execute_async_v3(stream), "to run", log)

        def wait() -> None:
            with memory:
                memory.wait(stream)

        bare()
        wait()
        if cuda_graphs:
            captured = memory.capture(stream, bare)
            alone = microseconds(lambda: memory.launch(captured, stream), wait)
        else:
            alone = microseconds(bare, wait)
    session = TensorRtSession(
        bytearray(plan.data),
        flavour=flavour,
        input=input,
        outputs=SPEC.outputs,
        gpu=device,
        cuda_graphs=cuda_graphs,
    )
    with contextlib.closing(session):
        foreign = from_foreign(array, stream=stream)
        through_session = microseconds(lambda: session.run_on_device(foreign, stream), wait)
        backbone = EdgeBackbone(SPEC, input, session, device=f"cuda:{device}")
        through_backbone = microseconds(lambda: backbone(array, stream=stream), wait)
        held = host_allocations(lambda: backbone(array, stream=stream), wait)
        fixed = None  # the call that a loop with CUDA graphs makes, where buffers stay
        if cuda_graphs:
            graphed = backbone.graphed(array, stream=stream)
            fixed = microseconds(graphed, wait)
            held = host_allocations(graphed, wait)
        host = np.random.default_rng(0).random(input.opt_shape, np.float32)
        held_from_host = host_allocations(lambda: backbone(host), wait)
        refused = {str(shape): why for shape, why in session.graph_refusals.items()}
    return {
        "bare_us": alone,
        "session_us": through_session,
        "backbone_us": through_backbone,
        "graphed_us": fixed,
        "overhead_us": (through_backbone if fixed is None else fixed) - alone,
        "target_us": 20 if fixed is None else 5,
        "graph_refusals": refused,
        "device_arrays": held,
        "host_arrays": held_from_host,
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
