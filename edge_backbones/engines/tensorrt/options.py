"""Define the options of a plan."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from edge_backbones.errors import InputError
from edge_backbones.spec import ShapeRange


@dataclass(frozen=True, kw_only=True)
class Shapes:
    """Define one optimisation profile: the input sizes that kernels are chosen for."""

    batch: ShapeRange
    height: ShapeRange
    width: ShapeRange


@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """Say how a plan is compiled. ``None`` and ``False`` leave a setting to TensorRT.

    Attributes:
        profiles: Input sizes, each inside those of the graph; empty for one profile with all of them.
        targets: Architectures for TensorRT-RTX (``sm_89``).
        workspace: Bytes of scratch memory that a kernel may ask for.
        level: Builder optimisation level, 0 to 5.
        hardware_compatibility: ``ampere_plus`` for any GPU since Ampere (slower), or ``same_compute_capability``.
        version_compatible: Newer releases and the lean runtime can run the plan.
        embed_runtime: Put a lean runtime into the plan. It is code, which a device has to allow.
        refit: Weights can be replaced later.
        strip: Write the plan without weights.
        sparse: Use 2:4 sparse weights.
        dla_core: Compile for this core of the deep-learning accelerator.
        gpu_fallback: Let the GPU run layers that the DLA core cannot run.
        timing_cache: Kernel times that an earlier compilation measured.

    Raises:
        InputError: An option is out of range.
    """

    profiles: tuple[Shapes, ...] = ()
    targets: tuple[str, ...] = ()
    workspace: int | None = None
    level: int | None = None
    hardware_compatibility: Literal["none", "ampere_plus", "same_compute_capability"] = "none"
    version_compatible: bool = False
    embed_runtime: bool = False
    refit: bool = False
    strip: bool = False
    sparse: bool = False
    dla_core: int | None = None
    gpu_fallback: bool = True
    timing_cache: bytes | None = None

    def __post_init__(self) -> None:
        for target in self.targets:
            if not re.fullmatch(r"sm_\d{2,3}", target):
                raise InputError(f"target {target!r} is not an architecture: write sm_89 for compute capability 8.9")
        if self.level is not None and not 0 <= self.level <= 5:
            raise InputError(f"builder level must be 0 to 5, got {self.level}")
        if self.workspace is not None and not 1 <= self.workspace < 1 << 63:
            raise InputError(f"workspace must be at least 1 byte and below 2**63, got {self.workspace}")
        if self.embed_runtime and not self.version_compatible:
            raise InputError("embed_runtime is for version-compatible plans: set version_compatible=True too")
