"""What one step of a build hands to the next: frozen values that check themselves, so that no later code checks again.

::

    load -> LoadedBackbone -> prepare -> PreparedBackbone -> export -> ExportedGraph (+ golden samples)
         -> quantize -> TypedGraph -> compile -> CompiledEngine -> measure -> MeasuredEngine
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from edge_backbones.bundle.manifest import Source
from edge_backbones.engines.base import CompiledEngine
from edge_backbones.images.config import ImageConfig
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

    Args:
        module: takes float32 NCHW, normalised, and returns a tuple of float32 tensors in the order of ``spec.outputs``.
        source: where the network comes from, for the manifest.
        image_config: how frames become its input.
        channels_in: channels of its input.
        height: the height that it is made for.
        width: the width that it is made for.
        spec: stages, channels and strides as the library claims them; `prepare` measures them.
        image_differs: why ``image_config`` cannot prepare frames as the source does; empty where it can.
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
    """The network that is exported: batch norm folded, branches merged, kept stages only, in eval mode.

    ``module`` takes ``input`` (for ``image`` it preprocesses) and returns a tuple in the order of ``spec.outputs``.
    ``folded_batch_norms`` and ``kept_batch_norms`` count the batch norms that were folded and that stay in the graph.
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
    """An fp32 ONNX file whose outputs are named as ``spec.outputs``. Raises ValueError where the file does not exist."""

    path: Path
    spec: BackboneSpec
    input: InputSpec

    def __post_init__(self) -> None:
        if not self.path.is_file():
            raise ValueError(f"{self.path} does not exist")


@dataclass(frozen=True)
class TypedGraph:
    """An ONNX file whose tensors have the types of one precision; engines are compiled from it."""

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
