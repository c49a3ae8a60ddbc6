"""Models x precisions x devices: what is made, what is left alone, what fails alone, here and on a Ray cluster."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import json
import multiprocessing
import os
import pickle
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import msgspec
import numpy as np
import psutil
import pytest
from PIL import Image

from build_scripts import build_matrix as module
from build_scripts import matrix_cells, matrix_ray, matrix_tasks
from build_scripts.build_matrix import Ending, build_matrix
from build_scripts.matrix_tasks import Task, read_matrix, tasks_of
from edge_backbones import Bundle, EdgeBackbone
from edge_backbones.bundle.manifest import EngineRecord
from edge_backbones.bundle.writer import record_bytes
from edge_backbones.errors import EdgeBackbonesError, InputError, MissingDependencyError
from edge_backbones.machine.profiles import load_profile
from edge_backbones.parity_report import Gate
from edge_backbones.spec import Precision, ShapeRange
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


def test_an_engine_that_is_removed_or_damaged_is_made_again(folder):
    path = write(folder)
    endings, _ = carry_out(path, Pretender())
    bundles = {
        row: Bundle.open(folder / "bundles" / f"{row}.bundle") for row in ("test_resnet.fp32", "test_resnet.int8")
    }
    bundles["test_resnet.fp32"].remove_engine(*endings["test_resnet.fp32 on rtx-40"].engines)
    damaged = bundles["test_resnet.int8"].manifest.engines[1].file.path
    (bundles["test_resnet.int8"].path / damaged).write_bytes(b"half")
    again = Pretender()
    endings, _ = carry_out(path, again)
    assert set(again.asked) == {"test_resnet.fp32 on rtx-40", "test_resnet.int8 on rtx-40"}
    for row in bundles:
        bundle = Bundle.open(folder / "bundles" / f"{row}.bundle")
        bundle.check_files()
        assert [engine.key.device_name for engine in bundle.manifest.engines][1:] == ["rtx-40"]
    carry_out(path, nothing := Pretender())
    assert nothing.asked == []


def test_the_own_engine_of_a_bundle_counts_too(folder):
    path = write(folder)
    endings, _ = carry_out(path, Pretender())
    Bundle.open(folder / "bundles" / "test_resnet.fp32.bundle").remove_engine(*endings["test_resnet.fp32"].engines)
    carry_out(path, again := Pretender())
    assert again.asked == ["test_resnet.fp32", "test_resnet.fp32 on rtx-40"]


def test_a_kill_between_a_bundle_and_its_engine_loses_no_engine(folder):
    """The engine that the bundle had before says nothing of the new bundle."""
    path, engine = write(folder), "test_resnet.int8 on rtx-40"
    carry_out(path, Pretender())
    shutil.rmtree(folder / "bundles" / "test_resnet.int8.bundle")
    with pytest.raises(KeyboardInterrupt):
        carry_out(path, Pretender({engine: KeyboardInterrupt()}))
    stored = json.loads((folder / "bundles" / "matrix.json").read_text())
    assert stored["test_resnet.int8"]["status"] == "made"
    assert engine not in stored
    carry_out(path, again := Pretender())
    assert again.asked == [engine]


@pytest.mark.parametrize("killed", ["test_resnet.fp32", "test_resnet.fp32 on rtx-40"])
def test_what_is_begun_is_in_no_state(folder, killed):
    """With one bundle in the matrix: no other cell that ends writes the state meanwhile."""
    path = write(folder)
    text = path.read_text().replace('"fp32", "int8"', '"fp32"')
    path.write_text(text[: text.rindex("[[models]]")] + text[text.index("[[devices]]") :])
    endings, _ = carry_out(path, Pretender())
    assert set(endings) == {"test_resnet.fp32", "test_resnet.fp32 on rtx-40"}
    Bundle.open(folder / "bundles" / "test_resnet.fp32.bundle").remove_engine(*endings[killed].engines)
    with pytest.raises(KeyboardInterrupt):
        carry_out(path, Pretender({killed: KeyboardInterrupt()}))
    stored = json.loads((folder / "bundles" / "matrix.json").read_text())
    assert not {killed, "test_resnet.fp32 on rtx-40"} & set(stored)


def test_a_folder_may_move(folder):
    path = write(folder, device='\n[[devices]]\nprofile = "cards/mine.toml"\n')
    profile_file(folder / "cards" / "mine.toml")
    (folder / "weights.pt").write_bytes(b"weights")
    path.write_text(path.read_text().replace('"random:0"', '"weights.pt"'))
    carry_out(path, first := Pretender())
    assert len(first.asked) == 9
    moved = folder.with_name(f"{folder.name}-moved")
    folder.rename(moved)
    moved_path = moved / path.name
    carry_out(moved_path, second := Pretender())
    assert second.asked == []
    (moved / "weights.pt").write_bytes(b"trained")
    carry_out(moved_path, third := Pretender())
    assert set(third.asked) == set(first.asked)


def test_an_edited_profile_makes_its_engines_again(folder):
    """And a comment in it does not: what it says counts."""
    path = write(folder, device='\n[[devices]]\nprofile = "cards/mine.toml"\n')
    text = profile_file(folder / "cards" / "mine.toml")
    carry_out(path, Pretender())
    (folder / "cards" / "mine.toml").write_text(text + "\n# it is blue\n")
    carry_out(path, same := Pretender())
    assert same.asked == []
    (folder / "cards" / "mine.toml").write_text(
        text.replace("workspace_bytes = 1_073_741_824", "workspace_bytes = 4096")
    )
    carry_out(path, edited := Pretender())
    assert set(edited.asked) == {name.replace("rtx-40", "mine") for name in ALL if "rtx-40" in name}


def profile_file(path: Path) -> str:
    """A profile like rtx-40, of a name of its own."""
    text = (ROOT / "profiles" / "rtx-40.toml").read_text().replace('name = "rtx-40"', f'name = "{path.stem}"', 1)
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    return text


def test_another_library_makes_again_what_it_made(folder, monkeypatch):
    path = write(folder)
    carry_out(path, Pretender())
    monkeypatch.setattr(matrix_tasks.registry, "InstalledVersions", lambda: {"tensorrt_rtx": "99.1"})
    carry_out(path, engines := Pretender())
    assert set(engines.asked) == {name for name in ALL if "rtx-40" in name}
    monkeypatch.setattr(matrix_tasks, "_versions", lambda: {"onnxruntime": "99.1"})
    carry_out(path, everything := Pretender())
    assert set(everything.asked) == ALL


def test_what_decides_the_ranges_is_among_the_versions():
    assert {"onnxruntime", "numpy", "torch"} <= set(matrix_tasks._versions())


def test_what_fails_fails_alone_and_is_tried_again(folder):
    """A refusal, a full disk, no memory, a damaged record: whatever it is."""
    path = write(folder)
    failing = {
        "test_resnet.int8": EdgeBackbonesError("made to\nfail"),
        "test_efficientnet.fp32 on rtx-40": OSError(28, "No space left on device"),
        "test_resnet.fp32 on rtx-40": MemoryError(),
    }
    endings, said = carry_out(path, Pretender(failing))
    assert endings["test_resnet.int8"].why == r"made to\nfail"
    assert endings["test_resnet.int8 on rtx-40"].why == "its bundle was not built"
    assert endings["test_efficientnet.fp32 on rtx-40"].why == "OSError: [Errno 28] No space left on device"
    assert endings["test_resnet.fp32 on rtx-40"].why == "MemoryError"
    assert len(said) == len(ALL)
    assert {name for name, ending in endings.items() if ending.status == "made"} == {
        "test_resnet.fp32", "test_efficientnet.fp32",
    }  # fmt: skip
    again = Pretender()
    endings, _ = carry_out(path, again)
    assert set(again.asked) == ALL - {"test_resnet.fp32", "test_efficientnet.fp32"}
    stored = json.loads((folder / "bundles" / "matrix.json").read_text())
    assert {ending["status"] for ending in stored.values()} == {"made", "there"}


def test_a_state_that_cannot_be_written_stops_no_cell(folder):
    path = write(folder)
    (folder / "bundles" / "matrix.json").mkdir(parents=True)
    endings, said = carry_out(path, Pretender())
    assert {ending.status for ending in endings.values()} == {"made"}
    assert any("matrix.json cannot be written (Is a directory): the next run will make again" in line for line in said)
    assert not list((folder / "bundles").glob(".matrix.json*"))


def test_a_process_that_cannot_be_started_fails_alone(folder, monkeypatch):
    path = write(folder)

    def refused(**_):
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(matrix_cells._PROCESSES, "Process", refused)
    endings, _ = carry_out(path, matrix_cells.here(2))
    assert {ending.status for ending in endings.values()} == {"failed"}
    assert endings["test_resnet.fp32"].why == "BlockingIOError: [Errno 11] Resource temporarily unavailable"


def test_the_longest_cells_start_first(folder):
    path = write(folder)
    carry_out(path, first := Pretender(seconds={"test_resnet.fp32": 9.0, "test_efficientnet.fp32": 3.0}))
    assert first.asked[0] == "test_resnet.int8"  # of those that were never timed: calibration takes longer
    (folder / "photographs" / "0.png").write_bytes((folder / "photographs" / "1.png").read_bytes())
    carry_out(path, second := Pretender())
    assert [name for name in second.asked if " on " not in name] == [
        "test_resnet.fp32", "test_efficientnet.fp32", "test_resnet.int8",
    ]  # fmt: skip


def test_an_engine_that_no_worker_can_make_waits(folder):
    path = write(folder, device='\n[[devices]]\nprofile = "jetson-orin-nano"\n')
    run = Pretender()
    endings, _ = carry_out(path, run)
    waiting = endings["test_resnet.fp32 on jetson-orin-nano"]
    assert (waiting.status, waiting.why) == ("waiting", "no worker offers sm_87")
    later = Pretender()
    endings, _ = carry_out(path, later, sm_87=1.0)
    assert set(later.asked) == {name for name in endings if name.endswith("jetson-orin-nano")}


def test_a_worker_that_goes_leaves_the_cell_waiting(folder):
    name = "test_resnet.fp32 on jetson-orin-nano"
    gone = Pretender({name: matrix_cells.NoWorkerError("no worker offers sm_87 any more")})
    path = write(folder, device='\n[[devices]]\nprofile = "jetson-orin-nano"\n')
    endings, _ = carry_out(path, gone, sm_87=1.0)
    assert (endings[name].status, endings[name].why) == ("waiting", "no worker offers sm_87 any more")
    carry_out(path, again := Pretender(), sm_87=1.0)
    assert again.asked == [name]


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


def test_a_model_whose_inputs_cannot_be_read_fails_alone(folder):
    path = write(folder)
    text = path.read_text().replace('precisions = ["fp32"]\n', 'precisions = ["fp32"]\nimages = "nowhere"\n')
    path.write_text(text)
    endings, _ = carry_out(path, Pretender())
    assert endings["test_efficientnet.fp32"].status == "failed"
    assert endings["test_efficientnet.fp32"].why.endswith("nowhere does not exist")
    assert endings["test_efficientnet.fp32 on rtx-40"].why == "its bundle was not built"
    assert {endings[name].status for name in endings if name.startswith("test_resnet")} == {"made"}
    (folder / "nowhere").mkdir()
    Image.new("RGB", (40, 30)).save(folder / "nowhere" / "one.png")
    endings, _ = carry_out(path, Pretender())
    assert {ending.status for ending in endings.values()} == {"made", "there"}
    # Gone for a while, as a folder on a network is: what was made of it is known when it is back.
    (folder / "nowhere").rename(folder / "away")
    assert carry_out(path, Pretender())[0]["test_efficientnet.fp32"].status == "failed"
    (folder / "away").rename(folder / "nowhere")
    assert {ending.status for ending in carry_out(path, Pretender())[0].values()} == {"there"}


def test_paths_are_relative_to_the_matrix(folder, monkeypatch):
    """Wherever it is called from; a profile among the options too."""
    path = write(folder, more=', profile = "cards/mine.toml"', device='\n[[devices]]\nprofile = "cards/mine.toml"\n')
    profile_file(folder / "cards" / "mine.toml")
    monkeypatch.chdir(folder.parent)
    *_, (build, engines) = tasks_of(read_matrix(path), Path(folder.name))
    assert build.options["profile"] == engines[-1].profile == str(folder / "cards" / "mine.toml")
    assert build.images == str(folder / "photographs")
    assert load_profile(engines[-1].profile).name == "mine"


def test_gates_and_size_ranges_are_tables():
    task = Task(
        model="m",
        precision=Precision.INT8,
        options={"gates": {"int8": {"min_cosine": 0.9}, "fp16": {"min_sqnr_db": 20.0}},
                 "batch": {"min": 1, "opt": 2, "max": 4}, "width": 64, "height": 32, "out_indices": [1, 2]},
    )  # fmt: skip
    options = matrix_cells.build_options(task)
    assert options.gates == {Precision.INT8: Gate(min_cosine=0.9), Precision.FP16: Gate(min_sqnr_db=20.0)}
    assert (options.batch, options.height) == (ShapeRange(min=1, opt=2, max=4), 32)
    assert (options.out_indices, options.precisions) == ((1, 2), (Precision.INT8,))
    with pytest.raises(InputError, match=r"option gates: .*min_cos\b"):
        matrix_cells.build_options(msgspec.structs.replace(task, options={"gates": {"int8": {"min_cos": 0.9}}}))


def test_a_bundle_travels_without_the_engines_of_others(tmp_path):
    bundle = make_bundle(tmp_path / "net.bundle")
    (tmp_path / "copy").mkdir()
    matrix_ray.unpack(matrix_ray.pack(bundle.path), tmp_path / "copy")
    copy = Bundle.open(tmp_path / "copy")
    copy.check_files()
    assert copy.manifest.golden == bundle.manifest.golden
    assert copy.manifest.engines == ()


def test_the_table_has_a_row_per_bundle_and_a_column_per_device(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    module.show(
        {
            "net.fp32": Ending(status="made", seconds=12.4),
            "net.fp32 on orin": Ending(status="waiting", why="no worker offers sm_87"),
            "net.int8": Ending(status="failed", why="too loud"),
            "net.int8 on orin": Ending(status="failed", why="its bundle was not built"),
            "vit.fp32": Ending(status="there", seconds=3.0),
        }
    )
    printed = capsys.readouterr().out
    table = [line for line in printed.splitlines() if not line.startswith(("net.", "vit."))]
    cells = [line.strip("│┃ ").replace("┃", "│").split("│") for line in table if "│" in line or "┃" in line]
    assert [[cell.strip() for cell in row] for row in cells] == [
        ["model and precision", "bundle", "orin"],
        ["net.fp32", "12 s", "waiting"],
        ["net.int8", "failed", "failed"],
        ["vit.fp32", "there"],
    ]
    assert [line for line in printed.splitlines() if line.startswith(("net.", "vit."))] == [
        "net.fp32 on orin: waiting: no worker offers sm_87",
        "net.int8: failed: too loud",
        "net.int8 on orin: failed: its bundle was not built",
    ]


def command(path: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "build_scripts.build_matrix", str(path), "--jobs", "2", "--json", *more]


def test_a_small_matrix_here(folder):
    """Real builds in processes; one model has a stage too many. The second run has nothing to do."""
    path = write(folder, more=", out_indices = [9]")
    done = subprocess.run(command(path), cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert done.stderr == ""
    endings = json.loads(done.stdout)
    assert endings["test_efficientnet.fp32"]["status"] == "failed"
    assert "9" in endings["test_efficientnet.fp32"]["why"]
    bundle = Bundle.open(folder / "bundles" / "test_resnet.int8.bundle")
    bundle.check_files()
    assert [engine.key.flavour for engine in bundle.manifest.engines] == ["openvino", "tensorrt_rtx"]
    assert [engine.name for engine in bundle.manifest.engines] == [
        *endings["test_resnet.int8"]["engines"], *endings["test_resnet.int8 on rtx-40"]["engines"],
    ]  # fmt: skip
    write(folder, more=", out_indices = [1]")
    assert subprocess.run(command(path), cwd=ROOT, check=False, stdout=subprocess.DEVNULL).returncode == 0
    again = subprocess.run(command(path), cwd=ROOT, capture_output=True, text=True, check=True)
    assert {ending["status"] for ending in json.loads(again.stdout).values()} == {"there"}


def test_a_cell_that_is_killed_is_told(tmp_path):
    long = Task(model="m", precision="fp32", source="resnet50")

    async def killed() -> None:
        cell = asyncio.create_task(
            matrix_cells.run_child(long, tmp_path / "x", concurrent.futures.ThreadPoolExecutor(1))
        )
        while not (running := multiprocessing.active_children()):
            await asyncio.sleep(0.01)
        running[0].kill()
        with pytest.raises(EdgeBackbonesError, match="died of signal 9"):
            await cell

    asyncio.run(killed())
    assert not multiprocessing.active_children()


def test_a_run_that_ends_early_leaves_no_cell_behind(tmp_path):
    long = Task(model="m", precision="fp32", source="resnet50")

    async def cancelled() -> None:
        cell = asyncio.create_task(
            matrix_cells.run_child(long, tmp_path / "x", concurrent.futures.ThreadPoolExecutor(1))
        )
        while not multiprocessing.active_children():
            await asyncio.sleep(0.01)
        cell.cancel()
        with pytest.raises(asyncio.CancelledError):
            await cell

    asyncio.run(cancelled())
    assert not multiprocessing.active_children()


def test_nothing_goes_on_when_the_matrix_is_killed(tmp_path):
    """A cell that wrote on would keep the bundle from the run that goes on in its place."""
    path = tmp_path / "matrix.toml"  # of a network that takes longer than anybody waits here
    options = '{ weights = "random:0" }'
    path.write_text(
        f'out = "bundles"\nprecisions = ["fp32"]\n[[models]]\nsource = "resnet152"\noptions = {options}\n'
        '[[devices]]\nprofile = "cpu"\n'
    )
    with subprocess.Popen(command(path), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as run:
        whole = psutil.Process(run.pid)
        deadline = time.monotonic() + 60

        def cells() -> list[psutil.Process]:  # what the server has forked
            return [process for process in whole.children(recursive=True) if process.ppid() != run.pid]

        while not cells():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(3.0)  # it has begun
        found = cells()
        assert found
        run.kill()
        run.wait()
    _, left = psutil.wait_procs(found, timeout=5)
    assert all(process.status() == psutil.STATUS_ZOMBIE for process in left)  # dead, and no init there that asks
    assert not (tmp_path / "bundles" / "resnet152.fp32.bundle").exists()


def test_what_cells_are_forked_from_has_no_threads():
    """A lock that a thread holds at the fork is never given back."""
    code = f"import os, {', '.join(matrix_cells._PRELOADED)}; print(len(os.listdir('/proc/self/task')))"
    one = {**os.environ, "OMP_NUM_THREADS": "1"}  # threads of OpenBLAS know of forks
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=one, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["1"]


def test_no_more_processes_than_jobs_run_at_a_time(monkeypatch, tmp_path):
    running, seen = 0, []

    async def pretend(*_):
        nonlocal running
        running += 1
        seen.append(running)
        await asyncio.sleep(0.02)
        running -= 1
        return ()

    async def six() -> None:
        run = matrix_cells.here(2)
        await asyncio.gather(*(run(Task(model=str(i), precision="fp32"), tmp_path) for i in range(6)))

    monkeypatch.setattr(matrix_cells, "run_child", pretend)
    asyncio.run(six())
    assert len(seen) == 6
    assert max(seen) == 2


def test_one_engine_at_a_time_is_timed_on_a_gpu(monkeypatch, tmp_path):
    """And who waits for the GPU takes no place of those that need none."""
    running, seen = set[str](), list[set[str]]()

    async def pretend(task, *_):
        running.add(task.model)
        seen.append(set(running))
        await asyncio.sleep(0.02)
        running.remove(task.model)
        return ()

    async def five() -> None:
        run = matrix_cells.here(2)
        gpu = [Task(model=f"gpu{i}", precision="fp32", flavour="tensorrt", resource="sm_90") for i in range(3)]
        tasks = [*gpu, Task(model="cpu0", precision="fp32"), Task(model="cpu1", precision="fp32")]
        await asyncio.gather(*(run(task, tmp_path) for task in tasks))

    monkeypatch.setattr(matrix_cells, "run_child", pretend)
    asyncio.run(five())
    assert max(sum(name.startswith("gpu") for name in names) for names in seen) == 1
    assert {"gpu0", "cpu0"} in seen


class FakeRay:
    """A cluster whose worker never answers, and is gone at the second look."""

    class exceptions:
        class RayError(Exception):
            pass

        class RayTaskError(RayError):
            pass

    cloudpickle = SimpleNamespace(register_pickle_by_value=lambda module: None)

    def __init__(self) -> None:
        self.offered = [{"sm_87": 1.0}, {"sm_87": 1.0}, {}]
        self.cancelled: list[object] = []
        self.asked = SimpleNamespace(future=concurrent.futures.Future)

    def init(self, **_: object) -> None:
        pass

    def remote(self, **_: object):
        return lambda function: SimpleNamespace(options=self.options)

    def options(self, **given: object):
        assert given == {"num_cpus": 0, "resources": {"sm_87": 1}}
        return SimpleNamespace(remote=lambda *_: self.asked)

    def cluster_resources(self) -> dict[str, float]:
        return self.offered.pop(0)

    def cancel(self, asked: object, *, force: bool) -> None:
        self.cancelled.append(asked)


def test_nobody_waits_for_a_worker_that_is_gone(monkeypatch, tmp_path):
    """Ray waits for another worker to join, for ever."""
    fake = FakeRay()
    monkeypatch.setitem(sys.modules, "ray", fake)
    monkeypatch.setattr(matrix_ray, "_POLL", 0.01)
    run, resources = matrix_ray.on_ray("auto", matrix_cells.here(1))
    assert resources == {"sm_87": 1.0}
    bundle = make_bundle(tmp_path / "net.bundle")
    task = Task(model="m", precision=Precision.FP32, flavour="openvino", profile="cpu", resource="sm_87")
    with pytest.raises(matrix_cells.NoWorkerError, match="no worker offers sm_87 any more"):
        asyncio.run(asyncio.wait_for(run(task, bundle.path), 30))
    assert fake.offered == []
    assert fake.cancelled == [fake.asked]


def test_what_a_worker_does_before_it_compiles(monkeypatch, tmp_path):
    """It sees its GPU though Ray hides it, and it has the profile that is a file of somebody else's."""
    seen = {}

    def pretend(bundle: Path, *, profile: str, **_: object) -> tuple[str, ...]:
        seen.update(hidden="CUDA_VISIBLE_DEVICES" in os.environ, profile=load_profile(profile), path=Path(profile))
        return (engine_for("orin", bundle).name,)

    monkeypatch.setattr(matrix_ray, "add_engine", pretend)
    monkeypatch.setattr(matrix_ray, "pack", with_engines)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    bundle, text = make_bundle(tmp_path / "net.bundle"), profile_file(tmp_path / "mine.toml")
    (tmp_path / "mine.toml").unlink()
    order = {"precision": "fp32", "flavour": "openvino", "profile": str(tmp_path / "mine.toml"), "targets": ()}
    _, [(record, files)] = matrix_ray._on_worker(order, matrix_ray.pack(bundle.path), text)
    assert msgspec.json.decode(record, type=EngineRecord).key.device_name == "orin"
    assert list(files.values()) == [b"orin"]
    assert (seen["hidden"], seen["profile"].name) == (False, "mine")
    assert not seen["path"].exists()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    matrix_ray._on_worker(order, matrix_ray.pack(bundle.path), text)
    assert seen["hidden"]


def with_engines(bundle: Path) -> bytes:
    """As pack does, and with the engine that engine_for makes others of."""
    import io
    import zipfile

    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for path in (p for p in bundle.rglob("*") if p.is_file()):
            archive.write(path, path.relative_to(bundle))
    return stream.getvalue()


def test_what_a_worker_says_can_be_read_here(monkeypatch, tmp_path):
    """Errors that take two arguments do not survive a pickle."""

    def refuse(*_: object, **__: object) -> None:
        raise MissingDependencyError("compiling for the GPU", "tensorrt")

    monkeypatch.setattr(matrix_ray, "add_engine", refuse)
    bundle = make_bundle(tmp_path / "net.bundle")
    order = {"precision": "fp32", "flavour": "tensorrt", "profile": "jetson-orin-nano", "targets": ()}
    with pytest.raises(EdgeBackbonesError) as caught:
        matrix_ray._on_worker(order, matrix_ray.pack(bundle.path), None)
    assert "needs the 'tensorrt' extra" in str(pickle.loads(pickle.dumps(caught.value)))


@pytest.fixture
def cluster():
    """The address of a machine that is none, with a device that is made up: a cluster of our own, beside any other."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    place = tempfile.mkdtemp(prefix="ray-")  # pytest's folders are too deep for the sockets in it
    start = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", f"--port={address[10:]}"]
    start += ["--node-ip-address=127.0.0.1", f"--temp-dir={place}", "--num-cpus=2", "--resources", '{"sm_87": 1}']
    start += ["--include-dashboard=false", "--disable-usage-stats", "--object-store-memory=200000000"]
    with open(Path(place) / "start.log", "w+") as log:
        head = subprocess.Popen(start, stdout=log, stderr=log, start_new_session=True)
        try:
            while "Ray runtime started" not in Path(log.name).read_text():
                assert head.poll() is None, Path(log.name).read_text()
                time.sleep(0.1)
            yield address
        finally:
            head.send_signal(signal.SIGTERM)  # it ends what it started
            with contextlib.suppress(subprocess.TimeoutExpired):
                head.wait(30)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(head.pid, signal.SIGKILL)
            head.wait()
            shutil.rmtree(place, ignore_errors=True)


def test_a_small_matrix_on_a_ray_cluster(folder, cluster):
    """The device's engine is made where the device is, and comes back: one that nobody makes here."""
    device = '\n[[devices]]\nname = "orin"\nprofile = "mine.toml"\nresource = "sm_87"\n'
    device += '\n[[devices]]\nname = "thor"\nprofile = "cpu"\nflavour = "openvino"\nresource = "sm_110"\n'
    path = write(folder, more=", out_indices = [9]", device=device)
    path.write_text(path.read_text().replace('[[devices]]\nprofile = "rtx-40"\n', ""))
    profile_file(folder / "mine.toml")
    quiet = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0", "RAY_DISABLE_IMPORT_WARNING": "1"}
    done = subprocess.run(
        command(path, "--ray", cluster), cwd=ROOT, capture_output=True, text=True, env=quiet, check=False
    )
    assert done.returncode == 1, done.stderr[-3000:]
    endings = msgspec.json.decode(done.stdout.strip().splitlines()[-1], type=dict[str, Ending])
    assert endings["test_resnet.int8 on orin"].status == "made", endings
    assert endings["test_resnet.int8 on thor"].why == "no worker offers sm_110"
    assert endings["test_efficientnet.fp32"].status == "failed"
    assert "9" in endings["test_efficientnet.fp32"].why
    bundle = Bundle.open(folder / "bundles" / "test_resnet.int8.bundle")
    bundle.check_files()
    own, orin = bundle.manifest.engines
    assert (own.name,) == endings["test_resnet.int8"].engines
    assert (orin.name,) == endings["test_resnet.int8 on orin"].engines
    assert (orin.key.flavour, orin.key.gpu.architectures) == ("tensorrt_rtx", ("sm_89",))
    with EdgeBackbone.from_pretrained(bundle.path) as backbone:
        assert backbone(np.zeros((1, 3, 32, 64), np.float32)).feature_maps
