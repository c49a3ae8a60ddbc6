"""Read files that a stranger may have made: no pipes or devices, no more bytes than expected, and every failure typed.

`opened`, `read_file` and `file_sha256` raise OSError, whose ``strerror`` says what is wrong with the file. `refusing` is put
around a parser: whatever the parser raises becomes an error of this package with a reason in one line.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import stat
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from edge_backbones.errors import EdgeBackbonesError

_LONGEST_REASON = 240


@contextlib.contextmanager
def opened(path: str | os.PathLike[str], *, follow: bool = True) -> Iterator[tuple[BinaryIO, int]]:
    """Open a regular file for reading and yield it with its size in bytes.

    Raises OSError, also for a pipe or a device, which could block. ``follow``: ``path`` itself may be a link.
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
    """Return the bytes of a regular file; raise OSError for one of more than ``limit`` bytes before memory is taken.

    ``follow``: as in `opened`.
    """
    with opened(path, follow=follow) as (file, size):
        if size > limit:
            raise OSError(errno.EFBIG, f"it has {size} bytes, more than the {limit} it may have", os.fspath(path))
        return file.read(size)


def file_sha256(path: str | os.PathLike[str]) -> str:
    """Return the SHA-256 of a file of any size as hex digits. Raises OSError."""
    digest = hashlib.sha256()
    with opened(path) as (file, _):
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


@contextlib.contextmanager
def refusing(refusal: Callable[[str], EdgeBackbonesError]) -> Iterator[None]:
    """Turn any exception of a parser of foreign bytes into ``refusal(why)``, with ``why`` in one line.

    Parsers raise many types of errors (RecursionError and MemoryError too), so this catches every Exception. Errors of this
    package pass as they are.
    """
    try:
        yield
    except EdgeBackbonesError:
        raise
    except Exception as error:
        raise refusal(in_short(error)) from error


_PLAIN = {
    errno.ENOENT: "it does not exist",
    errno.EISDIR: "it is a folder",
    errno.ENOTDIR: "a part of its path is a file, not a folder",
    errno.EEXIST: "a file has this name already",
    errno.EACCES: "its permissions do not allow it",
    errno.EPERM: "its permissions do not allow it",
    errno.EROFS: "its disk is read-only",
    errno.ENOSPC: "its disk is full",
}


def why_not(error: OSError) -> str:
    """Return in plain words why the system refused a path, without the path."""
    return _PLAIN.get(error.errno or 0, "") or error.strerror or str(error)


def why_not_made(path: str | os.PathLike[str]) -> str:
    """Return why nothing can be made at a path, whose folders need not exist yet; "" if it can.

    A folder is made and removed in the nearest folder that exists, because permissions alone do not tell.
    """
    place = next(parent for parent in Path(os.path.abspath(path)).parents if os.path.lexists(parent))
    try:
        Path(tempfile.mkdtemp(prefix=".edge-backbones-", dir=place)).rmdir()
    except OSError as error:
        return f"nothing can be made in {place}, {why_not(error)}"
    return ""


def in_short(error: BaseException) -> str:
    """Return the whole text of an error in one line of at most 240 characters, cut in the middle.

    For errors of parsers and decoders, which say what is wrong at the start and where at the end. Use
    `edge_backbones.errors.first_line` for libraries that write a reason and then lines of advice or a trace.
    """
    said = " ".join(str(error).split())
    if not said or isinstance(error, (KeyError, MemoryError, RecursionError)):
        said = ": ".join(filter(None, (type(error).__name__, said)))
    return shortened(said, _LONGEST_REASON)


def shortened(text: str, longest: int) -> str:
    """Return a text with its middle cut out if it has more than ``longest`` characters."""
    if len(text) <= longest:
        return text
    end = longest // 3
    return f"{text[: longest - end - 5]} ... {text[-end:]}"
