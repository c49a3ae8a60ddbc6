"""The example that puts a bundle into DETR: what follows the backbone sees what it saw before."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, DetrForObjectDetection

from edge_backbones.integrations.transformers import replace_backbone
from examples.detr import detect

pytestmark = pytest.mark.filterwarnings("ignore")  # torch and transformers warn about themselves


def test_the_command_draws_boxes_as_in_torch(place, typed):
    lines = typed("detr")
    assert float(re.search(r"by at most ([\d.]+) of the photograph", lines[0])[1]) < 1e-3
    assert len(lines) == 1 + 10
    with (
        Image.open(place / "samples" / "boxes.png") as drawn,
        Image.open(place / "samples/queries/astronaut.jpg") as was,
    ):
        assert drawn.size == was.size
        changed = (np.asarray(drawn) != np.asarray(was.convert("RGB"))).any(axis=2)
    assert 0 < changed.sum() < 0.5 * changed.size


def test_the_model_computes_what_it_computed_in_torch(place):
    """Boxes of random weights hardly depend on the photograph; what the encoder makes of the feature map does."""
    folder = place / "samples"
    model = DetrForObjectDetection.from_pretrained(folder / "detr").eval()
    processor = AutoImageProcessor.from_pretrained(folder / "detr")
    size = {"height": 480, "width": 640}
    astronaut, china = (
        processor(images=Image.open(folder / "queries" / f"{name}.jpg"), size=size, return_tensors="pt")
        for name in ("astronaut", "china")
    )
    before, other = (detect(model, inputs).encoder_last_hidden_state for inputs in (astronaut, china))
    replace_backbone(model, folder / "detr.bundle")
    after = detect(model, astronaut)

    def relative(difference: torch.Tensor) -> float:
        return float(difference.norm() / before.norm())

    error = relative(after.encoder_last_hidden_state - before)
    assert error < 1e-3
    assert relative(other - before) > 20 * error
    assert after.pred_boxes.shape == (1, 20, 4)
