"""The benchmark of whole frames: its arithmetic, and all of it on the smallest network."""

from __future__ import annotations

import pytest

from benchmarks import camera, common


def turn(milliseconds: float, stolen: float = 0.0) -> dict[str, float]:
    return {"frame_ms": milliseconds, "stolen_share": stolen}


def test_a_ratio_is_the_median_of_calm_rounds_and_judged_by_its_bound():
    rounds = [
        {"fit rgb": turn(10), "graph rgb": turn(12)},
        {"fit rgb": turn(20), "graph rgb": turn(22)},
        {"fit rgb": turn(10), "graph rgb": turn(11)},
        {"fit rgb": turn(10), "graph rgb": turn(90, stolen=0.5)},
    ]
    found = camera.summary("rgb", rounds)
    assert (found["fit rgb"], found["graph rgb"]) == (10, 12)
    assert found["ratio"] == pytest.approx(1.1)
    assert found["reached"]
    assert not camera.summary("rgb", [{"fit rgb": turn(10), "graph rgb": turn(13)}])["reached"]
    assert camera.summary("jpeg", [{"map jpeg": turn(10), "loop jpeg": turn(12)}])["reached"]
    assert not camera.summary("jpeg", [{"map jpeg": turn(10), "loop jpeg": turn(11)}])["reached"]


def test_every_contender_gives_the_same_maps(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "CACHE", tmp_path)
    bundles = {
        name: common.timing_bundle("test_resnet", f"test.{name}", out_indices=(1, 4), **options)
        for name, options in camera.BUNDLES.items()
    }
    for name, (first, second, _, _) in camera.COMPARISONS.items():
        found = camera.compare(name, bundles, rounds=1, threads=1)
        assert found["worst_cosine"] > (0.9999 if name == "jpeg" else 0.9)  # int8, each calibrated on what it takes
        assert found[first] > 0 < found[second]
