"""Real photographs without a download: crops of the ones that scikit-image and scikit-learn carry in their packages."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

import numpy as np
from PIL import Image

SOURCES = {
    "sklearn.datasets.images": ("china.jpg", "flower.jpg"),
    "skimage.data": ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg", "motorcycle_left.png"),
}
_SMALLEST_CROP = 200


def photographs() -> dict[str, Image.Image]:
    """Return every photograph by name, RGB."""
    found = {}
    for package, names in SOURCES.items():
        for name in names:
            with resources.files(package).joinpath(name).open("rb") as file, Image.open(file) as image:
                found[Path(name).stem] = image.convert("RGB")
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
