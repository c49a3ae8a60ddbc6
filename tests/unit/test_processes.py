"""Backbones in several processes: forked children, pickles, copies. What forks is a script of its own, which is killed if it
hangs."""

from __future__ import annotations

import copy
import os
import pickle
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import msgspec
import numpy as np
import pytest

from edge_backbones import errors, parity_report
from edge_backbones.bundle.writer import record_bytes
from edge_backbones.engines import forks
from edge_backbones.engines.openvino.session import OpenVinoSession
from edge_backbones.errors import BundleError, EngineMismatchError, InputError
from edge_backbones.runtime.backbone import EdgeBackbone
from edge_backbones.testing import SPEC, NumpySession, make_bundle, pooled, pooling_input

ROOT = Path(__file__).parents[2]
REFUSED = (
    "InferenceError: OpenVINO was started in the process that this one was forked from, and its threads do not exist"
)

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")

BEGIN = """
import gc, os, sys, threading
import numpy as np
from edge_backbones import EdgeBackbone
from edge_backbones.testing import pooled

path = sys.argv[1]
images = np.random.default_rng(0).standard_normal((2, 3, 32, 48)).astype(np.float32)

def check(backbone):
    np.testing.assert_allclose(backbone(images).feature_maps[0], pooled(images)[0], atol=1e-5)

def attempt(call):
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"

def in_child(work, leave=os._exit):
    '''What work() returns in a forked child, and how the child ended.'''
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writer, str(work()).encode())
        leave(0)
    os.close(writer)
    with os.fdopen(reader) as answer:
        print(answer.read())
    assert os.waitpid(child, 0)[1] == 0
"""


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("processes") / "pool.bundle").path


def run(code: str, *arguments: object) -> list[str]:
    """The lines that a script prints; one that hangs fails."""
    whole = [sys.executable, "-c", BEGIN + textwrap.dedent(code), *map(str, arguments)]
    done = subprocess.run(whole, capture_output=True, text=True, cwd=ROOT, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()


# ---- forked children


@needs_fork
@pytest.mark.parametrize("leave", ["os._exit", "sys.exit"])
def test_a_forked_child_refuses_the_engine_of_its_parent(path, leave):
    """The child ends too: what it inherited is not destroyed, which would wait for threads that it does not have."""
    lines = run(
        f"""
        backbone = EdgeBackbone.from_pretrained(path)
        check(backbone)
        in_child(lambda: attempt(lambda: backbone(images)), {leave})
        check(backbone)
        """,
        path,
    )
    assert len(lines) == 1
    assert lines[0].startswith(REFUSED)
    assert lines[0].endswith("or fork before a bundle is opened")


@needs_fork
@pytest.mark.parametrize("leave", ["os._exit", "sys.exit"])
@pytest.mark.parametrize("parent", ["backbone = None; gc.collect()", "backbone.close()", "pass"])
def test_a_forked_child_opens_no_engine_of_a_library_that_its_parent_uses(path, parent, leave):
    lines = run(
        f"""
        backbone = EdgeBackbone.from_pretrained(path)
        check(backbone)
        {parent}
        in_child(lambda: attempt(lambda: EdgeBackbone.from_pretrained(path)), {leave})
        """,
        path,
    )
    assert len(lines) == 1
    assert lines[0].startswith(REFUSED)


@needs_fork
@pytest.mark.parametrize("leave", ["os._exit", "sys.exit"])
def test_a_forked_child_closes_collects_and_forks_again(path, leave):
    lines = run(
        f"""
        first, second = EdgeBackbone.from_pretrained(path), EdgeBackbone.from_pretrained(path)
        check(first)
        check(second)

        def work():
            global first
            first.close()
            first = None
            gc.collect()
            in_child(lambda: attempt(lambda: second(images)))
            return attempt(lambda: second(images))

        sys.stdout.flush()
        in_child(work, {leave})
        check(first)
        """,
        path,
    )
    assert len(lines) == 2
    assert all(line.startswith(REFUSED) for line in lines)


@needs_fork
def test_a_thread_may_fork_while_others_run(path):
    lines = run(
        """
        backbone, stop = EdgeBackbone.from_pretrained(path), threading.Event()

        def loop():
            while not stop.is_set():
                check(backbone)

        def fork():
            for _ in range(10):
                in_child(lambda: attempt(lambda: backbone(images)))

        busy, forking = threading.Thread(target=loop), threading.Thread(target=fork)
        busy.start(), forking.start()
        forking.join()
        stop.set()
        busy.join()
        """,
        path,
    )
    assert len(lines) == 10
    assert all(line.startswith(REFUSED) for line in lines)


@needs_fork
def test_children_that_are_forked_before_a_bundle_is_opened_open_it(path):
    """What the refusal advises."""
    lines = run(
        """
        def work():
            with EdgeBackbone.from_pretrained(path) as backbone:
                check(backbone)
            return "fine"

        in_child(work)
        in_child(work)
        """,
        path,
    )
    assert lines == ["fine", "fine"]


def test_a_closed_engine_is_told_from_an_inherited_one(path):
    backbone = EdgeBackbone.from_pretrained(path)
    backbone.close()
    backbone._engine.abandon()
    with pytest.raises(InputError, match="this EdgeBackbone was closed"):
        backbone(np.zeros((2, 3, 32, 48), np.float32))
    opened = EdgeBackbone.from_pretrained(path)
    assert isinstance(opened._engine, OpenVinoSession)
    assert opened._engine in forks._inherited


# ---- pickles


def test_a_pickled_backbone_opens_its_bundle_in_another_process(path):
    backbone = EdgeBackbone.from_pretrained(os.path.relpath(path), threads=1, check_finite=False)
    backbone.out_indices = [-1]
    backbone.config.note = "mine"
    twin = pickle.loads(pickle.dumps(backbone))
    assert (twin.engine, twin.device, twin.input) == (backbone.engine, backbone.device, backbone.input)
    assert (twin.out_features, twin.out_indices, twin.config) == (["pool8"], [-1], backbone.config)
    assert twin._origin == backbone._origin
    assert not twin._checks_values
    backbone.close()
    images = np.random.default_rng(0).standard_normal((2, 3, 32, 48)).astype(np.float32)
    np.testing.assert_allclose(twin(images).feature_maps[0], pooled(images)[1], atol=1e-5)


def test_spawned_processes_get_their_own_engine(path, tmp_path):
    """Pool.map with a backbone in the arguments, as Ray and DataLoader workers have it. The spawned process starts in another
    folder than the one that the bundle was opened from."""
    script = tmp_path / "spawning.py"
    script.write_text(
        textwrap.dedent(
            """
            import multiprocessing, os, sys
            import numpy as np
            from edge_backbones import EdgeBackbone

            def work(backbone):
                os.chdir("/")
                return os.getpid(), [m.shape for m in backbone(np.zeros((3, 3, 32, 48), np.float32)).feature_maps]

            if __name__ == "__main__":
                os.chdir(os.path.dirname(sys.argv[1]))
                backbone = EdgeBackbone.from_pretrained(os.path.basename(sys.argv[1]))
                backbone.out_features = ["pool8"]
                backbone(np.zeros((2, 3, 32, 48), np.float32))
                with multiprocessing.get_context("spawn").Pool(1) as pool:
                    ((process, shapes),) = pool.map(work, [backbone])
                print(process != os.getpid(), shapes)
            """
        ),
        encoding="utf-8",
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, script, path], capture_output=True, text=True, timeout=60, env=environment, check=False
    )
    assert done.stdout == "True [(3, 3, 4, 6)]\n", done.stderr


def test_a_backbone_of_no_bundle_is_not_pickled():
    backbone = EdgeBackbone(SPEC, pooling_input(), NumpySession(pooling_input()))
    with pytest.raises(InputError, match="is not from a bundle and cannot be pickled: write a bundle"):
        pickle.dumps(backbone)


def test_a_bundle_that_is_gone_is_named(path, tmp_path):
    shutil.copytree(path, tmp_path / "b.bundle")
    with EdgeBackbone.from_pretrained(tmp_path / "b.bundle") as backbone:
        data = pickle.dumps(backbone)
    shutil.move(tmp_path / "b.bundle", tmp_path / "c.bundle")
    with pytest.raises(BundleError, match=r"holds the path of its bundle, and .*b\.bundle is not there any more"):
        pickle.loads(data)
    shutil.move(tmp_path / "c.bundle", tmp_path / "b.bundle")
    pickle.loads(data).close()


def test_a_bundle_that_was_built_again_is_not_taken_for_the_old_one(path, tmp_path):
    target = tmp_path / "b.bundle"
    make_bundle(target)
    with EdgeBackbone.from_pretrained(target) as backbone:
        data = pickle.dumps(backbone)
    shutil.rmtree(target)
    make_bundle(target)  # the same network: nothing has changed
    pickle.loads(data).close()
    shutil.rmtree(target)
    make_bundle(target, pooling_input(4))
    with pytest.raises(BundleError, match=r"b\.bundle was built again since this backbone was pickled: open it"):
        pickle.loads(data)


def test_other_weights_are_not_taken_for_the_old_ones(tmp_path):
    bundle = make_bundle(tmp_path / "b.bundle")
    only = bundle.manifest.engines[0]
    with EdgeBackbone.from_pretrained(bundle.path) as backbone:
        data = pickle.dumps(backbone)
    blob = bytes(bundle.read(only.file))
    for change in ({"precision": "int8"}, {"graph_sha256": "0" * 64}):
        key = msgspec.structs.replace(only.key, **change)
        file = record_bytes(key.path(blob, ".blob"), blob)
        bundle = bundle.add_engine(msgspec.structs.replace(only, key=key, file=file), {file.path: blob})
        if "precision" in change:  # an engine that would be preferred: the old one is still there
            twin = pickle.loads(data)
            assert "fp32" in twin.engine
            twin.close()
    with pytest.raises(BundleError, match="was built again"):
        pickle.loads(data)


def test_an_engine_that_is_not_there_any_more_is_named_with_the_bundle(path, monkeypatch):
    with EdgeBackbone.from_pretrained(path) as backbone:
        data = pickle.dumps(backbone)
    monkeypatch.setattr("edge_backbones.engines.registry.reasons_against", lambda key, host: ["is of another machine"])
    with pytest.raises(EngineMismatchError, match=r"no engine of .*pool\.bundle can run here.*is of another machine"):
        pickle.loads(data)


@pytest.mark.parametrize(
    "error",
    [
        errors.MissingDependencyError("the CPU engine", "cpu"),
        errors.BrokenLibraryError(ImportError("wrong ELF class")),
        parity_report.ParityError("it left its gate", 1, 2),  # type: ignore[arg-type]
        errors.InputError("it does not fit"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_errors_come_out_of_a_worker_as_they_are(error):
    """A pool of multiprocessing waits for ever for an error that does not unpickle."""
    twin = pickle.loads(pickle.dumps(error))
    assert (type(twin), str(twin), twin.args, vars(twin)) == (type(error), str(error), error.args, vars(error))


# ---- copies


@pytest.mark.parametrize("make", [copy.copy, copy.deepcopy])
def test_copies_share_the_engine_and_choose_their_own_stages(path, make):
    images = np.random.default_rng(0).standard_normal((2, 3, 32, 48)).astype(np.float32)
    backbone = EdgeBackbone.from_pretrained(path)
    twin = make(backbone)
    assert twin._engine is backbone._engine
    assert twin.config is not backbone.config
    assert twin.config == backbone.config
    twin.config.out_features = ["pool8"]
    assert (len(twin(images).feature_maps), len(backbone(images).feature_maps)) == (1, 2)
    del backbone
    np.testing.assert_allclose(twin(images).feature_maps[0], pooled(images)[1], atol=1e-5)


def test_a_deep_copy_keeps_what_is_shared_shared(path):
    with EdgeBackbone.from_pretrained(path) as backbone:
        first, second = copy.deepcopy([backbone, backbone])
        assert first is second
        assert first is not backbone


@pytest.mark.parametrize("closed", [0, 1])
def test_closing_one_copy_closes_the_engine_of_all(path, closed):
    backbone = EdgeBackbone.from_pretrained(path)
    both = (backbone, copy.deepcopy(backbone))
    both[closed].close()
    for one in both:
        with pytest.raises(InputError, match="this EdgeBackbone was closed"):
            one(np.zeros((2, 3, 32, 48), np.float32))
