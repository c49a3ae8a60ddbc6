"""The folders of the C++ library: where build systems find it, told without importing anything."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import edge_backbones
from edge_backbones.for_cpp import folder_for


@pytest.mark.parametrize(
    ("flag", "folder", "file"),
    [
        ("--includedir", edge_backbones.get_include(), "edge_backbones/edge_backbones.hpp"),
        ("--cmakedir", edge_backbones.get_cmake_dir(), "edge_backbones-config.cmake"),
    ],
)
def test_a_folder_is_printed_and_holds_what_is_looked_for(flag, folder, file):
    done = subprocess.run([sys.executable, "-m", "edge_backbones", flag], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"{folder}\n"), done.stderr
    assert (Path(folder) / file).is_file()


def test_the_folders_are_told_without_other_libraries():
    code = "import json, sys, edge_backbones as e; e.get_include(); print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert not {"numpy", "msgspec", "typer"} & set(json.loads(done.stdout))


@pytest.mark.parametrize("arguments", [[], ["--cmakedir", "x"], ["inspect"], ["--version"]])
def test_other_arguments_are_left_to_the_command_line(arguments):
    assert folder_for(arguments) is None


def test_every_error_code_of_cpp_is_an_error_of_python():
    header = (Path(edge_backbones.get_include()) / "edge_backbones" / "errors.hpp").read_text()
    names = [line.split('"')[1] for line in header.splitlines() if "case Code::" in line]
    assert len(names) == 7
    assert all(hasattr(edge_backbones, name) for name in names)
