"""The bundle: a folder that holds graphs, engines and the proof that they are right. This docstring is its format.

::

    resnet50.bundle/
      manifest.json        what is inside, and why this engine: structs of manifest.py, manifest.schema.json, at most 4 MiB
      graphs/int8.onnx     one typed ONNX graph per precision; graphs/fp32.ts is the frozen TorchScript
      golden.npz           inputs and the fp32 reference of every engine output: plain arrays, no pickles
      calibration.json     ranges of every tensor that may be quantised, and the hashes of what made them
      engines/*.blob       raw engine bytes with nothing in front, named flavour-version-architecture-feature-precision;
                           .plan of TensorRT, with what it says of its layers (.layers.json) and what it measured (.cache)

1. manifest.json MUST name every file that a reader opens, with its SHA-256 and size. Files it does not name are ignored.
2. A path MUST be relative, use forward slashes, have no ``..``, and lead over no link: links in a bundle are not followed.
3. A reader MUST refuse unknown keys, another ``schema_version``, a wrong digest, and any file whose size or hash differs.
   golden.npz MUST hold the arrays that the manifest promises and no others, stored and not compressed.
4. Nothing is unpickled. TorchScript is code: it is opened only when asked for by name.
5. A writer MUST make a new bundle beside the target and rename it into place, and MUST replace manifest.json by rename
   after the files it names are on disk. A reader therefore sees the old state or the new one, never a mixture.
6. What a killed writer left, the next one removes: hidden files with ``.writing-`` in their names, and files in engines/
   that are named as engines are and that the manifest does not name. Nothing else is ever removed: a bundle whose folder
   holds other files is not overwritten.

A bundle that is replaced is exchanged for the new one in one system call where the kernel can (Linux ``renameat2``).
Elsewhere it is renamed aside first: a reader may find nothing for a moment, and a crash in that moment is repaired by the
next writer. One who opened a manifest before it was replaced reopens it when a file is not there any more.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import os
import re
import secrets
import shutil
import stat
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TypeVar

import msgspec
import numpy as np

from edge_backbones.bundle import golden
from edge_backbones.bundle import manifest as manifest_module
from edge_backbones.bundle.manifest import MAX_MANIFEST_BYTES, EngineRecord, FileRecord, Manifest
from edge_backbones.bundle.onnx_gate import graph_fault
from edge_backbones.errors import BundleError, IntegrityError, ManifestError, refuse_lack
from edge_backbones.reading import opened, read_file, refusing, shortened

MANIFEST = "manifest.json"
_Read = TypeVar("_Read")


@dataclass(frozen=True)
class Bundle:
    """An opened bundle: the checked manifest and where its files lie. Files are checked when they are read."""

    path: Path
    manifest: Manifest

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Bundle:
        """Read and check manifest.json; raises BundleError (a ManifestError or IntegrityError where that fits)."""
        if not os.fspath(path):
            raise BundleError("the path of the bundle is empty: pass the path of its folder")
        folder = Path(path)
        try:
            if not folder.is_dir():
                raise BundleError(f"{folder} is not a bundle: there is no such folder")
            data = read_file(folder / MANIFEST, limit=MAX_MANIFEST_BYTES, follow=False)
        except FileNotFoundError as error:
            raise BundleError(f"{folder} is not a bundle: it has no {MANIFEST}") from error
        except OSError as error:
            refuse_lack(f"reading {folder / MANIFEST}", error)
            raise ManifestError(f"{folder / MANIFEST} cannot be read: {error.strerror or error}") from error
        manifest = manifest_module.decode(data, str(folder / MANIFEST))
        for record in manifest.files():
            _refuse_escape(folder, record)
        return cls(folder, manifest)

    def read(self, record: FileRecord) -> bytearray:
        """The bytes of a file, after comparing size and SHA-256. Raises IntegrityError naming the file.

        What is returned is what was compared, so a file that changes later does no harm. An ONNX graph has passed
        `graph_fault` then: libraries may have it.
        """
        path = _refuse_escape(self.path, record)
        try:
            with opened(path, follow=False) as (file, size):
                if size != record.size:
                    raise IntegrityError(f"{path} has {size} bytes, the manifest says {record.size}: {_REPAIR}")
                data = bytearray(size)
                del data[file.readinto(data) :]  # type: ignore[attr-defined]
        except FileNotFoundError as error:
            raise IntegrityError(f"{path} is missing: {_REPAIR}") from error
        except OSError as error:
            refuse_lack(f"reading {path}", error)
            raise IntegrityError(f"{path} cannot be read: {error.strerror or error}") from error
        except MemoryError as error:
            raise IntegrityError(
                f"{path} does not fit into the memory that is free: it has {record.size} bytes"
            ) from error
        digest = hashlib.sha256(data).hexdigest()
        if digest != record.sha256:
            raise IntegrityError(
                f"{path} was changed: SHA-256 {digest[:12]}..., the manifest says {record.sha256[:12]}...: {_REPAIR}"
            )
        if any(graph.file == record for graph in self.manifest.graphs if graph.format == "onnx"):
            fault = graph_fault(data)
            if fault is not None:
                raise IntegrityError(f"{path} is given to no library: {fault}. Build the bundle again")
        return data

    def check_files(self) -> None:
        """Read and compare every file of the bundle."""
        for record in self.manifest.files():
            self.read(record)

    def add_engine(self, engine: EngineRecord, contents: Mapping[str, bytes | bytearray]) -> Bundle:
        """Add an engine (or replace the one of the same name) on disk, and return the bundle as it is then.

        ``contents``: the bytes of each of ``engine.files`` that the bundle does not hold already, by path. They are on disk
        before the manifest that names them appears; files of the engine that it replaces go after that. Writers take
        turns; BundleError when one has held the bundle for a minute, or has taken out a file that is not in ``contents``, or
        the graph that the engine was made of.
        """
        with _lock(self.path, patience=_PATIENCE):
            current = Bundle.open(self.path)
            _clear_after_dead_writers(current)
            graphs = {graph.file.sha256 for graph in current.manifest.graphs}
            # An engine that the build compiled from the network itself is its own graph.
            is_own_graph = engine.key.graph_sha256 == engine.file.sha256 and engine.file.path.startswith("engines/")
            if graphs and engine.key.graph_sha256 not in graphs and not is_own_graph:
                raise BundleError(f"{self.path} was built anew since {engine.name} was begun: compile it again")
            held = current.manifest.files()
            gone = [file.path for file in engine.files if file.path not in contents and file not in held]
            if gone:
                raise BundleError(
                    f"{self.path} does not hold {gone[0]} any more: another process took {engine.name} out"
                )
            strange = [file.path for file in engine.files if file not in held and not _ENGINE_FILE.fullmatch(file.path)]
            if strange:
                raise BundleError(
                    f"{strange[0]!r} is not named as files of engines are (see EngineKey.path): not written"
                )
            kept = tuple(e for e in current.manifest.engines if e.name != engine.name)
            manifest = msgspec.structs.replace(current.manifest, engines=(*kept, engine))
            written: list[Path] = []
            try:
                for file in engine.files:
                    if file.path in contents or file not in held:
                        path = _refuse_escape(self.path, file)
                        if file.path not in {record.path for record in held}:
                            written.append(path)
                        _write_file(path, contents[file.path])
                write_manifest(self.path, manifest)
            except BaseException:
                with contextlib.suppress(BundleError, OSError):  # they would hide the cause
                    named = {
                        file.path for file in Bundle.open(self.path).manifest.files()
                    }  # of the new one, if it is there
                    for path in written:
                        if path.relative_to(self.path).as_posix() not in named:
                            path.unlink(missing_ok=True)
                raise
            _remove_unnamed(self.path, current.manifest, manifest)
        return Bundle.open(self.path)

    def require_writable(self, *, room: int = 0) -> None:
        """Raise BundleError where engines of ``room`` bytes could not be added: the lock, folder or disk would refuse.

        For who is about to spend minutes on an engine; waits for another writer as `add_engine` does.
        """
        with _lock(self.path, patience=_PATIENCE):
            _refuse_links(self.path, "engines")
            for folder in (self.path, self.path / "engines"):
                try:
                    folder.mkdir(exist_ok=True)
                    with tempfile.TemporaryFile(dir=folder):
                        pass
                except OSError as error:
                    raise BundleError(
                        f"{folder} cannot be written to ({error.strerror or error}): copy the bundle to where it can, and "
                        "compile there"
                    ) from error
            with _explained(self.path):
                free = shutil.disk_usage(self.path / "engines").free
        if free < room:
            raise BundleError(
                f"engines of about {room / 1e6:.0f} MB have to go to {self.path}, and {free / 1e6:.0f} MB are free there: "
                "make room, or copy it to where there is some"
            )

    def remove_engine(self, name: str) -> Bundle:
        """Take an engine out of the bundle on disk, and return the bundle as it is then. Processes that opened it keep it.

        Raises BundleError for a name that the bundle does not have.
        """
        with _lock(self.path, patience=_PATIENCE):
            current = Bundle.open(self.path)
            _clear_after_dead_writers(current)
            kept = tuple(engine for engine in current.manifest.engines if engine.name != name)
            if len(kept) == len(current.manifest.engines):
                names = ", ".join(engine.name for engine in kept) or "none"
                raise BundleError(f"{self.path} has no engine {name!r}; its engines: {names}")
            manifest = msgspec.structs.replace(current.manifest, engines=kept)
            write_manifest(self.path, manifest)
            _remove_unnamed(self.path, current.manifest, manifest)
        return Bundle.open(self.path)


def read_current(path: str | os.PathLike[str], read: Callable[[Bundle], _Read]) -> tuple[Bundle, _Read]:
    """A bundle and what ``read`` reads of it, though others add engines to it, take some out or replace it meanwhile."""
    bundle, again = Bundle.open(path), True
    while True:
        try:
            return bundle, read(bundle)
        except IntegrityError:
            replacement = Bundle.open(path)
            if replacement.manifest.digest == bundle.manifest.digest:  # or taken out, and added again since
                if not again:
                    raise
                again = False
            bundle = replacement


_REPAIR = "copy the bundle again or build it again"
_BEGUN = ".writing-"  # in the name of a file that is not whole yet
# EngineKey.path, and what lies beside an engine.
_ENGINE_FILE = re.compile(r"engines/[a-z0-9_]+-[^/]+-[0-9a-f]{8}\.[0-9a-f]{8}\.([a-z0-9]{1,10}|layers\.json)")
# What a bundle of any release holds, and what a writer of one leaves. All else in the folder is somebody's own.
_OWN_FILE = re.compile(
    r"manifest\.json|golden\.npz|calibration\.json|graphs/[a-z0-9]+\.(onnx|ts)|signature/(manifest\.json|model\.sig|[0-9a-f]+\.local)"
    r"|engines/[a-z0-9_]+-[^/]+\.([a-z0-9]{1,10}|layers\.json)|([a-z]+/)?\.[^/]+\.writing-[a-z0-9_]+"
)
_PATIENCE = 60.0  # seconds: many times what it takes to write an engine, even on a memory card


def record_file(folder: Path, path: str) -> FileRecord:
    """Hash a file that has been written into a bundle folder."""
    digest = hashlib.sha256()
    with (folder / path).open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return FileRecord(path=path, sha256=digest.hexdigest(), size=(folder / path).stat().st_size)


def load_golden(bundle: Bundle) -> dict[str, np.ndarray]:
    """Golden samples of a bundle as ``<case>/<input or stage>``; raises IntegrityError when they are not what it says."""
    record, backbone, input = bundle.manifest.golden, bundle.manifest.backbone, bundle.manifest.input
    path = bundle.path / record.file.path
    data = bundle.read(record.file)
    with refusing(
        lambda why: IntegrityError(f"{path} does not hold what the manifest says: {why}; build the bundle again")
    ):
        return golden.decode(data, record.cases, input, backbone)


def record_bytes(path: str, data: bytes | bytearray) -> FileRecord:
    """The record of bytes that will be written to ``path``."""
    return FileRecord(path=path, sha256=hashlib.sha256(data).hexdigest(), size=len(data))


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Replace manifest.json in one rename."""
    _write_file(folder / MANIFEST, manifest_module.encode(manifest))


@contextlib.contextmanager
def new_bundle(target: str | os.PathLike[str], *, overwrite: bool = False) -> Iterator[Path]:
    """A folder beside ``target`` to write a bundle into; on a clean exit it becomes ``target``, else it is removed.

    Raises BundleError when ``target`` exists and ``overwrite`` is False, or is something that is not a bundle. The old
    bundle stays where it is until the new one is complete and on disk.
    """
    target = Path(os.path.abspath(target))
    _refuse_target(target, overwrite)
    with _explained(target):
        target.parent.mkdir(parents=True, exist_ok=True)
    with _lock(target):
        with _explained(target):
            if _is_folder(_aside(target)) and not os.path.lexists(target):  # a writer died between its two renames
                _aside(target).rename(target)
            for stale in target.parent.glob(f".{target.name}.building-*"):  # ours: the lock says nobody writes there
                if _is_folder(stale):
                    shutil.rmtree(stale, ignore_errors=True)
            staging = target.parent / f".{target.name}.building-{secrets.token_hex(4)}"
            staging.mkdir()
        try:
            with _explained(target, staging):
                yield staging
            with _explained(target):
                Bundle.open(staging)
                _sync_tree(staging)
                _refuse_target(target, overwrite)
                if target.exists():
                    _exchange(staging, target)
                else:
                    staging.rename(target)
            try:
                _sync_folder(target.parent)
            except OSError as error:
                raise BundleError(
                    f"{target} is written, and the disk does not confirm it ({error.strerror or error}): run edge-backbones "
                    "verify on it before you rely on it"
                ) from error
        finally:
            shutil.rmtree(staging, ignore_errors=True)


@contextlib.contextmanager
def _explained(target: Path, staging: Path | None = None) -> Iterator[None]:
    """Turn an OSError into a BundleError with its cause and what helps.

    ``staging``: turn only those of files in there, and those that only a disk has: others are of what the caller reads.
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
    """What the system says, of which file, and how much room there is."""
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


def _refuse_target(target: Path, overwrite: bool) -> None:
    if not os.path.lexists(target):
        return
    if not overwrite:
        raise BundleError(f"{target} exists already: choose another folder or pass --overwrite (overwrite=True)")
    if not _is_folder(target) or (any(target.iterdir()) and not _has_our_manifest(target)):
        raise BundleError(f"{target} is not a bundle and will not be overwritten: choose another folder")
    strange = _strange_files(target, 3)
    if strange:
        raise BundleError(
            f"{target} holds {', '.join(shortened(name, 80) for name in strange)}, not of the bundle, which overwriting "
            "would delete: move it elsewhere, or choose another folder"
        )


def _strange_files(folder: Path, most: int) -> list[str]:
    """Files (links, pipes, closed folders too) in a bundle's folder that no writer of bundles put there; the first few."""
    found: list[str] = []
    closed: list[OSError] = []
    for place, folders, files in os.walk(folder, onerror=closed.append):
        links = [name for name in folders if not _is_folder(Path(place, name))]
        for name in sorted([*files, *links]):
            path = Path(place, name)
            if not _OWN_FILE.fullmatch(path.relative_to(folder).as_posix()) or not stat.S_ISREG(path.lstat().st_mode):
                found.append(path.relative_to(folder).as_posix())
        found += [str(error.filename) for error in closed]
        closed.clear()
        if len(found) >= most:
            break
    return found[:most]


def _is_folder(path: Path) -> bool:
    """Whether a folder is there, and no link to one."""
    with contextlib.suppress(OSError, ValueError):
        return stat.S_ISDIR(path.lstat().st_mode)
    return False


def _has_our_manifest(folder: Path) -> bool:
    """Other programs name files manifest.json too: only a folder with one of ours may be replaced."""
    try:
        data = read_file(folder / MANIFEST, limit=MAX_MANIFEST_BYTES, follow=False)
        with refusing(ManifestError):
            keys = msgspec.json.decode(data, type=dict[str, msgspec.Raw]).keys()
    except (OSError, ManifestError):
        return False
    return {"schema_version", "backbone", "engines", "digest"} <= set(keys)


def _refuse_escape(folder: Path, record: FileRecord) -> Path:
    """The file's place on disk; raises ManifestError for a path that leaves the folder, or leads over a link."""
    parts = record.path.split("/")
    if any(sign in record.path for sign in "\\:") or not record.path.isprintable() or {"", ".", ".."} & set(parts):
        raise ManifestError(
            f"{folder / MANIFEST} names {shortened(record.path, 120)!r}, which is not a plain path inside the bundle: refused"
        )
    _refuse_links(folder, record.path)
    return folder / record.path


def _refuse_links(folder: Path, path: str) -> None:
    place = folder
    for part in path.split("/"):
        place /= part
        try:
            linked = stat.S_ISLNK(place.lstat().st_mode)
        except OSError:  # not there: nor is what would lie in it
            return
        if linked:
            raise ManifestError(
                f"{shortened(str(place), 300)} is a link, which may lead outside of the bundle: refused. Put what it leads "
                "to in its place"
            )


def _remove_unnamed(folder: Path, before: Manifest, after: Manifest) -> None:
    """Files of engines that a manifest named and the one that took its place does not."""
    named = {record.path for record in after.files()}
    for file in (file for engine in before.engines for file in engine.files):
        if file.path not in named and _ENGINE_FILE.fullmatch(file.path):
            with contextlib.suppress(OSError):  # the next writer finds it
                _refuse_escape(folder, file).unlink(missing_ok=True)


def _clear_after_dead_writers(bundle: Bundle) -> None:
    """What a writer had begun when it was killed. For who holds the lock: nobody writes there then."""
    named = {record.path for record in bundle.manifest.files()}
    for folder in ("", "engines/", "graphs/"):
        if folder and not _is_folder(bundle.path / folder):
            continue
        with contextlib.suppress(OSError):
            for path in (bundle.path / folder).iterdir():
                name = f"{folder}{path.name}"
                is_ours = (path.name.startswith(".") and _BEGUN in path.name) or _ENGINE_FILE.fullmatch(name)
                if is_ours and name not in named and stat.S_ISREG(path.lstat().st_mode):
                    path.unlink(missing_ok=True)


def _write_file(path: Path, data: bytes | bytearray) -> None:
    """BundleError where the disk does not take it; nothing is left then."""
    try:
        write_beside_and_rename(path, data)
    except OSError as error:
        raise BundleError(
            f"{path} ({len(data) / 1e6:.1f} MB) cannot be written: {_reason(error, path.parent)}. The bundle is as it was: "
            f"{_way_out(error)}"
        ) from error


def write_beside_and_rename(path: Path, data: bytes | bytearray) -> None:
    """Write beside, flush to disk, rename: readers find the old file or the new one, whole. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}{_BEGUN}{secrets.token_hex(4)}")
    try:
        with temporary.open("xb") as file:  # no link, nothing that is there; with the rights that umask leaves
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


@contextlib.contextmanager
def _lock(target: Path, *, patience: float = 0.0) -> Iterator[None]:
    """One writer per bundle and machine; released by the kernel when the process dies.

    BundleError when another still holds it after ``patience`` seconds. A change of a bundle takes a moment and is waited for;
    a build takes minutes and is not.
    """
    try:
        import fcntl
    except ImportError:  # Windows has no flock: there, writers of one bundle must not run at the same time
        yield
        return
    with _explained(target):
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
    """The file that writers take turns by. Raises BundleError for a link or a pipe in its place, which is left alone."""
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


def _exchange(new: Path, old: Path) -> None:
    """Swap two folders: in one step where the kernel can, so that a reader always finds a bundle at ``old``."""
    if sys.platform == "linux":
        at_fdcwd, rename_exchange = -100, 2
        renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
        if renameat2 is not None and renameat2(at_fdcwd, bytes(new), at_fdcwd, bytes(old), rename_exchange) == 0:
            return
    aside = _aside(old)
    shutil.rmtree(aside, ignore_errors=True)
    old.rename(aside)
    try:
        new.rename(old)
    except OSError:
        aside.rename(old)
        raise
    aside.rename(new)


def _aside(target: Path) -> Path:
    """Where the old bundle waits while the new one takes its place, on systems that cannot exchange folders."""
    return target.with_name(f".{target.name}.replaced")


def _sync_tree(folder: Path) -> None:
    for path in sorted(folder.rglob("*")):
        with path.open("r+b") if path.is_file() else contextlib.nullcontext() as file:
            if file is not None:
                os.fsync(file.fileno())
            else:
                _sync_folder(path)
    _sync_folder(folder)


def _sync_folder(folder: Path) -> None:
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
