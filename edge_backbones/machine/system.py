"""Read what the files of a machine say of it: system, board, memory, driver, clocks. No program or library is loaded.

``root`` is the root folder, which can be a copy of another machine's files.
"""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path

import msgspec

# The first release of Jetson Linux of each JetPack, from NVIDIA's JetPack archive.
_JETPACKS = (
    ((32, 1), "4"), ((34, 1), "5.0"), ((35, 1), "5.0.2"), ((35, 2, 1), "5.1"), ((35, 3, 1), "5.1.1"), ((35, 4, 1), "5.1.2"),
    ((35, 5), "5.1.3"), ((35, 6), "5.1.4"), ((36, 2), "6.0"), ((36, 4), "6.1"), ((36, 4, 3), "6.2"), ((36, 4, 4), "6.2.1"),
    ((36, 5), "6.2.2"), ((38, 2), "7.0"), ((38, 4), "7.1"), ((39,), "7.2"),
)  # fmt: skip
_CPU_FILES = {
    "cpu governor": "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor",
    "cpu MHz now": "sys/devices/system/cpu/cpu0/cpufreq/scaling_cur_freq",
    "cpu MHz at most": "sys/devices/system/cpu/cpu0/cpufreq/scaling_max_freq",
    "turbo off": "sys/devices/system/cpu/intel_pstate/no_turbo",
    "boost": "sys/devices/system/cpu/cpufreq/boost",
}
_UNITS_PER_MHZ = {"cpu MHz now": 1e3, "cpu MHz at most": 1e3}


def default_cache() -> Path:
    """Return the user's cache folder of this package.

    It holds compiled engines (at most 4 GiB), bundles of AutoEdgeBackbone (at most 16 GiB), kernels that TensorRT-RTX
    compiled while an engine ran (at most 1 GiB), and notes of what was measured on this machine.

    This is all that the package writes: the bundle; the files that a command names (``run``: features/, ``verify
    --explain``: explanation.png, ``build`` and ``report``: <bundle>.report.html); hidden files beside these during a write;
    and this folder. Compiling for a signed bundle makes the device's key once (see :mod:`edge_backbones.bundle.vouchers`).
    ``bench`` uses the system's folder for temporary files. Loading and running an engine writes nothing,
    but for those kernels.

    Libraries of the workstation have folders of their own. huggingface_hub keeps its downloads (HF_HOME), matplotlib a list
    of fonts (``matplotlib`` in the cache and configuration folders), torch an empty folder for its compiler
    (``torchinductor_<user>`` beside temporary files). The telemetry of OpenVINO and ONNX Runtime, which would write files
    too, is switched off.
    """
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "edge_backbones"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "edge_backbones"


class HostMemory(msgspec.Struct, frozen=True, kw_only=True):
    """Sizes in bytes. ``available``: what can be used without swapping."""

    total: int
    available: int
    swap: int


class System(msgspec.Struct, frozen=True, kw_only=True):
    """What the files of a machine say; None or empty where they say nothing.

    ``jetson``: see :func:`is_jetson`. ``l4t``: the release of Jetson Linux, ``36.4.3``. ``driver``: the version of NVIDIA's
    kernel module. ``cuda``: the version of the toolkit in /usr/local/cuda. ``tensorrt_pythons``: Python versions (``3.10``)
    for which the system has a tensorrt package. ``settings``: governor, clocks, power mode.
    """

    name: str = ""
    board: str = ""
    jetson: bool = False
    l4t: str | None = None
    memory: HostMemory | None = None
    driver: str | None = None
    cuda: str | None = None
    tensorrt_pythons: tuple[str, ...] = ()
    container: bool = False
    settings: dict[str, str] = {}

    @property
    def jetpack(self) -> str | None:
        """Return the JetPack of this Jetson Linux; for a release newer than the table, the last JetPack in it."""
        if self.l4t is None:
            return None
        release = tuple(int(part) for part in self.l4t.split("."))
        return next((jetpack for first, jetpack in reversed(_JETPACKS) if release >= first), "3 or older")


def read_system(root: Path = Path("/")) -> System:
    """Read this machine, or the one whose files lie under ``root``."""
    release = re.search(r'^PRETTY_NAME="?(.*?)"?$', _text(root / "etc/os-release"), re.MULTILINE)
    l4t = re.search(r"R(\d+).*?REVISION:\s*([\d.]+)", _text(root / "etc/nv_tegra_release"))
    driver = re.search(r"Module\s+(?:for \w+\s+)?([\d.]+)", _text(root / "proc/driver/nvidia/version"))
    packages = (root / "usr/lib").glob("python3*/dist-packages/tensorrt/__init__.py")
    return System(
        name=release.group(1) if release else "",
        board=board_name(root),
        jetson=is_jetson(root),
        l4t=f"{l4t.group(1)}.{l4t.group(2)}" if l4t else None,
        memory=_memory(_text(root / "proc/meminfo")),
        driver=driver.group(1) if driver else None,
        cuda=_cuda(_text(root / "usr/local/cuda/version.json")),
        tensorrt_pythons=tuple(
            sorted(
                (path.parts[-4].removeprefix("python") for path in packages),
                key=lambda python: [int(part) for part in re.findall(r"\d+", python)],
            )
        ),
        container=(root / ".dockerenv").exists() or (root / "run/.containerenv").exists(),
        settings=settings(root),
    )


def board_name(root: Path = Path("/")) -> str:
    """Return the name of the board from a Jetson's device tree; empty on other machines.

    Docker hides the device tree: there the copy is read that jetson-containers gives its containers.
    """
    return _text(root / "proc/device-tree/model") or _text(root / "tmp/nv_jetson_model")


def is_jetson(root: Path = Path("/")) -> bool:
    """Return whether this machine is a Jetson. In a container only the name of the chip shows it.

    Docker hides the device tree, and /etc is that of the container.
    """
    return (
        _text(root / "sys/devices/soc0/family").startswith("Tegra")
        or (root / "etc/nv_tegra_release").exists()
        or "Jetson" in _text(root / "proc/device-tree/model")
    )


def kernel_has_driver(root: Path = Path("/")) -> bool:
    """Return whether the kernel has NVIDIA's driver. A container sees its GPU only if it was started with it."""
    return is_jetson(root) or (root / "proc/driver/nvidia/version").exists()


def settings(root: Path = Path("/")) -> dict[str, str]:
    """Return the governor, turbo, clocks and a Jetson's power mode, which decide how fast the machine is now."""
    found = {}
    for name, path in _CPU_FILES.items():
        text = _text(root / path)
        if text:
            unit = _UNITS_PER_MHZ.get(name)
            found[name] = f"{float(text) / unit:.0f}" if unit and text.isdigit() else text
    if board := board_name(root):
        found["Jetson"] = board
    # Xavier's, Orin's on JetPack 5 and 6, Thor's.
    gpus = [p for p in (root / "sys/class/devfreq").glob("*") if re.search(r"\.(gv11b|ga10b|gpu)$|^gpu-gpc-0$", p.name)]
    clocks = [text for path in gpus if (text := _text(path / "cur_freq")).isdigit()]
    if clocks:
        found["Jetson GPU MHz now"] = f"{int(clocks[0]) / 1e6:.0f}"
    status = _text(root / "var/lib/nvpmodel/status")
    if mode := re.search(r"pmode:(\d+)", status):
        names = re.findall(r"<\s*POWER_MODEL\s+ID=(\d+)\s+NAME=(\S+)\s*>", _text(root / "etc/nvpmodel.conf"))
        number = int(mode.group(1))
        known = {int(identity): name for identity, name in names}
        found["Jetson power mode"] = known.get(number, str(number))
    return found


def _memory(meminfo: str) -> HostMemory | None:
    rows = {name: int(kib) << 10 for name, kib in re.findall(r"^(\w+):\s+(\d+) kB", meminfo, re.MULTILINE)}
    if "MemTotal" not in rows:
        return None
    return HostMemory(
        total=rows["MemTotal"],
        available=rows.get("MemAvailable", rows.get("MemFree", 0)),
        swap=rows.get("SwapFree", 0),
    )


def _cuda(document: str) -> str | None:
    try:
        return str(json.loads(document)["cuda"]["version"])
    except (ValueError, KeyError, TypeError):
        return None


def _text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8", "replace").strip("\0 \n")
    except OSError:
        return ""


def gib(size: int) -> str:
    """Return a size in bytes as text: ``7.4 GiB``, or ``12 MiB`` where that says more."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 / 10 else f"{size / 2**20:.0f} MiB"
