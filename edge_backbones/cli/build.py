"""``edge-backbones build``: make a bundle from a model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from edge_backbones.cli import completion, console
from edge_backbones.cli.options import Form, choice, read_option, several, takes, usage
from edge_backbones.cli.shared import (
    OUTPUT_PANEL,
    JsonFlag,
    ModelArgument,
    frame_size,
    height_width,
    integers,
    names,
    shape_range,
)
from edge_backbones.errors import EdgeBackbonesError, SourceError
from edge_backbones.progress import Progress
from edge_backbones.report.page import write_report
from edge_backbones.spec import Precision
from edge_backbones.toolchain.build import build_bundle
from edge_backbones.toolchain.early import check_weights
from edge_backbones.toolchain.options import BuildOptions


def _precisions(chosen: list[Any]) -> tuple[Precision, ...] | Literal["auto"]:
    """Return the precisions that were typed, each once, or ``auto``; raise ValueError for auto beside others."""
    values = [one.value for one in chosen]
    if "auto" not in values:
        return tuple(dict.fromkeys(map(Precision, values)))
    if len(values) > 1:
        raise ValueError("auto chooses among all: give it alone")
    return "auto"


def _weights(text: str) -> str:
    """Return what was typed; raise ValueError for random weights without a seed, which are wrong on every machine."""
    if text.partition(":")[0] == "random":
        try:
            check_weights(text)
        except SourceError as error:
            raise ValueError(str(error)) from None
    return text


@takes(
    BuildOptions,
    weights=Form(short="w", read=_weights, metavar="WEIGHTS"),
    image=Form(flag="image_processor", type=Path | None),
    out_indices=Form(type=str | None, read=integers, metavar="LIST"),
    out_features=Form(type=str | None, read=names, metavar="LIST"),
    frame=Form(type=str | None, read=frame_size, metavar="HxW"),
    batch=Form(short="b", type=str | None, read=shape_range, metavar="RANGE"),
    precisions=Form(flag="precision", short="p", type=several(choice("auto", *Precision)), read=_precisions),
    percentile=Form(metavar="PERCENT"),
    calibration=Form(metavar="FILE"),
    exclude=Form(metavar="LAYER"),
    profile=Form(type=str | None, metavar="DEVICE", complete=completion.device_profiles),
    flavours=Form(flag="flavour", short="f"),
)
def build(
    model: ModelArgument,
    bundle: Annotated[Path, typer.Argument(help="The bundle folder to write.", metavar="BUNDLE", show_default=False)],
    *,
    images: Annotated[
        Path | None,
        typer.Option(
            "--images",
            "-i",
            metavar="FOLDER",
            help="Photographs to calibrate int8 with and to verify every engine on: a folder, or an .npz file.",
            show_default=False,
        ),
    ] = None,
    given: dict[str, Any],
    size: Annotated[
        str | None,
        typer.Option(
            "--size",
            "-s",
            help="Height and width of the input: HxW, one number for a square, or a range HxW:HxW:HxW (smallest, usual, "
            "largest). By default what the network's preprocessing makes, else the network's own. Frames are resized to it.",
            metavar="HxW",
            show_default=False,
            rich_help_panel="Input",
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an existing bundle, once the new one is verified.")
    ] = False,
    page: Annotated[
        bool,
        typer.Option(
            "--report/--no-report",
            help="Write BUNDLE.report.html, a page about the bundle, beside the bundle.",
            rich_help_panel=OUTPUT_PANEL,
        ),
    ] = True,
    as_json: JsonFlag = False,
) -> None:
    """Build a bundle: load, fold, export, calibrate, compile, verify. Nothing is written unless every stage passes.

    Example: **edge-backbones build resnet50 resnet50.bundle --images photos/ --out-indices 1,2,3,4**
    """
    height, width = (None, None) if size is None else read_option("--size", height_width, size)
    with usage():
        options = BuildOptions(**given, height=height, width=width)
    with console.Steps(as_json) as progress:
        result = build_bundle(model, bundle, images=images, options=options, overwrite=overwrite, progress=progress)
        written = _page_of(bundle, progress) if page else None
    manifest = result.bundle.manifest
    if as_json:
        console.print_json(
            {
                "bundle": str(bundle),
                "report": None if written is None else str(written),
                "parity": result.reports,
                "skipped": result.skipped,
                "reasons": result.reasons,
                "preprocessing": manifest.preprocessing,
                "notes": result.notes,
                "decision": manifest.decision,
            }
        )
        return
    if result.skipped:
        console.print_skipped(result.reasons)
    console.print_parity([e.parity for e in manifest.engines], names=[e.name for e in manifest.engines])
    console.print_trials(manifest.decision)
    for note in (manifest.preprocessing, *result.notes):
        console.err.print(note)
    console.out.print(f"wrote {bundle}" + ("" if written is None else f" and {written}"))


def _page_of(bundle: Path, progress: Progress) -> Path | None:
    """Write the report of a finished bundle and return its path; say on stderr why if that fails, and return None."""
    progress("writing the report", 0, None)
    try:
        return write_report(bundle)
    except (EdgeBackbonesError, OSError) as error:
        console.err.print(f"the bundle is done, its report is not: {error}", soft_wrap=True)
        return None
