"""How far our pixels are from those of transformers' own image processors, for every class that backbones and models with
one come with: ``python -m build_scripts.processor_table`` writes benchmarks/results/preprocessing.md.

Real photographs, landscape and portrait, larger and smaller than the network's input. Ours: `fit`, then the part of the graph
that normalises. A grey level is 1/255 of what a pixel can be.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers
from PIL import Image
from torch import nn

from build_scripts.photographs import photographs
from edge_backbones.images.fit import fit
from edge_backbones.toolchain.prepare import _FromImage
from edge_backbones.toolchain.sources.processors import Preprocessing, of_processor, pixels_of

OUT = Path("benchmarks/results/preprocessing.md")


class Case(NamedTuple):
    """An image processor class to compare.

    ``name``: of the class, without ImageProcessor. ``of``: the models that use it. ``since``: the release of
    transformers from which on it needs no files of the hub.
    """

    name: str
    of: str
    options: dict[str, Any]
    since: int = 4


def _square(side: int) -> dict[str, int]:
    return {"height": side, "width": side}


_SHORT = {"size": {"shortest_edge": 160, "longest_edge": 266}}
CASES = (
    Case("Beit", "beit", {}),
    Case("Beit", "beit", {"size": _square(256), "do_center_crop": True, "crop_size": _square(224)}),
    Case("Bit", "bit, focalnet, hiera, pixio", {}),
    Case("Bit", "dinov2", {"size": {"shortest_edge": 256}, "crop_size": _square(224)}),
    Case("Bit", "a crop of odd sides", {"size": {"shortest_edge": 237}, "crop_size": {"height": 211, "width": 211}}),
    Case("ConvNext", "convnext, convnextv2, resnet", {"size": {"shortest_edge": 224}, "crop_pct": 0.875}),
    Case("ConvNext", "convnext at 384", {}),
    Case("DINOv3ViT", "dinov3_vit, dinov3_convnext", {}),
    Case("PPLCNet", "pp_lcnet", {}),
    Case("Pvt", "pvt_v2", {}),
    Case("Sapiens2", "sapiens2", {"size": {"height": 256, "width": 192}}),
    Case("Sapiens2", "sapiens2", {"size": {"height": 256, "width": 192}, "do_pad": True}),
    Case("TextNet", "textnet", {"size": {"shortest_edge": 160}}),
    Case("Tipsv2", "tipsv2", {"size": _square(224)}),
    Case("ViT", "swin, swinv2, dinat", {}),
    Case("ViT", "pixels in 0..1", {"do_normalize": False}),
    Case("ViT", "pixels in 0..255", {"do_normalize": False, "do_rescale": False}),
    Case("ViT", "pixels in -1..1", {"rescale_factor": 1 / 127.5, "image_mean": [1.0] * 3, "image_std": [1.0] * 3}),
    Case("ViT", "not square", {"size": {"height": 160, "width": 256}, "resample": 3}),
    Case("ConditionalDetr", "conditional_detr", _SHORT),
    Case("DeformableDetr", "deformable_detr, lw_detr", _SHORT),
    Case("Detr", "detr, table-transformer, omdet-turbo", _SHORT),
    Case("Detr", "at most as high and wide", {"size": {"max_height": 160, "max_width": 200}}),
    Case("GroundingDino", "grounding-dino, mm-grounding-dino", _SHORT),
    Case("RTDetr", "rt_detr, rt_detr_v2, d_fine, deimv2", {"size": _square(320)}),
    Case("RfDetr", "rf_detr", _SHORT),
    Case("PPDocLayoutV2", "pp_doclayout_v2", {"size": _square(320)}),
    Case("PPDocLayoutV3", "pp_doclayout_v3", {"size": _square(320)}),
    Case("Mask2Former", "mask2former", _SHORT),
    Case("MaskFormer", "maskformer", _SHORT),
    Case("OneFormer", "oneformer", _SHORT, since=5),
    Case("Segformer", "upernet", {"size": _square(256)}),
    Case("DPT", "dpt", {}),
    Case("DPT", "depth_anything", {"size": _square(196), "keep_aspect_ratio": True, "ensure_multiple_of": 14}),
    Case("PromptDepthAnything", "prompt_depth_anything", {"size": _square(196)}),
    Case("CHMv2", "chmv2", {"do_resize": True, "size": _square(192)}),
    Case("Tvp", "tvp", {"size": {"longest_edge": 224}, "crop_size": _square(224), "pad_size": _square(224)}),
    Case("PPOCRV5ServerDet", "pp_ocrv5", {"limit_side_len": 320}),
    Case("SLANeXt", "slanext, slanet", {"size": _square(256), "pad_size": _square(256)}),
    Case("UVDoc", "uvdoc", {"size": {"height": 178, "width": 122}}),
    Case("MobileViT", "mobilevit (reverses channels)", {"size": {"shortest_edge": 288}, "crop_size": _square(256)}),
)  # fmt: skip
NOTED = (
    Case("PPOCRV5ServerRec", "lines of text", {}),
    Case("VitMatte", "vitmatte", {}),
    Case("VitPose", "vitpose", {}),
    Case("ZoeDepth", "zoedepth", {}),
)
"""Their transform is no function of a photograph and a size: the build says so, by name."""


def classes(case: Case) -> list[Any]:
    """Return the classes of a case in this transformers: the one on torchvision, and the one on Pillow and numpy."""
    if int(transformers.__version__.partition(".")[0]) < case.since:
        return []
    names = (f"{case.name}ImageProcessor{back_end}" for back_end in ("", "Fast", "Pil"))
    found = (getattr(transformers, name, None) for name in names)
    return list({kind.__name__: kind for kind in found if kind is not None}.values())  # some names are aliases


def pictures() -> dict[str, Image.Image]:
    """Return photographs: landscape and portrait, and smaller than an input."""
    found = photographs()
    coffee, rocket = found["coffee"], found["rocket"]
    return {
        "landscape": coffee,
        "portrait": rocket.crop((200, 0, 481, 427)),
        "small landscape": coffee.resize((131, 87)),
        "small portrait": rocket.resize((77, 123)),
    }


def largest_difference(processor: Any, preprocessing: Preprocessing) -> float:
    """Return the largest difference in grey levels between a processor's pixels and ours, over all pictures."""
    return max(_difference(preprocessing, picture, pixels_of(processor, picture)) for picture in pictures().values())


def _difference(preprocessing: Preprocessing, picture: Image.Image, theirs: np.ndarray) -> float:
    config = preprocessing.config
    rows, columns = theirs.shape[1:]
    height, width = preprocessing.size or (rows, columns)
    if config.crop_mode == "squash" and config.crop_pct == 1:  # a bundle that is built for what the processor makes
        height, width = rows, columns
    frame = fit(picture, config, height, width)
    with torch.no_grad():
        ours = _FromImage(nn.Identity(), config)(torch.from_numpy(frame[None])).numpy()[0]
    std = np.array(config.std[::-1] if config.channel_order == "bgr" else config.std)
    return float((np.abs(ours[:, :rows, :columns] - theirs) * (255 * std)[:, None, None]).max())


def main() -> None:
    lines = [
        f"transformers {transformers.__version__}, photographs: {', '.join(pictures())}; the largest difference of any "
        "pixel, in grey levels.",
        "",
        "| processor | comes with | what is done | grey levels |",
        "|---|---|---|---|",
    ]
    for case in CASES:
        for kind in classes(case):
            processor = kind(**case.options)
            found = of_processor(processor, "given")
            height, width = found.size or found.usual_size or (224, 224)
            levels = largest_difference(processor, found)
            what = found.config.describe(height, width).partition(", mean")[0]
            lines.append(f"| {kind.__name__} | {case.of} | {what} | {levels:.2f} |")
    lines += ["", "Noted by name when a bundle is built, since no photograph and size alone decide their pixels:", ""]
    for case in NOTED:
        for kind in classes(case):
            lines.append(f"- {' '.join(of_processor(kind(**case.options), 'given').notes)}")
    OUT.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        main()
