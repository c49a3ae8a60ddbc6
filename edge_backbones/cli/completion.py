"""What the Tab key offers for the values of options. Nothing heavy is imported, and nothing is raised: a shell waits."""

from __future__ import annotations

import typer

from edge_backbones.bundle.reader import Bundle
from edge_backbones.engines import registry
from edge_backbones.errors import EdgeBackbonesError
from edge_backbones.machine import profiles
from edge_backbones.toolchain.sources import names


def _bundle(ctx: typer.Context) -> Bundle | None:
    """Return the bundle that was typed already; None if none was, or what was typed is none."""
    # Click reads no arguments where the value of the last option is missing, which is the case here: it leaves them over.
    path = ctx.params.get("bundle") or next(iter(ctx.args), None)
    try:
        return None if path is None else Bundle.open(path)
    except (EdgeBackbonesError, OSError):
        return None


def engines(ctx: typer.Context, incomplete: str) -> list[str]:
    """Offer the precisions, the flavours and the names of the engines of the bundle that was typed."""
    bundle = _bundle(ctx)
    if bundle is None:
        return []
    keys = [engine.key for engine in bundle.manifest.engines]
    offered: list[str] = [*(key.precision.value for key in keys), *(key.flavour for key in keys)]
    offered += [engine.name for engine in bundle.manifest.engines]
    return [value for value in dict.fromkeys(offered) if value.startswith(incomplete)]


def engine_names(ctx: typer.Context, incomplete: str) -> list[str]:
    """Offer the names of the engines of the bundle that was typed."""
    bundle = _bundle(ctx)
    held = [] if bundle is None else [engine.name for engine in bundle.manifest.engines]
    return [name for name in held if name.startswith(incomplete)]


def flavours(incomplete: str) -> list[str]:
    """Offer the engine libraries."""
    return [name for name in registry.names() if name.startswith(incomplete)]


def device_profiles(incomplete: str) -> list[str]:
    """Offer the names of device profiles."""
    return [name for name in (profile.name for profile in profiles.list_profiles()) if name.startswith(incomplete)]


def models(incomplete: str) -> list[str]:
    """Offer timm's names, once a letter was typed."""
    return [name for name in names.known_names() if name.startswith(incomplete)] if incomplete else []
