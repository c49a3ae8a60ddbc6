"""The gate of ONNX graphs: what ONNX's own library writes passes, and what would leave the file, or lies, does not."""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from edge_backbones.bundle import onnx_gate
from edge_backbones.bundle.onnx_gate import graph_fault
from tests.graphs import pooling_graph

ORT_MEMORY = "*/_ORT_MEM_ADDR_/*"


def messages_of(descriptor, found=None):
    found = {} if found is None else found
    name = descriptor.full_name.removeprefix("onnx.")
    if name not in found:
        found[name] = descriptor
        for field in descriptor.fields:
            if field.message_type is not None:
                messages_of(field.message_type, found)
    return found


def repeats(field) -> bool:
    return field.is_repeated if hasattr(field, "is_repeated") else field.label == field.LABEL_REPEATED


def test_the_fields_are_those_of_onnx():
    """A newer ONNX may have more: then they are added here, and graphs with them pass."""
    kinds = {1: "double", 2: "float", 3: "int", 4: "int", 5: "int", 13: "int", 14: "int", 9: "string", 12: "bytes"}
    for name, descriptor in messages_of(onnx.ModelProto.DESCRIPTOR).items():
        ours = onnx_gate.MESSAGES[name]
        for field in descriptor.fields:
            kind = kinds.get(field.type) or field.message_type.full_name.removeprefix("onnx.")
            assert ours[field.number][:3] == (field.name, kind, repeats(field)), (name, field.name)


def tensors() -> list[TensorProto]:
    """Every type of element, in raw_data and in the field that is for it."""
    found = []
    for name, number in TensorProto.DataType.items():
        if name in ("UNDEFINED", "FLOAT6E2M3", "FLOAT6E3M2"):  # no engine takes six bits
            continue
        for shape in ((), (0,), (3,), (2, 3, 5)):
            count = int(np.prod(shape))
            values = ["a"] * count if name == "STRING" else np.zeros(count, helper.tensor_dtype_to_np_dtype(number))
            found.append(helper.make_tensor(f"{name}{shape}", number, shape, values))
            if name != "STRING":
                packed = {"INT4": 2, "UINT4": 2, "FLOAT4E2M1": 2, "INT2": 4, "UINT2": 4}.get(name)
                size = -(-count // packed) if packed else count * helper.tensor_dtype_to_np_dtype(number).itemsize
                found.append(helper.make_tensor(f"raw {name}{shape}", number, shape, bytes(size), raw=True))
    return found


def test_what_onnx_writes_passes():
    model = pooling_graph()
    model.graph.initializer.extend(tensors())
    model.graph.doc_string = "\u00e9" * 1000
    model.metadata_props.add(key="k", value="v")
    model.functions.append(
        helper.make_function("mine", "f", ["x"], ["y"], [helper.make_node("Relu", ["x"], ["y"])], model.opset_import)
    )
    model.graph.node.append(
        helper.make_node(
            "Nothing", [], ["n"], domain="mine", f=1.5, i=-3, s="x", floats=[1.0, 2.0], ints=[-1, 2], strings=["a", "b"]
        )
    )
    model.graph.value_info.append(
        helper.make_value_info("s", helper.make_sequence_type_proto(helper.make_tensor_type_proto(1, ["n", 3, None])))
    )
    assert graph_fault(model.SerializeToString()) is None
    assert graph_fault(bytearray(model.SerializeToString())) is None


def external(tensor: TensorProto, location: str = "../secret") -> TensorProto:
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in {"location": location, "offset": "4096", "length": "12"}.items():
        tensor.external_data.add(key=key, value=value)
    return tensor


def secret() -> TensorProto:
    return external(numpy_helper.from_array(np.ones(3, np.float32), "stolen"))


def in_weight(model):
    external(model.graph.initializer[0])


def in_memory(model):
    external(model.graph.initializer[0], ORT_MEMORY)


def without_location(model):
    """onnx's own reader goes by data_location; others go by the field."""
    external(model.graph.initializer[0]).data_location = TensorProto.DEFAULT


def only_location(model):
    model.graph.initializer[0].data_location = TensorProto.EXTERNAL


def in_constant(model):
    external(model.graph.node[0].attribute[0].t)


def in_tensors_of_an_attribute(model):
    model.graph.node.append(helper.make_node("Nothing", [], ["n"], all=[secret()]))


def in_branch(model):
    model.graph.node[3].attribute[0].g.initializer.append(secret())


def in_function(model):
    node = helper.make_node("Constant", [], ["y"], value=secret())
    model.functions.append(helper.make_function("mine", "f", [], ["y"], [node], model.opset_import))


def in_default_of_a_function(model):
    function = helper.make_function("mine", "f", [], [], [], model.opset_import)
    function.attribute_proto.append(helper.make_attribute("t", secret()))
    model.functions.append(function)


def in_training(model):
    model.training_info.add().algorithm.initializer.append(secret())


@pytest.mark.parametrize(
    "place",
    [
        in_weight, in_memory, without_location, only_location, in_constant, in_tensors_of_an_attribute, in_branch,
        in_function, in_default_of_a_function, in_training,
    ],
)  # fmt: skip
def test_values_outside_of_the_graph_are_refused_wherever_they_are(place: Callable[[onnx.ModelProto], None]):
    model = pooling_graph()
    place(model)
    fault = graph_fault(model.SerializeToString())
    assert fault is not None
    assert "has its values outside of the graph, in another file or in memory" in fault


def sparse(model):
    values = numpy_helper.from_array(np.ones(1, np.float32), "v")
    model.graph.sparse_initializer.append(
        helper.make_sparse_tensor(values, numpy_helper.from_array(np.array([1 << 40])), [2])
    )


def too_few_bytes(model):
    model.graph.initializer[0].raw_data = bytes(8)


def too_many_bytes(model):
    model.graph.initializer[0].raw_data = bytes(16)


def negative(model):
    model.graph.initializer[0].dims[:] = [-1, -3]


def overflowing(model):
    model.graph.initializer[0].dims[:] = [1 << 32, 1 << 32, 3]


def many_axes(model):
    model.graph.initializer[0].dims[:] = [1] * 100


def no_type(model):
    model.graph.initializer[0].data_type = 99


def both_fields(model):
    model.graph.initializer[0].float_data[:] = [1.0] * 3


def wrong_field(model):
    model.graph.initializer[0].ClearField("raw_data")
    model.graph.initializer[0].int64_data[:] = [1] * 3


def too_few_values(model):
    model.graph.initializer[0].ClearField("raw_data")
    model.graph.initializer[0].float_data[:] = [1.0] * 2


def segmented(model):
    model.graph.initializer[0].segment.end = 3


def negative_shape(model):
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = -7


def deep(model):
    for _ in range(30):
        inner = copy.deepcopy(model.graph)
        model.graph.node.append(helper.make_node("If", ["yes"], ["z"], then_branch=inner))
        del model.graph.node[:-1]


REFUSED = {
    sparse: "sparse",
    too_few_bytes: "has 8 bytes, and its shape 1x3x1x1 asks for 12",
    too_many_bytes: "has 16 bytes, and its shape 1x3x1x1 asks for 12",
    negative: "negative size",
    overflowing: "more than any tensor",
    many_axes: "more than 64 axes",
    no_type: "type 99",
    both_fields: "in a field that is not for its type",
    wrong_field: "in a field that is not for its type",
    too_few_values: "has 2 values, and its shape 1x3x1x1 asks for 3",
    segmented: "outside of the graph",
    negative_shape: "negative size",
    deep: "deeper than 40",
}


@pytest.mark.parametrize("change", REFUSED, ids=lambda change: change.__name__)
def test_a_graph_that_lies_is_refused(change):
    model = pooling_graph()
    change(model)
    fault = graph_fault(model.SerializeToString())
    assert fault is not None
    assert REFUSED[change] in fault


GRAPH = pooling_graph().SerializeToString()


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "no graph"),
        (b"no ONNX", "which ONNX does not know"),
        (GRAPH[:-1], "reaches behind the end"),
        (GRAPH + b"\0", "which ONNX does not know"),
        (GRAPH + b"\x3a\0", "has graph twice"),
        (GRAPH + b"\x3b\0", "wire type 3"),
        (b"\x08\x0a\x3a\0", "no operator set"),
        (b"\x08" + b"\xff" * 11, "longer than 64 bits"),
        (b"\x12\x02\xff\xff" + GRAPH, "not UTF-8"),
        (b"\xf8\xff\xff\xff\x0f\0", "which ONNX does not know"),
    ],
)
def test_bytes_that_are_no_graph_are_refused(data, said):
    fault = graph_fault(data)
    assert fault is not None
    assert said in fault


def test_a_graph_of_endless_fields_is_left_early(monkeypatch):
    monkeypatch.setattr(onnx_gate, "_MOST_FIELDS", 10)
    assert "more than 10 fields" in str(graph_fault(GRAPH))


@given(st.data())
def test_a_changed_byte_gives_a_phrase_or_a_graph_that_onnx_reads(data):
    """The independent reader: what passes here is a message for protobuf too, with all of its values in it."""
    changed = bytearray(GRAPH)
    for _ in range(data.draw(st.integers(1, 3))):
        changed[data.draw(st.integers(0, len(changed) - 1))] = data.draw(st.integers(0, 255))
    fault = graph_fault(changed)
    if fault is not None:
        assert len(fault) < 400
        assert "\n" not in fault
        return
    model = onnx.load_from_string(bytes(changed))
    for tensor in model.graph.initializer:
        assert not onnx.external_data_helper.uses_external_data(tensor)
        numpy_helper.to_array(tensor)
