"""Load a backbone from any kind of source: the first loader that knows the kind takes it.

Whatever the source, it is not changed: live modules are copied, and put into eval mode, float32 and host memory there.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import timm
from torch import nn

from edge_backbones.bundle.manifest import Source
from edge_backbones.errors import SourceError, first_line, needing
from edge_backbones.integrations.clients import find_backbone, is_backbone, is_timm_module
from edge_backbones.toolchain.artifacts import LoadedBackbone
from edge_backbones.toolchain.sources import names
from edge_backbones.toolchain.sources.base import (
    SourceLoader,
    SourceOptions,
    hub_answers,
    hub_folder,
    read_json,
    tensors_sha256,
)
from edge_backbones.toolchain.sources.module_source import ModuleSource
from edge_backbones.toolchain.sources.modules import plain_copy
from edge_backbones.toolchain.sources.plain import load_plain
from edge_backbones.toolchain.sources.processors import PROCESSOR_FILES, Preprocessing, given, read_processor
from edge_backbones.toolchain.sources.timm import load_timm, load_timm_folder, load_timm_module

ENTRY_POINTS = names.ENTRY_POINTS
"""The entry point group in which other packages register a :class:`SourceLoader`, as a class or as an object."""


def load_source(source: Any, options: SourceOptions) -> LoadedBackbone:
    """Load a backbone, in eval mode.

    ``source``: a timm name; a hub id; a ``save_pretrained`` folder of transformers or a timm model's; a configuration of
    transformers, or its .json file; a live backbone of either library, or a whole timm network; a :class:`ModuleSource`;
    or what a loader of another package takes (:data:`ENTRY_POINTS`). With ``options.from_model`` a client model (a folder,
    a hub id, or live), of which the backbone is taken. Raises SourceError, HubUnreachableError, InputError,
    MissingDependencyError.
    """
    if isinstance(source, LoadedBackbone):
        return source
    options = dataclasses.replace(options, image=given(options.image))
    for loader in LOADERS:
        if loader.matches(source):
            return loader.load(source, options)
    for name, loader in _registered_loaders():
        if loader.matches(source):
            return _checked(name, loader.load(source, options))
    return _refuse(source, options)


# ---- loaders --------------------------------------------------------------------------------------------------------


class _PlainModules:
    """Load plain modules with a description."""

    def matches(self, source: Any) -> bool:
        return isinstance(source, ModuleSource)

    def load(self, source: ModuleSource, options: SourceOptions) -> LoadedBackbone:
        if options.from_model:
            raise SourceError("from_model is for a whole model of transformers: a ModuleSource is a backbone already")
        return load_plain(source, options)


class _LiveModules:
    """Load live modules of timm and transformers, and the backbone in a live client model."""

    def matches(self, source: Any) -> bool:
        return isinstance(source, nn.Module)

    def load(self, source: nn.Module, options: SourceOptions) -> LoadedBackbone:
        options = _with_processor(options, lambda: _processor_of(source))
        return _load_live(find_backbone(source).module if options.from_model else source, options)


class _Configurations:
    """Load configuration objects of transformers."""

    def matches(self, source: Any) -> bool:
        return not _is_text(source) and hasattr(source, "model_type")

    def load(self, source: Any, options: SourceOptions) -> LoadedBackbone:
        return cast(LoadedBackbone, _transformers().load_config(source, options))


class _TimmNames:
    """Load names of timm, tags included. A folder of the same name with a configuration is preferred."""

    def matches(self, source: Any) -> bool:
        return _is_text(source) and _is_timm_name(str(source)) and not (Path(source) / "config.json").is_file()

    def load(self, source: Any, options: SourceOptions) -> LoadedBackbone:
        if options.from_model:
            names.refuse_path(str(source))
            raise SourceError(
                f"from_model is for a whole model of transformers: {source} is a backbone of timm already"
            )
        return load_timm(str(source), options)


class _ConfigurationFiles:
    """Load configurations of transformers that are .json files."""

    def matches(self, source: Any) -> bool:
        return _is_text(source) and str(source).endswith(".json") and Path(source).is_file()

    def load(self, source: Any, options: SourceOptions) -> LoadedBackbone:
        path, library = Path(source), _transformers()
        options = _with_processor(options, lambda: read_processor(path.parent))
        return cast(LoadedBackbone, library.load_config(library.read_config(path), options))


class _Folders:
    """Load folders of a saved model, of transformers or timm."""

    def matches(self, source: Any) -> bool:
        return _is_text(source) and (Path(source).expanduser() / "config.json").is_file()

    def load(self, source: Any, options: SourceOptions) -> LoadedBackbone:
        return _load_folder(Path(source).expanduser(), Path(source).name, options)


class _TimmHubNames:
    """Load names of timm as the model hub has them: ``timm/resnet18.a1_in1k``."""

    def matches(self, source: Any) -> bool:
        return _may_be_on_hub(source) and _is_timm_repository(_repository(source))

    def load(self, source: Any, options: SourceOptions) -> LoadedBackbone:
        return load_timm(str(source).removeprefix("timm/"), options)


class _HubRepositories:
    """Load repositories of the model hub that hold a saved model."""

    def matches(self, source: Any) -> bool:
        return _may_be_on_hub(source) and "/" in _repository(source)

    def load(self, source: Any, options: SourceOptions) -> LoadedBackbone:
        return _load_folder(hub_folder(_repository(source)), Path(source).name, options)


LOADERS: tuple[SourceLoader, ...] = (
    _PlainModules(),
    _LiveModules(),
    _Configurations(),
    _TimmNames(),
    _ConfigurationFiles(),
    _Folders(),
    _TimmHubNames(),
    _HubRepositories(),
)
"""The loaders of this package, in the order in which they are asked."""


def _registered_loaders() -> Iterator[tuple[str, SourceLoader]]:
    """Import the loaders of other packages one after the other. Raises SourceError for one that cannot be imported."""
    for entry in importlib.metadata.entry_points(group=ENTRY_POINTS):
        try:
            found = entry.load()
            loader = found() if isinstance(found, type) else found
        except Exception as error:  # the code of another package fails as it likes
            raise SourceError(
                f"the source {entry.name} ({entry.value}) cannot be imported: {first_line(error, typed=True)}; repair or "
                "uninstall its package"
            ) from error
        yield entry.name, loader


def _checked(name: str, loaded: Any) -> LoadedBackbone:
    if not isinstance(loaded, LoadedBackbone):
        raise SourceError(
            f"the source {name} returned a {type(loaded).__name__}, not a LoadedBackbone: repair its package"
        )
    return loaded


def _refuse(source: Any, options: SourceOptions) -> LoadedBackbone:
    """Raise SourceError for what no loader takes. timm has the last word on names: it suggests near ones."""
    if not _is_text(source):
        raise SourceError(
            f"a {type(source).__name__} is no source: pass a name, a folder, a configuration, or a module"
        )
    names.refuse_file(str(source))
    names.refuse_path(str(source))
    return load_timm(str(source).removeprefix("timm/"), options)


# ---- names, folders and the hub -------------------------------------------------------------------------------------


def _is_text(source: Any) -> bool:
    return isinstance(source, (str, os.PathLike))


def _is_timm_name(name: str) -> bool:
    return timm.is_model(name.partition(".")[0])


def _may_be_on_hub(source: Any) -> bool:
    return _is_text(source) and not names.is_path(str(source)) and not Path(source).exists()


def _repository(source: Any) -> str:
    return str(source).removeprefix("hf-hub:").removeprefix("hf_hub:")


def _is_timm_repository(repository: str) -> bool:
    return repository.startswith("timm/") and _is_timm_name(repository.removeprefix("timm/"))


def _is_timm_folder(folder: Path) -> bool:
    return "architecture" in read_json(folder / "config.json", "a model's configuration")


def _load_folder(folder: Path, name: str, options: SourceOptions) -> LoadedBackbone:
    """Load a saved model: timm's, a backbone of transformers, or with ``from_model`` the backbone in a client model."""
    if not _is_timm_folder(folder):
        options = _with_processor(options, lambda: read_processor(folder))
    if options.from_model:
        place = find_backbone(_transformers().load_client_folder(folder))
        source = Source(library="transformers", name=f"{name}:{place.path}", weights="pretrained")
        return _load_live(place.module, options, source)
    if _is_timm_folder(folder):
        return load_timm_folder(folder, options)
    return cast(LoadedBackbone, _transformers().load_folder(folder, options, name=name))


def _with_processor(options: SourceOptions, read: Callable[[], Preprocessing | None]) -> SourceOptions:
    """Return the options with the preprocessing that comes with a source, unless the user gave another."""
    return options if options.image is not None else dataclasses.replace(options, image=read())


def _processor_of(model: Any) -> Preprocessing | None:
    """Read the image processor that lies beside the files that a live model of transformers came from."""
    name = str(getattr(model, "name_or_path", "") or getattr(getattr(model, "config", None), "_name_or_path", "") or "")
    if not name:
        return None
    if Path(name).is_dir():
        return read_processor(Path(name))
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        return None
    for file in PROCESSOR_FILES:
        found = _hub_file(name, file)
        if found is not None and (preprocessing := read_processor(found.parent)) is not None:
            return preprocessing
    return None


def _hub_file(repository: str, name: str) -> Path | None:
    """Return a file of a hub repository, from the hub's cache or the hub; None where neither has it."""
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    cached = try_to_load_from_cache(repository, name)
    if isinstance(cached, str):
        return Path(cached)
    if not hub_answers():
        return None
    try:
        return Path(hf_hub_download(repository, name))
    except Exception as error:  # HTTP, validation and missing-entry errors have no common base
        logging.getLogger(__name__).debug("%s has no %s: %s", repository, name, error)
        return None


def _load_live(module: nn.Module, options: SourceOptions, source: Source | None = None) -> LoadedBackbone:
    """Copy a live backbone and load the copy. ``source``: the record of a model that was loaded from files."""
    if options.weights != "pretrained":
        raise SourceError(f"a live {type(module).__name__} has weights of its own: leave --weights out")
    net: Any = plain_copy(module)
    if not (is_backbone(net) or is_timm_module(net)):
        raise SourceError(
            f"a {type(net).__name__} is no backbone: of a model that has one inside take it with from_model=True, "
            "any other module wrap as ModuleSource(module=..., stage_names=[...])"
        )
    if source is None:
        name = getattr(getattr(net, "config", None), "model_type", None) or type(net).__name__
        library = "timm" if is_timm_module(net) else "transformers"
        source = Source(library=library, name=name, weights="module")  # type: ignore[arg-type]
    if source.weights == "module":
        source = Source(library=source.library, name=source.name, weights="module", weights_sha256=tensors_sha256(net))
    if is_timm_module(net):
        return load_timm_module(net, source, options)
    return cast(LoadedBackbone, _transformers().load_module(net, source, options))


def _transformers() -> Any:
    """Import our module for transformers, which takes seconds and is not needed for timm's networks."""
    with needing("a backbone of transformers", "build"):
        from edge_backbones.toolchain.sources import transformers
    return transformers
