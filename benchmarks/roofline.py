"""How far an engine is from what the machine can do: the work in its graph over the machine's measured ceilings.

The model is the least that any engine must do. Operations: two for every multiply-add of Conv, Gemm and MatMul, nothing for
the other nodes. Bytes: every weight once per call, and what the matrix operations read and write, each tensor once per
operation that reads it and once where it is written, in the number format that the graph has for it. All other nodes are
merged into their producers and cost nothing. What a cache holds is not fetched from memory again, so that a small network
may be faster than its bytes allow.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np

from edge_backbones.errors import InputError, MissingDependencyError

_MATRIX = frozenset({"Conv", "Gemm", "MatMul"})
_VIEWS = frozenset({"Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Identity"})
# Merged into the operation before them: their output is what is written.
_POINTWISE = frozenset(
    {
        "Add",
        "Cast",
        "Clip",
        "Div",
        "Elu",
        "Erf",
        "Gelu",
        "HardSigmoid",
        "HardSwish",
        "LeakyRelu",
        "Mul",
        "PRelu",
        "Relu",
    }
    | {"Sigmoid", "Softplus", "Sub", "Tanh"}
)
_BYTES = {"int8": 1, "fp8": 1, "fp16": 2, "bf16": 2, "fp32": 4}


class _Strict(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    pass


class Work(_Strict, frozen=True):
    """The work of one image.

    Operations by the number format of their operands, and bytes of activations. ``weight_bytes`` are read once per
    call, whatever its batch.
    """

    operations: dict[str, float]
    activation_bytes: float
    weight_bytes: int


class Ceilings(_Strict, frozen=True):
    """The best that was measured on this machine.

    Operations per second by number format, and bytes per second of a copy, where each byte counts when it is read and
    when it is written.
    """

    threads: int
    operations_per_second: dict[str, float]
    bytes_per_second: float


class Roofline(_Strict, frozen=True):
    """One call compared with the ceilings.

    ``fraction``: ``attainable_ms`` over the measured time. ``bound``: what limits the call first, operations or bytes.
    ``operations_per_second``: reached, over all formats.
    """

    batch: int
    measured_ms: float
    operations_ms: float
    bytes_ms: float
    attainable_ms: float
    fraction: float
    bound: Literal["operations", "bytes"]
    operations_per_second: float


def roofline(work: Work, ceilings: Ceilings, milliseconds: float, batch: int) -> Roofline:
    """Compare a call of ``batch`` images that took ``milliseconds`` with the ceilings.

    Half formats without a ceiling count as fp32, as CPUs compute them. Raises InputError for another format without
    one.
    """
    operations_ms = sum(
        1e3 * batch * count / _ceiling(ceilings.operations_per_second, kind) for kind, count in work.operations.items()
    )
    bytes_ms = 1e3 * (work.weight_bytes + batch * work.activation_bytes) / ceilings.bytes_per_second
    attainable = max(operations_ms, bytes_ms)
    return Roofline(
        batch=batch,
        measured_ms=milliseconds,
        operations_ms=operations_ms,
        bytes_ms=bytes_ms,
        attainable_ms=attainable,
        fraction=attainable / milliseconds,
        bound="operations" if operations_ms >= bytes_ms else "bytes",
        operations_per_second=1e3 * batch * sum(work.operations.values()) / milliseconds,
    )


def _ceiling(ceilings: Mapping[str, float], kind: str) -> float:
    found = ceilings.get(kind) or (ceilings.get("fp32") if kind in ("fp16", "bf16") else None)
    if not found:
        raise InputError(f"no ceiling was measured for {kind} operations, only for {', '.join(ceilings) or 'none'}")
    return found


# ---- What a graph does


def count_graph(onnx_path: Path, input_shape: Sequence[int]) -> Work:
    """Count the work of an ONNX graph with one input of ``input_shape``, whose first axis is the batch.

    Raises InputError if the graph does not take that shape, or if the shape of a matrix operation stays unknown.
    """
    graph = _Graph(onnx_path, tuple(input_shape))
    operations: dict[str, float] = {}
    weights: dict[str, int] = {}
    written: dict[str, int] = {}
    activations = 0
    for node in graph.nodes:
        if node.op_type not in _MATRIX:
            continue
        sources = [graph.source(name) for name in node.input if name]
        kinds = [graph.kind(source) for source in sources[:2]]
        # Both operands in 8 bits, or the engine computes in the format that they are turned into.
        kind = kinds[0] if kinds[0] == kinds[1] else graph.kind(node.output[0])
        operations[kind] = operations.get(kind, 0) + 2 * graph.multiply_adds(node) / input_shape[0]
        for source in dict.fromkeys(sources):
            if source in graph.constants:
                weights[source] = graph.size(source)
            else:
                activations += graph.size(source)
        written.update((name, graph.size(name)) for name in graph.stored(node.output[0]))
    return Work(
        operations=operations,
        activation_bytes=(activations + sum(written.values())) / input_shape[0],
        weight_bytes=sum(weights.values()),
    )


class _Graph:
    """Shapes, formats and neighbours of the tensors of one graph."""

    def __init__(self, path: Path, input_shape: tuple[int, ...]) -> None:
        onnx = _load_onnx()
        self._what = f"{path.name} for an input of {input_shape}"
        model = onnx.load(path, load_external_data=False)
        graph = model.graph
        self.constants = {tensor.name: tensor for tensor in graph.initializer}
        inputs = [value for value in graph.input if value.name not in self.constants]
        if len(inputs) != 1 or len(inputs[0].type.tensor_type.shape.dim) != len(input_shape):
            raise InputError(f"{path} does not take one input of {len(input_shape)} axes")
        for axis, size in zip(inputs[0].type.tensor_type.shape.dim, input_shape, strict=True):
            if axis.HasField("dim_value") and axis.dim_value != size:
                raise InputError(f"{path} is fixed to {axis.dim_value} where the input of {input_shape} has {size}")
            axis.dim_value = size
        del graph.value_info[:]  # of other sizes
        for output in graph.output:
            output.type.tensor_type.ClearField("shape")
        try:
            graph = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True).graph
        except onnx.shape_inference.InferenceError as error:
            raise InputError(f"no shapes in {self._what}: {' '.join(str(error).split())}") from error
        self.nodes = list(graph.node)
        self._names = onnx.TensorProto.DataType.Name
        self._types = {value.name: value.type.tensor_type for value in (*inputs, *graph.value_info, *graph.output)}
        self._producers = {name: node for node in self.nodes for name in node.output}
        self._consumers: dict[str, list[Any]] = {}
        for node in self.nodes:
            for name in node.input:
                self._consumers.setdefault(name, []).append(node)
        self._outputs = {output.name for output in graph.output}

    def shape(self, name: str) -> tuple[int, ...]:
        if name in self.constants:
            return tuple(self.constants[name].dims)
        held = self._types.get(name)
        if held is None or not held.HasField("shape") or not all(d.HasField("dim_value") for d in held.shape.dim):
            raise InputError(f"the shape of {name} stays unknown in {self._what}: export the graph with fixed sizes")
        return tuple(d.dim_value for d in held.shape.dim)

    def kind(self, name: str) -> str:
        """Return the number format of a tensor: ``int8``, ``fp8``, ``fp16``, ``bf16``, ``fp32``..."""
        element = self.constants[name].data_type if name in self.constants else self._types[name].elem_type
        full = str(self._names(element)).lower()
        if full.startswith("float8"):
            return "fp8"
        return {"float": "fp32", "float16": "fp16", "bfloat16": "bf16", "uint8": "int8"}.get(full, full)

    def size(self, name: str) -> int:
        """Return the bytes of a tensor."""
        kind = self.kind(name)
        if kind not in _BYTES:
            raise InputError(f"{name} in {self._what} is {kind}: only {', '.join(_BYTES)} are counted")
        return math.prod(self.shape(name)) * _BYTES[kind]

    def source(self, name: str) -> str:
        """Return the tensor that is read for ``name``: behind views, the 8-bit side of a DequantizeLinear."""
        while name in self._producers and name not in self.constants:
            node = self._producers[name]
            if node.op_type == "DequantizeLinear":
                return str(node.input[0])
            if node.op_type not in _VIEWS:
                break
            name = str(node.input[0])
        return name

    def stored(self, name: str) -> set[str]:
        """Return the tensors that are written for an operation's output: behind pointwise nodes and QuantizeLinear."""
        found = {name} if name in self._outputs else set()
        for node in self._consumers.get(name, ()):
            if node.op_type == "QuantizeLinear":
                found.add(node.output[0])
            elif node.op_type in _POINTWISE:
                found |= self.stored(node.output[0])
            else:
                found.add(name)
        return found

    def multiply_adds(self, node: Any) -> int:
        outputs, first = math.prod(self.shape(node.output[0])), self.shape(node.input[0])
        if node.op_type == "Conv":
            return outputs * math.prod(self.shape(node.input[1])[1:])  # (out, in / groups, *kernel)
        transposed = any(attribute.name == "transA" and attribute.i for attribute in node.attribute)
        return outputs * first[0 if transposed else -1]


def _load_onnx() -> Any:
    try:
        import onnx
        import onnx.shape_inference
    except ImportError as error:
        raise MissingDependencyError("counting the operations of a graph", "build") from error
    return onnx


# ---- What the machine does at best

_SIDE, _PRODUCTS = 1536, 4  # of the matrices, and of products one after another
_COPIED = 256 << 20
_REPEATS = 5


def measure_ceilings(threads: int) -> Ceilings:
    """Measure this machine: large matrix products in fp32 and int8 with OpenVINO, and a large copy.

    Each figure is the best of several. Takes seconds and half a gigabyte.
    """
    operations = {kind: _product_rate(kind, threads) for kind in ("fp32", "int8")}
    return Ceilings(threads=threads, operations_per_second=operations, bytes_per_second=_copy_rate(threads))


def _product_rate(kind: Literal["fp32", "int8"], threads: int) -> float:
    """Return the operations per second of a matrix product; a multiply-add is two."""
    from edge_backbones.engines.openvino.session import OpenVinoSession, compile_model, read_model

    blob = compile_model(read_model(product_graph(kind, _SIDE, _PRODUCTS)))
    session = OpenVinoSession(bytearray(blob), outputs=("product",), threads=threads)
    images = np.random.default_rng(0).standard_normal((_SIDE, _SIDE)).astype(np.float32)
    try:
        seconds = best_seconds(lambda: session.run(images))
    finally:
        session.close()
    return 2 * _PRODUCTS * _SIDE**3 / seconds


def product_graph(kind: Literal["fp32", "int8"], side: int, products: int) -> bytes:
    """Return an ONNX graph of square matrix products; for int8 with Q/DQ pairs and 8-bit weights."""
    onnx = _load_onnx()
    helper, numpy_helper = onnx.helper, onnx.numpy_helper
    random = np.random.default_rng(0)
    nodes, constants, name = [], [], "matrix"
    if kind == "int8":
        scalars = {"scale": np.float32(4 / 127), "zero": np.int8(0), "scales": np.full(side, 1 / side, np.float32)}
        scalars["zeros"] = np.zeros(side, np.int8)
        constants += [numpy_helper.from_array(np.asarray(value), key) for key, value in scalars.items()]
    for index in range(products):
        weight, result = f"weight{index}", "product" if index == products - 1 else f"product{index}"
        if kind == "int8":
            values = random.integers(-127, 128, (side, side)).astype(np.int8)
            constants.append(numpy_helper.from_array(values, f"{weight}.int8"))
            nodes += [
                helper.make_node("QuantizeLinear", [name, "scale", "zero"], [f"{name}.int8"]),
                helper.make_node("DequantizeLinear", [f"{name}.int8", "scale", "zero"], [f"{name}.dequantized"]),
                helper.make_node("DequantizeLinear", [f"{weight}.int8", "scales", "zeros"], [weight], axis=1),
            ]
            name = f"{name}.dequantized"
        else:
            values = (random.standard_normal((side, side)) / side**0.5).astype(np.float32)
            constants.append(numpy_helper.from_array(values, weight))
        nodes.append(helper.make_node("MatMul", [name, weight], [result]))
        name = result
    ends = [helper.make_tensor_value_info(end, onnx.TensorProto.FLOAT, [side, side]) for end in ("matrix", "product")]
    graph = helper.make_graph(nodes, "products", ends[:1], ends[1:], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    return bytes(model.SerializeToString())


def _copy_rate(threads: int) -> float:
    """Return the bytes per second of a copy, read and written."""
    source = np.random.default_rng(0).integers(0, 256, _COPIED, np.uint8)
    target = np.zeros_like(source)
    bounds = np.linspace(0, _COPIED, threads + 1).astype(int)
    parts = [(target[low:high], source[low:high]) for low, high in itertools.pairwise(bounds)]
    with ThreadPoolExecutor(threads) as pool:
        seconds = best_seconds(lambda: list(pool.map(lambda part: np.copyto(*part), parts)))
    return 2 * _COPIED / seconds


def best_seconds(call: Callable[[], Any]) -> float:
    """Return the seconds of the fastest of several calls, after one to warm up."""
    call()
    found = []
    for _ in range(_REPEATS):
        start = time.perf_counter()
        call()
        found.append(time.perf_counter() - start)
    return min(found)
