"""Functions that tests run in a process of their own, where they end it, hang or fail."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from edge_backbones.deploy import compile as device
from edge_backbones.deploy import parity, verify
from edge_backbones.engines.openvino import compile as openvino_compile
from edge_backbones.errors import CompileError
from edge_backbones.machine import child
from edge_backbones.parity_report import Gate, ParityError, ParityReport
from edge_backbones.spec import Precision


def answer(value: Any, *, in_process: bool, progress: Callable[..., None]) -> Any:
    """What it is given, after three steps; what libraries print must not get between."""
    print("printed")
    os.write(1, b"printed by a library\n")
    for done in range(3):
        progress("working", done, 3)
    return value, in_process, os.getpid()


def search_path(*, in_process: bool, progress: Callable[..., None]) -> list[str]:
    return sys.path


def end_by(number: int, *, in_process: bool, progress: Callable[..., None]) -> None:
    child.doing("was compiling int8 for openvino", "the graph is hostile")
    os.kill(os.getpid(), number)
    time.sleep(60)


def read_address_zero(*, in_process: bool, progress: Callable[..., None]) -> None:
    ctypes.string_at(0)


def leave(code: int, *, in_process: bool, progress: Callable[..., None]) -> None:
    os._exit(code)


def fail(kind: str, *, in_process: bool, progress: Callable[..., None]) -> None:
    if kind == "parity":
        report = ParityReport(precision=Precision.FP32, gate=Gate(max_relative=1e-3), stages=())
        raise ParityError("outside", report)
    if kind == "bug":
        raise KeyError("a bug")
    if kind == "unpicklable":
        error = ValueError("with a thread's lock")
        error.lock = sys.stdout  # type: ignore[attr-defined]
        raise error
    raise CompileError("refused")


def nested(*, in_process: bool, progress: Callable[..., None]) -> int:
    """A function that runs apart, called where it already does."""
    return process_id()


@child.apart(CompileError)
def process_id(*, in_process: bool = False, progress: Callable[..., None] | None = None) -> int:
    return os.getpid()


def wait(file: Path, stubborn: bool, *, in_process: bool, progress: Callable[..., None]) -> None:
    """Write a file when it is interrupted, unless it is stubborn, as libraries are that catch everything."""
    is_told = False
    while True:
        try:
            if not is_told:
                is_told = True
                progress(f"{os.getpid()}", 0, None)
            time.sleep(600)
        except KeyboardInterrupt:
            if not stubborn:
                file.write_text("interrupted")
                raise


def second_engine_is_killed(path: str, *, in_process: bool, progress: Callable[..., None]) -> None:
    compile_graph, made = openvino_compile.compile_graph, []

    def killed(*arguments: Any, **options: Any) -> Any:
        if made:
            os.kill(os.getpid(), signal.SIGKILL)
        made.append(1)
        return compile_graph(*arguments, **options)

    openvino_compile.compile_graph = killed
    device.compile_bundle(path, in_process=True, progress=progress)


def engine_ends_by_signal(path: str, *, in_process: bool, progress: Callable[..., None]) -> None:
    def ended(*_: Any, **__: Any) -> Any:
        os.kill(os.getpid(), signal.SIGSEGV)

    parity.measure_engine = ended
    verify.verify_bundle(path, in_process=True, progress=progress)
