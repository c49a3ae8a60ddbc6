"""Define the options of a plan."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from typing import Annotated, Literal

from edge_backbones.errors import InputError
from edge_backbones.option import Option, documented
from edge_backbones.spec import ShapeRange


@dataclass(frozen=True, kw_only=True)
class Shapes:
    """Define one optimisation profile: the input sizes that kernels are chosen for."""

    batch: ShapeRange
    height: ShapeRange
    width: ShapeRange


@documented
@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """Say how a plan is compiled. ``None`` and ``False`` leave a setting to TensorRT.

    Raises:
        InputError: An option is out of range.
    """

    profiles: Annotated[
        tuple[Shapes, ...],
        Option(
            "Input sizes to choose kernels for: an optimisation profile each, inside the sizes of the graph. By default one "
            "profile with every size of the graph.",
            group="TensorRT: speed",
        ),
    ] = ()
    targets: Annotated[
        tuple[str, ...],
        Option(
            "GPU architecture to compile for with tensorrt_rtx, such as sm_89.",
            group="TensorRT: which GPUs run the plan",
        ),
    ] = ()
    workspace: Annotated[
        int | None,
        Option("How much scratch memory a kernel may use.", group="TensorRT: speed", least=1, in_python="In bytes."),
    ] = None
    level: Annotated[
        int | None,
        Option(
            "How long to search for fast kernels: 0 is shortest, 5 longest.", group="TensorRT: speed", least=0, most=5
        ),
    ] = None
    tiling: Annotated[
        Literal["none", "fast", "moderate", "full"],
        Option(
            "How long to search for kernels that work through several layers tile by tile, so that maps stay in the "
            "cache. For TensorRT 10.8 and newer.",
            group="TensorRT: speed",
        ),
    ] = "none"
    hardware_compatibility: Annotated[
        Literal["none", "ampere_plus", "same_compute_capability"],
        Option(
            "Which other GPUs may run the plan, more slowly: any since Ampere, or those of the same compute capability.",
            group="TensorRT: which GPUs run the plan",
        ),
    ] = "none"
    version_compatible: Annotated[
        bool,
        Option("Let the lean runtime of the same release run the plan too.", group="TensorRT: which GPUs run the plan"),
    ] = False
    embed_runtime: Annotated[
        bool,
        Option(
            "Put the lean runtime into the plan, so that newer releases of TensorRT run it. That runtime is code, which a "
            "device has to allow.",
            group="TensorRT: which GPUs run the plan",
        ),
    ] = False
    refit: Annotated[bool, Option("Make a plan whose weights can be replaced later.", group="TensorRT: weights")] = (
        False
    )
    strip: Annotated[
        bool,
        Option(
            "Write the plan without its weights. Opening it puts in the weights of the bundle's graph.",
            group="TensorRT: weights",
        ),
    ] = False
    sparse: Annotated[
        bool, Option("Use kernels for 2:4 sparse weights, where the network has such.", group="TensorRT: weights")
    ] = False
    dla_core: Annotated[
        int | None,
        Option("Compile for this core of the DLA, the deep-learning accelerator.", group="DLA of a Jetson", least=0),
    ] = None
    gpu_fallback: Annotated[
        bool, Option("Run the layers that the DLA cannot run on the GPU.", group="DLA of a Jetson")
    ] = True
    timing_cache: Annotated[
        bytes | None,
        Option(
            "Kernel timings of an earlier compilation, to save time: its .cache file.",
            group="TensorRT: speed",
            in_python="The bytes of that file.",
        ),
    ] = None

    def __post_init__(self) -> None:
        for target in self.targets:
            if not re.fullmatch(r"sm_\d{2,3}", target):
                raise InputError(f"target {target!r} is not an architecture: write sm_89 for compute capability 8.9")
        if self.level is not None and not 0 <= self.level <= 5:
            raise InputError(f"builder level must be 0 to 5, got {self.level}")
        if self.workspace is not None and not 1 <= self.workspace < 1 << 63:
            raise InputError(f"workspace must be at least 1 byte and below 2**63, got {self.workspace}")
        if not self.gpu_fallback and self.dla_core is None:
            raise InputError("gpu_fallback=False (--no-gpu-fallback) is for a DLA core: set dla_core (--dla-core) too")
        if self.embed_runtime and not self.version_compatible:
            raise InputError("embed_runtime is for version-compatible plans: set version_compatible=True too")

    def changed(self) -> list[str]:
        """Return the names of the options that differ from their defaults."""
        return [field.name for field in dataclasses.fields(self) if getattr(self, field.name) != field.default]
