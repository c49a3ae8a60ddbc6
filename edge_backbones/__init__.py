"""Vision backbones as verified bundles of compiled engines, behind the backbone API of transformers.

A bundle is a folder with engines of one backbone, the graphs that they were compiled from, and the figures that each was
verified with. It is built on a workstation and runs on a device without torch.

Run a bundle
    `EdgeBackbone` opens one and answers with a `BackboneOutput`; arrays in GPU memory are `DeviceArray`.
Build one
    `build_bundle` with `BuildOptions` turns a model of timm or transformers, or a `ModuleSource`, into a bundle.
    `AutoEdgeBackbone` builds it when it is first asked for.
Deploy one
    `compile_bundle` adds engines for this machine, `verify_bundle` measures them again, `sign_bundle` signs the bundle.
    `Bundle` reads what is in it: its `Manifest` names every file.
Vocabulary
    `Precision`, `ShapeRange`, `InputSpec` and `BackboneSpec` describe engines; `ImageConfig` and `fit` prepare images;
    `Gate` and `ParityReport` say how near an engine is to fp32.
Errors
    Every error that is raised on purpose is an `EdgeBackbonesError`; its kinds are in edge_backbones/errors.py.

Models of other libraries take a bundle's backbone by the functions in :mod:`edge_backbones.integrations`. Every name is
imported when it is first used, so ``import edge_backbones`` is quick, and numpy and msgspec are enough to import any of them.

What is stable: the names in ``__all__``; the bundle format of each ``schema_version`` (a release refuses those that it does
not know, and says what to do); the exit codes and the ``--json`` output of the command line. Everything else may change in
any release.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from edge_backbones.auto import AutoEdgeBackbone as AutoEdgeBackbone
    from edge_backbones.bundle.manifest import EngineKey as EngineKey
    from edge_backbones.bundle.manifest import EngineRecord as EngineRecord
    from edge_backbones.bundle.manifest import FileRecord as FileRecord
    from edge_backbones.bundle.manifest import GraphRecord as GraphRecord
    from edge_backbones.bundle.manifest import Manifest as Manifest
    from edge_backbones.bundle.reader import Bundle as Bundle
    from edge_backbones.bundle.signing import sign_bundle as sign_bundle
    from edge_backbones.bundle.trust import SigstoreIdentity as SigstoreIdentity
    from edge_backbones.deploy.compile import CompileResult as CompileResult
    from edge_backbones.deploy.compile import compile_bundle as compile_bundle
    from edge_backbones.deploy.verify import verify_bundle as verify_bundle
    from edge_backbones.engines.base import CompiledEngine as CompiledEngine
    from edge_backbones.engines.base import CompileOptions as CompileOptions
    from edge_backbones.engines.base import EngineSession as EngineSession
    from edge_backbones.engines.base import Flavour as Flavour
    from edge_backbones.engines.base import LoadOptions as LoadOptions
    from edge_backbones.engines.gpu.arrays import DeviceArray as DeviceArray
    from edge_backbones.engines.gpu.memory import MemoryBackend as MemoryBackend
    from edge_backbones.engines.tensorrt.options import PlanOptions as PlanOptions
    from edge_backbones.engines.tensorrt.options import Shapes as Shapes
    from edge_backbones.errors import BrokenLibraryError as BrokenLibraryError
    from edge_backbones.errors import BundleError as BundleError
    from edge_backbones.errors import CalibrationError as CalibrationError
    from edge_backbones.errors import ClientMismatchError as ClientMismatchError
    from edge_backbones.errors import CompileError as CompileError
    from edge_backbones.errors import DeviceError as DeviceError
    from edge_backbones.errors import EdgeBackbonesError as EdgeBackbonesError
    from edge_backbones.errors import EngineMismatchError as EngineMismatchError
    from edge_backbones.errors import ExportError as ExportError
    from edge_backbones.errors import HubUnreachableError as HubUnreachableError
    from edge_backbones.errors import InferenceError as InferenceError
    from edge_backbones.errors import InputError as InputError
    from edge_backbones.errors import IntegrityError as IntegrityError
    from edge_backbones.errors import ManifestError as ManifestError
    from edge_backbones.errors import MissingDependencyError as MissingDependencyError
    from edge_backbones.errors import OutOfMemoryError as OutOfMemoryError
    from edge_backbones.errors import QuantizationError as QuantizationError
    from edge_backbones.errors import ResourceError as ResourceError
    from edge_backbones.errors import SourceError as SourceError
    from edge_backbones.errors import TrustError as TrustError
    from edge_backbones.for_cpp import get_cmake_dir as get_cmake_dir
    from edge_backbones.for_cpp import get_include as get_include
    from edge_backbones.images.config import ImageConfig as ImageConfig
    from edge_backbones.images.fit import fit as fit
    from edge_backbones.parity_report import Gate as Gate
    from edge_backbones.parity_report import ParityError as ParityError
    from edge_backbones.parity_report import ParityReport as ParityReport
    from edge_backbones.parity_report import StageParity as StageParity
    from edge_backbones.progress import Progress as Progress
    from edge_backbones.runtime.backbone import BackboneOutput as BackboneOutput
    from edge_backbones.runtime.backbone import EdgeBackbone as EdgeBackbone
    from edge_backbones.runtime.config import BackboneConfig as BackboneConfig
    from edge_backbones.spec import BackboneSpec as BackboneSpec
    from edge_backbones.spec import ExtraOutput as ExtraOutput
    from edge_backbones.spec import InputSpec as InputSpec
    from edge_backbones.spec import Layout as Layout
    from edge_backbones.spec import Precision as Precision
    from edge_backbones.spec import ShapeRange as ShapeRange
    from edge_backbones.toolchain.artifacts import LoadedBackbone as LoadedBackbone
    from edge_backbones.toolchain.build import BuildResult as BuildResult
    from edge_backbones.toolchain.build import build_bundle as build_bundle
    from edge_backbones.toolchain.calibration.images import ImageSource as ImageSource
    from edge_backbones.toolchain.options import BuildOptions as BuildOptions
    from edge_backbones.toolchain.sources.module_source import ModuleSource as ModuleSource

_NAMES = {
    # Run a bundle
    "edge_backbones.runtime.backbone": ("BackboneOutput", "EdgeBackbone"),
    "edge_backbones.runtime.config": ("BackboneConfig",),
    "edge_backbones.engines.gpu.arrays": ("DeviceArray",),
    "edge_backbones.engines.gpu.memory": ("MemoryBackend",),
    "edge_backbones.engines.base": ("CompiledEngine", "CompileOptions", "EngineSession", "Flavour", "LoadOptions"),
    # Build one
    "edge_backbones.toolchain.build": ("BuildResult", "build_bundle"),
    "edge_backbones.toolchain.options": ("BuildOptions",),
    "edge_backbones.auto": ("AutoEdgeBackbone",),
    "edge_backbones.toolchain.sources.module_source": ("ModuleSource",),
    "edge_backbones.toolchain.artifacts": ("LoadedBackbone",),
    "edge_backbones.toolchain.calibration.images": ("ImageSource",),
    # Deploy one
    "edge_backbones.bundle.reader": ("Bundle",),
    "edge_backbones.bundle.manifest": ("EngineKey", "EngineRecord", "FileRecord", "GraphRecord", "Manifest"),
    "edge_backbones.deploy.compile": ("CompileResult", "compile_bundle"),
    "edge_backbones.deploy.verify": ("verify_bundle",),
    "edge_backbones.engines.tensorrt.options": ("PlanOptions", "Shapes"),
    "edge_backbones.bundle.signing": ("sign_bundle",),
    "edge_backbones.for_cpp": ("get_cmake_dir", "get_include"),
    "edge_backbones.bundle.trust": ("SigstoreIdentity",),
    # Vocabulary
    "edge_backbones.spec": ("BackboneSpec", "ExtraOutput", "InputSpec", "Layout", "Precision", "ShapeRange"),
    "edge_backbones.parity_report": ("Gate", "ParityError", "ParityReport", "StageParity"),
    "edge_backbones.images.config": ("ImageConfig",),
    "edge_backbones.images.fit": ("fit",),
    "edge_backbones.progress": ("Progress",),
    # Errors
    "edge_backbones.errors": (
        "BrokenLibraryError",
        "BundleError",
        "CalibrationError",
        "ClientMismatchError",
        "CompileError",
        "DeviceError",
        "EdgeBackbonesError",
        "EngineMismatchError",
        "ExportError",
        "HubUnreachableError",
        "InferenceError",
        "InputError",
        "IntegrityError",
        "ManifestError",
        "MissingDependencyError",
        "OutOfMemoryError",
        "QuantizationError",
        "ResourceError",
        "SourceError",
        "TrustError",
    ),
}
"""Public names by the module that they are imported from when they are first used."""

_HOMES = {name: module for module, names in _NAMES.items() for name in names}
__all__ = ["__version__", *_HOMES]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'edge_backbones' has no attribute {name!r}")
    try:
        home = importlib.import_module(_HOMES[name])
    except (ImportError, MemoryError, OSError) as error:
        from edge_backbones.errors import BrokenLibraryError, refuse_lack

        refuse_lack("importing edge_backbones", error)
        try:  # are the two libraries broken that everything here needs?
            for library in ("msgspec", "numpy"):
                importlib.import_module(library)
        except ImportError as broken:
            raise BrokenLibraryError(broken) from error
        raise
    return getattr(home, name)


def __dir__() -> list[str]:
    return sorted(__all__)
