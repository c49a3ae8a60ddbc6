"""Results of the GPU suite: a file for each part, written when it ends, and a document that joins them."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.gpu_targets import targets

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
DONE, FAILED, NOT_RUN = "done", "failed", "not run"

_CODE = ("edge_backbones", "benchmarks", "tests/gpu")
_SAME = ("device", "driver", "python", "versions", "code")


@dataclass
class Part:
    """What came of one part.

    ``state``: done, failed or not run. ``reason``: why, unless it is done. ``figures``: what it measured; one that failed may
    have some.
    """

    name: str
    state: str
    reason: str = ""
    seconds: float = 0.0
    figures: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.name}: {self.state}, {self.seconds:.0f} s" + (f" ({self.reason})" if self.reason else "")


def slug(name: str) -> str:
    """Turn a GPU's name into a file name: ``NVIDIA H100 80GB HBM3`` into ``nvidia-h100-80gb-hbm3``."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def code_revision(root: Path = ROOT) -> str:
    """Return a hash of the code that is measured, which needs no git and knows of changes that nobody committed."""
    found = hashlib.sha256()
    for folder in _CODE:
        for path in sorted((root / folder).rglob("*.py")):
            content = path.read_bytes()
            found.update(f"{path.relative_to(root).as_posix()} {len(content)}\n".encode() + content)
    return found.hexdigest()[:16]


class Results:
    """The files of one GPU.

    Args:
        document: The document. The parts lie beside it, in a folder of its name.
        described: What `describe_machine` found, with ``code``. A part of another machine or code does not count.
    """

    def __init__(self, document: Path, described: dict[str, Any]) -> None:
        self.document = document
        self._described = described

    def path_of(self, name: str) -> Path:
        """Return the file of a part."""
        return self.document.with_suffix("") / f"{name}.json"

    def earlier(self, name: str) -> Part | None:
        """Return a part as an earlier run left it on this machine with this code; None if there is none."""
        try:
            stored = json.loads(self.path_of(name).read_text(encoding="utf-8"))
            part = Part(**stored.pop("part"))
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            return None
        here = json.loads(json.dumps(self._described))  # as it looks once it was written
        return part if all(_identity(stored, key) == _identity(here, key) for key in _SAME) else None

    def write(self, part: Part) -> None:
        """Write the file of a part."""
        _write(self.path_of(part.name), {**self._described, "part": asdict(part)})

    def join(self, parts: Sequence[Part]) -> None:
        """Write the document."""
        joined = {"targets": targets(parts), "parts": [asdict(part) for part in parts]}
        _write(self.document, {**self._described, **joined})


def _identity(described: dict[str, Any], key: str) -> Any:
    value = described.get(key)
    if key == "device" and isinstance(value, dict):  # another card of the same model does as well
        return {name: entry for name, entry in value.items() if name != "bus_address"}
    return value


def _write(path: Path, document: dict[str, Any]) -> None:
    """Write a file in whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    begun = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        begun.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
        begun.replace(path)
    finally:
        with contextlib.suppress(OSError):
            begun.unlink()
