"""What a backbone takes and returns: the structs that all other modules share.

Stages are named and numbered as in transformers: ``stage_names`` lists every stage of the network, ``out_features`` and
``out_indices`` the stages that are kept, in stage order. :func:`align_stages` repeats the rules and the messages of
``transformers.backbone_utils.BackboneConfigMixin``.
"""

from __future__ import annotations

import enum
import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, NamedTuple

import msgspec

from edge_backbones.errors import InputError

Layout = Literal["NCHW", "NHWC", "NLC", "NC"]
"""Axes of an engine output, one letter each: N the batch, C channels, H height, W width, L tokens.

Tokens include prefix tokens such as the class token. ``NC`` is one vector per image. ``layout.index("C")`` is the position of
the channels.
"""

FloatType = Literal["float32", "float16"]
"""numpy's name of a dtype that engines take and return."""

Name = Annotated[str, msgspec.Meta(min_length=1, max_length=300)]
Size = Annotated[int, msgspec.Meta(ge=1, le=1 << 24)]
_Many = msgspec.Meta(max_length=1024)
Names = Annotated[tuple[Name, ...], _Many]
Sizes = Annotated[tuple[Size, ...], _Many]


class Precision(str, enum.Enum):
    """Number formats of a typed graph.

    ``fp16`` and ``bf16`` keep normalisation and softmax in fp32; ``int8`` and ``fp8`` (E4M3) are Q/DQ on convolutions and
    matrix products, fp16 for the rest. The precision does not decide what an engine takes and returns: see
    `InputSpec.dtype` and `BackboneSpec.map_dtype`.
    """

    FP32 = "fp32"
    FP16 = "fp16"
    BF16 = "bf16"
    INT8 = "int8"
    FP8 = "fp8"

    def __str__(self) -> str:
        return self.value

    @property
    def info(self) -> PrecisionInfo:
        """What is particular about this precision: its row in the table below."""
        return _PRECISIONS[self]

    @property
    def is_calibrated(self) -> bool:
        """Whether the precision has ranges, which are found on calibration images."""
        return self.info.is_calibrated


@dataclass(frozen=True, kw_only=True)
class PrecisionInfo:
    """What is particular about one precision: code that depends on the number format reads it here.

    Args:
        bits: the size of one value.
        onnx_type: the name of its type in ``onnx.TensorProto``.
        largest: the largest magnitude that is used.
        rest: the precision of the nodes that are not quantised; the precision itself, unless it is calibrated.
        is_calibrated: activations have ranges, which are found on calibration images.
        is_integer: values are evenly spaced, so that it pays to clip ranges and to correct biases.
        torch_type: the name of its type in torch; None where no torch module is made of it.
        min_opset: the first ONNX opset whose operators take it.
        refused_operators: ONNX operators that TensorRT takes in fp32 and not in this precision.
    """

    bits: int
    onnx_type: str
    largest: float
    rest: Precision
    is_calibrated: bool = False
    is_integer: bool = False
    torch_type: str | None = None
    min_opset: int = 1
    refused_operators: frozenset[str] = frozenset()

    @property
    def is_half(self) -> bool:
        """Whether the precision is fp16 or bf16."""
        return self.bits == 16

    @property
    def has_range_of_fp32(self) -> bool:
        """Whether every magnitude that fp32 holds can be stored, if more coarsely."""
        return self.largest > 1e38


_PRECISIONS = {
    Precision.FP32: PrecisionInfo(
        bits=32, onnx_type="FLOAT", largest=3.4028234663852886e38, rest=Precision.FP32, torch_type="float32"
    ),
    Precision.FP16: PrecisionInfo(
        bits=16, onnx_type="FLOAT16", largest=65504.0, rest=Precision.FP16, torch_type="float16"
    ),
    Precision.BF16: PrecisionInfo(
        bits=16,
        onnx_type="BFLOAT16",
        largest=3.3895313892515355e38,
        rest=Precision.BF16,
        torch_type="bfloat16",
        min_opset=22,  # the first whose Conv takes bf16; from 20 on only lists of types have grown
        refused_operators=frozenset({"ConvTranspose", "HardSwish", "Mish"}),
    ),
    Precision.INT8: PrecisionInfo(
        bits=8,
        onnx_type="INT8",
        largest=127.0,  # symmetric: -128 is not used
        rest=Precision.FP16,
        is_calibrated=True,
        is_integer=True,
        min_opset=19,  # the first whose QuantizeLinear takes fp16 scales
    ),
    Precision.FP8: PrecisionInfo(
        bits=8,
        onnx_type="FLOAT8E4M3FN",
        largest=448.0,
        rest=Precision.FP16,
        is_calibrated=True,
        min_opset=19,
    ),
}


def precisions_of(names: Iterable[Precision | str]) -> tuple[Precision, ...]:
    """Return number formats by their names, or by one name; raises InputError for a name that is none."""
    try:
        return tuple(Precision(name) for name in ((names,) if isinstance(names, str) else names))
    except ValueError as error:
        raise InputError(f"{error}: choose among {', '.join(Precision)}") from None


class ShapeRange(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The sizes that an axis may have, as in an optimisation profile of TensorRT. The axis is fixed if min == max."""

    min: Size
    opt: Size
    max: Size

    def __post_init__(self) -> None:
        if not 1 <= self.min <= self.opt <= self.max:
            raise ValueError(f"a shape range needs 1 <= min <= opt <= max, got {self.min}:{self.opt}:{self.max}")

    @classmethod
    def fixed(cls, size: int) -> ShapeRange:
        """Return the range of an axis that has one size."""
        return cls(min=size, opt=size, max=size)

    @property
    def is_fixed(self) -> bool:
        """Return whether the axis has one size."""
        return self.min == self.max

    def __contains__(self, size: int) -> bool:
        return self.min <= size <= self.max

    def __str__(self) -> str:
        return str(self.min) if self.is_fixed else f"{self.min}..{self.max}"


Color = Literal["rgb", "bgr", "gray", "nv12", "yuyv"]
"""How the pixels of a camera frame are stored; `FrameSpec` says what each means."""

YUV_COLORS = ("nv12", "yuyv")
RGB_COLORS = ("rgb", "bgr")
Matrix = Literal["bt601", "bt709"]
Range = Literal["limited", "full"]


class FrameSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The frames of one camera: their size in pixels, and how a pixel is stored in uint8.

    ``color``, with the shape of a frame's array:

    - ``rgb`` and ``bgr``: (height, width, 3).
    - ``gray``: (height, width, 1).
    - ``nv12``: (height * 3 / 2, width, 1). Rows of luma, then rows of U and V by turns, one pair for 2 x 2 pixels.
    - ``yuyv``: (height, width, 2), also called YUY2. Luma, then U for even and V for odd columns: one pair for 2 pixels.

    ``matrix`` and ``range`` are read for nv12 and yuyv alone: the standard that the camera converts with, and whether its
    luma goes from 16 to 235 (``limited``) or from 0 to 255 (``full``). Their defaults are those of ``bt601``, ``limited``.
    """

    height: Size
    width: Size
    color: Color
    matrix: Matrix = "bt601"
    range: Range = "limited"

    def __post_init__(self) -> None:
        if (self.color in YUV_COLORS and self.width % 2) or (self.color == "nv12" and self.height % 2):
            raise ValueError(f"{self.color} frames have even sides, got {self.height} x {self.width}")
        if self.color not in YUV_COLORS and (self.matrix, self.range) != ("bt601", "limited"):
            raise ValueError(f"matrix and range are of {' and '.join(YUV_COLORS)} frames, and color is {self.color}")

    def suits(self, channels: int) -> bool:
        """Return whether a network of so many channels can take these frames. Grey ones can also become three channels."""
        return channels == 3 or (channels == 1 and self.color == "gray")

    @property
    def shape(self) -> tuple[int, int, int]:
        """Return the shape of the array of one frame: rows, columns, bytes."""
        rows = self.height * 3 // 2 if self.color == "nv12" else self.height
        return rows, self.width, {"rgb": 3, "bgr": 3, "yuyv": 2}.get(self.color, 1)

    def __str__(self) -> str:
        standard = {"bt601": "BT.601", "bt709": "BT.709"}[self.matrix]
        how = f" ({standard}, {self.range} range)" if self.color in YUV_COLORS else ""
        return f"{self.color} frames of {self.height}x{self.width}{how}"


class InputSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The one input of a graph.

    ``name``: ``pixel_values`` is NCHW, already normalised, as in transformers. ``image`` is uint8 NHWC, RGB for three
    channels, of the size that the network takes: the cast, the layout and ``mean`` / ``std`` are in the graph. ``frame`` is
    what a camera delivers, as ``frame`` says: colours, crop and resize are in the graph too.

    ``channels``, ``height`` and ``width``: those of the network. ``size_multiple``: a height or width that is not fixed must
    be a multiple of it. ``pixel_dtype``: the dtype of ``pixel_values``.
    """

    name: Literal["pixel_values", "image", "frame"]
    channels: Size
    batch: ShapeRange
    height: ShapeRange
    width: ShapeRange
    size_multiple: Size = 1
    pixel_dtype: FloatType = "float32"
    frame: FrameSpec | None = None

    def __post_init__(self) -> None:
        if self.name != "pixel_values" and self.pixel_dtype != "float32":
            raise ValueError(f"{self.name} is uint8, and pixel_dtype is {self.pixel_dtype}")
        if (self.name == "frame") != (self.frame is not None):
            raise ValueError(f"an input called frame says what its frames are, and no other does: this is {self.name}")
        if self.frame is not None and not self.frame.suits(self.channels):
            raise ValueError(f"{self.frame.color} frames do not become {self.channels} channels")
        if self.frame is not None and not (self.height.is_fixed and self.width.is_fixed):
            raise ValueError(f"frames are resized to one size, not to {self.height} x {self.width}")

    @property
    def dtype(self) -> str:
        """Return numpy's name of the dtype."""
        return self.pixel_dtype if self.name == "pixel_values" else "uint8"

    @property
    def layout(self) -> str:
        """Return the order of the four axes, as in `Layout`."""
        return "NCHW" if self.name == "pixel_values" else "NHWC"

    @property
    def size_axes(self) -> tuple[int, int]:
        """Return where height and width are among the four axes."""
        return self.layout.index("H"), self.layout.index("W")

    @property
    def of_network(self) -> InputSpec:
        """Return the input of the network behind the part of the graph that takes frames; itself without such a part."""
        return self if self.frame is None else msgspec.structs.replace(self, name="pixel_values", frame=None)

    def shape(self, batch: int, height: int, width: int) -> tuple[int, int, int, int]:
        """Return the sizes of the four axes in the layout of this input. ``height`` and ``width``: those of the network."""
        if self.frame is not None:
            return batch, *self.frame.shape
        if self.layout == "NCHW":
            return batch, self.channels, height, width
        return batch, height, width, self.channels

    @property
    def opt_shape(self) -> tuple[int, int, int, int]:
        """Return the shape that engines are optimised for."""
        return self.shape(self.batch.opt, self.height.opt, self.width.opt)

    @property
    def min_shape(self) -> tuple[int, int, int, int]:
        """Return the smallest shape that engines are compiled for."""
        return self.shape(self.batch.min, self.height.min, self.width.min)

    @property
    def max_shape(self) -> tuple[int, int, int, int]:
        """Return the largest shape that engines are compiled for."""
        return self.shape(self.batch.max, self.height.max, self.width.max)

    def batch_height_width(self, shape: Sequence[int]) -> tuple[int, int, int]:
        """Return batch, height and width of a shape in this layout; raise InputError if the engine cannot take it.

        For frames, height and width are those that the graph resizes them to.
        """
        if len(shape) == 4 and self.frame is not None:
            if shape[0] >= 1 and tuple(shape[1:]) == self.frame.shape:
                return shape[0], self.height.opt, self.width.opt
        elif len(shape) == 4:
            batch, height, width, channels = (
                (shape[0], shape[2], shape[3], shape[1]) if self.layout == "NCHW" else tuple(shape)
            )
            sizes_fit = self._fits(self.height, height) and self._fits(self.width, width)
            if batch >= 1 and channels == self.channels and sizes_fit:
                return batch, height, width
        raise InputError(f"{self.name} of shape {tuple(shape)} does not fit: this engine takes {self.describe()}")

    def _fits(self, axis: ShapeRange, size: int) -> bool:
        return size in axis and (axis.is_fixed or size % self.size_multiple == 0)

    def describe(self) -> str:
        """Return a phrase for messages: dtype, layout and the size of every axis."""
        height, width = str(self.height), str(self.width)
        sizes = f"(batch, {self.channels}, {height}, {width})"
        if self.frame is not None:
            sizes = f"(batch, {', '.join(map(str, self.frame.shape))}), {self.frame},"
        elif self.layout == "NHWC":
            sizes = f"(batch, {height}, {width}, {self.channels})"
        variable = [name for name, axis in (("height", self.height), ("width", self.width)) if not axis.is_fixed]
        multiples = f", {' and '.join(variable)} in multiples of {self.size_multiple}" if variable else ""
        return f"{self.dtype} {self.layout} {sizes} with any batch >= 1{multiples}"


class ExtraOutput(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """An engine output that is not the feature map of a kept stage. ``channels``: the size of its C axis."""

    name: Name
    layout: Layout
    channels: Size


class OutputSpec(NamedTuple):
    """One output, as callers see it and as an engine returns it.

    Attributes:
        name: Name of the output.
        layout: Order of the axes that callers see.
        engine_layout: Order of the axes in the engine's own array. It is another one for a map in channels-last memory.
        channels: Size of the C axis.
        strides: (vertical, horizontal) input pixels per cell; None for an output that is no feature map.
        dtype: numpy's name of the dtype.
    """

    name: str
    layout: Layout
    engine_layout: Layout
    channels: int
    strides: tuple[int, int] | None
    dtype: FloatType

    @property
    def is_reordered(self) -> bool:
        """Return whether callers see a view of the engine's array with its axes in another order."""
        return self.layout != self.engine_layout


class BackboneSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The stages of a backbone, and what was measured of the kept ones.

    ``out_indices``: as they were given, -1 stays -1 as in transformers. ``num_features``: channels, one entry per stage name,
    as in transformers. ``channels``, ``strides`` and ``layouts``: one entry per kept stage, measured in a forward of the
    network. A stride is (vertical, horizontal) input pixels per feature-map cell.

    ``cls_tokens``: the engine output with the class token of each kept stage. ``hidden_states``: the output that is each
    hidden state; it may be a feature map, if the network returns the same tensor twice. Both are empty for networks without
    them and if they were not asked for. ``extras``: every output that is not a feature map. ``has_attentions``: transformers'
    attribute of networks that can return attention weights.

    ``map_dtype``: the dtype of every output. ``channels_last``: whether engines return NCHW outputs in NHWC order. Callers
    see them as NCHW all the same, with the strides of channels-last memory: ``layouts`` does not change.
    """

    stage_names: Names
    out_features: Names
    out_indices: Annotated[tuple[int, ...], _Many]
    channels: Sizes
    strides: Annotated[tuple[tuple[Size, Size], ...], _Many]
    num_features: Sizes
    layouts: Annotated[tuple[Layout, ...], _Many]
    cls_tokens: Names = ()
    hidden_states: Names = ()
    extras: Annotated[tuple[ExtraOutput, ...], _Many] = ()
    has_attentions: bool = True
    map_dtype: FloatType = "float32"
    channels_last: bool = False

    def __post_init__(self) -> None:
        features, indices = align_stages(self.stage_names, list(self.out_features), list(self.out_indices))
        if not features or features != self.out_features or indices != self.out_indices:
            raise ValueError(f"out_features {self.out_features} and out_indices {self.out_indices} do not agree")
        if not len(self.channels) == len(self.strides) == len(self.layouts) == len(features):
            raise ValueError(
                f"{len(features)} stages need as many channels, strides and layouts, "
                f"got {self.channels}, {self.strides}, {self.layouts}"
            )
        if len(self.num_features) != len(self.stage_names):
            raise ValueError(f"{len(self.stage_names)} stage names need as many num_features, got {self.num_features}")
        if len(set(self.outputs)) != len(self.outputs):
            raise ValueError(f"engine outputs must have different names, got {self.outputs}")
        if self.cls_tokens and len(self.cls_tokens) != len(features):
            raise ValueError(f"{len(features)} stages need as many class tokens, got {self.cls_tokens}")
        unknown = [name for name in (*self.cls_tokens, *self.hidden_states) if name not in self.outputs]
        if unknown:
            raise ValueError(f"class tokens or hidden states {unknown} are no outputs, which are {self.outputs}")

    @property
    def outputs(self) -> tuple[str, ...]:
        """Return the names of all engine outputs in the order in which an engine returns them: feature maps first."""
        return (*self.out_features, *(extra.name for extra in self.extras))

    @property
    def described_outputs(self) -> tuple[OutputSpec, ...]:
        """Return every output in the order of `outputs`. Only this says in which layout engines return an output."""
        maps = zip(self.out_features, self.layouts, self.channels, self.strides, strict=True)
        described: list[tuple[str, Layout, int, tuple[int, int] | None]] = [*maps]
        described += [(extra.name, extra.layout, extra.channels, None) for extra in self.extras]
        return tuple(
            OutputSpec(
                name,
                layout,
                "NHWC" if self.channels_last and layout == "NCHW" else layout,
                channels,
                strides,
                self.map_dtype,
            )
            for name, layout, channels, strides in described
        )

    def describe_maps(self) -> str:
        """Return a phrase for messages: dtype and memory of the feature maps."""
        return f"{self.map_dtype}, {'channels-last' if self.channels_last else 'channels-first'} memory"


def measured_stride(pixels: int, cells: int, claimed: int | None = None) -> int:
    """Return the input pixels per cell of a feature map along one axis.

    At borders the quotient of the two is uneven: padding makes up to one cell more, convolutions without padding lose up to
    two. So ``claimed``, the stride that the network's library names, is returned if it explains the map.
    """
    if claimed is not None and -claimed < pixels - cells * claimed < 2 * claimed:
        return claimed
    return max(1, round(pixels / cells))


def align_stages(
    stage_names: Sequence[str] | None,
    out_features: Sequence[str] | None = None,
    out_indices: Sequence[int] | None = None,
) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Return the names and the indices of the chosen stages, in stage order; the last stage if nothing is chosen.

    Indices are returned as they were given, negative ones too. Raises InputError (a ValueError) with the rules and messages
    of transformers. It also raises it where transformers fails with another error: a negative index out of range, an int, a
    str.
    """
    if stage_names is None:
        raise InputError("Stage_names must be set for transformers backbones")
    names = list(stage_names)
    if out_features is not None:
        if not isinstance(out_features, list):
            raise InputError(f"out_features must be a list got {type(out_features)}")
        if any(name not in names for name in out_features):
            raise InputError(f"out_features must be a subset of stage_names: {names} got {out_features}")
        if len(set(out_features)) != len(out_features):
            raise InputError(f"out_features must not contain any duplicates, got {out_features}")
        ordered = [name for name in names if name in out_features]
        if out_features != ordered:
            raise InputError(
                f"out_features must be in the same order as stage_names, expected {ordered} got {out_features}"
            )
    if out_indices is not None:
        if not isinstance(out_indices, (list, tuple)):
            raise InputError(f"out_indices must be a list, got {type(out_indices)}")
        try:
            indices = [operator.index(i) for i in out_indices]  # numpy integers too
            positive = [range(len(names))[i] for i in indices]
        except (TypeError, IndexError):
            raise InputError(
                f"out_indices must be valid indices for stage_names {names}, got {list(out_indices)}"
            ) from None
        if len(set(positive)) != len(positive):
            raise InputError(
                f"out_indices must not contain any duplicates, got {indices}(equivalent to {tuple(positive)}))"
            )
        if positive != sorted(positive):
            expected = [i for _, i in sorted(zip(positive, indices, strict=True))]
            raise InputError(f"out_indices must be in the same order as stage_names, expected {expected} got {indices}")
        chosen = tuple(names[i] for i in positive)
        if out_features is not None and len(out_features) != len(indices):
            raise InputError("out_features and out_indices should have the same length if both are set")
        if out_features is not None and tuple(out_features) != chosen:
            raise InputError("out_features and out_indices should correspond to the same stages if both are set")
        return chosen, tuple(indices)
    if out_features is None:
        return (names[-1],), (len(names) - 1,)
    return tuple(out_features), tuple(names.index(name) for name in out_features)
