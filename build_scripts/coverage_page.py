"""benchmarks/results/coverage.md, written from coverage.json and never typed: ``python -m build_scripts.coverage_page``."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from build_scripts.architectures import TIMM, TRANSFORMERS

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
Results = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Figure:
    """How many of how many passed, and how many must."""

    what: str
    count: int
    of: int
    target: int

    @property
    def reached(self) -> bool:
        return self.count >= self.target


def main() -> None:
    write(RESULTS / "coverage.json", RESULTS / "coverage.md")


def write(source: Path, page: Path) -> list[Figure]:
    """Write the page of a results file; return its figures."""
    results = json.loads(source.read_text(encoding="utf-8"))["results"]
    page.write_text(render(results), encoding="utf-8")
    return figures(results)


def figures(results: Results) -> list[Figure]:
    """Return the figures that the sweep is for. An item that was not measured counts as failed."""
    passed = {
        library: [r for r in results.values() if r["library"] == library and fp32_passed(r)] for library in _TABLES
    }
    everything = [result for found in passed.values() for result in found]
    return [
        Figure("transformers: fp32 parity", len(passed["transformers"]), len(TRANSFORMERS), len(TRANSFORMERS)),
        Figure("timm: fp32 parity", len(passed["timm"]), len(TIMM), len(TIMM) - 2),
        *(
            Figure(
                f"TensorRT-RTX compiles the {precision} graph of those",
                sum(compiled(result, precision) for result in everything),
                len(everything),
                len(everything),
            )
            for precision in ("fp16", "int8")
        ),
    ]


def render(results: Results) -> str:
    """Return the whole page."""
    lines = [
        "# Coverage",
        "",
        "Written by `python -m build_scripts.sweep` from coverage.json. One representative of every architecture of",
        "transformers' AutoBackbone and of every module and feature class of timm, seeded random weights, batch 1 to 4.",
        "",
        "| figure | measured | target |",
        "|---|---|---|",
        *(
            f"| {f.what} | {f.count} of {f.of}{'' if f.reached else ' (missed)'} | {f.target} |"
            for f in figures(results)
        ),
        "",
        *_versions(results),
        "- **fp32**: worst relative error of any feature map of the CPU engine against eager PyTorch, at batches 1 to 4.",
        "- **fp16**, **int8**: cosine and SQNR of the worst feature map of the CPU engine, which computes fp16 in fp32.",
        "  Random weights: they show that the graph is sound, not how accurate a trained network is.",
        "- **RTX**: size of the plan that TensorRT-RTX compiles ahead of time, without a GPU.",
        "- **parameters**: those that the kept stages need.",
        "",
    ]
    for library, kind in _TABLES.items():
        found = [result for result in results.values() if result["library"] == library]
        lines += [f"## {library}", "", *_table(found, kind), *_failures(found)]
    return "\n".join(lines)


_TABLES = {"transformers": "architecture", "timm": "module"}


def fp32_passed(result: Mapping[str, Any]) -> bool:
    return bool(result.get("fp32", {}).get("passed"))


def compiled(result: Mapping[str, Any], precision: str) -> bool:
    return "rtx_plan_bytes" in result.get(precision, {})


def _versions(results: Results) -> list[str]:
    """Return the versions of the libraries; if several runs are mixed, those that vary."""
    found: dict[str, set[str]] = {}
    for result in results.values():
        for library, version in result["versions"].items():
            found.setdefault(library, set()).add(version)
    return ["Measured with " + ", ".join(f"{k} {' / '.join(sorted(v))}" for k, v in found.items()) + ".", ""]


def _table(results: Sequence[Mapping[str, Any]], kind: str) -> list[str]:
    return [
        f"| {kind} | {'representative, ' if kind == 'module' else ''}stages | input | parameters | fp32 | fp16 | int8 "
        "| RTX fp16 | RTX int8 | seconds |",
        "|---|---|---|---|---|---|---|---|---|---|",
        *(_row(result) for result in results),
        "",
    ]


def _row(result: Mapping[str, Any]) -> str:
    stages = ", ".join(result.get("stages", ()))
    what = [result["name"], stages]
    if result["library"] == "timm":
        what = [f"{result['module']}, {result['feature_class']}", f"{result['name']}: {stages}"]
    size = result.get("input")
    fp32 = result.get("fp32")
    cells = [
        *what,
        f"{size['height']} x {size['width']}" if size else "",
        f"{result['parameters'] / 1e6:.1f} M" if "parameters" in result else "",
        (f"{fp32['relative']:.0e}" if fp32["passed"] else f"**{fp32['relative']:.0e}**") if fp32 else "**failed**",
        *(_similarity(result.get(precision)) for precision in ("fp16", "int8")),
        *(_plan(result, precision) for precision in ("fp16", "int8")),
        f"{result['seconds'].get('all', 0):.0f}",
    ]
    return f"| {' | '.join(cells)} |"


def _similarity(parity: Mapping[str, Any] | None) -> str:
    return f"{parity['cosine']:.4f}, {parity['sqnr_db']:.0f} dB" if parity else "**none**"


def _plan(result: Mapping[str, Any], precision: str) -> str:
    if compiled(result, precision):
        return f"{result[precision]['rtx_plan_bytes'] / 1e6:.1f} MB"
    return "**failed**" if precision in result else "**none**"


def _failures(results: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = [
        f"- {result['name']}, {part}: {cause.replace('|', '/')}"
        for result in results
        for part, cause in result.get("causes", {}).items()
    ]
    return ["Causes of what failed:", "", *lines, ""] if lines else []


if __name__ == "__main__":
    main()
