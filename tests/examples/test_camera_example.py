"""The example that watches a camera. A video stands in for it."""

from __future__ import annotations

import re

from build_scripts.samples import FRAME_RATE


def test_it_prints_once_a_second_how_far_the_scene_is_from_the_first_frame(typed):
    lines = typed("camera", instead={"0": "samples/clip.mp4"})
    found = [re.fullmatch(r"(\d) s: ([\d.]+) frames/s, 0 dropped, distance ([\d.]+)", line).groups() for line in lines]
    assert [int(second) for second, _, _ in found] == [1, 2, 3, 4, 5]
    assert all(abs(float(rate) - FRAME_RATE) <= 1 for _, rate, _ in found)  # of the video: it is not timed
    distances = [float(distance) for _, _, distance in found]
    assert distances[0] < 0.3  # the same scene, moved
    assert min(distances[1:]) > 0.4


def test_it_ends_after_the_limit(typed):
    lines = typed("camera", "--limit", FRAME_RATE + 1, instead={"0": "samples/clip.mp4"})
    assert len(lines) == 1
