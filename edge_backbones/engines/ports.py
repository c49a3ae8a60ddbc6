"""What a GPU session decides, as functions over plain values: nothing here needs a GPU."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from edge_backbones.errors import InputError
from edge_backbones.spec import BackboneSpec, InputSpec, ShapeRange

Shape = tuple[int, ...]
StreamKey: TypeAlias = "int | tuple[int, int]"
ALIGNMENT = 256  # of every address that TensorRT is given; CUDA's allocations have it
_DTYPES = {"float32": "FLOAT", "uint8": "UINT8"}  # TensorRT's names


@dataclass(frozen=True)
class Profile:
    """One optimisation profile: the smallest, the usual and the largest shape of the input."""

    index: int
    min: Shape
    opt: Shape
    max: Shape

    def holds(self, shape: Sequence[int]) -> bool:
        return len(shape) == len(self.min) and all(
            low <= size <= high for low, size, high in zip(self.min, shape, self.max, strict=True)
        )

    def __str__(self) -> str:
        return f"profile {self.index}: min {self.min}, opt {self.opt}, max {self.max}"


@dataclass(frozen=True)
class Tensor:
    """An input or output as the engine describes it.

    ``dtype`` in TensorRT's words. ``shape``: -1 for an axis that may have several sizes; None where nothing is known of it.
    """

    name: str
    mode: Literal["INPUT", "OUTPUT"]
    dtype: str
    shape: Shape | None = None


@dataclass(frozen=True)
class Piece:
    """Images ``start`` to ``start + count`` of a batch, run as a batch of ``run``: the rest is filling."""

    start: int
    count: int
    run: int


def choose_profile(profiles: Sequence[Profile], shape: Shape) -> Profile:
    """The tightest profile that holds a shape: the smallest maximum, then the nearest optimum, then the first.

    InputError with the shape and the min, opt and max of every profile when none does.
    """
    fitting = [profile for profile in profiles if profile.holds(shape)]
    if not fitting:
        raise InputError(
            f"the input of shape {shape} fits no optimisation profile of this engine ({'; '.join(map(str, profiles))}): "
            "pass a shape inside one, or build the engine with wider ranges"
        )
    size = math.prod(shape)
    return min(fitting, key=lambda p: (math.prod(p.max), abs(math.prod(p.opt) - size), p.index))


def pieces(count: int, batch: ShapeRange) -> list[Piece]:
    """How a batch of ``count`` (at least 1) is run by an engine that takes ``batch``: as few pieces as there can be."""
    starts = range(0, count, batch.max)
    counts = [min(batch.max, count - start) for start in starts]
    return [Piece(start, n, max(n, batch.min)) for start, n in zip(starts, counts, strict=True)]


def mismatches(
    tensors: Iterable[Tensor], input: InputSpec, outputs: Sequence[str], spec: BackboneSpec | None = None
) -> list[str]:
    """Where an engine's inputs and outputs are not those of the manifest, one phrase each.

    ``spec``: what the outputs are, shapes included; without it names and dtypes are compared.
    """
    found = list(tensors)
    inputs = [tensor for tensor in found if tensor.mode == "INPUT"]
    returned = [tensor for tensor in found if tensor.mode == "OUTPUT"]
    reasons = []
    if [tensor.name for tensor in inputs] != [input.name]:
        reasons.append(f"it takes {[tensor.name for tensor in inputs]}, the manifest says [{input.name!r}]")
    else:
        if inputs[0].dtype != _DTYPES[input.dtype]:
            reasons.append(f"its input is {inputs[0].dtype}, the manifest says {_DTYPES[input.dtype]}")
        if not _takes(inputs[0].shape, input):
            reasons.append(f"it takes {_shown(inputs[0].shape)}, the manifest says {_sizes(input)}")
    if sorted(tensor.name for tensor in returned) != sorted(outputs):
        reasons.append(f"it returns {[tensor.name for tensor in returned]}, the manifest promises {list(outputs)}")
    elif spec is not None:
        shapes = {tensor.name: tensor.shape for tensor in returned}
        reasons += _wrong_shapes(shapes, input, spec)
    odd = [f"{tensor.name} {tensor.dtype}" for tensor in returned if tensor.dtype != "FLOAT"]
    if odd:
        reasons.append(f"it returns {', '.join(odd)}, the manifest promises FLOAT")
    return reasons


def _takes(shape: Shape | None, input: InputSpec) -> bool:
    """Whether an engine's input is free or of the one size wherever the manifest says so."""
    if shape is None:
        return True
    promised = zip(input.min_shape, input.max_shape, strict=True)
    return len(shape) == 4 and all(
        size == -1 or size == least == most for size, (least, most) in zip(shape, promised, strict=True)
    )


def _sizes(input: InputSpec) -> str:
    batch, height, width = str(input.batch), str(input.height), str(input.width)
    axes = (
        (batch, str(input.channels), height, width)
        if input.layout == "NCHW"
        else (batch, height, width, str(input.channels))
    )
    return f"({', '.join(axes)})"


def _shown(shape: Shape | None) -> str:
    return f"({', '.join('any' if size == -1 else str(size) for size in shape or ())})"


def _wrong_shapes(shapes: Mapping[str, Shape | None], input: InputSpec, spec: BackboneSpec) -> list[str]:
    """Outputs whose shape is not what the manifest says of their layout, channels, batch and (by their stride) size."""
    maps = zip(spec.out_features, spec.layouts, spec.channels, spec.strides, strict=True)
    extras = ((extra.name, extra.layout, extra.channels, None) for extra in spec.extras)
    reasons = []
    for name, layout, channels, strides in (*maps, *extras):
        shape = shapes[name]
        if shape is None:
            continue
        promise = f"{layout} with {channels} channels and batch {input.batch}"
        fits = len(shape) == len(layout)
        if fits:
            sizes = dict(zip(layout, shape, strict=True))
            fits = sizes["C"] in (-1, channels)
            fits = fits and (sizes["N"] == -1 or input.batch.min == sizes["N"] == input.batch.max)
            if fits and strides is not None and "H" in sizes:
                promise += f", strides {strides[0]} and {strides[1]} of {input.height} x {input.width} pixels"
                fits = _explains(input.height, sizes["H"], strides[0]) and _explains(
                    input.width, sizes["W"], strides[1]
                )
        if not fits:
            reasons.append(f"{name} has shape {_shown(shape)}, the manifest promises {promise}")
    return reasons


def _explains(pixels: ShapeRange, cells: int, stride: int) -> bool:
    """Whether a map of so many cells has this stride, as the build measures it; sizes that vary are not compared."""
    if cells == -1 or not pixels.is_fixed:
        return True
    left = pixels.max - cells * stride  # borders: padding makes up to one cell more, its lack costs up to two
    return -stride < left < 2 * stride or (cells > 0 and stride == max(1, round(pixels.max / cells)))


def uncovered(profiles: Sequence[Profile], input: InputSpec) -> list[Shape]:
    """Inputs that the manifest promises and no profile holds: all corners are tried, and what lies beyond each profile."""
    axes = (0, 2, 3) if input.layout == "NCHW" else (0, 1, 2)
    tried: list[list[int]] = []
    for axis, sizes, step in zip(
        axes, (input.batch, input.height, input.width), (1, input.size_multiple, input.size_multiple), strict=True
    ):
        beyond = [profile.max[axis] + step for profile in profiles]
        inside = (size for size in beyond if sizes.min <= size <= sizes.max)
        tried.append(sorted({sizes.min, sizes.opt, sizes.max, *inside}))
    shapes = dict.fromkeys(input.shape(*sizes) for sizes in itertools.product(*tried))
    return [shape for shape in shapes if not any(profile.holds(shape) for profile in profiles)]


def float32_bytes(shape: Sequence[int]) -> int:
    return 4 * math.prod(shape)


def rounded(size: int) -> int:
    """A size to allocate for ``size`` bytes, at most an eighth more, so that nearly equal sizes share memory."""
    step = max(ALIGNMENT, 1 << max(0, size.bit_length() - 4))
    return -(-size // step) * step


def stream_key(stream: int, thread: int) -> StreamKey:
    """Which queue a stream handle means: 0 and 1 are both the default stream, 2 is one per thread."""
    if stream == 2:
        return 2, thread
    return stream if stream > 2 else 0


def is_default(stream: int) -> bool:
    """Is this one of the handles that stand for a default stream, on which nothing can be captured?"""
    return stream in (0, 1, 2)


def says_out_of_memory(log: str) -> bool:
    """Is memory the reason that TensorRT logged?"""
    text = log.lower().replace(" ", "")
    return any(
        words in text for words in ("outofmemory", "out_of_memory", "cudaerrormemoryallocation", "couldnotallocate")
    )


def says_host_code(log: str) -> bool:
    """Is code for the host in the plan the reason that TensorRT logged?"""
    text = log.lower().replace(" ", "").replace("-", "").replace("_", "")
    return any(words in text for words in ("hostcode", "leanruntime", "versioncompatib"))
