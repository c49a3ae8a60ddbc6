"""Name the network of timm that a foreign state dict is of, for the message that refuses it."""

from __future__ import annotations

import functools
import re
import time
import zlib
from collections.abc import Mapping
from importlib import resources
from typing import Any

import timm
import torch

from edge_backbones.toolchain.sources.checkpoints import (
    State,
    common_prefix,
    learned_shapes,
    main_part,
    placements,
    stage_dotted,
)

_SECONDS = 2.0  # comparisons end after it: nobody should wait for a refusal
_EXPLAINED = 0.9  # share of the file's tensors, heads included, that the named network has


def nearest(state: State, *, but: str = "") -> str | None:
    """Return the timm name whose backbone this is, or None where none is. ``but``: the name that was asked for.

    A table of signatures proposes names, and each is compared: every tensor of the backbone must be in the file with its
    name and shape. Only the numbers of input channels, of image positions and of classes may differ.
    """
    ends = time.monotonic() + _SECONDS
    alike: str | None = None
    for name in _networks().get(signature(state), ()):
        if name == but or time.monotonic() > ends:
            continue
        found = _compared(state, name)
        if found == "equal":
            return name
        if found == "alike":
            alike = alike or name
    return alike


def signature(state: State) -> str:
    """Return eight digits that depend on the numbered blocks of a network, and not on its prefix, its head or its input.

    They count biases, norms and convolutions by their sizes. A network without numbered blocks is taken as a whole.
    """
    part = {stage_dotted(key): tensor for key, tensor in _unprefixed(state).items() if tensor.is_floating_point()}
    numbered = {key: t for key, t in part.items() if any(segment.isdigit() for segment in key.split("."))}
    chosen = numbered or {key: t for key, t in part.items() if key.count(".") > 1}
    sizes = [(t.shape[0], *t.shape[2:]) for t in chosen.values() if t.ndim in (1, 4)]
    return f"{zlib.crc32(repr(sorted(sizes)).encode()):08x}"


def backbone_shapes(net: Any) -> dict[str, tuple[int, ...]]:
    """Return learned tensors up to the last stage: heads and final norms come after it, and files may lack them."""
    shapes, keys = learned_shapes(net), list(net.state_dict())
    stages = [f"{stage['module']}." for stage in getattr(net, "feature_info", None) or ()]
    ends = [max((i for i, key in enumerate(keys) if key.startswith(stage)), default=-1) for stage in stages]
    last = max(ends, default=-1)
    before = set(keys[: last + 1] if last >= 0 else keys)
    return {key: shape for key, shape in shapes.items() if key in before}


def _unprefixed(state: State) -> dict[str, torch.Tensor]:
    part = main_part(state)
    prefix = common_prefix(part)
    return {re.sub(r"^(model|body)\.", "", key[len(prefix) :]): tensor for key, tensor in part.items()}


@functools.cache
def _networks() -> Mapping[str, tuple[str, ...]]:
    """Read the names by signature that ``python -m build_scripts.write_networks`` wrote."""
    found: dict[str, tuple[str, ...]] = {}
    text = resources.files("edge_backbones.toolchain.sources").joinpath("timm_networks.txt").read_text(encoding="utf-8")
    for line in text.splitlines():
        digits, name = line.split()
        found[digits] = (*found.get(digits, ()), name)
    return found


def _compared(state: State, name: str) -> str:
    """Return 'equal' or 'alike' where the file holds the backbone of this name, otherwise ''."""
    try:
        with torch.device("meta"):
            net = timm.create_model(name)
    except Exception:  # another release of timm, or an optional library is missing
        return ""
    shapes, wanted = learned_shapes(net), backbone_shapes(net)
    best = next(iter(placements(state, shapes)), None)
    if best is None or any(key not in best.keys for key in wanted):
        return ""
    pairs = [(key, tuple(state[best.keys[key]].shape), shape) for key, shape in wanted.items()]
    size = sum(key.startswith(best.prefix) and tensor.is_floating_point() for key, tensor in state.items())
    if len(best.keys) < _EXPLAINED * size or not all(_alike(*pair) for pair in pairs):
        return ""
    return "equal" if all(one == other for _, one, other in pairs) else "alike"


def _alike(key: str, one: tuple[int, ...], other: tuple[int, ...]) -> bool:
    """Return whether shapes differ in no more than input channels, or in positions, which grow with the image."""
    if one == other:
        return True
    if len(one) != len(other):
        return False
    if "pos_embed" in key or "relative_position" in key:
        return one[-1] == other[-1]
    return len(one) == 4 and one[0] == other[0] and one[2:] == other[2:] and other[1] == 3
