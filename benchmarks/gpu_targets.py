"""What the GPU suite was to reach, and the figures that it draws from several parts."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from benchmarks.gpu_common import TENSORRT

PRECISIONS = ("fp16", "int8", "fp8")
"""Number formats of the plans that are timed."""
PEER = "torch.compile max-autotune fp16"

_FASTEST_OURS = tuple(f"{flavour} fp16 with CUDA graphs" for flavour in TENSORRT)


def contender_name(kind: dict[str, Any]) -> str:
    """Return the name of a contender: ``torch eager fp16``, ``tensorrt int8 with CUDA graphs``."""
    names = {"eager": "torch eager", "compile": "torch.compile max-autotune"}
    words = [names.get(kind["kind"], kind["kind"]), kind.get("precision", "fp16")]
    return " ".join([*words, *(["with CUDA graphs"] if kind.get("graphed") else [])])


def targets(parts: Sequence[Any]) -> list[dict[str, Any]]:
    """Return the targets that were measured: ``what``, ``measured``, ``asked`` (in words) and ``reached``.

    ``parts``: objects with ``name`` and ``figures``.
    """
    found: list[dict[str, Any]] = []

    def add(what: str, measured: float, *, most: float | None = None, least: float | None = None) -> None:
        reached = (most is None or measured <= most) and (least is None or measured >= least)
        asked = f"at least {least:g}" if most is None else f"at most {most:g}"
        found.append({"what": what, "measured": measured, "asked": asked, "reached": reached})

    for part in parts:
        overhead, network = (
            re.fullmatch(pattern, part.name) for pattern in ("overhead-(.+)", "contend-.*(resnet50-.+)")
        )
        for setting, figures in part.figures.items() if overhead else ():
            if isinstance(figures, dict) and "target_us" in figures:
                what = f"{overhead[1]}, {setting}"
                add(f"{what}: microseconds over the bare call", figures["overhead_us"], most=figures["target_us"])
                for where in ("device_arrays", "host_arrays"):
                    if where in figures:
                        kept = figures[where]["kept_bytes_per_call"]
                        add(f"{what}: bytes that a call leaves behind ({where.replace('_', ' ')})", kept, most=1)
        for name, others in part.figures.get("times_faster_than", {}).items():
            if network and name in _FASTEST_OURS and PEER in others:
                add(f"{network[1]}: {name}, times as fast as {PEER}", others[PEER]["latency_ms"], least=1)
    return found


def timed_engines(parts: Sequence[Any]) -> list[dict[str, Any]]:
    """Return the engines that were timed, as arguments of the roofline task."""
    found = []
    for part in parts:
        named = re.fullmatch(r"contend(?:-all)?-(?P<model>.+)-(?P<batch>\d+)", part.name)
        for name, figures in part.figures.get("contenders", {}).items() if named else ():
            precision = next((one for one in PRECISIONS if f" {one}" in name), "fp16")
            engine = {"name": name, "precision": precision, "milliseconds": figures["pipelined_ms"]}
            found.append({"model": named["model"], "batch": int(named["batch"]), **engine})
    return found
