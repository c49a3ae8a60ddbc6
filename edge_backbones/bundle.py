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
2. A path MUST be relative, use forward slashes, have no ``..``, and stay inside the folder when links are followed.
3. A reader MUST refuse unknown keys, another ``schema_version``, a wrong digest, and any file whose size or hash differs.
4. Nothing is unpickled. TorchScript is code: it is opened only when asked for by name.
5. A writer MUST make a new bundle beside the target and rename it into place, and MUST replace manifest.json by rename
   after the files it names are on disk. A reader therefore sees the old state or the new one, never a mixture.
6. What a killed writer left, the next one removes: hidden files with ``.writing-`` in their names, and files in engines/
   that are named as engines are and that the manifest does not name.

A bundle that is replaced is exchanged for the new one in one system call where the kernel can (Linux ``renameat2``).
Elsewhere it is renamed aside first: a reader may find nothing for a moment, and a crash in that moment is repaired by the
next writer. One who opened a manifest before it was replaced reopens it when a file is not there any more.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import io
import os
import re
import shutil
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO, TypeVar

import msgspec
import numpy as np

from edge_backbones import manifest as manifest_module
from edge_backbones.errors import BundleError, IntegrityError, ManifestError
from edge_backbones.manifest import EngineRecord, FileRecord, Manifest

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
        folder = Path(path)
        if not folder.is_dir():
            raise BundleError(f"{folder} is not a bundle: there is no such folder")
        try:
            data = (folder / MANIFEST).read_bytes()
        except FileNotFoundError as error:
            raise BundleError(f"{folder} is not a bundle: it has no {MANIFEST}") from error
        except OSError as error:
            raise BundleError(f"{folder / MANIFEST} cannot be read: {error.strerror}") from error
        manifest = manifest_module.decode(data)
        for record in manifest.files():
            _refuse_escape(folder, record)
        return cls(folder, manifest)

    def read(self, record: FileRecord) -> bytearray:
        """The bytes of a file, after comparing size and SHA-256. Raises IntegrityError naming the file.

        What is returned is what was compared, so a file that changes later does no harm.
        """
        path = _refuse_escape(self.path, record)
        try:
            with path.open("rb") as file:
                data = bytearray(os.fstat(file.fileno()).st_size)
                del data[file.readinto(data) :]
        except FileNotFoundError as error:
            raise IntegrityError(f"{path} is missing: {_REPAIR}") from error
        except OSError as error:
            raise IntegrityError(f"{path} cannot be read: {error.strerror}") from error
        if len(data) != record.size:
            raise IntegrityError(f"{path} has {len(data)} bytes, the manifest says {record.size}: {_REPAIR}")
        digest = hashlib.sha256(data).hexdigest()
        if digest != record.sha256:
            raise IntegrityError(
                f"{path} was changed: SHA-256 {digest[:12]}..., the manifest says {record.sha256[:12]}...: {_REPAIR}"
            )
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
            if graphs and engine.key.graph_sha256 not in graphs and engine.key.flavour != "torch_tensorrt":
                raise BundleError(f"{self.path} was built anew since {engine.name} was begun: compile it again")
            held = current.manifest.files()
            gone = [file.path for file in engine.files if file.path not in contents and file not in held]
            if gone:
                raise BundleError(
                    f"{self.path} does not hold {gone[0]} any more: another process took {engine.name} out"
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
                named = {file.path for file in Bundle.open(self.path).manifest.files()}  # the new one, if that is there
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
_ENGINE_FILE = re.compile(
    r".+-[0-9a-f]{8}\.[0-9a-f]{8}\.(blob|plan|layers\.json|cache)"
)  # EngineKey.path, and what lies beside
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
    record = bundle.manifest.golden
    path = bundle.path / record.file.path
    try:
        with np.load(io.BytesIO(bundle.read(record.file)), allow_pickle=False) as archive:
            golden = {key: archive[key] for key in archive.files}
    except (ValueError, TypeError, EOFError, AttributeError, zipfile.BadZipFile) as error:
        raise IntegrityError(f"{path} is not an .npz of plain arrays: build the bundle again") from error
    names = (bundle.manifest.input.name, *bundle.manifest.backbone.outputs)
    missing = [f"{case}/{name}" for case in record.cases for name in names if f"{case}/{name}" not in golden]
    if missing:
        raise IntegrityError(f"{path} lacks {', '.join(missing)}: build the bundle again")
    for case in record.cases:
        arrays = [golden[f"{case}/{name}"] for name in names]
        images = {len(array) if array.ndim else 0 for array in arrays}
        if len(images) != 1 or 0 in images or arrays[0].ndim != 4 or any(array.ndim < 2 for array in arrays):
            raise IntegrityError(f"{path} does not hold one map per image in case {case!r}: build the bundle again")
    return golden


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
    target.parent.mkdir(parents=True, exist_ok=True)
    with _lock(target):
        if _aside(target).exists() and not target.exists():  # a writer died between its two renames
            _aside(target).rename(target)
        for stale in target.parent.glob(f".{target.name}.building-*"):  # ours alone: the lock says nobody writes there
            shutil.rmtree(stale, ignore_errors=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.building-", dir=target.parent))
        try:
            staging.chmod(0o755)
            yield staging
            Bundle.open(staging)
            _sync_tree(staging)
            _refuse_target(target, overwrite)
            if target.exists():
                _exchange(staging, target)
            else:
                staging.rename(target)
            _sync_folder(target.parent)
        finally:
            shutil.rmtree(staging, ignore_errors=True)


def _refuse_target(target: Path, overwrite: bool) -> None:
    if not target.exists() and not target.is_symlink():
        return
    if not overwrite:
        raise BundleError(f"{target} exists already: choose another folder or pass --overwrite (overwrite=True)")
    if target.is_symlink() or not target.is_dir() or (any(target.iterdir()) and not _has_our_manifest(target)):
        raise BundleError(f"{target} is not a bundle and will not be overwritten: choose another folder")


def _has_our_manifest(folder: Path) -> bool:
    """Other programs name files manifest.json too: only a folder with one of ours may be replaced."""
    try:
        keys = msgspec.json.decode((folder / MANIFEST).read_bytes(), type=dict[str, msgspec.Raw]).keys()
    except (OSError, msgspec.MsgspecError):
        return False
    return {"schema_version", "backbone", "engines", "digest"} <= set(keys)


def _refuse_escape(folder: Path, record: FileRecord) -> Path:
    """The file's place on disk; raises ManifestError for a path that leaves the folder."""
    parts = record.path.split("/")
    if record.path.startswith("/") or "\\" in record.path or ":" in record.path or {"", ".", ".."} & set(parts):
        raise ManifestError(f"the manifest names {record.path!r}, which is not a plain path inside the bundle: refused")
    path = folder / record.path
    try:
        inside = path.resolve().is_relative_to(folder.resolve())
    except (ValueError, RuntimeError, OSError):  # a null byte, a loop of links
        inside = False
    if not inside:
        raise ManifestError(f"the manifest names {record.path!r}, which leads outside {folder}: refused")
    return path


def _remove_unnamed(folder: Path, before: Manifest, after: Manifest) -> None:
    """Files of engines that a manifest named and the one that took its place does not."""
    named = {record.path for record in after.files()}
    for file in (file for engine in before.engines for file in engine.files):
        if file.path not in named:
            _refuse_escape(folder, file).unlink(missing_ok=True)


def _clear_after_dead_writers(bundle: Bundle) -> None:
    """What a writer had begun when it was killed. For who holds the lock: nobody writes there then."""
    named = {record.path for record in bundle.manifest.files()}
    begun = [*bundle.path.glob(f".*{_BEGUN}*"), *bundle.path.glob(f"*/.*{_BEGUN}*")]
    orphans = [path for path in bundle.path.glob("engines/*") if _ENGINE_FILE.fullmatch(path.name)]
    for path in (*begun, *orphans):
        if path.relative_to(bundle.path).as_posix() not in named and path.is_file() and not path.is_symlink():
            path.unlink(missing_ok=True)


def _write_file(path: Path, data: bytes | bytearray) -> None:
    """BundleError where the disk does not take it; nothing is left then."""
    try:
        write_beside_and_rename(path, data)
    except OSError as error:
        reason = error.strerror or str(error)
        room = ""
        with contextlib.suppress(OSError):
            room = f", {shutil.disk_usage(path.parent).free / 1e6:.0f} MB are free there"
        raise BundleError(
            f"{path} ({len(data) / 1e6:.1f} MB) cannot be written: {reason}{room}. The bundle is as it was: make room, or "
            "copy it to where there is some"
        ) from error


def write_beside_and_rename(path: Path, data: bytes | bytearray) -> None:
    """Write beside, flush to disk, rename: readers find the old file or the new one, whole. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}{_BEGUN}", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
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
    target = Path(os.path.realpath(target))
    path = target.parent / f".{target.name}.lock"
    until = time.monotonic() + patience
    while True:
        with _opened_lock(path, target) as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() < until:
                    time.sleep(0.02)
                    continue
                raise BundleError(
                    f"another process is writing {target}: wait for it, or choose another folder"
                ) from None
            ours = False
            with contextlib.suppress(FileNotFoundError):
                ours = os.stat(path).st_ino == os.fstat(file.fileno()).st_ino
            if ours:
                try:
                    yield
                finally:
                    path.unlink(missing_ok=True)
                return
        # The previous writer removed the file between our open and our lock: that lock protects nothing, try again.


def _opened_lock(path: Path, target: Path) -> TextIO:
    try:
        return path.open("w")
    except OSError as error:
        raise BundleError(
            f"{target} cannot be changed: its writers take turns by a file beside it, and {path} cannot be written "
            f"({error.strerror or error}). Copy the bundle to where its folder can be written to, or mount that folder and "
            "not the bundle alone"
        ) from error


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
