"""The parameters of the node: their defaults, their checks, and the file and the page that list them."""

from __future__ import annotations

from pathlib import Path

import pytest

from edge_backbones import InputError
from edge_backbones.integrations.ros2.options import DEFAULTS, DESCRIPTIONS, Options

ROOT = Path(__file__).parents[3]


def test_the_defaults_are_allowed_and_described():
    assert Options.of(DEFAULTS) == Options()
    assert list(DESCRIPTIONS) == list(DEFAULTS)
    assert all(description.endswith(".") for description in DESCRIPTIONS.values())
    assert DEFAULTS["stages"] == [""]  # an empty list has no type in ROS
    assert Options.of({**DEFAULTS, "stages": None}) == Options.of({**DEFAULTS, "stages": []}) == Options()  # stages:=[]


def test_values_are_taken_as_ros_gives_them():
    options = Options.of({**DEFAULTS, "stages": ["layer3", "layer4"], "picture_rate": 2, "threads": 4})
    assert options.stages == ("layer3", "layer4")
    assert (options.picture_rate, options.threads) == (2.0, 4)


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("bundle", 7, "parameter bundle is a text, got 7"),
        ("stages", "layer4", "parameter stages is a list of texts, got 'layer4'"),
        ("stages", [4], r"parameter stages is a list of texts, got \[4\]"),
        ("threads", -1, "parameter threads is a whole number from 0, got -1"),
        ("threads", True, "parameter threads is a whole number from 0, got True"),
        ("threads", 1.5, "parameter threads is a whole number from 0, got 1.5"),
        ("transport", "jpeg", "parameter transport is raw or compressed, got 'jpeg'"),
        ("output", "list", "parameter output is auto, tensor_list, feature_maps or multi_array, got 'list'"),
        ("topics", "one", "parameter topics is each or all, got 'one'"),
        ("publish", "", "parameter publish is subscribed or all, got ''"),
        ("reliability", "best", "parameter reliability is best_effort or reliable, got 'best'"),
        ("output_reliability", None, "parameter output_reliability is best_effort or reliable, got None"),
        ("picture_rate", -1.0, "parameter picture_rate is a number from 0 to 1000, got -1.0"),
        ("picture_rate", float("nan"), "parameter picture_rate is a number from 0 to 1000, got nan"),
        ("diagnostics_period", "1", "parameter diagnostics_period is a number from 0 to 1000, got '1'"),
        ("autostart", "yes", "parameter autostart is true or false, got 'yes'"),
    ],
)
def test_other_values_are_refused_with_what_may_be(name, value, said):
    with pytest.raises(InputError, match=said):
        Options.of({**DEFAULTS, name: value})


def test_the_page_lists_every_parameter_with_its_default():
    page = (ROOT / "docs" / "how-to" / "ros2.md").read_text(encoding="utf-8")
    rows = {line.split("`")[1]: line for line in page.splitlines() if line.startswith("| `")}
    assert [name for name in DEFAULTS if name not in rows] == []
    for name, default in DEFAULTS.items():
        shown = str(default).lower() if isinstance(default, bool) else "" if default in ("", [""]) else default
        assert rows[name].startswith(f"| `{name}` | {shown} |".replace("|  |", "| |"))
