"""The end of a process while threads are in calls: it ends with its own exit code, and says nothing of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

from edge_backbones.engines import exits
from edge_backbones.errors import InferenceError
from edge_backbones.runtime.backbone import EdgeBackbone
from edge_backbones.testing import make_bundle, pooled, pooling_input

ROOT = Path(__file__).parents[3]
BEGIN = """
import os, signal, sys, threading
import numpy as np
from edge_backbones import EdgeBackbone, EdgeBackbonesError

backbone = EdgeBackbone.from_pretrained(sys.argv[1])
images = np.ones(backbone.input.opt_shape, np.float32)
begun = threading.Barrier(4)

def work():
    backbone(images)
    begun.wait()
    try:
        while True:
            backbone(images)
    except EdgeBackbonesError as error:
        os.write(1, f"{type(error).__name__}: {error}\\n".encode())

for _ in range(3):
    threading.Thread(target=work, daemon=True).start()
begun.wait()
"""
REFUSED = "InferenceError: Python is ending, and no call begins any more: stop your threads before the program ends"
CLOSED = "InputError: this EdgeBackbone was closed: open the bundle again"


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    """Large images: at any moment the threads are in the library, not in Python."""
    return make_bundle(tmp_path_factory.mktemp("exits") / "pool.bundle", pooling_input(4, 512, 512)).path


def run(code: str, path: Path) -> subprocess.CompletedProcess:
    whole = [sys.executable, "-c", BEGIN + textwrap.dedent(code), path]
    return subprocess.run(whole, capture_output=True, text=True, cwd=ROOT, timeout=60, check=False)


@pytest.mark.parametrize(
    ("ending", "code", "said", "last"),
    [
        ("pass", 0, REFUSED, ""),
        ("sys.exit(7)", 7, REFUSED, ""),
        ("raise ValueError('mine')", 1, REFUSED, "ValueError: mine"),
        ("backbone.close()", 0, CLOSED, ""),
        ("backbone.close(); sys.exit(7)", 7, CLOSED, ""),
    ],
)
def test_a_process_ends_while_threads_are_in_calls(path, ending, code, said, last):
    done = run(ending, path)
    assert done.returncode == code, done.stderr
    assert (done.stderr.strip().splitlines() or [""])[-1] == last
    assert set(done.stdout.splitlines()) <= {said}  # a thread may not come to say it


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has other signals")
@pytest.mark.parametrize(
    ("ending", "code"),
    [
        ("os.kill(os.getpid(), signal.SIGINT); threading.Event().wait(10)", -signal.SIGINT),
        ("os.kill(os.getpid(), signal.SIGTERM); threading.Event().wait(10)", -signal.SIGTERM),
        (
            "signal.signal(signal.SIGTERM, lambda *_: sys.exit(5)); os.kill(os.getpid(), signal.SIGTERM)\n"
            "threading.Event().wait(10)",
            5,
        ),
        (
            "threading.Timer(0.2, lambda: os.kill(os.getpid(), signal.SIGINT)).start()\n"
            "while True: backbone(images)  # Ctrl-C finds the main thread in a call",
            -signal.SIGINT,
        ),
    ],
    ids=["Ctrl-C", "SIGTERM", "SIGTERM that is handled", "Ctrl-C in a call"],
)
def test_a_signal_ends_a_process_whose_threads_are_in_calls(path, ending, code):
    done = run(ending, path)
    assert done.returncode == code, done.stderr
    assert "terminate" not in done.stderr


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_forked_child_does_not_wait_for_the_calls_of_its_parent(path):
    done = run(
        """
        import time
        child = os.fork()
        if child == 0:
            sys.exit(3)
        start = time.monotonic()
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3
        assert time.monotonic() - start < 5  # and not the ten seconds that calls are waited for
        """,
        path,
    )
    assert done.returncode == 0, done.stderr


def test_maps_of_a_call_are_right_though_the_engine_is_closed_meanwhile(path):
    code = """
    import time
    from edge_backbones.testing import pooled
    images = np.random.default_rng(0).standard_normal(images.shape).astype(np.float32)
    expected, wrong = pooled(images), []

    def check():
        try:
            while True:
                for mine, right in zip(other(images).feature_maps, expected):
                    if not np.allclose(mine, right, atol=1e-5):
                        wrong.append(mine)
        except EdgeBackbonesError:
            pass

    for _ in range(5):
        other = EdgeBackbone.from_pretrained(sys.argv[1])
        threads = [threading.Thread(target=check) for _ in range(3)]
        [thread.start() for thread in threads]
        time.sleep(0.05)
        other.close()
        [thread.join() for thread in threads]
    os.write(2, f"{len(wrong)} wrong".encode())
    """
    done = run(code, path)
    assert (done.returncode, done.stderr) == (0, "0 wrong")


def test_a_session_knows_whether_it_is_called(path):
    """What the hook asks. An engine that has ended still gives what was begun, and refuses what was not."""
    images = np.random.default_rng(0).standard_normal((4, 3, 512, 512)).astype(np.float32)
    with EdgeBackbone.from_pretrained(path) as backbone:
        engine = backbone._engine
        assert not engine.is_called()
        np.testing.assert_allclose(backbone(images).feature_maps[0], pooled(images)[0], atol=1e-5)
        assert not engine.is_called()
        request = engine._idle.pop()
        assert engine.is_called()
        engine.end()
        assert engine.is_called()
        engine._idle.append(request)
        assert not engine.is_called()
        with pytest.raises(InferenceError, match=r"^Python is ending"):
            backbone(images)


def test_calls_that_are_counted_are_refused_when_python_ends():
    calls = exits._Calls()
    with calls:
        assert calls.is_called()
        calls.end()
    assert not calls.is_called()
    with pytest.raises(InferenceError, match=r"^Python is ending"), calls:
        pass
    assert not calls.is_called()
