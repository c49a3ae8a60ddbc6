"""Feature maps in float16 and in channels-last memory, and float16 input: every library's engine against fp32 torch."""

from __future__ import annotations

import dataclasses
import shutil
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import networks
import numpy as np
import onnx
import pytest
import torch
from msgspec import structs
from onnx import TensorProto

from edge_backbones import BuildOptions, Bundle, EdgeBackbone, Gate, build_bundle, compile_bundle, verify_bundle
from edge_backbones.bench.contender import MAKERS, Task, _parity
from edge_backbones.bundle.manifest import SCHEMA_VERSION
from edge_backbones.bundle.reader import load_golden
from edge_backbones.bundle.writer import write_manifest
from edge_backbones.cli.main import _run
from edge_backbones.errors import SourceError
from edge_backbones.integrations.modules import EngineModule
from edge_backbones.parity_report import ParityError
from edge_backbones.report.page import write_report
from edge_backbones.spec import Precision, ShapeRange
from edge_backbones.toolchain.artifacts import LoadedBackbone
from edge_backbones.toolchain.explain_bundle import explain_bundle

HEIGHT, WIDTH = 64, 96
BATCH = 3
PRECISIONS = (Precision.FP32, Precision.FP16, Precision.INT8)
FORMATS = {
    "float16": {"maps": "float16", "pixels": "float16"},
    "channels-last": {"maps": "channels-last"},
    "both": {"maps": ("float16", "channels-last"), "batch": ShapeRange(min=2, opt=BATCH, max=4)},
    "everything": {"maps": ("channels-last", "float16"), "pixels": "float16"},
}
# A residual CNN with an early and the last stage; a transformer, whose hidden states are tokens and whose maps are not.
NETWORKS = {"test_resnet": {"out_indices": (1, 4)}, "test_vit": {"out_indices": (-2, -1), "hidden_states": True}}
# Relative errors: of rounding to float16 alone (2 ** -11 at most), of fp16 arithmetic, and of int8 with random weights.
MOST = {Precision.FP32: 5e-4, Precision.FP16: 1e-2, Precision.INT8: 0.35}


@dataclass
class Case:
    """A built bundle of one network in one form, and the network."""

    loaded: LoadedBackbone
    path: Path
    maps: tuple[str, ...]
    pixels: str

    @property
    def dtype(self) -> str:
        return "float16" if "float16" in self.maps else "float32"


def options_of(**changes) -> BuildOptions:
    gates = {Precision.FP16: Gate(min_cosine=0.99), Precision.INT8: Gate(min_cosine=0.5)}
    fixed = {"height": HEIGHT, "width": WIDTH, "batch": BATCH, "gates": gates, "cache": None, "golden": 3}
    return BuildOptions(**{"precisions": PRECISIONS, **fixed, **changes})


CASES = [("test_resnet", "float16"), ("test_resnet", "channels-last"), ("test_vit", "both")]


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def case(request, tmp_path_factory, photograph_folder) -> Case:
    name, form = request.param
    options = options_of(torchscript=False, **FORMATS[form])
    loaded = networks.trained_like(name, img_size=(HEIGHT, WIDTH), **NETWORKS[name])
    path = tmp_path_factory.mktemp("formats") / f"{name}.bundle"
    build_bundle(loaded, path, images=photograph_folder, options=options)
    return Case(loaded, path, options.maps, options.pixels)


def some(bundle: Bundle, count: int) -> np.ndarray:
    """Return float32 inputs like those that ranges were found on: golden images, as they are and mirrored."""
    golden = load_golden(bundle).inputs["opt"].astype(np.float32)
    both = np.concatenate([golden, golden[..., ::-1]])
    return np.ascontiguousarray(both[np.arange(count) % len(both)])


def check(case: Case, backbone: EdgeBackbone, precision: Precision) -> None:
    """Compare with fp32 torch: as many images as the engine takes, more, and fewer."""
    bundle = Bundle.open(case.path)
    reordered = [o.is_reordered for o in bundle.manifest.backbone.described_outputs]
    assert any(reordered) == ("channels-last" in case.maps)
    for count in (BATCH, 2 * BATCH + 1, 1):
        images = some(bundle, count)
        found = backbone.run(images)
        expected = networks.maps_of(case.loaded.module, images)
        assert list(found) == list(case.loaded.spec.outputs)
        for name, actual, right, moved in zip(found, found.values(), expected, reordered, strict=True):
            assert actual.shape == right.shape, name
            assert actual.dtype == case.dtype, name
            assert networks.relative(actual, right) < MOST[precision], (name, count)
            tensor = torch.from_numpy(actual)
            if moved:
                assert tensor.is_contiguous(memory_format=torch.channels_last), name
            else:
                assert tensor.is_contiguous(), name
    chosen = backbone(images.astype(np.float16)).feature_maps
    for name, actual in zip(backbone.out_features, chosen, strict=True):
        # Rounded to float16 beforehand, pixels are a little others where the engine takes float32.
        assert networks.relative(actual, found[name]) < 0.5 * MOST[precision] + 3e-3, name


@pytest.mark.parametrize("precision", PRECISIONS)
def test_openvino_returns_them(case, precision):
    with EdgeBackbone.from_pretrained(case.path, engine=precision.value) as backbone:
        check(case, backbone, precision)


def test_openvino_reuses_and_does_not_overwrite_the_memory_of_a_view(case):
    with EdgeBackbone.from_pretrained(case.path, engine="fp32") as backbone:
        random = np.random.default_rng(0)
        first = random.standard_normal((BATCH, 3, HEIGHT, WIDTH)).astype(case.pixels)
        held = backbone(first).feature_maps[0]
        before = held.copy()
        for _ in range(3):
            backbone(random.standard_normal(first.shape).astype(case.pixels))
        np.testing.assert_array_equal(held, before)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_onnxruntime_returns_them(case, precision):
    bundle = Bundle.open(case.path)
    if not any(e.key.flavour == "onnxruntime" for e in bundle.manifest.engines):
        compile_bundle(case.path, flavour="onnxruntime", in_process=True)
        bundle = Bundle.open(case.path)
    [name] = [e.name for e in bundle.manifest.engines if (e.key.flavour, e.key.precision) == ("onnxruntime", precision)]
    with EdgeBackbone.from_pretrained(case.path, engine=name) as backbone:
        check(case, backbone, precision)


def test_the_manifest_says_what_they_are(case):
    manifest = Bundle.open(case.path).manifest
    assert manifest.schema_version == SCHEMA_VERSION
    assert manifest.backbone.map_dtype == case.dtype
    assert manifest.backbone.channels_last == ("channels-last" in case.maps)
    assert manifest.backbone.layouts == case.loaded.spec.layouts == ("NCHW", "NCHW")
    assert manifest.input.dtype == case.pixels
    golden = load_golden(Bundle.open(case.path))
    for name, output in zip(manifest.backbone.out_features, manifest.backbone.channels, strict=True):
        assert golden.outputs["opt"][name].shape[:2] == (3, output)
        assert golden.outputs["opt"][name].dtype == np.float32
    assert golden.inputs["opt"].dtype == case.pixels


@pytest.mark.parametrize("precision", PRECISIONS)
def test_graphs_begin_and_end_in_their_types_without_a_cast_too_many(case, precision):
    model = onnx.load(case.path / "graphs" / f"{precision}.onnx")
    onnx.checker.check_model(model, full_check=True)
    wanted = TensorProto.FLOAT16 if case.dtype == "float16" else TensorProto.FLOAT
    assert {output.type.tensor_type.elem_type for output in model.graph.output} == {wanted}
    [pixels] = model.graph.input
    assert pixels.type.tensor_type.elem_type == (TensorProto.FLOAT16 if case.pixels == "float16" else TensorProto.FLOAT)

    makers = {name: node for node in model.graph.node for name in node.output}
    readers = Counter(name for node in model.graph.node for name in node.input)
    spec = Bundle.open(case.path).manifest.backbone
    for output in spec.described_outputs:
        node = makers[output.name]
        if output.is_reordered:
            assert readers[output.name] == 0
            if node.op_type == "Cast":  # float32 maps of a half graph: the smaller values are moved
                assert (precision is Precision.FP32, case.dtype) == (False, "float32")
                node = makers[node.input[0]]
            assert node.op_type == "Transpose"
            assert list(node.attribute[0].ints) == [0, 2, 3, 1]
            node = makers[node.input[0]]
        if precision is not Precision.FP32 and case.dtype == "float16":
            norm = node.op_type == "Cast" and makers[node.input[0]].op_type == "LayerNormalization"
            assert node.op_type != "Cast" or norm, (output.name, node.op_type)  # norms are computed in fp32
    if precision is not Precision.FP32 and case.pixels == "float16":
        reading = [node.op_type for node in model.graph.node if pixels.name in node.input]
        assert "Cast" not in reading
    # What is rounded to 8 bits is what callers get without these formats: no Q reads a moved or cast output.
    for node in model.graph.node:
        if node.op_type == "QuantizeLinear":
            maker = makers.get(node.input[0])
            assert maker is None or maker.op_type != "Transpose" or maker.output[0] not in spec.outputs


def test_ranges_hold_for_every_form_of_the_maps(case, tmp_path, photograph_folder):
    """The network that is calibrated is the same: only float16 pixels make other ranges."""
    plain = tmp_path / "plain.bundle"
    batch = Bundle.open(case.path).manifest.input.batch
    options = options_of(
        precisions=(Precision.INT8,),
        calibration=case.path,
        pixels=case.pixels,
        batch=batch,
        torchscript=False,
    )
    build_bundle(case.loaded, plain, images=photograph_folder, options=options)
    manifest = Bundle.open(plain).manifest
    assert manifest.calibration.reused
    assert manifest.backbone.map_dtype == "float32"
    ours, theirs = (
        Counter(n.op_type for n in onnx.load(path / "graphs" / "int8.onnx").graph.node) for path in (case.path, plain)
    )
    for kind in ("QuantizeLinear", "DequantizeLinear", "Conv", "MatMul", "Add"):
        assert ours[kind] == theirs[kind], kind


def test_they_are_verified_shown_and_reported(case, capsys, tmp_path, photograph_folder):
    manifest = Bundle.open(case.path).manifest
    reports = verify_bundle(case.path, engine="openvino", in_process=True)
    assert [report.passed for report in reports] == [True] * 3
    assert _run(["inspect", str(case.path)]) == 0
    shown = capsys.readouterr().out
    memory = "channels-last" if "channels-last" in case.maps else "channels-first"
    assert f"maps: {case.dtype}, {memory} memory" in shown
    assert f"{case.pixels} NCHW" in shown
    [photograph] = photograph_folder.glob("1.jpg")
    assert _run(["run", str(case.path), str(photograph), "--out", str(tmp_path)]) == 0
    with np.load(tmp_path / "1.npz") as saved:
        assert [saved[name].dtype for name in manifest.backbone.out_features] == [case.dtype] * 2
        assert [saved[name].shape[0] for name in manifest.backbone.out_features] == list(manifest.backbone.channels)
    page = write_report(case.path, tmp_path / "page.html").read_text(encoding="utf-8")
    assert f"{case.dtype}, {memory} memory" in page
    assert "backbone.preprocess(" in page


def test_peers_of_the_benchmark_are_compared_in_the_same_layout(case):
    bundle = Bundle.open(case.path)
    golden = load_golden(bundle)
    engine = next(e.name for e in bundle.manifest.engines if e.key.precision is Precision.FP32)
    for peer in ("edge", "onnxruntime", "openvino-f32"):
        graph = str(case.path / "graphs" / "fp32.onnx")
        task = Task(peer=peer, bundle=str(case.path), engine=engine, file=graph)
        cosine, sqnr_db = _parity(MAKERS[peer](bundle, task), bundle, golden)
        assert cosine > 0.9999, peer
        assert sqnr_db > 60, peer


def test_a_module_of_torch_gets_tensors_of_the_same_memory(case):
    with EdgeBackbone.from_pretrained(case.path, engine="fp32") as backbone:
        module = EngineModule(backbone)
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            images = torch.randn(BATCH, 3, HEIGHT, WIDTH).to(dtype)
            maps = module.infer(images)["feature_maps"]
            with torch.no_grad():
                expected = case.loaded.module(images.float())
            for actual, right in zip(maps, expected, strict=False):
                assert actual.dtype == dtype
                assert actual.is_contiguous(memory_format=torch.channels_last) == ("channels-last" in case.maps)
                assert networks.relative(actual.float().numpy(), right.numpy()) < 1e-2


def test_torchscript_returns_them(tmp_path, photograph_folder):
    for name, stages in NETWORKS.items():
        loaded = networks.trained_like(name, img_size=(HEIGHT, WIDTH), **stages)
        path = tmp_path / f"{name}.bundle"
        options = options_of(precisions=(Precision.FP32,), flavours="torchscript", **FORMATS["everything"])
        build_bundle(loaded, path, images=photograph_folder, options=options)
        case = Case(loaded, path, options.maps, options.pixels)
        with EdgeBackbone.from_pretrained(path, engine="torchscript", allow_host_code=True) as backbone:
            check(case, backbone, Precision.FP32)


def test_maps_that_lie_in_channels_last_memory_anyway_stay_as_they_are(tmp_path, photograph_folder):
    class Moved(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = torch.nn.Conv2d(3, 8, 4, stride=4)

        def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return (self.conv(pixel_values).permute(0, 2, 3, 1),)

    loaded = networks.hand_made(Moved())
    loaded = dataclasses.replace(loaded, spec=structs.replace(loaded.spec, layouts=("NHWC",)))
    options = options_of(precisions=(Precision.FP32,), maps="channels-last", torchscript=False)
    build_bundle(loaded, tmp_path / "b.bundle", images=photograph_folder, options=options)
    manifest = Bundle.open(tmp_path / "b.bundle").manifest
    assert not manifest.backbone.channels_last
    with EdgeBackbone.from_pretrained(tmp_path / "b.bundle") as backbone:
        [feature_map] = backbone(np.zeros((1, 3, HEIGHT, WIDTH), np.float32)).feature_maps
    assert feature_map.shape == (1, 16, 24, 8)
    assert feature_map.flags.c_contiguous


@pytest.mark.parametrize(
    ("factor", "message"),
    [
        (1e6, r"layer4 reaches .* on the golden images, and float16 maps hold 65504: build float32 maps"),
        (
            1e-7,
            r"layer4 reaches .*e-0. alone on the golden images, and float16 rounds so small values by .*: build float32",
        ),
    ],
)
def test_values_that_float16_cannot_hold_are_refused_before_anything_is_compiled(
    factor, message, tmp_path, photograph_folder
):
    loaded = networks.trained_like("test_resnet", out_indices=(4,))
    module = loaded.module

    class Louder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = module

        def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return tuple(factor * m for m in self.net(pixel_values))

    louder = LoadedBackbone(
        Louder().eval(), loaded.source, loaded.image_config, loaded.channels_in, 64, 96, loaded.spec
    )
    options = options_of(precisions=(Precision.FP32,), maps="float16", torchscript=False)
    with pytest.raises(SourceError, match=message):
        build_bundle(louder, tmp_path / "b.bundle", images=photograph_folder, options=options)


def test_an_error_in_channels_last_maps_is_explained(case, tmp_path):
    """An int8 engine outside a tighter gate: the explanation compares in the layout of the graph."""
    path = Path(shutil.copytree(case.path, tmp_path / "b.bundle"))
    manifest = Bundle.open(path).manifest
    tight = Gate(min_sqnr_db=60.0)
    graphs = tuple(structs.replace(g, gate=tight) if g.precision is Precision.INT8 else g for g in manifest.graphs)
    engines = tuple(
        structs.replace(e, parity=structs.replace(e.parity, gate=tight)) if e.key.precision is Precision.INT8 else e
        for e in manifest.engines
        if e.key.flavour == "openvino"
    )
    write_manifest(path, structs.replace(manifest, graphs=graphs, engines=engines))
    with pytest.raises(ParityError):
        verify_bundle(path, engine="int8", in_process=True)
    [explanation] = explain_bundle(path, engine="int8", in_process=True)
    assert explanation.cause in ("activations", "weights")  # not the engine, and no difference of layouts
    assert "-300" not in explanation.sentence
