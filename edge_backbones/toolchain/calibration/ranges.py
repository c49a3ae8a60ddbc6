"""Range estimators: count how large the values of each tensor are over calibration batches, and choose where to clip.

The range of a tensor is one positive number: the |x| that becomes 127 in int8, or 448 in fp8. It must not depend on how
the data was delivered. So every tensor is reduced to counts (`Magnitudes`) that add up in any order:

- images are fed one static batch at a time (one image, where the batch is dynamic), whatever arrives, because a kernel may
  round differently at another batch size. Images that do not fill one are repeated, all equally often, and what is counted
  of them is divided by that;
- |x| is counted in bins whose width is a power of two. A value that does not fit doubles the width, and neighbouring bins
  are merged: exactly the histogram that the final width would have counted from the start.

Memory is one batch of activations and 32 KiB per tensor, whatever the number of images.

Exact zeros are left out of the counts: every scale represents them, so they have no say in where to clip. A percentile
of a ReLU's output is then a percentile of what passed the ReLU, and a nearly silent tensor keeps its few large values.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import numpy as np
import numpy.typing as npt

from edge_backbones.errors import CalibrationError
from edge_backbones.progress import Progress, no_progress
from edge_backbones.reading import in_short

if TYPE_CHECKING:
    from edge_backbones.engines.onnxruntime.library import onnxruntime

METHODS = ("max", "percentile", "entropy", "mse")

#: The threshold of a tensor that was zero on every image. Any positive number does: zero quantises to zero.
DEAD_TENSOR_THRESHOLD = 1.0

# At most this many bins are in use; the largest value lies in the upper half of them, so a bin is 1/2048 of the range
# or finer, 8 times finer than the 8-bit grid that the threshold will span.
_BINS = 4096
_NEAR_HALF_MAX = float(np.finfo(np.float16).max) / 4
_LEVELS = 128  # magnitudes of a symmetric int8: 0 to 127
_THRESHOLD_STEP = 16  # bins between two thresholds that entropy and mse try: 1/128 of the range or finer


def collect_magnitudes(
    model_path: Path,
    tensors: Sequence[str],
    batches: Iterable[npt.NDArray[np.generic]],
    *,
    largest: dict[str, float] | None = None,
    progress: Progress = no_progress,
) -> dict[str, Magnitudes]:
    """Run an ONNX graph over calibration batches and count how large the values of each named tensor are.

    Args:
        model_path: fp32 ONNX file with one input; its batch dimension is static or dynamic.
        tensors: names of float tensors in the graph; the graph's input and outputs may be among them.
        batches: arrays of the input's dtype, shaped (N, ...) as the input is. N may differ from batch to batch; a multiple
            of the graph's batch size takes the least time. Read once, never held.
        largest: the largest |x| so far of further tensors, from `float_tensors`; raised to that of these batches.
        progress: called as (step text, images done, None) after every batch.

    Returns:
        The counts in the order of `tensors`. The same data gives the same counts in any order and in batches of any size.

    Raises:
        CalibrationError: an unknown tensor, no batches, a batch that does not fit the input, or a NaN or infinite
            activation (which names the tensor).
    """
    largest = {} if largest is None else largest
    exposed = tuple(dict.fromkeys([*tensors, *largest]))
    if not exposed:
        return {}
    session = _session_with_outputs(model_path, exposed)
    magnitudes = {name: Magnitudes() for name in tensors}
    images = 0
    for batch in batches:
        for chunk, repeats in chunks(batch, session):
            distinct = len(chunk) // repeats
            for name, values in _activations(session, exposed, chunk):
                if name in magnitudes:
                    _count(magnitudes[name], values, name, range(images, images + distinct), repeats)
                if name in largest:
                    reached = magnitudes[name].largest if name in magnitudes else _reached(values, name)
                    largest[name] = max(largest[name], reached)
            images += distinct
        progress("calibrating", images, None)
    if images == 0:
        raise CalibrationError(
            "there were no calibration batches; give at least one image (a few dozen typical ones are better)"
        )
    return magnitudes


def merge_magnitudes(first: Mapping[str, Magnitudes], second: Mapping[str, Magnitudes]) -> dict[str, Magnitudes]:
    """Add up the counts of two streams. Equal to the counts of one stream, except that `furthest` is None."""
    merged = {}
    for name, one in first.items():
        other = second[name]
        exponents = [seen.exponent for seen in (one, other) if seen.exponent is not None]
        merged[name] = Magnitudes(max(one.largest, other.largest), None, max(exponents, default=None))
        for seen in (one, other):
            if seen.exponent is not None:
                merged[name].counts += _merged(seen.counts, max(exponents) - seen.exponent)
    return merged


def float_tensors(model_path: Path) -> tuple[str, ...]:
    """Name the float tensors that a graph computes, in graph order."""
    import onnx

    model = onnx.shape_inference.infer_shapes(onnx.load(model_path, load_external_data=False))
    described = (*model.graph.value_info, *model.graph.output)
    floats = {v.name for v in described if v.type.tensor_type.elem_type == onnx.TensorProto.FLOAT}
    return tuple(name for node in model.graph.node for name in node.output if name in floats)


def beyond_half(largest: Mapping[str, float]) -> tuple[str, ...]:
    """Name the tensors whose values come near what fp16 can hold.

    Near is a quarter of 65504: other images will have larger values than these.
    """
    return tuple(name for name, value in largest.items() if value > _NEAR_HALF_MAX)


def tensors_beyond_half(
    model_path: Path, batches: Iterable[npt.NDArray[np.generic]], *, progress: Progress = no_progress
) -> tuple[str, ...]:
    """Run a graph and name all its float tensors that are `beyond_half`. Raises what `collect_magnitudes` raises."""
    largest = dict.fromkeys(float_tensors(model_path), 0.0)
    step = "looking for values beyond fp16"
    collect_magnitudes(
        model_path, (), batches, largest=largest, progress=lambda _, done, total: progress(step, done, total)
    )
    return beyond_half(largest)


def find_ranges(
    magnitudes: Mapping[str, Magnitudes], *, method: str = "percentile", percentile: float = 99.99
) -> dict[str, float]:
    """Return the range of each tensor: the |x| that becomes 127 (in fp8: 448).

    ``max``: the largest |x| seen. ``percentile``: clips the largest values that are not zero, and keeps ``percentile``
    (in (0, 100], 100 is max) of them. ``entropy``: the least Kullback-Leibler divergence between the counts and the same
    in 128 levels (S. Migacz, 8-bit inference with TensorRT, GTC 2017). ``mse``: the least squared error of rounding and
    clipping together.

    Ranges are finite and positive; a tensor that is zero everywhere gets DEAD_TENSOR_THRESHOLD. Raises
    CalibrationError for a bad option.
    """
    if method not in METHODS:
        raise CalibrationError(f"range method is {method!r}; choose one of {', '.join(METHODS)}")
    if not 0.0 < percentile <= 100.0:
        raise CalibrationError(f"percentile is {percentile!r}; it must lie in (0, 100], 99.99 for example")
    return {name: _threshold(seen, method, percentile / 100.0) for name, seen in magnitudes.items()}


# ---- running the graph ----------------------------------------------------------------------------------------------


def _session_with_outputs(model_path: Path, tensors: Sequence[str]) -> onnxruntime.InferenceSession:
    """Return a session over the graph with `tensors` as its only outputs (the input itself needs no output)."""
    import onnx

    from edge_backbones.engines.onnxruntime.library import onnxruntime
    from edge_backbones.engines.onnxruntime.options import session_options

    model = onnx.load(model_path, load_external_data=False)
    inputs = {value.name for value in model.graph.input}
    known = {name for node in model.graph.node for name in node.output}
    unknown = [name for name in tensors if name not in known | inputs]
    if unknown:
        raise CalibrationError(
            f"{model_path} has no tensor named {', '.join(map(repr, unknown))}; take the names from the same graph"
        )
    del model.graph.output[:]
    computed = [name for name in tensors if name not in inputs] or [model.graph.node[-1].output[0]]
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in computed)

    options = session_options()
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(model_path.parent))
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def chunks(
    batch: npt.NDArray[np.generic], session: onnxruntime.InferenceSession
) -> Iterator[tuple[npt.NDArray[np.generic], int]]:
    """Split any number of images into batches of the graph's size; also yield how often each image is in its batch."""
    expected = session.get_inputs()[0]
    fits = batch.ndim == len(expected.shape) and all(
        want == got for want, got in zip(expected.shape[1:], batch.shape[1:], strict=True) if isinstance(want, int)
    )
    size = expected.shape[0] if isinstance(expected.shape[0], int) else 1
    if not fits:
        raise CalibrationError(
            f"a calibration batch is shaped {batch.shape}, the graph's input {expected.name!r} {tuple(expected.shape)};"
            " give images of that shape"
        )
    start = 0
    while start < len(batch):
        distinct = max(n for n in range(1, min(size, len(batch) - start) + 1) if size % n == 0)
        yield np.repeat(batch[start : start + distinct], size // distinct, axis=0), size // distinct
        start += distinct


def _activations(
    session: onnxruntime.InferenceSession, tensors: Sequence[str], chunk: npt.NDArray[np.generic]
) -> Iterator[tuple[str, npt.NDArray[np.generic]]]:
    """Run one batch and yield each named tensor."""
    input_name = session.get_inputs()[0].name
    names = [output.name for output in session.get_outputs()]
    try:
        values = dict(zip(names, session.run(names, {input_name: chunk}), strict=True))
    except Exception as error:  # onnxruntime raises unrelated classes; each says what did not fit
        raise CalibrationError(
            f"the graph did not run on a batch of {chunk.dtype} {chunk.shape}: {in_short(error)}"
        ) from error
    values[input_name] = chunk
    for name in tensors:
        yield name, values[name]


# ---- counting -------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Magnitudes:
    """The counts of one tensor. Bin i counts the values with i <= |x| / 2**exponent < i + 1, exact zeros left out.

    ``furthest``: which image of the stream, from 0, has the largest value; None where all are zero.
    """

    largest: float = 0.0
    furthest: int | None = None
    exponent: int | None = None  # None until a value other than zero arrives
    counts: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(_BINS, dtype=np.int64))


def _count(seen: Magnitudes, values: npt.NDArray[np.generic], name: str, images: range, repeats: int) -> None:
    """Count the activations of these images, each of which is there ``repeats`` times."""
    magnitudes = np.abs(values, dtype=np.float32).ravel()
    largest = float(magnitudes.max(initial=0.0))
    if not np.isfinite(largest):  # max() passes a NaN on
        _refuse(name, largest)
    if largest > seen.largest:
        seen.largest = largest
        seen.furthest = images[int(magnitudes.argmax()) * len(images) // magnitudes.size]  # images come first in memory
    if largest == 0.0:
        return

    exponent = _exponent_for(largest)
    if seen.exponent is None:
        seen.exponent = exponent
    elif exponent > seen.exponent:
        seen.counts = _merged(seen.counts, exponent - seen.exponent)
        seen.exponent = exponent
    # ldexp in float64: a float32 scale would overflow or underflow for magnitudes near the ends of the float32 range.
    scale = np.ldexp(1.0, -seen.exponent)
    magnitudes *= np.float32(scale) if 1e-30 < scale < 1e30 else scale
    counts = np.bincount(magnitudes.astype(np.intp), minlength=_BINS)
    counts[0] -= magnitudes.size - np.count_nonzero(values)
    seen.counts += (counts + repeats // 2) // repeats  # rounded: a kernel may differ in the last bit from copy to copy


def _reached(values: npt.NDArray[np.generic], name: str) -> float:
    """Return the largest |x|, without an array of magnitudes."""
    reached = float(np.maximum(values.max(initial=0.0), -values.min(initial=0.0)))  # passes a NaN on
    if not np.isfinite(reached):
        _refuse(name, reached)
    return reached


def _refuse(name: str, largest: float) -> NoReturn:
    raise CalibrationError(
        f"activation {name!r} holds {'NaN' if np.isnan(largest) else 'an infinite value'}; quantisation needs"
        " finite activations: check the calibration images, their normalisation and the weights"
    )


def _exponent_for(largest: float) -> int:
    """Return the smallest e with largest < _BINS * 2**e."""
    return int(np.frexp(largest)[1]) - (_BINS.bit_length() - 1)


def _merged(counts: npt.NDArray[np.int64], doublings: int) -> npt.NDArray[np.int64]:
    """Return the same counts in bins that are 2**doublings as wide."""
    merged = np.zeros_like(counts)
    # A shift past the last bin leaves index 0 whatever its size; numpy's shift by 64 or more is undefined.
    np.add.at(merged, np.arange(_BINS) >> min(doublings, _BINS.bit_length()), counts)
    return merged


# ---- where to clip --------------------------------------------------------------------------------------------------


def _threshold(seen: Magnitudes, method: str, share: float) -> float:
    """Return the range of one tensor. ``share``: the part of the values that ``percentile`` keeps."""
    if seen.exponent is None:
        return DEAD_TENSOR_THRESHOLD
    if method == "max" or (method == "percentile" and share == 1.0):
        return seen.largest
    if method == "percentile":
        bins = _quantile(seen.counts, share)
    elif method == "entropy":
        bins = _least_divergence(seen.counts)
    else:
        bins = _least_error(seen.counts)
    return min(float(np.ldexp(bins, seen.exponent)), seen.largest)


def _quantile(counts: npt.NDArray[np.int64], share: float) -> float:
    """Return the number of bins below which this share of the values lies, interpolated."""
    cumulative = np.cumsum(counts)
    wanted = share * float(cumulative[-1])
    index = int(np.searchsorted(cumulative, wanted))
    below = float(cumulative[index - 1]) if index else 0.0
    return index + (wanted - below) / float(counts[index])


def _thresholds_to_try(counts: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return thresholds to try, in bins: down to one bin per level, up to the last bin in use."""
    used = int(np.flatnonzero(counts)[-1]) + 1
    return np.arange(used, min(_LEVELS, used) - 1, -_THRESHOLD_STEP)[::-1]


def _least_divergence(counts: npt.NDArray[np.int64]) -> float:
    """Return the threshold with the least KL(P || Q), in bins.

    P has what is clipped in its last bin. Q has as many levels as int8, each spread over its own bins.
    """
    best, least = 0, np.inf
    total, filled = float(counts.sum()), counts > 0
    for bins in _thresholds_to_try(counts):
        inside = counts[:bins].astype(np.float64)
        edges = np.arange(min(_LEVELS, bins)) * bins // min(_LEVELS, bins)
        sums, width = np.add.reduceat(inside, edges), np.add.reduceat(filled[:bins].astype(np.float64), edges)
        level = np.repeat(sums / np.maximum(width, 1.0), np.diff(np.append(edges, bins)))
        q = np.where(filled[:bins], level, 0.0)
        p = inside
        p[-1] += total - p.sum()
        present = p > 0
        if not q.any() or (q[present] == 0).any():
            continue  # everything that is clipped would land where nothing was
        divergence = float((p[present] * np.log(p[present] / total * q.sum() / q[present])).sum())
        if divergence <= least:  # of equal ones the widest
            best, least = int(bins), divergence
    return float(best)


def _least_error(counts: npt.NDArray[np.int64]) -> float:
    """Return the threshold with the least squared error of rounding and clipping, in bins."""
    bins = _thresholds_to_try(counts)
    middle = np.arange(len(counts)) + 0.5
    best, least = 0, np.inf
    for threshold in bins:
        step = threshold / (_LEVELS - 1)
        error = middle - np.minimum(np.rint(middle / step), _LEVELS - 1) * step
        squared = float(counts @ (error * error))
        if squared <= least:
            best, least = int(threshold), squared
    return float(best)
