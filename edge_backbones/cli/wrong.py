"""What a wrong command line is told: the messages of typer in the words of the options."""

from __future__ import annotations

from typing import Any

import typer

# click's UsageError, which newer releases of typer carry inside and older ones import
UsageError: Any = typer.BadParameter.__base__

_OPTIONS_OF_OTHERS = {
    "--gpu": "type --device cuda, or --device cuda:0 for the GPU of index 0",
    "--cuda": "type --device cuda",
    "--cpu": "type --device cpu",
}
"""Options that there are elsewhere, and what to type instead where a command has ``--device``."""

_BOUNDS = {
    "greater_than_equal": ("ge", "at least"),
    "greater_than": ("gt", "more than"),
    "less_than_equal": ("le", "at most"),
    "less_than": ("lt", "less than"),
}
_KINDS = {"int_parsing": "a whole number", "int_from_float": "a whole number", "float_parsing": "a number"}


def in_words(error: Any) -> Any:
    """Return a usage error whose message names the option, the bound and the value; others as they are."""
    error.message = error.message.replace("Value error, ", "")  # of pydantic, which newer releases of typer use
    message = _of_an_unknown_option(error) or _of_a_value(error)
    return error if message is None else UsageError(message, error.ctx)


def _of_an_unknown_option(error: Any) -> str | None:
    """Return what to type in place of an option that the command lacks; None where nothing better is known."""
    option = getattr(error, "option_name", None)
    advice = _OPTIONS_OF_OTHERS.get(option or "")
    if advice is None or not hasattr(error, "possibilities") or error.ctx is None:
        return None
    has_device = any("--device" in parameter.opts for parameter in error.ctx.command.params)
    return f"there is no option {option}: {advice}" if has_device else None


def _of_a_value(error: Any) -> str | None:
    """Return a sentence about a number outside its bounds, or about a text that is no number; None for other errors."""
    parameter, cause = getattr(error, "param", None), error.__cause__
    if parameter is None or not hasattr(cause, "errors"):
        return None
    found = cause.errors()[0]
    name = max(parameter.opts, key=len)
    if found["type"] in _BOUNDS:
        bound, words = _BOUNDS[found["type"]]
        return f"{name} must be {words} {found['ctx'][bound]:g}, got {found['input']}"
    if found["type"] in _KINDS:
        return f"{name} takes {_KINDS[found['type']]}, got {str(found['input'])!r}"
    return None
