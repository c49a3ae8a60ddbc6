"""Tests that need an NVIDIA GPU. Without one every test is skipped, with the reason of the driver probe.

Beyond that a test is left out only for what is not installed, by looking whether it is there (:func:`gpu_engines.missing`): a
library that is there and fails fails the test.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from edge_backbones.machine import gpus


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--bundles", type=Path, help="what benchmarks.gpu_suite --prepare made")
    parser.addoption("--gpu", type=int, default=0, help="index of the GPU")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    reason = gpus.no_gpu_reason()
    for item in items if reason else ():
        if here in item.path.parents:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def gpu(request: pytest.FixtureRequest) -> int:
    """Index of the GPU that is tested."""
    # Without tests/gpu among the arguments pytest reads this file too late for its options.
    return int(request.config.getoption("--gpu", 0))


@pytest.fixture(scope="session")
def bundles(request: pytest.FixtureRequest) -> Path | None:
    """The folder of prepared bundles, if one was named."""
    folder = request.config.getoption("--bundles", None)
    return None if folder is None else Path(folder)
