"""Which machine measured, and what decides how fast it is today."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path

from edge_backbones.bench import energy
from edge_backbones.bench.results import Machine
from edge_backbones.errors import EdgeBackbonesError
from edge_backbones.runtime import compat, cuda
from edge_backbones.system import settings


def describe(*, root: Path = Path("/"), repository: Path | None = None) -> Machine:
    """This machine. ``repository``: a git checkout whose commit is recorded."""
    host = compat.this_host({})
    gpu_clocks: dict[str, str] = {}
    try:
        gpu = next((f"{g.name} ({g.architecture}), driver for CUDA {g.driver}" for g in cuda.gpus()), None)
        gpu_clocks = energy.gpu_settings()
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
        settings={**settings(root), **gpu_clocks},
        commit=None if repository is None else _commit(repository),
    )


def _commit(repository: Path) -> str | None:
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, cwd=repository, capture_output=True, text=True, check=True)  # noqa: S603
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
