"""``make demo``: resnet50 with four stages in int8, from photographs to feature maps and a report, with the commands shown.

Pretrained weights where the model hub (or its cache) has them; otherwise seeded random weights, and it says so.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

import timm

from build_scripts.photographs import photographs, write_crops
from edge_backbones.toolchain.sources.base import hub_answers
from edge_backbones.toolchain.sources.timm import cached_weights

OUTPUT = Path("demo_output")
MODEL = "resnet50"
CROPS = 68  # 64 calibrate, 4 are held out to verify


def main() -> None:
    folder, bundle = OUTPUT / "photographs", OUTPUT / f"{MODEL}.bundle"
    write_crops(folder, CROPS)
    print(f"wrote {CROPS} crops of real photographs to {folder}\n")
    weights = "pretrained"
    if not (hub_answers() or cached_weights(timm.get_pretrained_cfg(MODEL).hf_hub_id)):
        weights = "random:0"
        print(
            "The model hub does not answer, so this demo uses seeded random weights whose batch-norm statistics are\n"
            "averaged over the photographs: the same graph, speed and proof, but maps that mean little.\n"
        )
    edge_backbones(
        "build", MODEL, bundle, "--images", folder, "--out-indices", "1,2,3,4", "--weights", weights, "--overwrite"
    )
    photograph = OUTPUT / "photograph" / "coffee.png"
    photograph.parent.mkdir(exist_ok=True)
    photographs()["coffee"].save(photograph)
    edge_backbones("run", bundle, photograph, "--out", OUTPUT)
    print(f"\nlook at {OUTPUT / 'coffee.png'}\n")
    results = OUTPUT / "bench.json"
    edge_backbones("bench", bundle, "--vs", "torch", "--turns", "6", "--out", results)
    edge_backbones("report", bundle, "--bench", results)


def edge_backbones(*arguments: object) -> None:
    """Show and run one command as a user would type it."""
    words = [str(argument) for argument in arguments]
    print(f"$ edge-backbones {shlex.join(words)}", flush=True)
    done = subprocess.run([sys.executable, "-m", "edge_backbones.cli.main", *words], check=False)
    if done.returncode:
        sys.exit(done.returncode)


if __name__ == "__main__":
    main()
