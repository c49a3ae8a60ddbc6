"""Activations that are centred before they are rounded: the same network in fp32, and less noise in int8."""

from __future__ import annotations

import dataclasses
import json

import networks
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from edge_backbones import BuildOptions, Gate, build_bundle
from edge_backbones.errors import QuantizationError
from edge_backbones.spec import Precision
from edge_backbones.toolchain.calibration.calibrate import read_calibration
from edge_backbones.toolchain.calibration.choose import choose_centres
from edge_backbones.toolchain.calibration.noise import Run, Sample, measure_noise, run_reference, simulate
from edge_backbones.toolchain.calibration.ranges import collect_magnitudes, find_ranges
from edge_backbones.toolchain.export import export_onnx
from edge_backbones.toolchain.prepare import prepare
from edge_backbones.toolchain.quantize.centre import centre_of, centred_name, tensors_to_centre, write_centred_graph
from edge_backbones.toolchain.quantize.placement import quantized_layers, tensors_to_calibrate
from edge_backbones.toolchain.quantize.typed_graph import write_typed_graph


def run(graph, images: np.ndarray, batch: int) -> list[np.ndarray]:
    session = onnxruntime.InferenceSession(graph.path, providers=["CPUExecutionProvider"])
    parts = [session.run(None, {graph.input.name: images[i : i + batch]}) for i in range(0, len(images), batch)]
    return [np.concatenate(values) for values in zip(*parts, strict=True)]


NETWORKS = {  # stages, size, and the least gain in dB of the layers that read a centred tensor
    "test_vit": ((0, 1), 160, 160, 2.0),  # GELU before a MatMul
    "test_efficientnet": ((0, 1, 2), 64, 96, 2.0),  # SiLU and squeeze-excite before pointwise convolutions
    "mobilenetv3_small_100": ((4,), 64, 96, 1.0),  # hard swish: many values are exactly 0
}


@pytest.fixture(scope="module", params=NETWORKS)
def case(request, tmp_path_factory, photographs):
    indices, height, width, _ = NETWORKS[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    loaded = networks.trained_like(request.param, out_indices=indices)
    graph = export_onnx(prepare(loaded, networks.input_spec(height, width, batch=2)), folder / "fp32.onnx")
    images = networks.normalised(networks.crops(photographs, 12, height, width))
    batches = [images[i : i + 2] for i in range(0, 12, 2)]
    ranges = find_ranges(collect_magnitudes(graph.path, tensors_to_calibrate(graph), batches[:4]), method="max")
    held_out = [Sample(batch, np.ones(2)) for batch in batches[4:]]
    centres, of_centred = choose_centres(graph, ranges, batches[:4], held_out, work=folder)
    return graph, images, batches, ranges, centres, of_centred, folder


def test_fp32_is_the_same_network(case):
    graph, images, _, _, centres, _, folder = case
    assert centres  # these activations are worth it
    centred = write_centred_graph(graph, centres, folder / "again.onnx")
    for expected, actual in zip(run(graph, images, 2), run(centred, images, 2), strict=True):
        assert networks.relative(actual, expected) < 1e-5
    renamed = {name: centred_name(name) for name in centres}
    before = [(layer.name, renamed.get(layer.tensor, layer.tensor)) for layer in quantized_layers(graph)]
    assert [(layer.name, layer.tensor) for layer in quantized_layers(centred)] == before


def test_zero_stays_a_level_and_the_range_reaches_both_ends(case):
    graph, _, batches, ranges, centres, of_centred, _ = case
    model = onnx.load(graph.path)
    del model.graph.output[:]
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in centres)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    runs = [session.run(list(centres), {graph.input.name: batch}) for batch in batches[:4]]
    for (name, centre), *values in zip(centres.items(), *runs, strict=True):
        reach = of_centred[centred_name(name)]
        step = reach / 127
        assert abs(centre / step - round(centre / step)) < 0.05, name  # as near as half precision comes
        every = np.concatenate([value.ravel() for value in values])
        assert every.min() >= centre - reach - 1.01 * step, name
        assert every.max() <= centre + reach + 1.01 * step, name
        assert reach < 0.76 * ranges[name], name


def test_int8_has_less_noise(case, request):
    """Measured on other images than the centres were found on, with only the layers quantised that read them."""
    graph, _, batches, ranges, centres, of_centred, folder = case
    centred = write_centred_graph(graph, centres, folder / "again.onnx")
    others = {layer.name for layer in quantized_layers(graph) if layer.tensor not in centres}
    samples = [Sample(batch, np.ones(2)) for batch in batches[4:]]
    total = []
    for one in (graph, centred):
        simulation = simulate(one, {**ranges, **of_centred}, folder, excluded=others)
        noise = measure_noise([Run(simulation, samples, run_reference(graph, samples))], graph.spec.outputs)
        total.append(np.mean([10 * np.log10(value) for value in noise.values() if value > 0]))
    assert total[1] < total[0] - NETWORKS[request.node.callspec.params["case"]][3]


def test_the_int8_graph_holds_the_centres(case):
    graph, _, _, ranges, centres, of_centred, folder = case
    centred = write_centred_graph(graph, centres, folder / "again.onnx")
    path = folder / "int8.onnx"
    write_typed_graph(centred, precision=Precision.INT8, path=path, ranges={**ranges, **of_centred})
    model = onnx.load(path)
    values = {one.name: onnx.numpy_helper.to_array(one) for one in model.graph.initializer}
    made = {node.output[0]: node for node in model.graph.node}
    for name, centre in centres.items():
        subtract = made[centred_name(name)]
        constants = [values[i] for i in subtract.input if i in values]
        assert [float(constant) for constant in constants] == [centre]  # exactly, in half precision


def test_a_zero_gives_the_bias_in_int8(tmp_path):
    """Many activations are 0, so an error of 0 would add up over all channels."""
    graph = export_onnx(
        prepare(networks.hand_made(Reads("plain")), networks.input_spec(64, 96)), tmp_path / "graph.onnx"
    )
    (name,) = tensors_to_centre(graph)
    centre, reach = centre_of(-0.17, 3.3)
    centred = write_centred_graph(graph, {name: centre}, tmp_path / "centred.onnx")
    ranges = {**dict.fromkeys(tensors_to_calibrate(centred), 1.0), centred_name(name): reach}
    path = tmp_path / "int8.onnx"
    write_typed_graph(centred, precision=Precision.INT8, path=path, ranges=ranges, half=False)
    model = onnx.shape_inference.infer_shapes(onnx.load(path))
    kept = onnx.utils.Extractor(model).extract_model([name], ["stage0"])  # the graph begins at the activation
    session = onnxruntime.InferenceSession(kept.SerializeToString(), providers=["CPUExecutionProvider"])
    (value,) = session.run(None, {name: np.zeros((1, 32, 16, 24), np.float32)})
    bias = next(onnx.numpy_helper.to_array(i) for i in onnx.load(graph.path).graph.initializer if i.name == "conv.bias")
    np.testing.assert_allclose(value[0, :, 0, 0], bias, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("lowest", "highest", "expected"),
    [
        (-0.17, 4.0, (1.915, 2.085)),
        (-4.0, 0.17, (-1.915, 2.085)),
        (0.0, 4.0, (2.0, 2.0)),
        (1.0, 4.0, (2.0, 2.0)),  # 0 stays a level
        (-2.1, 4.0, None),  # nearly symmetric
        (-4.0, 4.0, None),
        (0.0, 0.0, None),
        (float("nan"), 1.0, None),
        (0.0, float("inf"), None),
        (-0.1, 2e5, None),  # half precision has no such centre
        (0.0, 1e-9, None),
    ],
)
def test_the_centre_of_a_range(lowest, highest, expected):
    found = centre_of(lowest, highest)
    if expected is None:
        assert found is None
        return
    centre, reach = found
    step = reach / 127
    assert centre == float(np.float16(centre))
    assert (centre, reach) == pytest.approx(expected, abs=2 * step)
    assert centre - reach <= min(lowest, 0) + step
    assert centre + reach >= max(highest, 0) - step


class Reads(nn.Module):
    """A layer behind a GELU, in the forms that take a centre and in those that do not."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.stem = nn.Conv2d(3, 32, 4, stride=4)
        padding = {"padded": 1, "same": "same"}.get(kind, 0)
        kernel = 3 if kind in ("padded", "same", "kernel") else 1
        self.conv = nn.Conv2d(
            32, 32, kernel, padding=padding, bias=kind != "no bias", groups=2 if kind == "groups" else 1
        )
        self.other = nn.Conv2d(32, 32, 3, padding=1)
        self.pointwise = nn.Conv2d(32, 32, 1)
        self.linear = nn.Linear(32, 32, bias=kind != "linear without bias")

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x = self.stem(x)
        if self.kind.startswith("linear"):
            return (self.linear(nn.functional.gelu(x.permute(0, 2, 3, 1))).permute(0, 3, 1, 2),)
        if self.kind == "none":
            return (self.conv(x),)
        if self.kind == "sum":
            return (self.conv(x + self.pointwise(x)),)
        activation = {"relu": torch.relu, "leaky": lambda y: nn.functional.leaky_relu(y, 0.25)}
        x = activation.get(self.kind, nn.functional.gelu)(x)
        if self.kind == "moved":
            x = nn.functional.max_pool2d(x, 2)
        if self.kind == "both":
            return (self.conv(x) + self.other(x),)
        if self.kind == "two":
            return (self.conv(x) + self.pointwise(x),)
        if self.kind == "joined":
            return (self.linear(torch.cat([x[:, :16], x[:, 16:] * 2], 1).permute(0, 2, 3, 1)).permute(0, 3, 1, 2),)
        y = self.conv(x)
        if self.kind == "read":  # by something else too, and as a feature map
            return (x, y * x.mean((2, 3), keepdim=True))
        return (y,)


@pytest.mark.parametrize(
    ("kind", "count"),
    [
        ("plain", 1), ("no bias", 1), ("groups", 1), ("kernel", 1), ("read", 1), ("linear", 1), ("two", 1), ("leaky", 1),
        ("padded", 0), ("same", 0), ("relu", 0), ("moved", 0), ("both", 0), ("joined", 0), ("none", 0), ("sum", 0),
        ("linear without bias", 0),
    ],
)  # fmt: skip
def test_only_layers_that_take_a_centre_get_one(tmp_path, photographs, kind, count):
    loaded = networks.hand_made(Reads(kind), stages=2 if kind == "read" else 1)
    graph = export_onnx(prepare(loaded, networks.input_spec(64, 96)), tmp_path / "graph.onnx")
    found = tensors_to_centre(graph)
    assert len(found) == count
    centred = write_centred_graph(graph, dict.fromkeys(found, 0.75), tmp_path / "centred.onnx")
    images = networks.normalised(networks.crops(photographs, 2, 64, 96))
    for expected, actual in zip(run(graph, images, 1), run(centred, images, 1), strict=True):
        assert networks.relative(actual, expected) < 1e-6


@pytest.fixture
def far_away(photographs):
    """Images, and some of a tenth of the contrast."""
    images = networks.normalised(networks.crops(photographs, 2, 64, 96))
    return images, images / 10


def test_what_does_not_help_is_left_alone(tmp_path, far_away):
    """On images with more contrast than those that the near end was found on, that end clips."""
    images, faint = far_away
    input = networks.input_spec(64, 96, batch=2)
    graph = export_onnx(prepare(networks.hand_made(Reads("leaky")), input), tmp_path / "graph.onnx")
    ranges = find_ranges(collect_magnitudes(graph.path, tensors_to_calibrate(graph), [images]), method="max")
    for held_out, count in ((faint, 1), (images, 0)):
        centres, of_centred = choose_centres(graph, ranges, [faint], [Sample(held_out, np.ones(2))], work=tmp_path)
        assert (len(centres), len(of_centred)) == (count, count)


def test_the_far_end_is_that_of_all_images(tmp_path, far_away):
    images, _ = far_away
    input = networks.input_spec(64, 96, batch=2)
    graph = export_onnx(prepare(networks.hand_made(Reads("plain")), input), tmp_path / "graph.onnx")
    seen = find_ranges(collect_magnitudes(graph.path, tensors_to_calibrate(graph), [images]), method="max")
    ranges = {name: 2 * value for name, value in seen.items()}  # of more images than the batches
    centres, of_centred = choose_centres(graph, ranges, [images], [Sample(images, np.ones(2))], work=tmp_path)
    ((name, centre),) = centres.items()
    assert centre + of_centred[centred_name(name)] == pytest.approx(ranges[name], rel=0.02)


def test_a_layer_in_half_reads_the_tensor_itself(tmp_path):
    graph = export_onnx(prepare(networks.hand_made(Reads("two")), networks.input_spec(64, 96)), tmp_path / "graph.onnx")
    (name,) = tensors_to_centre(graph)
    for excluded, readers in (((), 2), (("conv/Conv",), 1), (("conv/Conv", "pointwise/Conv"), 0)):
        centred = write_centred_graph(graph, {name: 0.5}, tmp_path / "centred.onnx", excluded=excluded)
        nodes = onnx.load(centred.path).graph.node
        assert sum(centred_name(name) in node.input for node in nodes) == readers
        assert any(node.op_type == "Sub" for node in nodes) == (readers > 0)
        found = {layer.name: layer.tensor for layer in quantized_layers(centred)}
        assert all(found[layer] == name for layer in excluded)


def test_a_centre_of_another_network_is_refused(tmp_path):
    graph = export_onnx(
        prepare(networks.hand_made(Reads("plain")), networks.input_spec(64, 96)), tmp_path / "graph.onnx"
    )
    with pytest.raises(
        QuantizationError, match="a centre for 'elsewhere', which takes none in this graph: calibrate again"
    ):
        write_centred_graph(graph, {"elsewhere": 1.0}, tmp_path / "centred.onnx")


@pytest.fixture(scope="module")
def built(tmp_path_factory, photograph_folder):
    """A network with SiLU and squeeze-excite in int8 and fp8, and the options that it was built with."""
    options = BuildOptions(
        weights="random:0", out_indices=(1, 2), precisions=("int8", "fp8"), height=64, width=96, torchscript=False,
        gates={"int8": Gate(min_cosine=1e-6), "fp8": Gate(min_cosine=1e-6)}, cache=None, golden=2,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("built") / "net.bundle"
    return build_bundle("test_efficientnet", path, images=photograph_folder, options=options).bundle, options


def centred_in(bundle, precision: str) -> dict[str, str]:
    """By layer, what it reads through a Q/DQ pair that has a centre."""
    nodes = onnx.load(bundle.path / "graphs" / f"{precision}.onnx").graph.node
    made = {output: node for node in nodes for output in node.output}
    found = {}
    for node in nodes:
        source = made.get(node.input[0]) if node.op_type in ("Conv", "MatMul", "Gemm") else None
        while source is not None and source.op_type in ("DequantizeLinear", "QuantizeLinear", "Cast"):
            source = made.get(source.input[0])
        if source is not None and source.op_type == "Sub":
            found[node.name] = source.output[0]
    return found


def test_a_build_centres_int8_and_not_fp8(built):
    bundle, _ = built
    file = read_calibration(bundle.path)
    assert set(centred_in(bundle, "int8").values()) == {centred_name(name) for name in file.centres} != set()
    assert centred_in(bundle, "fp8") == {}


def test_a_calibration_brings_its_centres(built, photograph_folder, tmp_path):
    bundle, options = built
    again = build_bundle(
        "test_efficientnet",
        tmp_path / "again.bundle",
        images=photograph_folder,
        options=dataclasses.replace(options, calibration=bundle.path),
    ).bundle
    assert (again.path / "graphs/int8.onnx").read_bytes() == (bundle.path / "graphs/int8.onnx").read_bytes()

    content = json.loads((bundle.path / "calibration.json").read_bytes())
    del content["centres"]  # as an earlier release wrote it
    old = tmp_path / "calibration.json"
    old.write_text(json.dumps(content), encoding="utf-8")
    plain = build_bundle(
        "test_efficientnet",
        tmp_path / "plain.bundle",
        images=photograph_folder,
        options=dataclasses.replace(options, calibration=old),
    ).bundle
    assert centred_in(plain, "int8") == {}


def test_an_excluded_layer_has_no_centre(built, photograph_folder, tmp_path):
    bundle, options = built
    layer, tensor = next(iter(centred_in(bundle, "int8").items()))
    some = dataclasses.replace(options, precisions=("int8",), exclude=(layer,), calibration=bundle.path)
    excluded = build_bundle("test_efficientnet", tmp_path / "net.bundle", images=photograph_folder, options=some).bundle
    assert layer not in centred_in(excluded, "int8")
    assert tensor not in centred_in(excluded, "int8").values()
    assert len(centred_in(excluded, "int8")) == len(centred_in(bundle, "int8")) - 1
