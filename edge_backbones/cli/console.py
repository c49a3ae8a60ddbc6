"""What the command line writes: lines, tables, progress and JSON.

A terminal gets progress bars and tables with lines. A pipe or a file gets one plain line per step, and tables whose columns
are separated by spaces. Nothing is ever cut or wrapped: a table that is wider than a terminal is printed as records.

Names out of a bundle are a stranger's text. Everything here prints a text as `errors.visible` shows it: on one line, with
control characters escaped.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any

import msgspec
import rich.box
import rich.console
import rich.table
from rich.console import ConsoleOptions, JustifyMethod, RenderResult
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


class Table:
    """A table of texts as `Console` prints them, which knows how it fits: as a table, as plain columns, or as records."""

    def __init__(self, *headers: str, title: str | None = None) -> None:
        self._title = None if title is None else visible(title)
        self._columns: list[tuple[str, JustifyMethod]] = [(header, "left") for header in headers]
        self._rows: list[tuple[Text, ...]] = []

    def add_column(self, header: str, justify: JustifyMethod = "left") -> None:
        """Add a column behind the others."""
        self._columns.append((header, justify))

    def add_row(self, *cells: str | Text) -> None:
        """Add a row with a cell for each column; texts among its cells are escaped."""
        self._rows.append(tuple(Text(visible(cell)) if isinstance(cell, str) else cell for cell in cells))

    def __rich_console__(self, console: rich.console.Console, options: ConsoleOptions) -> RenderResult:
        """Yield the table as lines that fit: see the module's docstring."""
        on_terminal = console.is_terminal
        table = rich.table.Table(box=rich.box.HEAVY_HEAD if on_terminal else None, pad_edge=on_terminal)
        for header, justify in self._columns:
            table.add_column(header, justify=justify, no_wrap=True, overflow="ignore")
        for row in self._rows:
            table.add_row(*row)
        width = console.measure(table, options=options.update(width=_WIDEST, max_width=_WIDEST)).maximum
        if self._title is not None:
            yield Text(self._title, style="italic")
        if width > console.width and on_terminal:
            yield from self._records()
        else:
            yield from console.render(table, options.update(width=width, max_width=width))

    def _records(self) -> Iterator[Text]:
        """Yield a line for each cell that is not empty, and an empty line after each row."""
        for row in self._rows:
            for (header, _), cell in zip(self._columns, row, strict=True):
                if cell.plain:
                    yield Text.assemble(f"{header}: " if header else "", cell)
            yield Text("")


_WIDEST = 10_000  # columns: wider than any table


EXIT_PARITY = 3
"""Exit code: a feature map is outside its parity gate."""
EXIT_SLOWER = 4
"""Exit code: slower than stored results, beyond noise."""

# No markup and no emoji: paths and messages may hold brackets and colons.
out = Console(soft_wrap=True, highlight=False, markup=False, emoji=False)
err = Console(stderr=True, soft_wrap=True, highlight=False, markup=False, emoji=False)


@dataclasses.dataclass
class Loudness:
    """How much is printed: ``quiet``: nothing but errors; ``verbose``: versions, messages for developers, times of steps."""

    quiet: bool = False
    verbose: bool = False

    def reset(self) -> None:
        """Go back to the usual loudness, before a command line is read."""
        self.quiet = self.verbose = out.quiet = err.quiet = False

    def add(self, *, verbose: bool, quiet: bool) -> None:
        """Take up flags, which may be typed before the name of a command, behind it, or both."""
        if verbose and not self.verbose:
            self.verbose = True
            _show_log()
            err.print(f"versions: {', '.join(f'{name} {version}' for name, version in _versions())}")
        self.quiet |= quiet
        out.quiet = err.quiet = self.quiet


loudness = Loudness()
"""The loudness of the command that runs."""


def _show_log() -> None:
    """Show the log of this package on stderr."""
    logger = logging.getLogger("edge_backbones")
    logger.setLevel(logging.DEBUG)
    if not logger.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(name)s: %(message)s"))
        logger.addHandler(handler)


_LIBRARIES = (
    "edge-backbones", "numpy", "torch", "timm", "transformers", "onnx", "onnxruntime", "openvino", "tensorrt",
    "tensorrt-rtx-cu13-bindings",
)  # fmt: skip


def _versions() -> Iterator[tuple[str, str]]:
    """Yield the name and the version of Python and of each library that matters and is installed, importing none."""
    import importlib.metadata
    import platform

    yield "Python", platform.python_version()
    for name in _LIBRARIES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            yield name, importlib.metadata.version(name)


def print_error(message: str) -> None:
    """Print an error to stderr as one line, with ``--quiet`` too."""
    err.quiet = False
    err.print(message)


class Steps:
    """Progress of one library call, on stderr: a bar per step with its time on a terminal, a line per step elsewhere.

    As a context manager it gives the `progress` function to call. Steps whose name begins with ``aloud`` are sentences: they
    are printed at once, on a terminal too. ``said`` holds what was printed as a line. ``quiet``: print sentences only.
    ``unit``: what is counted, such as "frames". The bar then shows the count without an end too, and the speed.

    Some libraries catch every exception, KeyboardInterrupt too. Ctrl-C is therefore remembered, and the next step raises
    KeyboardInterrupt again.
    """

    def __init__(self, quiet: bool, aloud: str | None = None, unit: str | None = None) -> None:
        self.said: list[str] = []
        self._aloud = aloud
        self._unit = unit
        silent = quiet or loudness.quiet
        on_terminal = sys.stderr.isatty() and not err.is_dumb_terminal
        self._lines = not silent and not on_terminal
        self._bars = Progress(
            SpinnerColumn("line", finished_text="[green]*[/]"),
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[count]}"),
            TimeElapsedColumn(),
            console=err,
            disable=silent or not on_terminal,
        )
        self._task: Any = None
        self._step = ""
        self._began = 0.0
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
        is_aloud = self._aloud is not None and step.startswith(self._aloud)
        if step != self._step:
            self._finish()
            self._step, self._began = step, time.perf_counter()
            self._task = None if is_aloud else self._bars.add_task(visible(step), total=total, count="")
            if is_aloud or self._lines:
                self.said.append(step)
                err.print(step)
        if self._task is not None:
            self._bars.update(self._task, completed=done, total=total, count=self._count(done, total))

    def _count(self, done: int, total: int | None) -> str:
        """Return the text behind the bar of a step."""
        if self._unit is None:
            return f"{done}/{total}" if total else ""
        if not done and not total:
            return ""
        task = self._bars.tasks[self._bars.task_ids.index(self._task)]
        speed = f", {task.speed:.1f} per second" if task.speed else ""
        return f"{done}{f'/{total}' if total else ''} {self._unit}{speed}"

    def _finish(self) -> None:
        """Fill the bar of the step that has ended; with ``--verbose`` say how long it took."""
        if self._task is None:
            return
        task = self._bars.tasks[self._bars.task_ids.index(self._task)]
        total = task.total or 1
        count = task.fields["count"] if self._unit else f"{total:.0f}/{total:.0f}" if task.total else ""
        self._bars.update(self._task, completed=total, total=total, count=count)
        if self._lines and loudness.verbose:
            err.print(f"{self._step}: {time.perf_counter() - self._began:.1f} s")

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


def print_parity(reports: Iterable[ParityReport], console: Console = out, *, names: Sequence[str] = ()) -> None:
    """Print a table of every report that has figures: one row per stage, with its verdict.

    ``names``: of the reports' engines. A title has one where another report is of the same precision.
    """
    reports = list(reports)
    count = Counter(report.precision for report in reports)
    for report, name in zip(reports, names or [""] * len(reports), strict=True):
        if not report.measured:
            continue
        what = name if name and count[report.precision] > 1 else report.precision
        title = f"parity of {what} with fp32 torch, worst golden image; gate: {report.gate}"
        table = Table("stage", title=title)
        for column in ("cosine", "SQNR dB", "relative error", "max |difference|", "verdict"):
            table.add_column(column, justify="right")
        for s in report.stages:
            figures = (f"{s.cosine:.6f}", f"{s.sqnr_db:.1f}", f"{s.relative:.1e}", f"{s.max_abs:.3g}")
            table.add_row(s.stage, *(figures if s.finite else ("not finite",) * 4), _verdict(s.passed))
        console.print(table)


def rest_of(precision: str, computes_in: object) -> str:
    """Return words for the rest of an int8 engine, where it is not fp32."""
    return f" with a {computes_in} rest" if precision == "int8" and isinstance(computes_in, str) else ""


def print_trials(decision: Decision | None) -> None:
    """Print what a build tried, parity beside latency; nothing without a decision."""
    if decision is None:
        return
    table = Table("engine", title=f"tried on {decision.device_name}")
    for column in ("cosine", "SQNR dB", "ms", "verdict"):
        table.add_column(column, justify="right")
    for trial in decision.trials:
        count = len(trial.blocks)
        without = f" without {count} block{'s' * (count > 1)}" if count else ""
        milliseconds = "" if trial.milliseconds is None else f"{trial.milliseconds:.2f}"
        table.add_row(
            f"{trial.precision}{without}{rest_of(trial.precision, trial.computes_in)}",
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
