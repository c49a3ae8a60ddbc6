"""Which graph a plan is compiled from: the typed one, or the fp32 graph for a DLA core of a release with weak typing."""

from __future__ import annotations

import hashlib

import msgspec
import pytest

from edge_backbones import Bundle
from edge_backbones.bundle.manifest import CalibrationFile, CalibrationRecord, GraphRecord
from edge_backbones.bundle.writer import record_file, write_manifest
from edge_backbones.engines.base import CompileOptions
from edge_backbones.engines.tensorrt import flavour, requests
from edge_backbones.engines.tensorrt.options import PlanOptions
from edge_backbones.errors import CompileError
from edge_backbones.progress import no_progress
from edge_backbones.spec import Precision
from edge_backbones.testing import make_bundle
from tests.simulated_builder import GRAPH, Library

WEAK, STRONG = Library(), Library(flags="VERSION_COMPATIBLE GPU_FALLBACK TF32")
RANGES = {"conv": 2.5}


@pytest.fixture
def bundle(tmp_path):
    """A bundle with a graph in fp32, fp16, bf16 and int8, each of other bytes, and with ranges."""
    made = make_bundle(tmp_path / "pooling.bundle")
    graphs = []
    (made.path / "graphs").mkdir()
    for precision in (Precision.FP32, Precision.FP16, Precision.BF16, Precision.INT8):
        (made.path / f"graphs/{precision}.onnx").write_bytes(
            GRAPH + b"\x12\x04" + precision.value.encode()
        )  # its producer
        file = record_file(made.path, f"graphs/{precision}.onnx")
        graphs.append(GraphRecord(format="onnx", precision=precision, file=file, opset=20))
    return write(made, graphs=tuple(graphs), calibration=calibration(made))


def calibration(made: Bundle, **changes: object) -> CalibrationRecord:
    found = CalibrationFile(
        network_sha256="0" * 64,
        data_sha256="0" * 64,
        preprocessing=made.manifest.image,
        method="max",
        percentile=99.99,
        chosen={},
        images=("a.png",),
        held_out=0,
        skipped=(),
        silent=(),
        factors={},
        ranges=RANGES,
        largest=RANGES,
        shifts={},
    )
    (made.path / "calibration.json").write_bytes(msgspec.json.encode(msgspec.structs.replace(found, **changes)))
    file = record_file(made.path, "calibration.json")
    return CalibrationRecord(file=file, method="max", percentile=99.99, chosen={}, images=1, held_out=0, skipped=())


def write(made: Bundle, **changes: object) -> Bundle:
    write_manifest(made.path, msgspec.structs.replace(made.manifest, **changes))
    return Bundle.open(made.path)


@pytest.fixture
def taken(monkeypatch):
    """What compile_engine is asked for."""
    asked = {}

    def compile_engine(graph, sha256, input, precision, **more):
        content = bytes(graph())
        assert sha256 == hashlib.sha256(content).hexdigest()
        asked.update(graph=content, precision=precision, **more)

    monkeypatch.setattr(flavour, "compile_engine", compile_engine)
    return asked


def compile_for(bundle: Bundle, precision: Precision, library: Library, monkeypatch, **plan: object) -> GraphRecord:
    monkeypatch.setattr(requests, "load_library", lambda name: library)
    (graph,) = [record for record in bundle.manifest.graphs if record.precision is precision]
    options = CompileOptions(plan=PlanOptions(**plan))
    flavour.TENSORRT.compile(bundle, graph, options, no_progress)
    return flavour.TENSORRT.source_graph(bundle, graph, options)


@pytest.mark.parametrize(
    ("precision", "library", "plan", "expected"),
    [
        (Precision.FP16, WEAK, {"dla_core": 0}, (b"fp32", True, None)),
        (Precision.INT8, WEAK, {"dla_core": 1}, (b"fp32", True, RANGES)),
        (Precision.FP16, WEAK, {}, (b"fp16", False, None)),
        (Precision.INT8, WEAK, {}, (b"int8", False, None)),
        (Precision.BF16, WEAK, {"dla_core": 0}, (b"bf16", False, None)),  # refused later: DLA has no bf16
        (Precision.FP16, STRONG, {"dla_core": 0}, (b"fp16", False, None)),
        (Precision.INT8, STRONG, {"dla_core": 0}, (b"int8", False, None)),
    ],
)
def test_the_dla_of_jetpack_6_is_compiled_from_the_fp32_graph(
    bundle, taken, monkeypatch, precision, library, plan, expected
):
    source = compile_for(bundle, precision, library, monkeypatch, **plan)
    assert (taken["graph"][-4:], taken["weak"], taken["ranges"]) == expected
    assert taken["precision"] is precision
    assert source.precision.value.encode() == expected[0]  # --resume looks for an engine of this graph


@pytest.mark.parametrize("precision", [Precision.FP16, Precision.INT8])
def test_a_bundle_without_an_fp32_graph_is_told_how_to_get_one(bundle, taken, monkeypatch, precision):
    rest = tuple(graph for graph in bundle.manifest.graphs if graph.precision is not Precision.FP32)
    without = write(bundle, graphs=rest)
    with pytest.raises(CompileError, match=f"{precision} on this DLA.*--precision {precision} --precision fp32"):
        compile_for(without, precision, WEAK, monkeypatch, dla_core=0)
    assert not taken


def test_int8_needs_ranges_of_this_graph(bundle, taken, monkeypatch):
    with pytest.raises(CompileError, match="has no calibration: build it with --precision int8"):
        compile_for(write(bundle, calibration=None), Precision.INT8, WEAK, monkeypatch, dla_core=0)
    equalised = write(bundle, calibration=calibration(bundle, factors={"conv": (1.0,)}))
    with pytest.raises(CompileError, match="of an equalised graph"):
        compile_for(equalised, Precision.INT8, WEAK, monkeypatch, dla_core=0)
    compile_for(equalised, Precision.FP16, WEAK, monkeypatch, dla_core=0)  # needs none
    assert taken["ranges"] is None
