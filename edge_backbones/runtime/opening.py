"""Choose and load the engine of a bundle that runs on a device of this machine."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_backbones.bundle import trust
from edge_backbones.bundle.manifest import EngineRecord, Manifest
from edge_backbones.bundle.reader import Bundle, read_current
from edge_backbones.engines import registry, select
from edge_backbones.engines.base import EngineSession, LoadOptions
from edge_backbones.errors import BundleError, EngineMismatchError, InputError
from edge_backbones.machine import gpus
from edge_backbones.machine.devices import Place, parse_device
from edge_backbones.spec import InputSpec

if TYPE_CHECKING:
    from edge_backbones.runtime.backbone import EdgeBackbone
    from edge_backbones.runtime.config import BackboneConfig


@dataclass(frozen=True)
class Opened:
    """Hold a loaded engine, and where it is from.

    Attributes:
        session: The loaded engine.
        record: Its record in the manifest.
        manifest: Manifest of the bundle.
        passed_over: Why each other engine of the bundle does not run here, by name.
        device: Where the engine is loaded: ``"cpu"`` or ``"cuda:0"``.
    """

    session: EngineSession
    record: EngineRecord
    manifest: Manifest
    passed_over: dict[str, str]
    device: str


def open_engine(
    path: str | os.PathLike[str],
    engine: str | None,
    load: LoadOptions,
    *,
    device: str,
    compiles: bool,
    trusted: trust.Trusted | None,
) -> Opened:
    """Choose the best engine of a bundle for this machine, and load it.

    Args:
        path: Folder of the bundle.
        engine: Narrow the choice to a precision, a flavour, or one engine's name or the beginning of it.
        load: How it is loaded; ``load.gpu`` is filled in.
        device: ``"auto"``, ``"cpu"``, ``"cuda"`` or ``"cuda:1"``.
        compiles: Compile an engine if none in the bundle runs here, and verify one that this machine has not measured.
        trusted: Keys of which one must have signed the bundle.

    Returns:
        The loaded engine.

    Raises:
        BundleError: The bundle is damaged, or not signed as asked (TrustError).
        EngineMismatchError: Nothing in the bundle can run here.
        InputError: ``device`` names no device, or an option is for another device.
    """
    _refuse_idle_options(load, parse_device(device)[0])
    code = load.allow_host_code

    def choose_and_load(bundle: Bundle) -> Opened:
        bundle, refused = trust.admit(bundle, trusted)
        asked = select.full_name(bundle, engine)
        host, place, index = select.machine_for(bundle, device)
        try:
            record = select.choose_engine(bundle, host, asked, device=place, allow_host_code=code)
        except EngineMismatchError as error:
            not_trusted = "".join(f". Not trusted: {name}: {why}" for name, why in refused.items())
            raise EngineMismatchError(f"{error}{not_trusted}") from error
        gpu = index if place == "cuda" or (place == "auto" and record.key.gpu is not None) else None
        if compiles:
            select.measure_here(bundle, record, host, gpu=gpu, allow_host_code=code)
        session = select.open_session(bundle, record, dataclasses.replace(load, gpu=gpu))
        others = select.passed_over(bundle, record, host, asked, device=place, allow_host_code=code)
        place_of_engine = "cpu" if gpu is None else f"cuda:{gpu}"
        return Opened(session, record, bundle.manifest, {**others, **refused}, place_of_engine)

    try:
        return read_current(path, choose_and_load)[1]
    except EngineMismatchError:
        gpu = _gpu_to_compile_for(device)
        if not compiles or (gpu is not None and registry.this_machine(gpu).gpu is None):
            raise
        select.compile_here(path, engine, gpu=gpu, allow_host_code=code)
        return read_current(path, choose_and_load)[1]


def _refuse_idle_options(load: LoadOptions, place: Place) -> None:
    """Raise InputError for options that mean nothing on the device that was asked for."""
    if place == "cuda" and load.threads is not None:
        raise InputError(f"threads={load.threads} is for engines on the CPU, and device is cuda: leave it out")
    if place == "cpu" and load.memory is not None:
        raise InputError(f"memory={load.memory!r} is for engines on a GPU, and device is cpu: leave it out")


def _gpu_to_compile_for(device: str) -> int | None:
    """Return the index of the GPU that an engine has to be compiled for; None for the CPU.

    With ``auto`` it is the GPU if there is one and a library here compiles for it.
    """
    place, gpu = parse_device(device)
    if place == "auto" and gpus.find_gpus() and "cpu" not in registry.serving(registry.this_machine(0)).devices:
        return 0
    return gpu if place == "cuda" else None


@dataclass(frozen=True)
class Origin:
    """Remember how a backbone was opened, to open the same engine in another process.

    ``options``: keyword arguments of ``from_pretrained``. ``graph``: precision and SHA-256 of the graph that runs.
    """

    path: str
    options: Mapping[str, Any]
    graph: tuple[str, str]
    input: InputSpec


def reopen(kind: type[EdgeBackbone], origin: Origin, config: BackboneConfig) -> EdgeBackbone:
    """Open the bundle of a pickled backbone again, with the same options, stages and configuration.

    ``pickle.loads`` calls it. Raises what ``from_pretrained`` raises, and BundleError if the bundle is gone or was
    rebuilt.
    """
    if not Path(origin.path).is_dir():
        raise BundleError(
            f"a pickled backbone holds the path of its bundle, and {origin.path} is not there any more: put the bundle "
            "back, or open it where it is with EdgeBackbone.from_pretrained"
        )
    backbone = kind.from_pretrained(origin.path, **origin.options)
    opened = backbone._origin
    if (
        opened is None
        or opened.graph != origin.graph
        or (backbone._spec, backbone._input) != (config._spec, origin.input)
    ):
        backbone.close()
        raise BundleError(
            f"{origin.path} was built again since this backbone was pickled: open it as it is now with "
            "EdgeBackbone.from_pretrained"
        )
    backbone._config = config
    return backbone
