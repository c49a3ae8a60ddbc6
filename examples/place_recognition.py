"""Find the place that a photograph was taken at: compare it with one photograph of every place, and print the ranking.

Needs a bundle of a trained network, a folder of places, and the extras `cpu` and `images` (or another engine than OpenVINO).

    python examples/place_recognition.py samples/features.bundle samples/places samples/queries/china.jpg

A photograph is described by one vector: the generalised mean over the positions of a feature map (GeM: Radenović, Tolias,
Chum, "Fine-tuning CNN Image Retrieval with No Human Annotation", TPAMI 2019). Vectors are compared by their cosine. A network
that was trained for places (NetVLAD, MixVPR, DINOv2 with SALAD) tells more places apart than one of ImageNet.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from edge_backbones import EdgeBackbone

POWER = 3  # 1 is the mean; the greater it is, the nearer to the maximum


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("places", type=Path, help="a folder with one photograph of each place")
    parser.add_argument("query", type=Path, help="the photograph whose place is asked for")
    parser.add_argument("--stage", help="the stage whose map is pooled; by default the last")
    arguments = parser.parse_args()

    places = sorted(arguments.places.iterdir())
    with EdgeBackbone.from_pretrained(arguments.bundle) as backbone:
        backbone.out_features = [arguments.stage or backbone.out_features[-1]]
        cosines = describe(backbone, places) @ describe(backbone, [arguments.query])[0]
    for place in np.argsort(-cosines):
        print(f"{cosines[place]:.3f}  {places[place].name}")


def describe(backbone: EdgeBackbone, photographs: Sequence[Path]) -> np.ndarray:
    """Return a vector of length 1 for each photograph: (photographs, channels)."""
    vectors = []
    for output in backbone.map(map(backbone.preprocess, photographs), in_flight=2):
        (feature_map,) = output.feature_maps  # (1, channels, height, width)
        vector = (np.maximum(feature_map[0], 1e-6) ** POWER).mean(axis=(1, 2)) ** (1 / POWER)
        vectors.append(vector / np.linalg.norm(vector))
    return np.stack(vectors)


if __name__ == "__main__":
    main()
