"""The documentation is built as `make docs` builds it, and holds what it promises."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from typer.main import get_command

import edge_backbones
from build_scripts import docs_docstrings, docs_pages
from edge_backbones import errors
from edge_backbones.cli.main import app
from edge_backbones.machine.profiles import list_profiles
from edge_backbones.parity_report import ParityError
from tests.docs.snippets import PAGES, ROOT

ERRORS = sorted(
    {
        kind.__name__
        for kind in (*vars(errors).values(), ParityError)
        if isinstance(kind, type) and issubclass(kind, errors.EdgeBackbonesError)
    }
)


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The built site. Strict: a warning, such as a link that leads nowhere, fails it."""
    assert "mkdocs build --strict\n" in (ROOT / "Makefile").read_text(
        encoding="utf-8"
    )  # with --quiet nothing would fail it
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


class Tags(HTMLParser):
    """Every tag of a page with its attributes, its headings' anchors, and what its links and files are."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.loads: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        if found.get("id"):
            self.ids.add(found["id"])
        if tag in ("script", "img", "iframe", "source", "video") and found.get("src"):
            self.loads.append(found["src"])
        if tag == "link" and found.get("rel") in ("stylesheet", "preconnect", "icon"):
            self.loads.append(found["href"])


def test_no_page_loads_anything_from_elsewhere(site):
    pages = list(site.rglob("*.html"))
    assert len(pages) > 30
    loads = {url for page in pages for url in Tags(page).loads}
    assert loads
    assert [url for url in loads if re.match(r"(https?:)?//", url)] == []


def test_every_public_name_has_a_place_in_the_reference(site):
    ids = set().union(*(Tags(page).ids for page in (site / "reference" / "api").glob("*.html")))
    missing = [name for name in edge_backbones.__all__ if f"edge_backbones.{name}" not in ids]
    assert missing == ["__version__"]


def test_the_reference_of_a_class_has_its_methods_and_none_of_sphinxs_roles(site):
    page = site / "reference" / "api" / "run.html"
    assert {"edge_backbones.EdgeBackbone.graphed", "edge_backbones.EdgeBackbone.close"} <= Tags(page).ids
    assert ":class:" not in page.read_text(encoding="utf-8")


def test_every_command_and_flag_is_on_the_page_of_the_command_line(site):
    page, ids = (site / "reference" / "cli.html").read_text(encoding="utf-8"), Tags(site / "reference" / "cli.html").ids
    group = get_command(app)
    for name in group.list_commands(None):
        assert name in ids
        for parameter in group.get_command(None, name).params:
            for option in (*parameter.opts, *parameter.secondary_opts):
                shown = option if parameter.param_type_name == "option" else parameter.name.upper()
                assert f"<code>{shown}</code>" in page, f"{name} {option}"


def test_the_page_of_the_command_line_has_none_of_the_terminals_markup(site):
    page = (site / "reference" / "cli.html").read_text(encoding="utf-8")
    assert "<code>edge-backbones stages resnet50</code>" in page
    assert re.findall(r"\[/?(?:bold|italic|dim|code)\]|\\\[", page) == []


def test_every_profile_has_a_section(site):
    assert {profile.name for profile in list_profiles()} <= Tags(site / "reference" / "devices.html").ids


def test_every_document_of_the_repository_is_a_page(site):
    for source, place in docs_pages.COPIED.items():
        assert (site / place).with_suffix(".html" if source.endswith(".md") else Path(place).suffix).is_file(), source


def troubleshooting() -> dict[str, str]:
    """What the page says about each error, by class."""
    text = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    parts = re.split(r"^### `(\w+)`$", text, flags=re.MULTILINE)[1:]
    return dict(zip(parts[::2], parts[1::2], strict=True))


def test_every_error_is_explained_and_no_other():
    assert sorted(troubleshooting()) == ERRORS


@pytest.mark.parametrize("name", ERRORS)
def test_an_error_has_a_cause_and_a_fix(name):
    about = troubleshooting()[name]
    assert "**Cause.**" in about
    assert "**Fix.**" in about


def test_the_format_of_a_bundle_is_that_of_its_reader():
    page = docs_pages.filled((ROOT / "docs" / "reference" / "bundle-format.md").read_text(encoding="utf-8"))
    assert "1. manifest.json MUST name every file that a reader opens" in page


def test_everything_that_is_to_be_filled_in_is(site):
    begins = [page for page in PAGES if "filled in by make docs" in page.read_text(encoding="utf-8")]
    assert {page.stem for page in begins} == {"cli", "devices", "bundle-format"}
    for page in begins:
        built = (site / page.relative_to(ROOT / "docs")).with_suffix(".html").read_text(encoding="utf-8")
        assert "make docs" not in built


def test_the_pages_are_all_in_the_navigation():
    listed = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert [page.name for page in PAGES if page.relative_to(ROOT / "docs").as_posix() not in listed] == []


@pytest.mark.parametrize(
    ("docstring", "markdown"),
    [
        ("Call it.\n\n>>> f(1)   # doctest: +SKIP\n... # more\n", "Call it.\n\n```python\nf(1)\n# more\n```\n"),
        ("See :class:`a.b.C` and :func:`~a.d`.", "See `a.b.C` and `a.d`."),
        ("A tree::\n\n    x\n", "A tree:\n\n    x\n"),
        ("A tree.\n\n::\n\n    x\n", "A tree.\n\n\n    x\n"),
    ],
)
def test_a_docstring_becomes_markdown(docstring, markdown):
    assert docs_docstrings.as_markdown(docstring) == markdown


def test_links_of_a_copied_document_lead_to_pages_or_become_paths(monkeypatch):
    monkeypatch.setattr(docs_pages, "ROOT", ROOT)
    page = docs_pages.document("benchmarks/README.md")
    assert "](growth.png)" in page
    assert "results (`benchmarks/results`)" in page
    assert "](results" not in page


@pytest.mark.parametrize(
    ("link", "on_the_site"),
    [
        ("[a](../../SECURITY.md#signing)", "[a](../project/security.md#signing)"),
        ("![a](../../benchmarks/results/feature_maps.png)", "![a](../benchmarks/feature_maps.png)"),
        ("[a](../explanation/limits.md)", "[a](../explanation/limits.md)"),
        ("[a](sign.md#b)", "[a](sign.md#b)"),
        ("[a](../../profiles)", "a (`profiles`)"),
        ("[a](https://example.org/)", "[a](https://example.org/)"),
    ],
)
def test_a_link_of_a_page_to_the_repository_leads_to_its_page_on_the_site(link, on_the_site):
    assert docs_pages.with_links_to_pages(f"{link}.", "docs/how-to/robot.md", "how-to/robot.md") == f"{on_the_site}."


def test_the_picture_is_on_the_first_page(site):
    pictures = [url for url in Tags(site / "index.html").loads if url.endswith(".png") and "feature_maps" in url]
    assert pictures
    assert all((site / url).is_file() for url in pictures)
