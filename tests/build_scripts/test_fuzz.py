"""Random damage to every kind of file, a few hundred cases of each; `make fuzz` tries a hundred times as many."""

from __future__ import annotations

from pathlib import Path

import pytest

from build_scripts import fuzz, fuzz_kinds
from edge_backbones.bundle.onnx_gate import graph_fault

CASES = {"manifests": 300, "golden": 300, "profiles": 200, "bench": 300, "calibration": 300, "matrix": 100}


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, fuzz_kinds.Kind]:
    return fuzz_kinds.kinds(tmp_path_factory.mktemp("fuzz"))


@pytest.mark.parametrize("name", CASES)
def test_damage_is_refused_in_one_line(kinds, name):
    found = fuzz.run(kinds[name], range(CASES[name]))
    assert not [line for line in found.findings if " took " not in line]
    assert sum(found.endings.values()) == CASES[name]
    assert found.endings.total() > found.endings["read"] > 0


def test_the_gate_takes_any_graph(kinds):
    """What passes goes to OpenVINO in `make fuzz`, in a process that may end."""
    passed = fuzz_kinds.Kind(kinds["graphs"].damaged, graph_fault)
    assert not [line for line in fuzz.run(passed, range(1000)).findings if " took " not in line]


def test_a_finding_is_told(tmp_path: Path):
    def fails(data: bytes) -> None:
        raise KeyError(data)

    found = fuzz.run(fuzz_kinds.Kind(lambda draw: b"x", fails), range(2))
    assert found.findings == ["0: KeyError: \"b'x'\"", "1: KeyError: \"b'x'\""]
