"""Write what config.pbtxt says about a Triton model, in protobuf's text format and without protobuf."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from edge_backbones.bundle.golden import GoldenSamples, full_batches
from edge_backbones.bundle.manifest import Manifest
from edge_backbones.spec import InputSpec, OutputSpec

Backend = Literal["tensorrt", "onnxruntime", "openvino", "python"]
Pictures = Literal["encoded", "rgb"]
"""What a preprocessing model takes: the bytes of image files, or RGB pixels."""

FIRST_LINE = "# Written by edge-backbones export-triton."
"""How the config.pbtxt of our models begins. A folder without it is not overwritten."""

PICTURES, PREPARED = "photograph", "prepared photograph"
"""Names of the input of a preprocessing model and of an ensemble, and of what flows inside an ensemble."""

LARGEST = 2**31 - 1
"""The largest number of an int32, the type of counts in config.pbtxt."""

_DATA_TYPES = {"float32": "TYPE_FP32", "float16": "TYPE_FP16", "uint8": "TYPE_UINT8"}
_BACKENDS = {"tensorrt": "tensorrt", "onnxruntime": "onnxruntime", "openvino": "openvino", "python": "python"}
_MODEL_FILES = {"tensorrt": "model.plan", "onnxruntime": "model.onnx", "openvino": "model.onnx", "python": "model.py"}


class Word(str):
    """A value that is written without quotes: a member of an enum."""

    __slots__ = ()


Message = Mapping[str, Any]
"""Fields by name. A value is a text, a `Word`, a bool, an int, a message, or a list of values of one kind."""


def render(message: Message) -> str:
    """Return a message in protobuf's text format."""
    return "".join(f"{line}\n" for line in _lines(message))


def _lines(message: Message) -> list[str]:
    lines: list[str] = []
    for field, value in message.items():
        values = value if isinstance(value, (list, tuple)) else [value]
        if values and isinstance(value, (list, tuple)) and not any(isinstance(one, Mapping) for one in values):
            lines.append(f"{field}: [{', '.join(map(_scalar, values))}]")
            continue
        for one in values:
            if isinstance(one, Mapping):
                inner = _lines(one)
                lines += [f"{field} {{", *(f"  {line}" for line in inner), "}"] if inner else [f"{field} {{ }}"]
            else:
                lines.append(f"{field}: {_scalar(one)}")
    return lines


def _scalar(value: str | bool | int) -> str:
    if isinstance(value, Word):
        return value
    if isinstance(value, bool):
        return "true" if value else "false"
    return str(value) if isinstance(value, int) else quoted(value)


def quoted(text: str) -> str:
    r"""Return a text as a string literal. Bytes of UTF-8 that are not printable ASCII become octal escapes (``\303``)."""
    plain = {ord('"'): '\\"', ord("\\"): "\\\\"}
    return '"' + "".join(plain.get(b, chr(b) if 32 <= b < 127 else f"\\{b:03o}") for b in text.encode()) + '"'


@dataclass(frozen=True)
class Tensor:
    """One input or output of a model. ``dims`` has no batch axis."""

    name: str
    data_type: str
    dims: tuple[int, ...]

    def config(self, batch: Batch) -> Message:
        """Return the entry of the tensor in config.pbtxt."""
        return {"name": self.name, "data_type": Word(self.data_type), "dims": batch.dims(self.dims)}


@dataclass(frozen=True)
class Batch:
    """How many images one request may hold.

    ``most``: Triton's max_batch_size. 0: Triton knows of no batch, and ``axis``, the first axis of every tensor, is in dims:
    a number, or -1 for any.
    """

    most: int
    axis: int = -1

    def dims(self, dims: Sequence[int]) -> list[int]:
        """Return the dims of a tensor as config.pbtxt has them."""
        return list(dims) if self.most else [self.axis, *dims]


def batch_of(backend: Backend, input: InputSpec, asked: int | None) -> Batch:
    """Return the batch of a network's model.

    EdgeBackbone runs every batch, in pieces where it must. ONNX Runtime and TensorRT take a batch of Triton's only if the
    first axis of the graph varies. OpenVINO's backend would set it to the largest batch and fill up every request.
    """
    if backend == "python":
        return Batch(asked or input.batch.max)
    if input.batch.is_fixed:
        return Batch(0, input.batch.min)
    return Batch(0) if backend == "openvino" else Batch(asked or input.batch.max)


def input_tensor(input: InputSpec) -> Tensor:
    """Return the input of a network, -1 for a height or a width that varies."""
    fixed = list(input.opt_shape)
    for axis, sizes in zip(input.size_axes, (input.height, input.width), strict=True):
        if not sizes.is_fixed:
            fixed[axis] = -1
    return Tensor(input.name, _DATA_TYPES[input.dtype], tuple(fixed[1:]))


def output_tensors(manifest: Manifest, golden: GoldenSamples, names: Sequence[str]) -> tuple[Tensor, ...]:
    """Return the outputs of a network, in the layout and dtype that its engine returns them in.

    Sizes are those of the golden samples, -1 where they follow from a height or a width that varies.
    """
    input = manifest.input
    varying = {axis for axis, sizes in (("H", input.height), ("W", input.width)) if not sizes.is_fixed}
    varying |= {"L"} if varying else set()
    found = []
    for output in manifest.backbone.described_outputs:
        if output.name in names:
            shape = dict(zip(output.layout, golden.outputs["opt"][output.name].shape, strict=True))
            dims = tuple(-1 if axis in varying else shape[axis] for axis in output.engine_layout[1:])
            found.append(Tensor(output.name, _DATA_TYPES[output.dtype], dims))
    return tuple(found)


def to_engine_layout(output: OutputSpec) -> tuple[int, ...]:
    """Return the axes that turn an output as callers see it into the engine's own array."""
    return tuple(output.layout.index(axis) for axis in output.engine_layout)


def picture_tensor(pictures: Pictures, channels: int) -> Tensor:
    """Return the input of a preprocessing model. Files are of any length, which only strings can be in a batch."""
    if pictures == "encoded":
        return Tensor(PICTURES, "TYPE_STRING", (1,))
    return Tensor(PICTURES, "TYPE_UINT8", (-1, -1, channels))


@dataclass(frozen=True)
class Instances:
    """How many copies of a model run, and where. ``gpu``: the index of one GPU; None for all of them.

    ``profiles``: how many optimisation profiles a plan has. ``dla_core``: the DLA core that a plan was compiled for.
    """

    count: int
    on_gpu: bool
    gpu: int | None = None
    profiles: int = 1
    dla_core: int | None = None

    def config(self) -> Message:
        """Return the instance group."""
        group: dict[str, Any] = {"count": self.count, "kind": Word("KIND_GPU" if self.on_gpu else "KIND_CPU")}
        if self.gpu is not None:
            group["gpus"] = [self.gpu]
        if self.profiles > 1:
            group["profile"] = [str(profile) for profile in range(self.profiles)]
        if self.dla_core is not None:
            group["secondary_devices"] = {"kind": Word("KIND_NVDLA"), "device_id": self.dla_core}
        return group


def model_config(
    name: str,
    backend: Backend,
    batch: Batch,
    inputs: Sequence[Tensor],
    outputs: Sequence[Tensor],
    *,
    instances: Instances,
    parameters: Mapping[str, str],
    batches: bool = True,
    warmup: Sequence[Message] = (),
) -> Message:
    """Return the configuration of a model of one backend. ``batches``: let Triton join requests to larger batches."""
    kind = {"platform": "tensorrt_plan"} if backend == "tensorrt" else {"backend": _BACKENDS[backend]}
    config: dict[str, Any] = {
        "name": name,
        **kind,
        "default_model_filename": _MODEL_FILES[backend],
        **_signature(batch, inputs, outputs),
        "instance_group": instances.config(),
    }
    if batches and batch.most > 1:
        config["dynamic_batching"] = {}
    return {**config, "parameters": _map(parameters), "model_warmup": list(warmup)}


def ensemble_config(
    name: str,
    preprocessing: str,
    network: str,
    batch: Batch,
    pictures: Tensor,
    input: Tensor,
    outputs: Sequence[Tensor],
) -> Message:
    """Return the configuration of an ensemble: pictures go through a preprocessing model, then through the network."""
    steps = (
        (preprocessing, {pictures.name: pictures.name}, {input.name: PREPARED}),
        (network, {input.name: PREPARED}, {output.name: output.name for output in outputs}),
    )
    scheduling = [
        {"model_name": model, "model_version": -1, "input_map": _entries(taken), "output_map": _entries(given)}
        for model, taken, given in steps
    ]
    signature = _signature(batch, [pictures], outputs)
    return {"name": name, "platform": "ensemble", **signature, "ensemble_scheduling": {"step": scheduling}}


def _signature(batch: Batch, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> Message:
    return {
        "max_batch_size": batch.most,
        "input": [tensor.config(batch) for tensor in inputs],
        "output": [tensor.config(batch) for tensor in outputs],
        "version_policy": {"latest": {"num_versions": 1}},
        "response_cache": {"enable": False},  # maps are larger than what a cache is for
    }


def _entries(values: Mapping[str, Any]) -> list[Message]:
    return [{"key": key, "value": value} for key, value in values.items()]


def _map(parameters: Mapping[str, str]) -> list[Message]:
    return _entries({key: {"string_value": value} for key, value in parameters.items()})


def warmups(input: InputSpec, golden: GoldenSamples, batch: Batch) -> tuple[list[Message], dict[str, bytes]]:
    """Return a warm-up for each case of the golden samples, and the files of input data by name.

    Triton sends the file of a warm-up as often as ``batch_size`` says, in one call, where it knows of a batch.
    """
    messages: list[Message] = []
    files = {}
    for case in golden.cases:
        images = golden.inputs[case]
        count = 1 if batch.most else (input.batch.opt if batch.axis == -1 else batch.axis)
        data = images[next(full_batches(len(images), count)) % len(images)]
        tensor = {
            "data_type": Word(_DATA_TYPES[input.dtype]),
            "dims": list(data.shape[1:] if batch.most else data.shape),
            "input_data_file": f"golden_{case}",
        }
        messages.append(
            {
                "name": f"golden {case}",
                "batch_size": min(input.batch.opt, batch.most) or 1,
                "inputs": _entries({input.name: tensor}),
            }
        )
        files[f"golden_{case}"] = np.ascontiguousarray(data).tobytes()
    return messages, files
