"""Let calls of engines finish before the process ends.

Python ends while daemon threads still run. If such a thread then returns from a C++ call, the process ends with
SIGABRT. An exit hook therefore refuses new calls and waits for those that are running.

The hook runs after the other threads have been joined; also after ``sys.exit``, an exception and Ctrl-C. A signal
without a handler, such as SIGTERM, ends the process at once and needs no hook.
"""

from __future__ import annotations

import atexit
import os
import time
import weakref
from typing import Protocol

from edge_backbones.errors import InferenceError


class Called(Protocol):
    """Report whether any thread is in a call of this session, so that the exit hook can wait for it."""

    def end(self) -> None:
        """Refuse every call from now on. Release nothing, because calls may be running."""
        ...

    def is_called(self) -> bool:
        """Return whether a thread is in a call now."""
        ...


_PATIENCE = 10.0  # seconds to wait for running calls, many times the length of one
_RETURN = 0.05  # seconds for a thread to destroy, in C++, what its last call used
_called: weakref.WeakSet[Called] = weakref.WeakSet()


class _Calls:
    """Count the calls into C++ libraries that the end of the process waits for.

    Use it as ``with calls:`` around such work. It raises InferenceError once the process is ending. Threads may share
    it.
    """

    def __init__(self) -> None:
        self._running: list[None] = []  # one entry per call; append and pop need no lock
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
    """Call ``session.end()`` when Python ends, and wait until no thread is in a call of it."""
    _called.add(session)


def refusal() -> InferenceError:
    """Return the error for a call that begins while Python ends."""
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
    """Forget calls of the parent's threads: they do not exist in a forked child and would never end there."""
    _called.clear()
    calls.forget()


atexit.register(_end)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)
