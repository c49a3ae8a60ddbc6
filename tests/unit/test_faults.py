"""Disks that take nothing and writers that die, at every single file operation of a change to a bundle."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from edge_backbones.bundle import reader as bundle_module
from edge_backbones.bundle.manifest import EngineRecord
from edge_backbones.bundle.reader import Bundle
from edge_backbones.bundle.writer import new_bundle, record_bytes
from edge_backbones.errors import BundleError
from edge_backbones.spec import Precision
from edge_backbones.testing import make_bundle
from tests.faults import OPERATIONS, failing

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the operations are those of Linux")


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return make_bundle(tmp_path / "net.bundle")


def engine_like(bundle: Bundle, precision: Precision) -> tuple[EngineRecord, dict[str, bytes]]:
    first = bundle.manifest.engines[0]
    key = msgspec.structs.replace(first.key, precision=precision)
    data = f"an engine in {precision}".encode()
    record = msgspec.structs.replace(first, key=key, file=record_bytes(key.path(data, ".blob"), data))
    return record, {record.file.path: data}


def add(bundle: Bundle) -> None:
    record, contents = engine_like(bundle, Precision.FP16)
    Bundle.open(bundle.path).add_engine(record, contents)


def remove(bundle: Bundle) -> None:
    Bundle.open(bundle.path).remove_engine(bundle.manifest.engines[0].name)


def overwrite(bundle: Bundle) -> None:
    contents = {path: path.read_bytes() for path in bundle.path.rglob("*") if path.is_file()}
    with new_bundle(bundle.path, overwrite=True) as folder:
        for path, data in contents.items():
            place = folder / path.relative_to(bundle.path)
            place.parent.mkdir(exist_ok=True)
            place.write_bytes(data)


def create(bundle: Bundle) -> None:
    with new_bundle(bundle.path.with_name("other.bundle")) as folder:
        for path in ("manifest.json", "golden.npz"):
            (folder / path).write_bytes((bundle.path / path).read_bytes())


def refused(bundle: Bundle) -> None:
    bundle.require_writable(room=1)


CHANGES = [add, remove, overwrite, create, refused]
CAUSES = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EACCES, errno.EMFILE)


def contents_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def restore(folder: Path, contents: dict[str, bytes]) -> None:
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    for name, data in contents.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


@pytest.mark.parametrize("change", CHANGES)
def test_every_error_of_the_disk_is_typed_and_leaves_a_whole_bundle(change: Callable[[Bundle], None], bundle):
    """Operation by operation fails, with one cause after the other, until none is left to fail."""
    place = bundle.path.parent
    good = contents_of(place)
    refusals = 0
    for number in range(10_000):
        cause = CAUSES[number % len(CAUSES)]
        said = os.strerror(cause)
        with failing(place, number, cause) as never:
            try:
                change(bundle)
            except BundleError as error:
                said = str(error)
                refusals += 1
        if never():
            break
        assert os.strerror(cause) in said, number
        assert "\n" not in said
        Bundle.open(bundle.path).check_files()
        add(bundle)  # what a failed cleaning left goes with the next writer, and stops none
        assert not list(bundle.path.rglob(".*")), number
        restore(place, good)
    assert number >= 4
    assert refusals >= 1


CRASHES = """
import os, sys
from pathlib import Path
from tests.faults import crashing
from tests.unit.test_faults import CHANGES, contents_of, engine_like, restore
from edge_backbones.bundle.reader import Bundle
from edge_backbones.errors import BundleError
from edge_backbones.spec import Precision

folder, name = Path(sys.argv[1]), sys.argv[2]
[change] = [c for c in CHANGES if c.__name__ == name]
good = contents_of(folder.parent)
first = Bundle.open(folder)
points = 0
for number in range(10_000):
    child = os.fork()
    if not child:
        crashing(folder.parent, number)
        change(first)
        os._exit(0)
    if not os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]):
        break
    points += 1
    found = Bundle.open(folder)   # the old state or the new one
    found.check_files()
    record, contents = engine_like(found if found.manifest.engines else first, Precision.INT8)
    found.add_engine(record, contents).check_files()  # the next writer is not stopped by what the dead one left
    files = set(contents_of(folder))
    named = {f.path for f in Bundle.open(folder).manifest.files()} | {"manifest.json"}
    assert files == named, (number, files ^ named)
    restore(folder.parent, good)
print(points)
"""


@pytest.mark.parametrize("change", [add, remove, overwrite])
def test_a_writer_that_dies_at_any_operation_leaves_a_whole_bundle(change, bundle):
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", CRASHES, str(bundle.path), change.__name__],
        capture_output=True,
        text=True,
        check=False,
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 8


def test_the_operations_are_counted(tmp_path):
    """The instrument itself: each kind of operation is seen, and only below the folder."""
    for operation in OPERATIONS:
        (tmp_path / "here").mkdir(exist_ok=True)
        (tmp_path / "here" / "file").write_bytes(b"x")
        with failing(tmp_path / "here", 0, errno.ENOSPC, only=operation) as never, contextlib.suppress(OSError):
            (tmp_path / "elsewhere").write_bytes(b"x")
            assert never()
            with (tmp_path / "here" / "new").open("wb") as file:
                file.write(b"x")
                file.flush()
                os.fsync(file.fileno())
            (tmp_path / "here" / "folder").mkdir()
            (tmp_path / "here" / "new").rename(tmp_path / "here" / "file")
            (tmp_path / "here" / "file").unlink()
            (tmp_path / "here" / "folder").rmdir()
            raise AssertionError(f"{operation} did not fail")


def test_limits_on_the_size_of_files_say_what_to_raise(bundle, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(errno.EFBIG, os.strerror(errno.EFBIG))))
    with pytest.raises(BundleError, match=r"File too large.*ulimit -f unlimited"):
        add(bundle)
    with pytest.raises(BundleError, match=r"net\.bundle was not written: File too large.*ulimit -f unlimited"):
        overwrite(bundle)
    monkeypatch.undo()
    Bundle.open(bundle.path).check_files()
    assert bundle_module.load_golden(bundle)
