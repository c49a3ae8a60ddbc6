"""The application of a robot goes on, whatever the bundle has become when it is told to take up a new engine."""

from __future__ import annotations

import os
import queue
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import msgspec
import numpy as np
import pytest

from edge_backbones import Bundle, EdgeBackbone
from edge_backbones.bundle import manifest
from edge_backbones.bundle.writer import record_bytes
from edge_backbones.errors import InputError

JETSON = Path(__file__).parents[2] / "build_scripts" / "jetson"

# Stands in front of OpenVINO: blobs that begin so crash inside native code, or never come back from it.
ENGINE_LIBRARY = """
import ctypes, sys, time
sys.modules.setdefault("openvino_telemetry", None)
import openvino
load = openvino.Core.import_model
def import_model(self, blob, *rest):
    begin = bytes(blob.data[:5])
    if begin == b"crash":
        ctypes.string_at(0)
    while begin == b"hangs":
        time.sleep(1)
    return load(self, blob, *rest)
openvino.Core.import_model = import_model
"""


class Robot:
    """robot.py in a process; what it prints is read as it comes."""

    def __init__(self, bundle: Path, library: Path, *options: str) -> None:
        (library / "sitecustomize.py").write_text(ENGINE_LIBRARY, encoding="utf-8")
        paths = [str(library), *filter(None, [os.environ.get("PYTHONPATH")])]
        self.process = subprocess.Popen(
            [sys.executable, str(JETSON / "robot.py"), str(bundle), "--every", "0.1", *options],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        self._lines: queue.Queue[str] = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        for line in self.process.stdout:
            self._lines.put(line.rstrip("\n"))

    def told(self, pattern: str) -> str:
        """The next line that is not of the latency, which has to match; and a line of the latency after it."""
        deadline, found = time.monotonic() + 120, None
        while True:
            line = self._lines.get(timeout=max(0.1, deadline - time.monotonic()))
            if re.fullmatch(r"\d+ frames: median [\d.]+ ms, p99 [\d.]+ ms", line):
                if found is not None:
                    return found
            else:
                assert found is None, f"one line was expected, and there was {line!r} after {found!r}"
                assert re.search(pattern, line), line
                assert line.isprintable(), line
                found = line

    def take_up(self) -> None:
        self.process.send_signal(signal.SIGHUP)

    def end(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)

    def __enter__(self) -> Robot:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        self._reader.join()
        self.process.stdout.close()


@pytest.fixture(scope="module")
def mine(bundle, tmp_path_factory) -> Path:
    return shutil.copytree(bundle, tmp_path_factory.mktemp("robot") / "net.bundle")


@pytest.fixture(scope="module")
def robot(mine) -> Iterator[Robot]:
    with Robot(mine, mine.parent, "--patience", "60") as running:
        running.told("layer1")
        yield running


# ---- what a bundle can become


def rewrite(folder: Path, change: Callable[[bytes], bytes]) -> None:
    """Change every engine and make the manifest agree, as a forger does."""
    opened = Bundle.open(folder)
    engines = []
    for engine in opened.manifest.engines:
        data = change((folder / engine.file.path).read_bytes())
        (folder / engine.file.path).write_bytes(data)
        engines.append(msgspec.structs.replace(engine, file=record_bytes(engine.file.path, data)))
    forged = msgspec.structs.replace(opened.manifest, engines=tuple(engines))
    (folder / "manifest.json").write_bytes(manifest.encode(forged))


def engines(folder: Path) -> Iterator[Path]:
    return (folder / "engines").iterdir()


def no_object(folder: Path) -> None:
    (folder / "manifest.json").write_text("{}", encoding="utf-8")


def half_a_manifest(folder: Path) -> None:
    data = (folder / "manifest.json").read_bytes()
    (folder / "manifest.json").write_bytes(data[: len(data) // 2])


def nested_manifest(folder: Path) -> None:
    (folder / "manifest.json").write_bytes(b'{"a":' + b"[" * 100_000)


def nested_config(folder: Path) -> None:
    data = (folder / "manifest.json").read_bytes()
    deep = b'"source": {"config": {"a": ' + b"[" * 2000 + b"]" * 2000 + b"},"
    (folder / "manifest.json").write_bytes(re.sub(rb'"source":\s*\{', lambda _: deep, data, count=1))


def sparse_manifest(folder: Path) -> None:
    os.truncate(folder / "manifest.json", 1 << 30)


def fifo_manifest(folder: Path) -> None:
    (folder / "manifest.json").unlink()
    os.mkfifo(folder / "manifest.json")


def folder_for_a_manifest(folder: Path) -> None:
    (folder / "manifest.json").unlink()
    (folder / "manifest.json").mkdir()


def link_to_itself(folder: Path) -> None:
    (folder / "manifest.json").unlink()
    (folder / "manifest.json").symlink_to("manifest.json")


def nothing_there(folder: Path) -> None:
    shutil.rmtree(folder)


def half_copied(folder: Path) -> None:
    for path in engines(folder):
        path.unlink()


def cut_engine(folder: Path) -> None:
    for path in engines(folder):
        os.truncate(path, path.stat().st_size // 2)


def sparse_engine(folder: Path) -> None:
    for path in engines(folder):
        os.truncate(path, 1 << 40)


def golden_of_another_network(folder: Path) -> None:
    """Whole and true to its manifest; only the maps are not what this network returns."""
    opened = Bundle.open(folder)
    record = opened.manifest.golden
    path = folder / record.file.path
    with np.load(path) as archive:
        arrays = {key: archive[key] for key in archive.files}
    name = next(key for key in arrays if key.endswith("/layer1"))
    arrays[name] = arrays[name][:, ::-1].copy()
    np.savez(path, **arrays)
    golden = msgspec.structs.replace(record, file=record_bytes(record.file.path, path.read_bytes()))
    (folder / "manifest.json").write_bytes(manifest.encode(msgspec.structs.replace(opened.manifest, golden=golden)))


def golden_that_is_none(folder: Path) -> None:
    opened = Bundle.open(folder)
    record = opened.manifest.golden
    (folder / record.file.path).write_bytes(b"PK\x03\x04 and no more")
    golden = msgspec.structs.replace(record, file=record_bytes(record.file.path, b"PK\x03\x04 and no more"))
    (folder / "manifest.json").write_bytes(manifest.encode(msgspec.structs.replace(opened.manifest, golden=golden)))


TRAPS: dict[Callable[[Path], None], str] = {
    no_object: r"manifest",
    half_a_manifest: r"manifest",
    nested_manifest: r"",
    nested_config: r"",
    sparse_manifest: r"manifest",
    fifo_manifest: r"",
    folder_for_a_manifest: r"manifest",
    link_to_itself: r"manifest",
    nothing_there: r"is not a bundle",
    half_copied: r"is missing",
    cut_engine: r"bytes",
    sparse_engine: r"",
    golden_of_another_network: r"layer1",
    golden_that_is_none: r"golden",
}
FORGED = {
    "no UTF-8": (lambda data: b"\xff\xfe\x1b[31m" + data, r""),
    "empty": (lambda data: b"", r""),
    "zeros": (lambda data: bytes(len(data)), r""),
    "crash": (lambda data: b"crash" + data, r"SIGSEGV"),
}


def refused(robot: Robot, mine: Path, bundle: Path, spoil: Callable[[Path], None], why: str) -> None:
    spoil(mine)
    try:
        robot.take_up()
        robot.told(f"^serving on with the engine in use: (?=.).*{why}")
        assert robot.process.poll() is None
    finally:
        shutil.rmtree(mine, ignore_errors=True)
        shutil.copytree(bundle, mine)


@pytest.mark.parametrize("spoil", TRAPS, ids=lambda trap: trap.__name__)
def test_a_robot_serves_on_beside(robot, mine, bundle, spoil):
    refused(robot, mine, bundle, spoil, TRAPS[spoil])


@pytest.mark.parametrize("name", FORGED)
def test_a_robot_serves_on_beside_an_engine_that_is(robot, mine, bundle, name):
    change, why = FORGED[name]
    refused(robot, mine, bundle, lambda folder: rewrite(folder, change), why)


def test_after_all_that_it_takes_up_a_good_one_and_ends_cleanly(robot, mine):
    opened = Bundle.open(mine)
    with EdgeBackbone.from_pretrained(mine) as backbone:
        best = backbone.engine
    opened.remove_engine(best)
    [rest] = Bundle.open(mine).manifest.engines
    robot.take_up()
    robot.told(f"^changed to {re.escape(rest.name)}$")
    assert robot.end() == 0


def test_an_engine_that_hangs_is_given_up(bundle, tmp_path):
    mine = shutil.copytree(bundle, tmp_path / "net.bundle")
    with Robot(mine, tmp_path, "--patience", "3") as robot:
        robot.told("layer1")
        rewrite(mine, lambda data: b"hangs" + data)
        robot.take_up()
        robot.told("^serving on with the engine in use: .* took longer than 3 s")
        robot.take_up()  # and the end does not wait for what is under way
        assert robot.end() == 0


def test_a_bundle_that_cannot_be_opened_at_first_is_told_in_one_line(tmp_path):
    command = [sys.executable, str(JETSON / "robot.py"), str(tmp_path / "net.bundle")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(r".*net\.bundle is not a bundle.*\n", done.stderr)


# ---- what fits the application


@pytest.fixture
def module(monkeypatch):
    monkeypatch.syspath_prepend(str(JETSON))
    import robot

    return robot


def test_an_engine_with_other_stages_or_for_other_frames_does_not_take_the_place(bundle, module):
    with EdgeBackbone.from_pretrained(bundle) as old:
        engine, frame = old.engine, np.zeros(old.input.opt_shape, np.float32)
        with module.take_up(str(bundle), "cpu", engine, old, frame) as new:
            assert new.engine == engine
        for what, other in (("out_features", ["layer4"]), ("channels", [1, 2, 3, 4]), ("strides", [(2, 2)] * 4)):
            before = {"out_features": old.out_features, "channels": old.channels, "strides": old.strides, what: other}
            with pytest.raises(module.RefusedError, match=f"the {what} of the new bundle are") as refused:
                module.take_up(str(bundle), "cpu", engine, SimpleNamespace(**before), frame)
            assert str(other) in str(refused.value)
            assert str(getattr(old, what)) in str(refused.value)
        with pytest.raises(InputError):
            module.take_up(str(bundle), "cpu", engine, old, frame[..., :-1])


def test_a_line_of_the_log_is_one_line_without_controls(module):
    assert module.one_line("a\nb\x1b[31mc\u202ed") == "a b\\x1b[31mc\\u202ed"
    assert module.one_line(MemoryError()) == "MemoryError"
    assert len(module.one_line("x" * 100_000)) == 1000
