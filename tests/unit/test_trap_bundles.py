"""Bundles that a stranger made: each way to use one ends in a line that names the file, and nothing happens outside."""

from __future__ import annotations

import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from edge_backbones import EdgeBackbone
from edge_backbones.bundle.reader import Bundle, load_golden
from edge_backbones.bundle.writer import new_bundle
from edge_backbones.deploy.compile import compile_bundle
from edge_backbones.deploy.verify import verify_bundle
from edge_backbones.errors import BundleError, EdgeBackbonesError
from tests import traps

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="pipes, links and files with holes as Linux has them")

_watched: list[str] = []
_seen: list[str] = []
_EVENTS = {"open", "os.remove", "os.rename", "os.truncate", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.chmod"}


def _hook(event: str, args: tuple[object, ...]) -> None:
    if _watched and event in _EVENTS:
        follows = not (event == "open" and isinstance(args[2], int) and args[2] & os.O_NOFOLLOW)
        for place in (os.path.abspath(arg) for arg in args if isinstance(arg, (str, os.PathLike))):
            folder, name = os.path.split(place)
            if (os.path.realpath(place) if follows else os.path.join(os.path.realpath(folder), name)).startswith(
                _watched[0]
            ):
                _seen.append(f"{event} {place}")


sys.addaudithook(_hook)


@pytest.fixture
def watched(tmp_path: Path) -> Iterator[Path]:
    """Nothing may touch tmp_path/outside, and nothing may wait."""
    _seen.clear()
    before = signal.signal(signal.SIGALRM, lambda *_: pytest.fail("it waits for something that does not come"))
    signal.alarm(60)
    yield tmp_path / "outside"
    _watched.clear()
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def used(bundle: Bundle) -> dict[str, Callable[[], object]]:
    path = bundle.path
    name = bundle.manifest.engines[0].name

    def inspect() -> None:
        opened = Bundle.open(path)
        load_golden(opened)
        opened.check_files()
        assert opened.manifest.preprocessing

    def run() -> None:
        with EdgeBackbone.from_pretrained(path):
            pass

    return {
        "inspect": inspect,
        "run": run,
        "verify": lambda: verify_bundle(path),
        "compile": lambda: compile_bundle(path),
        "remove": lambda: Bundle.open(path).remove_engine(name),
    }


@pytest.mark.parametrize("name", traps.TRAPS)
def test_a_trap_ends_in_a_line_that_names_the_file(name, tmp_path, watched):
    bundle = traps.make(name, tmp_path)
    before = tree(watched)
    said: dict[str, str] = {}
    _watched.append(str(watched))
    for what, use in used(bundle).items():
        try:
            use()
        except EdgeBackbonesError as error:
            said[what] = str(error)
    _watched.clear()
    assert not _seen
    assert tree(watched) == before
    for what, line in said.items():
        assert "\n" not in line, what
        assert len(line) < 700, what
    pattern = traps.TRAPS[name][1]
    if pattern:
        assert any(re.search(pattern, line) for line in said.values()), said
    else:
        assert not said


def test_an_empty_path_is_not_the_current_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(traps.bundle_with_graph(tmp_path / "net.bundle").path)
    with pytest.raises(BundleError, match="path of the bundle is empty"):
        Bundle.open("")
    Bundle.open(".")


def test_a_link_to_a_whole_bundle_is_opened(tmp_path):
    """Programs are deployed so: ``current`` leads to the newest."""
    bundle = traps.bundle_with_graph(tmp_path / "v3.bundle")
    (tmp_path / "current").symlink_to(bundle.path)
    Bundle.open(tmp_path / "current").check_files()


def test_remove_leaves_a_file_that_is_not_named_as_engines_are(tmp_path):
    bundle = traps.bundle_with_graph(tmp_path / "net.bundle")
    (bundle.path / "notes.txt").write_bytes(b"mine")
    record = traps.msgspec.to_builtins(traps.record_bytes("notes.txt", b"mine"))
    traps.changed(bundle, "engines", 0, "timing_cache", to=record)
    opened = Bundle.open(bundle.path)
    [engine] = opened.manifest.engines
    opened.remove_engine(engine.name)
    assert (bundle.path / "notes.txt").read_bytes() == b"mine"
    assert not (bundle.path / engine.file.path).exists()


@pytest.mark.parametrize("name", ["thesis.txt", "engines/mine.blob", "src/a.py", "graphs/notes.md", ".git"])
def test_a_bundle_that_holds_other_files_is_not_overwritten(tmp_path, name):
    bundle = traps.bundle_with_graph(tmp_path / "net.bundle")
    (bundle.path / name).parent.mkdir(exist_ok=True)
    (bundle.path / name).write_bytes(b"mine")
    with (
        pytest.raises(BundleError, match=f"net.bundle holds {re.escape(name)}, not of the bundle.*move it elsewhere"),
        new_bundle(bundle.path, overwrite=True),
    ):
        raise AssertionError("nothing is built for a place that will be refused")
    assert (bundle.path / name).read_bytes() == b"mine"


def test_a_link_in_a_bundle_is_somebodys_own(tmp_path):
    bundle = traps.bundle_with_graph(tmp_path / "net.bundle")
    (tmp_path / "elsewhere").mkdir()
    (bundle.path / "linked").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(BundleError, match="holds linked, not of the bundle"), new_bundle(bundle.path, overwrite=True):
        raise AssertionError


def test_what_a_killed_writer_left_is_no_reason_to_refuse(tmp_path):
    bundle = traps.bundle_with_graph(tmp_path / "net.bundle")
    (bundle.path / ".manifest.json.writing-0a1b2c3d").write_bytes(b"half")
    (bundle.path / "engines" / ".x.blob.writing-0a1b2c3d").write_bytes(b"half")
    with pytest.raises(ZeroDivisionError), new_bundle(bundle.path, overwrite=True):
        raise ZeroDivisionError


@pytest.mark.parametrize("mask", [0o077, 0o022, 0o002])
def test_files_get_the_rights_that_umask_leaves(tmp_path, mask):
    before = os.umask(mask)
    try:
        bundle = traps.bundle_with_graph(tmp_path / "net.bundle")
        [engine] = bundle.manifest.engines
        bundle.add_engine(engine, {engine.file.path: bytes(bundle.read(engine.file))})
    finally:
        os.umask(before)
    for path in [bundle.path, *bundle.path.rglob("*")]:
        whole = 0o777 if path.is_dir() else 0o666
        assert path.stat().st_mode & 0o777 == whole & ~mask, path
