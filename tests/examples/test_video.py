"""The example that finds the cuts of a video: the clip has a new scene every two seconds."""

from __future__ import annotations

import re

from build_scripts.samples import FRAME_RATE, SCENES, SECONDS_PER_SCENE


def test_it_finds_the_cuts_and_nothing_else(typed):
    *cuts, last = typed("video")
    seconds = [float(re.match(r"cut before ([\d.]+) s \(distance [\d.]+\)", line)[1]) for line in cuts]
    assert seconds == [SECONDS_PER_SCENE * index for index in range(1, len(SCENES))]
    frames = FRAME_RATE * SECONDS_PER_SCENE * len(SCENES)
    assert last == f"the last frame compared is number {frames - 5}, at {(frames - 5) / FRAME_RATE:.2f} s"


def test_every_frame_can_be_looked_at(typed):
    *cuts, last = typed("video", "--every", 1, "--least", 0.3)
    assert [line.split()[2] for line in cuts] == ["2.00", "4.00"]
    assert last.startswith(f"the last frame compared is number {FRAME_RATE * SECONDS_PER_SCENE * len(SCENES) - 1}, at ")
