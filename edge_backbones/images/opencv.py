"""Read frames with OpenCV's VideoCapture: GStreamer pipelines, and everything where PyAV is missing.

OpenCV says little about what goes wrong: it turns most errors into the end of the source.
"""

from __future__ import annotations

import functools
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from edge_backbones.errors import InputError
from edge_backbones.images.places import TIMEOUT, Place, Reader, Taken, device_of

_WITH_GSTREAMER = (
    "pip's OpenCV is built without GStreamer. Use the one of your system: apt install python3-opencv (JetPack has one), "
    "and an environment that sees it: python3 -m venv --system-site-packages ENV"
)
INSTALL = {"pipeline": _WITH_GSTREAMER, "camera": "pip install opencv-python-headless"}
"""How to install an OpenCV that reads a kind of source."""


def open_reader(place: Place, color: str) -> Reader:
    """Open a source. Raises InputError with the reason, as far as OpenCV says one."""
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")  # the lines of its libraries would lie beside the one message
    import cv2

    if place.kind == "pipeline":
        _check_pipeline(cv2, place)
    target: Any = place.address
    options: list[int] = []
    backend = cv2.CAP_ANY
    if place.kind == "camera" and sys.platform == "linux":
        target, backend = device_of(place), cv2.CAP_V4L2
    elif place.kind == "camera":
        target = int(target) if target.isdecimal() else target
    elif place.kind == "pipeline":
        backend = cv2.CAP_GSTREAMER
    elif place.kind == "url":
        backend, wait = cv2.CAP_FFMPEG, int(TIMEOUT * 1000)
        options = [cv2.CAP_PROP_OPEN_TIMEOUT_MSEC, wait, cv2.CAP_PROP_READ_TIMEOUT_MSEC, wait]
    level = cv2.utils.logging.getLogLevel()
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
    try:
        capture = cv2.VideoCapture(target, backend, options) if options else cv2.VideoCapture(target, backend)
    finally:
        cv2.utils.logging.setLogLevel(level)
    if not capture.isOpened():
        capture.release()
        raise InputError(_why_not_opened(place))
    return OpencvReader(place, color, capture)


class OpencvReader:
    """A source that OpenCV has opened: the `Reader` of it."""

    def __init__(self, place: Place, color: str, capture: Any) -> None:
        import cv2

        self._cv2, self._capture, self._place = cv2, capture, place
        self._code = cv2.COLOR_BGR2GRAY if color == "gray" else cv2.COLOR_BGR2RGB
        count = int(capture.get(cv2.CAP_PROP_FRAME_COUNT))
        self.is_live = place.is_live or (place.kind == "url" and count <= 0)
        self.count: int | None = count if count > 0 and not self.is_live else None
        rate = capture.get(cv2.CAP_PROP_FPS)
        self.rate: float | None = rate if 0 < rate < 1e4 else None

    def read(self, every: int) -> Iterator[Taken]:
        """Yield every ``every``-th frame with its time: that of the file, or of this machine's clock for a live source."""
        number, began = -1, 0.0
        while self._capture.grab():
            number += 1
            now = time.monotonic() if self.is_live else self._capture.get(self._cv2.CAP_PROP_POS_MSEC) / 1000
            began = began if number else now
            if number % every:
                continue
            # The next grab overwrites what is retrieved later, so this cannot wait for the frame to be taken.
            is_whole, pixels = self._capture.retrieve()
            yield Taken(number, now - began, functools.partial(self._converted, pixels) if is_whole else None)

    def close(self) -> None:
        """Close the source."""
        self._capture.release()

    def _converted(self, pixels: np.ndarray) -> np.ndarray:
        """Return RGB or grey of what OpenCV gives: BGR, unless a pipeline gives grey."""
        if (
            pixels.dtype != np.uint8
            or pixels.ndim not in (2, 3)
            or (pixels.ndim == 3 and pixels.shape[2] not in (1, 3))
        ):
            raise InputError(
                f"{self._place.name} gives frames of {pixels.dtype} {pixels.shape}: end it with "
                "! videoconvert ! video/x-raw,format=BGR ! appsink"
            )
        if pixels.ndim == 2 or pixels.shape[2] == 1:
            grey = pixels.reshape(pixels.shape[:2])
            made = (
                grey if self._code == self._cv2.COLOR_BGR2GRAY else self._cv2.cvtColor(grey, self._cv2.COLOR_GRAY2RGB)
            )
        else:
            made = self._cv2.cvtColor(pixels, self._code)
        return np.ascontiguousarray(made)


def _check_pipeline(cv2: Any, place: Place) -> None:
    """Raise InputError for a pipeline that OpenCV cannot run or that gives this program nothing."""
    if not cv2.videoio_registry.hasBackend(cv2.CAP_GSTREAMER):
        raise InputError(f"this OpenCV ({cv2.__version__}) cannot run GStreamer pipelines. {_WITH_GSTREAMER}")
    if "appsink" not in place.address:
        raise InputError(
            "the pipeline has no appsink, from which frames are taken: end it with "
            "! videoconvert ! video/x-raw,format=BGR ! appsink"
        )


def _why_not_opened(place: Place) -> str:
    if place.kind == "pipeline":
        return (
            f"GStreamer cannot run the pipeline: gst-launch-1.0 {place.address.replace('appsink', 'fakesink')} says why"
        )
    if place.kind == "camera":
        return f"{place.name} cannot be opened by OpenCV: another program uses it, or it is no camera"
    if place.kind == "url":
        return (
            f"{place.name} cannot be opened, or did not answer within {TIMEOUT:.0f} s: look at the address, and whether "
            "this machine reaches it"
        )
    if not Path(place.address).stat().st_size:
        return f"{place.name} is no image, and no video that can be read: it is empty"
    return (
        f"{place.name} is no image, and no video that OpenCV can read: it is of another kind, damaged, or of a codec that "
        "PyAV may have: pip install av"
    )
