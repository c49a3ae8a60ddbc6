"""A real Triton server for tests, and a client of it, in an environment of their own: ``make .venv/triton/.installed``.

The server's Python backend ignores PYTHONPATH: it takes the Python that comes first on PATH. So a server gets a virtual
environment of a few files, whose packages are those of the installed one and this working tree.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).parents[3]
INSTALLED = Path(sys.prefix) / "triton"
CLIENT = Path(__file__).with_name("client.py")
WHERE_IT_RUNS = pytest.mark.skipif(
    sys.platform != "linux" or sys.version_info >= (3, 13),
    reason="the package with the server has wheels for Linux alone, and needs numpy 1, which has none for Python 3.13",
)
_PATIENCE = 120


def require_installed() -> Path:
    """The folder of the environment's packages; the test fails with the command that installs it."""
    command = "make .venv/triton/.installed"
    assert (INSTALLED / ".installed").exists(), f"the environment with the Triton server is not installed: {command}"
    (packages,) = INSTALLED.glob("lib/python3.*/site-packages")
    return packages.resolve()


@dataclass(frozen=True)
class Server:
    """A server that runs, and its log."""

    http: str
    grpc: str
    log: Path
    process: subprocess.Popen[bytes]

    def said(self) -> str:
        return self.log.read_text(errors="replace")

    def is_ready(self, model: str = "") -> bool:
        path = f"v2/models/{model}/ready" if model else "v2/health/ready"
        with contextlib.suppress(OSError):
            return bool(urllib.request.urlopen(f"http://{self.http}/{path}", timeout=10).status == 200)
        return False

    def is_alive(self) -> bool:
        return self.process.poll() is None

    def models(self) -> dict[str, str]:
        """The state of each model of the repository."""
        request = urllib.request.Request(f"http://{self.http}/v2/repository/index", data=b"{}", method="POST")
        return {model["name"]: model["state"] for model in json.load(urllib.request.urlopen(request, timeout=10))}

    def stop(self) -> None:
        self.process.send_signal(signal.SIGINT)
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


@contextlib.contextmanager
def serving(repository: Path, work: Path) -> Iterator[Server]:
    """Start a server on a repository and wait until each of its models is ready or refused."""
    packages = require_installed()
    triton = packages / "pytriton" / "tritonserver"
    backends = work / "backends"
    shutil.copytree(triton / "backends", backends)
    stubs = triton / "python_backend_stubs" / packages.parent.name.removeprefix("python")
    shutil.copy(stubs / "triton_python_backend_stub", backends / "python")
    _make_environment(work / "python", packages)
    http, grpc = (f"127.0.0.1:{port}" for port in _free_ports(2))
    environment = {
        "PATH": f"{work / 'python' / 'bin'}:{os.environ['PATH']}",
        "LD_LIBRARY_PATH": str(packages / "nvidia_pytriton.libs"),
        "HOME": str(work),
        "OMP_NUM_THREADS": "1",
    }
    log = work / "server.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [
                triton / "bin" / "tritonserver", f"--model-repository={repository}", f"--backend-directory={backends}",
                "--http-address=127.0.0.1", f"--http-port={http.partition(':')[2]}", "--grpc-address=127.0.0.1",
                f"--grpc-port={grpc.partition(':')[2]}", "--allow-metrics=false", "--exit-on-error=false",
                "--strict-readiness=false", "--log-verbose=1",
            ],
            stdout=output, stderr=subprocess.STDOUT, env=environment,
        )  # fmt: skip
    server = Server(http, grpc, log, process)
    try:
        until = time.monotonic() + _PATIENCE
        while not server.is_ready():
            assert server.is_alive(), server.said()[-4000:]
            assert time.monotonic() < until, server.said()[-4000:]
            time.sleep(0.1)
        yield server
    finally:
        server.stop()


def _make_environment(folder: Path, packages: Path) -> None:
    """A virtual environment of the installed one's packages and this working tree."""
    subprocess.run([INSTALLED / "bin" / "python", "-m", "venv", "--without-pip", folder], check=True)
    own = folder / packages.relative_to(INSTALLED.resolve())
    (own / "both.pth").write_text(f"{ROOT}\n{packages}\n")


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def _client(*arguments: str) -> Any:
    require_installed()
    command = [INSTALLED / "bin" / "python", CLIENT, *arguments]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def parsed(*files: Path) -> list[dict[str, Any]]:
    """What Triton's own protobuf reads in each config.pbtxt, as JSON: enums by name, 64-bit numbers as text."""
    return list(_client("parse", *map(str, files)))


@dataclass(frozen=True)
class Call:
    """A request. ``outputs``: None for those that the server gives without being asked."""

    model: str
    inputs: Mapping[str, np.ndarray]
    outputs: Sequence[str] | None = None
    protocol: str = "http"


Answer = dict[str, np.ndarray] | str
"""The outputs, or the server's error."""


def ask(server: Server, work: Path, *groups: Sequence[Call]) -> list[list[Answer]]:
    """Send groups of calls, those of a group at the same time."""
    requests: list[list[dict[str, Any]]] = []
    for i, group in enumerate(groups):
        requests.append([])
        for j, call in enumerate(group):
            files = {name: str(work / f"{i}.{j}.{name}.npy") for name in call.inputs}
            for name, array in call.inputs.items():
                np.save(files[name], array, allow_pickle=True)
            url = server.grpc if call.protocol == "grpc" else server.http
            requests[-1].append(
                {
                    "protocol": call.protocol, "url": url, "model": call.model, "inputs": files,
                    "outputs": call.outputs, "to": str(work / f"{i}.{j}.npz"),
                }
            )  # fmt: skip
    answers = _client("ask", json.dumps(requests))
    found: list[list[Answer]] = []
    for group, asked in zip(answers, requests, strict=True):
        found.append([])
        for answer, request in zip(group, asked, strict=True):
            if answer["error"] is not None:
                found[-1].append(answer["error"])
                continue
            with np.load(request["to"]) as arrays:
                found[-1].append(dict(arrays))
    return found
