"""A small build matrix, the profile of a device in it, and a pretender that carries out its tasks at once."""

from __future__ import annotations

import asyncio
import shutil
import sys
from pathlib import Path

import msgspec

from build_scripts.build_matrix import Ending, build_matrix
from build_scripts.matrix_tasks import Task
from edge_backbones import Bundle
from edge_backbones.bundle.manifest import EngineRecord
from edge_backbones.bundle.writer import record_bytes
from edge_backbones.testing import make_bundle

ROOT = Path(__file__).parents[2]
MATRIX = """
out = "bundles"
images = "photographs"
precisions = ["fp32", "int8"]

[[models]]
source = "test_resnet"
options = {{ weights = "random:0", height = 32, width = 64, golden = 2 }}

[[models]]
source = "test_efficientnet"
precisions = ["fp32"]
options = {{ weights = "random:0", height = 32, width = 64, golden = 2{more} }}

[[devices]]
profile = "cpu"

[[devices]]
profile = "rtx-40"
{device}
"""


def write(folder: Path, *, more: str = "", device: str = "") -> Path:
    path = folder / "matrix.toml"
    path.write_text(MATRIX.format(more=more, device=device))
    return path


def carry_out(path: Path, run, **resources: float) -> tuple[dict[str, Ending], list[str]]:
    said: list[str] = []
    endings = asyncio.run(build_matrix(path, run=run, say=said.append, resources=resources))
    return endings, said


class Pretender:
    """Makes a bundle, or adds an engine to it, at once; remembers what it was asked for, and raises where it is told to."""

    def __init__(
        self, failing: dict[str, BaseException] | None = None, seconds: dict[str, float] | None = None
    ) -> None:
        self.failing, self.seconds, self.asked = failing or {}, seconds or {}, list[str]()

    async def __call__(self, task: Task, bundle: Path) -> tuple[float, tuple[str, ...]]:
        self.asked.append(task.name)
        await asyncio.sleep(0.01)
        if task.name in self.failing:
            raise self.failing[task.name]
        if task.flavour is None:
            shutil.rmtree(bundle, ignore_errors=True)
            make_bundle(bundle)
            made = Bundle.open(bundle).manifest.engines
        else:
            made = (engine_for(task.device or "", bundle),)
        return self.seconds.get(task.name, 0.5), tuple(engine.name for engine in made)


def engine_for(device: str, bundle: Path) -> EngineRecord:
    """Add an engine that no other device has."""
    opened, data = Bundle.open(bundle), device.encode()
    own = opened.manifest.engines[0]
    key = msgspec.structs.replace(own.key, device_name=device)
    path = key.path(data, ".blob")
    record = EngineRecord(key=key, file=record_bytes(path, data), parity=own.parity)
    opened.add_engine(record, {path: data})
    return record


ALL = {
    "test_resnet.fp32", "test_resnet.int8", "test_efficientnet.fp32", "test_resnet.fp32 on rtx-40",
    "test_resnet.int8 on rtx-40", "test_efficientnet.fp32 on rtx-40",
}  # fmt: skip


def profile_file(path: Path) -> str:
    """A profile like rtx-40, of a name of its own."""
    text = (ROOT / "profiles" / "rtx-40.toml").read_text().replace('name = "rtx-40"', f'name = "{path.stem}"', 1)
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    return text


def command(path: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "build_scripts.build_matrix", str(path), "--jobs", "2", "--json", *more]
