"""``edge-backbones inspect``: show what is in a bundle."""

from __future__ import annotations

import contextlib
import shlex
from collections.abc import Mapping, Sequence

from edge_backbones.bundle.manifest import EngineRecord, Manifest
from edge_backbones.bundle.reader import Bundle
from edge_backbones.cli import console
from edge_backbones.cli.shared import BundleArgument, JsonFlag
from edge_backbones.engines import select
from edge_backbones.errors import BundleError
from edge_backbones.report.kernels import KernelCounts
from edge_backbones.report.layers import describe_plan
from edge_backbones.report.summary import stored_times
from edge_backbones.report.words import computed, megabytes


def inspect(bundle: BundleArgument, as_json: JsonFlag = False) -> None:
    """Show what is in a bundle, and which of its engines run on this machine. No engine is opened.

    Example: **edge-backbones inspect resnet50.bundle**
    """
    opened = Bundle.open(bundle)
    manifest = opened.manifest
    host, _, _ = select.machine_for(opened, "auto")
    reasons = select.reasons_by_name(opened, host)
    kernels = _kernels_of(opened)
    if as_json:
        counts = {name: found._asdict() for name, found in kernels.items()}
        console.print_json({"manifest": manifest, "reasons_against": reasons, "kernels": counts})
        return
    _print_source(str(bundle), manifest)
    _print_stages(manifest)
    _print_graphs(manifest)
    _print_engines(str(bundle), manifest, reasons)
    for name, found in kernels.items():
        console.out.print(f"{name}: {found}")
    _print_calibration(manifest)
    console.print_trials(manifest.decision)
    if manifest.decision is not None:
        console.out.print(manifest.decision.sentence)
    console.out.print(f"built {manifest.provenance.created}")


def _kernels_of(bundle: Bundle) -> dict[str, KernelCounts]:
    """Count the kernels of the engines whose library described their layers, by engine name."""
    found = {}
    for engine in bundle.manifest.engines:
        with contextlib.suppress(BundleError):  # a file that is damaged or missing: verify tells
            described = describe_plan(bundle, engine)
            if described is not None:
                found[engine.name] = described.counts
    return found


def _print_source(bundle: str, manifest: Manifest) -> None:
    """Print the network, its weights, its input and its preprocessing."""
    source = manifest.source
    weights = {"random": f"random weights, seed {source.seed}", "pretrained": "pretrained weights"}.get(
        source.weights, f"weights with SHA-256 {(source.weights_sha256 or '')[:12]}..."
    )
    console.out.print(f"{bundle}: {source.name} of {source.library}, {weights}")
    console.out.print(f"input {manifest.input.name}: {manifest.input.describe()}, engine batch {manifest.input.batch}")
    console.out.print(manifest.preprocessing)
    for note in source.preprocessing_notes:
        console.out.print(note)


def _print_stages(manifest: Manifest) -> None:
    """Print the feature maps and other outputs as tables."""
    spec = manifest.backbone
    stages = console.Table("index", "stage", "channels", "stride", "layout", title="feature maps")
    for index, name, channels, (vertical, horizontal), layout in zip(
        spec.out_indices, spec.out_features, spec.channels, spec.strides, spec.layouts, strict=True
    ):
        stride = str(vertical) if vertical == horizontal else f"{vertical}x{horizontal}"
        stages.add_row(str(index), name, str(channels), stride, layout)
    console.out.print(stages)
    console.out.print(f"maps: {spec.describe_maps()}")
    if spec.extras:
        extras = console.Table("output", "channels", "layout", title="other outputs")
        for extra in spec.extras:
            extras.add_row(extra.name, str(extra.channels), extra.layout)
        console.out.print(extras)


def _print_graphs(manifest: Manifest) -> None:
    """Print the graphs that engines are compiled from."""
    if not manifest.graphs:
        return
    graphs = console.Table("precision", "format", "file", "size", title="graphs")
    for graph in manifest.graphs:
        graphs.add_row(str(graph.precision), graph.format, graph.file.path, megabytes(graph.file.size))
    console.out.print(graphs)


def _print_engines(bundle: str, manifest: Manifest, reasons: Mapping[str, Sequence[str]]) -> None:
    """Print the engines, why each does not run here (``reasons`` by engine name), and the parity of each.

    Where none runs here, the command that compiles one follows.
    """
    if manifest.engines:
        engines = console.Table("engine", "size", "ms", "runs here", title="engines")
        for engine in manifest.engines:
            why = reasons[engine.name]
            runs = "yes" if not why else "no: " + "; ".join(why)
            engines.add_row(engine.name, megabytes(engine.file.size), _time(manifest, engine), runs)
        console.out.print(engines)
        for engine in manifest.engines:
            if isinstance(engine.key.computes_in, str):
                words = computed(engine.key.precision, engine.key.computes_in)
                console.out.print(f"{engine.name}: {engine.key.precision}{words}")
    if all(reasons.values()):
        none = "no engine of it runs here" if manifest.engines else "no engine yet"
        graphs = any(graph.format == "onnx" for graph in manifest.graphs)
        advice = (
            f"compile one on the device: edge-backbones compile {shlex.quote(bundle)}"
            if graphs
            else "it has no ONNX graph to compile one from, unlike the bundle that it was packed from"
        )
        console.out.print(f"{none}: {advice}")
    console.print_parity([e.parity for e in manifest.engines], names=[e.name for e in manifest.engines])


def _time(manifest: Manifest, engine: EngineRecord) -> str:
    """Say how long a call of an engine takes: beside the other engines, or else in the trials of the build."""
    milliseconds, _ = stored_times(manifest, engine)
    if milliseconds is None:
        return "not timed"
    if engine.pipelined_milliseconds is not None:
        return f"{milliseconds:.2f} ({engine.pipelined_milliseconds:.2f} on the GPU alone)"
    return f"{milliseconds:.2f}" + ("" if engine.milliseconds is not None else " (when built)")


def _print_calibration(manifest: Manifest) -> None:
    """Print how int8 ranges were found, for a bundle that has a calibration."""
    record = manifest.calibration
    if record is None:
        return
    estimator = f"percentile {record.percentile:g}" if record.method == "percentile" else record.method
    chosen = ", ".join(f"{stage} by {method}" for stage, method in record.chosen.items())
    console.out.print(
        f"calibrated by {estimator} on {record.images} images, {len(record.skipped)} skipped"
        + (f": {chosen}" if chosen else "")
    )
