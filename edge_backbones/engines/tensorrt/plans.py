"""Check a plan before TensorRT reads it: whether it fits a machine, and what its first bytes say."""

from __future__ import annotations

import struct
from typing import cast

from edge_backbones.bundle.manifest import EngineKey, GpuKey
from edge_backbones.engines import compat
from edge_backbones.engines.base import Flavour
from edge_backbones.engines.compat import numbers
from edge_backbones.engines.tensorrt.library import TensorRtFlavour
from edge_backbones.machine.hosts import Host

_RTX_MAGIC = b"vtrt"
_RTX_HEADER_BYTES = 64
# Bit of each architecture in the mask of a plan of TensorRT-RTX, as release 1.7 writes it.
_RTX_MASK = {"sm_75": 1, "sm_80": 2, "sm_86": 4, "sm_89": 8, "sm_120": 16, "sm_121": 32}


def reasons_against(flavour: Flavour, key: EngineKey, host: Host) -> list[str]:
    """Return why a plan cannot run on ``host``, one phrase with a fix each; empty if it can."""
    asked = key.gpu
    if asked is None:
        return [f"is a plan, and its key says nothing of a GPU: {flavour.remedy()}"]
    reasons = _against_library(flavour, key, asked, host)
    if not reasons and asked.stripped and library_to_load(key, host) == "tensorrt_lean":
        reasons.append(
            "was written without weights, and tensorrt_lean takes none from a graph: compile it without --strip, or install "
            "tensorrt"
        )
    times_kernels = flavour.name == "tensorrt"  # TensorRT-RTX compiles for any machine
    if times_kernels and key.architecture != host.architecture:
        reasons.append(f"compiled on {key.architecture}; this machine is {host.architecture}: {flavour.remedy()}")
    gpu = host.gpu
    if gpu is None:
        return [*reasons, compat.no_gpu(host)]
    if elsewhere := compat.against_architecture(flavour, asked, gpu):
        reasons += elsewhere
    elif times_kernels and asked.hardware_compatibility == "none":
        # All modules of Jetson Orin have the same name, so compare the number of SMs too.
        there, here = f"{key.device_name} ({asked.multiprocessors} SMs)", f"{gpu.name} ({gpu.multiprocessors} SMs)"
        if key.device_name != gpu.name or asked.multiprocessors not in (None, gpu.multiprocessors):
            reasons.append(
                f"compiled for the kernels of {there}; this GPU is {here}, and only plans with --hardware-compatibility move "
                f"between models: {flavour.remedy()}"
            )
    return reasons + compat.against_driver(asked, gpu)


def _against_library(flavour: Flavour, key: EngineKey, asked: GpuKey, host: Host) -> list[str]:
    """Return why no library on ``host`` loads the plan."""
    here = host.versions.get(flavour.name)
    if asked.version_compatible:
        candidates = [host.versions.get(name) for name in ("tensorrt", "tensorrt_lean")]
        found = [version for version in candidates if version is not None]
        # Newer releases run the lean runtime that a plan carries. A plan without one needs the runtime of its own release.
        newer = any(numbers(version) >= numbers(key.library_version) for version in found)
        if key.library_version in found or (newer and asked.host_code):
            return []
        here = here or next(iter(found), None)
    if here is None:
        if host.jetson and flavour.name == "tensorrt_rtx":
            return [f"needs {flavour.name}, which no Jetson has: {flavour.remedy()}"]
        return [f"needs {flavour.name}, which is not installed: {flavour.install(host)}"]
    if here != key.library_version:
        newest = " or newer" if asked.host_code else ""
        return [
            f"compiled with {flavour.name} {key.library_version}{newest}; here {here}: {flavour.remedy()}, or install that "
            "release"
        ]
    return []


def library_to_load(key: EngineKey, host: Host) -> TensorRtFlavour:
    """Return the library that loads a plan: its own, or the lean runtime for a version-compatible plan."""
    name = cast(TensorRtFlavour, key.flavour)
    own, lean = (host.versions.get(flavour) for flavour in (name, "tensorrt_lean"))
    if key.gpu is None or not key.gpu.version_compatible or own == key.library_version:
        return name
    runs = own is not None and key.gpu.host_code and numbers(own) >= numbers(key.library_version)
    return name if runs or lean is None else "tensorrt_lean"


def reasons_in_plan(key: EngineKey, plan: bytes | bytearray | memoryview) -> list[str]:
    """Return what is wrong with a plan according to its first 64 bytes, one phrase each.

    A plan of TensorRT-RTX begins with its name, the file's length, the release and a mask of architectures. The header
    of TensorRT's plans is not documented: only an empty plan, or one of TensorRT-RTX, can be recognised.
    """
    if not plan:
        return ["the plan is empty: compile it again"]
    is_rtx = bytes(plan[:4]) == _RTX_MAGIC
    if key.flavour != "tensorrt_rtx":
        return (
            ["the plan was written by tensorrt_rtx: open it with that flavour, or compile it again"] if is_rtx else []
        )
    if not is_rtx:
        return [
            "the plan does not begin as those of tensorrt_rtx do: it is damaged or another library's; compile it again"
        ]
    if len(plan) < _RTX_HEADER_BYTES:
        return [f"the plan is truncated: {len(plan)} bytes, its header alone has {_RTX_HEADER_BYTES}; copy it again"]
    (size,) = struct.unpack_from("<Q", plan, 16)
    if size != len(plan):
        return [f"the plan is truncated: {len(plan)} bytes, its header says {size}; copy it again"]
    reasons = []
    version = ".".join(str(part) for part in plan[24:28])
    if not f"{key.library_version}.".startswith(f"{version}.") and not f"{version}.".startswith(
        f"{key.library_version}."
    ):
        reasons.append(
            f"the plan was written by tensorrt_rtx {version}, its key says {key.library_version}; compile it again"
        )
    mask, wanted = plan[32], key.gpu.architectures if key.gpu is not None else ()
    missing = [name for name in wanted if name in _RTX_MASK and not mask & _RTX_MASK[name]]
    if missing:
        reasons.append(f"the plan was not compiled for {', '.join(missing)}, as its key says; compile it again")
    return reasons
