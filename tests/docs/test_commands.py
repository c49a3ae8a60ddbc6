"""Every command in the documents can be typed: the command line itself parses it."""

from __future__ import annotations

import re
from typing import Any

import pytest
import typer
from typer.main import get_command

from edge_backbones import for_cpp
from edge_backbones.cli.main import app
from tests.docs.snippets import DOCUMENTS, commands, name_of, prose
from tests.unit.test_advice import ANY, COMMANDS, FOREIGN, OPTIONS

UsageError: Any = typer.BadParameter.__base__

# Options of other programs: with the program in front of them, or alone in a sentence.
OTHERS = re.compile(FOREIGN.pattern + r"|pip wheel|trtexec|colcon|ros2 launch|http\.server")
OF_OTHERS = {"--system-site-packages", "--cpu", "--demo", "--every-frame", "--latency", *for_cpp.FLAGS}

TYPED = [
    pytest.param(words, id=f"{name_of(path)}:{line}")
    for path in DOCUMENTS
    for line, words in commands(path)
    if words and words[0] != "--help"
]
QUOTED = [
    pytest.param(code, id=f"{name_of(path)}:{code[:60]}")
    for path in DOCUMENTS
    for code in dict.fromkeys(re.findall(r"`([^`\n]*(?:edge-backbones [a-z]|(?<![\w-])--[a-z])[^`\n]*)`", prose(path)))
]


def test_there_are_commands():
    assert len(TYPED) > 50
    assert len(QUOTED) > 50


@pytest.mark.parametrize("words", TYPED)
def test_a_command_in_a_code_block_is_parsed(words):
    name, *arguments = words
    if name.startswith("--"):
        assert name in ANY
        return
    assert name in COMMANDS, f"there is no edge-backbones {name}"
    if "--help" in arguments:
        return
    try:
        COMMANDS[name].make_context(name, arguments)
    except UsageError as error:
        pytest.fail(f"edge-backbones {' '.join(words)}: {error.format_message()}")


@pytest.mark.parametrize("code", QUOTED)
def test_a_command_or_flag_in_a_sentence_exists(code):
    for name, rest in re.findall(r"edge-backbones ([a-z]+(?:-[a-z]+)*)([^|;&]*)", code):
        options = re.findall(r"(?<![\w-])--[a-z][a-z-]*", rest)
        assert name in COMMANDS, f"there is no edge-backbones {name}"
        assert [option for option in options if option not in {*OPTIONS[name], "--help"}] == []
    if "edge-backbones " not in code and not OTHERS.search(code):
        options = re.findall(r"(?<![\w-])--[a-z][a-z-]*", code)
        assert [option for option in options if option not in {*ANY, *OF_OTHERS}] == []


def test_the_check_refuses_what_cannot_be_typed():
    command = get_command(app).get_command(None, "build")
    with pytest.raises(UsageError):
        command.make_context("build", ["resnet50", "out.bundle", "--no-such-flag"])
    with pytest.raises(UsageError):
        command.make_context("build", ["resnet50", "out.bundle", "--precision", "int9"])
