"""What the programs in ``examples/`` are tried with."""

from __future__ import annotations

import itertools
import sys

import numpy as np
import pytest
from PIL import Image

from build_scripts import samples
from edge_backbones.errors import MissingDependencyError


def test_a_query_is_a_part_of_its_place_and_brighter(tmp_path):
    samples.write_places(tmp_path)
    places, queries = (sorted((tmp_path / kind).iterdir()) for kind in ("places", "queries"))
    assert [path.name for path in places] == [path.name for path in queries]
    assert len(places) > 5
    for place, query in zip(places, queries, strict=True):
        with Image.open(place) as whole, Image.open(query) as part:
            assert part.size == pytest.approx((0.75 * whole.width, 0.75 * whole.height), abs=1)
            left, top = round(0.2 * whole.width), round(0.1 * whole.height)
            cut = np.asarray(whole.crop((left, top, left + part.width, top + part.height)).convert("L")).astype(float)
            assert np.asarray(part.convert("L")).mean() > 1.1 * cut.mean()


def test_only_the_defect_is_no_brick(tmp_path):
    samples.write_textures(tmp_path)
    good = sorted((tmp_path / "good").iterdir())
    assert len(good) == len({path.read_bytes() for path in good}) == 20
    left, upper, right, lower = samples.DEFECT
    with Image.open(tmp_path / "defect.png") as picture:
        damaged = np.asarray(picture)
    whole = np.asarray(samples._texture("brick"))[128 : 128 + samples.PIECE, 128 : 128 + samples.PIECE]
    changed = (damaged != whole).any(axis=2)
    assert changed[upper:lower, left:right].mean() > 0.9
    changed[upper:lower, left:right] = False
    assert not changed.any()


def test_the_clip_has_its_scenes_one_after_the_other(tmp_path):
    import av

    samples.write_clip(tmp_path / "clip.mp4")
    with av.open(str(tmp_path / "clip.mp4")) as container:
        frames = [frame.to_ndarray(format="rgb24").astype(int) for frame in container.decode(video=0)]
    assert len(frames) == samples.FRAME_RATE * samples.SECONDS_PER_SCENE * len(samples.SCENES)
    assert {frame.shape for frame in frames} == {(240, 320, 3)}
    steps = np.array([np.abs(after - before).mean() for before, after in itertools.pairwise(frames)])
    per_scene = samples.FRAME_RATE * samples.SECONDS_PER_SCENE
    assert sorted(np.argsort(steps)[-2:] + 1) == [per_scene, 2 * per_scene]


def test_without_pyav_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(MissingDependencyError, match="writing a video needs the 'video' extra"):
        samples.write_clip(tmp_path / "clip.mp4")
