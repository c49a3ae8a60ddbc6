"""``edge-backbones profiles`` and ``doctor``: what devices can do, and what this machine can do."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from edge_backbones.bundle.reader import Bundle
from edge_backbones.cli import completion, console
from edge_backbones.cli.shared import JsonFlag
from edge_backbones.doctor import judge, judge_engines, look
from edge_backbones.errors import visible
from edge_backbones.machine.gpus import find_gpus
from edge_backbones.machine.profiles import explain, list_profiles, load_profile, profile_of
from edge_backbones.machine.system import board_name


def profiles(
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="[DEVICE]",
            autocompletion=completion.device_profiles,
            help="The name of one device, or a .toml file of your own. By default all are listed.",
            show_default=False,
        ),
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """List the devices that engines are compiled for: what they have, which library serves them, which precisions pay.

    Example: **edge-backbones profiles jetson-orin-nano**
    """
    found = list_profiles() if name is None else (load_profile(name),)
    if as_json:
        console.print_json(found)
        return
    if name is not None:
        for line in explain(found[0]).splitlines():
            console.out.print(line)
        return
    table = console.Table("profile", "GPU", "GiB", "GB/s", "pays")
    for profile in found:
        memory = [module.memory_gib for module in profile.modules]
        speed = [module.bandwidth_gb_s for module in profile.modules if module.bandwidth_gb_s is not None]
        table.add_row(profile.name, profile.architecture or "", _span(memory), _span(speed), ", ".join(profile.pays))
    console.out.print(table)
    here = profile_of(next(iter(find_gpus()), None), board=board_name())
    console.out.print(f"this machine: {here.name if here else 'a GPU that no profile describes'}")
    console.out.print("what each has, takes and likes: edge-backbones profiles NAME")


def _span(sizes: Sequence[float]) -> str:
    """Return the smallest and the largest size in words, one number if they are the same."""
    ends = sorted({min(sizes), max(sizes)}) if sizes else []
    return " to ".join(f"{size:g}" for size in ends)


def doctor(
    bundle: Annotated[
        Path | None,
        typer.Argument(
            metavar="[BUNDLE]",
            help="A bundle: say too which of its engines run here. The exit code is 1 if none does.",
            show_default=False,
        ),
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Say what this machine can build and run, and what to do about the rest.

    Example: **edge-backbones doctor resnet50.bundle**
    """
    opened = None if bundle is None else Bundle.open(bundle)
    machine = look()
    engines = [] if opened is None else judge_engines(machine, opened)
    findings = [*judge(machine), *engines]
    if as_json:
        console.print_json(findings)
    else:
        for finding in findings:  # lines, not a table: a command that is to be copied must not be cut
            mark = ("!!", "yellow") if not finding.ok else ("--", "dim") if finding.absent else ("ok", "green")
            topic, found, fix = map(visible, (finding.topic, finding.found, finding.fix))
            console.out.print(Text.assemble(mark, "  ", (topic, "bold"), ": ", found), soft_wrap=True)
            if fix:
                console.out.print(Text.assemble("    to do: ", (fix, "cyan")), soft_wrap=True)
    if opened is not None and not any(finding.ok for finding in engines):
        raise typer.Exit(1)
