"""Test how names of devices are read."""

from __future__ import annotations

import pytest

from edge_backbones.errors import InputError
from edge_backbones.machine.devices import parse_device


@pytest.mark.parametrize(
    ("device", "found"),
    [
        ("auto", ("auto", 0)),
        ("cpu", ("cpu", 0)),
        ("cuda", ("cuda", 0)),
        ("cuda:0", ("cuda", 0)),
        ("cuda:12", ("cuda", 12)),
    ],
)
def test_a_device_is_a_kind_and_an_index(device, found):
    assert parse_device(device) == found


@pytest.mark.parametrize("device", ["", "gpu", "Auto", "cpu:0", "cuda:", "cuda:1000", "cuda:1 ", "cuda:-1", None, 1])
def test_other_text_is_refused(device):
    with pytest.raises(InputError, match="device must be 'auto', 'cpu', 'cuda' or 'cuda:<index>', got"):
        parse_device(device)
