"""Check that an engine's reported accuracy allows it to run, and remember which engines this machine has measured.

Whoever wrote the manifest chose the figures and gates in it. They are compared again here: an engine runs only if its
figures are there, fit each other and are inside the gate. Only a signature, or a measurement on this machine, can show
that they were measured at all.
"""

from __future__ import annotations

import contextlib
import hashlib
from pathlib import Path

import msgspec

from edge_backbones.bundle.manifest import EngineKey, EngineRecord, Manifest
from edge_backbones.engines import registry
from edge_backbones.engines.base import COMPILE
from edge_backbones.machine.hosts import Host
from edge_backbones.machine.system import default_cache
from edge_backbones.parity_report import Gate, StageParity
from edge_backbones.reading import shortened
from edge_backbones.spec import Precision

DEFAULT_GATES = {
    Precision.FP32: Gate(max_relative=1e-3),
    Precision.FP16: Gate(min_cosine=0.9999),
    Precision.BF16: Gate(min_sqnr_db=27.0),
    Precision.INT8: Gate(min_cosine=0.98, min_sqnr_db=15.0),
    Precision.FP8: Gate(min_cosine=0.98, min_sqnr_db=15.0),
}
VERIFY = "run edge-backbones verify on this device"
_NO_CACHE = (OSError, RuntimeError)  # the folder cannot be used; the user has no home folder
_MACHINE_ID = Path("/etc/machine-id")


def refuses_zeros(gate: Gate) -> bool:
    """Return whether a map of zeros (cosine 0, SQNR 0 dB, relative error 1) is outside a gate.

    A gate that accepts zeros checks nothing.
    """
    return (
        (gate.min_cosine is not None and gate.min_cosine > 0)
        or (gate.min_sqnr_db is not None and gate.min_sqnr_db > 0)
        or (gate.max_relative is not None and gate.max_relative < 1)
    )


def is_inside(gate: Gate, *, cosine: float, sqnr_db: float, relative: float) -> bool:
    """Return whether the figures of one map keep every bound of a gate.

    ``cosine``: of map and reference. ``sqnr_db``: signal-to-noise ratio in dB. ``relative``: norm of the error divided
    by that of the reference.
    """
    return (
        (gate.min_cosine is None or cosine >= gate.min_cosine)
        and (gate.min_sqnr_db is None or sqnr_db >= gate.min_sqnr_db)
        and (gate.max_relative is None or relative <= gate.max_relative)
    )


def gate_of(manifest: Manifest, engine: EngineKey, own: Gate | None = None) -> Gate:
    """Return the gate that an engine has to keep.

    It is the gate of the bundle's graph of its precision, or the precision's default. ``own``: the gate in the engine's
    own report. It counts only for engines that a build compiled from the network itself, because those have no graph in
    the bundle. A gate that a map of zeros passes is ignored.
    """
    given = [graph.gate for graph in manifest.graphs if graph.precision == engine.precision]
    flavour = registry.find(engine.flavour)
    if flavour is not None and flavour.graph_format is None:
        given.append(own)
    return next((gate for gate in given if gate is not None and refuses_zeros(gate)), DEFAULT_GATES[engine.precision])


def reasons_against(manifest: Manifest, engine: EngineRecord) -> list[str]:
    """Return why an engine's parity report does not let it run, one phrase with a fix; empty if it does."""
    report, gate = engine.parity, gate_of(manifest, engine.key, engine.parity.gate)
    if not report.measured:
        return [f"was compiled ahead of time and never measured: {VERIFY}"]
    if report.precision != engine.key.precision:
        return [f"is {engine.key.precision}, and its parity is reported as that of {report.precision}: {VERIFY}"]
    if report.gate != gate:
        return [f"was measured against the gate {report.gate}, and its bundle asks for {gate}: {VERIFY}"]
    reported = [stage.stage for stage in report.stages]
    if sorted(reported) != sorted(manifest.backbone.outputs):
        outputs, others = (shortened(str(list(names)), 150) for names in (manifest.backbone.outputs, reported))
        return [f"returns {outputs}, and its parity is reported for {others}: {VERIFY}"]
    judged = [msgspec.structs.replace(stage, passed=stage.passed and _holds(stage, gate)) for stage in report.stages]
    if failures := msgspec.structs.replace(report, stages=tuple(judged)).failures():
        return [f"was outside its gate ({gate}) when it was measured ({failures}): {COMPILE}"]
    return []


def _holds(stage: StageParity, gate: Gate) -> bool:
    return stage.finite and is_inside(gate, cosine=stage.cosine, sqnr_db=stage.sqnr_db, relative=stage.relative)


def remember(manifest: Manifest, engine: EngineRecord, host: Host) -> None:
    """Note in the user's cache folder that this machine has measured this engine, and that it was inside its gate.

    If the folder cannot be written, nothing happens: the engine is measured again when it matters.
    """
    with contextlib.suppress(*_NO_CACHE):
        note = _note(manifest, engine, host)
        note.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        note.write_text(f"{engine.name}\n", encoding="utf-8")


def forget(manifest: Manifest, engine: EngineRecord, host: Host) -> None:
    """Delete the note of an engine, because it was measured again and was outside its gate."""
    with contextlib.suppress(*_NO_CACHE):
        _note(manifest, engine, host).unlink(missing_ok=True)


def is_measured_here(manifest: Manifest, engine: EngineRecord, host: Host) -> bool:
    """Return whether this machine, with its current library, has measured exactly these engine bytes inside their gate."""
    try:
        return _note(manifest, engine, host).is_file()
    except _NO_CACHE:
        return False


def _note(manifest: Manifest, engine: EngineRecord, host: Host) -> Path:
    """Return the path of a note. Its name depends on everything that the measurement depended on."""
    try:
        machine = _MACHINE_ID.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        machine = ""
    gpu = None if engine.key.gpu is None or host.gpu is None else [host.gpu.name, host.gpu.driver]
    measured = [engine.file.sha256, engine.key, manifest.golden.file.sha256, manifest.backbone, manifest.input]
    against = gate_of(manifest, engine.key, engine.parity.gate)
    here = [machine, host.architecture, host.cpu_features, host.device_name, host.versions.get(engine.key.flavour), gpu]
    name = hashlib.sha256(msgspec.json.encode([measured, against, here])).hexdigest()
    return default_cache() / "measured" / name
