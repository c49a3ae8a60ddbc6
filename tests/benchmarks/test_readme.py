"""README.md and benchmarks/README.md show the figures of their results files, as they are."""

import pytest

from benchmarks import readme_table


@pytest.mark.parametrize(("page", "blocks"), list(zip(readme_table.PAGES, (1, 8), strict=True)))
def test_the_tables_are_the_results(page, blocks):
    text = page.read_text(encoding="utf-8")
    assert readme_table.rendered(text) == text
    assert len(readme_table._BLOCK.findall(text)) == blocks
