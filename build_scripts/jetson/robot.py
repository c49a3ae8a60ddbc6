"""An application on a robot, to start from: frames in, feature maps out, new engines without a restart.

::

    python robot.py /bundles/net.bundle --device cuda

SIGHUP opens the bundle anew, after `edge-backbones compile` has added an engine, say: the one in use serves on until the new
one is ready, and for good if the new one cannot be opened. SIGTERM ends after the frame at hand.
"""

from __future__ import annotations

import argparse
import signal
import time
from collections.abc import Iterator

import numpy as np

from edge_backbones import EdgeBackbone
from edge_backbones.errors import EdgeBackbonesError


def frames(backbone: EdgeBackbone) -> Iterator[np.ndarray]:
    """The camera: here noise, in the shape and dtype that the bundle takes. Put yours in its place."""
    rng, input = np.random.default_rng(0), backbone.input
    frame = rng.integers(0, 256, input.opt_shape, dtype=np.uint8)
    while True:
        yield frame if input.dtype == "uint8" else (frame / np.float32(255)).astype(np.float32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--every", type=float, default=10.0, help="seconds between two lines about the latency")
    given = parser.parse_args()

    asked: set[str] = set()
    signal.signal(signal.SIGTERM, lambda *_: asked.add("end"))
    signal.signal(signal.SIGINT, lambda *_: asked.add("end"))
    signal.signal(signal.SIGHUP, lambda *_: asked.add("open"))

    backbone = EdgeBackbone.from_pretrained(given.bundle, device=given.device)
    print(f"{backbone.engine}: {', '.join(backbone.out_features)}", flush=True)
    milliseconds: list[float] = []
    told = time.monotonic()
    for frame in frames(backbone):
        begin = time.perf_counter()
        backbone(frame).feature_maps  # noqa: B018  # what drives the robot goes here
        milliseconds.append(1e3 * (time.perf_counter() - begin))
        if time.monotonic() - told > given.every:
            median, p99 = np.percentile(milliseconds, (50, 99))
            print(f"{len(milliseconds)} frames: median {median:.2f} ms, p99 {p99:.2f} ms", flush=True)
            milliseconds, told = [], time.monotonic()
        if "open" in asked:
            asked.remove("open")
            try:
                new = EdgeBackbone.from_pretrained(given.bundle, device=given.device)
            except EdgeBackbonesError as error:
                print(f"serving on with the engine in use: {error}", flush=True)
            else:
                backbone.close()
                backbone = new
                print(f"changed to {backbone.engine}", flush=True)
        if "end" in asked:
            break
    backbone.close()


if __name__ == "__main__":
    main()
