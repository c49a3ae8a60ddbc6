"""What a manifest promises of an engine is held against the figures beside it and against the engine itself at load."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import pytest

from edge_backbones import EdgeBackbone, verify_bundle
from edge_backbones.bundle.manifest import GraphRecord, Manifest
from edge_backbones.bundle.reader import Bundle
from edge_backbones.bundle.writer import record_bytes, write_manifest
from edge_backbones.deploy import compile as device
from edge_backbones.deploy import parity, verify
from edge_backbones.deploy.parity import compare
from edge_backbones.engines import promises, registry
from edge_backbones.errors import EngineMismatchError, InferenceError
from edge_backbones.machine import hosts
from edge_backbones.parity_report import Gate, ParityError
from edge_backbones.spec import Precision, ShapeRange
from edge_backbones.testing import make_bundle, pooling_input
from tests.simulated_builder import GRAPH

replace = msgspec.structs.replace


@pytest.fixture
def bundle(tmp_path) -> Bundle:
    return make_bundle(tmp_path / "net.bundle")


def rewritten(bundle: Bundle, **changes) -> Bundle:
    """The bundle with other fields in its manifest, and the digest that belongs to them: what a forger writes."""
    write_manifest(bundle.path, replace(bundle.manifest, **changes))
    return Bundle.open(bundle.path)


def with_report(bundle: Bundle, **changes) -> Bundle:
    [engine] = bundle.manifest.engines
    return rewritten(bundle, engines=(replace(engine, parity=replace(engine.parity, **changes)),))


def with_stage(bundle: Bundle, **changes) -> Bundle:
    first, *rest = bundle.manifest.engines[0].parity.stages
    return with_report(bundle, stages=(replace(first, **changes), *rest))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"passed": False}, "was outside its gate (relative error <= 0.001) when it was measured (pool4 has"),
        ({"relative": 0.0011}, "was outside its gate (relative error <= 0.001) when it was measured (pool4 has"),
        ({"finite": False}, "pool4 has values that are not finite"),
        ({"stage": "pool9"}, "returns ['pool4', 'pool8'], and its parity is reported for ['pool9', 'pool8']"),
        ({"stage": "pool8"}, "returns ['pool4', 'pool8'], and its parity is reported for ['pool8', 'pool8']"),
    ],
)  # fmt: skip
def test_figures_that_do_not_pass_do_not_run(bundle, changes, words):
    forged = with_stage(bundle, **changes)
    with pytest.raises(EngineMismatchError) as told:
        EdgeBackbone.from_pretrained(forged.path)
    assert words in str(told.value)
    assert len(verify_bundle(forged.path, in_process=True)) == 1  # the engine is right: its report is written anew
    EdgeBackbone.from_pretrained(forged.path).close()


@pytest.mark.parametrize(
    ("gate", "words"),
    [
        (Gate(), "was measured against the gate finite values, and its bundle asks for relative error <= 0.001"),
        (Gate(max_relative=0.002), "was measured against the gate relative error <= 0.002, and its bundle asks for"),
        (Gate(min_cosine=-1.0, max_relative=1e30), "and its bundle asks for relative error <= 0.001"),
    ],
)  # fmt: skip
def test_a_gate_that_nobody_set_is_refused_and_not_used_by_verify(bundle, monkeypatch, gate, words):
    forged = with_report(bundle, gate=gate)
    with pytest.raises(EngineMismatchError) as told:
        EdgeBackbone.from_pretrained(forged.path)
    assert words in str(told.value)
    [report] = verify_bundle(forged.path, in_process=True)
    assert report.gate == Gate(max_relative=1e-3)
    EdgeBackbone.from_pretrained(forged.path).close()

    wrong = lambda *a, **k: compare(*a, **k) if a[0] != "pool8" else compare(a[0], a[1], a[2] * 1.01, *a[3:], **k)  # noqa: E731
    monkeypatch.setattr("edge_backbones.deploy.parity.compare", wrong)
    forged = with_report(bundle, gate=gate)
    with pytest.raises(ParityError, match="outside its gate"):
        verify_bundle(forged.path, in_process=True)


def test_a_gate_that_the_user_set_is_kept_and_one_that_asks_for_nothing_is_none(bundle):
    """A bundle built with gates of its own has them at its graphs, and runs by them."""
    own = Gate(max_relative=0.5)
    data = GRAPH
    [engine] = bundle.manifest.engines
    path = "graphs/fp32.onnx"
    (bundle.path / "graphs").mkdir()
    (bundle.path / path).write_bytes(data)

    def built(gate: Gate, of_report: Gate) -> Path:
        graph = GraphRecord(format="onnx", precision=Precision.FP32, file=record_bytes(path, data), gate=gate)
        key = replace(engine.key, graph_sha256=graph.file.sha256)
        record = replace(engine, key=key, parity=replace(engine.parity, gate=of_report))
        return rewritten(bundle, graphs=(graph,), engines=(record,)).path

    EdgeBackbone.from_pretrained(built(own, own)).close()
    with pytest.raises(EngineMismatchError, match=r"asks for relative error <= 0\.5: run edge-backbones verify"):
        EdgeBackbone.from_pretrained(built(own, Gate(max_relative=0.6)))
    for empty in (Gate(), Gate(max_relative=1.0), Gate(min_cosine=0.0), Gate(min_sqnr_db=-3.0)):
        with pytest.raises(EngineMismatchError, match=r"asks for relative error <= 0\.001"):
            EdgeBackbone.from_pretrained(built(empty, empty))
        [report] = verify_bundle(built(empty, empty), in_process=True)
        assert report.gate == Gate(max_relative=1e-3)


@pytest.mark.parametrize(
    "gate", [Gate(), *promises.DEFAULT_GATES.values(), Gate(max_relative=1.0), Gate(min_cosine=1e-6)]
)
def test_a_gate_asks_for_something_where_a_map_of_zeros_fails_it(gate):
    reference = np.random.default_rng(0).standard_normal((3, 5, 7)).astype(np.float32)
    assert compare("s", reference, np.zeros_like(reference), gate).passed is not promises.refuses_zeros(gate)


# ---- the engine itself


def lies(manifest: Manifest, name: str) -> dict[str, object]:
    spec, input = manifest.backbone, manifest.input
    return {
        "channels": {"backbone": replace(spec, channels=(3, 512))},
        "rank": {"backbone": replace(spec, layouts=("NCHW", "NLC"))},
        "order of axes": {"backbone": replace(spec, layouts=("NCHW", "NHWC"))},
        "strides": {"backbone": replace(spec, strides=((4, 4), (32, 32)))},
        "input channels": {
            "input": replace(input, channels=4),
            "image": replace(manifest.image, mean=(0.5,) * 4, std=(0.5,) * 4),
        },
        "input size": {"input": replace(input, height=ShapeRange.fixed(64))},
        "input sizes": {"input": replace(input, height=ShapeRange(min=32, opt=32, max=64))},
        "batch": {"input": replace(input, batch=ShapeRange.fixed(3))},
        "batches": {"input": replace(input, batch=ShapeRange(min=1, opt=2, max=8))},
        "dtype and layout": {"input": replace(input, name="image")},
    }[name]  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("lie", "words"),
    [
        ("channels", "pool8 has shape (2, 3, 4, 6), the manifest promises NCHW with 512 channels and batch 2"),
        ("rank", "pool8 has shape (2, 3, 4, 6), the manifest promises NLC with 3 channels"),
        ("order of axes", "pool8 has shape (2, 3, 4, 6), the manifest promises NHWC with 3 channels"),
        ("strides", "pool8 has shape (2, 3, 4, 6), the manifest promises NCHW with 3 channels and batch 2, strides 32"),
        ("input channels", "it takes (2, 3, 32, 48), the manifest says (2, 4, 32, 48)"),
        ("input size", "it takes (2, 3, 32, 48), the manifest says (2, 3, 64, 48)"),
        ("input sizes", "it takes (2, 3, 32, 48), the manifest says (2, 3, 32..64, 48)"),
        ("batch", "it takes (2, 3, 32, 48), the manifest says (3, 3, 32, 48)"),
        ("batches", "it takes (2, 3, 32, 48), the manifest says (1..8, 3, 32, 48)"),
        ("dtype and layout", "it takes ['pixel_values'], the manifest says ['image']"),
    ],
)  # fmt: skip
def test_ports_of_an_engine_are_those_of_its_manifest(bundle, lie, words):
    forged = rewritten(bundle, **lies(bundle.manifest, lie))
    with pytest.raises(EngineMismatchError) as told:
        EdgeBackbone.from_pretrained(forged.path)
    assert words in str(told.value)
    assert "\n" not in str(told.value)


def test_sizes_that_vary_are_taken_as_they_are(tmp_path):
    bundle = make_bundle(tmp_path / "net.bundle", pooling_input(ShapeRange(min=1, opt=2, max=8)))
    EdgeBackbone.from_pretrained(bundle.path).close()


# ---- what this machine has measured


def host() -> hosts.Host:
    return hosts.this_host(registry.InstalledVersions())


def test_what_was_verified_here_is_remembered_until_anything_changes(bundle, monkeypatch, tmp_path):
    manifest = bundle.manifest
    [engine] = manifest.engines
    assert not promises.is_measured_here(manifest, engine, host())
    verify_bundle(bundle.path, in_process=True)
    assert promises.is_measured_here(manifest, engine, host())
    assert promises.is_measured_here(manifest, replace(engine, milliseconds=1.0), host())

    other_bytes = replace(engine, file=replace(engine.file, sha256="0" * 64))
    assert not promises.is_measured_here(manifest, other_bytes, host())
    golden = replace(manifest.golden, file=replace(manifest.golden.file, sha256="0" * 64))
    assert not promises.is_measured_here(replace(manifest, golden=golden), engine, host())
    elsewhere = hosts.Host("x86_64", (), "another CPU", {"openvino": engine.key.library_version})
    assert not promises.is_measured_here(manifest, engine, elsewhere)
    monkeypatch.setattr(promises, "_MACHINE_ID", tmp_path / "id")
    (tmp_path / "id").write_text("another machine")
    assert not promises.is_measured_here(manifest, engine, host())


def test_an_engine_that_fails_later_is_forgotten(bundle, monkeypatch):
    verify_bundle(bundle.path, in_process=True)
    [engine] = bundle.manifest.engines

    def failing(*_, **__):
        [stage, *rest] = engine.parity.stages
        return replace(engine.parity, stages=(replace(stage, passed=False), *rest))

    monkeypatch.setattr(parity, "measure_engine", failing)
    with pytest.raises(ParityError):
        verify_bundle(bundle.path, in_process=True)
    assert not promises.is_measured_here(bundle.manifest, engine, host())


@pytest.mark.parametrize("cache", ["a file", "no home"])
def test_without_a_cache_folder_nothing_is_remembered_and_nothing_fails(bundle, monkeypatch, tmp_path, cache):
    if cache == "a file":
        (tmp_path / "cache").write_text("")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    else:
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    verify_bundle(bundle.path, in_process=True)
    assert not promises.is_measured_here(bundle.manifest, bundle.manifest.engines[0], host())


def test_on_mismatch_compile_measures_once_and_apart_what_was_never_measured_here(bundle, monkeypatch, in_process):
    asked = []
    measure = verify.verify_bundle

    def verified(path, **options):
        asked.append(options["engine"])
        return measure(path, **options)

    monkeypatch.setattr(verify, "verify_bundle", verified)
    EdgeBackbone.from_pretrained(bundle.path).close()  # by the figures of the manifest, in this process
    assert asked == []
    for _ in range(2):
        EdgeBackbone.from_pretrained(bundle.path, on_mismatch="compile").close()
    assert asked == [bundle.manifest.engines[0].name]


def test_an_engine_that_ends_the_process_that_measures_it_is_compiled_anew(bundle, monkeypatch, in_process):
    def died(*_, **__):
        raise InferenceError("the process that was running it ended by SIGSEGV")

    compiled = []
    monkeypatch.setattr(verify, "verify_bundle", died)
    monkeypatch.setattr(device, "compile_bundle", lambda path, **options: compiled.append(path))
    with pytest.raises(EngineMismatchError, match="ended by SIGSEGV"):  # this compile made none
        EdgeBackbone.from_pretrained(bundle.path, on_mismatch="compile")
    assert compiled == [bundle.path]
