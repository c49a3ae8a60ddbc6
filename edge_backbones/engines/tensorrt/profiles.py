"""Choose the optimisation profile for an input shape, and recognise known failures in TensorRT's log."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from edge_backbones.engines.ports import Shape
from edge_backbones.errors import InputError
from edge_backbones.spec import InputSpec


@dataclass(frozen=True)
class Profile:
    """Hold one optimisation profile: the smallest, the usual and the largest shape of the input."""

    index: int
    min: Shape
    opt: Shape
    max: Shape

    def holds(self, shape: Sequence[int]) -> bool:
        """Return whether an input of this shape is inside the profile."""
        return len(shape) == len(self.min) and all(
            low <= size <= high for low, size, high in zip(self.min, shape, self.max, strict=True)
        )

    def __str__(self) -> str:
        return f"profile {self.index}: min {self.min}, opt {self.opt}, max {self.max}"


def choose_profile(profiles: Sequence[Profile], shape: Shape) -> Profile:
    """Return the tightest profile that holds a shape: the smallest maximum, then the nearest optimum, then the first.

    Raises InputError, which lists every profile, if none holds it.
    """
    fitting = [profile for profile in profiles if profile.holds(shape)]
    if not fitting:
        raise InputError(
            f"the input of shape {shape} fits no optimisation profile of this engine ({'; '.join(map(str, profiles))}): "
            "pass a shape inside one, or build the engine with wider ranges"
        )
    size = math.prod(shape)
    return min(fitting, key=lambda p: (math.prod(p.max), abs(math.prod(p.opt) - size), p.index))


def uncovered(profiles: Sequence[Profile], input: InputSpec) -> list[Shape]:
    """Return input shapes that the manifest allows and no profile holds; empty if there are none.

    It tries the corners of the allowed sizes, and the sizes just beyond each profile.
    """
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


def says_out_of_memory(log: str) -> bool:
    """Return whether TensorRT's log says that memory ran out."""
    return _says(log, "outofmemory", "cudaerrormemoryallocation", "couldnotallocate")


def says_host_code(log: str) -> bool:
    """Return whether TensorRT's log says that the plan carries host code."""
    return _says(log, "hostcode", "leanruntime", "versioncompatib")


def _says(log: str, *words: str) -> bool:
    """Return whether a log has one of these words, with whatever marks between their parts."""
    text = re.sub(r"[-_ ]", "", log.lower())
    return any(word in text for word in words)
