"""What names a CUDA stream, and how memory on a GPU is sized."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeAlias

StreamKey: TypeAlias = "int | tuple[int, int]"


ALIGNMENT = 256  # of every address that TensorRT is given; CUDA's allocations have it


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
