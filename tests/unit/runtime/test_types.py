"""What a type checker, and so an editor, knows of the output of a call."""

from __future__ import annotations

from pathlib import Path

from mypy import api

SOURCE = """
from typing import Any
import numpy as np
from edge_backbones import DeviceArray, EdgeBackbone

def f(backbone: EdgeBackbone, image: np.ndarray, on_gpu: DeviceArray, unknown: Any, stage: str) -> None:
    maps = backbone(image).feature_maps
    reveal_type(maps)
    reveal_type(backbone(image, return_dict=False))
    reveal_type(backbone(on_gpu).feature_maps)
    reveal_type(backbone(unknown).feature_maps)
    maps[0].is_no_attribute_of_an_array
"""


def test_feature_maps_are_arrays_for_a_type_checker(tmp_path):
    file = tmp_path / "user.py"
    file.write_text(SOURCE)
    config = Path(__file__).parents[3] / "pyproject.toml"
    said, _, _ = api.run(["--no-error-summary", "--config-file", str(config), str(file)])
    lines = [line.partition(": ")[2] for line in said.splitlines()]
    array = "numpy.ndarray[tuple[Any, ...], numpy.dtype[Any]]"
    assert lines[:4] == [
        f'note: Revealed type is "tuple[{array}, ...]"',
        f'note: Revealed type is "tuple[tuple[{array}, ...], ...]"',
        'note: Revealed type is "tuple[edge_backbones.engines.gpu.arrays.DeviceArray, ...]"',
        'note: Revealed type is "tuple[Any, ...]"',
    ]
    assert 'has no attribute "is_no_attribute_of_an_array"' in lines[4]
