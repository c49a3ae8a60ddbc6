"""Open a bundle for the node, and turn an image message into feature maps. Nothing here imports ROS."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edge_backbones.bundle.reader import Bundle
from edge_backbones.errors import InputError
from edge_backbones.images.config import ImageConfig
from edge_backbones.images.fit import seen_by_network
from edge_backbones.integrations.ros2.frames import Frame, as_input_takes, frame_of_compressed, frame_of_image
from edge_backbones.integrations.ros2.maps import NamedMap
from edge_backbones.integrations.ros2.options import Options
from edge_backbones.pictures import View, as_map, draw_frame
from edge_backbones.runtime.backbone import EdgeBackbone
from edge_backbones.spec import InputSpec

_OF_IMAGES = (1, 3)


class Pipeline:
    """An opened bundle: image messages in, feature maps out. One thread at a time may use it.

    Attributes:
        backbone: The opened backbone, which returns the stages that are published.
        name: Name of the bundle's folder.
    """

    def __init__(self, backbone: EdgeBackbone, config: ImageConfig, name: str, *, compressed: bool) -> None:
        self.backbone, self.name = backbone, name
        self._config = config
        self._is_compressed = compressed
        self._views: dict[str, View] = {}

    @classmethod
    def open(cls, options: Options, stages: Sequence[str] = ()) -> Pipeline:
        """Open the bundle of ``options``, and run it once.

        ``stages``: what is published in the place of ``options.stages``. Raises what `EdgeBackbone.from_pretrained` raises,
        and InputError if the bundle has not all of the stages or takes no images of ROS. Nothing stays open then.
        """
        if not options.bundle:
            raise InputError("parameter bundle is empty: set it to the folder of a bundle")
        backbone = EdgeBackbone.from_pretrained(
            options.bundle,
            engine=options.engine or None,
            device=options.device,
            threads=options.threads or None,
            trusted=options.trusted or None,
        )
        try:
            chosen = stages or options.stages
            if chosen:
                order = {stage: place for place, stage in enumerate(backbone.stage_names)}
                backbone.out_features = sorted(chosen, key=lambda stage: order.get(stage, len(order)))
            config = Bundle.open(options.bundle).manifest.image
            compressed = options.transport == "compressed"
            made = cls(backbone, config, Path(options.bundle).resolve().name, compressed=compressed)
            made._try_out()
        except BaseException:
            backbone.close()
            raise
        return made

    @property
    def stages(self) -> list[str]:
        """Return the stages that a run returns, in the bundle's order."""
        return self.backbone.out_features

    def _try_out(self) -> None:
        """Run the engine on a black image, so that what cannot work is refused now, and the first frame is not late."""
        input = self.backbone.input
        if input.channels not in _OF_IMAGES:
            raise InputError(f"images of ROS have 1 or 3 channels, and this bundle takes {input.channels}")
        if self._is_compressed and input.frame is not None and input.frame.color not in ("rgb", "gray"):
            raise InputError(
                f"compressed images are decoded to RGB, and this bundle takes {input.frame} as they are: set transport to "
                "raw, or build a bundle with --input image"
            )
        if input.frame is not None:
            black = np.zeros(input.frame.shape, np.uint8)
            self.run(self.prepare_frame(Frame(black, input.frame.color)))
            return
        black = np.zeros((input.height.opt, input.width.opt, input.channels), np.uint8)
        self.run(self.prepare_frame(Frame(black, "gray" if input.channels == 1 else "rgb")))

    def prepare(self, message: Any) -> np.ndarray:
        """Return the input of the engine for an image message. Raises InputError for one that cannot be used."""
        if self._is_compressed:
            return self.prepare_frame(frame_of_compressed(message, self.backbone.input.channels))
        return self.prepare_frame(frame_of_image(message))

    def prepare_frame(self, frame: Frame) -> np.ndarray:
        """Return the input of the engine for a frame."""
        pixels, color = as_input_takes(frame, self.backbone.input)
        if isinstance(pixels, np.ndarray):
            return self.backbone.preprocess(pixels, color=color)
        return self.backbone.preprocess(pixels)

    def run(self, prepared: np.ndarray) -> list[NamedMap]:
        """Return the feature maps of an input of the engine."""
        maps = self.backbone(prepared).feature_maps
        backbone = self.backbone
        return [NamedMap(*one) for one in zip(backbone.out_features, maps, backbone.layouts, strict=True)]

    def draw(self, prepared: np.ndarray, maps: Sequence[NamedMap], title: str) -> np.ndarray | None:
        """Return a picture of what the network saw and of its maps; None if no map has a place in it.

        It is uint8 (rows, columns, 3). Colours mean the same in all pictures. Raises MissingDependencyError without
        matplotlib and Pillow.
        """
        photograph = photograph_of(prepared, self._config, self.backbone.input)
        height, width, _ = photograph.shape
        drawable = {}
        for named, stride in zip(maps, self.backbone.strides, strict=True):
            drawn = as_map(named.values[0], named.layout, (height // stride[0], width // stride[1]))
            if drawn is not None:
                drawable[named.stage] = drawn
        return draw_frame(photograph, drawable, title=title, views=self._views) if drawable else None

    def close(self) -> None:
        """Release the engine."""
        self.backbone.close()


def photograph_of(prepared: np.ndarray, config: ImageConfig, input: InputSpec) -> np.ndarray:
    """Return what the network sees of an input of the engine, a batch of one: uint8 (height, width, channels)."""
    if input.name != "pixel_values":
        seen: np.ndarray = seen_by_network(prepared, config, input)[0]
        return seen
    values: np.ndarray = prepared[0].transpose(1, 2, 0).astype(np.float32)
    values = values[..., ::-1] if config.channel_order == "bgr" else values
    mean, std = np.array(config.mean, np.float32), np.array(config.std, np.float32)
    levels: np.ndarray = np.clip(np.rint((values * std + mean) * 255), 0, 255).astype(np.uint8)
    return levels
