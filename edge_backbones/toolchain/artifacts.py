"""What one step hands to the next: frozen values that check themselves, so that no later code re-checks.

::

    load -> LoadedBackbone -> prepare -> PreparedBackbone -> export -> ExportedGraph (+ GoldenSamples)
         -> quantize -> TypedGraph -> compile -> CompiledEngine
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from edge_backbones.bundle.manifest import Source
from edge_backbones.engines.base import CompiledEngine
from edge_backbones.images.fit import ImageConfig
from edge_backbones.parity_report import ParityReport
from edge_backbones.spec import BackboneSpec, InputSpec, Precision

if TYPE_CHECKING:
    from torch import nn


OPSET = 20
"""ONNX opset of every graph that is exported.

Gelu is one node from 20 on and fp16 Q/DQ scales are allowed from 19; 23 adds an Attention node that TensorRT-RTX does not
build in fp32.
"""


@dataclass(frozen=True)
class LoadedBackbone:
    """A network as its source library makes it, in eval mode: the fp32 reference that parity is measured against.

    ``module`` takes float NCHW and returns a tuple of tensors in the order of ``spec.outputs``. ``spec`` is what the
    library claims of channels and strides; `prepare` measures them. ``height`` and ``width``: the size it is made for.
    ``image_differs``: why ``image_config`` cannot prepare frames as the source does, empty where it can.
    """

    module: nn.Module
    source: Source
    image_config: ImageConfig
    channels_in: int
    height: int
    width: int
    spec: BackboneSpec
    image_differs: str = ""

    def __post_init__(self) -> None:
        if self.module.training:
            raise ValueError("a loaded backbone must be in eval mode")


@dataclass(frozen=True)
class PreparedBackbone:
    """The network to be exported: batch norm folded, branches merged, kept stages only, in eval mode.

    ``module`` takes ``input`` (preprocessing included for ``image``) and returns a tuple in ``spec.outputs`` order.
    """

    module: nn.Module
    spec: BackboneSpec
    input: InputSpec
    folded_batch_norms: int
    kept_batch_norms: int

    def __post_init__(self) -> None:
        if self.module.training:
            raise ValueError("a prepared backbone must be in eval mode")


@dataclass(frozen=True)
class ExportedGraph:
    """The fp32 ONNX file; its outputs are named as ``spec.outputs``."""

    path: Path
    spec: BackboneSpec
    input: InputSpec

    def __post_init__(self) -> None:
        if not self.path.is_file():
            raise ValueError(f"{self.path} does not exist")


@dataclass(frozen=True)
class TypedGraph:
    """An ONNX file whose tensors carry the precision: what engines are compiled from."""

    path: Path
    precision: Precision
    spec: BackboneSpec
    input: InputSpec

    def __post_init__(self) -> None:
        if not self.path.is_file():
            raise ValueError(f"{self.path} does not exist")

    @property
    def opset(self) -> int:
        """The ONNX opset of the file."""
        return max(OPSET, self.precision.info.min_opset)


@dataclass(frozen=True)
class MeasuredEngine:
    """An engine that goes into the bundle, its parity, and its latency where several were timed."""

    engine: CompiledEngine
    parity: ParityReport
    milliseconds: float | None = None
