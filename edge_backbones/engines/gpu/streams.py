"""Identify CUDA streams, and round sizes of memory on a GPU."""

from __future__ import annotations

from typing import TypeAlias

StreamKey: TypeAlias = int


ALIGNMENT = 256  # bytes; TensorRT needs it for every address, and CUDA's allocations have it


def rounded(size: int) -> int:
    """Return the size to allocate for ``size`` bytes: at most an eighth more, so that nearly equal sizes share memory."""
    step = max(ALIGNMENT, 1 << max(0, size.bit_length() - 4))
    return -(-size // step) * step


def is_default(stream: int) -> bool:
    """Return whether a handle stands for a default stream, on which no graph can be captured."""
    return stream in (0, 1, 2)
