"""`edge-backbones build` and its family as a user types them: outcomes, one-line refusals, interruption."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from build_scripts.photographs import write_crops
from edge_backbones.bundle.reader import Bundle

SMALL = ("--weights", "random:0", "--size", "64x96", "--no-torchscript")


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "edge_backbones.cli.main", *map(str, arguments)]


def run(*arguments: object) -> subprocess.CompletedProcess:
    return subprocess.run(command(*arguments), capture_output=True, text=True, stdin=subprocess.DEVNULL)


@pytest.fixture(scope="module")
def photographs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("crops")
    write_crops(folder, 20)
    (folder / "broken.jpg").write_bytes(b"this is no JPEG")
    return folder


@pytest.fixture(scope="module")
def built(tmp_path_factory, photographs) -> tuple[Path, dict]:
    target = tmp_path_factory.mktemp("built") / "net.bundle"
    options = ("--out-indices=-2,-1", "--precision", "int8", "--precision", "fp16", "--json")
    done = run("build", "resnet10t", target, "--images", photographs, *SMALL, *options)
    assert done.returncode == 0, done.stderr
    return target, json.loads(done.stdout)


def test_build_reports_parity_and_skipped_images(built):
    target, document = built
    assert document["skipped"] == ["broken.jpg"]
    assert document["reasons"]["broken.jpg"].startswith("does not decode as an image: ")
    assert document["preprocessing"].endswith("read from timm's configuration of resnet10t.c3_in1k")
    assert [report["precision"] for report in document["parity"]] == ["int8", "fp16"]
    assert all(stage["passed"] for report in document["parity"] for stage in report["stages"])
    manifest = Bundle.open(target).manifest
    assert manifest.backbone.out_features == ("layer3", "layer4")
    assert manifest.calibration is not None
    assert (manifest.calibration.images, manifest.calibration.held_out) == (16, 16)
    ranges = json.loads((target / "calibration.json").read_text())
    assert len(ranges["network_sha256"]) == len(ranges["data_sha256"]) == 64
    assert min(ranges["ranges"].values()) > 0


def test_compile_replaces_engines_without_touching_the_rest(built):
    target, _ = built
    before = Bundle.open(target).manifest
    done = run("compile", target, "--precision", "fp16")
    assert done.returncode == 0, done.stderr
    after = Bundle.open(target).manifest
    assert {e.name for e in after.engines} == {e.name for e in before.engines}
    assert after.graphs == before.graphs
    assert run("verify", target).returncode == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("resnet51",), "Near names: resnet51q, resnet50"),
        (("resnet10t", "--out-indices=7"), "out_indices must be valid indices for stage_names"),
        (("resnet10t", "--out-features=layer9"), "out_features must be a subset of stage_names: ['act1', 'layer1'"),
        (
            ("resnet10t", "--weights", "nowhere.safetensors"),
            "neither 'pretrained', 'random:SEED' nor a file that exists",
        ),
        (("resnet10t", "--precision", "fp16", "--exclude", "nonsense"), "exclude is of int8 and fp8, and fp16 is what"),
    ],
)
def test_refusals_are_one_line_and_leave_nothing(tmp_path, photographs, arguments, message):
    name, *options = arguments
    done = run("build", name, tmp_path / "x.bundle", "--images", photographs, *SMALL, *options)
    assert done.returncode == (2 if "--exclude" in options else 1)
    *before, line = done.stderr.strip().splitlines()
    assert message in line
    assert set(before) <= {"loading libraries", "loading the network"} or done.returncode == 2, done.stderr
    assert list(tmp_path.iterdir()) == []


def test_an_empty_folder_and_a_folder_of_junk_are_refused(tmp_path):
    empty, junk = tmp_path / "empty", tmp_path / "junk"
    empty.mkdir()
    junk.mkdir()
    (junk / "a.png").write_bytes(b"junk")
    assert f"{empty} has no images" in run("build", "resnet10t", tmp_path / "x", "--images", empty, *SMALL).stderr
    stderr = run("build", "resnet10t", tmp_path / "x", "--images", junk, *SMALL).stderr
    assert "none of its 1 files is read: a.png does not decode as an image: it begins with b'junk'" in stderr


def test_an_existing_bundle_survives_a_failing_build(built, photographs):
    target, _ = built
    before = (target / "manifest.json").read_bytes()
    assert "pass --overwrite" in run("build", "resnet10t", target, "--images", photographs, *SMALL).stderr
    failing = run("build", "resnet10t", target, "--images", photographs, *SMALL, "--overwrite", "--out-indices=9")
    assert failing.returncode == 1
    assert (target / "manifest.json").read_bytes() == before
    assert {path.name for path in target.parent.iterdir()} == {target.name, f"{target.name}.report.html"}


@pytest.mark.skipif(os.name == "nt", reason="signals are a POSIX matter")
def test_ctrl_c_leaves_nothing_and_exits_with_130(tmp_path, photographs):
    arguments = ("build", "resnet18", tmp_path / "x.bundle", "--images", photographs, *SMALL)
    with subprocess.Popen(command(*arguments), stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
        deadline = time.monotonic() + 120
        while not list(tmp_path.glob(".x.bundle.building-*")) and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)  # at once: a second later a fast machine has built it
        stderr = process.communicate(timeout=120)[1]
    assert process.returncode == 130, stderr
    assert "Traceback" not in stderr
    assert list(tmp_path.iterdir()) == []
