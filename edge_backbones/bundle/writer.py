"""Write bundles: a new one in one step, and engines into one that is there. The format is in reader.py."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import secrets
import shutil
import stat
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import msgspec

from edge_backbones.bundle import manifest as manifest_module
from edge_backbones.bundle.manifest import MAX_MANIFEST_BYTES, EngineRecord, FileRecord, Manifest
from edge_backbones.bundle.storage import (
    MANIFEST,
    UNFINISHED,
    aside_of,
    exchange,
    explained,
    is_folder,
    lock,
    place_of,
    read_manifest,
    refuse_links,
    sync_folder,
    sync_tree,
    write_file,
)
from edge_backbones.errors import BundleError, ManifestError
from edge_backbones.reading import read_file, refusing, shortened

# EngineKey.path, and what lies beside an engine.
_ENGINE_FILE = re.compile(r"engines/[a-z_]+-[^/]+-[0-9a-f]{8}\.[0-9a-f]{8}\.(blob|plan|ts|pt2|layers\.json|cache)")
# What a bundle of any release holds, and what a writer of one leaves. All else in the folder is somebody's own.
_OWN_FILE = re.compile(
    r"manifest\.json|golden\.npz|calibration\.json|graphs/[a-z0-9]+\.(onnx|ts)|signature/(manifest\.json|model\.sig|[0-9a-f]+\.local)"
    r"|engines/[a-z_]+-[^/]+\.(blob|plan|ts|pt2|layers\.json|cache)|([a-z]+/)?\.[^/]+\.writing-[a-z0-9_]+"
)
_PATIENCE = 60.0  # seconds: many times what it takes to write an engine, even on a memory card


def record_file(folder: Path, path: str) -> FileRecord:
    """Hash a file that has been written into a bundle folder."""
    digest = hashlib.sha256()
    with (folder / path).open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return FileRecord(path=path, sha256=digest.hexdigest(), size=(folder / path).stat().st_size)


def record_bytes(path: str, data: bytes | bytearray) -> FileRecord:
    """The record of bytes that will be written to ``path``."""
    return FileRecord(path=path, sha256=hashlib.sha256(data).hexdigest(), size=len(data))


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Replace manifest.json in one rename."""
    write_file(folder / MANIFEST, manifest_module.encode(manifest))


@contextlib.contextmanager
def new_bundle(target: str | os.PathLike[str], *, overwrite: bool = False) -> Iterator[Path]:
    """A folder beside ``target`` to write a bundle into; on a clean exit it becomes ``target``, else it is removed.

    Raises BundleError when ``target`` exists and ``overwrite`` is False, or is something that is not a bundle. The old
    bundle stays where it is until the new one is complete and on disk.
    """
    target = Path(os.path.abspath(target))
    _refuse_target(target, overwrite)
    with explained(target):
        target.parent.mkdir(parents=True, exist_ok=True)
    with lock(target):
        with explained(target):
            if is_folder(aside_of(target)) and not os.path.lexists(target):  # a writer died between its two renames
                aside_of(target).rename(target)
            for stale in target.parent.glob(f".{target.name}.building-*"):  # ours: the lock says nobody writes there
                if is_folder(stale):
                    shutil.rmtree(stale, ignore_errors=True)
            staging = target.parent / f".{target.name}.building-{secrets.token_hex(4)}"
            staging.mkdir()
        try:
            with explained(target, staging):
                yield staging
            with explained(target):
                read_manifest(staging)
                sync_tree(staging)
                _refuse_target(target, overwrite)
                if target.exists():
                    exchange(staging, target)
                else:
                    staging.rename(target)
            try:
                sync_folder(target.parent)
            except OSError as error:
                raise BundleError(
                    f"{target} is written, and the disk does not confirm it ({error.strerror or error}): run edge-backbones "
                    "verify on it before you rely on it"
                ) from error
        finally:
            shutil.rmtree(staging, ignore_errors=True)


def add_engine(folder: Path, engine: EngineRecord, contents: Mapping[str, bytes | bytearray]) -> None:
    """Add an engine to the bundle in ``folder``, or replace the one of the same name; see `Bundle.add_engine`."""
    with lock(folder, patience=_PATIENCE):
        current = read_manifest(folder)
        _clear_after_dead_writers(folder, current)
        _refuse_stale(folder, current, engine, contents)
        kept = tuple(other for other in current.engines if other.name != engine.name)
        manifest = msgspec.structs.replace(current, engines=(*kept, engine))
        held = current.files()
        written: list[Path] = []
        try:
            for file in engine.files:
                if file.path in contents or file not in held:
                    path = place_of(folder, file)
                    if file.path not in {record.path for record in held}:
                        written.append(path)
                    write_file(path, contents[file.path])
            write_manifest(folder, manifest)
        except BaseException:
            with contextlib.suppress(BundleError, OSError):  # they would hide the cause
                named = {file.path for file in read_manifest(folder).files()}  # of the new one, if it is there
                for path in written:
                    if path.relative_to(folder).as_posix() not in named:
                        path.unlink(missing_ok=True)
            raise
        _remove_unnamed(folder, current, manifest)


def _refuse_stale(
    folder: Path, current: Manifest, engine: EngineRecord, contents: Mapping[str, bytes | bytearray]
) -> None:
    """Raise BundleError for an engine that does not belong to the bundle as it is now, or whose files it does not have."""
    graphs = {graph.file.sha256 for graph in current.graphs}
    if graphs and engine.key.graph_sha256 not in graphs and engine.key.flavour != "torch_tensorrt":
        raise BundleError(f"{folder} was built anew since {engine.name} was begun: compile it again")
    held = current.files()
    gone = [file.path for file in engine.files if file.path not in contents and file not in held]
    if gone:
        raise BundleError(f"{folder} does not hold {gone[0]} any more: another process took {engine.name} out")
    strange = [file.path for file in engine.files if file not in held and not _ENGINE_FILE.fullmatch(file.path)]
    if strange:
        raise BundleError(f"{strange[0]!r} is not named as files of engines are (see EngineKey.path): not written")


def remove_engine(folder: Path, name: str) -> None:
    """Remove an engine from the bundle in ``folder``; see `Bundle.remove_engine`."""
    with lock(folder, patience=_PATIENCE):
        current = read_manifest(folder)
        _clear_after_dead_writers(folder, current)
        kept = tuple(engine for engine in current.engines if engine.name != name)
        if len(kept) == len(current.engines):
            names = ", ".join(engine.name for engine in kept) or "none"
            raise BundleError(f"{folder} has no engine {name!r}; its engines: {names}")
        manifest = msgspec.structs.replace(current, engines=kept)
        write_manifest(folder, manifest)
        _remove_unnamed(folder, current, manifest)


def require_writable(folder: Path, *, room: int = 0) -> None:
    """Raise BundleError if engines of ``room`` bytes could not be added to ``folder``; see `Bundle.require_writable`."""
    with lock(folder, patience=_PATIENCE):
        refuse_links(folder, "engines")
        for place in (folder, folder / "engines"):
            try:
                place.mkdir(exist_ok=True)
                with tempfile.TemporaryFile(dir=place):
                    pass
            except OSError as error:
                raise BundleError(
                    f"{place} cannot be written to ({error.strerror or error}): copy the bundle to where it can, and "
                    "compile there"
                ) from error
        with explained(folder):
            free = shutil.disk_usage(folder / "engines").free
    if free < room:
        raise BundleError(
            f"engines of about {room / 1e6:.0f} MB have to go to {folder}, and {free / 1e6:.0f} MB are free there: "
            "make room, or copy it to where there is some"
        )


def _refuse_target(target: Path, overwrite: bool) -> None:
    if not os.path.lexists(target):
        return
    if not overwrite:
        raise BundleError(f"{target} exists already: choose another folder or pass --overwrite (overwrite=True)")
    if not is_folder(target) or (any(target.iterdir()) and not _has_our_manifest(target)):
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
        links = [name for name in folders if not is_folder(Path(place, name))]
        for name in sorted([*files, *links]):
            path = Path(place, name)
            if not _OWN_FILE.fullmatch(path.relative_to(folder).as_posix()) or not stat.S_ISREG(path.lstat().st_mode):
                found.append(path.relative_to(folder).as_posix())
        found += [str(error.filename) for error in closed]
        closed.clear()
        if len(found) >= most:
            break
    return found[:most]


def _has_our_manifest(folder: Path) -> bool:
    """Other programs name files manifest.json too: only a folder with one of ours may be replaced."""
    try:
        data = read_file(folder / MANIFEST, limit=MAX_MANIFEST_BYTES, follow=False)
        with refusing(ManifestError):
            keys = msgspec.json.decode(data, type=dict[str, msgspec.Raw]).keys()
    except (OSError, ManifestError):
        return False
    return {"schema_version", "backbone", "engines", "digest"} <= set(keys)


def _remove_unnamed(folder: Path, before: Manifest, after: Manifest) -> None:
    """Files of engines that a manifest named and the one that took its place does not."""
    named = {record.path for record in after.files()}
    for file in (file for engine in before.engines for file in engine.files):
        if file.path not in named and _ENGINE_FILE.fullmatch(file.path):
            with contextlib.suppress(OSError):  # the next writer finds it
                place_of(folder, file).unlink(missing_ok=True)


def _clear_after_dead_writers(folder: Path, manifest: Manifest) -> None:
    """Remove the unfinished files of a writer that was killed. Call it under the lock: nobody writes there then."""
    named = {record.path for record in manifest.files()}
    for inner in ("", "engines/", "graphs/"):
        if inner and not is_folder(folder / inner):
            continue
        with contextlib.suppress(OSError):
            for path in (folder / inner).iterdir():
                name = f"{inner}{path.name}"
                is_ours = (path.name.startswith(".") and UNFINISHED in path.name) or _ENGINE_FILE.fullmatch(name)
                if is_ours and name not in named and stat.S_ISREG(path.lstat().st_mode):
                    path.unlink(missing_ok=True)
