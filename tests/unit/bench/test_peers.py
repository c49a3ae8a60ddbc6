"""What peers are: their interpreters, and what installs them."""

from __future__ import annotations

import sys

import pytest

from edge_backbones.bench import peers
from edge_backbones.bench.compare import CompareOptions
from edge_backbones.errors import InputError


@pytest.mark.parametrize(
    ("peer", "pythons", "expected"),
    [
        ("openvino", {}, sys.executable),
        ("openvino-f32", {"openvino": "other"}, "other"),
        ("openvino-f32", {"openvino": "other", "openvino-f32": "own"}, "own"),
        ("nncf-f32", {"nncf": "other"}, sys.executable),  # NNCF only writes the graph there
    ],
)
def test_a_peer_runs_in_the_interpreter_that_was_named(peer, pythons, expected):
    assert peers.python_of(peer, pythons) == expected


def test_an_engine_of_the_bundle_runs_in_no_other_interpreter():
    with pytest.raises(InputError, match="--peer-python bf16 is for a peer, and --vs has bf16: leave it out"):
        CompareOptions(vs=("bf16",), pythons={"bf16": "other"})
    assert CompareOptions(vs=("openvino-f32",), pythons={"openvino": "other"}).vs == ("openvino-f32",)


@pytest.mark.parametrize("name", ["nncf", "nncf-f32"])
def test_what_is_missing_is_named_with_what_installs_it(name, monkeypatch):
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda module: None)
    with pytest.raises(InputError, match="not installed: pip install nncf"):
        peers.require_installed(name, {})
    peers.require_installed(name, {"nncf": "other"})
    with pytest.raises(InputError, match=r"not installed: pip install .*cpu"):
        peers.require_installed("openvino-f32", {})
