"""The table of what TensorRT-RTX refuses: one network through its own child, what is done again, and the table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from build_scripts import rtx_formats

# torch and timm warn about themselves while a network is made.
pytestmark = pytest.mark.filterwarnings("ignore")

NAMES = [variant.name for variant in rtx_formats.VARIANTS]


def result(**changes: Any) -> dict[str, Any]:
    return {"plan_bytes": dict.fromkeys(NAMES, 1), "causes": {}, "versions": {"a": "1"}, "finished": True, **changes}


def test_a_network_is_compiled_in_every_form(tmp_path: Path) -> None:
    found = rtx_formats.measure("timm/resnet10t", tmp_path, NAMES)
    assert found == json.loads((tmp_path / "result.json").read_text())
    assert found["causes"] == {}
    assert list(found["plan_bytes"]) == NAMES
    assert min(found["plan_bytes"].values()) > 10_000
    assert found["input"][0] != found["input"][1]


def test_a_refusal_is_kept_and_the_other_forms_are_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def compiled(graph: object, variant: rtx_formats.Variant, folder: Path) -> bytes:
        if variant.precision == "bf16":
            raise ValueError("no kernel")
        return b"plan"

    monkeypatch.setattr(rtx_formats, "compiled", compiled)
    monkeypatch.setattr(rtx_formats, "export_at", lambda size, source, folder: _Graph())
    found = rtx_formats.measure("timm/resnet10t", tmp_path, NAMES)
    assert list(found["causes"]) == ["bf16"]
    assert found["causes"]["bf16"].startswith("ValueError: no kernel")
    assert list(found["plan_bytes"]) == [name for name in NAMES if name != "bf16"]
    assert rtx_formats.is_done({**found, "versions": {}}, {}, NAMES)


class _Size:
    opt = 64


class _Input:
    height = width = _Size


class _Graph:
    input = _Input


@pytest.mark.parametrize(
    ("known", "done"),
    [
        (None, False),
        (result(), True),
        (result(versions={"a": "2"}), False),
        (result(finished=False), False),  # it crashed or was stopped
        (result(plan_bytes=dict.fromkeys(NAMES[1:], 1)), False),  # a form is new
        (result(plan_bytes=dict.fromkeys(NAMES[1:], 1), causes={NAMES[0]: "refused"}), True),
        (result(plan_bytes={}, causes={"export": "no ONNX form"}), True),
    ],
)
def test_what_has_an_answer_is_not_done_again(known: dict[str, Any] | None, done: bool) -> None:
    assert rtx_formats.is_done(known, {"a": "1"}, NAMES) is done


def test_the_table_counts_plans_and_lists_refusals() -> None:
    refused = result(plan_bytes=dict.fromkeys(NAMES[:-1], 1), causes={NAMES[-1]: "no fp8 kernel"})
    told = rtx_formats.table({"timm/b": refused, "timm/a": result()})
    counts = [line.split("  ")[-1].strip() for line in told.splitlines()[1 : 1 + len(NAMES)]]
    assert [count[-6:] for count in counts] == ["2 of 2"] * (len(NAMES) - 1) + ["1 of 2"]
    assert rtx_formats.is_done(result(plan_bytes={NAMES[1]: 1}), {"a": "1"}, NAMES[1:2])
    assert told.endswith("\n\ntimm/b: fp8: no fp8 kernel")
    assert rtx_formats.table({"timm/a": result()}).endswith("no refusals")
