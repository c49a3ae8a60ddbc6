"""``python -m build_scripts.rtx_formats``: which forms of a graph does TensorRT-RTX refuse, over the networks of the sweep?

Every network of the coverage sweep is exported with random weights and compiled for sm_89, which needs no GPU: in fp16 with
the usual maps, with float16 maps and with float16 maps in channels-last memory, and in int8, bf16 and fp8. Nothing is
calibrated: every range is the same number, because a plan's kernels do not depend on it. Each network is a process of its
own with a time limit. Results go to benchmarks/results/rtx_formats.json one by one, and a table of refusals is printed at
the end. A second run does what is missing, what crashed or was stopped, and what was compiled with other versions of the
libraries.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from build_scripts import sweep
from build_scripts.architectures import TRANSFORMERS, transformers_config

if TYPE_CHECKING:
    from edge_backbones.toolchain.artifacts import ExportedGraph

RESULTS = sweep.ROOT / "benchmarks" / "results" / "rtx_formats.json"
TARGET = "sm_89"
_RANGE = 4.0  # of every tensor: about what a normalised activation reaches
_BATCH = (1, 2, 4)


class Variant(NamedTuple):
    """A form of the graph: its precision, and the options ``maps`` of a build."""

    precision: str
    maps: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return " ".join((self.precision, *self.maps))


VARIANTS = (
    Variant("fp16"),
    Variant("fp16", ("float16",)),
    Variant("fp16", ("float16", "channels-last")),
    Variant("int8"),
    Variant("int8", ("float16", "channels-last")),
    Variant("bf16"),
    Variant("fp8"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="items or patterns, as for the sweep")
    names_of_forms = [variant.name for variant in VARIANTS]
    parser.add_argument("--forms", nargs="+", metavar="FORM", choices=names_of_forms, default=names_of_forms,
                        help=f"only these forms: {', '.join(map(repr, names_of_forms))}")  # fmt: skip
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time")
    parser.add_argument("--timeout", type=float, default=600, help="seconds that one network may take")
    parser.add_argument("--out", type=Path, default=RESULTS, help="results file")
    parser.add_argument("--fresh", action="store_true", help="do again what is in the results file")
    parser.add_argument("--table", action="store_true", help="only print the table of what is in the results file")
    parser.add_argument("--one", nargs=2, metavar=("NAME", "FOLDER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        name, folder = arguments.one
        measure(name, Path(folder), arguments.forms)
        return
    names = sweep.chosen(arguments.only)
    if not names:
        parser.error(f"no item is called {' or '.join(arguments.only)}; items: {', '.join(sweep.ITEMS)}")
    if not arguments.table:
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that children are stopped with it
        asyncio.run(
            compile_all(
                names, arguments.out, arguments.jobs, arguments.timeout, forms=arguments.forms, fresh=arguments.fresh
            )
        )
    print(table(sweep.read_results(arguments.out)))


# ---- the parent -----------------------------------------------------------------------------------------------------


async def compile_all(
    names: Sequence[str],
    out: Path,
    jobs: int,
    timeout: float,
    *,
    forms: Sequence[str] = tuple(variant.name for variant in VARIANTS),
    fresh: bool = False,
) -> None:
    """Compile what is not in ``out`` yet, ``jobs`` networks at a time; every result is written as soon as it is known."""
    versions = sweep.library_versions()
    known = sweep.read_results(out)
    todo = [name for name in names if fresh or not is_done(known.get(name), versions, forms)]
    print(f"{len(todo)} of {len(names)} to do, {jobs} at a time", flush=True)
    free = asyncio.Semaphore(jobs)
    done = 0

    async def one(name: str) -> None:
        nonlocal done
        async with free:
            with tempfile.TemporaryDirectory(prefix="rtx-formats-", ignore_cleanup_errors=True) as folder:
                command = [sys.executable, "-m", "build_scripts.rtx_formats", "--forms", *forms, "--one", name, folder]
                result = await sweep.run_child(command, Path(folder), timeout, jobs)
        sweep.write_result(out, name, {**result, "versions": versions})
        done += 1
        refused = ", ".join(result.get("causes", {})) or "nothing"
        print(f"[{done}/{len(todo)}] {name}: refused {refused}, {result['seconds']['all']:.0f} s", flush=True)

    await asyncio.gather(*(one(name) for name in todo))


def is_done(result: dict[str, Any] | None, versions: dict[str, str], forms: Sequence[str]) -> bool:
    """Return whether a network got an answer for every form, a refusal or a plan, from these versions."""
    if result is None or result.get("versions") != versions:
        return False
    answered = {*result.get("plan_bytes", {}), *result.get("causes", {})}
    return result.get("finished", False) and ("export" in answered or answered >= set(forms))


def table(results: dict[str, dict[str, Any]]) -> str:
    """Return how many networks each variant compiles for, and a line for each refusal."""
    lines = [f"{'form':28} networks that compiled, of those that were tried"]
    for variant in VARIANTS:
        compiled = sum(variant.name in result.get("plan_bytes", {}) for result in results.values())
        refused = sum(variant.name in result.get("causes", {}) for result in results.values())
        lines.append(f"{variant.name:28} {compiled} of {compiled + refused}")
    refusals = [
        f"{name}: {part}: {cause}"
        for name, result in sorted(results.items())
        for part, cause in result.get("causes", {}).items()
    ]
    return "\n".join([*lines, "", *(refusals or ["no refusals"])])


# ---- the child: one network -----------------------------------------------------------------------------------------


def measure(name: str, folder: Path, forms: Sequence[str]) -> dict[str, Any]:
    """Export one network in ``folder`` and compile these forms of it. Refusals become causes in its result.json.

    That file is up to date after every step, and ``step`` says "variant:what it does", so that a crash is blamed on the
    right variant.
    """
    result: dict[str, Any] = {"causes": {}, "seconds": {}, "plan_bytes": {}}

    def record(step: str) -> None:
        result["step"] = step
        sweep.write_json(folder / "result.json", result)

    record("export:exporting")
    graph = None
    with sweep.attempt(result, "export"), sweep.timed(result, "export"):
        graph = export(name, folder)
        result["input"] = [graph.input.height.opt, graph.input.width.opt]
    for variant in [variant for variant in VARIANTS if variant.name in forms] if graph is not None else ():
        record(f"{variant.name}:compiling")
        with sweep.attempt(result, variant.name), sweep.timed(result, variant.name):
            result["plan_bytes"][variant.name] = len(compiled(graph, variant, folder))
    del result["step"]
    result["finished"] = True
    sweep.write_json(folder / "result.json", result)
    return result


def export(name: str, folder: Path) -> ExportedGraph:
    """Export a network, at a small size that is not square if it takes one, else at its own size."""
    from edge_backbones.errors import EdgeBackbonesError

    library, _, model = name.partition("/")
    source: Any = model
    sizes: list[tuple[int, int] | None] = [*sweep._SMALL, None]
    if library == "transformers":
        source = transformers_config(model)
        sizes = [(TRANSFORMERS[model].height, TRANSFORMERS[model].width)]
    for size in sizes[:-1]:
        try:
            return export_at(size, source, folder)
        except EdgeBackbonesError:
            continue  # a network of another size
    return export_at(sizes[-1], source, folder)


def export_at(size: tuple[int, int] | None, source: Any, folder: Path) -> ExportedGraph:
    """Export a network with a batch of 1 to 4 at one size; None is the network's own."""
    from edge_backbones.spec import InputSpec, ShapeRange
    from edge_backbones.toolchain.export import export_onnx
    from edge_backbones.toolchain.prepare import prepare
    from edge_backbones.toolchain.sources.base import SourceOptions
    from edge_backbones.toolchain.sources.load import load_source

    kept = (-2, -1) if isinstance(source, str) else None  # a config says so itself
    loaded = load_source(source, SourceOptions(weights="random:0", img_size=size, out_indices=kept))
    height, width = size or (loaded.height, loaded.width)
    smallest, usual, largest = _BATCH
    input = InputSpec(
        name="pixel_values",
        channels=loaded.channels_in,
        batch=ShapeRange(min=smallest, opt=usual, max=largest),
        height=ShapeRange.fixed(height),
        width=ShapeRange.fixed(width),
    )
    return export_onnx(prepare(loaded, input), folder / "fp32.onnx")


def compiled(graph: ExportedGraph, variant: Variant, folder: Path) -> bytes:
    """Write the typed graph of a variant and compile it."""
    from edge_backbones.engines.tensorrt.compile import compile_plan
    from edge_backbones.engines.tensorrt.options import PlanOptions
    from edge_backbones.spec import Precision
    from edge_backbones.toolchain.options import BuildOptions
    from edge_backbones.toolchain.quantize.placement import tensors_to_calibrate
    from edge_backbones.toolchain.quantize.typed_graph import write_typed_graph
    from edge_backbones.toolchain.steps import with_formats

    precision = Precision(variant.precision)
    shaped = dataclasses.replace(graph, spec=with_formats(graph.spec, BuildOptions(maps=variant.maps)))
    ranges = dict.fromkeys(tensors_to_calibrate(graph), _RANGE) if precision.is_calibrated else {}
    typed = write_typed_graph(shaped, precision=precision, path=folder / "typed.onnx", ranges=ranges)
    options = PlanOptions(targets=(TARGET,))
    return compile_plan(typed.path.read_bytes(), graph.input, precision, flavour="tensorrt_rtx", options=options).data


if __name__ == "__main__":
    main()
