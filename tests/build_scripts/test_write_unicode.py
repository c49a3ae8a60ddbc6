"""unicode.hpp holds what Python knows of characters."""

from __future__ import annotations

import re
import unicodedata

from build_scripts.write_unicode import HEADER, header, is_unseen, ranges
from edge_backbones.errors import visible


def test_the_header_is_up_to_date():
    text = HEADER.read_text(encoding="utf-8")
    if (
        re.search(r"Unicode ([0-9.]+)", text).group(1) == unicodedata.unidata_version
    ):  # another Python knows other characters
        assert text == header(), "run: python -m build_scripts.write_unicode"


def test_what_is_unseen_is_what_errors_escape():
    assert all(is_unseen(chr(point)) == (visible(chr(point)) != chr(point)) for point in range(0x3000))
    assert ranges(lambda character: character in "abcx") == [(97, 99), (120, 120)]
