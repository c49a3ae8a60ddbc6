"""``make gpu``: tests/gpu and the benchmark on an NVIDIA GPU, within a budget of time.

Nothing has to be installed beyond numpy and msgspec: ``python3 -m benchmarks.gpu_suite`` from the repository root. What the
machine lacks becomes a part "not run" with the reason, a failure a part "failed" with its message, and the other parts go
on. Parts run in order of worth. One that is expected to take longer than what is left of the budget is passed over.

Each part writes benchmarks/results/<device>/<part>.json when it ends, and benchmarks/results/<device>.json joins them. A part
that is done is not run again while the GPU, the libraries and the code are the same: run the command again to go on.

Exit code: 0 when something is done and nothing failed, 1 when something failed, 3 when nothing was run (no GPU: the reason
is printed, and a document is written only where --out says), 130 when it was interrupted.

Without TensorRT, an engine of two kernels takes its place in the tests, so that sessions, events, graphs and page-locked
memory meet the driver. TensorRT compiles typed ONNX graphs, which take a workstation's libraries to make: ``--prepare
FOLDER`` there, copy the folder, ``--bundles FOLDER`` here. What was to be reached, and was, is under ``targets``; a figure
that misses is no failure.

Latency is from the call until the GPU is done; "pipelined" is the time per call of twenty that are enqueued before one wait.
Contenders of torch get fp16 in channels-last and leave fp16; ours get float32 NCHW, as a camera pipeline has it, and give
float32 NCHW.
"""

from __future__ import annotations

from benchmarks.gpu_needs import NOTHING_RUN  # isort: skip (it ends the program where numpy or msgspec is missing)

import argparse
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu_common import MissingError, patience
from benchmarks.gpu_parts import BUNDLES, Bench, Row, chosen_rows
from benchmarks.gpu_processes import ChildError, PartFailedError, PartSlowError, describe_machine
from benchmarks.gpu_results import DONE, FAILED, NOT_RUN, RESULTS, Part, Results, slug
from benchmarks.gpu_targets import targets
from edge_backbones.machine import gpus

BUDGET = 900.0
_PASSED, _FAILED, _INTERRUPTED = 0, 1, 130


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_suite", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--budget",
        type=float,
        metavar="SECONDS",
        help=f"time for everything; a part that does not fit is passed over (default: {BUDGET:g}, on a Jetson four times)",
    )
    parser.add_argument(
        "--only",
        nargs="+",
        default=[],
        metavar="PART",
        help="these parts, by their names or how these begin: --only contend",
    )
    parser.add_argument("--again", action="store_true", help="run parts that are done too")
    parser.add_argument("--list", action="store_true", help="print the parts with their expected times, and stop")
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="the document, in place of benchmarks/results/<device>.json"
    )
    parser.add_argument(
        "--bundles",
        type=Path,
        default=BUNDLES,
        metavar="FOLDER",
        help="what --prepare made elsewhere (default: .cache/gpu)",
    )
    parser.add_argument(
        "--prepare",
        type=Path,
        metavar="FOLDER",
        help="make the bundles on a workstation (needs the 'demo' extra, no GPU), each small enough to be copied alone: "
        "parity-*.bundle for the tests, MODEL-PRECISION.bundle for the benchmark; then stop",
    )
    parser.add_argument("--device", type=int, default=0, help="index of the GPU")
    parser.add_argument("--commit", help="what to write as the commit where this is no git checkout")
    options = parser.parse_args(arguments)
    try:
        options.rows = chosen_rows(options.only)
    except ValueError as error:
        parser.error(str(error))
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    if options.prepare is not None:
        from benchmarks.gpu_prepare import prepare

        prepare(options.prepare)
        return _PASSED
    if options.list:
        for row in options.rows:
            print(f"{row.name:40} about {row.expected:4g} s, at most {row.limit:4g} s")
        return _PASSED
    gpu, reason = find_gpu(options.device)
    path = options.out or (None if gpu is None else RESULTS / f"{slug(gpu.name)}.json")
    described = describe_machine(gpu, options.commit)
    suite = Suite(
        gpu=gpu,
        reason=reason,
        results=None if path is None else Results(path, described),
        bench_of=lambda found: Bench(found, options.bundles, described["code"]),
        budget=BUDGET * patience(gpu) if options.budget is None else options.budget,
        again=options.again,
    )
    signal.signal(signal.SIGTERM, _interrupt)
    return suite.run(options.rows)


def find_gpu(index: int) -> tuple[gpus.Gpu | None, str]:
    """Return the GPU of an index; None, and why, if it is not there."""
    reason = gpus.no_gpu_reason()
    if reason:
        return None, reason
    found = gpus.find_gpus()
    if not 0 <= index < len(found):
        return None, f"there is no cuda:{index}, {len(found)} GPUs are visible"
    return found[index], ""


def _interrupt(*_: object) -> None:
    """Let a SIGTERM end the child processes too."""
    raise KeyboardInterrupt


class Suite:
    """Run parts one after another, keep what comes of them, and write it after each.

    Args:
        gpu: The GPU; None if there is none.
        reason: Why there is none.
        results: Where results are written and read; None for nowhere.
        bench_of: Makes what the parts are given.
        budget: Seconds for all of them.
        again: Run parts that are done too.
    """

    def __init__(
        self, *, gpu: gpus.Gpu | None, reason: str, results: Results | None, bench_of: Any, budget: float, again: bool
    ) -> None:
        self.gpu, self.reason = gpu, reason
        self.results = results
        self.bench = None if gpu is None else bench_of(gpu)
        self.budget = budget
        self.again = again
        self.parts: list[Part] = []
        self._end = time.monotonic() + budget

    @property
    def left(self) -> float:
        """Seconds that are left of the budget."""
        return self._end - time.monotonic()

    def run(self, rows: Sequence[Row]) -> int:
        """Run parts and return the exit code."""
        interrupted = False
        for row in rows:
            if interrupted:
                self._add(Part(row.name, NOT_RUN, "the suite was interrupted"))
                continue
            try:
                self.measure(row)
            except KeyboardInterrupt:
                interrupted = True
                self._add(Part(row.name, NOT_RUN, "it was interrupted"))
        self._print()
        if interrupted:
            return _INTERRUPTED
        if any(part.state == FAILED for part in self.parts):
            return _FAILED
        return _PASSED if any(part.state == DONE for part in self.parts) else NOTHING_RUN

    def measure(self, row: Row) -> Part:
        """Run one part, unless it is done or cannot be run."""
        if self.bench is None:
            return self._add(Part(row.name, NOT_RUN, self.reason))
        made = row.made is None or row.made(self.bench).exists()
        earlier = None if self.results is None or self.again or not made else self.results.earlier(row.name)
        if earlier is not None and earlier.state == DONE:
            earlier.reason = "in an earlier run"
            return self._add(earlier)
        why = row.against(self.bench) or self._why_no_time(row)
        if why:
            return self._add(Part(row.name, NOT_RUN, why))
        limit = row.limit * patience(self.gpu)
        print(f"{row.name}: about {row.expected * patience(self.gpu):.0f} s ...", flush=True)
        start = time.monotonic()
        part = self._attempt(row, limit)
        part.seconds = round(time.monotonic() - start, 1)
        if part.state != NOT_RUN and self.results is not None:
            self.results.write(part)
        return self._add(part)

    def _why_no_time(self, row: Row) -> str:
        needed = row.expected * patience(self.gpu)
        if needed <= self.left:
            return ""
        return f"it takes about {needed:.0f} s, and {max(0, self.left):.0f} s of {self.budget:.0f} s are left"

    def _attempt(self, row: Row, limit: float) -> Part:
        """Run one part. What is missing makes it "not run", any exception "failed"."""
        seconds = min(limit, self.left)
        try:
            return Part(row.name, DONE, figures=row.run(self.bench, seconds))
        except MissingError as error:
            return Part(row.name, NOT_RUN, str(error))
        except PartSlowError as error:
            if seconds < limit:  # it had less than it may have
                return Part(row.name, NOT_RUN, f"the {self.budget:.0f} s were over: {error}", figures=error.figures)
            return Part(row.name, FAILED, str(error), figures=error.figures)
        except PartFailedError as error:
            return Part(row.name, FAILED, str(error), figures=error.figures)
        except ChildError as error:
            return Part(row.name, FAILED, str(error))
        except Exception as error:  # the suite goes on, and says what happened
            traceback.print_exc()
            return Part(row.name, FAILED, f"{type(error).__name__}: {error}")

    def _add(self, part: Part) -> Part:
        self.parts.append(part)
        if self.bench is not None:
            self.bench.parts[part.name] = part
        if part.seconds:
            print(part, flush=True)
        if self.results is not None:
            self.results.join(self.parts)  # at once: whoever ends a machine that is paid by the minute loses nothing
        return part

    def _print(self) -> None:
        """Print the table of all parts, the targets, and where they were written."""
        if self.bench is None:
            print(f"not run: {self.reason}")
            return
        width = max((len(part.name) for part in self.parts), default=0)
        print(f"\n{'part':{width}}  {'state':7}  seconds  why")
        for part in self.parts:
            print(f"{part.name:{width}}  {part.state:7}  {part.seconds:7.1f}  {part.reason[:200]}".rstrip())
        for target in targets(self.parts):
            missed = "" if target["reached"] else ": MISSED"
            print(f"{target['what']}: {target['measured']:.3g}, {target['asked']}{missed}")
        if self.results is not None:
            print(f"wrote {self.results.document}, and a file for each part in {self.results.document.with_suffix('')}")


if __name__ == "__main__":
    sys.exit(main())
