"""Processes of the GPU suite, and the description of the machine that its document begins with."""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import json
import os
import platform
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from benchmarks.gpu_common import MissingError
from benchmarks.gpu_results import ROOT, code_revision
from edge_backbones.machine import gpus

_LIBRARIES = (
    "numpy",
    "msgspec",
    "torch",
    "triton",
    "timm",
    "onnx",
    "cuda-bindings",
    "pycuda",
    "cupy-cuda12x",
    "cupy-cuda13x",
    "tensorrt",
    "tensorrt-lean",
    "tensorrt-rtx-cu12-bindings",
    "tensorrt-rtx-cu13-bindings",
    "torch-tensorrt",
    "torch-tensorrt-rtx",
    "pytest",
)


class ChildError(Exception):
    """A child process failed."""


class SlowChildError(ChildError):
    """A child process did not answer in time."""


class PartFailedError(Exception):
    """A part failed, but it has figures."""

    def __init__(self, message: str, figures: dict[str, Any] | None = None) -> None:
        super().__init__(message)
        self.figures = figures or {}


class PartSlowError(PartFailedError):
    """A part was ended because its time was over."""


# ---- The machine


def describe_machine(gpu: gpus.Gpu | None, commit: str | None) -> dict[str, Any]:
    """Return device, driver, versions, commit and date. What cannot be found out is None."""
    versions = {}
    for name in _LIBRARIES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    head = _output("git", "rev-parse", "HEAD")
    changes = _output("git", "status", "--porcelain", "--untracked-files=no") if head else None
    # Read only: what state the card was in when the figures were taken.
    query = "driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.limit,temperature.gpu,persistence_mode"
    card = _output("nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader", f"--id={gpu.index}") if gpu else None
    return {
        "device": None if gpu is None else asdict(gpu),
        "driver": None if gpu is None else (card or "").split(",")[0].strip() or None,
        "card": None if not card else dict(zip(query.split(","), map(str.strip, card.split(",")), strict=False)),
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": versions,
        "nvcc": last_words(_output("nvcc", "--version") or "") if shutil.which("nvcc") else None,
        "code": code_revision(),
        "commit": head or commit,
        "uncommitted_changes": None if changes is None else bool(changes),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


# ---- Processes


def run_command(command: Sequence[str], seconds: float, environment: dict[str, str]) -> tuple[int | None, str]:
    """Run a command; return its exit code (None if it was killed after ``seconds``) and its output."""
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
        try:
            code: int | None = process.wait(seconds)
        except subprocess.TimeoutExpired:
            code = None
        _end(process)
        output.seek(0)
        return code, output.read().decode(errors="replace")


def _end(process: subprocess.Popen[Any]) -> None:
    """Kill a child process and the processes that it started: torch.compile keeps workers."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        if hasattr(os, "killpg"):
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()
    process.wait()


def last_words(output: str) -> str:
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    return lines[-1][:500] if lines else "it printed nothing"


def command_of(task: str, arguments: dict[str, Any]) -> list[str]:
    """Return the command that runs a task of gpu_tasks.py."""
    return [sys.executable, "-m", "benchmarks.gpu_tasks", task, json.dumps(arguments)]


class Child:
    """A task of gpu_tasks.py in a process of its own, which answers with JSON lines on its standard output."""

    def __init__(self, task: str, **arguments: Any) -> None:
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 (closed by __exit__)
        self._process = subprocess.Popen(
            command_of(task, arguments),
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            start_new_session=True,
        )
        self._answers: queue.Queue[str | None] = queue.Queue()
        self._is_silent = False  # it said all that it had to say
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._answers.put(line)
        self._answers.put(None)

    def read(self, seconds: float) -> dict[str, Any]:
        """Return the next answer. Raises MissingError if the task says that something is missing, else ChildError."""
        try:
            line = self._answers.get(timeout=max(0.1, seconds))
        except queue.Empty:
            raise SlowChildError(f"no answer within {seconds:.0f} s: {last_words(self._said())}") from None
        self._is_silent = line is None
        if line is None:
            raise ChildError(f"the process ended with {self._process.wait()}: {last_words(self._said())}")
        answer: dict[str, Any] = json.loads(line)
        if "missing" in answer:
            raise MissingError(answer["missing"])
        if "error" in answer:
            raise ChildError(answer["error"])
        return answer

    def read_all(self, seconds: float) -> dict[str, Any]:
        """Return the last answer of a task that gives more and more of its figures.

        Raises what `read` raises for the first, and PartFailedError or PartSlowError with the figures that there were.
        """
        end, found = time.monotonic() + seconds, {}
        while True:
            try:
                found = self.read(end - time.monotonic())
            except SlowChildError as error:
                raise PartSlowError(f"ended after {seconds:.0f} s: {error}", found) from error
            except (MissingError, ChildError) as error:
                if not found:
                    raise
                if self._process.poll() == 0 and self._is_silent:
                    return found
                raise PartFailedError(str(error), found) from error

    def ask(self, question: dict[str, Any], seconds: float) -> dict[str, Any]:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # read() tells how it ended
            self._process.stdin.write(json.dumps(question) + "\n")
            self._process.stdin.flush()
        return self.read(seconds)

    def _said(self) -> str:
        self._errors.seek(0)
        return self._errors.read().decode(errors="replace")

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *exception: object) -> None:
        _end(self._process)
        for pipe in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(OSError):
                if pipe is not None:
                    pipe.close()
        self._errors.close()
