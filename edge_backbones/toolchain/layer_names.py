"""Names of layers, wherever they are shown or chosen: ``layer1.0.conv1/Conv`` is a node in the block ``layer1.0``."""

from __future__ import annotations

import ast
from collections import Counter
from typing import Any

_WRAPPERS = ("net", "model")  # modules that this package and timm put around a network


def name_nodes(graph: Any) -> None:
    """Name every node of an exported graph after its module and its type: ``layer1.0.conv1/Conv``, in place.

    Equal names are numbered from the second on. The names are the same in every precision.
    """
    count: Counter[str] = Counter()
    for node in graph:
        scopes = ast.literal_eval(node.metadata_props.get("pkg.torch.onnx.name_scopes", "[]"))
        parts = scopes[-2].split(".") if len(scopes) > 1 and "_empty" not in scopes[-2] else []
        while parts and parts[0] in _WRAPPERS:
            parts.pop(0)
        name = f"{'.'.join(parts)}/{node.op_type}".removeprefix("/")
        count[name] += 1
        node.name = name if count[name] == 1 else f"{name}#{count[name]}"


def block_of(name: str) -> str:
    """Return the module around a layer, up to its last number.

    ``layer1.0`` is the block of ``layer1.0.conv1/Conv`` and of ``layer1.0/Add``.
    """
    path, _, op_type = name.partition("/")
    parts = path.split(".")
    around = parts if op_type.startswith("Add") else parts[:-1]
    numbers = [i for i, part in enumerate(around) if part.rpartition("_")[2].isdecimal()]
    return ".".join(around[: numbers[-1] + 1] if numbers else around or parts)
