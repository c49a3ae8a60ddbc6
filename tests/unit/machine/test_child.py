"""A function in a process of its own: what comes back, what is said when that process dies, and that none is left behind."""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from edge_backbones import verify_bundle
from edge_backbones.errors import CompileError, InferenceError, IntegrityError
from edge_backbones.machine import child
from edge_backbones.parity_report import ParityError
from edge_backbones.testing import make_bundle

pytestmark = pytest.mark.skipif(os.name == "nt", reason="signals are a POSIX matter")


def run(function: str, *arguments, **options):
    return child.run_apart(f"apart_functions:{function}", arguments, {}, **options)


def is_gone(process: int) -> bool:
    deadline = time.monotonic() + 30
    while psutil.pid_exists(process) and psutil.Process(process).status() != psutil.STATUS_ZOMBIE:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def own_process_of(caller: int) -> list[psutil.Process]:
    """What run_apart has started there: libraries start others."""
    found = []
    for process in psutil.Process(caller).children():
        with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
            found += [process] if "edge_backbones.machine.child" in " ".join(process.cmdline()) else []
    return found


def test_arguments_results_and_progress_pass():
    said = []
    value = (Path("a"), b"\0\n", {"x": (1, 2.5)})
    returned, in_process, process = run("answer", value, progress=lambda *step: said.append(step))
    assert returned == value
    assert in_process  # the function starts no other
    assert process != os.getpid()
    assert said == [("working", done, 3) for done in range(3)]
    assert is_gone(process)


def test_any_thread_may_call():
    found = []
    thread = threading.Thread(target=lambda: found.append(run("answer", 7)[0]))
    thread.start()
    thread.join(60)
    assert found == [7]


def test_no_process_within_a_process():
    own, other = os.getpid(), run("nested")
    assert other != own
    from apart_functions import process_id

    assert process_id(in_process=True) == own
    assert process_id() not in (own, other)


def test_modules_are_found_as_here_and_not_in_the_current_folder(tmp_path, monkeypatch):
    for name in ("pickle", "edge_backbones", "numpy"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('code of the folder')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    found = run("search_path")
    assert found == [entry for entry in sys.path if entry]


def test_errors_are_raised_here():
    with pytest.raises(CompileError, match="refused"):
        run("fail", "ours")
    with pytest.raises(ParityError) as parity:
        run("fail", "parity")
    assert parity.value.reports[0].gate.max_relative == 1e-3
    with pytest.raises(KeyError, match="a bug") as bug:  # not of ours: with the lines where it was raised
        run("fail", "bug")
    assert 'raise KeyError("a bug")' in str(bug.value.__cause__)
    with pytest.raises(RuntimeError, match="ValueError: with a thread's lock"):
        run("fail", "unpicklable")


def test_a_killed_process_is_told_with_the_way_out(monkeypatch):
    monkeypatch.setattr(child, "_kills_for_memory", lambda: 5)
    with pytest.raises(CompileError) as told:
        run("end_by", signal.SIGKILL)
    assert "that was compiling int8 for openvino was killed (SIGKILL), as the system does for lack" in str(told.value)
    for advice in ("--workspace", "add swap", "--resume", "GiB available before"):
        assert advice in str(told.value)
    counted = iter((5, 6))
    monkeypatch.setattr(child, "_kills_for_memory", lambda: next(counted))
    with pytest.raises(CompileError, match="was killed by the system, for lack of memory"):
        run("end_by", signal.SIGKILL)


def test_a_crash_is_told_by_its_signal_and_what_it_was_doing():
    with pytest.raises(CompileError) as told:
        run("end_by", signal.SIGSEGV)
    expected = (
        "the process that was compiling int8 for openvino ended by SIGSEGV: the graph is hostile. The bundle is whole and "
        "holds what was finished before; in_process=True (--in-process) lets a debugger see it"
    )
    assert str(told.value) == expected
    with pytest.raises(CompileError, match=r"ended by SIGABRT: .*memory ran out. .*add swap.*--resume"):
        run("end_by", signal.SIGABRT)  # an allocation that fails in C++
    with pytest.raises(InferenceError, match="ended by SIGSEGV"):
        run("read_address_zero", refusal=InferenceError)
    with pytest.raises(CompileError, match="was ended from outside \\(SIGTERM\\)"):
        run("end_by", signal.SIGTERM)
    with pytest.raises(CompileError, match="ended with exit code 7 and no answer"):
        run("leave", 7)
    assert pickle.loads(pickle.dumps(told.value)).args == told.value.args


def test_kills_are_read_where_the_kernel_counts_them(tmp_path):
    vmstat = tmp_path / "vmstat"
    assert child._kills_for_memory(vmstat) == 0
    vmstat.write_text("pgfault 12\noom_kill 3\n")
    assert child._kills_for_memory(vmstat) == 3


@pytest.mark.parametrize("stubborn", [False, True])
def test_an_interrupt_here_ends_the_other_process(tmp_path, monkeypatch, stubborn):
    """Ctrl-C, or a progress function that raises. A library that catches everything is ended after a while."""
    monkeypatch.setattr(child, "_GRACE", -4.9)
    processes = []

    def interrupt(step: str, *_: object) -> None:
        processes.append(int(step))
        raise KeyboardInterrupt

    if not stubborn:
        monkeypatch.setattr(child, "_GRACE", 30)
    with pytest.raises(KeyboardInterrupt):
        run("wait", tmp_path / "file", stubborn, progress=interrupt)
    assert is_gone(processes[0])
    assert (tmp_path / "file").exists() is not stubborn


WAITING = """
import pathlib, sys
from edge_backbones.machine import child
said = lambda step, *_: print(step, flush=True)
child.run_apart("apart_functions:wait", (pathlib.Path(sys.argv[1]), False), {}, progress=said)
"""


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGKILL"])
def test_the_other_process_ends_with_its_caller(tmp_path, name):
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry)}
    with subprocess.Popen(
        [sys.executable, "-c", WAITING, str(tmp_path / "file")],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=env, start_new_session=True,
    ) as caller:  # fmt: skip
        assert caller.stdout is not None
        process = int(caller.stdout.readline())
        os.killpg(caller.pid, getattr(signal, name))  # as a terminal does: to all that belong to it
        assert caller.wait(60) != 0
    assert is_gone(process)
    assert (tmp_path / "file").read_text() == "interrupted"


def test_handlers_are_as_they_were():
    before = signal.getsignal(signal.SIGINT)
    run("answer", 1)
    assert signal.getsignal(signal.SIGINT) is before


def test_a_program_without_an_interpreter_is_told_the_way_out(monkeypatch):
    monkeypatch.setattr(sys, "executable", "")
    with pytest.raises(CompileError, match="pass in_process=True"):
        run("answer", 1)


def test_verify_names_the_engine_that_ended_its_process(tmp_path):
    bundle = make_bundle(tmp_path / "net.bundle")
    before = (bundle.path / "manifest.json").read_bytes()
    [engine] = bundle.manifest.engines
    with pytest.raises(InferenceError) as told:
        run("engine_ends_by_signal", str(bundle.path), refusal=InferenceError)
    assert f"the process that was running {engine.name} ended by SIGSEGV" in str(told.value)
    assert f"edge-backbones remove {bundle.path} {engine.name}" in str(told.value)
    assert (bundle.path / "manifest.json").read_bytes() == before


def test_verify_runs_apart_and_reports_as_in_this_process(tmp_path):
    bundle = make_bundle(tmp_path / "net.bundle")
    apart, here = [], []
    reports = verify_bundle(bundle.path, progress=lambda *step: apart.append(step))
    assert reports == verify_bundle(bundle.path, in_process=True, progress=lambda *step: here.append(step))
    assert apart == here
    (bundle.path / bundle.manifest.engines[0].file.path).write_bytes(b"damaged")
    with pytest.raises(IntegrityError, match="has 7 bytes"):
        verify_bundle(bundle.path)


def test_nothing_in_the_folder_where_it_is_called_is_run(tmp_path: Path):
    """As the command itself does not: a folder that one compiles in may be anybody's."""
    bundle = make_bundle(tmp_path / "net.bundle")
    for name in ("msgspec", "edge_backbones", "numpy", "pickle"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('code of the folder')")
    code = "import sys; del sys.path[0]; from edge_backbones.cli.main import main; main()"  # as in bin/edge-backbones
    env = {**os.environ, "PYTHONPATH": str(Path(child.__file__).parents[2])}
    done = subprocess.run(
        [sys.executable, "-c", code, "compile", str(bundle.path), "--precision", "int8", "--json"],
        cwd=tmp_path, capture_output=True, text=True, check=False, env=env,
    )  # fmt: skip
    assert done.returncode == 1
    assert "has no int8; its ONNX graphs: none" in done.stdout


@pytest.mark.parametrize("form", [[], ["--json"]])
@pytest.mark.parametrize("command", ["compile", "verify"])
def test_a_command_survives_what_kills_its_process(tmp_path: Path, command, form):
    bundle = make_bundle(tmp_path / "net.bundle")
    before = (bundle.path / "manifest.json").read_bytes()
    arguments = [sys.executable, "-m", "edge_backbones", command, str(bundle.path), *form]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 60
        while not (found := own_process_of(process.pid)):
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.005)
        found[0].kill()
        out, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "was killed (SIGKILL), as the system does for lack of memory" in (out if form else err)
    assert len((out + err).strip().splitlines()) == 1 or form
    assert (bundle.path / "manifest.json").read_bytes() == before
