"""Networks of timm that amplify rounding, each built in fp32 with few, some and many photographs.

``python -m build_scripts.sensitive_networks`` writes benchmarks/results/sensitive.md: the worst relative error of any feature
map of the engine, against fp32 torch. Weights are random. Takes half an hour.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from build_scripts.photographs import write_crops
from edge_backbones import BuildOptions, build_bundle
from edge_backbones.errors import EdgeBackbonesError
from edge_backbones.spec import Precision

OUT = Path("benchmarks/results/sensitive.md")
COUNTS = (8, 23, 68)
NETWORKS = (
    "nextvit_small", "davit_tiny", "poolformerv2_s12", "inception_next_tiny", "rdnet_tiny", "starnet_s1", "mambaout_femto",
    "sequencer2d_s", "focalnet_tiny_srf", "efficientvit_m0", "hgnetv2_b0", "cs3darknet_s", "gcvit_xxtiny", "hieradet_small",
    "vitamin_small_224", "regnetz_b16", "visformer_tiny", "xcit_nano_12_p16_224", "tf_efficientnetv2_b0",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", default=NETWORKS, metavar="NAME")
    chosen = parser.parse_args().only
    lines = [f"| network | {' | '.join(f'{count} photographs' for count in COUNTS)} |", "|---|---|---|---|"]
    print("\n".join(lines), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        sets = {count: Path(folder) / str(count) for count in COUNTS}
        for count, images in sets.items():
            write_crops(images, count)
        for name in chosen:
            cells = [_built(name, images, Path(folder) / "network.bundle") for images in sets.values()]
            lines.append(f"| {name} | {' | '.join(cells)} |")
            print(lines[-1], flush=True)
    if tuple(chosen) == NETWORKS:
        OUT.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _built(name: str, images: Path, bundle: Path) -> str:
    options = BuildOptions(weights="random:0", precisions=(Precision.FP32,), torchscript=False, cache=None)
    try:
        report = build_bundle(name, bundle, images=images, options=options, overwrite=True).reports[0]
    except EdgeBackbonesError as error:
        return f"refused: {error}"
    return f"{max(stage.relative for stage in report.stages):.1e}"


if __name__ == "__main__":
    main()
