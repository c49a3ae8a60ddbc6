"""What the command line writes: lines, tables, progress and JSON.

Names out of a bundle are a stranger's text. Everything here prints a text as `errors.visible` shows it: on one line, with
control characters escaped.
"""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Iterable, Mapping
from types import TracebackType
from typing import Any

import msgspec
import rich.console
import rich.table
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.text import Text

from edge_backbones.bundle.manifest import Decision
from edge_backbones.errors import visible
from edge_backbones.images.decode import grouped
from edge_backbones.parity_report import ParityReport
from edge_backbones.progress import Progress as Report


class Console(rich.console.Console):
    """A console that prints each text on one line, with control characters escaped."""

    def print(self, *objects: Any, **options: Any) -> None:
        """Print objects as rich does, and texts as `visible` shows them."""
        super().print(*(visible(o) if isinstance(o, str) else o for o in objects), **options)


class Table(rich.table.Table):
    """A table whose title and cells are texts as `Console` prints them."""

    def __init__(self, *headers: str, title: str | None = None, **options: Any) -> None:
        title = None if title is None else visible(title)
        super().__init__(*headers, title=title, title_justify="left", **options)

    def add_row(self, *cells: Any, **options: Any) -> None:
        """Add a row; texts among its cells are escaped, rich's own objects are taken as they are."""
        super().add_row(*(visible(c) if isinstance(c, str) else c for c in cells), **options)


EXIT_PARITY = 3
"""Exit code: a feature map is outside its parity gate."""
EXIT_SLOWER = 4
"""Exit code: slower than stored results, beyond noise."""

# No markup and no emoji: paths and messages may hold brackets and colons.
out = Console(soft_wrap=True, highlight=False, markup=False, emoji=False)
err = Console(stderr=True, highlight=False, markup=False, emoji=False)


class Steps:
    """Progress of one library call on a terminal: a line per step, with its elapsed time. Nothing is shown elsewhere.

    As a context manager it gives the `progress` function to call. Steps whose name begins with ``aloud`` are also printed to
    stderr at once, with or without a terminal, and kept in ``said``.

    Some libraries catch every exception, KeyboardInterrupt too. Ctrl-C is therefore remembered, and the next step raises
    KeyboardInterrupt again.
    """

    def __init__(self, quiet: bool, aloud: str | None = None) -> None:
        self.said: list[str] = []
        self._aloud = aloud
        self._bars = Progress(
            SpinnerColumn(finished_text="[green]*[/]"),
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[count]}"),
            TimeElapsedColumn(),
            console=err,
            disable=quiet or not err.is_terminal,
        )
        self._task: Any = None
        self._step = ""
        self._interrupted = False
        self._before: Any = None

    def __enter__(self) -> Report:
        self._before = signal.signal(signal.SIGINT, self._interrupt)
        self._bars.start()
        return self._progress

    def _interrupt(self, *_: Any) -> None:
        self._interrupted = True
        raise KeyboardInterrupt

    def _progress(self, step: str, done: int, total: int | None) -> None:
        if self._interrupted:
            raise KeyboardInterrupt
        if self._aloud is not None and step.startswith(self._aloud):
            self.said.append(step)
            err.print(step, soft_wrap=True)
        if step != self._step:
            self._finish()
            self._step, self._task = step, self._bars.add_task(visible(step), total=total, count="")
        self._bars.update(self._task, completed=done, total=total, count=f"{done}/{total}" if total else "")

    def _finish(self) -> None:
        if self._task is not None:
            task = self._bars.tasks[self._bars.task_ids.index(self._task)]
            total = task.total or 1
            self._bars.update(self._task, completed=total, total=total)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        signal.signal(signal.SIGINT, self._before)
        if kind is None:
            self._finish()
        self._bars.stop()


def print_json(value: Any) -> None:
    """Write one JSON document to stdout; structs and dataclasses become objects."""
    sys.stdout.write(json.dumps(msgspec.to_builtins(value), indent=2) + "\n")


def print_parity(reports: Iterable[ParityReport], console: Console = out) -> None:
    """Print a table of every report that has figures: one row per stage, with its verdict."""
    for report in reports:
        if not report.measured:
            continue
        title = f"parity of {report.precision} with fp32 torch, worst golden image; gate: {report.gate}"
        table = Table("stage", title=title)
        for column in ("cosine", "SQNR dB", "relative error", "max |difference|", ""):
            table.add_column(column, justify="right")
        for s in report.stages:
            figures = (f"{s.cosine:.6f}", f"{s.sqnr_db:.1f}", f"{s.relative:.1e}", f"{s.max_abs:.3g}")
            table.add_row(s.stage, *(figures if s.finite else ("not finite",) * 4), _verdict(s.passed))
        console.print(table)


def print_trials(decision: Decision | None) -> None:
    """Print what a build tried, parity beside latency; nothing without a decision."""
    if decision is None:
        return
    table = Table("engine", title=f"tried on {decision.device_name}")
    for column in ("cosine", "SQNR dB", "ms", ""):
        table.add_column(column, justify="right")
    for trial in decision.trials:
        count = len(trial.blocks)
        without = f" without {count} block{'s' * (count > 1)}" if count else ""
        milliseconds = "" if trial.milliseconds is None else f"{trial.milliseconds:.2f}"
        table.add_row(
            f"{trial.precision}{without}",
            f"{trial.cosine:.4f}",
            f"{trial.sqnr_db:.1f}",
            milliseconds,
            _verdict(trial.passed),
        )
    out.print(table)


def _verdict(passed: bool) -> Text:
    return Text("pass", style="green") if passed else Text("FAIL", style="red")


def print_skipped(reasons: Mapping[str, str]) -> None:
    """Print why image files were skipped, by file name, to stderr: files with the same reason share a line."""
    err.print(f"{len(reasons)} {'file was' if len(reasons) == 1 else 'files were'} skipped:")
    for line in grouped(reasons):
        err.print(f"  {line}", soft_wrap=True)
