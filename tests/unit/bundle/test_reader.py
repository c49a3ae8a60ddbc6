"""The bundle on disk: what a reader refuses, and what a writer leaves behind when it is stopped."""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from edge_backbones import EdgeBackbone
from edge_backbones.bundle import storage
from edge_backbones.bundle import writer as bundle_writer
from edge_backbones.bundle.manifest import EngineRecord
from edge_backbones.bundle.reader import Bundle
from edge_backbones.bundle.writer import new_bundle, record_bytes, record_file, write_manifest
from edge_backbones.errors import BundleError, IntegrityError, ManifestError
from edge_backbones.spec import Precision
from edge_backbones.testing import make_bundle, pooled


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return make_bundle(tmp_path / "pool.bundle")


def rewrite(bundle: Bundle, **changes: object) -> None:
    write_manifest(bundle.path, msgspec.structs.replace(bundle.manifest, **changes))


def files_of(bundle: Bundle) -> list[str]:
    return [record.path for record in bundle.manifest.files()]


def test_a_whole_bundle_passes(bundle):
    bundle.check_files()
    assert len(files_of(bundle)) == 2


@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "extend"])
def test_every_damaged_file_is_named(bundle, index, damage):
    path = bundle.path / files_of(bundle)[index]
    data = bytearray(path.read_bytes())
    if damage == "flip":
        data[len(data) // 2] ^= 1
    elif damage == "truncate":
        del data[-1:]
    elif damage == "extend":
        data += b"x"
    path.write_bytes(data)
    if damage == "remove":
        path.unlink()
    expected = {"flip": "was changed", "truncate": "bytes, the manifest says", "remove": "is missing"}
    with pytest.raises(IntegrityError, match=expected.get(damage, "bytes, the manifest says")) as caught:
        Bundle.open(bundle.path).check_files()
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    "path", ["../outside", "/etc/passwd", "engines/../../outside", "a//b", "./golden.npz", "C:\\x", "a\\..\\b", "c:x"]
)
def test_paths_that_escape_are_refused_before_anything_is_read(bundle, path):
    (bundle.path.parent / "outside").write_bytes(b"secret")
    golden = msgspec.structs.replace(bundle.manifest.golden, file=record_bytes(path, b"secret"))
    rewrite(bundle, golden=golden)
    with pytest.raises(ManifestError, match="refused"):
        Bundle.open(bundle.path)


def test_a_link_that_leads_outside_is_refused(bundle):
    outside = bundle.path.parent / "outside"
    outside.write_bytes(b"secret")
    (bundle.path / "link").symlink_to(outside)
    golden = msgspec.structs.replace(bundle.manifest.golden, file=record_bytes("link", b"secret"))
    rewrite(bundle, golden=golden)
    with pytest.raises(ManifestError, match="link is a link, which may lead outside of the bundle: refused"):
        Bundle.open(bundle.path)


def test_what_is_not_a_bundle_says_so(tmp_path):
    with pytest.raises(BundleError, match="there is no such folder"):
        Bundle.open(tmp_path / "nothing")
    with pytest.raises(BundleError, match=r"it has no manifest\.json"):
        Bundle.open(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(BundleError, match="file is not a bundle: it is a file, and a bundle is a folder"):
        Bundle.open(tmp_path / "file")


def test_its_manifest_is_not_a_bundle_and_leads_to_it(bundle):
    with pytest.raises(BundleError, match=f"it is a file of one: pass its folder, {bundle.path}"):
        Bundle.open(bundle.path / "manifest.json")


def test_a_bundle_shows_itself_in_one_short_line(bundle):
    (engine,) = bundle.manifest.engines
    assert repr(bundle) == f"Bundle({str(bundle.path)!r}: average_pooling, engines: {engine.name})"
    assert repr(bundle.remove_engine(engine.name)).endswith(": average_pooling, engines: none)")


def test_files_that_the_manifest_does_not_name_are_ignored(bundle):
    (bundle.path / "notes.txt").write_text("mine")
    Bundle.open(bundle.path).check_files()


def test_an_existing_target_is_refused_and_a_foreign_folder_never_replaced(bundle, tmp_path):
    with pytest.raises(BundleError, match="pass --overwrite"), new_bundle(bundle.path):
        pass
    foreign = tmp_path / "photos"
    foreign.mkdir()
    (foreign / "holiday.jpg").write_bytes(b"dear")
    with (
        pytest.raises(BundleError, match="not a bundle and will not be overwritten"),
        new_bundle(foreign, overwrite=True),
    ):
        pass
    assert (foreign / "holiday.jpg").read_bytes() == b"dear"


def test_a_failed_build_keeps_the_old_bundle_and_leaves_nothing(bundle):
    before = sorted(p.name for p in bundle.path.parent.iterdir())
    with pytest.raises(ZeroDivisionError), new_bundle(bundle.path, overwrite=True) as folder:
        (folder / "half").write_bytes(b"half")
        raise ZeroDivisionError
    Bundle.open(bundle.path).check_files()
    assert sorted(p.name for p in bundle.path.parent.iterdir()) == before


def test_a_folder_without_a_valid_manifest_never_becomes_a_bundle(tmp_path):
    with pytest.raises(BundleError), new_bundle(tmp_path / "x.bundle") as folder:
        (folder / "manifest.json").write_text("{}")
    assert list(tmp_path.iterdir()) == []


def copy_into(folder: Path, source: Bundle) -> None:
    for path in (*files_of(source), "manifest.json"):
        (folder / path).parent.mkdir(exist_ok=True)
        (folder / path).write_bytes((source.path / path).read_bytes())


def test_overwriting_replaces_the_whole_folder(bundle):
    stale = bundle.path / bundle.manifest.engines[0].key.path(b"an engine that the new bundle lacks", ".blob")
    stale.write_bytes(b"old")
    with new_bundle(bundle.path, overwrite=True) as folder:
        copy_into(folder, bundle)
        assert Bundle.open(bundle.path)  # the old one is there until the end
    assert not stale.exists()
    Bundle.open(bundle.path).check_files()


def test_overwriting_without_an_exchange_call_works_too(bundle, monkeypatch):
    monkeypatch.setattr(sys, "platform", "other")
    with new_bundle(bundle.path, overwrite=True) as folder:
        copy_into(folder, bundle)
    Bundle.open(bundle.path).check_files()
    assert [p.name for p in bundle.path.parent.iterdir()] == [bundle.path.name]


def test_two_writers_take_turns(bundle):
    with new_bundle(bundle.path, overwrite=True) as folder:
        with pytest.raises(BundleError, match="another process is writing"), new_bundle(bundle.path, overwrite=True):
            pass
        copy_into(folder, bundle)


def test_an_engine_is_added_once_the_other_writer_is_done(bundle, monkeypatch):
    [engine, *_] = bundle.manifest.engines
    add = {"engine": engine, "contents": {engine.file.path: bytes(bundle.read(engine.file))}}
    monkeypatch.setattr(bundle_writer, "_PATIENCE", 0.05)
    held, done = threading.Event(), threading.Event()

    def hold() -> None:
        with storage.lock(bundle.path):
            held.set()
            done.wait(60)

    writer = threading.Thread(target=hold)
    writer.start()
    held.wait(60)
    with pytest.raises(BundleError, match="another process is writing"):
        bundle.add_engine(**add)
    monkeypatch.setattr(bundle_writer, "_PATIENCE", 60.0)
    threading.Timer(0.1, done.set).start()
    bundle.add_engine(**add).check_files()
    writer.join()


def test_readers_see_a_whole_bundle_while_it_is_replaced(bundle):
    stop, failures = threading.Event(), []

    def read() -> None:
        while not stop.is_set():
            try:
                Bundle.open(bundle.path)
            except BundleError as error:
                failures.append(error)

    readers = [threading.Thread(target=read) for _ in range(2)]
    for reader in readers:
        reader.start()
    for _ in range(30):
        with new_bundle(bundle.path, overwrite=True) as folder:
            copy_into(folder, bundle)
    stop.set()
    for reader in readers:
        reader.join()
    assert not failures


def test_an_engine_is_added_and_replaced_and_nothing_else_is_touched(bundle):
    (bundle.path / "engines" / "mine.txt").write_bytes(b"not ours")
    old = bundle.manifest.engines[0]
    key = msgspec.structs.replace(old.key, precision="int8")
    other = msgspec.structs.replace(old, key=key, file=record_bytes(key.path(b"int8 engine", ".blob"), b"int8 engine"))
    grown = bundle.add_engine(other, {other.file.path: b"int8 engine"})
    assert [e.name for e in grown.manifest.engines] == [old.name, other.name]
    grown.check_files()
    again = msgspec.structs.replace(other, file=record_bytes(key.path(b"better engine", ".blob"), b"better engine"))
    replaced = grown.add_engine(again, {again.file.path: b"better engine"})
    assert [e.file.sha256 for e in replaced.manifest.engines] == [old.file.sha256, again.file.sha256]
    assert sorted(p.name for p in (bundle.path / "engines").iterdir()) == sorted(
        [*(Path(e.file.path).name for e in replaced.manifest.engines), "mine.txt"]
    )


def test_an_engines_folder_that_leads_outside_is_never_written_to(bundle, tmp_path):
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "thesis.txt").write_text("years")
    engine = bundle.manifest.engines[0]
    data = bytes(bundle.read(engine.file))
    rewrite(bundle, engines=())
    (bundle.path / engine.file.path).unlink()
    (bundle.path / "engines").rmdir()
    (bundle.path / "engines").symlink_to(victim)
    with pytest.raises(ManifestError, match="engines is a link, which may lead outside of the bundle: refused"):
        bundle.add_engine(engine, {engine.file.path: data})
    assert [path.name for path in victim.iterdir()] == ["thesis.txt"]


def test_a_folder_with_somebody_elses_manifest_is_never_replaced(tmp_path):
    site = tmp_path / "site"
    site.mkdir()
    (site / "manifest.json").write_text('{"name": "a web app", "icons": []}')
    with pytest.raises(BundleError, match="not a bundle and will not be overwritten"), new_bundle(site, overwrite=True):
        pass
    assert (site / "manifest.json").is_file()


def test_an_error_inside_a_build_comes_out_as_it_is(tmp_path):
    with pytest.raises(FileNotFoundError, match="mine"), new_bundle(tmp_path / "x.bundle"):
        raise FileNotFoundError("mine")


def test_a_crash_between_two_renames_is_repaired_by_the_next_writer(bundle):
    bundle.path.rename(bundle.path.with_name(".pool.bundle.replaced"))
    with pytest.raises(ZeroDivisionError), new_bundle(bundle.path, overwrite=True):
        raise ZeroDivisionError
    Bundle.open(bundle.path).check_files()


def test_a_null_byte_in_a_path_is_a_manifest_error(bundle):
    golden = msgspec.structs.replace(bundle.manifest.golden, file=record_bytes("a\0b", b""))
    rewrite(bundle, golden=golden)
    with pytest.raises(ManifestError, match="refused"):
        Bundle.open(bundle.path)


KILLED_WRITER = """
import sys, time
from pathlib import Path
from edge_backbones.bundle.writer import new_bundle
with new_bundle(sys.argv[1], overwrite=True) as folder:
    (folder / "half").write_bytes(b"x" * 1000)
    print("writing", flush=True)
    time.sleep(60)
"""


@pytest.mark.skipif(os.name == "nt", reason="kill -9 is a POSIX matter")
def test_kill_9_in_the_middle_leaves_the_old_bundle_and_the_next_build_cleans_up(bundle):
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED_WRITER, str(bundle.path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    with process:
        assert process.stdout.readline().strip() == "writing"
        process.send_signal(signal.SIGKILL)
    Bundle.open(bundle.path).check_files()
    assert any(p.name.startswith(".pool.bundle.building-") for p in bundle.path.parent.iterdir())
    with new_bundle(bundle.path, overwrite=True) as folder:
        copy_into(folder, bundle)
    Bundle.open(bundle.path).check_files()
    assert [p.name for p in bundle.path.parent.iterdir()] == [bundle.path.name]


def rewrite_for_ever(path: str) -> None:
    bundle = Bundle.open(path)
    engine = bundle.manifest.engines[0]
    data = bytes(bundle.read(engine.file))
    while True:
        bundle.add_engine(engine, {engine.file.path: data})


@pytest.mark.skipif(os.name == "nt", reason="kill -9 is a POSIX matter")
def test_kill_9_while_an_engine_is_added_never_leaves_a_half_state(bundle):
    context = multiprocessing.get_context("spawn")
    for delay in (0.0, 0.01, 0.02, 0.05):
        writer = context.Process(target=rewrite_for_ever, args=(str(bundle.path),))
        writer.start()
        deadline = time.monotonic() + 30
        while not list(bundle.path.parent.glob(".pool.bundle.lock")) and time.monotonic() < deadline:
            Bundle.open(bundle.path).check_files()
        time.sleep(delay)
        assert writer.is_alive()
        writer.kill()
        writer.join()
        Bundle.open(bundle.path).check_files()


def test_record_file_and_record_bytes_agree(tmp_path):
    data = os.urandom(3_000_000)
    (tmp_path / "f").write_bytes(data)
    assert record_file(tmp_path, "f") == record_bytes("f", data)


def test_an_engine_can_be_taken_out(bundle):
    [engine] = bundle.manifest.engines
    with pytest.raises(BundleError, match=f"has no engine 'int8'; its engines: {engine.name}"):
        bundle.remove_engine("int8")
    emptied = bundle.remove_engine(engine.name)
    assert emptied.manifest.engines == ()
    assert not (bundle.path / engine.file.path).exists()
    emptied.check_files()


def test_the_rest_of_a_dead_writer_goes_with_the_next_one(bundle):
    [engine] = bundle.manifest.engines
    rests = [
        bundle.path / ".manifest.json.writing-ab12cd_e",
        bundle.path / "engines" / f".{Path(engine.file.path).name}.writing-zzzzzzz0",
        bundle.path / engine.key.path(b"killed before the manifest named it", ".blob"),
    ]
    kept = [bundle.path / ".notes.markdown", bundle.path / ".keep.this.file", bundle.path / "engines" / "mine.blob"]
    for path in (*rests, *kept):
        path.write_bytes(b"half")
    bundle.add_engine(engine, {engine.file.path: bytes(bundle.read(engine.file))})
    assert not any(path.exists() for path in rests)
    assert all(path.exists() for path in kept)


def second_engine(bundle: Bundle) -> tuple[EngineRecord, bytes]:
    first = bundle.manifest.engines[0]
    data = bytes(bundle.read(first.file))
    key = msgspec.structs.replace(first.key, precision=Precision.FP16)
    return msgspec.structs.replace(first, key=key, file=record_bytes(key.path(data, ".blob"), data)), data


def test_an_engine_that_the_manifest_names_already_stays_when_the_rest_fails(bundle, monkeypatch):
    """Ctrl-C, or an error of the disk, while the rename is flushed: the new manifest may be there then."""
    second, data = second_engine(bundle)
    flush = storage.sync_folder

    def interrupted(folder: Path) -> None:
        flush(folder)
        if folder == bundle.path:  # the manifest has just been renamed
            raise KeyboardInterrupt

    monkeypatch.setattr(storage, "sync_folder", interrupted)
    with pytest.raises(KeyboardInterrupt):
        bundle.add_engine(second, {second.file.path: data})
    now = Bundle.open(bundle.path)
    assert second in now.manifest.engines
    now.check_files()


def test_a_record_whose_file_was_taken_out_meanwhile_is_refused(bundle):
    second, data = second_engine(bundle)
    bundle.add_engine(second, {second.file.path: data})
    bundle.remove_engine(second.name)
    with pytest.raises(BundleError, match=r"does not hold .* any more: another process took .* out"):
        bundle.add_engine(second, {})
    assert len(Bundle.open(bundle.path).manifest.engines) == 1


def come_and_go(path: str) -> None:
    """Add a second engine and take it out again, for ever."""
    bundle = Bundle.open(path)
    second, data = second_engine(bundle)
    while True:
        bundle.add_engine(second, {second.file.path: data})
        with contextlib.suppress(BundleError):  # the other writer was faster
            bundle.remove_engine(second.name)


@pytest.mark.skipif(os.name == "nt", reason="kill -9 is a POSIX matter")
def test_engines_come_and_go_under_running_readers(bundle):
    """Two writers, killed and started again; readers find one state or the other, and what was opened stays."""
    images = np.random.default_rng(0).standard_normal((2, *bundle.manifest.input.opt_shape[1:])).astype(np.float32)
    expected = pooled(images)
    context = multiprocessing.get_context("spawn")

    def writer() -> Any:
        process = context.Process(target=come_and_go, args=(str(bundle.path),))
        process.start()
        return process

    def check(backbone: EdgeBackbone) -> None:
        for ours, right in zip(backbone(images).feature_maps, expected, strict=True):
            np.testing.assert_allclose(ours, right, rtol=1e-5, atol=1e-5)

    writers = [writer(), writer()]
    seen = set()
    try:
        with EdgeBackbone.from_pretrained(bundle.path) as opened:
            deadline = time.monotonic() + 60
            for round in itertools.count():
                with EdgeBackbone.from_pretrained(bundle.path) as backbone:
                    check(backbone)
                check(opened)
                seen.add(len(Bundle.open(bundle.path).manifest.engines))
                if round % 25 == 24:
                    victim = round // 25 % 2
                    assert writers[victim].is_alive()  # the two have not been in each other's way
                    writers[victim].kill()
                    writers[victim].join()
                    Bundle.open(bundle.path)
                    writers[victim] = writer()
                if (round >= 150 and seen == {1, 2}) or time.monotonic() > deadline:
                    break
    finally:
        for process in writers:
            process.kill()
            process.join()
    assert seen == {1, 2}
    [first, *_] = bundle.manifest.engines
    last = Bundle.open(bundle.path).add_engine(first, {first.file.path: bytes(bundle.read(first.file))})
    last.check_files()
    assert not list(bundle.path.rglob(".*"))


def test_a_disk_that_is_full_leaves_the_bundle_as_it_was(bundle, tmp_path):
    """A limit on the size of files is as good as a full disk: the write fails in the middle."""
    before = {path: path.read_bytes() for path in bundle.path.rglob("*") if path.is_file()}
    code = """
import resource, signal, sys
from edge_backbones.bundle.reader import Bundle
from edge_backbones.bundle.writer import record_bytes
from edge_backbones.spec import Precision
import msgspec
bundle = Bundle.open(sys.argv[1])
[engine] = bundle.manifest.engines
data = b"x" * 3_000_000
key = msgspec.structs.replace(engine.key, precision=Precision.FP16)
other = msgspec.structs.replace(engine, key=key, file=record_bytes(key.path(data, ".blob"), data))
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]),) * 2)
try:
    bundle.add_engine(other, {other.file.path: data})
except Exception as error:
    print(type(error).__name__, error)
"""
    command = [sys.executable, "-c", code, str(bundle.path), "1000000"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout.startswith("BundleError "), done.stderr
    assert "cannot be written: File too large" in done.stdout
    assert "The bundle is as it was" in done.stdout
    assert len(done.stdout.splitlines()) == 1
    assert {path: path.read_bytes() for path in bundle.path.rglob("*") if path.is_file()} == before


def test_an_engine_goes_again_when_the_manifest_cannot_be_written(bundle, monkeypatch):
    [engine] = bundle.manifest.engines
    other, data = second_engine(bundle)
    monkeypatch.setattr(bundle_writer, "write_manifest", lambda *_: (_ for _ in ()).throw(BundleError("full")))
    with pytest.raises(BundleError, match="full"):
        bundle.add_engine(other, {other.file.path: data})
    assert not (bundle.path / other.file.path).exists()
    with pytest.raises(BundleError, match="full"):
        bundle.add_engine(engine, {engine.file.path: data})
    assert (bundle.path / engine.file.path).exists()  # the manifest names it
    Bundle.open(bundle.path).check_files()
