"""Tests that need an NVIDIA GPU. Without one every test is skipped, with the reason of the driver probe.

Beyond that a test is left out only for what is not installed, by looking whether it is there (:func:`gpu_engines.missing`): a
library that is there and fails fails the test.

``--results FILE`` writes what happened, a JSON line for every event, so that a process that dies or hangs loses nothing. A
test that began in that file already is not run again.
"""

from __future__ import annotations

import gc
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from edge_backbones.machine import gpus

# After these a process can do nothing more on the GPU: the remaining tests need another process.
_LOST = re.compile(
    r"CUDA_ERROR_(ILLEGAL_ADDRESS|LAUNCH_FAILED|LAUNCH_TIMEOUT|ILLEGAL_INSTRUCTION|MISALIGNED_ADDRESS|ASSERT|"
    r"HARDWARE_STACK_ERROR|INVALID_ADDRESS_SPACE|INVALID_PC|ECC_UNCORRECTABLE)|CUDA error: an illegal memory access"
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--bundles", type=Path, help="what benchmarks.gpu_suite --prepare made")
    parser.addoption("--gpu", type=int, default=0, help="index of the GPU")
    parser.addoption("--results", type=Path, help="file to add a JSON line to for every event")


def pytest_configure(config: pytest.Config) -> None:
    file = config.getoption("--results", None)
    if file is not None:
        config.pluginmanager.register(Results(file), "gpu results")


class Results:
    """Write what happens to a file."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._session: Any = None

    def _say(self, **event: Any) -> None:
        with self._file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(event) + "\n")

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, session: pytest.Session, items: list[pytest.Item]) -> None:
        self._session = session
        lines = self._file.read_text(encoding="utf-8").splitlines() if self._file.exists() else []
        begun = {event["begun"] for event in map(json.loads, lines) if "begun" in event}
        self._say(tests=[item.nodeid for item in items])
        items[:] = [item for item in items if item.nodeid not in begun]

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._say(begun=nodeid)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            text = report.longreprtext
            self._say(failed=report.nodeid, when=report.when, why=text[-3000:])
            if _LOST.search(text):
                self._session.shouldstop = "the GPU is lost for this process"
        elif report.skipped:
            why = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
            self._say(skipped=report.nodeid, why=why.removeprefix("Skipped: "))
        elif report.when == "call":
            self._say(passed=report.nodeid, seconds=round(report.duration, 2))

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        self._say(ended=nodeid)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    reason = gpus.no_gpu_reason()
    for item in items if reason else ():
        if here in item.path.parents:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def _calls_of_a_context_took_turns() -> Iterator[None]:
    """No call of the stand-in engine began in an execution context before the last one there had ended."""
    from benchmarks import gpu_standin

    yield
    gc.collect()  # it is told when the context goes
    found = list(gpu_standin.faults)
    gpu_standin.faults.clear()
    assert found == []


@pytest.fixture(autouse=True)
def _the_stand_in_driver_has_no_complaint() -> Iterator[None]:
    """Where libcuda is the stand-in of tests/driver: no rule was broken that a GPU does not check."""
    from benchmarks.gpu_kernels import on_standin

    if not on_standin():
        yield
        return
    from tests.driver.standin import StandIn

    driver = StandIn()
    driver.reset()
    yield
    assert driver.violations() == []


@pytest.fixture(scope="session")
def gpu(request: pytest.FixtureRequest) -> int:
    """Index of the GPU that is tested."""
    # Without tests/gpu among the arguments pytest reads this file too late for its options.
    return int(request.config.getoption("--gpu", 0))


@pytest.fixture(scope="session")
def bundles(request: pytest.FixtureRequest) -> Path | None:
    """The folder of prepared bundles, if one was named."""
    folder = request.config.getoption("--bundles", None)
    return None if folder is None else Path(folder)
