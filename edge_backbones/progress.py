"""How long-running work reports its progress."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, int, "int | None"], None]
"""``progress(step, done, total)``: called as work proceeds; ``total`` is None while it is not known."""


def no_progress(step: str, done: int, total: int | None) -> None:
    """Report nothing: the default."""
