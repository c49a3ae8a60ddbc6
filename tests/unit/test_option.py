"""Test the options dataclasses' texts: each is written once, and help() shows it."""

from __future__ import annotations

import dataclasses
import inspect
import pydoc
from dataclasses import dataclass
from typing import Annotated

import pytest

from edge_backbones import BuildOptions, PlanOptions
from edge_backbones.bench.compare import CompareOptions
from edge_backbones.option import Option, documented, options_of


@documented
@dataclass(frozen=True)
class Sizes:
    """Say how large.

    Raises:
        ValueError: Too large.
    """

    side: Annotated[int, Option("How long a side is.", in_python="In pixels.")] = 1
    hidden: Annotated[str | None, Option("What " + "nobody " * 40 + "types.", has_flag=False)] = None
    bare: int = 0


def test_the_docstring_lists_every_option_before_what_is_raised():
    text = inspect.getdoc(Sizes)
    assert "Attributes:\n    side: How long a side is. In pixels.\n    hidden: What" in text
    assert text.index("Attributes:") < text.index("Raises:") < text.index("ValueError: Too large.")
    assert max(map(len, text.splitlines())) <= 110


def test_signatures_show_types_without_their_texts():
    assert str(inspect.signature(Sizes)).startswith("(side: int = 1, hidden: str | None = None, bare: ")
    assert Sizes(side=3).side == 3


@pytest.mark.parametrize("declared", [BuildOptions, PlanOptions, CompareOptions])
def test_help_explains_every_field_once(declared):
    text = pydoc.plain(pydoc.render_doc(declared))
    assert options_of(declared).keys() == {field.name for field in dataclasses.fields(declared)}
    for name, (_, option) in options_of(declared).items():
        assert " ".join(text.replace("|", " ").split()).count(f"{name}: {option.help}") == 1
