"""Make Markdown of docstrings for the API pages: doctests become code blocks, roles of Sphinx become plain code.

An extension of griffe, which mkdocs.yml names.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

_ROLE = re.compile(r":(?:class|func|mod|meth|attr|data):`~?([\w.]+)`")
_DOCTEST = re.compile(r"(?:^>>> .*\n?(?:^(?:\.\.\.|>>>)(?: .*)?\n?)*)", re.MULTILINE)


class MarkdownDocstrings(griffe.Extension):
    """Rewrites the docstring of every object before mkdocstrings reads it."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite one docstring."""
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value)


def as_markdown(text: str) -> str:
    """Return a docstring as Markdown, with its indented literal blocks as they are."""
    text = _ROLE.sub(lambda role: f"`{role[1]}`", text)
    text = _DOCTEST.sub(lambda block: f"```python\n{_without_prompts(block[0])}\n```\n", text)
    text = re.sub(r"^::\n", "", text, flags=re.MULTILINE)  # a lone marker above a literal block
    return re.sub(r"(?<=\S)::$", ":", text, flags=re.MULTILINE)


def _without_prompts(block: str) -> str:
    lines = [line[4:].replace("# doctest: +SKIP", "").rstrip() for line in block.splitlines()]
    return "\n".join(lines)
