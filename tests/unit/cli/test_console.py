"""What the command line writes: tables that lose nothing anywhere, steps off a terminal and on one, terminals of ASCII."""

from __future__ import annotations

import io
import os
import pty
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
import rich.console

from edge_backbones.bundle.manifest import Decision, Trial
from edge_backbones.cli import console
from edge_backbones.spec import Precision
from edge_backbones.testing import make_bundle, pooling_input

CLI = [sys.executable, "-m", "edge_backbones.cli.main"]
LONG = "openvino-2026.4.1-x86_64-avx512_bf16-a-name-that-is-longer-than-a-narrow-terminal"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("console") / "pool.bundle", pooling_input(1)).path


def table() -> console.Table:
    made = console.Table("engine", "MB", title="engines [x]")
    made.add_column("runs here", justify="right")
    made.add_row(LONG, "1.5", "yes")
    made.add_row("b\x1b[2J", "", "no: it is of another machine")
    return made


def printed(*, terminal: bool, width: int, encoding: str = "utf-8") -> str:
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    target = rich.console.Console(
        file=file, force_terminal=terminal, width=width, color_system=None, soft_wrap=True, markup=False
    )
    target.print(table())
    file.flush()
    return file.buffer.getvalue().decode(encoding)


@pytest.mark.parametrize("width", [10, 60, 200])
def test_off_a_terminal_a_row_is_one_line_whatever_its_width(width):
    title, head, first, second = printed(terminal=False, width=width).splitlines()
    assert title == "engines [x]"
    assert head.split() == ["engine", "MB", "runs", "here"]
    assert first.split() == [LONG, "1.5", "yes"]
    assert "b\\x1b[2J" in second
    assert second.endswith("no: it is of another machine")


def test_a_table_that_is_wider_than_a_terminal_becomes_records():
    lines = printed(terminal=True, width=60).splitlines()
    assert lines[1:5] == [f"engine: {LONG}", "MB: 1.5", "runs here: yes", ""]
    assert lines[5:7] == ["engine: b\\x1b[2J", "runs here: no: it is of another machine"]
    wide = printed(terminal=True, width=200)
    assert "┃" in wide
    assert LONG in wide


def test_a_terminal_of_ascii_gets_ascii():
    shown = printed(terminal=True, width=200, encoding="ascii")
    assert LONG in shown
    assert "?" not in shown


def output(*arguments: object, **environment: str) -> subprocess.CompletedProcess:
    plain = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "FORCE_COLOR", "NO_COLOR", "PYTHONUTF8")}
    return subprocess.run([*CLI, *map(str, arguments)], capture_output=True, env={**plain, **environment})


def test_names_that_ascii_cannot_show_are_escaped(tmp_path):
    bundle = make_bundle(tmp_path / "pöol.bundle", pooling_input(1)).path
    for environment in ({"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}):
        for arguments in (("inspect", bundle), ("verify", bundle), ("--help",), ("verify", "--help")):
            done = output(*arguments, **environment)
            assert done.returncode == 0, done.stderr
            assert b"Error" not in done.stderr
            assert b"?" not in done.stdout
            done.stdout.decode("ascii")
        named = output("inspect", bundle, **environment).stdout.splitlines()[0]
        assert b"p\\xf6ol.bundle" in named or b"p\\udcc3\\udcb6ol.bundle" in named


def test_nothing_is_lost_in_a_pipe_of_a_narrow_shell(bundle):
    wide, narrow = (output("inspect", bundle, COLUMNS=columns).stdout.decode() for columns in ("500", "60"))
    assert narrow == wide
    assert "…" not in wide
    assert "\x1b" not in wide


def on_terminal(*arguments: object, **environment: str) -> str:
    """What a terminal receives of a command."""
    main, side = pty.openpty()
    process = subprocess.Popen(
        [*CLI, *map(str, arguments)], stdout=side, stderr=side, stdin=side,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "150", **environment},
    )  # fmt: skip
    os.close(side)
    received = b""
    while True:
        try:
            received += (block := os.read(main, 1 << 16))
        except OSError:  # Linux says so that the other side is closed
            break
        if not block:
            break
    os.close(main)
    assert process.wait() == 0, received
    return received.decode()


def test_on_a_terminal_every_bar_is_full_at_the_end(bundle):
    shown = on_terminal("verify", bundle)
    assert "\x1b[" in shown
    for step in ("checking files", "verifying fp32"):
        [*_, last] = [line for line in shown.split("\r\n") if step in line]
        assert "━" * 24 in "".join(last.split("\x1b")[-1:]) or last.count("━") >= 24, last


def test_no_color_is_obeyed(bundle):
    assert "\x1b[3" in on_terminal("inspect", bundle)
    shown = on_terminal("inspect", bundle, NO_COLOR="1")
    assert "\x1b[32m" not in shown
    assert "\x1b[31m" not in shown


def test_a_step_that_counts_ends_at_its_total(monkeypatch):
    with console.Steps(quiet=True) as progress:
        progress("calibrating", 3, 10)
        progress("exporting", 0, None)
        progress("measuring", 1, 5)
        bars = progress.__self__._bars
        assert [(task.completed, task.total, task.fields["count"]) for task in bars.tasks[:2]] == [
            (10, 10, "10/10"),
            (1, 1, ""),
        ]
    assert (bars.tasks[2].completed, bars.tasks[2].fields["count"]) == (5, "5/5")


def test_sentences_are_said_once(capfd):
    steps = console.Steps(quiet=False, aloud="leaving ")
    with steps as progress:
        progress("compiling int8", 0, None)
        progress("leaving int8 out: it is [red]", 0, None)
        progress("compiling fp16", 0, 4)
        progress("compiling fp16", 4, 4)
    assert capfd.readouterr().err.splitlines() == ["compiling int8", "leaving int8 out: it is [red]", "compiling fp16"]
    assert steps.said == ["compiling int8", "leaving int8 out: it is [red]", "compiling fp16"]


def test_trials_name_the_rest_of_int8_where_it_is_not_fp32(monkeypatch):
    plain = Trial(precision=Precision.INT8, blocks=("op:Add",), cosine=1.0, sqnr_db=30.0, passed=True, milliseconds=2.0)
    trials = (plain, msgspec.structs.replace(plain, computes_in="bf16"))
    trials += (msgspec.structs.replace(plain, precision=Precision.BF16, blocks=(), computes_in="bf16"),)
    written = io.StringIO()
    monkeypatch.setattr(console, "out", rich.console.Console(file=written, width=120))
    console.print_trials(Decision(sentence="", device_name="Xeon", trials=trials))
    rows = [line.split("1.0000")[0].strip() for line in written.getvalue().splitlines() if "1.0000" in line]
    assert rows == ["int8 without 1 block", "int8 without 1 block with a bf16 rest", "bf16"]
