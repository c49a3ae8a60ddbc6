"""Flags that are derived from the fields of an options dataclass, so that each option is declared once."""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import functools
import inspect
import typing
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

import typer

from edge_backbones.errors import EdgeBackbonesError, InputError
from edge_backbones.option import options_of

T = TypeVar("T")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Form:
    """How a field is typed on the command line, where that differs from its name and type in the dataclass.

    ``flag``: the flag without dashes in front. ``short``: its letter. ``complete``: what the Tab key offers. ``type``: what
    typer parses. ``read`` makes the field's value of that; a ValueError of it is a usage error. ``metavar``: what stands for
    the value in the help. ``help``: sentences about how the value is typed, after those of the `Option`.
    """

    flag: str | None = None
    short: str | None = None
    complete: Callable[..., Any] | None = None
    type: Any = None
    read: Callable[[Any], Any] | None = None
    metavar: str | None = None
    help: str = ""


def takes(options: type, **forms: Form) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command one flag for each field of an options dataclass that is annotated with an `Option` that asks for it.

    Name, type, default, help and group of a flag are those of the field; ``forms`` holds what is different on the command
    line, by field. The flags take the place of the command's parameter ``given``, which receives what was typed: values by
    field. What was not typed is missing in it, so that the dataclass's own default holds.
    """
    flags = dict(_flags(options, forms))
    assert forms.keys() <= flags.keys()

    def with_flags(command: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(command)
        def parsed(**typed: Any) -> None:
            given = {}
            for field, flag in flags.items():
                value = typed.pop(flag.parameter.name)
                if value is not None and value != []:
                    given[field] = read_option(f"--{flag.parameter.name.replace('_', '-')}", flag.read, value)
            command(**typed, given=given)

        parameters: list[inspect.Parameter] = []
        for parameter in inspect.signature(command, eval_str=True).parameters.values():
            own = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)]
            parameters += own if parameter.name != "given" else [flag.parameter for flag in flags.values()]
        parsed.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # typer reads both
        parsed.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return parsed

    return with_flags


class _Flag(NamedTuple):
    """Typer's parameter for a field, and the function that makes the field's value of what typer parsed."""

    parameter: inspect.Parameter
    read: Callable[[Any], Any]


def _flags(options: type, forms: Mapping[str, Form]) -> Iterator[tuple[str, _Flag]]:
    """Yield the name and the flag of each field whose `Option` asks for one."""
    fields = {field.name: field for field in dataclasses.fields(options)}
    for field_name, (kind, option) in options_of(options).items():
        if not option.has_flag:
            continue
        field = fields[field_name]
        form = forms.get(field.name, Form())
        name = form.flag or field.name
        typed, read = (form.type, _same) if form.type is not None else _typed(kind)
        default = field.default if isinstance(field.default, (bool, int, float, str)) else None
        dashed = name.replace("_", "-")
        unsaid = [value for value in _choices(typed) if value not in option.help]
        one_of = f"One of {', '.join(_choices(typed))}." if unsaid else ""
        sentences = (option.help, form.help, one_of, "Repeat for several." if _repeats(typed) else "")
        info = typer.Option(
            f"--{dashed}/--no-{dashed}" if default is True else f"--{dashed}",
            *([f"-{form.short}"] if form.short else []),
            help=" ".join(filter(None, sentences)),
            min=option.least,
            max=option.most,
            metavar=form.metavar or _metavar(typed),
            autocompletion=form.complete or (completing(*_choices(typed)) if _choices(typed) else None),
            show_default=default is not None,
            rich_help_panel=option.group,
        )
        parameter = inspect.Parameter(
            name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[typed, info]
        )
        yield field.name, _Flag(parameter, form.read or read)


def _typed(kind: Any) -> tuple[Any, Callable[[Any], Any]]:
    """Return the type that typer parses for a field's type: a list for a tuple, since its flag may be repeated."""
    if typing.get_origin(kind) is not tuple:
        return kind, _same
    item = typing.get_args(kind)[0]
    if typing.get_origin(item) is Literal:
        return several(choice(*typing.get_args(item))), lambda chosen: tuple(one.value for one in chosen)
    return several(item), tuple


def _repeats(kind: Any) -> bool:
    """Return whether typer parses a list: the flag may be typed more than once."""
    return any(typing.get_origin(part) is list for part in (kind, *typing.get_args(kind)))


def _choices(kind: Any) -> list[str]:
    """Return the values that typer takes for a type of choices; none for another type."""
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        return [str(member.value) for member in kind]
    parts = typing.get_args(kind)
    if typing.get_origin(kind) is Literal:
        return [str(part) for part in parts]
    return [choice for part in parts for choice in _choices(part)]


_METAVARS = {int: "N", float: "X", Path: "PATH", str: "NAME"}


def _metavar(kind: Any) -> str | None:
    """Return what stands for a value of a type in the help; None for a flag without a value."""
    parts = [part for part in typing.get_args(kind) if part is not type(None)]
    if typing.get_origin(kind) is Literal or not parts:
        return "NAME" if _choices(kind) else _METAVARS.get(kind)
    return _metavar(parts[0])


def completing(*values: str) -> Callable[..., list[str]]:
    """Return a function for typer that offers those of ``values`` that begin as what was typed."""

    def complete(incomplete: str) -> list[str]:
        return [value for value in values if value.startswith(incomplete)]

    return complete


def _same(value: T) -> T:
    return value


def several(kind: Any) -> Any:
    """Return the type of a flag that may be repeated."""
    make: Any = list
    return make[kind] | None


def choice(*values: str) -> Any:
    """Return an Enum of texts. Typer takes a Literal for a flag with one value, and only an Enum for one that repeats."""
    make: Any = enum.Enum
    return make("choice", {value: value for value in values}, type=str)


@contextlib.contextmanager
def usage() -> Iterator[None]:
    """Turn the InputError of an options dataclass into a usage error: its values are wrong whatever they are used on."""
    try:
        yield
    except InputError as error:
        raise typer.BadParameter(str(error)) from None


def read_option(option: str, read: Callable[[Any], T], typed: Any) -> T:
    """Return what ``read`` makes of the value of an option; turn a plain ValueError into a usage error that names it."""
    try:
        return read(typed)
    except EdgeBackbonesError:
        raise
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint=option) from None
