"""Packages of Debian and Ubuntu for tests that need a program of the system."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Sequence


def install(
    packages: Sequence[str],
    *,
    lacks: str,
    advice: str,
    run: Callable[[list[str]], None] | None = None,
) -> None:
    """Install packages with apt-get. Raises RuntimeError with the fix if that is not possible.

    ``lacks``: what is missing on this machine, and ``advice``: how a person installs it, both for the message. ``run`` is
    called with each command; by default it runs it.
    """
    if shutil.which("apt-get") is None or not hasattr(os, "geteuid") or os.geteuid() != 0:
        raise RuntimeError(f"there is no {lacks} on this machine, and only root can add Debian's: {advice}")
    for command in (["update", "--quiet"], ["install", "--quiet", "--yes", "--no-install-recommends", *packages]):
        if run is not None:
            run(["apt-get", *command])
            continue
        done = subprocess.run(
            ["apt-get", *command], check=False, capture_output=True, text=True, stdin=subprocess.DEVNULL,
            env={**os.environ, "DEBIAN_FRONTEND": "noninteractive"},
        )  # fmt: skip
        if done.returncode:
            last = (done.stderr or done.stdout).strip().splitlines()[-1:]
            raise RuntimeError(f"apt-get {command[0]} failed ({' '.join(last)}): {advice}")
