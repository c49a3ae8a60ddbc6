"""Run a file of tests/gpu in processes of its own, and say what came of every test."""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.gpu_common import MissingError
from benchmarks.gpu_needs import is_installed
from benchmarks.gpu_processes import PartFailedError, PartSlowError, last_words, run_command
from benchmarks.gpu_results import ROOT

TESTS = ROOT / "tests" / "gpu"
_STUCK = 90.0  # seconds after which the stacks of a test's threads are printed
_OTHER_TEST = "after the last test"


@dataclass
class Outcome:
    """What is known of the tests of a file.

    ``running``: the test that began and did not end, if there is one. ``left``: tests that did not begin.
    """

    passed: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, list[str]] = field(default_factory=dict)
    running: str | None = None
    left: list[str] = field(default_factory=list)

    def figures(self) -> dict[str, Any]:
        """Return them for the document."""
        found: dict[str, Any] = {"passed": len(self.passed), "failed": self.failed, "not_run": self.skipped}
        return {**found, "no_time": self.left} if self.left else found


def read_results(file: Path) -> Outcome | None:
    """Read what tests/gpu/conftest.py wrote; None if no test was collected."""
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    events = [json.loads(line) for line in lines if line.endswith("}")]  # a process may have died while it wrote
    collected = next((event["tests"] for event in events if "tests" in event), None)
    if collected is None:
        return None
    found, begun, ended = Outcome(), set(), set()
    for event in events:
        if "begun" in event:
            begun.add(event["begun"])
            found.running = event["begun"]
        elif "ended" in event:
            ended.add(event["ended"])
        elif "passed" in event:
            found.passed.append(_short(event["passed"]))
        elif "failed" in event:
            found.failed[_short(event["failed"])] = event["why"]
        elif "skipped" in event:
            found.skipped.setdefault(event["why"], []).append(_short(event["skipped"]))
    if found.running in ended:
        found.running = None
    found.left = [_short(test) for test in collected if test not in begun]
    found.passed = [test for test in found.passed if test not in found.failed]  # its clean-up failed
    return found


def _short(test: str) -> str:
    return test.rpartition("::")[2]


def run_tests(
    file: Path, seconds: float, *, device: int, bundles: Path, patience: float = 1.0, chosen: Sequence[str] = ()
) -> dict[str, Any]:
    """Return figures about the tests of a file.

    A process that dies, or whose GPU is lost, ends one test: another process runs those after it.

    Args:
        file: The file of tests.
        seconds: Time for all of them; what runs then is ended.
        device: Index of the GPU.
        bundles: Folder of prepared bundles.
        patience: How many times as long as on a server a test may take.
        chosen: Further arguments of pytest.

    Raises:
        MissingError: pytest is missing, or every test was left out.
        PartFailedError: A test failed.
        PartSlowError: The time was over before the last test.
    """
    if not is_installed("pytest"):
        raise MissingError(f"pytest is missing ({Path(sys.executable).name} -m pip install pytest)")
    end = time.monotonic() + seconds
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "results"
        command = [
            sys.executable,
            "-m",
            "pytest",
            str(file),
            "--confcutdir",
            str(TESTS),
            "-p",
            "no:cacheprovider",
            "-vv",
        ]
        command += ["-o", f"faulthandler_timeout={_STUCK * patience:g}", f"--results={results}"]
        # Neither the plugins nor the releases of this machine were chosen by us: their warnings are not our errors.
        command += ["-W", "default", f"--bundles={bundles.resolve()}", f"--gpu={device}", *chosen]
        environment = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
        died: dict[str, str] = {}
        before = -1
        while True:
            code, output = run_command(command, max(0.1, end - time.monotonic()), environment)
            outcome = read_results(results)
            if outcome is None:
                how = f"did not end within {seconds:.0f} s" if code is None else f"pytest ended with {code}"
                raise PartFailedError(f"{how}: {last_words(output)}", {"output": output[-4000:]})
            if code not in (None, 0, 1, 2, 5):
                died[_short(outcome.running or _OTHER_TEST)] = f"the process ended with {code}: {last_words(output)}"
            again = code is not None and outcome.left and (outcome.running or outcome.failed)
            begins_none, before = len(outcome.left) == before, len(outcome.left)
            if not again or begins_none or time.monotonic() >= end:
                outcome.failed |= died
                return _judged(outcome, code, seconds)


def _judged(outcome: Outcome, code: int | None, seconds: float) -> dict[str, Any]:
    """Return the figures; raise the error if they are not those of success."""
    if outcome.failed:
        name, why = next(iter(outcome.failed.items()))
        count = len(outcome.failed)
        raise PartFailedError(
            f"{count} of {len(outcome.passed) + count} failed, {name}: {_gist(why)}", outcome.figures()
        )
    if code is None:
        where = f"in {_short(outcome.running)}" if outcome.running else "between two tests"
        raise PartSlowError(
            f"ended after {seconds:.0f} s {where}, {len(outcome.left)} tests were left", outcome.figures()
        )
    if code not in (0, 5):
        raise PartFailedError(f"pytest ended with {code}", outcome.figures())
    if not outcome.passed:
        raise MissingError("; ".join(outcome.skipped) or "no test was found")
    return outcome.figures()


def _gist(text: str) -> str:
    """Return the line of a failure that says most: pytest marks it with an E."""
    marked = [line[1:].strip() for line in text.splitlines() if line.startswith("E ")]
    return (marked or text.strip().splitlines() or [""])[0][:300]
