"""``edge-backbones verify``: check a bundle's signature and files, and measure the parity of its engines again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from edge_backbones.bundle.reader import Bundle
from edge_backbones.bundle.trust import SigstoreIdentity
from edge_backbones.cli import console
from edge_backbones.cli.shared import (
    SIGSTORE_PANEL,
    AllowHostCode,
    BundleArgument,
    DeviceOption,
    EngineOption,
    InProcess,
    JsonFlag,
    SigstoreConfig,
)
from edge_backbones.deploy import verify as deploy
from edge_backbones.errors import visible
from edge_backbones.parity_report import ParityError

_EXPLANATION = "Why a gate fails"


def verify(
    bundle: BundleArgument,
    engine: EngineOption = None,
    device: DeviceOption = "auto",
    key: Annotated[
        list[Path] | None,
        typer.Option(
            "--key",
            "-k",
            metavar="FILE",
            help="Refuse a bundle that is not signed by this public key (PEM) or under this certificate. Repeat for several, "
            "or give a folder of them: one is enough.",
            show_default=False,
        ),
    ] = None,
    sigstore_identity: Annotated[
        str | None,
        typer.Option(
            metavar="WHO",
            help="Refuse a bundle that this e-mail address or workflow did not sign. Needs --sigstore-issuer.",
            show_default=False,
            rich_help_panel=SIGSTORE_PANEL,
        ),
    ] = None,
    sigstore_issuer: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="Who vouches for that identity, such as https://accounts.google.com.",
            show_default=False,
            rich_help_panel=SIGSTORE_PANEL,
        ),
    ] = None,
    sigstore_config: SigstoreConfig = None,
    explain: Annotated[
        bool,
        typer.Option(
            "--explain",
            help="If a gate fails: find the layer in which the error begins, and draw it.",
            rich_help_panel=_EXPLANATION,
        ),
    ] = False,
    picture: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Where --explain writes its picture. By default explanation.png.",
            show_default=False,
            rich_help_panel=_EXPLANATION,
        ),
    ] = None,
    allow_host_code: AllowHostCode = False,
    in_process: InProcess = False,
    as_json: JsonFlag = False,
) -> None:
    """Check the signature if one is asked for, then every file of a bundle, then measure the parity of its engines again.

    The engines run in the real runtime. One that was compiled ahead of time for this GPU is measured for the first time, and
    may run from then on.

    Example: **edge-backbones verify resnet50.bundle --engine int8**
    """
    if picture is not None and not explain:
        raise typer.BadParameter(
            f"{picture} is what --explain draws: add --explain, or leave it out", param_hint="--picture"
        )
    Bundle.open(bundle)  # what is no bundle is refused before a process is started
    identity = _identity(sigstore_identity, sigstore_issuer, sigstore_config)
    try:
        with console.Steps(as_json, aloud="passing ") as progress:
            reports = deploy.verify_bundle(
                bundle,
                engine=engine,
                device=device,
                allow_host_code=allow_host_code,
                trusted=key or None,
                sigstore=identity,
                in_process=in_process,
                progress=progress,
            )
    except ParityError as error:
        if not explain:
            raise
        _explain(
            bundle, engine, device, picture or Path("explanation.png"), error, as_json=as_json, in_process=in_process
        )
        raise typer.Exit(console.EXIT_PARITY) from None
    if as_json:
        console.print_json({"bundle": str(bundle), "parity": reports})
        return
    console.print_parity(reports)
    if explain:
        console.out.print("every feature map is inside its gate: there is nothing to explain")
    console.out.print(f"{bundle} is whole and right" + (", and signed as asked" if key or identity else ""))


def _identity(identity: str | None, issuer: str | None, config: Path | None) -> SigstoreIdentity | None:
    """Return who must have signed with Sigstore, None if nobody is asked for; half of an identity is a usage error."""
    if (identity is None) != (issuer is None) or (config and identity is None):
        raise typer.BadParameter(
            "Sigstore's signatures are of somebody, by an issuer: pass --sigstore-identity and --sigstore-issuer"
        )
    return None if identity is None or issuer is None else SigstoreIdentity(identity, issuer, config)


def _explain(
    bundle: Path,
    engine: str | None,
    device: str,
    picture: Path,
    error: ParityError,
    *,
    as_json: bool,
    in_process: bool,
) -> None:
    """Find where the error of each failing engine begins; print it with the reports and draw one picture per engine."""
    from edge_backbones.pictures import draw_layers
    from edge_backbones.toolchain.explain_bundle import explain_bundle

    with console.Steps(as_json) as progress:
        found = explain_bundle(bundle, engine=engine, device=device, in_process=in_process, progress=progress)
    drawn = [one for one in found if one.layers]
    files = [picture if len(drawn) == 1 else picture.with_stem(f"{picture.stem}.{one.precision}") for one in drawn]
    for one, file in zip(drawn, files, strict=True):
        layers = [(layer.name, layer.sqnr_db) for layer in one.layers]
        title = f"{bundle.name}, {one.precision}: {one.stage} is outside its gate; {one.cause}, {one.origin}"
        draw_layers(file, layers, origin=one.origin, limit_db=one.limit_db, title=title)
    if as_json:
        document = {"parity": error.reports, "explanations": found, "pictures": [str(file) for file in files]}
        console.print_json({"error": type(error).__name__, "message": str(error), **document})
        return
    console.print_parity(error.reports)
    for one in found:
        table = console.Table("layer" if one.cause == "engine" else "block alone", title=one.stage)
        table.add_column("SQNR dB", justify="right")
        for layer in one.layers:
            style = "red" if layer.name == one.origin else ""
            table.add_row(Text(visible(layer.name), style=style), Text(f"{layer.sqnr_db:.1f}", style=style))
        console.out.print(table)
        console.out.print(one.sentence)
    for file in files:
        console.out.print(f"drew {file}")
