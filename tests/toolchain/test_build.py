"""Bundles end to end: build, run, compile, verify; and what is on disk after everything that can go wrong."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import networks
import numpy as np
import pytest
import torch
from msgspec import structs
from PIL import Image
from torch import nn

from edge_backbones.bundle.reader import Bundle, load_golden
from edge_backbones.bundle.writer import write_manifest
from edge_backbones.deploy.compile import compile_bundle
from edge_backbones.deploy.verify import verify_bundle
from edge_backbones.engines import promises, registry
from edge_backbones.errors import (
    BundleError,
    CalibrationError,
    EngineMismatchError,
    InputError,
    IntegrityError,
    ManifestError,
    SourceError,
)
from edge_backbones.images.config import ImageConfig
from edge_backbones.images.decode import list_images
from edge_backbones.images.fit import fit
from edge_backbones.machine import hosts
from edge_backbones.parity_report import Gate, ParityError
from edge_backbones.runtime.backbone import EdgeBackbone
from edge_backbones.spec import Precision, ShapeRange
from edge_backbones.toolchain.build import build_bundle
from edge_backbones.toolchain.options import BuildOptions
from edge_backbones.toolchain.sources.base import SourceOptions
from edge_backbones.toolchain.sources.module_source import ModuleSource
from edge_backbones.toolchain.sources.timm import load_timm

pytestmark = pytest.mark.usefixtures("in_process")  # tests replace what is called there

TINY = {"weights": "random:0", "precisions": (Precision.FP32,), "cache": None, "height": 32, "width": 64, "golden": 1}
IMPOSSIBLE = {Precision.FP32: Gate(min_sqnr_db=299), Precision.INT8: Gate(min_cosine=1.0)}
ROUNDING = 1e-5


def contents(folder: Path) -> dict[str, str]:
    """Every file below a folder, with its hash."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def assert_same_maps(actual, expected, limit: float = ROUNDING) -> None:
    for one, reference in zip(actual, expected, strict=True):
        for image, reference_image in zip(one, reference, strict=True):
            assert networks.relative(image, reference_image) < limit


# ---- what a build gives ---------------------------------------------------------------------------------------------


def test_the_manifest_says_what_was_built(cnn):
    manifest = cnn.bundle.manifest
    assert manifest.backbone.out_features == ("blocks.1", "blocks.3")
    assert manifest.backbone.out_indices == (1, -2)
    assert manifest.backbone.strides == ((4, 4), (16, 16))
    assert manifest.input.opt_shape == (2, 3, 64, 96)
    assert (manifest.source.weights, manifest.source.seed, manifest.source.batch_norm_warmed) == ("random", 0, True)
    assert [(graph.format, graph.precision) for graph in manifest.graphs] == [("onnx", "fp32"), ("torchscript", "fp32")]
    assert len(manifest.golden.images) == 3
    assert manifest.calibration is None
    assert cnn.reports == tuple(engine.parity for engine in manifest.engines)
    assert all(report.passed for report in cnn.reports)


def test_a_bundle_holds_what_its_manifest_names_and_nothing_else(cnn, vit, dynamic):
    for result in (cnn, vit, dynamic):
        folder = result.bundle.path
        named = {record.path for record in result.bundle.manifest.files()}
        assert set(contents(folder)) == {"manifest.json"} | named
        result.bundle.check_files()
        assert [p.name for p in folder.parent.iterdir()] == [folder.name]  # no lock, no staging folder


def test_golden_samples_are_photographs_that_calibration_did_not_see(cnn, photograph_folder):
    assert set(cnn.bundle.manifest.golden.images) == {"1.jpg", "7.jpg", "more/9.png"}


# ---- running it -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def warmed(photograph_folder):
    """``warmed(result)``: the network of a bundle made again in torch by hand: seed, photographs, batch norm."""

    def network(result) -> torch.nn.Module:
        manifest = result.bundle.manifest
        size = manifest.input.height.opt, manifest.input.width.opt
        options = SourceOptions(weights="random:0", img_size=size, out_indices=manifest.backbone.out_indices)
        net = load_timm(manifest.source.name, options).module
        left_out = (*manifest.golden.images, *result.skipped)
        files = [path for path in list_images(photograph_folder) if not str(path).endswith(left_out)]
        pixels = np.stack([fit(Image.open(path), manifest.image, *size) for path in files])
        for norm in net.modules():
            if isinstance(norm, torch.nn.BatchNorm2d):
                norm.momentum = None
                norm.train()
        networks.maps_of(net, networks.normalised(pixels, manifest.image))
        return net.eval()

    return network


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
def test_any_batch_gives_every_image_its_maps(cnn, warmed, photographs, count):
    images = networks.normalised(networks.crops(photographs, count, 64, 96), cnn.bundle.manifest.image)
    with EdgeBackbone.from_pretrained(cnn.bundle.path) as backbone:
        maps = backbone(images).feature_maps
    assert [m.shape for m in maps] == [(count, 24, 16, 24), (count, 48, 4, 6)]
    assert_same_maps(maps, networks.maps_of(warmed(cnn), images))


@pytest.mark.parametrize("count", [1, 3])
def test_camera_frames_go_in_as_they_are(vit, warmed, photographs, count):
    frames = networks.crops(photographs, count, 64, 96)
    with EdgeBackbone.from_pretrained(vit.bundle.path) as backbone:
        maps = backbone(frames).feature_maps
    assert_same_maps(maps, networks.maps_of(warmed(vit), networks.normalised(frames, vit.bundle.manifest.image)))


@pytest.mark.parametrize("shape", [(1, 64, 128), (2, 96, 96), (3, 128, 64), (4, 64, 64), (9, 96, 64)])
def test_batch_and_size_vary_within_their_ranges(dynamic, warmed, photographs, shape):
    images = networks.normalised(networks.crops(photographs, *shape), dynamic.bundle.manifest.image)
    with EdgeBackbone.from_pretrained(dynamic.bundle.path) as backbone:
        assert_same_maps(backbone(images).feature_maps, networks.maps_of(warmed(dynamic), images))


@pytest.mark.parametrize("size", [(80, 96), (32, 96), (96, 160)])
def test_a_size_outside_the_range_is_refused(dynamic, size):
    with (
        EdgeBackbone.from_pretrained(dynamic.bundle.path) as backbone,
        pytest.raises(InputError, match=r"does not fit: this engine takes .*64\.\.128.*in multiples of 32"),
    ):
        backbone(np.zeros((2, 3, *size), np.float32))


def test_a_dynamic_bundle_is_verified_at_its_smallest_and_largest_size(dynamic):
    assert dynamic.bundle.manifest.golden.cases == ("max", "min", "opt")
    golden = load_golden(dynamic.bundle)
    sides = [golden.inputs[case].shape[2:] for case in ("min", "opt", "max")]
    assert sides == [(64, 64), (96, 96), (128, 128)]


def test_torchscript_in_the_bundle_is_the_network(cnn, warmed, photographs):
    images = networks.normalised(networks.crops(photographs, 2, 64, 96), cnn.bundle.manifest.image)
    with pytest.warns(FutureWarning, match=r"torch\.jit\.load"):
        module = torch.jit.load(cnn.bundle.path / "graphs" / "fp32.ts")
    assert_same_maps(networks.maps_of(module, images), networks.maps_of(warmed(cnn), images))


# ---- int8 -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def int8(photograph_folder, tmp_path_factory):
    """test_resnet, batch 2, 64 x 96, in int8 and fp16."""
    return build_bundle(
        "test_resnet",
        tmp_path_factory.mktemp("int8") / "int8.bundle",
        images=photograph_folder,
        options=BuildOptions(
            weights="random:0",
            gates={Precision.INT8: Gate(min_sqnr_db=15), Precision.FP16: Gate(min_cosine=0.9999)},  # 15 is no float
            percentile=100,
            precisions=(Precision.INT8, Precision.FP16),
            cache=None,
            batch=2,
            height=64,
            width=96,
            out_indices=(2, 4),
            torchscript=False,
        ),
    )


def test_every_precision_has_a_graph_and_an_engine(int8):
    manifest = int8.bundle.manifest
    assert [graph.precision for graph in manifest.graphs] == ["int8", "fp16"]
    assert [engine.key.precision for engine in manifest.engines] == ["int8", "fp16"]
    assert [engine.parity.passed for engine in manifest.engines] == [True, True]
    assert manifest.calibration is not None
    assert (manifest.calibration.images, manifest.calibration.method) == (6, "auto")
    assert set(manifest.calibration.chosen) == {"layer2", "layer4"}
    assert manifest.decision is None  # nothing had to be decided


def test_an_engine_that_comes_back_has_the_gate_of_its_graph(int8, copy_of):
    path = copy_of(int8)
    [first, _] = int8.bundle.manifest.engines
    Bundle.open(path).remove_engine(first.name)
    [again] = compile_bundle(path, precisions=(Precision.INT8,)).engines
    assert again.parity.gate == first.parity.gate == Gate(min_sqnr_db=15)


def test_images_that_did_not_decode_are_named_in_result_and_manifest(cnn, int8):
    assert cnn.skipped == int8.skipped == int8.bundle.manifest.calibration.skipped == ("broken.jpg",)


@pytest.mark.parametrize(("precision", "limit"), [("int8", 0.18), ("fp16", 5e-3)])
def test_each_precision_runs_by_name(int8, precision, limit):
    golden = load_golden(int8.bundle)
    images, expected = golden.inputs["opt"], [golden.outputs["opt"][stage] for stage in ("layer2", "layer4")]
    with EdgeBackbone.from_pretrained(int8.bundle.path, engine=precision) as backbone:
        maps = backbone(images).feature_maps
    assert_same_maps(maps, expected, limit)
    assert all(networks.relative(one, reference) > 1e-7 for one, reference in zip(maps, expected, strict=True))


def test_int8_without_images_is_refused_before_anything_is_made(tmp_path):
    with pytest.raises(CalibrationError, match="int8 needs calibration images"):
        build_bundle("test_resnet", tmp_path / "x.bundle", options=BuildOptions(weights="random:0"))
    assert list(tmp_path.iterdir()) == []


# ---- builds that fail -----------------------------------------------------------------------------------------------


def test_a_failing_gate_names_the_stage_and_leaves_the_old_bundle(cnn, copy_of):
    target = copy_of(cnn)
    before = contents(target.parent)
    with pytest.raises(ParityError, match=r"fp32 is outside its gate \(SQNR >= 299 dB\): layer4 has cosine") as caught:
        build_bundle(
            "test_resnet",
            target,
            options=BuildOptions(**TINY, out_indices=(-1,), gates=IMPOSSIBLE, torchscript=False),
            overwrite=True,
        )
    (stage,) = caught.value.reports[0].stages
    assert (stage.stage, stage.passed) == ("layer4", False)
    assert "openvino computes it wrongly: install another release (pip install --upgrade openvino)" in str(caught.value)
    assert contents(target.parent) == before
    assert [p.name for p in target.parent.iterdir()] == [target.name]


@pytest.mark.parametrize(
    ("name", "options", "error"),
    [
        ("no_such_network", {}, SourceError),
        ("test_resnet", {"out_indices": (9,)}, InputError),
        ("test_vit", {"output_stride": 8}, SourceError),
        ("test_resnet", {"height": ShapeRange(min=48, opt=64, max=64)}, SourceError),
    ],
)
def test_a_build_that_is_refused_leaves_nothing(tmp_path, name, options, error):
    with pytest.raises(error):
        build_bundle(name, tmp_path / "x.bundle", options=BuildOptions(**{**TINY, **options}))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "options",
    [
        {"input": "pixels"},
        {"precisions": ()},
        {"precisions": (Precision.FP32, Precision.FP32)},
        {"golden": 0},
        {"method": "median"},
        {"percentile": 0},
        {"height": 64},
    ],
)
def test_options_that_contradict_themselves_are_refused(options):
    with pytest.raises(InputError):
        BuildOptions(**options)


@pytest.mark.parametrize("gate", [Gate(), Gate(min_cosine=0.0), Gate(max_relative=1.0), Gate(min_sqnr_db=0.0)])
def test_a_gate_that_asks_for_nothing_is_refused(gate):
    """Its engine would not be let in: a map of zeros passes."""
    with pytest.raises(
        InputError, match=r"the gate of int8 asks for .*a map of zeros passes: .*Gate\(min_cosine=0\.9\)"
    ):
        BuildOptions(gates={Precision.INT8: gate})


def test_a_bundle_with_gates_of_its_own_runs_by_them(tmp_path):
    """Its program too, and both are measured against them again."""
    gates = {Precision.FP32: Gate(max_relative=0.01)}
    options = {
        "weights": "random:0",
        "height": 64,
        "width": 64,
        "golden": 1,
        "cache": None,
        "flavours": ("torchscript",),
    }
    made = build_bundle(
        "test_resnet", tmp_path / "a.bundle", options=BuildOptions(**options, precisions=(Precision.FP32,), gates=gates)
    ).bundle
    assert [engine.parity.gate for engine in made.manifest.engines] == [gates[Precision.FP32]] * 2
    EdgeBackbone.from_pretrained(made.path).close()
    EdgeBackbone.from_pretrained(made.path, engine="torchscript", allow_host_code=True).close()
    for engine in ("openvino", "torchscript"):
        [report] = verify_bundle(made.path, engine=engine, allow_host_code=True)
        assert report.gate == gates[Precision.FP32]
    host = hosts.this_host(registry.InstalledVersions())
    assert all(promises.is_measured_here(made.manifest, engine, host) for engine in made.manifest.engines)


def test_an_existing_folder_is_not_overwritten_unless_asked(cnn, copy_of):
    target = copy_of(cnn)
    before = contents(target)
    with pytest.raises(BundleError, match=r"exists already: .*--overwrite"):
        build_bundle("test_resnet", target, options=BuildOptions(**TINY))
    assert contents(target) == before


def test_what_is_not_a_bundle_is_never_overwritten(tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").write_text("years of work")
    for target in (tmp_path / "thesis", tmp_path / "thesis" / "chapter1.tex"):
        with pytest.raises(BundleError, match="is not a bundle and will not be overwritten"):
            build_bundle("test_resnet", target, options=BuildOptions(**TINY), overwrite=True)
    assert contents(tmp_path) == {"thesis/chapter1.tex": hashlib.sha256(b"years of work").hexdigest()}


BUILD = """
    import sys
    from edge_backbones.toolchain.build import build_bundle
    from edge_backbones.toolchain.options import BuildOptions
    from edge_backbones.spec import Precision
    build_bundle(
        "test_resnet",
        sys.argv[1],
        overwrite=True,
        options=BuildOptions(
            weights="random:0", precisions=(Precision.FP32,), height=32, width=64, golden=1, torchscript=False, cache=None
        ),
    )
"""


def python(code: str, *arguments: object) -> list[str]:
    return [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]


@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL")
def test_a_killed_build_leaves_the_old_bundle_and_the_next_one_cleans_up(cnn, copy_of):
    target = copy_of(cnn)
    before = contents(target)
    process = subprocess.Popen(python(BUILD, target))
    try:
        deadline = time.monotonic() + 120
        while not list(target.parent.glob(f".{target.name}.building-*/graphs")):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.002)
        os.kill(process.pid, signal.SIGKILL)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == -signal.SIGKILL
    assert len(list(target.parent.iterdir())) > 1  # what the dead process left beside the bundle
    assert contents(target) == before
    result = build_bundle("test_resnet", target, options=BuildOptions(**TINY, torchscript=False), overwrite=True)
    assert result.bundle.manifest.source.name == "test_resnet"
    assert [p.name for p in target.parent.iterdir()] == [target.name]


# ---- compile and verify ---------------------------------------------------------------------------------------------


def without_engines(path: Path) -> None:
    manifest = Bundle.open(path).manifest
    for engine in manifest.engines:
        (path / engine.file.path).unlink()
    write_manifest(path, structs.replace(manifest, engines=()))


def test_compile_adds_the_engine_again(vit, copy_of, photographs):
    path = copy_of(vit)
    frames = networks.crops(photographs, 1, 64, 96)
    with EdgeBackbone.from_pretrained(path) as backbone:
        expected = backbone(frames).feature_maps
    without_engines(path)
    with pytest.raises(EngineMismatchError, match="edge-backbones compile"):
        EdgeBackbone.from_pretrained(path)
    (engine,) = compile_bundle(path).engines
    assert engine.key == vit.bundle.manifest.engines[0].key
    assert verify_bundle(path)[0].passed
    with EdgeBackbone.from_pretrained(path) as backbone:
        for actual, reference in zip(backbone(frames).feature_maps, expected, strict=True):
            np.testing.assert_array_equal(actual, reference)


def test_compile_uses_the_cache(vit, copy_of, tmp_path):
    path, cache = copy_of(vit), tmp_path / "cache"
    (first,) = compile_bundle(path, cache=cache).engines
    (second,) = compile_bundle(path, cache=cache).engines
    assert len(list(cache.glob("*.blob"))) == 1
    assert first.file.sha256 == second.file.sha256


def test_compile_of_a_precision_that_the_bundle_lacks_is_refused(vit):
    with pytest.raises(BundleError, match=r"has no int8.*fp32"):
        compile_bundle(vit.bundle.path, precisions=(Precision.INT8,))


def test_a_gate_that_failed_leaves_the_bundle_as_it_was(vit, copy_of):
    path = copy_of(vit)
    manifest = Bundle.open(path).manifest
    (engine,) = manifest.engines
    strict = structs.replace(engine, parity=structs.replace(engine.parity, gate=IMPOSSIBLE[Precision.FP32]))
    graphs = tuple(structs.replace(graph, gate=IMPOSSIBLE[Precision.FP32]) for graph in manifest.graphs)
    write_manifest(path, structs.replace(manifest, engines=(strict,), graphs=graphs))
    before = contents(path)
    for step in (compile_bundle, verify_bundle):
        with pytest.raises(ParityError, match=r"blocks\.3 has cosine"):
            step(path)
    assert contents(path) == before


def test_verify_measures_what_the_build_measured(cnn, vit, dynamic):
    for result in (cnn, vit, dynamic):
        for report, built in zip(verify_bundle(result.bundle.path), result.reports, strict=True):
            for stage, then in zip(report.stages, built.stages, strict=True):
                assert stage.relative == pytest.approx(then.relative, rel=1e-3)


KINDS = ["graphs/fp32.onnx", "graphs/fp32.ts", "engines/", "golden.npz", "calibration.json"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("place", [0.0, 0.5, 1.0])
def test_verify_notices_one_changed_byte(cnn, int8, copy_of, kind, place):
    path = copy_of(int8 if kind == "calibration.json" else cnn)
    (name,) = {record.path for record in Bundle.open(path).manifest.files() if record.path.startswith(kind)}
    data = bytearray((path / name).read_bytes())
    data[int(place * (len(data) - 1))] ^= 1
    (path / name).write_bytes(data)
    with pytest.raises(IntegrityError, match=f"{Path(name).name} was changed"):
        verify_bundle(path)


def test_verify_notices_a_changed_manifest(cnn, copy_of):
    path = copy_of(cnn) / "manifest.json"
    path.write_bytes(path.read_bytes().replace(b'"max_relative": 0.001', b'"max_relative": 0.901'))
    with pytest.raises(ManifestError, match="was changed after it was written"):
        verify_bundle(path.parent)


def test_verify_asks_for_an_engine_that_can_run(cnn):
    with pytest.raises(EngineMismatchError, match="has no engine 'int8'"):
        verify_bundle(cnn.bundle.path, engine="int8")


DEVICE = """
    import sys
    for name in ("torch", "torchvision", "timm", "transformers", "onnx", "onnx_ir", "onnxscript", "onnxruntime", "PIL"):
        sys.modules[name] = None
    import numpy as np
    from edge_backbones import EdgeBackbone, compile_bundle, verify_bundle
    path = sys.argv[1]
    (engine,) = compile_bundle(path).engines
    (report,) = verify_bundle(path)
    assert report.passed
    with EdgeBackbone.from_pretrained(path) as backbone, np.load(path + "/golden.npz") as golden:
        maps = backbone(golden["opt/image"]).feature_maps
        for stage, actual in zip(backbone.out_features, maps, strict=True):
            np.testing.assert_allclose(actual, golden["opt/" + stage], rtol=1e-3, atol=1e-4)
    print(engine.name)
"""


def test_a_device_without_torch_compiles_verifies_and_runs(vit, copy_of):
    path = copy_of(vit)
    without_engines(path)
    run = subprocess.run(python(DEVICE, path), capture_output=True, text=True, timeout=120, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == vit.bundle.manifest.engines[0].name


class Untrained(nn.Module):
    """Features, and a head that training has not yet moved from zero."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Conv2d(3, 8, 3, 4, 1, bias=False)
        self.head = nn.Conv2d(8, 4, 1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, x):
        x = self.features(x).relu()
        return x, self.head(x)


@pytest.mark.parametrize("precision", [Precision.FP32, Precision.INT8])
def test_a_black_frame_and_a_head_of_zeros_do_not_stop_a_build(precision, photographs, tmp_path):
    frames = networks.crops(photographs, 12, 32, 48)
    frames[0] = 0  # the camera starts with a black frame, which is among the golden images
    torch.manual_seed(0)
    source = ModuleSource(
        module=Untrained(),
        stage_names=["c2", "head"],
        size=(32, 48),
        image=ImageConfig(mean=(0.0,) * 3, std=(1.0,) * 3),
    )
    options = BuildOptions(precisions=(precision,), torchscript=False, cache=None)
    result = build_bundle(source, tmp_path / "net.bundle", images=frames, options=options)
    golden = load_golden(result.bundle)
    assert not golden.outputs["opt"]["c2"][0].any()
    assert golden.outputs["opt"]["c2"][1].any()
    assert [note.partition(" is zero everywhere in the reference")[0] for note in result.notes if "zero" in note] == [
        "head"
    ]
    (report,) = result.reports
    assert {stage.stage: stage.passed for stage in report.stages} == {"c2": True, "head": True}
