"""Write the signatures of timm's networks, by which a refused checkpoint is named: ``make networks``, in five minutes.

Of names whose backbones have the same tensors the shortest is kept.
"""

from __future__ import annotations

import concurrent.futures
import zlib
from pathlib import Path

import timm
import torch

from edge_backbones.toolchain.sources.nearest import backbone_shapes, signature

TARGET = Path(__file__).parents[1] / "edge_backbones" / "toolchain" / "sources" / "timm_networks.txt"


def described(name: str) -> tuple[str, str, int]:
    """Return the signature of a network, its name, and a number that is the same for the same tensors."""
    with torch.device("meta"):
        net = timm.create_model(name)
    return signature(net.state_dict()), name, zlib.crc32(repr(sorted(backbone_shapes(net).items())).encode())


def main() -> None:
    names = sorted(timm.list_models(), key=lambda name: (len(name), name))
    with concurrent.futures.ProcessPoolExecutor() as pool:
        rows = list(pool.map(described, names, chunksize=8))
    kept = {(digits, tensors): name for digits, name, tensors in reversed(rows)}
    lines = [f"{digits} {name}\n" for (digits, _), name in kept.items()]
    TARGET.write_text("".join(sorted(lines, key=lambda line: (len(line), line))), encoding="utf-8")


if __name__ == "__main__":
    main()
