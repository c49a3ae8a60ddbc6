"""The help: panels, one example per command, what stands for every value, nothing eaten and nothing wider than a terminal."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
import typer
from rich.text import Text
from typer.main import get_command

from edge_backbones.cli import main as cli
from edge_backbones.cli.texts import EXIT_CODES, PANELS, marked

GROUP = get_command(cli.app)


def shown(*arguments: str, columns: int = 80) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "edge_backbones.cli.main", *arguments, "--help"],
        capture_output=True, text=True, env={**os.environ, "COLUMNS": str(columns)}, check=True,
    )  # fmt: skip
    return done.stdout


def test_every_command_has_one_line_in_one_panel():
    listed = [name for commands in PANELS.values() for name in commands]
    assert sorted(listed) == sorted(cli.COMMANDS)
    for commands in PANELS.values():
        for line in commands.values():
            assert line[0].isupper()
            assert line.endswith(".")
            assert len(line) < 90


def test_the_help_of_all_lists_commands_in_panels_and_exit_codes():
    text = shown()
    for panel, commands in PANELS.items():
        block = re.search(rf"─ {panel} ─.*?╰", text, re.DOTALL)
        assert block, panel
        for name in commands:
            assert re.search(rf"^│ {name} ", block.group(), re.MULTILINE), name
    said = " ".join(text.split())
    assert EXIT_CODES in said
    assert "edge-backbones build resnet50 resnet50.bundle --images photos/" in text


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_shows_an_example_and_fits_into_80_columns(name):
    text = shown(name)
    assert max(map(len, text.splitlines())) <= 80
    assert f"Example: edge-backbones {name}" in " ".join(text.split())
    assert "<bool>" not in text


def help_in(capsys, monkeypatch, columns: int, *arguments: str) -> str:
    monkeypatch.setenv("COLUMNS", str(columns))
    assert cli._run([*arguments, "--help"]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("columns", [40, 60, 79, 80, 100])
@pytest.mark.parametrize("name", ["", *cli.COMMANDS])
def test_nothing_is_cut_in_a_terminal_of_any_width(name, columns, capsys, monkeypatch):
    text = help_in(capsys, monkeypatch, columns, *filter(None, [name]))
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= columns
    assert not re.search("<(bool|str|path|list)", text)
    command = GROUP.get_command(None, name) if name else GROUP
    words = set(re.split(r"[\s,/]+", text))
    for parameter in command.params:
        if parameter.param_type_name == "option":
            assert {*parameter.opts, *parameter.secondary_opts} <= words
    if not name:
        assert set(cli.COMMANDS) <= words


def test_a_narrow_terminal_is_told_values_bounds_and_defaults(capsys, monkeypatch):
    said = " ".join(help_in(capsys, monkeypatch, 60, "compile").split())
    assert "One of none, ampere_plus, same_compute_capability. [default: none]" in said
    assert "--level N How long to search for fast kernels: 0 is shortest, 5 longest. [at least 0, at most 5]" in said
    assert "[at least 1, default: 4]" in " ".join(help_in(capsys, monkeypatch, 60, "build").split())
    assert "--report, --no-report" in help_in(capsys, monkeypatch, 60, "build")
    said = " ".join(help_in(capsys, monkeypatch, 60).split())
    assert EXIT_CODES in said
    assert all(f"{panel}: " in said for panel in PANELS)


@pytest.mark.parametrize(
    ("name", "usage"),
    [("remove", "BUNDLE ENGINE..."), ("doctor", "[BUNDLE]"), ("build", "MODEL BUNDLE"), ("run", "BUNDLE SOURCE")],
)
def test_the_usage_line_has_plain_names(name, usage, capsys, monkeypatch):
    for columns in (60, 100):
        first = help_in(capsys, monkeypatch, columns, name).strip().splitlines()[0].strip()
        assert first == f"Usage: edge-backbones {name} [OPTIONS] {usage}"


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_option_with_a_value_shows_what_stands_for_it(name):
    for parameter in GROUP.get_command(None, name).params:
        if parameter.param_type_name == "option" and not parameter.is_flag:
            assert parameter.metavar, f"{name} {parameter.opts}"
            assert re.fullmatch(r"[A-Zx]+(=[A-Z]+)?", parameter.metavar), parameter.metavar
        if parameter.param_type_name == "argument":
            assert parameter.metavar, f"{name} {parameter.name}"


def test_no_letter_means_two_things():
    found: dict[str, set[str]] = {}
    for name in cli.COMMANDS:
        for parameter in GROUP.get_command(None, name).params:
            letters = [option for option in parameter.opts if re.fullmatch("-[A-Za-z]", option)]
            assert len(letters) <= 1
            for letter in letters:
                found.setdefault(letter, set()).add(next(o for o in parameter.opts if o.startswith("--")))
    assert {letter: meanings for letter, meanings in found.items() if len(meanings) > 1} == {}
    assert found.keys() >= {"-p", "-o", "-f", "-i", "-e", "-s", "-d", "-t", "-j", "-v", "-q"}


def test_marked_keeps_brackets_and_joins_lines():
    text = marked("Take <name> and [x] or [bold]\nof `a b` and **c d**.\n\nThen [/x].")
    assert Text.from_markup(text).plain == "Take <name> and [x] or [bold] of a b and c d.\n\nThen [/x]."


def test_a_help_text_with_angle_and_square_brackets_is_shown_whole(monkeypatch, capsys):
    def command(value: str = typer.Option("", help="A <name>, [x] or [bold]y[/bold].")) -> None:
        """Do what <name> says with [x]."""

    monkeypatch.setattr("edge_backbones.cli.report.report", command)
    monkeypatch.setenv("COLUMNS", "120")
    assert cli._run(["report", "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "A <name>, [x] or [bold]y[/bold]." in text
    assert "Do what <name> says with [x]." in text
