"""Write cpp/include/edge_backbones/unicode.hpp: which characters cannot be printed, for C++ to decide as Python does.

``python -m build_scripts.write_unicode``, after an update of Python's Unicode database.
"""

from __future__ import annotations

import sys
import unicodedata
from collections.abc import Callable
from pathlib import Path

HEADER = Path(__file__).resolve().parents[1] / "edge_backbones/cpp/include/edge_backbones/unicode.hpp"


def ranges(holds: Callable[[str], bool]) -> list[tuple[int, int]]:
    """Return the first and the last code point of every run of characters for which ``holds`` is true."""
    found: list[list[int]] = []
    for point in range(sys.maxunicode + 1):
        if holds(chr(point)):
            if found and found[-1][1] == point - 1:
                found[-1][1] = point
            else:
                found.append([point, point])
    return [(first, last) for first, last in found]


def is_unseen(character: str) -> bool:
    """Return whether `edge_backbones.errors.visible` escapes a character."""
    return unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp") and character not in "\u200c\u200d"


def table(name: str, found: list[tuple[int, int]]) -> str:
    """Return a C++ array of ranges, and its length."""
    cells = [f"{{0x{first:x}, 0x{last:x}}}" for first, last in found]
    lines, line = [], " "
    for cell in cells:
        if len(line) + len(cell) > 118:
            lines.append(line)
            line = " "
        line += f" {cell},"
    lines.append(line)
    body = "\n".join(lines)
    return (
        f"inline constexpr std::uint32_t {name}[][2] = {{\n{body}\n}};\n"
        f"inline constexpr std::size_t {name}_count = sizeof {name} / sizeof {name}[0];\n"
    )


def header() -> str:
    """Return the text of the header."""
    return (
        f"// Unicode {unicodedata.unidata_version}: ranges of code points. Written by build_scripts/write_unicode.py.\n"
        "#pragma once\n\n#include <cstddef>\n#include <cstdint>\n\nnamespace edge_backbones::detail {\n\n"
        "/// Characters that Python's str.isprintable refuses.\n"
        f"{table('not_printable', ranges(lambda character: not character.isprintable()))}\n"
        "/// Control characters, and those that are invisible or change the direction of writing.\n"
        f"{table('unseen', ranges(is_unseen))}\n"
        "}  // namespace edge_backbones::detail\n"
    )


if __name__ == "__main__":
    HEADER.write_text(header(), encoding="utf-8")
