"""Which machine measured, and what decides how fast it is today."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path

from edge_backbones.bench.results import Machine
from edge_backbones.errors import EdgeBackbonesError
from edge_backbones.runtime import compat, cuda


def describe(*, root: Path = Path("/"), repository: Path | None = None) -> Machine:
    """This machine. ``repository``: a git checkout whose commit is recorded."""
    host = compat.this_host({})
    try:
        gpu = next((f"{g.name} ({g.architecture}), driver for CUDA {g.driver}" for g in cuda.gpus()), None)
    except EdgeBackbonesError as error:
        gpu = str(error)
    return Machine(
        name=host.device_name,
        architecture=host.architecture,
        cpu_features=host.cpu_features,
        cores=os.cpu_count() or 1,
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0,
        system=platform.platform(),
        python=platform.python_version(),
        gpu=gpu,
        settings=settings(root),
        commit=None if repository is None else _commit(repository),
    )


def settings(root: Path = Path("/")) -> dict[str, str]:
    """Governor, turbo, clocks and Jetson's power mode, as far as the system shows them."""
    files = {
        "cpu governor": "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor",
        "cpu MHz now": "sys/devices/system/cpu/cpu0/cpufreq/scaling_cur_freq",
        "cpu MHz at most": "sys/devices/system/cpu/cpu0/cpufreq/scaling_max_freq",
        "turbo off": "sys/devices/system/cpu/intel_pstate/no_turbo",
        "boost": "sys/devices/system/cpu/cpufreq/boost",
        "Jetson power mode": "var/lib/nvpmodel/status",
        "Jetson GPU MHz now": "sys/class/devfreq/17000000.gpu/cur_freq",
        "Jetson": "proc/device-tree/model",
    }
    per_mhz = {"cpu MHz now": 1e3, "cpu MHz at most": 1e3, "Jetson GPU MHz now": 1e6}
    found = {}
    for name, path in files.items():
        try:
            text = (root / path).read_text(encoding="utf-8", errors="replace").strip().strip("\x00")
        except OSError:
            continue
        if text:
            found[name] = f"{float(text) / per_mhz[name]:.0f}" if name in per_mhz and text.isdigit() else text
    return found


def _commit(repository: Path) -> str | None:
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, cwd=repository, capture_output=True, text=True, check=True)  # noqa: S603
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
