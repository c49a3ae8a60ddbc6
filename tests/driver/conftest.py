"""Tests over a stand-in for NVIDIA's driver, under the real bindings.

A test that takes ``driver`` or ``machine`` runs in a process of its own that has the stand-in as libcuda.so.1, once for every
release of the bindings. There ``driver`` is a `tests.driver.standin.StandIn`, and ``machine`` a
`tests.driver.machine.DriverMachine`, on which TensorRT has been used by its rules when the test ends.
``@pytest.mark.machine(memory=..., pools=0)`` chooses the GPU, with the names of libcuda/standin.h in small letters. Other
arguments are those of ``parametrize``, and ``tmp_path``.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from build_scripts.fetch_bindings import default_folder
from build_scripts.fetch_cuda import CUDA_RELEASES, why_not_here
from tests.driver.build import build

ROOT = Path(__file__).parents[2]
VERSIONS = {"cuda-12": 12090, "cuda-13": 13000}


class ChildError(Exception):
    """A test ended by something else than an assertion."""


class Server:
    """One process of child.py."""

    def __init__(self, release: str, machine: dict[str, Any], library: Path) -> None:
        folder = default_folder()
        places = [folder / name for name in (release, "cuda-core", "pycuda")]
        for place in places:
            assert (place / ".complete").is_file(), f"{place} is not there: run python -m build_scripts.fetch_cuda"
        environment = {
            **os.environ,
            "LD_LIBRARY_PATH": str(library.parent),
            "PYTHONPATH": os.pathsep.join(map(str, [*places, ROOT])),
            **{f"STANDIN_{name.upper()}": str(int(value)) for name, value in machine.items()},
        }
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.driver.child"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            cwd=ROOT,
        )

    def ask(self, request: tuple[str, str, dict[str, Any]]) -> tuple[int, str]:
        """Run a test; return its exit status (0, 1 for an assertion that failed, another) and what it said."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            pickle.dump(request, self._process.stdin)
            self._process.stdin.flush()
            return pickle.load(self._process.stdout)
        except (BrokenPipeError, EOFError):
            return 2, f"the process ended with {self._process.wait()}: what it said is on the standard error output"

    def close(self) -> None:
        self._process.communicate()


class Driver:
    """Where a test runs."""

    def __init__(self, servers: Servers, release: str, machine: dict[str, Any]) -> None:
        self.ask = servers.find(release, machine).ask


class Servers:
    """The processes of this run, one for every release and machine."""

    def __init__(self, library: Path) -> None:
        self._library = library
        self._made: dict[tuple[Any, ...], Server] = {}

    def find(self, release: str, machine: dict[str, Any]) -> Server:
        key = (release, *sorted(machine.items()))
        if key not in self._made:
            self._made[key] = Server(release, machine, self._library)
        return self._made[key]

    def close(self) -> None:
        for server in self._made.values():
            server.close()


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "machine(**options): the machine that the stand-in for libcuda pretends to be")


@pytest.fixture(scope="session")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    made = Servers(build(tmp_path_factory.mktemp("libcuda")))
    yield made
    made.close()


@pytest.fixture(params=CUDA_RELEASES)
def driver(request: pytest.FixtureRequest) -> Driver:
    if why := why_not_here():
        pytest.skip(why)
    machine = {"version": VERSIONS[request.param]}
    for marker in request.node.iter_markers("machine"):
        machine |= marker.kwargs
    return Driver(request.getfixturevalue("servers"), request.param, machine)


@pytest.fixture
def machine(driver: Driver) -> Driver:
    return driver


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Run the body of a test that takes ``driver`` or ``machine`` where the stand-in is."""
    made_there = {"driver", "machine", "monkeypatch"}
    names = pyfuncitem._fixtureinfo.argnames
    if not {"driver", "machine"} & set(names):
        return None
    arguments = {name: pyfuncitem.funcargs[name] for name in names if name not in made_there}
    module = ".".join(pyfuncitem.path.relative_to(ROOT).with_suffix("").parts)
    status, said = pyfuncitem.funcargs["driver" if "driver" in names else "machine"].ask(
        (module, pyfuncitem.function.__name__, arguments)
    )
    if status:
        __tracebackhide__ = True
        raise (AssertionError if status == 1 else ChildError)(said)
    return True
