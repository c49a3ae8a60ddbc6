"""One entry for every kind of source: what it is decides which loader takes it.

Whatever the source, it is not changed: live modules are copied, and put into eval mode, float32 and host memory there.
"""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast, get_args

import timm
import torch
from torch import nn

from edge_backbones.bundle.manifest import Source
from edge_backbones.errors import MissingDependencyError, SourceError, first_line
from edge_backbones.integrations.clients import find_backbone, is_backbone, is_timm_module
from edge_backbones.spec import BackboneSpec, Layout
from edge_backbones.toolchain.artifacts import LoadedBackbone
from edge_backbones.toolchain.sources.base import (
    SourceOptions,
    hub_answers,
    hub_folder,
    kept_stages,
    read_json,
    refuse_dataset_index,
    tensors_sha256,
)
from edge_backbones.toolchain.sources.module_source import ModuleSource
from edge_backbones.toolchain.sources.modules import feature_maps, missing_arguments, plain_copy
from edge_backbones.toolchain.sources.processors import PROCESSOR_FILES, Preprocessing, given, read_processor, unknown
from edge_backbones.toolchain.sources.timm import load_timm, load_timm_folder, load_timm_module


def load_source(source: Any, options: SourceOptions, *, from_model: bool = False) -> LoadedBackbone:
    """Load a backbone, in eval mode.

    ``source``: a timm name; a hub id; a ``save_pretrained`` folder of transformers or a timm model's; a configuration of
    transformers, or its .json file; a live backbone of either library, or a whole timm network; a :class:`ModuleSource`. With
    ``from_model`` a client model (a folder, a hub id, or live), of which the backbone is taken. Raises SourceError,
    HubUnreachableError, InputError, MissingDependencyError.
    """
    if isinstance(source, LoadedBackbone):
        return source
    options = dataclasses.replace(options, image=given(options.image))
    if isinstance(source, ModuleSource):
        if from_model:
            raise SourceError("from_model is for a whole model of transformers: a ModuleSource is a backbone already")
        return _load_plain(source, options)
    if isinstance(source, nn.Module):
        options = _with_processor(options, lambda: _processor_of(source))
        return _load_live(find_backbone(source).module if from_model else source, options)
    if not isinstance(source, (str, os.PathLike)):
        if hasattr(source, "model_type"):
            return cast(LoadedBackbone, _transformers().load_config(source, options))
        raise SourceError(
            f"a {type(source).__name__} is no source: pass a name, a folder, a configuration, or a module"
        )
    name = str(source)
    if from_model and timm.is_model(name.partition(".")[0]) and not Path(name).exists():
        raise SourceError(f"from_model is for a whole model of transformers: {name} is a backbone of timm already")
    if timm.is_model(name.partition(".")[0]) and not from_model and not (Path(name) / "config.json").is_file():
        return load_timm(name, options)
    if name.endswith(".json") and Path(name).is_file():
        options = _with_processor(options, lambda: read_processor(Path(name).parent))
        return cast(LoadedBackbone, _transformers().load_config(_transformers().read_config(Path(name)), options))
    folder = _folder(name)
    if folder is None:
        return load_timm(name.removeprefix("timm/"), options)  # refuses unknown names with near ones
    if not _is_timm_folder(folder):
        options = _with_processor(options, lambda: read_processor(folder))
    if from_model:
        place = find_backbone(_transformers().load_client_folder(folder))
        label = f"{Path(name).name}:{place.path}"
        return _load_live(place.module, options, Source(library="transformers", name=label, weights="pretrained"))
    if _is_timm_folder(folder):
        return load_timm_folder(folder, options)
    return cast(LoadedBackbone, _transformers().load_folder(folder, options, name=Path(name).name))


def _with_processor(options: SourceOptions, read: Callable[[], Preprocessing | None]) -> SourceOptions:
    """With the preprocessing that comes with a source, unless the user gave another."""
    return options if options.image is not None else dataclasses.replace(options, image=read())


def _processor_of(model: Any) -> Preprocessing | None:
    """The image processor that lies beside the files that a live model of transformers came from."""
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
    """A file of a hub repository, from the hub's cache or the hub; None where neither has it."""
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


def _folder(name: str) -> Path | None:
    """The local folder of a source given as text, from the hub if need be; None for what can only be a timm name."""
    path = Path(name).expanduser()
    if (path / "config.json").is_file():
        return path
    if path.is_dir():
        raise SourceError(f"{path} has no config.json: pass a folder that save_pretrained wrote")
    if path.is_file():
        raise SourceError(
            f"{path} is a file: pass the folder that holds it, or a name or configuration with weights={path}"
        )
    if path.is_absolute() or name.startswith((".", "~")):
        raise SourceError(f"{path} does not exist")
    repository = name.removeprefix("hf-hub:").removeprefix("hf_hub:")
    if repository.startswith("timm/") and timm.is_model(repository.removeprefix("timm/").partition(".")[0]):
        return None
    return hub_folder(repository) if "/" in repository else None


def _is_timm_folder(folder: Path) -> bool:
    return "architecture" in read_json(folder / "config.json", "a model's configuration")


def _load_live(module: nn.Module, options: SourceOptions, source: Source | None = None) -> LoadedBackbone:
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


def _load_plain(source: ModuleSource, options: SourceOptions) -> LoadedBackbone:
    refuse_dataset_index(options)
    if options.weights != "pretrained" or options.output_stride is not None or options.hidden_states:
        raise SourceError("weights, output_stride and hidden_states are not for a plain module: set them in the module")
    if options.num_channels not in (None, source.num_channels):
        raise SourceError(
            f"this ModuleSource takes {source.num_channels} channels, not {options.num_channels}: say it in one place"
        )
    stage_names = tuple(source.stage_names)
    if not stage_names or len(set(stage_names)) != len(stage_names):
        raise SourceError(f"stage_names must name every output once, got {list(stage_names)}")
    features, indices = kept_stages(stage_names, options, tuple(range(len(stage_names))))
    net = plain_copy(source.module)
    height, width = options.img_size or source.size
    given_image = options.image or given(source.image) or unknown(f"this ModuleSource of a {type(net).__name__}")
    preprocessing = given_image.for_channels(source.num_channels)
    image = torch.zeros(1, source.num_channels, height, width)
    try:
        with torch.no_grad():
            returned = net(image)
    except Exception as error:  # a user's module fails with whatever it trips over
        if missing := missing_arguments(net):
            raise SourceError(
                f"forward of this {type(net).__name__} needs {', '.join(missing)} besides the image: wrap it in a module "
                "whose forward takes the image alone"
            ) from error
        raise SourceError(
            f"this {type(net).__name__} does not run on images of {height}x{width} (height x width): "
            f"{first_line(error, typed=True)}"
        ) from error
    outputs = feature_maps(returned, stage_names)
    nchw: Layout = "NCHW"
    others = [axes for axes in source.layouts or () if axes not in get_args(Layout)]
    if others:
        raise SourceError(f"layouts {others} are unknown: {', '.join(get_args(Layout))} are known")
    layouts = tuple(source.layouts or [nchw] * len(stage_names))
    if len(outputs) != len(stage_names) or [len(axes) for axes in layouts] != [output.ndim for output in outputs]:
        shapes = [tuple(output.shape) for output in outputs]
        raise SourceError(f"this {type(net).__name__} returns {shapes}, not {', '.join(layouts)} for {stage_names}")
    channels = tuple(int(o.shape[axes.index("C")]) for o, axes in zip(outputs, layouts, strict=True))
    kept = [stage_names.index(feature) for feature in features]
    return LoadedBackbone(
        module=_Chosen(net, stage_names, kept, writes_input=image._version > 0).eval(),
        source=preprocessing.written_into(
            Source(library="torch", name=type(net).__name__, weights="module", weights_sha256=tensors_sha256(net))
        ),
        image_config=preprocessing.config,
        channels_in=source.num_channels,
        height=height,
        width=width,
        spec=BackboneSpec(
            stage_names=stage_names,
            out_features=features,
            out_indices=indices,
            channels=tuple(channels[i] for i in kept),
            strides=tuple(_strides(outputs[i], layouts[i], height, width) for i in kept),
            num_features=channels,
            layouts=tuple(layouts[i] for i in kept),
        ),
        image_differs=preprocessing.differs,
    )


class _Chosen(nn.Module):
    """Some outputs of a module, as float32 maps. One that writes into its input gets an image of its own."""

    def __init__(self, net: nn.Module, stage_names: tuple[str, ...], chosen: list[int], *, writes_input: bool) -> None:
        super().__init__()
        self.net = net
        self.stage_names = stage_names
        self.chosen = chosen
        self.writes_input = writes_input

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        outputs = feature_maps(self.net(pixel_values.clone() if self.writes_input else pixel_values), self.stage_names)
        return tuple(outputs[i] for i in self.chosen)


def _strides(output: torch.Tensor, layout: Layout, height: int, width: int) -> tuple[int, int]:
    if "H" not in layout:
        return 1, 1
    cells = (int(output.shape[layout.index(axis)]) for axis in "HW")
    vertical, horizontal = (max(1, round(n / m)) for n, m in zip((height, width), cells, strict=True))
    return vertical, horizontal


def _transformers() -> Any:
    """Our module for that library, which takes seconds to import and is not needed for timm's networks."""
    try:
        from edge_backbones.toolchain.sources import transformers
    except ModuleNotFoundError as error:
        raise MissingDependencyError(f"a backbone of transformers ({error.name} is not installed)", "build") from error
    return transformers
