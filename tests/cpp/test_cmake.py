"""find_package(edge_backbones): what it finds, and what it says where something is missing."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from edge_backbones import __version__, get_cmake_dir
from tests.cpp_programs import cmake, configured, run

CPP = Path(get_cmake_dir()).parent


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    """A copy of the library in a folder of its own, as in site-packages without the libraries that it needs."""
    package = tmp_path / "site" / "edge_backbones"
    shutil.copytree(CPP, package / "cpp")
    (package / "__init__.py").write_text(f'__version__ = "{__version__}"\n')
    return package / "cpp" / "cmake"


def project(folder: Path, text: str) -> Path:
    folder.mkdir()
    (folder / "CMakeLists.txt").write_text(f"cmake_minimum_required(VERSION 3.16)\nproject(user CXX)\n{text}\n")
    return folder


def configured_with(cmake_dir: Path, source: Path, *options: str):
    off = ["-DCMAKE_DISABLE_FIND_PACKAGE_nlohmann_json=ON", "-DCMAKE_DISABLE_FIND_PACKAGE_OpenVINO=ON"]
    return run(
        cmake(),
        "-S",
        source,
        "-B",
        source / "build",
        f"-Dedge_backbones_DIR={cmake_dir}",
        *off,
        *options,
        env={"PATH": "/usr/bin:/bin"},
    )


def test_missing_headers_are_named_with_the_commands_that_install_them(elsewhere, tmp_path):
    source = project(tmp_path / "user", "find_package(edge_backbones REQUIRED)")
    done = configured_with(elsewhere, source)
    assert done.returncode != 0
    said = " ".join(done.stderr.split())
    assert "pip install 'edge-backbones[cpp]'" in said
    assert "apt-get install nlohmann-json3-dev" in said


def test_headers_beside_the_package_are_found(elsewhere, tmp_path):
    header = tmp_path / "site" / "nlohmann_json" / "include" / "nlohmann" / "json.hpp"
    header.parent.mkdir(parents=True)
    header.write_text("")
    text = """find_package(edge_backbones REQUIRED)
get_target_property(found edge_backbones::edge_backbones INTERFACE_INCLUDE_DIRECTORIES)
message(STATUS "found ${found}")"""
    done = configured_with(elsewhere, project(tmp_path / "user", text))
    assert done.returncode == 0, done.stderr
    assert str(header.parents[1]) in done.stdout


@pytest.mark.parametrize(("word", "fails"), [("REQUIRED COMPONENTS", True), ("OPTIONAL_COMPONENTS", False)])
def test_a_component_whose_library_is_missing(word, fails, elsewhere, tmp_path):
    header = tmp_path / "site" / "nlohmann_json" / "include" / "nlohmann" / "json.hpp"
    header.parent.mkdir(parents=True)
    header.write_text("")
    text = f'find_package(edge_backbones {word} OpenVINO)\nmessage(STATUS "target <$<TARGET_EXISTS:x>>")'
    done = configured_with(elsewhere, project(tmp_path / "user", text))
    assert (done.returncode != 0) == fails
    said = " ".join((done.stderr + done.stdout).split())
    assert "OpenVINO is missing: pip install 'edge-backbones[cpu]'" in said


def test_a_component_that_does_not_exist(tmp_path):
    source = project(tmp_path / "user", "find_package(edge_backbones REQUIRED COMPONENTS Nonsense)")
    done = configured(source, source / "build")
    assert done.returncode != 0
    assert "there is no component Nonsense: choose among" in " ".join(done.stderr.split())


@pytest.mark.parametrize(
    ("asked", "fits"),
    [("", True), (__version__, True), (__version__.rpartition(".")[0], True), ("99.0", False), ("0.0.1", False)],
)
def test_the_version_is_that_of_the_package(asked, fits, tmp_path):
    told = 'message(STATUS "found [${edge_backbones_FOUND}] [${edge_backbones_VERSION}]")'
    text = f"find_package(edge_backbones {asked} QUIET)\n{told}"
    source = project(tmp_path / "user", text)
    done = configured(source, source / "build")
    assert done.returncode == 0, done.stderr
    assert ("found [TRUE]" in done.stdout or "found [1]" in done.stdout) == fits
    assert (f"[{__version__}]" in done.stdout) or not fits
