"""Read frames one by one from a video file, a camera, an address in the network, or a GStreamer pipeline.

PyAV reads them (``pip install av``); where it is missing, OpenCV does. GStreamer pipelines, and cameras of systems other than
Linux, are read by OpenCV alone.

A thread reads ahead. Of a file every frame is kept: the thread waits when two frames are ready. A camera does not wait:
of it only the newest frame is kept, and older ones that nobody took are dropped and counted.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import sys
import threading
import time
from collections import deque
from types import TracebackType
from typing import Literal, NamedTuple

import numpy as np

from edge_backbones.errors import InputError, MissingDependencyError, lack_told
from edge_backbones.images import opencv, pyav
from edge_backbones.images.places import TIMEOUT, Place, Reader, Taken, place_of

_AHEAD = 2  # decoded frames of a file that wait to be taken
_NAP = 0.1  # seconds between two looks at whether the reader or its user has stopped


class Frame(NamedTuple):
    """One frame of a source.

    Attributes:
        pixels: uint8 (height, width, 3) in the order RGB, or (height, width) for grey. The caller owns it.
        number: Which frame of the source it is, from 0. Frames that were left out, skipped or dropped are counted.
        seconds: Its time since the source's first frame.
    """

    pixels: np.ndarray
    number: int
    seconds: float


def frames(
    source: str | int | os.PathLike[str],
    *,
    every: int = 1,
    limit: int | None = None,
    color: Literal["rgb", "gray"] = "rgb",
) -> Frames:
    """Open a source and return an iterator over its frames.

    >>> with frames("clip.mp4", every=5) as source:                                              # doctest: +SKIP
    ...     for output in backbone.map(backbone.preprocess(frame.pixels) for frame in source):
    ...         ...

    Args:
        source: Path of a video file; number of a camera or the path of its device (``/dev/video0``); an address
            (``rtsp://...``); or a GStreamer pipeline that ends in ``appsink``.
        every: Give each ``every``-th frame.
        limit: Stop after so many frames.
        color: ``"rgb"``, or ``"gray"`` for frames of shape (height, width).

    Raises:
        InputError: The source cannot be read; the message says why.
        MissingDependencyError: Neither PyAV nor OpenCV is installed.
    """
    for name, value in (("every", every), ("limit", limit)):
        if value is not None and not (isinstance(value, int) and value >= 1):
            raise InputError(f"{name} must be a whole number, 1 or more, got {value!r}")
    if color not in ("rgb", "gray"):
        raise InputError(f"color must be 'rgb' or 'gray', got {color!r}")
    place = place_of(source)
    if place.kind in ("image", "folder"):
        raise InputError(
            f"{place.name} is {'a folder' if place.kind == 'folder' else 'an image'}: "
            "backbone.preprocess takes the paths of images"
        )
    return Frames(place, every, limit, color)


class Frames:
    """The frames of a source: an iterator that is closed at its end, by `close`, or as a context manager.

    Attributes:
        place: What the source is.
        is_live: Frames that come while nobody takes one are dropped.
        rate: Frames per second of the source; None if it does not say.
        count: Number of frames of the source, roughly; None if it does not say.
        skipped: Damaged frames that were left out so far.
        dropped: Frames of a live source that came too fast so far.
    """

    def __init__(self, place: Place, every: int, limit: int | None, color: str) -> None:
        self.place = place
        self.is_live = place.is_live
        self.rate: float | None = None
        self.count: int | None = None
        self.skipped = self.dropped = 0
        self._every, self._left, self._color = every, limit, color
        self._ready: deque[Taken | Frame] = deque()
        self._changed = threading.Condition()
        self._opened = self._ended = self._stopped = False
        self._error: BaseException | None = None
        # A daemon: a library that waits for a server that does not answer must not keep the program from ending.
        self._thread = threading.Thread(target=self._read, name="edge_backbones.frames", daemon=True)
        with lack_told("reading frames"):
            self._thread.start()
        try:
            with self._changed:
                while not (self._opened or self._ended):
                    self._changed.wait(_NAP)
        except BaseException:  # Ctrl-C
            self._stopped = True
            raise
        if not self._opened and self._error is not None:
            raise self._error

    def __iter__(self) -> Frames:
        return self

    def __next__(self) -> Frame:
        if self._left == 0:
            self.close()
        frame = self._next()
        if self._left is not None:
            self._left -= 1
        return frame

    def _next(self) -> Frame:
        patience = time.monotonic() + TIMEOUT + 2  # longer than the library's own: its message says more
        with self._changed:
            while not self._ready and not self._ended and not self._stopped:
                self._changed.wait(_NAP)
                if self.is_live and time.monotonic() > patience:
                    self._stopped = True
                    raise InputError(f"{self.place.name} has sent no frame for {TIMEOUT:.0f} s: is it still connected?")
            if self._stopped or not self._ready:
                error, self._error = self._error, None
                if self._stopped or error is None:
                    raise StopIteration
                raise error
            taken = self._ready.popleft()
            self._changed.notify_all()
        if isinstance(taken, Frame):
            return taken
        assert taken.make is not None  # damaged frames are counted by the thread
        return Frame(taken.make(), taken.number, taken.seconds)

    def stop(self) -> None:
        """End the iteration at the next frame. A signal handler may call it."""
        self._stopped = True

    def close(self) -> None:
        """Stop reading and close the source."""
        self._stopped = True
        with self._changed:
            self._changed.notify_all()
        if self._thread is not threading.current_thread():
            self._thread.join(1.0)

    def __enter__(self) -> Frames:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _read(self) -> None:
        """Read the source until it ends or nobody wants more: the thread."""
        try:
            with contextlib.closing(_open(self.place, self._color)) as reader:
                self.is_live, self.rate, self.count = reader.is_live, reader.rate, reader.count
                with self._changed:
                    self._opened = True
                    self._changed.notify_all()
                for taken in reader.read(self._every):
                    if not self._hand_over(taken):
                        break
        except BaseException as error:  # it is raised where the frames are taken
            self._error = error
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def _hand_over(self, taken: Taken) -> bool:
        """Make a frame ready to be taken; return whether more are wanted."""
        if taken.make is None:
            self.skipped += 1
            return not self._stopped
        # Pixels of a file are converted ahead. Those of a camera only when they are taken: most may be dropped.
        ready = taken if self.is_live else Frame(taken.make(), taken.number, taken.seconds)
        with self._changed:
            if self.is_live:
                self.dropped += len(self._ready)
                self._ready.clear()
            while len(self._ready) >= _AHEAD and not self._stopped:
                self._changed.wait(_NAP)
            self._ready.append(ready)
            self._changed.notify_all()
            return not self._stopped


def _open(place: Place, color: str) -> Reader:
    """Open a source with the library that reads it."""
    has_pyav, has_opencv = (importlib.util.find_spec(name) is not None for name in ("av", "cv2"))
    needs_opencv = place.kind == "pipeline" or (place.kind == "camera" and sys.platform != "linux")
    if has_pyav and not needs_opencv:
        return pyav.open_reader(place, color)
    if has_opencv:
        return opencv.open_reader(place, color)
    if needs_opencv:
        what = "a GStreamer pipeline" if place.kind == "pipeline" else f"a camera of {sys.platform}"
        raise MissingDependencyError(
            f"reading {what}", "video", fix=f"OpenCV reads it, and it is not installed: {opencv.INSTALL[place.kind]}"
        )
    raise MissingDependencyError(f"reading {place.name} as a video (PyAV is not installed)", "video")
