"""Say what a source of frames is: an image, a folder, a video file, a camera, an address, or a GStreamer pipeline."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

import numpy as np

from edge_backbones.errors import InputError, visible
from edge_backbones.images.decode import looks_like_image, shown

TIMEOUT = 10.0
"""Seconds that a camera or a server has to answer, and then to send the next frame."""

Kind = Literal["image", "folder", "video", "camera", "url", "pipeline"]

# Schemes of streams that go on whether somebody reads them or not.
_LIVE = re.compile(r"(rtsp|rtsps|rtmp|rtmps|rtmpt|rtp|udp|tcp|srt|mms|mmsh|mmst)://", re.IGNORECASE)
_SECRET = re.compile(r"([?&](?:[^=&]*(?:pass|pwd|token|key|secret|auth)[^=&]*)=)[^&]*", re.IGNORECASE)
_SCHEME = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)


class Place(NamedTuple):
    """What a source is: its kind, how the libraries are told about it, and its name without a password."""

    kind: Kind
    address: str
    name: str

    @property
    def is_live(self) -> bool:
        """Return whether frames come at their own pace. An address of http may be a file: its reader knows."""
        return self.kind in ("camera", "pipeline") or bool(self.kind == "url" and _LIVE.match(self.address))


class Taken(NamedTuple):
    """A frame as a reader gives it: ``make`` converts its pixels, and is None for a frame that is damaged."""

    number: int
    seconds: float
    make: Callable[[], np.ndarray] | None


class Reader(Protocol):
    """An opened source.

    Attributes:
        is_live: Frames come at their own pace.
        rate: Frames per second; None if the source does not say.
        count: Number of frames, roughly; None if the source does not say.
    """

    is_live: bool
    rate: float | None
    count: int | None

    def read(self, every: int) -> Iterator[Taken]:
        """Yield every ``every``-th frame, and all that are damaged."""

    def close(self) -> None:
        """Close the source."""


def place_of(source: str | int | os.PathLike[str]) -> Place:
    """Find out what ``source`` names. Raises InputError if a file is named that does not exist.

    A path that exists is an image, a folder, a camera (a device) or a video. Else a number is a camera, text with `` ! ``
    is a GStreamer pipeline, and text with ``://`` is an address.
    """
    text = os.fspath(source) if isinstance(source, os.PathLike) else str(source)
    if _SCHEME.match(text):
        return Place("url", text, visible(_without_password(text)))
    path, name = Path(text), shown(Path(text))
    if text and _exists(path) and not isinstance(source, int):
        if path.is_dir():
            return Place("folder", text, name)
        if stat.S_ISCHR(path.stat().st_mode):
            return Place("camera", text, name)
        return Place("image" if looks_like_image(path) else "video", text, name)
    if " ! " in text:
        return Place("pipeline", text, "the pipeline")
    if text.isdecimal() and text.isascii():
        return Place("camera", str(int(text)), f"camera {int(text)}")
    if text.startswith("/dev/video"):
        return Place("camera", text, name)
    if not text:
        raise InputError(
            "the source is an empty name: pass the path of an image or a video, the number of a camera, or an address"
        )
    raise InputError(f"{text} does not exist")


def _exists(path: Path) -> bool:
    """Return whether a path exists. A pipeline is longer than any path may be, which is an OSError."""
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def device_of(place: Place) -> str:
    """Return the device of a camera on Linux. Raises InputError if it cannot be read, with the cameras that there are."""
    device = f"/dev/video{place.address}" if place.address.isdecimal() else place.address
    if not Path(device).exists():
        others = sorted(str(path) for path in Path("/dev").glob("video*"))
        there = f"there are {', '.join(others)}" if others else "no camera is connected"
        inside = " (a container sees a camera with docker run --device)" if Path("/.dockerenv").exists() else ""
        raise InputError(f"{place.name} does not exist, {there}{inside}: {device} is where Linux would show it")
    if not os.access(device, os.R_OK | os.W_OK):
        raise InputError(
            f"{device} may not be opened by this user: sudo usermod -aG video $USER, and log in again; or look at the "
            "permissions of the device"
        )
    return device


def _without_password(address: str) -> str:
    """Return an address without the user, the password and the tokens in it, for messages and titles."""
    scheme, _, rest = address.partition("://")
    host, slash, path = rest.partition("/")
    return _SECRET.sub(r"\1...", f"{scheme}://{host.rpartition('@')[2]}{slash}{path}")
