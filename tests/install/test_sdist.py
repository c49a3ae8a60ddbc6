"""Test that the source distribution holds what its documents link to, and that it builds the same wheel."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from build_scripts.device_install import build_wheel

ROOT = Path(__file__).parents[2]
BUILD = "import sys; from setuptools.build_meta import build_sdist; build_sdist(sys.argv[1])"
LEFT = shutil.ignore_patterns(
    ".*", "__pycache__", "*.egg-info", "build", "dist", "demo_output", "samples", "site", "*.bundle"
)


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """What the source distribution unpacks to."""
    folder = tmp_path_factory.mktemp("sdist")
    shutil.copytree(ROOT, folder / "clone", ignore=LEFT)
    subprocess.run([sys.executable, "-c", BUILD, folder], cwd=folder / "clone", check=True, capture_output=True)
    (archive,) = folder.glob("edge_backbones-*.tar.gz")
    with tarfile.open(archive) as opened:
        opened.extractall(folder / "out", filter="data")
    (unpacked,) = (folder / "out").iterdir()
    return unpacked


def test_every_link_of_its_documents_leads_to_a_file_in_it(source):
    documents = [
        *source.glob("*.md"),
        *source.glob("docs/**/*.md"),
        *source.glob("benchmarks/**/*.md"),
        *source.glob("examples/*.md"),
    ]
    assert len(documents) > 5
    missing = []
    for document in documents:
        links = re.findall(r"\]\(([^)#\s]+)", document.read_text(encoding="utf-8"))
        there = ROOT / document.parent.relative_to(source)  # pages that are made when the site is built exist nowhere
        missing += [link for link in links if (there / link).is_file() and not (document.parent / link).is_file()]
    assert missing == []


def test_what_the_readme_types_is_in_it(source):
    for name in (
        "Makefile",
        "Dockerfile.jetson",
        "build_scripts/demo.py",
        "examples/anomaly.py",
        "tests/unit/test_spec.py",
        "profiles/cpu.toml",
    ):
        assert (source / name).is_file()
    assert not list(source.rglob("*.pyc"))


def test_the_wheel_of_it_holds_the_same_files(source, tmp_path):
    ours = build_wheel(tmp_path)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", tmp_path / "theirs", source]
    subprocess.run(command, check=True)
    with zipfile.ZipFile(ours) as one, zipfile.ZipFile(tmp_path / "theirs" / ours.name) as other:
        assert set(one.namelist()) == set(other.namelist())
