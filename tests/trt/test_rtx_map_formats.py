"""TensorRT-RTX compiles graphs with float16 and channels-last maps and float16 input, with no GPU."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import pytest

from edge_backbones.engines.ports import Tensor, mismatches
from edge_backbones.engines.tensorrt.compile import compile_plan
from edge_backbones.engines.tensorrt.library import logger_of
from edge_backbones.engines.tensorrt.options import PlanOptions
from edge_backbones.spec import FloatType, InputSpec, Precision, ShapeRange
from edge_backbones.toolchain.artifacts import ExportedGraph
from edge_backbones.toolchain.calibration.ranges import collect_magnitudes, find_ranges
from edge_backbones.toolchain.export import export_onnx
from edge_backbones.toolchain.prepare import prepare
from edge_backbones.toolchain.quantize.placement import tensors_to_calibrate
from edge_backbones.toolchain.quantize.typed_graph import write_typed_graph
from edge_backbones.toolchain.sources.base import SourceOptions
from edge_backbones.toolchain.sources.timm import load_timm

trt = pytest.importorskip("tensorrt_rtx_bindings", reason="the 'rtx' extra is not installed", exc_type=ImportError)

HEIGHT, WIDTH, BATCH = 64, 96, 3
NETWORKS = {"test_resnet": {"out_indices": (1, 4)}, "test_vit": {"out_indices": (-2, -1)}}


@dataclass(frozen=True)
class Case:
    graph: ExportedGraph
    ranges: dict[str, float]


def exported(name: str, folder: Path, pixels: FloatType) -> Case:
    fixed = ShapeRange.fixed
    input = InputSpec(
        name="pixel_values",
        channels=3,
        batch=fixed(BATCH),
        height=fixed(HEIGHT),
        width=fixed(WIDTH),
        pixel_dtype=pixels,
    )
    loaded = load_timm(name, SourceOptions(weights="random:0", img_size=(HEIGHT, WIDTH), **NETWORKS[name]))
    graph = export_onnx(prepare(loaded, input), folder / "fp32.onnx")
    images = np.random.default_rng(0).standard_normal(input.opt_shape).astype(pixels)
    return Case(graph, find_ranges(collect_magnitudes(graph.path, tensors_to_calibrate(graph), [images])))


@pytest.fixture(scope="module", params=list(NETWORKS))
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def cases(name: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    """The network with float32 and with float16 input."""
    return {pixels: exported(name, tmp_path_factory.mktemp(pixels), pixels) for pixels in ("float32", "float16")}


def ports_of(path: Path) -> list[Tensor]:
    """What TensorRT reads in the file, as an engine would tell it."""
    log = logger_of(trt)
    builder = trt.Builder(log)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, log)
    assert parser.parse_from_file(str(path)), log.last_error()
    inputs = [network.get_input(index) for index in range(network.num_inputs)]
    outputs = [network.get_output(index) for index in range(network.num_outputs)]
    return [Tensor(port.name, "INPUT", port.dtype.name, tuple(port.shape)) for port in inputs] + [
        Tensor(port.name, "OUTPUT", port.dtype.name, tuple(port.shape)) for port in outputs
    ]


@pytest.mark.parametrize(
    ("map_dtype", "channels_last", "pixels"),
    [
        ("float16", False, "float32"),
        ("float32", True, "float32"),
        ("float16", True, "float32"),
        ("float32", False, "float16"),
        ("float16", True, "float16"),
    ],
)
@pytest.mark.parametrize("precision", list(Precision))
def test_every_form_compiles(
    cases: dict[str, Case],
    precision: Precision,
    map_dtype: FloatType,
    channels_last: bool,
    pixels: FloatType,
    tmp_path: Path,
) -> None:
    case = cases[pixels]
    spec = msgspec.structs.replace(case.graph.spec, map_dtype=map_dtype, channels_last=channels_last)
    graph = dataclasses.replace(case.graph, spec=spec)
    typed = write_typed_graph(graph, precision=precision, path=tmp_path / "typed.onnx", ranges=case.ranges)
    assert mismatches(ports_of(typed.path), graph.input, spec.outputs, spec) == []
    plan = compile_plan(
        typed.path.read_bytes(),
        graph.input,
        precision,
        flavour="tensorrt_rtx",
        options=PlanOptions(targets=("sm_89",)),
    )
    assert len(plan.data) > 10_000
    assert plan.gpu.architectures == ("sm_89",)
