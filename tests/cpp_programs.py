"""Programs in C++ for tests, configured and built with CMake."""

from __future__ import annotations

import fcntl
import hashlib
import importlib.metadata
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from edge_backbones import get_cmake_dir

ROOT = Path(__file__).parents[1]


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


def built(source: Path, target: str = "all", *options: str) -> Path:
    """Return the folder of a project that was built, with the compiler run only where something changed.

    Builds stay in .cache/cpp between runs: CMake and the compiler's lists of headers say what is old. Whichever process of a
    run asks first compiles, and the others wait.
    """
    made_with = [sys.prefix, cmake(), importlib.metadata.version("openvino"), str(source), *options]
    name = f"{source.name}-{hashlib.sha256(repr(made_with).encode()).hexdigest()[:12]}"
    folder = ROOT / ".cache" / "cpp" / name
    folder.mkdir(parents=True, exist_ok=True)
    with folder.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "Makefile").exists():
            done = configured(source, folder, "-DCMAKE_BUILD_TYPE=", "-DCMAKE_CXX_FLAGS=-O0", *options)
            assert done.returncode == 0, done.stdout + done.stderr
        done = run(cmake(), "--build", folder, "--target", target, "--parallel", "2")
        assert done.returncode == 0, done.stdout + done.stderr
    return folder


def program(name: str) -> Path:
    """Return a program of tests/cpp/CMakeLists.txt."""
    return built(ROOT / "tests" / "cpp", name) / name
