"""``python -m build_scripts.sweep``: builds one representative of every backbone of timm and transformers.

Each is a process of its own with a time limit, because a compiler that is given a new graph may crash or not come back.
It builds a bundle with a batch of 1 to 4 (fp32 within the default gate; gates of fp16 and int8 open: random weights say
nothing of accuracy), runs the fp32 engine at other batches, and has TensorRT-RTX compile the fp16 and int8 graphs, which
needs no GPU. Results go to benchmarks/results/coverage.json one by one, and a page is written from that file. A second
run does what is missing, what failed, and what was measured with other versions of the libraries.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import fnmatch
import importlib.metadata
import json
import math
import os
import platform
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from build_scripts import coverage_page
from build_scripts.architectures import TIMM, TRANSFORMERS, cheapest_of_timm, transformers_config
from edge_backbones import cpus

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "coverage.json"
ITEMS = (*(f"transformers/{name}" for name in TRANSFORMERS), *(f"timm/{name}" for name in TIMM))

_SMALL = ((96, 128), (84, 112))  # not square; multiples of 32 and of 14, which most networks take
_BATCH = (1, 2, 4)
_OTHER_BATCHES = (1, 3, 4)  # golden samples are run two at a time
_GOLDEN, _PHOTOGRAPHS = 2, 14
_ENGINE_MAY_LOSE_DB, _HALF_MAY_LOSE_DB = 6.0, 20.0
_LONGEST_CAUSE = 300
_LIBRARIES = (
    "edge-backbones", "numpy", "torch", "timm", "transformers", "onnx", "onnxscript", "onnxruntime", "openvino",
    "tensorrt-rtx-cu13-bindings",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--only", nargs="+", metavar="NAME", help="items or patterns, such as timm/resnet10t 'trans*/*'"
    )
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time")
    parser.add_argument("--timeout", type=float, default=900, help="seconds that one item may take")
    parser.add_argument("--out", type=Path, default=RESULTS, help="results file; the page is written beside it")
    parser.add_argument("--fresh", action="store_true", help="do again what succeeded")
    parser.add_argument(
        "--check-representatives", action="store_true", help="only tell which networks of timm the table lacks"
    )
    parser.add_argument("--one", nargs=2, metavar=("NAME", "FOLDER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        name, folder = arguments.one
        measure(name, Path(folder))
        return
    if arguments.check_representatives:
        check_representatives()
        return
    names = chosen(arguments.only)
    if not names:
        parser.error(f"no item is called {' or '.join(arguments.only)}; items: {', '.join(ITEMS)}")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that children are stopped with it
    asyncio.run(sweep(names, arguments.out, arguments.jobs, arguments.timeout, fresh=arguments.fresh))
    page = arguments.out.with_suffix(".md")
    figures = coverage_page.write(arguments.out, page)
    print(f"wrote {arguments.out} and {page}")
    sys.exit(0 if all(figure.reached for figure in figures) else 1)


def chosen(patterns: Sequence[str] | None) -> list[str]:
    """Return the items that one of the patterns names, in the order of the tables."""
    return [name for name in ITEMS if patterns is None or any(fnmatch.fnmatch(name, p) for p in patterns)]


def check_representatives() -> None:
    """Compare the table with the installed timm."""
    found = cheapest_of_timm()
    missing = sorted(set(found) - set(TIMM.values()))
    gone = sorted(set(TIMM.values()) - set(found))
    for pair in missing:
        print(f"no representative: {'.'.join(pair)}, the cheapest is {found[pair]}")
    for pair in gone:
        print(f"not in this timm: {'.'.join(pair)}")
    print(
        f"{len(found)} pairs of module and class in timm {importlib.metadata.version('timm')}, {len(TIMM)} in the table"
    )
    sys.exit(1 if missing else 0)


# ---- the parent: processes and the results file ---------------------------------------------------------------------


async def sweep(names: Sequence[str], out: Path, jobs: int, timeout: float, *, fresh: bool = False) -> None:
    """Measure what is not in ``out`` yet, ``jobs`` at a time; every result is written as soon as it is known."""
    versions = library_versions()
    known = read_results(out)
    todo = [name for name in names if fresh or not is_done(known.get(name), versions)]
    print(f"{len(todo)} of {len(names)} to do, {jobs} at a time", flush=True)
    free = asyncio.Semaphore(jobs)
    done = 0

    async def one(name: str) -> None:
        nonlocal done
        async with free:
            with tempfile.TemporaryDirectory(prefix="sweep-", ignore_cleanup_errors=True) as folder:
                command = [sys.executable, "-m", "build_scripts.sweep", "--one", name, folder]
                result = await run_child(command, Path(folder), timeout, jobs)
        result = {**describe(name), **result, "versions": versions}
        write_result(out, name, result)
        done += 1
        print(f"[{done}/{len(todo)}] {name}: {summary(result)}", flush=True)

    await asyncio.gather(*(one(name) for name in todo))


async def run_child(command: Sequence[str], folder: Path, timeout: float, jobs: int = 1) -> dict[str, Any]:
    """Run one child. If it crashes or is stopped, the result it wrote so far counts, with the cause added."""
    started = time.monotonic()
    threads = str(max(1, cpus.usable() // jobs))
    with (folder / "log").open("wb") as log:
        child = await asyncio.create_subprocess_exec(
            *command,
            cwd=ROOT,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env={**os.environ, "OMP_NUM_THREADS": threads},
            start_new_session=True,  # compilers start processes too: the whole group is stopped
        )
        try:
            await asyncio.wait_for(child.wait(), timeout)
        except asyncio.TimeoutError:
            ending = f"stopped after {timeout:g} s"
        else:
            ending = how_it_ended(child.returncode or 0, folder / "log")
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            await child.wait()
    path = folder / "result.json"
    result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    part, _, step = result.pop("step", "fp32:starting").partition(":")
    if ending:
        result.setdefault("causes", {})[part] = f"{ending} ({step})"
    result.setdefault("seconds", {})["all"] = round(time.monotonic() - started, 1)
    return result


def how_it_ended(code: int, log: Path) -> str:
    """Return how a child failed: the signal, or the last line it wrote; empty if it finished."""
    if code < 0:
        return f"died of {signal.Signals(-code).name}"
    if code == 0:
        return ""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return one_line(lines[-1] if lines else f"exit code {code}")


def read_results(path: Path) -> dict[str, dict[str, Any]]:
    if not path.exists():
        return {}
    results: dict[str, dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["results"]
    return results


def write_result(path: Path, name: str, result: dict[str, Any]) -> None:
    """Put one result into the file, which is complete at any moment."""
    results = {**read_results(path), name: result}
    ordered = {known: results[known] for known in sorted(results)}
    write_json(path, {"results": ordered})


def write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)


def is_done(result: dict[str, Any] | None, versions: dict[str, str]) -> bool:
    return result is not None and not result.get("causes") and result.get("versions") == versions


def library_versions() -> dict[str, str]:
    """Return the versions of the libraries that results depend on, without those that are not installed."""
    versions = {"python": platform.python_version()}
    for library in _LIBRARIES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[library] = importlib.metadata.version(library)
    return versions


def describe(name: str) -> dict[str, Any]:
    """Return what is known of an item without building it."""
    library, _, model = name.partition("/")
    if library == "timm":
        module, feature_class = TIMM[model]
        return {"library": library, "name": model, "module": module, "feature_class": feature_class}
    return {"library": library, "name": model}


def summary(result: dict[str, Any]) -> str:
    """Return one line for the terminal."""
    if result.get("causes"):
        return "; ".join(f"{part}: {cause}" for part, cause in result["causes"].items())
    relative, cosine, seconds = result["fp32"]["relative"], result["int8"]["cosine"], result["seconds"]["all"]
    return f"fp32 {relative:.1e}, int8 cosine {cosine:.3f}, {seconds:.0f} s"


# ---- the child: one network -----------------------------------------------------------------------------------------


class Finding(Exception):  # noqa: N818  (a result of the sweep, not an error of its own)
    """The sweep itself found something wrong with an engine."""


def measure(name: str, folder: Path) -> dict[str, Any]:
    """Build and compile one item in ``folder``. Failures become causes in its result.json.

    That file is up to date after every step. While the sweep runs, its ``step`` says "part:what it does", so that a
    crash is blamed on the right part.
    """
    result: dict[str, Any] = {"causes": {}, "seconds": {}}

    def record(step: str) -> None:
        if result.get("step") != step:
            result["step"] = step
            write_json(folder / "result.json", result)

    record("fp32:importing")
    bundle = None
    with attempt(result, "fp32"), timed(result, "build"):
        bundle = build(name, folder, result, record)
    if bundle is not None:
        record("fp32:running other batches")
        with attempt(result, "fp32"):
            run_other_batches(bundle, result)
        for precision in ("fp16", "int8"):
            if precision in result:
                record(f"{precision}:comparing with the graph")
                with attempt(result, precision):
                    compare_with_graph(bundle, precision, result)
            part = f"rtx {precision}"
            if precision in result:
                record(f"{part}:compiling")
                with attempt(result, part), timed(result, part):
                    result[precision]["rtx_plan_bytes"] = len(compile_with_rtx(bundle, precision))
    del result["step"]
    write_json(folder / "result.json", result)
    return result


def build(name: str, folder: Path, result: dict[str, Any], record: Callable[[str], None]) -> Path:
    """Build the bundle of an item, at a small size that is not square if the network takes one, else at its own size."""
    from build_scripts.photographs import write_crops
    from edge_backbones.errors import CalibrationError, SourceError

    library, _, model = name.partition("/")
    source: Any = model
    sizes: list[tuple[int, int] | None] = [*_SMALL, None]
    if library == "transformers":
        source = transformers_config(model)
        sizes = [(TRANSFORMERS[model].height, TRANSFORMERS[model].width)]
    photographs = folder / "photographs"
    write_crops(photographs, _PHOTOGRAPHS)
    for size in sizes:
        try:
            return build_at(size, source, folder, photographs, result, record)
        except (SourceError, CalibrationError) as error:
            if size == sizes[-1]:
                raise
            result["refused"] = {"size": size, "cause": one_line(error)}
    raise AssertionError("unreachable: there is at least one size")


def build_at(
    size: tuple[int, int] | None,
    source: Any,
    folder: Path,
    photographs: Path,
    result: dict[str, Any],
    record: Callable[[str], None],
) -> Path:
    """Build the bundle with as many precisions as possible; each that fails leaves its cause in the result."""
    from edge_backbones import BuildOptions, build_bundle
    from edge_backbones.errors import CalibrationError, ExportError, SourceError
    from edge_backbones.parity_report import Gate, ParityError
    from edge_backbones.spec import Precision, ShapeRange

    height, width = size or (None, None)
    smallest, usual, largest = _BATCH
    every = (Precision.FP32, Precision.FP16, Precision.INT8)
    for count in (3, 2, 1):
        precisions = every[:count]
        target = folder / f"{precisions[-1]}.bundle"
        options = BuildOptions(
            weights="random:0",
            precisions=precisions,
            gates={Precision.FP16: Gate(min_cosine=1e-6), Precision.INT8: Gate(min_cosine=1e-6)},
            batch=ShapeRange(min=smallest, opt=usual, max=largest),
            height=height,
            width=width,
            out_indices=(-2, -1) if isinstance(source, str) else None,  # a config says so itself
            golden=_GOLDEN,
            torchscript=False,
            cache=None,
        )
        try:
            built = build_bundle(
                source,
                target,
                images=photographs,
                options=options,
                progress=lambda step, *_: record(f"{part_of(step)}:{step}"),
            )
        except (SourceError, CalibrationError, ExportError):
            raise  # fewer precisions would not help
        except Exception as error:  # a sweep notes whatever goes wrong with one network, and goes on
            if isinstance(error, ParityError) and error.reports[0].precision == Precision.FP32:
                result["fp32"] = {"passed": False, **worst(error.reports[0])}
                raise
            if len(precisions) == 1:
                result["causes"].clear()  # the others failed for the same reason
                raise
            result["causes"][precisions[-1].value] = one_line(error)
        else:
            manifest = built.bundle.manifest
            result["input"] = {"height": manifest.input.height.opt, "width": manifest.input.width.opt}
            result["batch"] = [manifest.input.batch.min, manifest.input.batch.max]
            result["stages"] = list(manifest.backbone.out_features)
            result["parameters"] = parameters(target)
            for report in built.reports:
                result[report.precision.value] = {"passed": report.passed, **worst(report)}
            return target
    raise AssertionError("unreachable: the last turn returns or raises")


def part_of(step: str) -> str:
    """Return the precision that a step is for: "compiling int8". Earlier steps are needed by all."""
    return next((precision for precision in ("fp16", "int8") if precision in step), "fp32")


def worst(report: Any) -> dict[str, float]:
    """Return the worst stage of a parity report, figure by figure."""
    return {
        "relative": significant(max(stage.relative for stage in report.stages)),
        "cosine": significant(min(stage.cosine for stage in report.stages), 6),
        "sqnr_db": significant(min(stage.sqnr_db for stage in report.stages)),
    }


def parameters(bundle: Path) -> int:
    """Return the number of weights of the fp32 graph: of the kept stages, with batch norm folded."""
    import onnx

    weights = onnx.load(bundle / "graphs" / "fp32.onnx").graph.initializer
    return sum(math.prod(weight.dims) for weight in weights if weight.data_type == onnx.TensorProto.FLOAT)


def run_other_batches(bundle: Path, result: dict[str, Any]) -> None:
    """Run the fp32 engine at batches that the build did not, against the same golden maps."""
    import numpy as np

    from edge_backbones import Bundle, EdgeBackbone
    from edge_backbones.bundle.reader import load_golden
    from edge_backbones.deploy.parity import compare
    from edge_backbones.engines.promises import DEFAULT_GATES
    from edge_backbones.spec import Precision

    golden = load_golden(Bundle.open(bundle))
    limit = DEFAULT_GATES[Precision.FP32]
    with EdgeBackbone.from_pretrained(bundle, engine="fp32") as backbone:
        images = golden.inputs["opt"]
        for batch in _OTHER_BATCHES:
            chosen = np.arange(batch) % len(images)
            for stage, feature_map in zip(backbone.out_features, backbone(images[chosen]).feature_maps, strict=True):
                parity = compare(stage, golden.outputs["opt"][stage][chosen], feature_map, limit)
                result["fp32"]["relative"] = max(result["fp32"]["relative"], significant(parity.relative))
                if not parity.passed:
                    result["fp32"]["passed"] = False
                    raise Finding(f"at batch {batch} {stage} is off by {parity.relative:.1e} relative")


def compare_with_graph(bundle: Path, precision: str, result: dict[str, Any]) -> None:
    """Run the typed graph in ONNX Runtime, node by node, and compare the engine with it.

    The rounding of random weights is the graph's, not the engine's. Fails if the engine is worse than its graph by more
    than another order of rounding explains. Also fails if the graph is much worse: the engine computes half as fp32,
    ONNX Runtime and GPUs do not, and there a number may overflow.
    """
    import numpy as np

    from edge_backbones import Bundle
    from edge_backbones.bundle.reader import load_golden
    from edge_backbones.deploy.parity import compare
    from edge_backbones.engines.onnxruntime.library import onnxruntime
    from edge_backbones.parity_report import Gate

    golden = load_golden(Bundle.open(bundle))
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    path = bundle / "graphs" / f"{precision}.onnx"
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    (input,), names = session.get_inputs(), [output.name for output in session.get_outputs()]
    outputs = session.run(names, {input.name: golden.inputs["opt"]})
    stages = [
        compare(name, expected, np.asarray(actual), Gate())
        for name, images in zip(names, outputs, strict=True)
        for expected, actual in zip(golden.outputs["opt"][name], images, strict=True)
    ]
    of_graph, of_engine = significant(min(stage.sqnr_db for stage in stages)), result[precision]["sqnr_db"]
    result[precision]["graph_sqnr_db"] = of_graph
    if of_engine < of_graph - _ENGINE_MAY_LOSE_DB:
        raise Finding(f"the engine has {of_engine:g} dB SQNR, its graph in ONNX Runtime {of_graph:g} dB")
    if not all(stage.finite for stage in stages) or of_graph < of_engine - _HALF_MAY_LOSE_DB:
        raise Finding(
            f"computed in half the graph has {of_graph:g} dB SQNR, as the engine computes it {of_engine:g} dB"
        )


def compile_with_rtx(bundle: Path, precision: str) -> bytes:
    """Compile a graph with TensorRT-RTX ahead of time, for every GPU that has the format."""
    from edge_backbones.bundle.reader import Bundle
    from edge_backbones.engines.tensorrt.compile import compile_plan
    from edge_backbones.spec import Precision

    graph, input = (bundle / "graphs" / f"{precision}.onnx").read_bytes(), Bundle.open(bundle).manifest.input
    return compile_plan(graph, input, Precision(precision), flavour="tensorrt_rtx").data


@contextlib.contextmanager
def attempt(result: dict[str, Any], part: str) -> Iterator[None]:
    """Record an error in the block as the cause why a part failed."""
    try:
        yield
    except Exception as error:  # as in build_at
        result["causes"][part] = one_line(error)


@contextlib.contextmanager
def timed(result: dict[str, Any], part: str) -> Iterator[None]:
    started = time.monotonic()
    try:
        yield
    finally:
        result["seconds"][part] = round(time.monotonic() - started, 1)


def one_line(error: BaseException | str) -> str:
    """Return an error as one short line, with its type and place unless this project raised it."""
    from edge_backbones.errors import EdgeBackbonesError

    text = " ".join(str(error).split())
    if len(text) > _LONGEST_CAUSE:
        text = f"{text[: _LONGEST_CAUSE - 3]}..."
    if isinstance(error, BaseException) and not isinstance(error, (EdgeBackbonesError, Finding)):
        frames = traceback.extract_tb(error.__traceback__)
        place = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
        text = f"{type(error).__name__}{': ' if text else ''}{text}{place}"
    return text


def significant(value: float, digits: int = 3) -> float:
    return float(f"{value:.{digits}g}")


if __name__ == "__main__":
    main()
