"""Say where the outputs of one call lie in one block of memory, so that a call allocates once and copies once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from edge_backbones.engines.gpu.streams import ALIGNMENT, rounded
from edge_backbones.engines.ports import Shape


@dataclass(frozen=True)
class Part:
    """Describe one array in a block: it begins ``offset`` bytes behind the block's beginning and takes ``nbytes``."""

    shape: Shape
    dtype: np.dtype
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Block:
    """Describe a block of ``size`` bytes and the arrays in it, each at a multiple of 256 bytes."""

    parts: tuple[Part, ...]
    size: int

    @classmethod
    def of(cls, shapes: Sequence[Shape], dtypes: Sequence[np.dtype], sizes: Sequence[int] | None = None) -> Block:
        """Return the block for arrays of these shapes and dtypes.

        ``sizes``: Bytes to keep free for each array, where it is more than the array takes.
        """
        parts, end = [], 0
        for index, (shape, dtype) in enumerate(zip(shapes, dtypes, strict=True)):
            nbytes = math.prod(shape) * dtype.itemsize
            parts.append(Part(shape, dtype, end, nbytes))
            kept = nbytes if sizes is None else sizes[index]
            end += -(-kept // ALIGNMENT) * ALIGNMENT
        return cls(tuple(parts), rounded(max(end, 1)))

    @property
    def end(self) -> int:
        """Return where the last array ends, in bytes: what has to be copied."""
        return self.parts[-1].offset + self.parts[-1].nbytes

    def arrays(self, memory: Any) -> list[np.ndarray]:
        """Return the arrays over host memory that has the block's size; ``memory`` supports the buffer protocol."""
        # The buffer must not be an array: numpy would make that the base of further views, instead of the arrays here.
        return [np.ndarray(part.shape, part.dtype, buffer=memory, offset=part.offset) for part in self.parts]


NO_ARRAYS = Block((), 0)
