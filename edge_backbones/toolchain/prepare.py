"""Prepare the network for deployment: freeze and fold batch norm, merge branches, bake preprocessing in.

Freezing means what ``freeze_batch_norm_2d`` of transformers' TimmBackboneConfig means: running statistics and affine
parameters are constants. A FrozenBatchNorm2d that stays in the graph adds a Mul and an Add per layer to every engine. So
the constants are multiplied into the convolution in front (Jacob et al. 2018, section 3.2) wherever a convolution feeds a
batch norm and nothing else. Batch norms in front of a convolution (pre-activation networks) stay, with constant statistics.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import msgspec
import numpy as np
import torch
from timm.layers.norm_act import BatchNormAct2d, SyncBatchNormAct
from timm.utils.model import reparameterize_model
from torch import nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_weights
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from edge_backbones.difference import relative_error
from edge_backbones.errors import CalibrationError, ExportError, SourceError, first_line
from edge_backbones.images.config import ImageConfig
from edge_backbones.spec import BackboneSpec, InputSpec, measured_stride
from edge_backbones.toolchain.artifacts import LoadedBackbone, PreparedBackbone

# Folding and merging only reorder arithmetic. In float64 a right fold changes a map by 1e-13, and by 1e-9 where the
# network amplifies rounding ten thousand times; a wrong eps or a weight that is off by a thousandth changes it by far more.
_MAX_CHANGE_IN_DOUBLE = 1e-8
_MAX_CHANGE_IN_SINGLE = 1e-3  # for a network that only runs in float32
_FROZEN_BUFFERS = ("weight", "bias", "running_mean", "running_var")
# Norms of other classes may do more than normalise, which folding would lose.
_KNOWN_FORWARDS = {kind.forward for kind in (nn.BatchNorm2d, nn.SyncBatchNorm, BatchNormAct2d, SyncBatchNormAct)}
_BATCH_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm)
_IN_DOUBLE = {
    torch.float32: torch.float64, torch.float16: torch.float64, torch.bfloat16: torch.float64,
    torch.complex64: torch.complex128,
}  # fmt: skip
_CASTS = (torch.Tensor.float, torch.Tensor.half, torch.Tensor.bfloat16)


def warm_batch_norm(loaded: LoadedBackbone, batches: Iterable[np.ndarray]) -> LoadedBackbone:
    """Set batch-norm statistics (in place) to the average over ``batches`` of float32 NCHW.

    For random weights only: untouched statistics (mean 0, variance 1) let activations grow from layer to layer, which
    no trained network does.
    """
    norms = [m for m in loaded.module.modules() if isinstance(m, _BatchNorm)]
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
    except Exception as error:  # a network fails with whatever it trips over
        raise SourceError(f"the network does not take images of this size: {first_line(error)}") from error
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    loaded.module.eval()
    return dataclasses.replace(loaded, source=msgspec.structs.replace(loaded.source, batch_norm_warmed=True))


def prepare(loaded: LoadedBackbone, input: InputSpec) -> PreparedBackbone:
    """Make the module that is exported; ``loaded`` stays as it is, the reference to compare with.

    The fold is done and judged in float64, where a right one is exact; the result is rounded to float32 once. A network
    that does not run in float64 is folded and judged in float32. Raises SourceError when the network refuses this input
    size, returns something that is not a feature map, gives values that are not finite, or answers differently each time;
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
    for stage, feature_map in zip(spec.outputs, expected, strict=True):
        if not feature_map.isfinite().all():
            raise SourceError(f"{stage} is not finite on an image of noise: {cause_of_nan(loaded.module)}")
    net, folded, kept = _folded(copy.deepcopy(loaded.module), sample)
    exact = _folded_in_double(loaded.module, net, sample)
    changes = _changes(expected, _forward(net, sample)) if exact is None else exact
    allowed = _MAX_CHANGE_IN_SINGLE if exact is None else _MAX_CHANGE_IN_DOUBLE
    for stage, change in zip(spec.outputs, changes, strict=True):
        if not change <= allowed:
            if max(_changes(expected, _forward(loaded.module, sample))) > allowed:
                raise SourceError(
                    f"this network gives another {stage} each time it sees the same image: its forward draws random "
                    "numbers in eval mode (functional.dropout needs training=self.training)"
                )
            raise ExportError(
                f"folding batch norm changes {stage} by {change:.1e} relative, at most {allowed:g} is rounding in "
                f"{'float32' if exact is None else 'float64'}: this network cannot be folded"
            )
    module = net
    if input.name == "image":
        module = _FromImage(net, loaded.image_config)
    elif input.dtype == "float16":
        module = _FromHalf(net)
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    return PreparedBackbone(module.eval(), spec, input, folded, kept)


def cause_of_nan(net: nn.Module) -> str:
    """Say which weight makes maps that are not finite, or that none does."""
    for name, tensor in (*net.named_parameters(), *net.named_buffers()):
        values = tensor.detach()
        is_mask = not isinstance(tensor, nn.Parameter) and not values.isnan().any()  # a mask of -inf, as attention has
        if values.is_floating_point() and not values.isfinite().all() and not is_mask:
            count = int((~values.isfinite()).sum())
            return f"{name} holds {count} of {values.numel()} values that are NaN or infinite; load sound weights"
    return "all its weights are finite, so something in its forward divides by zero, overflows or takes a root of less"


def _folded(net: nn.Module, sample: torch.Tensor) -> tuple[nn.Module, int, int]:
    """Change the form of a network in place and not what it computes; also count batch norms that were folded and kept."""
    net = reparameterize_model(net, inplace=True).eval()
    thaw_batch_norm(net)
    write_out_attention(net)
    join_channel_norms(net)
    return net, *fold_batch_norm(net, sample)


def _folded_in_double(module: nn.Module, net: nn.Module, sample: torch.Tensor) -> list[float] | None:
    """Fold a float64 copy of ``module``, give its weights to ``net``, and return how much each map changed.

    ``net`` is the same fold in float32. Returns None and leaves ``net`` as it is when the network does not run in float64.
    One copy lives at a time: memory peaks at two float32 copies above the two that stay.
    """
    try:
        twin = copy.deepcopy(module).double()
        with _InDouble():
            expected = _forward(twin, sample.double())
        del twin  # one at a time; and it may have kept tables that it computed
        twin = copy.deepcopy(module).double()
        with _InDouble():
            exact, _, _ = _folded(twin, sample.double())
            changes = _changes(expected, _forward(exact, sample.double()))
    except Exception:  # a float32 table of its own, a compiled function: it fails with whatever it trips over
        return None
    ours, theirs = dict(_tensors_of(net)), dict(_tensors_of(exact))
    if {name: tensor.shape for name, tensor in ours.items()} != {name: t.shape for name, t in theirs.items()}:
        return None  # its forward depends on the type
    with torch.no_grad():
        for name, tensor in ours.items():
            tensor.copy_(theirs[name])
    return changes


def _tensors_of(net: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from net.named_parameters()
    yield from net.named_buffers()


def _changes(before: tuple[torch.Tensor, ...], after: tuple[torch.Tensor, ...]) -> list[float]:
    return [relative_error(b.detach().numpy(), a.detach().numpy()) for a, b in zip(before, after, strict=True)]


class _InDouble(TorchFunctionMode):
    """Compute in float64 whatever type the code asks for: casts, new tensors, tables that are no parameters."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        func = torch.Tensor.double if func in _CASTS else func
        given = tree_map(_doubled, (args, kwargs or {}))
        result = func(*given[0], **given[1])
        return result if any(result is arg for arg in given[0]) else tree_map(_doubled, result)  # in place: as it is


def _doubled(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to(_IN_DOUBLE[value.dtype]) if value.dtype in _IN_DOUBLE else value
    return _IN_DOUBLE.get(value, value) if isinstance(value, torch.dtype) else value


def thaw_batch_norm(net: nn.Module) -> None:
    """Turn every frozen batch norm into the ``nn.BatchNorm2d`` that it stands for, in place, so that it can be folded.

    torchvision, timm and each detection model of transformers have a class of their own, all with the same four buffers;
    transformers' have no ``eps`` and use 1e-5.
    """
    for path, frozen in list(net.named_modules()):
        if "FrozenBatchNorm" not in type(frozen).__name__:
            continue
        norm: nn.Module = nn.BatchNorm2d(len(frozen.weight), eps=getattr(frozen, "eps", 1e-5)).eval()
        norm.to(frozen.weight)
        norm.load_state_dict({name: getattr(frozen, name) for name in _FROZEN_BUFFERS}, strict=False)
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
    """Replace norms over channels that transformers computes by hand (vitdet, convnext in 4.44) by one LayerNorm, in place.

    No engine fuses means, powers and roots that are nodes of their own. What looks like such a norm and is none is found by
    `prepare`, which compares the outputs.
    """
    for path, norm in list(net.named_modules()):
        by_hand = "LayerNorm" in type(norm).__name__ and not isinstance(norm, nn.LayerNorm)
        known = all(hasattr(norm, name) for name in ("weight", "bias", "normalized_shape", "eps"))
        if by_hand and known and getattr(norm, "data_format", "channels_first") == "channels_first":
            net.set_submodule(path, _ChannelsFirstLayerNorm(norm))


class _ChannelsFirstLayerNorm(nn.Module):
    """A LayerNorm over the channels of NCHW, with the parameters of a norm that computes it by hand."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = norm.weight, norm.bias, float(norm.eps)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        last = x.permute(0, 2, 3, 1)
        return functional.layer_norm(last, tuple(self.weight.shape), self.weight, self.bias, self.eps).permute(
            0, 3, 1, 2
        )


def fold_batch_norm(net: nn.Module, sample: torch.Tensor) -> tuple[int, int]:
    """Multiply batch norms into the convolutions that feed them, in place; return how many were folded and how many stay.

    Pairs are found by watching one forward: names and positions in the module tree say nothing of the data flow.
    """
    norms = {id(m.running_mean): m for m in net.modules() if isinstance(m, _BATCH_NORMS) and m.track_running_stats}
    if not norms:
        return 0, 0
    flow = _DataFlow()
    with flow:
        maps = _forward(net, sample)
    flow.uses.update(id(feature_map) for feature_map in maps)
    # A weight that a hook computes is no parameter: what is folded into it would be overwritten.
    convs = {id(m.weight): m for m in net.modules() if isinstance(m, nn.Conv2d) and "weight" in m._parameters}
    folded = 0
    replacements: dict[nn.Module, nn.Module] = {}
    for source, mean in flow.batch_norms:
        conv, norm = convs.get(flow.conv_outputs.get(source, 0)), norms.get(mean)
        if conv is None or norm is None or not _only_normalises(norm):
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


def _only_normalises(norm: nn.Module) -> bool:
    """Whether a batch norm does what its numbers say, and nothing that folding would lose."""
    hooks = (norm._forward_hooks, norm._forward_pre_hooks)
    return type(norm).forward in _KNOWN_FORWARDS and "forward" not in vars(norm) and not any(hooks)


class _DataFlow(TorchFunctionMode):
    """Record which tensor feeds which in one forward. Tensors are kept alive, so that their ids stay unique."""

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
    """A network that takes camera frames: uint8 NHWC.

    They are cast first (TensorRT transposes no uint8), then brought to NCHW and normalised. Channels are reversed for a
    network that takes BGR.
    """

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


class _FromHalf(nn.Module):
    """A network that takes float16, which every graph casts to the type that it computes in."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self.net(pixel_values.float())  # type: ignore[no-any-return]


def _forward(module: nn.Module, sample: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Run the network on one sample. Raises SourceError when it does not take the size."""
    try:
        with torch.no_grad():
            return tuple(module(sample))
    except Exception as error:  # a network fails with whatever it trips over
        size = "x".join(str(n) for n in sample.shape[2:])
        raise SourceError(
            f"the network does not take images of {size} (height x width): {first_line(error)}"
        ) from error


def _measured_spec(claimed: BackboneSpec, sample: torch.Tensor, outputs: tuple[torch.Tensor, ...]) -> BackboneSpec:
    """Read channels and strides off the real maps. A claimed stride is believed where the maps agree with it."""
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
        sizes = zip(sample.shape[2:], cells, stride, strict=True)
        # Without cells (tokens) the claim is all there is.
        strides.append(tuple(measured_stride(n, m, claim) if m else claim for n, m, claim in sizes))
    return msgspec.structs.replace(
        claimed,
        channels=tuple(channels[:kept]),
        strides=tuple((v, h) for v, h in strides),
        num_features=tuple(num_features),
        extras=tuple(
            msgspec.structs.replace(extra, channels=n) for extra, n in zip(claimed.extras, channels[kept:], strict=True)
        ),
    )
