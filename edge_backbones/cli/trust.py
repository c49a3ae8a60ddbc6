"""``edge-backbones sign``: sign a bundle."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from edge_backbones.bundle import signing
from edge_backbones.cli import console
from edge_backbones.cli.options import usage
from edge_backbones.cli.shared import SIGSTORE_PANEL, BundleArgument, JsonFlag, SigstoreConfig


def sign(
    bundle: BundleArgument,
    key: Annotated[
        Path | None,
        typer.Option(
            "--key",
            "-k",
            metavar="FILE",
            help="The private key to sign with: a PEM file, ECDSA on P-256, P-384 or P-521.",
            show_default=False,
        ),
    ] = None,
    passphrase_file: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="A file whose first line is the key's passphrase. Without it a terminal is asked.",
            show_default=False,
        ),
    ] = None,
    certificate: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE",
            help="The certificate of the key. Repeat for the certificates between it and the root.",
            show_default=False,
        ),
    ] = None,
    sigstore: Annotated[
        bool,
        typer.Option(
            "--sigstore",
            help="Sign with an OpenID login instead of a key. The signature goes to Sigstore's public log.",
            rich_help_panel=SIGSTORE_PANEL,
        ),
    ] = False,
    sigstore_config: SigstoreConfig = None,
    as_json: JsonFlag = False,
) -> None:
    """Sign a bundle with OpenSSF Model Signing, after checking its files. Engines that a device adds later do not break it.

    Example: **edge-backbones sign resnet50.bundle --key private.pem**, and on the device **edge-backbones verify
    resnet50.bundle --key public.pem**.

    Make the keys with **openssl ecparam -name prime256v1 -genkey -noout -out private.pem** and **openssl ec -in private.pem
    -pubout -out public.pem**.
    """
    if sigstore_config is not None and not sigstore:
        raise typer.BadParameter(
            f"{sigstore_config} is for --sigstore: add it, or leave this out", param_hint="--sigstore-config"
        )
    with usage():
        signing.check_signer(key=key, sigstore=sigstore, of_a_key=bool(passphrase_file or certificate))
    passphrase = None
    if passphrase_file is not None:
        passphrase = signing.read_passphrase(passphrase_file)
    elif key is not None and sys.stdin.isatty() and signing.has_passphrase(key):
        passphrase = typer.prompt(f"passphrase of {key}", hide_input=True, err=True).encode()
    signer = signing.sign_bundle(
        bundle,
        key=key,
        passphrase=passphrase,
        certificates=certificate or (),
        sigstore=sigstore,
        trust_config=sigstore_config,
    )
    if as_json:
        console.print_json({"bundle": str(bundle), "signature": str(bundle / signing.SIGNATURE), "signer": signer})
        return
    console.out.print(f"signed {bundle} with {signer}: {bundle / signing.SIGNATURE}")
