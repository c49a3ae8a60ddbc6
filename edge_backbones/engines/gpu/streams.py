"""Identify CUDA streams, and round sizes of memory on a GPU."""

from __future__ import annotations

from typing import TypeAlias

StreamKey: TypeAlias = "int | tuple[int, int]"


ALIGNMENT = 256  # bytes; TensorRT needs it for every address, and CUDA's allocations have it


def rounded(size: int) -> int:
    """Return the size to allocate for ``size`` bytes: at most an eighth more, so that nearly equal sizes share memory."""
    step = max(ALIGNMENT, 1 << max(0, size.bit_length() - 4))
    return -(-size // step) * step


def stream_key(stream: int, thread: int) -> StreamKey:
    """Return a key for the queue that a stream handle means in a thread.

    Handles 0 and 1 are both the default stream; 2 is the default stream of each thread.
    """
    if stream == 2:
        return 2, thread
    return stream if stream > 2 else 0


def is_default(stream: int) -> bool:
    """Return whether a handle stands for a default stream, on which no graph can be captured."""
    return stream in (0, 1, 2)
