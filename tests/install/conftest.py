"""What is installed on a device, and a bundle to run there."""

from __future__ import annotations

import platform
import sys
from pathlib import Path

import pytest

from build_scripts.device_install import OLDEST, build_small, find_oldest_python

_RAN_WITH = pytest.StashKey[str]()


@pytest.fixture(scope="session")
def old_python(request) -> str:
    """Python 3.10, JetPack 6's; the Python of the tests where there is none. The summary says which."""
    found = find_oldest_python()
    told = f"Python {OLDEST} ({found})" if found else f"Python {platform.python_version()}: no {OLDEST} was found here"
    request.config.stash[_RAN_WITH] = told
    return found or sys.executable


def pytest_terminal_summary(terminalreporter, config) -> None:
    if told := config.stash.get(_RAN_WITH, None):
        terminalreporter.write_line(f"tests/install ran with {told}")


@pytest.fixture(scope="session")
def bundle(tmp_path_factory) -> Path:
    """int8 and fp32 of a small network, for this CPU."""
    return build_small(tmp_path_factory.mktemp("bundles") / "net.bundle")
