"""Make a small bundle of a large one: what one device needs, for the way to it."""

from __future__ import annotations

import functools
import os
import re
import tarfile
import tempfile
from pathlib import Path

import msgspec

from edge_backbones.bundle import trust
from edge_backbones.bundle.manifest import EngineRecord, Manifest
from edge_backbones.bundle.reader import Bundle, read_current
from edge_backbones.bundle.storage import explained
from edge_backbones.bundle.writer import new_bundle, write_manifest
from edge_backbones.engines import registry, select
from edge_backbones.errors import BundleError, EngineMismatchError, InputError
from edge_backbones.machine.devices import Place, parse_device

_TAR_SUFFIX = re.compile(r"\.(tar|tar\.gz|tgz)$")


def pack_bundle(
    path: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    engine: str | None = None,
    device: str = "auto",
    graphs: bool = False,
    overwrite: bool = False,
) -> Manifest:
    """Write a bundle with only the engines that are asked for, and what a device needs to run and verify them.

    The manifest, the golden samples and the calibration record stay. Graphs are left out, so the new bundle cannot be
    compiled again, unless ``graphs`` keeps the typed ONNX graphs. Timing caches and TorchScript files that no kept engine
    is made of are left out too. Files are compared with the manifest as they are copied. A signature is of the whole
    bundle: the new one is not signed.

    Args:
        path: Folder of the bundle.
        target: Folder to write; a tar file that holds the folder if the name ends in .tar, .tar.gz or .tgz.
        engine: Keep the engines that this means: a precision, a flavour, or a name in the manifest or the beginning of
            one. Programs for torch are kept only if it names them.
        device: Keep engines for ``"cpu"`` or ``"cuda"`` only, whether this machine can run them or not. With ``"auto"`` and
            no ``engine`` that is the one that a runtime would choose here.
        graphs: Keep the ONNX graphs, for ``compile_bundle`` on the device. Then no engine is kept unless ``engine`` or
            ``device`` asks for it, and it may be missing.
        overwrite: Replace an existing target.

    Returns:
        The manifest of the new bundle.

    Raises:
        BundleError: A file is damaged, there is no graph to keep, or the target exists or cannot be written.
        EngineMismatchError: The bundle has no engine that is meant, or none for this machine.
        InputError: ``device`` names no device, or the target is inside the bundle.
    """
    if Path(target).resolve().is_relative_to(Path(path).resolve()):
        raise InputError(
            f"{target} is the bundle itself or inside it, which packing leaves as it is: choose another name"
        )
    if not is_tar(target):
        return _write(path, target, engine, device, graphs=graphs, overwrite=overwrite)
    file = Path(target)
    _refuse_file(file, overwrite=overwrite)
    name = _TAR_SUFFIX.sub("", file.name) or "bundle"
    with explained(file), tempfile.TemporaryDirectory(dir=file.parent, prefix=f".{file.name}.") as work:
        manifest = _write(path, Path(work, name), engine, device, graphs=graphs, overwrite=False)
        written = Path(work, file.name + ".writing")
        with tarfile.open(written, "w:gz" if file.name.endswith((".gz", ".tgz")) else "w") as archive:
            archive.add(Path(work, name), arcname=name, filter=_of_nobody)
        written.replace(file)
    return manifest


def is_tar(target: str | os.PathLike[str]) -> bool:
    """Return whether `pack_bundle` writes a tar file of this name."""
    return _TAR_SUFFIX.search(os.fspath(target)) is not None


def _refuse_file(file: Path, *, overwrite: bool) -> None:
    """Raise BundleError unless a tar file may be written at ``file``. Only a tar file with a bundle is replaced."""
    if not os.path.lexists(file):
        return
    if not file.is_file():
        raise BundleError(f"{file} is not a file, and the name is one of a tar file: choose another name")
    if not overwrite:
        raise BundleError(f"{file} exists already: choose another name or pass --overwrite (overwrite=True)")
    try:
        with tarfile.open(file) as archive:
            holds_bundle = any(name.endswith("/manifest.json") for name in archive.getnames())
    except (tarfile.TarError, OSError, EOFError):
        holds_bundle = False
    if not holds_bundle:
        raise BundleError(f"{file} is no tar file with a bundle and will not be overwritten: choose another name")


def _write(
    path: str | os.PathLike[str],
    target: str | os.PathLike[str],
    engine: str | None,
    device: str,
    *,
    graphs: bool,
    overwrite: bool,
) -> Manifest:
    """Write the folder of `pack_bundle`."""
    with new_bundle(target, overwrite=overwrite) as folder:

        def copy(bundle: Bundle) -> Manifest:
            bundle, _ = trust.admit(bundle)
            manifest = _kept(bundle, engine, device, graphs=graphs)
            for record in dict.fromkeys(manifest.files()):
                place = folder / record.path
                place.parent.mkdir(parents=True, exist_ok=True)
                place.write_bytes(bundle.read(record))
            return manifest

        write_manifest(folder, read_current(path, copy)[1])
    return Bundle.open(target).manifest


def _kept(bundle: Bundle, engine: str | None, device: str, *, graphs: bool) -> Manifest:
    """Return the manifest of what `pack_bundle` keeps."""
    if graphs and not any(graph.format == "onnx" for graph in bundle.manifest.graphs):
        raise BundleError(f"{bundle.path} has no ONNX graph to keep: pack the bundle that it was packed of")
    engines = _kept_engines(bundle, select.full_name(bundle, engine), device, graphs=graphs)
    weights = {e.key.graph_sha256 for e in engines if e.key.gpu is not None and e.key.gpu.stripped}
    return msgspec.structs.replace(
        bundle.manifest,
        engines=tuple(msgspec.structs.replace(e, timing_cache=None) for e in engines),
        graphs=tuple(
            graph
            for graph in bundle.manifest.graphs
            if graph.file.sha256 in weights or (graphs and graph.format == "onnx")
        ),
    )


def _kept_engines(bundle: Bundle, engine: str | None, device: str, *, graphs: bool) -> list[EngineRecord]:
    """Return the engines that `pack_bundle` keeps; raise EngineMismatchError if there has to be one and is none."""
    place, _ = parse_device(device)
    if engine is None and place == "auto":
        host, place, _ = select.machine_for(bundle, device)
        return [] if graphs else [select.choose_engine(bundle, host, device=place)]
    reasons = functools.partial(_reasons_against, engine=engine, place=place)
    try:
        return select.fitting_engines(bundle, engine, reasons, device=place)
    except EngineMismatchError:
        if graphs and engine is None:
            return []
        raise


def _reasons_against(record: EngineRecord, *, engine: str | None, place: Place) -> list[str]:
    """Return why an engine is not for a kind of device; whether this machine runs it does not matter."""
    flavour = registry.find(record.key.flavour)
    is_program = flavour is not None and flavour.is_program
    if is_program and engine not in (record.key.flavour, record.name):
        return [f"is a program: it is packed only when asked for by name (engine={record.key.flavour!r})"]
    return select.against_place(record, place)


def _of_nobody(entry: tarfile.TarInfo) -> tarfile.TarInfo:
    """Return an entry of a tar file without owner and time, so that the same bundle makes the same file."""
    entry.uid = entry.gid = entry.mtime = 0
    entry.uname = entry.gname = ""
    return entry
