"""Load backbones of transformers: configurations, live modules, ``save_pretrained`` folders, and whole client models.

Works with transformers 4.44 and with 5.x. Where they differ, the behaviour is asked for (a class attribute, a mapping)
and no version is compared.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import torch
import transformers
from torch import nn
from transformers.models.auto.modeling_auto import MODEL_FOR_BACKBONE_MAPPING
from transformers.utils import logging as library_logging

from edge_backbones.bundle.manifest import Source
from edge_backbones.errors import InputError, SourceError, first_line
from edge_backbones.reading import file_sha256
from edge_backbones.spec import BackboneSpec, ExtraOutput, Layout, measured_stride
from edge_backbones.toolchain.artifacts import LoadedBackbone
from edge_backbones.toolchain.sources.base import (
    SourceOptions,
    kept_stages,
    random_seed,
    read_checkpoint,
    read_json,
    refuse_dataset_index,
    seeded,
    wake_residual_branches,
)
from edge_backbones.toolchain.sources.checkpoints import (
    explanation,
    fits,
    learned_shapes,
    main_part,
    misfit,
    place,
    surplus_tensors,
)
from edge_backbones.toolchain.sources.nearest import nearest
from edge_backbones.toolchain.sources.processors import given, unknown
from edge_backbones.toolchain.sources.timm import load_timm, load_timm_module


def load_config(config: Any, options: SourceOptions) -> LoadedBackbone:
    """Load the network that AutoBackbone makes of a configuration, which is not changed.

    A configuration holds no weights: they are random with a seed, or of a checkpoint file; timm's own for a
    TimmBackboneConfig. Raises SourceError for a configuration that is no backbone's.
    """
    config = _backbone_config(config)
    if config.model_type == "timm_backbone":
        return _load_timm_config(config, options)
    _refuse_timm_options(options)
    seed = random_seed(options.weights)
    source = Source(library="transformers", name=config.model_type, weights="random", seed=seed)
    with _choosing_stages(config, options):
        if seed is not None:
            with seeded(seed):
                net = _from_config(config)
            wake_residual_branches(net)
        elif options.weights == "pretrained":
            raise SourceError(
                f"a {type(config).__name__} has no weights: pass the folder or the hub id of a pretrained model instead, "
                "a checkpoint file (--weights model.safetensors) or seeded random weights (--weights random:0)"
            )
        else:
            path = Path(options.weights)
            net = _from_checkpoint(config, path)
            sha256 = file_sha256(path)
            source = msgspec.structs.replace(source, weights="checkpoint", weights_sha256=sha256)
    return load_module(net, source, options)


def load_folder(folder: Path, options: SourceOptions, *, name: str) -> LoadedBackbone:
    """Load what ``save_pretrained`` wrote: a backbone, or a model of the same architecture with a head, which is dropped.

    With weights that are random or of another file only the configuration is taken. Raises SourceError for files that
    are no such model or lack weights that the backbone needs.
    """
    whole = read_config(folder)
    config = _backbone_config(whole)
    if options.weights != "pretrained":
        return load_config(config, options)
    if getattr(whole, "backbone_config", None) is not None:
        raise SourceError(
            f"{folder} is a whole model ({type(whole).__name__}): take the backbone in it with from_model=True "
            "(--from-model)"
        )
    if config.model_type == "timm_backbone":
        backbone_class = transformers.TimmBackbone
    else:
        _refuse_timm_options(options)
        backbone_class = _backbone_class(config)
    with _choosing_stages(config, options):
        net = _complete(str(folder), folder, backbone_class, config=config)
    source = Source(library="transformers", name=name, weights="pretrained")
    return load_module(net, source, options)


def load_client_folder(folder: Path) -> Any:
    """Load a whole model, such as DETR, as its own class does. Raises SourceError for what transformers cannot load."""
    config = read_config(folder)
    names = getattr(config, "architectures", None) or ["(none)"]
    model_class = getattr(transformers, names[0], None)
    if model_class is None:
        raise SourceError(f"{folder} is a {names[0]}, which transformers {transformers.__version__} does not have")
    return _complete(str(folder), folder, model_class, config=_without_downloads(config))


def load_module(net: Any, source: Source, options: SourceOptions) -> LoadedBackbone:
    """Load a live backbone of transformers. It is used as it is: hand over a copy in eval mode."""
    net = net.float()  # transformers 5 keeps the half precision of a checkpoint
    if isinstance(net, transformers.TimmBackbone):
        return _load_timm_backbone(net, source, options)
    _refuse_timm_options(options)
    channels_in = _channels_in(net.config)
    if options.num_channels not in (None, channels_in):
        raise SourceError(
            f"{source.name} takes {channels_in} channels, not {options.num_channels}: set num_channels in its configuration"
        )
    stage_names = tuple(net.stage_names)
    features, indices = kept_stages(stage_names, options, tuple(net.out_indices))
    if list(features) != list(net.out_features):
        net.out_features = list(features)
    preprocessing = (given(options.image) or unknown(f"this {type(net).__name__}")).for_channels(channels_in)
    own_size = getattr(net.config, "image_size", None) or options.default_size
    height, width = options.img_size or preprocessing.usual_size or _pair(own_size)
    module = _Stages(net, options)
    spec = _measured(module, stage_names, features, indices, torch.zeros(1, channels_in, height, width))
    config = {**_json_of(net.config), "out_features": list(features), "out_indices": list(indices)}
    if module.dataset_index is not None:
        source = msgspec.structs.replace(source, options={**source.options, "dataset_index": module.dataset_index})
    return LoadedBackbone(
        module=module.eval(),
        source=preprocessing.written_into(msgspec.structs.replace(source, config=config)),
        image_config=preprocessing.config,
        channels_in=channels_in,
        height=height,
        width=width,
        spec=spec,
        image_differs=preprocessing.differs,
    )


class _Stages(nn.Module):
    """A transformers backbone as a function of tensors: maps, then class tokens, then hidden states that are no maps."""

    def __init__(self, net: Any, options: SourceOptions) -> None:
        super().__init__()
        self.net = net
        self.hidden_states = options.hidden_states
        self.maps_among_hidden: dict[int, int] = {}
        experts = int(getattr(net.config, "num_experts", 1) or 1)
        self.dataset_index = options.dataset_index if experts > 1 else None
        if experts <= 1:
            refuse_dataset_index(options)
        if not 0 <= options.dataset_index < max(experts, 1):
            raise InputError(f"dataset_index must be below {experts}, got {options.dataset_index}")

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        output = self.call(pixel_values)
        hidden = output.hidden_states if self.hidden_states else ()
        others = [state for i, state in enumerate(hidden) if i not in self.maps_among_hidden]
        return (*output.feature_maps, *(getattr(output, "cls_tokens", None) or ()), *others)

    def call(self, pixel_values: torch.Tensor) -> Any:
        """Run the backbone and return its own output."""
        arguments: dict[str, Any] = {"output_hidden_states": self.hidden_states, "return_dict": True}
        if self.dataset_index is not None:
            arguments["dataset_index"] = torch.full((pixel_values.shape[0],), self.dataset_index)
        return self.net(pixel_values, **arguments)


def _measured(
    module: _Stages,
    stage_names: tuple[str, ...],
    features: tuple[str, ...],
    indices: tuple[int, ...],
    sample: torch.Tensor,
) -> BackboneSpec:
    """Measure what one forward returns: the library's ``num_features`` may be wrong, and it knows no strides."""
    net: Any = module.net
    try:
        with torch.no_grad():
            output = module.call(sample)
    except Exception as error:  # networks refuse sizes, channels and stages with whatever they trip over
        size = "x".join(str(n) for n in sample.shape[2:])
        raise SourceError(
            f"{type(net).__name__} with the stages {list(features)} does not run on images of {size} "
            f"(height x width): {first_line(error, typed=True)}"
        ) from error
    maps = output.feature_maps or ()
    if len(maps) != len(features):
        raise SourceError(f"{type(net).__name__} returns {len(maps)} maps for the stages {list(features)}")
    if len(net.num_features) != len(stage_names):
        raise SourceError(
            f"this {type(net.config).__name__} gives channels of {len(net.num_features)} stages and names "
            f"{len(stage_names)}: lists in it disagree (resnet: depths and hidden_sizes)"
        )
    layouts: list[Layout] = ["NCHW" if feature_map.ndim == 4 else "NLC" for feature_map in maps]
    extras = [
        ExtraOutput(name=f"cls_tokens.{feature}", layout="NC", channels=int(token.shape[-1]))
        for feature, token in zip(features, getattr(output, "cls_tokens", None) or (), strict=False)
    ]
    cls_tokens, hidden_states = tuple(extra.name for extra in extras), []
    for i, state in enumerate(output.hidden_states or () if module.hidden_states else ()):
        if not isinstance(state, torch.Tensor):
            raise SourceError(
                f"{type(net).__name__} returns a {type(state).__name__} for each hidden state, not a tensor: "
                "build it without hidden states"
            )
        same = next((k for k, feature_map in enumerate(maps) if feature_map is state), None)
        if same is not None:
            module.maps_among_hidden[i] = same
            hidden_states.append(features[same])
            continue
        layout: Layout = "NCHW" if state.ndim == 4 else "NLC"
        channels = int(state.shape[layout.index("C")])
        extras.append(ExtraOutput(name=f"hidden_states.{i}", layout=layout, channels=channels))
        hidden_states.append(extras[-1].name)
    channels_of = [int(m.shape[axes.index("C")]) for m, axes in zip(maps, layouts, strict=True)]
    num_features = [_one_number(n) for n in net.num_features]
    for index, channels in zip(indices, channels_of, strict=True):
        num_features[index] = channels
    patch = _pair(getattr(net.config, "patch_size", None) or 1)
    return BackboneSpec(
        stage_names=stage_names,
        out_features=features,
        out_indices=indices,
        channels=tuple(channels_of),
        strides=tuple(
            _strides(sample, m, patch) if axes == "NCHW" else patch for m, axes in zip(maps, layouts, strict=True)
        ),
        num_features=tuple(num_features),
        layouts=tuple(layouts),
        cls_tokens=cls_tokens,
        hidden_states=tuple(hidden_states),
        extras=tuple(extras),
        has_attentions=bool(getattr(net, "has_attentions", True)),
    )


def _strides(sample: torch.Tensor, feature_map: torch.Tensor, patch: tuple[int, int]) -> tuple[int, int]:
    vertical, horizontal = (
        _stride(int(pixels), int(cells), size)
        for pixels, cells, size in zip(sample.shape[2:], feature_map.shape[2:], patch, strict=True)
    )
    return vertical, horizontal


def _stride(pixels: int, cells: int, patch: int) -> int:
    """Return the stride that explains a map, with or without padding: the patch size or a power of two, where several do."""
    fitting = [s for s in range(1, pixels + 1) if cells in (pixels // s, -(-pixels // s))]
    likely = [s for s in fitting if s == patch > 1] or [s for s in fitting if s & (s - 1) == 0]
    return (likely or fitting or [measured_stride(pixels, cells)])[0]


# ---- configurations -------------------------------------------------------------------------------------------------


def read_config(path: Path) -> Any:
    """Read a configuration file, or the one in a folder. Raises SourceError for one that this transformers does not know."""
    read_json(path / "config.json" if path.is_dir() else path, "a model's configuration")
    try:
        return transformers.AutoConfig.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # JSON, validation and unknown-type errors have no common base
        raise SourceError(
            f"transformers {transformers.__version__} does not read {path}: {first_line(error)}"
        ) from error


def _backbone_config(config: Any) -> Any:
    """Copy a configuration, so that it may be changed; of a client's configuration the backbone's part."""
    inner = getattr(config, "backbone_config", None)
    config = copy.deepcopy(config if inner is None else inner)
    known = {c.model_type for c in MODEL_FOR_BACKBONE_MAPPING}
    if getattr(config, "model_type", None) not in known:
        raise SourceError(
            f"{type(config).__name__} is not a backbone of transformers {transformers.__version__}, which are "
            f"{', '.join(sorted(known))}"
        )
    return _without_downloads(config)


def _without_downloads(config: Any) -> Any:
    """Keep transformers 4.44 from fetching pretrained weights in a constructor: the weights come from elsewhere here."""
    for part in (config, getattr(config, "backbone_config", None)):
        if part is not None and getattr(part, "use_pretrained_backbone", False):
            part.use_pretrained_backbone = False
    return config


def _backbone_class(config: Any) -> Any:
    return MODEL_FOR_BACKBONE_MAPPING[type(config)]


@contextlib.contextmanager
def _choosing_stages(config: Any, options: SourceOptions) -> Iterator[None]:
    """Set the stages in the configuration before the network exists, because swin has a norm per chosen stage.

    Inside, what transformers raises becomes a SourceError.
    """
    chosen = options.out_indices is not None or options.out_features is not None
    if chosen and config.model_type != "timm_backbone":
        features, _ = kept_stages(tuple(config.stage_names), options, (-1,))
        config.out_features = list(features)
    try:
        yield
    except SourceError:
        raise
    except ImportError as error:
        raise SourceError(f"{config.model_type} needs a library that is not installed: {first_line(error)}") from error
    except Exception as error:  # constructors refuse options with whatever they trip over
        raise SourceError(
            f"transformers cannot make a {config.model_type} backbone of this configuration: "
            f"{first_line(error, typed=True)}"
        ) from error


def _from_config(config: Any) -> Any:
    make: Any = transformers.AutoBackbone.from_config
    return make(config, attn_implementation="eager").eval()


def _complete(what: str, folder: Path | None, model_class: Any, **arguments: Any) -> Any:
    """Call ``from_pretrained`` and accept no gaps: raises SourceError when tensors are missing or do not fit."""
    load: Any = model_class.from_pretrained
    if model_class is transformers.TimmBackbone:  # its own takes the folder for a timm name
        load = functools.partial(vars(transformers.PreTrainedModel)["from_pretrained"].__func__, model_class)
    try:
        with _quiet():
            net, report = load(None if folder is None else str(folder), output_loading_info=True, **arguments)
    except Exception as error:  # safetensors, pickle and torch errors have no common base
        cause = first_line(error).partition(". ")[0]
        raise SourceError(f"{what} cannot be loaded as {model_class.__name__} ({cause})") from error
    missing = [key for key in report["missing_keys"] if not key.endswith("num_batches_tracked")]
    missing += [str(key[0]) for key in report.get("mismatched_keys", ())]
    if missing:
        raise SourceError(
            f"{what} has no fitting weights for {len(missing)} tensors of {model_class.__name__}, "
            f"{sorted(missing)[0]} first: wrong file?"
        )
    return net.eval()


def _from_checkpoint(config: Any, path: Path) -> Any:
    """Load a file of the backbone, or of a model that holds it, whatever prefix the backbone has there.

    Names of other releases go through transformers' own key mapping. Raises SourceError unless every learned tensor came
    from the file.
    """
    state = read_checkpoint(path)
    with seeded(0):
        net = _from_config(config)
    every, wanted = net.state_dict(), learned_shapes(net)
    what = type(net).__name__
    placement = place(path, what, state, wanted, every)
    if placement is None or not fits(state, wanted, placement):
        try:
            return _complete(
                f"{path} in a {type(config).__name__}", None, type(net), config=config, state_dict=main_part(state)
            )
        except SourceError as error:
            raise SourceError(f"{error} {explanation(what, state, wanted, nearest(state))}") from error
    surplus = surplus_tensors(state, wanted, every, placement)
    if surplus:
        raise SourceError(f"{path} {misfit(what, state, wanted, surplus=surplus, near=nearest(state))}")
    placed = {name: state[key] for name, key in placement.keys.items()}
    net.load_state_dict({k: v for k, v in placed.items() if v.shape == every[k].shape}, strict=False)
    return net


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the library, which reports every head that is not loaded and draws bars. What matters is checked here."""
    before, bars = logging.root.manager.disable, library_logging.is_progress_bar_enabled()
    logging.disable(logging.WARNING)
    library_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        logging.disable(before)
        if bars:
            library_logging.enable_progress_bar()  # type: ignore[no-untyped-call]


def _refuse_timm_options(options: SourceOptions) -> None:
    if options.output_stride is not None:
        raise SourceError("output_stride is an option of timm names: transformers sets strides in the configuration")


def _channels_in(config: Any) -> int:
    return int(getattr(config, "num_channels", None) or getattr(config, "stem_num_channels", None) or 3)


def _pair(value: Any) -> tuple[int, int]:
    if isinstance(value, (list, tuple)):
        return int(value[0]), int(value[-1])
    return int(value), int(value)


def _one_number(value: Any) -> int:
    """Return the last of several numbers: pp_lcnet_v4 gives its stem's channels as (in, middle, out)."""
    return int(value[-1]) if isinstance(value, (list, tuple)) else int(value)


def _json_of(config: Any) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
    content.pop("_name_or_path", None)  # a path of the build machine
    return content


# ---- timm inside of transformers ------------------------------------------------------------------------------------


def _load_timm_config(config: Any, options: SourceOptions) -> LoadedBackbone:
    """Load what a TimmBackboneConfig asks timm for. Maps keep timm's layout, as TimmBackbone returns them."""
    if not config.backbone:
        raise SourceError("backbone is not set in the config. Please set it to a timm model name.")
    if not getattr(config, "features_only", True):
        raise SourceError("a TimmBackboneConfig with features_only=False makes no backbone: leave it at True")
    chosen = options.out_indices is not None or options.out_features is not None
    merged = dataclasses.replace(
        options,
        num_channels=options.num_channels or config.num_channels,
        output_stride=options.output_stride or getattr(config, "output_stride", None),
        out_indices=options.out_indices if chosen else tuple(getattr(config, "out_indices", None) or (-1,)),
    )
    loaded = load_timm(config.backbone, merged, native_layout=True)
    return _with_config(loaded, config)


def _load_timm_backbone(net: Any, source: Source, options: SourceOptions) -> LoadedBackbone:
    """Load the feature extractor in a live TimmBackbone. Its layout is kept."""
    if options.out_indices is None and options.out_features is None:
        options = dataclasses.replace(options, out_indices=tuple(net.out_indices))
    loaded = load_timm_module(net._backbone, source, options, native_layout=True)
    return _with_config(loaded, net.config)


def _with_config(loaded: LoadedBackbone, config: Any) -> LoadedBackbone:
    """Return it with the configuration of transformers in the record of its source."""
    content = {
        **_json_of(config),
        "stage_names": list(loaded.spec.stage_names),
        "out_features": list(loaded.spec.out_features),
        "out_indices": list(loaded.spec.out_indices),
    }
    source = msgspec.structs.replace(loaded.source, library="transformers", config=content)
    return dataclasses.replace(loaded, source=source)
