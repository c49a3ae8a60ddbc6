"""Two bundles, and the Python that has GStreamer: an environment of the system's Python, made by make test-consumers."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.photographs import quick_timing

__all__ = ["quick_timing"]

ROOT = Path(__file__).parents[3]
EXAMPLE = ROOT / "examples" / "gstreamer.py"
HEIGHT, WIDTH = 90, 234  # GStreamer pads rows to multiples of 4 bytes: RGB to 704, the luma of NV12 to 236

# What is typed at gst-launch-1.0, which is a package of its own.
_LAUNCH = """
import sys, gi
gi.require_version("Gst", "1.0")
from gi.repository import Gst
Gst.init(None)
pipeline = Gst.parse_launch(sys.argv[1])
pipeline.set_state(Gst.State.PLAYING)
message = pipeline.get_bus().timed_pop_filtered(20 * Gst.SECOND, Gst.MessageType.EOS | Gst.MessageType.ERROR)
pipeline.set_state(Gst.State.NULL)
assert message is not None and message.type == Gst.MessageType.EOS, message and message.parse_error()
"""


@pytest.fixture(scope="session")
def python() -> str:
    """The Python of the environment."""
    environment = Path(sys.prefix) / "gstreamer"
    assert (environment / ".installed").exists(), (
        f"there is no environment with GStreamer: make {environment.parent.name}/gstreamer/.installed"
    )
    return str(environment / "bin" / "python")


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``rgb.bundle`` and ``nv12.bundle``, whose frames are HEIGHT x WIDTH: treat it as read-only."""
    import timm
    import torch

    from edge_backbones import BuildOptions, build_bundle

    made = tmp_path_factory.mktemp("gstreamer")
    torch.manual_seed(0)
    net = timm.create_model("test_resnet", features_only=True, out_indices=(1, 2, 3, 4)).eval()
    options = {"precisions": "fp32", "torchscript": False, "golden": 1, "cache": None, "height": 96, "width": 96}
    build_bundle(net, made / "rgb.bundle", options=BuildOptions(**options))
    of_frames = BuildOptions(**options, input="frame", frame=(HEIGHT, WIDTH), color="nv12")
    build_bundle(net, made / "nv12.bundle", options=of_frames)
    return made


@pytest.fixture(scope="session")
def environment() -> dict[str, str]:
    """The variables of a process: this tree goes first, and GStreamer says its reasons in English."""
    return {**os.environ, "PYTHONPATH": str(ROOT), "LANG": "C.UTF-8", "LC_ALL": "C.UTF-8"}


@pytest.fixture
def example(python: str, environment: dict[str, str], folder: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run the example on a bundle of the folder, a source and a sink."""

    def run(bundle: str, source: str, sink: str, *more: object) -> subprocess.CompletedProcess[str]:
        command = [python, str(EXAMPLE), str(folder / bundle), source, sink, *map(str, more)]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

    return run


@pytest.fixture
def in_python(python: str, environment: dict[str, str]) -> Callable[..., str]:
    """Run code in the environment, in the folder of the example; return what it prints."""

    def run(code: str, *arguments: object) -> str:
        command = [python, "-c", code, *map(str, arguments)]
        done = subprocess.run(command, env=environment, cwd=EXAMPLE.parent, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


@pytest.fixture
def launch(in_python: Callable[..., str]) -> Callable[[str], str]:
    """Run a pipeline until its end."""
    return lambda pipeline: in_python(_LAUNCH, pipeline)
