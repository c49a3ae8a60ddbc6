"""Carry out the tasks of a build matrix on machines of a Ray cluster. They have the package, and not these scripts."""

from __future__ import annotations

import asyncio
import io
import os
import tempfile
import time
import zipfile
from pathlib import Path
from typing import Any

import msgspec

import build_scripts
from build_scripts.matrix_cells import NoWorkerError, Run, add_engine, order_of
from build_scripts.matrix_tasks import Task, words_of
from edge_backbones.bundle.manifest import EngineRecord, encode
from edge_backbones.bundle.reader import Bundle
from edge_backbones.errors import EdgeBackbonesError, InputError

_POLL = 3.0  # seconds between two looks at what a cluster offers


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
