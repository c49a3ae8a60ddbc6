"""What is installed on a device, and a bundle to run there."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from skimage import data

from edge_backbones import BuildOptions, build_bundle
from edge_backbones.spec import Precision


@pytest.fixture(scope="session")
def old_python() -> str:
    """A Python 3.10 that starts: a version manager's shim may not. The Python of the tests where there is none."""
    for candidate in ("python3.10", sys.executable):
        found = shutil.which(candidate)
        if found and subprocess.run([found, "-c", ""], capture_output=True, check=False).returncode == 0:
            return found
    raise AssertionError("not even the Python of the tests starts")


@pytest.fixture(scope="session")
def bundle(tmp_path_factory) -> Path:
    """int8 and fp32 of a small network, for this CPU."""
    target = tmp_path_factory.mktemp("bundles") / "net.bundle"
    images = np.stack([data.astronaut()[y : y + 96, x : x + 96] for y in (0, 150, 300) for x in (0, 100, 200, 300)])
    options = BuildOptions(
        weights="random:0",
        precisions=(Precision.INT8, Precision.FP32),
        out_indices=(1, 2, 3, 4),
        height=64,
        width=96,
        torchscript=False,
    )
    return build_bundle("test_resnet", target, images=images, options=options).bundle.path
