"""What every test has: the same examples of Hypothesis on every machine, a cache folder of the run's own, and a thread that a
signal finds alive."""

from __future__ import annotations

import ctypes
import importlib
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

# No example is failed for being slow on a busy machine.
settings.register_profile("project", derandomize=True, deadline=None)
settings.load_profile("project")

# A run that was started in the background ignores Ctrl-C, and so would every process that a test starts and interrupts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


# The files that take longest begin first: otherwise one process is in the middle of such a file when the others are done.
_LONGEST = (
    "transformers/test_clients.py",
    "benchmarks/test_gpu_on_standin.py",
    "build_scripts/test_sweep.py",
    "build_scripts/test_demo.py",
    "install/test_readme_blocks.py",
    "toolchain/test_checkpoints.py",
    "toolchain/test_candidates.py",
    "toolchain/test_build_command.py",
    "toolchain/test_onnxruntime_engine.py",
    "transformers/test_sources.py",
    "transformers/test_traps.py",
    "trt/test_rtx_compiles_graphs.py",
    "transformers/test_auto.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the tests of the longest files first, and leave the order of all others."""
    places = {Path(__file__).parent / name: place for place, name in enumerate(_LONGEST)}
    items.sort(key=lambda item: places.get(item.path, len(places)))


@pytest.fixture(scope="session", autouse=True)
def _cache_of_the_run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What this machine has measured is noted in the user's cache folder: tests leave that of their user alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Functions that start a process of their own run here: for tests that replace what they call."""
    from edge_backbones.machine import child

    def run_here(
        function: str,
        arguments: Sequence[Any],
        options: Mapping[str, Any],
        *,
        progress: Callable[..., None] | None = None,
        **_: Any,
    ) -> Any:
        module, _, name = function.partition(":")
        told = {} if progress is None else {"progress": progress}
        return getattr(importlib.import_module(module), name)(*arguments, **options, **told, in_process=True)

    monkeypatch.setattr(child, "run_apart", run_here)


class SignalStack(ctypes.Structure):
    """``stack_t`` of sigaltstack(2)."""

    _fields_ = (("address", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t))


@pytest.fixture(autouse=sys.platform == "linux", scope="module")
def _signal_stack_is_mapped() -> Iterator[None]:
    """Two OpenVINO Cores that go in the wrong order leave the thread a signal stack that is not there: the next signal
    would end the whole run without a word, many tests later. This names the module that did it."""
    yield
    stack = SignalStack()
    assert ctypes.CDLL(None).sigaltstack(None, ctypes.byref(stack)) == 0
    with open("/proc/self/maps") as maps:
        spans = [[int(end, 16) for end in line.split()[0].split("-")] for line in maps]
    assert not stack.address or any(start <= stack.address < end for start, end in spans), (
        "the signal stack of this thread is not mapped: use core() of engines/openvino/session.py, not a Core of your own"
    )
