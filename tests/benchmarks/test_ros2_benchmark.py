"""The benchmark of the node of ROS 2: its arithmetic, and that the page has its figures. It runs in tests/consumers."""

from __future__ import annotations

import json
import os

from benchmarks import ros2
from benchmarks.common import RESULTS, ROOT


def turn(plain: float, through: float) -> dict:
    node = {"wait_p50_ms": 0.25, "publish_p50_ms": 0.5}
    return {"plain_ms": plain, "ros_ms": through, "cost_ms": through - plain, "node": node}


def test_the_cost_is_the_median_of_the_rounds_own_differences():
    found = ros2.summary([turn(10, 14), turn(20, 23), turn(30, 90)])
    assert (found["plain_ms"], found["ros_ms"], found["cost_ms"], found["in_node_ms"]) == (20, 23, 4, 0.75)
    assert found["reached"]
    assert not ros2.summary([turn(10, 15.1)])["reached"]


def test_the_resident_memory_is_that_of_the_process():
    assert 10 < ros2.resident_mb(os.getpid()) < 1e5


def test_the_page_has_the_stored_figures():
    found = json.loads((RESULTS / "ros2.json").read_text(encoding="utf-8"))
    page = " ".join((ROOT / "docs" / "how-to" / "ros2.md").read_text(encoding="utf-8").split())
    cost, soak = found["cost"], found["soak"]
    assert f"takes {cost['ros_ms']:.1f} ms through ROS and {cost['plain_ms']:.1f} ms without it" in page
    assert f"The median difference is {cost['cost_ms']:.1f} ms, {cost['in_node_ms']:.1f} ms of it in the node" in page
    minutes = round(soak["seconds"] / 60)
    node = soak["node"]
    assert node["received"] + node["lost"] == soak["sent"]
    assert node["published"] + node["dropped"] == node["received"]
    assert f"{minutes} minutes at {soak['rate_hz']:g} Hz: {soak['sent']} images, {node['published']} computed" in page
    assert f"{soak['begin_mb']:.0f} MB at the begin and {soak['end_mb']:.0f} MB at the end" in page
