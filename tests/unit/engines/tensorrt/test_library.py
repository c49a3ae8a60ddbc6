"""Which module a flavour is, and what is said when there is none: with modules that are made up."""

from __future__ import annotations

import re
import sys
import types

import pytest

from edge_backbones.engines.tensorrt.library import (
    FLAVOURS,
    against_driver,
    against_release,
    library_version,
    load_library,
)
from edge_backbones.errors import MissingDependencyError
from edge_backbones.installation import pip_install
from edge_backbones.machine import system


@pytest.fixture
def modules(monkeypatch, tmp_path):
    """A place for made-up modules; none of TensorRT's own can be imported."""
    for flavour in FLAVOURS:
        for name in (flavour, f"{flavour}_bindings"):
            monkeypatch.delitem(sys.modules, name, raising=False)
    hidden = {name for flavour in FLAVOURS for name in (flavour, f"{flavour}_bindings")}

    class Hide:
        def find_spec(self, name, path=None, target=None):
            if name in hidden and not (tmp_path / f"{name}.py").exists():
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(sys, "meta_path", [Hide(), *sys.meta_path])
    monkeypatch.syspath_prepend(tmp_path)

    def write(name: str, code: str) -> None:
        (tmp_path / f"{name}.py").write_text(code)

    yield write
    for name in hidden:
        sys.modules.pop(name, None)


def test_a_library_that_is_missing_is_named_with_its_extra(modules, monkeypatch):
    monkeypatch.setattr(system, "is_jetson", lambda: False)
    with pytest.raises(MissingDependencyError, match=r"\(not installed\) .*" + re.escape(pip_install("tensorrt"))):
        load_library("tensorrt")
    with pytest.raises(
        MissingDependencyError, match=r"tensorrt_rtx engine \(not installed\).*" + re.escape(pip_install("rtx"))
    ):
        load_library("tensorrt_rtx")
    assert [library_version(flavour) for flavour in FLAVOURS] == [None] * 3


def test_on_a_jetson_pip_is_not_where_tensorrt_comes_from(modules, monkeypatch):
    monkeypatch.setattr(system, "is_jetson", lambda: True)
    with pytest.raises(MissingDependencyError, match=r"apt install python3-libnvinfer.*--system-site-packages") as told:
        load_library("tensorrt")
    assert "pip install" not in str(told.value)


@pytest.mark.parametrize(
    ("flavour", "version", "jetson", "way"),
    [
        ("tensorrt", "8.6.2", True, "upgrade to JetPack 6.2 or newer"),
        ("tensorrt", "10.2.0.post1", False, "pip install --upgrade tensorrt"),
        ("tensorrt", "10.3.0", True, None),
        ("tensorrt", "11.4.0.106", False, None),
        ("tensorrt_rtx", "1.7.1", False, None),
    ],
)
def test_the_oldest_release(flavour, version, jetson, way):
    told = against_release(flavour, version, jetson=jetson)
    assert (way in told and told.startswith("10.3 is the oldest")) if way else told == ""


def test_a_library_that_cannot_be_loaded_says_why(modules):
    modules(
        "tensorrt", 'raise ImportError("libnvinfer.so.10: cannot open shared object file: No such file or directory")'
    )
    with pytest.raises(
        MissingDependencyError, match=r"installed, and cannot be loaded: libnvinfer\.so\.10: cannot open"
    ):
        load_library("tensorrt")


def test_the_bindings_alone_are_enough(modules):
    modules("tensorrt_lean_bindings", "__version__ = '11.4.0'\nRuntime = object")
    assert library_version("tensorrt_lean") == "11.4.0"


def test_rtx_in_the_place_of_tensorrt_is_not_taken_for_it(modules):
    """torch-tensorrt-rtx puts it there."""
    sys.modules["tensorrt"] = types.SimpleNamespace(__version__="1.7", ComputeCapability=object, Runtime=object)
    modules("tensorrt_rtx", "__version__ = '1.7.1'\nComputeCapability = object\nRuntime = object")
    assert library_version("tensorrt") is None
    assert library_version("tensorrt_rtx") == "1.7.1"


def test_a_driver_that_is_older_than_the_wheel_is_told(tmp_path, monkeypatch):
    """The lean runtime dies under it without a word: it must not be reached."""
    for wheel in ("tensorrt_lean_cu13-11.4.0", "tensorrt_cu12_bindings-10.13.2", "tensorrt_cu13_bindings-10.13.2"):
        folder = tmp_path / f"{wheel}.dist-info"
        folder.mkdir()
        name, _, version = wheel.partition("-")
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    monkeypatch.syspath_prepend(tmp_path)
    told = against_driver("tensorrt_lean", "12.6")
    assert told.startswith(
        "tensorrt_lean here was made with CUDA 13, and the driver serves CUDA 12.6: update the driver"
    )
    assert told.endswith("install tensorrt-lean-cu12")
    assert against_driver("tensorrt_lean", "13.0") == ""
    assert against_driver("tensorrt", "12.6") == ""  # one of the two is for it
    assert "made with CUDA 12" in against_driver("tensorrt", "11.8")


def test_a_library_that_no_wheel_installed_is_tried(monkeypatch):
    monkeypatch.setattr(sys, "path", [])
    assert against_driver("tensorrt", "11.4") == ""
