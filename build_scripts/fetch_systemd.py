"""systemd-analyze for the tests of the units: the one of this machine, or Debian's package.

    python -m build_scripts.fetch_systemd

It reads unit files; nothing of systemd has to run.
"""

from __future__ import annotations

import shutil
import sys

from build_scripts import debian

_ADVICE = "install systemd (Debian, Ubuntu: apt install systemd)"


def require_analyze() -> str:
    """Return the path of systemd-analyze. Raises RuntimeError with the fix if there is none."""
    found = shutil.which("systemd-analyze")
    if found is None:
        raise RuntimeError(f"there is no systemd-analyze on this machine: {_ADVICE}")
    return found


def install_analyze() -> str:
    """Install Debian's package with apt-get. Raises RuntimeError with the fix if that is not possible."""
    debian.install(["systemd"], lacks="systemd-analyze", advice=_ADVICE)
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
