"""GStreamer for the tests of the example: the one of this machine, or Debian's packages.

    python -m build_scripts.fetch_gstreamer

Its bindings belong to the system's Python. A virtual environment of that Python sees them if it was made with
--system-site-packages.
"""

from __future__ import annotations

import subprocess
import sys

from build_scripts import debian

PYTHON = "/usr/bin/python3"
PACKAGES = (
    "python3-venv",
    "python3-gi",
    "python3-gst-1.0",  # maps buffers without a copy
    "gir1.2-gstreamer-1.0",
    "gir1.2-gst-plugins-base-1.0",
    "gstreamer1.0-plugins-base",
    "gstreamer1.0-plugins-good",
)
_ADVICE = f"install GStreamer and its bindings for Python (Debian, Ubuntu: apt install {' '.join(PACKAGES)})"
# Elements of both collections of plug-ins; ensurepip is what Debian leaves out of Python without python3-venv.
_ASK = """
import ensurepip, gi, gi.overrides._gi_gst
gi.require_version("GstVideo", "1.0")
gi.require_version("GstApp", "1.0")
from gi.repository import Gst, GstApp, GstVideo
Gst.init(None)
wanted = "videotestsrc", "appsink", "videoconvert", "vp8enc", "v4l2src"
missing = [name for name in wanted if not Gst.ElementFactory.find(name)]
assert not missing, f"no element {' '.join(missing)}"
print(Gst.version_string())
"""


def require_gstreamer() -> str:
    """Return the version of GStreamer. Raises RuntimeError with the fix if the system's Python cannot use it."""
    try:
        done = subprocess.run([PYTHON, "-c", _ASK], check=False, capture_output=True, text=True)
    except OSError as error:
        raise RuntimeError(f"there is no {PYTHON} ({error.strerror}): {_ADVICE}") from error
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:]
        raise RuntimeError(f"there is no GStreamer that {PYTHON} can use ({' '.join(last)}): {_ADVICE}")
    return done.stdout.strip()


def install_gstreamer() -> str:
    """Install Debian's packages with apt-get. Raises RuntimeError with the fix if that is not possible."""
    debian.install(PACKAGES, lacks="GStreamer for Python", advice=_ADVICE)
    return require_gstreamer()


def main() -> None:
    try:
        print(require_gstreamer())
    except RuntimeError:
        try:
            print(install_gstreamer())
        except RuntimeError as error:
            sys.exit(str(error))


if __name__ == "__main__":
    main()
