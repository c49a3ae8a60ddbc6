"""``edge-backbones run``: the feature maps of photographs, as arrays and as pictures."""

from __future__ import annotations

import zipfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from edge_backbones.bundle.reader import Bundle
from edge_backbones.cli import console
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
from edge_backbones.images.fit import fit, to_input
from edge_backbones.pictures import as_map, draw_feature_maps
from edge_backbones.runtime.backbone import EdgeBackbone


def run(
    bundle: BundleArgument,
    source: Annotated[
        Path, typer.Argument(help="An image, or a folder of images.", metavar="IMAGES", show_default=False)
    ],
    out: Annotated[
        Path,
        typer.Option(
            "--out", "-o", metavar="FOLDER", help="The folder to write to: IMAGE.npz and IMAGE.png for each image."
        ),
    ] = Path("features"),
    engine: EngineOption = None,
    device: DeviceOption = "auto",
    allow_host_code: AllowHostCode = False,
    threads: ThreadsOption = None,
    picture: Annotated[
        bool, typer.Option(help="Draw the feature maps as a picture too.", rich_help_panel=OUTPUT_PANEL)
    ] = True,
    as_json: JsonFlag = False,
) -> None:
    """Compute the feature maps of photographs: for each an .npz file with one array per stage, and a picture of them.

    Files of a folder that cannot be decoded are skipped, with the reason.

    Example: **edge-backbones run resnet50.bundle photo.jpg --out features/**
    """
    check_output(out, "--out", folder=True)
    opened = Bundle.open(bundle)
    is_folder = source.is_dir()
    files = _image_files(source)
    targets = _feature_files(files, source if is_folder else source.parent, out)
    image_config = opened.manifest.image
    if opened.manifest.source.not_repeated:
        warning = (
            f"these maps are not what the network gives after its own processor: {opened.manifest.source.not_repeated}"
        )
        console.err.print(warning, soft_wrap=True)
    written: list[dict[str, Any]] = []
    reasons: dict[str, str] = {}
    with (
        EdgeBackbone.from_pretrained(
            bundle, engine=engine, device=device, threads=threads, allow_host_code=allow_host_code
        ) as backbone,
        console.Steps(as_json) as progress,
    ):
        height, width = backbone.input.height.opt, backbone.input.width.opt
        for done, (file, (features, drawing)) in enumerate(zip(files, targets, strict=True)):
            progress("running", done, len(files))
            try:  # `decode` leaves the name of the file to the summary of a folder, `open_image` has it in its message
                image = (decode if is_folder else open_image)(file, backbone.input.channels)
            except InputError as error:
                if not is_folder:
                    raise
                reasons[shown(file)] = str(error)
                continue
            photograph = fit(image, image_config, height, width)
            maps = backbone(to_input(photograph[None], image_config, backbone.input)).feature_maps
            by_stage = {stage: m[0] for stage, m in zip(backbone.out_features, maps, strict=True)}
            features.parent.mkdir(parents=True, exist_ok=True)
            save_maps(features, by_stage)
            if picture:
                title = f"{bundle.name}: {shown(Path(file.name))}"
                _draw(drawing, photograph, by_stage, backbone, title)
            shapes = {stage: list(m.shape) for stage, m in by_stage.items()}
            written.append({"image": shown(file), "features": shown(features), "shapes": shapes})
        progress("running", len(files), len(files))
    if not written:
        raise InputError(f"{shown(source)}: none of its {len(reasons)} files is read: {'; '.join(grouped(reasons))}")
    if as_json:
        console.print_json([*written, *({"image": name, "skipped": reason} for name, reason in reasons.items())])
        return
    if reasons:
        console.print_skipped(reasons)
    for entry in written:
        stages = ", ".join(f"{stage} {'x'.join(map(str, shape))}" for stage, shape in entry["shapes"].items())
        console.out.print(f"{entry['features']}: {stages}")


def _image_files(source: Path) -> list[Path]:
    """Return the image files that ``source`` names; raise InputError if there are none."""
    if not source.exists():
        raise InputError(f"{source} does not exist")
    files = list_images(source) if source.is_dir() else [source]
    if not files:
        raise InputError(why_no_images(source))
    return files


def _feature_files(files: list[Path], root: Path, out: Path) -> list[tuple[Path, Path]]:
    """Return where the feature maps and the picture of each image go; raise InputError if that would overwrite an image.

    The features of a.jpg go to a.npz and its picture to a.png. Where a folder holds a.png too, they go to a.jpg.npz and
    a.jpg.png.
    """
    stems = Counter(file.with_suffix("") for file in files)
    targets = []
    for file in files:
        base = out / file.relative_to(root)
        base = base.with_suffix("") if stems[file.with_suffix("")] == 1 else base
        targets.append((base.with_name(base.name + ".npz"), base.with_name(base.name + ".png")))
    images = {file.resolve() for file in files}
    lost = [path for pair in targets for path in pair if path.resolve() in images]
    if lost:
        raise InputError(f"{lost[0]} is one of the images and would be overwritten: choose another folder with --out")
    return targets


def save_maps(path: Path, maps: Mapping[str, np.ndarray]) -> None:
    """Write an .npz file with one array per stage.

    numpy.savez cannot be used: stages may have the names of its own arguments, ``file`` and ``allow_pickle``.
    """
    with zipfile.ZipFile(path, "w") as archive:
        for stage, feature_map in maps.items():
            with archive.open(f"{stage}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, feature_map, allow_pickle=False)


def _draw(
    path: Path, photograph: np.ndarray, by_stage: Mapping[str, np.ndarray], backbone: EdgeBackbone, title: str
) -> None:
    """Draw the feature maps of one image beside it; write nothing if no stage has a place in the image."""
    height, width, _ = photograph.shape
    drawable = {}
    for (stage, output), layout, stride in zip(by_stage.items(), backbone.layouts, backbone.strides, strict=True):
        drawn = as_map(output, layout, (height // stride[0], width // stride[1]))
        if drawn is not None:
            drawable[stage] = drawn
    if drawable:
        draw_feature_maps(path, photograph, drawable, title=title)
