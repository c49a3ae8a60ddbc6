"""Check an ONNX graph before any library parses it.

Libraries trust a graph more than they should. OpenVINO and TensorRT read external data from files in the current folder, and
OpenVINO also from addresses in the memory of this process. A tensor with fewer bytes than its shape asks for crashes it. So
the wire format of protobuf is walked first, without onnx, without protobuf and without a copy of the weights.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from edge_backbones.reading import shortened

_MOST_BYTES = (1 << 31) - 1  # protobuf's own limit
_MOST_FIELDS = 4_000_000  # a graph of ten thousand nodes has half a million
_DEEPEST = 40  # messages in messages; a graph in a node's attribute is three
_MOST_AXES = 64
_MOST_ELEMENTS = 1 << 40

_MESSAGES_TEXT = """
ModelProto ir_version=1:int producer_name=2:string producer_version=3:string domain=4:string model_version=5:int
  doc_string=6:string graph=7:GraphProto opset_import=8:OperatorSetIdProto* metadata_props=14:StringStringEntryProto*
  training_info=20:TrainingInfoProto* functions=25:FunctionProto* configuration=26:DeviceConfigurationProto*
OperatorSetIdProto domain=1:string version=2:int
GraphProto node=1:NodeProto* name=2:string initializer=5:TensorProto* doc_string=10:string input=11:ValueInfoProto*
  output=12:ValueInfoProto* value_info=13:ValueInfoProto* quantization_annotation=14:TensorAnnotation*
  sparse_initializer=15:SparseTensorProto* metadata_props=16:StringStringEntryProto*
NodeProto input=1:string* output=2:string* name=3:string op_type=4:string attribute=5:AttributeProto* doc_string=6:string
  domain=7:string overload=8:string metadata_props=9:StringStringEntryProto*
  device_configurations=10:NodeDeviceConfigurationProto*
AttributeProto name=1:string f=2:float i=3:int s=4:bytes t=5:TensorProto g=6:GraphProto floats=7:float* ints=8:int*
  strings=9:bytes* tensors=10:TensorProto* graphs=11:GraphProto* doc_string=13:string tp=14:TypeProto
  type_protos=15:TypeProto* type=20:int ref_attr_name=21:string sparse_tensor=22:SparseTensorProto
  sparse_tensors=23:SparseTensorProto*
TensorProto dims=1:int* data_type=2:int segment=3:TensorProto.Segment float_data=4:float* int32_data=5:int*
  string_data=6:bytes* int64_data=7:int* name=8:string raw_data=9:bytes double_data=10:double* uint64_data=11:int*
  doc_string=12:string external_data=13:StringStringEntryProto* data_location=14:int
  metadata_props=16:StringStringEntryProto*
TensorProto.Segment begin=1:int end=2:int
SparseTensorProto values=1:TensorProto indices=2:TensorProto dims=3:int*
StringStringEntryProto key=1:string value=2:string
ValueInfoProto name=1:string type=2:TypeProto doc_string=3:string metadata_props=4:StringStringEntryProto*
TypeProto tensor_type=1:TypeProto.Tensor sequence_type=4:TypeProto.Sequence map_type=5:TypeProto.Map denotation=6:string
  opaque_type=7:TypeProto.Opaque sparse_tensor_type=8:TypeProto.SparseTensor optional_type=9:TypeProto.Optional
TypeProto.Tensor elem_type=1:int shape=2:TensorShapeProto
TypeProto.SparseTensor elem_type=1:int shape=2:TensorShapeProto
TypeProto.Sequence elem_type=1:TypeProto
TypeProto.Optional elem_type=1:TypeProto
TypeProto.Map key_type=1:int value_type=2:TypeProto
TypeProto.Opaque domain=1:string name=2:string
TensorShapeProto dim=1:TensorShapeProto.Dimension*
TensorShapeProto.Dimension dim_value=1:int dim_param=2:string denotation=3:string
TensorAnnotation tensor_name=1:string quant_parameter_tensor_names=2:StringStringEntryProto*
TrainingInfoProto initialization=1:GraphProto algorithm=2:GraphProto initialization_binding=3:StringStringEntryProto*
  update_binding=4:StringStringEntryProto*
FunctionProto name=1:string input=4:string* output=5:string* attribute=6:string* node=7:NodeProto* doc_string=8:string
  opset_import=9:OperatorSetIdProto* domain=10:string attribute_proto=11:AttributeProto* value_info=12:ValueInfoProto*
  overload=13:string metadata_props=14:StringStringEntryProto*
DeviceConfigurationProto name=1:string num_devices=2:int device=3:string*
NodeDeviceConfigurationProto configuration_id=1:string sharding_spec=2:ShardingSpecProto* pipeline_stage=3:int
ShardingSpecProto tensor_name=1:string device=2:int* index_to_device_group_map=3:IntIntListEntryProto*
  sharded_dim=4:ShardedDimProto*
IntIntListEntryProto key=1:int value=2:int*
ShardedDimProto axis=1:int simple_sharding=2:SimpleShardedDimProto*
SimpleShardedDimProto dim_value=1:int dim_param=2:string num_shards=3:int
"""
"""The messages of onnx.proto (IR version 13) with the name, number and kind of each field; ``*`` marks repeated fields."""


class Field(NamedTuple):
    """A field of a message. ``kind``: ``int``, ``float``, ``double``, ``string``, ``bytes``, or the name of a message."""

    name: str
    kind: str
    repeats: bool
    wire: int


_VARINT, _FIXED64, _LENGTH, _FIXED32 = 0, 1, 2, 5
_WIRES = {"int": _VARINT, "double": _FIXED64, "float": _FIXED32}
_WIDTHS = {"double": 8, "float": 4}


def _messages(text: str) -> dict[str, dict[int, Field]]:
    found: dict[str, dict[int, Field]] = {}
    fields: dict[int, Field] = {}
    for word in text.split():
        name, _, rest = word.partition("=")
        if not rest:
            fields = found[name] = {}
            continue
        number, _, kind = rest.partition(":")
        plain = kind.rstrip("*")
        fields[int(number)] = Field(name, plain, plain != kind, _WIRES.get(plain, _LENGTH))
    return found


MESSAGES = _messages(_MESSAGES_TEXT)

# For each TensorProto.DataType: the bits of an element, the field that holds the values if raw_data does not, and how many
# elements one value of that field holds.
_TYPES: dict[int, tuple[int, str, float]] = {
    1: (32, "float_data", 1), 2: (8, "int32_data", 1), 3: (8, "int32_data", 1), 4: (16, "int32_data", 1),
    5: (16, "int32_data", 1), 6: (32, "int32_data", 1), 7: (64, "int64_data", 1), 8: (0, "string_data", 1),
    9: (8, "int32_data", 1), 10: (16, "int32_data", 1), 11: (64, "double_data", 1), 12: (32, "uint64_data", 1),
    13: (64, "uint64_data", 1), 14: (64, "float_data", 0.5), 15: (128, "double_data", 0.5), 16: (16, "int32_data", 1),
    17: (8, "int32_data", 1), 18: (8, "int32_data", 1), 19: (8, "int32_data", 1), 20: (8, "int32_data", 1),
    21: (4, "int32_data", 2), 22: (4, "int32_data", 2), 23: (4, "int32_data", 2), 24: (8, "int32_data", 1),
    25: (2, "int32_data", 4), 26: (2, "int32_data", 4),
}  # fmt: skip
_VALUES = frozenset(values for _, values, _ in _TYPES.values())


class _FaultError(Exception):
    """What is wrong with the graph."""


def graph_fault(graph: bytes | bytearray) -> str | None:
    """Return a phrase that says why libraries may not parse this graph; None for a sound graph.

    A sound graph is one whole ModelProto with one graph. Every tensor (weights, attributes, subgraphs, functions) holds its
    own values, with as many bytes as its shape and type ask for. There are no fields that ONNX does not define, no sparse
    tensors, and no message is nested deeper than 40 others. Operators are not checked: libraries do that.
    """
    if len(graph) > _MOST_BYTES:
        return f"it has {len(graph)} bytes, and an ONNX graph has less than 2 GiB"
    try:
        seen = _Walk(graph).message("ModelProto", 0, len(graph), 0)
    except _FaultError as fault:
        return str(fault)
    for field, what in (("graph", "no graph"), ("ir_version", "no IR version"), ("opset_import", "no operator set")):
        if field not in seen:
            return f"it is not an ONNX model: it has {what}"
    return None


class _Walk:
    """A walk over the wire format of one graph. Methods raise `_FaultError`; positions are bytes of ``data``."""

    def __init__(self, data: bytes | bytearray) -> None:
        self.data = data
        self.left = _MOST_FIELDS

    def message(self, kind: str, start: int, end: int, depth: int) -> set[str]:
        """Check a message and everything in it; return the names of its fields."""
        if depth > _DEEPEST:
            raise _FaultError(f"it nests messages deeper than {_DEEPEST}")
        if kind == "TensorProto":
            self.tensor(start, end)
            return set()
        if kind == "SparseTensorProto":
            raise _FaultError("it has sparse tensors, and engines take none")
        seen = set()
        for field, wire, first, last in self.fields(kind, start, end):
            name, of = field.name, field.kind
            seen.add(name)
            if of in MESSAGES:
                self.message(of, first, last, depth + 1)
            elif of == "string":
                self.text(first, last)
            elif wire != field.wire:
                self.packed(field, first, last)
            elif name == "dim_value" and first >> 63:
                raise _FaultError("a shape in it has a negative size")
        return seen

    def tensor(self, start: int, end: int) -> None:
        """Check that a tensor holds its own values, as many as its shape and type ask for."""
        shape: list[int] = []
        counts: dict[str, int] = {}
        data_type, name, raw, external = 0, "", None, False
        for field, wire, first, last in self.fields("TensorProto", start, end):
            if field.name == "dims":
                shape += self.varints(first, last) if wire == _LENGTH else [first]
                if len(shape) > _MOST_AXES:
                    raise _FaultError(f"a tensor in it has more than {_MOST_AXES} axes")
            elif field.name == "data_type":
                data_type = first
            elif field.name == "raw_data":
                raw = last - first
            elif field.name in _VALUES:
                one = wire == field.wire
                counts[field.name] = counts.get(field.name, 0) + (1 if one else self.packed(field, first, last))
            elif field.name == "name":
                name = self.text(first, last)
            elif field.name in ("external_data", "segment") or (field.name == "data_location" and first):
                external = True
            elif field.kind == "string":
                self.text(first, last)
            elif field.kind in MESSAGES:
                self.message(field.kind, first, last, 0)  # metadata: flat
        which = f"its tensor {shortened(name, 80)!r}"
        if external:
            raise _FaultError(f"{which} has its values outside of the graph, in another file or in memory")
        if data_type not in _TYPES:
            raise _FaultError(f"{which} has type {data_type}, which no engine takes")
        if any(size >> 63 for size in shape):
            raise _FaultError(f"{which} has a negative size")
        elements = math.prod(shape)
        if elements > _MOST_ELEMENTS:
            raise _FaultError(f"{which} has {shortened(str(elements), 40)} elements, more than any tensor")
        bits, values, per_value = _TYPES[data_type]
        if raw is not None and bits and not counts:
            expected = (elements * bits + 7) // 8
            if raw != expected:
                raise _FaultError(f"{which} has {raw} bytes, and its shape {_shown(shape)} asks for {expected}")
            return
        expected = math.ceil(elements / per_value)
        found = counts.pop(values, 0)
        if raw is not None or counts:
            raise _FaultError(f"{which} has its values in a field that is not for its type")
        if found != expected:
            raise _FaultError(f"{which} has {found} values, and its shape {_shown(shape)} asks for {expected}")

    def fields(self, kind: str, start: int, end: int) -> Iterator[tuple[Field, int, int, int]]:
        """Yield each field of a message with its wire type, and its integer and 0 or where its value begins and ends."""
        data, known = self.data, MESSAGES[kind]
        once = set()
        position = start
        while position < end:
            self.left -= 1
            if self.left < 0:
                raise _FaultError(f"it has more than {_MOST_FIELDS} fields")
            tag = data[position]
            position += 1
            if tag > 127:
                tag, position = self.varint(position - 1, end)
            number, wire = tag >> 3, tag & 7
            field = known.get(number)
            if field is None:
                raise _FaultError(f"its {kind} at byte {start} has a field {number}, which ONNX does not know")
            if wire != field.wire and not (wire == _LENGTH and field.repeats):
                raise _FaultError(f"{field.name} of its {kind} at byte {start} has wire type {wire}, not {field.wire}")
            if not field.repeats:
                if number in once:
                    raise _FaultError(f"its {kind} at byte {start} has {field.name} twice")
                once.add(number)
            if wire == _VARINT:
                value, position = self.varint(position, end)
                yield field, wire, value, 0
                continue
            length = 4 if wire == _FIXED32 else 8
            if wire == _LENGTH:
                length, position = self.varint(position, end)
            if length > end - position:
                raise _FaultError(f"{field.name} of its {kind} at byte {start} reaches behind the end of it")
            yield field, wire, position, position + length
            position += length

    def varint(self, position: int, end: int) -> tuple[int, int]:
        """Return an unsigned 64-bit integer and the position behind it."""
        data, value, shift = self.data, 0, 0
        while position < end and shift < 70:
            byte = data[position]
            position += 1
            value |= (byte & 127) << shift
            if byte < 128:
                return value & 0xFFFFFFFFFFFFFFFF, position
            shift += 7
        raise _FaultError(f"its integer before byte {position} is cut off or longer than 64 bits")

    def varints(self, start: int, end: int) -> list[int]:
        """Return the integers of a packed field, at most one more than a shape may have."""
        found: list[int] = []
        while start < end and len(found) <= _MOST_AXES:
            value, start = self.varint(start, end)
            found.append(value)
        return found

    def packed(self, field: Field, start: int, end: int) -> int:
        """Return how many values a packed field holds."""
        if field.kind in _WIDTHS:
            if (end - start) % _WIDTHS[field.kind]:
                raise _FaultError(f"{field.name} at byte {start} is not whole")
            return (end - start) // _WIDTHS[field.kind]
        if field.kind != "int":  # bytes: one value each
            return 1
        values = np.frombuffer(memoryview(self.data)[start:end], np.uint8)
        if end > start and values[-1] > 127:
            raise _FaultError(f"{field.name} at byte {start} is not whole")
        return int(np.count_nonzero(values < 128))

    def text(self, start: int, end: int) -> str:
        """Return a string; a name that is not UTF-8 is a fault."""
        try:
            return str(self.data[start:end], "utf-8")
        except UnicodeDecodeError:
            raise _FaultError(f"its name at byte {start} is not UTF-8") from None


def _shown(shape: list[int]) -> str:
    return shortened("x".join(map(str, shape)) or "()", 60)
