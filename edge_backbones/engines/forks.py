"""Refuse engines in forked children. A fork copies an engine's memory, but not the threads that it waits for.

A child that calls, closes or just collects an engine of its parent hangs, or crashes when it ends. So a forked child
refuses to use such an engine, and never destroys it. Children that are started with spawn inherit nothing.
"""

from __future__ import annotations

import ctypes
import os
import weakref
from typing import Protocol

from edge_backbones.errors import InferenceError


class Inherited(Protocol):
    """Hold something native that a forked child must neither use nor destroy."""

    def abandon(self) -> None:
        """Keep everything native for good, and refuse every call from now on. It runs in the child."""
        ...


# A function object of its own, because argument types set on ctypes.pythonapi.Py_IncRef would apply to the whole process.
_increase_references = ctypes.PYFUNCTYPE(None, ctypes.py_object)(("Py_IncRef", ctypes.pythonapi))
_inherited: weakref.WeakSet[Inherited] = weakref.WeakSet()


def keep_for_good(held: object) -> None:
    """Prevent an object and all that it holds from ever being destroyed, even when the process ends."""
    _increase_references(held)


def abandon_in_children(inherited: Inherited) -> None:
    """Call ``inherited.abandon()`` in every child that this process forks while ``inherited`` lives."""
    _inherited.add(inherited)


def refusal(library: str) -> InferenceError:
    """Return the error for a call in a forked child."""
    return InferenceError(
        f"{library} was started in the process that this one was forked from, and its threads do not exist here: start "
        "workers with the 'spawn' method (DataLoader: multiprocessing_context='spawn'), or fork before a bundle is opened"
    )


def _in_child() -> None:
    for inherited in list(_inherited):
        inherited.abandon()


if hasattr(os, "register_at_fork"):  # Windows does not fork
    os.register_at_fork(after_in_child=_in_child)
