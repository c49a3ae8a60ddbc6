"""Can this engine run on this machine? Decided from its key in the manifest, and for plans from the first bytes of the file:
nothing is deserialised to find out, because a library that is handed a foreign engine may end the process."""

from __future__ import annotations

import re
import struct
from typing import Literal

from edge_backbones.bundle.manifest import EngineKey, Flavour, GpuKey
from edge_backbones.engines.tensorrt.library import FROM_JETPACK, against_release
from edge_backbones.machine.gpus import Gpu
from edge_backbones.machine.hosts import Host
from edge_backbones.machine.profiles import RTX_ARCHITECTURES

_EXTRAS = {
    "openvino": "cpu",
    "torchscript": "build",
    "tensorrt": "tensorrt",
    "tensorrt_rtx": "rtx",
    "torch_tensorrt": "torch-tensorrt",
}
_RTX_MAGIC = b"vtrt"
_RTX_HEADER_BYTES = 64
# Bit of an architecture in the mask of a TensorRT-RTX plan, as 1.7 writes it.
_RTX_MASK = {"sm_75": 1, "sm_80": 2, "sm_86": 4, "sm_89": 8, "sm_120": 16, "sm_121": 32}


def serving_flavour(host: Host) -> Flavour:
    """The flavour of engines that are compiled for a machine when none is asked for.

    For its GPU: TensorRT where the release makes plans, else TensorRT-RTX where it is installed and knows the GPU. Where
    neither is there, or no GPU: OpenVINO for the CPU.
    """
    if host.gpu is not None:
        version = host.versions.get("tensorrt")
        if version is not None and not against_release("tensorrt", version, jetson=host.jetson):
            return "tensorrt"
        if host.gpu.architecture in RTX_ARCHITECTURES and host.versions.get("tensorrt_rtx") is not None:
            return "tensorrt_rtx"
    return "openvino"


COMPILE = "run edge-backbones compile here"


def _again(key: EngineKey) -> str:
    """What makes an engine of this key for this machine."""
    if key.flavour == "torch_tensorrt":  # of the network itself, which no bundle holds
        return "run edge-backbones build MODEL BUNDLE --flavour torch_tensorrt --overwrite here"
    return COMPILE


def reasons_against(key: EngineKey, host: Host) -> list[str]:
    """Why an engine cannot run on a host, one phrase each with the way out; empty when it can."""
    return _reasons_on_cpu(key, host) if key.gpu is None else _reasons_on_gpu(key, key.gpu, host)


def _reasons_on_cpu(key: EngineKey, host: Host) -> list[str]:
    reasons = _library_reasons(key, host)
    if key.flavour == "torchscript":
        return reasons  # code that torch compiles where it runs
    if key.architecture != host.architecture:
        reasons.append(f"compiled for {key.architecture}; this machine is {host.architecture}: {_again(key)}")
    elif missing := [feature for feature in key.cpu_features if feature not in host.cpu_features]:
        lacking = ", ".join(missing)
        reasons.append(f"compiled for a CPU with {lacking}; this one ({host.device_name}) has none: {_again(key)}")
    return reasons


def _reasons_on_gpu(key: EngineKey, asked: GpuKey, host: Host) -> list[str]:
    reasons = _library_reasons(key, host)
    if not reasons and asked.stripped and flavour_to_load(key, host) == "tensorrt_lean":
        reasons.append(
            "was written without weights, and tensorrt_lean takes none from a graph: compile it without --strip, or install "
            "tensorrt"
        )
    if key.flavour in ("tensorrt", "torch_tensorrt") and key.architecture != host.architecture:
        reasons.append(f"compiled on {key.architecture}; this machine is {host.architecture}: {_again(key)}")
    gpu = host.gpu
    if gpu is None:
        return [*reasons, f"needs an NVIDIA GPU: {host.no_gpu or 'none was asked for (device=cuda)'}"]
    if not _architecture_fits(asked, gpu):
        there = ", ".join(asked.architectures)
        reasons.append(f"compiled for {there}; this GPU ({gpu.name}) is {gpu.architecture}: {_again(key)}")
    elif key.flavour == "tensorrt" and asked.hardware_compatibility == "none":
        # All modules of Jetson Orin have one name.
        there, here = f"{key.device_name} ({asked.multiprocessors} SMs)", f"{gpu.name} ({gpu.multiprocessors} SMs)"
        if key.device_name != gpu.name or asked.multiprocessors not in (None, gpu.multiprocessors):
            reasons.append(
                f"compiled for the kernels of {there}; this GPU is {here}, and only plans with --hardware-compatibility move "
                f"between models: {_again(key)}"
            )
    if asked.driver is not None and _major(gpu.driver) < _major(asked.driver):
        reasons.append(
            f"compiled under a driver for CUDA {asked.driver}; the one here serves CUDA {gpu.driver}: update the driver"
        )
    return reasons


def _library_reasons(key: EngineKey, host: Host) -> list[str]:
    here = host.versions.get(key.flavour)
    if key.gpu is not None and key.gpu.version_compatible:
        candidates = [host.versions.get(flavour) for flavour in ("tensorrt", "tensorrt_lean")]
        found = [version for version in candidates if version is not None]
        # Newer releases run the lean runtime that a plan carries; one that carries none needs that of its own release.
        newer = any(_numbers(version) >= _numbers(key.library_version) for version in found)
        if key.library_version in found or (newer and key.gpu.host_code):
            return []
        here = here or next(iter(found), None)
    if here is None:
        if host.jetson and key.flavour == "tensorrt_rtx":
            return [f"needs {key.flavour}, which no Jetson has: {_again(key)}"]
        pip = f"pip install 'edge-backbones[{_EXTRAS[key.flavour]}]'"
        way = FROM_JETPACK if host.jetson and key.flavour == "tensorrt" else pip
        return [f"needs {key.flavour}, which is not installed: {way}"]
    if key.flavour == "torchscript":
        return []  # torch loads what older releases wrote
    if here != key.library_version:
        newest = " or newer" if key.gpu is not None and key.gpu.host_code else ""
        return [
            f"compiled with {key.flavour} {key.library_version}{newest}; here {here}: {_again(key)}, or install that release"
        ]
    return []


def _architecture_fits(asked: GpuKey, gpu: Gpu) -> bool:
    if gpu.architecture in asked.architectures:
        return True
    return asked.hardware_compatibility == "ampere_plus" and _capability(gpu.architecture) >= 80


def flavour_to_load(key: EngineKey, host: Host) -> Flavour | Literal["tensorrt_lean"]:
    """The library that loads an engine: its own, or the lean runtime for a version-compatible plan."""
    own, lean = (host.versions.get(flavour) for flavour in (key.flavour, "tensorrt_lean"))
    if key.gpu is None or not key.gpu.version_compatible or own == key.library_version:
        return key.flavour
    runs = own is not None and key.gpu.host_code and _numbers(own) >= _numbers(key.library_version)
    return key.flavour if runs or lean is None else "tensorrt_lean"


def reasons_in_plan(key: EngineKey, plan: bytes | bytearray | memoryview) -> list[str]:
    """What is wrong with the bytes of a plan, one phrase each, from its first 64.

    TensorRT-RTX writes its name, the length of the file, its release and a mask of architectures there. TensorRT's own
    header is not documented: only emptiness and the other library's name can be told.
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


def _capability(architecture: str) -> int:
    return int(architecture.removeprefix("sm_"))


def _major(version: str) -> int:
    return _numbers(version)[0]


def _numbers(version: str) -> tuple[int, ...]:
    # A manifest may have any digits there: Python refuses to read more than a few thousand.
    return tuple(int(part) for part in re.findall(r"[0-9]{1,9}", version)) or (0,)
