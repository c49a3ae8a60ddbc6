"""Bundles that both languages open, built once per run, and the program that opens them in C++."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from build_scripts.photographs import write_crops
from tests.cpp_programs import program

Asking = Callable[..., list[dict[str, Any]]]


def build_networks(folder: Path, *names: str) -> None:
    """Build networks of different kinds in int8 and fp32: mobilenet.bundle, resnet.bundle and vit.bundle."""
    from edge_backbones import BuildOptions, Gate, build_bundle

    write_crops(folder / "photographs", 8)
    # Random weights are noisy in int8: here two languages are compared, not a network with its reference.
    loose = {"int8": Gate(min_cosine=0.1)}
    sources = {
        "mobilenet": ("mobilenetv3_small_050", {"width": 96, "out_indices": (0, 2, 4)}),
        "resnet": ("resnet18", {}),
        "vit": ("vit_tiny_patch16_224", {}),
    }
    for name in names:
        source, options = sources[name]
        chosen = BuildOptions(
            torchscript=False, method="max", gates=loose, precisions=("int8", "fp32"), weights="random:0",
            **{"height": 64, "width": 64, **options},
        )  # fmt: skip
        build_bundle(source, folder / f"{name}.bundle", images=folder / "photographs", options=chosen)


@pytest.fixture(scope="session")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of bundles: three networks in int8 and fp32, and a small one in every form of input and output."""
    import timm
    import torch

    from edge_backbones import BuildOptions, ShapeRange, build_bundle

    folder = tmp_path_factory.mktemp("bundles")
    build_networks(folder, "mobilenet", "resnet", "vit")

    def build(name: str, net: Any, **options: Any) -> None:
        chosen = {"height": 64, "width": 64, **options}
        build_bundle(
            net, folder / f"{name}.bundle", options=BuildOptions(torchscript=False, precisions=("fp32",), **chosen)
        )

    torch.manual_seed(0)
    net = timm.create_model("test_resnet", features_only=True, out_indices=(1, 2, 3, 4)).eval()
    sizes = ShapeRange(min=32, opt=64, max=128)
    build("dynamic", net, height=sizes, width=sizes, batch=ShapeRange(min=2, opt=2, max=3))
    build("image", net, input="image")
    build("nv12", net, input="frame", frame=(48, 64), color="nv12")
    build("half", net, maps=("float16", "channels-last"), pixels="float16", batch=2)
    return folder


@pytest.fixture(scope="session")
def verify_program() -> Path:
    return program("verify")


@pytest.fixture
def ask(tmp_path: Path) -> Asking:
    """Return a function that opens bundles in C++ as requests say, and returns an answer for each."""
    probe = program("probe")

    def asked(*requests: dict[str, Any], **options: Any) -> list[dict[str, Any]]:
        file = tmp_path / "requests.json"
        folders = [tmp_path / f"out{number}" for number in range(len(requests))]
        for folder in folders:
            folder.mkdir(exist_ok=True)
        told = [{"out": str(folder), **request} for folder, request in zip(folders, requests, strict=True)]
        file.write_text(json.dumps(told), encoding="utf-8")
        done = subprocess.run([probe, file], capture_output=True, text=True, timeout=300, **options)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return asked


@pytest.fixture
def call(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Return a function that writes an array where C++ reads it, and returns the call for `ask`."""

    def written(array: np.ndarray, mode: str = "maps", **more: Any) -> dict[str, Any]:
        file = tmp_path / f"input{len(list(tmp_path.glob('input*')))}"
        whole = array if array.base is None or array.flags.c_contiguous else array.base
        whole.tofile(file)
        strides = [] if array.flags.c_contiguous else [step // array.itemsize for step in array.strides]
        return {
            "file": str(file),
            "dtype": array.dtype.name,
            "shape": array.shape,
            "strides": strides,
            "mode": mode,
            **more,
        }

    return written


def maps_of(result: dict[str, Any]) -> dict[str, np.ndarray]:
    """Return the maps that C++ wrote."""
    assert "maps" in result, result
    return {one["name"]: np.fromfile(one["file"], one["dtype"]).reshape(one["shape"]) for one in result["maps"]}
