"""Packages of Debian are installed by root alone, and each script says what is missing and how to add it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from build_scripts import debian, fetch_gstreamer

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="apt-get is of Debian")


def program(path: Path, text: str) -> Path:
    path.write_text(f"#!/bin/sh\n{text}\n", encoding="utf-8")
    path.chmod(0o755)
    return path


def test_packages_are_installed_by_root_without_questions(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("os.geteuid", lambda: 0)
    with pytest.raises(
        RuntimeError, match="there is no thing on this machine, and only root can add Debian's: do this"
    ):
        debian.install(["one"], lacks="thing", advice="do this")
    told = tmp_path / "told"
    program(tmp_path / "apt-get", f'echo "$@ $DEBIAN_FRONTEND" >> {told}')
    debian.install(["one", "two"], lacks="thing", advice="do this")
    assert told.read_text().splitlines() == [
        "update --quiet noninteractive",
        "install --quiet --yes --no-install-recommends one two noninteractive",
    ]
    program(tmp_path / "apt-get", "[ $1 = update ] || { echo 'E: no room' >&2; exit 100; }")
    with pytest.raises(RuntimeError, match=r"apt-get install failed \(E: no room\): do this"):
        debian.install(["one"], lacks="thing", advice="do this")
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    with pytest.raises(RuntimeError, match="only root can add"):
        debian.install(["one"], lacks="thing", advice="do this")


def test_gstreamer_is_asked_of_the_systems_python(monkeypatch, tmp_path):
    monkeypatch.setattr(fetch_gstreamer, "PYTHON", str(tmp_path / "none"))
    with pytest.raises(RuntimeError, match=r"there is no .*none \(No such file or directory\): install GStreamer"):
        fetch_gstreamer.require_gstreamer()
    fails = program(tmp_path / "fails", "echo \"ModuleNotFoundError: No module named 'gi'\" >&2; exit 1")
    monkeypatch.setattr(fetch_gstreamer, "PYTHON", str(fails))
    with pytest.raises(RuntimeError, match=r"No module named 'gi'\): install .*apt install python3-venv python3-gi "):
        fetch_gstreamer.require_gstreamer()
    monkeypatch.setattr(fetch_gstreamer, "PYTHON", str(program(tmp_path / "works", "echo GStreamer 9.9")))
    assert fetch_gstreamer.require_gstreamer() == "GStreamer 9.9"


def test_the_script_ends_with_the_advice_where_nothing_can_be_installed(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", "from build_scripts import fetch_gstreamer as f; f.PYTHON = '/nothing'; f.main()"],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "PATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "only root can add Debian's: install GStreamer" in done.stderr
