"""What a precision means in an ONNX graph: the type of its tensors, and the scale that a range gives."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from edge_backbones.spec import Precision

HALF_SMALLEST = float(np.finfo(np.float16).smallest_subnormal)


def type_of(precision: Precision) -> ir.DataType:
    """Return the ONNX type of tensors in this precision."""
    return ir.DataType[precision.info.onnx_type]


def largest_threshold(precision: Precision) -> float:
    """Return the largest |x| that int8 or fp8 can have as a range: its scale must be an fp16 number."""
    return Precision.FP16.info.largest * precision.info.largest


def activation_scale(tensor: str, threshold: float) -> tuple[str, npt.NDArray[np.float32]]:
    """Return the name and the value of the scale that an int8 graph has for the range of a tensor."""
    return f"{tensor}.scale", scales_of(np.asarray(threshold), Precision.INT8)


def scales_of(thresholds: npt.NDArray[np.floating], precision: Precision) -> npt.NDArray[np.float32]:
    """Divide thresholds by the largest magnitude of int8 or fp8, rounded up to fp16 numbers, so that nothing is clipped.

    No scale is 0: the smallest is the smallest fp16 number, and a threshold of 0 gives 1.
    """
    exact = np.maximum(thresholds.astype(np.float64) / precision.info.largest, HALF_SMALLEST)
    half = exact.astype(np.float16)
    with np.errstate(over="ignore"):  # what follows the largest half is computed, never chosen
        half = np.where(half < exact, np.nextafter(half, np.float16(np.inf)), half)
    # A channel of zeros takes any scale; 1 keeps engines away from their smallest numbers.
    return np.where(thresholds == 0.0, np.float32(1.0), half.astype(np.float32))
