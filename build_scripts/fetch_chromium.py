"""A Chromium for tests of HTML pages: the one of this machine, or Debian's package.

    python -m build_scripts.fetch_chromium

Tests drive it through the DevTools protocol over a pipe, so that no driver and no Python package is needed.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

from build_scripts import debian

_COMMANDS = ("chromium", "chromium-browser", "google-chrome-stable", "google-chrome", "chrome", "microsoft-edge")
_MAC_APPLICATIONS = ("Chromium.app/Contents/MacOS/Chromium", "Google Chrome.app/Contents/MacOS/Google Chrome")
_WINDOWS_PROGRAMS = ("Chromium/Application/chrome.exe", "Google/Chrome/Application/chrome.exe")
_ADVICE = "install Chromium or Google Chrome (Debian, Ubuntu: apt install chromium)"


def find_chromium() -> Path | None:
    """Return the first Chromium or Chrome: on the PATH, then where macOS and Windows keep programs."""
    for command in _COMMANDS:
        if found := shutil.which(command):
            return Path(found)
    folders = {
        "darwin": (_MAC_APPLICATIONS, ["/Applications", str(Path.home() / "Applications")]),
        "win32": (
            _WINDOWS_PROGRAMS,
            [os.environ.get(name, "") for name in ("PROGRAMFILES", "PROGRAMFILES(X86)", "LOCALAPPDATA")],
        ),
    }
    programs, places = folders.get(sys.platform, ((), []))
    candidates = (Path(place) / program for place in places if place for program in programs)
    return next((path for path in candidates if path.is_file()), None)


def require_chromium() -> Path:
    """Return the first Chromium or Chrome. Raises RuntimeError with the fix if there is none."""
    found = find_chromium()
    if found is None:
        raise RuntimeError(
            f"there is no Chromium on this machine: {_ADVICE}, or run python -m build_scripts.fetch_chromium"
        )
    return found


def install_chromium(run: Callable[[list[str]], None] | None = None) -> Path:
    """Install Debian's package with apt-get. Raises RuntimeError with the fix if that is not possible."""
    debian.install(["chromium"], lacks="Chromium", advice=_ADVICE, run=run)
    found = find_chromium()
    if found is None:
        raise RuntimeError(f"apt-get installed a chromium that is not on the PATH: {_ADVICE}")
    return found


def main() -> None:
    try:
        print(find_chromium() or install_chromium())
    except RuntimeError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
