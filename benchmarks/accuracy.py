"""``python -m benchmarks.accuracy``: what each number format costs trained networks, beside what other tools make of them.

Networks, images and seeds are those of `benchmarks.digits`, and of `benchmarks.imagenet` for the one that is trained on
ImageNet. Every variant is calibrated on the same images and judged on the same others: top-1 through the network's own
head, agreement (the same class as fp32), and SQNR of each feature map over all test images, against eager PyTorch. Results go
to benchmarks/results/accuracy.json, each network's beside the machine that measured them.

Peers run in processes of their own, by `benchmarks/accuracy_peers.py`; NNCF and ModelOpt ask for releases of their own, so
their Python can be named: ``--nncf .../bin/python --modelopt .../bin/python``. A peer that is not installed is left out.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import accuracy_peers, digits, imagenet, readme_table
from benchmarks.common import RESULTS, machine
from build_scripts import top1
from edge_backbones import BuildOptions, EdgeBackbone, build_bundle
from edge_backbones.parity_report import Gate
from edge_backbones.spec import Precision
from edge_backbones.toolchain.sources.base import SourceOptions
from edge_backbones.toolchain.sources.load import load_source

STORED = RESULTS / "accuracy.json"
CALIBRATION = 128
OPEN = {precision: Gate(min_cosine=1e-6) for precision in Precision if precision is not Precision.FP32}
INT8 = (Precision.INT8,)
VARIANTS: dict[str, dict[str, Any]] = {
    "fp32": {"precisions": (Precision.FP32,)},
    "fp16": {"precisions": (Precision.FP16,), "gates": OPEN},
    "bf16": {"precisions": (Precision.BF16,), "gates": OPEN},
    "fp8": {"precisions": (Precision.FP8,), "gates": OPEN},
    "int8 max": {"precisions": INT8, "gates": OPEN, "method": "max"},
    "int8 percentile": {"precisions": INT8, "gates": OPEN, "method": "percentile"},
    "int8 entropy": {"precisions": INT8, "gates": OPEN, "method": "entropy"},
    "int8 mse": {"precisions": INT8, "gates": OPEN, "method": "mse"},
    "int8 ranges chosen": {"precisions": INT8, "gates": OPEN},
    "int8 within its gate": {"precisions": INT8},
    "auto": {"precisions": "auto"},
}


PEERS_START_FROM = "fp32"
MEASURED = (*VARIANTS, *accuracy_peers.KINDS)
NETWORKS = (*digits.STAGES, imagenet.NAME)


@dataclass(frozen=True)
class Case:
    """A trained network, with what calibrates and what judges it.

    Args:
        net: the whole network, in eval mode.
        trained_on: the data set of its training.
        stages: the indices of the kept stages.
        calibration: float32 (count, 3, height, width).
        test: the same, of other images.
        labels: the classes of the test images, int64.
        logits: the network's own head, from the last feature map (NCHW) to (count, classes).
    """

    net: Any
    trained_on: str
    stages: tuple[int, ...]
    calibration: torch.Tensor
    test: torch.Tensor
    labels: torch.Tensor
    logits: Callable[[Any, np.ndarray], torch.Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument(
        "--seeds", nargs="+", type=int, default=list(digits.SEEDS), help="of networks trained on digits"
    )
    parser.add_argument(
        "--variants", nargs="+", choices=MEASURED, default=list(MEASURED), help="fp32 is always measured"
    )
    parser.add_argument("--nncf", default=sys.executable, help="Python that has NNCF")
    parser.add_argument("--modelopt", default=sys.executable, help="Python that has ModelOpt")
    parser.add_argument("--out", type=Path, default=STORED)
    arguments = parser.parse_args()
    pythons = {"nncf": arguments.nncf, "modelopt": arguments.modelopt}
    document = {"networks": {}, "summary": {}, "runs": {}}
    if arguments.out.exists():
        document = json.loads(arguments.out.read_text(encoding="utf-8"))
    runs = document["runs"]
    for name in arguments.only:
        for seed in [0] if name == imagenet.NAME else arguments.seeds:  # which comes with its weights
            case = load_case(name, seed)
            found = measure(f"{name}, seed {seed}", case, arguments.variants, pythons)
            runs.setdefault(name, {}).setdefault(str(seed), {}).update(found)
            document["networks"][name] = {
                "trained_on": case.trained_on, "images": len(case.labels), "machine": machine()
            }  # fmt: skip
            document["summary"] = summary(runs)
            arguments.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    show(document["summary"])
    if arguments.out == STORED:
        readme_table.update()
    print(f"wrote {arguments.out}")


def load_case(name: str, seed: int) -> Case:
    """Return a trained network with its images. ``seed``: of its training, for those trained on digits."""
    if name == imagenet.NAME:
        net = imagenet.trained()
        test, labels = imagenet.test_images(net)
        pixels = imagenet.calibration(net, CALIBRATION)
        return Case(net, "ImageNet", imagenet.STAGES, pixels, test, labels, top1.head)
    pixels, _, test, labels = digits.images()
    net = digits.trained(name, seed)
    return Case(net, "digits", digits.STAGES[name], pixels[:CALIBRATION], test, labels, digits.logits)


def measure(name: str, case: Case, variants: Collection[str], pythons: Mapping[str, str]) -> dict[str, Any]:
    """Measure fp32 and the given variants, peers among them, on one trained network."""
    net, stages, labels = case.net, case.stages, case.labels
    calibration, images = case.calibration.numpy(), case.test.numpy()
    loaded = load_source(net, SourceOptions(out_indices=stages))
    with torch.no_grad():
        reference = dict(zip(loaded.spec.outputs, (m.numpy() for m in loaded.module(case.test)), strict=True))
        expected = net(case.test).argmax(1)
    found: dict[str, Any] = {}

    def judge(variant: str, maps: Mapping[str, np.ndarray], **more: Any) -> None:
        chosen = case.logits(net, maps[loaded.spec.outputs[-1]]).argmax(1)
        sqnr = {stage: round(sqnr_db(reference[stage], maps[stage]), 2) for stage in reference}
        found[variant] = {
            "top1": round(float((chosen == labels).float().mean()), 4),
            "agreement": round(float((chosen == expected).float().mean()), 4),
            "sqnr_db": sqnr,
            **more,
        }
        print(f"{name}, {variant}: {found[variant]}", flush=True)

    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        for variant, options in VARIANTS.items():
            if variant not in (PEERS_START_FROM, *variants):
                continue
            bundle = work / f"{variant}.bundle"
            result = build_bundle(
                net,
                bundle,
                images=calibration,
                options=BuildOptions(
                    **options,
                    out_indices=stages,
                    height=images.shape[2],
                    width=images.shape[3],
                    golden=16,
                    torchscript=False,
                ),
            )
            with EdgeBackbone.from_pretrained(bundle) as backbone:
                maps = backbone.run(images)
            (engine,) = result.bundle.manifest.engines
            record = result.bundle.manifest.onnx_graph(engine.key.precision)
            judge(variant, maps, shipped=record.precision.value, excluded=len(record.excluded), notes=result.notes)
        np.savez(work / "images.npz", calibration=calibration, test=images)
        for kind in accuracy_peers.KINDS:
            if kind not in variants:
                continue
            python = pythons.get(kind.partition(" ")[0], sys.executable)
            command = [
                python,
                accuracy_peers.__file__,
                kind,
                str(work / f"{PEERS_START_FROM}.bundle" / "graphs" / "fp32.onnx"),
            ]
            done = subprocess.run(
                [*command, str(work / "images.npz"), str(work / "maps.npz")], capture_output=True, text=True
            )
            if done.returncode:
                print(f"{kind}: {(done.stderr.strip().splitlines() or ['failed'])[-1]}", flush=True)
                continue
            judge(kind, np.load(work / "maps.npz"))
    return found


def sqnr_db(reference: np.ndarray, actual: np.ndarray) -> float:
    difference = actual.astype(np.float64) - reference
    return float(10 * np.log10((reference.astype(np.float64) ** 2).sum() / max((difference**2).sum(), 1e-300)))


def summary(results: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> dict[str, Any]:
    """Return mean, lowest and highest value over the seeds."""
    found: dict[str, Any] = {}
    for name, seeds in results.items():
        for variant in next(iter(seeds.values())):
            runs = [seed[variant] for seed in seeds.values() if variant in seed]
            figures = {
                "top1": [run["top1"] for run in runs],
                "agreement": [run["agreement"] for run in runs],
                "mean_sqnr_db": [statistics.mean(run["sqnr_db"].values()) for run in runs],
                "last_sqnr_db": [list(run["sqnr_db"].values())[-1] for run in runs],
            }
            found.setdefault(name, {})[variant] = {
                key: {"mean": round(statistics.mean(values), 4), "low": min(values), "high": max(values)}
                for key, values in figures.items()
            }
    return found


def show(summaries: Mapping[str, Any]) -> None:
    for name, variants in summaries.items():
        print(f"\n{name:24}{'top-1':>18}{'agreement':>20}{'mean SQNR dB':>24}{'last':>8}")
        for variant, figures in variants.items():
            top1, agreement, mean, last = (
                figures[key] for key in ("top1", "agreement", "mean_sqnr_db", "last_sqnr_db")
            )
            print(
                f"{variant:24}{top1['mean']:8.4f} ({top1['low']:.4f})"
                f"{agreement['mean']:10.4f} ({agreement['low']:.4f})"
                f"{mean['mean']:9.2f} ({mean['low']:.2f} .. {mean['high']:.2f}){last['mean']:8.2f}"
            )


if __name__ == "__main__":
    main()
