"""The parts of the GPU suite, in order of worth, with the time that each is expected to take.

The times are guesses for a server, until a first run has measured them.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import gpu_standin
from benchmarks.gpu_common import BATCHES, MODELS, TENSORRT, MissingError, patience, require_tensorrt, why_no_torch
from benchmarks.gpu_contend import compare
from benchmarks.gpu_needs import is_installed
from benchmarks.gpu_processes import Child, PartFailedError, PartSlowError, last_words, run_command
from benchmarks.gpu_pytest import TESTS, run_tests
from benchmarks.gpu_results import ROOT, Part
from benchmarks.gpu_targets import PRECISIONS, timed_engines
from benchmarks.gpu_tasks import rtx_refusal
from edge_backbones.machine import gpus
from edge_backbones.machine.profiles import FIRST_ARCHITECTURE

BUNDLES = ROOT / ".cache" / "gpu"

_TO_PREPARE = ("torch", "timm", "onnx", "onnxscript", "onnxruntime", "openvino", "skimage")


@dataclass
class Bench:
    """What the parts need to know.

    ``parts``: those that ended, by name. ``bundles``: what --prepare made.
    """

    gpu: gpus.Gpu
    bundles: Path
    code: str
    parts: dict[str, Part] = field(default_factory=dict)

    @property
    def patience(self) -> float:
        """How many times as long as on a server something may take."""
        return patience(self.gpu)

    def bundle(self, model: str, precision: str) -> Path:
        """Return the prepared bundle of a network."""
        return self.bundles / f"{model}-{precision}.bundle"

    def compiled(self, model: str, precision: str, flavour: str) -> Path:
        """Return where the bundle with a plan lies."""
        return self.bundles / "compiled" / self.code / f"{model}-{precision}-{flavour}.bundle"

    def ask(self, task: str, seconds: float, **arguments: Any) -> dict[str, Any]:
        """Return what a task of gpu_tasks answers."""
        with Child(task, device=self.gpu.index, **arguments) as child:
            return child.read_all(seconds)


@dataclass(frozen=True)
class Row:
    """One part.

    Attributes:
        name: Its name.
        expected: Seconds that it takes on a server.
        limit: Seconds after which it is ended, on a server.
        run: Does it, within the seconds that it is given, and returns its figures.
        against: Says why it cannot run here, before anything is started; empty if it can.
        made: What it leaves behind. If that is gone, the part runs again.
    """

    name: str
    expected: float
    limit: float
    run: Callable[[Bench, float], dict[str, Any]]
    against: Callable[[Bench], str] = lambda bench: ""
    made: Callable[[Bench], Path] | None = None


def rows() -> list[Row]:
    """Return all parts in order of worth."""
    small, *others = MODELS
    return [
        _tests("memory", 30, 150),
        _tests("arrays", 20, 90, against=_no_other_library),
        _tests("engines", 120, 300),
        _task("ceilings", 15, 60),
        _overhead(gpu_standin.NAME, 15, 60),
        _overhead("torchscript", 20, 90),
        Row("roofline", 25, 90, lambda bench, seconds: bench.ask("roofline", seconds), lambda bench: why_no_torch()),
        *(_contest(small, batch) for batch in BATCHES),
        _tests("processes", 90, 240),
        _tests("parity-torchscript", 60, 180, "parity", "-k", "test_torchscript", against=lambda bench: why_no_torch()),
        *(_contest(model, batch) for model in others for batch in BATCHES),
        _task("rtx-answer", 30, 90, "rtx_answer", against=lambda bench: _no_tensorrt("tensorrt_rtx")),
        *(_overhead(flavour, 60, 180) for flavour in TENSORRT),
        _tests("plans", 120, 300, against=lambda bench: _no_tensorrt("tensorrt")),
        Row("graphs", 300, 900, _prepare, _why_not_prepare, lambda bench: bench.bundles / "pooling.onnx"),
        _tests("parity-plans", 150, 450, "parity", "-k", "test_plans or test_torch_tensorrt", against=_no_plans),
        *(_plan(model, precision, flavour) for model in MODELS for flavour in TENSORRT for precision in PRECISIONS),
        *(_contest(model, batch, all_of_them=True) for model in MODELS for batch in BATCHES),
        Row("roofline-engines", 60, 180, _roofline_of_engines, _no_timed_engines),
    ]


def chosen_rows(names: Sequence[str]) -> list[Row]:
    """Return the parts of these names, or whose names begin so; all for no name. Raises ValueError for an unknown one."""
    table = rows()
    for name in names:
        if not any(row.name.startswith(name) for row in table):
            raise ValueError(f"there is no part {name!r}; there are {', '.join(row.name for row in table)}")
    return [row for row in table if not names or any(row.name.startswith(name) for name in names)]


# ---- Kinds of parts


def _tests(
    name: str,
    expected: float,
    limit: float,
    file: str = "",
    *chosen: str,
    against: Callable[[Bench], str] | None = None,
) -> Row:
    def run(bench: Bench, seconds: float) -> dict[str, Any]:
        return run_tests(
            TESTS / f"test_gpu_{file or name}.py",
            seconds,
            device=bench.gpu.index,
            bundles=bench.bundles,
            patience=bench.patience,
            chosen=chosen,
        )

    return Row(name, expected, limit, run, against or (lambda bench: ""))


def _task(
    name: str, expected: float, limit: float, task: str = "", *, against: Callable[[Bench], str] | None = None
) -> Row:
    return Row(
        name, expected, limit, lambda bench, seconds: bench.ask(task or name, seconds), against or (lambda bench: "")
    )


def _overhead(flavour: str, expected: float, limit: float) -> Row:
    def against(bench: Bench) -> str:
        if flavour == "torchscript":
            return why_no_torch()
        return _no_flavour(bench, flavour) if flavour in TENSORRT else ""

    def run(bench: Bench, seconds: float) -> dict[str, Any]:
        return bench.ask("overhead", seconds, flavour=flavour, bundles=str(bench.bundles))

    return Row(f"overhead-{flavour}", expected, limit, run, against)


def _contest(model: str, batch: int, *, all_of_them: bool = False) -> Row:
    """torch and TorchScript; or these, every plan that was compiled, and torch.compile, which takes minutes to get ready."""

    def run(bench: Bench, seconds: float) -> dict[str, Any]:
        kinds: list[dict[str, Any]] = [{"kind": kind} for kind in ("eager", "torchscript")]
        if all_of_them:
            kinds += _compiled_plans(bench, model)
            kinds.append({"kind": "compile"})  # last, with all the time that is left
        return compare(bench.gpu.index, model, batch, kinds, seconds)

    name, times = ("contend-all", (150, 480)) if all_of_them else ("contend", (60, 180))
    return Row(f"{name}-{model}-{batch}", *times, run, lambda bench: why_no_torch())


def _compiled_plans(bench: Bench, model: str) -> list[dict[str, Any]]:
    return [
        {
            "kind": flavour,
            "precision": precision,
            "bundle": str(bench.compiled(model, precision, flavour)),
            "graphed": graphed,
        }
        for flavour in TENSORRT
        for precision in PRECISIONS
        if bench.compiled(model, precision, flavour).is_dir()
        for graphed in (False, True)
    ]


def _plan(model: str, precision: str, flavour: str) -> Row:
    """Compile a network on the GPU that runs it."""

    def against(bench: Bench) -> str:
        first = FIRST_ARCHITECTURE.get(precision, 0)
        if why := _no_flavour(bench, flavour):
            return why
        if int(bench.gpu.architecture.removeprefix("sm_")) < first:
            return f"{bench.gpu.architecture} has no {precision}, which came with sm_{first}"
        if not bench.bundle(model, precision).is_dir():
            return f"{bench.bundle(model, precision).name} is not in {bench.bundles}: make it with --prepare"
        return ""

    def run(bench: Bench, seconds: float) -> dict[str, Any]:
        target = bench.compiled(model, precision, flavour)
        begun = target.with_name(f".{target.name}")
        for folder in (begun, target):
            shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(bench.bundle(model, precision), begun)
        try:
            found = bench.ask("compile_plan", seconds, bundle=str(begun), flavour=flavour)
            begun.rename(target)
        finally:
            shutil.rmtree(begun, ignore_errors=True)
        return found

    name = f"plan-{flavour}-{model}-{precision}"
    return Row(name, 60, 240, run, against, lambda bench: bench.compiled(model, precision, flavour))


def _prepare(bench: Bench, seconds: float) -> dict[str, Any]:
    """Make the graphs that TensorRT compiles, where the libraries of a workstation are installed."""
    begun = bench.bundles.with_name(f".{bench.bundles.name}.{os.getpid()}")
    command = [sys.executable, "-m", "benchmarks.gpu_suite", "--prepare", str(begun)]
    try:
        code, output = run_command(command, seconds, dict(os.environ))
        if code is None:
            raise PartSlowError(f"ended after {seconds:.0f} s: {last_words(output)}")
        if code:
            raise PartFailedError(f"--prepare ended with {code}: {last_words(output)}")
        shutil.rmtree(bench.bundles, ignore_errors=True)
        begun.rename(bench.bundles)  # half of them would pass for all
    finally:
        shutil.rmtree(begun, ignore_errors=True)
    return {"bundles": len(list(bench.bundles.glob("*.bundle")))}


def _roofline_of_engines(bench: Bench, seconds: float) -> dict[str, Any]:
    timed = timed_engines(list(bench.parts.values()))
    return bench.ask("roofline", seconds, timed=timed, bundles=str(bench.bundles))


# ---- Why a part cannot run


def _no_other_library(bench: Bench) -> str:
    return why_no_torch() if why_no_torch() and not is_installed("cupy") else ""


def _no_tensorrt(flavour: str) -> str:
    try:
        require_tensorrt(flavour)
    except MissingError as error:
        return str(error)
    return ""


def _no_flavour(bench: Bench, flavour: str) -> str:
    """Why a flavour of TensorRT runs nothing here, which TensorRT-RTX was asked about itself."""
    answer = bench.parts.get("rtx-answer") if flavour == "tensorrt_rtx" else None
    refusal = "" if answer is None or not answer.figures else rtx_refusal(answer.figures)
    return refusal or _no_tensorrt(flavour)


def _no_plans(bench: Bench) -> str:
    reasons = [_no_flavour(bench, flavour) for flavour in TENSORRT]
    return "" if is_installed("torch_tensorrt") or not all(reasons) else "; ".join(reasons)


def _why_not_prepare(bench: Bench) -> str:
    if why := _no_plans(bench):
        return why
    if (bench.bundles / "pooling.onnx").is_file():
        return f"{bench.bundles} has them"
    lacking = [name for name in _TO_PREPARE if not is_installed(name)]
    return f"{', '.join(lacking)} not installed: make them elsewhere with --prepare" if lacking else ""


def _no_timed_engines(bench: Bench) -> str:
    if why := why_no_torch():
        return why
    timed = timed_engines(list(bench.parts.values()))
    graphs = [bench.bundle(engine["model"], engine["precision"]) for engine in timed]
    return "" if any(path.is_dir() for path in graphs) else "no engine was timed whose graph is here: see --prepare"
