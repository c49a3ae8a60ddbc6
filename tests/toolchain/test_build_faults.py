"""A build on a disk that takes nothing more: the true cause, and the old bundle whole."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from edge_backbones.bundle.onnx_gate import graph_fault
from edge_backbones.bundle.reader import Bundle
from edge_backbones.errors import BundleError
from edge_backbones.spec import Precision
from edge_backbones.toolchain.build import build_bundle
from edge_backbones.toolchain.options import BuildOptions
from edge_backbones.toolchain.sources.module_source import ModuleSource
from tests.faults import failing

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the operations and limits are those of Linux")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 16, 3, 2, 1)

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        first = torch.relu(self.first(pixel_values))
        return first, torch.relu(self.second(first))


def build(target: Path, *precisions: Precision) -> None:
    images = [np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8) for _ in range(4)]
    source = ModuleSource(module=Net().eval(), stage_names=["first", "second"], size=(64, 64))
    wanted = precisions or (Precision.FP32,)
    method = "max" if Precision.INT8 in wanted else None
    options = BuildOptions(precisions=wanted, method=method, golden=2, cache=None)
    build_bundle(source, target, images=images, overwrite=True, options=options)


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("faults") / "net.bundle"
    build(path, Precision.FP32, Precision.INT8)
    return path


def test_every_graph_that_is_written_passes_the_gate(target):
    graphs = sorted((target / "graphs").glob("*.onnx"))
    assert [path.name for path in graphs] == ["fp32.onnx", "int8.onnx"]
    assert [graph_fault(path.read_bytes()) for path in graphs] == [None, None]


@pytest.mark.parametrize(
    ("number", "cause"),
    [
        (4, errno.EACCES),  # the folder beside the target
        (6, errno.ENOSPC),  # the images
        (7, errno.EDQUOT),  # the exported graph
        (8, errno.EROFS),
        (9, errno.EIO),
        (10, errno.EMFILE),
        (11, errno.ENOSPC),
    ],
)
def test_an_error_of_the_disk_comes_out_as_it_is_and_the_old_bundle_stays(target, number, cause):
    before = Bundle.open(target).manifest.digest
    with failing(target.parent, number, cause) as never, pytest.raises(BundleError, match=os.strerror(cause)) as caught:
        build(target)
    assert not never()
    assert "\n" not in str(caught.value)
    now = Bundle.open(target)
    assert now.manifest.digest == before
    now.check_files()
    assert [path.name for path in target.parent.iterdir()] == [target.name]


@pytest.fixture
def limited() -> Callable[[int], None]:
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("size", [3_000, 20_000])
def test_a_file_that_grows_beyond_the_limit_says_so(target, limited, size):
    """Writing fails in the middle of a file, as on a full disk: first for a graph, then for images."""
    before = Bundle.open(target).manifest.digest
    limited(size)
    with pytest.raises(BundleError, match=r"was not written: File too large.*ulimit -f unlimited"):
        build(target)
    limited(-1)
    assert Bundle.open(target).manifest.digest == before
    assert [path.name for path in target.parent.iterdir()] == [target.name]


def test_an_error_of_the_images_is_not_blamed_on_the_disk(target):
    def images():
        raise FileNotFoundError(errno.ENOENT, "No such file or directory", "/nowhere/photograph.jpg")
        yield

    source = ModuleSource(module=Net().eval(), stage_names=["first", "second"], size=(64, 64))
    with pytest.raises(FileNotFoundError, match="photograph"):
        build_bundle(
            source, target, images=images(), overwrite=True, options=BuildOptions(precisions=(Precision.FP32,))
        )
