"""Compute the feature maps of every photograph in a folder, several at a time, and write them to .npz files.

Needs a bundle and a folder of photographs, and the extras `cpu` and `images` (or another engine than OpenVINO).

    python examples/folder.py samples/features.bundle samples/photographs samples/features

Photographs are read and resized while the engine works on those before them. `edge-backbones run` does the same at the
command line, and draws the maps too.
"""

import argparse
from pathlib import Path

import numpy as np

from edge_backbones import EdgeBackbone

BATCH = 8  # photographs in one call


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("photographs", type=Path, help="a folder of .jpg and .png files")
    parser.add_argument("out", type=Path, help="the folder for one .npz file for each photograph")
    arguments = parser.parse_args()

    files = sorted(f for f in arguments.photographs.iterdir() if f.suffix.lower() in (".jpg", ".jpeg", ".png"))
    batches = [files[start : start + BATCH] for start in range(0, len(files), BATCH)]
    arguments.out.mkdir(parents=True, exist_ok=True)
    with EdgeBackbone.from_pretrained(arguments.bundle) as backbone:
        outputs = backbone.map((backbone.preprocess(batch) for batch in batches), in_flight=2)
        for batch, output in zip(batches, outputs):
            for index, file in enumerate(batch):
                maps = {stage: m[index] for stage, m in zip(backbone.out_features, output.feature_maps)}
                np.savez(arguments.out / f"{file.name}.npz", **maps)
            print(f"{len(batch)} photographs, from {batch[0].name} to {batch[-1].name}")


if __name__ == "__main__":
    main()
