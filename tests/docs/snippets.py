"""The code blocks of the documents, and the commands in them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
PAGES = sorted(ROOT.glob("docs/**/*.md"))
DOCUMENTS = [
    *PAGES,
    ROOT / "README.md",
    ROOT / "SECURITY.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    ROOT / "examples" / "README.md",
]

_FENCE = re.compile(r"^( *)```([^\n]*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
_BETWEEN = {"&&", "||", "|", ";"}


class Snippet(NamedTuple):
    """A code block: where it stands, its language, what else its fence says, and its text."""

    page: str
    line: int
    language: str
    classes: frozenset[str]
    reason: str
    code: str


def snippets(path: Path) -> Iterator[Snippet]:
    """Yield the code blocks of a document. A fence is ```python, or ```{ .python .not-run data-reason="..." }."""
    text = path.read_text(encoding="utf-8")
    for found in _FENCE.finditer(text):
        indent, info, code = found.groups()
        words = [word.removeprefix(".") for word in shlex.split(info.strip("{} "))]
        reason = next((word.partition("=")[2] for word in words if word.startswith("data-reason=")), "")
        code = "".join(line.removeprefix(indent) for line in code.splitlines(keepends=True))
        line = text.count("\n", 0, found.start()) + 2
        yield Snippet(name_of(path), line, words[0] if words else "", frozenset(words[1:]), reason, code)


def name_of(path: Path) -> str:
    """Return a document's path from the top of the repository."""
    return path.relative_to(ROOT).as_posix()


def commands(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Yield every command with edge-backbones in the shell blocks of a document: its line, and its words without the name."""
    for snippet in snippets(path):
        if snippet.language not in ("sh", "bash", "shell", "console"):
            continue
        for number, line in _lines(snippet.code):
            for words in _simple_commands(line):
                if words and Path(words[0]).name == "edge-backbones":
                    yield snippet.line + number, words[1:]


def _lines(code: str) -> Iterator[tuple[int, str]]:
    """Yield the commands of a shell block with their line: what ends with a backslash or inside quotes goes on."""
    begun, text = 0, ""
    for number, line in enumerate(code.splitlines()):
        begun = begun if text else number
        text = f"{text}\n{line}" if text else line
        if text.endswith("\\"):
            text = text[:-1]
            continue
        try:
            shlex.split(text, comments=True)
        except ValueError:  # a quotation that is still open
            continue
        yield begun, text
        text = ""
    assert not text, f"a quotation is never closed: {text}"


def _simple_commands(line: str) -> Iterator[list[str]]:
    words: list[str] = []
    for word in shlex.split(line, comments=True):
        if word in _BETWEEN:
            yield words
            words = []
        elif words or not re.match(r"\w+=", word):  # VARIABLE=value in front of a command
            words.append(word)
    yield words


def prose(path: Path) -> str:
    """Return a document without its code blocks."""
    return _FENCE.sub("", path.read_text(encoding="utf-8"))
