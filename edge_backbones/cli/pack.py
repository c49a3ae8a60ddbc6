"""``edge-backbones pack``: write a bundle with only what one device needs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from edge_backbones.bundle.reader import Bundle
from edge_backbones.cli import console
from edge_backbones.cli.shared import BundleArgument, DeviceOption, EngineOption, JsonFlag
from edge_backbones.deploy.pack import pack_bundle


def pack(
    bundle: BundleArgument,
    out: Annotated[
        Path, typer.Argument(help="The folder to write, or the file with --tar.", metavar="OUT", show_default=False)
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
        bool, typer.Option("--tar", help="Write one tar file, compressed if its name ends in .gz or .tgz.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing OUT.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Write a small bundle for one device: the engine that runs there, the manifest and the golden samples.

    By default the engine is the one that would run on this machine. The new bundle is not signed.

    Example: **edge-backbones pack resnet50.bundle robot.bundle**

    Example: **edge-backbones pack resnet50.bundle jetson.tar --graphs --tar**
    """
    before = sum(file.size for file in set(Bundle.open(bundle).manifest.files()))
    packed = pack_bundle(bundle, out, engine=engine, device=device, graphs=graphs, as_tar=tar, overwrite=overwrite)
    after = sum(file.size for file in set(packed.files()))
    if as_json:
        names = [one.name for one in packed.engines]
        console.print_json({"bundle": str(out), "engines": names, "bytes": after, "bytes_before": before})
        return
    held = [one.name for one in packed.engines] + [graph.file.path for graph in packed.graphs]
    console.out.print(f"wrote {out}: {after / 1e6:.1f} MB of {before / 1e6:.1f} MB, with {', '.join(held)}")
    if (bundle / "signature").is_dir():
        console.err.print(f"{out} is not signed: the signature of {bundle} is of all of it", soft_wrap=True)
