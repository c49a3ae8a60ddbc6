"""Read files that a stranger may have made: no links, pipes or devices, no more bytes than expected, and every failure typed.

`opened` and `read_file` raise OSError, whose ``strerror`` says what is wrong with the file. `refusing` is the boundary around
a parser: whatever the parser raises becomes one error of ours with one short line.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Callable, Iterator
from typing import BinaryIO

from edge_backbones.errors import EdgeBackbonesError

_LONGEST_REASON = 240


@contextlib.contextmanager
def opened(path: str | os.PathLike[str], *, follow: bool = True) -> Iterator[tuple[BinaryIO, int]]:
    """Open a regular file for reading; yields it and its size in bytes.

    A pipe or a device is refused instead of waited for. ``follow``: whether ``path`` itself may be a link. Raises OSError.
    """
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    if not follow:
        flags |= getattr(os, "O_NOFOLLOW", 0)
    try:
        handle = os.open(path, flags)
    except ValueError as error:  # a null byte in the path
        raise OSError(errno.EINVAL, str(error), os.fspath(path)) from error
    except OSError as error:
        if error.errno == errno.ELOOP and not follow:
            raise OSError(errno.ELOOP, "it is a link, and links are not followed", os.fspath(path)) from error
        if error.errno == errno.ENXIO:
            raise OSError(errno.ENXIO, "it is no regular file", os.fspath(path)) from error
        raise
    try:
        found = os.fstat(handle)
        if not stat.S_ISREG(found.st_mode):
            what = "a folder" if stat.S_ISDIR(found.st_mode) else "no regular file"
            raise OSError(errno.EINVAL, f"it is {what}", os.fspath(path))
        with open(handle, "rb", closefd=False) as file:
            yield file, found.st_size
    finally:
        os.close(handle)


def read_file(path: str | os.PathLike[str], *, limit: int, follow: bool = True) -> bytes:
    """The bytes of a regular file of at most ``limit`` bytes, whose size is looked at before memory is taken.

    ``follow``: as in `opened`. Raises OSError.
    """
    with opened(path, follow=follow) as (file, size):
        if size > limit:
            raise OSError(errno.EFBIG, f"it has {size} bytes, more than the {limit} it may have", os.fspath(path))
        return file.read(size)


@contextlib.contextmanager
def refusing(refusal: Callable[[str], EdgeBackbonesError]) -> Iterator[None]:
    """The boundary around a parser of a stranger's bytes: what it raises becomes ``refusal(why)``, with why in one line.

    Parsers fail with whatever they trip over (RecursionError and MemoryError too), so everything is caught here, and
    nowhere else. Errors of ours pass as they are.
    """
    try:
        yield
    except EdgeBackbonesError:
        raise
    except Exception as error:
        raise refusal(in_short(error)) from error


def in_short(error: BaseException) -> str:
    """The text of an error in one line of at most a few hundred characters; where it was, at the end, is kept."""
    said = " ".join(str(error).split())
    if not said or isinstance(error, (KeyError, MemoryError, RecursionError)):
        said = ": ".join(filter(None, (type(error).__name__, said)))
    return shortened(said, _LONGEST_REASON)


def shortened(text: str, longest: int) -> str:
    """Cut the middle out of a text that has more than ``longest`` characters."""
    if len(text) <= longest:
        return text
    end = longest // 3
    return f"{text[: longest - end - 5]} ... {text[-end:]}"
