"""Models x precisions x devices: what is made, what is left alone, what fails alone, here and on a Ray cluster."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import numpy as np
import pytest
from PIL import Image

from build_scripts import build_matrix as module
from build_scripts.build_matrix import Ending, Task, build_matrix, read_matrix, tasks_of
from edge_backbones import Bundle, EdgeBackbone
from edge_backbones.errors import EdgeBackbonesError, InputError
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


@pytest.fixture
def folder(tmp_path, photographs) -> Path:
    (tmp_path / "photographs").mkdir()
    for index in range(10):
        crop = np.ascontiguousarray(photographs[index % 3][index * 8 : index * 8 + 80, 20:140])
        Image.fromarray(crop).save(tmp_path / "photographs" / f"{index}.png")
    return tmp_path


def write(folder: Path, *, more: str = "", device: str = "") -> Path:
    path = folder / "matrix.toml"
    path.write_text(MATRIX.format(more=more, device=device))
    return path


def carry_out(path: Path, run, **resources: float) -> tuple[dict[str, Ending], list[str]]:
    said: list[str] = []
    endings = asyncio.run(build_matrix(path, run=run, say=said.append, resources=resources))
    return endings, said


class Pretender:
    """Makes a bundle at once; remembers what it was asked for, and fails where it is told to."""

    def __init__(self, *failing: str) -> None:
        self.failing, self.asked = failing, list[str]()

    async def __call__(self, task: Task, bundle: Path) -> float:
        self.asked.append(task.name)
        await asyncio.sleep(0.01)
        if task.name in self.failing:
            raise EdgeBackbonesError("made to\nfail")
        if task.flavour is None:
            shutil.rmtree(bundle, ignore_errors=True)
            make_bundle(bundle)
        return 0.5


ALL = {
    "test_resnet.fp32", "test_resnet.int8", "test_efficientnet.fp32", "test_resnet.fp32 on rtx-40",
    "test_resnet.int8 on rtx-40", "test_efficientnet.fp32 on rtx-40",
}  # fmt: skip


def test_everything_is_made_once_and_only_what_changed_again(folder):
    path, first, second = write(folder), Pretender(), Pretender()
    endings, said = carry_out(path, first)
    assert set(first.asked) == set(endings) == ALL
    assert {ending.status for ending in endings.values()} == {"made"}
    assert len(said) == len(ALL)
    assert said[-1].startswith("[6/6] ")
    endings, _ = carry_out(path, second)
    assert second.asked == []
    assert {ending.status for ending in endings.values()} == {"there"}
    changed = Pretender()
    carry_out(write(folder, more=", out_indices = [1]"), changed)
    assert set(changed.asked) == {"test_efficientnet.fp32", "test_efficientnet.fp32 on rtx-40"}
    (folder / "photographs" / "0.png").write_bytes((folder / "photographs" / "1.png").read_bytes())
    again = Pretender()
    carry_out(write(folder, more=", out_indices = [1]"), again)
    assert set(again.asked) == ALL


def test_a_bundle_that_is_gone_is_made_again(folder):
    path = write(folder)
    carry_out(path, Pretender())
    (folder / "bundles" / "test_resnet.int8.bundle" / "manifest.json").write_text("damaged")
    again = Pretender()
    carry_out(path, again)
    assert again.asked == ["test_resnet.int8", "test_resnet.int8 on rtx-40"]


def test_what_fails_fails_alone_and_is_tried_again(folder):
    path = write(folder)
    endings, _ = carry_out(path, Pretender("test_resnet.int8", "test_efficientnet.fp32 on rtx-40"))
    assert endings["test_resnet.int8"].why == "made to fail"
    assert endings["test_resnet.int8 on rtx-40"].why == "its bundle was not built"
    assert {name for name, ending in endings.items() if ending.status == "made"} == {
        "test_resnet.fp32", "test_resnet.fp32 on rtx-40", "test_efficientnet.fp32",
    }  # fmt: skip
    again = Pretender()
    endings, _ = carry_out(path, again)
    assert set(again.asked) == {"test_resnet.int8", "test_resnet.int8 on rtx-40", "test_efficientnet.fp32 on rtx-40"}
    stored = json.loads((folder / "bundles" / "matrix.json").read_text())
    assert {ending["status"] for ending in stored.values()} == {"made", "there"}


def test_an_engine_that_no_worker_can_make_waits(folder):
    path = write(folder, device='\n[[devices]]\nprofile = "jetson-orin-nano"\n')
    run = Pretender()
    endings, _ = carry_out(path, run)
    waiting = endings["test_resnet.fp32 on jetson-orin-nano"]
    assert (waiting.status, waiting.why) == ("waiting", "no worker offers sm_87")
    later = Pretender()
    endings, _ = carry_out(path, later, sm_87=1.0)
    assert set(later.asked) == {name for name in endings if name.endswith("jetson-orin-nano")}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("out = 3", r"matrix.toml is not a build matrix: .*out"),
        ('out = "x"\nmodels = []\ndevices = []', "there are no models"),
        ('out = "x"\ncolour = 1\nmodels = []\ndevices = []', "unknown field `colour`"),
        (
            'out = "x"\ndevices = [{profile = "cpu"}]\nmodels = [{source = "a"}, {source = "a"}]',
            "two models are named a",
        ),
        (
            'out = "x"\ndevices = [{profile = "cpu"}]\nmodels = [{source = "a", options = {hight = 3}}]',
            "'hight'.* there are",
        ),
        (
            'out = "x"\ndevices = [{profile = "cpu"}]\nmodels = [{source = "a", name = "../b"}]',
            "cannot be part of a file name",
        ),
    ],
)
def test_a_matrix_that_is_none_is_refused(tmp_path, text, message):
    path = tmp_path / "matrix.toml"
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        read_matrix(path)
    with pytest.raises(InputError, match="cannot be read"):
        read_matrix(tmp_path / "nothing.toml")


def test_missing_photographs_are_named(tmp_path):
    path = write(tmp_path)
    with pytest.raises(InputError, match="photographs does not exist"):
        tasks_of(read_matrix(path), tmp_path)


def test_bundles_survive_the_way_to_a_worker(tmp_path):
    bundle = make_bundle(tmp_path / "net.bundle")
    (tmp_path / "copy").mkdir()
    module.unpack(module.pack(bundle.path), tmp_path / "copy")
    Bundle.open(tmp_path / "copy").check_files()


def command(path: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "build_scripts.build_matrix", str(path), "--jobs", "2", "--json", *more]


def test_a_small_matrix_here(folder):
    """Real builds in processes; one model has a stage too many. The second run has nothing to do."""
    path = write(folder, more=", out_indices = [9]")
    done = subprocess.run(command(path), cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    endings = json.loads(done.stdout)
    assert endings["test_efficientnet.fp32"]["status"] == "failed"
    assert "9" in endings["test_efficientnet.fp32"]["why"]
    bundle = Bundle.open(folder / "bundles" / "test_resnet.int8.bundle")
    bundle.check_files()
    assert [engine.key.flavour for engine in bundle.manifest.engines] == ["openvino", "tensorrt_rtx"]
    write(folder, more=", out_indices = [1]")
    assert subprocess.run(command(path), cwd=ROOT, check=False, stdout=subprocess.DEVNULL).returncode == 0
    begin = time.monotonic()
    again = subprocess.run(command(path), cwd=ROOT, capture_output=True, text=True, check=True)
    assert {ending["status"] for ending in json.loads(again.stdout).values()} == {"there"}
    assert time.monotonic() - begin < 60  # not a measurement: a build would take longer than all of this


def test_a_cell_that_is_killed_is_told(monkeypatch, tmp_path):
    monkeypatch.setattr(module.sys, "executable", str(tmp_path / "killed"))
    (tmp_path / "killed").write_text("#!/bin/sh\nkill -9 $$\n")
    (tmp_path / "killed").chmod(0o755)
    task = Task(model="m", precision="fp32")
    with pytest.raises(EdgeBackbonesError, match="died of signal 9"):
        asyncio.run(module.run_child(task, tmp_path / "x.bundle"))


def test_no_more_processes_than_jobs_run_at_a_time(monkeypatch, tmp_path):
    running, seen = 0, []

    async def pretend(*_):
        nonlocal running
        running += 1
        seen.append(running)
        await asyncio.sleep(0.02)
        running -= 1

    async def six() -> None:
        run = module.here(2)
        await asyncio.gather(*(run(Task(model=str(i), precision="fp32"), tmp_path) for i in range(6)))

    monkeypatch.setattr(module, "run_child", pretend)
    asyncio.run(six())
    assert len(seen) == 6
    assert max(seen) == 2


@pytest.fixture
def cluster(tmp_path):
    """Two machines that are none: one with a device that is made up."""
    ray = [sys.executable, "-m", "ray.scripts.scripts"]
    quiet = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0", "RAY_DISABLE_IMPORT_WARNING": "1"}
    start = [*ray, "start", "--head", "--port=0", "--num-cpus=2", "--include-dashboard=false", "--disable-usage-stats"]
    resources = json.dumps({"sm_87": 1})
    done = subprocess.run([*start, f"--resources={resources}"], capture_output=True, text=True, env=quiet, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    yield quiet
    subprocess.run([*ray, "stop", "--force"], capture_output=True, env=quiet, check=False)


def test_a_small_matrix_on_a_ray_cluster(folder, cluster):
    """The device's engine is made where the device is: here an engine for its CPU."""
    device = '\n[[devices]]\nname = "orin"\nprofile = "cpu"\nflavour = "openvino"\nresource = "sm_87"\n'
    device += '\n[[devices]]\nname = "thor"\nprofile = "cpu"\nflavour = "openvino"\nresource = "sm_110"\n'
    path = write(folder, more=", out_indices = [9]", device=device)
    done = subprocess.run(
        command(path, "--ray", "auto"), cwd=ROOT, capture_output=True, text=True, env=cluster, check=False
    )
    assert done.returncode == 1, done.stderr[-3000:]
    endings = msgspec.json.decode(done.stdout.strip().splitlines()[-1], type=dict[str, Ending])
    assert endings["test_resnet.int8 on orin"].status == "made", endings
    assert endings["test_resnet.int8 on thor"].why == "no worker offers sm_110"
    assert endings["test_efficientnet.fp32"].status == "failed"
    assert "9" in endings["test_efficientnet.fp32"].why
    bundle = folder / "bundles" / "test_resnet.int8.bundle"
    Bundle.open(bundle).check_files()
    with EdgeBackbone.from_pretrained(bundle) as backbone:
        assert backbone(np.zeros((1, 3, 32, 64), np.float32)).feature_maps
