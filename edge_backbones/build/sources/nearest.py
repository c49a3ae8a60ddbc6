"""Name the network of timm that a foreign state dict is of, for the message that refuses it."""

from __future__ import annotations

import functools
import inspect
import math
import re
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import timm
import torch

from edge_backbones.build.sources.checkpoints import State, learned_shapes, placements

_SECONDS = 1.5  # the search ends after it: a refusal should not keep anybody waiting
_FAMILIES = 3
_EXPLAINED = 0.9  # share of the file's tensors, heads included, that the named network has


def nearest(state: State, *, but: str = "") -> str | None:
    """Return the timm name whose backbone this is, or None where none was found in time. ``but``: the one that failed.

    Every tensor of the backbone must be in the file with its name and shape; only the numbers of input channels, of
    image positions and of classes may differ. Which candidates are worth a comparison is guessed from the words in the
    keys, which the source of the right family contains, and from the numbers in the shapes, which its configuration does.
    """
    ends = time.monotonic() + _SECONDS
    found: list[tuple[float, str]] = []
    for name in _candidates(state):
        if time.monotonic() > ends:
            break
        if name == but:
            continue
        explained, exact = _compared(state, name)
        if exact and explained >= _EXPLAINED:
            return name
        if explained >= _EXPLAINED:
            found.append((-explained, name))
    return min(found)[1] if found else None


def _compared(state: State, name: str) -> tuple[float, bool]:
    """The share of the file's tensors that the network has, 0 where it lacks one of the backbone's; and: all shapes equal."""
    try:
        with torch.device("meta"):
            net = timm.create_model(name)
    except Exception:  # an optional library is missing, or the constructor needs numbers: it is no candidate
        return 0.0, False
    shapes = learned_shapes(net)
    wanted = _of_backbone(net, shapes)
    best = next(iter(placements(state, shapes)), None)
    if best is None or not wanted or any(key not in best.keys for key in wanted):
        return 0.0, False
    pairs = [(key, tuple(state[best.keys[key]].shape), wanted[key]) for key in wanted]
    if not all(_alike(*pair) for pair in pairs):
        return 0.0, False
    size = sum(key.startswith(best.prefix) and tensor.is_floating_point() for key, tensor in state.items())
    return len(best.keys) / max(size, 1), all(one == other for _, one, other in pairs)


def _of_backbone(net: Any, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Tensors up to the last stage: heads and final norms are registered after it, and files may lack them."""
    info = getattr(net, "feature_info", None)
    if not info:
        return dict(shapes)
    stage = str(info[-1]["module"])
    keys = list(net.state_dict())
    last = max((i for i, key in enumerate(keys) if key.startswith(f"{stage}.")), default=len(keys))
    before = set(keys[: last + 1])
    return {key: shape for key, shape in shapes.items() if key in before}


def _alike(key: str, one: tuple[int, ...], other: tuple[int, ...]) -> bool:
    """Whether shapes differ in no more than input channels, or in positions, which grow with the image."""
    if one == other:
        return True
    if len(one) != len(other):
        return False
    if "pos_embed" in key or "relative_position" in key:
        return one[-1] == other[-1]
    return len(one) == 4 and one[0] == other[0] and one[2:] == other[2:] and other[1] == 3


def _candidates(state: State) -> Iterator[str]:
    """Names of timm, the likeliest first."""
    shapes = {key: tuple(tensor.shape) for key, tensor in state.items() if tensor.is_floating_point()}
    sizes = Counter(shape[0] for shape in shapes.values() if len(shape) == 1)
    numbers = {number for shape in shapes.values() for number in shape} | _lengths(shapes)
    for family in _families(shapes):
        ranked = []
        for name in timm.list_models(module=family):
            configured = _numbers(family, name)
            known = sum(number in numbers for number in configured) / max(len(configured), 1)
            used = sum(n for size, n in sizes.items() if size in configured) / max(sizes.total(), 1)
            ranked.append((-known - used, len(name), name))
        yield from (name for *_, name in sorted(ranked))


def _families(keys: Iterable[str]) -> list[str]:
    """Modules of timm whose source has the words of the keys; a word that few modules have says more."""
    words = {re.sub(r"_\d+$", "", part) for key in keys for part in key.split(".") if not part.isdigit()}
    sources = _sources()
    modules = Counter(word for source in sources.values() for word in source)
    scores = {
        family: sum(math.log(len(sources) / modules[word]) for word in words & source)
        for family, source in sources.items()
    }
    return sorted(scores, key=lambda family: -scores[family])[:_FAMILIES]


@functools.cache
def _sources() -> dict[str, frozenset[str]]:
    """Every word in the source of a family, and of the shared builders that it imports."""

    def words(module: Any) -> frozenset[str]:
        try:
            return frozenset(re.findall(r"\w+", inspect.getsource(module)))
        except (OSError, TypeError):  # installed without sources
            return frozenset()

    shared = {key: words(module) for key, module in list(sys.modules.items()) if key.startswith("timm.models._eff")}
    found = {}
    for family in timm.list_modules():
        module = sys.modules[f"timm.models.{family}"]
        imported = {getattr(value, "__module__", "") for value in vars(module).values()}
        found[family] = words(module).union(*(shared[key] for key in imported & shared.keys()))
    return found


def _numbers(family: str, name: str) -> set[int]:
    """Whole numbers in the function that makes a network, or in its entry of a table of configurations."""
    entry: Any = inspect.unwrap(timm.model_entrypoint(name))
    found = set(_whole(entry.__code__.co_consts))
    for key, table in vars(sys.modules[f"timm.models.{family}"]).items():
        if isinstance(table, dict) and name in table and "default" not in key:
            found |= {int(number) for number in re.findall(r"\b\d+\b", repr(table[name]))}
    return found - {0}


def _whole(value: Any) -> Iterator[int]:
    if isinstance(value, tuple):
        for item in value:
            yield from _whole(item)
    elif isinstance(value, int) and not isinstance(value, bool):
        yield value


def _lengths(keys: Iterable[str]) -> set[int]:
    """How many numbered blocks follow each other, at every place where blocks are numbered."""
    blocks: dict[str, set[str]] = {}
    for key in keys:
        parts = key.split(".")
        for i, part in enumerate(parts):
            if part.isdigit():
                blocks.setdefault(".".join(parts[:i]), set()).add(part)
    return {len(numbers) for numbers in blocks.values()}
