"""The HTML report: its figures against the bundle, its safety, and what a browser makes of it."""

from __future__ import annotations

import base64
import contextlib
import io
import itertools
import json
import os
import re
import select
import shutil
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import pytest
import timm
import torch
from msgspec.structs import replace
from PIL import Image

from build_scripts import fetch_chromium
from edge_backbones import verify_bundle
from edge_backbones.bench.results import Comparison, MeasuredMachine, Measurement, Ratio
from edge_backbones.bundle.golden import GoldenSamples
from edge_backbones.bundle.manifest import BlockNoise, CalibrationFile, Decision, GoldenRecord, GpuKey, Trial
from edge_backbones.bundle.reader import Bundle, load_golden
from edge_backbones.bundle.writer import BundleWriter, record_file, write_manifest
from edge_backbones.errors import (
    EngineMismatchError,
    InferenceError,
    InputError,
    IntegrityError,
    MissingDependencyError,
)
from edge_backbones.machine import child
from edge_backbones.parity_report import ParityReport
from edge_backbones.report.page import write_report
from edge_backbones.runtime.backbone import EdgeBackbone
from edge_backbones.spec import Precision
from edge_backbones.testing import make_bundle
from edge_backbones.toolchain.build import build_bundle
from edge_backbones.toolchain.options import BuildOptions
from tests.imports import require_import_without

HOSTILE = '<script>alert_(1)</script><img src="https://example.org/x.png">\'" onload="alert(2)'


class Page(HTMLParser):
    """A page as a list of tags, its text, and its tables: by class, rows of cells, a cell being (text, values of <data>)."""

    def __init__(self, path: Path) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.tables: dict[str, list[list[list[tuple[str, list[float]]]]]] = {}
        self.values: list[float] = []
        self._rows: list[list[tuple[str, list[float]]]] = []
        self._raw = False
        self._in_cell = False
        self.feed(path.read_text(encoding="utf-8"))

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        self.tags.append((tag, attributes))
        self._raw = tag in ("style", "script")
        if tag == "table":
            self._rows = []
            self.tables.setdefault((attributes.get("class") or "").partition(" ")[0], []).append(self._rows)
        elif tag == "tr":
            self._rows.append([])
        elif tag in ("td", "th"):
            self._rows[-1].append(("", []))
            self._in_cell = True
        elif tag == "data":
            self.values.append(float(attributes["value"]))
            if self._in_cell:
                self._rows[-1][-1][1].append(self.values[-1])

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th"):
            self._in_cell = False

    def handle_data(self, data: str) -> None:
        if self._raw:
            self._raw = False
            return
        self.words.append(data)
        if self._in_cell:
            text, values = self._rows[-1][-1]
            self._rows[-1][-1] = (" ".join(f"{text} {data}".split()), values)

    def rows(self, kind: str, which: int = 0) -> list[list[tuple[str, list[float]]]]:
        """Without the head."""
        return self.tables[kind][which][1:]

    def images(self) -> dict[str, Image.Image]:
        """By alternative text."""
        uris = {str(a["alt"]): str(a["src"]) for a in self.of("img")}
        return {alt: Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))) for alt, uri in uris.items()}


def measurement(name: str, milliseconds: float, **figures: Any) -> Measurement:
    return Measurement(name=name, what=f"{name} as it is", median_ms=milliseconds, p90_ms=1.1 * milliseconds, **figures)


COMPARISON = Comparison(
    bundle="some.bundle",
    engine="openvino int8",
    precision="int8",
    input_shape=(2, 3, 64, 96),
    threads=2,
    device="cpu",
    date="2026-11-02",
    machine=MeasuredMachine(
        name="a processor", architecture="x86_64", cpu_features=(), cores=2, memory_bytes=8 << 30, system="Linux",
        python="3.11", gpu=None, settings={"governor": "performance"}, commit="0123abc",
    ),
    measurements=(
        measurement("ours", 2.5, file_mb=1.25, worst_cosine=0.991),
        measurement("torch", 10.125, file_mb=4.5),
        measurement("nearly", 2.5625, joules=0.5),
        measurement("quick", 2.0),
        Measurement(name="absent", what="not here", missing="pip install 'absent[all]'"),
    ),
    ratios=(
        Ratio(name="torch", median=4.05, low=3.9, high=4.2),
        Ratio(name="nearly", median=1.02, low=0.97, high=1.07),
        Ratio(name="quick", median=0.8, low=0.78, high=0.81),
    ),
)  # fmt: skip


@pytest.fixture(scope="module")
def int8(photograph_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """test_resnet, batch 2, 64 x 96, in int8 and fp32, which were tried and timed."""
    options = BuildOptions(
        weights="random:0", percentile=100, precisions=(Precision.INT8, Precision.FP32), cache=None, batch=2, height=64,
        width=96, out_indices=(2, 4), torchscript=False,
    )  # fmt: skip
    target = tmp_path_factory.mktemp("report") / "int8.bundle"
    bundle = build_bundle("test_resnet", target, images=photograph_folder, options=options).bundle
    trials = (
        Trial(precision=Precision.FP32, blocks=(), cosine=1.0, sqnr_db=120.5, passed=True, milliseconds=3.25),
        Trial(precision=Precision.INT8, blocks=("layer1.0",), cosine=0.97, sqnr_db=11.5, passed=False),
        Trial(precision=Precision.INT8, blocks=("op:Add",), cosine=0.99, sqnr_db=20.5, passed=True, milliseconds=1.625),
        Trial(precision=Precision.FP16, blocks=(), cosine=1.0, sqnr_db=70.5, passed=False, milliseconds=6.5),
    )
    noise = tuple(BlockNoise(block=f"block{i}", sqnr_db={"layer2": 9.5 + i, "layer4": 300.0}) for i in range(13))
    decision = Decision(
        sentence="fp32 3.25 ms: shipping fp32", device_name="a processor", trials=trials, sensitivity=noise
    )
    engines = tuple(
        replace(e, milliseconds=1.0 if e.key.precision is Precision.INT8 else 2.0) for e in bundle.manifest.engines
    )
    write_manifest(bundle.path, replace(bundle.manifest, decision=decision, engines=engines))
    return Bundle.open(bundle.path)


@pytest.fixture(scope="module")
def report(int8: Bundle) -> Path:
    return write_report(int8.path, comparisons=[COMPARISON])


@pytest.fixture(scope="module")
def page(report: Path) -> Page:
    return Page(report)


@pytest.fixture
def pooling(tmp_path: Path) -> Bundle:
    return make_bundle(tmp_path / "pooling.bundle")


def on_another_machine(bundle: Bundle) -> Bundle:
    """The same with engines that cannot run here."""
    engines = tuple(replace(e, key=replace(e.key, architecture="riscv64")) for e in bundle.manifest.engines)
    write_manifest(bundle.path, replace(bundle.manifest, engines=engines))
    return Bundle.open(bundle.path)


# ---- the figures ----------------------------------------------------------------------------------------------------


def test_the_report_lies_beside_the_bundle_which_stays_as_it_is(int8, report):
    assert report == int8.path.parent / "int8.bundle.report.html"
    assert [p.name for p in report.parent.iterdir() if p.name not in (report.name, int8.path.name)] == []
    int8.check_files()


def test_parity_is_that_of_the_manifest(int8, page):
    for index, engine in enumerate(int8.manifest.engines):
        rows = page.rows("parity", index)
        assert [row[0][0] for row in rows] == ["layer2", "layer4"]
        for row, stage in zip(rows, engine.parity.stages, strict=True):
            values = [value for _, found in row for value in found]
            assert values == [stage.sqnr_db, stage.cosine, stage.relative, stage.max_abs]
            assert row[1][0] == f"{stage.sqnr_db:.1f}"
            assert row[-1][0] == "pass"
    lines = [float(line["x1"]) for line in page.of("line")]
    assert len(lines) >= 4 + 2  # SQNR and cosine of int8, the relative error of fp32
    assert all(0 < x < 100 for x in lines[:6])


def test_a_gate_is_where_its_figure_would_be(int8, page):
    """A bar is as long as its figure, and the line lies at the gate on the same scale."""
    bars = [
        (a, float(rect["width"]))
        for a, rect in zip(page.of("svg"), (r for r in page.of("rect") if r.get("class") == "fill"), strict=False)
    ]
    parity = int8.manifest.engines[0].parity
    widths = [width for a, width in bars if str(a.get("aria-label")).startswith("SQNR")][:2]
    line = float(page.of("line")[0]["x1"])
    for width, stage in zip(widths, parity.stages, strict=True):
        assert width / line == pytest.approx(stage.sqnr_db / parity.gate.min_sqnr_db, rel=1e-2)


def test_what_the_build_tried_and_sizes_are_those_of_the_manifest(int8, page):
    manifest = int8.manifest
    fast, slow, *_ = page.rows("trials")
    assert (fast[0][0], fast[2][1], fast[3][1], fast[4][1], fast[5][0]) == ("1", [3.25], [1.0], [120.5], "pass")
    assert (slow[2], slow[3][1], slow[4][1], slow[5][0]) == (("not timed", []), [0.97], [11.5], "fail")
    assert "without layer1.0" in slow[1][0]
    assert manifest.decision.sentence in page.text
    files = [*(e.file for e in manifest.engines), *(g.file for g in manifest.graphs)]
    assert [(row[0][0], row[1][1]) for row in page.rows("sizes")] == [(f.path, [f.size]) for f in files]
    hashes = [(row[0][0], row[1][0], row[2][0]) for row in page.rows("files")]
    assert hashes == [(f.path, str(f.size), f.sha256) for f in manifest.files()]
    assert manifest.digest in page.text
    assert manifest.provenance.created in page.text
    assert manifest.preprocessing.removeprefix("preprocessing: ") in page.text


def test_the_trade_curve_has_a_point_where_each_timed_trial_is(report):
    """Milliseconds from 0 to the slowest, decibels from the worst to the best; numbers are those of the table."""
    svg = report.read_text(encoding="utf-8").partition('<figure class="trade">')[2].partition("</figure>")[0]
    found = re.findall(r'<g class="(\w+)"><circle cx="([\d.]+)" cy="([\d.]+)".*?>(\d)</text>', svg)
    points = {number: (kind, float(x), float(y)) for kind, x, y, number in found}
    assert points == {
        "1": ("passed", 40 + 150, 20.0),
        "3": ("passed", 40 + 75, 150.0),
        "4": ("failed", 340.0, 85.0),
    }
    assert "0 to 6.50" in svg
    assert ">120<" in svg
    assert ">20<" in svg


def test_the_loudest_blocks_are_listed(page):
    rows = page.rows("blocks")
    assert [row[0][0] for row in rows] == [f"block{i}" for i in range(12)]
    assert [row[1][1] for row in rows] == [[9.5 + i] for i in range(12)]
    assert {row[2] for row in map(tuple, ([c[0] for c in row] for row in rows))} == {"none"}
    assert "the loudest 12 of 13" in page.text


def test_ranges_are_those_of_the_calibration(int8, page):
    data = (int8.path / "calibration.json").read_bytes()
    found = msgspec.json.decode(data, type=CalibrationFile)
    graph = onnx.load(int8.path / "graphs" / "int8.onnx").graph
    writers = {name: node.name for node in graph.node for name in node.output}
    every, widest = (
        {words[0][0].split()[-1]: ("".join(words[0][0].split()), words[1][1], words[2][1]) for words in page.rows(kind)}
        for kind in ("ranges", "widest")
    )
    tensors = [tensor for tensor in found.ranges if tensor != "pixel_values"]
    assert len(page.rows("ranges")) == len(found.ranges)
    assert {"layer1.0.act1/Relu", "layer1.0.conv1/Conv"} & {writers[tensor] for tensor in tensors if tensor in writers}
    for tensor in tensors:
        text, value, largest = every[tensor]
        assert (value, largest) == ([found.ranges[tensor]], [found.largest[tensor]])
        node = next(writers[n] for n in (f"{tensor}.half", tensor) if not writers.get(n, "Cast").startswith("Cast"))
        module, _, op = node.partition("/")
        assert text == f"{module}{op},tensor{tensor}"
    order = sorted(found.ranges, key=lambda tensor: -found.ranges[tensor])[:10]
    assert list(widest) == [tensor if tensor != "pixel_values" else "input" for tensor in order]
    columns = [str(a["aria-label"]).split() for a in page.of("svg") if " ranges from " in str(a.get("aria-label"))]
    assert sum(int(words[0]) for words in columns) == len(found.ranges)
    for words in columns:
        low, high = float(words[3]), float(words[5])
        assert sum(low * 0.99 < value < high * 1.01 for value in found.ranges.values()) >= int(words[0])


def products_of_convolutions(height: int, width: int) -> list[tuple[int, int]]:
    """Of test_resnet up to its last stage: input channels and multiply-adds of each, seen by torch."""
    counted: list[tuple[int, int]] = []
    net = timm.create_model("test_resnet", features_only=True, out_indices=(2, 4)).eval()
    for module in net.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_hook(
                lambda conv, _, out: counted.append((conv.in_channels, out.numel() * conv.weight[0].numel()))
            )
    with torch.no_grad():
        net(torch.zeros(1, 3, height, width))
    return counted


def test_the_error_of_each_layer_is_that_of_the_graph_without_rounding(int8, page):
    """Of the first layer in int8 it is the rounding of its own input; behind it errors build up."""
    rows = {"".join(row[0][0].split()): row[1][1] for row in page.rows("noise")}
    graph = onnx.load(int8.path / "graphs" / "int8.onnx").graph
    assert list(rows) == [node.name for node in graph.node if node.op_type == "Conv"]
    stem = next(iter(rows))
    assert rows.pop(stem) == []  # it is not quantised
    values = [value for (value,) in rows.values()]
    assert all(10 < value < 80 for value in values)
    assert values[0] == max(values)
    assert "the worst is" in page.text


def test_where_onnxruntime_is_missing_the_error_of_layers_is_a_sentence(int8, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "edge_backbones.toolchain.explain", None)
    page = Page(write_report(int8.path, tmp_path / "r.html"))
    assert "Not measured: measuring the error of layers" in page.text
    assert "noise" not in page.tables


def test_why_layers_are_not_in_int8(int8, tmp_path, photograph_folder):
    """By hand, by the build, and by the rules: the shares add up to what is not in int8."""
    from edge_backbones.report.layers import list_layers

    options = BuildOptions(
        weights="random:0", precisions=(Precision.INT8,), cache=None, height=64, width=96, out_indices=(2, 4),
        torchscript=False, exclude=("layer1.0", "op:Add"),
    )  # fmt: skip
    built = build_bundle("test_resnet", tmp_path / "net.bundle", images=photograph_folder, options=options).bundle
    engine = built.manifest.engines[0]
    shipped = Trial(
        precision=Precision.INT8, blocks=("op:Add",), cosine=0.99, sqnr_db=20, passed=True, milliseconds=1.5
    )
    decision = Decision(sentence="so", device_name=engine.key.device_name, trials=(shipped,))
    write_manifest(built.path, replace(built.manifest, decision=decision))
    found = list_layers(Bundle.open(built.path))
    why = {layer.name: layer.why for layer in found.outside}
    assert why["layer1.0.conv1/Conv"] == "left out by hand, with --exclude"
    assert why["layer2.0/Add"] == "the build left the skip branches out: see what it tried"
    stem = next(layer for layer in found.outside if "few input channels (3)" in layer.why)
    assert stem.op == "Conv"
    assert all(layer.why for layer in found.outside)
    assert sum(count for _, count, _ in found.reasons) == len(found.outside)
    shares = sum(share for _, _, share in found.reasons)
    assert shares == pytest.approx(1 - next(share for kind, _, share in found.formats if kind == "int8"))
    page = Page(write_report(built.path, tmp_path / "r.html"))
    assert [(row[0][0], row[1][1]) for row in page.rows("reasons")] == [(w, [n]) for w, n, _ in found.reasons]
    assert len(page.rows("outside")) == len(found.outside)


@pytest.mark.parametrize(
    ("precision", "weight", "groups", "why"),
    [
        (Precision.FP8, (64, 16, 3, 3), 4, "4 groups"),
        (Precision.FP8, (64, 1, 3, 3), 64, "64 groups"),
        (Precision.FP8, (64, 64, 7, 7), 1, "a kernel of 7 x 7"),
        (Precision.FP8, (64, 3, 3, 3), 1, "3 channels to 64"),
        (Precision.FP8, (40, 16, 1, 1), 1, "16 channels to 40"),
        (Precision.INT8, (64, 1, 3, 3), 64, "depthwise"),
        (Precision.INT8, (64, 3, 3, 3), 1, r"few input channels \(3\)"),
    ],
)
def test_why_a_convolution_is_not_quantised(precision, weight, groups, why):
    from edge_backbones.report.layers import _why_outside

    assert re.match(why, _why_outside(precision, "Conv", weight, groups))


def test_times_of_layers_are_asked_for(int8, page, tmp_path):
    assert "times" not in page.tables
    assert "edge-backbones report int8.bundle --time-layers" in page.text
    timed = Page(write_report(int8.path, tmp_path / "r.html", time_layers=True))
    slowest, every = timed.tables["times"]
    names = ["".join(row[0][0].split()) for row in every[1:]]
    graph = onnx.load(int8.path / "graphs" / "int8.onnx").graph
    convolutions = {node.name for node in graph.node if node.op_type == "Conv"}
    assert len(convolutions & set(names)) > len(convolutions) / 2
    taken = [row[2][1][0] for row in slowest[1:]]
    assert taken == sorted(taken, reverse=True)
    assert len(taken) == 10
    assert sum(float(row[3][0].split()[0]) for row in every[1:]) == pytest.approx(100, abs=5)
    assert "layers, one" not in timed.text


def test_a_library_that_times_no_layers_has_no_command(pooling, tmp_path, monkeypatch):
    from edge_backbones.engines.openvino.flavour import OpenVino

    monkeypatch.setattr(OpenVino, "times_layers", False)
    page = Page(write_report(pooling.path, tmp_path / "r.html"))
    assert "--time-layers" not in page.text
    assert "The bundle holds no times of single layers, and OpenVINO does not tell them." in page.text


def with_plan(bundle: Bundle, said: bytes) -> Bundle:
    """The same with a TensorRT plan, not measured, of which the library said this."""
    engine = bundle.manifest.engines[0]
    gpu = GpuKey(architectures=("sm_87",), driver="12.6")
    key = replace(engine.key, flavour="tensorrt", library_version="10.3.0", device_name="Orin", gpu=gpu)
    (bundle.path / "engines" / "plan.layers.json").write_bytes(said)
    layers = record_file(bundle.path, "engines/plan.layers.json")
    unmeasured = ParityReport(precision=Precision.FP32, gate=engine.parity.gate, stages=())
    plan = replace(engine, key=key, parity=unmeasured, layers=layers)
    write_manifest(bundle.path, replace(bundle.manifest, engines=(engine, plan)))
    return Bundle.open(bundle.path)


def test_what_tensorrt_says_of_layers_is_listed(pooling, tmp_path):
    layers = [
        {"Name": "conv", "LayerType": "CaskConvolution", "TacticName": "sm80_i8816", "Outputs": []},
        {"Name": HOSTILE, "LayerType": "Reformat", "Outputs": [{"Format/Datatype": "Int8 NC/32HW32"}]},
        "a name alone",
    ]
    bundle = with_plan(pooling, json.dumps({"Layers": layers * 40, "Bindings": []}).encode())
    page = Page(write_report(bundle.path, tmp_path / "r.html"))
    rows = [[cell[0] for cell in row] for row in page.rows("plan")]
    assert rows[0] == ["conv", "CaskConvolution", "sm80_i8816"]
    assert rows[1] == [HOSTILE.replace(".", ". "), "Reformat", "Int8 NC/32HW32"]
    assert rows[2] == ["a name alone", "", ""]
    assert len(rows) == 60
    assert "60 more are in engines/plan.layers.json" in page.text
    assert "120 kernels: no fused attention, no casts, 40 reformats and copies." in page.text
    plan = bundle.manifest.engines[1]
    assert f"trtexec --loadEngine={plan.file.path} --dumpProfile --separateProfileRun" in page.text


@pytest.mark.parametrize("said", [b"no json", b"[]", b"{}", b'{"Layers": 3}', b'{"Layers": []}', b'"Layers"'])
def test_a_file_that_describes_no_layers_does_not_stop_the_page(pooling, tmp_path, said):
    page = Page(write_report(with_plan(pooling, said).path, tmp_path / "r.html"))
    assert "plan" not in page.tables
    assert len(page.rows("parity")) == 2


def test_layers_of_a_dynamic_graph_are_counted_at_its_usual_size(dynamic, tmp_path):
    page = Page(write_report(dynamic.bundle.path, tmp_path / "r.html"))
    assert sum(count for _, count in products_of_convolutions(96, 96)) in page.values
    assert "fp32: " in page.text
    assert "Nothing was calibrated" in page.text


def test_layers_and_multiply_adds_are_those_of_the_network(int8, page):
    graph = onnx.load(int8.path / "graphs" / "int8.onnx").graph
    dequantized = {name for node in graph.node if node.op_type == "DequantizeLinear" for name in node.output}
    convolutions = [node for node in graph.node if node.op_type == "Conv"]
    quantized = [node for node in convolutions if node.input[0] in dequantized]
    assert 0 < len(quantized) < len(convolutions)  # the stem is not

    counted = products_of_convolutions(64, 96)
    total = sum(count for _, count in counted)
    inside = sum(count for channels, count in counted if channels > 3)
    values = page.values
    at = values.index(total)  # one image's, though the engine takes two
    assert values[at + 1] == len(quantized)
    assert values[at + 2] == pytest.approx(inside / total)
    assert "int8: " + str(len(quantized)) in page.text


def test_without_onnx_one_line_stands_for_the_layers(int8, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    page = Page(write_report(int8.path, tmp_path / "r.html"))
    assert "Not shown: reading the layers of a graph needs the 'build' extra" in page.text
    assert len(page.rows("parity")) == 2


def test_peers_are_ranked_only_where_the_machine_tells(page):
    rows = {row[0][0].split()[0]: row for row in page.rows("peers")}
    assert list(rows) == ["ours", "torch", "nearly", "quick"]
    assert [row[1][1] for row in rows.values()] == [[2.5], [10.125], [2.5625], [2.0]]
    words = {name: row[2][0] for name, row in rows.items()}
    assert words["ours"] == "this engine"
    assert words["torch"] == "4.05 (3.90 to 4.20), slower than this engine"
    assert words["quick"] == "0.80 (0.78 to 0.81), faster than this engine"
    assert words["nearly"] == "1.02 (0.97 to 1.07): the machine does not tell which is faster"
    assert "absent : pip install 'absent[all]'" in page.text
    assert [head[0] for head in page.tables["peers"][0][0]] == [
        "contender", "median ms", "time beside this engine's", "file MB", "p90 ms", "J / image", "worst cosine",
    ]  # fmt: skip


# ---- feature maps ---------------------------------------------------------------------------------------------------


def energy(values: np.ndarray) -> np.ndarray:
    return np.sqrt(np.mean(values.astype(np.float64) ** 2, axis=0))


def test_pictures_are_the_energies_of_reference_engine_and_difference(int8, page):
    golden = load_golden(int8)
    with EdgeBackbone.from_pretrained(int8.path) as backbone:
        assert int8.manifest.engines[0].key.precision == "int8"
        maps = backbone.run(golden.inputs["opt"])
    images = page.images()
    assert len(images) == len(int8.manifest.golden.images) * (1 + 2 * 5)
    for index, name in enumerate(int8.manifest.golden.images):
        assert images[f"input image {name}, as the network sees it"].size == (96, 64)
        for stage in ("layer2", "layer4"):
            reference, actual = golden.outputs["opt"][stage][index], maps[stage][index]
            low, high = energy(reference).min(), energy(reference).max()
            difference = energy(actual - reference)
            for alt, expected, least, most in (
                (f"fp32 reference: energy of {stage} on {name}", energy(reference), low, high),
                (f"int8 engine: energy of {stage} on {name}", energy(actual), low, high),
                (f"energy of the difference in {stage} on {name}", difference, 0, difference.max()),
            ):
                levels = np.asarray(images[alt]).astype(np.float64)
                shown = least + levels / 255 * (most - least)
                assert np.abs(shown - np.clip(expected, least, most)).max() <= 0.51 / 255 * (most - least) + 1e-6
            assert f"{low:.3g} to {high:.3g}" in page.text
            assert f"0 to {difference.max():.3g}" in page.text


def test_components_of_reference_and_engine_have_the_same_colours(int8, page):
    golden = load_golden(int8)
    with EdgeBackbone.from_pretrained(int8.path) as backbone:
        maps = backbone.run(golden.inputs["opt"])
    images = page.images()
    for index, name in enumerate(int8.manifest.golden.images):
        for stage in ("layer2", "layer4"):
            reference = golden.outputs["opt"][stage][index].astype(np.float64)
            cells = reference.reshape(len(reference), -1).T
            mean = cells.mean(axis=0)
            _, _, directions = np.linalg.svd(cells - mean, full_matrices=False)
            signs = np.sign(directions[np.arange(3), np.abs(directions[:3]).argmax(axis=1)])
            components = directions[:3] * signs[:, None]
            low, high = np.percentile((cells - mean) @ components.T, [1, 99], axis=0)
            for who, values in (("fp32 reference", reference), ("int8 engine", maps[stage][index])):
                levels = ((values.reshape(len(values), -1).T - mean) @ components.T - low) / (high - low)
                expected = 255 * np.clip(levels, 0, 1).reshape(*values.shape[1:], 3)
                shown = np.asarray(images[f"{who}: components of {stage} on {name}"].convert("RGB")).astype(float)
                assert np.abs(shown - expected).mean() < 12  # 64 colours


def test_the_photograph_is_what_went_in(int8, page):
    config = int8.manifest.image
    pixels = load_golden(int8).inputs["opt"][0].transpose(1, 2, 0) * config.std + config.mean
    shown = np.asarray(page.images()[f"input image {int8.manifest.golden.images[0]}, as the network sees it"])
    assert np.abs(shown - 255 * pixels).mean() < 8  # JPEG


def with_maps(bundle: Bundle, maps: dict[str, np.ndarray]) -> GoldenRecord:
    """Put other reference maps into golden.npz, and return its record."""
    golden = GoldenSamples("pixel_values", load_golden(bundle).inputs, {"opt": maps})
    return BundleWriter(bundle.path).add_golden(golden, bundle.manifest.golden.images)


@pytest.mark.parametrize("layout", ["NHWC", "NLC"])
def test_every_layout_gives_the_same_pictures(pooling, tmp_path, layout):
    bundle = on_another_machine(pooling)
    expected = Page(write_report(bundle.path, tmp_path / "a.html")).of("img")
    maps = {}
    for stage, values in load_golden(bundle).outputs["opt"].items():
        channels_last = values.transpose(0, 2, 3, 1)
        tokens = channels_last.reshape(len(channels_last), -1, 3)
        prefix = np.full((len(tokens), 1, 3), 9, np.float32)
        maps[stage] = channels_last if layout == "NHWC" else np.concatenate([prefix, tokens], axis=1)
    record = with_maps(bundle, maps)
    spec = replace(bundle.manifest.backbone, layouts=(layout, layout))
    write_manifest(bundle.path, replace(bundle.manifest, golden=record, backbone=spec))
    found = Page(write_report(bundle.path, tmp_path / "b.html"))
    assert found.of("img") == expected
    assert len(expected) == 2 * (1 + 2 * 2)


def test_a_vector_is_named_where_no_map_can_be_drawn(pooling, tmp_path):
    maps = load_golden(pooling).outputs["opt"]
    record = with_maps(pooling, {**maps, "pool8": maps["pool8"].mean(axis=(2, 3))})
    spec = replace(pooling.manifest.backbone, layouts=("NCHW", "NC"))
    write_manifest(pooling.path, replace(pooling.manifest, golden=record, backbone=spec))
    page = Page(write_report(pooling.path, tmp_path / "r.html"))
    assert "No map can be drawn of pool8" in page.text


def test_large_maps_are_averaged_and_the_page_says_so(tmp_path):
    from edge_backbones.testing import pooling_input

    bundle = make_bundle(tmp_path / "large.bundle", pooling_input(height=512, width=1024))
    page = Page(write_report(bundle.path))
    assert page.images()["fp32 reference: energy of pool4 on noise 0"].size == (112, 56)
    assert "pool4 has 128 \u00d7 256 cells" in page.text
    assert (tmp_path / "large.bundle.report.html").stat().st_size < 1_500_000


def test_where_no_engine_runs_the_page_says_why_and_has_the_rest(pooling, tmp_path):
    bundle = on_another_machine(pooling)
    page = Page(write_report(bundle.path, tmp_path / "r.html"))
    assert "No engine of this bundle runs on the machine that wrote this page." in page.text
    assert (
        page.text.count("compiled for riscv64; this machine is") == 2
    )  # beside the engine, and where its maps would be
    assert all("engine" not in alt and "difference" not in alt for alt in page.images())
    assert len(page.rows("parity")) == 2


def test_an_engine_that_fails_here_does_not_stop_the_page(pooling, tmp_path):
    engine = pooling.manifest.engines[0]
    (pooling.path / engine.file.path).write_bytes(b"no engine at all")
    broken = replace(engine, file=record_file(pooling.path, engine.file.path))
    write_manifest(pooling.path, replace(pooling.manifest, engines=(broken,)))
    page = Page(write_report(pooling.path, tmp_path / "r.html"))
    assert f"{engine.name} failed here:" in page.text
    assert len(page.images()) == 2 * (1 + 2 * 2)


def test_an_engine_that_was_never_measured_here_runs_in_a_process_of_its_own(tmp_path, monkeypatch):
    """What ends that process is on the page. An engine that this machine has verified runs here."""
    bundle = make_bundle(tmp_path / "net.bundle")
    asked = []

    def ended(function, *_, **__):
        asked.append(function)
        raise InferenceError("the process that was running it ended by SIGSEGV")

    monkeypatch.setattr(child, "run_apart", ended)
    assert "failed here: the process that was running it ended by SIGSEGV" in Page(write_report(bundle.path)).text
    assert asked == ["edge_backbones.report.page:run_engine"]
    verify_bundle(bundle.path, in_process=True)
    assert "failed here" not in Page(write_report(bundle.path)).text
    assert len(asked) == 1


def test_a_plan_that_was_never_measured_is_listed_with_its_facts(pooling, tmp_path):
    engine = pooling.manifest.engines[0]
    gpu = GpuKey(architectures=("sm_87",), driver="12.6", multiprocessors=8, profiles=(((1, 3, 32, 48),) * 3,))
    key = replace(engine.key, flavour="tensorrt", library_version="10.3.0", device_name="Orin", gpu=gpu)
    unmeasured = ParityReport(precision=Precision.FP32, gate=engine.parity.gate, stages=())
    plan = replace(engine, key=key, parity=unmeasured)
    write_manifest(pooling.path, replace(pooling.manifest, engines=(engine, plan)))
    page = Page(write_report(pooling.path, tmp_path / "r.html"))
    assert "fp32 for TensorRT 10.3.0 on sm_87 (Orin)" in page.text
    assert "not measured" in page.text
    assert "Orin (8 multiprocessors)" in page.text
    assert "1 \u00d7 3 \u00d7 32 \u00d7 48 to" in page.text
    assert any("fp32 engine: energy of pool8" in alt for alt in page.images())  # of the one that runs


def test_an_engine_can_be_named(int8, tmp_path):
    page = Page(write_report(int8.path, tmp_path / "r.html", engine="fp32"))
    assert any(alt.startswith("fp32 engine: ") for alt in page.images())
    with pytest.raises(EngineMismatchError, match="has no engine 'fp8'; it holds"):
        write_report(int8.path, tmp_path / "r.html", engine="fp8")


# ---- safe and whole -------------------------------------------------------------------------------------------------


def test_everything_is_in_the_file(page):
    addresses = [a[name] for _, a in page.tags for name in ("src", "href", "srcset", "action", "data") if name in a]
    assert addresses
    ids = {a["id"] for _, a in page.tags if "id" in a}
    for address in addresses:
        assert address.startswith("data:") or address.removeprefix("#") in ids
    assert not page.of("script")


def test_style_fetches_nothing(report):
    text = report.read_text(encoding="utf-8")
    assert "url(" not in text
    assert "@import" not in text
    assert "://" not in text


def test_every_picture_has_words_and_headings_are_in_order(page):
    assert all(image["alt"] for image in page.of("img"))
    drawings = [a for a in page.of("svg") if a.get("aria-hidden") != "true"]
    ids = {a["id"] for _, a in page.tags if "id" in a}
    assert all(a["role"] == "img" and (a.get("aria-label") or a.get("aria-labelledby") in ids) for a in drawings)
    levels = [int(tag[1]) for tag, _ in page.tags if tag in ("h1", "h2", "h3", "h4")]
    assert levels.count(1) == 1
    assert levels[0] == 1
    assert all(later <= earlier + 1 for earlier, later in itertools.pairwise(levels))
    assert page.of("html")[0]["lang"] == "en"
    assert "title" in [tag for tag, _ in page.tags]
    assert any(a.get("name") == "viewport" for a in page.of("meta"))


def test_hostile_names_stay_text(pooling, tmp_path):
    plain = Page(write_report(pooling.path, tmp_path / "a.html", comparisons=[COMPARISON]))
    manifest = pooling.manifest
    hostile = replace(
        manifest,
        source=replace(manifest.source, name=HOSTILE),
        golden=replace(manifest.golden, images=(HOSTILE, "noise 1")),
        provenance=replace(manifest.provenance, created=HOSTILE, versions={}),
        engines=tuple(replace(e, key=replace(e.key, device_name=HOSTILE)) for e in manifest.engines),
    )
    write_manifest(pooling.path, hostile)
    peers = tuple(
        replace(m, name=HOSTILE, what=HOSTILE, missing=m.missing and HOSTILE) for m in COMPARISON.measurements
    )
    comparison = replace(COMPARISON, engine=HOSTILE, measurements=peers)
    found = Page(write_report(pooling.path, tmp_path / "b.html", comparisons=[comparison]))
    assert [tag for tag, _ in found.tags] == [tag for tag, _ in plain.tags]
    assert [sorted(a) for _, a in found.tags] == [sorted(a) for _, a in plain.tags]
    assert found.text.count(" ".join(HOSTILE.split())) > 12
    assert f"input image {HOSTILE}, as the network sees it" in found.images()


def test_hostile_stage_names_stay_text(pooling, tmp_path):
    stages = (HOSTILE, "pool8")
    maps = load_golden(pooling).outputs["opt"]
    record = with_maps(pooling, {HOSTILE: maps["pool4"], "pool8": maps["pool8"]})
    spec = replace(pooling.manifest.backbone, stage_names=("pool2", *stages), out_features=stages)
    engine = pooling.manifest.engines[0]
    parity = replace(engine.parity, stages=tuple(replace(s, stage=HOSTILE) for s in engine.parity.stages))
    engines = (replace(engine, parity=parity),)
    write_manifest(pooling.path, replace(pooling.manifest, golden=record, backbone=spec, engines=engines))
    found = Page(write_report(pooling.path, tmp_path / "r.html"))
    assert not found.of("script")
    assert not any("onload" in a for _, a in found.tags)
    assert [row[0][0] for row in found.rows("parity")] == [" ".join(HOSTILE.split())] * 2


def test_the_same_input_gives_the_same_bytes(int8, report, tmp_path):
    again = write_report(int8.path, tmp_path / "again.html", comparisons=[COMPARISON])
    assert again.read_bytes() == report.read_bytes()


def test_a_report_is_replaced_at_once_or_not_at_all(pooling):
    out = write_report(pooling.path)
    first = out.read_bytes()
    before = out.stat().st_ino
    with out.open("rb") as reader:
        write_report(pooling.path, comparisons=[COMPARISON])
        assert reader.read() == first  # whoever had it open reads the old one to its end
    second = out.read_bytes()
    assert second != first
    assert out.stat().st_ino != before
    (pooling.path / "golden.npz").write_bytes(b"damaged")
    with pytest.raises(IntegrityError, match=r"golden\.npz has 7 bytes"):
        write_report(pooling.path)
    assert out.read_bytes() == second
    assert sorted(p.name for p in out.parent.iterdir()) == ["pooling.bundle", "pooling.bundle.report.html"]


def test_places_that_cannot_hold_a_report_are_refused(pooling, tmp_path):
    with pytest.raises(InputError, match="holds what its manifest names"):
        write_report(pooling.path, pooling.path / "manifest.json")
    folder = tmp_path / "folder"
    folder.mkdir()
    with pytest.raises(InputError, match="cannot be written"):
        write_report(pooling.path, folder)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["folder", "pooling.bundle"]


@pytest.mark.parametrize("library", ["jinja2", "matplotlib", "PIL"])
def test_a_missing_library_is_named_with_its_extra(pooling, monkeypatch, library):
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(MissingDependencyError, match=r"edge-backbones\[report\]"):
        write_report(pooling.path)


def test_the_module_imports_with_numpy_and_msgspec_alone():
    libraries = [
        "torch",
        "timm",
        "transformers",
        "onnx",
        "onnxruntime",
        "openvino",
        "PIL",
        "matplotlib",
        "jinja2",
        "rich",
    ]
    require_import_without("edge_backbones.report.page", libraries)


# ---- in a browser ---------------------------------------------------------------------------------------------------

_PLACE_PIPES = """
import os, sys
commands, answers = os.dup(int(sys.argv[1])), os.dup(int(sys.argv[2]))
os.dup2(commands, 3), os.dup2(answers, 4)
os.set_inheritable(3, True), os.set_inheritable(4, True)
os.execv(sys.argv[3], sys.argv[3:])
"""


class Browser:
    """Headless Chromium, spoken to in the DevTools protocol through its descriptors 3 and 4: JSON, a zero byte at the end."""

    def __init__(self, profile: Path) -> None:
        program = str(fetch_chromium.require_chromium())
        theirs, self._commands = os.pipe()
        self._answers, their_answers = os.pipe()
        flags = [
            "--headless", "--remote-debugging-pipe", "--disable-gpu", "--no-first-run", "--disable-background-networking",
            "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage", "--hide-scrollbars",
            f"--user-data-dir={profile}", *(["--no-sandbox"] if os.geteuid() == 0 else []),
        ]  # fmt: skip
        self._process = subprocess.Popen(
            [
                sys.executable,
                "-c",
                _PLACE_PIPES,
                str(theirs),
                str(their_answers),
                program,
                *flags,
            ],
            pass_fds=(theirs, their_answers),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(theirs)
        os.close(their_answers)
        self._buffer = b""
        self._calls = 0
        self.events: list[dict[str, Any]] = []

    def start(self) -> None:
        target = self.call("Target.createTarget", session=None, url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", session=None, targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, *, session: str | None = "page", **params: Any) -> Any:
        self._calls += 1
        message = {"id": self._calls, "method": method, "params": params}
        if session is not None:
            message["sessionId"] = self._session
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._calls:
                assert "error" not in answer, answer
                return answer["result"]
            self.events.append(answer)

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._answers], [], [], 60)
            block = os.read(self._answers, 1 << 16) if ready else b""
            assert block, f"Chromium said nothing more; it ended with {self._process.poll()}"
            self._buffer += block
        first, self._buffer = self._buffer.split(b"\0", 1)
        return json.loads(first)

    def open(self, page: Path, *, scheme: str, width: int, height: int = 800) -> None:
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        self.events.clear()
        self.call("Page.navigate", url=page.as_uri())
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self.events.append(self._next())

    def evaluate(self, script: str) -> Any:
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def close(self) -> None:
        with contextlib.suppress(AssertionError, OSError):
            self.call("Browser.close", session=None)
        try:
            self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._commands)
        os.close(self._answers)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    opened = Browser(tmp_path_factory.mktemp("profile"))
    try:
        opened.start()
        yield opened
    finally:
        opened.close()


@pytest.fixture(scope="module", params=["a network's maps, with peers", "tokens, alone"])
def shown(request: pytest.FixtureRequest, report: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if request.param != "tokens, alone":
        return report
    vit = request.getfixturevalue("vit")
    return write_report(vit.bundle.path, tmp_path_factory.mktemp("vit") / "vit.html")


# Of each text: what it says and its contrast with the nearest background that is not transparent (WCAG 2, 1.4.3).
_CONTRASTS = """
(() => {
  const numbers = colour => colour.match(/[\\d.]+/g).map(Number);
  const luminance = ([r, g, b]) => [r, g, b].map(v => v / 255)
    .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const found = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement, text = walker.currentNode.data.trim();
    if (!text || element.closest("svg") || !element.checkVisibility({visibilityProperty: true})) continue;
    let behind = element;
    while (behind && (numbers(getComputedStyle(behind).backgroundColor)[3] ?? 1) === 0) behind = behind.parentElement;
    const paper = behind ? getComputedStyle(behind).backgroundColor : "rgb(255, 255, 255)";
    const pair = [numbers(getComputedStyle(element).color), numbers(paper)];
    if (pair.some(colour => (colour[3] ?? 1) !== 1)) found.push([text, 0]);
    const [dark, light] = pair.map(luminance).sort((a, b) => a - b);
    found.push([text, (light + 0.05) / (dark + 0.05)]);
  }
  return found;
})()
"""


# Of each layer in the strips: its format, its height, and the contrast of its colour with the page.
_DRAWN = """
(() => {
  const luminance = colour => colour.match(/[\\d.]+/g).map(Number).slice(0, 3).map(v => v / 255)
    .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0) + 0.05;
  const page = luminance(getComputedStyle(document.body).backgroundColor);
  return [...document.querySelectorAll(".strip rect")].map(rect => {
    const [dark, light] = [luminance(getComputedStyle(rect).fill), page].sort((a, b) => a - b);
    return [rect.getAttribute("class"), rect.getAttribute("height"), light / dark];
  });
})()
"""


@pytest.mark.parametrize("width", [360, 1200])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_browser_shows_the_page_without_complaint(browser, shown, scheme, width):
    browser.open(shown, scheme=scheme, width=width)
    browser.evaluate("document.querySelectorAll('details').forEach(one => { one.open = true; })")
    broken = "[...document.images].filter(i => !(i.complete && i.naturalWidth > 0 && i.clientWidth > 20)).length"
    assert browser.evaluate(broken) == 0
    assert browser.evaluate("document.images.length") > 6
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    outside = """[...document.querySelectorAll('body *')].filter(e => !e.closest('.scroll') && !e.closest('svg')
        && e.getBoundingClientRect().right > innerWidth + 0.5).map(e => e.outerHTML.slice(0, 80))"""
    assert browser.evaluate(outside) == []
    contrasts = browser.evaluate(_CONTRASTS)
    assert len(contrasts) > 80
    assert [(text, ratio) for text, ratio in contrasts if ratio < 4.5] == []
    drawn = browser.evaluate(_DRAWN)
    assert len({kind for kind, _, _ in drawn}) >= (1 if shown.name == "vit.html" else 2)
    assert [(kind, ratio) for kind, _, ratio in drawn if ratio < 3] == []  # WCAG 2, 1.4.11
    assert len({height for _, height, _ in drawn}) == len({kind for kind, _, _ in drawn})  # seen without colours too
    papers = browser.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)")
    assert (sum(papers) > 600) if scheme == "light" else (sum(papers) < 150)
    requested = [e["params"]["request"]["url"] for e in browser.events if e["method"] == "Network.requestWillBeSent"]
    assert [url for url in requested if not url.startswith("data:")] == [shown.as_uri()]
    complaints = ("Log.entryAdded", "Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Network.loadingFailed")
    assert [e for e in browser.events if e["method"] in complaints] == []


@pytest.mark.parametrize(("width", "height"), [(390, 844), (1400, 800)])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_first_screen_answers_is_it_good_and_fast(browser, shown, scheme, width, height):
    browser.open(shown, scheme=scheme, width=width, height=height)
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    places = browser.evaluate(
        """['#verdict', '.tiles > div:nth-child(1) .figure', '.tiles > div:nth-child(2) .figure',
            '.tiles > div:nth-child(3) .figure'].map(one => {
              const place = document.querySelector(one).getBoundingClientRect();
              return [place.top, place.bottom, place.left, place.right];
            })"""
    )
    for top, bottom, left, right in places:
        assert 0 <= top < bottom <= height
        assert 0 <= left < right <= width
    assert "Pass." in browser.evaluate("document.getElementById('verdict').innerText")


def test_wide_tables_stack_on_a_phone(browser, report):
    """Of tables with many columns every cell is on the screen, with its head beside it; the rest scroll in their boxes."""
    browser.open(report, scheme="light", width=390, height=844)
    browser.evaluate("document.querySelectorAll('details').forEach(one => { one.open = true; })")
    outside = """[...document.querySelectorAll('.stack td')].filter(
        cell => cell.getBoundingClientRect().right > innerWidth).map(cell => cell.outerHTML.slice(0, 80))"""
    assert browser.evaluate("document.querySelectorAll('.stack td').length") > 50
    assert browser.evaluate(outside) == []
    label = "getComputedStyle(document.querySelector('.parity td'), '::before').content"
    assert browser.evaluate(label) == '"SQNR, dB"'
    browser.open(report, scheme="light", width=1400, height=800)
    assert browser.evaluate(label) == "none"


def test_a_complaint_of_the_browser_would_be_seen(browser, tmp_path):
    """What the test above relies on: a page that asks for something, throws and overflows is noticed."""
    bad = tmp_path / "bad.html"
    bad.write_text(
        "<body style='background:#fff'><div style='width:900px;color:#aaa'>wide and pale</div>"
        f"<img src='{(tmp_path / 'none.png').as_uri()}'><script>console.error('no'); undefined.x</script>"
    )
    browser.open(bad, scheme="light", width=360)
    methods = {event["method"] for event in browser.events}
    assert {"Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Network.loadingFailed"} <= methods
    assert browser.evaluate("document.documentElement.scrollWidth") > 360
    ((_, ratio),) = browser.evaluate(_CONTRASTS)
    assert ratio == pytest.approx(2.32, abs=0.01)


# ---- the browser itself ---------------------------------------------------------------------------------------------


def test_a_browser_is_found_on_the_path(tmp_path, monkeypatch):
    program = tmp_path / "google-chrome"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert fetch_chromium.require_chromium() == program


def test_without_a_browser_the_message_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(fetch_chromium.sys, "platform", "linux")
    with pytest.raises(RuntimeError, match=r"no Chromium on this machine: install .*apt install chromium"):
        fetch_chromium.require_chromium()
    with pytest.raises(RuntimeError, match="only root can add Debian's"):
        fetch_chromium.install_chromium()


def test_debians_package_is_installed_by_root(tmp_path, monkeypatch):
    apt = tmp_path / "apt-get"
    apt.write_text("#!/bin/sh\n")
    apt.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(fetch_chromium.sys, "platform", "linux")
    monkeypatch.setattr("os.geteuid", lambda: 0)
    commands: list[list[str]] = []

    def run(command: list[str]) -> None:
        commands.append(command)
        if "install" in command:
            shutil.copy2(apt, tmp_path / "chromium")

    assert fetch_chromium.install_chromium(run) == tmp_path / "chromium"
    assert [command[1] for command in commands] == ["update", "install"]
    assert commands[1][-1] == "chromium"
