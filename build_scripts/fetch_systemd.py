"""systemd-analyze for the tests of the units: the one of this machine, or Debian's package.

    python -m build_scripts.fetch_systemd

It reads unit files; nothing of systemd has to run.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

_ADVICE = "install systemd (Debian, Ubuntu: apt install systemd)"


def require_analyze() -> str:
    """Return the path of systemd-analyze. Raises RuntimeError with the fix if there is none."""
    found = shutil.which("systemd-analyze")
    if found is None:
        raise RuntimeError(f"there is no systemd-analyze on this machine: {_ADVICE}")
    return found


def install_analyze() -> str:
    """Install Debian's package with apt-get. Raises RuntimeError with the fix if that is not possible."""
    if shutil.which("apt-get") is None or os.geteuid() != 0:
        raise RuntimeError(f"there is no systemd-analyze on this machine, and only root can add Debian's: {_ADVICE}")
    for command in (["update"], ["install", "--yes", "--no-install-recommends", "systemd"]):
        done = subprocess.run(
            ["apt-get", "--quiet", *command], check=False, capture_output=True, text=True, stdin=subprocess.DEVNULL,
            env={**os.environ, "DEBIAN_FRONTEND": "noninteractive"},
        )  # fmt: skip
        if done.returncode:
            last = (done.stderr or done.stdout).strip().splitlines()[-1:]
            raise RuntimeError(f"apt-get {command[0]} failed ({' '.join(last)}): {_ADVICE}")
    return require_analyze()


def main() -> None:
    if not sys.platform.startswith("linux"):
        print("systemd is for Linux only: its opinion of the units is not asked here")
        return
    try:
        print(shutil.which("systemd-analyze") or install_analyze())
    except RuntimeError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
