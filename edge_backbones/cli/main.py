"""The command line's entry point: run one command and turn its outcome into an exit code.

Exit codes, by one rule:

0. Done.
1. Refused: what the command line names (a model, a file, a bundle, this machine) does not do. One line on stderr says why.
2. The command line itself is wrong, whatever it names: an unknown command or option, a missing argument, a value that the
   option never takes, options that exclude each other.
3. A feature map is outside its parity gate.
4. Slower than stored results, beyond noise.
130. Interrupted.

With ``--json`` stdout holds one JSON document and nothing else, also when a command refuses (1, 2 and 3).

Each command is a function in a module beside this one, which is imported when the command is used.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import io
import re
import sys
from collections.abc import Callable
from typing import Annotated, Any

from edge_backbones import __version__
from edge_backbones.errors import (
    EdgeBackbonesError,
    MissingDependencyError,
    ResourceError,
    refuse_lack,
    why_no_import,
)

try:
    import msgspec  # noqa: F401
    import numpy  # noqa: F401
except ImportError as broken:
    sys.exit(f"edge-backbones: {why_no_import(broken)}")

try:
    import rich  # noqa: F401
    import typer
    from typer.core import TyperCommand, TyperGroup
    from typer.main import get_command
except ImportError as missing_cli:
    sys.exit(f"edge-backbones: {MissingDependencyError('the command line', 'cli')} ({missing_cli.name} is missing)")

from edge_backbones.cli import console, narrow
from edge_backbones.cli.texts import EXIT_CODES, PANELS, START, marked, panel_of
from edge_backbones.cli.wrong import UsageError, in_words
from edge_backbones.parity_report import ParityError

COMMANDS = {
    "stages": "stages:stages",
    "build": "build:build",
    "compile": "compile:compile_",
    "remove": "compile:remove",
    "pack": "pack:pack",
    "export-triton": "triton:export",
    "export-deepstream": "deepstream:export",
    "sign": "trust:sign",
    "verify": "verify:verify",
    "run": "run:run",
    "inspect": "inspect:inspect",
    "profiles": "machine:profiles",
    "doctor": "machine:doctor",
    "bench": "bench:bench",
    "report": "report:report",
}
"""The module and the function of each command. `texts.PANELS` holds the line about it in ``edge-backbones --help``."""

_STYLE: dict[str, Any] = {
    "rich_markup_mode": "rich",
    "pretty_exceptions_enable": False,
    "context_settings": {"help_option_names": ["--help", "-h"]},
}

Verbose = Annotated[
    bool,
    typer.Option("--verbose", "-v", help="Say more: versions, and the time of each step.", rich_help_panel="Output"),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.", rich_help_panel="Output")]


class Commands(TyperGroup):
    """The group of all commands. It imports the module of a command when that command is asked for."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Return the names of the commands, in the order of the help's panels."""
        listed = [name for commands in PANELS.values() for name in commands if name in COMMANDS]
        return [*listed, *(name for name in COMMANDS if name not in listed)]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Return a command; None for an unknown name."""
        if cmd_name in COMMANDS and cmd_name not in self.commands:
            self.commands[cmd_name] = _loaded(cmd_name)
        return self.commands.get(cmd_name)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Return the command of an argument list; for an unknown name typer suggests near ones of all that it sees here."""
        if args[0] not in COMMANDS:
            self.commands = self._listed().commands
        return super().resolve_command(ctx, args)

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Print the help with one line per command, without importing any."""
        listed = self._listed()
        if narrow.is_narrow():
            narrow.print_help(listed, ctx)
        else:
            listed.format_help(ctx, formatter)

    def shell_complete(self, ctx: Any, incomplete: str) -> Any:
        """Return completions for the name of a command, without importing any."""
        return TyperGroup.shell_complete(self._listed(), ctx, incomplete)

    def get_params(self, ctx: Any) -> list[Any]:
        """Return the parameters, ``--help`` too."""
        return _without_types(super().get_params(ctx))

    def _listed(self) -> TyperGroup:
        """Return a group of the same options whose commands have a name, a panel and a line of help, and do nothing."""
        lines = {name: line for commands in PANELS.values() for name, line in commands.items()}
        commands: dict[str, Any] = {
            name: TyperCommand(name, help=marked(lines.get(name, "")), rich_help_panel=panel_of(name))
            for name in self.list_commands(None)
        }
        return Listed(
            name=self.name, commands=commands, params=self.params, help=self.help, epilog=self.epilog,
            rich_markup_mode=self.rich_markup_mode,
        )  # fmt: skip


class Listed(TyperGroup):
    """A group for the help alone, which shows no type for a flag."""

    def get_params(self, ctx: Any) -> list[Any]:
        """Return the parameters, ``--help`` too."""
        return _without_types(super().get_params(ctx))


class Command(TyperCommand):
    """A command whose help shows no type where none is typed, and whose usage line has plain names."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Print the help, as lines in a narrow terminal."""
        if narrow.is_narrow():
            narrow.print_help(self, ctx)
        else:
            super().format_help(ctx, formatter)

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """Return the parts of the usage line: ``[OPTIONS]``, ``BUNDLE``, ``ENGINE...``, ``[BUNDLE]``."""
        pieces = [self.options_metavar or ""]
        for parameter in self.get_params(ctx):
            for piece in parameter.get_usage_pieces(ctx):
                name = re.sub(r"[\[\]{}.]", "", piece)
                pieces.append((name if parameter.required else f"[{name}]") + "..." * ("..." in piece))
        return pieces

    def get_params(self, ctx: Any) -> list[Any]:
        """Return the parameters, ``--help`` too."""
        return _without_types(super().get_params(ctx))


def _without_types(parameters: list[Any]) -> list[Any]:
    """Take the type from flags, which have no value, and from arguments, whose name says what they are."""
    for parameter in parameters:
        if parameter.param_type_name == "argument":
            parameter.display_type_rich = lambda ctx: None
        elif getattr(parameter, "is_flag", False):
            parameter.metavar = ""
    return parameters


def _loaded(name: str) -> Any:
    """Import the function of a command and make typer's command of it."""
    module, _, function = COMMANDS[name].partition(":")
    alone = typer.Typer(add_completion=False, **_STYLE)
    run = _with_loudness(getattr(importlib.import_module(f"edge_backbones.cli.{module}"), function))
    settings = _STYLE["context_settings"]
    alone.command(name, cls=Command, help=marked(run.__doc__ or ""), context_settings=settings)(run)
    command = get_command(alone)
    parameters: list[Any] = command.params
    for parameter in parameters:
        parameter.help = marked(parameter.help or "")
    return command


def _with_loudness(function: Callable[..., None]) -> Callable[..., None]:
    """Give the function of a command the options that every command has."""

    @functools.wraps(function)
    def run(*, verbose: bool, quiet: bool, **typed: Any) -> None:
        _set_loudness(verbose, quiet)
        function(**typed)

    parameters = [
        parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
        for parameter in inspect.signature(function, eval_str=True).parameters.values()
    ]
    for name, annotation in (("verbose", Verbose), ("quiet", Quiet)):
        parameters.append(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=False, annotation=annotation))
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # typer reads both
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


def _set_loudness(verbose: bool, quiet: bool) -> None:
    """Take up what was typed before or behind the name of the command."""
    console.loudness.add(verbose=verbose, quiet=quiet)
    if console.loudness.verbose and console.loudness.quiet:
        raise typer.BadParameter("--verbose and --quiet exclude each other: leave one out")


app = typer.Typer(cls=Commands, no_args_is_help=True, help=marked(START), epilog=marked(EXIT_CODES), **_STYLE)


def _show_version(asked: bool) -> None:
    if asked:
        console.out.print(f"edge-backbones {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", "-V", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> None:
    _set_loudness(verbose, quiet)


def main() -> None:
    """Run the command that sys.argv names and exit with its code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal of ASCII shows other letters as escapes
            stream.reconfigure(errors="backslashreplace")
    sys.exit(_run(sys.argv[1:]))


def _run(arguments: list[str]) -> int:
    """Run one command; return its exit code. Nothing but a bug is raised."""
    console.loudness.reset()
    try:
        code = app(arguments, prog_name="edge-backbones", standalone_mode=False) or 0
    except ParityError as error:
        if not _wants_json(arguments):
            console.print_parity(error.reports, console.err)
        return _refuse(arguments, error, console.EXIT_PARITY, parity=error.reports)
    except EdgeBackbonesError as error:
        return _refuse(arguments, error, 1)
    except (OSError, MemoryError) as error:
        try:
            refuse_lack("this command", error)
        except ResourceError as lack:
            return _refuse(arguments, lack, 1)
        return _refuse(arguments, error, 1)
    except ImportError as error:  # a missing extra is a MissingDependencyError
        missing = isinstance(error, ModuleNotFoundError)
        return _refuse(arguments, error if missing else why_no_import(error), 1)
    except UsageError as error:
        return _show_usage(arguments, in_words(error))
    except (typer.Abort, KeyboardInterrupt):
        code = 130
    if code == 130:  # newer releases of typer return it for KeyboardInterrupt
        console.print_error("interrupted: no bundle was changed")
    return int(code)


def _show_usage(arguments: list[str], error: Any) -> int:
    """Print what is wrong with a command line, as JSON where that was asked for; return its exit code."""
    if _wants_json(arguments):
        console.print_json({"error": "UsageError", "message": " ".join(error.format_message().split())})
    else:
        error.show()
    return int(error.exit_code)


def _wants_json(arguments: list[str]) -> bool:
    return "--json" in arguments or "-j" in arguments


def _refuse(arguments: list[str], error: BaseException, code: int, **details: Any) -> int:
    """Print a refusal on one line, or as JSON where that was asked for; return its exit code."""
    message = " ".join(str(error).split()) or type(error).__name__
    if _wants_json(arguments):
        console.print_json({"error": type(error).__name__, "message": message, **details})
    else:
        console.print_error(f"edge-backbones: {message}")
    return code


if __name__ == "__main__":
    main()
