"""Small videos that tests make with PyAV: every frame has a grey level of its own, so each can be told from the others."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
import time
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

RED, GREEN, BLUE = (200, 30, 40), (30, 180, 60), (20, 40, 190)


def level(number: int) -> int:
    """The grey level of a frame, in its lower half."""
    return 40 + 5 * number


def picture(number: int, height: int = 48, width: int = 64) -> np.ndarray:
    """A frame: red on its upper left, blue on its upper right, below a grey level that tells its number."""
    pixels = np.empty((height, width, 3), np.uint8)
    pixels[: height // 2, : width // 2], pixels[: height // 2, width // 2 :] = RED, BLUE
    pixels[height // 2 :] = level(number)
    return pixels


def number_of(pixels: np.ndarray) -> int:
    """Which frame this is, by its grey level, which decoders give up to three levels too dark."""
    return round((float(pixels[pixels.shape[0] * 3 // 4, pixels.shape[1] // 2].mean()) - 38.5) / 5)


def make_video(
    path: Path,
    frames: int = 10,
    *,
    codec: str = "libx264",
    pixels: str = "yuv420p",
    rate: int = 10,
    colorspace: int = 1,
    color_range: int = 1,
    size: tuple[int, int] = (48, 64),
    format: str | None = None,
    start: int = 0,
    **options: str,
) -> Path:
    """Write a video of `picture`. ``colorspace`` and ``color_range``: numbers of FFmpeg, by default BT.709 of television."""
    with av.open(str(path), "w", format=format) as container:
        stream = container.add_stream(codec, rate=rate, options=options)
        stream.height, stream.width, stream.pix_fmt = *size, pixels
        is_rgb = pixels in ("gbrp10le", "bgr0", "rgb24")
        if not is_rgb:
            stream.codec_context.colorspace, stream.codec_context.color_range = colorspace, color_range
        for number in range(frames):
            frame = av.VideoFrame.from_ndarray(picture(number, *size))
            colours = {} if is_rgb else {"dst_colorspace": colorspace, "dst_color_range": color_range}
            frame = frame.reformat(format=pixels, **colours)
            frame.pts, frame.time_base = start * rate + number, Fraction(1, rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def turned(path: Path, matrix: tuple[int, int, int, int], to: Path) -> Path:
    """Copy an mp4 with another display matrix (a b, c d) in its track header, as a telephone that is held sideways writes."""
    data = bytearray(path.read_bytes())
    header = data.index(b"tkhd")
    at = header + 4 + 4 + 20 + 8 + 8  # version 0: version and flags, times and id, reserved, layer to volume
    a, b, c, d = (number << 16 for number in matrix)
    data[at : at + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    to.write_bytes(data)
    return to


@contextlib.contextmanager
def served(data: bytes, *, pieces: int = 1, pause: float = 0.0, hold: bool = False) -> Iterator[str]:
    """Send bytes to whoever connects, in pieces with a pause between them; yield the address.

    ``hold``: do not end the connection, so that the reader waits for more.
    """
    done = threading.Event()
    server = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        with contextlib.suppress(OSError):
            client, _ = server.accept()
            with client:
                size = -(-len(data) // pieces) or 1
                for begin in range(0, len(data), size):
                    client.sendall(data[begin : begin + size])
                    if done.wait(pause):
                        return
                if hold:
                    done.wait(60)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield f"tcp://127.0.0.1:{server.getsockname()[1]}"
    finally:
        done.set()
        server.close()
        thread.join(5)


def wait_for(condition, seconds: float = 30.0) -> None:
    """Wait until a condition holds; fail if it does not."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "what was waited for did not happen"
        time.sleep(0.01)
