"""``edge-backbones run``: the feature maps of photographs, videos and cameras, as arrays and as pictures."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import typer

from edge_backbones.bundle.reader import Bundle
from edge_backbones.cli import console, streams
from edge_backbones.cli.map_files import require_format, save_maps, writing
from edge_backbones.cli.shared import (
    OUTPUT_PANEL,
    AllowHostCode,
    BundleArgument,
    DeviceOption,
    EngineOption,
    JsonFlag,
    ThreadsOption,
    check_output,
)
from edge_backbones.errors import InputError
from edge_backbones.images.decode import decode, grouped, list_images, open_image, shown, why_no_images
from edge_backbones.images.fit import fit, image_to_input, seen_by_network, to_input
from edge_backbones.images.places import place_of
from edge_backbones.pictures import View, as_map, draw_feature_maps, draw_frame
from edge_backbones.runtime.backbone import EdgeBackbone
from edge_backbones.runtime.preprocess import prepare

FRAMES_PANEL = "Frames"


def run(
    bundle: BundleArgument,
    source: Annotated[
        str,
        typer.Argument(
            help="An image, a folder of images, a video file, a camera (0 or /dev/video0), an address "
            "(rtsp://...), or a GStreamer pipeline in quotes that ends in appsink.",
            metavar="SOURCE",
            show_default=False,
        ),
    ],
    out: Annotated[
        Path,
        typer.Option(
            "--out",
            "-o",
            metavar="FOLDER",
            help="The folder to write to: IMAGE.npz and IMAGE.png for each image, frame_NUMBER.npz for each frame.",
        ),
    ] = Path("features"),
    engine: EngineOption = None,
    device: DeviceOption = "auto",
    threads: ThreadsOption = None,
    every: Annotated[
        int,
        typer.Option("--every", metavar="N", min=1, help="Take each Nth frame or image.", rich_help_panel=FRAMES_PANEL),
    ] = 1,
    limit: Annotated[
        int | None,
        typer.Option(
            "--max",
            metavar="N",
            min=1,
            help="Stop after N frames or images. All by default.",
            show_default=False,
            rich_help_panel=FRAMES_PANEL,
        ),
    ] = None,
    format: Annotated[
        Literal["npz", "zarr", "none"],
        typer.Option(
            "--format",
            metavar="FORMAT",
            help="How feature maps are written for each image or frame: npz, a file; zarr, a folder; none, not at all.",
            rich_help_panel=OUTPUT_PANEL,
        ),
    ] = "npz",
    picture: Annotated[
        bool, typer.Option(help="Draw the feature maps of each image as a picture too.", rich_help_panel=OUTPUT_PANEL)
    ] = True,
    video: Annotated[
        Path | None,
        typer.Option(
            "--video",
            metavar="FILE",
            help="Draw the feature maps of the frames as a video: .mp4, .mov, .mkv or .webm.",
            show_default=False,
            rich_help_panel=OUTPUT_PANEL,
        ),
    ] = None,
    overwrite: Annotated[
        bool,
        typer.Option(
            "--overwrite", help="Replace the frames and the video of an earlier run.", rich_help_panel=OUTPUT_PANEL
        ),
    ] = False,
    as_json: JsonFlag = False,
    allow_host_code: AllowHostCode = False,
) -> None:
    """Compute the feature maps of photographs, of a video or of a camera: one array per stage for each image or frame.

    An image gets a picture of its maps too. Frames get a video of such pictures with `--video`. Files of a folder that cannot
    be decoded are skipped, with the reason; so are damaged frames. A video keeps every frame. Of a camera or a stream, frames
    that come too fast are dropped. Ctrl-C ends a stream in good order.

    Example: **edge-backbones run resnet50.bundle photo.jpg --out features/**

    Example: **edge-backbones run resnet50.bundle clip.mp4 --every 5 --video maps.mp4**

    Example: **edge-backbones run resnet50.bundle 0 --max 100**
    """
    check_output(out, "--out", folder=True)
    opened = Bundle.open(bundle)
    require_format(format)
    place = place_of(source)
    is_stream = place.kind not in ("image", "folder")
    request = streams.Request(source, place.kind == "video", out, format, video, every, limit, overwrite, bundle.name)
    if is_stream:
        if video is not None:
            check_output(video, "--video")
        streams.check_request(request)
        files, targets = [], []
    else:
        _refuse_for_images(place.name, place.kind, video, format, picture)
        path = Path(source)
        files = _image_files(path)
        targets = _feature_files(files, path if path.is_dir() else path.parent, out, format)
        files, targets = files[::every], targets[::every]
    if opened.manifest.source.not_repeated:
        warning = (
            f"these maps are not what the network gives after its own processor: {opened.manifest.source.not_repeated}"
        )
        console.err.print(warning, soft_wrap=True)
    with EdgeBackbone.from_pretrained(
        bundle, engine=engine, device=device, threads=threads, allow_host_code=allow_host_code
    ) as backbone:
        maker = _Maker(opened, backbone, bundle.name, threads)
        if is_stream:
            streams.run_frames(request, backbone, maker.as_input, maker.as_photograph, maker.picture, as_json=as_json)
            return
        written, reasons = _run_images(files, targets, maker, request, picture=picture, as_json=as_json)
    _print_images(Path(source), written, reasons, as_json=as_json)


class _Maker:
    """Turns images and frames into the input of an opened bundle, and its maps into pictures."""

    def __init__(self, opened: Bundle, backbone: EdgeBackbone, name: str, threads: int | None) -> None:
        self.backbone, self.name = backbone, name
        self._config = opened.manifest.image
        self._is_repeated = not opened.manifest.source.not_repeated
        self._threads = threads
        self._views: dict[str, View] = {}

    def as_input(self, frame: np.ndarray, color: str) -> np.ndarray:
        """Return the input of the backbone for a frame: uint8 (height, width, 3), or (height, width) for grey."""
        if self._is_repeated:
            return self.backbone.preprocess(frame, color=color)  # type: ignore[arg-type]
        # `preprocess` refuses, and asks for a processor. The user was warned instead.
        return prepare(frame, self._config, self.backbone.input, color=color, threads=self._threads)

    def as_photograph(self, image: Any) -> np.ndarray:
        """Return an image or a frame as the network sees it: uint8 (height, width, channels)."""
        return self.input_and_photograph(image)[1]

    def input_and_photograph(self, image: Any) -> tuple[np.ndarray, np.ndarray]:
        """Return the input of the backbone for an image, a batch of one, and what the network sees of it."""
        config, input = self._config, self.backbone.input
        if input.frame is not None:  # the graph fits it
            frame = image_to_input(image, config, input)[None]
            return frame, seen_by_network(frame, config, input)[0]
        photograph = fit(image, config, input.height.opt, input.width.opt)
        return to_input(photograph[None], config, input), photograph

    def picture(self, photograph: np.ndarray, by_stage: Mapping[str, np.ndarray], title: str) -> np.ndarray | None:
        """Return the picture of a frame's maps as an array; None if no stage has a place in the frame.

        Colours mean the same in all pictures.
        """
        drawable = _drawable(photograph, by_stage, self.backbone)
        return draw_frame(photograph, drawable, title=title, views=self._views) if drawable else None


def _refuse_for_images(name: str, kind: str, video: Path | None, format: str, picture: bool) -> None:
    """Raise InputError for options that make no sense for images."""
    if video is not None:
        what = "a folder" if kind == "folder" else "an image"
        raise InputError(f"--video is for a video or a camera, and {name} is {what}: leave it out")
    if format == "none" and not picture:
        raise InputError("--format none and --no-picture leave nothing to write: leave one out")


def _run_images(
    files: list[Path],
    targets: list[tuple[Path, Path]],
    maker: _Maker,
    request: streams.Request,
    *,
    picture: bool,
    as_json: bool,
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Run image files; return an entry for each that was written, and the reasons against the others of a folder."""
    is_folder = Path(request.source).is_dir()
    written: list[dict[str, Any]] = []
    reasons: dict[str, str] = {}
    total = len(files) if request.limit is None else min(len(files), request.limit)
    with console.Steps(as_json) as progress:
        for file, (features, drawing) in zip(files, targets, strict=True):
            if len(written) == total:
                break
            progress("running", len(written), total)
            try:  # `decode` leaves the name of the file to the summary of a folder, `open_image` has it in its message
                image = (decode if is_folder else open_image)(file, maker.backbone.input.channels)
            except InputError as error:
                if not is_folder:
                    raise
                reasons[shown(file)] = str(error)
                continue
            given, photograph = maker.input_and_photograph(image)
            maps = maker.backbone(given).feature_maps
            by_stage = {stage: m[0] for stage, m in zip(maker.backbone.out_features, maps, strict=True)}
            with writing(features):
                features.parent.mkdir(parents=True, exist_ok=True)
            if request.format != "none":
                save_maps(features, by_stage)
            if picture:
                title = f"{maker.name}: {shown(Path(file.name))}"
                _draw(drawing, photograph, by_stage, maker.backbone, title)
            shapes = {stage: list(m.shape) for stage, m in by_stage.items()}
            features_file = None if request.format == "none" else shown(features)
            written.append({"image": shown(file), "features": features_file, "shapes": shapes})
        progress("running", total, total)
    return written, reasons


def _print_images(source: Path, written: list[dict[str, Any]], reasons: dict[str, str], *, as_json: bool) -> None:
    """Print what was written and what was skipped; raise InputError if nothing was written."""
    if not written:
        raise InputError(f"{shown(source)}: none of its {len(reasons)} files is read: {'; '.join(grouped(reasons))}")
    if as_json:
        console.print_json([*written, *({"image": name, "skipped": reason} for name, reason in reasons.items())])
        return
    if reasons:
        console.print_skipped(reasons)
    for entry in written:
        stages = ", ".join(f"{stage} {'x'.join(map(str, shape))}" for stage, shape in entry["shapes"].items())
        console.out.print(f"{entry['features'] or entry['image']}: {stages}")


def _image_files(source: Path) -> list[Path]:
    """Return the image files that ``source`` names; raise InputError if there are none."""
    files = list_images(source) if source.is_dir() else [source]
    if not files:
        raise InputError(why_no_images(source))
    return files


def _feature_files(files: list[Path], root: Path, out: Path, format: str = "npz") -> list[tuple[Path, Path]]:
    """Return where the feature maps and the picture of each image go; raise InputError if that would overwrite an image.

    The features of a.jpg go to a.npz and its picture to a.png. Where a folder holds a.png too, they go to a.jpg.npz and
    a.jpg.png.
    """
    stems = Counter(file.with_suffix("") for file in files)
    targets = []
    for file in files:
        base = out / file.relative_to(root)
        base = base.with_suffix("") if stems[file.with_suffix("")] == 1 else base
        targets.append(
            (base.with_name(f"{base.name}.{'npz' if format == 'none' else format}"), base.with_name(base.name + ".png"))
        )
    images = {file.resolve() for file in files}
    lost = [path for pair in targets for path in pair if path.resolve() in images]
    if lost:
        raise InputError(f"{lost[0]} is one of the images and would be overwritten: choose another folder with --out")
    return targets


def _draw(
    path: Path, photograph: np.ndarray, by_stage: Mapping[str, np.ndarray], backbone: EdgeBackbone, title: str
) -> None:
    """Draw the feature maps of one image beside it; write nothing if no stage has a place in the image."""
    drawable = _drawable(photograph, by_stage, backbone)
    if drawable:
        with writing(path):
            draw_feature_maps(path, photograph, drawable, title=title)


def _drawable(
    photograph: np.ndarray, by_stage: Mapping[str, np.ndarray], backbone: EdgeBackbone
) -> dict[str, np.ndarray]:
    """Return the maps that have a place in the image, each as (channels, height, width)."""
    height, width, _ = photograph.shape
    drawable = {}
    for (stage, output), layout, stride in zip(by_stage.items(), backbone.layouts, backbone.strides, strict=True):
        drawn = as_map(output, layout, (height // stride[0], width // stride[1]))
        if drawn is not None:
            drawable[stage] = drawn
    return drawable
