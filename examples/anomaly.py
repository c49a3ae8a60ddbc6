"""Show what is wrong in a photograph: each place is compared with all places of photographs in which nothing is wrong.

Needs a bundle of a trained network with stages of strides 8 and 16, photographs of good pieces, one of the piece to inspect,
and the extras `cpu` and `images` (or another engine than OpenVINO).

    python examples/anomaly.py samples/features.bundle samples/good samples/defect.png samples/heat.png

It is the idea of PatchCore (Roth and others, "Towards Total Recall in Industrial Anomaly Detection", CVPR 2022): features of
the two middle stages, averaged over 3 x 3 cells, and the distance to the nearest in a memory of good ones. PatchCore then
thins out the memory, which this program leaves out.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from edge_backbones import Bundle, EdgeBackbone, fit


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("good", type=Path, help="a folder of photographs in which nothing is wrong")
    parser.add_argument("inspected", type=Path, help="the photograph to look at")
    parser.add_argument("out", type=Path, help="the picture to write: what the network sees, and what is wrong in red")
    arguments = parser.parse_args()

    with EdgeBackbone.from_pretrained(arguments.bundle) as backbone:
        memory = describe(backbone, sorted(arguments.good.iterdir()))
        distances = distances_to(memory, describe(backbone, [arguments.inspected])[0])
        rows, columns = backbone.input.height.opt, backbone.input.width.opt
    photograph = Image.open(arguments.inspected).convert("RGB")
    seen = Image.fromarray(fit(photograph, Bundle.open(arguments.bundle).manifest.image, rows, columns))
    usual = max(distances_to(np.delete(memory, i, axis=0), piece).max() for i, piece in enumerate(memory))
    row, column = np.unravel_index(distances.argmax(), distances.shape)
    print(f"farthest from good: cell {row}, {column} of {distances.shape[0]} x {distances.shape[1]}")
    print(f"its distance: {distances.max():.1f}; among good photographs at most {usual:.1f}")

    strength = np.uint8(np.clip(3 * distances / usual - 2.7, 0, 1) * 200)  # none up to 0.9 of what is usual
    mask = Image.fromarray(strength).resize(seen.size, Image.Resampling.BICUBIC)
    Image.composite(Image.new("RGB", seen.size, "red"), seen, mask).save(arguments.out)


def describe(backbone: EdgeBackbone, photographs: Sequence[Path]) -> np.ndarray:
    """Return a vector for each cell of stride 8: (photographs, rows, columns, channels)."""
    stages = zip(backbone.out_features, backbone.strides)
    backbone.out_features = [stage for stage, stride in stages if stride in ((8, 8), (16, 16))]
    fine, coarse = map(averaged, backbone(backbone.preprocess(list(photographs))).feature_maps)
    return np.concatenate([fine, coarse.repeat(2, axis=2).repeat(2, axis=3)], axis=1).transpose(0, 2, 3, 1)


def averaged(maps: np.ndarray) -> np.ndarray:
    """Return the mean of each cell and its eight neighbours."""
    height, width = maps.shape[2:]
    padded = np.pad(maps, ((0, 0), (0, 0), (1, 1), (1, 1)), mode="edge")
    return sum(padded[:, :, y : y + height, x : x + width] for y in range(3) for x in range(3)) / 9


def distances_to(memory: np.ndarray, piece: np.ndarray) -> np.ndarray:
    """Return the distance of each cell of ``piece`` to the nearest vector of ``memory``: (rows, columns)."""
    known, cells = memory.reshape(-1, memory.shape[-1]), piece.reshape(-1, piece.shape[-1])
    squares = (cells**2).sum(1)[:, None] + (known**2).sum(1) - 2 * cells @ known.T
    return np.sqrt(np.maximum(squares.min(axis=1), 0)).reshape(piece.shape[:2])


if __name__ == "__main__":
    main()
