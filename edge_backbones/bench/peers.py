"""The peers that a bundle's engine is compared with: their names, what they are, and which interpreter runs them."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Mapping

from edge_backbones.bench.contender import MAKERS
from edge_backbones.errors import InputError
from edge_backbones.installation import pip_install
from edge_backbones.spec import Precision

WHAT = {
    "edge": "this bundle's engine",
    "torch": "the network in eager mode, fp32",
    "torch-compile": "torch.compile, fp32",
    "torchscript": "the bundle's frozen module, fp32",
    "onnxruntime": "ONNX Runtime on the fp32 graph",
    "openvino": "OpenVINO on the fp32 graph, in the number format that OpenVINO chooses",
    "openvino-f32": "OpenVINO on the fp32 graph, in fp32",
    "nncf": "OpenVINO on the fp32 graph as NNCF quantises it to int8, the rest in the number format that OpenVINO chooses",
    "nncf-f32": "OpenVINO on the fp32 graph as NNCF quantises it to int8, the rest in fp32",
    "graph": "an ONNX file, compiled as an int8 engine of a bundle is",
}
PEERS = tuple(name for name in MAKERS if name not in ("edge", "graph"))
ON_CPU = ("openvino", "openvino-f32", "nncf", "nncf-f32")
RUN_GRAPHS = ("onnxruntime", *ON_CPU)
_MODULES = {"torch-compile": "torch", "torchscript": "torch"}  # of peers whose name differs from their module's
_EXTRAS = {"torch": "build", "onnxruntime": "onnxruntime", "openvino": "cpu"}  # that install a module


def is_engine(name: str) -> bool:
    """Return whether a name is that of a precision, which means an engine of the bundle."""
    return name in set(Precision)


def library_of(name: str) -> str:
    """Return the peer that another one only sets otherwise: ``nncf`` for ``nncf-f32``."""
    return name.removesuffix("-f32")


def python_of(peer: str, pythons: Mapping[str, str]) -> str:
    """Return the interpreter that runs a peer: for NNCF this one, in which OpenVINO runs what NNCF wrote."""
    if library_of(peer) == "nncf":
        return sys.executable
    return pythons.get(peer, pythons.get(library_of(peer), sys.executable))


def what(name: str, peer: str) -> str:
    """Say what a contender is. ``peer``: what runs it, a name from `MAKERS`."""
    return f"this bundle's {name} engine" if is_engine(name) else WHAT[peer]


def require_installed(name: str, pythons: Mapping[str, str]) -> None:
    """Raise InputError, with the command that installs it, if a peer is not installed."""
    if name == "edge" or is_engine(name) or not pythons.keys().isdisjoint({name, library_of(name)}):
        return
    module = _MODULES.get(name, library_of(name))
    if importlib.util.find_spec(module) is None:
        nncf = "pip install nncf (or say which Python has it: --peer-python nncf=PYTHON)"
        raise InputError(f"not installed: {nncf if module == 'nncf' else pip_install(_EXTRAS[module])}")
