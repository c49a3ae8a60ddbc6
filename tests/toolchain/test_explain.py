"""Engines that are planted wrong: the explanation has to name the layer that was tampered with."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from msgspec import structs
from onnx import numpy_helper
from openvino import opset13 as ops
from PIL import Image

from edge_backbones.bundle.manifest import EngineRecord
from edge_backbones.bundle.reader import Bundle, load_golden
from edge_backbones.bundle.writer import BundleWriter, record_file, write_manifest
from edge_backbones.deploy.parity import allowed_noise, measure_engine
from edge_backbones.deploy.verify import verify_bundle
from edge_backbones.engines.openvino import int8_graph as cpu_graph
from edge_backbones.engines.openvino.compile import compile_graph
from edge_backbones.parity_report import Gate, ParityError, ParityReport
from edge_backbones.spec import Precision
from edge_backbones.toolchain import explain
from edge_backbones.toolchain.artifacts import ExportedGraph
from edge_backbones.toolchain.build import build_bundle
from edge_backbones.toolchain.explain_bundle import explain_bundle
from edge_backbones.toolchain.options import BuildOptions
from edge_backbones.toolchain.quantize.typed_graph import write_typed_graph

pytestmark = pytest.mark.usefixtures("in_process")  # tests replace what is called there

GATE = Gate(min_sqnr_db=16.0)


@pytest.fixture(scope="module")
def built(photograph_folder, tmp_path_factory):
    options = BuildOptions(
        weights="random:0",
        precisions=(Precision.INT8, Precision.FP32, Precision.BF16),
        cache=None,
        batch=2,
        height=64,
        width=96,
        out_indices=(2, 4),
        torchscript=False,
    )
    return build_bundle(
        "test_resnet", tmp_path_factory.mktemp("built") / "net.bundle", images=photograph_folder, options=options
    )


def with_engine(bundle: Path, graph: onnx.ModelProto, precision: Precision, gate: Gate) -> None:
    """Replace the engine of a precision by one that was compiled from another graph."""
    opened = Bundle.open(bundle)
    spec, input = opened.manifest.backbone, opened.manifest.input
    engine = compile_graph(graph.SerializeToString(), precision, cache=None)
    report = measure_engine(engine.key, engine.data, spec, input, load_golden(opened), gate)
    assert not report.passed  # else nothing was planted
    file = BundleWriter(bundle).add_file(engine.key.path(engine.data, engine.suffix), engine.data)
    others = tuple(e for e in opened.manifest.engines if e.key.precision != precision)
    record = EngineRecord(key=engine.key, file=file, parity=report)
    write_manifest(bundle, structs.replace(opened.manifest, engines=(*others, record)))


def with_graph(bundle: Path, graph: onnx.ModelProto, precision: Precision) -> None:
    opened = Bundle.open(bundle)
    path = opened.manifest.onnx_graph(precision).file.path
    onnx.save(graph, bundle / path)
    graphs = [
        structs.replace(record, file=record_file(bundle, path)) if record.file.path == path else record
        for record in opened.manifest.graphs
    ]
    write_manifest(bundle, structs.replace(opened.manifest, graphs=tuple(graphs)))


def scaled(graph: onnx.ModelProto, name: str, factor: float) -> None:
    """Multiply one initializer."""
    [tensor] = [tensor for tensor in graph.graph.initializer if tensor.name == name]
    values = numpy_helper.to_array(tensor)
    tensor.CopyFrom(numpy_helper.from_array((factor * values).astype(values.dtype), name))


def load(bundle: Path, precision: str) -> onnx.ModelProto:
    return onnx.load(bundle / "graphs" / f"{precision}.onnx")


def damaged(graph: onnx.ModelProto, layer: str) -> onnx.ModelProto:
    """The same graph with the weights of one layer turned and enlarged, if it has that layer."""
    for node in graph.graph.node:
        if node.name == layer:
            [dequantize] = [other for other in graph.graph.node if node.input[1] in other.output] or [None]
            scaled(graph, node.input[1] if dequantize is None else dequantize.input[1], -6.0)
    return graph


@pytest.fixture
def bundle(built, tmp_path) -> Path:
    return Path(shutil.copytree(built.bundle.path, tmp_path / "net.bundle"))


@pytest.mark.parametrize("layer", ["conv1.3/Conv", "layer2.0.conv1/Conv", "layer4.0.conv2/Conv"])
@pytest.mark.parametrize("precision", [Precision.FP32, Precision.INT8])
def test_a_layer_that_the_engine_library_computes_wrongly(bundle, monkeypatch, layer, precision):
    with_engine(bundle, damaged(load(bundle, precision), layer), precision, GATE)
    right = explain.read_model
    monkeypatch.setattr(
        explain,
        "read_model",
        lambda data: right(damaged(onnx.load_from_string(data), layer).SerializeToString()),
    )
    with pytest.raises(ParityError):
        verify_bundle(bundle, engine=precision.value)
    [found] = explain_bundle(bundle, engine=precision.value)
    assert (found.precision, found.cause, found.origin) == (precision, "engine", layer)
    assert f"computes {layer} otherwise than its graph says" in found.sentence
    [origin] = [one for one in found.layers if one.name == layer]
    assert origin.sqnr_db < found.limit_db
    assert len(found.layers) <= 6  # bisection, not one compilation per layer


def test_an_engine_of_another_graph(bundle):
    with_engine(bundle, damaged(load(bundle, "int8"), "layer2.0.conv1/Conv"), Precision.INT8, GATE)
    [found] = explain_bundle(bundle)
    assert (found.cause, found.origin) == ("engine", found.stage)
    assert "the engine is not of this graph. First compile it again" in found.sentence
    assert all(one.sqnr_db > found.limit_db for one in found.layers)


@pytest.mark.parametrize(("layer", "block"), [("layer2.0.downsample.1/Conv", "layer2.0"), ("conv1.3/Conv", "conv1")])
def test_activations_that_are_rounded_too_coarsely(bundle, layer, block):
    wrong = load(bundle, "int8")
    [node] = [node for node in wrong.graph.node if node.name == layer]
    [dequantize] = [other for other in wrong.graph.node if node.input[0] in other.output]
    scaled(wrong, dequantize.input[1], 300.0)
    with_graph(bundle, wrong, Precision.INT8)
    with_engine(bundle, wrong, Precision.INT8, GATE)
    [found] = explain_bundle(bundle)
    assert (found.cause, found.origin) == ("activations", block)
    assert f"most of the error of {found.stage} begins in {block}" in found.sentence
    assert f"--exclude {block}" in found.sentence
    assert [one.sqnr_db for one in found.layers] == sorted(one.sqnr_db for one in found.layers)


def test_weights_that_are_wrong(bundle):
    wrong = damaged(load(bundle, "int8"), "layer2.0.conv1/Conv")
    with_graph(bundle, wrong, Precision.INT8)
    with_engine(bundle, wrong, Precision.INT8, GATE)
    [found] = explain_bundle(bundle)
    assert (found.cause, found.origin) == ("weights", found.stage)


def test_a_format_without_rounding_points(bundle):
    wrong = damaged(load(bundle, "fp32"), "layer2.0.conv1/Conv")
    with_graph(bundle, wrong, Precision.FP32)
    with_engine(bundle, wrong, Precision.FP32, Gate(max_relative=1e-3))
    [found] = explain_bundle(bundle)
    assert (found.cause, found.layers) == ("format", ())


def report_of(bundle: Path, precision: Precision, gate: Gate, failing: str = "layer4") -> ParityReport:
    """One in which that stage failed."""
    engine = Bundle.open(bundle).manifest.engines[0]
    stages = tuple(structs.replace(stage, passed=stage.stage != failing) for stage in engine.parity.stages)
    return ParityReport(precision=precision, gate=gate, stages=stages)


@pytest.mark.parametrize("case", ["opt", "max"])
def test_the_worst_image_of_any_case_is_explained(bundle, case):
    """One image out of several is outside, in one of the sizes: over all of them the graph would hold its gate."""
    right = load_golden(Bundle.open(bundle))
    maps = {"opt": right.outputs["opt"], case: {name: one.copy() for name, one in right.outputs["opt"].items()}}
    golden = replace(right, inputs=dict.fromkeys(maps, right.inputs["opt"]), outputs=maps)
    expected = maps[case]["layer4"]
    gate = Gate(min_sqnr_db=9.0)
    noise = np.random.default_rng(0).standard_normal(expected[1].shape).astype(np.float32)
    noise *= np.linalg.norm(expected[1]) / np.linalg.norm(noise) * 10 ** (-7.0 / 20)
    expected[1] += noise
    report = report_of(bundle, Precision.INT8, gate)
    found = explain.explain(bundle / "graphs" / "int8.onnx", report, golden)
    assert found.cause == "weights"  # what the graph is held against was planted: without any rounding it is as far


def test_an_error_of_the_adaptation_to_the_cpu(bundle, monkeypatch):
    """The engine is made of an adapted graph: what goes wrong there is found like any other error of the engine."""
    layer = "layer2.0.conv1/Conv"
    model = load(bundle, "int8")
    [output] = [node.output[0] for node in model.graph.node if node.name == layer]
    right = cpu_graph.adapt

    def wrong(opened):
        right(opened)
        for node in opened.get_ordered_ops():
            if output in node.output(0).get_names() and node.get_type_name() != "Result":
                readers = node.output(0).get_target_inputs()
                factor = ops.convert(ops.constant(np.float32(-6)), node.output(0).get_element_type())
                turned = ops.multiply(node.output(0), factor)
                for reader in readers:
                    reader.replace_source_output(turned.output(0))
        opened.validate_nodes_and_infer_types()

    monkeypatch.setattr(cpu_graph, "adapt", wrong)
    with_engine(bundle, model, Precision.INT8, GATE)
    [found] = explain_bundle(bundle, engine="int8")
    assert found.cause == "engine"
    assert found.origin in (layer, next(node.name for node in model.graph.node if output in node.input))


def fp16_of(bundle: Path, folder: Path) -> Path:
    opened = Bundle.open(bundle)
    plain = ExportedGraph(bundle / "graphs" / "fp32.onnx", opened.manifest.backbone, opened.manifest.input)
    return write_typed_graph(plain, precision=Precision.FP16, path=folder / "fp16.onnx").path


def test_values_that_fp16_cannot_hold(bundle, tmp_path):
    graph = onnx.load(fp16_of(bundle, tmp_path))
    layer = "layer2.0.conv1/Conv"
    [node] = [node for node in graph.graph.node if node.name == layer]
    [weights] = [tensor for tensor in graph.graph.initializer if tensor.name == node.input[1]]
    scaled(graph, node.input[1], 6e4 / np.abs(numpy_helper.to_array(weights).astype(np.float32)).max())
    onnx.save(graph, tmp_path / "wrong.onnx")
    report = report_of(bundle, Precision.FP16, Gate(min_cosine=0.9999))
    golden = load_golden(Bundle.open(bundle))
    found = explain.explain(tmp_path / "wrong.onnx", report, golden)
    assert (found.cause, found.origin) == ("format", layer)
    assert "is the first layer with values that fp16 cannot hold: build bf16 or fp32" in found.sentence


def test_a_format_that_is_too_coarse_for_a_layer(bundle, tmp_path):
    graph = damaged(onnx.load(fp16_of(bundle, tmp_path)), "layer2.0.conv1/Conv")
    onnx.save(graph, tmp_path / "wrong.onnx")
    report = report_of(bundle, Precision.FP16, Gate(min_cosine=0.9999))
    golden, fp32 = load_golden(Bundle.open(bundle)), bundle / "graphs" / "fp32.onnx"
    found = explain.explain(tmp_path / "wrong.onnx", report, golden, plain=fp32)
    assert (found.cause, found.origin) == ("format", "layer2.0.conv1/Conv")
    assert "is the first layer that fp16 takes further from fp32 than that" in found.sentence
    assert found.layers
    alone = explain.explain(tmp_path / "wrong.onnx", report, golden)
    assert (alone.origin, alone.layers) == ("layer4", ())
    assert "With an fp32 graph in the bundle the layer can be told" in alone.sentence


def test_the_error_at_every_layer(bundle, tmp_path):
    """fp16 against fp32, int8 against itself without rounding of activations; a damaged layer and those behind it show."""
    image = load_golden(Bundle.open(bundle)).inputs["opt"][:1]
    half, fp32 = fp16_of(bundle, tmp_path), bundle / "graphs" / "fp32.onnx"
    found = explain.layer_noise(half, image, plain=fp32)
    convolutions = [node.name for node in onnx.load(half).graph.node if node.op_type == "Conv"]
    assert [layer.name for layer in found] == convolutions
    assert all(50 < layer.sqnr_db < 100 for layer in found)
    assert explain.layer_noise(half, image) == ()  # nothing to compare with
    layer = "layer2.0.conv1/Conv"
    onnx.save(damaged(onnx.load(half), layer), tmp_path / "wrong.onnx")
    wrong = {one.name: one.sqnr_db for one in explain.layer_noise(tmp_path / "wrong.onnx", image, plain=fp32)}
    right = {one.name: one.sqnr_db for one in found}
    at = convolutions.index(layer)
    assert all(wrong[name] == right[name] for name in convolutions[:at])
    assert wrong[layer] < 30
    assert wrong[convolutions[-1]] < 30
    int8 = explain.layer_noise(bundle / "graphs" / "int8.onnx", image, plain=fp32)
    assert [one.name for one in int8] == convolutions
    assert 10 < min(one.sqnr_db for one in int8) < 50


def test_a_layer_of_a_bf16_engine_that_is_not_that_of_its_graph(bundle):
    with_engine(bundle, damaged(load(bundle, "bf16"), "layer2.0.conv1/Conv"), Precision.BF16, GATE)
    with pytest.raises(ParityError):
        verify_bundle(bundle)
    [found] = explain_bundle(bundle)
    # Compiled by itself every layer of the graph is right: the engine that lies in the bundle is of another graph.
    assert (found.precision, found.cause, found.origin) == (Precision.BF16, "engine", "layer2")


def test_bf16_that_is_too_coarse(bundle):
    report, graph = report_of(bundle, Precision.BF16, Gate(min_cosine=0.9999)), bundle / "graphs" / "bf16.onnx"
    golden, fp32 = load_golden(Bundle.open(bundle)), bundle / "graphs" / "fp32.onnx"
    damaged_graph = bundle / "graphs" / "damaged.onnx"
    onnx.save(damaged(onnx.load(graph), "layer2.0.conv1/Conv"), damaged_graph)
    found = explain.explain(damaged_graph, report, golden, plain=fp32)
    assert (found.cause, found.origin) == ("format", "layer2.0.conv1/Conv")


def test_bf16_is_computed_as_torch_computes_it():
    """Products are added up in float32 and every result is rounded, against PyTorch's own bf16."""
    random = np.random.default_rng(0)
    image, weights = random.standard_normal((2, 8, 9, 11)), random.standard_normal((16, 8, 3, 3)) / 8
    weights, bias = weights.astype(np.float32), random.standard_normal(16).astype(np.float32)
    graph = onnx.parser.parse_model(
        """
        <ir_version: 10, opset_import: ["": 22]>
        net (float[2, 8, 9, 11] x, bfloat16[16, 8, 3, 3] w, bfloat16[16] b) => (float[2, 16, 7, 9] y)
        <bfloat16[2, 8, 9, 11] h, bfloat16[2, 16, 7, 9] c, bfloat16[2, 16, 7, 9] r, bfloat16[2, 16, 7, 9] t>
        { h = Cast<to=16>(x) c = Conv(h, w, b) r = Relu(c) t = Mul(r, r) y = Cast<to=1>(t) }
        """
    )
    for name, value in (("w", weights), ("b", bias)):
        tensor = ir.serde.serialize_tensor(ir.tensor(value.astype(ml_dtypes.bfloat16), name=name))
        graph.graph.initializer.append(tensor)
        graph.graph.input.remove(next(i for i in graph.graph.input if i.name == name))
    session = explain._session(ir.from_proto(graph))
    [actual] = session.run(None, {"x": image.astype(np.float32)})
    x, w, b = (torch.from_numpy(np.asarray(v, np.float32)).bfloat16() for v in (image, weights, bias))
    expected = torch.relu(torch.nn.functional.conv2d(x, w, b)).square().float().numpy()
    np.testing.assert_array_equal(actual, actual.astype(ml_dtypes.bfloat16).astype(np.float32))
    np.testing.assert_allclose(actual, expected, rtol=2**-6, atol=2**-9)
    exact = torch.relu(torch.nn.functional.conv2d(x.float(), w.float(), b.float())).square().numpy()
    assert not np.array_equal(exact, actual)


def test_nothing_to_explain(bundle):
    assert explain_bundle(bundle) == ()


@pytest.mark.parametrize(
    ("gate", "noise"),
    [
        (Gate(min_sqnr_db=20.0), 0.01),
        (Gate(max_relative=0.1), 0.01),
        (Gate(min_cosine=0.98), 1 / 0.98**2 - 1),
        (Gate(min_cosine=0.5, min_sqnr_db=10.0, max_relative=0.9), 0.1),
        (Gate(), np.inf),
    ],
)
def test_noise_that_a_gate_allows(gate, noise):
    assert allowed_noise(gate) == pytest.approx(noise)


# ---- at the command line --------------------------------------------------------------------------------------------


def verify(*arguments: str | Path, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "edge_backbones.cli.main", "verify", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder)


def test_verify_explains_in_words_and_in_a_picture(bundle, tmp_path):
    wrong = load(bundle, "int8")
    [node] = [node for node in wrong.graph.node if node.name == "layer2.0.downsample.1/Conv"]
    [dequantize] = [other for other in wrong.graph.node if node.input[0] in other.output]
    scaled(wrong, dequantize.input[1], 300.0)
    with_graph(bundle, wrong, Precision.INT8)
    with_engine(bundle, wrong, Precision.INT8, GATE)

    done = verify(bundle, "--explain", folder=tmp_path)
    assert done.returncode == 3, done.stderr
    assert "begins in layer2.0" in " ".join(done.stdout.split())
    assert "drew explanation.png" in done.stdout
    with Image.open(tmp_path / "explanation.png") as picture:
        assert picture.width > 500
        assert len(picture.convert("RGB").getcolors(1 << 20)) > 20

    done = verify(bundle, "--explain", "--json", "--picture", "why/int8.png", folder=tmp_path)
    document = json.loads(done.stdout)
    assert done.returncode == 3
    assert (document["error"], document["pictures"]) == ("ParityError", ["why/int8.png"])
    assert document["explanations"][0]["origin"] == "layer2.0"
    assert (tmp_path / "why" / "int8.png").stat().st_size > 5000

    done = verify(bundle, folder=tmp_path)
    assert done.returncode == 3
    assert "begins in" not in done.stdout + done.stderr
