"""File operations below a folder that fail, or end the process, by number: every one of a change can be tried.

Python announces its file operations to audit hooks before it carries them out, and an exception of a hook takes the place of
the operation. Flushing to disk is announced nowhere, and is replaced instead.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

OPERATIONS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "fsync")


class _Plan:
    def __init__(self, folder: Path, number: int, act: Callable[[str], None], only: str | None) -> None:
        self.folder, self.left, self.act, self.only = os.path.realpath(folder), number, act, only
        self.done = False

    def passes(self, operation: str, path: str) -> None:
        if self.done or (self.only is not None and operation != self.only) or not path.startswith(self.folder):
            return
        if self.left:
            self.left -= 1
            return
        self.done = True
        self.act(path)


_plans: list[_Plan] = []
_fsync = os.fsync


def _hook(event: str, args: tuple[Any, ...]) -> None:
    if not _plans or event not in OPERATIONS or not args or not isinstance(args[0], (str, bytes, os.PathLike)):
        return
    if event == "open" and isinstance(args[2], int) and not args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
        return  # readers are another matter
    path = os.path.abspath(os.fsdecode(args[0]))
    for plan in list(_plans):
        plan.passes(event, path)


def _flush(handle: int) -> None:
    path = os.readlink(f"/proc/self/fd/{handle}")
    for plan in list(_plans):
        plan.passes("fsync", path)
    _fsync(handle)


sys.addaudithook(_hook)


@contextlib.contextmanager
def failing(folder: Path, number: int, cause: int, *, only: str | None = None) -> Iterator[Callable[[], bool]]:
    """Operation ``number`` below ``folder`` raises OSError; yields what tells whether it never came to that."""

    def fail(path: str) -> None:
        raise OSError(cause, os.strerror(cause), path)

    plan = _Plan(folder, number, fail, only)
    _plans.append(plan)
    os.fsync = _flush
    try:
        yield lambda: not plan.done
    finally:
        _plans.remove(plan)
        os.fsync = _fsync


def crashing(folder: Path, number: int) -> None:
    """From now on operation ``number`` below ``folder`` ends this process, as a kill or a power cut would."""

    def end(path: str) -> None:
        os._exit(77)

    _plans.append(_Plan(folder, number, end, None))
    os.fsync = _flush
