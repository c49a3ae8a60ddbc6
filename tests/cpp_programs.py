"""Programs in C++ for tests, configured and built once per run with CMake, whichever process of the run asks first."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from edge_backbones import get_cmake_dir

SOURCE = Path(__file__).parent / "cpp"


def cmake() -> str:
    """Return CMake: pip's, beside this Python, or the system's."""
    found = shutil.which("cmake", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
    assert found, "CMake is missing: pip install 'edge-backbones[dev]', or apt-get install cmake"
    return found


def run(*command: str | Path, **options) -> subprocess.CompletedProcess:
    """Run a command and return what it printed, whatever its exit code."""
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=600, **options)


def configured(source: Path, folder: Path, *options: str) -> subprocess.CompletedProcess:
    """Configure a project with this Python's packages."""
    return run(
        cmake(),
        "-S",
        source,
        "-B",
        folder,
        f"-Dedge_backbones_DIR={get_cmake_dir()}",
        f"-Dedge_backbones_SITE_PACKAGES={sysconfig.get_path('purelib')}",
        *options,
    )


def program(tmp_path_factory: pytest.TempPathFactory, name: str) -> Path:
    """Return a program of tests/cpp/CMakeLists.txt, which is built the first time that one is asked for in a run."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base
    folder = shared / "cpp-build"
    with (shared / "cpp-build.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "CMakeCache.txt").exists():
            done = configured(SOURCE, folder, "-DCMAKE_BUILD_TYPE=", "-DCMAKE_CXX_FLAGS=-O1")
            assert done.returncode == 0, done.stdout + done.stderr
        done = run(cmake(), "--build", folder, "--target", name, "--parallel", "2")
        assert done.returncode == 0, done.stdout + done.stderr
    return folder / name
