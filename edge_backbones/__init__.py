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
    from edge_backbones.bundle.reader import Bundle as Bundle
    from edge_backbones.bundle.trust import sign_bundle as sign_bundle
    from edge_backbones.deploy.compile import compile_bundle as compile_bundle
    from edge_backbones.deploy.verify import verify_bundle as verify_bundle
    from edge_backbones.errors import EdgeBackbonesError as EdgeBackbonesError
    from edge_backbones.runtime.backbone import BackboneOutput as BackboneOutput
    from edge_backbones.runtime.backbone import EdgeBackbone as EdgeBackbone
    from edge_backbones.toolchain.build import BuildOptions as BuildOptions
    from edge_backbones.toolchain.build import build_bundle as build_bundle
    from edge_backbones.toolchain.sources.module_source import ModuleSource as ModuleSource

_HOMES = {
    "AutoEdgeBackbone": "edge_backbones.auto",
    "BackboneOutput": "edge_backbones.runtime.backbone",
    "EdgeBackbone": "edge_backbones.runtime.backbone",
    "Bundle": "edge_backbones.bundle.reader",
    "EdgeBackbonesError": "edge_backbones.errors",
    "ModuleSource": "edge_backbones.toolchain.sources.module_source",
    "BuildOptions": "edge_backbones.toolchain.build",
    "build_bundle": "edge_backbones.toolchain.build",
    "compile_bundle": "edge_backbones.deploy.compile",
    "sign_bundle": "edge_backbones.bundle.trust",
    "verify_bundle": "edge_backbones.deploy.verify",
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
