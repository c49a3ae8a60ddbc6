"""The network as it will be deployed: frozen and folded batch norm, merged branches, preprocessing baked in.

Freezing means what ``freeze_batch_norm_2d`` of transformers' TimmBackboneConfig means: running statistics and affine
parameters are constants. A FrozenBatchNorm2d left in the graph costs a Mul and an Add per layer in every engine, so the
constants are multiplied into the convolution in front (Jacob et al. 2018, section 3.2) wherever a convolution feeds a
batch norm and nothing else. Batch norms in front of a convolution (pre-activation nets) stay, with constant statistics.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections import Counter
from collections.abc import Iterable
from typing import Any

import msgspec
import numpy as np
import torch
from timm.utils.model import reparameterize_model
from torch import nn
from torch.nn import functional
from torch.nn.utils.fusion import fuse_conv_bn_weights
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from edge_backbones.build.artifacts import LoadedBackbone, PreparedBackbone
from edge_backbones.errors import CalibrationError, ExportError, SourceError
from edge_backbones.images import ImageConfig
from edge_backbones.spec import BackboneSpec, InputSpec

# Folding and merging only reorder float32 arithmetic; anything above this is a wrong fold.
_MAX_RELATIVE_CHANGE = 1e-3
_FROZEN_BUFFERS = ("weight", "bias", "running_mean", "running_var")


def warm_batch_norm(loaded: LoadedBackbone, batches: Iterable[np.ndarray]) -> LoadedBackbone:
    """Set batch-norm statistics (in place) to the average over ``batches`` of float32 NCHW.

    For random weights only: untouched statistics (mean 0, variance 1) let activations grow from layer to layer, which
    no trained network does.
    """
    norms = [m for m in loaded.module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    if not norms:
        return loaded
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # cumulative average
        norm.train()
    try:
        with torch.no_grad():
            for batch in batches:
                loaded.module(torch.from_numpy(batch))
    except ValueError as error:
        raise CalibrationError(f"batch-norm statistics need more images or larger ones: {error}") from error
    except (AssertionError, RuntimeError) as error:
        cause = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise SourceError(f"the network does not take images of this size: {cause}") from error
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    loaded.module.eval()
    return dataclasses.replace(loaded, source=msgspec.structs.replace(loaded.source, batch_norm_warmed=True))


def prepare(loaded: LoadedBackbone, input: InputSpec) -> PreparedBackbone:
    """Make the module that is exported; ``loaded`` stays as it is, the reference to compare with.

    Raises SourceError when the network refuses this input size or returns something that is not a feature map,
    ExportError when the folded network would not compute what the loaded one does.
    """
    sample = torch.rand(
        1, input.channels, input.height.opt, input.width.opt, generator=torch.Generator().manual_seed(0)
    )
    sample = (sample - torch.tensor(loaded.image_config.mean).view(1, -1, 1, 1)) / torch.tensor(
        loaded.image_config.std
    ).view(1, -1, 1, 1)
    expected = _forward(loaded.module, sample)
    spec = _measured_spec(loaded.spec, sample, expected)
    net = reparameterize_model(copy.deepcopy(loaded.module), inplace=True).eval()
    thaw_batch_norm(net)
    write_out_attention(net)
    join_channel_norms(net)
    folded, kept = fold_batch_norm(net, sample)
    for stage, before, after in zip(spec.outputs, expected, _forward(net, sample), strict=True):
        change = float(torch.linalg.norm(after - before) / torch.linalg.norm(before))
        if not change <= _MAX_RELATIVE_CHANGE:
            raise ExportError(
                f"folding batch norm changes {stage} by {change:.1e} relative: this network cannot be folded"
            )
    module = net if input.name == "pixel_values" else _FromImage(net, loaded.image_config)
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    return PreparedBackbone(module.eval(), spec, input, folded, kept)


def thaw_batch_norm(net: nn.Module) -> None:
    """Turn every frozen batch norm into the ``nn.BatchNorm2d`` that it stands for, in place, so that it can be folded.

    torchvision, timm and each detection model of transformers have a class of their own, all with the same four buffers;
    transformers' have no ``eps`` and use 1e-5.
    """
    for path, frozen in list(net.named_modules()):
        if "FrozenBatchNorm" not in type(frozen).__name__:
            continue
        norm: nn.Module = nn.BatchNorm2d(len(frozen.weight), eps=getattr(frozen, "eps", 1e-5)).eval()
        norm.load_state_dict({name: getattr(frozen, name) for name in _FROZEN_BUFFERS}, strict=False)
        norm.to(frozen.weight.device)
        activation = getattr(frozen, "act", None)  # timm's FrozenBatchNormAct2d carries its activation
        net.set_submodule(path, norm if activation is None else nn.Sequential(norm, activation))


def write_out_attention(net: nn.Module) -> None:
    """Choose the attention made of matrix products and softmax wherever a library offers a fused one, in place.

    Some fused calls have no ONNX form (timm's hiera); others export with a guard against rows that are masked
    completely (IsNaN and Where behind every softmax), which no engine fuses.
    """
    for module in net.modules():
        if getattr(module, "fused_attn", False):  # timm
            module.fused_attn = False  # type: ignore[assignment]
        if callable(choose := getattr(module, "set_attn_implementation", None)):  # transformers 5
            with contextlib.suppress(ValueError):  # not every architecture has the choice
                choose("eager")


def join_channel_norms(net: nn.Module) -> None:
    """Make one LayerNorm node of norms over channels that transformers computes by hand (vitdet, convnext in 4.44).

    Means, powers and roots as nodes of their own are fused by no engine. What looks like one and is not is found by
    `prepare`, which compares the outputs.
    """
    for path, norm in list(net.named_modules()):
        by_hand = "LayerNorm" in type(norm).__name__ and not isinstance(norm, nn.LayerNorm)
        known = all(hasattr(norm, name) for name in ("weight", "bias", "normalized_shape", "eps"))
        if by_hand and known and getattr(norm, "data_format", "channels_first") == "channels_first":
            net.set_submodule(path, _ChannelsFirstLayerNorm(norm))


class _ChannelsFirstLayerNorm(nn.Module):
    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = norm.weight, norm.bias, float(norm.eps)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        last = x.permute(0, 2, 3, 1)
        return functional.layer_norm(last, tuple(self.weight.shape), self.weight, self.bias, self.eps).permute(
            0, 3, 1, 2
        )


def fold_batch_norm(net: nn.Module, sample: torch.Tensor) -> tuple[int, int]:
    """Multiply batch norms into the convolutions that feed them, in place; returns (folded, left in the graph).

    Pairs are found by watching one forward: names and positions in the module tree say nothing of the data flow.
    """
    flow = _DataFlow()
    with flow:
        maps = _forward(net, sample)
    flow.uses.update(id(feature_map) for feature_map in maps)
    convs = {id(m.weight): m for m in net.modules() if isinstance(m, nn.Conv2d)}
    norms = {id(m.running_mean): m for m in net.modules() if isinstance(m, nn.BatchNorm2d) and m.track_running_stats}
    folded = 0
    replacements: dict[nn.Module, nn.Module] = {}
    for source, mean in flow.batch_norms:
        conv, norm = convs.get(flow.conv_outputs.get(source, 0)), norms.get(mean)
        if conv is None or norm is None:
            continue
        if not flow.uses[source] == flow.uses[id(conv.weight)] == flow.uses[mean] == 1:
            continue  # shared by several places: folding would change the others
        with torch.no_grad():
            assert norm.running_mean is not None and norm.running_var is not None  # noqa: PT018  (found by its id above)
            conv.weight, conv.bias = fuse_conv_bn_weights(
                conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
            )
        replacements[norm] = getattr(norm, "act", nn.Identity())  # timm's BatchNormAct2d carries its activation
        folded += 1
    for path, module in list(net.named_modules(remove_duplicate=False)):
        if module in replacements:
            net.set_submodule(path, replacements[module])
    return folded, len(norms) - folded


class _DataFlow(TorchFunctionMode):
    """Which tensor feeds which, seen from the calls of one forward. Tensors are kept alive so that ids stay unique."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_outputs: dict[int, int] = {}  # id of a convolution's result -> id of its weight
        self.batch_norms: list[tuple[int, int]] = []  # (id of the input, id of running_mean)
        self.uses: Counter[int] = Counter()  # id of a tensor -> operations that take it
        self._alive: list[Any] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if any(isinstance(leaf, torch.Tensor) for leaf in tree_leaves(result)):  # reading .shape is not a use
            self._alive.append(result)
            self.uses.update(id(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor))
        if func is functional.conv2d:
            weight = args[1] if len(args) > 1 else kwargs["weight"]
            self.conv_outputs[id(result)] = id(weight)
        elif func is functional.batch_norm:
            source = args[0] if args else kwargs["input"]
            mean = args[1] if len(args) > 1 else kwargs["running_mean"]
            self.batch_norms.append((id(source), id(mean)))
        return result


class _FromImage(nn.Module):
    """uint8 NHWC camera frames in: cast first (TensorRT transposes no uint8), then layout, then mean and std, and channels
    reversed for a network that takes them so."""

    mean: torch.Tensor
    std: torch.Tensor
    order: torch.Tensor | None

    def __init__(self, net: nn.Module, config: ImageConfig) -> None:
        super().__init__()
        self.net = net
        self.register_buffer("mean", 255 * torch.tensor(config.mean).view(1, -1, 1, 1))
        self.register_buffer("std", 255 * torch.tensor(config.std).view(1, -1, 1, 1))
        channels = range(len(config.mean))
        order = torch.tensor(list(reversed(channels))) if config.channel_order == "bgr" else None
        self.register_buffer("order", order, persistent=False)

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, ...]:
        pixel_values = (image.float().permute(0, 3, 1, 2) - self.mean) / self.std
        if self.order is not None:
            pixel_values = pixel_values.index_select(1, self.order)
        return self.net(pixel_values)  # type: ignore[no-any-return]


def _forward(module: nn.Module, sample: torch.Tensor) -> tuple[torch.Tensor, ...]:
    try:
        with torch.no_grad():
            return tuple(module(sample))
    except (AssertionError, RuntimeError, ValueError) as error:
        size = "x".join(str(n) for n in sample.shape[2:])
        cause = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise SourceError(f"the network does not take images of {size} (height x width): {cause}") from error


def _measured_spec(claimed: BackboneSpec, sample: torch.Tensor, outputs: tuple[torch.Tensor, ...]) -> BackboneSpec:
    """Channels and strides off the real maps; the metadata is only believed where the maps agree with it."""
    layouts = [*claimed.layouts, *(extra.layout for extra in claimed.extras)]
    if len(outputs) != len(layouts) or any(o.ndim != len(axes) for o, axes in zip(outputs, layouts, strict=True)):
        shapes = [tuple(output.shape) for output in outputs]
        raise SourceError(f"outputs {claimed.outputs} should be {', '.join(layouts)}, the forward gave {shapes}")
    channels = [int(o.shape[axes.index("C")]) for o, axes in zip(outputs, layouts, strict=True)]
    kept = len(claimed.out_features)
    num_features = list(claimed.num_features)
    for index, measured in zip(claimed.out_indices, channels, strict=False):
        num_features[index] = measured
    strides = []
    for feature_map, axes, stride in zip(outputs, claimed.layouts, claimed.strides, strict=False):
        cells = [int(feature_map.shape[axes.index(axis)]) if axis in axes else 0 for axis in "HW"]
        strides.append(tuple(_stride(*sizes) for sizes in zip(sample.shape[2:], cells, stride, strict=True)))
    return msgspec.structs.replace(
        claimed,
        channels=tuple(channels[:kept]),
        strides=tuple((v, h) for v, h in strides),
        num_features=tuple(num_features),
        extras=tuple(
            msgspec.structs.replace(extra, channels=n) for extra, n in zip(claimed.extras, channels[kept:], strict=True)
        ),
    )


def _stride(pixels: int, cells: int, claimed: int) -> int:
    """Input pixels per cell; where borders make the quotient uneven, the claimed stride if it explains the map.

    Padding makes up to one cell more, convolutions without padding lose up to two (inception). Without cells (tokens)
    the claim is all there is.
    """
    if not cells or -claimed < pixels - cells * claimed < 2 * claimed:
        return claimed
    return max(1, round(pixels / cells))
