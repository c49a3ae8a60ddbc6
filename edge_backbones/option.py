"""Explain options where they are declared.

The command line takes its flags and their help from there, and `documented` puts the same texts into the docstring.
"""

from __future__ import annotations

import dataclasses
import inspect
import textwrap
from dataclasses import dataclass
from typing import Any, TypeVar, get_args, get_type_hints

T = TypeVar("T")
_WIDTH = 110


@dataclass(frozen=True)
class Option:
    """Say what a field of an options dataclass means: ``Annotated[int, Option("How many images to measure on.")]``.

    Attributes:
        help: Sentences for both the command line and Python.
        group: Heading under which the command line lists the flag; None for the first list.
        least: Smallest number that the command line accepts; the dataclass checks its own values.
        most: Largest number that the command line accepts.
        in_python: Sentences for Python only, such as the unit of a value that is typed in another one.
        has_flag: Whether the command line has a flag for this field alone.
    """

    help: str
    group: str | None = None
    least: int | None = None
    most: int | None = None
    in_python: str = ""
    has_flag: bool = True


def options_of(cls: type) -> dict[str, tuple[Any, Option]]:
    """Return the type and the `Option` of each field of a dataclass that has one, by field."""
    found = {}
    hints = get_type_hints(cls, include_extras=True)
    for field in dataclasses.fields(cls):
        kind, *extras = get_args(hints[field.name]) or (None,)
        option = next((extra for extra in extras if isinstance(extra, Option)), None)
        if option is not None:
            found[field.name] = kind, option
    return found


def documented(cls: type[T]) -> type[T]:
    """Show the texts of an options dataclass in its docstring, as an ``Attributes:`` section, and not in its signature.

    The section goes before ``Raises:``, if there is one.
    """
    options = options_of(cls)
    lines = [
        textwrap.fill(
            f"{field}: {option.help} {option.in_python}".strip(),
            width=_WIDTH,
            break_on_hyphens=False,
            initial_indent="    ",
            subsequent_indent="        ",
        )
        for field, (_, option) in options.items()
    ]
    summary, raises, errors = inspect.cleandoc(cls.__doc__ or "").partition("\nRaises:")
    cls.__doc__ = "\n".join([summary.rstrip(), "", "Attributes:", *lines, ""]) + raises + errors
    signature = inspect.signature(cls)
    plain = [
        parameter.replace(annotation=options[name][0]) if name in options else parameter
        for name, parameter in signature.parameters.items()
    ]
    cls.__signature__ = signature.replace(parameters=plain)  # type: ignore[attr-defined]  # help() reads it
    return cls
