"""Fill in what the documentation takes from the code or from other documents. A hook of mkdocs.

The pages of docs/ can be read in a clone: their links lead to files of the repository. When ``make docs`` runs, this hook

- fills ``reference/cli.md`` with every command and flag, read off the command line itself, ``reference/devices.md`` with the
  device profiles, and ``reference/bundle-format.md`` with the rules of the format;
- adds ``project/``, ``benchmarks/`` and ``examples/``: CHANGELOG.md, SECURITY.md, CONTRIBUTING.md, the figures and the
  programs, which lie elsewhere;
- turns links to those documents into links to their pages.

What is filled in is made on every run, so it cannot be older than what it describes.
"""

from __future__ import annotations

import enum
import posixpath
import re
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from typer.main import get_command

from edge_backbones.bundle import reader
from edge_backbones.cli import main as cli
from edge_backbones.machine import profiles

ROOT = Path(__file__).parents[1]
COPIED = {
    "CHANGELOG.md": "project/changelog.md",
    "SECURITY.md": "project/security.md",
    "CONTRIBUTING.md": "project/contributing.md",
    "benchmarks/README.md": "benchmarks/index.md",
    "benchmarks/results/coverage.md": "benchmarks/coverage.md",
    "benchmarks/results/preprocessing.md": "benchmarks/preprocessing.md",
    "benchmarks/results/sensitive.md": "benchmarks/sensitive.md",
    "benchmarks/results/growth.png": "benchmarks/growth.png",
    "benchmarks/results/feature_maps.png": "benchmarks/feature_maps.png",
    "edge_backbones/bundle/manifest.schema.json": "reference/manifest.schema.json",
    "examples/README.md": "examples/index.md",
    "examples/heat.png": "examples/heat.png",
    **{f"examples/{path.name}": f"examples/{path.name}" for path in sorted((ROOT / "examples").glob("*.py"))},
    **{f"examples/shared_memory/{name}": f"examples/shared_memory/{name}" for name in ("backbone.py", "camera.cpp")},
}
"""Files of the repository that the site holds, and where."""
_TITLES = {
    "benchmarks/results/sensitive.md": "Networks that amplify rounding",
    "benchmarks/results/preprocessing.md": "Preprocessing",
    "benchmarks/README.md": "Benchmarks",
}
_LINK = re.compile(r"\]\(([^)\s#]+)(#[^)\s]*)?\)")
_FILLED = re.compile(r"<!-- (\w+): filled in by make docs -->\n.*?<!-- end -->\n", re.DOTALL)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the documents that lie outside docs/ to the site. Called by mkdocs."""
    for source, place in COPIED.items():
        path = ROOT / source
        content = document(source) if path.suffix == ".md" else path.read_bytes()
        files.append(File.generated(config, place, content=content))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Fill in what a page takes from the code, and lead its links to pages. Called by mkdocs."""
    place = page.file.src_uri
    return markdown if place in COPIED.values() else with_links_to_pages(filled(markdown), f"docs/{place}", place)


def filled(markdown: str) -> str:
    """Replace the blocks between ``<!-- NAME: filled in by make docs -->`` and ``<!-- end -->`` by what the code says."""
    writers = {"command_line": command_line, "devices": devices, "bundle_format": bundle_format}
    return _FILLED.sub(lambda block: writers[block[1]]() + "\n", markdown)


def document(source: str) -> str:
    """Return a document of the repository as a page: links go to pages of the site, or become plain paths."""
    text = (ROOT / source).read_text(encoding="utf-8")
    if (title := _TITLES.get(source)) and not text.startswith(f"# {title}\n"):
        text = f"# {title}\n\n" + re.sub(r"\A# .*\n+", "", text)
    return with_links_to_pages(text, source, COPIED[source])


def with_links_to_pages(text: str, source: str, place: str) -> str:
    """Lead the links of a document to pages of the site. What is no page becomes a plain path.

    ``source``: where the document lies in the repository. ``place``: where it lies in the site.
    """

    def link(found: re.Match[str]) -> str:
        target, anchor = found[1], found[2] or ""
        if "://" in target:
            return found[0]
        within = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        page = within.removeprefix("docs/") if within.startswith("docs/") else COPIED.get(within)
        return f"]({posixpath.relpath(page, posixpath.dirname(place))}{anchor})" if page else f"] (`{within}`)"

    return re.sub(r"\[([^]]*)\] \(`", r"\1 (`", _LINK.sub(link, text))


def bundle_format() -> str:
    """Return the rules of the format, from the docstring that specifies it."""
    text = (reader.__doc__ or "").partition("\n")[2].strip()
    return re.sub(r"^::\n", "", text, flags=re.MULTILINE).replace("``", "`")


def command_line() -> str:
    """Return the sections about every command, in the order of ``edge-backbones --help``."""
    group: Any = get_command(cli.app)
    context = group.make_context("edge-backbones", [], resilient_parsing=True)
    lines = [
        *_exit_codes(),
        "",
        "| command | what it does |",
        "|---|---|",
    ]
    commands = {name: group.get_command(context, name) for name in group.list_commands(context)}
    shown = {name: command for name, command in commands.items() if not getattr(command, "hidden", False)}
    lines += [f"| [{name}](#{name}) | {_cell(_sentences(command.help)[0])} |" for name, command in shown.items()]
    general = list(_parameters(group))
    if general:
        lines += ["", "Before the name of a command:", "", *_options(group, general)]
    for name, command in shown.items():
        lines += ["", *_command(name, command)]
    return "\n".join(lines) + "\n"


def _exit_codes() -> Iterator[str]:
    """Yield the sentence about exit codes, from the docstring of the command line."""
    for paragraph in (cli.__doc__ or "").split("\n\n"):
        if paragraph.startswith("Exit codes"):
            yield " ".join(paragraph.split()).replace("``", "`")


def _command(name: str, command: Any) -> list[str]:
    """Return the section about one command."""
    wanted = [p for p in command.params if not getattr(p, "hidden", False)]
    arguments = [p for p in wanted if p.param_type_name == "argument"]
    words = " ".join(f"{p.name.upper()}" if p.required else f"[{p.name.upper()}]" for p in arguments)
    lines = [f"## {name}", "", f"```text\nedge-backbones {name} {words} [OPTIONS]\n```", ""]
    lines += [_typographic(part) + "\n" for part in (command.help or "").split("\n\n")]
    if arguments:
        lines += ["| argument | |", "|---|---|"]
        lines += [f"| `{p.name.upper()}` | {_cell(getattr(p, 'help', '') or '')} |" for p in arguments] + [""]
    panels: dict[str, list[Any]] = {}
    for parameter in _parameters(command):
        panels.setdefault(getattr(parameter, "rich_help_panel", None) or "Options", []).append(parameter)
    for panel, parameters in panels.items():
        lines += [f"**{panel}**", "", *_options(command, parameters), ""]
    return lines


def _parameters(command: Any) -> Iterator[Any]:
    """Yield the options of a command that its help shows."""
    for parameter in command.params:
        if parameter.param_type_name == "option" and not getattr(parameter, "hidden", False):
            yield parameter


def _options(command: Any, parameters: list[Any]) -> list[str]:
    """Return a definition list with one entry per option; unlike a table it needs no width."""
    hints = typing.get_type_hints(command.callback)
    lines = []
    for parameter in parameters:
        flags = ", ".join(f"`{flag}`" for flag in (*parameter.opts, *parameter.secondary_opts))
        value = _value(parameter, hints.get(parameter.name, bool))  # typer adds flags of its own
        text = _typographic(parameter.help or "").replace("<", "&lt;")
        lines += [f"{flags} {value}".rstrip(), f":   {text}{_default(parameter)}", ""]
    return lines


def _value(parameter: Any, annotation: Any) -> str:
    """Return what an option takes: its choices, or the word for its value."""
    if parameter.is_flag:
        return ""
    if choices := _choices(annotation):
        return ", ".join(f"`{choice}`" for choice in choices)
    kind = _kind(annotation)
    return f"`{parameter.metavar or ('TEXT' if kind is str else kind.__name__.upper())}`"


def _choices(annotation: Any) -> list[str]:
    """Return the values that a type allows, where it lists them."""
    if isinstance(annotation, type) and issubclass(annotation, enum.Enum):
        return [member.value for member in annotation]
    if typing.get_origin(annotation) is typing.Literal:
        return list(typing.get_args(annotation))
    return [choice for part in typing.get_args(annotation) for choice in _choices(part)]


def _kind(annotation: Any) -> type:
    """Return the type of one value of an annotation such as ``list[Path] | None``."""
    parts = [part for part in typing.get_args(annotation) if part is not type(None)]
    kind: type = _kind(parts[0]) if parts else annotation
    return kind


def _default(parameter: Any) -> str:
    """Return the sentence about an option's default, where its help shows one."""
    default = parameter.default
    if not getattr(parameter, "show_default", False) or callable(default) or default in (None, False, ()):
        return ""
    if default is True and parameter.secondary_opts:
        return f" Default: `{parameter.opts[0]}`."
    return f" Default: `{getattr(default, 'value', default)}`."


def _sentences(text: str | None) -> list[str]:
    """Return the first paragraph of a help text as one line, and the rest."""
    return [" ".join(part.split()) for part in (text or "").split("\n\n")] or [""]


def _typographic(text: str) -> str:
    """Return a paragraph of a help text on one line. What a terminal shows in bold, commands and flags, is code."""
    text = re.sub(r"\[bold\](.*?)\[/bold\]|\*\*(edge-backbones [^*]+)\*\*", r"`\1\2`", " ".join(text.split()))
    return text.replace("\\[", "[")  # rich's escape


def _cell(text: str) -> str:
    """Return a text that may stand in a cell of a table."""
    return _typographic(text).replace("|", "\\|").replace("<", "&lt;")


def devices() -> str:
    """Return a section about every device profile."""
    sections = [
        f"## {profile.name}\n\n```text\n{profiles.explain(profile)}\n```" for profile in profiles.list_profiles()
    ]
    return "\n\n".join(sections)
