"""What a backbone takes and returns: the vocabulary that every other module shares.

Stages are named and numbered as in transformers: ``stage_names`` lists every stage of the network, ``out_features`` /
``out_indices`` the ones that are kept, always in stage order. :func:`align_stages` holds the rules of
``transformers.backbone_utils.BackboneConfigMixin`` (with its messages), and is the only place where they live.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import Literal

import msgspec

from edge_backbones.errors import InputError


class Precision(str, enum.Enum):
    """Number formats of a typed graph.

    ``fp16`` keeps normalisation and softmax in fp32; ``int8`` is Q/DQ on convolutions and matrix products, fp16 for
    the rest. Inputs and feature maps are float32 (or uint8 in) whatever the precision.
    """

    FP32 = "fp32"
    FP16 = "fp16"
    INT8 = "int8"

    def __str__(self) -> str:
        return self.value


class ShapeRange(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Sizes that one axis may take: TensorRT's optimisation profile for that axis. Fixed when min == opt == max."""

    min: int
    opt: int
    max: int

    def __post_init__(self) -> None:
        if not 1 <= self.min <= self.opt <= self.max:
            raise ValueError(f"a shape range needs 1 <= min <= opt <= max, got {self.min}:{self.opt}:{self.max}")

    @classmethod
    def fixed(cls, size: int) -> ShapeRange:
        return cls(min=size, opt=size, max=size)

    @property
    def is_fixed(self) -> bool:
        return self.min == self.max

    def __contains__(self, size: int) -> bool:
        return self.min <= size <= self.max

    def __str__(self) -> str:
        return str(self.min) if self.is_fixed else f"{self.min}..{self.max}"


class InputSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The one input of a graph.

    ``pixel_values`` is float32, NCHW, already normalised, as transformers has it. ``image`` is uint8, NHWC, as a
    camera delivers it (RGB for three channels): cast, layout and ``mean`` / ``std`` are inside the graph.
    ``size_multiple``: a height or width that is not fixed must be a multiple of it.
    """

    name: Literal["pixel_values", "image"]
    channels: int
    batch: ShapeRange
    height: ShapeRange
    width: ShapeRange
    size_multiple: int = 1

    @property
    def dtype(self) -> str:
        return "float32" if self.name == "pixel_values" else "uint8"

    @property
    def layout(self) -> str:
        return "NCHW" if self.name == "pixel_values" else "NHWC"

    def shape(self, batch: int, height: int, width: int) -> tuple[int, int, int, int]:
        """The four axes in this input's layout."""
        if self.layout == "NCHW":
            return batch, self.channels, height, width
        return batch, height, width, self.channels

    @property
    def opt_shape(self) -> tuple[int, int, int, int]:
        return self.shape(self.batch.opt, self.height.opt, self.width.opt)

    @property
    def min_shape(self) -> tuple[int, int, int, int]:
        return self.shape(self.batch.min, self.height.min, self.width.min)

    @property
    def max_shape(self) -> tuple[int, int, int, int]:
        return self.shape(self.batch.max, self.height.max, self.width.max)

    def batch_height_width(self, shape: Sequence[int]) -> tuple[int, int, int]:
        """Split a four-axis shape of this input's layout; raises InputError when the engine cannot take it."""
        if len(shape) == 4:
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
        """One phrase for messages: dtype, layout and the size of every axis."""
        height, width = str(self.height), str(self.width)
        sizes = f"(batch, {self.channels}, {height}, {width})"
        if self.layout == "NHWC":
            sizes = f"(batch, {height}, {width}, {self.channels})"
        variable = [name for name, axis in (("height", self.height), ("width", self.width)) if not axis.is_fixed]
        multiples = f", {' and '.join(variable)} in multiples of {self.size_multiple}" if variable else ""
        return f"{self.dtype} {self.layout} {sizes} with any batch >= 1{multiples}"


class BackboneSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Stages of a backbone and what was measured of the kept ones.

    ``num_features`` has one entry per stage name, as transformers has it; ``channels`` and ``strides`` have one per
    kept stage and were read off a real forward. A stride is input pixels per feature-map cell, (vertical, horizontal).
    """

    stage_names: tuple[str, ...]
    out_features: tuple[str, ...]
    out_indices: tuple[int, ...]
    channels: tuple[int, ...]
    strides: tuple[tuple[int, int], ...]
    num_features: tuple[int, ...]

    def __post_init__(self) -> None:
        features, indices = align_stages(self.stage_names, list(self.out_features), list(self.out_indices))
        if not features or features != self.out_features or indices != self.out_indices:
            raise ValueError(f"out_features {self.out_features} and out_indices {self.out_indices} do not agree")
        if not len(self.channels) == len(self.strides) == len(features):
            raise ValueError(
                f"{len(features)} stages need as many channels and strides, got {self.channels}, {self.strides}"
            )
        if len(self.num_features) != len(self.stage_names):
            raise ValueError(f"{len(self.stage_names)} stage names need as many num_features, got {self.num_features}")


def align_stages(
    stage_names: Sequence[str],
    out_features: Sequence[str] | None = None,
    out_indices: Sequence[int] | None = None,
) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Names and non-negative indices of the chosen stages, in stage order; neither given means the last stage.

    The rules and messages are those of transformers, and where transformers trips over its own input (an
    out-of-range negative index, an int, a str) the ValueError that it should raise. Raises InputError, a ValueError.
    """
    names = list(stage_names)
    if out_features is not None:
        if not isinstance(out_features, (list, tuple)):
            raise InputError(f"out_features must be a list got {type(out_features)}")
        if any(name not in names for name in out_features):
            raise InputError(f"out_features must be a subset of stage_names: {names} got {list(out_features)}")
        if len(set(out_features)) != len(out_features):
            raise InputError(f"out_features must not contain any duplicates, got {list(out_features)}")
        ordered = [name for name in names if name in out_features]
        if list(out_features) != ordered:
            raise InputError(
                f"out_features must be in the same order as stage_names, expected {ordered} got {list(out_features)}"
            )
    if out_indices is not None:
        if not isinstance(out_indices, (list, tuple)):
            raise InputError(f"out_indices must be a list, got {type(out_indices)}")
        if any(not isinstance(i, int) or isinstance(i, bool) or not -len(names) <= i < len(names) for i in out_indices):
            raise InputError(f"out_indices must be valid indices for stage_names {names}, got {list(out_indices)}")
        positive = [i % len(names) for i in out_indices]
        if len(set(positive)) != len(positive):
            resolved = "" if positive == list(out_indices) else f" (equivalent to {positive})"
            raise InputError(f"out_indices must not contain any duplicates, got {list(out_indices)}{resolved}")
        if positive != sorted(positive):
            expected = [i for _, i in sorted(zip(positive, out_indices, strict=True))]
            raise InputError(
                f"out_indices must be in the same order as stage_names, expected {expected} got {list(out_indices)}"
            )
    if out_features is not None and out_indices is not None:
        if len(out_features) != len(out_indices):
            raise InputError("out_features and out_indices should have the same length if both are set")
        if list(out_features) != [names[i] for i in out_indices]:
            raise InputError("out_features and out_indices should correspond to the same stages if both are set")
    if out_indices is not None:
        chosen = [i % len(names) for i in out_indices]
    elif out_features is not None:
        chosen = [names.index(name) for name in out_features]
    else:
        chosen = [len(names) - 1]
    return tuple(names[i] for i in chosen), tuple(chosen)
