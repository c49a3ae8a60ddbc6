"""Engines in forked children: a fork copies the memory of an engine, and none of the threads that it waits for.

A child that calls, closes or merely collects an engine of its parent waits for ever, or crashes when it ends. So a forked
child refuses to use such an engine, and never destroys it. Children that are started with spawn have nothing to inherit.
"""

from __future__ import annotations

import ctypes
import os
import weakref
from typing import Protocol

from edge_backbones.errors import InferenceError


class Inherited(Protocol):
    """Something that a forked child must neither use nor destroy."""

    def abandon(self) -> None:
        """In the child: keep everything native for good, and refuse every call from now on."""
        ...


# A function object of our own: argument types set on ctypes.pythonapi's would hold for every library in the process.
_increase_references = ctypes.PYFUNCTYPE(None, ctypes.py_object)(("Py_IncRef", ctypes.pythonapi))
_inherited: weakref.WeakSet[Inherited] = weakref.WeakSet()


def keep_for_good(held: object) -> None:
    """Never destroy an object, nor what it holds: not when nobody refers to it, and not when the process ends."""
    _increase_references(held)


def abandon_in_children(inherited: Inherited) -> None:
    """Call ``inherited.abandon()`` in every child that this process forks while ``inherited`` lives."""
    _inherited.add(inherited)


def refusal(library: str) -> InferenceError:
    """The error for a call in a forked child."""
    return InferenceError(
        f"{library} was started in the process that this one was forked from, and its threads do not exist here: start "
        "workers with the 'spawn' method (DataLoader: multiprocessing_context='spawn'), or fork before a bundle is opened"
    )


def _in_child() -> None:
    for inherited in list(_inherited):
        inherited.abandon()


if hasattr(os, "register_at_fork"):  # Windows does not fork
    os.register_at_fork(after_in_child=_in_child)
