"""What these tests build: the stand-ins for CUDA and TensorRT, and projects of users over one engine library each."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

import pytest

from tests.cpp_programs import cmake, configured, run

HERE = Path(__file__).parent


def built(tmp_path_factory: pytest.TempPathFactory, source: Path, name: str, *options: str) -> Path:
    """Build a project once per run, whichever process of the run asks first; return the folder of what was built."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base
    folder = shared / f"back-ends-{name}"
    with (shared / f"{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "built").exists():
            done = configured(source, folder, "-DCMAKE_BUILD_TYPE=", *options)
            assert done.returncode == 0, done.stdout + done.stderr
            done = run(cmake(), "--build", folder, "--parallel", "2")
            assert done.returncode == 0, done.stdout + done.stderr
            (folder / "built").touch()
    return folder


def stand_ins(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder with the stand-ins (nvidia/include, nvidia/lib), and with programs that run sessions over them."""
    return built(tmp_path_factory, HERE, "stand-ins")


def user_project(tmp_path_factory: pytest.TempPathFactory, component: str, *options: str) -> Path:
    """Return the folder of a user's project over one component."""
    return built(tmp_path_factory, HERE / "user", component, f"-DCOMPONENT={component}", *options)
