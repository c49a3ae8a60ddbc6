"""What goes wrong on the way from a network to a graph, each case against the network's own forward.

A case is exported once, for 1 to 4 images of a size that is not square and mostly not the one that the network was made
for, and run with numbers of images that the exporter has not seen.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import importlib
import math
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import timm
import torch
import transformers
from timm.models.hiera import Hiera
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from transformers import CONFIG_MAPPING, AutoBackbone, ResNetConfig, TimmBackbone, TimmBackboneConfig

from build_scripts.architectures import TRANSFORMERS
from edge_backbones.spec import InputSpec, ShapeRange
from edge_backbones.toolchain.artifacts import LoadedBackbone, PreparedBackbone
from edge_backbones.toolchain.export import export_onnx
from edge_backbones.toolchain.prepare import prepare
from edge_backbones.toolchain.sources.base import SourceOptions
from edge_backbones.toolchain.sources.load import load_source
from edge_backbones.toolchain.sources.module_source import ModuleSource

ROUNDING = 2e-5  # relative
SMALL_RESNET = {"embedding_size": 16, "hidden_sizes": [32, 48, 64, 80], "depths": [1, 1, 1, 1]}
SHALLOW = {"num_hidden_layers": 2, "out_indices": [1, 2]}
SHORT = {"depths": [1, 1, 1, 1]}


def offered(*names: str) -> list[str]:
    """Those that the installed transformers has."""
    return [name for name in names if name.split()[0] in CONFIG_MAPPING]


def trained(net: nn.Module) -> Any:
    """Numbers as training leaves them, in eval mode: nothing is 0 or 1, activations keep their size, positions matter."""
    generator = torch.Generator().manual_seed(0)

    def normal(tensor: torch.Tensor, mean: float = 0.0) -> torch.Tensor:
        return mean + torch.randn(tensor.shape, generator=generator)

    with torch.no_grad():
        for name, tensor in net.named_parameters():
            if "position_emb" in name or "pos_embed" in name:
                tensor.copy_(normal(tensor))
            elif tensor.ndim > 1:
                tensor.copy_(normal(tensor) / math.sqrt(tensor[0].numel()))
            else:
                tensor.copy_(0.2 * normal(tensor, 0.0 if name.endswith("bias") else 4.0))
        for norm in net.modules():
            if isinstance(getattr(norm, "running_var", None), torch.Tensor):  # frozen norms too
                norm.running_mean.copy_(0.3 * normal(norm.running_mean))
                norm.running_var.copy_(torch.rand(norm.running_var.shape, generator=generator) + 0.5)
                norm.weight.copy_(0.3 * normal(norm.weight, 3.0))
                norm.bias.copy_(0.3 * normal(norm.bias))
    return net.eval()


def pixels(height: int, width: int, *, batch: int = 2, channels: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(height + width + batch)
    coarse = nn.functional.interpolate(torch.randn(batch, channels, 4, 5, generator=generator), size=(height, width))
    return coarse + 0.5 * torch.randn(batch, channels, height, width, generator=generator)


def backbone(name: str, **changes: Any) -> Any:
    config = CONFIG_MAPPING[name](**{**TRANSFORMERS[name].arguments, **changes})
    return trained(AutoBackbone.from_config(config))


def over_timm(name: str, **arguments: Any) -> Any:
    config = TimmBackboneConfig(backbone=name, **arguments)
    config.use_pretrained_backbone = False  # 4.44 would download in the constructor
    return trained(TimmBackbone(config))


# ---- the cases ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trap:
    """A network, the image size, and the maps of a batch when the network is called the normal way."""

    net: Any
    height: int
    width: int
    reference: Callable[[torch.Tensor], Any]
    options: SourceOptions
    from_model: bool = False
    source: Any = None


def trap(
    net: Any,
    height: int,
    width: int,
    *,
    reference: Callable[[torch.Tensor], Any] | None = None,
    from_model: bool = False,
    source: Any = None,
    **options: Any,
) -> Trap:
    chosen = SourceOptions(img_size=(height, width), **options)
    return Trap(net, height, width, reference or net, chosen, from_model, source)


def timm_hiera() -> Trap:
    net = trained(Hiera(img_size=(64, 96), embed_dim=32, num_heads=1, stages=(1, 1, 2, 1)))
    reference = functools.partial(net.forward_intermediates, intermediates_only=True)
    return trap(net, 64, 96, reference=reference, out_indices=(0, 1, 2, 3))


def timm_vit() -> Trap:
    net = trained(VisionTransformer(img_size=(64, 96), patch_size=16, embed_dim=48, depth=2, num_heads=3))
    reference = functools.partial(net.forward_intermediates, indices=[0, 1], intermediates_only=True)
    return trap(net, 64, 96, reference=reference, out_indices=(0, 1))


def timm_convnext() -> Trap:
    net = timm.create_model("convnext_atto", features_only=True, out_indices=(1, 0))
    return trap(trained(net), 64, 96)


def experts() -> Trap:
    net = backbone("vitpose_backbone", **SHALLOW, num_experts=3, part_features=16)

    def second(images: torch.Tensor) -> Any:
        return net(images, dataset_index=torch.ones(len(images), dtype=torch.long))

    return trap(net, 96, 64, reference=second, dataset_index=1)


def client(model: Any) -> Trap:
    """The backbone inside a model; where it is depends on the release."""
    modules = dict(trained(model).named_modules())
    places = ("model.backbone.model", "model.backbone.conv_encoder.model")
    part = next(modules[place] for place in places if place in modules)
    return trap(model, 64, 96, reference=part, from_model=True)


def detr(**changes: Any) -> Trap:
    arguments = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "num_queries": 4}
    arguments |= {f"{part}_attention_heads": 2 for part in ("encoder", "decoder")}
    arguments |= {f"{part}_ffn_dim": 16 for part in ("encoder", "decoder")}
    arguments |= {"use_pretrained_backbone": False, **changes}
    return client(transformers.DetrForObjectDetection(transformers.DetrConfig(**arguments)))


def detr_over_resnet() -> Trap:
    config = ResNetConfig(**SMALL_RESNET, out_features=["stage2", "stage3", "stage4"])
    return detr(backbone_config=config, use_timm_backbone=False, backbone=None)


def detr_over_timm() -> Trap:
    return detr(backbone_config=None, use_timm_backbone=True, backbone="resnet10t")


def rt_detr() -> Trap:
    small = {f"{part}_ffn_dim": 16 for part in ("encoder", "decoder")}
    small |= {f"{part}_attention_heads": 2 for part in ("encoder", "decoder")}
    config = transformers.RTDetrConfig(
        backbone_config=transformers.RTDetrResNetConfig(**SMALL_RESNET, out_features=["stage2", "stage3", "stage4"]),
        encoder_in_channels=[48, 64, 80],
        encoder_hidden_dim=16,
        d_model=16,
        decoder_in_channels=[16, 16, 16],
        decoder_layers=1,
        num_queries=4,
        num_denoising=0,
        **small,
    )
    return client(transformers.RTDetrForObjectDetection(config))


CASES: dict[str, Callable[[], Trap]] = {
    "beit": lambda: trap(backbone("beit", **SHALLOW), 64, 96),
    "dinov2": lambda: trap(backbone("dinov2", **SHALLOW), 42, 70),  # smaller than it was made for
    "dinov2_with_registers": lambda: trap(backbone("dinov2_with_registers", **SHALLOW), 64, 112),
    "pixio": lambda: trap(backbone("pixio", **SHALLOW), 64, 96),
    "tipsv2_vision_model": lambda: trap(backbone("tipsv2_vision_model", **SHALLOW), 56, 84),
    "dinov3_vit": lambda: trap(backbone("dinov3_vit", **SHALLOW, return_class_token=True), 64, 96),
    "vitdet": lambda: trap(backbone("vitdet", **SHALLOW, residual_block_indices=[1], window_block_indices=[0]), 64, 96),
    "vitpose_backbone experts": experts,
    "hiera": lambda: trap(backbone("hiera", **SHORT), 96, 128),
    "convnext": lambda: trap(backbone("convnext", **SHORT), 64, 96),
    "dinov3_convnext": lambda: trap(backbone("dinov3_convnext", **SHORT), 64, 96),
    "uvdoc_backbone": lambda: trap(backbone("uvdoc_backbone"), 96, 128),
    "pp_lcnet_v4": lambda: trap(backbone("pp_lcnet_v4", out_indices=[0, 1, 4]), 96, 128),
    "timm_backbone resnet10t frozen": lambda: trap(
        over_timm("resnet10t", out_indices=[1, -1], freeze_batch_norm_2d=True), 64, 96
    ),
    "timm_backbone byobnet frozen": lambda: trap(
        over_timm("test_byobnet", out_indices=[1, -1], freeze_batch_norm_2d=True), 64, 96
    ),
    "timm_backbone mambaout": lambda: trap(over_timm("mambaout_femto", out_indices=[0, 1]), 64, 96),
    "detr over resnet": detr_over_resnet,
    "detr over timm": detr_over_timm,
    "rt_detr": rt_detr,
    "resnet image": lambda: trap(backbone("resnet", **SMALL_RESNET), 64, 96),
    "timm hiera": timm_hiera,
    "timm vit": timm_vit,
    "timm convnext": timm_convnext,
}
CASES = {name: make for name, make in CASES.items() if name.split()[0] in CONFIG_MAPPING or name.split()[0] == "timm"}


def those(*names: str) -> list[str]:
    return [name for name in names if name in CASES]


@dataclass(frozen=True)
class Exported:
    trap: Trap
    loaded: LoadedBackbone
    prepared: PreparedBackbone
    path: Path
    nodes: list[onnx.NodeProto]
    constants: frozenset[str]

    def run(self, images: torch.Tensor) -> dict[str, np.ndarray]:
        session = onnxruntime.InferenceSession(self.path, providers=["CPUExecutionProvider"])
        return dict(zip(self.prepared.spec.outputs, session.run(None, {"pixel_values": images.numpy()}), strict=True))

    @property
    def kinds(self) -> Counter[str]:
        return Counter(node.op_type for node in self.nodes)

    def fed_by(self, kind: str) -> set[str]:
        """Kinds of the nodes that read what a kind of node makes."""
        made = {name for node in self.nodes if node.op_type == kind for name in node.output}
        return {node.op_type for node in self.nodes if made.intersection(node.input)}


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Exported]:
    folder = tmp_path_factory.mktemp("graphs")

    @functools.cache
    def export(name: str) -> Exported:
        case = CASES[name]()
        module = case.net.train()  # as from_config leaves it
        loaded = load_source(module, dataclasses.replace(case.options, from_model=case.from_model))
        module.eval()
        prepared = prepare(loaded, input_spec(case.height, case.width))
        path = export_onnx(prepared, folder / f"{name}.onnx").path
        graph = onnx.load(path).graph
        constants = {tensor.name for tensor in graph.initializer}
        constants |= {name for node in graph.node if node.op_type == "Constant" for name in node.output}
        return Exported(case, loaded, prepared, path, list(graph.node), frozenset(constants))

    return export


def input_spec(height: int, width: int, *, batch: int = 4, channels: int = 3) -> InputSpec:
    return InputSpec(
        name="pixel_values",
        channels=channels,
        batch=ShapeRange(min=1, opt=1, max=batch),
        height=ShapeRange.fixed(height),
        width=ShapeRange.fixed(width),
    )


def maps(output: Any) -> list[np.ndarray]:
    return [feature_map.detach().numpy() for feature_map in getattr(output, "feature_maps", output)]


def assert_same(actual: list[np.ndarray], expected: list[np.ndarray]) -> None:
    for one, reference in zip(actual, expected, strict=True):
        assert one.shape == reference.shape
        assert np.linalg.norm(one - reference) < ROUNDING * np.linalg.norm(reference)


# ---- what every graph computes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("batch", [1, 3])
def test_the_graph_computes_what_the_network_does(name, batch, exported):
    """A batch of 1 as an example would fix it: the exporter sees 2 images."""
    case = exported(name)
    images = pixels(case.trap.height, case.trap.width, batch=batch)
    with torch.no_grad():
        expected = maps(case.trap.reference(images))
    actual, spec = case.run(images), case.prepared.spec
    assert_same([actual[feature] for feature in spec.out_features], expected)
    assert spec.channels == tuple(m.shape[axes.index("C")] for m, axes in zip(expected, spec.layouts, strict=True))
    assert [spec.num_features[i] for i in spec.out_indices] == list(spec.channels)
    assert not any(module.training for module in case.prepared.module.modules())
    for feature_map, axes, strides in zip(expected, spec.layouts, spec.strides, strict=True):
        if "H" in axes:
            cells = [feature_map.shape[axes.index(axis)] for axis in "HW"]
            sizes = (case.trap.height, case.trap.width)
            assert [-(-size // stride) for size, stride in zip(sizes, strides, strict=True)] == cells


# ---- attention ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    those(
        "beit", "dinov2", "dinov2_with_registers", "pixio", "tipsv2_vision_model", "dinov3_vit", "vitdet", "hiera",
        "vitpose_backbone experts", "timm hiera", "timm vit",
    ),
)  # fmt: skip
def test_attention_is_matrix_products_and_softmax(name, exported):
    """Fused attention exports with IsNaN and Where behind every softmax, or not at all (timm's hiera)."""
    case = exported(name)
    assert case.kinds["Softmax"] >= 2
    assert not case.kinds["IsNaN"]
    assert case.fed_by("Softmax") == {"MatMul"}


def test_the_fused_attention_of_the_source_is_left_as_it_was():
    net = trained(VisionTransformer(img_size=(32, 48), patch_size=16, embed_dim=48, depth=1, num_heads=3))
    assert net.blocks[0].attn.fused_attn
    loaded = load_source(net, SourceOptions(img_size=(32, 48)))
    prepare(loaded, input_spec(32, 48))
    assert net.blocks[0].attn.fused_attn
    assert {m.fused_attn for m in loaded.module.modules() if hasattr(m, "fused_attn")} == {True}
    net = backbone("dinov2", **SHALLOW)
    before = copy.deepcopy(net.config.to_dict()), net.config._attn_implementation
    prepare(load_source(net, SourceOptions(img_size=(56, 84))), input_spec(56, 84))
    assert (net.config.to_dict(), net.config._attn_implementation) == before


# ---- position embeddings --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    those(
        "beit", "dinov2", "dinov2_with_registers", "pixio", "tipsv2_vision_model", "dinov3_vit", "vitdet", "hiera",
        "timm hiera", "timm vit",
    ),
)  # fmt: skip
def test_positions_are_constants_of_the_built_size(name, exported):
    assert not exported(name).kinds.keys() & {"Resize", "Upsample", "Sin", "Cos", "GridSample"}


# ---- norms ----------------------------------------------------------------------------------------------------------


def layer_norms(case: Exported) -> int:
    """Norms over channels that a forward of the network runs."""
    seen: list[nn.Module] = []
    modules = [module for module in case.trap.net.modules() if "LayerNorm" in type(module).__name__]
    handles = [module.register_forward_hook(lambda module, *_: seen.append(module)) for module in modules]
    with torch.no_grad():
        case.trap.reference(pixels(case.trap.height, case.trap.width))
    for handle in handles:
        handle.remove()
    return len(seen)


NORMED = those("convnext", "dinov3_convnext", "vitdet", "timm convnext", "timm_backbone mambaout")


@pytest.mark.parametrize("name", NORMED)
def test_norms_over_channels_stay_one_node(name, exported):
    case = exported(name)
    assert case.kinds["LayerNormalization"] == layer_norms(case) > 2
    assert not case.kinds.keys() & {"ReduceMean", "Pow", "Sqrt", "Reciprocal"}


@pytest.mark.parametrize("name", NORMED)
def test_tensorrt_sees_norms(name, exported):
    trt = pytest.importorskip("tensorrt_rtx_bindings", reason="the 'rtx' extra is not installed", exc_type=ImportError)

    class Log(trt.ILogger):  # type: ignore[misc,name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.Logger.INTERNAL_ERROR, trt.Logger.ERROR):
                self.errors.append(message)

    case, log = exported(name), tensorrt_log(Log)
    network = trt.Builder(log).create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    assert trt.OnnxParser(network, log).parse_from_file(str(case.path)), log.errors
    kinds = Counter(network.get_layer(index).type.name for index in range(network.num_layers))
    assert kinds["NORMALIZATION"] == layer_norms(case)


@functools.cache
def tensorrt_log(kind: Any) -> Any:
    """TensorRT keeps the first logger of a process and warns about others."""
    return kind()


# ---- frozen batch norm ----------------------------------------------------------------------------------------------

FROZEN = those(
    "detr over resnet", "detr over timm", "rt_detr", "timm_backbone resnet10t frozen", "timm_backbone byobnet frozen"
)


@pytest.mark.parametrize("name", FROZEN)
def test_frozen_batch_norm_is_folded_into_convolutions(name, exported):
    case = exported(name)
    frozen = [m for m in case.loaded.module.modules() if "FrozenBatchNorm" in type(m).__name__]
    assert frozen
    assert (case.prepared.folded_batch_norms, case.prepared.kept_batch_norms) == (len(frozen), 0)
    assert not case.kinds["BatchNormalization"]
    scales = [
        n for n in case.nodes if n.op_type in ("Mul", "Add", "Sub", "Div") and case.constants.intersection(n.input)
    ]
    assert not scales


def frozen_classes() -> list[str]:
    """torchvision's, timm's, and that of every model of transformers which has one: found in the source."""
    found = ["torchvision.ops.FrozenBatchNorm2d", "timm.layers.FrozenBatchNormAct2d"]
    for path in sorted((Path(transformers.__file__).parent / "models").glob("*/modeling_*.py")):
        for name in re.findall(r"^class (\w*FrozenBatchNorm2d)\(", path.read_text(encoding="utf-8"), re.MULTILINE):
            found.append(f"transformers.models.{path.parent.name}.{path.stem}.{name}")
    return found


class Net(nn.Module):
    """Two convolutions, each with a frozen norm."""

    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        self.first, self.first_norm = nn.Conv2d(3, 8, 3, bias=False), kind(8)
        self.second, self.second_norm = nn.Conv2d(8, 4, 3), kind(4)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x = self.first_norm(self.first(x)).relu()
        return (self.second_norm(self.second(x)),)


@pytest.mark.parametrize("path", frozen_classes())
def test_every_frozen_batch_norm_is_folded(path):
    module, _, name = path.rpartition(".")
    kind = getattr(importlib.import_module(module), name)
    net, images = trained(Net(kind)), pixels(12, 16)
    for norm in net.modules():
        if isinstance(norm, kind):
            norm.running_var.mul_(1e-4)  # eps matters
    with torch.no_grad():
        expected = maps(net(images))
    loaded = load_source(ModuleSource(module=net, stage_names=["out"], size=(12, 16)), SourceOptions())
    prepared = prepare(loaded, input_spec(12, 16))
    assert (prepared.folded_batch_norms, prepared.kept_batch_norms) == (2, 0)
    with torch.no_grad():
        assert_same(maps(prepared.module(images)), expected)
    kinds = {type(module) for module in prepared.module.modules()}
    assert not kinds & {kind, nn.BatchNorm2d}


# ---- train mode -----------------------------------------------------------------------------------------------------


class Dropping(nn.Module):
    """What behaves differently in training, inside of a container."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Dropout(0.5)])

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        for layer in self.layers:
            x = layer(x)
        return (x,)


def test_a_module_in_train_mode_is_exported_as_it_works_afterwards(tmp_path):
    net, images = trained(Dropping()), pixels(32, 48, batch=3)
    with torch.no_grad():
        expected = maps(net(images))
    net.train()
    loaded = load_source(ModuleSource(module=net, stage_names=["out"], size=(32, 48)), SourceOptions())
    path = export_onnx(prepare(loaded, input_spec(32, 48)), tmp_path / "net.onnx").path
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    assert_same(session.run(None, {"pixel_values": images.numpy()}), expected)
    assert {node.op_type for node in onnx.load(path).graph.node} == {"Conv"}
    assert all(module.training for module in net.modules())


# ---- channels and stages --------------------------------------------------------------------------------------------


if {"uvdoc_backbone", "pp_lcnet_v4"} <= CASES.keys():

    @pytest.mark.parametrize("name", ["uvdoc_backbone", "pp_lcnet_v4"])
    def test_channels_that_the_library_gets_wrong_are_measured(name, exported):
        case = exported(name)
        assert list(case.prepared.spec.channels) != list(case.trap.net.channels)  # else there is nothing to correct
        assert case.prepared.spec.channels == case.loaded.spec.channels


def test_stages_asked_out_of_order_come_in_order(exported):
    spec = exported("timm convnext").prepared.spec
    assert (spec.out_features, spec.out_indices) == (("stages.0", "stages.1"), (0, 1))
    assert spec.strides == ((4, 4), (8, 8))
    assert spec.channels == (40, 80)
