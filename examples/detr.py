"""Find objects in a photograph with DETR of transformers, whose backbone is a compiled bundle, and draw their boxes.

Needs a DETR, a bundle of its backbone, and the extra `build` (torch, transformers): torch runs what follows the backbone.

    edge-backbones build samples/detr samples/detr.bundle --from-model --size 480x640 --images samples/photographs
    python examples/detr.py samples/detr samples/detr.bundle samples/queries/astronaut.jpg samples/boxes.png

The network in samples/detr has random weights, so its boxes mean nothing. With a model hub, take facebook/detr-resnet-50 in
the place of samples/detr in both commands, and --threshold 0.7.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw
from transformers import AutoImageProcessor, DetrForObjectDetection

from edge_backbones import Bundle
from edge_backbones.integrations.transformers import replace_backbone


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a name of the model hub, or a folder that save_pretrained wrote")
    parser.add_argument("bundle", type=Path, help="built from the same model with --from-model")
    parser.add_argument("photograph", type=Path)
    parser.add_argument("out", type=Path, help="the picture to write: the photograph with boxes")
    parser.add_argument("--threshold", type=float, default=0.0, help="the least probability of a box")
    arguments = parser.parse_args()

    photograph = Image.open(arguments.photograph).convert("RGB")
    model = DetrForObjectDetection.from_pretrained(arguments.model).eval()
    processor = AutoImageProcessor.from_pretrained(arguments.model)
    size = Bundle.open(arguments.bundle).manifest.input  # of the images that the engine takes
    inputs = processor(
        images=photograph, size={"height": size.height.opt, "width": size.width.opt}, return_tensors="pt"
    )
    in_torch = detect(model, inputs)
    replace_backbone(model, arguments.bundle)
    compiled = detect(model, inputs)
    difference = (in_torch.pred_boxes - compiled.pred_boxes).abs().max().item()
    print(f"boxes differ from those in torch by at most {difference:.5f} of the photograph's width or height")

    found = processor.post_process_object_detection(
        compiled, threshold=arguments.threshold, target_sizes=[(photograph.height, photograph.width)]
    )[0]
    pen = ImageDraw.Draw(photograph)
    for index in found["scores"].argsort(descending=True)[:10]:
        name = f"{model.config.id2label[found['labels'][index].item()]} {found['scores'][index]:.2f}"
        left, upper, right, lower = found["boxes"][index].tolist()
        pen.rectangle((left, upper, right, lower), outline="red", width=3)
        pen.text((left + 6, upper + 6), name, fill="red", font_size=16)
        print(f"{name}: {left:.0f}, {upper:.0f} to {right:.0f}, {lower:.0f}")
    photograph.save(arguments.out)


def detect(model: DetrForObjectDetection, inputs: dict[str, torch.Tensor]) -> Any:
    """Return boxes (1, queries, 4), logits (1, queries, classes + 1), and what the encoder makes of the feature map."""
    with torch.inference_mode():
        return model(**inputs)


if __name__ == "__main__":
    main()
