"""Find the cuts of a video: the frames whose features are far from those of the frame before.

Needs a bundle and a video, and the extras `cpu` and `video` (or another engine than OpenVINO).

    python examples/video.py samples/features.bundle samples/clip.mp4

Frames are decoded and resized while the engine works on those before them. `edge-backbones run` writes the feature maps of
a video, and a video of their pictures.
"""

import argparse
from itertools import tee

import numpy as np

from edge_backbones import EdgeBackbone
from edge_backbones.images.sources import frames


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle")
    parser.add_argument("video")
    parser.add_argument("--every", type=int, default=5, help="look at one frame of so many")
    parser.add_argument("--least", type=float, default=0.4, help="the least cosine distance that is a cut")
    arguments = parser.parse_args()

    before = None
    with (
        EdgeBackbone.from_pretrained(arguments.bundle) as backbone,
        frames(arguments.video, every=arguments.every) as source,
    ):
        shown, taken = tee(source)
        outputs = backbone.map((backbone.preprocess(frame.pixels) for frame in taken), in_flight=2)
        for frame, output in zip(shown, outputs):
            vector = output.feature_maps[-1][0].mean(axis=(1, 2))  # of the last stage: what is in the frame, not where
            vector /= np.linalg.norm(vector)
            if before is not None and 1 - before @ vector > arguments.least:
                print(f"cut before {frame.seconds:.2f} s (distance {1 - before @ vector:.2f})")
            before = vector
        print(f"the last frame compared is number {frame.number}, at {frame.seconds:.2f} s")


if __name__ == "__main__":
    main()
