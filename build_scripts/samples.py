"""What the programs in ``examples/`` are tried with: ``python -m build_scripts.samples`` writes it to ``samples/``.

Photographs and textures are from scikit-image and scikit-learn, and ImageNet's weights from the package that the demo takes
(:mod:`build_scripts.lite0`): nothing is downloaded. ``make demo`` installs all of it.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from importlib import resources
from pathlib import Path

import numpy as np
from PIL import Image, ImageEnhance

from build_scripts.lite0 import write_checkpoint
from build_scripts.photographs import photographs, write_crops
from edge_backbones.errors import MissingDependencyError

FRAME_RATE = 25
SECONDS_PER_SCENE = 2
SCENES = ("coffee", "astronaut", "china")
CLIP_SIZE = 320, 240  # columns, rows
PIECE = 256  # side of a piece of a texture
DEFECT = 150, 60, 190, 110  # left, upper, right and lower end of what is wrong in defect.png


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=Path("samples"))
    folder = parser.parse_args().folder
    write_samples(folder)
    print(f"wrote {', '.join(sorted(path.name for path in folder.iterdir()))} to {folder}")


def write_samples(folder: Path) -> None:
    """Write photographs, places and queries, textures, a clip, ImageNet's weights and an untrained DETR."""
    write_crops(folder / "photographs", 40)
    write_places(folder)
    write_textures(folder)
    write_clip(folder / "clip.mp4")
    write_checkpoint(folder / "lite0.safetensors")
    write_detr(folder / "detr")


def write_places(folder: Path) -> None:
    """Write a photograph of each place, and what another camera sees of it: a part of it, brighter and in paler colours."""
    for kind in ("places", "queries"):
        (folder / kind).mkdir(parents=True, exist_ok=True)
    for name, photograph in photographs().items():
        photograph.thumbnail((640, 640))
        photograph.save(folder / "places" / f"{name}.jpg")
        width, height = photograph.size
        part = photograph.crop((round(0.2 * width), round(0.1 * height), round(0.95 * width), round(0.85 * height)))
        brighter = ImageEnhance.Color(ImageEnhance.Brightness(part).enhance(1.4)).enhance(0.6)
        brighter.save(folder / "queries" / f"{name}.jpg")


def write_textures(folder: Path) -> None:
    """Write pieces of a brick wall without a fault, and one with gravel where there should be brick."""
    (folder / "good").mkdir(parents=True, exist_ok=True)
    brick, gravel = (_texture(name) for name in ("brick", "gravel"))
    random = np.random.default_rng(0)
    for index in range(20):
        left, top = (int(random.integers(0, length - PIECE + 1)) for length in brick.size)
        brick.crop((left, top, left + PIECE, top + PIECE)).save(folder / "good" / f"{index:02d}.png")
    damaged = brick.crop((128, 128, 128 + PIECE, 128 + PIECE))
    damaged.paste(gravel.crop(DEFECT), DEFECT[:2])
    damaged.save(folder / "defect.png")


def _texture(name: str) -> Image.Image:
    with resources.files("skimage.data").joinpath(f"{name}.png").open("rb") as file, Image.open(file) as image:
        return image.convert("RGB")


def write_clip(path: Path) -> None:
    """Write a video of a camera that moves over photographs. Raises MissingDependencyError without PyAV."""
    try:
        import av
    except ImportError as error:
        raise MissingDependencyError("writing a video", "video") from error
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=FRAME_RATE)
        stream.width, stream.height = CLIP_SIZE
        stream.bit_rate = 2_000_000
        for picture in _scenes():
            container.mux(stream.encode(av.VideoFrame.from_image(picture)))
        container.mux(stream.encode())


def _scenes() -> Iterator[Image.Image]:
    images = photographs()
    width, height = CLIP_SIZE
    for name in SCENES:
        photograph = images[name]
        scale = 1.3 * max(width / photograph.width, height / photograph.height)
        photograph = photograph.resize((round(photograph.width * scale), round(photograph.height * scale)))
        for step in np.linspace(0, 1, FRAME_RATE * SECONDS_PER_SCENE):
            left = round(step * (photograph.width - width))
            top = round(step * (photograph.height - height))
            yield photograph.crop((left, top, left + width, top + height))


def write_detr(folder: Path) -> None:
    """Write a DETR with random weights: small, without a model hub, and blind."""
    import torch
    from transformers import DetrConfig, DetrForObjectDetection, DetrImageProcessor, TimmBackboneConfig

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = DetrConfig(
            backbone_config=TimmBackboneConfig(backbone="resnet18", out_indices=[4]),
            encoder_layers=2,
            decoder_layers=2,
            num_queries=20,
        )
        DetrForObjectDetection(config).save_pretrained(folder)
    DetrImageProcessor(size={"height": 480, "width": 640}).save_pretrained(folder)


if __name__ == "__main__":
    main()
