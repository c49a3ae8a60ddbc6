"""Every command in the documents can be typed: the command line itself parses it."""

from __future__ import annotations

import re
from typing import Any

import pytest
import typer
from typer.main import get_command

from edge_backbones.cli.main import app
from tests.docs.snippets import DOCUMENTS, commands, name_of, prose
from tests.unit.test_advice import ANY, COMMANDS, FOREIGN, OPTIONS

UsageError: Any = typer.BadParameter.__base__

# What the documents say already and the command line does not have yet: a command, or a command and an option of it. A test
# fails as soon as it has one: then the line goes, and the documents are held against the command line itself.
PENDING: set[tuple[str, str]] = {
    ("stages", ""),
    ("pack", ""),
    ("compile", "--device"),
    ("verify", "--device"),
}

# Options of other programs: with the program in front of them, or alone in a sentence.
OTHERS = re.compile(FOREIGN.pattern + r"|pip wheel|trtexec|http\.server")
OF_OTHERS = {"--system-site-packages", "--cpu"}

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


def is_pending(words: list[str]) -> bool:
    name, options = words[0], {word.partition("=")[0] for word in words[1:]}
    return (name, "") in PENDING or any((name, option) in PENDING for option in options)


def test_there_are_commands():
    assert len(TYPED) > 50
    assert len(QUOTED) > 50


@pytest.mark.parametrize("words", TYPED)
def test_a_command_in_a_code_block_is_parsed(words):
    if is_pending(words):
        return
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
    for name, rest in re.findall(r"edge-backbones ([a-z]+)([^|;&]*)", code):
        options = re.findall(r"(?<![\w-])--[a-z][a-z-]*", rest)
        if not is_pending([name, *options]):
            assert name in COMMANDS, f"there is no edge-backbones {name}"
            assert [option for option in options if option not in {*OPTIONS[name], "--help"}] == []
    if "edge-backbones " not in code and not OTHERS.search(code):
        pending = {option for _, option in PENDING}
        options = re.findall(r"(?<![\w-])--[a-z][a-z-]*", code)
        assert [option for option in options if option not in {*ANY, *pending, *OF_OTHERS}] == []


@pytest.mark.parametrize(("name", "option"), sorted(PENDING))
def test_what_is_pending_is_not_there_yet(name, option):
    there = name in COMMANDS and (not option or option in OPTIONS[name])
    assert not there, f"edge-backbones {name} {option} exists now: remove it from PENDING"


@pytest.mark.parametrize(("name", "option"), sorted(PENDING))
def test_what_is_pending_is_in_the_documents(name, option):
    text = "\n".join(path.read_text(encoding="utf-8") for path in DOCUMENTS)
    assert re.search(rf"edge-backbones {name}\b[^`\n]*{re.escape(option)}", text), (
        "nothing uses it: remove it from PENDING"
    )


def test_the_check_refuses_what_cannot_be_typed():
    command = get_command(app).get_command(None, "build")
    with pytest.raises(UsageError):
        command.make_context("build", ["resnet50", "out.bundle", "--no-such-flag"])
    with pytest.raises(UsageError):
        command.make_context("build", ["resnet50", "out.bundle", "--precision", "int9"])
