"""Read a bundle: a folder with graphs, engines and their golden samples. This docstring describes the format.

::

    resnet50.bundle/
      manifest.json        names all files: structs of manifest.py, manifest.schema.json; at most 4 MiB
      graphs/int8.onnx     one typed ONNX graph per precision; graphs/fp32.ts is the frozen TorchScript
      golden.npz           images and the fp32 reference of every engine output: plain arrays, no pickles
      calibration.json     ranges of every tensor that may be quantised, and hashes of the network and the images
      engines/*.blob       the bytes of an engine, named flavour-version-architecture-feature-precision; TensorRT has .plan,
                           with a description of the layers (.layers.json) and a timing cache (.cache)

1. manifest.json MUST name every file that a reader opens, with its SHA-256 and size. Other files are ignored.
2. A path MUST be relative, use forward slashes, have no ``..`` and go through no link: links in a bundle are not followed.
3. A reader MUST refuse unknown keys, an unknown ``schema_version``, a wrong digest, and any file whose size or hash differs.
   golden.npz MUST hold exactly the arrays that the manifest promises, stored and not compressed.
4. Nothing is unpickled. TorchScript is code: it is loaded only if it is asked for by name.
5. A writer MUST make a new bundle beside the target and rename it to the target. It MUST write files before the manifest
   that names them, and replace manifest.json by rename. So a reader sees the old state or the new one, never a mixture.
6. The next writer removes what a killed writer left: hidden files with ``.writing-`` in their names, and files in engines/
   with the name of an engine that the manifest does not name. Nothing else is ever removed: a bundle whose folder holds
   other files is not overwritten.

Where the kernel can (Linux ``renameat2``), a bundle is replaced in one system call. Elsewhere the old bundle is renamed
first: a reader may find no bundle for a moment, and the next writer repairs a crash in that moment. A reader that opened a
manifest before it was replaced opens it again when a file is missing (`read_current`).
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from edge_backbones.bundle import writer
from edge_backbones.bundle.golden import GoldenSamples
from edge_backbones.bundle.manifest import EngineRecord, FileRecord, Manifest
from edge_backbones.bundle.onnx_gate import graph_fault
from edge_backbones.bundle.storage import place_of, read_manifest
from edge_backbones.errors import BundleError, IntegrityError, refuse_lack
from edge_backbones.reading import opened, refusing

_REPAIR = "copy the bundle again or build it again"
_Read = TypeVar("_Read")


@dataclass(frozen=True)
class Bundle:
    """An opened bundle: its checked manifest and where its files lie. A file is checked when it is read."""

    path: Path
    manifest: Manifest

    def __repr__(self) -> str:
        engines = ", ".join(engine.name for engine in self.manifest.engines) or "none"
        return f"Bundle({str(self.path)!r}: {self.manifest.source.name}, engines: {engines})"

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Bundle:
        """Read and check manifest.json.

        Raises BundleError where there is no bundle, ManifestError for a manifest that is not what the format says.
        """
        if not os.fspath(path):
            raise BundleError("the path of the bundle is empty: pass the path of its folder")
        folder = Path(path)
        return cls(folder, read_manifest(folder))

    def read(self, record: FileRecord) -> bytearray:
        """Return the bytes of a file after comparing their size and SHA-256 with the manifest.

        The bytes that are returned are the ones that were compared: a file that changes later does no harm. An ONNX graph
        has passed `graph_fault` too, so libraries may parse it. Raises IntegrityError, which names the file.
        """
        path = place_of(self.path, record)
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
                raise IntegrityError(f"{path} is refused: {fault}. Build the bundle again")
        return data

    def check_files(self) -> None:
        """Read every file and compare it with the manifest; raises IntegrityError for the first that differs."""
        for record in self.manifest.files():
            self.read(record)

    def add_engine(self, engine: EngineRecord, contents: Mapping[str, bytes | bytearray]) -> Bundle:
        """Add an engine on disk, in place of one of the same name, and return the bundle as it is then.

        ``contents``: by path, the bytes of those of ``engine.files`` that the bundle does not hold already. They are on disk
        before the manifest that names them appears. The files of a replaced engine are removed after that. Writers take
        turns. Raises BundleError when another writer has held the bundle for a minute, when another process has removed a
        file that is not in ``contents``, and when the graph that the engine was made of is not in the bundle any more.
        """
        writer.add_engine(self.path, engine, contents)
        return Bundle.open(self.path)

    def remove_engine(self, name: str) -> Bundle:
        """Remove an engine on disk, and return the bundle as it is then. Processes that loaded the engine keep it.

        Raises BundleError for a name that the bundle does not have.
        """
        writer.remove_engine(self.path, name)
        return Bundle.open(self.path)

    def require_writable(self, *, room: int = 0) -> None:
        """Raise BundleError if engines of ``room`` bytes could not be added: the lock, the folder or the disk refuses.

        Call it before minutes are spent on an engine. It waits for another writer as `add_engine` does.
        """
        writer.require_writable(self.path, room=room)


def read_current(path: str | os.PathLike[str], read: Callable[[Bundle], _Read]) -> tuple[Bundle, _Read]:
    """Open a bundle and return it with what ``read`` reads of it, whatever other processes change in it meanwhile.

    Where a file is missing or differs because the manifest was replaced, the bundle is opened and read again.
    """
    bundle, again = Bundle.open(path), True
    while True:
        try:
            return bundle, read(bundle)
        except IntegrityError:
            replacement = Bundle.open(path)
            if replacement.manifest.digest == bundle.manifest.digest:  # or it was removed, and added again since
                if not again:
                    raise
                again = False
            bundle = replacement


def load_golden(bundle: Bundle) -> GoldenSamples:
    """Return the golden samples of a bundle; raise IntegrityError if they are not what the manifest says."""
    record, backbone, input = bundle.manifest.golden, bundle.manifest.backbone, bundle.manifest.input
    path = bundle.path / record.file.path
    data = bundle.read(record.file)
    with refusing(
        lambda why: IntegrityError(f"{path} does not hold what the manifest says: {why}; build the bundle again")
    ):
        return GoldenSamples.decode(data, record.cases, input, backbone)
