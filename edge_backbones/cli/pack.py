"""``edge-backbones pack``: write a bundle with only what one device needs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from edge_backbones.bundle.reader import Bundle
from edge_backbones.cli import console
from edge_backbones.cli.shared import BundleArgument, DeviceOption, EngineOption, JsonFlag
from edge_backbones.deploy.pack import is_tar, pack_bundle


def pack(
    bundle: BundleArgument,
    out: Annotated[
        Path,
        typer.Argument(help="The folder to write, or a .tar, .tar.gz or .tgz file.", metavar="OUT", show_default=False),
    ],
    *,
    engine: EngineOption = None,
    device: DeviceOption = "auto",
    graphs: Annotated[
        bool,
        typer.Option(
            "--graphs",
            help="Keep the ONNX graphs, so that `compile` works on the device. No engine is kept then, unless --engine or "
            "--device asks for it.",
        ),
    ] = False,
    tar: Annotated[
        bool, typer.Option("--tar", help="Write one tar file: the name of OUT has to be that of one.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing OUT.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Write a small bundle for one device: the engine that runs there, the manifest and the golden samples.

    By default the engine is the one that would run on this machine. The new bundle is not signed.

    Example: **edge-backbones pack resnet50.bundle robot.bundle**

    Example: **edge-backbones pack resnet50.bundle jetson.tar --graphs --tar**
    """
    if tar and not is_tar(out):
        raise typer.BadParameter(f"{out} is no name of a tar file: use {out}.tar, .tar.gz or .tgz", param_hint="--tar")
    is_signed = (bundle / "signature").is_dir()
    before = sum(file.size for file in set(Bundle.open(bundle).manifest.files()))
    packed = pack_bundle(bundle, out, engine=engine, device=device, graphs=graphs, overwrite=overwrite)
    after = sum(file.size for file in set(packed.files()))
    if as_json:
        names = [one.name for one in packed.engines]
        kept = {"engines": names, "graphs": [graph.file.path for graph in packed.graphs]}
        console.print_json({"bundle": str(out), **kept, "bytes": after, "bytes_before": before})
        return
    held = [one.name for one in packed.engines] + [graph.file.path for graph in packed.graphs]
    console.out.print(f"wrote {out}: {after / 1e6:.1f} MB of {before / 1e6:.1f} MB, with {', '.join(held)}")
    if is_signed:
        console.err.print(f"{out} is not signed: the signature of {bundle} is of all of it", soft_wrap=True)
