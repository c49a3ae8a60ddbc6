"""What a GPU session decides, as functions over plain values: nothing here needs a GPU."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from edge_backbones.errors import InputError
from edge_backbones.spec import InputSpec, ShapeRange

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
    """An input or output as the engine describes it; ``dtype`` in TensorRT's words."""

    name: str
    mode: Literal["INPUT", "OUTPUT"]
    dtype: str


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


def mismatches(tensors: Iterable[Tensor], input: InputSpec, outputs: Sequence[str]) -> list[str]:
    """Where an engine's inputs and outputs are not those of the manifest, one phrase each."""
    found = list(tensors)
    inputs = [tensor for tensor in found if tensor.mode == "INPUT"]
    returned = [tensor for tensor in found if tensor.mode == "OUTPUT"]
    reasons = []
    if [tensor.name for tensor in inputs] != [input.name]:
        reasons.append(f"it takes {[tensor.name for tensor in inputs]}, the manifest says [{input.name!r}]")
    elif inputs[0].dtype != _DTYPES[input.dtype]:
        reasons.append(f"its input is {inputs[0].dtype}, the manifest says {_DTYPES[input.dtype]}")
    if sorted(tensor.name for tensor in returned) != sorted(outputs):
        reasons.append(f"it returns {[tensor.name for tensor in returned]}, the manifest promises {list(outputs)}")
    odd = [f"{tensor.name} {tensor.dtype}" for tensor in returned if tensor.dtype != "FLOAT"]
    if odd:
        reasons.append(f"it returns {', '.join(odd)}, the manifest promises FLOAT")
    return reasons


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
