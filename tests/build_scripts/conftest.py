"""Photographs, a folder of them, and quick timings, for the tests of build_scripts/."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.photographs import photograph_folder, photographs, quick_timing

__all__ = ["photograph_folder", "photographs", "quick_timing"]


@pytest.fixture
def folder(tmp_path, photographs) -> Path:
    (tmp_path / "photographs").mkdir()
    for index in range(10):
        crop = np.ascontiguousarray(photographs[index % 3][index * 8 : index * 8 + 80, 20:140])
        Image.fromarray(crop).save(tmp_path / "photographs" / f"{index}.png")
    return tmp_path
