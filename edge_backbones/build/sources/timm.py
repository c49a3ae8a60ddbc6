"""Backbones of timm: any name that ``timm.create_model(..., features_only=True)`` knows, tags included."""

from __future__ import annotations

import contextlib
import difflib
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data.config import resolve_model_data_config
from timm.layers.config import set_layer_config
from timm.models._helpers import load_state_dict
from torch import nn

from edge_backbones.build.artifacts import LoadedBackbone
from edge_backbones.bundle import record_file
from edge_backbones.errors import HubUnreachableError, InputError, SourceError
from edge_backbones.images import ImageConfig
from edge_backbones.manifest import Source
from edge_backbones.spec import align_stages

_HUB_TIMEOUT_S = 5.0
_ASLEEP, _AWAKE = 1e-3, 0.05  # scale of a residual branch: untrained, and woken
_OFFLINE_ADVICE = "pass a local file (--weights model.safetensors) or seeded random weights (--weights random:0)"


@dataclass(frozen=True, kw_only=True)
class TimmOptions:
    """How to make the network.

    ``weights``: ``"pretrained"``, ``"random:SEED"``, or the path of a checkpoint (.safetensors, or .pth / .pt / .bin
    that ``torch.load(weights_only=True)`` accepts). ``img_size``: (height, width), None for the network's own.
    ``out_indices`` / ``out_features``: the kept stages by transformers' rules, the last stage when neither is given.
    """

    weights: str = "pretrained"
    num_channels: int = 3
    img_size: tuple[int, int] | None = None
    output_stride: int | None = None
    out_indices: tuple[int, ...] | None = None
    out_features: tuple[str, ...] | None = None


@dataclass(frozen=True)
class TimmBackbone:
    """A loaded backbone and the image size that it was made for."""

    backbone: LoadedBackbone
    height: int
    width: int


def load_timm(name: str, options: TimmOptions) -> TimmBackbone:
    """Create the network, with its weights, in eval mode; maps come out NCHW.

    Raises SourceError for an unknown name (near ones are suggested), options that the architecture does not take, or
    weights that do not fit; HubUnreachableError when pretrained weights cannot be had; InputError for the stages.
    """
    arguments = _arguments(name, options)
    with torch.device("meta"):
        outline = _create(name, {**arguments, "pretrained": False})
    info = outline.feature_info.info
    stage_names = tuple(str(stage["module"]) for stage in info)
    if len(set(stage_names)) != len(stage_names):
        raise SourceError(
            f"{name} names several stages alike ({', '.join(stage_names)}): its stages cannot be selected"
        )
    features, indices = align_stages(stage_names, options.out_features, options.out_indices)
    if not indices:
        raise InputError(f"no stage is kept: choose at least one of {list(stage_names)}")
    arguments["out_indices"] = indices

    source, net = _with_weights(name, options.weights, arguments)
    config = resolve_model_data_config(net)  # type: ignore[no-untyped-call]
    height, width = options.img_size or config["input_size"][1:]
    backbone = LoadedBackbone(
        module=_NchwStages(net).eval(),
        source=source,
        image_config=_image_config(config, options.num_channels),
        channels_in=options.num_channels,
        stage_names=stage_names,
        out_features=features,
        out_indices=indices,
        num_features=tuple(int(stage["num_chs"]) for stage in info),
        reductions=tuple(int(info[i]["reduction"]) for i in indices),
    )
    return TimmBackbone(backbone, int(height), int(width))


def pretrained_at_hand(name: str) -> bool:
    """Can pretrained weights be loaded now: does the hub answer, or does its cache hold them?"""
    config = timm.get_pretrained_cfg(name)
    if config is None or not config.has_weights:
        return False
    return _hub_answers() or bool(config.hf_hub_id and _cached_weights(str(config.hf_hub_id)))


class _NchwStages(nn.Module):
    """timm's feature list as a tuple of NCHW maps; Swin-like families work in NHWC and say so in ``output_fmt``."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.channels_last = str(getattr(net, "output_fmt", "NCHW")).endswith("NHWC")

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        maps = self.net(pixel_values)
        return tuple(m.permute(0, 3, 1, 2) for m in maps) if self.channels_last else tuple(maps)


def _arguments(name: str, options: TimmOptions) -> dict[str, Any]:
    """Keyword arguments for timm. Networks of fixed size take img_size; convolutional ones do not know the word."""
    arguments: dict[str, Any] = {"features_only": True, "in_chans": options.num_channels}
    if options.output_stride is not None:
        arguments["output_stride"] = options.output_stride
    if options.img_size is not None:
        sized = {**arguments, "img_size": options.img_size}
        try:
            with torch.device("meta"):
                _create(name, {**sized, "pretrained": False})
        except SourceError as error:
            if "unexpected keyword argument 'img_size'" not in str(error):
                raise
        else:
            return sized
    return arguments


def _create(name: str, arguments: Mapping[str, Any]) -> Any:
    """``timm.create_model`` with its errors turned into ours. ``exportable``: attention as plain matrix products."""
    try:
        with set_layer_config(exportable=True):
            return timm.create_model(name, **arguments)
    except (RuntimeError, ValueError, TypeError, AssertionError, NotImplementedError) as error:
        options = {
            k: v for k, v in arguments.items() if k not in ("features_only", "pretrained", "pretrained_cfg_overlay")
        }
        text = str(error) or type(error).__name__
        if "Unknown model" in text or "Invalid pretrained tag" in text or "has no source prefix" in text:
            raise SourceError(f"timm has no model {name!r}.{_near_names(name)}") from error
        raise SourceError(f"timm cannot make {name} with {options}: {text}") from error


def _near_names(name: str) -> str:
    near = difflib.get_close_matches(name, timm.list_models(), n=4, cutoff=0.6)
    if "." in name:
        near = difflib.get_close_matches(name, timm.list_pretrained(), n=4, cutoff=0.6) or near
    return f" Near names: {', '.join(near)}" if near else " timm.list_models() lists them all"


def _with_weights(name: str, weights: str, arguments: dict[str, Any]) -> tuple[Source, nn.Module]:
    numbers = {key: value for key, value in arguments.items() if isinstance(value, int) and not isinstance(value, bool)}
    options = {"num_channels" if key == "in_chans" else key: value for key, value in numbers.items()}
    kind, _, seed_text = weights.partition(":")
    if kind == "random":
        if not (seed_text.isdecimal() and int(seed_text) < 2**63):
            raise SourceError(f"random weights need a seed, as in random:0; got {weights!r}")
        with _seeded(int(seed_text)):
            net = _create(name, arguments)
        _wake_residual_branches(net)
        return Source(library="timm", name=name, weights="random", seed=int(seed_text), options=options), net
    if kind == "pretrained":
        return Source(library="timm", name=name, weights="pretrained", options=options), _pretrained(name, arguments)
    path = Path(weights)
    if not path.is_file():
        raise SourceError(f"weights {weights!r} are neither 'pretrained', 'random:SEED' nor a file that exists")
    sha256 = record_file(path.parent, path.name).sha256
    net = _from_checkpoint(name, path, arguments)
    return Source(library="timm", name=name, weights="checkpoint", weights_sha256=sha256, options=options), net


def _wake_residual_branches(net: nn.Module) -> None:
    """Give the branches that training starts at zero a small weight, in place.

    timm initialises the last norm of a residual branch to 0 and layer scales to 1e-6. Left so, the branch's convolutions
    would be folded into zeros, and parity would be measured on a network that is not there. Large weights would measure
    chaos instead: random branches pass on rounding errors that trained ones damp.
    """
    with torch.no_grad():
        for path, module in net.named_modules():
            for name, parameter in module.named_parameters(path, recurse=False):
                scales_a_norm = isinstance(module, nn.modules.batchnorm._BatchNorm) and name.endswith("weight")
                if (scales_a_norm or name.endswith("gamma")) and float(parameter.abs().max()) < _ASLEEP:
                    parameter.fill_(_AWAKE)


def _pretrained(name: str, arguments: Mapping[str, Any]) -> nn.Module:
    """Weights from the hub, or from its local cache when the hub does not answer."""
    config = timm.get_pretrained_cfg(name)
    if config is None or not config.has_weights:
        raise SourceError(f"timm has no pretrained weights for {name}: {_OFFLINE_ADVICE}")
    overlay = None
    if config.hf_hub_id and not _hub_answers():
        overlay = _cached_weights(str(config.hf_hub_id))
        if overlay is None:
            raise HubUnreachableError(
                f"the model hub does not answer and {name} is not in its cache: {_OFFLINE_ADVICE}"
            )
    try:
        return _create(name, {**arguments, "pretrained": True, "pretrained_cfg_overlay": overlay})  # type: ignore[no-any-return]
    except OSError as error:
        raise HubUnreachableError(
            f"pretrained weights of {name} cannot be fetched ({error}): {_OFFLINE_ADVICE}"
        ) from error


def _hub_answers() -> bool:
    """One short request, because the hub library itself retries for a minute before it gives up."""
    from huggingface_hub import constants, get_session

    try:
        if get_session().head(constants.ENDPOINT, timeout=_HUB_TIMEOUT_S).status_code >= 400:
            return False  # a proxy that answers in the hub's place
    except Exception as error:  # the HTTP library behind the session changes between releases
        logging.getLogger(__name__).debug("the model hub does not answer: %s", error)
        return False
    return True


def _cached_weights(repository: str) -> dict[str, str] | None:
    from huggingface_hub import try_to_load_from_cache

    for filename in ("model.safetensors", "pytorch_model.bin"):
        cached = try_to_load_from_cache(repository, filename)
        if isinstance(cached, str):
            return {"file": cached}
    return None


def _from_checkpoint(name: str, path: Path, arguments: Mapping[str, Any]) -> nn.Module:
    """Load a file through timm's own key mapping, and make sure that it reached every layer.

    timm ignores keys that are missing from the file, so the network is made twice from one seed, the second time with
    every number of the file changed: a weight or a statistic that is the same in both got nothing from the file.
    """
    try:
        # Read here and not by timm: older releases run the code in a pickle unless told not to.
        content = load_state_dict(str(path), weights_only=True)
        changed = {key: 1.5 * value + 1.25 if value.is_floating_point() else value for key, value in content.items()}
    except Exception as error:  # unpickling and safetensors errors have no common base
        cause = _first_line(error).partition(". ")[0]
        raise SourceError(
            f"{path} cannot be read as a checkpoint ({cause}): save it as .safetensors, "
            "or as a plain state dict with torch.save"
        ) from error
    try:
        net, other = (_from_state_dict(name, state, arguments) for state in (content, changed))
    except SourceError as error:
        raise SourceError(f"{path} does not fit {name}: {_first_line(error.__cause__ or error)}") from error
    second = other.state_dict()
    learned = [key for key, _ in net.named_parameters()] + [key for key in second if "running_" in key]
    untouched = [key for key in learned if torch.equal(net.state_dict()[key], second[key])]
    if untouched:
        raise SourceError(
            f"{path} has no weights for {len(untouched)} tensors of {name}, {untouched[0]} first: wrong file?"
        )
    return net


def _from_state_dict(name: str, state: Mapping[str, torch.Tensor], arguments: Mapping[str, Any]) -> nn.Module:
    overlay = {"state_dict": dict(state)}
    with _seeded(0):
        net: nn.Module = _create(name, {**arguments, "pretrained": True, "pretrained_cfg_overlay": overlay})
    for module in net.modules():  # timm keeps the overlay, and with it a second copy of all weights
        getattr(module, "pretrained_cfg", {}).pop("state_dict", None)
    return net


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def _first_line(error: BaseException) -> str:
    """The first line that says something: torch puts a heading above the tensors that do not fit."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return lines[1] if lines[0].endswith(":") and len(lines) > 1 else lines[0]


def _image_config(config: Mapping[str, Any], channels: int) -> ImageConfig:
    """timm's data config; for other than its own channels the mean over channels serves each of them."""
    mean, std = (tuple(float(v) for v in config[key]) for key in ("mean", "std"))
    if len(mean) != channels:
        mean, std = ((sum(values) / len(values),) * channels for values in (mean, std))
    return ImageConfig(
        mean=mean,
        std=std,
        interpolation=config["interpolation"],
        crop_pct=float(config["crop_pct"]),
        crop_mode=config.get("crop_mode") or "center",
    )
