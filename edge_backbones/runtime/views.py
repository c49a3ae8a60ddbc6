"""Show the arrays of an engine in the layout that callers see, without a copy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from edge_backbones.spec import BackboneSpec

_TO_NCHW = (0, 3, 1, 2)


def reordered_outputs(spec: BackboneSpec) -> tuple[bool, ...]:
    """Return for each output whether engines return it in channels-last memory; empty if they return none so."""
    reordered = tuple(output.is_reordered for output in spec.described_outputs)
    return reordered if any(reordered) else ()


def as_callers_see(outputs: Sequence[Any], reordered: Sequence[bool]) -> list[Any]:
    """Return the outputs of an engine, with NCHW views of those in channels-last memory.

    Args:
        outputs: Every output in graph order: numpy arrays or DeviceArrays.
        reordered: For each output whether it is NHWC and callers see NCHW; empty for none.
    """
    if not reordered:
        return list(outputs)
    return [_channels_first(output) if moved else output for output, moved in zip(outputs, reordered, strict=True)]


def _channels_first(array: Any) -> Any:
    return array.transpose(_TO_NCHW) if isinstance(array, np.ndarray) else array.channels_first()
