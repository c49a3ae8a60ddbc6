"""The coverage sweep: a few representatives through its own child, what survives a crash, and the page."""

from __future__ import annotations

import asyncio
import importlib.metadata
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from build_scripts import coverage_page, sweep
from build_scripts.architectures import LAST_SEEN, NEEDS_MORE, TIMM, TRANSFORMERS, transformers_config

# torch, timm and transformers warn about themselves while a network is made.
pytestmark = pytest.mark.filterwarnings("ignore")

QUICK = ["timm/lcnet_035", "timm/resnet10t", "transformers/resnet", "transformers/dinov2"]


def is_newer(library: str) -> bool:
    """Is the installed release newer than the one that the tables were made for? Then they may lack something."""
    installed, seen = importlib.metadata.version(library), LAST_SEEN[library]
    return [int(n) for n in installed.split(".")[:3]] > [int(n) for n in seen.split(".")[:3]]


# ---- the tables -----------------------------------------------------------------------------------------------------


def test_every_module_of_timm_has_a_representative() -> None:
    import timm

    modules = {module for module, _ in TIMM.values()}
    for name, (module, _) in TIMM.items():
        assert module not in timm.list_modules() or name in timm.list_models(module=module)
    if not is_newer("timm"):
        assert set(timm.list_modules()) <= modules
    assert len(set(TIMM.values())) == len(TIMM)


def test_every_architecture_of_transformers_has_a_config() -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_BACKBONE_MAPPING_NAMES

    known = set(MODEL_FOR_BACKBONE_MAPPING_NAMES)
    if not is_newer("transformers"):
        assert known - NEEDS_MORE <= set(TRANSFORMERS)
    for name in known & set(TRANSFORMERS):
        config = transformers_config(name)
        assert config.model_type == name
        assert len(getattr(config, "vision_config", config).out_indices) > 1


def test_an_architecture_that_this_release_lacks_is_said_to_be_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TRANSFORMERS, "no_such_net", TRANSFORMERS["resnet"])
    with pytest.raises(KeyError, match="no_such_net"):
        transformers_config("no_such_net")


def test_items_are_chosen_by_pattern() -> None:
    assert len(sweep.chosen(None)) == len(TIMM) + len(TRANSFORMERS)
    assert sweep.chosen(["timm/resnet10t", "transformers/swin*"]) == [
        "transformers/swin",
        "transformers/swinv2",
        "timm/resnet10t",
    ]
    assert sweep.chosen(["timm"]) == []


# ---- one network ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", QUICK)
def test_a_representative_builds_passes_and_compiles(name: str, tmp_path: Path) -> None:
    result = sweep.measure(name, tmp_path)
    assert result == json.loads((tmp_path / "result.json").read_text())
    assert result["causes"] == {}
    assert result["fp32"]["passed"]
    assert result["fp32"]["relative"] < 1e-4
    assert result["input"]["height"] != result["input"]["width"]
    assert result["batch"] == [1, 4]
    assert len(result["stages"]) > 1
    assert result["parameters"] > 10_000
    assert result["fp16"]["cosine"] > 0.999
    for precision in ("fp16", "int8"):
        assert result[precision]["rtx_plan_bytes"] > 10_000


def test_an_engine_and_its_graph_that_disagree_are_found(tmp_path: Path) -> None:
    result = sweep.measure("transformers/resnet", tmp_path)
    of_graph = result["int8"]["graph_sqnr_db"]
    for of_engine, finding in ((of_graph - 10, "the engine has"), (of_graph + 30, "computed in half the graph has")):
        with pytest.raises(sweep.Finding, match=finding):
            sweep.compare_with_graph(tmp_path / "int8.bundle", "int8", {"int8": {"sqnr_db": of_engine}})


def test_a_network_that_is_refused_leaves_a_cause(tmp_path: Path) -> None:
    result = sweep.measure("timm/no_such_net", tmp_path)
    assert set(result["causes"]) == {"fp32"}
    assert "no_such_net" in result["causes"]["fp32"]
    assert "fp32" not in result


def test_other_precisions_are_built_when_one_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from edge_backbones.toolchain.calibration import calibrate

    def broken(*arguments: object, **options: object) -> None:
        raise IndexError("no\n  ranges")

    monkeypatch.setattr(calibrate, "calibrate", broken)
    result = sweep.measure("timm/lcnet_035", tmp_path)
    assert set(result["causes"]) == {"int8"}
    assert result["causes"]["int8"].startswith("IndexError: no ranges (test_sweep.py:")
    assert result["fp32"]["passed"]
    assert result["fp16"]["rtx_plan_bytes"] > 10_000
    assert "int8" not in result


def test_causes_are_one_line() -> None:
    assert sweep.one_line("Traceback:\n  File x\n\nKeyError: 'a'") == "Traceback: File x KeyError: 'a'"
    assert len(sweep.one_line("word " * 1000)) == 300
    with pytest.raises(AssertionError) as caught:
        raise AssertionError
    assert sweep.one_line(caught.value).startswith("AssertionError (test_sweep.py:")


# ---- processes ------------------------------------------------------------------------------------------------------


def run(script: str, folder: Path, timeout: float) -> dict[str, Any]:
    return asyncio.run(sweep.run_child([sys.executable, "-c", script, str(folder)], folder, timeout))


def is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    stat = Path(f"/proc/{process}/stat")
    return not stat.exists() or stat.read_text().split()[2] != "Z"


def test_a_child_that_takes_too_long_is_stopped_with_its_children(tmp_path: Path) -> None:
    script = """
import pathlib, subprocess, sys, time
folder = pathlib.Path(sys.argv[1])
(folder / "result.json").write_text('{"step": "rtx int8:compiling", "fp32": {"passed": true}}')
sleeper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
(folder / "pid").write_text(str(sleeper.pid))
time.sleep(600)
"""
    started = time.monotonic()
    result = run(script, tmp_path, 3)
    assert time.monotonic() - started < 60
    assert result["causes"] == {"rtx int8": "stopped after 3 s (compiling)"}
    assert result["fp32"] == {"passed": True}
    deadline = time.monotonic() + 30
    while is_alive(int((tmp_path / "pid").read_text())) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_alive(int((tmp_path / "pid").read_text()))


def test_a_child_that_crashes_leaves_what_it_had(tmp_path: Path) -> None:
    script = """
import os, pathlib, signal, sys
(pathlib.Path(sys.argv[1]) / "result.json").write_text('{"step": "fp32:exporting", "causes": {}}')
os.kill(os.getpid(), signal.SIGSEGV)
"""
    assert run(script, tmp_path, 60)["causes"] == {"fp32": "died of SIGSEGV (exporting)"}


def test_a_child_that_does_not_start_says_so(tmp_path: Path) -> None:
    assert run("import no_such_module", tmp_path, 60)["causes"] == {
        "fp32": "ModuleNotFoundError: No module named 'no_such_module' (starting)"
    }


def test_only_what_is_missing_failed_or_old_is_done_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, names, started = tmp_path / "coverage.json", list(sweep.ITEMS[:4]), []

    async def child(command: list[str], folder: Path, timeout: float, jobs: int) -> dict[str, Any]:
        name = command[-2]
        started.append(name)
        await asyncio.sleep(0)
        return GOOD if name != names[1] else {"causes": {"fp32": "broken"}, "seconds": {"all": 1}}

    monkeypatch.setattr(sweep, "run_child", child)
    asyncio.run(sweep.sweep(names[:3], out, jobs=2, timeout=9))
    assert sorted(started) == sorted(names[:3])
    assert f"{names[1]}: fp32: broken" in capsys.readouterr().out

    results = sweep.read_results(out)
    results[names[2]]["versions"]["torch"] = "2.0"
    sweep.write_json(out, {"results": results})
    started.clear()
    asyncio.run(sweep.sweep(names, out, jobs=2, timeout=9))
    assert sorted(started) == sorted(names[1:])
    assert set(sweep.read_results(out)) == set(names)

    started.clear()
    asyncio.run(sweep.sweep(names[:1], out, jobs=2, timeout=9))
    assert not started
    asyncio.run(sweep.sweep(names[:1], out, jobs=2, timeout=9, fresh=True))
    assert started == names[:1]


def test_a_real_child_writes_the_file(tmp_path: Path) -> None:
    out = tmp_path / "coverage.json"
    asyncio.run(sweep.sweep(["timm/lcnet_035"], out, jobs=1, timeout=300))
    (result,) = sweep.read_results(out).values()
    assert result["causes"] == {}
    assert (result["module"], result["feature_class"]) == ("mobilenetv3", "MobileNetV3Features")
    assert result["versions"]["timm"] == importlib.metadata.version("timm")
    assert [path.name for path in tmp_path.iterdir()] == ["coverage.json"]


# ---- the page -------------------------------------------------------------------------------------------------------

GOOD = {
    "causes": {},
    "seconds": {"all": 12.3},
    "input": {"height": 96, "width": 128},
    "stages": ["stage3", "stage4"],
    "parameters": 1_250_000,
    "fp32": {"passed": True, "relative": 7.6e-7, "cosine": 1.0, "sqnr_db": 122.0},
    "fp16": {"passed": True, "relative": 1e-3, "cosine": 0.999999, "sqnr_db": 56.0, "rtx_plan_bytes": 2_600_000},
    "int8": {"passed": True, "relative": 0.07, "cosine": 0.9973, "sqnr_db": 22.5, "rtx_plan_bytes": 1_400_000},
}


def results(**changed: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """A whole sweep where everything is good, but for the items named by their model."""
    versions = {"versions": {"torch": "2.9"}}
    found = {item: {**sweep.describe(item), **GOOD, **versions} for item in sweep.ITEMS}
    for item in sweep.ITEMS:
        if (model := item.partition("/")[2]) in changed:
            found[item] = {**sweep.describe(item), "seconds": {"all": 5}, **changed[model], **versions}
    return found


def test_the_page_says_what_passed() -> None:
    page = coverage_page.render(results())
    assert f"| transformers: fp32 parity | {len(TRANSFORMERS)} of {len(TRANSFORMERS)} |" in page
    assert f"| timm: fp32 parity | {len(TIMM)} of {len(TIMM)} |" in page
    assert (
        "| resnet, FeatureListNet | resnet10t: stage3, stage4 | 96 x 128 | 1.2 M | 8e-07 | 1.0000, 56 dB "
        "| 0.9973, 22 dB | 2.6 MB | 1.4 MB | 12 |"
    ) in page
    assert "Causes" not in page
    assert "missed" not in page
    assert "torch 2.9" in page


def test_the_page_says_what_failed_and_why() -> None:
    int8 = {key: value for key, value in GOOD["int8"].items() if key != "rtx_plan_bytes"}
    page = coverage_page.render(
        results(
            resnet={"causes": {"fp32": "no | such\nthing".replace("\n", " ")}},
            resnet10t={**GOOD, "int8": int8, "causes": {"rtx int8": "unsupported"}},
        )
    )
    assert f"| transformers: fp32 parity | {len(TRANSFORMERS) - 1} of {len(TRANSFORMERS)} (missed) |" in page
    assert "- resnet, fp32: no / such thing" in page
    assert "- resnet10t, rtx int8: unsupported" in page
    assert f"int8 graph of those | {len(sweep.ITEMS) - 2} of {len(sweep.ITEMS) - 1} (missed) |" in page
    figures = coverage_page.figures(results(resnet10t={"causes": {"fp32": "x"}}, crossvit_tiny_240={"causes": {}}))
    assert all(figure.reached for figure in figures)


def test_what_was_not_measured_has_not_passed(tmp_path: Path) -> None:
    source, page = tmp_path / "coverage.json", tmp_path / "coverage.md"
    sweep.write_result(source, "timm/resnet10t", results()["timm/resnet10t"])
    figures = coverage_page.write(source, page)
    assert [figure.count for figure in figures] == [0, 1, 1, 1]
    assert page.read_text() == coverage_page.render(sweep.read_results(source))
