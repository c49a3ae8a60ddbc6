"""Engines at the end of the process: Python ends while daemon threads run, and a thread that then returns from a call in C++
ends the process with SIGABRT. So a hook refuses new calls and waits for those that run.

It runs when the other threads have been joined, after ``sys.exit``, an exception and Ctrl-C too. A signal that nobody
handles, such as SIGTERM, ends the process at once and needs no hook.
"""

from __future__ import annotations

import atexit
import os
import time
import weakref
from typing import Protocol

from edge_backbones.errors import InferenceError


class Called(Protocol):
    """A session that threads call, and that knows without counting whether one is in a call."""

    def end(self) -> None:
        """Refuse every call from now on. Release nothing: calls may run."""
        ...

    def is_called(self) -> bool:
        """Whether a thread is in a call now."""
        ...


_PATIENCE = 10.0  # seconds: many times what a call takes
_RETURN = 0.05  # seconds that a thread has to destroy, in C++, what its last call used
_called: weakref.WeakSet[Called] = weakref.WeakSet()


class _Calls:
    """``with calls:`` around work of a C++ library, which the end of the process waits for. Refuses when that has begun."""

    def __init__(self) -> None:
        self._running: list[None] = []  # threads append and pop without a lock
        self._is_ending = False

    def __enter__(self) -> None:
        if self._is_ending:
            raise refusal()
        self._running.append(None)

    def __exit__(self, *_: object) -> None:
        self._running.pop()

    def end(self) -> None:
        self._is_ending = True

    def is_called(self) -> bool:
        return bool(self._running)

    def forget(self) -> None:
        self._running.clear()


calls = _Calls()


def end_with_process(session: Called) -> None:
    """Call ``session.end()`` when Python ends, and wait until nobody is in a call of it."""
    _called.add(session)


def refusal() -> InferenceError:
    """The error for a call that begins while Python ends."""
    return InferenceError("Python is ending, and no call begins any more: stop your threads before the program ends")


def _end() -> None:
    ending: list[Called] = [calls, *_called]
    for one in ending:
        one.end()
    if not any(one.is_called() for one in ending):
        return
    until = time.monotonic() + _PATIENCE
    while any(one.is_called() for one in ending) and time.monotonic() < until:
        time.sleep(0.001)
    time.sleep(_RETURN)


def _in_child() -> None:
    """Calls of other threads are not in a forked child, and never end there."""
    _called.clear()
    calls.forget()


atexit.register(_end)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)
