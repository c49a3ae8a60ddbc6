"""A cell of the build matrix in a process of its own: what it is told, how it ends, and how many run at a time."""

from __future__ import annotations

import asyncio
import concurrent.futures
import multiprocessing
import os
import subprocess
import sys
import time

import msgspec
import psutil
import pytest

from build_scripts import matrix_cells
from build_scripts.matrix_tasks import Task
from edge_backbones.errors import EdgeBackbonesError, InputError
from edge_backbones.parity_report import Gate
from edge_backbones.spec import Precision, ShapeRange
from tests.build_scripts.matrices import ROOT, carry_out, command, write


def test_a_process_that_cannot_be_started_fails_alone(folder, monkeypatch):
    path = write(folder)

    def refused(**_):
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(matrix_cells._PROCESSES, "Process", refused)
    endings, _ = carry_out(path, matrix_cells.here(2))
    assert {ending.status for ending in endings.values()} == {"failed"}
    assert endings["test_resnet.fp32"].why == "BlockingIOError: [Errno 11] Resource temporarily unavailable"


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
