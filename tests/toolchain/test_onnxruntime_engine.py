"""ONNX Runtime as the engine of a bundle, against fp32 torch, OpenVINO and its own rules."""

from __future__ import annotations

import multiprocessing
import os

import msgspec
import numpy as np
import pytest
import torch

from edge_backbones import BuildOptions, EdgeBackbone, build_bundle, compile_bundle, verify_bundle
from edge_backbones.bundle.reader import Bundle
from edge_backbones.engines import registry
from edge_backbones.engines.onnxruntime.session import OnnxRuntimeSession, cause
from edge_backbones.errors import EngineMismatchError, InferenceError, InputError
from edge_backbones.spec import Precision, ShapeRange
from edge_backbones.toolchain.sources.base import SourceOptions
from edge_backbones.toolchain.sources.timm import load_timm

SIZES = {
    "batch": ShapeRange(min=1, opt=2, max=4),
    "height": ShapeRange(min=64, opt=96, max=160),
    "width": ShapeRange(min=64, opt=128, max=160),
}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory, photographs):
    target = tmp_path_factory.mktemp("ort") / "resnet.bundle"
    precisions = (Precision.FP32, Precision.FP16, Precision.INT8)
    options = BuildOptions(
        weights="random:0", precisions=precisions, torchscript=False, out_indices=(1, 2, 4), cache=None, **SIZES
    )
    build_bundle("test_resnet", target, images=photographs, options=options)
    result = compile_bundle(target, precisions=("fp32", "int8"), flavour="onnxruntime")
    assert [engine.parity.passed for engine in result.engines] == [True, True]
    return Bundle.open(target)


def engines(bundle: Bundle, flavour: str = "onnxruntime") -> dict[str, str]:
    return {e.key.precision.value: e.name for e in bundle.manifest.engines if e.key.flavour == flavour}


@pytest.mark.parametrize(("count", "height", "width"), [(1, 64, 64), (2, 96, 128), (3, 160, 64), (7, 64, 160)])
def test_its_maps_are_those_of_openvino_in_fp32(bundle, count, height, width):
    """Several sizes, not square, and batches that it is given in pieces."""
    with (
        EdgeBackbone.from_pretrained(bundle.path, engine=engines(bundle)["fp32"]) as ours,
        EdgeBackbone.from_pretrained(bundle.path, engine=engines(bundle, "openvino")["fp32"]) as other,
    ):
        images = np.random.default_rng(0).standard_normal((count, 3, height, width)).astype(np.float32)
        for one, reference in zip(ours(images).feature_maps, other(images).feature_maps, strict=True):
            assert one.shape == reference.shape
            assert np.linalg.norm(one - reference) < 1e-4 * np.linalg.norm(reference)


def test_it_is_verified_against_fp32_torch(bundle):
    reports = verify_bundle(bundle.path, engine="onnxruntime", in_process=True)
    assert len(reports) == 2
    assert max(stage.relative for stage in reports[0].stages) < 1e-4  # of fp32 torch, on the golden samples


def test_a_live_network_gives_the_same_maps(tmp_path, photographs):
    loaded = load_timm("test_convnext", SourceOptions(weights="random:3", out_indices=(0, 3)))
    target = tmp_path / "b.bundle"
    options = BuildOptions(precisions=(Precision.FP32,), torchscript=False, height=64, width=96, batch=2, cache=None)
    build_bundle(loaded, target, images=photographs, options=options)
    compile_bundle(target, flavour="onnxruntime")
    images = np.random.default_rng(1).standard_normal((2, 3, 64, 96)).astype(np.float32)
    with EdgeBackbone.from_pretrained(target, engine="onnxruntime", threads=1) as backbone:
        output = backbone.run(images)
    golden = verify_bundle(target, engine="onnxruntime", in_process=True)
    assert golden[0].passed
    assert [m.dtype for m in output.values()] == [np.float32] * 2
    assert all(torch.isfinite(torch.from_numpy(m)).all() for m in output.values())


def test_an_fp32_graph_is_the_engine_and_an_int8_one_is_rewritten(bundle):
    graphs = {graph.file.path for graph in bundle.manifest.graphs}
    ours = {e.key.precision.value: e for e in bundle.manifest.engines if e.key.flavour == "onnxruntime"}
    assert ours["fp32"].file.path in graphs
    assert ours["int8"].file.path.startswith("engines/onnxruntime-")
    assert ours["int8"].file.path.endswith(".onnx")
    assert all(engine.milliseconds is not None for engine in ours.values())  # timed beside OpenVINO's
    smaller = bundle.remove_engine(ours["fp32"].name).remove_engine(ours["int8"].name)
    smaller.check_files()
    assert not (bundle.path / ours["int8"].file.path).exists()
    compile_bundle(bundle.path, precisions=("fp32", "int8"), flavour="onnxruntime", resume=True)
    assert len(engines(Bundle.open(bundle.path))) == 2


def test_an_engine_of_an_earlier_release_still_runs(bundle):
    """It was the graph itself, also for int8."""
    graph = bundle.manifest.onnx_graph(Precision.INT8)
    engine = next(e for e in bundle.manifest.engines if e.name == engines(bundle)["int8"])
    images = np.random.default_rng(0).standard_normal((3, 3, 96, 128)).astype(np.float32)
    with EdgeBackbone.from_pretrained(bundle.path, engine=engine.name) as backbone:
        now = backbone(images).feature_maps
    older = bundle.add_engine(msgspec.structs.replace(engine, file=graph.file), {})
    try:
        with EdgeBackbone.from_pretrained(older.path, engine=engine.name) as backbone:
            before = backbone(images).feature_maps
    finally:
        compile_bundle(bundle.path, precisions=("int8",), flavour="onnxruntime")
    for one, other in zip(now, before, strict=True):
        assert np.linalg.norm(one - other) < 0.5 * np.linalg.norm(other)  # of noise, which int8 amplifies


def test_results_are_the_callers_own(bundle):
    images = np.ones((2, 3, 96, 128), np.float32)
    with EdgeBackbone.from_pretrained(bundle.path, engine=engines(bundle)["int8"]) as backbone:
        kept = backbone(images).feature_maps
        first = [m.copy() for m in kept]
        backbone(np.zeros_like(images))
        for one, copy in zip(kept, first, strict=True):
            np.testing.assert_array_equal(one, copy)
            one += 1  # may be written to
    with pytest.raises(InputError, match="was closed: open the bundle again"):
        backbone(images)


def test_what_it_does_not_load_is_a_mismatch(bundle):
    manifest = bundle.manifest
    fp16 = next(graph for graph in manifest.graphs if graph.precision is Precision.FP16)
    data = bundle.read(fp16.file)
    for graph in (b"", b"not a graph", bytes(data)[: len(data) // 2]):
        with pytest.raises(EngineMismatchError):
            OnnxRuntimeSession(graph, input=manifest.input, spec=manifest.backbone)
    other = manifest.backbone.__class__(
        **{
            **{name: getattr(manifest.backbone, name) for name in manifest.backbone.__struct_fields__},
            "channels": tuple(n + 1 for n in manifest.backbone.channels),
        }
    )
    fp32 = bundle.read(next(graph for graph in manifest.graphs if graph.precision is Precision.FP32).file)
    with pytest.raises(EngineMismatchError, match="the graph is not the one of this manifest"):
        OnnxRuntimeSession(fp32, input=manifest.input, spec=other)
    with pytest.raises(InputError, match="threads must be at least 1, got 0"):
        OnnxRuntimeSession(fp32, input=manifest.input, spec=manifest.backbone, threads=0)


def test_the_cause_is_quoted_without_its_code():
    assert cause(RuntimeError("[ONNXRuntimeError] : 9 : NOT_IMPLEMENTED : no kernel for Conv(11)")) == (
        "no kernel for Conv(11)"
    )
    assert cause(RuntimeError("something else")) == "something else"


def _child(backbone, images, answers):
    try:
        backbone(images)
    except InferenceError as error:
        answers.put(str(error))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_is_refused_and_does_not_hang(bundle):
    images = np.zeros((2, 3, 96, 128), np.float32)
    context = multiprocessing.get_context("fork")
    with EdgeBackbone.from_pretrained(bundle.path, engine=engines(bundle)["fp32"]) as backbone:
        backbone(images)
        answers = context.Queue()
        child = context.Process(target=_child, args=(backbone, images, answers))
        child.start()
        assert "ONNX Runtime was started in the process that this one was forked from" in answers.get(timeout=30)
        child.join(30)
        assert child.exitcode == 0
        backbone(images)


def test_a_machine_with_another_cpu_is_told_why(bundle):
    engine = next(e for e in bundle.manifest.engines if e.key.flavour == "onnxruntime")
    here = registry.this_machine(None)
    assert registry.reasons_against(engine.key, here) == []
    old = here.__class__(here.architecture, (), "an old CPU", {"onnxruntime": "1.0"})
    assert registry.reasons_against(engine.key, old)[0].startswith("compiled with onnxruntime ")
    assert "this one (an old CPU) has none" in registry.reasons_against(engine.key, old)[1]
