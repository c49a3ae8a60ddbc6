"""Find the tensors of one network in a file that somebody trained, and explain why a file does not fit.

A state dict is rarely saved as the network that is built here names its tensors. It lies in a dict beside an optimizer,
every key has a prefix of DistributedDataParallel, of torch.compile, of a Lightning module or of a detector, and timm's
``features_only`` models rename stages (``stages.0`` becomes ``stages_0``). One rule covers all of these: a network is
found where every one of its names, spelled in either way, follows the same prefix.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from edge_backbones.errors import SourceError

State = Mapping[str, torch.Tensor]
Shapes = Mapping[str, tuple[int, ...]]

# Wrappers that put a segment anywhere in a key: torch.compile, FSDP and activation checkpointing.
_INSERTED = re.compile(r"(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
# Tensors beside others of a module. Masks, decoders and counters may lie there too, and are no part of a backbone.
_CHANGES_THE_FUNCTION = re.compile(r"bias|weight|gamma|lora_\w+|(?:reg|register|dist|cls|storage)_tokens?")
# Words of which people and libraries make the names of what holds a backbone, as in model_ema, conv_encoder, image_encoder.
_WRAPPER_WORDS = frozenset(
    re.findall(
        r"\w+",
        """module model net network nn backbone encoder body base trunk visual vision image feature features extractor pixel
        level conv cnn timm graph state dict weights params ema averaged avg swa student teacher online target momentum query
        key q k current detector segmentor inner wrapped""",
    )
)
# What timm's own loader prefers, then what DINO evaluates. Anything else has the same rank.
_CONTAINERS = (
    "state_dict_ema",
    "model_ema",
    "ema",
    "teacher",
    "state_dict",
    "model_state_dict",
    "model",
    "net",
    "student",
)
_SHOWN = 5


@dataclass(frozen=True)
class Placement:
    """Where a file holds a network: ``keys[name]`` is the file's key of that tensor, the prefix included."""

    prefix: str
    keys: Mapping[str, str]


def flat_tensors(content: Any) -> dict[str, torch.Tensor]:
    """Return every tensor in nested dicts by its dotted path, without the state of optimizers.

    Every dict is visited once, so that a file whose dicts contain each other ends.
    """
    found: dict[str, torch.Tensor] = {}
    seen: set[int] = set()

    def visit(node: Mapping[Any, Any], path: str) -> None:
        if id(node) in seen or "param_groups" in node:
            return
        seen.add(id(node))
        for key, value in node.items():
            if isinstance(value, torch.Tensor):
                found.setdefault(f"{path}{key}", value)
            elif isinstance(value, Mapping):
                visit(value, f"{path}{key}.")

    if isinstance(content, Mapping):
        visit(content, "")
    return found


def learned_shapes(net: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return the shapes of what training gives a network: parameters, and statistics of batch norms."""
    parameters = {key for key, _ in net.named_parameters()}
    return {
        key: tuple(tensor.shape)
        for key, tensor in net.state_dict().items()
        if key in parameters or key.rpartition(".")[2].startswith("running_")
    }


def stage_spelling(name: str) -> str:
    """Return a name as timm's FeatureListNet and FeatureDictNet spell it: ``stages.0.conv`` is ``stages_0.conv``."""
    first, _, rest = name.partition(".")
    second, dot, rest = rest.partition(".")
    return f"{first}_{second}.{rest}" if dot else name


def whole_names(extractor: Iterable[str], whole: Iterable[str]) -> dict[str, str]:
    """Map the names in a ``features_only`` model of timm to the names in the whole network."""
    spelled: dict[str, str] = {}
    for name in whole:
        for spelling in (name, stage_spelling(name), f"model.{name}", f"body.{name}"):
            spelled.setdefault(spelling, name)
    return {name: spelled.get(name, name) for name in extractor}


def placements(state: State, names: Iterable[str]) -> list[Placement]:
    """Return every prefix in the file under which it holds some of ``names``, the one with the most first."""
    spelled = {spelling: name for name in names for spelling in (stage_spelling(name), name)}
    found: dict[str, dict[str, str]] = {}
    for key in state:
        clean = _INSERTED.sub("", key)
        starts = [0, *(match.end() for match in re.finditer(r"\.", clean))]
        for start in starts:
            name = spelled.get(clean[start:])
            if name is not None:
                found.setdefault(clean[:start], {}).setdefault(name, key)
    return sorted((Placement(prefix, keys) for prefix, keys in found.items()), key=lambda p: -len(p.keys))


def place(path: object, what: str, state: State, wanted: Shapes, names: Iterable[str]) -> Placement | None:
    """Return where the file holds all of ``wanted``, or None. Other ``names`` are placed where the file has them.

    The prefix must be one of wrappers, or of the network's own name (``resnet.`` for resnet18). A placement whose shapes
    are the network's is preferred to one whose shapes are not, averaged weights to others, and a teacher to its student.
    Raises SourceError when the file holds several networks of the same rank and their tensors differ.
    """
    complete = [
        placement
        for placement in placements(state, names)
        if _is_wrapper(placement.prefix, what) and all(name in placement.keys for name in wanted)
    ]
    fitting = [placement for placement in complete if fits(state, wanted, placement)]
    chosen = sorted(fitting or complete, key=lambda placement: _rank(placement.prefix))
    for other in chosen[1:]:
        if _rank(other.prefix) > _rank(chosen[0].prefix):
            break
        if any(not _equal(state[chosen[0].keys[name]], state[other.keys[name]]) for name in wanted):
            raise SourceError(
                f"{path} holds several networks that fit {what}, under {chosen[0].prefix!r} and {other.prefix!r}: save "
                "the one that you want in a file of its own"
            )
    return chosen[0] if chosen else None


def absent(what: str, state: State, wanted: Shapes) -> frozenset[str]:
    """Return the wanted tensors that the file lacks where it holds the most of them; nothing where it holds under half."""
    keys = _best(what, state, wanted).keys
    return frozenset(name for name in wanted if name not in keys) if 2 * len(keys) >= len(wanted) else frozenset()


def surplus_tensors(state: State, wanted: Shapes, whole: Iterable[str], placement: Placement) -> list[str]:
    """Return tensors that the file's backbone has and the network lacks, for which it would be another function.

    They are of blocks that follow the network's last ones (a deeper network's file fits a shallower network), or beside
    the network's own tensors a bias or a register token. ``whole``: every name of the whole network, of which ``wanted``
    may be the first stages. Heads and what only training uses are no surplus.
    """
    known = set(whole)
    blocks = {block for name in known for block in _numbered(name)}
    containers = {block.rpartition(".")[0] for name in wanted for block in _numbered(name)}
    modules = {name.rpartition(".")[0] for name in wanted}
    surplus = []
    for key in state:
        clean = _INSERTED.sub("", key)
        if not clean.startswith(placement.prefix):
            continue
        name = clean[len(placement.prefix) :]
        for spelling in (name, stage_dotted(name)):
            module, _, last = spelling.rpartition(".")
            beside = module in modules and spelling not in known and _CHANGES_THE_FUNCTION.fullmatch(last)
            if beside or any(b not in blocks and b.rpartition(".")[0] in containers for b in _numbered(spelling)):
                surplus.append(name)
                break
    return surplus


def fits(state: State, wanted: Shapes, placement: Placement) -> bool:
    """Return whether every wanted tensor has its shape in the file and is of a floating-point type."""
    return not _mismatched(state, wanted, placement)


def main_part(state: State) -> dict[str, torch.Tensor]:
    """Return the one state dict that timm's loader would take from the file, without ``module.`` and ``_orig_mod.``."""
    for container in _CONTAINERS:
        part = {key[len(container) + 1 :]: value for key, value in state.items() if key.startswith(f"{container}.")}
        if part:
            break
    else:
        part = dict(state)
    return {_INSERTED.sub("", key).removeprefix("module."): value for key, value in part.items()}


def without_wrappers(state: State) -> dict[str, torch.Tensor]:
    """Take off what all keys begin with as long as it is the name of a wrapper."""
    prefix = common_prefix(state)
    while prefix and not _is_wrapper(prefix, ""):
        prefix = prefix[: prefix.rstrip(".").rfind(".") + 1]
    return {key.removeprefix(prefix): value for key, value in state.items()}


def common_prefix(keys: Iterable[str]) -> str:
    """Return the whole segments that all keys begin with, the last dot included."""
    ordered = sorted(keys)
    if not ordered:
        return ""
    first, last = ordered[0].split(".")[:-1], ordered[-1].split(".")[:-1]
    shared = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(first, last, strict=False))
    return "".join(f"{segment}." for segment, _ in shared)


def misfit(
    what: str,
    state: State,
    wanted: Shapes,
    *,
    unreached: Iterable[str] = (),
    surplus: Iterable[str] = (),
    near: str | None = None,
) -> str:
    """Explain in one line, which follows the path of the file, why the file does not hold the network.

    ``wanted``: shapes by name. ``unreached``: names of tensors that got nothing from the file although the library
    accepted it. ``surplus``: names that the network lacks. ``near``: the network that the file seems to be of.
    """
    best = _best(what, state, wanted)
    mismatched = _mismatched(state, wanted, best)
    if surplus := list(surplus):
        cause = f"has {len(surplus)} tensors that {what} lacks, {surplus[0]} first"
    elif mismatched:
        name = mismatched[0]
        in_file = _described(state[best.keys[name]])
        cause = (
            f"does not fit {what}: size mismatch for {name}, {in_file} in the file and {wanted[name]} in the network"
        )
    else:
        lacking = list(unreached) or [name for name in wanted if name not in best.keys] or list(wanted)
        cause = f"has no weights for {len(lacking)} tensors of {what}, {lacking[0]} first"
    return f"{cause}: wrong file? {explanation(what, state, wanted, near)}"


def explanation(what: str, state: State, wanted: Shapes, near: str | None) -> str:
    """Return what a refusal says of the keys: their prefix, the network that they are of, and the first on each side."""
    best = _best(what, state, wanted)
    prefix = best.prefix or common_prefix(_INSERTED.sub("", key) for key in state)
    parts = []
    if len(best.keys) == len(wanted) and not _is_wrapper(best.prefix, what):
        parts.append(
            f"All are there under {prefix!r}, which is not the prefix of a known wrapper: save them without it."
        )
    elif prefix:
        parts.append(f"The file's keys begin with {prefix!r}.")
    if near:
        parts.append(f"It fits {near} of timm.")
    parts.append(f"First keys of the file: {_first(state)}; of the network: {_first(wanted)}")
    return " ".join(parts)


def _best(what: str, state: State, wanted: Shapes) -> Placement:
    """Return the placement of the most tensors.

    Under a prefix that is no wrapper's it must have at least half of the tensors: fewer may be there by chance.
    """
    found = placements(state, wanted)
    likely = [p for p in found if _is_wrapper(p.prefix, what) or 2 * len(p.keys) >= len(wanted)]
    return next(iter(likely), Placement("", {}))


def _first(keys: Iterable[str]) -> str:
    shown = list(keys)
    return ", ".join(shown[:_SHOWN]) + (", ..." if len(shown) > _SHOWN else "")


def _described(tensor: torch.Tensor) -> str:
    shape = str(tuple(tensor.shape))
    return shape if tensor.is_floating_point() else f"{shape} of {str(tensor.dtype).removeprefix('torch.')}"


def _mismatched(state: State, wanted: Shapes, placement: Placement) -> list[str]:
    placed = {name: state[placement.keys[name]] for name in wanted if name in placement.keys}
    return [name for name, t in placed.items() if tuple(t.shape) != wanted[name] or not t.is_floating_point()]


def _equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.shape == other.shape and torch.equal(one, other)


def _words(text: str) -> set[str]:
    return set(re.findall(r"[a-z]+", text.lower()))


def _numbered(name: str) -> list[str]:
    """Return the numbered blocks that a tensor is in.

    ``layer1.0`` and ``layer1.0.downsample.1`` of ``layer1.0.downsample.1.weight``.
    """
    parts = name.split(".")
    return [".".join(parts[: i + 1]) for i, part in enumerate(parts) if part.isdigit()]


def stage_dotted(name: str) -> str:
    """Return a name of stage_spelling as the whole network has it."""
    return re.sub(r"^([a-z_]+)_(\d+)\.", r"\1.\2.", name)


def _is_wrapper(prefix: str, what: str) -> bool:
    """Return whether a prefix is made of words of wrappers, or of the network's own name: ``pvt_v2.`` for PvtV2Backbone."""
    own = what.lower().replace("_", "")
    return all(
        _words(segment) <= _WRAPPER_WORDS or (len(segment) > 2 and segment.lower().replace("_", "") in own)
        for segment in prefix.split(".")
    )


def _rank(prefix: str) -> int:
    """Return the order of preference of a prefix, the smallest first.

    Averaged weights come first, then a teacher, what timm takes first, others, and last what training goes on with.
    """
    words = _words(prefix)
    container = prefix.partition(".")[0]
    if words & {"ema", "averaged", "swa"}:
        return _CONTAINERS.index(container) if container in _CONTAINERS[:3] else 2
    if "teacher" in words:
        return 3
    if words & {"student", "current"}:
        return len(_CONTAINERS) + 1
    return _CONTAINERS.index(container) if container in ("state_dict", "model_state_dict") else len(_CONTAINERS)
