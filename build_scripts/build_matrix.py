"""``python -m build_scripts.build_matrix MATRIX.toml``: models x precisions x devices become bundles.

One bundle per model and precision, with an engine for every device. What can be made anywhere is made in parallel processes
of this machine: graphs, engines for its own CPU, engines of TensorRT-RTX. Full TensorRT compiles for the GPU that it runs on:
such an engine is made here if that GPU is here, or with ``--ray ADDRESS`` on a machine of a Ray cluster that offers it
as a resource (``ray start --address=... --resources='{"sm_87": 1}'``). The bundle travels to it and the engine back; the
machine needs this package and its TensorRT, no torch and no shared disk.

A matrix, in which every path is relative to its file::

    out = "bundles"
    images = "photographs"
    precisions = ["int8", "fp16"]            # of every model that has none of its own

    [[models]]
    source = "resnet50"                      # what `edge-backbones build` takes
    options = { out_indices = [1, 2, 3, 4], height = 224, width = 224, batch = { min = 1, opt = 4, max = 8 } }

    [[models]]
    source = "checkpoints/my_convnext"
    options = { gates = { int8 = { min_sqnr_db = 12.0 } } }

    [[devices]]
    profile = "cpu"

    [[devices]]
    profile = "jetson-orin-nano"             # or a .toml file of yours; TensorRT, on a worker that offers sm_87

What is there already is not made again, unless its inputs changed: the contents of source, weights, images and profile, the
options, the libraries, this machine's CPU; not where the files lie. A bundle holds what its latest inputs made: going back
to earlier ones makes it again. An engine that was removed from its bundle, or cut short in it, is made again
(``edge-backbones verify`` reads every byte). Not seen from here: another TensorRT on a worker, and weights that changed on
a hub under their name; take the bundle away to make it again. A cell that fails fails alone. ``matrix.json`` in the output
folder says how every cell ended; the longest cells of the run before start first.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import io
import json
import math
import os
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

import build_scripts
from build_scripts.matrix_cells import NoWorkerError, Run, add_engine, here, order_of
from build_scripts.matrix_tasks import Task, local_resources, read_matrix, tasks_of, words_of
from edge_backbones.bundle.manifest import EngineRecord, encode
from edge_backbones.bundle.reader import Bundle
from edge_backbones.errors import BundleError, EdgeBackbonesError, InputError
from edge_backbones.reading import read_file, refusing

if TYPE_CHECKING:
    pass

_MAX_STATE_BYTES = 64 << 20
_POLL = 3.0  # seconds between two looks at what a cluster offers


class Ending(msgspec.Struct, frozen=True, kw_only=True):
    """How a task ended: ``made``, ``there`` (nothing had changed), ``failed`` or ``waiting`` (for a worker), and why.

    ``seconds``: that it took when it was last made. ``engines``: what it added to the bundle, by name.
    """

    status: str
    seconds: float = 0.0
    why: str = ""
    digest: str = ""
    engines: tuple[str, ...] = ()


# ---- carrying it out ------------------------------------------------------------------------------------------------


async def build_matrix(
    path: Path, *, run: Run, say: Callable[[str], None] = print, resources: Mapping[str, float] | None = None
) -> dict[str, Ending]:
    """Make every cell that is missing or out of date.

    ``run``: carries out a task, and limits how many run at a time. ``resources``: devices that are available.
    """
    matrix = read_matrix(path)
    out = (path.parent / matrix.out).resolve()
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{out} cannot be made: {error.strerror or error}") from error
    state = out / "matrix.json"
    known = _read_state(state)
    earlier = dict(known)
    todo = _longest_first(tasks_of(matrix, path.parent), earlier)
    count = sum(1 + len(engines) for _, engines in todo)
    endings: dict[str, Ending] = {}
    unread: set[str] = set()  # what is known of them stays: their inputs may be back tomorrow

    def store() -> None:
        try:
            _write_state(state, {**known, **{name: found for name, found in endings.items() if name not in unread}})
        except OSError as error:
            say(
                f"{state} cannot be written ({error.strerror or error}): the next run will make again what this one made"
            )

    def end(task: Task, ending: Ending) -> None:
        seconds = ending.seconds or (earlier[task.name].seconds if task.name in earlier else 0.0)
        endings[task.name] = msgspec.structs.replace(ending, digest=task.digest, seconds=seconds)
        store()
        told = {"made": f"{ending.seconds:.1f} s", "there": "nothing changed"}.get(ending.status, ending.why)
        say(f"[{len(endings)}/{count}] {task.name}: {ending.status}, {told}")

    async def one(task: Task, bundle: Path) -> Ending:
        try:
            seconds, engines = await run(task, bundle)
        except NoWorkerError as error:
            return Ending(status="waiting", why=words_of(error))
        except Exception as error:  # whatever it is: the other cells do not suffer from it
            return Ending(status="failed", why=words_of(error))
        return Ending(status="made", seconds=seconds, engines=engines)

    async def cell(task: Task, bundle: Path, built_on_it: Sequence[Task] = ()) -> None:
        before = known.get(task.name)
        done = before is not None and before.status in ("made", "there") and before.digest == task.digest
        if task.why:
            unread.update(one.name for one in (task, *built_on_it))
            end(task, Ending(status="failed", why=task.why))
        elif before is not None and done and _holds(bundle, before.engines):
            end(task, msgspec.structs.replace(before, status="there"))
        elif task.resource is not None and not (resources or {}).get(task.resource):
            end(task, Ending(status="waiting", why=f"no worker offers {task.resource}"))
        else:
            for outdated in (task, *built_on_it):  # before it begins: who is killed meanwhile says nothing of them
                known.pop(outdated.name, None)
            store()
            end(task, await one(task, bundle))

    async def row(build: Task, engines: Sequence[Task]) -> None:
        bundle = out / f"{build.model}.{build.precision}.bundle"
        await cell(build, bundle, engines)
        if endings[build.name].status == "failed":
            for engine in engines:
                end(engine, Ending(status="failed", why="its bundle was not built"))
        else:
            await asyncio.gather(*(cell(engine, bundle) for engine in engines))

    await asyncio.gather(*(row(build, engines) for build, engines in todo))
    return endings


def _longest_first(
    todo: Sequence[tuple[Task, list[Task]]], earlier: Mapping[str, Ending]
) -> list[tuple[Task, list[Task]]]:
    """Sort tasks by the time they took last, longest first, so that no long cell starts when the others are done.

    Tasks without a time come first, and among them calibrated precisions, which take longer.
    """

    def seconds(task: Task) -> float:
        return earlier[task.name].seconds if task.name in earlier else 0.0

    def length(row: tuple[Task, list[Task]]) -> tuple[float, bool]:
        build, engines = row
        known = (seconds(build) or math.inf) + sum(seconds(engine) for engine in engines)
        return known, build.precision.is_calibrated

    rows = [(build, sorted(engines, key=seconds, reverse=True)) for build, engines in todo]
    return sorted(rows, key=length, reverse=True)


def _holds(bundle: Path, engines: Sequence[str]) -> bool:
    """Return whether a bundle is there with these engines, and every file has the right size."""
    try:
        manifest = Bundle.open(bundle).manifest
        found = {engine.name: engine for engine in manifest.engines}
        files = msgspec.structs.replace(manifest, engines=tuple(found[name] for name in engines)).files()
        return all((bundle / file.path).stat().st_size == file.size for file in files)
    except (BundleError, KeyError, OSError):
        return False


def _read_state(path: Path) -> dict[str, Ending]:
    try:
        data = read_file(path, limit=_MAX_STATE_BYTES)
        with refusing(InputError):
            return msgspec.json.decode(data, type=dict[str, Ending])
    except (OSError, InputError):
        return {}


def _write_state(path: Path, endings: Mapping[str, Ending]) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_bytes(msgspec.json.format(msgspec.json.encode(endings), indent=1) + b"\n")
        temporary.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# ---- a Ray cluster --------------------------------------------------------------------------------------------------


def on_ray(address: str, elsewhere: Run) -> tuple[Run, dict[str, float]]:
    """Return how to run a task on a device of a Ray cluster, and its devices; other tasks run ``elsewhere``."""
    try:
        import ray
    except ImportError as error:
        raise InputError("--ray needs Ray: pip install 'edge-backbones[fleet]'") from error
    try:
        ray.init(address=address, log_to_driver=False)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise InputError(f"no Ray cluster at {address}: {' '.join(str(error).split())[:200]}") from error
    # Workers have the package, not these scripts.
    ray.cloudpickle.register_pickle_by_value(build_scripts)
    # A process of its own for every cell, as here; what crashed once would crash again.
    remote = ray.remote(max_calls=1, max_retries=0)(_on_worker)

    async def answer_of(resource: str, *arguments: Any) -> tuple[float, list[tuple[bytes, dict[str, bytes]]]]:
        asked = remote.options(num_cpus=0, resources={resource: 1}).remote(*arguments)
        answer = asyncio.wrap_future(asked.future())
        try:
            # Ray itself waits for ever for a worker that is gone: another one could join.
            while not (await asyncio.wait({answer}, timeout=_POLL))[0]:
                if not ray.cluster_resources().get(resource):
                    raise NoWorkerError(f"no worker offers {resource} any more")
            return answer.result()
        except ray.exceptions.RayTaskError as error:
            cause = error.cause if isinstance(error.cause, EdgeBackbonesError) else error
            raise EdgeBackbonesError(str(cause).strip().splitlines()[-1]) from error
        except ray.exceptions.RayError as error:
            raise EdgeBackbonesError(f"the worker died: {' '.join(str(error).split())[:200]}") from error
        finally:
            if not answer.done():
                answer.cancel()
                ray.cancel(asked, force=True)

    async def run(task: Task, bundle: Path) -> tuple[float, tuple[str, ...]]:
        if task.resource is None:
            return await elsewhere(task, bundle)
        order, profile = order_of(task), str(task.profile)
        text = Path(profile).read_text(encoding="utf-8") if profile.endswith(".toml") else None
        seconds, made = await answer_of(task.resource, order, await asyncio.to_thread(pack, bundle), text)
        records = []
        for encoded, contents in made:
            records.append(msgspec.json.decode(encoded, type=EngineRecord))
            await asyncio.to_thread(Bundle.open(bundle).add_engine, records[-1], contents)
        return seconds, tuple(record.name for record in records)

    return run, dict(ray.cluster_resources())


def _on_worker(
    order: dict[str, Any], packed: bytes, profile: str | None
) -> tuple[float, list[tuple[bytes, dict[str, bytes]]]]:
    """Compile on a worker: return the seconds, and the records and files of the engines.

    ``profile``: the text of a profile that is a file.
    """
    # Older releases of Ray hide every GPU from a task that asks for none of their resource "GPU". Here the device is a
    # resource of its own, and the first look at CUDA decides what this process sees.
    if os.environ.get("CUDA_VISIBLE_DEVICES") == "":
        del os.environ["CUDA_VISIBLE_DEVICES"]
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as work:
        if profile is not None:
            order = {**order, "profile": str(Path(work) / Path(order["profile"]).name)}
            Path(order["profile"]).write_text(profile, encoding="utf-8")
        bundle = Path(work) / "cell.bundle"
        bundle.mkdir()
        unpack(packed, bundle)
        try:
            names = add_engine(bundle, **order)
        except Exception as error:  # in words: not every error can be unpickled on the other side
            raise EdgeBackbonesError(words_of(error)) from None
        opened = Bundle.open(bundle)
        made = [engine for engine in opened.manifest.engines if engine.name in names]
        sent = [(msgspec.json.encode(e), {file.path: bytes(opened.read(file)) for file in e.files}) for e in made]
        return time.monotonic() - begin, sent


def pack(bundle: Path) -> bytes:
    """Return a bundle without the engines of other devices, which may change meanwhile."""
    opened = Bundle.open(bundle)
    manifest = msgspec.structs.replace(opened.manifest, engines=())
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("manifest.json", encode(manifest))
        for file in manifest.files():
            archive.writestr(file.path, bytes(opened.read(file)))
    return stream.getvalue()


def unpack(packed: bytes, folder: Path) -> None:
    with zipfile.ZipFile(io.BytesIO(packed)) as archive:
        archive.extractall(folder)


# ---- the command line -----------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("matrix", type=Path, help="the TOML file")
    parser.add_argument("--jobs", type=int, default=cores(), help="cells at a time (default: one per core)")
    parser.add_argument("--ray", metavar="ADDRESS", help="a Ray cluster with the devices: its address, or 'auto'")
    parser.add_argument("--json", action="store_true", help="print how every cell ended, and nothing else")
    given = parser.parse_args(arguments)
    if given.jobs < 1:
        parser.error("--jobs must be at least 1")

    def say(text: str) -> None:
        if not given.json:
            print(text, flush=True)

    try:
        os.environ["OMP_NUM_THREADS"] = str(max(1, cores() // given.jobs))  # of a cell: they share the cores
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


def show(endings: Mapping[str, Ending]) -> None:
    """Print a row per bundle and a column per device."""
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
    sys.exit(main())
