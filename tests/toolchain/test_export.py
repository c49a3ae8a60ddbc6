"""Exported files compute what the network computes, in every form of input, and hold nothing of this machine."""

from __future__ import annotations

import dataclasses
import getpass
from pathlib import Path

import networks
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from edge_backbones.errors import ExportError, SourceError
from edge_backbones.spec import Precision
from edge_backbones.toolchain.export import (
    OPSET,
    check_onnx,
    check_torchscript,
    export_onnx,
    export_torchscript,
    golden_samples,
    zero_stages,
)
from edge_backbones.toolchain.prepare import prepare
from edge_backbones.toolchain.trace import trace_torchscript

ROUNDING = 1e-5
SMALLER = {
    "nf_regnet_b0": {"out_indices": (1,)},
    "resnetv2_50x1_bit": {"out_indices": (1,)},
    "swinv2_tiny_window8_256": {"out_indices": (0,), "img_size": (64, 64)},
}


def run(path: Path, array: np.ndarray) -> list[np.ndarray]:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: array})


def assert_same_maps(actual, expected) -> None:
    for one, reference in zip(actual, expected, strict=True):
        assert networks.relative(one, reference) < ROUNDING


class Case:
    """A network, prepared and exported once."""

    def __init__(self, folder: Path, name: str, spec, **options) -> None:
        self.loaded = networks.trained_like(name, **options)
        self.prepared = prepare(self.loaded, spec)
        self.graph = export_onnx(self.prepared, folder / f"{name}.onnx")
        self.model = onnx.load(self.graph.path)

    def expected(self, pixel_values: np.ndarray) -> list[np.ndarray]:
        return networks.maps_of(self.loaded.module, pixel_values)


@pytest.fixture(scope="module")
def fixed(tmp_path_factory) -> Case:
    folder = tmp_path_factory.mktemp("fixed")
    return Case(folder, "test_efficientnet", networks.input_spec(64, 96, batch=2), out_indices=(1, 3))


@pytest.fixture(scope="module")
def dynamic(tmp_path_factory) -> Case:
    spec = networks.input_spec((64, 96, 160), (32, 64, 128), batch=(1, 1, 8), size_multiple=32)
    return Case(tmp_path_factory.mktemp("dynamic"), "test_resnet", spec, out_indices=(1, 4))


@pytest.fixture(scope="module")
def camera(tmp_path_factory) -> Case:
    spec = networks.input_spec(64, 96, batch=(1, 2, 4), name="image")
    return Case(tmp_path_factory.mktemp("camera"), "test_vit", spec, img_size=(64, 96), out_indices=(0, 5))


# ---- the graph ------------------------------------------------------------------------------------------------------


def test_a_static_graph_computes_the_loaded_network(fixed, photographs):
    images = networks.normalised(networks.crops(photographs, 2, 64, 96))
    assert_same_maps(run(fixed.graph.path, images), fixed.expected(images))


def test_input_and_outputs_are_named(fixed, camera):
    assert [value.name for value in fixed.model.graph.input] == ["pixel_values"]
    assert [value.name for value in fixed.model.graph.output] == ["blocks.1", "blocks.3"]
    assert [value.name for value in camera.model.graph.input] == ["image"]
    assert [value.name for value in camera.model.graph.output] == ["blocks.0", "blocks.5"]
    for case in (fixed, camera):
        assert [value.version for value in case.model.opset_import if value.domain == ""] == [OPSET]


def test_nodes_are_named_after_the_modules_they_come_from(fixed, camera):
    for case in (fixed, camera):
        names = [node.name for node in case.model.graph.node]
        assert len(set(names)) == len(names)
        modules = dict(case.loaded.module.net.named_modules())
        layers = [
            n.name for n in case.model.graph.node if n.op_type == "Conv" or n.input[-1].endswith(("weight", "bias"))
        ]
        assert len(layers) > 5
        assert all(name.partition("/")[0] in {key.removeprefix("model.") for key in modules} for name in layers)
    assert {"conv_stem/Conv", "blocks.1.0.conv_exp/Conv"} <= {node.name for node in fixed.model.graph.node}
    assert {"blocks.5.attn.qkv/MatMul", "blocks.0.mlp.fc1/MatMul"} <= {node.name for node in camera.model.graph.node}


def test_no_batch_norm_is_left_where_folding_is_possible(fixed, dynamic):
    for case in (fixed, dynamic):
        assert case.prepared.folded_batch_norms > 5
        kinds = {node.op_type for node in case.model.graph.node}
        assert "Conv" in kinds
        assert "BatchNormalization" not in kinds


@pytest.mark.parametrize("name", ["nf_regnet_b0", "resnetv2_50x1_bit", "swinv2_tiny_window8_256"])
def test_what_depends_on_no_image_is_a_constant(name, tmp_path):
    """Standardised weights: int8 quantises constants only. Tables of relative positions: small networks of their own."""
    case = Case(tmp_path, name, networks.input_spec(64, 64, batch=(1, 2, 4)), **SMALLER[name])
    images = np.random.default_rng(0).standard_normal((2, 3, 64, 64)).astype(np.float32)
    assert_same_maps(run(case.graph.path, images), case.expected(images))
    stored = {tensor.name for tensor in case.model.graph.initializer}
    assert [n.name for n in case.model.graph.node if n.op_type in ("Conv", "Gemm") and n.input[1] not in stored] == []
    known = set(stored)
    for node in case.model.graph.node:
        if all(name in known for name in node.input if name):
            known.update(node.output)
    assert [n.op_type for n in case.model.graph.node if n.op_type != "Constant" and known.issuperset(n.output)] == []


def test_weights_behind_the_last_kept_stage_are_not_in_the_file(fixed):
    stored = sum(int(np.prod(tensor.dims)) for tensor in fixed.model.graph.initializer)
    net = fixed.loaded.module.net
    whole, behind = (sum(p.numel() for p in module.parameters()) for module in (net, net.blocks[4]))
    assert behind > 0.3 * whole
    assert stored <= whole - behind


def test_nothing_of_this_machine_is_in_the_file(fixed):
    text = fixed.graph.path.read_bytes()
    here = [str(Path(torch.__file__).parent), str(Path(__file__).parent), str(Path.home()), "site-packages", ".py"]
    assert not [name for name in here if name.encode() in text]
    assert getpass.getuser() == "root" or getpass.getuser().encode() not in text
    graph = fixed.model.graph
    for item in (fixed.model, graph, *graph.node, *graph.input, *graph.output, *graph.initializer, *graph.value_info):
        assert not item.doc_string
        assert not item.metadata_props


def test_the_same_network_gives_the_same_bytes(fixed, tmp_path):
    again = Case(tmp_path, "test_efficientnet", networks.input_spec(64, 96, batch=2), out_indices=(1, 3))
    assert again.graph.path.read_bytes() == fixed.graph.path.read_bytes()


@pytest.mark.parametrize("shape", [(1, 64, 32), (3, 96, 64), (2, 160, 128), (8, 64, 96)])
def test_a_dynamic_graph_takes_every_batch_and_size(dynamic, photographs, shape):
    images = networks.normalised(networks.crops(photographs, *shape))
    assert_same_maps(run(dynamic.graph.path, images), dynamic.expected(images))


def test_dynamic_axes_are_named_and_no_others(fixed, dynamic, camera):
    def axes(case: Case) -> list[bool]:
        return [bool(axis.dim_param) for axis in case.model.graph.input[0].type.tensor_type.shape.dim]

    assert axes(fixed) == [False, False, False, False]
    assert axes(dynamic) == [True, False, True, True]
    assert axes(camera) == [True, False, False, False]


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_camera_frames_are_normalised_in_the_graph(camera, photographs, batch):
    frames = networks.crops(photographs, batch, 64, 96)
    expected = camera.expected(networks.normalised(frames, camera.loaded.image_config))
    assert_same_maps(run(camera.graph.path, frames), expected)


def test_frames_are_cast_before_they_are_transposed(camera):
    order = [node.op_type for node in camera.model.graph.node if node.op_type in ("Cast", "Transpose")]
    assert order.index("Cast") < order.index("Transpose")
    assert camera.model.graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.UINT8


def test_a_transformer_of_fixed_size_says_that_its_size_cannot_vary(tmp_path):
    prepared = prepare(
        networks.trained_like("test_vit3", img_size=(64, 96)),
        networks.input_spec((32, 64, 96), (64, 96, 128), size_multiple=16),
    )
    with pytest.raises(ExportError, match=r"build it for a fixed size: --size 64x96"):
        export_onnx(prepared, tmp_path / "x.onnx")
    assert not (tmp_path / "x.onnx").exists()


class Does(torch.nn.Module):
    """A network whose forward is the function that it was given."""

    def __init__(self, does) -> None:
        super().__init__()
        self.does = does

    def forward(self, x):
        return (self.does(x),)


def fails(error):
    def does(x):
        raise error

    return does


REFUSED = {
    "a size that is fixed": (
        lambda x: x.reshape(2, 3, -1),
        "this network is of a fixed size: its code computes with the batch 2 and the bundle is asked for ",
    ),
    "sizes that take another way": (
        lambda x: x if x.shape[0] > 3 else x * 2,
        "Not all values of batch = L['x'].size()[0] in the specified range batch <= 4 satisfy the generated guard",
    ),
    "values that decide": (lambda x: x if x.sum() > 0 else -x, "Could not guard on data-dependent expression"),
    "an operation without a form in ONNX": (
        torch.special.bessel_j0,
        "No ONNX function found for <OpOverload(op='prims.bessel_j0', overload='default')>",
    ),
    "channels": (lambda x: torch.conv2d(x, torch.ones(3, 5, 1, 1)), "to have 5 channels, but got 3 channels instead"),
    "a key": (fails(KeyError("stem")), "with any batch >= 1: KeyError: 'stem'; "),
    "an assertion": (fails(AssertionError()), ": AssertionError; "),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_network_that_cannot_be_exported_is_refused_with_the_cause(case, fixed, tmp_path):
    does, said = REFUSED[case]
    spec = networks.input_spec(8, 8, batch=(1, 2, 4))
    prepared = dataclasses.replace(fixed.prepared, module=Does(does).eval(), input=spec)
    with pytest.raises(ExportError) as caught:
        export_onnx(prepared, tmp_path / "x.onnx")
    message = str(caught.value)
    assert said in message
    assert "\n" not in message
    assert "For more information" not in message
    assert "Failed to convert" not in message


@pytest.mark.parametrize("case", ["channels", "a key", "an assertion"])
def test_a_network_that_cannot_be_traced_is_refused_with_the_cause(case):
    """Whatever its code raises."""
    does, said = REFUSED[case]
    with pytest.raises(ExportError, match="cannot be traced as TorchScript in fp32 ") as caught:
        trace_torchscript(Does(does).eval(), networks.input_spec(8, 8), Precision.FP32)
    assert said.strip(": ;").rpartition(">= 1: ")[2] in str(caught.value)


def test_a_graph_that_onnx_runtime_does_not_take_is_refused(fixed, tmp_path):
    model = onnx.load(fixed.graph.path)
    model.graph.node[0].op_type = "NoSuchOp"
    onnx.save(model, tmp_path / "x.onnx")
    with pytest.raises(
        ExportError, match=r"ONNX Runtime does not load the exported graph: .*No Op registered for NoSuchOp"
    ):
        check_onnx(dataclasses.replace(fixed.graph, path=tmp_path / "x.onnx"), {})


# ---- TorchScript ----------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*torch.jit.load:FutureWarning")  # deprecated in Python; libtorch reads the file
@pytest.mark.parametrize("case", ["fixed", "camera"])
def test_torchscript_computes_the_loaded_network(case, request, photographs, tmp_path):
    case = request.getfixturevalue(case)
    export_torchscript(case.prepared, tmp_path / "fp32.ts")
    frames = networks.crops(photographs, 2, 64, 96)
    images = networks.normalised(frames, case.loaded.image_config)
    script = torch.jit.load(tmp_path / "fp32.ts")
    assert_same_maps(
        networks.maps_of(script, frames if case.graph.input.name == "image" else images), case.expected(images)
    )


def test_a_wrong_torchscript_module_is_refused_naming_the_stage(fixed, photographs, tmp_path):
    export_torchscript(fixed.prepared, tmp_path / "fp32.ts")
    images = networks.normalised(networks.crops(photographs, 3, 64, 96))
    golden = golden_samples(fixed.loaded, fixed.graph.input, {"opt": images})
    check_torchscript(tmp_path / "fp32.ts", fixed.prepared, golden)
    golden.outputs["opt"]["blocks.1"][2] *= 1.01
    with pytest.raises(ExportError, match=r"the exported TorchScript module is wrong: blocks\.1 differs"):
        check_torchscript(tmp_path / "fp32.ts", fixed.prepared, golden)


# ---- golden samples -------------------------------------------------------------------------------------------------


def test_golden_maps_are_those_of_the_loaded_network(camera, photographs):
    frames = networks.crops(photographs, 3, 64, 96)
    golden = golden_samples(camera.loaded, camera.graph.input, {"opt": frames})
    assert golden.input_name == "image"
    assert list(golden.outputs["opt"]) == ["blocks.0", "blocks.5"]
    np.testing.assert_array_equal(golden.inputs["opt"], frames)
    expected = camera.expected(networks.normalised(frames, camera.loaded.image_config))
    assert_same_maps([golden.outputs["opt"]["blocks.0"], golden.outputs["opt"]["blocks.5"]], expected)


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_a_right_graph_passes_whatever_the_number_of_images(fixed, photographs, count):
    images = networks.normalised(networks.crops(photographs, count, 64, 96))
    check_onnx(fixed.graph, golden_samples(fixed.loaded, fixed.graph.input, {"opt": images}))


@pytest.mark.parametrize("image", [0, 2])
def test_a_wrong_graph_is_refused_naming_the_stage(fixed, photographs, image):
    images = networks.normalised(networks.crops(photographs, 3, 64, 96))
    golden = golden_samples(fixed.loaded, fixed.graph.input, {"opt": images})
    golden.outputs["opt"]["blocks.3"][image] *= 1.01
    with pytest.raises(ExportError, match=r"is wrong: blocks\.3 differs from the network by 9\.9e-03 relative"):
        check_onnx(fixed.graph, golden)


class Dead(nn.Module):
    """A live map that is zero for a black frame, and a branch that is not yet trained."""

    def __init__(self) -> None:
        super().__init__()
        self.live = nn.Conv2d(3, 4, 3, 2, 1, bias=False)
        self.dead = nn.Conv2d(4, 2, 1)
        nn.init.zeros_(self.dead.weight)
        nn.init.zeros_(self.dead.bias)

    def forward(self, x):
        first = self.live(x).relu()
        return first, self.dead(first)


@pytest.fixture
def dead(tmp_path):
    torch.manual_seed(0)
    loaded = networks.hand_made(Dead(), stages=2)
    return loaded, export_onnx(prepare(loaded, networks.input_spec(32, 48, batch=2)), tmp_path / "net.onnx")


def test_zero_maps_are_right_where_the_graph_gives_zeros(dead, photographs):
    loaded, graph = dead
    images = networks.normalised(networks.crops(photographs, 3, 32, 48))
    images[0] = 0
    golden = golden_samples(loaded, graph.input, {"opt": images})
    assert not golden.outputs["opt"]["stage0"][0].any()
    check_onnx(graph, golden)
    assert zero_stages(golden, graph.spec.outputs) == ["stage1"]
    golden.outputs["opt"]["stage0"][0] = 1e-3 * golden.outputs["opt"]["stage0"][1]  # weak, and not what the graph gives
    with pytest.raises(ExportError, match=r"stage0 differs from the network by 1\.0e\+00 relative"):
        check_onnx(graph, golden)


def test_a_reference_that_is_not_finite_is_refused_naming_the_image(dead, photographs):
    loaded, graph = dead
    images = networks.normalised(networks.crops(photographs, 3, 32, 48))
    loaded.module.live.weight.data *= 1e10
    images[1] *= 1e35
    with pytest.raises(
        SourceError, match=r"stage0 of the network itself is not finite on image 2 of 3 golden images \(opt"
    ):
        golden_samples(loaded, graph.input, {"opt": images})


class Coordinates(nn.Module):
    """A grid that is made once per size, as CoordConv and heads of detectors keep it."""

    def __init__(self, *, cuts: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, 4, 1)
        self.grid = None
        self.cuts = cuts

    def forward(self, x):
        x = self.conv(x)
        height, width = x.shape[-2:]
        if self.grid is None or self.grid.shape[-2:] != x.shape[-2:]:
            self.grid = torch.linspace(-1, 1, height * width).view(1, 1, height, width)
        return (
            x * (self.grid[..., :1, :1] if self.cuts else self.grid) + (self.grid.mean() + height if self.cuts else 0),
        )


@pytest.mark.parametrize("cuts", [True, False])  # wrong at another size, or an error there
def test_a_table_for_one_size_asks_for_a_fixed_size(cuts, tmp_path, photographs):
    input = networks.input_spec((16, 32, 64), (16, 32, 64), size_multiple=4)
    loaded = networks.hand_made(Coordinates(cuts=cuts))
    cases = {size: networks.normalised(networks.crops(photographs, 1, n, n)) for size, n in (("opt", 32), ("max", 64))}
    with pytest.raises(ExportError, match=r"--size 32x32 \(height=32, width=32\)$"):
        graph = export_onnx(prepare(loaded, input), tmp_path / "net.onnx")
        check_onnx(graph, golden_samples(loaded, input, cases))
    fixed = networks.input_spec(32, 32)
    graph = export_onnx(prepare(loaded, fixed), tmp_path / "fixed.onnx")
    check_onnx(graph, golden_samples(loaded, fixed, {"opt": cases["opt"]}))
