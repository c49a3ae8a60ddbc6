"""List the engine libraries of this release, one row each, and find those that other packages add.

A library's module is imported only when it is asked for: reading a bundle needs none of them.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
from collections.abc import Iterator, Mapping

from edge_backbones.bundle.manifest import EngineKey
from edge_backbones.engines.base import Flavour
from edge_backbones.errors import InputError
from edge_backbones.machine import hosts
from edge_backbones.machine.hosts import Host

ROWS = {
    "tensorrt": "edge_backbones.engines.tensorrt.flavour:TENSORRT",
    "tensorrt_rtx": "edge_backbones.engines.tensorrt.flavour:TENSORRT_RTX",
    "openvino": "edge_backbones.engines.openvino.flavour:OPENVINO",
    "onnxruntime": "edge_backbones.engines.onnxruntime.flavour:ONNXRUNTIME",
    "torch_tensorrt": "edge_backbones.engines.torch.flavour:TORCH_TENSORRT",
    "torchscript": "edge_backbones.engines.torch.flavour:TORCHSCRIPT",
    "tensorrt_lean": "edge_backbones.engines.tensorrt.flavour:TENSORRT_LEAN",
}
"""Where each library is found. Of equally fast and precise engines, the first library in this order is preferred."""
ENTRY_POINTS = "edge_backbones.flavours"
"""Group of entry points, ``name = "package.module:OBJECT"``, with which other packages add a `Flavour`."""


@functools.cache
def find(name: str) -> Flavour | None:
    """Return the engine library of that name, ours or an installed package's; None if there is none.

    Raises InputError if a package's entry point is no `Flavour` of that name.
    """
    if name in ROWS:
        module, _, attribute = ROWS[name].partition(":")
        ours: Flavour = getattr(importlib.import_module(module), attribute)
        return ours
    for point in importlib.metadata.entry_points(group=ENTRY_POINTS, name=name):
        theirs = point.load()
        if isinstance(theirs, Flavour) and theirs.name == name:
            return theirs
        raise InputError(
            f"the entry point {point.value} of {ENTRY_POINTS} is no Flavour named {name!r}: upgrade or remove its package"
        )
    return None


def get(name: str) -> Flavour:
    """Return the engine library of that name. Raises InputError, which lists the names, if there is none."""
    found = find(name)
    if found is None:
        raise InputError(f"there is no flavour {name!r}: choose among {', '.join(names())}")
    return found


def names() -> tuple[str, ...]:
    """Return the names of all engine libraries, ours first."""
    theirs = sorted({point.name for point in importlib.metadata.entry_points(group=ENTRY_POINTS)} - set(ROWS))
    return (*ROWS, *theirs)


def title_of(name: str) -> str:
    """Return the name of an engine library for people; one that nobody here knows keeps its name."""
    found = find(name)
    return name if found is None else found.title


def reasons_against(key: EngineKey, host: Host) -> list[str]:
    """Return why an engine with this key cannot run on ``host``, one phrase with a fix each; empty if it can."""
    flavour = find(key.flavour)
    if flavour is None:
        return [
            f"is of the flavour {key.flavour}, which this release does not know: upgrade edge-backbones, or install the "
            "package that adds it"
        ]
    return flavour.reasons_against(key, host)


def serving(host: Host) -> Flavour:
    """Return the library that compiles engines for ``host`` if the user names none.

    For its GPU: TensorRT if that release compiles plans, else TensorRT-RTX if it is installed and knows the GPU.
    Without either, or without a GPU: a library for the CPU, OpenVINO first.
    """
    return next((flavour for flavour in map(get, ROWS) if flavour.serves(host)), get("openvino"))


def this_machine(gpu: int | None) -> Host:
    """Return this machine with its engine libraries, and with the GPU of index ``gpu`` if that is not None."""
    return hosts.this_host(InstalledVersions(), gpu=gpu)


class InstalledVersions(Mapping[str, str]):
    """Map flavours to the versions of the engine libraries that can be imported here.

    A library is looked up only when it is asked for: TensorRT takes a second to import, and a bundle for the CPU does
    not need it.
    """

    def __init__(self) -> None:
        self._found: dict[str, str | None] = {}

    def __getitem__(self, name: str) -> str:
        if name not in self._found:
            flavour = find(name)
            self._found[name] = None if flavour is None else flavour.version()
        version = self._found[name]
        if version is None:
            raise KeyError(name)
        return version

    def __iter__(self) -> Iterator[str]:
        return iter([name for name in names() if self.get(name) is not None])

    def __len__(self) -> int:
        return len(list(iter(self)))
