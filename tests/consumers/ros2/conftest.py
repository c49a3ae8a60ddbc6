"""The node and the rest of a robot, in two processes over the real rclpy and Fast DDS, and small bundles."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).parents[3]
STAGES = ["layer2", "layer3", "layer4"]
SIZE = {"height": 64, "width": 96}
FRAME = (90, 120)  # of the camera


def python_of_ros() -> Path:
    """The Python whose environment holds ROS 2. Its wheels start Python again at every start, so the tests' own has none."""
    found = Path(sys.prefix) / "ros2" / "bin" / "python"
    assert (found.parents[1] / ".installed").exists(), f"ROS 2 is not installed: make {sys.prefix}/ros2/.installed"
    return found


def environment() -> dict[str, str]:
    """Messages go through shared memory, in a domain of this process: no network, and no other test, takes part."""
    return {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "FASTDDS_BUILTIN_TRANSPORTS": "SHM",
        "ROS_DOMAIN_ID": str(1 + os.getpid() % 100),
        "RCUTILS_LOGGING_USE_STDOUT": "0",
        "RCUTILS_COLORIZED_OUTPUT": "0",
        "OMP_NUM_THREADS": "1",
    }


class Robot:
    """The process of robot.py: `robot.do("send", ...)` is a command of it, and returns its answer."""

    def __init__(self, folder: Path) -> None:
        command = [python_of_ros(), Path(__file__).with_name("robot.py")]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self._process = subprocess.Popen(command, env=environment(), **pipes)
        self._folder = folder
        self._files = 0

    def do(self, what: str, **arguments: Any) -> dict[str, Any]:
        print(json.dumps({"do": what, **arguments}), file=self._process.stdin, flush=True)
        answer = json.loads(self._process.stdout.readline())
        assert "error" not in answer, answer["error"]
        return answer

    def file(self, values: np.ndarray) -> str:
        """Write the bytes of an image for the process."""
        self._files += 1
        path = self._folder / f"image_{self._files}.npy"
        np.save(path, values)
        return str(path)

    def maps(self, values: np.ndarray, **fields: Any) -> dict[str, np.ndarray]:
        """Send an image, and return the maps that come back with its header."""
        out = self._folder / "maps.npz"
        fields = {"stages": STAGES, **fields}
        assert self.do("send", file=self.file(values), out=str(out), **fields)["header_is_kept"]
        with np.load(out) as file:
            return dict(file)

    def close(self) -> None:
        self._process.communicate(timeout=60)


class Node:
    """The process of the node, as ``ros2 run`` starts it. ``log``: what it wrote, once it has ended."""

    def __init__(self, folder: Path, parameters: dict[str, Any]) -> None:
        values = {"output": "multi_array", "threads": 1, "diagnostics_period": 0.2, **parameters}
        given = [word for name, value in values.items() for word in ("-p", f"{name}:={json.dumps(value)}")]
        command = [python_of_ros(), "-m", "edge_backbones.integrations.ros2", "--ros-args", *given]
        path = os.pathsep.join((str(ROOT), str(folder)))  # a test may lay a package into its folder
        self._path = folder / "node.log"
        with self._path.open("w") as log:
            self._process = subprocess.Popen(
                command, env={**environment(), "PYTHONPATH": path}, cwd=folder, stdout=log, stderr=log
            )

    @property
    def log(self) -> str:
        return self._path.read_text()

    def end(self, number: signal.Signals = signal.SIGINT) -> int:
        """Send a signal, and return the exit status."""
        self._process.send_signal(number)
        return self._process.wait(timeout=60)


@pytest.fixture
def robot(tmp_path: Path) -> Iterator[Robot]:
    """The rest of the robot."""
    made = Robot(tmp_path)
    with contextlib.closing(made):
        yield made


@pytest.fixture
def start_node(tmp_path: Path) -> Iterator[Callable[..., Node]]:
    """Start the node with some parameters. It has to end well."""
    started: list[Node] = []

    def start(**parameters: Any) -> Node:
        started.append(Node(tmp_path, parameters))
        return started[-1]

    yield start
    for node in started:
        if node._process.poll() is None:
            assert node.end() == 0, node.log
        assert "Traceback" not in node.log


@pytest.fixture(scope="session")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bundles of a small network: pixels, image and nv12 by their input, and other of other weights and fewer stages."""
    from edge_backbones import BuildOptions, build_bundle

    folder = tmp_path_factory.mktemp("bundles")
    given: dict[str, dict[str, Any]] = {
        "pixels": {"weights": "random:0", **SIZE},
        "image": {"weights": "random:0", "input": "image", **SIZE},
        "nv12": {"weights": "random:0", "input": "frame", "frame": FRAME, "color": "nv12", **SIZE},
        "other": {"weights": "random:1", "input": "image", **SIZE},
        "fewer": {"weights": "random:0", "input": "image", "out_indices": (4,), **SIZE},
    }
    for name, options in given.items():
        all_options = {"out_indices": (2, 3, 4), "precisions": "fp32", "torchscript": False, **options}
        build_bundle("test_resnet", folder / name, options=BuildOptions(**all_options))
    return folder
