"""What a network sees in photographs, in fp32 and by its engine: the most probable class of ImageNet, side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import ImageNetInfo, create_transform, resolve_model_data_config
from timm.models.efficientnet import EfficientNet

from edge_backbones import Bundle, EdgeBackbone, fit
from edge_backbones.cli.console import Table
from edge_backbones.images.fit import to_input


@dataclass(frozen=True)
class Answer:
    """The most probable class: its index in ImageNet-1k, its name, its probability."""

    index: int
    name: str
    probability: float


@dataclass(frozen=True)
class Comparison:
    """One photograph, what the network answers in fp32 torch, and what it answers with the engine's last feature map."""

    photograph: str
    fp32: Answer
    engine: Answer

    @property
    def agrees(self) -> bool:
        return self.fp32.index == self.engine.index


def compare(network: Any, bundle: Path, images: Mapping[str, Image.Image]) -> list[Comparison]:
    """Ask the whole network of timm in fp32, and the bundle's engine followed by the network's own head.

    The two roads share nothing before the head: fp32 takes timm's own transform, the engine the bundle's preprocessing.
    """
    transform = create_transform(**resolve_model_data_config(network))
    config = Bundle.open(bundle).manifest.image
    rows = []
    with EdgeBackbone.from_pretrained(bundle) as backbone:
        height, width = backbone.input.height.opt, backbone.input.width.opt
        for name, image in images.items():
            with torch.inference_mode():
                fp32 = network(transform(image)[None])
            pixels = to_input(fit(image, config, height, width)[None], config, backbone.input)
            engine = head(network, backbone(pixels).feature_maps[-1])
            rows.append(Comparison(name, answer(fp32[0]), answer(engine[0])))
    return rows


def head(network: Any, feature_map: np.ndarray) -> torch.Tensor:
    """Return the logits of the network's own head, in fp32, for its last feature map: NCHW to (images, classes)."""
    features = torch.from_numpy(np.ascontiguousarray(feature_map))
    with torch.inference_mode():
        if isinstance(
            network, EfficientNet
        ):  # its last stage ends before this convolution, its forward_head begins after
            features = network.bn2(network.conv_head(features))
        return network.forward_head(features)  # type: ignore[no-any-return]


def answer(logits: torch.Tensor) -> Answer:
    """Return the most probable of ImageNet's 1000 classes. timm carries their names; the first of the synonyms is taken."""
    probabilities = logits.softmax(0)
    index = int(probabilities.argmax())
    synonyms = ImageNetInfo("imagenet-1k").index_to_description(index)
    return Answer(index, synonyms.partition(",")[0], float(probabilities[index]))


def table(rows: Sequence[Comparison], title: str) -> Table:
    """Return a table for a terminal of 80 columns."""
    shown = Table("photograph", title=title)
    for engine in ("fp32", "int8"):
        shown.add_column(engine)
        shown.add_column("", justify="right")
    shown.add_column("same")
    for row in rows:
        answers = [cell for one in (row.fp32, row.engine) for cell in (one.name, f"{one.probability:.2f}")]
        shown.add_row(row.photograph, *answers, "yes" if row.agrees else "no")
    return shown


def agreement(rows: Sequence[Comparison]) -> str:
    """Return the line that counts the photographs with the same answer."""
    return f"top-1 agreement fp32/int8: {sum(row.agrees for row in rows)} of {len(rows)}"
