"""``edge-backbones stages``: what `build --out-indices` can keep of a network."""

from __future__ import annotations

from typing import Annotated

import typer

from edge_backbones.cli import console
from edge_backbones.cli.options import read_option
from edge_backbones.cli.shared import JsonFlag, ModelArgument, height_width
from edge_backbones.option import options_of
from edge_backbones.toolchain.options import BuildOptions
from edge_backbones.toolchain.stages import list_stages


def stages(
    model: ModelArgument,
    *,
    from_model: Annotated[
        bool, typer.Option("--from-model", help=options_of(BuildOptions)["from_model"][1].help)
    ] = False,
    size: Annotated[
        str | None,
        typer.Option(
            "--size",
            "-s",
            help="Height and width of the input: HxW, or one number for a square.",
            metavar="HxW",
            show_default=False,
        ),
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """List the stages of a network, for `build --out-indices`: names, channels, strides. Nothing is built.

    Example: **edge-backbones stages resnet50**
    """
    height, width = (None, None) if size is None else read_option("--size", height_width, size)
    with console.Steps(as_json) as progress:
        progress("loading libraries", 0, None)
        found = list_stages(model, BuildOptions(from_model=from_model, height=height, width=width))
    spec = found.spec
    rows = [
        {"index": index, "stage": name, "channels": channels, "stride": list(stride), "layout": layout}
        for index, (name, channels, stride, layout) in enumerate(
            zip(spec.out_features, spec.channels, spec.strides, spec.layouts, strict=True)
        )
    ]
    if as_json:
        size_of_input = {"height": found.height, "width": found.width}
        console.print_json({"model": model, "input": size_of_input, "default": found.default, "stages": rows})
        return
    table = console.Table(
        "index", "stage", "channels", "stride", "layout", title=f"{model} at {found.height} x {found.width}"
    )
    for row, (vertical, horizontal) in zip(rows, spec.strides, strict=True):
        stride = str(vertical) if vertical == horizontal else f"{vertical}x{horizontal}"
        table.add_row(str(row["index"]), str(row["stage"]), str(row["channels"]), stride, str(row["layout"]))
    console.out.print(table)
    last = spec.out_features[found.default]
    console.out.print(f"without --out-indices, build keeps the stage {last}")
