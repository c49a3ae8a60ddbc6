"""Ctrl-C and the node's program, without ROS."""

from __future__ import annotations

import signal
import threading

import pytest

from edge_backbones.integrations.ros2.interrupts import Interrupts


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def handler():
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)


def test_one_key_interrupts_once(handler):
    clock = Clock()
    Interrupts(clock).install()
    for now, does_interrupt in ((10, True), (10, False), (11.9, False), (12.1, True), (14, False)):
        clock.now = now
        if does_interrupt:
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
        else:
            signal.raise_signal(signal.SIGINT)


def test_an_end_that_has_begun_is_not_interrupted_at_once():
    clock = Clock()
    interrupts = Interrupts(clock)
    interrupts.begin_end()
    interrupts.handle(signal.SIGINT, None)
    clock.now = 3
    with pytest.raises(KeyboardInterrupt):
        interrupts.handle(signal.SIGINT, None)


def test_after_the_end_the_signal_is_ignored(handler):
    interrupts = Interrupts(Clock())
    interrupts.install()
    interrupts.end()
    assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    signal.raise_signal(signal.SIGINT)


def test_another_thread_leaves_the_handler_alone(handler):
    before = signal.getsignal(signal.SIGINT)
    thread = threading.Thread(target=Interrupts().install)
    thread.start()
    thread.join()
    assert signal.getsignal(signal.SIGINT) == before
