"""Judge names and paths of models without importing timm or torch, which takes seconds.

`refuse` refuses only what the loaders would refuse too: where it cannot be sure, it leaves the word to them.
"""

from __future__ import annotations

import difflib
import functools
import importlib.metadata
import importlib.util
import re
import sys
from importlib import resources
from pathlib import Path

from edge_backbones.errors import SourceError

ENTRY_POINTS = "edge_backbones.sources"
"""The entry point group in which other packages register loaders of their own sources."""
_COMPILED = (".onnx", ".engine", ".plan", ".trt", ".tflite", ".xml", ".pt2", ".mlpackage")
_WEIGHTS = (".pt", ".pth", ".ckpt", ".safetensors", ".bin")


def refuse(source: str) -> None:
    """Raise SourceError for a text that no loader takes: a path without a saved model, or a name that timm does not have."""
    if (Path(source).expanduser() / "config.json").is_file():
        return
    refuse_file(source)
    if importlib.metadata.entry_points(group=ENTRY_POINTS):
        return  # loaders of other packages may take any text
    if is_path(source):
        refuse_path(source)
        return
    name = source.removeprefix("timm/").partition(".")[0]
    if "/" in source.removeprefix("timm/") or not is_unknown(name):
        return
    refuse_path(source)
    if not Path(source).exists():
        raise SourceError(f"timm has no model {source!r}. {hint(source)}")


def refuse_file(name: str) -> None:
    """Raise SourceError for a file of weights or of a compiled network, whether it exists or not: neither is a model."""
    path = Path(name).expanduser()
    if path.suffix in _COMPILED and not path.is_dir():
        raise SourceError(
            f"{path} is a network without its source, which build does not read: pass the model that it was made from, "
            "a timm name (resnet50), a hub id (microsoft/resnet-50) or a folder that save_pretrained wrote"
        )
    if path.suffix in _WEIGHTS and not path.is_dir():
        raise SourceError(
            f"{path} is a file of weights: name the network and give it these weights: edge-backbones build resnet50 "
            f"resnet50.bundle --weights {path} (weights={str(path)!r})"
        )


def refuse_path(name: str) -> None:
    """Raise SourceError for a path that holds no saved model, or that does not exist."""
    path = Path(name).expanduser()
    if path.is_dir():
        raise SourceError(f"{path} has no config.json: pass a folder that save_pretrained wrote")
    if path.is_file() and path.suffix != ".json":
        raise SourceError(
            f"{path} is a file: pass the folder that holds it, or a name or configuration with weights={path}"
        )
    if is_path(name) and not path.exists():
        raise SourceError(f"{path} does not exist")


def is_path(name: str) -> bool:
    """Return whether a name can only be a path, whether it exists or not."""
    return Path(name).expanduser().is_absolute() or name.startswith((".", "~"))


@functools.cache
def known_names() -> tuple[str, ...]:
    """Return the networks of timm that ``python -m build_scripts.write_networks`` found, sorted."""
    text = resources.files("edge_backbones.toolchain.sources").joinpath("timm_networks.txt").read_text(encoding="utf-8")
    return tuple(sorted(line.split()[1] for line in text.splitlines()))


def hint(name: str) -> str:
    """Return a sentence with the names nearest to one that timm does not have."""
    near = difflib.get_close_matches(name.removeprefix("timm/").lower(), known_names(), n=4, cutoff=0.6)
    return f"Near names: {', '.join(near)}" if near else "timm.list_models() lists them all"


def is_unknown(name: str) -> bool:
    """Return whether the installed timm certainly has no network of this name, which is without its tag."""
    if name in known_names() or "timm" in sys.modules:  # a program may have registered its own
        return False
    spec = importlib.util.find_spec("timm")
    if spec is None or not spec.submodule_search_locations:
        return False  # it is not installed, which the build says
    # A network is a function in timm/models, and a renamed one a text there.
    named = re.compile(rf"\bdef {re.escape(name)}\(|['\"]{re.escape(name)}['\"]")
    files = [file for folder in spec.submodule_search_locations for file in Path(folder, "models").rglob("*.py")]
    return bool(files) and not any(named.search(file.read_text(encoding="utf-8", errors="replace")) for file in files)
