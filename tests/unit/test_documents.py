"""Links in the documents lead to files that exist in a clone, where they are read before anything is built."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = sorted(ROOT.glob("docs/**/*.md"))
DOCUMENTS = sorted(
    [
        *PAGES,
        *(
            path
            for place in (".", "benchmarks", "benchmarks/results", "examples")
            for path in ROOT.glob(f"{place}/*.md")
        ),
    ]
)


def prose(document: Path) -> str:
    """Return a document without its code."""
    text = re.sub(r"^( *)```.*?^\1```$", "", document.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"`[^`\n]*`", "", text)


def links(document: Path) -> list[tuple[str, str]]:
    """Return what the links and pictures of a document lead to, a file and its anchor; those to other places are left out."""
    found = re.findall(r"\]\(([^)#\s]*)(?:#([^)\s]*))?\)", prose(document))
    return [(target, anchor) for target, anchor in found if "://" not in target]


def anchors(document: Path) -> set[str]:
    """Return the anchors of a document's headings."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"`", "", document.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_lead_to_files(document):
    assert [target for target, _ in links(document) if not (document.parent / target).exists()] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_anchors_lead_to_headings(document):
    written_later = ROOT / "docs" / "reference" / "cli.md"  # its headings are the commands
    missing = []
    for target, anchor in links(document):
        page = (document.parent / target).resolve() if target else document
        if anchor and page != written_later and anchor not in anchors(page):
            missing.append(f"{target}#{anchor}")
    assert missing == []


def test_the_pages_have_links_out_of_docs_and_none_to_what_is_built():
    targets = [(page.parent / target).resolve() for page in PAGES for target, _ in links(page)]
    assert ROOT / "SECURITY.md" in targets
    assert ROOT / "benchmarks" / "results" / "feature_maps.png" in targets
    assert [target for target in targets if target.is_relative_to(ROOT / "site")] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_a_page_has_no_bare_placeholder(page):
    assert "{{" not in prose(page)


def test_every_page_can_be_reached_from_the_first_without_a_menu():
    reached, todo = set(), [ROOT / "docs" / "index.md"]
    while todo:
        page = todo.pop()
        if page not in reached:
            reached.add(page)
            todo += [found for target, _ in links(page) if (found := (page.parent / target).resolve()) in PAGES]
    assert [page for page in PAGES if page not in reached] == []


def test_the_text_of_the_wheel_installs_the_wheel_itself_as_the_readme_does():
    wheel = re.search(r"edge_backbones-[\w.-]+\.whl", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert wheel is not None
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8").partition("authors = ")[0]
    installs = re.findall(r"^pip install .*$", text, re.MULTILINE)
    assert len(installs) == 2
    assert all(f"'./{wheel[0]}[" in line for line in installs)


def test_the_readme_has_such_links():
    assert "](docs/index.md)" in (ROOT / "README.md").read_text(encoding="utf-8")
