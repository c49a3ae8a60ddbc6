"""What the processes of the GPU suite do, each alone: contenders, measured ceilings, overheads, what TensorRT-RTX answers.

``python -m benchmarks.gpu_tasks TASK JSON`` answers with JSON lines on its standard output.
"""

from __future__ import annotations

from benchmarks import gpu_needs  # noqa: F401  # isort: skip (it ends the program where numpy or msgspec is missing)

import contextlib
import json
import os
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.gpu_common import (
    BATCHES,
    MODELS,
    PIPELINED,
    SIZE,
    TENSORRT,
    MissingError,
    cosine,
    fixed_input,
    pooling_input,
    pooling_onnx,
    require_tensorrt,
    require_torch,
    trained_like,
    why_no_torch,
)
from benchmarks.gpu_kernels import on_standin
from benchmarks.gpu_overhead import on_device, overhead
from edge_backbones.engines.gpu import memory as cuda
from edge_backbones.errors import MissingDependencyError
from edge_backbones.machine import gpus


def child_main(task: str, arguments: dict[str, Any]) -> None:
    """Answer with what a task yields, or with the reason why it failed."""
    # Libraries print where they like: answers have a channel of their own.
    with os.fdopen(os.dup(1), "w") as answers:
        os.dup2(2, 1)
        try:
            for answer in TASKS[task](**arguments):
                print(json.dumps(answer), file=answers, flush=True)
        except Exception as error:
            traceback.print_exc()
            text = " ".join(str(error).split())[:2000]
            said = {"missing": text} if is_missing(error) else {"error": f"{type(error).__name__}: {text}"}
            print(json.dumps(said), file=answers, flush=True)


def is_missing(error: Exception) -> bool:
    """Return whether an error says that a library is not installed. A library that fails to load is a failure."""
    if isinstance(error, ModuleNotFoundError):
        return not (error.name or "").startswith(("edge_backbones", "benchmarks"))
    return isinstance(error, (MissingError, MissingDependencyError))


# ---- Tasks of child processes


def contend(
    device: int | str, model: str, batch: int, kind: str, size: int = SIZE, **options: Any
) -> Iterator[dict[str, Any]]:
    """Load a contender, then time its calls on request. ``device``: index of the GPU, or "cpu" in tests."""
    make = _plan_contender if kind in TENSORRT else _torch_contender
    call, wait, facts = make(device, model, batch, kind, size, **options)
    yield facts
    for line in sys.stdin:
        yield timings(call, wait, json.loads(line)["seconds"])


def timings(call: Callable[[], Any], wait: Callable[[], None], seconds: float) -> dict[str, float]:
    """Return the milliseconds per call: waiting for each call, and for rows of calls."""
    single, rows = [], []
    begin = time.perf_counter()
    while len(single) < 10 or time.perf_counter() - begin < seconds / 2:
        start = time.perf_counter()
        call()
        wait()
        single.append(1e3 * (time.perf_counter() - start))
    begin = time.perf_counter()
    while len(rows) < 2 or time.perf_counter() - begin < seconds / 2:
        start = time.perf_counter()
        for _ in range(PIPELINED):
            call()
        wait()
        rows.append(1e3 * (time.perf_counter() - start) / PIPELINED)
    ordered = sorted(single)
    return {
        "latency_ms": statistics.median(single),
        "latency_p99_ms": ordered[min(len(ordered) - 1, round(0.99 * len(ordered)))],
        "fastest_ms": ordered[0],
        "pipelined_ms": statistics.median(rows),
        "calls": len(single),
    }


def _torch_contender(
    device: int | str, model: str, batch: int, kind: str, size: int
) -> tuple[Callable[[], Any], Callable[[], None], dict[str, Any]]:
    if device != "cpu":
        require_torch()
    import torch

    place = torch.device("cpu" if device == "cpu" else f"cuda:{device}")
    loaded = trained_like(model, MODELS.get(model))
    images = np.random.default_rng(0).standard_normal((batch, 3, size, size)).astype(np.float32)

    # The reference in fp32 without TF32, on the same device.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    with torch.inference_mode():
        net = loaded.module.to(place)
        expected = [m.float().cpu().numpy() for m in net(torch.from_numpy(images).to(place))]
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True

    if kind == "torchscript":
        call = _torchscript(loaded, batch, size, device, images)
    else:
        net = net.half().to(memory_format=torch.channels_last)
        pixels = torch.from_numpy(images).to(place).half().contiguous(memory_format=torch.channels_last)
        run = torch.compile(net, mode="max-autotune") if kind == "compile" else net

        def call() -> Any:
            with torch.inference_mode():
                return run(pixels)

    def wait() -> None:
        if place.type == "cuda":
            torch.cuda.synchronize(place)

    for _ in range(10):
        call()
    wait()
    actual = [torch.from_dlpack(m).float().cpu().numpy() for m in call()]
    return call, wait, {"cosine": _checked_cosine(expected, actual), "warm_up_calls": 11}


def _torchscript(loaded: Any, batch: int, size: int, device: int | str, images: np.ndarray) -> Callable[[], Any]:
    """Load TorchScript fp16 as a bundle has it, through EdgeBackbone, with arrays on the GPU."""
    import copy
    import dataclasses

    import torch

    from edge_backbones import EdgeBackbone
    from edge_backbones.engines.torch.session import TorchScriptSession
    from edge_backbones.spec import Precision
    from edge_backbones.toolchain.prepare import prepare as fold
    from edge_backbones.toolchain.trace import trace_torchscript

    place = "cpu" if device == "cpu" else f"cuda:{device}"
    on_cpu = dataclasses.replace(loaded, module=copy.deepcopy(loaded.module).cpu())
    prepared = fold(on_cpu, fixed_input(batch, size, size))
    data = trace_torchscript(prepared.module, prepared.input, Precision.FP16)
    session = TorchScriptSession(data, input=prepared.input, outputs=prepared.spec.outputs, device=place)
    backbone = EdgeBackbone(prepared.spec, prepared.input, session, device=place)
    if device == "cpu":
        return lambda: [torch.from_numpy(m) for m in backbone(images).feature_maps]
    pixels = torch.from_numpy(images).to(place)
    stream = torch.cuda.current_stream(pixels.device)
    return lambda: backbone(pixels, stream=stream).feature_maps


def _checked_cosine(expected: Sequence[np.ndarray], actual: Sequence[np.ndarray]) -> float:
    """Return the cosine against fp32; raise an error if a contender computes something else."""
    found = cosine(expected, actual)
    if not found > 0.99:  # fp16 leaves 0.9999; NaN is not above it either
        raise RuntimeError(f"its maps have cosine {found:.4f} to the fp32 reference: it computes something else")
    return found


def _plan_contender(
    device: int | str,
    model: str,
    batch: int,
    kind: str,
    size: int,
    precision: str,
    bundle: str,
    graphed: bool,
) -> tuple[Callable[[], Any], Callable[[], None], dict[str, Any]]:
    """Load a plan through EdgeBackbone, without torch. Its parity was measured when it was compiled."""
    from edge_backbones import Bundle, EdgeBackbone

    index = int(device)
    opened = Bundle.open(bundle)
    engine = next(e for e in opened.manifest.engines if e.key.flavour == kind and e.key.precision.value == precision)
    where = {"engine": engine.name, "device": f"cuda:{index}"}
    backbone = EdgeBackbone.from_pretrained(bundle, allow_host_code=True, **where)  # made here
    memory = cuda.open_memory(index)
    images = np.random.default_rng(0).standard_normal((batch, 3, size, size)).astype(np.float32)
    array, stream = on_device(memory, images)

    replay = backbone.graphed(array, stream=stream) if graphed else lambda: backbone(array, stream=stream)

    def call() -> Any:
        return replay().feature_maps

    def wait() -> None:
        with memory:
            memory.wait(stream)

    for _ in range(10):
        call()
    wait()
    return call, wait, {"cosine": min(stage.cosine for stage in engine.parity.stages), "warm_up_calls": 10}


def compile_plan(device: int, bundle: str, flavour: str) -> Iterator[dict[str, Any]]:
    """Compile a bundle's graphs for this GPU and measure their parity; the gate is the bundle's."""
    from edge_backbones import compile_bundle
    from edge_backbones.bundle.reader import Bundle
    from edge_backbones.engines.tensorrt.options import PlanOptions, Shapes
    from edge_backbones.spec import Precision, ShapeRange

    manifest = Bundle.open(bundle).manifest
    input = manifest.input
    plan = PlanOptions(
        profiles=tuple(
            Shapes(batch=ShapeRange(min=input.batch.min, opt=batch, max=batch), height=input.height, width=input.width)
            for batch in BATCHES
            if batch in input.batch
        )
    )
    held = tuple(Precision(g.precision) for g in manifest.graphs if g.format == "onnx")
    start = time.perf_counter()
    result = compile_bundle(bundle, precisions=held, flavour=flavour, plan=plan, gpu=device)  # type: ignore[arg-type]
    yield {
        "seconds": time.perf_counter() - start,
        "notes": result.notes,
        "engines": [
            {
                "name": record.name,
                "bytes": record.file.size,
                "measured": record.parity.measured,
                "stages": [{"stage": s.stage, "cosine": s.cosine, "sqnr_db": s.sqnr_db} for s in record.parity.stages],
            }
            for record in result.engines
        ],
    }


def ceilings(device: int) -> Iterator[dict[str, Any]]:
    """Measure what this GPU can do at best. The data is random, because zeros are faster."""
    memory = cuda.open_memory(device)
    integrated = gpus.find_gpus()[device].integrated  # its memory is the system's
    size, count = (1 << 28 if integrated or on_standin() else 1 << 30), 20
    seed = np.random.default_rng(0).integers(0, 256, 1 << 24, np.uint8)
    with memory:
        stream, source, target = memory.new_stream(), memory.allocate(size), memory.allocate(size)
        for offset in range(0, size, seed.nbytes):
            memory.copy_in(source + offset, seed.ctypes.data, seed.nbytes, stream)
        memory.wait(stream)
        seconds = []
        for _ in range(5):
            start = time.perf_counter()
            for _ in range(count):
                memory.copy(target, source, size, stream)
            memory.wait(stream)
            seconds.append((time.perf_counter() - start) / count)
        memory.free(source)
        memory.free(target)
    figures: dict[str, Any] = {"copy_gb_per_s": 2 * size / statistics.median(seconds) / 1e9, "copy_bytes": size}
    yield {**figures, "fp16_matmul_tflops": None, "not_run": {"matmul": why_no_torch()}}
    if why_no_torch():
        return
    import torch

    n = 4096 if integrated else 8192
    place = torch.device(f"cuda:{device}")
    generator = torch.Generator(place).manual_seed(0)
    a, b = (torch.randn(n, n, device=place, generator=generator).half() for _ in range(2))
    for _ in range(5):
        a @ b
    milliseconds = []
    for _ in range(15):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        a @ b
        end.record()
        end.synchronize()
        milliseconds.append(begin.elapsed_time(end))
    yield {**figures, "fp16_matmul_tflops": 2 * n**3 / statistics.median(milliseconds) / 1e9, "matmul_size": n}


def roofline(device: int, timed: Sequence[dict[str, Any]] = (), bundles: str = "") -> Iterator[dict[str, Any]]:
    """Return this GPU's ceilings by number format, and what share of them each timed engine reaches."""
    require_torch()
    found, not_run = matrix_ceilings(device, side=4096 if gpus.find_gpus()[device].integrated else 8192)
    copied = next(ceilings(device))["copy_gb_per_s"] * 1e9
    answer: dict[str, Any] = {"operations_per_second": found, "bytes_per_second": copied, "not_run": not_run}
    yield {**answer, "engines": []}
    if not timed:
        return
    engines, missing = rooflines(timed, found, copied, Path(bundles))
    yield {**answer, "engines": engines, "not_run": {**not_run, **missing}}


def matrix_ceilings(device: int | str, side: int = 8192) -> tuple[dict[str, float], dict[str, str]]:
    """Return the best operations per second of torch's matrix products by format, and why a format has none."""
    import torch

    place = torch.device("cpu" if device == "cpu" else f"cuda:{device}")
    generator = torch.Generator(place).manual_seed(0)

    def floats(dtype: Any) -> tuple[Any, Any]:
        return tuple(torch.randn(side, side, device=place, generator=generator).to(dtype) for _ in range(2))

    def product(kind: str) -> Callable[[], Any]:
        if kind == "int8":
            a, b = (
                torch.randint(-127, 128, (side, side), device=place, generator=generator, dtype=torch.int8)
                for _ in range(2)
            )
            return lambda: torch._int_mm(a, b)
        torch.backends.cuda.matmul.allow_tf32 = kind == "tf32"
        a, b = floats({"fp16": torch.float16, "bf16": torch.bfloat16}.get(kind, torch.float32))
        return lambda: a @ b

    def wait() -> None:
        if place.type == "cuda":
            torch.cuda.synchronize(place)

    found, not_run = {}, {}
    for kind in ("fp16", "bf16", "tf32", "fp32", "int8"):
        try:
            call = product(kind)
            for _ in range(3):
                call()
            wait()
            seconds = []
            for _ in range(10):
                start = time.perf_counter()
                call()
                wait()
                seconds.append(time.perf_counter() - start)
        except (RuntimeError, AttributeError) as error:  # this GPU or this release has no such product
            not_run[f"{kind} product"] = " ".join(str(error).split())[:500]
            continue
        found[kind] = 2 * side**3 / min(seconds)
    return found, not_run


def rooflines(
    timed: Sequence[dict[str, Any]], operations: dict[str, float], copied: float, bundles: Path
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Compare each engine (model, batch, name, precision, milliseconds) with the least that its graph needs.

    Also returns what cannot be computed, and why. The times are those of pipelined calls, so the host does not count.
    """
    import msgspec

    from benchmarks.roofline import Ceilings, count_graph
    from benchmarks.roofline import roofline as against
    from edge_backbones.errors import InputError

    best = Ceilings(threads=1, operations_per_second=operations, bytes_per_second=copied)
    engines, missing = [], {}
    for engine in timed:
        path = bundles / f"{engine['model']}-{engine['precision']}.bundle" / "graphs" / f"{engine['precision']}.onnx"
        what = f"{engine['model']}, batch {engine['batch']}, {engine['name']}"
        if not path.is_file():
            missing[what] = f"{path.parent.parent.name} is not in {bundles}: make it with --prepare"
            continue
        try:
            work = count_graph(path, (engine["batch"], 3, SIZE, SIZE))
            found = against(work, best, engine["milliseconds"], engine["batch"])
        except (InputError, MissingDependencyError) as error:
            missing[what] = str(error)
            continue
        engines.append({**engine, **msgspec.to_builtins(found)})
    return engines, missing


def rtx_answer(device: int, bundles: str | None = None) -> Iterator[dict[str, Any]]:
    """Return what TensorRT-RTX says about this GPU: for plans with its default targets, and for this GPU."""
    library = require_tensorrt("tensorrt_rtx")
    from edge_backbones.engines.tensorrt.library import logger_of

    graph = pooling_onnx(None if bundles is None else Path(bundles))
    log = logger_of(library)
    with contextlib.ExitStack() as stack:
        if gpus.find_gpus():  # it speaks of the device that is current in this thread
            stack.enter_context(cuda.open_memory(device))
        plan = _rtx_plan(library, graph, log, current=False)
        if plan is None:
            raise RuntimeError(f"TensorRT-RTX does not compile the pooling graph: {log.last_error()}")
        log.clear()
        runtime = library.Runtime(log)
        validity, bits = runtime.get_engine_validity(plan)
        said_of_validity = log.last_error()
        log.clear()
        engine = runtime.deserialize_cuda_engine(plan)
        said_of_loading = log.last_error()
        log.clear()
        current = _rtx_plan(library, graph, log, current=True) is not None
        said_of_current = log.last_error()
    names = {name: int(value) for name, value in library.EngineInvalidityDiagnostics.__members__.items()}
    yield {
        "version": str(library.__version__),
        "accepted": engine is not None,
        "validity": validity.name,
        "diagnostics": int(bits),
        "diagnostics_names": [name for name, bit in names.items() if int(bits) & bit],
        "validity_log": said_of_validity,
        "deserialise_log": None if engine is not None else said_of_loading,
        "compiled_for_this_gpu": current,
        "compile_log": None if current else said_of_current,
    }


def _rtx_plan(library: Any, graph: bytes, log: Any, *, current: bool) -> bytes | None:
    """Compile the pooling graph for the default targets, or for the GPU here (ComputeCapability.CURRENT).

    This bypasses the package, which would load the plan on the GPU that it finds: this GPU may refuse it.
    """
    builder = library.Builder(log)
    network = builder.create_network(0)
    parser = library.OnnxParser(network, log)
    if not parser.parse(graph):
        raise RuntimeError(f"TensorRT-RTX cannot read the pooling graph: {log.last_error()}")
    config = builder.create_builder_config()
    if current:
        config.num_compute_capabilities = 1
        if not config.set_compute_capability(library.ComputeCapability.CURRENT, 0):
            return None
    input = pooling_input()
    profile = builder.create_optimization_profile()
    profile.set_shape("pixel_values", input.min_shape, input.opt_shape, input.max_shape)
    if config.add_optimization_profile(profile) < 0:
        raise RuntimeError(f"TensorRT-RTX refuses the profile: {log.last_error()}")
    plan = builder.build_serialized_network(network, config)
    return None if plan is None else bytes(plan)


def rtx_refusal(answer: dict[str, Any]) -> str:
    """Return why TensorRT-RTX cannot run on this GPU; empty if it can.

    Only refusals that name the GPU or its driver count; any other error is a failure of the caller's plan.
    """
    if answer["accepted"] or not set(answer["diagnostics_names"]) & {"UNSUPPORTED_CC", "OLD_CUDA_DRIVER"}:
        return ""
    named = ", ".join(answer["diagnostics_names"])
    return f"TensorRT-RTX {answer['version']} refuses this GPU ({named}): {answer['deserialise_log']}"


TASKS: dict[str, Callable[..., Iterator[dict[str, Any]]]] = {
    "contend": contend,
    "compile_plan": compile_plan,
    "ceilings": ceilings,
    "roofline": roofline,
    "rtx_answer": rtx_answer,
    "overhead": overhead,
}


if __name__ == "__main__":
    child_main(sys.argv[1], json.loads(sys.argv[2]))
