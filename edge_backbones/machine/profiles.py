"""Device profiles: what a device has, which engine libraries serve it, and why a build for it cannot work.

Each profile is a file in profiles/. A comment on each line names the source of its figure. A file of your own can be used
wherever a name can. Reading profiles needs no GPU and no driver; :func:`profile_of` takes what a driver reported.
"""

from __future__ import annotations

import difflib
import functools
import os
import re
from pathlib import Path
from typing import Annotated, Literal

import msgspec

from edge_backbones.bundle.manifest import Architecture, FlavourName
from edge_backbones.errors import InputError, MissingDependencyError
from edge_backbones.machine.gpus import Gpu
from edge_backbones.reading import read_file, refusing, shortened, why_not
from edge_backbones.spec import Precision, ShapeRange, Size

Kind = Literal["cpu", "jetson", "datacenter", "rtx"]
NumberFormat = Literal["fp32", "fp16", "bf16", "int8", "fp8", "fp4"]
Versions = Annotated[
    str, msgspec.Meta(pattern=r"^[0-9]+(\.[0-9]+)*( to [0-9]+(\.[0-9]+)*| and later)?\Z", max_length=60)
]
"""``10.3``, ``10.3 to 10.7`` (both included) or ``11.4.1 and later``."""

RTX_ARCHITECTURES = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_120", "sm_121")
"""The architectures that TensorRT-RTX compiles for; the first one only if it is named as a target."""
FIRST_ARCHITECTURE = {Precision.BF16: 80, Precision.FP8: 89}
"""The first architecture whose tensor cores compute a format. Formats that are missing run on every supported GPU."""

_KINDS: tuple[Kind, ...] = ("cpu", "jetson", "datacenter", "rtx")
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
    of the board; any of them tells the device from others of its architecture, and of several profiles the longest counts.
    ``precisions``: number formats that the hardware computes, or for a CPU that its engine library accepts. ``pays``: the
    formats that are worth building, and why. ``flavours``: engine libraries that serve the device; a build matrix takes the
    first if it names none. ``unified_memory``: CPU and GPU share their memory.
    """

    name: Annotated[str, msgspec.Meta(pattern=r"^[a-z0-9][a-z0-9_.-]*\Z")]
    title: str
    kind: Kind
    architecture: Architecture | None = None
    device_names: tuple[str, ...] = ()
    unified_memory: bool = False
    precisions: Annotated[tuple[NumberFormat, ...], msgspec.Meta(min_length=1)]
    pays: dict[NumberFormat, str]
    flavours: Annotated[tuple[FlavourName, ...], msgspec.Meta(min_length=1)]
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
    named = {
        profile.name: max((len(name) for name in profile.device_names if _has_word(words, name)), default=0)
        for profile in same
    }
    # The longest name tells most: an RTX PRO card is an RTX card too.
    longest = max(named.values(), default=0)
    found = [profile for profile in same if longest and named[profile.name] == longest]
    if not found and gpu.integrated:  # a carrier board of another maker
        found = [profile for profile in same if any(_fits(gpu.memory_bytes, module) for module in profile.modules)]
    return found[0] if len(found) == 1 else None


def modules_of(profile: DeviceProfile, gpu: Gpu | None) -> tuple[Module, ...]:
    """Return the modules of a profile with the memory size of this GPU; all modules without a GPU or if none fits."""
    fitting = tuple(module for module in profile.modules if gpu is not None and _fits(gpu.memory_bytes, module))
    return fitting or profile.modules


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
        raise InputError(f"device profile {path} cannot be read: {why_not(error)}") from error
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
