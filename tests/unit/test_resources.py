"""A process without memory, threads or file descriptors: the error says so, and never that the engine is to be compiled."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from edge_backbones.engines import select as session
from edge_backbones.engines.openvino import session as openvino
from edge_backbones.errors import (
    EngineMismatchError,
    InferenceError,
    MissingDependencyError,
    ResourceError,
    lack_told,
    refuse_lack,
)
from edge_backbones.runtime.backbone import EdgeBackbone
from edge_backbones.testing import make_bundle, pooled

ROOT = Path(__file__).parents[2]
PLUGIN = "/env/openvino/libs/libopenvino_intel_cpu_plugin.so"
# Recorded from OpenVINO 2026.4 under RLIMIT_AS and RLIMIT_NPROC.
NO_ROOM = f'Exception from core.cpp:237:\nCannot load library "{PLUGIN}": failed to map segment from shared object\n'
NO_THREAD = "Exception from core.cpp:237:\nException from plugin.cpp:84:\nResource temporarily unavailable\n\n"
NO_MEMORY = "Exception from core.cpp:237:\nException from plugin.cpp:84:\nstd::bad_alloc\n\n"


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("resources") / "pool.bundle").path


@pytest.mark.parametrize(
    ("error", "lack", "said"),
    [
        (MemoryError(), "memory", "MemoryError"),
        (MemoryError("Unable to allocate 8 GiB"), "memory", "Unable to allocate 8 GiB"),
        (RuntimeError(NO_ROOM), "memory", "failed to map segment from shared object"),
        (RuntimeError(NO_MEMORY), "memory", "std::bad_alloc"),
        (RuntimeError(NO_THREAD), "threads", "Resource temporarily unavailable"),
        (RuntimeError("can't start new thread"), "threads", "can't start new thread"),
        (
            RuntimeError("alloc_cpu.cpp:119] DefaultCPUAllocator: can't allocate memory"),
            "memory",
            "can't allocate memory",
        ),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "memory", "Cannot allocate memory"),
        (OSError(errno.EMFILE, "Too many open files", "a"), "file descriptors", "Too many open files"),
        (OSError(errno.ENFILE, "Too many open files in system"), "file descriptors", "Too many open files in system"),
        (
            ImportError("libx.so: cannot open shared object file: Too many open files"),
            "file descriptors",
            "Too many open files",
        ),
    ],
)
def test_a_lack_is_told_by_type_number_or_text(error, lack, said):
    with pytest.raises(ResourceError) as caught:
        refuse_lack("opening", error)
    assert caught.value.lack == lack
    assert str(caught.value).startswith(f"opening failed because this process has no {lack} left ({said}): ")
    assert caught.value.__cause__ is error


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("the blob was written by another release"),
        OSError(errno.EACCES, "Permission denied", "a"),
        ImportError(
            "libgomp.so.1: cannot allocate memory in static TLS block"
        ),  # of glibc, when too much was loaded before
        ImportError("/mnt/x.so: failed to map segment from shared object: Operation not permitted"),  # mounted noexec
        ModuleNotFoundError("No module named 'openvino'"),
    ],
)
def test_another_cause_is_no_lack(error):
    refuse_lack("opening", error)
    with pytest.raises(type(error)) as caught, lack_told("opening"):
        raise error
    assert caught.value is error


def test_a_lack_while_an_engine_is_loaded_is_no_mismatch(path, monkeypatch):
    """on_mismatch="compile" would compile, in a process that has no memory."""
    monkeypatch.setattr(session, "compile_here", lambda *_, **__: pytest.fail("it compiles"))
    for error in (RuntimeError(NO_ROOM), RuntimeError(NO_THREAD), RuntimeError(NO_MEMORY), MemoryError()):
        monkeypatch.setattr(openvino, "core", lambda error=error: SimpleNamespace(import_model=raising(error)))
        with pytest.raises(
            ResourceError, match=r"^loading an engine with OpenVINO 20.* has no (memory|threads) left"
        ) as caught:
            EdgeBackbone.from_pretrained(path, on_mismatch="compile")
        assert not isinstance(caught.value, EngineMismatchError)
        assert "compile" not in str(caught.value)


@pytest.mark.parametrize(
    "error", [ValueError("bad"), OverflowError("int"), KeyError("port"), IndexError(), TypeError("no")]
)
def test_whatever_else_a_blob_does_to_the_library_is_a_mismatch(path, monkeypatch, error):
    monkeypatch.setattr(openvino, "core", lambda: SimpleNamespace(import_model=raising(error)))
    with pytest.raises(EngineMismatchError, match="does not load this engine"):
        EdgeBackbone.from_pretrained(path)


def test_a_lack_in_a_call_is_told_and_the_next_call_is_right(path, monkeypatch):
    images = np.random.default_rng(0).standard_normal((2, 3, 32, 48)).astype(np.float32)
    with EdgeBackbone.from_pretrained(path) as backbone:
        for error, kind in (
            (MemoryError(), ResourceError),
            (RuntimeError(NO_THREAD), ResourceError),
            (RuntimeError("x"), None),
        ):
            with monkeypatch.context() as patch:
                patch.setattr(backbone._engine, "_run", raising(error))
                with pytest.raises(kind or InferenceError) as caught:
                    backbone(images)
                assert isinstance(caught.value, ResourceError) == (kind is ResourceError)
        with monkeypatch.context() as patch:  # in our own code: filling up a batch, joining maps
            patch.setattr("edge_backbones.runtime.backbone.np.concatenate", raising(MemoryError()))
            with pytest.raises(
                ResourceError, match=r"^a call of this backbone, which takes float32 NCHW \(batch, 3, 32, 48\)"
            ):
                backbone(np.zeros((4, 3, 32, 48), np.float32))
        np.testing.assert_allclose(backbone(images).feature_maps[0], pooled(images)[0], atol=1e-5)


def test_a_library_that_does_not_load_for_lack_is_not_called_missing(monkeypatch):
    """Nor is the engine passed over for it, as if it were for another machine."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "openvino"]:
        monkeypatch.delitem(sys.modules, name)
    finder = SimpleNamespace(find_spec=lambda name, *_: None)
    monkeypatch.setattr(sys, "meta_path", [finder, *sys.meta_path])
    finder.find_spec = raising_for("openvino", ImportError("x.so: failed to map segment from shared object"))
    with pytest.raises(ResourceError, match=r"^loading OpenVINO failed because this process has no memory left"):
        openvino.library_version()
    finder.find_spec = raising_for("openvino", ModuleNotFoundError("No module named 'openvino'"))
    with pytest.raises(MissingDependencyError, match="pip install"):
        openvino.load_library()
    assert openvino.library_version() is None


def raising(error: BaseException):
    def call(*_: object, **__: object):
        raise error

    return call


def raising_for(wanted: str, error: ImportError):
    def find_spec(name: str, *_: object) -> None:
        if name == wanted:
            raise error

    return find_spec


LIMITED = """
import os, resource, sys
import numpy as np
from edge_backbones import EdgeBackbone, EdgeBackbonesError
from edge_backbones.engines.openvino import session as openvino
from edge_backbones.runtime import backbone

def limit(what, room):
    if what == "AS":
        used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + room, used + room))
    else:
        used = len(os.listdir("/proc/self/fd")) - 1  # one was listing
        resource.setrlimit(resource.RLIMIT_NOFILE, (used + room, used + room))

what, when = sys.argv[1:3]
if when == "in the library":
    openvino.load_library()
if when == "in the plugin":
    openvino.core()
limit(what, 1 << 20 if what == "AS" else 0)
try:
    EdgeBackbone.from_pretrained(sys.argv[3])
except EdgeBackbonesError as error:
    print(type(error).__name__, error)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits are Linux's")
@pytest.mark.parametrize("when", ["before the library", "in the library", "in the plugin"])
@pytest.mark.parametrize(("what", "lack"), [("AS", "memory"), ("NOFILE", "file descriptors")])
def test_a_process_at_its_limit_says_which(path, what, lack, when):
    whole = [sys.executable, "-c", textwrap.dedent(LIMITED), what, when, path]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(whole, capture_output=True, text=True, timeout=60, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    kind, said = done.stdout.split(" ", 1)
    assert kind == "ResourceError", said
    assert f"this process has no {lack} left" in said
    assert "compile" not in said
