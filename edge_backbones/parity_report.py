"""How close the outputs of an engine are to fp32 torch, and how close they have to be."""

from __future__ import annotations

from typing import Annotated

import msgspec

from edge_backbones.errors import EdgeBackbonesError
from edge_backbones.spec import Name, Precision

Decibels = Annotated[float, msgspec.Meta(ge=-1e4, le=1e4)]
Share = Annotated[float, msgspec.Meta(ge=0, le=1e30)]
Cosine = Annotated[float, msgspec.Meta(ge=-1.001, le=1.001)]


class Gate(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Bounds that every output of an engine must keep. None: no bound."""

    min_cosine: Cosine | None = None
    min_sqnr_db: Decibels | None = None
    max_relative: Share | None = None

    def __str__(self) -> str:
        parts = [
            f"cosine >= {self.min_cosine:g}" if self.min_cosine is not None else "",
            f"SQNR >= {self.min_sqnr_db:g} dB" if self.min_sqnr_db is not None else "",
            f"relative error <= {self.max_relative:g}" if self.max_relative is not None else "",
        ]
        return " and ".join(part for part in parts if part) or "finite values"


class StageParity(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """An output x of an engine compared with its fp32 reference r; each figure is that of the worst golden image.

    ``cosine``: of the flattened maps. ``sqnr_db``: 10 log10(|r|^2 / |r - x|^2). ``max_abs``: max |r - x|. ``relative``:
    |r - x| / |r|, Frobenius norms. ``finite``: whether all values are finite; if not, the figures are zeros.
    """

    stage: Name
    cosine: Cosine
    sqnr_db: Decibels
    max_abs: Annotated[float, msgspec.Meta(ge=0)]
    relative: Annotated[float, msgspec.Meta(ge=0)]
    finite: bool
    passed: bool


class ParityReport(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Every output of one engine, measured through the runtime on the golden samples.

    ``stages`` is empty for an engine that was not measured yet: it was compiled ahead of time for a GPU that was not there.
    """

    precision: Precision
    gate: Gate
    stages: tuple[StageParity, ...]

    @property
    def measured(self) -> bool:
        """Return whether the engine was measured."""
        return bool(self.stages)

    @property
    def passed(self) -> bool:
        """Return whether the engine was measured and every output is inside the gate."""
        return self.measured and all(stage.passed for stage in self.stages)

    def failures(self) -> str:
        """Return a phrase for each output outside the gate, with its figures."""
        return "; ".join(
            f"{stage.stage} has cosine {stage.cosine:.4f}, SQNR {stage.sqnr_db:.1f} dB, relative error "
            f"{stage.relative:.2e}, max |difference| {stage.max_abs:.3g}"
            if stage.finite
            else f"{stage.stage} has values that are not finite"
            for stage in self.stages
            if not stage.passed
        )


class ParityError(EdgeBackbonesError):
    """An output is outside its gate. ``reports``: the figures of every output, one report per engine outside its gate."""

    def __init__(self, message: str, *reports: ParityReport) -> None:
        super().__init__(message)
        self.reports = reports
