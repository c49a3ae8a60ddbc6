"""The int8 engine of ONNX Runtime beside its own fp32, OpenVINO's fp32 and torch, in turns, each alone in its process.

``python -m benchmarks.onnxruntime_engine resnet18.bundle ...`` measures bundles, writes benchmarks/results/onnxruntime.json
and the table in benchmarks/README.md. A bundle: ``edge-backbones build resnet18 resnet18.bundle --weights random:0 --images
PHOTOGRAPHS --precision int8 --precision fp32``, and then ``edge-backbones compile resnet18.bundle --flavour onnxruntime``.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

import msgspec

from benchmarks import readme_table
from benchmarks.common import RESULTS, ROOT, machine
from edge_backbones.bench.compare import CompareOptions, compare
from edge_backbones.bundle.reader import Bundle

FILE = RESULTS / "onnxruntime.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundles", nargs="+", type=Path)
    parser.add_argument("--turns", type=int, default=15, help="turns of every contender")
    parser.add_argument("--threads", type=int, default=2, help="threads of every contender")
    arguments = parser.parse_args()
    load = os.getloadavg()
    comparisons = {}
    for path in arguments.bundles:
        bundle = Bundle.open(path)
        engine = next(
            e.name for e in bundle.manifest.engines if (e.key.flavour, e.key.precision) == ("onnxruntime", "int8")
        )
        options = CompareOptions(
            engine=engine,
            vs=("onnxruntime", "openvino-f32", "torch"),
            threads=arguments.threads,
            turns=arguments.turns,
            seconds=0.4,
            calls=4,
            repository=ROOT,
        )
        found = comparisons[bundle.manifest.source.name] = compare(path, options)
        print(bundle.manifest.source.name, *(f"{m.name} {m.median_ms} ms" for m in found.measurements), flush=True)
    results = {
        "machine": {**machine(), "threads": arguments.threads},
        "load_average": {"before": load, "after": os.getloadavg()},
        "comparisons": msgspec.to_builtins(comparisons),
    }
    FILE.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    readme_table.update()


if __name__ == "__main__":
    main()
