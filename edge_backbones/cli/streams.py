"""The frames of a video or a camera for ``edge-backbones run``: feature maps as they come, and a video of their pictures."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import shutil
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, TextIO

import numpy as np

from edge_backbones.cli import console
from edge_backbones.cli.map_files import save_maps, writing
from edge_backbones.errors import EdgeBackbonesError, InputError
from edge_backbones.images import video_file
from edge_backbones.images.decode import shown
from edge_backbones.images.sources import Frame, Frames, frames
from edge_backbones.runtime.backbone import EdgeBackbone

INDEX = "frames.jsonl"
"""The file in the folder that says the number and the time of each frame: one JSON object per line."""

_IN_FLIGHT = 2
_OURS = re.compile(r"frame_\d{8,}\.(npz|zarr)|frames\.jsonl")

# Of a frame at network size, its maps by stage and a title: a picture, or None if no stage has a place in the frame.
Draw = Callable[[np.ndarray, Mapping[str, np.ndarray], str], "np.ndarray | None"]


@dataclasses.dataclass
class Request:
    """What is written of the frames, and where.

    Attributes:
        source: What the user typed.
        is_file: It is the path of a video.
        out: Folder of the feature maps.
        format: "npz", "zarr", or "none" for no feature maps.
        video: File of the pictures; None for none.
        every: Run each Nth frame.
        limit: Stop after so many frames; None for all.
        overwrite: Replace what an earlier run wrote.
        title: The beginning of each picture's title.
    """

    source: str
    is_file: bool
    out: Path
    format: str
    video: Path | None
    every: int
    limit: int | None
    overwrite: bool
    title: str


@dataclasses.dataclass
class Summary:
    """What has been done so far. It is what ``--json`` prints."""

    source: str
    frames: int = 0
    skipped: int = 0
    dropped: int = 0
    seconds: float = 0.0
    frames_per_second: float = 0.0
    shapes: dict[str, list[int]] = dataclasses.field(default_factory=dict)
    first: str | None = None
    last: str | None = None
    index: str | None = None
    video: str | None = None
    interrupted: bool = False


def check_request(request: Request) -> None:
    """Raise InputError if files of an earlier run would be mixed with new ones, or a video cannot be written."""
    video = request.video
    if video is not None:
        video_file.check_name(video)
        if request.is_file and video.exists() and video.samefile(request.source):
            raise InputError(f"{video} is the source and would be overwritten: choose another file with --video")
        if video.exists() and not request.overwrite:
            raise InputError(f"{video} exists: choose another file with --video, or replace it with --overwrite")
    elif request.format == "none":
        raise InputError("--format none writes no feature maps and --video is not given: nothing would be written")
    earlier = 0 if request.format == "none" else len(_earlier(request.out))
    if earlier and not request.overwrite:
        raise InputError(
            f"{request.out} holds {earlier} files of an earlier run: choose another folder with --out, or replace them "
            "with --overwrite"
        )


def _earlier(folder: Path) -> list[Path]:
    """Return what an earlier run has written to a folder."""
    return [path for path in folder.iterdir() if _OURS.fullmatch(path.name)] if folder.is_dir() else []


def run_frames(
    request: Request,
    backbone: EdgeBackbone,
    as_input: Callable[[np.ndarray, str], np.ndarray],
    as_photograph: Callable[[np.ndarray], np.ndarray],
    draw: Draw,
    *,
    as_json: bool,
) -> None:
    """Run the frames of a source, write their maps and pictures as they come, and print a summary at the end.

    Ctrl-C ends it behind the frame at hand: everything is written whole, the summary is printed, and KeyboardInterrupt is
    raised. An error in the middle of the source ends it in the same way.

    Args:
        request: What to write.
        backbone: The opened backbone.
        as_input: Turns a frame and its colour ("rgb" or "gray") into the input of the backbone.
        as_photograph: Turns a frame into what the network sees, for the picture.
        draw: Draws a picture.
        as_json: Print the summary as JSON.
    """
    if backbone.input.channels not in (1, 3):
        raise InputError(
            f"a video has 3 channels, or 1 as grey, and this backbone takes {backbone.input.channels}: call it in Python"
        )
    color: Literal["rgb", "gray"] = "gray" if backbone.input.channels == 1 else "rgb"
    failed: EdgeBackbonesError | OSError | None = None
    with contextlib.ExitStack() as stack:
        progress = stack.enter_context(console.Steps(as_json, unit="frames"))
        if not request.is_file:
            progress("connecting", 0, None)
        source = stack.enter_context(frames(request.source, every=request.every, limit=request.limit, color=color))
        summary, began = Summary(source.place.name), time.monotonic()
        with _Stop(source) as stop, _Output(request, source) as output:
            waiting: deque[tuple[Frame, np.ndarray | None]] = deque()

            def inputs() -> Iterator[np.ndarray]:
                for frame in source:
                    waiting.append((frame, as_photograph(frame.pixels) if request.video else None))
                    yield as_input(frame.pixels, color)

            progress("running", 0, _total(source, request))
            try:
                for maps in backbone.map(inputs(), in_flight=_IN_FLIGHT):
                    frame, photograph = waiting.popleft()
                    by_stage = {s: m[0] for s, m in zip(backbone.out_features, maps.feature_maps, strict=True)}
                    if photograph is not None:
                        title = f"{request.title}: {source.place.name.rpartition('/')[2]}, {frame.seconds:.2f} s"
                        output.add_picture(draw(photograph, by_stage, title), frame)
                    output.add_maps(by_stage, frame)
                    summary.frames += 1
                    summary.shapes = summary.shapes or {s: list(m.shape) for s, m in by_stage.items()}
                    progress("running", summary.frames, _total(source, request))
            except (EdgeBackbonesError, OSError) as error:  # of the source, the engine or the disk
                failed = error
        progress("running", summary.frames, summary.frames)
        _finish(summary, source, output, began)
        summary.interrupted = stop.asked
    if failed is None and not summary.frames and not summary.interrupted:
        failed = InputError(_why_no_frames(source))
    if failed is None or (summary.frames and not as_json):
        _print(summary, as_json)
    if failed is not None:
        raise failed
    if summary.interrupted:
        raise KeyboardInterrupt


def _total(source: Frames, request: Request) -> int | None:
    """Return how many frames will be run, roughly; None for a source without an end."""
    count = None if source.count is None else -(-source.count // request.every)
    if request.limit is None:
        return count
    return request.limit if count is None else min(count, request.limit)


def _finish(summary: Summary, source: Frames, output: _Output, began: float) -> None:
    """Complete the summary once everything is written."""
    summary.skipped, summary.dropped = source.skipped, source.dropped
    summary.seconds = round(time.monotonic() - began, 3)
    summary.frames_per_second = round(summary.frames / max(summary.seconds, 1e-3), 2)
    summary.first, summary.last, summary.index, summary.video = output.first, output.last, output.index, output.video


def _why_no_frames(source: Frames) -> str:
    name = source.place.name
    if source.skipped:
        return f"{name}: none of its {source.skipped} frames decodes: it is damaged"
    return f"{name} has no frames: it is empty, or it ended at once"


def _print(summary: Summary, as_json: bool) -> None:
    """Print what was done: a document, or some lines."""
    if as_json:
        console.print_json(summary)
        return
    what = f"{summary.frames} frame{'s' * (summary.frames != 1)} in {summary.seconds:.1f} s"
    line = f"{summary.source}: {what} ({summary.frames_per_second:.1f} per second)"
    if summary.skipped:
        line += f"; {summary.skipped} damaged, skipped"
    if summary.dropped:
        line += f"; {summary.dropped} came too fast, dropped"
    console.out.print(line)
    if summary.first is not None:
        stages = ", ".join(f"{stage} {'x'.join(map(str, shape))}" for stage, shape in summary.shapes.items())
        span = summary.first if summary.first == summary.last else f"{summary.first} to {summary.last}"
        console.out.print(f"{span}: {stages}")
        console.out.print(f"{summary.index}: the number and the time of each frame")
    if summary.video is not None:
        console.out.print(f"{summary.video}: their pictures")


class _Stop:
    """Let Ctrl-C, or the SIGTERM of a service manager, end the loop over frames in good order. A second one ends it at once.

    As a context manager, in the main thread. ``asked``: there was one.
    """

    def __init__(self, source: Frames) -> None:
        self.asked = False
        self._source = source
        self._before: dict[signal.Signals, Any] = {}

    def _ask(self, *_: Any) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        self._source.stop()

    def __enter__(self) -> _Stop:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


class _Output:
    """The files that are written: a file or a folder per frame, the index, and the video."""

    def __init__(self, request: Request, source: Frames) -> None:
        self.first: str | None = None
        self.last: str | None = None
        self.index: str | None = None
        self.video: str | None = None
        self._request = request
        self._index: TextIO | None = None
        self._stack = contextlib.ExitStack()
        self._video: video_file.VideoFile | None = None
        if request.video is not None:
            rate = None if source.rate is None else source.rate / request.every
            self._video = video_file.VideoFile(request.video, rate)

    def __enter__(self) -> _Output:
        if self._video is not None:
            self._stack.enter_context(self._video)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)

    def add_maps(self, by_stage: Mapping[str, np.ndarray], frame: Frame) -> None:
        """Write the feature maps of a frame, then its line in the index."""
        if self._request.format == "none":
            return
        out = self._request.out
        with writing(out / INDEX):
            index = self._begun()
        path = out / f"frame_{frame.number:08}.{self._request.format}"
        save_maps(path, by_stage)
        entry = {"frame": frame.number, "seconds": round(frame.seconds, 6), "features": path.name}
        with writing(out / INDEX):
            index.write(json.dumps(entry) + "\n")
            index.flush()
        self.first, self.last = self.first or shown(path), shown(path)

    def _begun(self) -> TextIO:
        """Return the index. At the first frame, remove what an earlier run wrote, and begin it."""
        if self._index is None:
            out = self._request.out
            out.mkdir(parents=True, exist_ok=True)
            for path in _earlier(out):  # only now: a source that cannot be read must not cost them
                if path.is_dir():
                    shutil.rmtree(path)
                else:
                    path.unlink()
            self._index = self._stack.enter_context((out / INDEX).open("w", encoding="utf-8"))
            self.index = shown(out / INDEX)
        return self._index

    def add_picture(self, picture: np.ndarray | None, frame: Frame) -> None:
        """Add a picture to the video; raise InputError if there is none."""
        assert self._video is not None  # only then pictures are drawn
        if picture is None:
            raise InputError("--video draws maps, and no stage of this bundle has a place in the frame: leave it out")
        self._video.add(picture, frame.seconds)
        self.video = shown(self._video.path)
