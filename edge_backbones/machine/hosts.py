"""What an engine's key is compared with: the CPU, the GPU and the engine libraries of this machine."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from edge_backbones.machine.gpus import Gpu, find_gpus, no_gpu_reason
from edge_backbones.machine.system import is_jetson

# Instruction sets that change which kernels a CPU engine was compiled to, weakest first; the last one names the engine.
_X86_FEATURES = (
    "avx2", "avx512f", "avx_vnni", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_fp16", "amx_int8",
)  # fmt: skip
_ARM_FEATURES = ("asimd", "asimdhp", "asimddp", "sve", "bf16", "i8mm")


@dataclass(frozen=True)
class Host:
    """What decides which engines a machine runs.

    ``versions``: library version by flavour (``tensorrt_lean`` too), of those that can be imported. ``gpu``: the one to run
    on, or None; ``no_gpu``: why there is none. ``jetson``: its TensorRT comes with JetPack.
    """

    architecture: str
    cpu_features: tuple[str, ...]
    device_name: str
    versions: Mapping[str, str]
    gpu: Gpu | None = None
    no_gpu: str = ""
    jetson: bool = False


def cpu_features(cpuinfo: str, architecture: str) -> tuple[str, ...]:
    """The instruction sets that matter, out of the text of /proc/cpuinfo; weakest first."""
    known = _X86_FEATURES if architecture in ("x86_64", "AMD64") else _ARM_FEATURES
    flags: set[str] = set()
    for line in cpuinfo.splitlines():
        if line.lower().startswith(("flags", "features")):
            flags = set(line.partition(":")[2].split())
            break
    return tuple(feature for feature in known if feature in flags)


def device_name(cpuinfo: str) -> str:
    """The CPU's model name out of the text of /proc/cpuinfo, or an empty text."""
    return next((line.partition(":")[2].strip() for line in cpuinfo.splitlines() if line.startswith("model name")), "")


def this_host(versions: Mapping[str, str], *, gpu: int | None = None) -> Host:
    """Read this machine, and the GPU of index ``gpu`` where one is meant.

    Without /proc/cpuinfo (macOS, Windows) no CPU feature is known. Asking for a GPU starts the driver, which takes part of a
    second: it is not asked for a CPU.
    """
    try:
        cpuinfo = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        cpuinfo = ""
    architecture = platform.machine()
    name = device_name(cpuinfo) or platform.processor() or architecture
    described, no_gpu = None, ""
    if gpu is not None:
        found = find_gpus()
        described = found[gpu] if 0 <= gpu < len(found) else None
        no_gpu = no_gpu_reason() or ("" if described else f"this machine has {len(found)} GPUs, and none is cuda:{gpu}")
    return Host(architecture, cpu_features(cpuinfo, architecture), name, versions, described, no_gpu, is_jetson())
