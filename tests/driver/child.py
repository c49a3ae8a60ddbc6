"""Run tests over the stand-in for libcuda: a process that has it, and a fork of it for every test.

The process is started by conftest.py with the stand-in on its library path and bindings of one release on its Python path. It
imports them once. Requests come and answers go as pickles.
"""

from __future__ import annotations

import importlib
import inspect
import os
import pickle
import sys
import tempfile
import traceback
import warnings
from typing import Any

import pytest


def serve() -> None:
    """Answer requests (module, test, arguments) until there are no more."""
    requests, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    for name in ("numpy", "cuda.bindings.driver", "edge_backbones.engines.tensorrt.session"):
        importlib.import_module(name)
    while True:
        try:
            request = pickle.load(requests)
        except EOFError:
            return
        pickle.dump(answer(*request), answers)
        answers.flush()


def answer(module: str, test: str, arguments: dict[str, Any]) -> tuple[int, str]:
    """Run a test in a fork; return its exit status and what it said."""
    importlib.import_module(module)
    with tempfile.TemporaryFile() as output:
        child = os.fork()
        if not child:
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
            os._exit(run(module, test, arguments))
        _, status = os.waitpid(child, 0)
        output.seek(0)
        said = output.read().decode(errors="replace")
    if os.WIFSIGNALED(status):
        said += f"\nthe process ended by signal {os.WTERMSIG(status)}"
    return os.waitstatus_to_exitcode(status), said


def run(module: str, test: str, arguments: dict[str, Any]) -> int:
    """Run a test in this process, which has not started CUDA yet. Returns 0, or 1 for an assertion that failed, or 2."""
    from tests.driver.standin import StandIn

    warnings.simplefilter("error")
    function = getattr(sys.modules[module], test)
    asked = inspect.signature(function).parameters
    try:
        driver = StandIn()
        if "driver" in asked:
            arguments["driver"] = driver
        if "monkeypatch" in asked:
            arguments["monkeypatch"] = pytest.MonkeyPatch()  # the process ends with the test
        if "machine" in asked:
            from tests.driver.machine import DriverMachine

            arguments["machine"] = machine = DriverMachine(driver)
        function(**arguments)
        if "machine" in asked:
            assert machine.gpu.violations == []
        assert driver.violations() == []
    except BaseException as error:
        lines = traceback.TracebackException.from_exception(error, capture_locals=True).format()
        sys.stderr.write("".join(f"{line[:300]}\n" for text in lines for line in text.splitlines()))
        return 1 if isinstance(error, AssertionError) else 2
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return 0


if __name__ == "__main__":
    serve()
