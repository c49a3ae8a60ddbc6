"""The benchmark of threads: its arithmetic, and a contender under a mask on the smallest network."""

from __future__ import annotations

import os

import pytest

from benchmarks import common, threads
from benchmarks.common import ROOT


def turn(*milliseconds: float) -> threads.Turn:
    return {"mean": list(milliseconds), "p99": [2 * one for one in milliseconds]}


def contenders() -> dict[str, threads.Task]:
    return threads.tasks({f"{m} {lib}": [("b", lib)] for m in "RM" for lib in ("OpenVINO", "ONNX Runtime")})


def turns(rounds: int = 7) -> dict[str, list[threads.Turn]]:
    """Every call takes 10 ms, twice as long beside another engine at the same time."""
    found = {}
    for name, task in contenders().items():
        milliseconds = 20.0 if task.get("together") and not task.get("threads") else 10.0
        found[name] = [turn(*[milliseconds] * len(task["engines"]))] * rounds
    return found


def test_engines_that_do_not_slow_each_other_have_a_ratio_of_1():
    rows = threads.figures(turns())
    assert len({row["what"] for row in rows}) == len(rows) == 19
    assert {row["value"] for row in rows} == {1.0}
    assert all(row["reached"] for row in rows)


def test_slower_engines_miss_their_targets():
    slow = turns()
    slow["M OpenVINO {'quota': 1.0} None"] = [turn(20)] * 7
    slow["R OpenVINO + M OpenVINO False"] = [turn(15, 10)] * 7
    slow["R OpenVINO + R OpenVINO True"] = [turn(20, 40)] * 7
    missed = {row["what"]: row["value"] for row in threads.figures(slow) if not row["reached"]}
    assert missed == {
        "mobilenetv3_large_100 OpenVINO with a quota of 1 CPU: time with threads=None over threads=1": 2.0,
        "resnet50 OpenVINO and mobilenetv3_large_100 OpenVINO in turn: time of both calls over that alone": 1.25,
        "resnet50 OpenVINO and resnet50 OpenVINO at the same time: time of the work over that alone": pytest.approx(
            4 / 3
        ),
    }


def test_figures_of_quotas_are_left_out_where_there_are_none():
    without = {name: of for name, of in turns().items() if "quota" not in contenders()[name]}
    assert {row["what"] for row in threads.figures(turns())} - {row["what"] for row in threads.figures(without)} == {
        row["what"] for row in threads.figures(turns()) if "quota" in row["what"]
    }


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system has no affinity masks")
def test_a_contender_calls_its_engines_in_turn_and_together(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "CACHE", tmp_path)
    bundle = common.timing_bundle("test_resnet", "test.threads", precisions=("int8",))
    for together in (False, True):
        task = {"engines": [(str(bundle), "openvino")] * 2, "cpus": 1, "together": together}
        found = threads.take_turn(task, ROOT)
        assert [len(found["mean"]), len(found["p99"])] == [2, 2]
        assert min(found["mean"]) > 0
