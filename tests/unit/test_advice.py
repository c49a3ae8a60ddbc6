"""Every command and every option that a message advises exists: read off the source, held against the command line."""

from __future__ import annotations

import ast
import enum
import re
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

import edge_backbones
from edge_backbones.cli.main import app

PACKAGE = Path(edge_backbones.__file__).parent
GROUP = get_command(app)
COMMANDS = {name: GROUP.get_command(None, name) for name in GROUP.list_commands(None)}
OPTIONS = {
    name: {option: parameter for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
    for name, command in COMMANDS.items()
}
ANY = {option for of_command in OPTIONS.values() for option in of_command} | {
    "--help", "--version", "--install-completion"
}  # fmt: skip
# Options of other programs that stand in messages, by what stands before them.
FOREIGN = re.compile(
    r"docker run\b|trtexec|install --editable|pip install\b|-m venv\b|apt install\b|git\b|mount it|nvpmodel|fallocate"
    r"|cpupower|--[a-z]+=|qemu|tritonserver"
)


def texts(path: Path) -> Iterator[tuple[int, str]]:
    """String literals of a module that are no docstrings; what an f-string fills in is ``{}``."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    inside = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            inside.add(node.value)
        if isinstance(node, ast.JoinedStr):
            inside.update(node.values)
            parts = [str(part.value) if isinstance(part, ast.Constant) else "{}" for part in node.values]
            yield node.lineno, "".join(parts)
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in inside:
            yield node.lineno, node.value


MESSAGES = [
    pytest.param(text, id=f"{path.relative_to(PACKAGE)}:{line}")
    for path in sorted(PACKAGE.rglob("*.py"))
    for line, text in texts(path)
    if re.search(r"edge-backbones [a-z]|(?<![\w-])--[a-z]", text) and " " in text
]


def test_there_are_messages():
    assert len(MESSAGES) > 40


def choices(annotation: Any) -> list[str]:
    """What an option takes, where that is a choice."""
    if isinstance(annotation, type) and issubclass(annotation, enum.Enum):
        return [member.value for member in annotation]
    parts = typing.get_args(annotation)
    if typing.get_origin(annotation) is typing.Literal:
        return list(parts)
    return [choice for part in parts for choice in choices(part)]


@pytest.mark.parametrize("text", MESSAGES)
def test_every_command_in_a_message_can_be_typed(text):
    for found in re.finditer(r"edge-backbones ([a-z]+(?:-[a-z]+)*)([^,;:()`]*)", text):
        name, rest = found.groups()
        assert name in COMMANDS, f"there is no edge-backbones {name}"
        for option, value in re.findall(r"(--[a-z-]+)(?: ([a-z0-9_]+))?", rest):
            if FOREIGN.search(rest[: rest.index(option)]):
                continue
            assert option in OPTIONS[name], f"edge-backbones {name} has no {option}"
            taken = choices(typing.get_type_hints(COMMANDS[name].callback).get(OPTIONS[name][option].name))
            assert not (value and taken) or value in taken, f"{option} takes no {value}"
    for found in re.finditer(r"(?<![\w-])(--[a-z][a-z-]*)", text):
        if not FOREIGN.search(text[: found.end() + 1]):
            assert found.group(1) in ANY, f"no command has {found.group(1)}"


def test_every_extra_in_a_message_can_be_installed():
    metadata = (PACKAGE.parent / "pyproject.toml").read_text(encoding="utf-8")
    extras = set(re.findall(r"^([a-z-]+) = \[", metadata.partition("[project.optional-dependencies]")[2], re.MULTILINE))
    place = {"pip_install": 0, "MissingDependencyError": 1, "needing": 1}  # of the extra among the arguments
    found = {
        call.args[place[call.func.id]].value
        for path in PACKAGE.rglob("*.py")
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id in place
        if len(call.args) > place[call.func.id] and isinstance(call.args[place[call.func.id]], ast.Constant)
        if not any(keyword.arg == "fix" for keyword in call.keywords)  # the message names another way
    }
    assert found
    assert found <= extras
