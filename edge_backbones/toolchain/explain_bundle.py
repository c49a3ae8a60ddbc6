"""Explain the engines of a bundle that are outside their gates. Imports the libraries of the workstation when called."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from edge_backbones.bundle import trust
from edge_backbones.bundle.golden import GoldenSamples
from edge_backbones.bundle.reader import Bundle, load_golden
from edge_backbones.deploy.parity import measure_in_bundle
from edge_backbones.deploy.verify import runnable, say_what_is_run
from edge_backbones.engines import promises
from edge_backbones.errors import BundleError, InferenceError, needing
from edge_backbones.machine import child
from edge_backbones.progress import Progress, no_progress
from edge_backbones.spec import Precision

if TYPE_CHECKING:
    from edge_backbones.toolchain.explain import Explanation


def as_engines_return(golden: GoldenSamples, bundle: Bundle) -> GoldenSamples:
    """Return golden samples whose references have the layout of the typed graphs' outputs."""
    moved = [o.name for o in bundle.manifest.backbone.described_outputs if o.is_reordered]
    outputs = {
        case: {**maps, **{name: maps[name].transpose(0, 2, 3, 1) for name in moved}}
        for case, maps in golden.outputs.items()
    }
    return dataclasses.replace(golden, outputs=outputs)


@child.apart(InferenceError)
def explain_bundle(
    path: str | Path,
    *,
    engine: str | None = None,
    device: str = "auto",
    in_process: bool = False,
    progress: Progress = no_progress,
) -> tuple[Explanation, ...]:
    """Explain every engine that can run here (or only ``engine``) and is outside its gate: say where its error begins.

    Needs the libraries of the workstation. Runs in a process of its own, as `verify_bundle` does. Raises BundleError for a
    damaged file or a graph that the bundle lacks, EngineMismatchError when no engine can run here, MissingDependencyError.
    """
    del in_process  # child.apart has read it
    with needing("explaining an error", "build"):
        from edge_backbones.toolchain.explain import explain
    bundle, _ = trust.admit(Bundle.open(path))
    bundle.check_files()
    golden = load_golden(bundle)
    found = []
    for record, on in runnable(bundle, engine, device, code=False):
        progress(f"verifying {record.key.precision}", 0, None)
        precision, gate = record.key.precision, promises.gate_of(bundle.manifest, record.key, record.parity.gate)
        say_what_is_run(bundle, record)
        report = measure_in_bundle(bundle, record.key, bundle.read(record.file), golden, gate, on)
        if report.passed:
            continue
        if record.key.gpu is not None:
            raise BundleError(
                f"{record.name} is outside its gate ({report.failures()}); where an error begins is found for CPU engines "
                "only: compile this graph for the CPU and explain that engine"
            )
        graph = bundle.manifest.onnx_graph(precision)
        if graph is None:
            raise BundleError(f"{bundle.path} has no {precision} graph, and without it an error cannot be explained")
        fp32 = bundle.manifest.onnx_graph(Precision.FP32)
        plain = None if fp32 is None or precision is Precision.FP32 else bundle.path / fp32.file.path
        typed = bundle.path / graph.file.path
        child.doing(f"was explaining {record.name}", f"{typed} is hostile, {child.OR_A_FAULT}")
        found.append(explain(typed, report, as_engines_return(golden, bundle), plain=plain, progress=progress))
    return tuple(found)
