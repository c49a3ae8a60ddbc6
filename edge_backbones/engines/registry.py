"""The engine libraries that this release knows, one row each, and how those of other packages are found.

A room is imported when its library is asked for: none of them is needed to read a bundle.
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
"""By preference, where engines are as fast and as precise as each other."""
ENTRY_POINTS = "edge_backbones.flavours"
"""Group of entry points, ``name = "package.module:OBJECT"``, by which other packages add a `Flavour`."""


@functools.cache
def find(name: str) -> Flavour | None:
    """Return the engine library of that name, of ours or of an installed package's; None if there is none."""
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
    """Return the engine library of that name; raises InputError with the names that there are."""
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
    """Return why an engine with this key cannot run on ``host``, one phrase each with the way out; empty if it can."""
    flavour = find(key.flavour)
    if flavour is None:
        return [
            f"is of the flavour {key.flavour}, which this release does not know: upgrade edge-backbones, or install the "
            "package that adds it"
        ]
    return flavour.reasons_against(key, host)


def serving(host: Host) -> Flavour:
    """Return the library that engines are compiled with for ``host`` when none is asked for.

    For its GPU: TensorRT where the release makes plans, else TensorRT-RTX where it is installed and knows the GPU. Where
    neither is there, or no GPU: OpenVINO for the CPU.
    """
    return next((flavour for flavour in map(get, ROWS) if flavour.serves(host)), get("openvino"))


def this_machine(gpu: int | None) -> Host:
    """Return this machine with its engine libraries, and the GPU of that index where one is meant."""
    return hosts.this_host(InstalledVersions(), gpu=gpu)


class InstalledVersions(Mapping[str, str]):
    """The version of every engine library that can be imported here, by flavour.

    A library is looked at when it is asked for: TensorRT takes a second to import, and a bundle for the CPU does not need
    it.
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
