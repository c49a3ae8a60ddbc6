"""README.md shows the figures of its results files, as they are."""

from benchmarks import readme_table


def test_the_tables_are_the_results():
    text = readme_table.README.read_text(encoding="utf-8")
    assert readme_table.rendered(text) == text
    assert len(readme_table._BLOCK.findall(text)) == 4
