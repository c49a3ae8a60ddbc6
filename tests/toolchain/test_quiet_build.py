"""A build from random weights asks nobody, and leaves files in its bundle, in the cache and in matplotlib's alone."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BUILD = """
import sys
seen = []
def watch(event, arguments):
    if event.startswith(("socket.", "os.fork")) or (event == "subprocess.Popen" and "fc-list" not in str(arguments)
            and "ldconfig" not in str(arguments)):
        seen.append(f"{event} {arguments}")
sys.addaudithook(watch)
from edge_backbones.cli.main import app
assert not app(sys.argv[1:], standalone_mode=False)
import onnxruntime, os
assert os.environ["ORT_DISABLE_TELEMETRY"] == "1"
assert not seen, seen
"""


@pytest.mark.skipif(sys.platform == "win32", reason="home folders are elsewhere there")
def test_a_build_sends_nothing(photograph_folder, tmp_path):
    home, folder, log = tmp_path / "home", tmp_path / "here", tmp_path / "log"
    home.mkdir(), folder.mkdir()
    environment = {name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH") if name in os.environ}
    environment |= {
        "HOME": str(home),
        "PYTHONPATH": str(ROOT),
    }  # no CI and no offline mode: both would keep libraries quiet
    whole = [sys.executable, "-c", BUILD, "build", "resnet10t", tmp_path / "net.bundle", "--weights", "random:0"]
    whole += ["--precision", "fp32", "--size", "64x64", "--golden", "1", "--images", str(photograph_folder)]
    trace = ["strace", "-f", "-qq", "-o", str(log), "-e", "trace=connect,sendto,sendmmsg,sendmsg"]
    can_trace = shutil.which("strace") and not subprocess.run([*trace, "true"], capture_output=True).returncode
    done = subprocess.run(
        [*(trace if can_trace else []), *whole],
        capture_output=True,
        text=True,
        cwd=folder,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    if can_trace:  # libraries in C++ tell no hook of Python
        assert "AF_INET" not in log.read_text()
    assert list(folder.iterdir()) == []
    written = {path.relative_to(home).as_posix() for path in home.rglob("*") if path.is_file()}
    cached = {path for path in written if path.startswith(".cache/edge_backbones/")}
    assert cached
    assert {path for path in written if not path.startswith(".cache/matplotlib/fontlist")} == cached
