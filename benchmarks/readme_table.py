"""The figures in README.md and benchmarks/README.md, written from the results files and never typed."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

from benchmarks.common import ROOT

PAGES = (ROOT / "README.md", ROOT / "benchmarks" / "README.md")
_BLOCK = re.compile(r"<!-- (?P<kind>figures|summary) of (?P<path>\S+) -->\n.*?<!-- end of figures -->\n", re.DOTALL)
_PEERS = {
    "torch": "torch",
    "torch-compile": "torch.compile",
    "torchscript": "TorchScript",
    "onnxruntime": "ONNX Runtime",
    "openvino": "OpenVINO",
    "openvino-f32": "OpenVINO in fp32",
    "nncf": "NNCF",
    "nncf-f32": "NNCF, rest in fp32",
    "modelopt": "ModelOpt",
}
_TITLES = {**_PEERS, "bf16": "our bf16", "fp32": "our fp32"}


def render(path: str, kind: str = "figures") -> str:
    """Return the block of a results file.

    ``path``: relative to the project. ``kind``: ``figures`` for all of them, or ``summary``.
    """
    results = json.loads((ROOT / path).read_text(encoding="utf-8"))
    lines = _summary(results) if kind == "summary" else _TABLES.get(Path(path).stem, _bench)(results)
    return "\n".join([f"<!-- {kind} of {path} -->", *lines, "<!-- end of figures -->"]) + "\n"


def rendered(text: str) -> str:
    """Return a page's text with every block rendered from its results file."""
    return _BLOCK.sub(lambda block: render(block["path"], block["kind"]), text)


def update(path: str | None = None) -> None:
    """Rewrite the blocks of the pages. ``path``: a results file that replaces the one of another machine."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        if path is not None:
            text = _BLOCK.sub(lambda block: render(path, block["kind"]) if _is_bench(block["path"]) else block[0], text)
        page.write_text(rendered(text), encoding="utf-8")


def _is_bench(path: str) -> bool:
    return Path(path).stem not in _TABLES


def _bench(results: dict[str, Any]) -> list[str]:
    machine, comparisons = results["machine"], results["comparisons"]
    peers = [m["name"] for m in next(iter(comparisons.values()))["measurements"][1:]]
    return [
        f"On {machine['threads']} threads of an {machine['cpu']} ({', '.join(machine['cpu_features'][-1:])}), OpenVINO",
        f"{machine['versions']['openvino']}, batch 1 at 224 x 224: the time of the engine that the runtime takes, how many",
        "times as long each other one takes, and the bounds of that median with 95 % confidence; '=' where this machine does",
        "not tell which is faster. OpenVINO and NNCF without a format compute floats as OpenVINO chooses: in bf16 on CPUs",
        "that have it. The weights are those of benchmarks/networks.py.",
        "",
        f"| | ours | {' | '.join(_TITLES.get(name, name) for name in peers)} | roofline |",
        f"|---|---|{'---|' * len(peers)}---|",
        *(_compared(model, one, peers, results["rooflines"].get(model, {})) for model, one in comparisons.items()),
        "",
        "SQNR of the worst feature map against fp32, in dB:",
        "",
        f"| | ours | {' | '.join(_TITLES.get(name, name) for name in _WITH_QUALITY)} |",
        f"|---|---|{'---|' * len(_WITH_QUALITY)}",
        *(f"| {model} | {' | '.join(_quality(one, name) for name in ('edge', *_WITH_QUALITY))} |"
          for model, one in comparisons.items()),
        "",
        *_figures(results),
    ]  # fmt: skip


_WITH_QUALITY = ("bf16", "openvino", "nncf", "nncf-f32")  # of the contenders that do not compute in fp32


def _quality(comparison: dict[str, Any], name: str) -> str:
    found = next((m.get("worst_sqnr_db") for m in comparison["measurements"] if m["name"] == name), None)
    return "-" if found is None else f"{found:.1f}"


def _summary(results: dict[str, Any]) -> list[str]:
    """Return the table of the medians of the ratios, with their geometric means and the quality of those in few bits."""
    machine, comparisons = results["machine"], results["comparisons"]
    ratios = {model: {r["name"]: r["median"] for r in one["ratios"]} for model, one in comparisons.items()}
    rows = []
    for model, one in comparisons.items():
        cells = []
        for name in _SUMMARISED:
            quality = f" ({_quality(one, name)})" if name in _WITH_QUALITY else ""
            cells.append(f"{ratios[model][name]:.1f}x{quality}" if name in ratios[model] else "absent")
        ours = f"{one['measurements'][0]['median_ms']:.1f} ms, {one['precision']} ({_quality(one, 'edge')})"
        rows.append(f"| {model} | {ours} | {' | '.join(cells)} |")
    means = []
    for name in _SUMMARISED:
        found = [of_model[name] for of_model in ratios.values() if name in of_model]
        means.append(f"{math.exp(sum(map(math.log, found)) / len(found)):.1f}x" if found else "absent")
    return [
        f"On {machine['threads']} threads of an {machine['cpu']} ({', '.join(machine['cpu_features'][-1:])}), batch 1 at",
        "224 x 224: our time, and how many times as long each peer takes. In brackets: SQNR of the worst map, dB.",
        "",
        f"| | ours | {' | '.join(_TITLES.get(name, name) for name in _SUMMARISED)} |",
        f"|---|---|{'---|' * len(_SUMMARISED)}",
        *rows,
        f"| geometric mean | | {' | '.join(means)} |",
    ]


_SUMMARISED = ("torch", "torch-compile", "onnxruntime", "openvino", "nncf")


def _compared(model: str, comparison: dict[str, Any], peers: list[str], roofline: dict[str, Any]) -> str:
    measurements = {m["name"]: m for m in comparison["measurements"]}
    ratios = {ratio["name"]: ratio for ratio in comparison["ratios"]}
    cells = []
    for name in peers:
        ratio = ratios.get(name)
        if ratio is None:
            cells.append("absent")
            continue
        same = " =" if ratio["low"] <= 1 <= ratio["high"] else ""
        cells.append(f"{ratio['median']:.2f}x{same} ({ratio['low']:.2f} to {ratio['high']:.2f})")
    reached = ", ".join(f"{kind} {100 * one['fraction']:.0f} % ({one['bound']})" for kind, one in roofline.items())
    ours = f"{measurements['edge']['median_ms']:.1f} ms, {comparison['precision']}"
    return f"| {model} | {ours} | {' | '.join(cells)} | {reached} |"


def _accuracy(results: dict[str, Any]) -> list[str]:
    return [*_accuracy_on_digits(results), "", *_accuracy_on_imagenet(results)]


def _accuracy_on_digits(results: dict[str, Any]) -> list[str]:
    lines = [
        "| trained on digits | seeds | top-1 fp32 | top-1 `auto` | agreement | SQNR of `auto` | best other int8 |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, variants in _trained_on("digits", results).items():
        auto = variants["auto"]
        shipped = "/".join(sorted({seed["auto"]["shipped"] for seed in results["runs"][name].values()}))
        lines.append(
            f"| {name} | {len(results['runs'][name])} | {variants['fp32']['top1']['mean']:.4f} | {auto['top1']['mean']:.4f} "
            f"({shipped}) | {auto['agreement']['mean']:.4f} | {auto['mean_sqnr_db']['mean']:.1f} dB | "
            f"{_best_peer(variants)} |"
        )
    return lines


def _accuracy_on_imagenet(results: dict[str, Any]) -> list[str]:
    """Return the table that counts photographs: they are too few for percents."""
    lines = [
        "| trained on ImageNet | photographs | right in fp32 | right in int8 | same answer | SQNR of int8 "
        "| best other int8 |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, variants in _trained_on("ImageNet", results).items():
        images = results["networks"][name]["images"]
        int8 = variants["int8 within its gate"]
        shares = (variants["fp32"]["top1"], int8["top1"], int8["agreement"])
        counts = [f"{round(share['mean'] * images)}" for share in shares]
        lines.append(
            f"| {name} | {images} | {' | '.join(counts)} | {int8['mean_sqnr_db']['mean']:.1f} dB | {_best_peer(variants)} |"
        )
    return lines


def _trained_on(data: str, results: dict[str, Any]) -> dict[str, Any]:
    return {
        name: variants
        for name, variants in results["summary"].items()
        if results["networks"][name]["trained_on"] == data
    }


def _best_peer(variants: dict[str, Any]) -> str:
    """Return the SQNR of the other tool whose int8 graph has the highest, and the tool's name."""
    peers = {kind: figures for kind, figures in variants.items() if kind.partition(" ")[0] in _PEERS}
    best = max(peers, key=lambda kind: peers[kind]["mean_sqnr_db"]["mean"])
    return f"{peers[best]['mean_sqnr_db']['mean']:.1f} dB ({_PEERS[best.partition(' ')[0]]})"


def _int8_graphs(results: dict[str, Any]) -> list[str]:
    """Return the table of ModelOpt's time over ours: above 1 our graph is faster."""
    lines = [
        "| ModelOpt's int8 graph over ours | call by call | ours again over ours | 1 thread, by processes | 2 threads "
        "| kernels (those without a like) |",
        "|---|---|---|---|---|---|",
    ]
    for name, figures in results["networks"].items():
        paired = figures["call_by_call"]
        found = [
            (paired[key]["median"], paired[key]["bounds"]) for key in ("modelopt_over_ours", "ours_again_over_ours")
        ]
        found += [(one["modelopt_over_ours"], one["bounds"]) for one in (figures["speed"][n] for n in ("1", "2"))]
        cells = [f"{median:.3f} ({low:.3f} to {high:.3f})" for median, (low, high) in found]
        count = figures["kernels"]
        cells.append(f"{count['modelopt']} ({count['modelopt_only']}) over {count['ours']} ({count['ours_only']})")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def _figures(results: dict[str, Any]) -> list[str]:
    return [
        "| figure | measured | target |",
        "|---|---|---|",
        *(_row(figure) for figure in results["figures"]),
    ]


def _row(figure: dict[str, Any]) -> str:
    bound = "at least" if figure["at_least"] else "at most"
    digits = 0 if figure["value"] >= 100 else 2
    unit = "" if figure["unit"] in ("x", "%") else " "
    value = f"{figure['value']:.{digits}f}{unit}{figure['unit']}"
    if "low" in figure:
        value += f" ({figure['low']:.{digits}f} to {figure['high']:.{digits}f})"
    miss = "" if figure["reached"] else " (missed)"
    return f"| {figure['what']} | {value}{miss} | {bound} {figure['target']:g}{unit}{figure['unit']} |"


def _onnxruntime(results: dict[str, Any]) -> list[str]:
    machine, load = results["machine"], results["load_average"]
    versions = machine["versions"]
    lines = [
        f"Threads: {machine['threads']}, of an {machine['cpu']} ({machine['cpu_features'][-1]}). ONNX Runtime",
        f"{versions['onnxruntime']}, OpenVINO {versions['openvino']}, batch 1 at 224 x 224, random weights. Others used",
        f"the machine too: its load average was {load['before'][0]:.1f} before and {load['after'][0]:.1f} afterwards.",
        "",
        "| | int8 of ONNX Runtime | its fp32 | OpenVINO fp32 | torch | SQNR of int8 |",
        "|---|---|---|---|---|---|",
    ]
    for model, comparison in results["comparisons"].items():
        ours = comparison["measurements"][0]
        ratios = [f"{r['median']:.2f}x ({r['low']:.2f} to {r['high']:.2f})" for r in comparison["ratios"]]
        sqnr = ours["worst_sqnr_db"]
        lines.append(f"| {model} | {ours['median_ms']:.1f} ms | {' | '.join(ratios)} | {sqnr:.1f} dB |")
    return lines


def _camera(results: dict[str, Any]) -> list[str]:
    machine, (height, width) = results["machine"], results["frame"]
    titles = {
        "rgb": "RGB: `fit` and an engine, against the engine with preprocessing in its graph",
        "nv12": "NV12: conversion, `fit` and an engine, against the engine with all of it in its graph",
        "jpeg": "JPEG, decoded by Pillow: `backbone.map` against a loop",
    }
    rows = []
    for name, one in results["comparisons"].items():
        times = [value for kind, value in one.items() if kind.endswith(f" {name}")]
        ratio = f"{one['ratio']:.2f}x ({one['ratio_low']:.2f} to {one['ratio_high']:.2f})"
        rows.append(
            f"| {titles[name]} | {times[0]:.1f} ms | {times[1]:.1f} ms | {ratio} | {one['bound']} {one['target']:g}x |"
        )
    return [
        f"{results['model']} in int8, frames of {height} x {width}, on {machine['threads']} threads of an {machine['cpu']}:",
        "",
        "| frames | the first | the second | second over first | target |",
        "|---|---|---|---|---|",
        *rows,
        "",
        "TensorRT-RTX compiles the int8 graph for RGB frames, for every architecture that it knows and without a GPU, in "
        + " and ".join(f"{seconds:.1f} s ({size})" for size, seconds in results["rtx_seconds"].items())
        + ".",
    ]


def _threads(results: dict[str, Any]) -> list[str]:
    machine = results["machine"]
    rows = []
    for row in results["figures"]:
        target = "" if row["target"] is None else f"at most {row['target']:g}x"
        before = f"{row['before']:.2f}x" if "before" in row else ""
        bounds = f"{row['low']:.2f} to {row['high']:.2f}" + (f", {row['rounds']} rounds" if "rounds" in row else "")
        rows.append(f"| {row['what']} | {before} | {row['value']:.2f}x ({bounds}) | {target} |")
    missing = results["no_cgroups"]
    return [
        f"Engines in int8 on {machine['threads']} cores of an {machine['cpu']}, OpenVINO {machine['versions']['openvino']},",
        f"ONNX Runtime {machine['versions']['onnxruntime']}"
        + (f"; no cgroup could be made: {missing}:" if missing else ":"),
        "",
        "| figure | before | now | target |",
        "|---|---|---|---|",
        *rows,
    ]


_TABLES = {
    "accuracy": _accuracy,
    "camera": _camera,
    "int8_graphs": _int8_graphs,
    "device": _figures,
    "matrix": _figures,
    "onnxruntime": _onnxruntime,
    "threads": _threads,
}
