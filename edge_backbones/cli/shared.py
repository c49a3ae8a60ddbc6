"""Flags that several commands share, and how the texts of options are read."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from edge_backbones.cli import completion
from edge_backbones.cli.options import completing
from edge_backbones.errors import InputError
from edge_backbones.machine.devices import parse_device
from edge_backbones.reading import why_not_made
from edge_backbones.spec import ShapeRange


def check_device(name: str) -> str:
    """Refuse a name of no device."""
    try:
        parse_device(name)
    except InputError as error:
        gpu = re.fullmatch(r"(?:gpu|nvidia|cuda)?:?([0-9]{0,3})", name.lower())
        advice = f". A GPU is called cuda: --device cuda{gpu[1] and ':' + gpu[1]}" if gpu and name else ""
        raise typer.BadParameter(f"{error}{advice}") from None
    return name


OUTPUT_PANEL = "Output"
RARE_PANEL = "Rarely needed"
JsonFlag = Annotated[
    bool,
    typer.Option(
        "--json", "-j", help="Write one JSON document to stdout and nothing else.", rich_help_panel=OUTPUT_PANEL
    ),
]
ModelArgument = Annotated[
    str,
    typer.Argument(
        help="What to build: a timm name (resnet50, resnet50.a1_in1k), a hub id (microsoft/resnet-50), a folder that "
        "save_pretrained wrote, or a config.json of transformers.",
        metavar="MODEL",
        autocompletion=completion.models,
        show_default=False,
    ),
]
BundleArgument = Annotated[Path, typer.Argument(help="A bundle folder.", metavar="BUNDLE", show_default=False)]
EngineOption = Annotated[
    str | None,
    typer.Option(
        "--engine",
        "-e",
        metavar="NAME",
        autocompletion=completion.engines,
        help="Which engine to use: a precision (int8), a flavour (openvino), or the name of one engine or the beginning of "
        "it. By default the best one that runs here.",
        show_default=False,
    ),
]
DeviceOption = Annotated[
    str,
    typer.Option(
        "--device",
        "-d",
        callback=check_device,
        metavar="DEVICE",
        autocompletion=completing("auto", "cpu", "cuda"),
        help="The device: cpu, cuda or cuda:1. auto: the first GPU if something here is for it, else the CPU.",
    ),
]
ThreadsOption = Annotated[
    int | None,
    typer.Option(
        "--threads",
        "-t",
        metavar="N",
        min=1,
        help="The most CPU threads to use. By default as many as this process may use: containers' limits count.",
        show_default=False,
    ),
]
AllowHostCode = Annotated[
    bool,
    typer.Option(
        "--allow-host-code",
        help="Allow code of the bundle to run: a TorchScript program, or the runtime inside a version-compatible plan. Only "
        "for a bundle that you trust as you trust a program.",
        rich_help_panel=RARE_PANEL,
    ),
]
InProcess = Annotated[
    bool,
    typer.Option(
        "--in-process",
        help="Stay in this process, for a debugger. By default a child process does the work, so that a crash of an engine "
        "library is reported.",
        rich_help_panel=RARE_PANEL,
    ),
]

SIGSTORE_PANEL = "Sigstore"
SigstoreConfig = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="The client trust configuration (JSON) of a Sigstore of your own, instead of the public one.",
        show_default=False,
        rich_help_panel=SIGSTORE_PANEL,
    ),
]


def check_output(path: Path, option: str, *, folder: bool = False) -> None:
    """Raise InputError if a file (or a folder) cannot be written to ``path``, before minutes are spent on its content."""
    if path.exists() and path.is_dir() != folder:
        kind, other = ("folder", "file") if folder else ("file", "folder")
        raise InputError(f"{path} is a {other}: {option} takes a {kind}")
    if why := why_not_made(path / "file" if folder else path):
        raise InputError(f"{path} cannot be written ({why}): choose another place with {option}")


def integers(text: str) -> tuple[int, ...]:
    """Read a list of integers such as 1,2,3; raise ValueError for anything else."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"{text!r} is not a list of integers such as 1,2,3") from None


def names(text: str) -> tuple[str, ...]:
    """Read a list of names such as layer1,layer4."""
    return tuple(name.strip() for name in text.split(","))


def shape_range(text: str) -> ShapeRange:
    """Read one size, or three as MIN:OPT:MAX; raise ValueError for anything else."""
    try:
        parts = [int(part) for part in text.split(":")]
        if len(parts) not in (1, 3):
            raise ValueError("one number, or three as MIN:OPT:MAX")
        return ShapeRange(min=parts[0], opt=parts[len(parts) // 2], max=parts[-1])
    except ValueError as error:
        raise ValueError(f"{text!r} is not a size or MIN:OPT:MAX: {error}") from None


def height_width(text: str) -> tuple[ShapeRange, ShapeRange]:
    """Read HxW, or HxW:HxW:HxW as min:opt:max, a number for a square; raise ValueError for anything else."""
    pairs = [part.lower().split("x") for part in text.split(":")]
    pairs = [pair * 2 if len(pair) == 1 else pair for pair in pairs]
    if any(len(pair) != 2 or not "".join(pair).isdecimal() for pair in pairs):
        raise ValueError(f"{text!r} is not HxW, one number for a square, or a range such as HxW:HxW:HxW")
    heights, widths = (":".join(pair[axis] for pair in pairs) for axis in (0, 1))
    return shape_range(heights), shape_range(widths)


def frame_size(text: str) -> tuple[int, int]:
    """Read the HxW of a camera's frames; raise ValueError for anything else."""
    height, width = height_width(text)
    if not (height.is_fixed and width.is_fixed) or "x" not in text.lower():
        raise ValueError(f"{text!r} is not one size HxW, as 1080x1920: build a bundle for each size of frames")
    return height.opt, width.opt
