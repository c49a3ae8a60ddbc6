"""What every engine library of this package gives: engines that were compiled, and engines that were loaded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from edge_backbones.bundle.manifest import EngineKey


@dataclass(frozen=True)
class CompiledEngine:
    """Raw engine bytes of one flavour, and the key that says where they may run. ``from_cache``: not compiled now.

    ``layers``: what the library says of its layers, as JSON. ``timing_cache``: what TensorRT measured. ``notes``: what the
    user should know, a sentence each.
    """

    data: bytes
    key: EngineKey
    suffix: str
    from_cache: bool
    layers: str | None = None
    timing_cache: bytes | None = None
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.data:
            raise ValueError("an engine cannot be empty")


class EngineSession(Protocol):
    """One loaded engine. ``run`` may be called from several threads at once."""

    def run(self, array: np.ndarray) -> list[np.ndarray]:
        """Every output of the engine, in graph order, as new float32 arrays that the caller owns.

        ``array`` is C-contiguous, of the input's dtype and of a shape that the engine takes as it is.
        """
        ...

    def close(self) -> None:
        """Release the engine. Not while a call runs in another thread; closing twice is fine."""
        ...
