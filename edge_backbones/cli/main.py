"""The command line's entry point: run one command and turn its outcome into an exit code.

Exit codes: 0 done, 1 refused (one line on stderr says why), 2 wrong usage, 3 a feature map is outside its parity gate,
4 slower than stored results beyond noise, 130 interrupted. With ``--json`` stdout holds one JSON document and nothing else,
also when a command refuses (1 and 3).

Each command is a function in a module beside this one, which is imported when the command is used.
"""

from __future__ import annotations

import importlib
import sys
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
    from typer.core import TyperGroup
    from typer.main import get_command
except ImportError as missing_cli:
    sys.exit(f"edge-backbones: {MissingDependencyError('the command line', 'cli')} ({missing_cli.name} is missing)")

from edge_backbones.cli import console
from edge_backbones.parity_report import ParityError

COMMANDS = {
    "stages": "stages:stages",
    "build": "build:build",
    "compile": "compile:compile_",
    "remove": "compile:remove",
    "pack": "pack:pack",
    "sign": "trust:sign",
    "verify": "verify:verify",
    "run": "run:run",
    "inspect": "inspect:inspect",
    "profiles": "machine:profiles",
    "doctor": "machine:doctor",
    "bench": "bench:bench",
    "report": "report:report",
}
"""The module and the function of each command, in the order of ``edge-backbones --help``."""

_STYLE: dict[str, Any] = {
    "add_completion": False,
    "rich_markup_mode": "markdown",
    "pretty_exceptions_enable": False,
}
# click's UsageError, which newer releases of typer carry inside and older ones import
_UsageError: Any = typer.BadParameter.__base__


class Commands(TyperGroup):
    """The group of all commands. It imports the module of a command when that command is asked for."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Return the names of the commands, in the order of `COMMANDS`."""
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Return a command; for an unknown name load all and return None, so that typer can suggest a near one."""
        for name in [cmd_name] if cmd_name in COMMANDS else COMMANDS:
            if name not in self.commands:
                self.commands[name] = _loaded(name)
        return self.commands.get(cmd_name)


def _loaded(name: str) -> Any:
    """Import the function of a command and make typer's command of it."""
    module, _, function = COMMANDS[name].partition(":")
    alone = typer.Typer(**_STYLE)
    alone.command(name)(getattr(importlib.import_module(f"edge_backbones.cli.{module}"), function))
    return get_command(alone)


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    **_STYLE,
    help="Vision backbones as verified bundles of compiled engines, behind the transformers backbone API.\n\n"
    "`build` makes a bundle from a model of timm or transformers, `run` gives the feature maps of a photograph.",
)


def _show_version(asked: bool) -> None:
    if asked:
        console.out.print(f"edge-backbones {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Run the command that sys.argv names and exit with its code."""
    sys.exit(_run(sys.argv[1:]))


def _run(arguments: list[str]) -> int:
    """Run one command; return its exit code. Nothing but a bug is raised."""
    try:
        return app(arguments, prog_name="edge-backbones", standalone_mode=False) or 0
    except ParityError as error:
        if "--json" not in arguments:
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
    except _UsageError as error:
        error.show()
        return int(error.exit_code)
    except (typer.Abort, KeyboardInterrupt):
        console.err.print("interrupted: no bundle was changed")
        return 130


def _refuse(arguments: list[str], error: BaseException, code: int, **details: Any) -> int:
    """Print a refusal on one line, or as JSON where that was asked for; return its exit code."""
    message = " ".join(str(error).split()) or type(error).__name__
    if "--json" in arguments:
        console.print_json({"error": type(error).__name__, "message": message, **details})
    else:
        console.err.print(f"edge-backbones: {message}", soft_wrap=True)
    return code


if __name__ == "__main__":
    main()
