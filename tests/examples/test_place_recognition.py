"""The example that finds places: each changed photograph finds its own, with ImageNet's weights."""

from __future__ import annotations

import numpy as np

from edge_backbones import EdgeBackbone
from examples.place_recognition import describe


def test_the_command_prints_the_ranking_with_the_right_place_first(typed):
    lines = [line.split() for line in typed("place_recognition")]
    cosines = [float(cosine) for cosine, _ in lines]
    assert lines[0][1] == "china.jpg"
    assert cosines == sorted(cosines, reverse=True)
    assert len(lines) == 7
    assert cosines[0] > cosines[1] + 0.1


def test_every_photograph_that_was_cropped_and_brightened_finds_its_place(place):
    places, queries = (sorted((place / "samples" / kind).iterdir()) for kind in ("places", "queries"))
    assert [path.name for path in places] == [path.name for path in queries]
    with EdgeBackbone.from_pretrained(place / "samples" / "features.bundle") as backbone:
        backbone.out_features = backbone.out_features[-1:]
        known, asked = describe(backbone, places), describe(backbone, queries)
    np.testing.assert_allclose(np.linalg.norm(known, axis=1), 1, rtol=1e-5)
    cosines = asked @ known.T
    assert cosines.argmax(axis=1).tolist() == list(range(len(places)))
    others = cosines - 2 * np.eye(len(places))
    assert (cosines.diagonal() - others.max(axis=1)).min() > 0.05


def test_another_stage_can_be_asked_for(typed):
    assert typed("place_recognition", "--stage", "blocks.4")[0].endswith("china.jpg")
