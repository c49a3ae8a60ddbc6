"""Check the host arrays that callers pass, and make them contiguous."""

from __future__ import annotations

from typing import Any

import numpy as np

from edge_backbones.engines.gpu.arrays import refuse_views
from edge_backbones.errors import InputError, first_line
from edge_backbones.spec import InputSpec

_LARGEST = {"float16": "65504", "float32": "3.4e38"}
_POSITIVE_INFINITY, _NEGATIVE_INFINITY = 0x7C00, 0xFC00  # the bits of float16


def half_is_finite(array: np.ndarray) -> bool:
    """Return whether a float16 array has neither NaN nor infinity.

    The exponent of those is all ones, so as integers they are the largest of either sign. This takes a thirtieth of the
    time of ``np.isfinite(array).all()``, which converts every value.
    """
    return bool(array.view(np.int16).max() < _POSITIVE_INFINITY and array.view(np.uint16).max() < _NEGATIVE_INFINITY)


def refuse_not_finite(array: np.ndarray, spec: InputSpec) -> None:
    """Raise InputError if an array holds NaN or infinity; return if only the sum of its squares overflowed."""
    found = {}
    for index, sample in enumerate(array):
        counts = {"NaN": int(np.isnan(sample).sum()), "infinite": int(np.isinf(sample).sum())}
        if any(counts.values()):
            found[index] = " and ".join(f"{count} {kind}" for kind, count in counts.items() if count)
    if found:
        first = ", ".join(f"{what} in sample {index}" for index, what in list(found.items())[:3])
        more = f", and more in {len(found) - 3} other samples" if len(found) > 3 else ""
        raise InputError(
            f"{spec.name} of shape {array.shape} has values that are not finite ({first}{more}): replace them, as "
            "np.nan_to_num(array, posinf=0, neginf=0) does, or open the bundle with check_finite=False"
        )


def host_array(values: Any, spec: InputSpec) -> np.ndarray:
    """Return a writable, C-contiguous array of the engine's dtype.

    It shares the caller's memory and is a copy only if it must be. Floats of other widths are cast to the engine's. A
    single frame without a batch axis becomes a batch of one. Raises InputError for another dtype, masked values, or values
    beyond the engine's dtype.
    """
    if not isinstance(values, np.ndarray):
        if not hasattr(values, "__dlpack__"):
            raise InputError(
                f"{spec.name} of type {type(values).__name__} does not fit: pass a numpy array or a DLPack tensor, "
                f"{spec.describe()}"
            )
        values = from_dlpack(values, spec.name, spec.dtype)
    refuse_masked(values, spec.name)
    is_float = values.dtype.kind == "f" or values.dtype.name == "bfloat16"  # jax's bfloat16 comes from ml_dtypes
    if spec.dtype != "uint8" and is_float:
        try:
            with np.errstate(over="raise"):
                values = values.astype(spec.dtype, copy=False)
        except FloatingPointError as error:
            beyond = f"values beyond {spec.dtype}, whose largest is {_LARGEST[spec.dtype]}"
            raise InputError(
                f"{spec.name} of dtype {values.dtype} has {beyond}, and this engine takes {spec.describe()}: scale them, or "
                "np.clip them"
            ) from error
    elif values.dtype != spec.dtype:
        raise InputError(f"{spec.name} of dtype {values.dtype} does not fit: this engine takes {spec.describe()}")
    values = values.reshape(batched(values.shape, spec)) if spec.name != "pixel_values" else values
    # OpenVINO accepts writable memory only, although it does not write to an input.
    return np.require(np.asarray(values), requirements=("C", "W"))


def batched(shape: tuple[int, ...], spec: InputSpec) -> tuple[int, ...]:
    """Return the shape of a batch for frames whose first axis, the batch, or last axis, of one channel, is left out."""
    if spec.frame is not None and spec.frame.shape[2] == 1 and shape[-2:] == spec.frame.shape[:2]:
        shape = *shape, 1
    return (1, *shape) if len(shape) == 3 else shape


def refuse_masked(values: np.ndarray, name: str) -> None:
    """Raise InputError for an array with masked values."""
    if isinstance(values, np.ma.MaskedArray) and np.ma.is_masked(values):
        raise InputError(
            f"{name} has {np.ma.getmaskarray(values).sum()} masked values, and an engine has no mask: pass array.filled(0)"
        )


def from_dlpack(values: Any, name: str, dtype: str) -> np.ndarray:
    """Return a numpy array over the memory of a CPU array of another library.

    ``name`` and ``dtype`` are for the message of the InputError: what the array is, and which dtype is wanted.
    """
    refuse_views(values)
    try:
        return np.from_dlpack(values)
    except (BufferError, RuntimeError, TypeError, ValueError) as error:
        found, cause = getattr(values, "dtype", "unknown dtype"), first_line(error).rstrip(".")
        raise InputError(
            f"{name} of {found} cannot be read through DLPack ({cause}): pass a dense {dtype} tensor on the CPU, detached"
        ) from error
