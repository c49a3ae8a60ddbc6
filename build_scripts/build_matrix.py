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
import json
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import msgspec

from build_scripts.matrix_cells import NoWorkerError, Run, here
from build_scripts.matrix_ray import on_ray
from build_scripts.matrix_tasks import Task, local_resources, read_matrix, tasks_of, words_of
from edge_backbones import cpus
from edge_backbones.bundle.reader import Bundle
from edge_backbones.errors import BundleError, EdgeBackbonesError, InputError
from edge_backbones.reading import read_file, refusing

_MAX_STATE_BYTES = 64 << 20


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


# ---- the command line -----------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("matrix", type=Path, help="the TOML file")
    parser.add_argument(
        "--jobs",
        type=int,
        default=cpus.usable(),
        help="cells at a time (default: one per CPU that this process may use)",
    )
    parser.add_argument("--ray", metavar="ADDRESS", help="a Ray cluster with the devices: its address, or 'auto'")
    parser.add_argument("--json", action="store_true", help="print how every cell ended, and nothing else")
    given = parser.parse_args(arguments)
    if given.jobs < 1:
        parser.error("--jobs must be at least 1")

    def say(text: str) -> None:
        if not given.json:
            print(text, flush=True)

    try:
        os.environ["OMP_NUM_THREADS"] = str(max(1, cpus.usable() // given.jobs))  # of a cell: they share the cores
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
