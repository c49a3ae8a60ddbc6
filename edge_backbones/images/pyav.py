"""Read frames with PyAV: files of every kind, cameras of Linux, and addresses in the network."""

from __future__ import annotations

import functools
import struct
import time
from collections.abc import Iterator
from typing import Any

import numpy as np

from edge_backbones.errors import InputError, first_line, needing
from edge_backbones.images.places import TIMEOUT, Place, Reader, Taken, device_of

_MOST_FAILURES = 100  # errors of a file in a row, after which the rest of it is given up

_MOST_PREDICTED = 300  # frames behind a damaged one that are left out: some cameras never send key frames
_NO_VIDEO = frozenset({"tty", "bin", "adf", "idf", "xbin"})  # FFmpeg paints texts as pictures of a terminal


def open_reader(place: Place, color: str) -> Reader:
    """Open a video file, a camera of Linux or an address. Raises InputError with the reason."""
    with needing("reading video", "video"):
        import av
    began = time.monotonic()
    try:
        return PyavReader(place, color, _opened(av, place))
    except av.FFmpegError as error:
        raise InputError(_why_not_opened(place, error, time.monotonic() - began)) from error


def _opened(av: Any, place: Place) -> Any:
    """Return the container of a source."""
    if place.kind == "camera":
        device = device_of(place)
        if not any("v4l2" in name.split(",") for name in av.formats_available):
            raise InputError(
                "this PyAV is built without cameras (v4l2): pip install opencv-python-headless, without PyAV"
            )
        return av.open(device, format="v4l2", metadata_errors="ignore")
    if place.kind == "url":
        # UDP loses packets of large frames, so TCP comes first.
        options = {"rtsp_flags": "prefer_tcp"} if place.address.lower().startswith("rtsp") else {}
        return av.open(place.address, options=options, timeout=(TIMEOUT, TIMEOUT), metadata_errors="ignore")
    # With a scheme, because a colon in a name would look like one.
    return av.open(f"file:{place.address}", metadata_errors="ignore")


class PyavReader:
    """A source that PyAV has opened: the `Reader` of it."""

    def __init__(self, place: Place, color: str, container: Any) -> None:
        self._place, self._container = place, container
        self._format = "gray" if color == "gray" else "rgb24"
        self._began: float | None = None
        try:
            self._stream = self._video_stream()
        except BaseException:
            container.close()
            raise
        stream, duration = self._stream, container.duration
        self.is_live = place.is_live or (place.kind == "url" and duration is None)
        self.rate = float(rate) if (rate := stream.average_rate or stream.guessed_rate) else None
        self.count: int | None = stream.frames or None
        if self.count is None and duration and self.rate and not self.is_live:
            self.count = round(duration / 1e6 * self.rate)
        # Threads with a frame each are faster, but a live frame would wait for those behind it.
        stream.thread_type = "SLICE" if self.is_live else "AUTO"
        from av.video.reformatter import VideoReformatter

        self._reformatter = VideoReformatter()

    def _video_stream(self) -> Any:
        """Return the video stream to read; raise InputError if there is none."""
        name, streams = self._place.name, self._container.streams
        if self._container.format.name in _NO_VIDEO:
            raise InputError(f"{name} is no image, and no video that can be read: it is a text")
        found = streams.best("video")
        is_cover = found is not None and "attached_pic" in (found.disposition.name or "")
        if found is None or is_cover:
            kinds = sorted({stream.type for stream in streams if stream is not found})
            raise InputError(
                f"{name} has no video{', only ' + ' and '.join(kinds) if kinds else ''}: pass another file"
            )
        if found.codec_context is None:
            raise InputError(
                f"{name} has video of a codec that this PyAV cannot decode: convert it to H.264 with ffmpeg"
            )
        return found

    def read(self, every: int) -> Iterator[Taken]:
        """Yield every ``every``-th frame with its time, and all that are damaged.

        The decoder marks only the frame whose data is damaged. Those that are predicted from it, up to the next key frame,
        show the damage too.
        """
        distrusted = 0
        for number, frame in enumerate(self._decoded()):
            if frame is None or frame.is_corrupt:
                distrusted = _MOST_PREDICTED
            elif frame.key_frame:
                distrusted = 0
            if distrusted:
                distrusted -= 1
                yield Taken(number, 0.0, None)
                continue
            seconds = self._seconds(number, frame.time)
            if number % every == 0:
                yield Taken(number, seconds, functools.partial(self._pixels, frame))

    def close(self) -> None:
        """Close the source."""
        self._container.close()

    def _seconds(self, number: int, time_of_frame: float | None) -> float:
        """Return the time since the first frame; by the rate if the source has no clock."""
        if time_of_frame is None:
            return number / (self.rate or 25.0)
        if self._began is None:
            self._began = time_of_frame
        return time_of_frame - self._began

    def _decoded(self) -> Iterator[Any]:
        """Yield the frames in the order that they are shown in, and None in the place of data that does not decode."""
        import av

        failures, packets = 0, self._container.demux(self._stream)
        while True:
            waiting = time.monotonic()
            try:
                packet = next(packets)
            except (StopIteration, av.EOFError):
                return
            except av.FFmpegError as error:
                failures += 1
                if self.is_live or failures > _MOST_FAILURES or not isinstance(error, av.InvalidDataError):
                    raise InputError(_why_it_ended(self._place, error, time.monotonic() - waiting)) from error
                packets = self._container.demux(self._stream)  # the one that failed is at its end
                continue
            failures = 0
            try:
                decoded = packet.decode()
            except av.EOFError:
                return
            except av.FFmpegError:
                yield None
                continue
            yield from decoded

    def _pixels(self, frame: Any) -> np.ndarray:
        """Convert a frame with its own colour matrix and range, and turn it upright."""
        try:
            converted = self._reformatter.reformat(frame, format=self._format, threads=1).to_ndarray()
        except Exception as error:  # FFmpeg's own errors, and ValueError for formats that PyAV makes no array of
            raise InputError(
                f"{self._place.name} has pixels of the format {frame.format.name}, which do not convert to {self._format} "
                f"({first_line(error)}): convert it to H.264 with ffmpeg"
            ) from error
        matrix = frame.side_data.get("DISPLAYMATRIX")
        return converted if matrix is None else upright(converted, struct.unpack("<9i", bytes(matrix)))


def upright(pixels: np.ndarray, matrix: tuple[int, ...]) -> np.ndarray:
    """Turn and mirror pixels as a display matrix says, by quarters of a turn: telephones write video as the sensor sees it.

    ``matrix``: nine numbers by rows; (x, y) of the picture is shown at (x m[0] + y m[3], x m[1] + y m[4]).
    """
    right, down = matrix[0], matrix[4]
    if abs(matrix[1]) > abs(matrix[0]):
        pixels = pixels.swapaxes(0, 1)
        right, down = matrix[3], matrix[1]
    if right < 0:
        pixels = pixels[:, ::-1]
    if down < 0:
        pixels = pixels[::-1]
    return np.ascontiguousarray(pixels)


def _why_not_opened(place: Place, error: Any, seconds: float) -> str:
    """Return a message for what FFmpeg raised, whose own text names neither the reason nor the fix."""
    import av

    name, said = place.name, error.strerror or first_line(error)
    if place.kind == "url":
        if isinstance(error, av.ExitError) or seconds >= TIMEOUT:
            return f"{name} did not answer within {TIMEOUT:.0f} s: look at the address, and whether this machine reaches it"
        if isinstance(error, av.HTTPUnauthorizedError):
            return f"{name} wants a user and a password: {name.partition('://')[0]}://USER:PASSWORD@..."
        if isinstance(error, av.ProtocolNotFoundError):
            return f"{name}: this PyAV knows no {name.partition('://')[0]}://, use rtsp, rtmp, http, udp or tcp"
        return f"{name} cannot be opened ({said}): look at the address, and whether the server runs"
    if place.kind == "camera":
        busy = isinstance(error, OSError) and error.errno == 16
        why = "another program uses it: end that one" if busy else "is it a camera? ls /dev/v4l/by-id lists them"
        return f"{name} cannot be opened ({said}): {why}"
    if isinstance(error, (av.InvalidDataError, av.EOFError)):
        return (
            f"{name} is no image, and no video that can be read ({said}): it is of another kind, damaged, or a recording "
            "that was cut off"
        )
    return f"{name} cannot be read: {said}"


def _why_it_ended(place: Place, error: Any, seconds: float) -> str:
    import av

    if isinstance(error, av.ExitError) or (place.is_live and seconds >= TIMEOUT):
        return f"{place.name} has sent nothing for {TIMEOUT:.0f} s: it is gone, or the network is"
    return f"{place.name} cannot be read further: {error.strerror or first_line(error)}"
