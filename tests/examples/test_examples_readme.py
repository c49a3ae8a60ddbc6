"""The page of the examples: it names every program, and every program says what it needs and how it is run."""

from __future__ import annotations

import ast
import re

import pytest

from tests.examples.conftest import ROOT, command_of

PROGRAMS = sorted(path.stem for path in (ROOT / "examples").glob("*.py"))
LONGER = {"gstreamer"}
"""Those beside other systems, which tests/consumers runs."""
SHORT = [program for program in PROGRAMS if program not in LONGER]


def test_the_page_has_a_row_for_every_program_and_every_program_has_a_test():
    page = (ROOT / "examples" / "README.md").read_text(encoding="utf-8")
    assert sorted(re.findall(r"^\| \[(\w+)\.py\]\(\1\.py\)", page, re.MULTILINE)) == PROGRAMS
    tested = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests" / "examples").glob("test_*.py"))
    assert [program for program in SHORT if f'typed("{program}"' not in tested] == []
    assert [name for name in LONGER if not list((ROOT / "tests" / "consumers" / name).glob("test_*.py"))] == []
    assert "](shared_memory/backbone.py)" in page


@pytest.mark.parametrize("program", LONGER)
def test_a_longer_program_says_what_it_needs(program):
    source = (ROOT / "examples" / f"{program}.py").read_text(encoding="utf-8")
    assert re.search(r"^Needs a ", ast.get_docstring(ast.parse(source)), re.MULTILINE)


@pytest.mark.parametrize("program", SHORT)
def test_a_program_says_what_it_needs_and_is_short(program):
    source = (ROOT / "examples" / f"{program}.py").read_text(encoding="utf-8")
    tree = ast.parse(source)
    assert re.search(r"^Needs a ", ast.get_docstring(tree), re.MULTILINE)
    assert len(command_of(program)) > 2
    beside = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    beside += [
        node.body[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.FunctionDef) and ast.get_docstring(node)
    ]
    left_out = {line for node in beside for line in range(node.lineno, node.end_lineno + 1)}
    code = [line for number, line in enumerate(source.splitlines(), 1) if line.strip() and number not in left_out]
    assert len(code) <= 40
