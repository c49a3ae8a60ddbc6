"""Small ONNX graphs of every kind of node, tensor and nesting, and a bundle that holds one."""

from __future__ import annotations

import hashlib
from pathlib import Path

import msgspec
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from edge_backbones.bundle.manifest import GraphRecord
from edge_backbones.bundle.reader import Bundle
from edge_backbones.bundle.writer import BundleWriter, write_manifest
from edge_backbones.spec import Precision
from edge_backbones.testing import make_bundle


def pooling_graph() -> onnx.ModelProto:
    """The pooling backbone of edge_backbones.testing in ONNX, with a weight, a constant and a branch."""
    image = helper.make_tensor_value_info("pixel_values", TensorProto.FLOAT, [2, 3, 32, 48])
    outputs = [helper.make_tensor_value_info(f"pool{k}", TensorProto.FLOAT, [2, 3, 32 // k, 48 // k]) for k in (4, 8)]
    one = numpy_helper.from_array(np.ones((1, 3, 1, 1), np.float32), "one")
    yes = numpy_helper.from_array(np.array(True), "yes")
    same = helper.make_graph(
        [helper.make_node("Identity", ["scaled"], ["chosen"])],
        "branch",
        [],
        [helper.make_tensor_value_info("chosen", TensorProto.FLOAT, [2, 3, 32, 48])],
    )
    nodes = [
        helper.make_node("Constant", [], ["constant"], "constant", value=one),
        helper.make_node("Mul", ["pixel_values", "weight"], ["mul"], "mul"),
        helper.make_node("Mul", ["mul", "constant"], ["scaled"], "scale"),
        helper.make_node("If", ["yes"], ["either"], "if", then_branch=same, else_branch=same),
    ]
    nodes += [
        helper.make_node("AveragePool", ["either"], [f"pool{k}"], f"pool{k}", kernel_shape=[k, k], strides=[k, k])
        for k in (4, 8)
    ]
    weight = numpy_helper.from_array(np.ones((1, 3, 1, 1), np.float32), "weight")
    graph = helper.make_graph(nodes, "pooling", [image], outputs, [weight, yes])
    return helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 17)])


def bundle_with_graph(target: Path, graph: bytes | None = None) -> Bundle:
    """The pooling backbone with its ONNX graph (or ``graph`` in its place) and an engine for this CPU."""
    data = pooling_graph().SerializeToString() if graph is None else graph
    bundle = make_bundle(target)
    (target / "graphs").mkdir()
    return with_graph(bundle, data)


def with_graph(bundle: Bundle, data: bytes) -> Bundle:
    """The bundle with these bytes as its graph, whatever they are, and a manifest that fits."""
    path = "graphs/fp32.onnx"
    (bundle.path / path).unlink(missing_ok=True)
    file = BundleWriter(bundle.path).add_file(path, data)
    record = GraphRecord(format="onnx", precision=Precision.FP32, file=file, opset=17)
    [engine] = bundle.manifest.engines
    key = msgspec.structs.replace(engine.key, graph_sha256=hashlib.sha256(data).hexdigest())
    engines = (msgspec.structs.replace(engine, key=key),)
    write_manifest(bundle.path, msgspec.structs.replace(bundle.manifest, graphs=(record,), engines=engines))
    return Bundle.open(bundle.path)
