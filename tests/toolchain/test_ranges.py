"""Ranges against float64 numpy over all activations at once, and what they must not depend on."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from edge_backbones.errors import CalibrationError
from edge_backbones.toolchain.calibration.ranges import (
    DEAD_TENSOR_THRESHOLD,
    METHODS,
    collect_magnitudes,
    find_ranges,
    merge_magnitudes,
    tensors_beyond_half,
)

BIN = 1 / 2048  # the widest a bin can be, relative to the largest value


def one_node_graph(
    path: Path, op_type: str = "Relu", batch: int | str = "batch", dtype: int = TensorProto.FLOAT
) -> Path:
    """x (batch, 3, 5, 7) -> op -> y, which is read by a last node that makes the graph's output."""
    first = (
        helper.make_node("Cast", ["x"], ["y"], to=TensorProto.FLOAT)
        if dtype != TensorProto.FLOAT
        else helper.make_node(op_type, ["x"], ["y"])
    )
    graph = helper.make_graph(
        [first, helper.make_node("Neg", ["y"], ["out"])],
        "one_node",
        [helper.make_tensor_value_info("x", dtype, [batch, 3, 5, 7])],
        [
            helper.make_tensor_value_info(
                "out", TensorProto.FLOAT, [batch, 3, 5, 7][:: -1 if op_type == "Transpose" else 1]
            )
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(model, path)
    return path


def collect_ranges(
    model: Path, tensors: Sequence[str], batches: Iterable[np.ndarray], **options: str | float
) -> dict[str, float]:
    return find_ranges(collect_magnitudes(model, tensors, batches), **options)


@pytest.fixture
def relu(tmp_path: Path) -> Path:
    return one_node_graph(tmp_path / "relu.onnx")


def heavy_tailed(count: int, seed: int = 0) -> np.ndarray:
    """Images whose scale differs from one to the next over four decades, so that histograms have to grow."""
    random = np.random.default_rng(seed)
    images = random.standard_t(3, size=(count, 3, 5, 7)) * 10.0 ** random.uniform(-2, 2, size=(count, 1, 1, 1))
    return images.astype(np.float32)


def split(images: np.ndarray, sizes: Sequence[int]) -> list[np.ndarray]:
    return np.split(images, np.cumsum(sizes)[:-1])


@pytest.mark.parametrize("percentile", [50.0, 90.0, 99.0, 99.9, 100.0])
def test_percentile_is_that_of_the_values_that_are_not_zero(relu: Path, percentile: float) -> None:
    images = heavy_tailed(40)
    found = collect_ranges(relu, ["x", "y"], [images], percentile=percentile)
    for name, values in (("x", images), ("y", np.maximum(images, 0))):
        magnitudes = np.sort(np.abs(values[values != 0]).astype(np.float64))
        enough = magnitudes[int(np.ceil(percentile / 100 * len(magnitudes))) - 1]  # the least that keeps that share
        assert found[name] == pytest.approx(enough, abs=BIN * magnitudes[-1])


def test_the_threshold_is_interpolated_within_a_bin(relu: Path) -> None:
    # Evenly spread values: every quantile is known exactly, also between the edges of the bins.
    images = (np.arange(1, 105 * 64 + 1, dtype=np.float32) / (105 * 64)).reshape(64, 3, 5, 7)
    for percentile in (10.0, 33.3, 99.97):
        found = collect_ranges(relu, ["x"], [images], percentile=percentile)["x"]
        assert found == pytest.approx(percentile / 100, abs=2 / images.size)


def test_max_is_the_largest_magnitude(relu: Path) -> None:
    images = heavy_tailed(9)
    found = collect_ranges(relu, ["x", "y", "out"], [images], method="max")
    assert found == {"x": np.abs(images).max(), "y": images.max(), "out": images.max()}
    assert list(found) == ["x", "y", "out"]


@pytest.mark.parametrize("method", METHODS)
def test_neither_order_nor_batch_size_matters(relu: Path, method: str) -> None:
    images = heavy_tailed(24)
    expected = collect_ranges(relu, ["x", "y"], [images], method=method, percentile=99.0)
    ascending = images[np.argsort(np.abs(images).max(axis=(1, 2, 3)))]
    for batches in (split(images, [1] * 24), split(images, [5, 11, 8]), [images[::-1]], [ascending], [ascending[::-1]]):
        assert collect_ranges(relu, ["x", "y"], batches, method=method, percentile=99.0) == expected  # to the last bit


def test_counts_of_two_streams_add_up_to_those_of_one(relu: Path) -> None:
    images = heavy_tailed(24)
    for first, second in ((images[:5], images[5:]), (images[:20], images[20:]), (np.zeros_like(images[:2]), images)):
        one, two = (collect_magnitudes(relu, ["x", "y"], [part]) for part in (first, second))
        merged = merge_magnitudes(one, two)
        together = collect_magnitudes(relu, ["x", "y"], [first, second])
        for name in ("x", "y"):
            assert (merged[name].largest, merged[name].exponent) == (together[name].largest, together[name].exponent)
            np.testing.assert_array_equal(merged[name].counts, together[name].counts)
    silent = collect_magnitudes(relu, ["y"], [np.zeros_like(images)])
    assert merge_magnitudes(silent, silent)["y"].largest == 0.0


@pytest.mark.parametrize("batch", ["batch", 1, 3])
def test_the_image_that_reaches_furthest_is_known(tmp_path: Path, batch: int | str) -> None:
    images = np.random.default_rng(0).uniform(-1, 1, (12, 3, 5, 7)).astype(np.float32)
    images[7, 1, 2, 3], images[4, 0, 0, 0] = 5.0, -6.0
    graph = one_node_graph(tmp_path / "relu.onnx", batch=batch)
    seen = collect_magnitudes(graph, ["x", "y"], split(images, [3, 6, 3]))
    assert (seen["x"].furthest, seen["y"].furthest) == (4, 7)
    assert collect_magnitudes(graph, ["y"], [-np.abs(images)])["y"].furthest is None


@pytest.mark.parametrize("batch", [2, 3, 4, 6, 8])
def test_images_that_fill_no_static_batch_count_once(tmp_path: Path, batch: int) -> None:
    """Wherever a tensor has its images: x has them first, y last."""
    model = one_node_graph(tmp_path / "static.onnx", "Transpose", batch)
    images = heavy_tailed(11)
    images[10] *= 100  # one that is counted twice would be noticed
    expected = collect_magnitudes(one_node_graph(tmp_path / "one.onnx", "Transpose", 1), ["x", "y"], [images])
    for batches in ([images], split(images, [1, 7, 3]), split(images, [batch] * (11 // batch) + [11 % batch])):
        seen = collect_magnitudes(model, ["x", "y"], batches)
        for name, other in expected.items():
            np.testing.assert_array_equal(seen[name].counts, other.counts)
            assert (seen[name].largest, seen[name].exponent) == (other.largest, other.exponent)
        assert seen["x"].furthest == expected["x"].furthest


def test_camera_frames_are_counted_as_integers(tmp_path: Path) -> None:
    model = one_node_graph(tmp_path / "frames.onnx", dtype=TensorProto.UINT8)
    frames = np.full((2, 3, 5, 7), 200, dtype=np.uint8)
    assert collect_ranges(model, ["y"], [frames], method="max") == {"y": 200.0}


@pytest.mark.parametrize("magnitude", [1e-42, 1e-30, 1.0, 3e38])
def test_every_float32_magnitude_can_be_counted(relu: Path, magnitude: float) -> None:
    images = np.full((2, 3, 5, 7), magnitude, dtype=np.float32)
    images[0, 0, 0, 0] = 0.0
    value = float(np.float32(magnitude))
    assert collect_ranges(relu, ["x"], [images], percentile=99.0)["x"] == pytest.approx(value, rel=2 * BIN)
    # A first image that is very much smaller than the others leaves no trace.
    faint = np.full((1, 3, 5, 7), 1e-42, dtype=np.float32)
    assert collect_ranges(relu, ["x"], [faint, images, images], percentile=99.0)["x"] == pytest.approx(
        value, rel=2 * BIN
    )


def test_a_tensor_that_is_always_zero_gets_a_harmless_range(relu: Path) -> None:
    images = -np.abs(heavy_tailed(3)) - 1e-3
    for method in METHODS:
        assert collect_ranges(relu, ["y"], [images], method=method) == {"y": DEAD_TENSOR_THRESHOLD}


def test_a_nearly_silent_tensor_keeps_its_few_values(relu: Path) -> None:
    images = np.zeros((100, 3, 5, 7), dtype=np.float32)
    images[17, 1, 2, 3] = 6.0
    assert collect_ranges(relu, ["y"], [images], percentile=99.9)["y"] == pytest.approx(6.0, rel=2 * BIN)


@pytest.mark.parametrize(("bad", "word"), [(np.nan, "NaN"), (np.inf, "infinite"), (-np.inf, "infinite")])
@pytest.mark.parametrize("method", METHODS)
def test_activations_that_are_not_finite_are_refused_by_name(relu: Path, bad: float, word: str, method: str) -> None:
    images = heavy_tailed(4)
    images[2, 0, 4, 6] = bad
    with pytest.raises(CalibrationError, match=f"'x' holds .*{word}.*check the calibration images"):
        collect_ranges(relu, ["x"], [images], method=method)


def test_refusals_say_what_to_do(relu: Path) -> None:
    images = heavy_tailed(2)
    with pytest.raises(CalibrationError, match="no calibration batches; give at least one image"):
        collect_ranges(relu, ["y"], [])
    with pytest.raises(CalibrationError, match="no tensor named 'z'"):
        collect_ranges(relu, ["y", "z"], [images])
    with pytest.raises(CalibrationError, match="'median'; choose one of max, percentile, entropy, mse"):
        collect_ranges(relu, ["y"], [images], method="median")
    for percentile in (0.0, 100.5, float("nan")):
        with pytest.raises(CalibrationError, match=r"must lie in \(0, 100\]"):
            collect_ranges(relu, ["y"], [images], percentile=percentile)
    with pytest.raises(CalibrationError, match=r"\(2, 3, 7, 5\).*'x' \('batch', 3, 5, 7\)"):
        collect_ranges(relu, ["y"], [images.transpose(0, 1, 3, 2)])
    with pytest.raises(CalibrationError, match="did not run on a batch of float64"):
        collect_ranges(relu, ["y"], [images.astype(np.float64)])


def test_progress_counts_images(relu: Path) -> None:
    calls: list[tuple[str, int, int | None]] = []
    collect_magnitudes(relu, ["y"], split(heavy_tailed(7), [2, 5]), progress=lambda *call: calls.append(call))
    assert calls == [("calibrating", 2, None), ("calibrating", 7, None)]
    del calls[:]
    tensors_beyond_half(relu, split(heavy_tailed(7), [2, 5]), progress=lambda *call: calls.append(call))
    assert calls == [("looking for values beyond fp16", 2, None), ("looking for values beyond fp16", 7, None)]


@pytest.mark.parametrize("sign", [1, -1])
def test_large_values_of_either_sign_are_found(tmp_path: Path, sign: int) -> None:
    model = one_node_graph(tmp_path / "identity.onnx", "Identity", batch=4)
    images = np.zeros((7, 3, 5, 7), np.float32)
    assert tensors_beyond_half(model, [images]) == ()
    images[5, 1, 2, 3] = sign * 20_000.0
    assert tensors_beyond_half(model, [images]) == ("y", "out")


def test_memory_does_not_grow_with_the_number_of_images(relu: Path) -> None:
    def peak(count: int) -> int:
        tracemalloc.start()
        collect_ranges(relu, ["x", "y"], (heavy_tailed(1, seed) for seed in range(count)))
        size = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return size

    peak(2)  # imports
    assert peak(400) < peak(20) + 100_000


# ---- where to clip --------------------------------------------------------------------------------------------------


def with_outliers(kind: str) -> np.ndarray:
    random = np.random.default_rng(3)
    values = {
        "uniform": lambda size: random.uniform(-1, 1, size),
        "normal": random.standard_normal,
        "laplace": lambda size: random.laplace(size=size),
        "student": lambda size: random.standard_t(4, size),
    }[kind]((400, 3, 5, 7))
    return values.astype(np.float32)


def rounding_error(values: np.ndarray, threshold: float) -> float:
    """Of symmetric int8 with this threshold, summed over the values themselves."""
    step = threshold / 127
    values = values.astype(np.float64)
    return float(((values - np.clip(np.rint(values / step), -127, 127) * step) ** 2).sum())


@pytest.mark.parametrize("kind", ["uniform", "normal", "laplace", "student"])
def test_mse_is_the_threshold_of_the_least_rounding_error(relu: Path, kind: str) -> None:
    images = with_outliers(kind)
    found = collect_ranges(relu, ["x"], [images], method="mse")["x"]
    largest = float(np.abs(images).max())
    least = min(rounding_error(images, largest * share) for share in np.linspace(0.05, 1, 400))
    assert rounding_error(images, found) <= 1.01 * least
    if kind in ("laplace", "student"):
        assert rounding_error(images, largest) > 1.1 * least  # else there was nothing to find


def divergence(values: np.ndarray, bins: int, width: float) -> float:
    """The algorithm of the talk, written out: slowly, with loops, from the values themselves."""
    counts = [0.0] * bins
    clipped = 0
    for value in np.abs(values[values != 0]).astype(np.float64) / width:
        if value < bins:
            counts[int(value)] += 1
        else:
            clipped += 1
    spread = [0.0] * bins
    for level in range(128):
        members = range(level * bins // 128, (level + 1) * bins // 128)
        filled = [i for i in members if counts[i]]
        for i in filled:
            spread[i] = sum(counts[k] for k in members) / len(filled)
    counts[-1] += clipped
    total, spread_total = sum(counts), sum(spread)
    result = 0.0
    for count, other in zip(counts, spread, strict=True):
        if count and not other:
            return float("inf")
        if count:
            result += count / total * float(np.log((count / total) / (other / spread_total)))
    return result


@pytest.mark.parametrize("kind", ["uniform", "normal", "laplace", "student"])
def test_entropy_is_the_threshold_of_the_least_divergence(relu: Path, kind: str) -> None:
    images = with_outliers(kind)[:40]
    seen = collect_magnitudes(relu, ["x"], [images])
    found = find_ranges(seen, method="entropy")["x"]
    largest = float(np.abs(images).max())
    width = 2.0 ** (int(np.floor(np.log2(largest))) + 1) / 4096
    used = int(largest / width) + 1
    tried = {bins: divergence(images, bins, width) for bins in range(used, 127, -16)}
    assert min(found, largest) == pytest.approx(min(min(tried, key=lambda bins: tried[bins]) * width, largest))


def test_estimators_differ_where_there_is_something_to_clip(relu: Path) -> None:
    """ONNX Runtime's entropy, with as many bins as levels, is max under another name."""
    seen = collect_magnitudes(relu, ["x"], [with_outliers("student")])
    found = {method: find_ranges(seen, method=method)["x"] for method in METHODS}
    assert len(set(found.values())) == len(METHODS)
    assert all(value < found["max"] for method, value in found.items() if method != "max")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("values", [[5.0], [1e-3, 5.0], [-2.0, 2.0], [1.0, 2.0, 3.0, 200.0]])
def test_a_handful_of_values_has_a_range(relu: Path, method: str, values: list[float]) -> None:
    images = np.zeros((1, 3, 5, 7), dtype=np.float32)
    images.flat[: len(values)] = values
    found = collect_ranges(relu, ["x"], [images], method=method)["x"]
    assert 0 < found <= max(np.abs(values)) * (1 + 1e-6)
