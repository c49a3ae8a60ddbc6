"""What quantised tensors are stored as, and the scale that a range gives."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from edge_backbones.spec import Precision

HALF_MAX = float(np.finfo(np.float16).max)
HALF_SMALLEST = float(np.finfo(np.float16).smallest_subnormal)


@dataclass(frozen=True)
class Format:
    """What quantised tensors are stored as, and the largest magnitude of it that is used."""

    name: str
    dtype: ir.DataType
    largest: float

    @property
    def largest_threshold(self) -> float:
        return HALF_MAX * self.largest


FORMATS = {
    Precision.INT8: Format("int8", ir.DataType.INT8, 127),  # symmetric: -128 is not used
    Precision.FP8: Format("fp8", ir.DataType.FLOAT8E4M3FN, 448),
}


def activation_scale(tensor: str, threshold: float) -> tuple[str, npt.NDArray[np.float32]]:
    """Name and value of the scale that an int8 graph has for a range."""
    return f"{tensor}.scale", scales_of(np.asarray(threshold), FORMATS[Precision.INT8])


def scales_of(thresholds: npt.NDArray[np.floating], to: Format) -> npt.NDArray[np.float32]:
    """threshold / largest, rounded up to numbers that fp16 holds: nothing within the threshold is clipped. Never 0."""
    exact = np.maximum(thresholds.astype(np.float64) / to.largest, HALF_SMALLEST)
    half = exact.astype(np.float16)
    with np.errstate(over="ignore"):  # what follows the largest half is computed, never chosen
        half = np.where(half < exact, np.nextafter(half, np.float16(np.inf)), half)
    # A channel of zeros takes any scale; 1 keeps engines away from their smallest numbers.
    return np.where(thresholds == 0.0, np.float32(1.0), half.astype(np.float32))
