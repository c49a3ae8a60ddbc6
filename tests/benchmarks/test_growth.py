"""The laws that growth is told with, on points whose law is known, and the picture of made-up results."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from benchmarks import common, end_to_end, growth

X = (1, 2, 4, 8, 16, 32)


def noisy(values, share=0.02):
    return np.asarray(values) * (1 + share * np.random.default_rng(0).standard_normal(len(values)))


# ---- fits


def test_a_line_is_found():
    exact = growth.fit_linear(X, [3 + 0.5 * x for x in X])
    assert (exact["law"], exact["r2"]) == ("linear", pytest.approx(1))
    assert (exact["fixed"], exact["slope"]) == (pytest.approx(3), pytest.approx(0.5))
    assert exact["slope_error"] == pytest.approx(0, abs=1e-9)
    found = growth.fit_linear(X, noisy([3 + 0.5 * x for x in X]))
    assert abs(found["slope"] - 0.5) < 4 * found["slope_error"] < 0.1
    assert abs(found["fixed"] - 3) < 4 * found["fixed_error"] < 2
    assert 0.99 < found["r2"] < 1


def test_a_power_is_found():
    exact = growth.fit_power(X, [7 * x**1.9 for x in X])
    assert (exact["factor"], exact["exponent"], exact["r2"]) == (pytest.approx(7), pytest.approx(1.9), pytest.approx(1))
    found = growth.fit_power(X, noisy([7 * x**1.9 for x in X]))
    assert abs(found["exponent"] - 1.9) < 4 * found["exponent_error"] < 0.1
    assert found["r2"] > 0.99


def test_standard_errors_are_those_of_the_textbook():
    """Against the formulas of simple regression: s / sqrt(Sxx), and s * sqrt(1 / n + mean**2 / Sxx)."""
    x, y = np.array([1.0, 2, 3, 4]), np.array([2.0, 3, 5, 4])
    found = growth.fit_linear(x, y)
    s = np.sqrt(((y - found["fixed"] - found["slope"] * x) ** 2).sum() / 2)
    assert found["slope_error"] == pytest.approx(s / np.sqrt(5))
    assert found["fixed_error"] == pytest.approx(s * np.sqrt(1 / 4 + 2.5**2 / 5))


def test_two_points_have_no_law():
    """Any law of two parameters passes through two points: the points are named instead."""
    points = [{"x": n, "milliseconds": 2 + 10 / n, "resident_mb": 75.0 + n} for n in (2, 1)]
    latency, memory = growth.curves("threads", points)
    assert latency["fit"] is None
    assert latency["points"] == [[1, 12.0], [2, 7.0]]
    assert latency["words"] == "2 points, 12 and 7 ms: too few for a law"
    assert memory["words"] == "2 points, 76 and 77 MB: too few for a law"
    three = growth.curves("threads", [*points, {"x": 4, "milliseconds": 4.5, "resident_mb": 79.0}])
    assert all(curve["fit"]["slope_error"] is not None for curve in three)


def test_a_point_that_was_measured_twice_is_one_place():
    points = [{"x": n, "seconds": 6 + 0.4 * n} for n in (4, 4, 8)]
    (curve,) = growth.curves("images", points)
    assert curve["fit"] is None
    assert curve["words"].startswith("3 points")


# ---- curves


def batch_points():
    y = noisy([2 + 4 * x for x in X], 0.01)
    return [{"x": x, "milliseconds": float(value), "resident_mb": 60 + 5.0 * x} for x, value in zip(X, y, strict=True)]


def side_points():
    return [
        {"x": side, "milliseconds": 1e-4 * side**2.1, "resident_mb": 70 + 90 * side**2 / 1e6} for side in growth.SIDES
    ]


def test_curves_of_an_axis():
    latency, memory = growth.curves("batch", batch_points()[::-1])
    assert [point[0] for point in latency["points"]] == list(X)
    assert latency["words"].startswith(f"{latency['fit']['fixed']:.3g} ms + ")
    assert "ms per image, R² " in latency["words"]
    assert memory["fit"]["slope"] == pytest.approx(5)
    latency, memory = growth.curves("side", side_points())
    assert latency["fit"]["exponent"] == pytest.approx(2.1)
    assert latency["words"].startswith("ms ∝ side^(2.1")
    assert memory["fit"]["slope"] == pytest.approx(90)  # per megapixel
    for curve in (latency, memory):
        x, y = np.array(curve["points"]).T
        np.testing.assert_allclose(growth.predict(curve, x), y, rtol=1e-6)


def test_threads_share_a_part_of_the_work():
    points = [{"x": n, "milliseconds": 3 + 12 / n, "resident_mb": 50.0} for n in (1, 2, 4)]
    latency, memory = growth.curves("threads", points)
    assert (latency["fit"]["fixed"], latency["fit"]["slope"]) == (pytest.approx(3), pytest.approx(12))
    assert "/ threads" in latency["words"]
    assert memory["fit"]["slope"] == pytest.approx(0, abs=1e-9)
    assert growth.curves("threads", points[:1]) == []  # one core: nothing grows


def test_build_time_is_drawn_over_what_was_measured_of_the_network():
    points = [{"x": None, "seconds": 4 * p**0.5, "parameters": p} for p in (25.0, 1.0, 11.0)]
    (curve,) = growth.curves("parameters", points)
    assert [point[0] for point in curve["points"]] == [1, 11, 25]
    assert curve["fit"]["exponent"] == pytest.approx(0.5)


def test_the_choice_of_points():
    assert growth.some((1, 2, 4, 8, 16, 32), quick=False) == (1, 2, 4, 8, 16, 32)
    assert growth.some((1, 2, 4, 8, 16, 32), quick=True) == (1, 8, 32)
    assert [growth.thread_counts(cores) for cores in (1, 2, 6, 8)] == [(1,), (1, 2), (1, 2, 4, 6), (1, 2, 4, 8)]
    full = growth.build_points("resnet18", quick=False)
    assert [x for axis, x, _ in full if axis == "images"] == list(growth.IMAGES)
    assert [a["model"] for axis, _, a in full if axis == "parameters"] == list(growth.NETWORKS)
    assert len(growth.build_points("resnet18", quick=True)) < len(full)


# ---- the picture


def made_up():
    points = {
        "batch": batch_points(),
        "side": side_points(),
        "stages": [{"x": n, "milliseconds": 1.5 * n, "resident_mb": 40 + 9.0 * n} for n in range(1, 6)],
        "threads": [{"x": n, "milliseconds": 2 + 10 / n, "resident_mb": 75.0 + n} for n in (1, 2)],
        "images": [{"x": n, "seconds": 6 + 0.4 * n} for n in growth.IMAGES],
        "parameters": [{"x": None, "seconds": 5 * p**0.4, "parameters": p} for p in (0.6, 3.0, 11.2, 23.5)],
    }
    found = [curve for axis, values in points.items() for curve in growth.curves(axis, values)]
    return {"machine": {"cpu": "made-up CPU", "threads": 2}, "model": "resnet18", "quick": False, "curves": found}


def test_the_picture(tmp_path):
    results = json.loads(json.dumps(made_up()))  # as it is stored
    assert len(results["curves"]) == len(growth.CURVES)
    growth.draw(results, tmp_path / "growth.png")
    with Image.open(tmp_path / "growth.png") as image:
        assert image.width > 900
        pixels = np.asarray(image.convert("RGB"))
    points = (np.abs(pixels.astype(int) - (0x1F, 0x3D, 0x6E)).sum(axis=2) < 30).mean(axis=0)
    assert points[: len(points) // 2].sum() > 0  # in both columns
    assert points[len(points) // 2 :].sum() > 0
    assert not has_line(tmp_path, results, "threads")
    assert has_line(tmp_path, results, "batch")
    growth.draw({**results, "curves": results["curves"][:1]}, tmp_path / "one.png")
    assert (tmp_path / "one.png").stat().st_size < (tmp_path / "growth.png").stat().st_size


def has_line(folder, results, axis):
    """Whether the picture of the first curve of an axis has a fitted law, by its colour."""
    only = [curve for curve in results["curves"] if curve["axis"] == axis][:1]
    growth.draw({**results, "curves": only}, folder / "only.png")
    with Image.open(folder / "only.png") as image:
        pixels = np.asarray(image.convert("RGB")).astype(int)
    return bool((np.abs(pixels - (0x8A, 0xA4, 0xC8)).sum(axis=2) < 6).sum() > 200)


def test_stored_points_are_fitted_and_drawn_anew(tmp_path, monkeypatch):
    results = json.loads(json.dumps(made_up()))
    stale = [{**curve, "fit": {"law": "linear"}, "words": "a law of an older release"} for curve in results["curves"]]
    (tmp_path / "growth.json").write_text(json.dumps({**results, "curves": stale}))
    monkeypatch.setattr(growth, "RESULTS", tmp_path)
    monkeypatch.setattr("sys.argv", ["growth", "--redraw"])
    growth.main()
    assert json.loads((tmp_path / "growth.json").read_text()) == results
    assert (tmp_path / "growth.png").stat().st_size > 10_000


def test_the_committed_picture_has_no_law_of_two_points():
    stored = json.loads((common.RESULTS / "growth.json").read_text())
    assert stored == growth.refit(stored)
    few = [curve for curve in stored["curves"] if len(curve["points"]) < growth.LEAST_POINTS]
    assert all(curve["fit"] is None and "too few for a law" in curve["words"] for curve in few)


# ---- frames to feature maps


def test_ratios_are_of_one_round_and_of_calm_ones():
    def turn(frame, preprocessing, stolen=0.0):
        engine = frame - preprocessing
        return {"frame_ms": frame, "preprocessing_ms": preprocessing, "engine_ms": engine, "stolen_share": stolen}

    rounds = [
        {"timm": turn(30.0, 20.0), "ours": turn(15.0, 5.0)},
        {"timm": turn(60.0, 40.0), "ours": turn(30.0, 10.0)},  # a slow minute: the same ratio
        {"timm": turn(10.0, 2.0, 0.5), "ours": turn(90.0, 80.0, 0.5)},
    ]
    found = end_to_end.summary(rounds)
    assert (found["ratio"], found["preprocessing_ratio"], found["engine_ratio"]) == (2, 4, 1)
    assert found["timm"]["frame_ms"] == 45
    assert found["reached"]
    assert not end_to_end.summary([{"timm": turn(12.0, 2.0), "ours": turn(10.0, 1.0)}])["reached"]


def test_both_ways_end_with_the_same_maps(tmp_path, monkeypatch):
    """The whole benchmark, on the smallest network and for an instant."""
    monkeypatch.setattr(common, "CACHE", tmp_path)
    bundles = {
        kind: common.timing_bundle("test_resnet", f"test.{input}", input=input, out_indices=(1, 4))
        for kind, input in end_to_end.KINDS.items()
    }
    found = end_to_end.compare(bundles, rounds=1, threads=1)
    assert found["worst_cosine"] > 0.999
    assert len(found["rounds"]) == 1
    for kind in end_to_end.KINDS:
        assert 0 < found[kind]["preprocessing_ms"] < found[kind]["frame_ms"]


def test_the_frame_is_a_photograph():
    frame = end_to_end.frame()
    assert (frame.shape, frame.dtype) == ((1080, 1920, 3), np.uint8)
    assert frame.std() > 30
    assert np.abs(np.diff(frame.astype(int), axis=1)).mean() < 10  # no noise
