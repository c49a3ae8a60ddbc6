"""Use a bundle as the encoder of a segmentation_models_pytorch model (Unet, FPN, DeepLabV3, ...).

::

    model = segmentation_models_pytorch.Unet("tu-resnet18", encoder_weights=None, classes=2)
    model.encoder = EdgeEncoder(EdgeBackbone.from_pretrained("resnet18.bundle"))

The decoder expects the channels of the original encoder: the bundle must have the same ``out_channels``.
"""

from __future__ import annotations

import torch

from edge_backbones.errors import ClientMismatchError
from edge_backbones.integrations.modules import EngineModule
from edge_backbones.runtime.backbone import EdgeBackbone


class EdgeEncoder(EngineModule):
    """An encoder that runs a bundle's engine.

    It returns a list of maps: the image first, then one map per level, each half as large. As in the library's own
    encoders, a level that the network lacks (stride 2 in networks of transformers that begin with 4) is a map of 0
    channels, and a map as large as the image (VGG) replaces the image. Raises ClientMismatchError unless maps are NCHW and
    their strides are different powers of two.
    """

    def __init__(self, backbone: EdgeBackbone) -> None:
        super().__init__(backbone)
        strides = backbone.strides
        levels = [n.bit_length() - 1 for n, _ in strides]
        if (
            any(v != h or v != 2**level for (v, h), level in zip(strides, levels, strict=True))
            or sorted(set(levels)) != levels
            or any(layout != "NCHW" for layout in backbone.layouts)
        ):
            raise ClientMismatchError(
                f"an encoder needs one NCHW map per power of two, this bundle has strides {strides} and layouts "
                f"{backbone.layouts}: choose its stages with out_indices"
            )
        self.levels = levels
        self.output_stride = strides[-1][0]
        channels = {0: backbone.input.channels, **dict(zip(levels, backbone.channels, strict=True))}
        self.out_channels = [channels.get(level, 0) for level in range(levels[-1] + 1)]

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Return the maps of normalised images (batch, channels, height, width), one per level."""
        maps = {0: x, **dict(zip(self.levels, self.infer(x)["feature_maps"], strict=True))}
        height, width = x.shape[2:]
        for level in range(1, self.levels[-1]):
            if level not in maps:
                maps[level] = x.new_empty(len(x), 0, height >> level, width >> level)
        return [maps[level] for level in range(self.levels[-1] + 1)]
