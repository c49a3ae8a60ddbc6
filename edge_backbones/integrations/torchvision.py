"""Use a bundle as the backbone of torchvision's detection models (Faster R-CNN, RetinaNet, FCOS, Mask R-CNN).

::

    backbone = EdgeBackboneWithFPN(EdgeBackbone.from_pretrained("resnet50.bundle"))
    model = torchvision.models.detection.FasterRCNN(backbone, num_classes=91, fixed_size=(640, 640))

The model pads images to various multiples of 32: give it ``fixed_size`` (width, height), or build the bundle with a range
of sizes.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import nn
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock, FeaturePyramidNetwork, LastLevelMaxPool

from edge_backbones.errors import ClientMismatchError
from edge_backbones.integrations.modules import EngineModule
from edge_backbones.runtime.backbone import EdgeBackbone


class EdgeFeatures(EngineModule):
    """The feature maps as torchvision's ``IntermediateLayerGetter`` returns them: an OrderedDict with keys "0", "1", ..."""

    def forward(self, x: torch.Tensor) -> OrderedDict[str, torch.Tensor]:
        """Return the maps of normalised images, shape (batch, channels, height, width)."""
        maps = self.infer(x)["feature_maps"]
        return OrderedDict((str(i), feature_map) for i, feature_map in enumerate(maps))


class EdgeBackboneWithFPN(nn.Module):
    """torchvision's ``BackboneWithFPN`` over an engine; the pyramid is trainable.

    ``out_channels``: channels of every pyramid level. ``extra_blocks``: as in torchvision, LastLevelMaxPool by
    default. Submodules have torchvision's names, so a pyramid's weights load from its checkpoints (``fpn.*``).
    """

    def __init__(
        self, backbone: EdgeBackbone, out_channels: int = 256, extra_blocks: ExtraFPNBlock | None = None
    ) -> None:
        super().__init__()
        if any(layout != "NCHW" for layout in backbone.layouts):
            raise ClientMismatchError(f"a pyramid needs NCHW maps, this bundle returns {backbone.layouts}")
        self.body = EdgeFeatures(backbone)
        self.fpn = FeaturePyramidNetwork(
            in_channels_list=backbone.channels,
            out_channels=out_channels,
            extra_blocks=extra_blocks or LastLevelMaxPool(),
        )
        self.out_channels = out_channels

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the levels of the pyramid for normalised images, shape (batch, channels, height, width)."""
        pyramid: dict[str, torch.Tensor] = self.fpn(self.body(x))
        return pyramid
