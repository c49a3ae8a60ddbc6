"""The table of engine libraries, those of other packages, and bundles with engines that nobody here knows."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
import types

import msgspec
import numpy as np
import pytest

from edge_backbones import EdgeBackbone
from edge_backbones.bundle import manifest as manifest_module
from edge_backbones.bundle.reader import Bundle
from edge_backbones.engines import registry, select
from edge_backbones.engines.base import CompiledEngine, Flavour
from edge_backbones.errors import EngineMismatchError, InputError
from edge_backbones.testing import make_bundle, pooled


class Theirs(Flavour):
    """A library of another package: its engine is the pooling network of the tests, in numpy."""

    name, title, extra, package = "theirs", "Theirs", "theirs", "theirs"

    def version(self):
        return "1.0"

    def reasons_against(self, key, host):
        return []

    def load(self, key, data, spec, input, options):
        return types.SimpleNamespace(run=lambda array: list(pooled(array)), close=lambda: None)

    def compile(self, bundle, graph, options, progress):
        return CompiledEngine(b"theirs", None, ".theirs", from_cache=False)


@pytest.fixture
def bundle(tmp_path) -> Bundle:
    """A bundle with an engine of the flavour ``theirs`` beside OpenVINO's."""
    made = make_bundle(tmp_path / "pool.bundle")
    (engine,) = made.manifest.engines
    key = msgspec.structs.replace(engine.key, flavour="theirs", library_version="1.0")
    return made.add_engine(msgspec.structs.replace(engine, key=key, milliseconds=None), {})


@pytest.fixture
def installed(monkeypatch):
    """The package of ``theirs`` is installed."""
    points = {"theirs": types.SimpleNamespace(name="theirs", value="theirs:THEIRS", load=Theirs)}

    def entry_points(*, group, name=None):
        assert group == "edge_backbones.flavours"
        return [point for point in points.values() if name in (None, point.name)]

    monkeypatch.setattr(importlib.metadata, "entry_points", entry_points)
    registry.find.cache_clear()
    yield points
    registry.find.cache_clear()


def test_every_row_is_a_flavour_of_its_name():
    for name in registry.ROWS:
        flavour = registry.get(name)
        assert (flavour.name, isinstance(flavour, Flavour)) == (name, True)
        assert flavour.title
        assert flavour.devices
    assert registry.names() == tuple(registry.ROWS)
    with pytest.raises(
        InputError, match=r"there is no flavour 'tensor': choose among tensorrt, tensorrt_rtx, openvino"
    ):
        registry.get("tensor")


def test_a_bundle_with_an_engine_that_nobody_knows_opens(bundle):
    opened = Bundle.open(bundle.path)
    assert [engine.key.flavour for engine in opened.manifest.engines] == ["openvino", "theirs"]
    unknown = opened.manifest.engines[1].name
    with EdgeBackbone.from_pretrained(bundle.path) as backbone:
        assert "is of the flavour theirs, which this release does not know" in backbone.passed_over[unknown]
    for asked in ("theirs", unknown):
        with pytest.raises(EngineMismatchError, match="which this release does not know: upgrade edge-backbones"):
            EdgeBackbone.from_pretrained(bundle.path, engine=asked)


def test_a_library_of_another_package_runs_its_engines(bundle, installed):
    assert registry.names()[-1] == "theirs"
    image = np.random.default_rng(0).standard_normal((2, 3, 32, 48)).astype(np.float32)
    with EdgeBackbone.from_pretrained(bundle.path, engine="theirs") as backbone:
        assert backbone.engine.startswith("theirs-1.0-")
        for one, expected in zip(backbone(image).feature_maps, pooled(image), strict=False):
            np.testing.assert_array_equal(one, expected)
    host = registry.this_machine(None)
    assert host.versions["theirs"] == "1.0"
    assert select.choose_engine(bundle, host).key.flavour == "openvino"  # ours first, where nothing was timed


def test_an_entry_point_that_is_no_flavour_is_refused(bundle, installed):
    installed["theirs"].load = lambda: object()
    with pytest.raises(InputError, match=r"the entry point theirs:THEIRS of edge_backbones.flavours is no Flavour"):
        registry.find("theirs")


@pytest.mark.parametrize("name", ["", "Theirs", "a-b", "a b", "9a", "x" * 41, "a\n"])
def test_what_is_no_name_of_a_library_is_no_manifest(bundle, name):
    raw = msgspec.json.decode(manifest_module.encode(bundle.manifest))
    raw["engines"][1]["key"]["flavour"] = name
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert(raw, type=manifest_module.Manifest)


@pytest.mark.parametrize(
    "load",
    [
        'tensorrt.library.load_library("tensorrt")',
        'tensorrt.library.load_library("tensorrt_lean")',
        "openvino.session.load_library()",
        "onnxruntime.library.load_library()",
        "torch.session.load_library()",
        "torch.session.load_torch_tensorrt()",
    ],
)
def test_a_folder_of_the_name_is_no_library(load, tmp_path):
    """Python imports a folder of sources, such as a clone of TensorRT, where the library is not installed."""
    name = next(
        name
        for name in ("tensorrt_lean", "torch_tensorrt", "tensorrt", "openvino", "onnxruntime", "torch")
        if name in load
    )
    (tmp_path / name).mkdir()
    code = f"""import pathlib, sys
from edge_backbones import engines, errors
from edge_backbones.engines.onnxruntime import library
from edge_backbones.engines.openvino import session
from edge_backbones.engines.tensorrt import library
from edge_backbones.engines.torch import session
from edge_backbones.machine import system
sys.path[:] = [{str(tmp_path)!r}, *(part for part in sys.path if not pathlib.Path(part, {name!r}).is_dir())]
import {name}
try:
    engines.{load}
except errors.MissingDependencyError as error:
    print(error)
"""
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert "pip install" in said.stdout, said.stderr
