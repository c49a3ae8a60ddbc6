"""How near an engine's feature maps are to fp32 torch, and how near they have to be."""

from __future__ import annotations

from typing import Annotated

import msgspec

from edge_backbones.errors import EdgeBackbonesError
from edge_backbones.spec import Name, Precision

Decibels = Annotated[float, msgspec.Meta(ge=-1e4, le=1e4)]
Share = Annotated[float, msgspec.Meta(ge=0, le=1e30)]
Cosine = Annotated[float, msgspec.Meta(ge=-1.001, le=1.001)]


class Gate(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Bounds that every feature map must keep; None means not asked."""

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
    """A feature map (or other output) against its fp32 reference over all golden samples; the worst case counts.

    ``cosine`` of the flattened maps, ``sqnr_db`` = 10 log10(|r|^2 / |r - x|^2), ``max_abs`` = max |r - x|,
    ``relative`` = |r - x| / |r| (Frobenius). A value that is not finite is stored as ``finite = False`` and zeros.
    """

    stage: Name
    cosine: Cosine
    sqnr_db: Decibels
    max_abs: Annotated[float, msgspec.Meta(ge=0)]
    relative: Annotated[float, msgspec.Meta(ge=0)]
    finite: bool
    passed: bool


class ParityReport(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Every output of one engine, measured through the real runtime on the golden samples.

    Without ``stages`` it is still to be measured: the engine was compiled ahead of time for a GPU that was not there.
    """

    precision: Precision
    gate: Gate
    stages: tuple[StageParity, ...]

    @property
    def measured(self) -> bool:
        return bool(self.stages)

    @property
    def passed(self) -> bool:
        return self.measured and all(stage.passed for stage in self.stages)

    def failures(self) -> str:
        """One phrase per failing stage, with its figures."""
        return "; ".join(
            f"{stage.stage} has cosine {stage.cosine:.4f}, SQNR {stage.sqnr_db:.1f} dB, relative error "
            f"{stage.relative:.2e}, max |difference| {stage.max_abs:.3g}"
            if stage.finite
            else f"{stage.stage} has values that are not finite"
            for stage in self.stages
            if not stage.passed
        )


class ParityError(EdgeBackbonesError):
    """A feature map left its gate. ``reports`` hold the figures of every stage, one report per engine that left it."""

    def __init__(self, message: str, *reports: ParityReport) -> None:
        super().__init__(message)
        self.reports = reports
