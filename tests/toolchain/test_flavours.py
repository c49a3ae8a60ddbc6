"""Engines of other libraries beside OpenVINO's: what `build --flavour` and `compile --flavour` add, and who runs them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import msgspec
import networks
import numpy as np
import pytest
import torch
from transformers import ResNetConfig

from edge_backbones import BuildOptions, Bundle, EdgeBackbone, build_bundle, compile_bundle, verify_bundle
from edge_backbones.bench import contender
from edge_backbones.bench.compare import CompareOptions, compare
from edge_backbones.bench.contender import Task
from edge_backbones.bundle.writer import BundleWriter, write_manifest
from edge_backbones.cli.main import _run
from edge_backbones.engines import select as session
from edge_backbones.errors import CompileError, EngineMismatchError, InputError
from edge_backbones.machine import gpus
from edge_backbones.machine.profiles import load_profile
from edge_backbones.progress import no_progress
from edge_backbones.spec import Precision
from edge_backbones.toolchain import build as pipeline
from edge_backbones.toolchain import torch_tensorrt
from edge_backbones.toolchain.prepare import prepare

pytestmark = pytest.mark.usefixtures("in_process")  # tests replace what is called there

ROOT = Path(__file__).parents[2]
OPTIONS = {"weights": "random:0", "precisions": (Precision.FP32,), "height": 64, "width": 96, "batch": 2, "golden": 2}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    target = tmp_path_factory.mktemp("flavours") / "resnet.bundle"
    return build_bundle("test_resnet", target, options=BuildOptions(**OPTIONS, flavours=("torchscript",))).bundle


def test_torchscript_is_an_engine_that_is_run_only_by_name(built):
    engines = built.manifest.engines
    assert [engine.key.flavour for engine in engines] == ["openvino", "torchscript"]
    assert engines[1].file.path == "graphs/fp32.ts"  # the graph itself, not a copy
    assert all(engine.parity.passed for engine in engines)
    images = np.random.default_rng(0).standard_normal((3, 3, 64, 96)).astype(np.float32)
    with (
        EdgeBackbone.from_pretrained(built.path) as usual,
        EdgeBackbone.from_pretrained(built.path, engine="torchscript", allow_host_code=True) as scripted,
    ):
        for ours, theirs in zip(usual(images).feature_maps, scripted(images).feature_maps, strict=True):
            assert ours.shape == theirs.shape
            np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-3)
            assert not np.array_equal(ours, theirs)  # two libraries, two roundings
    with pytest.raises(EngineMismatchError, match=r"is a program, .* it is run only when asked for by name"):
        EdgeBackbone.from_pretrained(built.path, device="cuda")
    assert len(verify_bundle(built.path)) == 1  # nobody asked to run the program
    assert len(verify_bundle(built.path, allow_host_code=True)) == 1
    assert len(verify_bundle(built.path, engine="torchscript", allow_host_code=True)) == 1


def test_a_program_is_run_only_where_the_caller_allows_it(built, monkeypatch, capsys):
    """Not opened either: torch runs nothing of a file that it has not seen."""
    monkeypatch.setattr(torch.jit, "load", lambda *_, **__: pytest.fail("the program was opened"))
    name = built.manifest.engines[1].name
    for engine in ("torchscript", name):
        for step in (EdgeBackbone.from_pretrained, verify_bundle):
            with pytest.raises(EngineMismatchError, match=r"with allow_host_code=True .*--allow-host-code\)\.$"):
                step(built.path, engine=engine)
        assert _run(["verify", str(built.path), "--engine", engine]) == 1
        assert "--allow-host-code" in capsys.readouterr().err
        with pytest.raises(EngineMismatchError, match="allow_host_code=True"):
            compare(built.path, CompareOptions(engine=engine, vs=()))
    with pytest.raises(CompileError, match=r"a TorchScript engine is a program.* pass allow_host_code=True"):
        compile_bundle(built.path, flavour="torchscript")
    record, data = built.manifest.engines[1], (built.path / "graphs/fp32.ts").read_bytes()
    with pytest.raises(EngineMismatchError, match="is a program, and it is run only with allow_host_code=True"):
        session.load_engine(record.key, bytearray(data), built.manifest.backbone, built.manifest.input)
    task = Task(peer="torchscript", bundle=str(built.path))
    with pytest.raises(InputError, match="is a program: allow_host_code=True"):
        contender.torchscript(built, task)


def test_torchscript_is_added_to_a_finished_bundle(built, tmp_path):
    target = tmp_path / "b.bundle"
    build_bundle("test_resnet", target, options=BuildOptions(**OPTIONS))
    (added,) = compile_bundle(target, flavour="torchscript", allow_host_code=True).engines
    assert added.parity.passed
    assert [engine.key.flavour for engine in Bundle.open(target).manifest.engines] == ["openvino", "torchscript"]
    Bundle.open(target).check_files()
    again = compile_bundle(
        target, flavour="torchscript", allow_host_code=True
    ).engines  # replaces itself, and its file stays
    assert len(again) == 1
    Bundle.open(target).check_files()


def test_a_profile_has_the_sizes_that_nobody_asked_for(tmp_path):
    options = {name: value for name, value in OPTIONS.items() if name != "batch"}
    profile = load_profile("jetson-orin-nx")
    assert not profile.defaults.batch.is_fixed
    made = build_bundle("test_resnet", tmp_path / "a.bundle", options=BuildOptions(**options, profile="jetson-orin-nx"))
    assert made.bundle.manifest.input.batch == profile.defaults.batch
    asked = BuildOptions(**OPTIONS, profile="jetson-orin-nx")
    assert build_bundle("test_resnet", tmp_path / "b.bundle", options=asked).bundle.manifest.input.batch.max == 2
    mine = tmp_path / "cpu.toml"
    text = next((ROOT / "profiles").glob("cpu.toml")).read_text()
    mine.write_text(re.sub(r"size = \d+", "size = 96", text))
    del options["height"], options["width"]
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")  # knows no size
    sized = build_bundle(config, tmp_path / "c.bundle", options=BuildOptions(**options, profile=mine))
    assert sized.bundle.manifest.input.opt_shape == (1, 3, 96, 96)


def test_what_cannot_be_compiled_here_leaves_nothing(built, tmp_path, capsys):
    before = (built.path / "manifest.json").read_bytes()
    with pytest.raises(CompileError, match="edge-backbones build MODEL BUNDLE --flavour torch_tensorrt"):
        compile_bundle(built.path, flavour="torch_tensorrt")
    with pytest.raises(
        CompileError, match=r"this machine .*: copy .* to the device .*compiled here: --flavour tensorrt_rtx"
    ):
        compile_bundle(built.path, flavour="openvino", profile="rtx-40")
    with pytest.raises(InputError, match="did you mean jetson-orin-nx"):
        compile_bundle(built.path, flavour="tensorrt", profile="jetson-orin-n")
    assert (built.path / "manifest.json").read_bytes() == before
    with pytest.raises(CompileError, match="fp8 needs sm_89 or newer and jetson-orin-nx is sm_87: choose fp16 or int8"):
        build_bundle(
            "test_resnet",
            tmp_path / "t.bundle",
            images=np.zeros((2, 3, 64, 96), np.float32),
            options=BuildOptions(**{**OPTIONS, "precisions": (Precision.FP8,)}, profile="jetson-orin-nx"),
        )
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(InputError, match="leave torchscript=True"):
        BuildOptions(flavours=("torchscript",), torchscript=False)
    if not gpus.find_gpus():
        target = tmp_path / "t.bundle"
        with pytest.raises(
            CompileError, match="torch_tensorrt compiles on the GPU that will run the engine: no NVIDIA"
        ):
            build_bundle("test_resnet", target, options=BuildOptions(**OPTIONS, flavours=("torch_tensorrt",)))
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("program", "suffix"), [("torchscript", ".ts"), ("exported_program", ".pt2")])
def test_torch_tensorrt_writes_the_program_that_was_asked_for(monkeypatch, program, suffix):
    """What comes of the options where a GPU is; the GPU and torch_tensorrt are made up."""
    gpu = gpus.Gpu(1, "Made-up", "sm_87", 1 << 30, "12.6", 8, integrated=True)
    asked = []

    def compiled(module, input, **options):
        asked.append(options)
        return options["output_format"].encode()

    monkeypatch.setattr(gpus, "find_gpus", lambda: [gpu])
    monkeypatch.setattr(torch_tensorrt, "compile_torch_tensorrt", compiled)
    wanted = {**OPTIONS, "precisions": (Precision.FP32, Precision.BF16), "flavours": ("torch_tensorrt",)}
    prepared = prepare(networks.trained_like("test_resnet", out_indices=(1, 4)), networks.input_spec(64, 96))
    engines = list(pipeline._torch_tensorrt_engines(prepared, BuildOptions(**wanted, program=program), no_progress))
    assert [(engine.data, engine.suffix) for engine in engines] == [(program.encode(), suffix)] * 2
    assert [engine.key.precision for engine in engines] == [Precision.FP32, Precision.BF16]
    assert {options["device"] for options in asked} == {"cuda:1"}
    with pytest.raises(InputError, match="program must be torchscript or exported_program, got 'onnx'"):
        BuildOptions(**wanted, program="onnx")
    with pytest.raises(InputError, match="exported_program is of flavour torch_tensorrt, which is not built"):
        BuildOptions(**OPTIONS, program="exported_program")


def test_the_command_line(built, capsys):
    assert _run(["compile", str(built.path), "--flavour", "torchscript", "--allow-host-code", "--json"]) == 0
    (engine,) = json.loads(capsys.readouterr().out)["engines"]
    assert engine["key"]["flavour"] == "torchscript"
    assert _run(["compile", str(built.path), "--flavour", "openvino", "--profile", "h100"]) == 1
    assert "engines for h100 are compiled on its own GPU, sm_90" in " ".join(capsys.readouterr().err.split())
    assert _run(["profiles", "--json"]) == 0
    assert {profile["name"] for profile in json.loads(capsys.readouterr().out)} >= {"cpu", "jetson-orin-nx", "h100"}
    assert _run(["profiles"]) == 0
    assert "jetson-thor" in capsys.readouterr().out
    assert _run(["profiles", "jetson-orin-nx"]) == 0
    assert "2 DLA cores" in capsys.readouterr().out
    assert _run(["profiles", "jetson"]) == 1


def test_an_engine_that_does_not_fit_is_compiled_on_the_spot_when_asked(tmp_path):
    target = tmp_path / "b.bundle"
    bundle = build_bundle("test_resnet", target, options=BuildOptions(**OPTIONS)).bundle
    (record,) = bundle.manifest.engines
    key = msgspec.structs.replace(record.key, library_version="2024.0.0")
    file = BundleWriter(target).add_file(key.path(b"old", ".blob"), b"old")
    old = msgspec.structs.replace(record, key=key, file=file)
    write_manifest(target, msgspec.structs.replace(bundle.manifest, engines=(old,)))

    with pytest.raises(EngineMismatchError, match=r"compiled with openvino 2024\.0\.0; here"):
        EdgeBackbone.from_pretrained(target)
    with pytest.raises(InputError, match="on_mismatch must be 'raise' or 'compile', got 'rebuild'"):
        EdgeBackbone.from_pretrained(target, on_mismatch="rebuild")
    with EdgeBackbone.from_pretrained(target, on_mismatch="compile") as backbone:
        assert backbone(np.zeros((2, 3, 64, 96), np.float32)).feature_maps
    assert Bundle.open(target).manifest.engines[0].key.library_version == "2024.0.0"
    assert len(Bundle.open(target).manifest.engines) == 2
    EdgeBackbone.from_pretrained(target).close()  # from now on there is one that fits
    if not gpus.find_gpus():
        with pytest.raises(EngineMismatchError, match="runs on cpu, not on cuda"):
            EdgeBackbone.from_pretrained(target, device="cuda", on_mismatch="compile")
