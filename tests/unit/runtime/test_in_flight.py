"""Several calls at once: order, back-pressure, errors and the end."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import threading
import time

import numpy as np
import pytest

from edge_backbones.errors import InputError
from edge_backbones.runtime.backbone import EdgeBackbone
from edge_backbones.runtime.in_flight import in_order
from edge_backbones.spec import ShapeRange
from edge_backbones.testing import SPEC, NumpySession, pooled, pooling_input


class Source:
    """Numbers from 0 on; how many were taken."""

    def __init__(self, count: int, fails: bool = False) -> None:
        self.count, self.fails, self.taken, self.threads = count, fails, 0, set()

    def __iter__(self):
        for number in range(self.count):
            self.taken += 1
            self.threads.add(threading.get_ident())
            yield number
        if self.fails:
            raise OSError("the camera is gone")


@pytest.mark.parametrize("in_flight", [1, 2, 5])
def test_results_come_in_order_and_calls_run_at_once(in_flight):
    together = threading.Barrier(in_flight)

    def call(number: int) -> int:
        if number < in_flight:
            together.wait(30)  # all of them run at this time
        time.sleep(0.002 * (7 - number % 7))  # later ones are done earlier
        return number * number

    source = Source(40)
    assert list(in_order(call, source, in_flight)) == [number * number for number in range(40)]
    assert source.threads == {threading.get_ident()}


@pytest.mark.parametrize("in_flight", [1, 2, 5])
def test_no_more_frames_are_taken_than_are_in_flight(in_flight):
    source = Source(30)
    results = in_order(lambda number: number, source, in_flight)
    assert source.taken == 0
    for number in range(30):
        assert next(results) == number
        assert source.taken <= number + in_flight
    assert next(results, None) is None


def test_an_error_of_a_call_comes_in_its_place_and_ends_all():
    started = []

    def call(number: int) -> int:
        started.append(number)
        if number == 3:
            raise ZeroDivisionError
        return number

    source, before = Source(100), threading.active_count()
    results = in_order(call, source, 2)
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ZeroDivisionError):
        next(results)
    assert next(results, None) is None
    assert max(started) <= 4
    assert threading.active_count() == before


def test_an_error_of_the_source_comes_behind_the_results_before_it():
    results = in_order(lambda number: number, Source(5, fails=True), 3)
    assert [next(results) for _ in range(5)] == [0, 1, 2, 3, 4]
    with pytest.raises(OSError, match="the camera is gone"):
        next(results)


def test_leaving_the_loop_waits_for_what_runs_and_begins_nothing():
    begun, ended = [], []

    def call(number: int) -> int:
        begun.append(number)
        time.sleep(0.05)
        ended.append(number)
        return number

    before = threading.active_count()
    results = in_order(call, Source(100), 4)
    assert next(results) == 0
    results.close()
    assert begun == sorted(ended) or sorted(begun) == sorted(ended)
    assert len(begun) <= 5
    assert threading.active_count() == before


def test_nothing_in_flight_is_refused_at_once():
    with pytest.raises(InputError, match="in_flight must be 1 or more, got 0"):
        in_order(abs, [1], 0)


def test_a_backbone_maps_frames_of_every_batch():
    input = pooling_input(ShapeRange(min=1, opt=2, max=4))
    frames = [np.random.default_rng(n).random((1 + n % 6, 3, 32, 48), np.float32) for n in range(20)]
    with EdgeBackbone(SPEC, input, NumpySession(input)) as backbone:
        for output, frame in zip(backbone.map(iter(frames), in_flight=3), frames, strict=True):
            for actual, expected in zip(output.feature_maps, pooled(frame), strict=True):
                np.testing.assert_array_equal(actual, expected)
        outputs = list(backbone.map(frames, return_dict=False))
        assert all(isinstance(output, tuple) for output in outputs)
        with pytest.raises(InputError, match=r"shape \(1, 3, 5, 5\) does not fit"):
            list(backbone.map([frames[0], np.zeros((1, 3, 5, 5), np.float32)]))
        with pytest.raises(InputError, match="hidden states"):
            list(backbone.map(frames, output_hidden_states=True))
        with pytest.raises(InputError, match="in_flight must be 1 or more"):
            backbone.map(frames, 0)


def test_ctrl_c_ends_the_loop_and_the_process():
    code = """
    import os, signal, threading, time
    from edge_backbones.runtime.in_flight import in_order

    signal.signal(signal.SIGINT, signal.default_int_handler)

    def call(number):
        time.sleep(0.05)
        return number

    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
    try:
        for number in in_order(call, range(10**9), 3):
            pass
    except KeyboardInterrupt:
        left = [thread.name for thread in threading.enumerate() if thread.name.startswith("edge_backbones.map")]
        print("interrupted, left:", left)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "interrupted, left: []\n", "")
