"""A bundle gains plans for GPUs that are not here: held back until a device has measured them, and never in the CPU's way."""

from __future__ import annotations

import json
import re

import msgspec
import numpy as np
import pytest

from edge_backbones import Bundle, EdgeBackbone, compile_bundle, verify_bundle
from edge_backbones.bundle.writer import write_manifest
from edge_backbones.cli.main import _run
from edge_backbones.engines.tensorrt.options import PlanOptions
from edge_backbones.errors import CompileError, EngineMismatchError, InputError, IntegrityError
from edge_backbones.machine import gpus
from edge_backbones.spec import Precision
from edge_backbones.testing import pooled

pytestmark = pytest.mark.usefixtures("in_process")  # tests replace what is called there

pytest.importorskip("tensorrt_rtx_bindings", reason="the 'rtx' extra is not installed", exc_type=ImportError)


def test_a_plan_for_another_gpu_waits_until_it_is_measured(bundle, monkeypatch):
    (added,) = compile_bundle(bundle.path, flavour="tensorrt_rtx", plan=PlanOptions(targets=("sm_89",))).engines
    grown = Bundle.open(bundle.path)
    grown.check_files()
    assert [engine.key.flavour for engine in grown.manifest.engines] == ["openvino", "tensorrt_rtx"]
    assert added.key.gpu.architectures == ("sm_89",)
    assert added.file.path.endswith(".plan")
    assert not added.parity.measured
    assert not added.parity.passed
    assert added.parity.gate == grown.manifest.engines[0].parity.gate
    assert bytes(grown.read(added.file))[:4] == b"vtrt"  # nothing in front: any tool of TensorRT-RTX opens it

    # The CPU engine goes on as if nothing had happened.
    images = np.random.default_rng(0).random(grown.manifest.input.opt_shape, np.float32)
    with EdgeBackbone.from_pretrained(bundle.path) as backbone:
        for actual, expected in zip(backbone(images).feature_maps, pooled(images), strict=True):
            np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)
    # And the plan is refused, by name too.
    with pytest.raises(EngineMismatchError, match="never measured: run edge-backbones verify on this device"):
        EdgeBackbone.from_pretrained(bundle.path, device="cuda")
    with pytest.raises(EngineMismatchError, match="runs on cuda, not on cpu"):
        EdgeBackbone.from_pretrained(bundle.path, engine=added.name, device="cpu")
    # verify says why it cannot measure it here.
    monkeypatch.setattr("edge_backbones.machine.hosts.find_gpus", tuple)
    monkeypatch.setattr("edge_backbones.machine.hosts.no_gpu_reason", lambda: "no NVIDIA driver")
    with pytest.raises(EngineMismatchError, match="needs an NVIDIA GPU: no NVIDIA driver"):
        verify_bundle(bundle.path, engine="tensorrt_rtx")
    assert [report.passed for report in verify_bundle(bundle.path)] == [True]  # the CPU's


def test_compiling_again_replaces_the_plan(bundle):
    options = PlanOptions(targets=("sm_86",))
    compile_bundle(bundle.path, flavour="tensorrt_rtx", plan=options)
    compile_bundle(bundle.path, flavour="tensorrt_rtx", plan=options)
    grown = Bundle.open(bundle.path)
    assert len(grown.manifest.engines) == 2
    assert len(list((bundle.path / "engines").iterdir())) == 2


def test_a_refused_compilation_leaves_the_bundle_as_it_was(bundle):
    before = {path: path.read_bytes() for path in bundle.path.rglob("*") if path.is_file()}
    with pytest.raises(CompileError, match="does not compile for sm_87"):
        compile_bundle(bundle.path, flavour="tensorrt_rtx", plan=PlanOptions(targets=("sm_87",)))
    with pytest.raises(CompileError, match="no version compatibility"):
        compile_bundle(bundle.path, flavour="tensorrt_rtx", plan=PlanOptions(version_compatible=True))
    assert {path: path.read_bytes() for path in bundle.path.rglob("*") if path.is_file()} == before


def test_a_truncated_plan_is_named(bundle):
    (added,) = compile_bundle(bundle.path, flavour="tensorrt_rtx", plan=PlanOptions(targets=("sm_86",))).engines
    plan = bundle.path / added.file.path
    plan.write_bytes(plan.read_bytes()[:-10])
    with pytest.raises(IntegrityError, match=added.file.path):
        verify_bundle(bundle.path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"targets": ("89",)}, "'89' is not an architecture: write sm_89"),
        ({"level": 6}, "builder level must be 0 to 5, got 6"),
        ({"workspace": 0}, r"workspace must be at least 1 byte and below 2\*\*63, got 0"),
        ({"embed_runtime": True}, "set version_compatible=True too"),
    ],
)
def test_options_that_mean_nothing(options, message):
    with pytest.raises(InputError, match=message):
        PlanOptions(**options)


def test_the_command_line(bundle, capsys):
    arguments = ["compile", str(bundle.path), "--flavour", "tensorrt_rtx", "--target", "sm_86", "--target", "sm_120"]
    assert _run([*arguments, "--shapes", "2x32x48", "--json"]) == 0
    (engine,) = json.loads(capsys.readouterr().out)["engines"]
    assert engine["key"]["gpu"]["architectures"] == ["sm_86", "sm_120"]
    assert engine["key"]["precision"] == Precision.FP32
    assert _run(["inspect", str(bundle.path), "--json"]) == 0
    reasons = json.loads(capsys.readouterr().out)["reasons_against"]
    assert any("never measured" in why for why in reasons[engine_name(bundle)])
    assert _run([*arguments, "--shapes", "2x32"]) == 2
    capsys.readouterr()
    assert _run(["compile", str(bundle.path), "--flavour", "tensorrt_rtx"]) == 0
    assert re.search(
        r"^compiled for (sm_\d+(, )?)+: no target was given \(--target", capsys.readouterr().err, re.MULTILINE
    )
    assert _run([*arguments, "--target", "sm_90", "--json"]) == 1
    if not gpus.find_gpus():
        assert _run(["compile", str(bundle.path), "--flavour", "tensorrt"]) == 1
        assert "TensorRT compiles on the GPU that will run the plan" in capsys.readouterr().err.replace("\n", " ")


def engine_name(bundle):
    return next(engine.name for engine in Bundle.open(bundle.path).manifest.engines if engine.key.gpu is not None)


def test_what_the_gpu_lacks_is_left_out_unless_it_was_asked_for(bundle):
    (graph,) = bundle.manifest.graphs
    as_fp8 = msgspec.structs.replace(graph, precision=Precision.FP8)
    write_manifest(bundle.path, msgspec.structs.replace(bundle.manifest, graphs=(as_fp8, graph)))
    said = []
    plan = PlanOptions(targets=("sm_86",))
    added = compile_bundle(
        bundle.path, flavour="tensorrt_rtx", plan=plan, progress=lambda step, *_: said.append(step)
    ).engines
    assert [engine.key.precision for engine in added] == [Precision.FP32]
    assert any("leaving fp8 out: sm_86 has no fp8" in step for step in said)
    with pytest.raises(CompileError, match="sm_86 has no fp8"):
        compile_bundle(bundle.path, flavour="tensorrt_rtx", plan=plan, precisions=(Precision.FP8,))


def test_a_plan_with_its_own_runtime_is_refused_before_it_is_compiled(bundle):
    plan = PlanOptions(version_compatible=True, embed_runtime=True)
    with pytest.raises(
        CompileError, match=r"is measured by running it: if you trust the bundle, pass allow_host_code=True \(--allow"
    ):
        compile_bundle(bundle.path, flavour="tensorrt", plan=plan)
