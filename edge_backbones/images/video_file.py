"""Write pictures as a video file that players take, with PyAV."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from edge_backbones.errors import InputError, first_line, needing

# By suffix, the encoders that are tried. Not every build of FFmpeg has those of H.264, whose licences differ.
_ENCODERS = {
    ".mp4": ("libx264", "libopenh264", "mpeg4"),
    ".mov": ("libx264", "libopenh264", "mpeg4"),
    ".mkv": ("libx264", "libopenh264", "mpeg4"),
    ".webm": ("libvpx-vp9",),
}
_OPTIONS = {
    "libx264": {"preset": "veryfast", "crf": "20", "bf": "0"},  # a frame out of order would delay the first by some
    "libvpx-vp9": {"deadline": "realtime", "cpu-used": "8", "crf": "24", "b": "0", "row-mt": "1"},
    "mpeg4": {"q": "3", "flags": "qscale", "global_quality": str(3 * 118)},
}
_TICKS = 1000  # of the file's clock, in a second
_KEY_FRAMES = 50  # frames between two from which a player can begin


def check_name(path: Path) -> None:
    """Raise InputError if no video can be written to a file of this name, MissingDependencyError without PyAV."""
    if path.suffix.lower() not in _ENCODERS:
        kind = f"{path.suffix} is" if path.suffix else "a name without a suffix is"
        raise InputError(f"{path}: {kind} no kind of video that is written here: use one of {' '.join(_ENCODERS)}")
    with needing("writing video", "video"):
        import av
    _encoder(av, path)


def _encoder(av: Any, path: Path) -> str:
    """Return the first encoder for this kind of file that PyAV has; raise InputError if it has none."""
    tried = _ENCODERS[path.suffix.lower()]
    for name in tried:
        try:
            av.Codec(name, "w")
        except av.codec.codec.UnknownCodecError:
            continue
        return name
    raise InputError(
        f"{path}: this PyAV has no encoder for it (of {', '.join(tried)}): pip install --force-reinstall av"
    )


class VideoFile:
    """A video that is being written. It can be played once it is closed; what an mp4 holds can also be played before that.

    All pictures have the size of the first; others are resized. An odd row or column at the end is cut off.
    """

    def __init__(self, path: Path, rate: float | None) -> None:
        """``rate``: Pictures per second, roughly: the times of the pictures decide."""
        self.path, self._rate = path, rate or 25.0
        self._container: Any = None
        self._stream: Any = None
        self._last = -1
        self.count = 0

    def add(self, picture: np.ndarray, seconds: float) -> None:
        """Add a picture, uint8 (height, width, 3) in RGB, that is shown from ``seconds`` on."""
        import av

        try:
            if self._container is None:
                self._begin(av, picture.shape[0] // 2 * 2, picture.shape[1] // 2 * 2)
            stream = self._stream
            cut = np.ascontiguousarray(picture[: picture.shape[0] // 2 * 2, : picture.shape[1] // 2 * 2])
            frame = av.VideoFrame.from_ndarray(cut, format="rgb24").reformat(
                width=stream.width,
                height=stream.height,
                format="yuv420p",
                dst_colorspace="ITU709",
                dst_color_range="MPEG",
            )
            self._last = max(self._last + 1, round(seconds * _TICKS))  # times that do not grow are refused by players
            frame.pts, frame.time_base = self._last, Fraction(1, _TICKS)
            self._container.mux(stream.encode(frame))
        except av.FFmpegError as error:
            raise InputError(f"{self.path} cannot be written: {error.strerror or first_line(error)}") from error
        self.count += 1

    def _begin(self, av: Any, height: int, width: int) -> None:
        """Make the file, once the size of the pictures is known."""
        name = _encoder(av, self.path)
        # Fragments: what was written can be played even if the process is killed. At the end they become one usual file.
        options = (
            {"movflags": "+hybrid_fragmented", "flush_packets": "1"}
            if self.path.suffix.lower() in (".mp4", ".mov")
            else {}
        )
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._container = av.open(str(self.path), "w", options=options)
        stream = self._container.add_stream(
            name, rate=Fraction(self._rate).limit_denominator(1001), options=_OPTIONS.get(name, {})
        )
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.codec_context.time_base = Fraction(1, _TICKS)
        stream.codec_context.gop_size = _KEY_FRAMES
        stream.codec_context.color_range = 1  # of television
        stream.codec_context.colorspace = stream.codec_context.color_primaries = stream.codec_context.color_trc = (
            1  # BT.709
        )
        self._container.start_encoding()  # a file that cannot be written is refused here, not behind the first packet
        self._stream = stream

    def close(self) -> None:
        """Write what the encoder holds, and the index of the file."""
        container, self._container = self._container, None
        if container is None:
            return
        import av

        try:
            container.mux(self._stream.encode())
            container.close()
        except av.FFmpegError as error:
            raise InputError(f"{self.path} cannot be written: {error.strerror or first_line(error)}") from error

    def __enter__(self) -> VideoFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
