"""Write bundles: a new one in one step, or engines into an existing one. The format is described in reader.py."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import secrets
import shutil
import stat
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from edge_backbones.bundle import manifest as manifest_module
from edge_backbones.bundle.golden import GoldenSamples
from edge_backbones.bundle.manifest import (
    MAX_MANIFEST_BYTES,
    SCHEMA_VERSION,
    EngineRecord,
    FileRecord,
    GoldenRecord,
    Manifest,
)
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
from edge_backbones.reading import file_sha256, read_file, refusing, shortened

# Files of engines, as EngineKey.path names them, and the files that TensorRT adds to them.
_ENGINE_FILE = re.compile(r"engines/[a-z0-9_]+-[^/]+-[0-9a-f]{8}\.[0-9a-f]{8}\.([a-z0-9]{1,10}|layers\.json)")
# Files that a bundle of any release holds or that a killed writer leaves. Other files in the folder belong to the user.
_OWN_FILE = re.compile(
    r"manifest\.json|golden\.npz|calibration\.json|graphs/[a-z0-9]+\.(onnx|ts)|signature/(manifest\.json|model\.sig|[0-9a-f]+\.local)"
    r"|engines/[a-z0-9_]+-[^/]+\.([a-z0-9]{1,10}|layers\.json)|([a-z]+/)?\.[^/]+\.writing-[a-z0-9_]+"
)
_PATIENCE = 60.0  # seconds: writing an engine takes far less, even on a memory card


class BundleWriter:
    """Fill the folder of a new bundle: write or hash each file once, then write the manifest that names them.

    ::

        with new_bundle("pool.bundle") as folder:
            writer = BundleWriter(folder)
            graph = GraphRecord(format="onnx", precision=..., file=writer.add_file("graphs/fp32.onnx", data))
            golden = writer.add_golden(samples, images=names)
            writer.finish(graphs=(graph,), golden=golden, ...)
        bundle = Bundle.open("pool.bundle")
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def add_file(self, path: str, data: bytes | bytearray | None = None) -> FileRecord:
        """Return the record of a file at ``path``, relative to the folder. ``data`` is written there; None: it exists."""
        if data is None:
            return record_file(self.folder, path)
        place = self.folder / path
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(data)
        return record_bytes(path, data)

    def add_golden(self, samples: GoldenSamples, images: Sequence[str]) -> GoldenRecord:
        """Write golden.npz and return its record. ``images``: the names of the images, in the order of the samples."""
        file = self.add_file("golden.npz", samples.encode())
        return GoldenRecord(file=file, cases=samples.cases, images=tuple(images))

    def finish(self, **fields: Any) -> Manifest:
        """Write manifest.json and return the manifest.

        ``fields``: those of :class:`edge_backbones.bundle.manifest.Manifest` except ``schema_version`` and ``digest``. Raises
        ManifestError for values that a reader would refuse.
        """
        manifest = Manifest(schema_version=SCHEMA_VERSION, **fields)
        write_manifest(self.folder, manifest)
        return manifest


def record_file(folder: Path, path: str) -> FileRecord:
    """Return the record of a file that lies at ``path`` in the bundle's folder."""
    return FileRecord(path=path, sha256=file_sha256(folder / path), size=(folder / path).stat().st_size)


def record_bytes(path: str, data: bytes | bytearray) -> FileRecord:
    """Return the record of bytes that are going to be written to ``path``."""
    return FileRecord(path=path, sha256=hashlib.sha256(data).hexdigest(), size=len(data))


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Replace manifest.json in one rename."""
    write_file(folder / MANIFEST, manifest_module.encode(manifest))


@contextlib.contextmanager
def new_bundle(target: str | os.PathLike[str], *, overwrite: bool = False) -> Iterator[Path]:
    """Make a folder beside ``target`` for a new bundle and yield it; rename it to ``target`` when the block ends well.

    After an exception the folder is removed. The old bundle stays where it is until the new one is complete and on disk.
    Raises BundleError when ``target`` exists and ``overwrite`` is False, when it is not a bundle, and when another writer
    holds it.
    """
    target = Path(os.path.abspath(target))
    check_target(target, overwrite=overwrite)
    with explained(target):
        target.parent.mkdir(parents=True, exist_ok=True)
    with lock(target):
        with explained(target):
            if is_folder(aside_of(target)) and not os.path.lexists(target):  # a writer died between two renames
                aside_of(target).rename(target)
            for stale in target.parent.glob(f".{target.name}.building-*"):  # under the lock nobody writes there
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
                check_target(target, overwrite=overwrite)
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
            with contextlib.suppress(BundleError, OSError):  # such an error would hide the first one
                named = {file.path for file in read_manifest(folder).files()}  # the new manifest may be there
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
    # An engine that the build compiled from the network itself is its own graph.
    is_own_graph = engine.key.graph_sha256 == engine.file.sha256 and engine.file.path.startswith("engines/")
    if graphs and engine.key.graph_sha256 not in graphs and not is_own_graph:
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


def check_target(target: str | os.PathLike[str], *, overwrite: bool) -> None:
    """Raise BundleError unless a new bundle may be put at ``target``."""
    target = Path(os.path.abspath(target))
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
    """Return the first few files in a bundle's folder that no writer of bundles made, up to about ``most``.

    Links, pipes and folders that cannot be read count too.
    """
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
    """Return whether manifest.json is that of a bundle: other programs give files this name too."""
    try:
        data = read_file(folder / MANIFEST, limit=MAX_MANIFEST_BYTES, follow=False)
        with refusing(ManifestError):
            keys = msgspec.json.decode(data, type=dict[str, msgspec.Raw]).keys()
    except (OSError, ManifestError):
        return False
    return {"schema_version", "backbone", "engines", "digest"} <= set(keys)


def _remove_unnamed(folder: Path, before: Manifest, after: Manifest) -> None:
    """Remove the files of engines that the manifest ``before`` names and the one in its place, ``after``, does not."""
    named = {record.path for record in after.files()}
    for file in (file for engine in before.engines for file in engine.files):
        if file.path not in named and _ENGINE_FILE.fullmatch(file.path):
            with contextlib.suppress(OSError):  # the next writer removes it
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
