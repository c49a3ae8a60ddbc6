"""Read the name of a device: ``auto``, ``cpu``, ``cuda`` or ``cuda:1``."""

from __future__ import annotations

import re
from typing import Literal

from edge_backbones.errors import InputError

Place = Literal["auto", "cpu", "cuda"]


def parse_device(device: str) -> tuple[Place, int]:
    """Return the kind of a device, and the index of its GPU (0 if none is named).

    Raises InputError for other text.
    """
    if device == "auto":
        return "auto", 0
    if device == "cpu":
        return "cpu", 0
    found = re.fullmatch(r"cuda(?::([0-9]{1,3}))?", str(device))
    if found is None:
        raise InputError(f"device must be 'auto', 'cpu', 'cuda' or 'cuda:<index>', got {device!r}")
    return "cuda", int(found[1] or 0)
