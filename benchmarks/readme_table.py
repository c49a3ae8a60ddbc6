"""The figures in README.md, written from a results file and never typed."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
_BLOCK = re.compile(r"<!-- figures of (?P<path>\S+) -->\n.*?<!-- end of figures -->\n", re.DOTALL)


def render(path: str) -> str:
    """The block for a results file, ``path`` relative to the project."""
    results = json.loads((ROOT / path).read_text(encoding="utf-8"))
    machine = results["machine"]
    openvino = machine["versions"]["openvino"]
    lines = [
        f"<!-- figures of {path} -->",
        f"On {machine['threads']} threads of an {machine['cpu']} ({', '.join(machine['cpu_features'][-1:])}), OpenVINO",
        f"{openvino}, batch 1 at 224 x 224; peers side by side, each alone in its process, alternating, medians of the",
        "calmer rounds:",
        "",
        "| figure | measured | target |",
        "|---|---|---|",
        *(_row(figure) for figure in results["figures"]),
        "<!-- end of figures -->",
    ]
    return "\n".join(lines) + "\n"


def update(path: str) -> None:
    """Put the block of ``path`` into README.md."""
    README.write_text(_BLOCK.sub(lambda _: render(path), README.read_text(encoding="utf-8")), encoding="utf-8")


def shown_path() -> str:
    """The results file that README.md shows."""
    found = _BLOCK.search(README.read_text(encoding="utf-8"))
    if found is None:
        raise ValueError("README.md has no block of figures")
    return found["path"]


def _row(figure: dict[str, Any]) -> str:
    bound = "at least" if figure["at_least"] else "at most"
    digits = 0 if figure["value"] >= 100 else 2
    unit = "" if figure["unit"] in ("x", "%") else " "
    value = f"{figure['value']:.{digits}f}{unit}{figure['unit']}"
    miss = "" if figure["reached"] else " (missed)"
    return f"| {figure['what']} | {value}{miss} | {bound} {figure['target']:g}{unit}{figure['unit']} |"
