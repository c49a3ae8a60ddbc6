"""Put folders of models into a Triton model repository, whole or not at all."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from edge_backbones.bundle import manifest as manifest_module
from edge_backbones.bundle import storage
from edge_backbones.bundle.manifest import MAX_MANIFEST_BYTES, FileRecord
from edge_backbones.bundle.reader import Bundle
from edge_backbones.errors import BundleError, IntegrityError
from edge_backbones.integrations.triton_config import FIRST_LINE, Message, Tensor, render
from edge_backbones.reading import read_file, shortened

VERSION = "1"
"""The version of a model that is written: the name of its folder."""

_OWN_FILE = re.compile(
    r"config\.pbtxt|warmup(/golden_[a-z]+)?|1(/(model\.(py|plan|onnx)|preprocessing\.json|(bundle|__pycache__)(/.*)?))?"
)


@dataclass(frozen=True)
class TritonModel:
    """Hold what was written about one model.

    Attributes:
        name: Its name, and that of its folder.
        backend: ``tensorrt``, ``onnxruntime``, ``openvino``, ``python`` or ``ensemble``.
        serves: The engine, the graph or the models that it consists of.
        max_batch_size: Triton's: the largest batch; 0 if ``dims`` begin with the batch axis.
        inputs: What it takes.
        outputs: What it answers.
    """

    name: str
    backend: str
    serves: str
    max_batch_size: int
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]


@dataclass
class ModelFolder:
    """The folder of a model before it is written. ``files``: by path, the bytes, or the file of the bundle."""

    model: TritonModel
    config: Message
    files: dict[str, bytes | FileRecord] = field(default_factory=dict)
    copies_bundle: bool = False


def write_model(folder: ModelFolder, place: Path, bundle: Bundle) -> None:
    """Write the folder of a model. Files of the bundle are compared with its manifest as they are copied."""
    (place / VERSION).mkdir(parents=True)  # an ensemble has an empty one
    (place / "config.pbtxt").write_text(f"{FIRST_LINE}\n{render(folder.config)}", encoding="ascii")
    for name, data in folder.files.items():
        (place / name).parent.mkdir(exist_ok=True)
        (place / name).write_bytes(bundle.read(data) if isinstance(data, FileRecord) else data)
    if folder.copies_bundle:
        _copy_bundle(bundle, place / VERSION / "bundle")


def _copy_bundle(bundle: Bundle, target: Path) -> None:
    """Copy the files that a bundle's manifest names, the manifest byte for byte, and the signature."""
    data = read_file(bundle.path / storage.MANIFEST, limit=MAX_MANIFEST_BYTES, follow=False)
    if manifest_module.decode(data, str(bundle.path / storage.MANIFEST)).digest != bundle.manifest.digest:
        raise IntegrityError(f"{bundle.path} was changed while it was copied: try again")
    for record in dict.fromkeys(bundle.manifest.files()):
        (target / record.path).parent.mkdir(parents=True, exist_ok=True)
        (target / record.path).write_bytes(bundle.read(record))
    (target / storage.MANIFEST).write_bytes(data)
    signature = bundle.path / "signature"
    for file in sorted(signature.iterdir()) if storage.is_folder(signature) else ():
        (target / "signature").mkdir(exist_ok=True)
        (target / "signature" / file.name).write_bytes(read_file(file, limit=MAX_MANIFEST_BYTES, follow=False))


@contextlib.contextmanager
def staged(repository: Path, base: str) -> Iterator[Path]:
    """Yield a folder from which models can be renamed into the repository; remove it at the end."""
    is_new = not os.path.lexists(repository)
    if repository.exists() and not repository.is_dir():
        raise BundleError(f"{repository} is a file, and a repository is a folder: choose another name")
    with storage.explained(repository):
        repository.mkdir(parents=True, exist_ok=True)
    try:
        with storage.lock(repository / base):
            with storage.explained(repository):
                staging = _make_staging(repository, f".{base}.building-{secrets.token_hex(4)}")
            try:
                with storage.explained(repository, staging):
                    yield staging
            finally:
                shutil.rmtree(staging, ignore_errors=True)
    finally:
        if is_new:
            with contextlib.suppress(OSError):  # it holds the models
                repository.rmdir()


def _make_staging(repository: Path, name: str) -> Path:
    """Make a folder beside the repository, and return it. Raises OSError.

    Triton takes every folder in a repository for a model, hidden ones too, and a server that starts ends if one cannot be
    loaded. Only where nothing can be renamed from beside the repository, as where it is mounted, the folder is inside it.
    """
    beside = Path(os.path.realpath(repository)).parent / name
    probe = repository / f"{name}.probe"  # a file: Triton looks at folders alone
    try:
        beside.mkdir()
        (beside / probe.name).touch()
        (beside / probe.name).rename(probe)
        probe.unlink()
    except OSError:
        shutil.rmtree(beside, ignore_errors=True)
        inside = repository / name
        inside.mkdir()
        return inside
    return beside


def require_free(place: Path, *, overwrite: bool) -> None:
    """Raise BundleError unless a model may be put at ``place``: only a model that `export_triton` wrote is replaced."""
    if not os.path.lexists(place):
        return
    if not overwrite:
        raise BundleError(f"{place} exists already: choose another --name, or pass --overwrite (overwrite=True)")
    try:
        text = (place / "config.pbtxt").read_bytes() if storage.is_folder(place) else b""
    except OSError:
        text = b""
    if not text.startswith(FIRST_LINE.encode()):
        raise BundleError(
            f"{place} is no model that export-triton wrote and will not be overwritten: choose another --name"
        )
    strange = [path.relative_to(place).as_posix() for path in sorted(place.rglob("*"))]
    strange = [path for path in strange if not _OWN_FILE.fullmatch(path)]
    if strange:
        raise BundleError(
            f"{place} holds {', '.join(shortened(name, 80) for name in strange[:3])}, which export-triton did not write and "
            "overwriting would delete: move it elsewhere, or choose another --name"
        )


def publish(staging: Path, repository: Path, names: Sequence[str], *, overwrite: bool) -> None:
    """Move models to their places, all or none. Those that were there lie in ``staging`` then."""
    moved: list[tuple[str, bool]] = []
    try:
        for name in names:
            require_free(repository / name, overwrite=overwrite)
            replaces = (repository / name).exists()
            if replaces:
                storage.exchange(staging / name, repository / name)
            else:
                (staging / name).rename(repository / name)
            moved.append((name, replaces))
    except BaseException:
        for name, replaces in reversed(moved):
            if replaces:
                storage.exchange(staging / name, repository / name)
            else:
                (repository / name).rename(staging / name)
        raise
    storage.sync_folder(repository)
