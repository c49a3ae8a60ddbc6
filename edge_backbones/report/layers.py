"""The layers of a bundle's graph: the number format of each, and how many multiply-adds it takes."""

from __future__ import annotations

import math
from typing import NamedTuple

from edge_backbones.bundle.manifest import GraphRecord
from edge_backbones.bundle.reader import Bundle
from edge_backbones.errors import IntegrityError, MissingDependencyError
from edge_backbones.spec import Precision

_LAYERS_SHOWN = 12
_PRECISIONS_OF_LAYERS = (Precision.INT8, Precision.FP8, Precision.FP16, Precision.BF16, Precision.FP32)
# Nodes that only move data or change its format.
_MOVERS = frozenset({
    "Cast", "Concat", "Constant", "ConstantOfShape", "DepthToSpace", "DequantizeLinear", "Expand", "Flatten", "Gather",
    "Identity", "Pad", "QuantizeLinear", "Range", "Reshape", "Shape", "Slice", "SpaceToDepth", "Split", "Squeeze", "Tile",
    "Transpose", "Unsqueeze",
})  # fmt: skip


class Layer(NamedTuple):
    """A node that computes; ``format`` is its number format, ``products`` its multiply-adds for one image."""

    name: str
    op: str
    format: str
    products: int


class Layers(NamedTuple):
    """The layers of one graph, in order.

    ``formats``: for each number format how many layers compute in it, and their share of the multiply-adds, from 0 to 1.
    ``products``: multiply-adds of all layers for one image. ``outside``: the largest layers of an int8 or fp8 graph that
    compute in another format.
    """

    precision: str
    layers: list[Layer]
    formats: list[tuple[str, int, float]]
    products: int
    outside: list[Layer]


def list_layers(bundle: Bundle) -> Layers | str:
    """Return the layers of the bundle's graph with the fewest bits, or a sentence that says why they are not shown.

    Raises IntegrityError for a file that is no graph of this bundle.
    """
    found = (bundle.manifest.onnx_graph(precision) for precision in _PRECISIONS_OF_LAYERS)
    record = next((graph for graph in found if graph is not None), None)
    if record is None:
        return "This bundle holds no ONNX graph to look into."
    try:
        layers = _read_layers(bundle, record)
    except MissingDependencyError as error:
        return f"Not shown: {error}."
    products = sum(layer.products for layer in layers)
    formats = []
    for one in ("int8", "fp8", "fp16", "bf16", "fp32"):
        of_one = [layer for layer in layers if layer.format == one]
        if of_one:
            formats.append((one, len(of_one), sum(layer.products for layer in of_one) / max(products, 1)))
    few = record.precision.value
    outside = [layer for layer in layers if layer.products and few in ("int8", "fp8") and layer.format != few]
    outside.sort(key=lambda layer: -layer.products)
    return Layers(few, layers, formats, products, outside[:_LAYERS_SHOWN])


def _read_layers(bundle: Bundle, record: GraphRecord) -> list[Layer]:
    """Return the layers of a graph in order, at the bundle's usual input size.

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
        graph = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    except (DecodeError, ValueError, IndexError, onnx.shape_inference.InferenceError) as error:
        raise IntegrityError(
            f"{bundle.path / record.file.path} is not a graph of this bundle: {error}; build the bundle again"
        ) from error
    types = {weight.name: weight.data_type for weight in graph.initializer}
    shapes = {weight.name: tuple(weight.dims) for weight in graph.initializer}
    for value in (*graph.input, *graph.value_info, *graph.output):
        types[value.name] = value.type.tensor_type.elem_type
        shapes[value.name] = tuple(axis.dim_value for axis in value.type.tensor_type.shape.dim)
    halves = {onnx.TensorProto.FLOAT16: "fp16", onnx.TensorProto.BFLOAT16: "bf16"}
    dequantized = {output for node in graph.node if node.op_type == "DequantizeLinear" for output in node.output}
    layers = []
    for node in graph.node:
        operands = [name for name in node.input if name]
        if node.op_type in _MOVERS or not operands:
            continue
        product = node.op_type in ("Conv", "ConvTranspose", "Gemm", "MatMul")
        if product and all(name in dequantized for name in operands[:2]):
            number_format = record.precision.value
        else:
            number_format = halves.get(types.get(operands[0], 0), "fp32")
        count = 0
        if product:
            data, weight, result = (shapes.get(name, ()) for name in (*operands[:2], node.output[0]))
            count = _products(node.op_type, data, weight, result) // input.batch.opt
        layers.append(Layer(node.name, node.op_type, number_format, count))
    return layers


def _products(op: str, data: tuple[int, ...], weight: tuple[int, ...], result: tuple[int, ...]) -> int:
    """Return the multiply-adds of a node, from the shapes of its two operands and of its result."""
    if op == "Conv":
        return math.prod(result) * math.prod(weight[1:])
    if op == "ConvTranspose":
        return math.prod(data) * math.prod(weight[1:])
    return math.prod(result) * data[-1] if data else 0
