"""``edge-backbones export-deepstream``: write what DeepStream's nvinfer needs to run a plan of a bundle."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from edge_backbones.cli import console
from edge_backbones.cli.shared import BundleArgument, EngineOption, JsonFlag
from edge_backbones.integrations.deepstream import export_deepstream


def export(
    bundle: BundleArgument,
    folder: Annotated[Path, typer.Argument(help="The folder to write.", metavar="FOLDER", show_default=False)],
    *,
    engine: EngineOption = None,
    unique_id: Annotated[
        int,
        typer.Option("--unique-id", metavar="N", min=0, help="The id of this nvinfer's metadata in the pipeline."),
    ] = 1,
    one_std: Annotated[
        bool,
        typer.Option(
            "--one-std",
            help="Normalise with the mean of the channels' standard deviations if they differ: nvinfer has one factor for "
            "all channels.",
        ),
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what an earlier export wrote.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Write the TensorRT plan of a bundle and config_infer.txt, the configuration of DeepStream's Gst-nvinfer.

    nvinfer attaches every feature map to its frames, as tensor metadata. What it does otherwise than the network's own
    preprocessing is printed; a bundle that it cannot prepare frames for is refused.

    Example: **edge-backbones export-deepstream resnet50.bundle deepstream**
    """
    written = export_deepstream(
        bundle, folder, engine=engine, unique_id=unique_id, one_std=one_std, overwrite=overwrite
    )
    if as_json:
        files = {"config": str(written.config), "plan": str(written.plan)}
        console.print_json({**files, "engine": written.engine, "notes": list(written.notes)})
        return
    console.out.print(f"wrote {written.config} and {written.plan.name}", soft_wrap=True)
    for note in written.notes:
        console.err.print(note, soft_wrap=True)
