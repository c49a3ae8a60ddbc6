"""``make gpu``: tests/gpu and the benchmark on an NVIDIA GPU, written to benchmarks/results/<device>.json.

It needs no installation: ``python3 -m benchmarks.gpu_suite`` from the repository root. What the machine lacks becomes a part
"not run" with the reason, a failure a part "failed" with its message, and the other parts go on. Exit code: 0 when something
ran and nothing failed, 1 when something failed, 3 when nothing was run (no GPU: the reason is printed, and a document is
written only where --out says).

TensorRT compiles typed ONNX graphs, which take the workstation's libraries to make. Where those are installed they are made
first, in minutes that do not count; else ``--prepare FOLDER`` on a workstation, copy the folder, ``--bundles FOLDER`` here.
Without them the TorchScript, CUDA-memory and graph parts run all the same. What was to be reached, and was, is under
``targets``; a figure that misses is no failure.

Every contender is alone in its process, started once, and waits while another is timed; they take turns, ratios are taken
within a round, and the median of the rounds counts. Latency is from the call until the GPU is done; "pipelined" is the time
per call of twenty that are enqueued before one wait. Contenders of torch get fp16 in channels-last and leave fp16; ours get
float32 NCHW, as a camera pipeline has it, and give float32 NCHW.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import statistics
import sys
import tempfile
import time
import traceback
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.gpu_common import BATCHES, MODELS, NOTHING_RUN, TENSORRT, MissingError, patience, require_tensorrt
from benchmarks.gpu_prepare import PRECISIONS, prepare
from benchmarks.gpu_processes import (
    ROOT,
    Child,
    ChildError,
    SlowChildError,
    describe_machine,
    last_words,
    run_command,
    slug,
)
from benchmarks.gpu_tasks import rtx_refusal
from edge_backbones.machine import gpus
from edge_backbones.machine.profiles import FIRST_ARCHITECTURE

TESTS = ROOT / "tests" / "gpu"
BUNDLES = ROOT / ".cache" / "gpu"

PASSED, FAILED = 0, 1

ROUNDS = 7
SECONDS_PER_TURN = 0.6
# Seconds on a server, see `patience`. A task that takes longer hangs.
WALL_TIME = 480.0
LONGEST_TASK = 200.0
_TIME_FOR_ROUNDS = 30.0
_TO_PREPARE = ("torch", "timm", "onnx", "onnxscript", "onnxruntime", "openvino", "skimage")


@dataclass
class Part:
    """One part of the document.

    ``status``: passed, failed or not run. ``reason``: why, unless it passed.
    """

    name: str
    status: str
    reason: str = ""
    seconds: float = 0.0
    figures: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.status}: {self.name}" + (f" ({self.reason})" if self.reason else "")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_suite", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="the document, in place of benchmarks/results/<device>.json"
    )
    parser.add_argument(
        "--seconds",
        type=float,
        help="wall time for everything; what does not fit is listed as not run (default: 480, on a Jetson 1920)",
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
    reason = gpus.no_gpu_reason()
    found = () if reason else gpus.find_gpus()
    gpu = found[options.device] if 0 <= options.device < len(found) else None
    if options.seconds is None:
        options.seconds = WALL_TIME * patience(gpu)
    suite = Suite(options)
    if not reason and not 0 <= options.device < len(found):
        reason = f"there is no cuda:{options.device}, {len(found)} GPUs are visible"
    if reason:
        suite.skip_all(reason)
    else:
        suite.gpu = gpu
        suite.run()
    return suite.finish()


# ---- The parts, in turn


class Suite:
    """Run the parts, keep their results, and write the document after each."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.gpu: gpus.Gpu | None = None
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
            self.add(Part("roofline", "not run", reason))

    def run(self) -> None:
        half = self.options.only
        if half is not None:
            self.parts = self._kept(tests=half == "benchmark")
        if not self.options.bundles.is_dir():
            self.measure("make the graphs", self._prepare)
            self._end = time.monotonic() + self.options.seconds
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
        self.measure(
            "roofline",
            lambda: self._ask("roofline", timed=timed_engines(self.parts), bundles=str(self.options.bundles)),
        )

    def _prepare(self) -> dict[str, Any]:
        lacking = [name for name in _TO_PREPARE if importlib.util.find_spec(name) is None]
        if lacking:
            raise MissingError(f"{', '.join(lacking)} not installed: make them elsewhere with --prepare")
        self.options.bundles.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self.options.bundles.parent) as begun:  # half of them would pass for all
            prepare(Path(begun) / "bundles")
            (Path(begun) / "bundles").rename(self.options.bundles)
        return {"bundles": len(list(self.options.bundles.glob("*.bundle")))}

    def measure(self, name: str, action: Callable[[], dict[str, Any]]) -> Part:
        """Run one part. Something that is missing makes it "not run", any exception "failed"."""
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
        for target in targets(self.parts):
            print(
                target["what"]
                + f": {target['measured']:.3g}, {target['asked']}"
                + ("" if target["reached"] else ": MISSED")
            )
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
        document = {**self._described, "targets": targets(self.parts), "parts": [asdict(part) for part in self.parts]}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
        return path

    def _kept(self, *, tests: bool) -> list[Part]:
        """Return the parts of the other half from the document that is there."""
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
        """Raise MissingError if a kind of engine cannot run here at all."""
        if flavour in TENSORRT:
            require_tensorrt(flavour)
        if flavour == "tensorrt_rtx" and self.rtx_refusal:
            raise MissingError(self.rtx_refusal)

    def _require_format(self, precision: str) -> None:
        first = FIRST_ARCHITECTURE.get(precision, 0)
        if self.gpu is not None and int(self.gpu.architecture.removeprefix("sm_")) < first:
            raise MissingError(f"{self.gpu.architecture} has no {precision}, which came with sm_{first}")

    def _ask(self, task: str, **arguments: Any) -> dict[str, Any]:
        with Child(task, device=self.options.device, **arguments) as child:
            try:
                return child.read(min(self.left, LONGEST_TASK * patience(self.gpu)))
            except SlowChildError as error:
                if self.left > 0:
                    raise
                raise MissingError(f"the {self.options.seconds:g} s that it was given were over: {error}") from error

    # -- tests

    def _test(self, file: Path, seconds: float) -> dict[str, Any]:
        """Run one file of tests/gpu in a process of its own, so that a GPU fault in it does not reach the next."""
        if importlib.util.find_spec("pytest") is None:
            raise MissingError("pytest is not installed")
        if seconds <= 0:
            raise MissingError("the time for tests was over")
        with tempfile.TemporaryDirectory() as folder:
            report = Path(folder) / "report.xml"
            command = [sys.executable, "-m", "pytest", str(file), "--confcutdir", str(TESTS), "-p", "no:cacheprovider"]
            command += ["--junitxml", str(report), "-o", "junit_family=xunit2", "-vv"]
            command += ["-o", f"faulthandler_timeout={90 * patience(self.gpu):g}"]
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
        """Return every contender of a model. Plans are compiled here, on the GPU that runs them."""
        kinds: list[dict[str, Any]] = [{"kind": kind} for kind in ("eager", "torchscript")]
        for flavour in TENSORRT:
            for precision in PRECISIONS:
                name = f"{flavour} {precision}"

                def compile_it(flavour: str = flavour, precision: str = precision) -> dict[str, Any]:
                    self._require(flavour)
                    self._require_format(precision)
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
        """Time contenders side by side. One that fails is left out, and the part fails at its end."""
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
    """A part failed, but it has figures."""

    def __init__(self, message: str, figures: dict[str, Any]) -> None:
        super().__init__(message)
        self.figures = figures


_PEER = "torch.compile max-autotune fp16"
_FASTEST_OURS = tuple(f"{flavour} fp16 with CUDA graphs" for flavour in TENSORRT)
OVERHEADS = {f"overhead: {flavour}": flavour for flavour in ("torchscript", *TENSORRT)}


def contender_name(kind: dict[str, Any]) -> str:
    """Return the name of a contender: ``eager fp16``, ``tensorrt int8 graphs``."""
    names = {"eager": "torch eager", "compile": "torch.compile max-autotune"}
    words = [names.get(kind["kind"], kind["kind"]), kind.get("precision", "fp16")]
    return " ".join([*words, *(["with CUDA graphs"] if kind.get("cuda_graphs") else [])])


def targets(parts: Sequence[Part]) -> list[dict[str, Any]]:
    """Return the targets that were measured: ``what``, ``measured``, ``asked`` (in words) and ``reached``."""
    found: list[dict[str, Any]] = []

    def add(what: str, measured: float, *, most: float | None = None, least: float | None = None) -> None:
        reached = (most is None or measured <= most) and (least is None or measured >= least)
        asked = f"at least {least:g}" if most is None else f"at most {most:g}"
        found.append({"what": what, "measured": measured, "asked": asked, "reached": reached})

    for part in parts:
        for setting, figures in part.figures.items() if part.name in OVERHEADS else ():
            what = f"{OVERHEADS[part.name]}, {setting.replace('_', ' ')}"
            if isinstance(figures, dict) and "target_us" in figures:
                add(f"{what}: microseconds over the bare call", figures["overhead_us"], most=figures["target_us"])
                for where in ("device_arrays", "host_arrays"):
                    kept = figures[where]["kept_bytes_per_call"]
                    add(f"{what}: bytes that a call leaves behind ({where.replace('_', ' ')})", kept, most=1)
        for name, others in part.figures.get("times_faster_than", {}).items():
            peer = others.get(_PEER)
            if part.name.startswith("benchmark: resnet50,") and name in _FASTEST_OURS and peer is not None:
                what = f"{part.name.removeprefix('benchmark: ')}: {name}, times as fast as {_PEER}"
                add(what, peer["latency_ms"], least=1)
    return found


def timed_engines(parts: Sequence[Part]) -> list[dict[str, Any]]:
    """Return the engines that were timed, as arguments of the roofline task."""
    found = []
    for part in parts:
        named = re.fullmatch(r"benchmark: (?P<model>.+), batch (?P<batch>\d+)", part.name)
        for name, figures in part.figures.get("contenders", {}).items() if named else ():
            precision = next((one for one in PRECISIONS if f" {one}" in name), "fp16")
            engine = {"name": name, "precision": precision, "milliseconds": figures["pipelined_ms"]}
            found.append({"model": named["model"], "batch": int(named["batch"]), **engine})
    return found


def medians(turns: Sequence[dict[str, float]]) -> dict[str, float]:
    """Return the median of each figure over the rounds."""
    return {key: statistics.median(turn[key] for turn in turns) for key in turns[0]} if turns else {}


def ratios(turns: dict[str, list[dict[str, float]]]) -> dict[str, dict[str, dict[str, float]]]:
    """Return how many times faster each contender is than each other: medians of the ratios within a round."""

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
    """Read a JUnit report: counts, reasons of skips, messages of failures. Raises PartFailedError, MissingError."""
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


if __name__ == "__main__":
    sys.exit(main())
