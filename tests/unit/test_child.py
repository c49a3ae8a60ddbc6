"""A command in a process of its own: codes, signals, and what is told of a process that was killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from edge_backbones import child
from edge_backbones.errors import CompileError
from edge_backbones.testing import make_bundle

pytestmark = pytest.mark.skipif(os.name == "nt", reason="signals are a POSIX matter")


def command(code: str) -> tuple[str, ...]:
    return (sys.executable, "-c", code)


def killed_by(name: str) -> tuple[str, ...]:
    return command(f"import os, signal; os.kill(os.getpid(), signal.{name})")


def test_the_exit_code_and_the_arguments_are_passed_on():
    assert child.run(["3"], command("import sys; sys.exit(int(sys.argv[1]))")) == 3
    assert child.run([], command("pass")) == 0


def test_a_killed_process_is_told_with_the_way_out(monkeypatch):
    monkeypatch.setattr(child, "_kills_for_memory", lambda: 5)
    with pytest.raises(CompileError) as told:
        child.run([], killed_by("SIGKILL"))
    assert "was killed (SIGKILL), as the system does for lack of memory" in str(told.value)
    for advice in ("--workspace", "add swap", "--resume", "GiB available before"):
        assert advice in str(told.value)
    counted = iter((5, 6))
    monkeypatch.setattr(child, "_kills_for_memory", lambda: next(counted))
    with pytest.raises(CompileError, match="was killed by the system, for lack of memory"):
        child.run([], killed_by("SIGKILL"))


def test_a_crash_is_told_by_its_signal():
    with pytest.raises(CompileError, match=r"crashed in a library \(SIGSEGV\)"):
        child.run([], killed_by("SIGSEGV"))
    with pytest.raises(CompileError, match=r"\(SIGABRT\), which may be for lack of memory. .*add swap.*--resume"):
        child.run([], killed_by("SIGABRT"))  # an allocation that fails in C++


def test_kills_are_read_where_the_kernel_counts_them(tmp_path):
    vmstat = tmp_path / "vmstat"
    assert child._kills_for_memory(vmstat) == 0
    vmstat.write_text("pgfault 12\noom_kill 3\n")
    assert child._kills_for_memory(vmstat) == 3


COUNTING = """
import signal, sys, time
seen = []
signal.signal(signal.{name}, lambda *_: seen.append(1))
print("ready", flush=True)
deadline = time.monotonic() + 60
while not seen and time.monotonic() < deadline:
    time.sleep(0.01)
time.sleep(0.3)
sys.exit(10 + len(seen))
"""
PARENT = """
import sys
from edge_backbones import child
sys.exit(child.run([], (sys.executable, "-c", {code!r})))
"""


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_signals_are_passed_on_once(name):
    code = PARENT.format(code=COUNTING.format(name=name))
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == "ready\n"
        os.killpg(parent.pid, getattr(signal, name))  # as a terminal does: to all that belong to it
        assert parent.wait(60) == 11


def test_handlers_are_as_they_were():
    before = signal.getsignal(signal.SIGINT)
    child.run([], command("pass"))
    assert signal.getsignal(signal.SIGINT) is before


def test_nothing_in_the_folder_where_it_is_called_is_run(tmp_path: Path):
    """As the command itself does not: a folder that one compiles in may be anybody's."""
    bundle = make_bundle(tmp_path / "net.bundle")
    for name in ("msgspec", "edge_backbones", "numpy"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('code of the folder')")
    code = "import sys; del sys.path[0]; from edge_backbones.cli import main; main()"  # as in bin/edge-backbones
    done = subprocess.run(
        [sys.executable, "-c", code, "compile", str(bundle.path), "--precision", "int8", "--json"],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "has no int8; its ONNX graphs: none" in done.stdout


@pytest.mark.parametrize("form", [[], ["--json"]])
def test_compile_survives_what_kills_it(tmp_path: Path, form):
    bundle = make_bundle(tmp_path / "net.bundle")
    before = (bundle.path / "manifest.json").read_bytes()
    arguments = [sys.executable, "-m", "edge_backbones", "compile", str(bundle.path), *form]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 60
        while not (found := psutil.Process(process.pid).children()):
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.005)
        found[0].kill()
        out, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "compiling was killed" in (out if form else err)
    assert len((out + err).strip().splitlines()) == 1 or form
    assert (bundle.path / "manifest.json").read_bytes() == before
