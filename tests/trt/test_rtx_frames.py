"""TensorRT-RTX compiles graphs that take whole frames of a camera, with no GPU."""

from __future__ import annotations

import shutil
from pathlib import Path

import msgspec
import pytest

from edge_backbones.engines.tensorrt.compile import compile_plan
from edge_backbones.engines.tensorrt.options import PlanOptions
from edge_backbones.images.camera import frame_spec
from edge_backbones.spec import Color, InputSpec, Precision, ShapeRange
from edge_backbones.toolchain.artifacts import ExportedGraph, LoadedBackbone
from edge_backbones.toolchain.export import export_front, export_onnx
from edge_backbones.toolchain.prepare import prepare
from edge_backbones.toolchain.quantize.typed_graph import write_typed_graph
from edge_backbones.toolchain.sources.base import SourceOptions
from edge_backbones.toolchain.sources.timm import load_timm

pytest.importorskip("tensorrt_rtx_bindings", reason="the 'rtx' extra is not installed", exc_type=ImportError)

FIXED = ShapeRange.fixed
INPUT = InputSpec(
    name="pixel_values", channels=3, batch=ShapeRange(min=1, opt=1, max=4), height=FIXED(64), width=FIXED(96)
)


@pytest.fixture(scope="module")
def loaded() -> LoadedBackbone:
    return load_timm("test_resnet", SourceOptions(weights="random:0", img_size=(64, 96), out_indices=(1, 4)))


@pytest.fixture(scope="module")
def graph(loaded: LoadedBackbone, tmp_path_factory: pytest.TempPathFactory) -> ExportedGraph:
    return export_onnx(prepare(loaded, INPUT), tmp_path_factory.mktemp("graph") / "fp32.onnx")


@pytest.mark.parametrize("precision", [Precision.FP32, Precision.FP16, Precision.BF16])
@pytest.mark.parametrize(
    ("color", "size"),
    [("rgb", (1080, 1920)), ("bgr", (480, 640)), ("gray", (720, 1280)), ("nv12", (2160, 3840)), ("yuyv", (480, 640))],
)
def test_frames_of_every_colour_compile(
    loaded: LoadedBackbone,
    graph: ExportedGraph,
    precision: Precision,
    color: Color,
    size: tuple[int, int],
    tmp_path: Path,
) -> None:
    input = msgspec.structs.replace(INPUT, name="frame", frame=frame_spec(*size, color))
    path = tmp_path / "typed.onnx"
    if precision is Precision.FP32:
        shutil.copyfile(graph.path, path)
    else:
        write_typed_graph(graph, precision=precision, path=path)
    export_front(loaded.image_config, input).put_before(path)
    plan = compile_plan(
        path.read_bytes(), input, precision, flavour="tensorrt_rtx", options=PlanOptions(targets=("sm_89",))
    )
    assert len(plan.data) > 10_000
