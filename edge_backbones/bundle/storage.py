"""The folder of a bundle on disk: read its manifest, lock it, write files that readers see whole, explain disk errors."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import secrets
import shutil
import stat
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from edge_backbones.bundle import manifest as manifest_module
from edge_backbones.bundle.manifest import MAX_MANIFEST_BYTES, FileRecord, Manifest
from edge_backbones.errors import BundleError, ManifestError, refuse_lack
from edge_backbones.reading import read_file, shortened

MANIFEST = "manifest.json"
UNFINISHED = ".writing-"
"""In the name of a file that is not whole yet."""


def read_manifest(folder: Path) -> Manifest:
    """Read and check a bundle's manifest.json and the paths that it names.

    Raises BundleError for a folder that is no bundle, ManifestError for a manifest that is not what the format says.
    """
    try:
        if not folder.is_dir():
            raise BundleError(f"{folder} is not a bundle: {_why_no_folder(folder)}")
        data = read_file(folder / MANIFEST, limit=MAX_MANIFEST_BYTES, follow=False)
    except FileNotFoundError as error:
        raise BundleError(f"{folder} is not a bundle: it has no {MANIFEST}") from error
    except OSError as error:
        refuse_lack(f"reading {folder / MANIFEST}", error)
        raise ManifestError(f"{folder / MANIFEST} cannot be read: {error.strerror or error}") from error
    manifest = manifest_module.decode(data, str(folder / MANIFEST))
    for record in manifest.files():
        place_of(folder, record)
    return manifest


def _why_no_folder(path: Path) -> str:
    """Say what stands where a bundle's folder should be."""
    if not path.exists():
        return "there is no such folder"
    if path.name == MANIFEST:
        return f"it is a file of one: pass its folder, {path.parent}"
    return "it is a file, and a bundle is a folder (tar -xf unpacks one that edge-backbones pack wrote as a tar file)"


def place_of(folder: Path, record: FileRecord) -> Path:
    """Return the file's path on disk; raise ManifestError for a path that leaves the folder or goes through a link."""
    parts = record.path.split("/")
    if any(sign in record.path for sign in "\\:") or not record.path.isprintable() or {"", ".", ".."} & set(parts):
        raise ManifestError(
            f"{folder / MANIFEST} names {shortened(record.path, 120)!r}, which is not a plain path inside the bundle: refused"
        )
    refuse_links(folder, record.path)
    return folder / record.path


def refuse_links(folder: Path, path: str) -> None:
    """Raise ManifestError if any part of ``path`` below ``folder`` is a link."""
    place = folder
    for part in path.split("/"):
        place /= part
        try:
            linked = stat.S_ISLNK(place.lstat().st_mode)
        except OSError:  # it is missing, and so is everything below it
            return
        if linked:
            raise ManifestError(
                f"{shortened(str(place), 300)} is a link, which may lead outside of the bundle: refused. Put what it leads "
                "to in its place"
            )


def is_folder(path: Path) -> bool:
    """Return whether ``path`` is a folder. A link to a folder is not one."""
    with contextlib.suppress(OSError, ValueError):
        return stat.S_ISDIR(path.lstat().st_mode)
    return False


def write_file(path: Path, data: bytes | bytearray) -> None:
    """Write a file of a bundle in one rename. Raises BundleError if the disk refuses it, and leaves the old file then."""
    try:
        write_beside_and_rename(path, data)
    except OSError as error:
        raise BundleError(
            f"{path} ({len(data) / 1e6:.1f} MB) cannot be written: {_reason(error, path.parent)}. The bundle is as it was: "
            f"{_way_out(error)}"
        ) from error


def write_beside_and_rename(path: Path, data: bytes | bytearray) -> None:
    """Write a hidden file beside ``path``, flush it to disk and rename it to ``path``. Raises OSError.

    Readers find the whole old file or the whole new one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}{UNFINISHED}{secrets.token_hex(4)}")
    try:
        with temporary.open("xb") as file:  # "x" follows no link and opens no existing file; umask decides the rights
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


@contextlib.contextmanager
def lock(target: Path, *, patience: float = 0.0) -> Iterator[None]:
    """Hold the lock of the bundle at ``target``: one writer per bundle and machine. The kernel frees it if the process dies.

    Raises BundleError if another writer still holds it after ``patience`` seconds. Wait for a change of a bundle, which
    takes a moment; do not wait for a build, which takes minutes.
    """
    try:
        import fcntl
    except ImportError:  # Windows has no flock: writers of one bundle must not run at the same time there
        yield
        return
    with explained(target):
        target = Path(os.path.realpath(target))
    path = target.parent / f".{target.name}.lock"
    until = time.monotonic() + patience
    while True:
        with _opened_lock(path, target) as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if not isinstance(error, BlockingIOError):  # a file system without locks
                    raise BundleError(f"{path} cannot be locked: {error.strerror or error}") from error
                if time.monotonic() < until:
                    time.sleep(0.02)
                    continue
                raise BundleError(
                    f"another process is writing {target}: wait for it, or choose another folder"
                ) from None
            ours = False
            with contextlib.suppress(OSError):
                ours = os.stat(path).st_ino == os.fstat(file.fileno()).st_ino
            if ours:
                try:
                    yield
                finally:
                    with contextlib.suppress(OSError):
                        path.unlink()
                return
        # The previous writer removed the file between our open and our lock: that lock protects nothing, try again.


def _opened_lock(path: Path, target: Path) -> BinaryIO:
    """Open the lock file. Raises BundleError for a link or a pipe in its place, and leaves that alone."""
    flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    strange = BundleError(
        f"{target} cannot be changed: {path} is not the file that its writers take turns by; remove it"
    )
    try:
        handle = os.open(path, flags, 0o666)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EISDIR):
            raise strange from error
        raise BundleError(
            f"{target} cannot be changed: its writers take turns by a file beside it, and {path} cannot be written "
            f"({error.strerror or error}). Copy the bundle to where its folder can be written to, or mount that folder and "
            "not the bundle alone"
        ) from error
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise strange
    return os.fdopen(handle, "r+b")


@contextlib.contextmanager
def explained(target: Path, staging: Path | None = None) -> Iterator[None]:
    """Turn an OSError into a BundleError with the cause and the way out.

    ``staging``: turn only errors of files in this folder and errors that only a disk raises. Other errors belong to the
    files that the caller reads, and pass.
    """
    try:
        yield
    except OSError as error:
        if staging is not None and error.errno not in _DISK_ERRORS and not _is_inside(error, staging):
            raise
        raise BundleError(
            f"{target} was not written: {_reason(error, target.parent)}. What was there before is as it was: "
            f"{_way_out(error)}"
        ) from error


_DISK_ERRORS = {errno.ENOSPC, errno.EFBIG, errno.EROFS, errno.EIO, getattr(errno, "EDQUOT", errno.ENOSPC)}


def _is_inside(error: OSError, folder: Path) -> bool:
    names = (name for name in (error.filename, error.filename2) if isinstance(name, (str, os.PathLike)))
    return any(Path(os.path.abspath(name)).is_relative_to(folder) for name in names)


def _reason(error: OSError, folder: Path) -> str:
    """Return the system's message, the file that it is about and how much room the disk has."""
    said = error.strerror or str(error)
    where = f" ({error.filename})" if isinstance(error.filename, str) else ""
    with contextlib.suppress(OSError):
        return f"{said}{where}, {shutil.disk_usage(folder).free / 1e6:.0f} MB are free there"
    return f"{said}{where}"


def _way_out(error: OSError) -> str:
    if error.errno == errno.EFBIG:
        return "raise the limit on the size of files (ulimit -f unlimited)"
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return "raise the limit on open files (ulimit -n 4096)"
    if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        return "choose a folder that can be written to"
    return "make room, or copy it to where there is some"


def exchange(new: Path, old: Path) -> None:
    """Swap two folders, in one step where the kernel can: then a reader finds a bundle at ``old`` at any time."""
    if sys.platform == "linux":
        at_fdcwd, rename_exchange = -100, 2
        renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
        if renameat2 is not None and renameat2(at_fdcwd, bytes(new), at_fdcwd, bytes(old), rename_exchange) == 0:
            return
    aside = aside_of(old)
    shutil.rmtree(aside, ignore_errors=True)
    old.rename(aside)
    try:
        new.rename(old)
    except OSError:
        aside.rename(old)
        raise
    aside.rename(new)


def aside_of(target: Path) -> Path:
    """Return where the old bundle lies while the new one is renamed, on systems that cannot swap folders in one step."""
    return target.with_name(f".{target.name}.replaced")


def sync_tree(folder: Path) -> None:
    """Flush every file and folder below ``folder`` to disk. Raises OSError."""
    for path in sorted(folder.rglob("*")):
        with path.open("r+b") if path.is_file() else contextlib.nullcontext() as file:
            if file is not None:
                os.fsync(file.fileno())
            else:
                sync_folder(path)
    sync_folder(folder)


def sync_folder(folder: Path) -> None:
    """Flush the names in a folder to disk, where the system can. Raises OSError."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
