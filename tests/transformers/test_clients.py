"""A bundle in the place of a backbone: every client of transformers, the module itself, and what is refused."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from clients import CLIENTS, Client, relative, tensors, trained_like
from safetensors.torch import load_file
from torch import nn

from edge_backbones import Bundle, EdgeBackbone
from edge_backbones.errors import (
    BundleError,
    ClientMismatchError,
    EdgeBackbonesError,
    EngineMismatchError,
    InputError,
    SourceError,
)
from edge_backbones.integrations.clients import find_backbone
from edge_backbones.integrations.transformers import EdgeBackboneModule, replace_backbone
from edge_backbones.spec import ShapeRange

# What the oldest supported release of transformers does that newer releases of torch warn of.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning"),
]

TOLERANCE = 1e-3
RESNET = {
    "embedding_size": 8,
    "hidden_sizes": [8, 16, 24, 32],
    "depths": [1, 1, 1, 1],
    "layer_type": "basic",
    "out_features": ["stage2", "stage3", "stage4"],
}


def engine_of(model: nn.Module) -> EdgeBackboneModule:
    (found,) = (module for module in model.modules() if isinstance(module, EdgeBackboneModule))
    return found


@contextmanager
def calls_of(module: nn.Module) -> Iterator[list[torch.Tensor]]:
    """The images that a module is called with."""
    seen: list[torch.Tensor] = []
    handle = module.register_forward_hook(lambda _module, arguments, _output: seen.append(arguments[0]))
    try:
        yield seen
    finally:
        handle.remove()


def swapped(client: Client, bundle: Path, **options: Any) -> Any:
    model = copy.deepcopy(client.model)
    replace_backbone(model, bundle, **options)
    return model


# ---- clients --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CLIENTS)
def test_client_gives_the_same_outputs(
    name: str, client_of: Callable[[str], Client], bundle_of: Callable[..., Path]
) -> None:
    client = client_of(name)
    images = client.images(1)
    expected, different = tensors(client(images)), tensors(client(client.images(2)))
    model = copy.deepcopy(client.model)
    place = find_backbone(model)

    original = replace_backbone(model, bundle_of(name))
    with calls_of(engine_of(model)) as calls:
        actual = tensors(client(images, model))

    assert len(calls) == 1
    assert original is place.module
    assert model.get_submodule(place.path) is engine_of(model)
    assert actual.keys() == expected.keys()
    assert {path: relative(actual[path], expected[path]) for path in expected} == {
        path: pytest.approx(0, abs=TOLERANCE) for path in expected
    }
    main = [path for path in expected if path.split(".")[1] == client.main]
    assert main
    assert all(
        relative(different[path], expected[path]) > 10 * TOLERANCE for path in main
    )  # it is the image that counts

    inside = f"{place.path}."
    kept = [key for key in client.model.state_dict() if not key.startswith(inside)]
    assert list(model.state_dict()) == kept
    assert not any(key.startswith(inside) for key, _ in model.named_parameters())
    assert len(kept) < len(client.model.state_dict())


@pytest.mark.parametrize("name", ["detr_timm", "upernet"])
def test_saved_client_holds_no_backbone(
    name: str, client_of: Callable[[str], Client], bundle_of: Callable[..., Path], tmp_path: Path
) -> None:
    client = client_of(name)
    model = swapped(client, bundle_of(name))
    path = find_backbone(model).path

    model.save_pretrained(tmp_path)

    written = load_file(tmp_path / "model.safetensors")
    expected = {k: v for k, v in client.model.state_dict().items() if not k.startswith(f"{path}.")}
    # By value: transformers 5 writes some tensors under the names of older checkpoints, and tied ones once.
    assert len(written) <= len(expected)
    for values, among in ((written, expected), (expected, written)):
        for value in values.values():
            assert any(value.shape == other.shape and torch.equal(value, other) for other in among.values())
    assert type(client.model).config_class.from_pretrained(tmp_path).model_type == client.model.config.model_type


def test_client_takes_batches_that_the_engine_was_not_built_for(
    client_of: Callable[[str], Client], bundle_of: Callable[..., Path]
) -> None:
    client = client_of("upernet")
    model = swapped(client, bundle_of("upernet", hidden_states=True))
    images = torch.cat([client.images(seed) for seed in (1, 2, 3)])
    for batch in (1, 3, 6):
        assert relative(client(images[:batch], model).logits, client(images[:batch]).logits) < TOLERANCE


def test_client_takes_every_size_of_a_range(client_of: Callable[[str], Client], build: Callable[..., Path]) -> None:
    client = client_of("detr")
    size = ShapeRange(min=64, opt=96, max=128)
    bundle = build(client.model, from_model=True, batch=ShapeRange(min=1, opt=2, max=4), height=size, width=size)
    model = swapped(client, bundle)
    for height, width in ((64, 128), (96, 96), (128, 64)):
        images = nn.functional.interpolate(client.images(1), size=(height, width))
        assert relative(client(images, model).logits, client(images).logits) < TOLERANCE
    with pytest.raises(InputError, match=re.escape("64..128")):
        client(torch.zeros(1, 3, 160, 64), model)


def test_pixel_mask_still_counts(client_of: Callable[[str], Client], bundle_of: Callable[..., Path]) -> None:
    client = client_of("detr_timm")
    model = swapped(client, bundle_of("detr_timm"))
    images, mask = client.images(1), torch.ones(2, 64, 96, dtype=torch.long)
    mask[0, :, 48:] = 0
    expected = client(images, pixel_mask=mask).logits
    assert relative(client(images, model, pixel_mask=mask).logits, expected) < TOLERANCE
    assert relative(client(images, model).logits, expected) > 10 * TOLERANCE


def test_hidden_states_reach_the_caller(client_of: Callable[[str], Client], bundle_of: Callable[..., Path]) -> None:
    client = client_of("upernet")
    model = swapped(client, bundle_of("upernet", hidden_states=True))
    images = client.images(1)
    expected = client(images, output_hidden_states=True).hidden_states
    actual = client(images, model, output_hidden_states=True).hidden_states
    assert len(actual) == len(expected) == 5
    assert all(relative(a, e) < TOLERANCE for a, e in zip(actual, expected, strict=True))
    assert client(images, model).hidden_states is None


def test_client_in_bfloat16(client_of: Callable[[str], Client], bundle_of: Callable[..., Path]) -> None:
    client = client_of("upernet")
    model = swapped(client, bundle_of("upernet", hidden_states=True)).to(torch.bfloat16)
    images = client.images(1)
    with calls_of(engine_of(model)) as calls:
        logits = client(images.bfloat16(), model).logits
    assert calls[0].dtype == logits.dtype == torch.bfloat16
    assert relative(logits.float(), client(images).logits) < 0.1


def test_client_of_bfloat16_is_swapped(client_of: Callable[[str], Client], bundle_of: Callable[..., Path]) -> None:
    client = client_of("upernet")
    model = copy.deepcopy(client.model).to(torch.bfloat16)
    replace_backbone(model, bundle_of("upernet", hidden_states=True))
    assert client(client.images(1).bfloat16(), model).logits.dtype == torch.bfloat16


def test_copy_of_a_swapped_client_shares_the_engine(
    client_of: Callable[[str], Client], bundle_of: Callable[..., Path]
) -> None:
    client = client_of("detr")
    model = swapped(client, bundle_of("detr"))
    twin = copy.deepcopy(model)
    images = client.images(1)
    assert torch.equal(client(images, twin).logits, client(images, model).logits)
    assert engine_of(twin) is not engine_of(model)
    assert engine_of(twin).backbone._engine is engine_of(model).backbone._engine

    engine_of(twin).out_features = ["stage4"]
    assert engine_of(model).out_features == ["stage2", "stage3", "stage4"]
    with torch.no_grad():
        next(twin.class_labels_classifier.parameters()).zero_()
    assert torch.equal(client(images, model).logits, client(images, swapped(client, bundle_of("detr"))).logits)


@pytest.mark.parametrize("training", [True, False])
def test_modes_are_kept(training: bool, client_of: Callable[[str], Client], bundle_of: Callable[..., Path]) -> None:
    model = copy.deepcopy(client_of("detr").model).train(training)
    frozen = find_backbone(model).module
    next(m for m in frozen.modules() if isinstance(m, nn.ReLU)).train(not training)  # one part is in another mode
    modes = {name: module.training for name, module in model.named_modules()}
    original = replace_backbone(model, bundle_of("detr"))
    assert {n: m.training for n, m in model.named_modules()} == {n: modes[n] for n, _ in model.named_modules()}
    path = find_backbone(model).path
    assert {f"{path}.{n}".rstrip("."): m.training for n, m in original.named_modules()} == {
        name: mode for name, mode in modes.items() if f"{name}.".startswith(f"{path}.")
    }
    model.train(not training)
    assert engine_of(model).training is not training


def test_heads_train_beside_an_engine(client_of: Callable[[str], Client], bundle_of: Callable[..., Path]) -> None:
    client = client_of("upernet")
    model = swapped(client, bundle_of("upernet", hidden_states=True)).train()
    labels = torch.zeros(2, 64, 96, dtype=torch.long)
    model(pixel_values=client.images(1), labels=labels).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_original_goes_back(client_of: Callable[[str], Client], bundle_of: Callable[..., Path]) -> None:
    client = client_of("upernet")
    model = copy.deepcopy(client.model)
    model.backbone = replace_backbone(model, bundle_of("upernet", hidden_states=True))
    images = client.images(1)
    assert torch.equal(client(images, model).logits, client(images).logits)


def test_engine_is_replaced_by_another(
    client_of: Callable[[str], Client], bundle_of: Callable[..., Path], build: Callable[..., Path]
) -> None:
    client = client_of("detr_timm")
    model = swapped(client, bundle_of("detr_timm"))
    wider = build(client.model, from_model=True, width=160)
    images = nn.functional.interpolate(client.images(1), size=(64, 160))
    expected = client(images).logits
    with pytest.raises(ClientMismatchError, match="64"):
        replace_backbone(model, wider)  # it is compared on an image of the new size, which the old engine does not take

    same_size = build(client.model, from_model=True, batch=1)
    first = replace_backbone(model, same_size)
    assert isinstance(first, EdgeBackboneModule)
    assert engine_of(model) is not first
    assert engine_of(model).as_list == first.as_list
    assert relative(client(client.images(1), model).logits, client(client.images(1)).logits) < TOLERANCE
    assert expected.shape[0] == 2


def test_other_weights_on_purpose(client_of: Callable[[str], Client], build: Callable[..., Path]) -> None:
    client = client_of("detr")
    other = copy.deepcopy(client.model)
    place = find_backbone(other)
    trained_like(place.module, seed=5)
    model = swapped(client, build(place.module), same_weights=False)
    images = client.images(1)
    assert relative(client(images, model).logits, client(images, other).logits) < TOLERANCE
    assert relative(client(images, model).logits, client(images).logits) > 10 * TOLERANCE


# ---- the module -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def swin(client_of: Callable[[str], Client]) -> Any:
    """The backbone inside of the UperNet."""
    return client_of("upernet").model.backbone


@pytest.fixture
def module(bundle_of: Callable[..., Path]) -> EdgeBackboneModule:
    return EdgeBackboneModule(EdgeBackbone.from_pretrained(bundle_of("upernet", hidden_states=True)))


@pytest.fixture
def images(client_of: Callable[[str], Client]) -> torch.Tensor:
    return client_of("upernet").images(1)


def test_module_has_no_state(module: EdgeBackboneModule) -> None:
    assert not list(module.parameters())
    assert not list(module.buffers())
    assert not list(module.children())
    assert module.state_dict() == {}
    module.load_state_dict({})
    assert module.to(torch.float16) is module
    assert "stage4" in repr(module)


def test_module_answers_like_the_backbone(module: EdgeBackboneModule, swin: Any, images: torch.Tensor) -> None:
    for name in ("stage_names", "out_features", "channels", "num_features", "out_feature_channels"):
        assert getattr(module, name) == getattr(swin, name), name
    assert list(module.out_indices) == list(swin.out_indices)
    for name in ("patch_size", "embed_dim", "hidden_size", "window_size"):
        assert getattr(module.config, name) == getattr(swin.config, name), name
    with torch.no_grad():
        expected = swin(images)
    actual = module(images)
    assert isinstance(actual, transformers.modeling_outputs.BackboneOutput)
    assert list(actual.keys()) == list(expected.keys()) == ["feature_maps"]
    assert isinstance(actual.feature_maps, tuple)
    for a, e in zip(actual.feature_maps, expected.feature_maps, strict=True):
        assert relative(a, e) < TOLERANCE
        assert not a.requires_grad
        assert a.is_contiguous()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_maps_have_the_dtype_of_the_images(
    dtype: torch.dtype, module: EdgeBackboneModule, images: torch.Tensor
) -> None:
    images = images.to(dtype)
    expected = module(images.float(), output_hidden_states=True)
    actual = module(images, output_hidden_states=True)
    for a, e in zip(tensors(actual).values(), tensors(expected).values(), strict=True):
        assert a.dtype == dtype
        assert torch.equal(a, e.to(dtype))


def test_images_of_other_strides_and_views(module: EdgeBackboneModule, images: torch.Tensor) -> None:
    expected = module(images).feature_maps
    for same in (
        images.contiguous(memory_format=torch.channels_last),
        images.flip(0).flip(0),
        images.repeat(2, 1, 1, 1)[:2],
    ):
        assert all(torch.equal(a, e) for a, e in zip(module(same).feature_maps, expected, strict=True))


def test_maps_are_the_callers(module: EdgeBackboneModule, images: torch.Tensor) -> None:
    first = module(images).feature_maps
    kept = [feature_map.clone() for feature_map in first]
    module(-images)
    assert all(torch.equal(a, e) for a, e in zip(first, kept, strict=True))


def test_images_with_a_gradient_are_refused(module: EdgeBackboneModule, images: torch.Tensor) -> None:
    wanting = images.clone().requires_grad_()
    with pytest.raises(InputError, match="no gradient"):
        module(wanting)
    with torch.no_grad():
        actual = module(wanting).feature_maps
    assert all(torch.equal(a, e) for a, e in zip(actual, module(wanting.detach()).feature_maps, strict=True))


def test_narrowing(module: EdgeBackboneModule, images: torch.Tensor) -> None:
    maps = dict(zip(module.out_features, module(images).feature_maps, strict=True))
    module.out_features = ["stage2", "stage4"]
    assert (module.out_indices, module.channels) == ([2, 4], [32, 128])
    assert [torch.equal(m, maps[s]) for m, s in zip(module(images)[0], ["stage2", "stage4"], strict=True)] == [
        True,
        True,
    ]
    module.out_indices = [-1]
    assert module.out_features == ["stage4"]
    assert torch.equal(module(images).feature_maps[0], maps["stage4"])
    assert module.config.out_features == ["stage4"]
    for bad in (["stem"], ["stage9"], ["stage4", "stage1"]):
        with pytest.raises(InputError):
            module.out_features = bad
        assert module.out_features == ["stage4"]


def test_return_dict(module: EdgeBackboneModule, swin: Any, images: torch.Tensor) -> None:
    (maps,) = module(images, return_dict=False)
    assert all(torch.equal(a, e) for a, e in zip(maps, module(images).feature_maps, strict=True))
    maps, hidden = module(images, output_hidden_states=True, return_dict=False)
    with torch.no_grad():
        expected = swin(images, output_hidden_states=True, return_dict=False)
    assert len(expected) == 2
    for ours, theirs in zip((maps, hidden), expected, strict=True):
        assert all(relative(a, e) < TOLERANCE for a, e in zip(ours, theirs, strict=True))


def test_other_arguments(module: EdgeBackboneModule, images: torch.Tensor) -> None:
    expected = module(images).feature_maps
    actual = module.forward_with_filtered_kwargs(
        images, output_hidden_states=False, output_attentions=False, interpolate_pos_encoding=True
    )
    assert all(torch.equal(a, e) for a, e in zip(actual.feature_maps, expected, strict=True))
    assert torch.equal(module(pixel_values=images)["feature_maps"][0], expected[0])
    with pytest.raises(InputError, match="attentions"):
        module(images, output_attentions=True)


def test_images_that_the_engine_does_not_take(module: EdgeBackboneModule, images: torch.Tensor) -> None:
    for bad in (images[:, :2], images[:, :, :32], images[0], images.to(torch.uint8), images[:0]):
        with pytest.raises(InputError) as refusal:
            module(bad)
        assert "\n" not in str(refusal.value)


def test_timm_clients_get_what_they_had(client_of: Callable[[str], Client], bundle_of: Callable[..., Path]) -> None:
    """DETR unwraps timm's extractor, whose maps are a list; DAB-DETR keeps the TimmBackbone around it."""
    detr = swapped(client_of("detr_timm"), bundle_of("detr_timm"))
    assert isinstance(engine_of(detr)(client_of("detr_timm").images(1)), list)
    if "dab_detr" in CLIENTS:
        dab_detr = swapped(client_of("dab_detr"), bundle_of("dab_detr"))
        output = engine_of(dab_detr)(client_of("dab_detr").images(1))
        assert isinstance(output, transformers.modeling_outputs.BackboneOutput)


@pytest.mark.skipif("vit_pose_plus" not in CLIENTS, reason="this release of transformers has no VitPose")
def test_one_expert_is_compiled(client_of: Callable[[str], Client], bundle_of: Callable[..., Path]) -> None:
    client = client_of("vit_pose_plus")
    model = swapped(client, bundle_of("vit_pose_plus"))
    images, others = client.images(1), torch.tensor([2, 2])
    with torch.no_grad(), pytest.raises(InputError, match="dataset_index"):
        model(pixel_values=images, dataset_index=others)
    assert relative(client(images, model).heatmaps, client(images).heatmaps) < TOLERANCE
    with torch.no_grad():
        other_expert = client.model(pixel_values=images, dataset_index=others).heatmaps
    assert relative(other_expert, client(images).heatmaps) > 10 * TOLERANCE


# ---- refusals -------------------------------------------------------------------------------------------------------


@contextmanager
def refused(client: Client, error: type[EdgeBackbonesError], message: str) -> Iterator[None]:
    """A refusal in one line, after which the client is what it was."""
    images = client.images(1)
    outputs = tensors(client(images))
    before = [(path, id(module), module.training) for path, module in client.model.named_modules()]
    state = {key: value.clone() for key, value in client.model.state_dict().items()}
    with pytest.raises(error, match=message) as refusal:
        yield
    assert "\n" not in str(refusal.value)
    assert [(path, id(module), module.training) for path, module in client.model.named_modules()] == before
    assert client.model.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in client.model.state_dict().items())
    after = tensors(client(images))
    assert all(torch.equal(after[path], outputs[path]) for path in outputs)


DIFFERENT: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "weights": ({}, {}, "the weights differ: stage2 .* same_weights=False"),
    "channels": ({"hidden_sizes": [8, 16, 24, 40]}, {}, "channels or strides differ: .* 32x2x3, .* 40x2x3"),
    "strides": ({"downsample_in_first_stage": True}, {}, "channels or strides differ: .* 16x8x12, .* 16x4x6"),
    "stages": (
        {"out_features": ["stage3", "stage4"]},
        {},
        r"reads the stages .*'stage2'.* build it again with out_feat",
    ),
    "names of stages": (
        {"hidden_sizes": [8, 16, 24], "depths": [1, 1, 1], "out_features": ["stage1", "stage2", "stage3"]},
        {},
        "reads the stages .*'stage4'",
    ),
    "frames": ({}, {"input": "image"}, "takes camera frames .* input='pixel_values'"),
    "colours": ({"num_channels": 4}, {}, "does not take the images of .*: .*channel"),
}


@pytest.mark.parametrize("what", DIFFERENT)
def test_bundle_that_differs(what: str, client_of: Callable[[str], Client], build: Callable[..., Path]) -> None:
    client = client_of("detr")
    changes, options, message = DIFFERENT[what]
    bundle = build(transformers.ResNetConfig(**{**RESNET, **changes}), **options)
    with refused(client, ClientMismatchError, message):
        replace_backbone(client.model, bundle)


def test_bundle_that_cannot_be_opened(
    client_of: Callable[[str], Client], bundle_of: Callable[..., Path], tmp_path: Path
) -> None:
    client = client_of("detr")
    with refused(client, BundleError, "nowhere"):
        replace_backbone(client.model, tmp_path / "nowhere.bundle")
    with refused(client, EngineMismatchError, "int8"):
        replace_backbone(client.model, bundle_of("detr"), engine="int8")


@pytest.mark.skipif("chm_v2" not in CLIENTS, reason="this release of transformers has no CHMv2")
def test_bundle_without_class_tokens(client_of: Callable[[str], Client], build: Callable[..., Path]) -> None:
    client = client_of("chm_v2")
    backbone = copy.deepcopy(client.model.backbone)
    backbone.config.return_class_token = False
    bundle = build(backbone)
    assert not Bundle.open(bundle).manifest.backbone.cls_tokens
    with refused(client, ClientMismatchError, "class tokens"):
        replace_backbone(client.model, bundle)


@pytest.mark.skipif("vit_pose_plus" not in CLIENTS, reason="this release of transformers has no VitPose")
def test_bundle_of_another_network_with_experts(
    client_of: Callable[[str], Client], bundle_of: Callable[..., Path]
) -> None:
    client = client_of("vit_pose_plus")
    with refused(client, ClientMismatchError, "does not take the images of .*dataset_index must be provided"):
        replace_backbone(client.model, bundle_of("vit_pose"))


def test_models_without_one_backbone(bundle_of: Callable[..., Path], build: Callable[..., Path]) -> None:
    resnet = transformers.ResNetConfig(**RESNET)
    plain = transformers.ResNetModel(resnet).eval()
    alone = transformers.AutoBackbone.from_config(resnet).eval()
    two = nn.ModuleDict({"left": copy.deepcopy(alone), "right": copy.deepcopy(alone)})
    vit = transformers.DPTForDepthEstimation(
        transformers.DPTConfig(
            image_size=64,
            patch_size=16,
            hidden_size=32,
            num_hidden_layers=4,
            num_attention_heads=2,
            intermediate_size=32,
            backbone_out_indices=[0, 1, 2, 3],
            neck_hidden_sizes=[8, 8, 8, 8],
            fusion_hidden_size=8,
        )
    )
    cases = [(plain, "no backbone"), (alone, "no backbone"), (vit, "no backbone"), (two, r"several .*left, right")]
    for model, message in cases:
        before = [id(module) for module in model.modules()]
        with pytest.raises(SourceError, match=message) as refusal:
            replace_backbone(model, bundle_of("detr"))
        assert "\n" not in str(refusal.value)
        with pytest.raises(SourceError, match=message):
            build(model, from_model=True)
        assert [id(module) for module in model.modules()] == before


def test_size_at_call_time(client_of: Callable[[str], Client], bundle_of: Callable[..., Path]) -> None:
    client = client_of("detr")
    model = swapped(client, bundle_of("detr"))
    images = client.images(1)
    expected = client(images, model).logits
    with pytest.raises(InputError, match="64") as refusal:
        client(images[:, :, :, :64], model)
    assert "\n" not in str(refusal.value)
    assert torch.equal(client(images, model).logits, expected)


# ---- other libraries ------------------------------------------------------------------------------------------------
