"""Write the keys of engines for CPUs, and find the reasons why an engine does not run on a machine.

Here is what several engine libraries have in common. The reasons come from the engine's key in the manifest. Nothing is
loaded to find them, because a library that loads an engine of another machine may crash the process.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence

import msgspec

from edge_backbones.bundle.manifest import EngineKey, GpuKey
from edge_backbones.engines.base import Flavour
from edge_backbones.machine import hosts
from edge_backbones.machine.gpus import Gpu
from edge_backbones.machine.hosts import Host
from edge_backbones.spec import Precision

_UNITS = {
    Precision.BF16: ("avx512_bf16", "amx_bf16"),
    Precision.FP16: ("avx512_fp16", "amx_fp16", "asimdhp"),
}
"""Instruction sets that compute in a number format, any one of which is enough.

OpenVINO computes bf16 without them too, on every CPU with AVX-512: it emulates them, which is slower than fp32.
"""


def has_units(precision: Precision, cpu_features: Sequence[str]) -> bool:
    """Return whether a CPU computes fp16 or bf16 itself. True for fp32."""
    return precision is Precision.FP32 or any(feature in cpu_features for feature in _UNITS.get(precision, ()))


def is_arm(host: Host) -> bool:
    """Return whether the CPU of ``host`` is a 64-bit ARM: Linux calls it aarch64, macOS arm64."""
    return host.architecture in ("aarch64", "arm64")


def computed_in(key: EngineKey) -> str:
    """Return the number format that OpenVINO is asked for when it loads an engine: fp32 if the key does not say."""
    return key.computes_in if isinstance(key.computes_in, str) else Precision.FP32.value


def cpu_key(
    flavour: str, version: str, precision: Precision, graph: bytes, *, computes_in: Precision | None = None
) -> EngineKey:
    """Return the key of an engine that a library compiles from a graph for this machine's CPU.

    ``computes_in``: as in the key; None where the key does not say.
    """
    host = hosts.this_host({flavour: version})
    return EngineKey(
        flavour=flavour,
        library_version=version,
        architecture=host.architecture,
        cpu_features=host.cpu_features,
        device_name=host.device_name,
        precision=precision,
        graph_sha256=hashlib.sha256(graph).hexdigest(),
        computes_in=msgspec.UNSET if computes_in is None else computes_in.value,  # type: ignore[arg-type]
    )


def against_library(flavour: Flavour, key: EngineKey, host: Host) -> list[str]:
    """Return why the library on ``host`` does not load an engine: it is missing or another release."""
    here = host.versions.get(flavour.name)
    if here is None:
        return [f"needs {flavour.name}, which is not installed: {flavour.install(host)}"]
    if here != key.library_version:
        return [
            f"compiled with {flavour.name} {key.library_version}; here {here}: {flavour.remedy()}, or install that release"
        ]
    return []


def against_cpu(flavour: Flavour, key: EngineKey, host: Host) -> list[str]:
    """Return why the CPU of ``host`` does not run an engine: it has another architecture or lacks instructions."""
    if key.architecture != host.architecture:
        return [f"compiled for {key.architecture}; this machine is {host.architecture}: {flavour.remedy()}"]
    if missing := [feature for feature in key.cpu_features if feature not in host.cpu_features]:
        lacking = ", ".join(missing)
        return [f"compiled for a CPU with {lacking}; this one ({host.device_name}) has none: {flavour.remedy()}"]
    if not has_units(Precision(computed_in(key)), host.cpu_features):
        return [
            f"computes in {computed_in(key)}; this CPU ({host.device_name}) has no instructions for it: {flavour.remedy()}"
        ]
    return []


def no_gpu(host: Host) -> str:
    """Return why no engine for a GPU runs on a machine without one."""
    return f"needs an NVIDIA GPU: {host.no_gpu or 'none was asked for (device=cuda)'}"


def against_architecture(flavour: Flavour, asked: GpuKey, gpu: Gpu) -> list[str]:
    """Return why a GPU's architecture does not run an engine."""
    later = asked.hardware_compatibility == "ampere_plus" and int(gpu.architecture.removeprefix("sm_")) >= 80
    if gpu.architecture in asked.architectures or later:
        return []
    there = ", ".join(asked.architectures)
    return [f"compiled for {there}; this GPU ({gpu.name}) is {gpu.architecture}: {flavour.remedy()}"]


def against_driver(asked: GpuKey, gpu: Gpu) -> list[str]:
    """Return why the NVIDIA driver of a GPU is too old for an engine."""
    if asked.driver is None or numbers(gpu.driver)[0] >= numbers(asked.driver)[0]:
        return []
    return [
        f"compiled under a driver for CUDA {asked.driver}; the one here serves CUDA {gpu.driver}: update the driver"
    ]


def numbers(version: str) -> tuple[int, ...]:
    """Return the numbers in a version text: (10, 3, 0) for 10.3.0, (0,) for text without numbers.

    A manifest may hold any text, so at most nine digits of each number are read.
    """
    return tuple(int(part) for part in re.findall(r"[0-9]{1,9}", version)) or (0,)
