"""The layers of a bundle's graph: the number format of each and why, multiply-adds, and which module writes a tensor."""

from __future__ import annotations

import math
import shlex
from collections.abc import Collection
from typing import Any, NamedTuple

import msgspec

from edge_backbones.bundle.manifest import EngineRecord, GraphRecord
from edge_backbones.bundle.reader import Bundle
from edge_backbones.engines import registry
from edge_backbones.errors import IntegrityError, MissingDependencyError
from edge_backbones.report.kernels import KernelCounts, count_kernels
from edge_backbones.report.summary import is_meant, shipped_trial
from edge_backbones.spec import Precision

_PRECISIONS_OF_LAYERS = (Precision.INT8, Precision.FP8, Precision.FP16, Precision.BF16, Precision.FP32)
_PLAN_ROWS = 60
_PRODUCTS = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
# Nodes that only move data or change its format.
_MOVERS = frozenset({
    "Cast", "Concat", "Constant", "ConstantOfShape", "DepthToSpace", "DequantizeLinear", "Expand", "Flatten", "Gather",
    "Identity", "Pad", "QuantizeLinear", "Range", "Reshape", "Shape", "Slice", "SpaceToDepth", "Split", "Squeeze", "Tile",
    "Transpose", "Unsqueeze",
})  # fmt: skip


class Layer(NamedTuple):
    """A node that computes.

    ``format``: its number format. ``products``: its multiply-adds for one image. ``why``: why an int8 or fp8 graph computes
    it in another format, empty where that needs no reason.
    """

    name: str
    op: str
    format: str
    products: int
    why: str = ""


class Layers(NamedTuple):
    """The layers of one graph, in order.

    ``formats``: for each number format how many layers compute in it, and their share of the multiply-adds, from 0 to 1.
    ``products``: multiply-adds of all layers for one image. ``outside``: the layers of an int8 or fp8 graph that multiply, or
    that the build left out, and that compute in another format. ``reasons``: why, with the number of these layers and their
    share of the multiply-adds, the largest share first. ``writers``: by tensor, the name of the node that computes
    it. ``graph``: its record.
    """

    precision: str
    layers: list[Layer]
    formats: list[tuple[str, int, float]]
    products: int
    outside: list[Layer]
    reasons: list[tuple[str, int, float]]
    writers: dict[str, str]
    graph: GraphRecord


def list_layers(bundle: Bundle) -> Layers | str:
    """Return the layers of the bundle's graph with the fewest bits, or a sentence that says why they are not shown.

    Raises IntegrityError for a file that is no graph of this bundle.
    """
    found = (bundle.manifest.onnx_graph(precision) for precision in _PRECISIONS_OF_LAYERS)
    record = next((graph for graph in found if graph is not None), None)
    if record is None:
        return "This bundle holds no ONNX graph to look into."
    try:
        graph = _read_graph(bundle, record)
    except MissingDependencyError as error:
        return f"Not shown: {error}."
    layers = _layers_of(graph, record, bundle)
    products = sum(layer.products for layer in layers)
    formats = []
    for one in ("int8", "fp8", "fp16", "bf16", "fp32"):
        of_one = [layer for layer in layers if layer.format == one]
        if of_one:
            formats.append((one, len(of_one), sum(layer.products for layer in of_one) / max(products, 1)))
    few = record.precision.value
    outside = [layer for layer in layers if record.precision.is_calibrated and layer.format != few]
    outside = [layer for layer in outside if layer.products or layer.name in record.excluded]
    reasons = []
    for why in dict.fromkeys(layer.why for layer in outside):
        alike = [layer for layer in outside if layer.why == why]
        reasons.append((why, len(alike), sum(layer.products for layer in alike) / max(products, 1)))
    reasons.sort(key=lambda reason: -reason[2])
    writers = {output: node.name for node in graph.node for output in node.output}
    return Layers(few, layers, formats, products, outside, reasons, writers, record)


def _read_graph(bundle: Bundle, record: GraphRecord) -> Any:
    """Return a graph with the shapes that it has at the bundle's usual input size.

    Raises MissingDependencyError without onnx, IntegrityError for a file that is no graph of this bundle.
    """
    try:
        import onnx
        from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
    except ImportError as error:
        raise MissingDependencyError("reading the layers of a graph", "build") from error
    input = bundle.manifest.input
    try:
        model = onnx.load_from_string(bytes(bundle.read(record.file)))
        for size, axis in zip(input.opt_shape, model.graph.input[0].type.tensor_type.shape.dim, strict=True):
            axis.dim_value = size
        for output in model.graph.output:  # of a dynamic graph; the sizes are inferred from the input's
            output.type.tensor_type.ClearField("shape")
        del model.graph.value_info[:]
        return onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    except (DecodeError, ValueError, IndexError, onnx.shape_inference.InferenceError) as error:
        raise IntegrityError(
            f"{bundle.path / record.file.path} is not a graph of this bundle: {error}; build the bundle again"
        ) from error


def _layers_of(graph: Any, record: GraphRecord, bundle: Bundle) -> list[Layer]:
    """Return the nodes of a graph that compute, in order."""
    import onnx

    types = {weight.name: weight.data_type for weight in graph.initializer}
    shapes = {weight.name: tuple(weight.dims) for weight in graph.initializer}
    for value in (*graph.input, *graph.value_info, *graph.output):
        types[value.name] = value.type.tensor_type.elem_type
        shapes[value.name] = tuple(axis.dim_value for axis in value.type.tensor_type.shape.dim)
    halves = {onnx.TensorProto.FLOAT16: "fp16", onnx.TensorProto.BFLOAT16: "bf16"}
    dequantized = {output for node in graph.node if node.op_type == "DequantizeLinear" for output in node.output}
    blocks = _blocks_left_out(bundle, record)
    layers = []
    for node in graph.node:
        operands = [name for name in node.input if name]
        if node.op_type in _MOVERS or not operands:
            continue
        product = node.op_type in _PRODUCTS
        if product and all(name in dequantized for name in operands[:2]):
            number_format = record.precision.value
        else:
            number_format = halves.get(types.get(operands[0], 0), "fp32")
        count, why = 0, ""
        if product:
            data, weight, result = (shapes.get(name, ()) for name in (*operands[:2], node.output[0]))
            count = _products(node.op_type, data, weight, result) // bundle.manifest.input.batch.opt
            if record.precision.is_calibrated and number_format != record.precision.value:
                groups = next((attribute.i for attribute in node.attribute if attribute.name == "group"), 1)
                why = _why_outside(record.precision, node.op_type, weight, groups)
        if node.name in record.excluded:
            why = _why_excluded(node.name, blocks)
        layers.append(Layer(node.name, node.op_type, number_format, count, why))
    return layers


def _blocks_left_out(bundle: Bundle, record: GraphRecord) -> tuple[str, ...]:
    """Return the blocks that the build itself left out of int8 to hold the gate, or because that was faster."""
    decision = bundle.manifest.decision
    engine = next((e for e in bundle.manifest.engines if e.key.graph_sha256 == record.file.sha256), None)
    if decision is None or engine is None:
        return ()
    trial = shipped_trial(decision, engine, bundle.manifest)
    return () if trial is None else trial.blocks


def _why_excluded(name: str, blocks: Collection[str]) -> str:
    """Say why a layer that could be quantised is not."""
    block = next((block for block in blocks if is_meant(name, block)), None)
    if block is None:
        return "left out by hand, with --exclude"
    what = "the skip branches" if block.startswith("op:") else block
    return f"the build left {what} out: see what it tried"


def _why_outside(precision: Precision, op: str, weight: tuple[int, ...], groups: int) -> str:
    """Say why a layer that multiplies is no candidate for int8 or fp8; ``weight``: the shape of its second operand.

    The rules are those of toolchain.quantize.placement, which says what each was measured to cost.
    """
    if precision is Precision.FP8 and op == "Conv" and len(weight) > 1:
        outputs, inputs, *kernel = weight
        if groups != 1:
            return f"{groups} groups: TensorRT has fp8 kernels for one"
        if math.prod(kernel) > 32:
            return f"a kernel of {' x '.join(map(str, kernel))}: TensorRT's fp8 kernels hold at most 32 weights"
        if outputs % 16 or inputs % 16:
            return f"{inputs} channels to {outputs}: TensorRT's fp8 kernels take multiples of 16"
    if op == "Conv" and len(weight) > 1 and weight[1] == 1:
        return "depthwise: rounding costs it too much accuracy, except behind a ReLU"
    if op == "Conv" and len(weight) > 1:
        return f"few input channels ({weight[1]}): int8 kernels gain nothing"
    if op == "MatMul":
        return "multiplies activations or small matrices: int8 kernels gain nothing"
    return "int8 kernels gain nothing here"


def _products(op: str, data: tuple[int, ...], weight: tuple[int, ...], result: tuple[int, ...]) -> int:
    """Return the multiply-adds of a node, from the shapes of its two operands and of its result."""
    if op == "Conv":
        return math.prod(result) * math.prod(weight[1:])
    if op == "ConvTranspose":
        return math.prod(data) * math.prod(weight[1:])
    return math.prod(result) * data[-1] if data else 0


class PlanLayers(NamedTuple):
    """What a library says of the layers of an engine.

    ``rows``: name, type, and the kernel or the format of the output, of the first layers; ``more``: how many follow.
    ``command``: the library's own command that times them, empty if there is none. ``counts``: what their kernels do.
    """

    rows: list[tuple[str, str, str]]
    more: int
    command: str
    counts: KernelCounts


def describe_plan(bundle: Bundle, engine: EngineRecord) -> PlanLayers | None:
    """Return what an engine's layers file says, None without such a file, or for one that names no layers.

    TensorRT writes ``{"Layers": [...]}``: of each layer its name alone, or an object of which a few keys are read here.
    """
    if engine.layers is None:
        return None
    try:
        said = msgspec.json.decode(bundle.read(engine.layers))
    except msgspec.DecodeError:
        return None
    found = said.get("Layers") if isinstance(said, dict) else None
    if not isinstance(found, list) or not found:
        return None
    flavour = registry.find(engine.key.flavour)
    command = "" if flavour is None else flavour.profiler(shlex.quote(engine.file.path))
    rows = [_row_of_plan(one) for one in found[:_PLAN_ROWS]]
    return PlanLayers(rows, max(0, len(found) - _PLAN_ROWS), command, count_kernels(found))


def _row_of_plan(layer: object) -> tuple[str, str, str]:
    if not isinstance(layer, dict):
        return str(layer), "", ""
    outputs = layer.get("Outputs")
    first = outputs[0] if isinstance(outputs, list) and outputs and isinstance(outputs[0], dict) else {}
    kernel = layer.get("TacticName") or first.get("Format/Datatype") or ""
    return str(layer.get("Name", "")), str(layer.get("LayerType", "")), str(kernel)
