"""The README shows what was measured."""

from __future__ import annotations

from benchmarks import readme_table


def test_the_table_of_figures_is_the_results_file():
    assert readme_table.render(readme_table.shown_path()) in readme_table.README.read_text(encoding="utf-8")
