"""What OpenVINO refuses is quoted by its cause: provoked here with the installed release, because texts change."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edge_backbones.engines.openvino import session as openvino
from edge_backbones.errors import CompileError, EngineMismatchError, InferenceError

WEIGHT = np.ones((4, 3, 3, 3), np.float32)


def graph(*nodes: onnx.NodeProto, shape=(1, 3, 8, 8), inputs=(), opset=19, **constants: np.ndarray) -> bytes:
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    tensors = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    made = helper.make_graph(nodes, "g", [x, *inputs], [y], tensors)
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid("com.acme", 1)]
    return helper.make_model(made, opset_imports=opsets, ir_version=8).SerializeToString()


def conv(name="stem/Conv", result="y", **attributes) -> onnx.NodeProto:
    return helper.make_node("Conv", ["x", "w"], [result], name=name, **attributes)


def node(operation, *inputs, result="y", **attributes) -> onnx.NodeProto:
    return helper.make_node(operation, list(inputs), [result], name=f"head/{operation}", **attributes)


OFFSETS = helper.make_tensor_value_info("o", TensorProto.FLOAT, (1, 18, 6, 6))
READING = {
    "an operation without a rule": (
        graph(node("DeformConv", "x", "w", "o"), inputs=[OFFSETS], w=WEIGHT),
        "no conversion rule for DeformConv",
    ),
    "operations of others": (
        graph(node("Foo", "x", result="z", domain="com.acme"), node("Bar", "z", domain="com.acme")),
        "no conversion rule for com.acme.Bar, com.acme.Foo",
    ),
    "one that needs another package": (
        graph(node("StringNormalizer", "x")),
        "no conversion rule for StringNormalizer",
    ),
    "channels": (
        graph(conv(), shape=(1, 5, 8, 8), w=WEIGHT),
        "Conv 'stem/Conv': Data batch channel count (5) does not match filter input channel count (3)",
    ),
    "groups": (
        graph(conv(group=2), w=WEIGHT),
        "Conv 'stem/Conv': Input channels dimension of data batch is incompatible with filter groups or input channels",
    ),
    "types": (
        graph(node("Add", "x", "b"), b=np.ones(8, np.int64)),
        "Add 'head/Add': Arguments do not have the same element type (arg0 element type: f32, arg1 element type: i64)",
    ),
    "sizes": (
        graph(node("Reshape", "x", "s"), s=np.array([7, 7])),
        "Reshape 'head/Reshape': Requested output shape [7,7] is incompatible with input shape",
    ),
    "a missing attribute": (graph(node("Concat", "x", "x")), "unknown attribute 'axis'"),
    "an attribute that is no choice": (
        graph(node("Gelu", "x", approximate="banana"), opset=20),
        "Gelu 'head/Gelu': Unsupported approximate attribute: banana",
    ),
    "an axis": (graph(node("Concat", "x", "x", axis=9)), "Concat 'head/Concat': Axis 9 out of the tensor rank"),
    "a tensor from nowhere": (graph(node("Relu", "nothing")), "nothing node not found in graph cache"),
    "several at once": (
        graph(
            conv(result="z", group=2),
            node("DeformConv", "z", "w", "o"),
            inputs=[OFFSETS],
            w=WEIGHT,
        ),
        "no conversion rule for DeformConv; Conv 'stem/Conv': Input channels dimension",
    ),
}
FRAMES = ("Exception from", "failed at", "While validating", "FrontEnd API", "Summary", "http", ".cpp", ".hpp", "\n")


def bare(message: str) -> bool:
    return not any(frame in message for frame in FRAMES)


@pytest.mark.parametrize("name", READING)
def test_a_graph_that_cannot_be_read_is_refused_with_the_cause(name):
    data, said = READING[name]
    with pytest.raises(CompileError) as caught:
        openvino.read_model(data)
    message = str(caught.value)
    assert message.startswith(f"OpenVINO {openvino.library_version()} cannot read this graph: ")
    assert said in message
    assert bare(message), message


def test_a_graph_that_cannot_be_compiled_is_refused_with_the_cause():
    vast = graph(node("Tile", "x", "r"), r=np.array([1 << 20, 1 << 10, 1 << 4, 1]))  # 13 TB
    with pytest.raises(CompileError) as caught:
        openvino.compile_model(openvino.read_model(vast))
    assert "cannot compile this graph: Failed to allocate" in str(caught.value)
    assert bare(str(caught.value))


@pytest.fixture(scope="module")
def blob() -> bytes:
    return openvino.compile_model(openvino.read_model(graph(conv(), w=WEIGHT)))


def test_a_damaged_engine_is_refused_with_the_cause(blob):
    """Whichever byte it is: UTF-8 that its text is not is a refusal too, and no error of Python's."""
    told = set()
    damaged = [b"", b"x" * 700, blob[:100], blob[: len(blob) // 2]]
    for position in (0, 10, 40, 100, 200, len(blob) // 2):
        damaged.append(blob[:position] + bytes([blob[position] ^ 0xFF]) + blob[position + 1 :])
    for data in damaged:
        with pytest.raises(EngineMismatchError) as caught:
            openvino.OpenVinoSession(bytearray(data), outputs=["y"])
        assert bare(str(caught.value)), str(caught.value)
        told.add(str(caught.value))
    assert any("Cannot import compiled blob: incompatible runtime requirements magic" in message for message in told)


def test_an_engine_of_another_release_is_refused_with_both(blob):
    release = openvino.library_version().partition("-")[0]
    other = "1" + release[1:]
    assert release.encode() in blob
    with pytest.raises(EngineMismatchError) as caught:
        openvino.OpenVinoSession(bytearray(blob.replace(release.encode(), other.encode())), outputs=["y"])
    assert "it was built for a different runtime configuration" in str(caught.value)
    assert f"ov={other}" in str(caught.value)
    assert f"ov={release}" in str(caught.value)


def test_an_engine_that_fails_while_it_runs_says_why(blob):
    session = openvino.OpenVinoSession(bytearray(blob), outputs=["y"])
    with pytest.raises(InferenceError, match=r"failed on float32 \(1, 3, 4, 4\): Can't set the input tensor.*incompat"):
        session.run(np.ones((1, 3, 4, 4), np.float32))
    dynamic = graph(node("Reshape", "x", "s"), shape=("n", 3, "h", "w"), s=np.array([1, 3, -1, 7]))
    session = openvino.OpenVinoSession(bytearray(openvino.compile_model(openvino.read_model(dynamic))), outputs=["y"])
    with pytest.raises(InferenceError) as caught:
        session.run(np.ones((1, 3, 8, 8), np.float32))
    assert "the shape of input data (1.3.8.8) conflicts with the reshape pattern (1.3.-1.7)" in str(caught.value)
    assert bare(str(caught.value))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("Exception from src/core/src/runtime/allocator.cpp:79:\nstd::bad_alloc\n\n", "out of memory (std::bad_alloc)"),
        ("Exception from src/a.cpp:1:\nCheck 'x == 1' failed at src/b.cpp:2:\n\n", "Exception from src/a.cpp:1:"),
        ("", "RuntimeError"),
        ("something new", "something new"),
    ],
)
def test_a_text_that_is_all_trace_is_quoted_as_it_is(text, said):
    assert openvino.cause(RuntimeError(text)) == said
