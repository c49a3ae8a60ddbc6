"""What became of frames, and how long they took."""

from __future__ import annotations

import dataclasses
import threading

import pytest

from edge_backbones.integrations.ros2.figures import Counts, Gaps, Latencies, Newest, Reasons, Times, status


def test_the_newest_item_is_taken_and_older_ones_are_replaced():
    newest: Newest[int] = Newest()
    assert [newest.put(1), newest.put(2), newest.put(3)] == [False, True, True]
    assert newest.take() == 3
    assert newest.put(4) is False
    assert newest.close() is True
    assert newest.close() is False
    assert newest.take() is None
    assert newest.take() is None


@pytest.mark.parametrize("end", [lambda newest: newest.put(5), lambda newest: newest.close()])
def test_a_thread_that_waits_wakes(end):
    newest: Newest[int] = Newest()
    taken: list[int | None] = []
    thread = threading.Thread(target=lambda: taken.append(newest.take()))
    thread.start()
    end(newest)
    thread.join(30)
    assert taken in ([5], [None])


def test_gaps_in_numbers_are_missing_messages():
    gaps = Gaps()
    numbers = [7, 8, 11, 12, 1, 2, 5]  # the camera was started again before 1
    assert [gaps.missing("a", number) for number in numbers] == [0, 0, 2, 0, 0, 0, 2]
    assert [gaps.missing("b", number) for number in (100, 101)] == [0, 0]
    assert gaps.missing("a", 6) == 0
    assert gaps.missing("a", None) == 0


def test_latencies_are_of_the_last_frames_in_milliseconds():
    latencies = Latencies()
    assert latencies.summary() == {}
    for _ in range(1000):
        latencies.add(Times(1.0, 1.0, 1.0, 1.0))
    for index in range(300):
        latencies.add(Times(0.001, 0.002, 0.1 if index < 10 else 0.004, 0.001))
    assert latencies.summary() == {
        "latency_p50_ms": 8.0,
        "latency_p99_ms": 104.0,
        "wait_p50_ms": 1.0,
        "prepare_p50_ms": 2.0,
        "engine_p50_ms": 4.0,
        "publish_p50_ms": 1.0,
    }


def test_a_reason_is_new_once_whatever_its_numbers_are():
    reasons = Reasons()
    assert [reasons.is_new(reason) for reason in ("54 bytes", "55 bytes", "other")] == [True, False, True]
    assert sum(reasons.is_new("x" * size) for size in range(1, 1000)) == 48  # a stranger cannot fill the log


def said(**counts):
    is_active = counts.pop("is_active", True)
    before = Counts(received=100, published=90, dropped=10)
    after = dataclasses.replace(before, **{k: getattr(before, k) + v for k, v in counts.items()})
    return status(after, before, 2.0, Latencies(), {"engine": "e", "last_error": "why"}, is_active=is_active)


@pytest.mark.parametrize(
    ("counts", "level", "message"),
    [
        (
            {"received": 60, "published": 50, "dropped": 10, "lost": 1},
            "OK",
            "25.0 frames per second; 10 came too fast, 1 were",
        ),
        ({"received": 6, "published": 5, "failed": 1}, "ERROR", "1 frames failed: why"),
        ({"received": 6, "refused": 6}, "WARN", "6 frames were refused: why"),
        ({}, "WARN", "no frames came"),
        ({"received": 6, "unread": 6}, "OK", "nobody has subscribed"),
        ({"is_active": False}, "OK", "inactive"),
    ],
)
def test_diagnostics_say_what_happened_since_the_last(counts, level, message):
    found = said(**counts)
    assert found.level == level
    assert found.message.startswith(message)
    assert found.values["engine"] == "e"
    assert found.values["received"] == str(100 + counts.get("received", 0))
    assert all(isinstance(value, str) for value in found.values.values())


def test_the_rate_is_of_the_time_since_the_last_diagnostics():
    assert said(received=60, published=60).values["rate_hz"] == "30.00"
