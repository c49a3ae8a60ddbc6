"""TensorRT-RTX compiles every typed graph, with no GPU: the form that `quantize` writes is one that TensorRT takes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from edge_backbones.build.artifacts import ExportedGraph
from edge_backbones.build.export import export_onnx
from edge_backbones.build.prepare import prepare
from edge_backbones.build.quantize import tensors_to_calibrate, write_typed_graph
from edge_backbones.build.ranges import collect_magnitudes, find_ranges
from edge_backbones.build.sources.common import SourceOptions
from edge_backbones.build.sources.timm import load_timm
from edge_backbones.spec import InputSpec, Precision, ShapeRange

trt = pytest.importorskip("tensorrt_rtx_bindings", reason="the 'rtx' extra is not installed", exc_type=ImportError)

HEIGHT, WIDTH = 64, 96


def input_spec(batch: ShapeRange, *, camera_frames: bool = False) -> InputSpec:
    return InputSpec(
        name="image" if camera_frames else "pixel_values",
        channels=3,
        batch=batch,
        height=ShapeRange.fixed(HEIGHT),
        width=ShapeRange.fixed(WIDTH),
    )


# A residual CNN with a batch of 2 to 8, mobile CNNs with squeeze-excite (swish, hard swish), a transformer on camera frames.
NETWORKS = {
    "test_resnet": input_spec(ShapeRange(min=2, opt=4, max=8)),
    "test_efficientnet": input_spec(ShapeRange.fixed(2)),
    "lcnet_035": input_spec(ShapeRange.fixed(1)),
    "test_vit": input_spec(ShapeRange.fixed(1), camera_frames=True),
}


# A100, RTX 30, L4 and RTX 40, RTX 50. The first two have no fp8.
TARGETS = tuple(getattr(trt.ComputeCapability, name) for name in ("SM80", "SM86", "SM89", "SM120"))
FLOATS = {Precision.FP32: trt.DataType.FLOAT, Precision.BF16: trt.DataType.BF16}


@dataclass(frozen=True)
class Case:
    graph: ExportedGraph
    ranges: dict[str, float]


@pytest.fixture(scope="module", params=list(NETWORKS))
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    input = NETWORKS[request.param]
    loaded = load_timm(request.param, SourceOptions(weights="random:0", img_size=(HEIGHT, WIDTH)))
    graph = export_onnx(prepare(loaded, input), tmp_path_factory.mktemp(request.param) / "fp32.onnx")
    random, shape = np.random.default_rng(0), input.shape(2, HEIGHT, WIDTH)
    images = random.integers(0, 256, shape) if input.dtype == "uint8" else random.standard_normal(shape)
    return Case(
        graph, find_ranges(collect_magnitudes(graph.path, tensors_to_calibrate(graph), [images.astype(input.dtype)]))
    )


class Log(trt.ILogger):  # type: ignore[misc,name-defined]
    """Keeps errors: TensorRT reports a failure as None, and says why only here."""

    def __init__(self) -> None:
        super().__init__()
        self.errors: list[str] = []

    def log(self, severity: Any, message: str) -> None:
        if severity in (trt.Logger.INTERNAL_ERROR, trt.Logger.ERROR):
            self.errors.append(message)

    def last_error(self) -> str:
        return self.errors[-1] if self.errors else "TensorRT logged no error"


@pytest.fixture(scope="module")
def log() -> Log:
    # One for all builders: TensorRT keeps the first logger of a process and warns about others.
    return Log()


def parsed(path: Path, log: Log) -> tuple[Any, Any, Any]:
    """The builder, the network and the parser, which owns the weights."""
    builder = trt.Builder(log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(str(path)):
        pytest.fail("\n".join(parser.get_error(i).desc() for i in range(parser.num_errors)) or log.last_error())
    return builder, network, parser


def compiled(
    builder: Any, network: Any, input: InputSpec, log: Log, targets: Sequence[trt.ComputeCapability] = ()
) -> bytes:
    config = builder.create_builder_config()
    if targets:
        config.num_compute_capabilities = len(targets)
        assert all(config.set_compute_capability(target, index) for index, target in enumerate(targets))
    profile = builder.create_optimization_profile()
    assert profile.set_shape(input.name, input.min_shape, input.opt_shape, input.max_shape) is not False
    assert config.add_optimization_profile(profile) >= 0
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        pytest.fail(f"TensorRT-RTX built nothing: {log.last_error()}")
    return bytes(plan)


@pytest.mark.parametrize("precision", list(Precision))
def test_every_precision_compiles(case: Case, precision: Precision, log: Log, tmp_path: Path) -> None:
    typed = write_typed_graph(case.graph, precision=precision, path=tmp_path / "typed.onnx", ranges=case.ranges)
    builder, network, parser = parsed(typed.path, log)

    assert [(network.get_input(i).name, network.get_input(i).dtype) for i in range(network.num_inputs)] == [
        (typed.input.name, trt.DataType.UINT8 if typed.input.dtype == "uint8" else trt.DataType.FLOAT)
    ]
    assert [(network.get_output(i).name, network.get_output(i).dtype) for i in range(network.num_outputs)] == [
        (name, trt.DataType.FLOAT) for name in typed.spec.out_features
    ]

    layers = [network.get_layer(index) for index in range(network.num_layers)]
    seen = Counter(layer.type.name for layer in layers)
    nodes = Counter(node.op_type for node in onnx.load(typed.path).graph.node)
    assert seen["QUANTIZE"] == nodes["QuantizeLinear"]
    assert seen["DEQUANTIZE"] == nodes["DequantizeLinear"]
    assert bool(seen["QUANTIZE"]) == (precision in (Precision.INT8, Precision.FP8))
    convolutions = {layer.get_output(0).dtype for layer in layers if layer.type == trt.LayerType.CONVOLUTION}
    assert convolutions == {FLOATS.get(precision, trt.DataType.HALF)}

    targets = TARGETS[2:] if precision is Precision.FP8 else TARGETS
    assert len(compiled(builder, network, typed.input, log, targets)) > 10_000
    for target in targets:
        assert len(compiled(builder, network, typed.input, log, [target])) > 10_000
    del parser  # kept until here: the network's weights are views of it


@pytest.mark.parametrize("case", ["test_resnet"], indirect=True)
def test_a_gpu_without_fp8_is_told(case: Case, log: Log, tmp_path: Path) -> None:
    typed = write_typed_graph(case.graph, precision=Precision.FP8, path=tmp_path / "fp8.onnx", ranges=case.ranges)
    builder, network, _parser = parsed(typed.path, log)
    with pytest.raises(pytest.fail.Exception, match=r"sm80.*fp8_e4m3"):
        compiled(builder, network, typed.input, log, TARGETS[:1])


@pytest.mark.parametrize("case", ["test_resnet"], indirect=True)
def test_a_dynamic_graph_without_a_profile_is_told_apart_from_success(case: Case, log: Log, tmp_path: Path) -> None:
    # The None that TensorRT returns, and the reason in its log, are what `compiled` relies on.
    assert not case.graph.input.batch.is_fixed
    typed = write_typed_graph(case.graph, precision=Precision.INT8, path=tmp_path / "int8.onnx", ranges=case.ranges)
    builder, network, _parser = parsed(typed.path, log)
    assert builder.build_serialized_network(network, builder.create_builder_config()) is None
    assert "no optimization profile" in log.last_error()
