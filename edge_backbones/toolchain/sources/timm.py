"""Load backbones of timm: any name that ``timm.create_model(..., features_only=True)`` knows, tags included, and modules."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import logging
from collections.abc import Iterator, Mapping, Set
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data.config import resolve_data_config, resolve_model_data_config
from timm.layers.config import set_layer_config
from timm.models._features import FeatureGetterNet, FeatureHookNet
from torch import nn

from edge_backbones.bundle.manifest import Source
from edge_backbones.errors import HubUnreachableError, SourceError
from edge_backbones.reading import file_sha256
from edge_backbones.spec import BackboneSpec, ExtraOutput, Layout
from edge_backbones.toolchain.artifacts import LoadedBackbone
from edge_backbones.toolchain.sources.base import (
    OFFLINE_ADVICE,
    SourceOptions,
    hub_answers,
    kept_stages,
    random_seed,
    read_checkpoint,
    read_json,
    refuse_dataset_index,
    seeded,
    wake_residual_branches,
)
from edge_backbones.toolchain.sources.checkpoints import (
    absent,
    fits,
    learned_shapes,
    main_part,
    misfit,
    place,
    surplus_tensors,
    whole_names,
    without_wrappers,
)
from edge_backbones.toolchain.sources.nearest import nearest
from edge_backbones.toolchain.sources.processors import given, of_timm

_MOST_CHANNELS = 16  # channels of an image: a stem with more takes pixels folded into channels


def load_timm(name: str, options: SourceOptions, *, native_layout: bool = False) -> LoadedBackbone:
    """Create the network, with its weights, in eval mode.

    Maps come out NCHW, with ``native_layout`` as timm's feature extractor gives them (NHWC for the swin family). Hidden
    states are every stage up to the last kept one.

    Raises SourceError for an unknown name (near ones are suggested), options that the architecture does not take, or
    weights that do not fit; HubUnreachableError when pretrained weights cannot be had; InputError for the stages.
    """
    refuse_dataset_index(options)
    if options.img_size is None and (image := given(options.image)) is not None:
        options = dataclasses.replace(options, img_size=image.size)
    arguments = _arguments(name, options)
    with torch.device("meta"):
        outline = _create(name, {**arguments, "pretrained": False})
    stage_names = _stage_names(outline.feature_info.info)
    features, indices = kept_stages(stage_names, options, (len(stage_names) - 1,))
    kept = [stage_names.index(feature) for feature in features]
    arguments["out_indices"] = tuple(range(kept[-1] + 1)) if options.hidden_states else tuple(kept)
    source, net = _with_weights(name, options.weights, arguments)
    return _loaded(net, source, options, features, indices, native_layout=native_layout)


def load_timm_module(
    net: Any, source: Source, options: SourceOptions, *, native_layout: bool = False
) -> LoadedBackbone:
    """Load a live module of timm: a feature extractor (``features_only=True``) as it is, or a whole network, wrapped as one.

    ``net`` is used as it is: hand over a copy in eval mode. Stages that a feature extractor does not return cannot be
    kept; raises SourceError for those, InputError for a bad selection.
    """
    refuse_dataset_index(options)
    if options.output_stride is not None:
        raise SourceError("output_stride is for timm names: a live module has the strides that it was created with")
    options = dataclasses.replace(
        options, num_channels=_input_channels(net, options), img_size=options.img_size or _own_size(net)
    )
    if isinstance(net.feature_info, list):  # a whole network
        net = _feature_extractor(net, options)
    stage_names = _stage_names(net.feature_info.info)
    given = [i % len(stage_names) for i in net.feature_info.out_indices]
    returned = sorted(given)
    if given != returned and isinstance(net, (FeatureHookNet, FeatureGetterNet)):
        # Other classes return stages in the network's order; these do not, and do not say so.
        raise SourceError(f"a {type(net).__name__} with out_indices out of order: create it with {tuple(returned)}")
    features, indices = kept_stages(stage_names, options, tuple(returned))
    missing = [feature for feature in features if stage_names.index(feature) not in returned]
    if missing:
        held = [stage_names[i] for i in returned]
        raise SourceError(f"this module returns the stages {held} and not {missing}: create it with these out_indices")
    if options.hidden_states and returned != list(range(returned[-1] + 1)):
        raise SourceError(
            "hidden states need a module that returns every stage: create it with "
            f"out_indices={tuple(range(returned[-1] + 1))}"
        )
    return _loaded(net, source, options, features, indices, native_layout=native_layout)


def load_timm_folder(folder: Path, options: SourceOptions) -> LoadedBackbone:
    """Load a model that timm saved for the hub: ``config.json`` names its architecture and preprocessing."""
    content = read_json(folder / "config.json", "a timm model's configuration")
    try:
        name, preprocessing = str(content["architecture"]), dict(content.get("pretrained_cfg") or {})
    except (ValueError, KeyError, TypeError) as error:
        raise SourceError(f"{folder / 'config.json'} is not a timm model's configuration: {error!r}") from error
    if options.weights == "pretrained":
        files = [path for suffix in (".safetensors", ".bin", ".pth") for path in sorted(folder.glob(f"*{suffix}"))]
        if not files:
            raise SourceError(f"{folder} has no weights: a .safetensors, .bin or .pth file belongs beside config.json")
        options = dataclasses.replace(options, weights=str(files[0]))
    if options.image is None and preprocessing:
        config = resolve_data_config({}, pretrained_cfg=preprocessing)  # type: ignore[no-untyped-call]
        options = dataclasses.replace(options, image=of_timm(config, f"pretrained_cfg in {folder.name}/config.json"))
    return load_timm(name, options)


def _loaded(
    net: Any,
    source: Source,
    options: SourceOptions,
    features: tuple[str, ...],
    indices: tuple[int, ...],
    *,
    native_layout: bool,
) -> LoadedBackbone:
    """Describe a feature extractor of timm and wrap it so that it returns the kept stages."""
    info = net.feature_info.info
    stage_names = _stage_names(info)
    returned = sorted(i % len(info) for i in net.feature_info.out_indices)
    kept = [stage_names.index(feature) for feature in features]
    others = [i for i in returned if i not in kept and i < kept[-1]] if options.hidden_states else []
    names = {i: stage_names[i] if i in kept else f"hidden_states.{i}" for i in sorted((*kept, *others))}
    channels_last = str(getattr(net, "output_fmt", "NCHW")).endswith("NHWC")
    layout: Layout = "NHWC" if native_layout and channels_last else "NCHW"
    config = resolve_model_data_config(net)  # type: ignore[no-untyped-call]
    channels_in = options.num_channels or int(config["input_size"][0])
    preprocessing = (given(options.image) or of_timm(config, _read_from(net, source))).for_channels(channels_in)
    height, width = options.img_size or preprocessing.usual_size or config["input_size"][1:]
    spec = BackboneSpec(
        stage_names=stage_names,
        out_features=features,
        out_indices=indices,
        channels=tuple(int(info[i]["num_chs"]) for i in kept),
        strides=tuple((int(info[i]["reduction"]),) * 2 for i in kept),
        num_features=tuple(int(stage["num_chs"]) for stage in info),
        layouts=(layout,) * len(kept),
        hidden_states=tuple(names.values()) if options.hidden_states else (),
        extras=tuple(ExtraOutput(name=names[i], layout=layout, channels=int(info[i]["num_chs"])) for i in others),
    )
    return LoadedBackbone(
        module=_Stages(net, [returned.index(i) for i in (*kept, *others)], channels_last and not native_layout).eval(),
        source=preprocessing.written_into(source),
        image_config=preprocessing.config,
        channels_in=channels_in,
        height=int(height),
        width=int(width),
        spec=spec,
        image_differs=preprocessing.differs,
    )


def _read_from(net: Any, source: Source) -> str:
    """Name timm's configuration of a network, or say that it has none of its own."""
    config = getattr(net, "pretrained_cfg", None) or {}
    if not config.get("mean"):
        return f"timm's defaults, since {source.name} has no configuration"
    tag = f".{config['tag']}" if config.get("tag") else ""
    return f"timm's configuration of {config.get('architecture') or source.name.partition('.')[0]}{tag}"


def _input_channels(net: nn.Module, options: SourceOptions) -> int | None:
    """Return the channels that the first convolution takes, unless it takes pixels folded into channels."""
    first = next((m.in_channels for m in net.modules() if isinstance(m, nn.Conv2d)), None)
    if first is None or first > _MOST_CHANNELS:
        return options.num_channels
    if options.num_channels not in (None, first):
        raise SourceError(f"this module takes {first} channels, not {options.num_channels}: leave num_channels out")
    return first


def _own_size(net: nn.Module) -> tuple[int, int] | None:
    """Return the size that a network with position embeddings was created for, which timm's data config does not follow."""
    for module in net.modules():
        size = getattr(module, "img_size", None)
        if size is not None:
            height, width = (size, size) if isinstance(size, int) else tuple(size)[:2]
            return int(height), int(width)
    return None


class _Stages(nn.Module):
    """The chosen outputs of a feature extractor, which are in stage order whatever the order of its ``out_indices``."""

    def __init__(self, net: nn.Module, chosen: list[int], channels_last: bool) -> None:
        super().__init__()
        self.net = net
        self.chosen = chosen
        self.channels_last = channels_last

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        maps = self.net(pixel_values)
        maps = list(maps.values()) if isinstance(maps, dict) else list(maps)
        chosen = [maps[i] for i in self.chosen]
        return tuple(m.permute(0, 3, 1, 2) for m in chosen) if self.channels_last else tuple(chosen)


def _stage_names(info: list[dict[str, Any]]) -> tuple[str, ...]:
    """Return timm's names of the stages. Stages that it names alike (crossvit, coat) are numbered."""
    given = [str(stage["module"]) for stage in info]
    return tuple(
        name if given.count(name) == 1 else f"{name}#{given[:index].count(name)}" for index, name in enumerate(given)
    )


def _feature_extractor(net: Any, options: SourceOptions) -> Any:
    """Wrap a whole network with timm's own feature extractor, which drops the blocks behind the last kept stage."""
    names = _stage_names(net.feature_info)
    features, _ = kept_stages(names, options, (len(names) - 1,))
    last = names.index(features[-1])
    kept = range(last + 1) if options.hidden_states else [names.index(feature) for feature in features]
    try:
        return FeatureGetterNet(net, out_indices=tuple(kept))
    except (AssertionError, AttributeError, NotImplementedError) as error:
        raise SourceError(
            f"timm cannot take features from this {type(net).__name__}: create it with features_only=True"
        ) from error


def _arguments(name: str, options: SourceOptions) -> dict[str, Any]:
    """Return keyword arguments for timm. Networks of fixed size take img_size; convolutional ones do not know the word."""
    arguments: dict[str, Any] = {"features_only": True, "in_chans": options.num_channels or 3}
    if options.output_stride is not None:
        arguments["output_stride"] = options.output_stride
    if options.img_size is not None:
        sized = {**arguments, "img_size": options.img_size}
        try:
            with torch.device("meta"):
                _create(name, {**sized, "pretrained": False})
        except SourceError as error:
            if "unexpected keyword argument" not in str(error) or "'img_size'" not in str(error):
                raise
        else:
            return sized
    return arguments


def _create(name: str, arguments: Mapping[str, Any]) -> Any:
    """Call ``timm.create_model`` and turn its errors into ours. ``exportable``: attention as plain matrix products."""
    try:
        with set_layer_config(exportable=True), _no_talk_of_heads():
            return timm.create_model(name, **arguments)
    except (RuntimeError, ValueError, TypeError, AssertionError, LookupError, AttributeError, ArithmeticError) as error:
        options = {
            k: v for k, v in arguments.items() if k not in ("features_only", "pretrained", "pretrained_cfg_overlay")
        }
        text = str(error) or type(error).__name__
        if "Unknown model" in text or "Invalid pretrained tag" in text or "has no source prefix" in text:
            raise SourceError(f"timm has no model {name!r}.{_near_names(name)}") from error
        if stride := options.get("output_stride"):
            raise SourceError(
                f"{name} cannot be dilated to a stride of {stride} ({text}): leave --output-stride out (output_stride)"
            ) from error
        raise SourceError(f"timm cannot make {name} with {options}: {text}") from error


@contextlib.contextmanager
def _no_talk_of_heads() -> Iterator[None]:
    """Hold back timm's warning that it found weights of a classifier, which every pretrained file has and no backbone."""
    log = logging.getLogger("timm.models._builder")

    def is_worth_reading(record: logging.LogRecord) -> bool:
        return not str(record.msg).startswith("Unexpected keys")

    log.addFilter(is_worth_reading)
    try:
        yield
    finally:
        log.removeFilter(is_worth_reading)


def _near_names(name: str) -> str:
    near = difflib.get_close_matches(name, timm.list_models(), n=4, cutoff=0.6)
    if "." in name:
        near = difflib.get_close_matches(name, timm.list_pretrained(), n=4, cutoff=0.6) or near
    return f" Near names: {', '.join(near)}" if near else " timm.list_models() lists them all"


def _with_weights(name: str, weights: str, arguments: dict[str, Any]) -> tuple[Source, nn.Module]:
    """Create the network with these weights; also return the record of where they come from."""
    numbers = {key: value for key, value in arguments.items() if isinstance(value, int) and not isinstance(value, bool)}
    options = {"num_channels" if key == "in_chans" else key: value for key, value in numbers.items()}
    seed = random_seed(weights)
    if seed is not None:
        with seeded(seed):
            net = _create(name, arguments)
        wake_residual_branches(net)
        return Source(library="timm", name=name, weights="random", seed=seed, options=options), net
    if weights == "pretrained":
        return Source(library="timm", name=name, weights="pretrained", options=options), _pretrained(name, arguments)
    path = Path(weights)
    net = _from_checkpoint(name, path, arguments)
    sha256 = file_sha256(path)
    return Source(library="timm", name=name, weights="checkpoint", weights_sha256=sha256, options=options), net


def _pretrained(name: str, arguments: Mapping[str, Any]) -> nn.Module:
    """Create the network with weights from the hub, or from its local cache when the hub does not answer."""
    config = timm.get_pretrained_cfg(name)
    if config is None or not config.has_weights:
        raise SourceError(f"timm has no pretrained weights for {name}: {OFFLINE_ADVICE}")
    overlay = None
    if config.hf_hub_id and not hub_answers():
        overlay = cached_weights(str(config.hf_hub_id))
        if overlay is None:
            raise HubUnreachableError(f"the model hub does not answer and {name} is not in its cache: {OFFLINE_ADVICE}")
    try:
        return _create(name, {**arguments, "pretrained": True, "pretrained_cfg_overlay": overlay})  # type: ignore[no-any-return]
    except OSError as error:
        raise HubUnreachableError(
            f"pretrained weights of {name} cannot be fetched ({error}): {OFFLINE_ADVICE}"
        ) from error


def cached_weights(repository: str) -> dict[str, str] | None:
    """Return timm's option for weights that the hub's cache holds, or None."""
    from huggingface_hub import try_to_load_from_cache

    for filename in ("model.safetensors", "pytorch_model.bin"):
        cached = try_to_load_from_cache(repository, filename)
        if isinstance(cached, str):
            return {"file": cached}
    return None


def _from_checkpoint(name: str, path: Path, arguments: Mapping[str, Any]) -> nn.Module:
    """Load a file in timm's own names, whatever prefix they have there, or in the names of the architecture's authors.

    Other image sizes, other channels and authors' names go through timm's key mapping, which may leave layers without
    weights. Raises SourceError unless every learned tensor came from the file.
    """
    state = read_checkpoint(path)
    untrained = {**arguments, "pretrained": False}
    with torch.device("meta"):
        extractor = _create(name, untrained)
        whole = _create(name, {k: v for k, v in untrained.items() if k not in ("features_only", "out_indices")})
    every = whole.state_dict()
    names = whole_names(extractor.state_dict(), every)
    wanted = {names[key]: shape for key, shape in learned_shapes(extractor).items()}
    placement = place(path, name, state, wanted, every)
    lacking = frozenset() if placement is not None else absent(name, state, wanted)
    if lacking and _are_unused(name, arguments, names, lacking):
        wanted = {key: shape for key, shape in wanted.items() if key not in lacking}
        placement = place(path, name, state, wanted, every)
    fillers: dict[str, torch.Tensor] = {}
    if placement is None:
        to_try = [main_part(state)]
        stripped = without_wrappers(to_try[0])
        to_try += [stripped] if stripped.keys() != to_try[0].keys() else []
    else:
        surplus = surplus_tensors(state, wanted, every, placement)
        if surplus:
            near = nearest(state, but=name)
            raise SourceError(f"{path} {misfit(name, state, wanted, surplus=surplus, near=near)}")
        to_try = [{key: state[placement.keys[key]] for key in set(names.values()) & placement.keys.keys()}]
        # timm drops heads and final norms only after loading: it may insist on them, and knows its own files by them.
        fillers = {k: torch.zeros(v.shape, dtype=v.dtype) for k, v in every.items() if k not in set(names.values())}
        if fits(state, wanted, placement):
            own = {key: to_try[0][names[key]] for key in names if names[key] in to_try[0]}
            return _as_it_is(name, {**fillers, **to_try[0]}, own, arguments)
    unreached: list[str] = []
    for tensors in to_try:
        with _foreign_keys():
            net, unreached = _mapped_by_timm(name, tensors, fillers, arguments)
            if not unreached:
                return net
    missing = [key for key in wanted if key in lacking] or [names[key] for key in unreached]
    near = nearest(state, but=name)
    raise SourceError(f"{path} {misfit(name, state, wanted, unreached=missing, near=near)}")


def _are_unused(name: str, arguments: Mapping[str, Any], names: Mapping[str, str], lacking: Set[str]) -> bool:
    """Return whether no feature map depends on these tensors.

    timm's FeatureGraphNet and FeatureGetterNet leave out what their maps do not need, such as a last norm, while the
    wrapper that is made here may keep it. NaN in every one of these tensors would reach each map that depends on one.
    """
    with seeded(0):
        net = _create(name, {**arguments, "pretrained": False}).eval()
    for key, tensor in net.state_dict().items():
        if names[key] in lacking and tensor.is_floating_point():
            tensor.fill_(float("nan"))
    channels, *size = resolve_model_data_config(net)["input_size"]  # type: ignore[no-untyped-call]
    image = torch.zeros(1, arguments.get("in_chans", channels), *(arguments.get("img_size") or size))
    maps: Any = None
    with torch.no_grad(), _foreign_keys():
        maps = net(image)
    if maps is None:  # the network does not run on this image
        return False
    return all(bool(m.isfinite().all()) for m in (maps.values() if isinstance(maps, dict) else maps))


@contextlib.contextmanager
def _foreign_keys() -> Iterator[None]:
    """Swallow whatever timm's key mappings trip over, except for memory that ran out, which says nothing of the keys.

    timm's warnings list every key that it does not know. They are held back, since a refusal says what matters of them.
    """
    log = logging.getLogger("timm")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:
        logging.getLogger(__name__).debug("timm cannot work with these keys: %r", error)
    finally:
        log.setLevel(level)


def _as_it_is(
    name: str, whole: Mapping[str, torch.Tensor], own: dict[str, torch.Tensor], arguments: Mapping[str, Any]
) -> nn.Module:
    """Load tensors that have the network's names and shapes (``own``), past timm's mapping, which would resize some.

    timm is still asked to load the ``whole`` network, because it makes some networks differently for pretrained weights.
    """
    net = None
    with _foreign_keys():
        net = _from_state_dict(name, whole, arguments)
    if net is None:
        with seeded(0):
            net = _create(name, {**arguments, "pretrained": False})
    shapes = {key: value.shape for key, value in net.state_dict().items()}
    net.load_state_dict({key: value for key, value in own.items() if value.shape == shapes[key]}, strict=False)
    return net


def _mapped_by_timm(
    name: str, state: Mapping[str, torch.Tensor], fillers: Mapping[str, torch.Tensor], arguments: Mapping[str, Any]
) -> tuple[nn.Module, list[str]]:
    """Load through timm's own key mapping; also return the learned tensors that got nothing from ``state``.

    timm ignores keys that are missing from the file, so the network is made twice from one seed, the second time with
    every number of the file changed: a weight or a statistic that is the same in both got nothing from the file.
    """
    changed = {key: 1.5 * value + 1.25 if value.is_floating_point() else value for key, value in state.items()}
    net, other = (_from_state_dict(name, {**fillers, **content}, arguments) for content in (state, changed))
    first, second = net.state_dict(), other.state_dict()
    return net, [key for key in learned_shapes(net) if torch.equal(first[key], second[key])]


def _from_state_dict(name: str, state: Mapping[str, torch.Tensor], arguments: Mapping[str, Any]) -> nn.Module:
    """Create the network through timm's loader of pretrained weights, with these tensors as the weights."""
    overlay = {"state_dict": dict(state)}
    with seeded(0):
        net: nn.Module = _create(name, {**arguments, "pretrained": True, "pretrained_cfg_overlay": overlay})
    for module in net.modules():  # timm keeps the overlay, and with it a second copy of all weights
        getattr(module, "pretrained_cfg", {}).pop("state_dict", None)
    return net
