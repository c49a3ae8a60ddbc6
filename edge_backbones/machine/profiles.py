"""Device profiles: what a device has, which engine libraries serve it, and why a build for it cannot work.

Each profile is a file in profiles/. A comment on each line names the source of its figure. A file of your own can be used
wherever a name can. Reading profiles needs no GPU and no driver; :func:`profile_of` takes what a driver reported.
"""

from __future__ import annotations

import difflib
import functools
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import msgspec

from edge_backbones.bundle.manifest import Architecture, Flavour
from edge_backbones.errors import InputError, MissingDependencyError
from edge_backbones.machine.gpus import Gpu
from edge_backbones.reading import read_file, refusing, shortened
from edge_backbones.spec import InputSpec, Precision, ShapeRange, Size

Kind = Literal["cpu", "jetson", "datacenter", "rtx"]
NumberFormat = Literal["fp32", "fp16", "bf16", "int8", "fp8", "fp4"]
ServingFlavour = Literal[Flavour, "tensorrt_lean"]
Versions = Annotated[
    str, msgspec.Meta(pattern=r"^[0-9]+(\.[0-9]+)*( to [0-9]+(\.[0-9]+)*| and later)?\Z", max_length=60)
]
"""``10.3``, ``10.3 to 10.7`` (both included) or ``11.4.1 and later``."""

RTX_ARCHITECTURES = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_120", "sm_121")
"""The architectures that TensorRT-RTX compiles for; the first one only if it is named as a target."""
FIRST_ARCHITECTURE = {Precision.BF16: 80, Precision.FP8: 89}
"""The first architecture whose tensor cores compute a format. Formats that are missing run on every supported GPU."""

_KINDS: tuple[Kind, ...] = ("cpu", "jetson", "datacenter", "rtx")
_DLA_LARGEST_BATCH = 4096
_DLA_LARGEST_SIZE = 8192
_MAX_BYTES = 1 << 20
_IN_WHEEL = Path(__file__).parents[1] / "profiles_data"
_IN_CHECKOUT = Path(__file__).parents[2] / "profiles"


class Module(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One module or card of a profile. A figure that was not published is None."""

    name: str
    memory_gib: Annotated[float, msgspec.Meta(gt=0, le=1e6)]
    bandwidth_gb_s: Annotated[float, msgspec.Meta(gt=0, le=1e9)] | None = None
    dla_cores: Annotated[int, msgspec.Meta(ge=0, le=64)] = 0


class Software(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Releases of TensorRT that serve a device, on a Jetson with their JetPack. ``dla``: they compile for its DLA cores."""

    tensorrt: Versions
    jetpack: Versions | None = None
    dla: bool = False


class Defaults(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The values that a build uses if nothing else is asked for.

    ``size``: height and width, for networks that have no size of their own. ``workspace_bytes``: see PlanOptions.
    """

    batch: ShapeRange
    size: Size
    workspace_bytes: Annotated[int, msgspec.Meta(ge=1, le=1 << 50)] | None = None


class DeviceProfile(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One device, or a family whose members all run the same engines.

    ``architecture``: that of the GPU (``sm_87``), None for a CPU. ``device_names``: words in the name of the CUDA device or
    of the board; any of them tells the device from others of its architecture. ``precisions``: number formats that the
    hardware computes, or for a CPU that its engine library accepts. ``pays``: the formats that are worth building, and why.
    ``flavours``: engine libraries that serve the device. ``unified_memory``: CPU and GPU share their memory.
    """

    name: Annotated[str, msgspec.Meta(pattern=r"^[a-z0-9][a-z0-9_.-]*\Z")]
    title: str
    kind: Kind
    architecture: Architecture | None = None
    device_names: tuple[str, ...] = ()
    unified_memory: bool = False
    precisions: Annotated[tuple[NumberFormat, ...], msgspec.Meta(min_length=1)]
    pays: dict[NumberFormat, str]
    flavours: Annotated[tuple[ServingFlavour, ...], msgspec.Meta(min_length=1)]
    modules: tuple[Module, ...] = ()
    software: tuple[Software, ...] = ()
    defaults: Defaults
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if (self.architecture is None) != (self.kind == "cpu"):
            raise ValueError(f"kind {self.kind} and architecture {self.architecture} do not agree: GPUs alone have one")
        if self.kind != "cpu" and not self.modules:
            raise ValueError("a GPU needs at least one entry in modules: its memory decides what fits")
        unknown = [name for name in self.pays if name not in self.precisions]
        if unknown:
            raise ValueError(f"pays has {', '.join(unknown)}, which precisions {list(self.precisions)} lacks")

    @property
    def dla_cores(self) -> int:
        """Return the number of DLA cores of the module that has the most."""
        return max((module.dla_cores for module in self.modules), default=0)


@functools.cache
def list_profiles() -> tuple[DeviceProfile, ...]:
    """Return the profiles of the package: the CPU, then Jetsons, datacenter and RTX cards, each by architecture."""
    profiles = [_read(path) for path in _folder().glob("*.toml")]
    return tuple(sorted(profiles, key=lambda p: (_KINDS.index(p.kind), _number(p.architecture), p.name)))


def load_profile(name_or_path: str | os.PathLike[str]) -> DeviceProfile:
    """Return a profile by name or from a .toml file; raise InputError with the known names or the wrong field."""
    text = os.fspath(name_or_path)
    if text.endswith(".toml") or isinstance(name_or_path, os.PathLike):
        return _read(Path(text))
    profiles = {profile.name: profile for profile in list_profiles()}
    if text not in profiles:
        close = difflib.get_close_matches(text.lower().replace("_", "-").replace(" ", "-"), profiles, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(close)}?" if close else f"there are {', '.join(profiles)}"
        raise InputError(f"no device profile {shortened(text, 80)!r}: {hint} (or give the path of a .toml file)")
    return profiles[text]


def profile_of(gpu: Gpu | None, *, board: str = "") -> DeviceProfile | None:
    """Return the profile of a detected GPU, or of the CPU for None; return None if no profile fits or several do.

    ``board``: the name from :func:`edge_backbones.machine.system.board_name`. CUDA reports Orin Nano and Orin NX of 8 GB
    alike: only the name of the board tells them apart.
    """
    if gpu is None:
        return load_profile("cpu")
    same = [
        profile
        for profile in list_profiles()
        if profile.architecture == gpu.architecture and (profile.kind == "jetson") == gpu.integrated
    ]
    words = f"{gpu.name} {board}"
    found = [profile for profile in same if any(_has_word(words, name) for name in profile.device_names)]
    if not found and gpu.integrated:  # a carrier board of another maker
        found = [profile for profile in same if any(_fits(gpu.memory_bytes, module) for module in profile.modules)]
    return found[0] if len(found) == 1 else None


def modules_of(profile: DeviceProfile, gpu: Gpu | None) -> tuple[Module, ...]:
    """Return the modules of a profile with the memory size of this GPU; all modules without a GPU or if none fits."""
    fitting = tuple(module for module in profile.modules if gpu is not None and _fits(gpu.memory_bytes, module))
    return fitting or profile.modules


def refusals(
    profile: DeviceProfile,
    *,
    precision: Precision,
    flavour: ServingFlavour,
    input: InputSpec,
    dla_core: int | None = None,
    targets: Sequence[str] = (),
) -> list[str]:
    """Why this build cannot serve the device, each a sentence with the way out; empty when nothing speaks against it.

    ``input``: the sizes that the engine is compiled for. ``targets``: architectures for TensorRT-RTX, none for its own
    choice. What only the engine library can tell (layers, memory) is left to it.
    """
    reasons = _against_flavour(profile, flavour)
    if not reasons:
        reasons += _against_targets(profile, precision, flavour, targets)
        if flavour != "torchscript" and precision.value not in profile.precisions:
            reasons.append(_against_precision(profile, precision))
    if dla_core is not None:
        reasons += _against_dla(profile, precision, flavour, input, dla_core)
    return reasons


def explain(profile: DeviceProfile) -> str:
    """Describe a profile in a few lines of text."""
    lines = [f"{profile.name}: {profile.title}" + (f", {profile.architecture}" if profile.architecture else "")]
    for module in profile.modules:
        shared = " shared with the CPU" if profile.unified_memory else ""
        parts = [f"{module.memory_gib:g} GiB{shared}"]
        parts += [f"{module.bandwidth_gb_s:g} GB/s"] if module.bandwidth_gb_s is not None else []
        parts += [f"{module.dla_cores or 'no'} DLA cores".replace("1 DLA cores", "1 DLA core")] * profile.unified_memory
        lines.append(f"  {module.name}: {', '.join(parts)}")
    lines.append(f"  engines: {', '.join(profile.flavours)}")
    for software in profile.software:
        jetpack = f" on JetPack {software.jetpack}" if software.jetpack else ""
        lines.append(f"  TensorRT {software.tensorrt}{jetpack}{', with DLA' if software.dla else ''}")
    lines.append(f"  precisions: {', '.join(profile.precisions)}")
    lines += [f"  {precision} pays: {why}" for precision, why in profile.pays.items()]
    defaults = profile.defaults
    workspace = f", workspace {defaults.workspace_bytes >> 20} MiB" if defaults.workspace_bytes else ""
    batch = f"batch {defaults.batch}" + ("" if defaults.batch.is_fixed else f" (best at {defaults.batch.opt})")
    lines.append(f"  defaults: {batch}, {defaults.size}x{defaults.size}{workspace}")
    return "\n".join(lines + [f"  note: {note}" for note in profile.notes])


def _folder() -> Path:
    """Return the folder of the profiles: inside the package in a wheel, beside it in a checkout or an editable install."""
    return _IN_WHEEL if _IN_WHEEL.is_dir() else _IN_CHECKOUT


def _read(path: Path) -> DeviceProfile:
    try:
        data = read_file(path, limit=_MAX_BYTES)
    except OSError as error:
        raise InputError(f"device profile {path} cannot be read: {error.strerror or error}") from error
    with refusing(lambda why: InputError(f"{path} is not a device profile: {why}")):
        try:
            profile = msgspec.toml.decode(data, type=DeviceProfile)
        except ImportError as error:  # Python 3.10 has no TOML reader
            raise MissingDependencyError("reading device profiles on this Python", "cli") from error
    if profile.name != path.stem:
        raise InputError(
            f"{path} is not a device profile: its name is {profile.name!r}, its file's {path.stem!r}: let them agree"
        )
    return profile


def _number(architecture: str | None) -> int:
    return int(architecture.removeprefix("sm_")) if architecture else 0


def _has_word(text: str, word: str) -> bool:
    return re.search(rf"(?<![A-Za-z0-9]){re.escape(word)}(?![A-Za-z0-9])", text, re.IGNORECASE) is not None


def _fits(memory_bytes: int, module: Module) -> bool:
    # CUDA reports what the system left of it: 14.1 of 16 GiB on an Orin NX.
    return 0.75 * module.memory_gib < memory_bytes / 2**30 <= module.memory_gib


def _against_flavour(profile: DeviceProfile, flavour: ServingFlavour) -> list[str]:
    if flavour == "tensorrt_lean":
        return ["tensorrt_lean runs plans and compiles none: compile with flavour tensorrt and version_compatible=True"]
    if flavour in profile.flavours:
        return []
    others = " or ".join(name for name in profile.flavours if name != "tensorrt_lean")
    if flavour == "tensorrt_rtx" and profile.architecture is not None:
        return [
            f"TensorRT-RTX compiles for {', '.join(RTX_ARCHITECTURES)} and {profile.name} is {profile.architecture}: "
            f"use flavour {others}"
        ]
    if flavour == "openvino":
        return [f"openvino runs on CPUs and {profile.name} is a GPU: use flavour {others}, or the profile cpu"]
    return [f"{flavour} does not serve {profile.name}: use flavour {others}"]


def _against_precision(profile: DeviceProfile, precision: Precision) -> str:
    first = FIRST_ARCHITECTURE.get(precision)
    needs = f"{precision} needs sm_{first} or newer" if first else f"{precision} is not among what it computes"
    buildable = [precision.value for precision in Precision]
    instead = " or ".join(name for name in profile.pays if name in buildable) or "fp32"
    return f"{needs} and {profile.name} is {profile.architecture or 'a CPU'}: choose {instead}"


def _against_targets(
    profile: DeviceProfile, precision: Precision, flavour: ServingFlavour, targets: Sequence[str]
) -> list[str]:
    if flavour != "tensorrt_rtx":
        if targets:
            return [f"targets are for tensorrt_rtx and {flavour} compiles for the GPU it finds: leave them out"]
        return []
    reasons = []
    unknown = [target for target in targets if target not in RTX_ARCHITECTURES]
    if unknown:
        reasons.append(
            f"TensorRT-RTX does not compile for {', '.join(unknown)}: choose among {', '.join(RTX_ARCHITECTURES)}"
        )
    if targets and profile.architecture not in targets:
        reasons.append(
            f"an engine for {', '.join(targets)} does not run on {profile.name}: add the target {profile.architecture}"
        )
    if not targets and profile.architecture == "sm_75":
        reasons.append(
            f"TensorRT-RTX leaves sm_75 out of its portable engines and {profile.name} is one: name the target sm_75"
        )
    first = FIRST_ARCHITECTURE.get(precision, 0)
    # The device's own architecture is answered for by its precisions.
    late = [
        target
        for target in targets
        if target in RTX_ARCHITECTURES and target != profile.architecture and _number(target) < first
    ]
    if late:
        reasons.append(
            f"{precision} needs sm_{first} or newer and the targets have {', '.join(late)}: leave those out or choose "
            "another precision"
        )
    return reasons


def _against_dla(
    profile: DeviceProfile, precision: Precision, flavour: ServingFlavour, input: InputSpec, core: int
) -> list[str]:
    count = profile.dla_cores
    if not count:
        return [
            f"DLA core {core} was asked for and {profile.name} has none: leave it out, and the GPU runs every layer"
        ]
    reasons = []
    if not 0 <= core < count:
        cores = "core 0 alone" if count == 1 else f"cores 0 to {count - 1}"
        reasons.append(f"DLA core {core} does not exist: {profile.name} has {cores}")
    if flavour != "tensorrt":
        reasons.append(f"{flavour} compiles nothing for DLA: use flavour tensorrt")
    return reasons + against_dla(precision, input)


def against_dla(precision: Precision, input: InputSpec) -> list[str]:
    """Why no DLA core computes this, each a sentence with the way out."""
    reasons = []
    if precision not in (Precision.FP16, Precision.INT8):
        reasons.append(f"DLA computes fp16 and int8, not {precision}: choose one of them, or leave dla_core out")
    axes = {"batch": input.batch, "height": input.height, "width": input.width}
    dynamic = [f"{name} {axis}" for name, axis in axes.items() if not axis.is_fixed]
    if dynamic:
        reasons.append(f"DLA takes fixed shapes and this input has {', '.join(dynamic)}: give each one size")
    if input.batch.max > _DLA_LARGEST_BATCH:
        reasons.append(
            f"DLA takes batches of at most {_DLA_LARGEST_BATCH}, not {input.batch.max}: choose a smaller one"
        )
    sizes = {"channels": input.channels, "height": input.height.max, "width": input.width.max}
    large = [f"{name} {size}" for name, size in sizes.items() if size > _DLA_LARGEST_SIZE]
    if large:
        reasons.append(
            f"DLA takes sizes of at most {_DLA_LARGEST_SIZE}, not {', '.join(large)}: choose a smaller input"
        )
    return reasons
