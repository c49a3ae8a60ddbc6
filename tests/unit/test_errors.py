"""What is quoted of another library's exception in a message of ours."""

from __future__ import annotations

import pytest

from edge_backbones.errors import first_line, root_cause


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (RuntimeError("\n\n  sizes differ\nFor more, see https://a.b"), "sizes differ"),
        (RuntimeError("Error(s) in loading state_dict for Net:\n\tsize mismatch for stem"), "size mismatch for stem"),
        (RuntimeError("heading:\nof a heading:\nthe cause"), "the cause"),
        (RuntimeError("nothing but a heading:"), "nothing but a heading:"),
        (AssertionError(), "AssertionError"),
        (ValueError(" \n "), "ValueError"),
        (KeyError("stem"), "KeyError: 'stem'"),
        (OSError(2, "No such file or directory", "a.bin"), "[Errno 2] No such file or directory: 'a.bin'"),
    ],
)
def test_the_first_line_that_says_something(error, said):
    assert first_line(error) == said


def test_the_type_may_stand_in_front_and_once_only():
    assert first_line(TypeError("not a tensor"), typed=True) == "TypeError: not a tensor"
    assert first_line(KeyError("stem"), typed=True) == "KeyError: 'stem'"
    assert first_line(AssertionError(), typed=True) == "AssertionError"


def test_the_root_of_a_chain_is_what_was_raised_first():
    first, second, third = ValueError("the cause"), RuntimeError("translating"), RuntimeError("Failed to export")
    second.__cause__, third.__cause__ = first, second
    assert root_cause(third) is first
    assert root_cause(first) is first
