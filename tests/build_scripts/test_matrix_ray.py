"""A build matrix on a Ray cluster: what travels to a worker, what comes back, and what happens when it is gone."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import os
import pickle
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import msgspec
import numpy as np
import pytest

from build_scripts import matrix_cells, matrix_ray
from build_scripts.build_matrix import Ending
from build_scripts.matrix_tasks import Task
from edge_backbones import Bundle, EdgeBackbone
from edge_backbones.bundle.manifest import EngineRecord
from edge_backbones.errors import EdgeBackbonesError, MissingDependencyError
from edge_backbones.machine.profiles import load_profile
from edge_backbones.spec import Precision
from edge_backbones.testing import make_bundle
from tests.build_scripts.matrices import ROOT, command, engine_for, profile_file, write


def test_a_bundle_travels_without_the_engines_of_others(tmp_path):
    bundle = make_bundle(tmp_path / "net.bundle")
    (tmp_path / "copy").mkdir()
    matrix_ray.unpack(matrix_ray.pack(bundle.path), tmp_path / "copy")
    copy = Bundle.open(tmp_path / "copy")
    copy.check_files()
    assert copy.manifest.golden == bundle.manifest.golden
    assert copy.manifest.engines == ()


class FakeRay:
    """A cluster whose worker never answers, and is gone at the second look."""

    class exceptions:
        class RayError(Exception):
            pass

        class RayTaskError(RayError):
            pass

    cloudpickle = SimpleNamespace(register_pickle_by_value=lambda module: None)

    def __init__(self) -> None:
        self.offered = [{"sm_87": 1.0}, {"sm_87": 1.0}, {}]
        self.cancelled: list[object] = []
        self.asked = SimpleNamespace(future=concurrent.futures.Future)

    def init(self, **_: object) -> None:
        pass

    def remote(self, **_: object):
        return lambda function: SimpleNamespace(options=self.options)

    def options(self, **given: object):
        assert given == {"num_cpus": 0, "resources": {"sm_87": 1}}
        return SimpleNamespace(remote=lambda *_: self.asked)

    def cluster_resources(self) -> dict[str, float]:
        return self.offered.pop(0)

    def cancel(self, asked: object, *, force: bool) -> None:
        self.cancelled.append(asked)


def test_nobody_waits_for_a_worker_that_is_gone(monkeypatch, tmp_path):
    """Ray waits for another worker to join, for ever."""
    fake = FakeRay()
    monkeypatch.setitem(sys.modules, "ray", fake)
    monkeypatch.setattr(matrix_ray, "_POLL", 0.01)
    run, resources = matrix_ray.on_ray("auto", matrix_cells.here(1))
    assert resources == {"sm_87": 1.0}
    bundle = make_bundle(tmp_path / "net.bundle")
    task = Task(model="m", precision=Precision.FP32, flavour="openvino", profile="cpu", resource="sm_87")
    with pytest.raises(matrix_cells.NoWorkerError, match="no worker offers sm_87 any more"):
        asyncio.run(asyncio.wait_for(run(task, bundle.path), 30))
    assert fake.offered == []
    assert fake.cancelled == [fake.asked]


def test_what_a_worker_does_before_it_compiles(monkeypatch, tmp_path):
    """It sees its GPU though Ray hides it, and it has the profile that is a file of somebody else's."""
    seen = {}

    def pretend(bundle: Path, *, profile: str, **_: object) -> tuple[str, ...]:
        seen.update(hidden="CUDA_VISIBLE_DEVICES" in os.environ, profile=load_profile(profile), path=Path(profile))
        return (engine_for("orin", bundle).name,)

    monkeypatch.setattr(matrix_ray, "add_engine", pretend)
    monkeypatch.setattr(matrix_ray, "pack", with_engines)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    bundle, text = make_bundle(tmp_path / "net.bundle"), profile_file(tmp_path / "mine.toml")
    (tmp_path / "mine.toml").unlink()
    order = {"precision": "fp32", "flavour": "openvino", "profile": str(tmp_path / "mine.toml"), "targets": ()}
    _, [(record, files)] = matrix_ray._on_worker(order, matrix_ray.pack(bundle.path), text)
    assert msgspec.json.decode(record, type=EngineRecord).key.device_name == "orin"
    assert list(files.values()) == [b"orin"]
    assert (seen["hidden"], seen["profile"].name) == (False, "mine")
    assert not seen["path"].exists()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    matrix_ray._on_worker(order, matrix_ray.pack(bundle.path), text)
    assert seen["hidden"]


def with_engines(bundle: Path) -> bytes:
    """As pack does, and with the engine that engine_for makes others of."""
    import io
    import zipfile

    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for path in (p for p in bundle.rglob("*") if p.is_file()):
            archive.write(path, path.relative_to(bundle))
    return stream.getvalue()


def test_what_a_worker_says_can_be_read_here(monkeypatch, tmp_path):
    """Errors that take two arguments do not survive a pickle."""

    def refuse(*_: object, **__: object) -> None:
        raise MissingDependencyError("compiling for the GPU", "tensorrt")

    monkeypatch.setattr(matrix_ray, "add_engine", refuse)
    bundle = make_bundle(tmp_path / "net.bundle")
    order = {"precision": "fp32", "flavour": "tensorrt", "profile": "jetson-orin-nano", "targets": ()}
    with pytest.raises(EdgeBackbonesError) as caught:
        matrix_ray._on_worker(order, matrix_ray.pack(bundle.path), None)
    assert "needs the 'tensorrt' extra" in str(pickle.loads(pickle.dumps(caught.value)))


@pytest.fixture
def cluster():
    """The address of a machine that is none, with a device that is made up: a cluster of our own, beside any other."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    place = tempfile.mkdtemp(prefix="ray-")  # pytest's folders are too deep for the sockets in it
    start = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", f"--port={address[10:]}"]
    start += ["--node-ip-address=127.0.0.1", f"--temp-dir={place}", "--num-cpus=2", "--resources", '{"sm_87": 1}']
    start += ["--include-dashboard=false", "--disable-usage-stats", "--object-store-memory=200000000"]
    with open(Path(place) / "start.log", "w+") as log:
        head = subprocess.Popen(start, stdout=log, stderr=log, start_new_session=True)
        try:
            while "Ray runtime started" not in Path(log.name).read_text():
                assert head.poll() is None, Path(log.name).read_text()
                time.sleep(0.1)
            yield address
        finally:
            head.send_signal(signal.SIGTERM)  # it ends what it started
            with contextlib.suppress(subprocess.TimeoutExpired):
                head.wait(30)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(head.pid, signal.SIGKILL)
            head.wait()
            shutil.rmtree(place, ignore_errors=True)


def test_a_small_matrix_on_a_ray_cluster(folder, cluster):
    """The device's engine is made where the device is, and comes back: one that nobody makes here."""
    device = '\n[[devices]]\nname = "orin"\nprofile = "mine.toml"\nresource = "sm_87"\n'
    device += '\n[[devices]]\nname = "thor"\nprofile = "cpu"\nflavour = "openvino"\nresource = "sm_110"\n'
    path = write(folder, more=", out_indices = [9]", device=device)
    path.write_text(path.read_text().replace('[[devices]]\nprofile = "rtx-40"\n', ""))
    profile_file(folder / "mine.toml")
    quiet = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0", "RAY_DISABLE_IMPORT_WARNING": "1"}
    done = subprocess.run(
        command(path, "--ray", cluster), cwd=ROOT, capture_output=True, text=True, env=quiet, check=False
    )
    assert done.returncode == 1, done.stderr[-3000:]
    endings = msgspec.json.decode(done.stdout.strip().splitlines()[-1], type=dict[str, Ending])
    assert endings["test_resnet.int8 on orin"].status == "made", endings
    assert endings["test_resnet.int8 on thor"].why == "no worker offers sm_110"
    assert endings["test_efficientnet.fp32"].status == "failed"
    assert "9" in endings["test_efficientnet.fp32"].why
    bundle = Bundle.open(folder / "bundles" / "test_resnet.int8.bundle")
    bundle.check_files()
    own, orin = bundle.manifest.engines
    assert (own.name,) == endings["test_resnet.int8"].engines
    assert (orin.name,) == endings["test_resnet.int8 on orin"].engines
    assert (orin.key.flavour, orin.key.gpu.architectures) == ("tensorrt_rtx", ("sm_89",))
    with EdgeBackbone.from_pretrained(bundle.path) as backbone:
        assert backbone(np.zeros((1, 3, 32, 64), np.float32)).feature_maps
