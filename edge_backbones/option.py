"""Options are explained where they are declared: the command line takes its flags and their help from there."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Option:
    """What a field of an options dataclass means: ``Annotated[int, Option("How many images to measure on.")]``.

    ``group`` is the heading under which the command line lists the flag, None for the first list. ``least`` and ``most``
    bound a number on the command line; the dataclass checks its own values.
    """

    help: str
    group: str | None = None
    least: int | None = None
    most: int | None = None
