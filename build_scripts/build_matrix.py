"""``python -m build_scripts.build_matrix MATRIX.toml``: models x precisions x devices become bundles.

One bundle per model and precision, with an engine for every device. What can be made anywhere is made in parallel processes
of this machine: graphs, engines for its own CPU, engines of TensorRT-RTX. Full TensorRT compiles for the GPU that it runs on:
such an engine is made here if that GPU is here, or with ``--ray ADDRESS`` on a machine of a Ray cluster that offers it
as a resource (``ray start --address=... --resources='{"sm_87": 1}'``). The bundle travels to it and the engine back; the
machine needs this package and its TensorRT, no torch and no shared disk.

A matrix::

    out = "bundles"                          # beside this file
    images = "photographs"
    precisions = ["int8", "fp16"]            # of every model that has none of its own

    [[models]]
    source = "resnet50"                      # what `edge-backbones build` takes
    options = { out_indices = [1, 2, 3, 4], height = 224, width = 224 }

    [[devices]]
    profile = "cpu"

    [[devices]]
    profile = "jetson-orin-nano"             # TensorRT, on a worker that offers sm_87

What is there already is not made again, unless its inputs changed: source, weights, options, images, libraries. A cell that
fails fails alone. ``matrix.json`` in the output folder says how every cell ended.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import hashlib
import importlib.metadata
import io
import json
import os
import re
import sys
import tempfile
import time
import zipfile
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from edge_backbones import __version__
from edge_backbones.bundle import Bundle
from edge_backbones.errors import BundleError, EdgeBackbonesError, InputError
from edge_backbones.manifest import EngineRecord, Flavour
from edge_backbones.profiles import RTX_ARCHITECTURES, load_profile
from edge_backbones.spec import Precision

_LIBRARIES = ("torch", "timm", "transformers", "onnx", "onnxscript", "onnx-ir", "openvino", "tensorrt-rtx-cu13-libs")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


class Model(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """``options``: fields of BuildOptions. ``name``: of its bundles, the source's by default."""

    source: str
    name: str | None = None
    images: str | None = None
    precisions: tuple[Precision, ...] | None = None
    options: dict[str, Any] = {}

    @property
    def title(self) -> str:
        return self.name or re.sub(r"[^A-Za-z0-9_.-]+", "-", self.source.rstrip("/")).strip("-.")


class Device(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """``profile``: of `edge-backbones profiles`, or a .toml file. ``flavour``: by the profile's kind. ``resource``: what a
    worker has to offer, for engines that cannot be made anywhere; by default the GPU's architecture."""

    profile: str
    name: str | None = None
    flavour: Flavour | None = None
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
    """A bundle to build, or (``flavour``) an engine to add to it. ``digest``: of all that decides what comes out."""

    model: str
    precision: Precision
    device: str | None = None
    source: str = ""
    images: str | None = None
    options: dict[str, Any] = {}
    flavour: Flavour | None = None
    profile: str | None = None
    targets: tuple[str, ...] = ()
    resource: str | None = None
    digest: str = ""

    @property
    def name(self) -> str:
        return f"{self.model}.{self.precision}" + (f" on {self.device}" if self.device else "")


class Ending(msgspec.Struct, frozen=True, kw_only=True):
    """How a task ended: ``made``, ``there`` (nothing had changed), ``failed`` or ``waiting`` (for a worker), and why."""

    status: str
    seconds: float = 0.0
    why: str = ""
    digest: str = ""


Run = Callable[[Task, Path], Awaitable[float]]
"""Carry out a task on a bundle, when there is room; returns the seconds that it took, and raises EdgeBackbonesError."""


# ---- the matrix -----------------------------------------------------------------------------------------------------


def read_matrix(path: Path) -> Matrix:
    """Raises InputError that names the file and the field."""
    try:
        matrix = msgspec.toml.decode(path.read_bytes(), type=Matrix)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not a build matrix: {error}") from error
    from edge_backbones.build.pipeline import BuildOptions

    known = {field.name for field in dataclasses.fields(BuildOptions)} - {"precisions", "cache", "calibration"}
    for model in matrix.models:
        unknown = sorted(set(model.options) - known)
        if unknown:
            raise InputError(f"{path}: {model.title} has options {unknown}; there are {', '.join(sorted(known))}")
    for kind, titles in (("models", [m.title for m in matrix.models]), ("devices", [d.title for d in matrix.devices])):
        twice = sorted({title for title in titles if titles.count(title) > 1})
        if twice or not titles:
            raise InputError(f"{path}: " + (f"two {kind} are named {twice[0]}" if twice else f"there are no {kind}"))
        bad = [title for title in titles if not _NAME.fullmatch(title)]
        if bad:
            raise InputError(f"{path}: {bad[0]!r} cannot be part of a file name: give it another name")
    return matrix


def tasks_of(matrix: Matrix, folder: Path) -> list[tuple[Task, list[Task]]]:
    """Every bundle, and the engines that are added to it. Paths in the matrix are beside its file, in ``folder``."""
    hashes: dict[str, str] = {}
    found = []
    for model in matrix.models:
        images = model.images or matrix.images
        place = None if images is None else str((folder / images).resolve())
        if place is not None and place not in hashes:
            hashes[place] = _hash_of(Path(place))
        source, options, files = model.source, dict(model.options), []
        if (folder / source).exists():  # a save_pretrained folder; other sources are names
            files.append(folder / source)
            source = str((folder / source).resolve())
        if "weights" in options and (folder / options["weights"]).is_file():
            files.append(folder / options["weights"])
            options["weights"] = str((folder / options["weights"]).resolve())
        content = [__version__, _versions(), hashes.get(place or ""), [_hash_of(path) for path in files]]
        for precision in model.precisions or matrix.precisions:
            build = Task(model=model.title, precision=precision, source=source, images=place, options=options)
            build = msgspec.structs.replace(build, digest=_digest(build, content))
            engines = [engine_task(build, device) for device in matrix.devices]
            found.append((build, [engine for engine in engines if engine is not None]))
    return found


def engine_task(build: Task, device: Device) -> Task | None:
    """None for this machine's own CPU: that engine comes with the bundle."""
    profile = load_profile(device.profile)
    kinds: dict[str, Flavour] = {"cpu": "openvino", "rtx": "tensorrt_rtx"}
    flavour = device.flavour or kinds.get(profile.kind, "tensorrt")
    if flavour == "openvino" and device.resource is None:
        return None
    anywhere = flavour == "tensorrt_rtx"
    task = Task(
        model=build.model,
        precision=build.precision,
        device=device.title,
        flavour=flavour,
        profile=device.profile,
        targets=(profile.architecture,) if anywhere and profile.architecture in RTX_ARCHITECTURES else (),
        resource=device.resource or (None if anywhere else profile.architecture),
    )
    return msgspec.structs.replace(task, digest=_digest(task, [build.digest]))


def _digest(task: Task, more: Any) -> str:
    return hashlib.sha256(json.dumps([msgspec.to_builtins(task), more], sort_keys=True).encode()).hexdigest()


def _versions() -> dict[str, str]:
    found = {"python": sys.version.partition(" ")[0]}
    for library in _LIBRARIES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[library] = importlib.metadata.version(library)
    return found


def _hash_of(path: Path) -> str:
    """Of a file, or of all files of a folder and their names."""
    if not path.exists():
        raise InputError(f"{path} does not exist")
    digest = hashlib.sha256()
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    for file in files:
        with file.open("rb") as opened:
            content = hashlib.file_digest(opened, "sha256") if hasattr(hashlib, "file_digest") else _sha256(opened)
        digest.update(f"{file.relative_to(path) if path.is_dir() else file.name}\0{content.hexdigest()}\0".encode())
    return digest.hexdigest()


def _sha256(file: Any) -> Any:
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest


# ---- carrying it out ------------------------------------------------------------------------------------------------


async def build_matrix(
    path: Path, *, run: Run, say: Callable[[str], None] = print, resources: Mapping[str, float] | None = None
) -> dict[str, Ending]:
    """Every cell that is not there yet; ``run`` says how many at a time. ``resources``: devices that can be had."""
    matrix = read_matrix(path)
    out = (path.parent / matrix.out).resolve()
    out.mkdir(parents=True, exist_ok=True)
    state = out / "matrix.json"
    known = _read_state(state)
    todo = tasks_of(matrix, path.parent)
    count = sum(1 + len(engines) for _, engines in todo)
    endings: dict[str, Ending] = {}

    def end(task: Task, ending: Ending) -> None:
        endings[task.name] = msgspec.structs.replace(ending, digest=task.digest)
        _write_state(state, {**known, **endings})
        told = {"made": f"{ending.seconds:.1f} s", "there": "nothing changed"}.get(ending.status, ending.why)
        say(f"[{len(endings)}/{count}] {task.name}: {ending.status}, {told}")

    async def one(task: Task, bundle: Path) -> Ending:
        try:
            seconds = await run(task, bundle)
        except EdgeBackbonesError as error:
            return Ending(status="failed", why=" ".join(str(error).split()))
        return Ending(status="made", seconds=seconds)

    async def row(build: Task, engines: Sequence[Task]) -> None:
        bundle = out / f"{build.model}.{build.precision}.bundle"
        before = known.get(build.name)
        if before is not None and before.status != "failed" and before.digest == build.digest and _is_whole(bundle):
            end(build, Ending(status="there"))
        else:
            end(build, await one(build, bundle))
            for engine in engines:
                known.pop(engine.name, None)
        for engine in engines:
            previous = known.get(engine.name)
            if endings[build.name].status == "failed":
                end(engine, Ending(status="failed", why="its bundle was not built"))
            elif previous is not None and previous.status in ("made", "there") and previous.digest == engine.digest:
                end(engine, Ending(status="there"))
            elif engine.resource is not None and not (resources or {}).get(engine.resource):
                end(engine, Ending(status="waiting", why=f"no worker offers {engine.resource}"))
            else:
                end(engine, await one(engine, bundle))

    await asyncio.gather(*(row(build, engines) for build, engines in todo))
    return endings


def _is_whole(bundle: Path) -> bool:
    try:
        Bundle.open(bundle)
    except BundleError:
        return False
    return True


def _read_state(path: Path) -> dict[str, Ending]:
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, Ending])
    except (OSError, msgspec.DecodeError):
        return {}


def _write_state(path: Path, endings: Mapping[str, Ending]) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_bytes(msgspec.json.format(msgspec.json.encode(endings), indent=1) + b"\n")
    temporary.replace(path)


# ---- one cell, wherever it is ---------------------------------------------------------------------------------------


def carry_out(task: Task, bundle: Path) -> None:
    """Build the bundle, or add the engine to it."""
    if task.flavour is None:
        from edge_backbones.build.pipeline import BuildOptions, build_bundle

        options = {"torchscript": False, **task.options}
        given = {k: tuple(v) if isinstance(v, list) else v for k, v in options.items()}
        build_options = BuildOptions(**given, precisions=(task.precision,))
        build_bundle(task.source, bundle, images=task.images, options=build_options, overwrite=True)
        return
    add_engine(bundle, **_order(task))


def _order(task: Task) -> dict[str, Any]:
    """What a device has to know to make the engine, as plain values."""
    return {
        "precision": task.precision.value,
        "flavour": task.flavour,
        "profile": task.profile,
        "targets": task.targets,
    }


def add_engine(bundle: Path, *, precision: str, flavour: Any, profile: str, targets: tuple[str, ...]) -> None:
    from edge_backbones.build.device import compile_bundle
    from edge_backbones.build.tensorrt import PlanOptions

    plan = PlanOptions(targets=targets)
    compile_bundle(bundle, precisions=(Precision(precision),), flavour=flavour, profile=profile, plan=plan)


def here(jobs: int) -> Run:
    """So many processes at a time, which share the cores."""
    free, threads = asyncio.Semaphore(jobs), max(1, (os.cpu_count() or 1) // jobs)

    async def run(task: Task, bundle: Path) -> float:
        async with free:
            begin = time.monotonic()
            await run_child(task, bundle, threads)
            return time.monotonic() - begin

    return run


async def run_child(task: Task, bundle: Path, threads: int = 1) -> None:
    """In a process of its own: a cell that crashes, or is killed, takes no other along."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    process = await asyncio.create_subprocess_exec(
        *(
            sys.executable,
            "-m",
            "build_scripts.build_matrix",
            "--child",
            msgspec.json.encode(task).decode(),
            str(bundle),
        ),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
        env=environment,
    )
    try:
        _, told = await process.communicate()
    except BaseException:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        raise
    if process.returncode:
        lines = [line for line in told.decode(errors="replace").splitlines() if line.strip()]
        died = f"died of signal {-process.returncode}" if process.returncode < 0 else ""
        raise EdgeBackbonesError(died or (lines[-1] if lines else f"exit code {process.returncode}"))


def child(text: str, bundle: str) -> None:
    try:
        carry_out(msgspec.json.decode(text, type=Task), Path(bundle))
    except (EdgeBackbonesError, OSError, MemoryError) as error:
        sys.exit(" ".join(str(error).split()) or type(error).__name__)


# ---- a Ray cluster --------------------------------------------------------------------------------------------------


def on_ray(address: str, elsewhere: Run) -> tuple[Run, dict[str, float]]:
    """How to run a task on the device of a cluster, and the devices that it has; what needs none is run ``elsewhere``."""
    try:
        import ray
    except ImportError as error:
        raise InputError("--ray needs Ray: pip install 'edge-backbones[fleet]'") from error
    try:
        ray.init(address=address, log_to_driver=False)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise InputError(f"no Ray cluster at {address}: {' '.join(str(error).split())[:200]}") from error
    ray.cloudpickle.register_pickle_by_value(
        sys.modules[carry_out.__module__]
    )  # workers have the package, not this script
    # A process of its own for every cell, as here; what crashed once would crash again.
    remote = ray.remote(max_calls=1, max_retries=0)(_on_worker)

    async def run(task: Task, bundle: Path) -> float:
        if task.resource is None:
            return await elsewhere(task, bundle)
        worker = remote.options(num_cpus=0, resources={task.resource: 1})
        try:
            seconds, engines = await worker.remote(_order(task), pack(bundle))
        except ray.exceptions.RayTaskError as error:
            cause = error.cause if isinstance(error.cause, EdgeBackbonesError) else error
            raise EdgeBackbonesError(str(cause).strip().splitlines()[-1]) from error
        except ray.exceptions.RayError as error:
            raise EdgeBackbonesError(f"the worker died: {' '.join(str(error).split())[:200]}") from error
        opened = Bundle.open(bundle)
        for encoded, contents in engines:
            opened = opened.add_engine(msgspec.json.decode(encoded, type=EngineRecord), contents)
        return float(seconds)

    return run, dict(ray.cluster_resources())


def _on_worker(order: dict[str, Any], packed: bytes) -> tuple[float, list[tuple[bytes, dict[str, bytes]]]]:
    """Seconds, and the records and files of the engines that were added."""
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as work:
        bundle = Path(work) / "cell.bundle"
        bundle.mkdir()
        unpack(packed, bundle)
        before = {engine.file for engine in Bundle.open(bundle).manifest.engines}
        add_engine(bundle, **order)
        opened = Bundle.open(bundle)
        added = [engine for engine in opened.manifest.engines if engine.file not in before]
        sent = [(msgspec.json.encode(e), {file.path: bytes(opened.read(file)) for file in e.files}) for e in added]
        return time.monotonic() - begin, sent


def pack(bundle: Path) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_STORED) as archive:
        for path in sorted(p for p in bundle.rglob("*") if p.is_file()):
            archive.write(path, path.relative_to(bundle).as_posix())
    return stream.getvalue()


def unpack(packed: bytes, folder: Path) -> None:
    with zipfile.ZipFile(io.BytesIO(packed)) as archive:
        archive.extractall(folder)


# ---- the command line -----------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("matrix", type=Path, help="the TOML file")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="cells at a time (default: one per core)")
    parser.add_argument("--ray", metavar="ADDRESS", help="a Ray cluster with the devices: its address, or 'auto'")
    parser.add_argument("--json", action="store_true", help="print how every cell ended, and nothing else")
    given = parser.parse_args(arguments)
    if given.jobs < 1:
        parser.error("--jobs must be at least 1")

    def say(text: str) -> None:
        if not given.json:
            print(text, flush=True)

    try:
        run, resources = here(given.jobs), local_resources()
        if given.ray:
            run, resources = on_ray(given.ray, run)
        endings = asyncio.run(build_matrix(given.matrix, run=run, say=say, resources=resources))
    except EdgeBackbonesError as error:
        print(f"build_matrix: {error}", file=sys.stderr)
        return 1
    if given.json:
        print(json.dumps({name: msgspec.to_builtins(ending) for name, ending in endings.items()}))
    else:
        show(endings)
    return 1 if any(ending.status == "failed" for ending in endings.values()) else 0


def local_resources() -> dict[str, float]:
    """The GPUs that are here, by architecture."""
    from edge_backbones.runtime import cuda

    return {gpu.architecture: 1.0 for gpu in cuda.gpus()}


def show(endings: Mapping[str, Ending]) -> None:
    """A row per bundle, a column per device."""
    from rich.console import Console
    from rich.table import Table

    devices = list(dict.fromkeys(name.partition(" on ")[2] or "bundle" for name in endings))
    table = Table("model and precision", *devices)
    for row in dict.fromkeys(name.partition(" on ")[0] for name in endings):
        cells = [endings.get(row if device == "bundle" else f"{row} on {device}") for device in devices]
        table.add_row(
            row, *("" if c is None else c.status if c.status != "made" else f"{c.seconds:.0f} s" for c in cells)
        )
    Console(highlight=False).print(table)
    for name, ending in endings.items():
        if ending.why:
            print(f"{name}: {ending.status}: {ending.why}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(*sys.argv[2:])
    else:
        sys.exit(main())
