"""What the processes of the GPU suite do, each alone: contenders, measured ceilings, overheads, what TensorRT-RTX answers.

``python -m benchmarks.gpu_tasks TASK JSON`` answers with JSON lines on its standard output.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import sys
import time
import traceback
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edge_backbones.engines.gpu import memory as cuda
from edge_backbones.errors import MissingDependencyError
from edge_backbones.machine import gpus

TENSORRT = ("tensorrt", "tensorrt_rtx")
# Kept stages by network; the first is measured always, the others while time is left.
MODELS = {
    "resnet50": (1, 2, 3, 4),
    "mobilenetv3_large_100": (0, 1, 2, 3, 4),
    "vit_small_patch16_224": (2, 5, 8, 11),
}
SIZE = 224
PIPELINED = 20
BATCHES = (1, 32)
LARGEST_BATCH = 32


class MissingError(Exception):
    """What a part needs, time included, is not there: it is not run."""


def child_main(task: str, arguments: dict[str, Any]) -> None:
    """Answer with what a task yields, or with why it does not."""
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
    """Does it say that a library is not installed? One that is and does not load is a failure."""
    if isinstance(error, ModuleNotFoundError):
        return not (error.name or "").startswith(("edge_backbones", "benchmarks"))
    return isinstance(error, (MissingError, MissingDependencyError))


# ---- What is measured: networks


def require_tensorrt(flavour: str) -> Any:
    """TensorRT's module; MissingError where it is not installed."""
    from edge_backbones.engines.tensorrt.library import load_library

    try:
        return load_library(flavour)  # type: ignore[arg-type]
    except MissingDependencyError as error:
        raise MissingError(str(error)) from error


def trained_like(model: str, out_indices: Sequence[int] | None = None, seed: int = 0) -> Any:
    """A timm backbone (LoadedBackbone) with seeded weights, and batch norms as training leaves them.

    Untouched batch norm (mean 0, variance 1, scale 1) would hide a wrong fold, and its activations grow from block to
    block as no trained network's do.
    """
    import torch

    from edge_backbones.toolchain.sources.base import SourceOptions
    from edge_backbones.toolchain.sources.timm import load_timm

    indices = None if out_indices is None else tuple(out_indices)
    loaded = load_timm(model, SourceOptions(weights=f"random:{seed}", out_indices=indices))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for norm in loaded.module.modules():
            if isinstance(norm, torch.nn.modules.batchnorm._BatchNorm) and norm.track_running_stats:
                norm.running_mean.normal_(0, 0.3, generator=generator)
                norm.running_var.uniform_(0.5, 2, generator=generator)
                norm.weight.uniform_(-0.3, 1.4, generator=generator)
                norm.bias.normal_(0, 0.3, generator=generator)
    return loaded


def fixed_input(batch: int, height: int, width: int) -> Any:
    from edge_backbones.spec import InputSpec, ShapeRange

    return InputSpec(
        name="pixel_values",
        channels=3,
        batch=ShapeRange.fixed(batch),
        height=ShapeRange.fixed(height),
        width=ShapeRange.fixed(width),
    )


def pooling_input(largest: int = 256) -> Any:
    """The input of the pooling backbone: 1 to 32 images of 32 to ``largest`` pixels in steps of 8."""
    from edge_backbones.spec import InputSpec, ShapeRange

    size = ShapeRange(min=32, opt=64, max=largest)
    return InputSpec(
        name="pixel_values",
        channels=3,
        batch=ShapeRange(min=1, opt=2, max=LARGEST_BATCH),
        height=size,
        width=size,
        size_multiple=8,
    )


def pooling_onnx(bundles: Path | None = None) -> bytes:
    """The graph of edge_backbones.testing's pooling backbone for any batch and size, so that every value is known."""
    if bundles is not None and (bundles / "pooling.onnx").is_file():
        return (bundles / "pooling.onnx").read_bytes()
    try:
        from onnx import TensorProto, helper
    except ModuleNotFoundError as error:
        raise MissingError("onnx is not installed, and --bundles has no pooling.onnx") from error
    stages = (("pool4", 4), ("pool8", 8))
    nodes = [
        helper.make_node("AveragePool", ["pixel_values"], [stage], kernel_shape=[k, k], strides=[k, k])
        for stage, k in stages
    ]
    axes = ["batch", 3, "height", "width"]
    inputs = [helper.make_tensor_value_info("pixel_values", TensorProto.FLOAT, axes)]
    outputs = [
        helper.make_tensor_value_info(stage, TensorProto.FLOAT, ["batch", 3, f"height{k}", f"width{k}"])
        for stage, k in stages
    ]
    graph = helper.make_graph(nodes, "average_pooling", inputs, outputs)
    model: bytes = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10
    ).SerializeToString()
    return model


def pooling_module() -> Any:
    """The same in torch."""
    import torch

    class Pooling(torch.nn.Module):
        def forward(self, pixels: Any) -> Any:
            return tuple(torch.nn.functional.avg_pool2d(pixels, k) for k in (4, 8))

    return Pooling().eval()


def cosine(expected: Sequence[np.ndarray], actual: Sequence[np.ndarray]) -> float:
    """The smallest over all maps; NaN for values that are not finite."""
    found = []
    for reference, value in zip(expected, actual, strict=True):
        a, b = (array.astype(np.float64).ravel() for array in (reference, value))
        found.append(float(a @ b / np.sqrt((a @ a) * (b @ b))))
    return float(np.min(found))  # NaN where one of them is


# ---- Tasks of child processes


def contend(
    device: int | str, model: str, batch: int, kind: str, size: int = SIZE, **options: Any
) -> Iterator[dict[str, Any]]:
    """Get ready, say so, and then time calls whenever asked. ``device``: the GPU's index, or "cpu" in tests of this file."""
    make = _plan_contender if kind in TENSORRT else _torch_contender
    call, wait, facts = make(device, model, batch, kind, size, **options)
    yield facts
    for line in sys.stdin:
        yield timings(call, wait, json.loads(line)["seconds"])


def timings(call: Callable[[], Any], wait: Callable[[], None], seconds: float) -> dict[str, float]:
    """Milliseconds per call, waited for one by one and in rows."""
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
    """TorchScript fp16 as a bundle has it: through EdgeBackbone, arrays on the GPU in and out."""
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
    """A contender that computes something else is no contender."""
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
    cuda_graphs: bool,
) -> tuple[Callable[[], Any], Callable[[], None], dict[str, Any]]:
    """A plan through EdgeBackbone, without torch. Parity was measured when it was compiled."""
    from edge_backbones import Bundle, EdgeBackbone

    index = int(device)
    opened = Bundle.open(bundle)
    engine = next(e for e in opened.manifest.engines if e.key.flavour == kind and e.key.precision.value == precision)
    options = {"device": f"cuda:{index}", "cuda_graphs": cuda_graphs}
    backbone = EdgeBackbone.from_pretrained(bundle, engine=engine.name, allow_host_code=True, **options)  # made here
    memory = cuda.open_memory(index)
    images = np.random.default_rng(0).standard_normal((batch, 3, size, size)).astype(np.float32)
    array, stream = on_device(memory, images)

    def call() -> Any:
        return backbone(array, stream=stream).feature_maps

    def wait() -> None:
        with memory:
            memory.wait(stream)

    for _ in range(10):
        call()
    wait()
    refused = getattr(backbone._engine, "graph_refusals", {})
    if cuda_graphs and refused:
        raise RuntimeError(f"CUDA graphs were refused: {refused}")
    return call, wait, {"cosine": min(stage.cosine for stage in engine.parity.stages), "warm_up_calls": 10}


def on_device(memory: cuda.Memory, values: np.ndarray) -> tuple[Any, int]:
    """A copy on the GPU (it lives as long as the process), and a stream to work on."""
    from edge_backbones.engines.gpu.arrays import DeviceArray

    values = np.ascontiguousarray(values)
    with memory:
        pointer, stream = memory.allocate(values.nbytes), memory.new_stream()
        memory.copy_in(pointer, values.ctypes.data, values.nbytes, stream)
        memory.wait(stream)
    return DeviceArray(
        pointer, values.shape, values.dtype, device=memory.gpu, owner=None, synchronize=None, stream=stream
    ), stream


def compile_plan(device: int, bundle: str, flavour: str) -> Iterator[dict[str, Any]]:
    """Compile a bundle's graphs for this GPU; parity against fp32 is measured on the way, its gate is the bundle's."""
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
    """What this GPU does at best here: the figures to hold others against. Random data: zeros run faster."""
    memory = cuda.open_memory(device)
    size, count = 1 << 30, 20
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
    try:
        import torch
    except ModuleNotFoundError:
        yield {**figures, "fp16_matmul_tflops": None, "not_run": {"matmul": "torch is not installed"}}
        return
    n = 8192
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


def roofline(device: int, timed: list[dict[str, Any]], bundles: str) -> Iterator[dict[str, Any]]:
    """This GPU's ceilings by number format, and where every engine that was timed is below them."""
    found, not_run = matrix_ceilings(device)
    copied = next(ceilings(device))["copy_gb_per_s"] * 1e9
    answer: dict[str, Any] = {"operations_per_second": found, "bytes_per_second": copied, "not_run": not_run}
    engines, missing = rooflines(timed, found, copied, Path(bundles))
    yield {**answer, "engines": engines, "not_run": {**not_run, **missing}}


def matrix_ceilings(device: int | str, side: int = 8192) -> tuple[dict[str, float], dict[str, str]]:
    """Operations per second of a large matrix product of torch, the best of several, and why a format has none."""
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
    """For every engine (model, batch, name, precision, milliseconds) what its bundle's graph needs at least, and what
    cannot be told. Pipelined calls: the host is not what is measured."""
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
    """What TensorRT-RTX says to this GPU, in its own words: plans for its default targets, and for the GPU at hand."""
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
    """A plan of the pooling graph for the default targets, or for the GPU at hand (ComputeCapability.CURRENT).

    Not through the package, which looks into a plan where it finds a GPU: here the GPU may refuse it.
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
    """Why nothing of TensorRT-RTX is run on this GPU; empty when it takes it.

    Only where it names the GPU or its driver: any other trouble is a failure of whoever loads a plan.
    """
    if answer["accepted"] or not set(answer["diagnostics_names"]) & {"UNSUPPORTED_CC", "OLD_CUDA_DRIVER"}:
        return ""
    named = ", ".join(answer["diagnostics_names"])
    return f"TensorRT-RTX {answer['version']} refuses this GPU ({named}): {answer['deserialise_log']}"


def overhead(device: int, flavour: str, bundles: str | None = None) -> Iterator[dict[str, Any]]:
    """Host microseconds per call that only enqueues, of the library alone and through our session and EdgeBackbone.

    The pooling backbone: the GPU is done with a call before the next one comes, so that nothing but the host is timed.
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
    """What a call of TensorRT returned; it fails by returning None or False."""
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
    plan = build(graph, input, Precision.FP32, flavour=flavour, device=device)
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
    """Median host time of a call that only enqueues, over rows short enough that the queue never fills."""
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
    """Python's and numpy's memory in steady state: bytes that stay behind per call, and the most that one call holds."""
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
