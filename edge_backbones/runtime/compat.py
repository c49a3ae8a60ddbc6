"""Can this engine run on this machine? Pure functions over the key in the manifest: nothing is deserialised to find out."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from pathlib import Path

from edge_backbones.manifest import EngineKey

# Instruction sets that change which kernels a CPU engine was compiled to, weakest first; the last one names the engine.
_X86_FEATURES = ("avx2", "avx512f", "avx_vnni", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8")
_ARM_FEATURES = ("asimd", "asimdhp", "asimddp", "sve", "bf16", "i8mm")


@dataclass(frozen=True)
class Host:
    """What compat needs to know of a machine. ``versions``: library version by flavour, of those that can be imported."""

    architecture: str
    cpu_features: tuple[str, ...]
    device_name: str
    versions: dict[str, str]


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


def this_host(versions: dict[str, str]) -> Host:
    """Read this machine; without /proc/cpuinfo (macOS, Windows) no CPU feature is known."""
    try:
        cpuinfo = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        cpuinfo = ""
    architecture = platform.machine()
    name = device_name(cpuinfo) or platform.processor() or architecture
    return Host(architecture, cpu_features(cpuinfo, architecture), name, versions)


def reasons_against(key: EngineKey, host: Host) -> list[str]:
    """Why an engine cannot run on a host, one phrase each; empty when it can."""
    reasons = []
    here = host.versions.get(key.flavour)
    if here is None:
        reasons.append(f"needs {key.flavour}, which is not installed: pip install 'edge-backbones[cpu]'")
    elif here != key.library_version:
        reasons.append(f"compiled with {key.flavour} {key.library_version}; here {here}")
    if key.architecture != host.architecture:
        reasons.append(f"compiled for {key.architecture}; this machine is {host.architecture}")
    elif missing := [feature for feature in key.cpu_features if feature not in host.cpu_features]:
        reasons.append(f"compiled for a CPU with {', '.join(missing)}; this one ({host.device_name}) has none")
    return reasons
