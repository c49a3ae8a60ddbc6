"""What tests of plans begin with."""

from __future__ import annotations

import msgspec
import onnx
import pytest
from onnx import TensorProto, helper

from edge_backbones import Bundle
from edge_backbones.bundle.manifest import GraphRecord
from edge_backbones.bundle.writer import record_file, write_manifest
from edge_backbones.spec import Precision
from edge_backbones.testing import make_bundle


@pytest.fixture
def bundle(tmp_path):
    """The pooling bundle, with the ONNX graph of what its engine computes."""
    bundle = make_bundle(tmp_path / "pooling.bundle")
    pools = [
        helper.make_node("AveragePool", ["pixel_values"], [stage], kernel_shape=[k, k], strides=[k, k])
        for stage, k in (("pool4", 4), ("pool8", 8))
    ]
    shape = bundle.manifest.input.opt_shape
    graph = helper.make_graph(
        pools,
        "average_pooling",
        [helper.make_tensor_value_info("pixel_values", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(node.output[0], TensorProto.FLOAT, None) for node in pools],
    )
    (bundle.path / "graphs").mkdir()
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)]), bundle.path / "graphs" / "fp32.onnx"
    )
    file = record_file(bundle.path, "graphs/fp32.onnx")
    record = GraphRecord(format="onnx", precision=Precision.FP32, file=file, opset=20)
    write_manifest(bundle.path, msgspec.structs.replace(bundle.manifest, graphs=(record,)))
    return Bundle.open(bundle.path)
