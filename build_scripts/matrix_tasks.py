"""The file of a build matrix, and the tasks in it. Each task has a digest of everything that decides its result."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from edge_backbones import __version__
from edge_backbones.engines import registry
from edge_backbones.errors import EdgeBackbonesError, InputError
from edge_backbones.machine import gpus, hosts
from edge_backbones.machine.profiles import RTX_ARCHITECTURES, load_profile
from edge_backbones.reading import read_file, refusing, shortened
from edge_backbones.spec import Precision

_LIBRARIES = (
    "torch",
    "timm",
    "transformers",
    "numpy",
    "Pillow",
    "onnx",
    "onnxscript",
    "onnx-ir",
    "onnxruntime",
    "openvino",
)
_MAX_BYTES = 1 << 20
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


class Model(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A model of the matrix.

    ``options``: fields of BuildOptions; gates and size ranges are tables. ``name``: of its bundles, by default the
    source's.
    """

    source: str
    name: str | None = None
    images: str | None = None
    precisions: tuple[Precision, ...] | None = None
    options: dict[str, Any] = {}

    @property
    def title(self) -> str:
        return self.name or re.sub(r"[^A-Za-z0-9_.-]+", "-", self.source.rstrip("/")).strip("-.")


class Device(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A device of the matrix.

    ``profile``: a name from `edge-backbones profiles`, or a .toml file. ``flavour``: by default that of the profile's
    kind. ``resource``: what a worker must offer, for engines that can be made only on the device; by default the GPU's
    architecture.
    """

    profile: str
    name: str | None = None
    flavour: str | None = None
    resource: str | None = None

    @property
    def title(self) -> str:
        return self.name or Path(self.profile).stem


class Matrix(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    out: str
    models: tuple[Model, ...]
    devices: tuple[Device, ...]
    precisions: tuple[Precision, ...] = (Precision.INT8,)
    images: str | None = None


class Task(msgspec.Struct, frozen=True, kw_only=True):
    """A bundle to build, or an engine (with ``flavour``) to add to it.

    ``digest``: of everything that decides the result. ``why``: why it cannot be made, if an input cannot be read.
    """

    model: str
    precision: Precision
    device: str | None = None
    source: str = ""
    images: str | None = None
    options: dict[str, Any] = {}
    flavour: str | None = None
    profile: str | None = None
    targets: tuple[str, ...] = ()
    resource: str | None = None
    digest: str = ""
    why: str = ""

    @property
    def name(self) -> str:
        return f"{self.model}.{self.precision}" + (f" on {self.device}" if self.device else "")


def read_matrix(path: Path) -> Matrix:
    """Read a matrix file. Raises InputError that names the file and the field."""
    try:
        data = read_file(path, limit=_MAX_BYTES)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from error
    with refusing(lambda why: InputError(f"{path} is not a build matrix: {why}")):
        matrix = msgspec.toml.decode(data, type=Matrix)
    from edge_backbones.toolchain.options import BuildOptions

    known = {field.name for field in dataclasses.fields(BuildOptions)} - {"precisions", "cache", "calibration"}
    for model in matrix.models:
        unknown = sorted(set(model.options) - known)
        if unknown:
            said, title = shortened(str(unknown), 100), shortened(model.title, 80)
            raise InputError(f"{path}: {title} has options {said}; there are {', '.join(sorted(known))}")
    for kind, titles in (("models", [m.title for m in matrix.models]), ("devices", [d.title for d in matrix.devices])):
        twice = [title for title, count in collections.Counter(titles).items() if count > 1]
        if not titles:
            raise InputError(f"{path}: there are no {kind}")
        if twice:
            raise InputError(f"{path}: two {kind} are named {shortened(twice[0], 80)}")
        bad = [title for title in titles if not _NAME.fullmatch(title)]
        if bad:
            raise InputError(f"{path}: {shortened(bad[0], 80)!r} cannot be part of a file name: give it another name")
    return matrix


def tasks_of(matrix: Matrix, folder: Path) -> list[tuple[Task, list[Task]]]:
    """Return a task for every bundle and every engine. Paths in the matrix are relative to its ``folder``.

    Digests are of contents, not of places and names: a folder may move.
    """
    hash_of = functools.cache(_hash_of)
    host = hosts.this_host({})
    made_with = [__version__, _versions(), host.architecture, host.cpu_features]
    found = []
    for model in matrix.models:
        with refusing(lambda why, model=model: InputError(f"{shortened(model.title, 80)} cannot be built: {why}")):  # type: ignore[misc]
            task, content, why = _model_task(model, matrix, folder, hash_of)
        for precision in model.precisions or matrix.precisions:
            digest = _digest(made_with, content, precision)
            build = msgspec.structs.replace(task, precision=precision, digest=digest, why=why)
            engines = [engine_task(build, device, folder) for device in matrix.devices]
            found.append((build, [engine for engine in engines if engine is not None]))
    return found


def _model_task(
    model: Model, matrix: Matrix, folder: Path, hash_of: Callable[[Path], str]
) -> tuple[Task, dict[str, Any], str]:
    """Return the task of a model's bundle, its inputs by content, and why an input cannot be read (empty if all can)."""
    images = model.images or matrix.images
    place = None if images is None else (folder / images).resolve()
    source, options, meant = model.source, dict(model.options), dict(model.options)
    content: dict[str, Any] = {"source": source, "options": meant}
    why = ""
    try:
        content["images"] = place and hash_of(place)
        if (folder / source).exists():  # a save_pretrained folder; other sources are names
            source = str((folder / source).resolve())
            content["source"] = hash_of(Path(source))
        if (folder / str(options.get("weights", "pretrained"))).is_file():
            options["weights"] = str((folder / options["weights"]).resolve())
            meant["weights"] = hash_of(Path(options["weights"]))
        if "profile" in options:
            options["profile"] = _found_profile(str(options["profile"]), folder)
            meant["profile"] = msgspec.to_builtins(load_profile(options["profile"]))
    except InputError as error:
        why = words_of(error)
    path = None if place is None else str(place)
    task = Task(model=model.title, precision=Precision.FP32, source=source, images=path, options=options)
    return task, content, why


def engine_task(build: Task, device: Device, folder: Path) -> Task | None:
    """Return the task of an engine; None for this machine's own CPU, whose engine comes with the bundle."""
    path = _found_profile(device.profile, folder)
    profile = load_profile(path)
    flavour = device.flavour or profile.flavours[0]
    if flavour == "openvino" and device.resource is None:
        return None
    anywhere = registry.get(flavour).takes_targets
    targets = (profile.architecture,) if anywhere and profile.architecture in RTX_ARCHITECTURES else ()
    resource = device.resource or (None if anywhere else profile.architecture)
    library = None  # of a worker: nobody knows before it is asked
    if resource is None or resource in local_resources():
        library = registry.InstalledVersions().get(flavour)
    return Task(
        model=build.model,
        precision=build.precision,
        device=device.title,
        flavour=flavour,
        profile=path,
        targets=targets,
        resource=resource,
        digest=_digest(build.digest, flavour, msgspec.to_builtins(profile), targets, resource, library),
    )


def _found_profile(name_or_path: str, folder: Path) -> str:
    return str((folder / name_or_path).resolve()) if name_or_path.endswith(".toml") else name_or_path


def _digest(*content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def _versions() -> dict[str, str]:
    found = {"python": sys.version.partition(" ")[0]}
    for library in _LIBRARIES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[library] = importlib.metadata.version(library)
    return found


def _hash_of(path: Path) -> str:
    """Return the hash of a file's content, or of all files of a folder and their names."""
    digest = hashlib.sha256()
    try:
        if not path.exists():
            raise InputError(f"{path} does not exist")
        for file in sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]:
            with file.open("rb") as opened:
                content = hashlib.file_digest(opened, "sha256") if hasattr(hashlib, "file_digest") else _sha256(opened)
            name = file.relative_to(path).as_posix() if path.is_dir() else ""
            digest.update(f"{name}\0{content.hexdigest()}\0".encode())
    except OSError as error:
        raise InputError(f"{error.filename or path} cannot be read: {error.strerror or error}") from error
    return digest.hexdigest()


def _sha256(file: Any) -> Any:
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest


def words_of(error: BaseException) -> str:
    """Return an error in one line, with its type unless it is one of ours."""
    said = " ".join(str(error).split())
    return said if isinstance(error, EdgeBackbonesError) and said else f"{type(error).__name__}: {said}".rstrip(": ")


def local_resources() -> dict[str, float]:
    """Return the GPUs of this machine by architecture."""
    return {gpu.architecture: 1.0 for gpu in gpus.find_gpus()}
