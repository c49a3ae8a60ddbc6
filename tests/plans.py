"""A bundle's record of a TensorRT plan, without TensorRT: for what copies plans and reads their keys."""

from __future__ import annotations

from typing import Any

from edge_backbones.bundle.manifest import EngineKey, EngineRecord, GpuKey
from edge_backbones.bundle.reader import Bundle
from edge_backbones.bundle.writer import record_bytes
from edge_backbones.engines.promises import DEFAULT_GATES
from edge_backbones.parity_report import ParityReport, StageParity
from edge_backbones.spec import Precision

PLAN = b"a plan of TensorRT"


def plan_record(bundle: Bundle, precision: str = "fp16", *, flavour: str = "tensorrt", **gpu: Any) -> EngineRecord:
    """The record of a plan whose parity was measured, which add_engine takes."""
    precision = Precision(precision)
    key = EngineKey(
        flavour=flavour,
        library_version="10.3.0",
        architecture="aarch64",
        cpu_features=(),
        device_name="Orin",
        precision=precision,
        graph_sha256="0" * 64,
        gpu=GpuKey(**{"architectures": ("sm_87",), **gpu}),
    )
    stages = tuple(
        StageParity(stage=name, cosine=1, sqnr_db=60, max_abs=0, relative=0, finite=True, passed=True)
        for name in bundle.manifest.backbone.outputs
    )
    parity = ParityReport(precision=precision, gate=DEFAULT_GATES[precision], stages=stages)
    return EngineRecord(key=key, file=record_bytes(key.path(PLAN, ".plan"), PLAN), parity=parity)


def with_plan(bundle: Bundle, **options: Any) -> Bundle:
    record = plan_record(bundle, **options)
    return bundle.add_engine(record, {record.file.path: PLAN})
