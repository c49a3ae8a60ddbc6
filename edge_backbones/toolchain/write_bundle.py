"""The last step of a build: put graphs, engines, golden samples and ranges into the bundle's folder, and the manifest."""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import platform
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

import edge_backbones
from edge_backbones.bundle.golden import GoldenSamples
from edge_backbones.bundle.manifest import (
    CalibrationFile,
    CalibrationRecord,
    EngineRecord,
    GraphRecord,
    Manifest,
    Provenance,
)
from edge_backbones.bundle.writer import BundleWriter
from edge_backbones.engines import registry
from edge_backbones.parity_report import Gate
from edge_backbones.progress import Progress
from edge_backbones.spec import Precision
from edge_backbones.toolchain.artifacts import LoadedBackbone, MeasuredEngine, PreparedBackbone

if TYPE_CHECKING:
    from edge_backbones.toolchain.candidates import Candidate, Verdict

_CALIBRATION, _SCRIPT = "calibration.json", "graphs/fp32.ts"
_LIBRARIES = ("numpy", "torch", "timm", "transformers", "onnx", "onnxscript", "onnxruntime", "openvino")


def write_bundle(
    folder: Path,
    *,
    loaded: LoadedBackbone,
    prepared: PreparedBackbone,
    golden: GoldenSamples,
    golden_names: tuple[str, ...],
    verdict: Verdict,
    script: Path | None,
    torch_engines: Sequence[MeasuredEngine],
    calibration: CalibrationFile | None,
    reused: bool,
    gates: Mapping[Precision, Gate],
    progress: Progress,
) -> Manifest:
    """Write every file of a bundle into ``folder``, the manifest last, and return the manifest.

    ``golden``: input and feature maps by case; ``golden_names``: names of the golden images. ``script``: the TorchScript
    module, which is moved, as the graphs of ``verdict`` are. ``reused``: ``calibration`` comes from another build.
    ``gates``: those that the user set.
    """
    progress("writing the bundle", 0, None)
    (folder / "graphs").mkdir()
    (folder / "engines").mkdir()
    writer = BundleWriter(folder)
    graphs = [_write_graph(writer, candidate, gates) for candidate in (*verdict.chosen, *verdict.spare)]
    if script is not None:
        graphs.append(_write_script(writer, script, gates))
    several = len(verdict.chosen) > 1
    candidates = [MeasuredEngine(c.engine, c.shipped, c.milliseconds if several else None) for c in verdict.chosen]
    return writer.finish(
        backbone=prepared.spec,
        input=prepared.input,
        image=loaded.image_config,
        source=loaded.source,
        graphs=tuple(graphs),
        engines=tuple(_write_engine(writer, measured) for measured in (*candidates, *torch_engines)),
        golden=writer.add_golden(golden, golden_names),
        calibration=None if calibration is None else _write_calibration(writer, calibration, reused=reused),
        decision=verdict.decision,
        provenance=_provenance(),
    )


def _write_graph(writer: BundleWriter, candidate: Candidate, gates: Mapping[Precision, Gate]) -> GraphRecord:
    """Move the graph of a candidate into the bundle."""
    path = f"graphs/{candidate.precision}.onnx"
    shutil.move(candidate.typed.path, writer.folder / path)
    return GraphRecord(
        format="onnx",
        precision=candidate.precision,
        file=writer.add_file(path),
        opset=candidate.typed.opset,
        excluded=candidate.excluded,
        gate=gates.get(candidate.precision),
    )


def _write_script(writer: BundleWriter, script: Path, gates: Mapping[Precision, Gate]) -> GraphRecord:
    """Move the TorchScript module into the bundle."""
    shutil.move(script, writer.folder / _SCRIPT)
    file, gate = writer.add_file(_SCRIPT), gates.get(Precision.FP32)
    return GraphRecord(format="torchscript", precision=Precision.FP32, file=file, gate=gate)


def _write_engine(writer: BundleWriter, measured: MeasuredEngine) -> EngineRecord:
    """Write one engine. A TorchScript engine is the module among the graphs, which is there already."""
    engine = measured.engine
    if registry.get(engine.key.flavour).graph_is_engine:
        file = writer.add_file(_SCRIPT)
    else:
        file = writer.add_file(engine.key.path(engine.data, engine.suffix), engine.data)
    return EngineRecord(key=engine.key, file=file, parity=measured.parity, milliseconds=measured.milliseconds)


def _write_calibration(writer: BundleWriter, found: CalibrationFile, *, reused: bool) -> CalibrationRecord:
    """Write calibration.json."""
    text = msgspec.json.format(msgspec.json.encode(found), indent=1) + b"\n"
    return CalibrationRecord(
        file=writer.add_file(_CALIBRATION, text),
        method=found.method,
        percentile=found.percentile,
        chosen=found.chosen,
        images=len(found.images),
        held_out=found.held_out,
        skipped=found.skipped,
        reused=reused,
    )


def _provenance() -> Provenance:
    """Record when the bundle is made and with which releases."""
    versions = {"python": platform.python_version(), "edge_backbones": edge_backbones.__version__}
    for library in _LIBRARIES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[library] = importlib.metadata.version(library)
    created = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    return Provenance(created=created, versions=versions)
