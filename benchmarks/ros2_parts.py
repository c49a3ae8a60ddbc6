"""The processes of benchmarks.ros2, which run with the Python of .venv/ros2: ``python -m benchmarks.ros2_parts PART``.

``plain``: fit and engine in a loop, without ROS. ``ask``: a camera that sends a frame, and waits for its map. ``soak``: a
camera at a fixed rate. Each prints a line of JSON.
"""

from __future__ import annotations

import argparse
import array
import json
import time
from typing import Any

import numpy as np

SIZE = (480, 640)
NODE = "/edge_backbone"
_WARM_UP = 10
_PATIENCE = 60.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=("plain", "ask", "soak"))
    parser.add_argument("--bundle")
    parser.add_argument("--stage", default="layer4")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--frames", type=int, default=100)
    parser.add_argument("--rate", type=float, default=30.0)
    parser.add_argument("--seconds", type=float, default=60.0)
    given = parser.parse_args()
    print(json.dumps({"plain": plain, "ask": ask, "soak": soak}[given.part](given)), flush=True)


def scene() -> np.ndarray:
    """Return a frame of a camera, the same every time: uint8 (480, 640, 3)."""
    coarse = np.random.default_rng(0).integers(0, 256, (SIZE[0] // 16, SIZE[1] // 16, 3), np.uint8)
    return coarse.repeat(16, 0).repeat(16, 1)


def plain(given: argparse.Namespace) -> dict[str, Any]:
    """Time preprocessing and engine, frame by frame."""
    from edge_backbones import EdgeBackbone

    frame, times = scene(), []
    with EdgeBackbone.from_pretrained(given.bundle, threads=given.threads) as backbone:
        backbone.out_features = [given.stage]
        for _ in range(_WARM_UP + given.frames):
            began = time.perf_counter()
            backbone(backbone.preprocess(frame))
            times.append(1e3 * (time.perf_counter() - began))
    return {"ms": times[_WARM_UP:]}


class Camera:
    """A camera and a reader of the maps of one stage, in one node."""

    def __init__(self, stage: str) -> None:
        import rclpy
        from diagnostic_msgs.msg import DiagnosticArray
        from rclpy.qos import HistoryPolicy, QoSProfile, ReliabilityPolicy
        from sensor_msgs.msg import Image
        from std_msgs.msg import Float32MultiArray

        rclpy.init()
        self.node = rclpy.create_node("camera")
        self._spin_once, self._end = rclpy.spin_once, rclpy.try_shutdown
        self.maps: list[Any] = []
        self.count = 0
        self.said: dict[str, str] = {}
        last = QoSProfile(history=HistoryPolicy.KEEP_LAST, depth=1, reliability=ReliabilityPolicy.RELIABLE)
        self._publisher = self.node.create_publisher(Image, "image", last)
        self.node.create_subscription(Float32MultiArray, f"{NODE}/features/{stage}", self._keep, last)
        self.node.create_subscription(DiagnosticArray, "/diagnostics", self._hear, 10)
        self._message = Image(height=SIZE[0], width=SIZE[1], encoding="rgb8", step=SIZE[1] * 3)
        self._message.data = array.array("B", scene().tobytes())
        self._message.header.frame_id = "camera"
        self.wait(lambda: self._publisher.get_subscription_count() > 0)
        self.wait(lambda: self.node.count_publishers(f"{NODE}/features/{stage}") > 0)
        self.spin(1.0)

    def _keep(self, message: Any) -> None:
        self.maps[:] = [message]
        self.count += 1

    def _hear(self, message: Any) -> None:
        for one in message.status:
            self.said = {value.key: value.value for value in one.values}

    def spin(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            self._spin_once(self.node, timeout_sec=left)

    def wait(self, until: Any) -> None:
        end = time.monotonic() + _PATIENCE
        while not until():
            self._spin_once(self.node, timeout_sec=0.05)
            if time.monotonic() > end:
                raise TimeoutError(f"the node did not answer for {_PATIENCE} s")

    def send(self) -> None:
        self._message.header.stamp = self.node.get_clock().now().to_msg()
        self._publisher.publish(self._message)

    def close(self) -> None:
        self.node.destroy_node()
        self._end()


def ask(given: argparse.Namespace) -> dict[str, Any]:
    """Time a frame from its publication to the map in the reader's callback, and read the node's own figures."""
    camera, times = Camera(given.stage), []
    for _ in range(_WARM_UP + given.frames):
        camera.maps.clear()
        began = time.perf_counter()
        camera.send()
        camera.wait(lambda: camera.maps)
        times.append(1e3 * (time.perf_counter() - began))
    camera.spin(1.5)
    camera.close()
    parts = {name: float(value) for name, value in camera.said.items() if name.endswith("_ms")}
    return {"ms": times[_WARM_UP:], "node": parts}


def soak(given: argparse.Namespace) -> dict[str, Any]:
    """Send frames at a rate for some time; return how many came back, and what the node has counted."""
    camera = Camera(given.stage)
    begin = time.monotonic()
    sent = 0
    while (now := time.monotonic()) < begin + given.seconds:
        due = begin + sent / given.rate
        if now >= due:
            camera.send()
            sent += 1
        else:
            camera._spin_once(camera.node, timeout_sec=due - now)
    camera.spin(2.5)
    camera.close()
    counts = {name: int(value) for name, value in camera.said.items() if value.isdigit()}
    times = {name: float(value) for name, value in camera.said.items() if name.endswith("_ms")}
    return {"sent": sent, "came_back": camera.count, "node": counts, "node_ms": times}


if __name__ == "__main__":
    main()
