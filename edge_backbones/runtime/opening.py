"""Choose and load the engine of a bundle that runs on a device of this machine."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from edge_backbones.bundle import trust
from edge_backbones.bundle.manifest import EngineRecord, Manifest
from edge_backbones.bundle.reader import Bundle, read_current
from edge_backbones.engines import registry, select
from edge_backbones.engines.base import EngineSession, LoadOptions
from edge_backbones.errors import BundleError, EngineMismatchError, InputError
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
    """

    session: EngineSession
    record: EngineRecord
    manifest: Manifest
    passed_over: dict[str, str]


def open_engine(
    path: str | os.PathLike[str],
    engine: str | None,
    load: LoadOptions,
    *,
    compiles: bool,
    trusted: trust.Trusted | None,
) -> Opened:
    """Choose the best engine of a bundle for this machine, and load it.

    Args:
        path: Folder of the bundle.
        engine: Narrow the choice to a precision, a flavour or one engine's name.
        load: How it is loaded: on the CPU, or on the GPU of index ``load.gpu``.
        compiles: Compile an engine if none in the bundle runs here, and verify one that this machine has not measured.
        trusted: Keys of which one must have signed the bundle.

    Returns:
        The loaded engine.

    Raises:
        BundleError: The bundle is damaged, or not signed as asked (TrustError).
        EngineMismatchError: Nothing in the bundle can run here.
    """
    host, code = registry.this_machine(load.gpu), load.allow_host_code
    device = "cpu" if load.gpu is None else "cuda"
    refused: dict[str, str] = {}

    def choose_and_load(bundle: Bundle) -> tuple[EngineRecord, EngineSession]:
        nonlocal refused
        bundle, refused = trust.admit(bundle, trusted)
        try:
            record = select.choose_engine(bundle, host, engine, device=device, allow_host_code=code)
        except EngineMismatchError as error:
            not_trusted = "".join(f". Not trusted: {name}: {why}" for name, why in refused.items())
            raise EngineMismatchError(f"{error}{not_trusted}") from error
        if compiles:
            select.measure_here(bundle, record, host, gpu=load.gpu, allow_host_code=code)
        return record, select.open_session(bundle, record, load)

    try:
        bundle, (record, session) = read_current(path, choose_and_load)
    except EngineMismatchError:
        if not compiles or (load.gpu is not None and host.gpu is None):
            raise
        select.compile_here(path, engine, gpu=load.gpu, allow_host_code=code)
        bundle, (record, session) = read_current(path, choose_and_load)
    others = select.passed_over(bundle, record, host, engine, device=device, allow_host_code=code)
    return Opened(session, record, bundle.manifest, {**others, **refused})


def parse_device(device: str) -> tuple[Literal["cpu", "cuda"], int | None]:
    """Return ``cpu`` or ``cuda``, and the index of the GPU (None for the CPU).

    Raises InputError for other text.
    """
    if device == "cpu":
        return "cpu", None
    found = re.fullmatch(r"cuda(?::([0-9]{1,3}))?", str(device))
    if found is None:
        raise InputError(f"device must be 'cpu', 'cuda' or 'cuda:<index>', got {device!r}")
    return "cuda", int(found[1] or 0)


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
