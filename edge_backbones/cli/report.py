"""``edge-backbones report``: write the HTML page of a bundle."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from edge_backbones.bench.results import read
from edge_backbones.bundle.reader import Bundle
from edge_backbones.cli import console
from edge_backbones.cli.shared import BundleArgument, EngineOption, JsonFlag, check_output
from edge_backbones.report.page import write_report


def report(
    bundle: BundleArgument,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            metavar="FILE",
            help="The HTML file to write. By default BUNDLE.report.html, beside the bundle.",
            show_default=False,
        ),
    ] = None,
    bench_results: Annotated[
        list[Path] | None,
        typer.Option(
            "--bench",
            metavar="FILE",
            help="A file that `bench --out` wrote, to show. Repeat for several.",
            show_default=False,
        ),
    ] = None,
    engine: EngineOption = None,
    time_layers: Annotated[
        bool,
        typer.Option(
            "--time-layers", help="Run the engine some more on this machine, and show the time of each of its layers."
        ),
    ] = False,
    as_json: JsonFlag = False,
) -> None:
    """Write one HTML page about a bundle: is it good, is it fast, feature maps beside fp32, layers, ranges and origin.

    Example: **edge-backbones report resnet50.bundle --bench today.json**
    """
    if out is not None:
        check_output(out, "--out")
        Bundle.open(bundle)
        out.parent.mkdir(parents=True, exist_ok=True)
    comparisons = [read(file) for file in bench_results or ()]
    written = write_report(bundle, out, comparisons=comparisons, engine=engine, time_layers=time_layers)
    if as_json:
        console.print_json({"bundle": str(bundle), "report": str(written)})
        return
    console.out.print(f"wrote {written}")
