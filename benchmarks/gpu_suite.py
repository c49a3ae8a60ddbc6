"""``make gpu``: tests/gpu and the benchmark on an NVIDIA GPU, written to benchmarks/results/<device>.json.

It needs no installation: ``python3 -m benchmarks.gpu_suite`` from the repository root. What the machine lacks becomes a part
"not run" with the reason, a failure a part "failed" with its message, and the other parts go on. Exit code: 0 when something
ran and nothing failed, 1 when something failed, 3 when nothing was run (no GPU: the reason is printed, and a document is
written only where --out says).

TensorRT compiles typed ONNX graphs, which take the workstation's libraries to make: ``--prepare FOLDER`` there, copy the
folder, ``--bundles FOLDER`` here. Without it the TorchScript, CUDA-memory and graph parts run all the same.

Every contender is alone in its process, started once, and waits while another is timed; they take turns, ratios are taken
within a round, and the median of the rounds counts. Latency is from the call until the GPU is done; "pipelined" is the time
per call of twenty that are enqueued before one wait. Contenders of torch get fp16 in channels-last and leave fp16; ours get
float32 NCHW, as a camera pipeline has it, and give float32 NCHW.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib.metadata
import importlib.util
import json
import os
import platform
import queue
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import tracemalloc
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from edge_backbones.errors import MissingDependencyError
from edge_backbones.runtime import cuda

ROOT = Path(__file__).parents[1]
TESTS = ROOT / "tests" / "gpu"
BUNDLES = ROOT / ".cache" / "gpu"

PASSED, FAILED, NOTHING_RUN = 0, 1, 3
TENSORRT = ("tensorrt", "tensorrt_rtx")
# Kept stages by network; the first is measured always, the others while time is left.
MODELS = {
    "resnet50": (1, 2, 3, 4),
    "mobilenetv3_large_100": (0, 1, 2, 3, 4),
    "vit_small_patch16_224": (2, 5, 8, 11),
}
BATCHES = (1, 32)
SIZE = 224
PARITY_MODELS = ("mobilenetv3_small_050", "test_resnet", "test_vit")
LARGEST_BATCH = 32

ROUNDS = 7
SECONDS_PER_TURN = 0.6
PIPELINED = 20
LONGEST_TASK = 200.0  # seconds; what takes longer hangs
_TIME_FOR_ROUNDS = 30.0
_LIBRARIES = (
    "numpy",
    "msgspec",
    "torch",
    "triton",
    "timm",
    "onnx",
    "cuda-bindings",
    "pycuda",
    "cupy-cuda12x",
    "cupy-cuda13x",
    "tensorrt",
    "tensorrt-lean",
    "tensorrt-rtx-cu12-bindings",
    "tensorrt-rtx-cu13-bindings",
    "torch-tensorrt",
    "torch-tensorrt-rtx",
    "pytest",
)


@dataclass
class Part:
    """One part of the document. ``status``: passed, failed or not run; ``reason``: why, unless it passed."""

    name: str
    status: str
    reason: str = ""
    seconds: float = 0.0
    figures: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.status}: {self.name}" + (f" ({self.reason})" if self.reason else "")


class ChildError(Exception):
    """A process of ours did not do what it was asked."""


class SlowChildError(ChildError):
    """It did not answer in time."""


class MissingError(Exception):
    """What a part needs, time included, is not there: it is not run."""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_suite", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="the document, in place of benchmarks/results/<device>.json"
    )
    parser.add_argument(
        "--seconds", type=float, default=480, help="wall time for everything; what does not fit is listed as not run"
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
    parser.add_argument(
        "--only",
        choices=("tests", "benchmark"),
        help="one half; parts of the other half are kept from the document that is there, if device and commit are the same",
    )
    parser.add_argument("--device", type=int, default=0, help="index of the GPU")
    parser.add_argument("--commit", help="what to write as the commit where this is no git checkout")
    options = parser.parse_args(arguments)
    if options.prepare is not None:
        prepare(options.prepare)
        return PASSED
    suite = Suite(options)
    reason = cuda.no_gpu_reason()
    found = () if reason else cuda.gpus()
    if not reason and not 0 <= options.device < len(found):
        reason = f"there is no cuda:{options.device}, {len(found)} GPUs are visible"
    if reason:
        suite.skip_all(reason)
    else:
        suite.gpu = found[options.device]
        suite.run()
    return suite.finish()


# ---- The parts, in turn


class Suite:
    """Runs the parts, keeps what came of them and writes the document after each."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.gpu: cuda.Gpu | None = None
        self.parts: list[Part] = []
        self._end = time.monotonic() + options.seconds
        self._described: dict[str, Any] | None = None
        self.rtx_refusal = ""

    @property
    def left(self) -> float:
        return self._end - time.monotonic()

    @property
    def path(self) -> Path | None:
        if self.options.out is not None:
            return Path(self.options.out)
        return None if self.gpu is None else ROOT / "benchmarks" / "results" / f"{slug(self.gpu.name)}.json"

    def skip_all(self, reason: str) -> None:
        if self.options.only != "benchmark":
            for file in test_files():
                self.add(Part(test_name(file), "not run", reason))
        if self.options.only != "tests":
            for name in ("ceilings", "TensorRT-RTX on this GPU", *OVERHEADS):
                self.add(Part(name, "not run", reason))
            for model in MODELS:
                for batch in BATCHES:
                    self.add(Part(f"benchmark: {model}, batch {batch}", "not run", reason))

    def run(self) -> None:
        half = self.options.only
        if half is not None:
            self.parts = self._kept(tests=half == "benchmark")
        if half != "benchmark":
            share = 1.0 if half == "tests" else 0.5
            end_of_tests = time.monotonic() + share * self.left
            for file in test_files():
                self.measure(test_name(file), lambda file=file: self._test(file, end_of_tests - time.monotonic()))
        if half != "tests":
            self._benchmark()

    def _benchmark(self) -> None:
        self.measure("ceilings", lambda: self._ask("ceilings"))
        answer = self.measure(
            "TensorRT-RTX on this GPU", lambda: self._ask("rtx_answer", bundles=str(self.options.bundles))
        )
        if answer.figures:
            self.rtx_refusal = rtx_refusal(answer.figures)
        for name, flavour in OVERHEADS.items():

            def overhead_of(flavour: str = flavour) -> dict[str, Any]:
                self._require(flavour)
                return self._ask("overhead", flavour=flavour, bundles=str(self.options.bundles))

            self.measure(name, overhead_of)
        with tempfile.TemporaryDirectory() as work:
            for model in MODELS:
                kinds = self._contenders(model, Path(work))
                for batch in BATCHES:
                    name = f"benchmark: {model}, batch {batch}"
                    self.measure(name, lambda batch=batch, kinds=kinds: self._compare(model, batch, kinds))  # noqa: B023

    def measure(self, name: str, action: Callable[[], dict[str, Any]]) -> Part:
        """Do one part. What is missing makes it "not run", any exception "failed"."""
        start = time.monotonic()
        if self.left <= 0:
            return self.add(Part(name, "not run", f"the {self.options.seconds:g} s that it was given were over"))
        try:
            part = Part(name, "passed", figures=action())
        except MissingError as error:
            part = Part(name, "not run", str(error))
        except PartFailedError as error:
            part = Part(name, "failed", str(error), figures=error.figures)
        except Exception as error:  # the suite goes on, and says what happened
            known = isinstance(error, ChildError)
            part = Part(name, "failed", str(error) if known else f"{type(error).__name__}: {error}")
            if not known:
                traceback.print_exc()
        part.seconds = round(time.monotonic() - start, 1)
        return self.add(part)

    def add(self, part: Part) -> Part:
        self.parts.append(part)
        print(part, flush=True)
        if self.gpu is not None:
            self.write()  # at once: whoever ends a machine that is paid for by the minute loses nothing
        return part

    def finish(self) -> int:
        written = self.write()
        print(
            f"wrote {written}" if written else "wrote nothing: there is no GPU to name the document after (--out FILE)"
        )
        if any(part.status == "failed" for part in self.parts):
            return FAILED
        return PASSED if any(part.status == "passed" for part in self.parts) else NOTHING_RUN

    def write(self) -> Path | None:
        path = self.path
        if path is None:
            return None
        if self._described is None:
            self._described = describe_machine(self.gpu, self.options.commit)
        document = {**self._described, "parts": [asdict(part) for part in self.parts]}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
        return path

    def _kept(self, *, tests: bool) -> list[Part]:
        """Parts of the half that is not run now, from the document that is there."""
        assert self.path is not None
        try:
            before = json.loads(self.path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return []
        self._described = describe_machine(self.gpu, self.options.commit)
        if any(before.get(key) != self._described[key] for key in ("device", "commit")):
            return []
        return [Part(**part) for part in before["parts"] if part["name"].startswith("tests/gpu") == tests]

    def _require(self, flavour: str) -> None:
        """MissingError where a kind of engine cannot run here at all."""
        if flavour in TENSORRT:
            require_tensorrt(flavour)
        if flavour == "tensorrt_rtx" and self.rtx_refusal:
            raise MissingError(self.rtx_refusal)

    def _ask(self, task: str, **arguments: Any) -> dict[str, Any]:
        with Child(task, device=self.options.device, **arguments) as child:
            try:
                return child.read(min(self.left, LONGEST_TASK))
            except SlowChildError as error:
                if self.left > 0:
                    raise
                raise MissingError(f"the {self.options.seconds:g} s that it was given were over: {error}") from error

    # -- tests

    def _test(self, file: Path, seconds: float) -> dict[str, Any]:
        """One file of tests/gpu in a process of its own: a GPU that faulted there is well again in the next."""
        if importlib.util.find_spec("pytest") is None:
            raise MissingError("pytest is not installed")
        if seconds <= 0:
            raise MissingError("the time for tests was over")
        with tempfile.TemporaryDirectory() as folder:
            report = Path(folder) / "report.xml"
            command = [sys.executable, "-m", "pytest", str(file), "--confcutdir", str(TESTS), "-p", "no:cacheprovider"]
            command += ["--junitxml", str(report), "-o", "junit_family=xunit2", "-o", "faulthandler_timeout=90", "-vv"]
            # Neither the plugins nor the releases of this machine were chosen by us: their warnings are not our errors.
            command += ["-W", "default", f"--bundles={self.options.bundles.resolve()}", f"--gpu={self.options.device}"]
            environment = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
            code, output = run_command(command, seconds, environment)
            if not report.exists():
                ended = f"did not end within {seconds:.0f} s" if code is None else f"pytest ended with {code}"
                raise PartFailedError(f"{ended}: {last_words(output)}", {"output": output[-4000:]})
            return read_report(report, code)

    # -- benchmark

    def _contenders(self, model: str, work: Path) -> list[dict[str, Any]]:
        """Every contender of a model; plans are compiled here, on the GPU that runs them."""
        kinds: list[dict[str, Any]] = [{"kind": kind} for kind in ("eager", "torchscript")]
        for flavour in TENSORRT:
            for precision in ("fp16", "int8"):
                name = f"{flavour} {precision}"

                def compile_it(flavour: str = flavour, precision: str = precision) -> dict[str, Any]:
                    self._require(flavour)
                    source = self.options.bundles / f"{model}-{precision}.bundle"
                    if not source.is_dir():
                        raise MissingError(f"{source.name} is not in {self.options.bundles}: make it with --prepare")
                    target = work / f"{model}-{precision}-{flavour}.bundle"
                    shutil.copytree(source, target)
                    return self._ask("compile_plan", bundle=str(target), flavour=flavour)

                part = self.measure(f"compile: {model}, {name}", compile_it)
                if part.status == "passed":
                    bundle = str(work / f"{model}-{precision}-{flavour}.bundle")
                    for graphs in (False, True):
                        kinds.append({"kind": flavour, "precision": precision, "bundle": bundle, "cuda_graphs": graphs})
        return [*kinds, {"kind": "compile"}]  # last, with all the time that is left: it takes minutes to get ready

    def _compare(self, model: str, batch: int, kinds: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Contenders side by side; one that fails is left out and makes the part fail at its end."""
        failures: dict[str, str] = {}
        missing: dict[str, str] = {}
        ready: dict[str, dict[str, Any]] = {}
        turns: dict[str, list[dict[str, float]]] = {}
        with contextlib.ExitStack() as stack:
            children = {}
            for kind in kinds:
                name = contender_name(kind)
                start = time.monotonic()
                try:
                    seconds = self.left - _TIME_FOR_ROUNDS
                    if seconds <= 0:
                        raise MissingError(f"the {self.options.seconds:g} s that it was given were nearly over")
                    child = Child("contend", device=self.options.device, model=model, batch=batch, **kind)
                    stack.enter_context(child)
                    ready[name] = {**child.read(seconds), "ready_s": round(time.monotonic() - start, 1)}
                    children[name] = child
                except SlowChildError as error:
                    missing[name] = f"not ready in the time that was left: {error}"
                except MissingError as error:
                    missing[name] = str(error)
                except ChildError as error:
                    failures[name] = str(error)
            turns = {name: [] for name in children}
            for _ in range(ROUNDS):
                if self.left < 2 * SECONDS_PER_TURN * len(children) or failures.keys() & children.keys():
                    break
                for name, child in children.items():
                    try:
                        turns[name].append(child.ask({"seconds": SECONDS_PER_TURN}, 60))
                    except ChildError as error:
                        failures[name] = str(error)
                        break
        whole = min((len(turn) for turn in turns.values()), default=0)
        figures = {
            "rounds": whole,
            "contenders": {
                name: {**ready[name], **medians(turns[name][:whole])}
                for name in turns
                if whole and name not in failures
            },
            "not_run": missing,
            "failed": failures,
        }
        figures["times_faster_than"] = ratios({name: turns[name][:whole] for name in figures["contenders"]})
        if failures:
            raise PartFailedError("; ".join(f"{name}: {why}" for name, why in failures.items()), figures)
        if not figures["contenders"]:
            raise MissingError(
                "; ".join(f"{name}: {why}" for name, why in missing.items()) or "there was no time for a round"
            )
        return figures


class PartFailedError(Exception):
    """A part failed and has figures all the same."""

    def __init__(self, message: str, figures: dict[str, Any]) -> None:
        super().__init__(message)
        self.figures = figures


OVERHEADS = {f"overhead: {flavour}": flavour for flavour in ("torchscript", *TENSORRT)}


def contender_name(kind: dict[str, Any]) -> str:
    """``eager fp16``, ``tensorrt int8 graphs``."""
    names = {"eager": "torch eager", "compile": "torch.compile max-autotune"}
    words = [names.get(kind["kind"], kind["kind"]), kind.get("precision", "fp16")]
    return " ".join([*words, *(["with CUDA graphs"] if kind.get("cuda_graphs") else [])])


def medians(turns: Sequence[dict[str, float]]) -> dict[str, float]:
    """Each figure's median over the rounds."""
    return {key: statistics.median(turn[key] for turn in turns) for key in turns[0]} if turns else {}


def ratios(turns: dict[str, list[dict[str, float]]]) -> dict[str, dict[str, dict[str, float]]]:
    """How many times faster each contender is than each other: medians of the ratios within a round."""

    def ratio(fast: str, slow: str, key: str) -> float:
        return statistics.median(b[key] / a[key] for a, b in zip(turns[fast], turns[slow], strict=True))

    keys = ("latency_ms", "pipelined_ms")
    return {
        fast: {slow: {key: ratio(fast, slow, key) for key in keys} for slow in turns if slow != fast} for fast in turns
    }


def test_files() -> list[Path]:
    return sorted(TESTS.glob("test_*.py"))


def test_name(file: Path) -> str:
    return file.relative_to(ROOT).as_posix()


def read_report(report: Path, code: int | None) -> dict[str, Any]:
    """Counts of a JUnit report, reasons of skips and messages of failures. Raises PartFailedError, MissingError."""
    passed, failures, skipped = 0, {}, {}
    for case in ElementTree.parse(report).iter("testcase"):
        name = case.get("name", "")
        problem = next((child for child in case if child.tag in ("failure", "error")), None)
        skip = case.find("skipped")
        if problem is not None:
            failures[name] = f"{problem.get('message', '')}\n{(problem.text or '')[-3000:]}".strip()
        elif skip is not None:
            skipped.setdefault(skip.get("message", ""), []).append(name)
        else:
            passed += 1
    figures = {"passed": passed, "failed": failures, "not_run": skipped}
    if failures or code not in (0, 5):
        first = next(iter(failures.items()), ("pytest", f"ended with {code}"))
        raise PartFailedError(
            f"{len(failures)} of {passed + len(failures)} failed, {first[0]}: {first[1].splitlines()[0]}", figures
        )
    if not passed:
        raise MissingError("; ".join(skipped) or "no test was found")
    return figures


# ---- The machine


def slug(name: str) -> str:
    """``NVIDIA H100 80GB HBM3`` as a file name: ``nvidia-h100-80gb-hbm3``."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def describe_machine(gpu: cuda.Gpu | None, commit: str | None) -> dict[str, Any]:
    """Device, driver, versions, commit and date. What cannot be found out is None."""
    versions = {}
    for name in _LIBRARIES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    head = _output("git", "rev-parse", "HEAD")
    changes = _output("git", "status", "--porcelain", "--untracked-files=no") if head else None
    # Read only: what state the card was in when the figures were taken.
    query = "driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.limit,temperature.gpu,persistence_mode"
    card = _output("nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader", f"--id={gpu.index}") if gpu else None
    return {
        "device": None if gpu is None else asdict(gpu),
        "driver": None if gpu is None else (card or "").split(",")[0].strip() or None,
        "card": None if not card else dict(zip(query.split(","), map(str.strip, card.split(",")), strict=False)),
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": versions,
        "nvcc": last_words(_output("nvcc", "--version") or "") if shutil.which("nvcc") else None,
        "commit": head or commit,
        "uncommitted_changes": None if changes is None else bool(changes),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


# ---- Processes


def run_command(command: Sequence[str], seconds: float, environment: dict[str, str]) -> tuple[int | None, str]:
    """Exit code (None: it was ended after ``seconds``) and everything that it printed."""
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
        try:
            code: int | None = process.wait(seconds)
        except subprocess.TimeoutExpired:
            code = None
        _end(process)
        output.seek(0)
        return code, output.read().decode(errors="replace")


def _end(process: subprocess.Popen[Any]) -> None:
    """End a process of ours and what it started: torch.compile keeps workers."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        if hasattr(os, "killpg"):
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()
    process.wait()


def last_words(output: str) -> str:
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    return lines[-1][:500] if lines else "it printed nothing"


class Child:
    """One of the tasks below in a process of its own, which answers with JSON lines on its standard output."""

    def __init__(self, task: str, **arguments: Any) -> None:
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 (closed by __exit__)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.gpu_suite", "--child", task, json.dumps(arguments)],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            start_new_session=True,
        )
        self._answers: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._answers.put(line)
        self._answers.put(None)

    def read(self, seconds: float) -> dict[str, Any]:
        """The next answer. Raises MissingError where the task says that something is missing, else ChildError."""
        try:
            line = self._answers.get(timeout=max(0.1, seconds))
        except queue.Empty:
            raise SlowChildError(f"no answer within {seconds:.0f} s: {last_words(self._said())}") from None
        if line is None:
            raise ChildError(f"the process ended with {self._process.wait()}: {last_words(self._said())}")
        answer: dict[str, Any] = json.loads(line)
        if "missing" in answer:
            raise MissingError(answer["missing"])
        if "error" in answer:
            raise ChildError(answer["error"])
        return answer

    def ask(self, question: dict[str, Any], seconds: float) -> dict[str, Any]:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # read() tells how it ended
            self._process.stdin.write(json.dumps(question) + "\n")
            self._process.stdin.flush()
        return self.read(seconds)

    def _said(self) -> str:
        self._errors.seek(0)
        return self._errors.read().decode(errors="replace")

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *exception: object) -> None:
        _end(self._process)
        for pipe in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(OSError):
                if pipe is not None:
                    pipe.close()
        self._errors.close()


def child_main(task: str, arguments: dict[str, Any]) -> None:
    """Answer with what a task yields, or with why it does not."""
    # Libraries print where they like: answers have a channel of their own.
    with os.fdopen(os.dup(1), "w") as answers:
        os.dup2(2, 1)
        try:
            for answer in TASKS[task](**arguments):
                print(json.dumps(answer), file=answers, flush=True)
        except Exception as error:
            traceback.print_exc()
            text = " ".join(str(error).split())[:2000]
            said = {"missing": text} if is_missing(error) else {"error": f"{type(error).__name__}: {text}"}
            print(json.dumps(said), file=answers, flush=True)


def is_missing(error: Exception) -> bool:
    """Does it say that a library is not installed? One that is and does not load is a failure."""
    if isinstance(error, ModuleNotFoundError):
        return not (error.name or "").startswith(("edge_backbones", "benchmarks"))
    return isinstance(error, (MissingError, MissingDependencyError))


# ---- What is measured: networks


def require_tensorrt(flavour: str) -> Any:
    """TensorRT's module; MissingError where it is not installed."""
    from edge_backbones.runtime.tensorrt_library import load_library

    try:
        return load_library(flavour)  # type: ignore[arg-type]
    except MissingDependencyError as error:
        raise MissingError(str(error)) from error


def trained_like(model: str, out_indices: Sequence[int] | None = None, seed: int = 0) -> Any:
    """A timm backbone (LoadedBackbone) with seeded weights, and batch norms as training leaves them.

    Untouched batch norm (mean 0, variance 1, scale 1) would hide a wrong fold, and its activations grow from block to
    block as no trained network's do.
    """
    import torch

    from edge_backbones.build.sources.common import SourceOptions
    from edge_backbones.build.sources.timm import load_timm

    indices = None if out_indices is None else tuple(out_indices)
    loaded = load_timm(model, SourceOptions(weights=f"random:{seed}", out_indices=indices))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for norm in loaded.module.modules():
            if isinstance(norm, torch.nn.modules.batchnorm._BatchNorm) and norm.track_running_stats:
                norm.running_mean.normal_(0, 0.3, generator=generator)
                norm.running_var.uniform_(0.5, 2, generator=generator)
                norm.weight.uniform_(-0.3, 1.4, generator=generator)
                norm.bias.normal_(0, 0.3, generator=generator)
    return loaded


def fixed_input(batch: int, height: int, width: int) -> Any:
    from edge_backbones.spec import InputSpec, ShapeRange

    return InputSpec(
        name="pixel_values",
        channels=3,
        batch=ShapeRange.fixed(batch),
        height=ShapeRange.fixed(height),
        width=ShapeRange.fixed(width),
    )


def pooling_input(largest: int = 256) -> Any:
    """The input of the pooling backbone: 1 to 32 images of 32 to ``largest`` pixels in steps of 8."""
    from edge_backbones.spec import InputSpec, ShapeRange

    size = ShapeRange(min=32, opt=64, max=largest)
    return InputSpec(
        name="pixel_values",
        channels=3,
        batch=ShapeRange(min=1, opt=2, max=LARGEST_BATCH),
        height=size,
        width=size,
        size_multiple=8,
    )


def pooling_onnx(bundles: Path | None = None) -> bytes:
    """The graph of edge_backbones.testing's pooling backbone for any batch and size, so that every value is known."""
    if bundles is not None and (bundles / "pooling.onnx").is_file():
        return (bundles / "pooling.onnx").read_bytes()
    try:
        from onnx import TensorProto, helper
    except ModuleNotFoundError as error:
        raise MissingError("onnx is not installed, and --bundles has no pooling.onnx") from error
    stages = (("pool4", 4), ("pool8", 8))
    nodes = [
        helper.make_node("AveragePool", ["pixel_values"], [stage], kernel_shape=[k, k], strides=[k, k])
        for stage, k in stages
    ]
    axes = ["batch", 3, "height", "width"]
    inputs = [helper.make_tensor_value_info("pixel_values", TensorProto.FLOAT, axes)]
    outputs = [
        helper.make_tensor_value_info(stage, TensorProto.FLOAT, ["batch", 3, f"height{k}", f"width{k}"])
        for stage, k in stages
    ]
    graph = helper.make_graph(nodes, "average_pooling", inputs, outputs)
    model: bytes = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10
    ).SerializeToString()
    return model


def pooling_module() -> Any:
    """The same in torch."""
    import torch

    class Pooling(torch.nn.Module):
        def forward(self, pixels: Any) -> Any:
            return tuple(torch.nn.functional.avg_pool2d(pixels, k) for k in (4, 8))

    return Pooling().eval()


def cosine(expected: Sequence[np.ndarray], actual: Sequence[np.ndarray]) -> float:
    """The smallest over all maps; NaN for values that are not finite."""
    found = []
    for reference, value in zip(expected, actual, strict=True):
        a, b = (array.astype(np.float64).ravel() for array in (reference, value))
        found.append(float(a @ b / np.sqrt((a @ a) * (b @ b))))
    return float(np.min(found))  # NaN where one of them is


# ---- Tasks of child processes


def contend(
    device: int | str, model: str, batch: int, kind: str, size: int = SIZE, **options: Any
) -> Iterator[dict[str, Any]]:
    """Get ready, say so, and then time calls whenever asked. ``device``: the GPU's index, or "cpu" in tests of this file."""
    make = _plan_contender if kind in TENSORRT else _torch_contender
    call, wait, facts = make(device, model, batch, kind, size, **options)
    yield facts
    for line in sys.stdin:
        yield timings(call, wait, json.loads(line)["seconds"])


def timings(call: Callable[[], Any], wait: Callable[[], None], seconds: float) -> dict[str, float]:
    """Milliseconds per call, waited for one by one and in rows."""
    single, rows = [], []
    begin = time.perf_counter()
    while len(single) < 10 or time.perf_counter() - begin < seconds / 2:
        start = time.perf_counter()
        call()
        wait()
        single.append(1e3 * (time.perf_counter() - start))
    begin = time.perf_counter()
    while len(rows) < 2 or time.perf_counter() - begin < seconds / 2:
        start = time.perf_counter()
        for _ in range(PIPELINED):
            call()
        wait()
        rows.append(1e3 * (time.perf_counter() - start) / PIPELINED)
    ordered = sorted(single)
    return {
        "latency_ms": statistics.median(single),
        "latency_p99_ms": ordered[min(len(ordered) - 1, round(0.99 * len(ordered)))],
        "fastest_ms": ordered[0],
        "pipelined_ms": statistics.median(rows),
        "calls": len(single),
    }


def _torch_contender(
    device: int | str, model: str, batch: int, kind: str, size: int
) -> tuple[Callable[[], Any], Callable[[], None], dict[str, Any]]:
    import torch

    place = torch.device("cpu" if device == "cpu" else f"cuda:{device}")
    loaded = trained_like(model, MODELS.get(model))
    images = np.random.default_rng(0).standard_normal((batch, 3, size, size)).astype(np.float32)

    # The reference in fp32 without TF32, on the same device.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    with torch.inference_mode():
        net = loaded.module.to(place)
        expected = [m.float().cpu().numpy() for m in net(torch.from_numpy(images).to(place))]
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True

    if kind == "torchscript":
        call = _torchscript(loaded, batch, size, device, images)
    else:
        net = net.half().to(memory_format=torch.channels_last)
        pixels = torch.from_numpy(images).to(place).half().contiguous(memory_format=torch.channels_last)
        run = torch.compile(net, mode="max-autotune") if kind == "compile" else net

        def call() -> Any:
            with torch.inference_mode():
                return run(pixels)

    def wait() -> None:
        if place.type == "cuda":
            torch.cuda.synchronize(place)

    for _ in range(10):
        call()
    wait()
    actual = [torch.from_dlpack(m).float().cpu().numpy() for m in call()]
    return call, wait, {"cosine": _checked_cosine(expected, actual), "warm_up_calls": 11}


def _torchscript(loaded: Any, batch: int, size: int, device: int | str, images: np.ndarray) -> Callable[[], Any]:
    """TorchScript fp16 as a bundle has it: through EdgeBackbone, arrays on the GPU in and out."""
    import copy
    import dataclasses

    import torch

    from edge_backbones import EdgeBackbone
    from edge_backbones.build.prepare import prepare as fold
    from edge_backbones.build.torchscript import trace_torchscript
    from edge_backbones.runtime.torchscript import TorchScriptSession
    from edge_backbones.spec import Precision

    place = "cpu" if device == "cpu" else f"cuda:{device}"
    on_cpu = dataclasses.replace(loaded, module=copy.deepcopy(loaded.module).cpu())
    prepared = fold(on_cpu, fixed_input(batch, size, size))
    data = trace_torchscript(prepared.module, prepared.input, Precision.FP16)
    session = TorchScriptSession(data, input=prepared.input, outputs=prepared.spec.outputs, device=place)
    backbone = EdgeBackbone(prepared.spec, prepared.input, session, device=place)
    if device == "cpu":
        return lambda: [torch.from_numpy(m) for m in backbone(images).feature_maps]
    pixels = torch.from_numpy(images).to(place)
    stream = torch.cuda.current_stream(pixels.device)
    return lambda: backbone(pixels, stream=stream).feature_maps


def _checked_cosine(expected: Sequence[np.ndarray], actual: Sequence[np.ndarray]) -> float:
    """A contender that computes something else is no contender."""
    found = cosine(expected, actual)
    if not found > 0.99:  # fp16 leaves 0.9999; NaN is not above it either
        raise RuntimeError(f"its maps have cosine {found:.4f} to the fp32 reference: it computes something else")
    return found


def _plan_contender(
    device: int | str,
    model: str,
    batch: int,
    kind: str,
    size: int,
    precision: str,
    bundle: str,
    cuda_graphs: bool,
) -> tuple[Callable[[], Any], Callable[[], None], dict[str, Any]]:
    """A plan through EdgeBackbone, without torch. Parity was measured when it was compiled."""
    from edge_backbones import Bundle, EdgeBackbone

    index = int(device)
    opened = Bundle.open(bundle)
    engine = next(e for e in opened.manifest.engines if e.key.flavour == kind and e.key.precision.value == precision)
    backbone = EdgeBackbone.from_pretrained(bundle, engine=engine.name, device=f"cuda:{index}", cuda_graphs=cuda_graphs)
    memory = cuda.open_memory(index)
    images = np.random.default_rng(0).standard_normal((batch, 3, size, size)).astype(np.float32)
    array, stream = on_device(memory, images)

    def call() -> Any:
        return backbone(array, stream=stream).feature_maps

    def wait() -> None:
        with memory:
            memory.wait(stream)

    for _ in range(10):
        call()
    wait()
    refused = getattr(backbone._engine, "graph_refusals", {})
    if cuda_graphs and refused:
        raise RuntimeError(f"CUDA graphs were refused: {refused}")
    return call, wait, {"cosine": min(stage.cosine for stage in engine.parity.stages), "warm_up_calls": 10}


def on_device(memory: cuda.Memory, values: np.ndarray) -> tuple[Any, int]:
    """A copy on the GPU (it lives as long as the process), and a stream to work on."""
    from edge_backbones.runtime.device_arrays import DeviceArray

    values = np.ascontiguousarray(values)
    with memory:
        pointer, stream = memory.allocate(values.nbytes), memory.new_stream()
        memory.copy_in(pointer, values.ctypes.data, values.nbytes, stream)
        memory.wait(stream)
    return DeviceArray(
        pointer, values.shape, values.dtype, device=memory.device, owner=None, synchronize=None, stream=stream
    ), stream


def compile_plan(device: int, bundle: str, flavour: str) -> Iterator[dict[str, Any]]:
    """Compile a bundle's graphs for this GPU; parity against fp32 is measured on the way, its gate is the bundle's."""
    from edge_backbones import compile_bundle
    from edge_backbones.build.tensorrt import PlanOptions, Shapes
    from edge_backbones.bundle import Bundle
    from edge_backbones.spec import Precision, ShapeRange

    manifest = Bundle.open(bundle).manifest
    input = manifest.input
    plan = PlanOptions(
        profiles=tuple(
            Shapes(batch=ShapeRange.fixed(batch), height=input.height, width=input.width)
            for batch in BATCHES
            if batch in input.batch
        )
    )
    held = tuple(Precision(g.precision) for g in manifest.graphs if g.format == "onnx")
    start = time.perf_counter()
    records = compile_bundle(bundle, precisions=held, flavour=flavour, plan=plan, device=device)  # type: ignore[arg-type]
    yield {
        "seconds": time.perf_counter() - start,
        "engines": [
            {
                "name": record.name,
                "bytes": record.file.size,
                "measured": record.parity.measured,
                "stages": [{"stage": s.stage, "cosine": s.cosine, "sqnr_db": s.sqnr_db} for s in record.parity.stages],
            }
            for record in records
        ],
    }


def ceilings(device: int) -> Iterator[dict[str, Any]]:
    """What this GPU does at best here: the figures to hold others against. Random data: zeros run faster."""
    memory = cuda.open_memory(device)
    size, count = 1 << 30, 20
    seed = np.random.default_rng(0).integers(0, 256, 1 << 24, np.uint8)
    with memory:
        stream, source, target = memory.new_stream(), memory.allocate(size), memory.allocate(size)
        for offset in range(0, size, seed.nbytes):
            memory.copy_in(source + offset, seed.ctypes.data, seed.nbytes, stream)
        memory.wait(stream)
        seconds = []
        for _ in range(5):
            start = time.perf_counter()
            for _ in range(count):
                memory.copy(target, source, size, stream)
            memory.wait(stream)
            seconds.append((time.perf_counter() - start) / count)
        memory.free(source)
        memory.free(target)
    figures: dict[str, Any] = {"copy_gb_per_s": 2 * size / statistics.median(seconds) / 1e9, "copy_bytes": size}
    try:
        import torch
    except ModuleNotFoundError:
        yield {**figures, "fp16_matmul_tflops": None, "not_run": {"matmul": "torch is not installed"}}
        return
    n = 8192
    place = torch.device(f"cuda:{device}")
    generator = torch.Generator(place).manual_seed(0)
    a, b = (torch.randn(n, n, device=place, generator=generator).half() for _ in range(2))
    for _ in range(5):
        a @ b
    milliseconds = []
    for _ in range(15):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        a @ b
        end.record()
        end.synchronize()
        milliseconds.append(begin.elapsed_time(end))
    yield {**figures, "fp16_matmul_tflops": 2 * n**3 / statistics.median(milliseconds) / 1e9, "matmul_size": n}


def rtx_answer(device: int, bundles: str | None = None) -> Iterator[dict[str, Any]]:
    """What TensorRT-RTX says to this GPU, in its own words: plans for its default targets, and for the GPU at hand."""
    library = require_tensorrt("tensorrt_rtx")
    from edge_backbones.runtime.tensorrt_library import logger_of

    graph = pooling_onnx(None if bundles is None else Path(bundles))
    log = logger_of(library)
    with contextlib.ExitStack() as stack:
        if cuda.gpus():  # it speaks of the device that is current in this thread
            stack.enter_context(cuda.open_memory(device))
        plan = _rtx_plan(library, graph, log, current=False)
        if plan is None:
            raise RuntimeError(f"TensorRT-RTX does not compile the pooling graph: {log.last_error()}")
        log.clear()
        runtime = library.Runtime(log)
        validity, bits = runtime.get_engine_validity(plan)
        said_of_validity = log.last_error()
        log.clear()
        engine = runtime.deserialize_cuda_engine(plan)
        said_of_loading = log.last_error()
        log.clear()
        current = _rtx_plan(library, graph, log, current=True) is not None
        said_of_current = log.last_error()
    names = {name: int(value) for name, value in library.EngineInvalidityDiagnostics.__members__.items()}
    yield {
        "version": str(library.__version__),
        "accepted": engine is not None,
        "validity": validity.name,
        "diagnostics": int(bits),
        "diagnostics_names": [name for name, bit in names.items() if int(bits) & bit],
        "validity_log": said_of_validity,
        "deserialise_log": None if engine is not None else said_of_loading,
        "compiled_for_this_gpu": current,
        "compile_log": None if current else said_of_current,
    }


def _rtx_plan(library: Any, graph: bytes, log: Any, *, current: bool) -> bytes | None:
    """A plan of the pooling graph for the default targets, or for the GPU at hand (ComputeCapability.CURRENT).

    Not through the package, which looks into a plan where it finds a GPU: here the GPU may refuse it.
    """
    builder = library.Builder(log)
    network = builder.create_network(0)
    parser = library.OnnxParser(network, log)
    if not parser.parse(graph):
        raise RuntimeError(f"TensorRT-RTX cannot read the pooling graph: {log.last_error()}")
    config = builder.create_builder_config()
    if current:
        config.num_compute_capabilities = 1
        if not config.set_compute_capability(library.ComputeCapability.CURRENT, 0):
            return None
    input = pooling_input()
    profile = builder.create_optimization_profile()
    profile.set_shape("pixel_values", input.min_shape, input.opt_shape, input.max_shape)
    if config.add_optimization_profile(profile) < 0:
        raise RuntimeError(f"TensorRT-RTX refuses the profile: {log.last_error()}")
    plan = builder.build_serialized_network(network, config)
    return None if plan is None else bytes(plan)


def rtx_refusal(answer: dict[str, Any]) -> str:
    """Why nothing of TensorRT-RTX is run on this GPU; empty when it takes it.

    Only where it names the GPU or its driver: any other trouble is a failure of whoever loads a plan.
    """
    if answer["accepted"] or not set(answer["diagnostics_names"]) & {"UNSUPPORTED_CC", "OLD_CUDA_DRIVER"}:
        return ""
    named = ", ".join(answer["diagnostics_names"])
    return f"TensorRT-RTX {answer['version']} refuses this GPU ({named}): {answer['deserialise_log']}"


def overhead(device: int, flavour: str, bundles: str | None = None) -> Iterator[dict[str, Any]]:
    """Host microseconds per call that only enqueues, of the library alone and through our session and EdgeBackbone.

    The pooling backbone: the GPU is done with a call before the next one comes, so that nothing but the host is timed.
    """
    if flavour == "torchscript":
        yield _torchscript_overhead(device)
        return
    require_tensorrt(flavour)
    graph = pooling_onnx(None if bundles is None else Path(bundles))
    yield {
        f"cuda_graphs_{'on' if graphs else 'off'}": _plan_overhead(device, flavour, graph, graphs)
        for graphs in (False, True)
    }


def must(result: Any, what: str, log: Any) -> Any:
    """What a call of TensorRT returned; it fails by returning None or False."""
    if result is None or result is False:
        raise RuntimeError(f"TensorRT refused {what}: {log.last_error()}")
    return result


def _plan_overhead(device: int, flavour: Any, graph: bytes, cuda_graphs: bool) -> dict[str, Any]:
    from edge_backbones import EdgeBackbone
    from edge_backbones.build.tensorrt import compile_plan as build
    from edge_backbones.runtime.device_arrays import from_foreign
    from edge_backbones.runtime.tensorrt import TensorRtSession
    from edge_backbones.runtime.tensorrt_library import load_library, logger_of
    from edge_backbones.spec import Precision
    from edge_backbones.testing import SPEC

    input = pooling_input()
    plan = build(graph, input, Precision.FP32, flavour=flavour, device=device)
    memory = cuda.open_memory(device)
    array, stream = on_device(memory, np.random.default_rng(0).random(input.opt_shape, np.float32))
    library = load_library(flavour)
    with memory:
        runtime = library.Runtime(logger_of(library))
        engine = must(runtime.deserialize_cuda_engine(plan.data), "its own plan", logger_of(library))
        log = logger_of(library)
        context = must(engine.create_execution_context(), "an execution context", log)
        must(context.set_input_shape(input.name, input.opt_shape), "the shape", log)
        must(context.set_tensor_address(input.name, array.pointer), "the input's address", log)
        for name in SPEC.outputs:
            buffer = memory.allocate(4 * int(np.prod(tuple(context.get_tensor_shape(name)))))
            must(context.set_tensor_address(name, buffer), "an output's address", log)

        def bare() -> None:
            must(context.execute_async_v3(stream), "to run", log)

        def wait() -> None:
            with memory:
                memory.wait(stream)

        bare()
        wait()
        if cuda_graphs:
            captured = memory.capture(stream, bare)
            alone = microseconds(lambda: memory.launch(captured, stream), wait)
        else:
            alone = microseconds(bare, wait)
    session = TensorRtSession(
        bytearray(plan.data),
        flavour=flavour,
        input=input,
        outputs=SPEC.outputs,
        device=device,
        cuda_graphs=cuda_graphs,
    )
    with contextlib.closing(session):
        foreign = from_foreign(array, stream=stream)
        through_session = microseconds(lambda: session.run_on_device(foreign, stream), wait)
        backbone = EdgeBackbone(SPEC, input, session, device=f"cuda:{device}")
        through_backbone = microseconds(lambda: backbone(array, stream=stream), wait)
        held = host_allocations(lambda: backbone(array, stream=stream), wait)
        host = np.random.default_rng(0).random(input.opt_shape, np.float32)
        held_from_host = host_allocations(lambda: backbone(host), wait)
        refused = {str(shape): why for shape, why in session.graph_refusals.items()}
    return {
        "bare_us": alone,
        "session_us": through_session,
        "backbone_us": through_backbone,
        "overhead_us": through_backbone - alone,
        "target_us": 5 if cuda_graphs else 20,
        "graph_refusals": refused,
        "device_arrays": held,
        "host_arrays": held_from_host,
    }


def _torchscript_overhead(device: int) -> dict[str, Any]:
    import torch

    from edge_backbones import EdgeBackbone
    from edge_backbones.build.torchscript import trace_torchscript
    from edge_backbones.runtime.device_arrays import from_foreign
    from edge_backbones.runtime.torchscript import TorchScriptSession
    from edge_backbones.spec import Precision
    from edge_backbones.testing import SPEC

    input = pooling_input()
    data = trace_torchscript(pooling_module(), input, Precision.FP32)
    session = TorchScriptSession(data, input=input, outputs=SPEC.outputs, device=f"cuda:{device}")
    backbone = EdgeBackbone(SPEC, input, session, device=f"cuda:{device}")
    pixels = torch.rand(input.opt_shape, device=f"cuda:{device}")
    queue_ = torch.cuda.Stream(device)
    stream = queue_.cuda_stream
    torch.cuda.synchronize(device)
    module = session._module

    def bare() -> Any:
        with torch.inference_mode():
            return module(pixels)

    def wait() -> None:
        queue_.synchronize()

    with torch.cuda.stream(queue_):
        alone = microseconds(bare, wait)
        foreign = from_foreign(pixels, stream=stream)
        through_session = microseconds(lambda: session.run_on_device(foreign, stream), wait)
        through_backbone = microseconds(lambda: backbone(pixels, stream=stream), wait)
        held = host_allocations(lambda: backbone(pixels, stream=stream), wait)
    return {
        "bare_us": alone,
        "session_us": through_session,
        "backbone_us": through_backbone,
        "overhead_us": through_backbone - alone,
        "device_arrays": held,
    }


def microseconds(call: Callable[[], Any], wait: Callable[[], None], rows: int = 60) -> float:
    """Median host time of a call that only enqueues, over rows short enough that the queue never fills."""
    for _ in range(50):
        call()
    wait()
    found = []
    for _ in range(rows):
        start = time.perf_counter()
        for _ in range(PIPELINED):
            call()
        found.append(1e6 * (time.perf_counter() - start) / PIPELINED)
        wait()
    return statistics.median(found)


def host_allocations(call: Callable[[], Any], wait: Callable[[], None], calls: int = 200) -> dict[str, float]:
    """Python's and numpy's memory in steady state: bytes that stay behind per call, and the most that one call holds."""
    for _ in range(50):
        call()
    wait()
    tracemalloc.start()
    try:
        for _ in range(20):
            call()
        wait()
        before, _ = tracemalloc.get_traced_memory()
        peaks = []
        for _ in range(calls):
            at_start, _ = tracemalloc.get_traced_memory()
            tracemalloc.reset_peak()
            call()
            peaks.append(tracemalloc.get_traced_memory()[1] - at_start)
        wait()
        after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    return {"kept_bytes_per_call": (after - before) / calls, "largest_bytes_in_a_call": float(statistics.median(peaks))}


TASKS: dict[str, Callable[..., Iterator[dict[str, Any]]]] = {
    "contend": contend,
    "compile_plan": compile_plan,
    "ceilings": ceilings,
    "rtx_answer": rtx_answer,
    "overhead": overhead,
}


# ---- On a workstation


def prepare(
    folder: Path,
    *,
    parity: Sequence[str] = PARITY_MODELS,
    benchmark: Sequence[str] = tuple(MODELS),
    precisions: Sequence[str] = ("fp32", "fp16", "bf16", "int8"),
) -> None:
    """Bundles without engines: the typed graphs that TensorRT compiles, and the golden samples of the fp32 network.

    A precision in which a network with random weights leaves its gate on the CPU is left out: a GPU would leave it too.
    Such weights do not compress: resnet50 is 47 MB in fp16 and 24 MB in int8. Take along what fits.
    """
    from build_scripts.photographs import write_crops
    from edge_backbones import BuildOptions
    from edge_backbones.spec import Precision, ShapeRange

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "pooling.onnx").write_bytes(pooling_onnx())
    size = ShapeRange(min=64, opt=96, max=160)
    usual: dict[str, Any] = {
        "weights": "random:0",
        "batch": ShapeRange(min=1, opt=1, max=LARGEST_BATCH),
        "torchscript": False,
        "fallback": False,
    }
    with tempfile.TemporaryDirectory() as photographs:
        write_crops(Path(photographs), 36)
        for model in parity:
            # A transformer has one size; other networks get a range of them.
            sides = (160, 160) if "vit" in model else (size, size)
            for precision in precisions:
                options = BuildOptions(
                    **usual, height=sides[0], width=sides[1], precisions=(Precision(precision),), golden=2
                )
                _build(trained_like(model), folder / f"parity-{model}-{precision}.bundle", photographs, options)
        for model in benchmark:
            for precision in ("fp16", "int8"):
                options = BuildOptions(
                    **usual,
                    height=SIZE,
                    width=SIZE,
                    out_indices=MODELS.get(model),
                    precisions=(Precision(precision),),
                    golden=1,
                )
                _build(model, folder / f"{model}-{precision}.bundle", photographs, options)


def _build(source: Any, target: Path, photographs: str, options: Any) -> None:
    import msgspec

    from edge_backbones import build_bundle
    from edge_backbones.bundle import write_manifest
    from edge_backbones.errors import ParityError

    try:
        bundle = build_bundle(source, target, images=photographs, options=options, overwrite=True).bundle
    except ParityError as error:
        print(f"{target.name} is left out: {error}", flush=True)
        return
    # The CPU's engines are as large as the graphs, and nobody runs them there.
    shutil.rmtree(bundle.path / "engines")
    write_manifest(bundle.path, msgspec.structs.replace(bundle.manifest, engines=()))
    total = sum(path.stat().st_size for path in target.rglob("*") if path.is_file())
    print(f"{target.name}: {total / 1e6:.1f} MB", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child_main(sys.argv[2], json.loads(sys.argv[3]))
    else:
        sys.exit(main())
