"""Numbers and names in the words of the report."""

from __future__ import annotations

from collections.abc import Iterable


def times(sizes: Iterable[int]) -> str:
    """Write sizes as 3 × 224 × 224."""
    return " \u00d7 ".join(str(size) for size in sizes)


def megabytes(size: int) -> str:
    """Write a number of bytes in MB, small ones in kB."""
    return f"{size / 1e6:.1f} MB" if size >= 1e5 else f"{size / 1e3:.1f} kB"


def fixed(value: float, digits: int = 2) -> str:
    """Write a number with so many digits behind the point."""
    return f"{value:.{digits}f}"


def signs(text: object) -> str:
    """Write >= and <= as one sign each."""
    return str(text).replace(">=", "\u2265").replace("<=", "\u2264")


def yes_or_no(value: bool) -> str:
    """Write a truth value as yes or no."""
    return "yes" if value else "no"


def computed(precision: str, computes_in: object) -> str:
    """Return words that follow a precision and say what its engine computes in; empty where the engine's key does not say.

    Of int8 it is the rest, what is not int8, that is meant.
    """
    if not isinstance(computes_in, str):
        return ""
    return f" with a {computes_in} rest" if precision == "int8" else f", computed in {computes_in}"
