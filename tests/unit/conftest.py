"""The unit tests need no torch: they are what runs in minutes, and what a device's own environment could run."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(autouse=True, scope="module")
def _torch_is_not_imported(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail the first module after which torch is loaded, unless other suites run too: those import it."""
    alone = all(Path(__file__).parent in item.path.parents for item in request.session.items)
    yield
    assert not alone or "torch" not in sys.modules, (
        "a unit test, or what it imports, imported torch: move it to tests/toolchain"
    )
