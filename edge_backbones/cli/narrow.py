"""The help of a command for a narrow terminal: lines instead of panels, so that nothing is cut."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import rich.console
from rich.console import RenderableType
from rich.markup import escape
from rich.padding import Padding
from rich.text import Text
from typer.core import TyperGroup

PANELS_FROM = 80
"""The width in columns from which every panel shows its text whole."""


def is_narrow() -> bool:
    """Return whether the terminal is too narrow for panels."""
    return rich.console.Console().width < PANELS_FROM


def print_help(command: Any, ctx: Any) -> None:
    """Print the help of a command or of the group of all: each name on a line, and what it does below it."""
    console = rich.console.Console(highlight=False)
    for part in _parts(command, ctx):
        console.print(part, overflow="fold")


def _parts(command: Any, ctx: Any) -> Iterator[RenderableType]:
    yield Text(command.get_usage(ctx), style="bold")
    for paragraph in inspect.cleandoc(command.help or "").split("\n\n"):
        yield Text("")
        yield Text.from_markup(paragraph)
    for panel, parameters in _by_panel(command.get_params(ctx)).items():
        yield Text(f"\n{panel}:", style="bold")
        for parameter in parameters:
            yield from _entry(_names(parameter), _sentences(parameter, ctx))
    if isinstance(command, TyperGroup):
        listed = [command.get_command(ctx, name) for name in command.list_commands(ctx)]
        for panel, commands in _by_panel([one for one in listed if one is not None]).items():
            yield Text(f"\n{panel}:", style="bold")
            for one in commands:
                yield from _entry(one.name or "", one.help or "")
    if command.epilog:
        yield Text("")
        yield Text.from_markup(command.epilog)


def _by_panel(items: list[Any]) -> dict[str, list[Any]]:
    """Return parameters or commands by the title of their panel; those without one first, arguments before options."""
    found: dict[str, list[Any]] = {"Arguments": [], "Options": []}
    for item in items:
        if getattr(item, "hidden", False):
            continue
        usual = "Arguments" if getattr(item, "param_type_name", "") == "argument" else "Options"
        found.setdefault(getattr(item, "rich_help_panel", None) or usual, []).append(item)
    return {panel: members for panel, members in found.items() if members}


def _entry(name: str, sentences: str) -> Iterator[RenderableType]:
    yield Padding(Text(name, style="bold"), (0, 0, 0, 2), expand=False)
    yield Padding(Text.from_markup(sentences), (0, 0, 0, 6), expand=False)


def _names(parameter: Any) -> str:
    """Return how a parameter is typed: ``--images, -i FOLDER``."""
    if parameter.param_type_name == "argument":
        return str(parameter.metavar or parameter.name)
    flags = ", ".join(sorted([*parameter.opts, *parameter.secondary_opts], key=lambda flag: not flag.startswith("--")))
    return flags if parameter.is_flag else f"{flags} {parameter.metavar or ''}".rstrip()


def _sentences(parameter: Any, ctx: Any) -> str:
    """Return the help of a parameter with its bounds and its default, as markup."""
    least, most, default = getattr(parameter, "min", None), getattr(parameter, "max", None), parameter.get_default(ctx)
    shown = getattr(parameter, "show_default", False) and not getattr(parameter, "is_flag", False)
    asides = [
        "" if least is None else f"at least {least}",
        "" if most is None else f"at most {most}",
        f"default: {getattr(default, 'value', default)}" if shown and default not in (None, [], ()) else "",
    ]
    aside = ", ".join(filter(None, asides))
    return f"{parameter.help or ''}" + (escape(f" [{aside}]") if aside else "")
