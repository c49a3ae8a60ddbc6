"""Watch a camera: print once a second how many frames the backbone sees, and how far the scene is from the first frame.

Needs a bundle and a camera, and the extras `cpu` and `video` (or another engine than OpenVINO).

    python examples/camera.py samples/features.bundle 0

0 is the first camera. The path of a device, an address (rtsp://...) and a video work too. Of a camera only the newest frame
is taken, so the program never lags behind: frames that come too fast are dropped and counted. Ctrl-C ends it.
"""

import argparse
from itertools import tee

import numpy as np

from edge_backbones import EdgeBackbone
from edge_backbones.images.sources import frames


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle")
    parser.add_argument("camera")
    parser.add_argument("--limit", type=int, help="end after so many frames")
    arguments = parser.parse_args()

    first, count, printed = None, 0, 0.0
    with (
        EdgeBackbone.from_pretrained(arguments.bundle) as backbone,
        frames(arguments.camera, limit=arguments.limit) as source,
    ):
        shown, taken = tee(source)
        outputs = backbone.map((backbone.preprocess(frame.pixels) for frame in taken), in_flight=2)
        for frame, output in zip(shown, outputs):
            vector = output.feature_maps[-1][0].mean(axis=(1, 2))
            vector /= np.linalg.norm(vector)
            first = vector if first is None else first
            count += 1
            if frame.seconds - printed >= 1:
                rate = count / (frame.seconds - printed)
                distance = 1 - first @ vector  # 0: the same scene
                print(f"{frame.seconds:.0f} s: {rate:.1f} frames/s, {source.dropped} dropped, distance {distance:.2f}")
                count, printed = 0, frame.seconds


if __name__ == "__main__":
    main()
