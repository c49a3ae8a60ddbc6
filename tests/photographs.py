"""Fixtures for suites that build from real photographs; import them in a conftest. Nothing here needs torch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from edge_backbones.deploy import timing


@pytest.fixture(scope="session", autouse=True)
def quick_timing() -> Iterator[None]:
    """Time engines with one call each: a build that has several times them, and no test depends on their speed."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"_ROUNDS": 1, "_WARM_UP": 1, "_CALLS": 1, "_SECONDS": 0.0}.items():
            patch.setattr(timing, name, value)
        yield


@pytest.fixture(scope="session")
def photographs() -> list[np.ndarray]:
    """Real photographs of several sizes, landscape and square: uint8 (height, width, 3)."""
    from skimage import data

    return [data.coffee(), data.astronaut(), data.chelsea(), data.rocket()]


@pytest.fixture(scope="session")
def photograph_folder(photographs: list[np.ndarray], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten crops of photographs as files of two formats, in a folder and a folder below it, and one that is no image."""
    folder = tmp_path_factory.mktemp("photographs")
    (folder / "more").mkdir()
    for index, crop in enumerate(crops(photographs, 10, 130, 170)):
        name = f"more/{index}.png" if index % 3 == 0 else f"{index}.jpg"
        Image.fromarray(crop).save(folder / name)
    (folder / "broken.jpg").write_text("no image")
    return folder


def crops(photographs: list[np.ndarray], count: int, height: int, width: int) -> np.ndarray:
    """``count`` different uint8 crops of photographs: (count, height, width, 3)."""
    random = np.random.default_rng(0)
    cut = []
    for index in range(count):
        photograph = photographs[index % len(photographs)]
        top = random.integers(photograph.shape[0] - height + 1)
        left = random.integers(photograph.shape[1] - width + 1)
        cut.append(photograph[top : top + height, left : left + width])
    return np.stack(cut)
