"""Take frames from a GStreamer pipeline, and give pictures of their feature maps to another one.

Needs a bundle, the extras `cpu` and `report`, and GStreamer. Its bindings belong to the Python of the distribution:

    sudo apt install python3-venv python3-gi python3-gst-1.0 gir1.2-gst-plugins-base-1.0 gstreamer1.0-plugins-good
    /usr/bin/python3 -m venv --system-site-packages ENV

Both pipelines are texts, as of gst-launch-1.0. The first ends where the frames are, the second begins with the pictures:

    python examples/gstreamer.py samples/features.bundle "v4l2src" "autovideosink"
    python examples/gstreamer.py samples/features.bundle "rtspsrc location=rtsp://camera/1 ! decodebin" "autovideosink"
    python examples/gstreamer.py samples/features.bundle "filesrc location=samples/clip.mp4 ! decodebin" \
        "video/x-raw,format=I420 ! x264enc ! mp4mux ! filesink location=maps.mp4" --every-frame

Only the newest frame is taken, so the program never lags behind a camera; `--every-frame` takes all of a recording. A
picture has the timestamp of its frame. Ctrl-C ends the second pipeline too, so that a file is complete.
"""

import argparse
import ctypes
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from edge_backbones import Bundle, EdgeBackbone, EdgeBackbonesError, fit
from edge_backbones.images.fit import seen_by_network
from edge_backbones.pictures import as_map, draw_frame

# gi loads GStreamer, and with it libunwind, for all libraries that are loaded later. Exceptions in C++ would go to the
# functions of libunwind and end the process, so those of GCC, which have the same names, come first.
if sys.platform == "linux":
    ctypes.CDLL("libgcc_s.so.1", ctypes.RTLD_GLOBAL)
try:
    import gi

    gi.require_version("Gst", "1.0")
    gi.require_version("GstApp", "1.0")
    gi.require_version("GstVideo", "1.0")
    from gi.repository import GLib, Gst, GstApp, GstVideo  # noqa: F401  # GstApp gives appsink and appsrc their methods
except (ImportError, ValueError) as missing:
    sys.exit(
        f"{sys.executable} cannot use GStreamer ({missing}): apt install python3-gi python3-gst-1.0 "
        "gir1.2-gst-plugins-base-1.0 gstreamer1.0-plugins-good, and make the environment with "
        "/usr/bin/python3 -m venv --system-site-packages"
    )

FORMATS = {"rgb": "RGB", "bgr": "BGR", "gray": "GRAY8", "nv12": "NV12", "yuyv": "YUY2"}
RANGES = {"16-235": "limited", "0-255": "full"}
POLL = 100 * Gst.MSECOND  # how long a call into GStreamer waits: Python sees Ctrl-C between two calls


class PipelineError(Exception):
    """A pipeline cannot be used; the text is one line."""


# ---- frames ---------------------------------------------------------------------------------------------------------


def color_of(backbone: EdgeBackbone) -> str:
    """Return the colour format in which a bundle wants frames, as `EdgeBackbone.preprocess` calls it."""
    if backbone.input.frame is not None:
        return backbone.input.frame.color
    return "gray" if backbone.input.channels == 1 else "rgb"


def check_caps(caps: Any, backbone: EdgeBackbone) -> Any:
    """Return the GstVideoInfo of frames; raise PipelineError if a bundle that takes whole frames takes other ones."""
    info, frame = GstVideo.VideoInfo.new_from_caps(caps), backbone.input.frame
    if frame is None:
        return info
    if (info.height, info.width) != (frame.height, frame.width):
        raise PipelineError(
            f"the pipeline delivers frames of {info.height}x{info.width}, and this bundle takes {frame}: end the "
            f"pipeline in ! videoscale ! video/x-raw,width={frame.width},height={frame.height}"
        )
    matrix, range = info.colorimetry.matrix.value_nick, RANGES.get(info.colorimetry.range.value_nick)
    is_known = frame.color in ("nv12", "yuyv") and matrix in ("bt601", "bt709") and range is not None
    if is_known and (matrix, range) != (frame.matrix, frame.range):
        wanted = ("1:" if frame.range == "full" else "2:") + ("3:5:1" if frame.matrix == "bt709" else "4:16:4")
        raise PipelineError(
            f"the pipeline delivers colours of {matrix}, {range} range, and this bundle takes {frame}: end the "
            f"pipeline in ! videoconvert ! video/x-raw,format={FORMATS[frame.color]},colorimetry={wanted}"
        )
    return info


@contextmanager
def pixels_of(buffer: Any, info: Any) -> Iterator[np.ndarray]:
    """Map a buffer, and give its frame as uint8 (rows, columns, bytes of a pixel). The array dies with the block.

    It shares the memory of the buffer: rows lie at the pitch that the buffer's GstVideoMeta says, or at that of the caps.
    """
    meta = GstVideo.buffer_get_video_meta(buffer)
    offset, stride = (info.offset, info.stride) if meta is None else (meta.offset, meta.stride)
    mapped, memory = buffer.map(Gst.MapFlags.READ)
    if not mapped:
        raise PipelineError(
            "GStreamer cannot map a frame: its memory is not the CPU's, end the pipeline in ! videoconvert"
        )
    try:
        size = {"YUY2": 2, "RGB": 3, "BGR": 3}.get(info.finfo.name, 1)

        def plane(index: int, rows: int) -> np.ndarray:
            shape, strides = (rows, info.width, size), (stride[index], size, 1)
            return np.ndarray(shape, np.uint8, memory.data, offset[index], strides)

        if info.finfo.name != "NV12":
            yield plane(0, info.height)
        elif stride[1] == stride[0] and offset[1] == offset[0] + info.height * stride[0]:
            yield plane(0, info.height * 3 // 2)
        else:  # U and V do not follow the luma: the one case in which a frame is copied
            yield np.concatenate([plane(0, info.height), plane(1, info.height // 2)])
    finally:
        buffer.unmap(memory)


# ---- pictures -------------------------------------------------------------------------------------------------------


class Painter:
    """Draws the maps of frames beside what the network saw. Colours mean the same in all pictures."""

    def __init__(self, bundle: Path, backbone: EdgeBackbone) -> None:
        self.backbone, self.config, self.views = backbone, Bundle.open(bundle).manifest.image, {}

    def draw(self, frame: np.ndarray, maps: tuple[np.ndarray, ...], title: str) -> np.ndarray:
        """Return the picture of a frame and its maps, uint8 RGB."""
        backbone, size = self.backbone, (self.backbone.input.height.opt, self.backbone.input.width.opt)
        if backbone.input.frame is None:
            photograph = fit(frame, self.config, *size)
        else:
            photograph = seen_by_network(frame[None], self.config, backbone.input)[0]
        described = zip(backbone.out_features, maps, backbone.layouts, backbone.strides)
        drawn = {
            stage: as_map(m[0], layout, (size[0] // stride[0], size[1] // stride[1]))
            for stage, m, layout, stride in described
        }
        with_place = {stage: m for stage, m in drawn.items() if m is not None}
        return draw_frame(photograph, with_place, title=title, views=self.views)


# ---- pipelines ------------------------------------------------------------------------------------------------------


def parse(text: str) -> Any:
    """Return the pipeline of a text; raise PipelineError with GStreamer's own reason."""
    try:
        return Gst.parse_launch(text)
    except GLib.Error as error:
        raise PipelineError(f"GStreamer cannot make a pipeline of {text!r}: {error.message}") from None


def raise_error(pipeline: Any) -> None:
    """Raise PipelineError if the pipeline has posted an error: the element's name, its message, and the cause."""
    message = pipeline.get_bus().pop_filtered(Gst.MessageType.ERROR)
    if message is not None:
        error, debug = message.parse_error()
        cause = (debug or "").strip().splitlines()[-1:]
        raise PipelineError(f"{message.src.get_name()}: {' '.join([error.message, *(f'({why})' for why in cause)])}")


def start(pipeline: Any) -> None:
    if pipeline.set_state(Gst.State.PLAYING) == Gst.StateChangeReturn.FAILURE:
        raise_error(pipeline)
        raise PipelineError(f"{pipeline.get_name()} does not start, and GStreamer does not say why: set GST_DEBUG=3")


class Frames:
    """The frames at the end of a pipeline, as samples of GStreamer."""

    def __init__(self, text: str, color: str, *, every_frame: bool = False) -> None:
        takes = "max-buffers=4 sync=false" if every_frame else "max-buffers=1 drop=true"
        caps = f"video/x-raw,format={FORMATS[color]}"
        self.pipeline = parse(f"{text} ! videoconvert ! appsink name=frames caps={caps} {takes}")
        self._sink = self.pipeline.get_by_name("frames")

    def __iter__(self) -> Iterator[Any]:
        start(self.pipeline)
        while True:
            sample = self._sink.try_pull_sample(POLL)
            if sample is not None:
                yield sample
                continue
            raise_error(self.pipeline)
            if self._sink.is_eos():
                return

    def close(self) -> None:
        """Stop the pipeline."""
        self.pipeline.set_state(Gst.State.NULL)


class Pictures:
    """The beginning of a pipeline that takes pictures. It starts with the first one, on the clock of the frames."""

    def __init__(self, text: str, latency_ms: int) -> None:
        source = f"appsrc name=pictures format=time is-live=true block=true min-latency={latency_ms * Gst.MSECOND}"
        self.pipeline, self._is_running = parse(f"{source} ! videoconvert ! {text}"), False
        self._source = self.pipeline.get_by_name("pictures")

    def push(self, picture: np.ndarray, frame: Any, frames: Any) -> None:
        """Push a picture, uint8 RGB, with the timestamp of the buffer ``frame`` of the pipeline ``frames``."""
        if not self._is_running:
            self._start(picture, frames)
        height, width, _ = picture.shape
        rows = np.zeros((height, -(-width * 3 // 4) * 4), np.uint8)  # GStreamer's rows of RGB begin at multiples of 4
        rows[:, : width * 3] = picture.reshape(height, -1)
        buffer = Gst.Buffer.new_wrapped(rows.tobytes())
        buffer.pts, buffer.duration = frame.pts, frame.duration
        pushed = self._source.emit("push-buffer", buffer)
        try:
            raise_error(self.pipeline)
            if pushed != Gst.FlowReturn.OK:
                raise PipelineError(f"the pipeline of the pictures takes no more of them ({pushed.value_nick})")
        except PipelineError:
            self._is_running = False  # and nothing will come out at its end
            raise

    def _start(self, picture: np.ndarray, frames: Any) -> None:
        height, width, _ = picture.shape
        caps = f"video/x-raw,format=RGB,width={width},height={height},framerate=0/1"
        self._source.set_property("caps", Gst.Caps.from_string(caps))
        self._source.set_property("max-bytes", 2 * picture.nbytes)
        self.pipeline.use_clock(frames.get_clock())
        self.pipeline.set_start_time(Gst.CLOCK_TIME_NONE)
        self.pipeline.set_base_time(frames.get_base_time())
        start(self.pipeline)
        self._is_running = True

    def close(self, *, within_s: float = 10) -> None:
        """End the pipeline, so that a file is complete; raise PipelineError if it does not end in time."""
        if self._is_running:
            self._source.emit("end-of-stream")
            last = time.monotonic() + within_s
            while self.pipeline.get_bus().timed_pop_filtered(POLL, Gst.MessageType.EOS) is None:
                raise_error(self.pipeline)
                if time.monotonic() > last:
                    raise PipelineError(f"the pipeline of the pictures did not end within {within_s:.0f} s")

    def stop(self) -> None:
        """Stop the pipeline, whatever it holds."""
        self.pipeline.set_state(Gst.State.NULL)


def run(arguments: argparse.Namespace, backbone: EdgeBackbone) -> int:
    """Run both pipelines until the frames end; return their number."""
    color, count, caps, info = color_of(backbone), 0, None, None
    painter = Painter(arguments.bundle, backbone)
    frames = Frames(arguments.source, color, every_frame=arguments.every_frame)
    pictures = None
    try:
        pictures = Pictures(arguments.sink, arguments.latency)
        for sample in frames:
            buffer = sample.get_buffer()
            if caps is None or not sample.get_caps().is_equal(caps):  # frames may change their size
                caps = sample.get_caps()
                info = check_caps(caps, backbone)
            has_time = buffer.pts != Gst.CLOCK_TIME_NONE
            with pixels_of(buffer, info) as frame:
                maps = backbone(backbone.preprocess(frame, color=color)).feature_maps
                title = f"{buffer.pts / Gst.SECOND:.2f} s" if has_time else f"frame {count}"
                picture = painter.draw(frame, maps, title)
            if arguments.maps is not None:
                name = f"{buffer.pts:015d}.npz" if has_time else f"frame_{count:08d}.npz"
                np.savez(arguments.maps / name, **dict(zip(backbone.out_features, maps)))
            pictures.push(picture, buffer, frames.pipeline)
            count += 1
    finally:
        frames.close()
        if pictures is not None:
            try:
                pictures.close()
            finally:
                pictures.stop()
    if not count:
        raise PipelineError("the pipeline ended without a frame: run it with gst-launch-1.0 to see why")
    return count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("source", help="the pipeline that ends in frames")
    parser.add_argument("sink", help="the pipeline that begins with pictures")
    parser.add_argument("--every-frame", action="store_true", help="take every frame, for recordings")
    parser.add_argument("--maps", type=Path, help="also write an .npz file per frame here, named by its time in ns")
    parser.add_argument("--latency", type=int, default=200, help="ms after which a frame's picture is shown")
    arguments = parser.parse_args()

    Gst.init(None)
    try:
        if arguments.maps is not None:
            arguments.maps.mkdir(parents=True, exist_ok=True)
        with EdgeBackbone.from_pretrained(arguments.bundle) as backbone:
            print(f"{run(arguments, backbone)} frames")
    except KeyboardInterrupt:
        sys.exit(130)
    except (PipelineError, EdgeBackbonesError, OSError) as error:
        sys.exit(f"{parser.prog}: {error}")


if __name__ == "__main__":
    main()
