"""What the picture shows is what the network saw."""

from __future__ import annotations

import numpy as np
import pytest

from edge_backbones.images.camera import frame_spec, from_rgb
from edge_backbones.images.config import ImageConfig
from edge_backbones.images.fit import fit, image_to_input
from edge_backbones.integrations.ros2.pipeline import photograph_of
from edge_backbones.spec import InputSpec, ShapeRange

PICTURE = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)


@pytest.mark.parametrize("order", ["rgb", "bgr"])
@pytest.mark.parametrize("kind", ["pixel_values", "image", "frame"])
def test_the_photograph_is_what_fit_gives(kind, order):
    config = ImageConfig(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), channel_order=order)
    frame = frame_spec(40, 60, "bgr") if kind == "frame" else None
    input = InputSpec(
        name=kind,
        channels=3,
        batch=ShapeRange.fixed(1),
        height=ShapeRange.fixed(24),
        width=ShapeRange.fixed(32),
        frame=frame,
    )
    prepared = image_to_input(PICTURE, config, input) if frame is None else from_rgb(PICTURE, frame)
    found = photograph_of(np.ascontiguousarray(prepared)[None], config, input)
    np.testing.assert_array_equal(found, fit(PICTURE, config, 24, 32))
