"""Carry out the tasks of a build matrix on this machine, each in a process of its own."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from build_scripts.matrix_tasks import Task, words_of
from edge_backbones.errors import EdgeBackbonesError, InputError
from edge_backbones.parity_report import Gate
from edge_backbones.reading import refusing, shortened
from edge_backbones.spec import Precision, ShapeRange

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

    from edge_backbones.toolchain.options import BuildOptions


_STRUCTURED = {  # options that are no plain values
    "gates": dict[Precision, Gate],
    "batch": int | ShapeRange,
    "height": int | ShapeRange,
    "width": int | ShapeRange,
}
# Cells are forked from a server that has imported what takes seconds and starts no thread (OpenVINO and ONNX Runtime do).
_PRELOADED = ["edge_backbones.toolchain.build", "timm", "onnxscript"]
_PROCESSES: Any = multiprocessing.get_context("spawn" if sys.platform == "win32" else "forkserver")
_PROCESSES.set_forkserver_preload(_PRELOADED)


class NoWorkerError(EdgeBackbonesError):
    """No machine of the cluster offers what a task needs."""


Run = Callable[[Task, Path], Awaitable[tuple[float, tuple[str, ...]]]]
"""Carry out a task on a bundle, when there is room; returns the seconds that it took and the names of its engines. What it
raises is the end of that task; NoWorkerError leaves it waiting."""


def carry_out(task: Task, bundle: Path) -> tuple[str, ...]:
    """Build the bundle or add the engine; return the names of the engines that this put into it."""
    if task.flavour is not None:
        return add_engine(bundle, **order_of(task))
    from edge_backbones.toolchain.build import build_bundle

    options = build_options(task)
    built = build_bundle(task.source, bundle, images=task.images, options=options, overwrite=True)
    return tuple(engine.name for engine in built.bundle.manifest.engines)


def build_options(task: Task) -> BuildOptions:
    """Return the BuildOptions of a model. Raises InputError that names the option."""
    from edge_backbones.toolchain.options import OF_CALIBRATED, BuildOptions

    elsewhere = () if task.precision.is_calibrated else OF_CALIBRATED  # what the cells beside this one are told
    options = {name: value for name, value in task.options.items() if name not in elsewhere}
    given: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in options.items()}
    for name in given.keys() & _STRUCTURED.keys():
        with refusing(lambda why, name=name: InputError(f"option {name}: {why}")):  # type: ignore[misc]
            given[name] = msgspec.convert(given[name], _STRUCTURED[name])
    with refusing(
        lambda why: InputError(f"the options of {shortened(task.model, 80)} are not those of a build: {why}")
    ):
        return BuildOptions(**{"torchscript": False, **given, "precisions": (task.precision,)})


def order_of(task: Task) -> dict[str, Any]:
    """Return what a device needs to know to make an engine, as plain values."""
    return {
        "precision": task.precision.value,
        "flavour": task.flavour,
        "profile": task.profile,
        "targets": task.targets,
    }


def add_engine(
    bundle: Path, *, precision: str, flavour: Any, profile: str, targets: tuple[str, ...]
) -> tuple[str, ...]:
    from edge_backbones.deploy.compile import compile_bundle
    from edge_backbones.engines.tensorrt.options import PlanOptions

    plan = PlanOptions(targets=targets)
    result = compile_bundle(bundle, precisions=(Precision(precision),), flavour=flavour, profile=profile, plan=plan)
    return tuple(engine.name for engine in result.engines)


def here(jobs: int) -> Run:
    """Return a function that runs tasks here, several at a time; on a GPU one at a time, because engines are timed."""
    free, threads = asyncio.Semaphore(jobs), ThreadPoolExecutor(jobs)
    devices: dict[str, asyncio.Lock] = collections.defaultdict(asyncio.Lock)

    async def run(task: Task, bundle: Path) -> tuple[float, tuple[str, ...]]:
        device = contextlib.nullcontext() if task.resource is None else devices[task.resource]
        async with device, free:  # the device first: who waits for it leaves the place to others
            begin = time.monotonic()
            engines = await run_child(task, bundle, threads)
            return time.monotonic() - begin, engines

    return run


async def run_child(task: Task, bundle: Path, threads: ThreadPoolExecutor) -> tuple[str, ...]:
    """Run a task in a process of its own, so that a cell that crashes or is killed harms no other."""
    receiver, sender = _PROCESSES.Pipe(duplex=False)
    with receiver:
        with sender:  # the process has its own: what it leaves unsaid ends the reading
            process = _PROCESSES.Process(target=child, args=(msgspec.json.encode(task), str(bundle), sender))
            try:
                process.start()
            except (EOFError, BrokenPipeError) as error:
                tried = ", ".join(_PRELOADED)
                raise EdgeBackbonesError(f"no cell can start: python -c 'import {tried}' tells why") from error
        try:
            engines, why = await asyncio.get_running_loop().run_in_executor(threads, _outcome, process, receiver)
        except BaseException:
            process.kill()
            process.join()
            raise
    if why:
        raise EdgeBackbonesError(why)
    return engines


def _outcome(process: Any, receiver: Connection) -> tuple[tuple[str, ...], str]:
    """Return what a cell sent before its process ended: the names of its engines, or why there are none."""
    try:
        engines, why = receiver.recv()
    except (EOFError, OSError):
        process.join()
        code = process.exitcode or 0
        return (), f"died of signal {-code}" if code < 0 else f"exit code {code}"
    process.join()
    return tuple(engines), why


def child(text: bytes, bundle: str, sender: Connection) -> None:
    """Carry out a task, and send the names of its engines or the reason of the failure. Library output is dropped."""
    threading.Thread(target=_end_with_the_matrix, daemon=True).start()
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in range(3):
        os.dup2(nowhere, stream)
    try:
        sender.send((carry_out(msgspec.json.decode(text, type=Task), Path(bundle)), ""))
    except Exception as error:
        sender.send(((), words_of(error)))


def _end_with_the_matrix() -> None:
    """Make this process end when the matrix is killed, so that no cell goes on writing."""
    matrix = multiprocessing.parent_process()
    if matrix is not None:
        matrix.join()
        os._exit(1)
