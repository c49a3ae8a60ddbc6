"""Copy a user's module as an exporter can take it: unwrapped, merged, with plain weights; and read its outputs as maps."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize, prune, remove_spectral_norm, remove_weight_norm
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from edge_backbones.errors import SourceError, first_line

_QUANTISED = ("torch.ao.nn.quantized", "torch.ao.nn.intrinsic", "torch.ao.nn.qat", "torch.ao.quantization", "torchao",
              "bitsandbytes")  # fmt: skip
_FLOAT_INTRINSIC = "torch.ao.nn.intrinsic.modules.fused"


def plain_copy(module: nn.Module) -> nn.Module:
    """Copy a module in eval mode, float32 and host memory, without what only training or another runtime needs.

    `torch.compile` and DataParallel (and DistributedDataParallel) are taken off, LoRA adapters are merged, and weights
    that are computed (weight_norm, spectral_norm, pruning masks, parametrizations) become plain ones. ``module`` stays as
    it is. Raises SourceError for a module that has no weights yet, is quantised, or is TorchScript.
    """
    module = _unwrapped(module)
    _refuse(module)
    memo: dict[int, Any] = {}
    for inner in reversed(list(module.modules())):  # the innermost first
        for value in vars(inner).values():
            if isinstance(value, torch.Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach().clone()  # kept by a forward; torch copies leaves only
        if (bare := _unwrapped(inner)) is not inner:
            memo[id(inner)] = copy.deepcopy(bare, memo)
    try:
        net = copy.deepcopy(module, memo).cpu().float().eval()
    except Exception as error:  # a member that does not copy (a lock, a handle) fails as it likes
        raise SourceError(f"this {type(module).__name__} cannot be copied: {first_line(error)}") from error
    for inner in net.modules():
        inner._compiled_call_impl = None
    net = _merged(net)
    _make_weights_plain(net)
    return net.float().eval()


def _unwrapped(module: Any) -> Any:
    """Take off what `torch.compile` and data parallelism were put around."""
    while True:
        if isinstance(getattr(module, "_orig_mod", None), nn.Module):
            module = module._orig_mod
        elif isinstance(module, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            module = module.module
        else:
            return module


def _refuse(module: nn.Module) -> None:
    """Raise SourceError for a module that is TorchScript, sharded, quantised, or without weights."""
    name = type(module).__name__
    for path, inner in module.named_modules():
        kind = type(inner)
        where = f"{path} of this {name}" if path else f"this {name}"
        if isinstance(inner, torch.jit.ScriptModule):
            raise SourceError(f"{where} is TorchScript: pass the nn.Module that it was scripted or traced from")
        if kind.__name__ == "FullyShardedDataParallel":
            raise SourceError(
                f"{where} is sharded (FullyShardedDataParallel): save its full state dict and load it into the plain module"
            )
        if kind.__module__.startswith(_QUANTISED) and not kind.__module__.startswith(_FLOAT_INTRINSIC):
            raise SourceError(
                f"{where} is quantised already ({kind.__name__}): pass the float network as it was before; "
                "int8 is made here (--precision int8)"
            )
    for path, tensor in (*module.named_parameters(), *module.named_buffers()):
        if is_lazy(tensor):
            raise SourceError(
                f"{path} of this {name} has no shape yet (a lazy layer): run the module on one image first"
            )
        if tensor.is_meta:
            raise SourceError(f"this {name} is on the meta device and has no weights: load them first")
        if tensor.is_quantized or type(tensor).__module__.startswith(_QUANTISED):
            raise SourceError(
                f"{path} of this {name} is quantised already ({tensor.dtype}): pass the float network as it was before; "
                "int8 is made here (--precision int8)"
            )


def _merged(net: nn.Module) -> nn.Module:
    """Add low-rank adapters to the weights they adapt: models of PEFT, layers that it put into a model, and their like."""
    try:
        for path, inner in list(net.named_modules()):
            if callable(merge := getattr(inner, "merge_and_unload", None)):
                net = _with(net, path, merge())
                break  # it merges everything below it
        for path, inner in list(net.named_modules()):
            if callable(merge := getattr(inner, "merge", None)) and isinstance(
                getattr(inner, "base_layer", None), nn.Module
            ):
                merge()
                net = _with(net, path, inner.base_layer)
            elif callable(merge := getattr(inner, "merge_adapter", None)):
                merge()
    except Exception as error:  # adapters of many libraries fail as they like
        raise SourceError(
            f"the adapters of this {type(net).__name__} cannot be merged ({first_line(error, typed=True)}): "
            "pass model.merge_and_unload()"
        ) from error
    return net


def _with(net: nn.Module, path: str, replacement: nn.Module) -> nn.Module:
    if not path:
        return replacement
    net.set_submodule(path, replacement)
    return net


def _make_weights_plain(net: nn.Module) -> None:
    """Store each computed weight as a plain parameter, in place, so that batch norm can be folded into it."""
    for inner in list(net.modules()):
        for hook in list(inner._forward_pre_hooks.values()):
            if isinstance(hook, WeightNorm):
                remove_weight_norm(inner, hook.name)
            elif isinstance(hook, SpectralNorm):
                remove_spectral_norm(inner, hook.name)
            elif isinstance(hook, prune.BasePruningMethod):
                prune.remove(inner, hook._tensor_name)  # type: ignore[no-untyped-call]
        if parametrize.is_parametrized(inner):
            # The class was made for one module and is shared with its copies: torch takes the weight out of the class.
            kind = type(inner)
            members = {key: value for key, value in vars(kind).items() if key not in ("__dict__", "__weakref__")}
            inner.__class__ = type(kind.__name__, kind.__bases__, members)
            for name in list(inner.parametrizations):  # type: ignore[arg-type]
                # One that changes shape or type has to stay: its weight is computed in every forward, and not folded.
                with contextlib.suppress(ValueError, RuntimeError):
                    parametrize.remove_parametrizations(inner, name, leave_parametrized=True)


def missing_arguments(module: nn.Module) -> list[str]:
    """Name what ``forward`` needs besides the image."""
    parameters = list(inspect.signature(module.forward).parameters.values())
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    needed = [p for p in parameters if p.default is p.empty and p.kind in (*positional, inspect.Parameter.KEYWORD_ONLY)]
    return [p.name for p in needed[1:]] if needed and needed[0].kind in positional else [p.name for p in needed]


def feature_maps(outputs: Any, stage_names: tuple[str, ...]) -> list[torch.Tensor]:
    """Make a list of float32 tensors of whatever a forward returned.

    A dict (or a dataclass, as the outputs of transformers are) that has every stage name as a key gives these, in the order
    of ``stage_names``. All else is taken in the order in which it is written, nested tuples, lists, dicts and dataclasses
    depth first; None is left out. Raises SourceError for what is not a float tensor, with its place and type.
    """
    keyed = _fields(outputs)
    if isinstance(keyed, dict) and all(isinstance(keyed.get(name), torch.Tensor) for name in stage_names):
        keyed = {name: keyed[name] for name in stage_names}
    maps = []
    for place, value in _leaves(keyed, ""):
        if not isinstance(value, torch.Tensor):
            raise SourceError(
                f"output{place} is a {type(value).__name__}: a stage must be a float tensor; return maps only"
            )
        if not value.is_floating_point() or value.layout is not torch.strided:
            kind = value.dtype if value.layout is torch.strided else value.layout
            raise SourceError(
                f"output{place} is {kind} of shape {tuple(value.shape)}: a stage must be a dense float tensor; "
                "leave it out of what forward returns, or convert it there"
            )
        maps.append(value.float())
    return maps


def _fields(value: Any) -> Any:
    """Return mappings and dataclasses as a dict, all else as it is."""
    if isinstance(value, Mapping):
        return dict(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    return value


def _leaves(value: Any, place: str) -> Iterator[tuple[str, Any]]:
    """Yield everything that is no container with its place in the output, depth first."""
    value = _fields(value)
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _leaves(inner, f"{place}[{key!r}]")
    elif isinstance(value, (list, tuple)):
        for index, inner in enumerate(value):
            yield from _leaves(inner, f"{place}[{index}]")
    elif value is not None:
        yield place, value
