"""Every flag keeps its name, its type and its default: held against tests/golden/cli_flags.json.

A flag that is new or gone on purpose is recorded with ``python -m tests.unit.test_cli_flags``.
"""

from __future__ import annotations

import enum
import json
import types
import typing
from pathlib import Path
from typing import Any

from typer.main import get_command

from edge_backbones.cli.main import app

GOLDEN = Path(__file__).parents[1] / "golden" / "cli_flags.json"


def plain(value: Any) -> Any:
    """Return a default as it is typed."""
    if isinstance(value, enum.Enum):
        return value.value
    return str(value) if isinstance(value, Path) else value


def takes(annotation: Any) -> str:
    """Return the name of the type of one value, or its choices."""
    if isinstance(annotation, type) and issubclass(annotation, enum.Enum):
        return "|".join(member.value for member in annotation)
    parts = [part for part in typing.get_args(annotation) if part is not types.NoneType]
    if typing.get_origin(annotation) is typing.Literal:
        return "|".join(parts)
    return takes(parts[0]) if parts else annotation.__name__


def flags() -> dict[str, dict[str, str]]:
    """Return what each command takes, by command and by the names of each option or argument."""
    found: dict[str, dict[str, str]] = {}
    group = get_command(app)
    for name in group.list_commands(None):
        command = group.get_command(None, name)
        hints = typing.get_type_hints(command.callback, include_extras=True)
        found[name] = {}
        for parameter in command.params:
            annotation, info = typing.get_args(hints[parameter.name])
            words = [parameter.param_type_name, takes(annotation), f"default {plain(parameter.default)!r}"]
            if info.min is not None or info.max is not None:
                words.append(f"from {info.min} to {info.max}")
            if parameter.nargs == -1 or getattr(parameter, "multiple", False):
                words.append("repeats")
            if parameter.required:
                words.append("required")
            found[name][" ".join((*parameter.opts, *parameter.secondary_opts))] = ", ".join(words)
    return found


def test_every_flag_is_as_it_was_recorded():
    assert flags() == json.loads(GOLDEN.read_text(encoding="utf-8"))


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps(flags(), indent=1, sort_keys=True) + "\n", encoding="utf-8")
