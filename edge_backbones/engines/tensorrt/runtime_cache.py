"""Keep the kernels that TensorRT-RTX compiles when an engine runs first, so that the next process need not compile them.

A file holds what ``IRuntimeCache.serialize`` returned, behind its SHA-256. It lies in the user's cache folder and is named
after all that it depends on. TensorRT-RTX checks release, GPU and driver once more, and refuses what does not fit. A file
that is missing, damaged or another user's costs time and nothing else: reading and writing return a note and never raise.

The kernels are code for the GPU, so a file that others may have written is not read.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import stat
from pathlib import Path

from edge_backbones.bundle.storage import write_beside_and_rename
from edge_backbones.machine.gpus import Gpu
from edge_backbones.machine.system import default_cache, gib
from edge_backbones.reading import opened

LARGEST_FILE = 256 << 20
LARGEST_FOLDER = 1 << 30

_MAGIC = b"edge_backbones runtime cache 1\n"
_HEADER_BYTES = len(_MAGIC) + 32
_SUFFIX = ".rtxcache"


def path_of(engine_sha256: str, library_version: str, gpu: Gpu, *, folder: Path | None = None) -> Path:
    """Return the file for one engine on one GPU. Nothing is read or written.

    Args:
        engine_sha256: Hash of the plan.
        library_version: Release of TensorRT-RTX.
        gpu: The GPU that runs the engine.
        folder: Folder of the files; None for the one in the user's cache.
    """
    model = re.sub(r"[^a-z0-9]+", "-", gpu.name.lower()).strip("-")[:40]
    release = re.sub(r"[^0-9A-Za-z.]+", "-", library_version)[:40]
    return (folder or default_cache() / "tensorrt_rtx") / (
        f"{release}-{gpu.architecture}-{model}-cuda{gpu.driver.partition('.')[0]}-{engine_sha256[:32]}{_SUFFIX}"
    )


def read(path: Path) -> tuple[bytes | None, str]:
    """Return what was kept, and a note for the user; the note is empty if nothing was kept yet, or if it was read.

    A damaged file is deleted.
    """
    try:
        with opened(path, follow=False) as (file, size):
            if why := _against_owner(os.fstat(file.fileno())):
                return None, f"{path} is not read: {why}. Delete it"
            if size > LARGEST_FILE + _HEADER_BYTES:
                why = f"it has {gib(size)}, and at most {gib(LARGEST_FILE)} are read"
            else:
                content = file.read(size)
                data = content[_HEADER_BYTES:]
                if content[:_HEADER_BYTES] == _header(data):
                    with contextlib.suppress(OSError):
                        os.utime(path)  # the least recently used ones are deleted first
                    return data, ""
                why = "it is damaged"
    except FileNotFoundError:
        return None, ""
    except (OSError, MemoryError) as error:
        return None, f"{path} cannot be read ({_reason(error)}): TensorRT-RTX compiles its kernels again"
    with contextlib.suppress(OSError):
        path.unlink()
    return None, f"{path} was deleted: {why}. TensorRT-RTX compiles its kernels again"


def write(path: Path, data: bytes | bytearray | memoryview) -> str:
    """Keep what TensorRT-RTX compiled, in one rename; return a note for the user, empty if it was written.

    Of processes that write at once, the last one counts. The least recently used files of the folder are deleted until the
    rest fit into ``LARGEST_FOLDER``.
    """
    content = bytes(data)
    if len(content) > LARGEST_FILE:
        return f"{path} is not written: it would have {gib(len(content))}, and at most {gib(LARGEST_FILE)} are kept"
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_beside_and_rename(path, _header(content) + content)
        path.chmod(0o600)  # whatever the umask: a file that others may write is not read
        _keep_within(path.parent, LARGEST_FOLDER)
    except OSError as error:
        return (
            f"{path} cannot be written ({_reason(error)}): the next process compiles the kernels of TensorRT-RTX again"
        )
    return ""


def _header(data: bytes) -> bytes:
    return _MAGIC + hashlib.sha256(data).digest()


def _against_owner(found: os.stat_result) -> str:
    """Return why a file may come from another user; empty if it is this user's own, or on systems without such rights."""
    if os.name != "posix":
        return ""
    if found.st_uid not in (os.geteuid(), 0):
        return "it belongs to another user"
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return f"others may write it ({stat.S_IMODE(found.st_mode):04o})"
    return ""


def _keep_within(folder: Path, limit: int) -> None:
    """Delete the least recently used files beyond ``limit`` bytes. Other processes may delete them too."""
    found = []
    for path in folder.glob(f"*{_SUFFIX}"):
        with contextlib.suppress(OSError):
            known = path.stat(follow_symlinks=False)
            found.append((known.st_mtime_ns, known.st_size, path))
    total = 0
    for _, size, path in sorted(found, reverse=True):
        total += size
        if total > limit:
            with contextlib.suppress(OSError):
                path.unlink()


def _reason(error: BaseException) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
