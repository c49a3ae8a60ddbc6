"""Channels that are scaled before they are rounded: the same network in fp32, and less noise in int8."""

from __future__ import annotations

import networks
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from edge_backbones.errors import CalibrationError, QuantizationError
from edge_backbones.toolchain.calibration.choose import choose_factors
from edge_backbones.toolchain.calibration.noise import Sample, noise_of_blocks
from edge_backbones.toolchain.calibration.ranges import collect_magnitudes, find_ranges
from edge_backbones.toolchain.export import export_onnx
from edge_backbones.toolchain.prepare import prepare
from edge_backbones.toolchain.quantize import equalise
from edge_backbones.toolchain.quantize.placement import quantized_layers, tensors_to_calibrate


def with_loud_channels(name: str, **options):
    """A network whose normalisations let a few channels through louder than the rest, as trained ones do."""
    loaded = networks.trained_like(name, **options)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for module in loaded.module.modules():
            if isinstance(module, nn.LayerNorm):
                module.weight.mul_(10 ** torch.empty_like(module.weight).uniform_(-1.5, 0.5, generator=generator))
                module.bias.normal_(0, 0.1, generator=generator)
    return loaded


def run(graph, images: np.ndarray, batch: int) -> list[np.ndarray]:
    session = onnxruntime.InferenceSession(graph.path, providers=["CPUExecutionProvider"])
    parts = [session.run(None, {graph.input.name: images[i : i + batch]}) for i in range(0, len(images), batch)]
    return [np.concatenate(values) for values in zip(*parts, strict=True)]


NETWORKS = {
    # Stages, size, and the least gain in dB: of test_vit, weights leave most of the noise.
    "test_vit": ((0, 1), 160, 160, 0.0),  # Gemm or MatMul right behind a normalisation
    "test_convnext": ((0, 1, 2, 3), 64, 96, 1.0),  # pointwise layers behind it, with the channels last
    "test_convnext3": ((3,), 64, 96, 1.0),
    "mobilenetv3_small_100": ((1, 2), 64, 96, 1.0),  # pointwise, ReLU, depthwise, ReLU, pointwise: twice
    "mobilenetv3_large_100": ((0, 1), 64, 96, 1.0),  # three times
}


@pytest.fixture(scope="module", params=NETWORKS)
def case(request, tmp_path_factory, photographs):
    indices, height, width, _ = NETWORKS[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    loaded = with_loud_channels(request.param, out_indices=indices)
    graph = export_onnx(prepare(loaded, networks.input_spec(height, width, batch=2)), folder / "fp32.onnx")
    images = networks.normalised(networks.crops(photographs, 12, height, width))
    batches = [images[i : i + 2] for i in range(0, 12, 2)]
    found = choose_factors(graph, batches[:4], [Sample(batch, np.ones(2)) for batch in batches[4:]], work=folder)
    return graph, images, batches, found, folder


def test_fp32_is_the_same_network(case):
    graph, images, _, found, folder = case
    assert found  # loud channels are worth it
    equalised = equalise.write_equalised_graph(graph, found, folder / "again.onnx")
    assert equalised.path.read_bytes() != graph.path.read_bytes()
    for expected, actual in zip(run(graph, images, 2), run(equalised, images, 2), strict=True):
        assert networks.relative(actual, expected) < 1e-5
    assert [layer.name for layer in quantized_layers(equalised)] == [layer.name for layer in quantized_layers(graph)]


def test_every_channel_is_divided_by_its_factor(case):
    graph, _, batches, found, folder = case
    equalised = equalise.write_equalised_graph(graph, found, folder / "again.onnx")
    values = []
    for one in (graph, equalised):
        model = onnx.load(one.path)
        del model.graph.output[:]
        model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in found)
        session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        runs = [session.run(list(found), {graph.input.name: batch}) for batch in batches[:4]]
        values.append([np.concatenate(arrays) for arrays in zip(*runs, strict=True)])
    axes = equalise.tensors_to_equalise(graph)
    for (name, factors), before, after in zip(found.items(), *values, strict=True):
        shape = [1] * before.ndim
        shape[axes[name].axis] = -1
        np.testing.assert_allclose(after * np.reshape(factors, shape), before, rtol=1e-4, atol=1e-5)
        assert np.abs(after).max() <= np.abs(before).max() * 1.0001  # nothing comes nearer to what half can hold


def test_int8_has_less_noise(case, request):
    """Measured on other images than the factors were found on, with every layer quantised."""
    graph, _, batches, found, folder = case
    equalised = equalise.write_equalised_graph(graph, found, folder / "again.onnx")
    total = []
    for one in (graph, equalised):
        ranges = find_ranges(collect_magnitudes(one.path, tensors_to_calibrate(one), batches[:4]), method="max")
        samples = [Sample(batch, np.ones(2)) for batch in batches[4:]]
        noise = noise_of_blocks(one, ranges, samples, excluded=(), work=folder)
        outputs = graph.spec.outputs
        total.append(np.mean([10 * np.log10(sum(of_block[o] for of_block in noise.values())) for o in outputs]))
    assert total[1] < total[0] - NETWORKS[request.node.callspec.params["case"]][3]


def test_what_does_not_help_is_left_alone(tmp_path, photographs):
    """Channels that are equally loud have nothing to gain, and a network without normalisations nowhere to."""
    images = networks.normalised(networks.crops(photographs, 4, 64, 96))
    samples = [Sample(images[2:], np.ones(2))]
    loaded = networks.trained_like("test_resnet", out_indices=(1, 4))
    graph = export_onnx(prepare(loaded, networks.input_spec(64, 96, batch=2)), tmp_path / "cnn.onnx")
    assert choose_factors(graph, [images[:2]], samples, work=tmp_path) == {}
    assert equalise.factors(np.zeros(5), 0.75).tolist() == [1.0] * 5
    assert equalise.factors(np.full(5, 3.0), 0.75).tolist() == [1.0] * 5
    smallest = equalise.factors(np.array([0.0, 1.0]), 0.75)  # silent on these images, perhaps not on others
    assert smallest[0] == pytest.approx((1 / 256) ** 0.75)


def test_activations_that_are_not_finite_are_left_to_who_refuses_them(tmp_path):
    loaded = networks.hand_made(Shared("layers"))
    graph = export_onnx(prepare(loaded, networks.input_spec(64, 96)), tmp_path / "graph.onnx")
    images = np.full((1, 3, 64, 96), np.inf, np.float32)
    assert choose_factors(graph, [images], [Sample(images, np.ones(1))], work=tmp_path) == {}
    with pytest.raises(CalibrationError, match="holds"):
        collect_magnitudes(graph.path, tensors_to_calibrate(graph), [images])


def test_factors_of_another_network_are_refused(tmp_path):
    graph = export_onnx(
        prepare(networks.hand_made(Shared("layers")), networks.input_spec(64, 96)), tmp_path / "graph.onnx"
    )
    with pytest.raises(
        QuantizationError, match="factors for 'elsewhere', which takes none in this graph: calibrate again"
    ):
        equalise.write_equalised_graph(graph, {"elsewhere": [1.0]}, tmp_path / "equalised.onnx")


class Depthwise(nn.Module):
    """A depthwise convolution and what stands before it, and between it and a pointwise layer."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.stem = nn.Conv2d(3, 32, 4, stride=4)
        self.depthwise = nn.Conv2d(32, 32, 3, padding=1, groups=1 if kind == "full" else 32, bias=kind != "no bias")
        self.pointwise = nn.Conv2d(32, 32, 1)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x = self.stem(x)
        if self.kind in ("both", "both read"):
            x = x.relu()
        before = self.depthwise(x)
        if self.kind == "both read":
            return (self.pointwise(before.relu()) + x,)
        x = {"swish": nn.functional.hardswish, "relu6": nn.functional.relu6}.get(self.kind, torch.relu)(before)
        if self.kind == "residual":
            return (self.pointwise(x) + x,)
        if self.kind == "gate":
            return (self.pointwise(x * x.mean((2, 3), keepdim=True)),)
        if self.kind == "read":
            return (self.pointwise(x) + before,)
        return (self.pointwise(x),)


@pytest.mark.parametrize(
    ("kind", "sites"),
    [
        ("relu", 1), ("both", 2), ("both read", 1), ("no bias", 1), ("swish", 0), ("relu6", 0), ("residual", 0), ("gate", 0),
        ("read", 0), ("full", 0),
    ],
)  # fmt: skip
def test_a_depthwise_convolution_is_scaled_through_relus_alone(tmp_path, photographs, kind, sites):
    loaded = networks.hand_made(Depthwise(kind))
    graph = export_onnx(prepare(loaded, networks.input_spec(64, 96)), tmp_path / "graph.onnx")
    found = equalise.tensors_to_equalise(graph)
    assert len(found) == sites
    quantized = {layer.name: layer.tensor for layer in quantized_layers(graph)}
    assert ("depthwise/Conv" in quantized) == (kind.startswith("both") or kind == "full")
    values = dict.fromkeys(found, np.random.default_rng(0).uniform(0.1, 1, 32))
    equalised = equalise.write_equalised_graph(graph, values, tmp_path / "equalised.onnx")
    images = networks.normalised(networks.crops(photographs, 2, 64, 96))
    (expected,), (actual,) = (run(one, images, 1) for one in (graph, equalised))
    assert networks.relative(actual, expected) < 1e-6


class Shared(nn.Module):
    """A normalisation that something else than layers reads too."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.norm = nn.LayerNorm(64)
        self.first, self.second = nn.Linear(64, 64), nn.Linear(64, 64)
        self.stem = nn.Conv2d(3, 64, 4, stride=4)
        self.grouped = nn.Conv2d(64, 64, 3, padding=1, groups=2)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
        x = self.norm(self.stem(x).permute(0, 2, 3, 1))
        if self.kind == "layers":
            return ((self.first(x).relu() + self.second(x)).permute(0, 3, 1, 2),)
        if self.kind == "residual":
            return ((self.first(x).relu() + x).permute(0, 3, 1, 2),)
        if self.kind == "grouped":
            return (self.grouped(x.permute(0, 3, 1, 2)),)
        return (self.first(x.relu()).permute(0, 3, 1, 2),)


@pytest.mark.parametrize(("kind", "sites"), [("layers", 1), ("residual", 0), ("grouped", 0), ("activation", 0)])
def test_only_what_layers_alone_read_is_scaled(tmp_path, kind, sites):
    loaded = networks.hand_made(Shared(kind))
    graph = export_onnx(prepare(loaded, networks.input_spec(64, 96)), tmp_path / "graph.onnx")
    assert len(equalise.tensors_to_equalise(graph)) == sites
