"""Every peer of `edge-backbones bench`, for real: it runs the network of the bundle, held against fp32 where it can be."""

from __future__ import annotations

import json
import subprocess
import sys

import msgspec
import numpy as np
import pytest
from transformers import ResNetConfig

from edge_backbones import BuildOptions, build_bundle
from edge_backbones.bench.compare import CompareOptions, compare, read_images
from edge_backbones.bench.contender import MAKERS, Task
from edge_backbones.bench.peers import PEERS
from edge_backbones.bench.results import Comparison
from edge_backbones.bundle.manifest import Manifest
from edge_backbones.bundle.reader import Bundle, load_golden
from edge_backbones.engines.openvino.compile import computes_in
from edge_backbones.spec import Precision
from edge_backbones.testing import make_bundle

QUICK = {"turns": 2, "seconds": 0, "calls": 3, "threads": 1}


def test_every_peer_runs_a_cnn(cnn):
    result = compare(
        cnn.bundle.path, CompareOptions(vs=PEERS, allow_host_code=True, pythons={"nncf": sys.executable}, **QUICK)
    )
    found = {m.name: m for m in result.measurements}
    for name in ("nncf", "nncf-f32"):
        assert found[name].missing == "NNCF failed: ModuleNotFoundError: No module named 'nncf'"
    ran = [name for name, m in found.items() if not m.missing]
    assert ran == ["edge", *PEERS[:-2]], {name: m.missing for name, m in found.items()}
    for name in ("edge", "torchscript", "onnxruntime", "openvino-f32"):
        assert found[name].worst_sqnr_db > 80, name
        assert found[name].worst_cosine > 0.9999, name
        assert found[name].file_mb > 0.1
    in_bf16 = computes_in(Precision.BF16) is Precision.BF16
    assert (found["openvino"].worst_sqnr_db < 60) == in_bf16  # OpenVINO's own choice
    assert found["torch"].worst_sqnr_db is None  # of other random weights
    assert {name for m in found.values() for name in m.versions} == {"openvino", "torch", "onnxruntime"}
    assert [ratio.name for ratio in result.ratios] == list(PEERS[:-2])
    assert all(ratio.low <= ratio.median <= ratio.high for ratio in result.ratios)


def test_another_engine_of_the_bundle_is_a_contender(cnn):
    result = compare(cnn.bundle.path, CompareOptions(engine="fp32", vs=("fp32", "int8", "fp8"), **QUICK))
    fp32, again, int8, fp8 = result.measurements
    assert fp32.worst_sqnr_db == again.worst_sqnr_db
    assert again.what == "this bundle's fp32 engine"
    assert [ratio.name for ratio in result.ratios] == [m.name for m in (again, int8, fp8) if not m.missing]
    assert "fp8" in fp8.missing


def test_camera_frames_are_normalised_for_a_network_that_takes_none(vit):
    result = compare(vit.bundle.path, CompareOptions(vs=("torch", "onnxruntime", "torchscript"), **QUICK))
    edge, torch, onnxruntime, torchscript = result.measurements
    assert (edge.missing, torch.missing, onnxruntime.missing) == ("", "", "")
    assert onnxruntime.worst_sqnr_db > 80
    assert "no TorchScript file" in torchscript.missing


@pytest.mark.parametrize("source", ["timm", "transformers"])
def test_torch_runs_the_network_of_the_bundle(source, cnn, tmp_path):
    if source == "timm":
        bundle = cnn.bundle
    else:
        config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], out_features=["stage1", "stage2"])
        options = BuildOptions(
            weights="random:0", precisions=(Precision.FP32,), height=32, width=64, torchscript=False, cache=None
        )
        bundle = build_bundle(config, tmp_path / "net.bundle", options=options).bundle
    golden, input = load_golden(bundle), bundle.manifest.input
    loaded = MAKERS["torch"](bundle, Task(peer="torch", bundle=str(bundle.path)))
    maps = loaded.call(np.ascontiguousarray(golden.inputs["opt"][: input.batch.opt]))
    expected = [golden.outputs["opt"][name][: input.batch.opt] for name in bundle.manifest.backbone.out_features]
    assert [m.shape for m in maps] == [e.shape for e in expected]


def test_a_bundle_without_an_fp32_graph_is_compared_with_one_exported_anew(cnn, monkeypatch):
    monkeypatch.setattr(Manifest, "onnx_graph", lambda self, precision: None)
    seen = []
    options = CompareOptions(vs=("onnxruntime", "openvino"), **QUICK)
    result = compare(cnn.bundle.path, options, progress=lambda *step: seen.append(step[0]))
    assert seen.count("exporting the network in fp32") == 1
    for peer in result.measurements[1:]:
        assert peer.missing == ""
        assert peer.median_ms > 0
        assert peer.worst_sqnr_db is None  # of other random weights


def test_a_network_that_cannot_be_made_again_is_named(tmp_path):
    bundle = make_bundle(tmp_path / "pool.bundle")  # of a network that timm does not have
    result = compare(bundle.path, CompareOptions(vs=("torch", "onnxruntime"), **QUICK))
    for peer in result.measurements[1:]:
        assert "average_pooling" in peer.missing


def test_photographs_become_inputs(cnn, vit, photograph_folder):
    (photograph_folder / "broken.jpg").rename(photograph_folder / "broken.txt")
    try:
        floats, frames = (read_images(photograph_folder, net.bundle, 4) for net in (cnn, vit))
    finally:
        (photograph_folder / "broken.txt").rename(photograph_folder / "broken.jpg")
    assert (floats.shape, floats.dtype) == ((4, 3, 64, 96), np.float32)
    assert (frames.shape, frames.dtype) == ((4, 64, 96, 3), np.uint8)


def test_the_command_line_compares_stores_and_notices_lost_ground(cnn, tmp_path):
    def run(*arguments) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "edge_backbones.cli.main", "bench", cnn.bundle.path, *arguments]
        quick = ("--turns", "6", "--seconds", "0", "--threads", "1")
        return subprocess.run([*map(str, command), *quick], capture_output=True, text=True, check=False)

    stored = tmp_path / "results" / "today.json"
    done = run("--vs", "openvino,nncf", "--out", stored)
    assert done.returncode == 0, done.stderr
    assert "openvino: OpenVINO on the fp32 graph" in done.stdout
    assert "nncf did not run: not installed: pip install nncf" in done.stdout
    result = msgspec.json.decode(stored.read_bytes(), type=Comparison)
    assert [m.name for m in result.measurements] == ["edge", "openvino", "nncf"]

    better = [msgspec.structs.replace(ratio, median=900, low=800, high=1000) for ratio in result.ratios]
    stored.write_bytes(msgspec.json.encode(msgspec.structs.replace(result, ratios=tuple(better))))
    done = run("--vs", "openvino", "--against", stored, "--json")
    assert done.returncode == 4, done.stderr
    (phrase,) = json.loads(done.stdout)["regressions"]
    assert "900.00 (800.00 to 1000.00)" in phrase

    done = run("--device", "cuda", "--vs", "openvino,nncf")
    assert done.returncode == 2
    assert "openvino and nncf run on the CPU, not on cuda: leave them out of --vs" in " ".join(done.stderr.split())

    done = run("--vs", "tensorflow")
    assert done.returncode == 2
    assert "--vs takes torch, " in done.stderr
    assert Bundle.open(cnn.bundle.path).manifest == cnn.bundle.manifest  # a benchmark leaves a bundle as it was
