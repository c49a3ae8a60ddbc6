"""edge_backbones: vision backbones as verified bundles of compiled engines, behind the transformers backbone API.

On the device: :class:`EdgeBackbone`, :class:`BackboneOutput`, :class:`Bundle`. To build: :func:`build_bundle`,
:func:`compile_bundle` and :class:`AutoEdgeBackbone`. In models of other libraries: :mod:`edge_backbones.integrations`.
Every name is loaded when it is first used, so that ``import edge_backbones`` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from edge_backbones.auto import AutoEdgeBackbone as AutoEdgeBackbone
    from edge_backbones.build.device import compile_bundle as compile_bundle
    from edge_backbones.build.device import verify_bundle as verify_bundle
    from edge_backbones.build.pipeline import BuildOptions as BuildOptions
    from edge_backbones.build.pipeline import build_bundle as build_bundle
    from edge_backbones.build.sources.load import ModuleSource as ModuleSource
    from edge_backbones.bundle import Bundle as Bundle
    from edge_backbones.errors import EdgeBackbonesError as EdgeBackbonesError
    from edge_backbones.runtime.backbone import BackboneOutput as BackboneOutput
    from edge_backbones.runtime.backbone import EdgeBackbone as EdgeBackbone
    from edge_backbones.trust import sign_bundle as sign_bundle

_HOMES = {
    "AutoEdgeBackbone": "edge_backbones.auto",
    "BackboneOutput": "edge_backbones.runtime.backbone",
    "EdgeBackbone": "edge_backbones.runtime.backbone",
    "Bundle": "edge_backbones.bundle",
    "EdgeBackbonesError": "edge_backbones.errors",
    "ModuleSource": "edge_backbones.build.sources.load",
    "BuildOptions": "edge_backbones.build.pipeline",
    "build_bundle": "edge_backbones.build.pipeline",
    "compile_bundle": "edge_backbones.build.device",
    "sign_bundle": "edge_backbones.trust",
    "verify_bundle": "edge_backbones.build.device",
}
__all__ = ["__version__", *_HOMES]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'edge_backbones' has no attribute {name!r}")
    try:
        home = importlib.import_module(_HOMES[name])
    except (ImportError, MemoryError, OSError) as error:
        from edge_backbones.errors import BrokenLibraryError, refuse_lack

        refuse_lack("importing edge_backbones", error)
        try:  # whether it is for want of what everything here stands on
            for library in ("msgspec", "numpy"):
                importlib.import_module(library)
        except ImportError as broken:
            raise BrokenLibraryError(broken) from error
        raise
    return getattr(home, name)


def __dir__() -> list[str]:
    return sorted(__all__)
