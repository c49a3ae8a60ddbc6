"""Count what a TensorRT plan spends kernels on: fused attention, casts and copies, from its description of the layers.

The names are TensorRT's own. A kernel of attention is called ``_gemm_mha_v2_...`` or ``fmha_...``; a kernel that its compiler
generated is called after what it does, ``__myl_CastMulAdd_myl0_3``; a change of a tensor's format is a layer of the type
Reformat. What is fused into a kernel that computes costs next to nothing, so only kernels that do nothing else count.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

# In a tactic: attention. Not in a layer's name, which holds names of the network's modules (``encoder.0.mha``).
_ATTENTION = re.compile(r"(?:^|_)(?:f?mha|fused_mha|flash)(?:_|\d|$)", re.IGNORECASE)
_GENERATED_ATTENTION = re.compile(r"_*(?:mye\d+)?_ge(?:mm|mv)_mha")
_GENERATED = re.compile(r"__myl_(?:bb\d+_\d+_)?([A-Z][A-Za-z]*)")
# Parts of the names of generated kernels, which older releases cut to three letters.
_CASTS = frozenset({"Cast", "Cas"})
_COPIES = frozenset({"Conc", "Con", "Expa", "Move", "Mov", "Repl", "Rep", "Resh", "Res", "Slic", "Sli", "Tran", "Tra"})
# Layers without a kernel.
_IDLE = frozenset({"Constant", "NoOp", "signal", "wait"})


class KernelCounts(NamedTuple):
    """How many kernels a plan runs, and how many of them are fused attention, nothing but casts, and nothing but copies."""

    kernels: int
    attention: int
    casts: int
    copies: int

    def __str__(self) -> str:
        parts = [
            f"{self.attention or 'no'} fused attention",
            _plural(self.casts, "cast"),
            _plural(self.copies, "reformat or copy", "reformats and copies"),
        ]
        return f"{_plural(self.kernels, 'kernel')}: {', '.join(parts)}"


def count_kernels(layers: Iterable[object]) -> KernelCounts:
    """Count the kernels of a plan; ``layers``: the list ``Layers`` of TensorRT's JSON, objects or names alone."""
    kinds = [_kind_of(layer) for layer in layers]
    return KernelCounts(
        kernels=sum(kind != "idle" for kind in kinds),
        attention=kinds.count("attention"),
        casts=kinds.count("cast"),
        copies=kinds.count("copy"),
    )


def _kind_of(layer: object) -> str:
    """Return what a layer's kernel does: attention, cast, copy, other, or idle if it has none."""
    name, kind, tactic = (
        (str(layer.get(key) or "") for key in ("Name", "LayerType", "TacticName"))
        if isinstance(layer, dict)
        else (str(layer), "", "")
    )
    if kind in _IDLE:
        return "idle"
    if _ATTENTION.search(tactic) or _GENERATED_ATTENTION.match(name):
        return "attention"
    if kind == "Cast":
        return "cast"
    if kind == "Reformat" or (not kind and name.startswith("Reformatting CopyNode")):
        return "copy"
    generated = _GENERATED.match(tactic) or _GENERATED.match(name)
    parts = set(re.findall(r"[A-Z][a-z]*", generated.group(1))) if generated else set()
    if parts and parts <= _CASTS | _COPIES:
        return "cast" if parts & _CASTS else "copy"
    return "other"


def _plural(count: int, one: str, many: str = "") -> str:
    return f"{count or 'no'} {one if count == 1 else many or f'{one}s'}"
