"""What this machine can build and run, and what to install for the rest. Looks only; installs and downloads nothing."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Sequence

import msgspec

from edge_backbones.runtime import compat, cuda, tensorrt_library

_TENSORRT = (
    "pip install 'edge-backbones[tensorrt]'; on a Jetson: apt install python3-libnvinfer, and a virtual environment made "
    "by the system's Python with --system-site-packages"
)


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """One thing looked at. ``fix`` is empty when there is nothing to do."""

    topic: str
    ok: bool
    found: str
    fix: str = ""


def examine() -> list[Finding]:
    """Everything that decides what can be built and run here."""
    host = compat.this_host({})
    return [
        Finding(
            topic="machine", ok=True, found=f"{platform.system()} {host.architecture}, {host.device_name}, {_memory()}"
        ),
        _int8(host),
        _python(),
        _library("run on the CPU (OpenVINO)", "cpu", ("openvino",)),
        _library("read image files", "images", ("Pillow",)),
        _library("draw feature maps and reports", "report", ("matplotlib", "Jinja2")),
        _library(
            "build bundles",
            "build",
            ("torch", "timm", "transformers", "onnx", "onnxscript", "onnx-ir", "onnxruntime", "openvino"),
        ),
        _tensorrt("tensorrt", "compile and run engines of this GPU (TensorRT)", _TENSORRT),
        _tensorrt(
            "tensorrt_rtx",
            "compile for RTX GPUs, without one too (TensorRT-RTX)",
            "pip install 'edge-backbones[rtx]'",
        ),
        _gpu(),
    ]


def _memory() -> str:
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return "memory unknown"
    return f"{total / 2**30:.0f} GiB, {os.cpu_count()} logical cores"


def _int8(host: compat.Host) -> Finding:
    """Without dot-product instructions int8 still runs, at about the speed of fp32."""
    fast = [f for f in host.cpu_features if f in ("avx_vnni", "avx512_vnni", "amx_int8", "asimddp", "i8mm")]
    found = f"instructions: {', '.join(host.cpu_features) or 'not known on this system'}"
    fix = "" if fast else "this CPU has no int8 dot product: measure before you prefer int8 over fp32"
    return Finding(topic="fast int8 on the CPU", ok=bool(fast), found=found, fix=fix)


def _python() -> Finding:
    return Finding(topic="python", ok=True, found=f"{platform.python_implementation()} {platform.python_version()}")


def _library(purpose: str, extra: str, distributions: Sequence[str]) -> Finding:
    """An extra, by the distributions that it brings."""
    versions, missing = [], []
    for name in distributions:
        try:
            versions.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            missing.append(name)
    found = (
        ", ".join(versions)
        + ("; " if versions and missing else "")
        + (f"missing: {', '.join(missing)}" if missing else "")
    )
    fix = f"pip install 'edge-backbones[{extra}]'" if missing else ""
    return Finding(topic=purpose, ok=not missing, found=found, fix=fix)


def _gpu() -> Finding:
    """The driver's own answer."""
    topic = "NVIDIA GPU"
    found = cuda.gpus()
    if not found:
        return Finding(topic=topic, ok=False, found=f"{cuda.no_gpu_reason()}; CPU engines do not need one")
    listed = ", ".join(f"{gpu.name} ({gpu.architecture}, {gpu.memory_bytes / 2**30:.0f} GiB)" for gpu in found)
    return Finding(topic=topic, ok=True, found=f"{listed}; the driver serves CUDA {found[0].driver}")


def _tensorrt(flavour: tensorrt_library.TensorRtFlavour, purpose: str, fix: str) -> Finding:
    """By import: on a Jetson no distribution is installed for pip to know."""
    version = tensorrt_library.library_version(flavour)
    return Finding(topic=purpose, ok=version is not None, found=version or "missing", fix="" if version else fix)
