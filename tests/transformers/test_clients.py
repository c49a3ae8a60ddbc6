"""A bundle in the place of a backbone: every client of transformers, the module itself, and what is refused."""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
import segmentation_models_pytorch as segmentation_models
import torch
import torchvision
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
from edge_backbones.integrations.segmentation_models import EdgeEncoder
from edge_backbones.integrations.torchvision import EdgeBackboneWithFPN, EdgeFeatures
from edge_backbones.integrations.transformers import EdgeBackboneModule, replace_backbone
from edge_backbones.runtime.backbone import BackboneOutput
from edge_backbones.spec import BackboneSpec, InputSpec, ShapeRange
from edge_backbones.toolchain.sources.module_source import ModuleSource

# What the oldest supported release of transformers does that newer releases of torch warn of.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:torch.meshgrid. in an upcoming release:UserWarning"),
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
    loaded, report = type(client.model).from_pretrained(tmp_path, output_loading_info=True)
    assert report["missing_keys"]
    assert all(key.startswith(f"{path}.") for key in report["missing_keys"])
    assert not report["unexpected_keys"]
    assert all(torch.equal(loaded.state_dict()[key], value) for key, value in expected.items())


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


def test_hidden_states_that_the_bundle_lacks(
    client_of: Callable[[str], Client], bundle_of: Callable[..., Path]
) -> None:
    """Some models ask for them always, and drop them."""
    client = client_of("detr")
    model = swapped(client, bundle_of("detr"))
    images = client.images(1)
    assert engine_of(model)(images, output_hidden_states=True).hidden_states is None
    assert torch.equal(client(images, model, output_hidden_states=True).logits, client(images, model).logits)


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_client_over_float16_maps_in_channels_last_memory(
    dtype: torch.dtype, client_of: Callable[[str], Client], bundle_of: Callable[..., Path]
) -> None:
    """The engine's formats are its own matter: a client gets tensors of its dtype, in channels_last."""
    client = client_of("upernet")
    bundle = bundle_of("upernet", maps=("float16", "channels-last"), pixels="float16", hidden_states=True)
    model = swapped(client, bundle).to(dtype)
    images = client.images(1)
    maps = engine_of(model)(images.to(dtype)).feature_maps
    assert {feature_map.dtype for feature_map in maps} == {dtype}
    assert all(feature_map.is_contiguous(memory_format=torch.channels_last) for feature_map in maps)
    logits = client(images.to(dtype), model).logits
    assert logits.dtype == dtype
    assert relative(logits.float(), client(images).logits) < (0.1 if dtype == torch.bfloat16 else 5e-3)


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
    seen: list[nn.Module] = []
    engine_of(model).register_forward_hook(lambda module, *_: seen.append(module))
    twin = copy.deepcopy(model)
    images = client.images(1)
    assert torch.equal(client(images, twin).logits, client(images, model).logits)
    assert seen == [engine_of(twin), engine_of(model)]
    assert engine_of(twin) is not engine_of(model)
    assert engine_of(twin).backbone._engine is engine_of(model).backbone._engine

    engine_of(twin).out_features = ["stage4"]
    assert engine_of(model).out_features == ["stage2", "stage3", "stage4"]
    with torch.no_grad():
        next(twin.class_labels_classifier.parameters()).zero_()
    assert torch.equal(client(images, model).logits, client(images, swapped(client, bundle_of("detr"))).logits)


def test_a_swapped_client_is_saved_whole_and_opens_its_bundle_again(
    client_of: Callable[[str], Client], bundle_of: Callable[..., Path], tmp_path: Path
) -> None:
    client, bundle = client_of("detr"), tmp_path / "detr.bundle"
    shutil.copytree(bundle_of("detr"), bundle)
    model = swapped(client, bundle)
    images = client.images(1)
    expected = client(images, model).logits
    torch.save(model, tmp_path / "client.pt")
    engine_of(model).backbone.close()

    again = torch.load(tmp_path / "client.pt", weights_only=False)
    assert torch.equal(client(images, again).logits, expected)
    assert engine_of(again).out_features == engine_of(model).out_features
    engine_of(again).backbone.close()

    shutil.rmtree(bundle)
    with pytest.raises(BundleError, match=r"detr\.bundle is not there any more: put the bundle back"):
        torch.load(tmp_path / "client.pt", weights_only=False)


@pytest.mark.parametrize("check_finite", [True, False])
def test_a_client_refuses_values_that_are_not_finite_unless_it_is_told_not_to(
    check_finite: bool, client_of: Callable[[str], Client], bundle_of: Callable[..., Path]
) -> None:
    client = client_of("upernet")
    model = swapped(client, bundle_of("upernet"), check_finite=check_finite)
    images = client.images(1)
    images[1, 0, 3, 3] = torch.nan
    with contextlib.nullcontext() if not check_finite else pytest.raises(InputError, match="1 NaN in sample 1"):
        assert client(images, model).logits.shape == client(images).logits.shape


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_module_takes_every_floating_dtype_and_refuses_what_float32_cannot_hold(
    dtype: torch.dtype, client_of: Callable[[str], Client], bundle_of: Callable[..., Path]
) -> None:
    module = EdgeBackboneModule(EdgeBackbone.from_pretrained(bundle_of("detr")))
    images = client_of("detr").images(1).to(dtype)
    expected = module(images.float()).feature_maps[0].to(dtype)
    assert torch.equal(module(images).feature_maps[0], expected)
    negative = torch._neg_view(-images)  # type: ignore[attr-defined]
    assert negative.is_neg()
    assert torch.equal(module(negative).feature_maps[0], expected)
    message = "beyond float32" if dtype == torch.float64 else "not finite"
    with pytest.raises(InputError, match=message):
        module((images.double() * 1e39).to(dtype))


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


@pytest.mark.parametrize("context", [torch.enable_grad, torch.inference_mode])
def test_client_with_and_without_autograd(
    context: Any, client_of: Callable[[str], Client], bundle_of: Callable[..., Path]
) -> None:
    client = client_of("detr")
    model = swapped(client, bundle_of("detr"))
    images = client.images(1)
    with context():
        logits = model(pixel_values=images).logits
    assert torch.equal(logits, client(images, model).logits)


def test_backbone_under_two_names(client_of: Callable[[str], Client], bundle_of: Callable[..., Path]) -> None:
    client = client_of("detr")

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.detector = copy.deepcopy(client.model)
            self.features = find_backbone(self.detector).module

    model = Twice()
    replace_backbone(model, bundle_of("detr"))
    assert model.features is engine_of(model)
    assert find_backbone(model.detector).module is model.features
    assert not any(key.startswith("features") for key in model.state_dict())


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


class OnTheGpu(EdgeBackbone):
    """Stands in for a backbone whose engine is on the GPU: takes tensors there and returns tensors there."""

    device = "cuda"

    def __call__(self, pixel_values: torch.Tensor, **arguments: Any) -> Any:  # type: ignore[override]
        self.taken = pixel_values
        self.given = (pixel_values[:, :, ::2, ::2].contiguous(),)
        return BackboneOutput(self.given)


def test_an_engine_on_the_gpu_takes_and_gives_tensors_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    like = backbone_of([3], [2])
    backbone = OnTheGpu(like._spec, like.input, like._engine)
    images = torch.rand(1, 3, 64, 96)
    module = EdgeBackboneModule(backbone)
    monkeypatch.setattr(torch.Tensor, "cpu", lambda tensor: pytest.fail("copied to the host"))
    monkeypatch.setattr(torch.Tensor, "numpy", lambda tensor: pytest.fail("copied to the host"))
    (feature_map,) = module(images).feature_maps
    assert backbone.taken.data_ptr() == images.data_ptr()
    assert feature_map.data_ptr() == backbone.given[0].data_ptr()
    (feature_map,) = module(images.half()).feature_maps
    assert (backbone.taken.dtype, feature_map.dtype) == (torch.float32, torch.float16)
    backbone._input = msgspec.structs.replace(backbone._input, pixel_dtype="float16")
    for other in (images, images.bfloat16(), images.half()):
        (feature_map,) = module(other).feature_maps
        assert (backbone.taken.dtype, feature_map.dtype) == (torch.float16, other.dtype)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_floats_do_not_become_the_uint8_of_an_engine_for_frames(dtype: torch.dtype, device: str) -> None:
    like = backbone_of([3], [2])
    backbone = OnTheGpu(like._spec, like.input, like._engine)
    backbone.device = device  # type: ignore[misc]
    backbone._input = msgspec.structs.replace(backbone._input, name="image")
    EdgeBackboneModule(backbone)(torch.rand(1, 3, 64, 96).to(dtype))
    # The backbone refuses it. numpy has no bfloat16.
    assert backbone.taken.dtype == (torch.float32 if (device, dtype) == ("cpu", torch.bfloat16) else dtype)


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


@pytest.mark.skipif(
    importlib.util.find_spec("transformers.backbone_utils") is None,
    reason="this release of transformers does not select hidden states",
)
@pytest.mark.parametrize("asked", [True, 1, -1, [0, -2], [9]])
def test_selected_hidden_states(module: EdgeBackboneModule, swin: Any, images: torch.Tensor, asked: Any) -> None:
    with torch.no_grad():
        expected = swin(images, output_hidden_states=asked).hidden_states
    actual = module(images, output_hidden_states=asked).hidden_states
    assert len(actual) == len(expected)
    for ours, theirs in zip(actual, expected, strict=True):
        assert ours is theirs is None or relative(ours, theirs) < TOLERANCE


@pytest.mark.skipif("chm_v2" not in CLIENTS, reason="this release of transformers has no CHMv2")
def test_return_dict_with_class_tokens(client_of: Callable[[str], Client], bundle_of: Callable[..., Path]) -> None:
    client = client_of("chm_v2")
    module = EdgeBackboneModule(EdgeBackbone.from_pretrained(bundle_of("chm_v2")))
    images = client.images(1)
    with torch.no_grad():
        expected = tensors(client.model.backbone(images, return_dict=False))
    for actual in (tensors(module(images, return_dict=False)), tensors(module(images).to_tuple())):
        assert actual.keys() == expected.keys()
        assert all(relative(actual[path], expected[path]) < TOLERANCE for path in expected)


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

STAGES = ["layer1", "layer2", "layer3", "layer4"]


def torchvision_resnet() -> Any:
    """A ResNet of one block per stage, its batch norm frozen as torchvision's detection models have it."""
    block = torchvision.models.resnet.BasicBlock
    return trained_like(torchvision.models.ResNet(block, [1, 1, 1, 1], norm_layer=torchvision.ops.FrozenBatchNorm2d))


def pyramid(stages: list[str], extra_blocks: Any = None) -> Any:
    layers = {stage: str(i) for i, stage in enumerate(stages)}
    channels = [64 << STAGES.index(stage) for stage in stages]
    return torchvision.models.detection.backbone_utils.BackboneWithFPN(
        torchvision_resnet(), layers, channels, 32, extra_blocks
    ).eval()


@pytest.fixture(scope="module")
def torchvision_bundle(build: Callable[..., Path]) -> Path:
    return build(ModuleSource(module=pyramid(STAGES).body, stage_names=STAGES), weights="pretrained")


@pytest.mark.parametrize(("name", "threshold"), [("FasterRCNN", "box_score_thresh"), ("RetinaNet", "score_thresh")])
def test_torchvision_detector(name: str, threshold: str, torchvision_bundle: Path) -> None:
    make = getattr(torchvision.models.detection, name)
    options = {"num_classes": 4, "fixed_size": (96, 64), threshold: 0.0}
    stages, blocks = STAGES, None
    if name == "RetinaNet":  # five levels, the first of stride 8
        stages, blocks = STAGES[1:], torchvision.ops.feature_pyramid_network.LastLevelP6P7(32, 32)
    original = trained_like(make(pyramid(stages, blocks), **options), seed=1)
    original.backbone.body.load_state_dict(pyramid(stages).body.state_dict())

    backbone = EdgeBackbone.from_pretrained(torchvision_bundle)
    backbone.out_features = stages
    features = EdgeBackboneWithFPN(backbone, 32, copy.deepcopy(blocks))
    detector = make(features, **options).eval()
    missing, unexpected = detector.load_state_dict(original.state_dict(), strict=False)
    assert not missing
    assert all(key.startswith("backbone.body.") for key in unexpected)

    generator = torch.Generator().manual_seed(0)
    images = [torch.rand(3, height, width, generator=generator) for height, width in ((64, 96), (80, 70), (50, 120))]
    with torch.no_grad():
        expected_maps = original.backbone(images[0][None])
        maps = detector.backbone(images[0][None])
        expected, actual, others = original(images), detector(images), original([1 - image for image in images])
    assert list(maps) == list(expected_maps)
    assert all(relative(maps[key], expected_maps[key]) < TOLERANCE for key in maps)
    for a, e, other in zip(actual, expected, others, strict=True):
        assert len(e["boxes"]) > 0
        assert torch.equal(a["labels"], e["labels"])
        assert relative(a["boxes"], e["boxes"]) < TOLERANCE
        assert relative(a["scores"], e["scores"]) < TOLERANCE
        assert not torch.equal(other["scores"], e["scores"])


def test_torchvision_pyramid_trains(torchvision_bundle: Path) -> None:
    features = EdgeBackboneWithFPN(EdgeBackbone.from_pretrained(torchvision_bundle), 32)
    detector = torchvision.models.detection.FasterRCNN(features, num_classes=4, fixed_size=(96, 64)).train()
    targets = [{"boxes": torch.tensor([[8.0, 8.0, 40.0, 40.0]]), "labels": torch.tensor([1])}] * 2
    sum(detector(list(torch.rand(2, 3, 64, 96)), targets).values()).backward()
    assert all(parameter.grad is not None for parameter in features.parameters())
    assert all(key.startswith("fpn.") for key in features.state_dict())


def test_torchvision_sizes_that_vary(torchvision_bundle: Path) -> None:
    features = EdgeBackboneWithFPN(EdgeBackbone.from_pretrained(torchvision_bundle), 32)
    detector = torchvision.models.detection.FasterRCNN(features, num_classes=4, min_size=64, max_size=128).eval()
    with torch.no_grad(), pytest.raises(InputError, match="64"):
        detector([torch.rand(3, 64, 64)])


def test_torchvision_features_by_name(torchvision_bundle: Path) -> None:
    images = torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = pyramid(STAGES).body(images)
    actual = EdgeFeatures(EdgeBackbone.from_pretrained(torchvision_bundle))(images)
    assert list(actual) == list(expected) == ["0", "1", "2", "3"]
    assert all(relative(actual[key], expected[key]) < TOLERANCE for key in expected)


@pytest.mark.parametrize("name", ["tu-resnet18", "tu-test_convnext"])
def test_segmentation_model(name: str, build: Callable[..., Path]) -> None:
    """A network with a map at half the image's size, and one whose first map is at a quarter."""
    model = trained_like(
        segmentation_models.Unet(name, encoder_weights=None, classes=2, decoder_channels=(32, 16, 16, 8, 8))
    )
    encoder = EdgeEncoder(EdgeBackbone.from_pretrained(build(model.encoder.model)))
    assert (encoder.out_channels, encoder.output_stride) == (model.encoder.out_channels, model.encoder.output_stride)

    images = torch.randn(3, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, expected_maps, other = model(images), model.encoder(images), model(images.flip(-1))
        maps = encoder(images)
        model.encoder = encoder
        actual = model(images)
    assert [m.shape for m in maps] == [m.shape for m in expected_maps]
    assert relative(actual, expected) < TOLERANCE
    assert relative(other, expected) > 10 * TOLERANCE
    assert not any(key.startswith("encoder.") for key in model.state_dict())


class Zeros:
    """An engine that returns zeros, of the sizes that a specification says."""

    def __init__(self, spec: BackboneSpec) -> None:
        self.spec = spec

    def run(self, array: Any) -> list[Any]:
        batch, _, height, width = array.shape
        shapes = zip(self.spec.channels, self.spec.strides, strict=True)
        return [torch.zeros(batch, channels, height // v, width // h).numpy() for channels, (v, h) in shapes]

    def close(self) -> None:
        pass


def backbone_of(channels: list[int], strides: list[int], layout: Any = "NCHW") -> EdgeBackbone:
    names = tuple(f"stage{i}" for i in range(len(channels)))
    spec = BackboneSpec(
        stage_names=names,
        out_features=names,
        out_indices=tuple(range(len(names))),
        channels=tuple(channels),
        strides=tuple((stride, stride) for stride in strides),
        num_features=tuple(channels),
        layouts=(layout,) * len(names),
    )
    sizes = {"batch": ShapeRange.fixed(1), "height": ShapeRange.fixed(64), "width": ShapeRange.fixed(96)}
    return EdgeBackbone(spec, InputSpec(name="pixel_values", channels=3, **sizes), Zeros(spec))


@pytest.mark.parametrize(
    ("strides", "levels"),
    [([2, 4, 8], [3, 8, 16, 24]), ([4, 8, 16], [3, 0, 8, 16, 24]), ([2, 8, 16], [3, 8, 0, 16, 24])],
)
def test_encoder_levels(strides: list[int], levels: list[int]) -> None:
    """As in segmentation_models_pytorch's own encoders: the image first, no channels where a level is missing."""
    encoder = EdgeEncoder(backbone_of([8, 16, 24], strides))
    images = torch.rand(1, 3, 64, 96)
    maps = encoder(images)
    assert encoder.out_channels == levels
    assert encoder.output_stride == strides[-1]
    assert maps[0] is images
    assert [tuple(m.shape) for m in maps] == [(1, c, 64 >> i, 96 >> i) for i, c in enumerate(levels)]


def test_encoder_of_a_network_with_full_size_maps() -> None:
    """VGG: its first map stands where others have the image."""
    encoder = EdgeEncoder(backbone_of([8, 16, 24], [1, 2, 4]))
    assert encoder.out_channels == [8, 16, 24]
    assert [m.shape[1] for m in encoder(torch.rand(1, 3, 64, 96))] == [8, 16, 24]


@pytest.mark.parametrize(
    ("strides", "layout"),
    [([14, 14], "NCHW"), ([16, 16], "NCHW"), ([8, 4], "NCHW"), ([4, 8], "NHWC"), ([8, 16], "NLC")],
)
def test_encoder_refuses_what_is_no_pyramid(strides: list[int], layout: str) -> None:
    with pytest.raises(ClientMismatchError, match="one NCHW map per power of two") as refusal:
        EdgeEncoder(backbone_of([8, 16], strides, layout))
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("layout", ["NHWC", "NLC"])
def test_pyramid_refuses_other_layouts(layout: str) -> None:
    with pytest.raises(ClientMismatchError, match=layout) as refusal:
        EdgeBackboneWithFPN(backbone_of([8, 16], [8, 16], layout))
    assert "\n" not in str(refusal.value)


def test_a_torchscript_engine_in_a_client(client_of: Callable[[str], Client], bundle_of: Callable[..., Path]) -> None:
    """Engines that are code are loaded where the caller says that he trusts them."""
    client, bundle = client_of("detr"), bundle_of("detr", torchscript=True, flavours=("torchscript",))
    (engine,) = (e.name for e in Bundle.open(bundle).manifest.engines if e.key.flavour == "torchscript")
    with pytest.raises(EngineMismatchError, match="allow_host_code=True"):
        swapped(client, bundle, engine=engine)
    model, images = swapped(client, bundle, engine=engine, allow_host_code=True), client.images(1)
    assert engine_of(model).backbone.engine == engine
    torch.testing.assert_close(client(images, model).logits, client(images).logits, rtol=1e-3, atol=1e-4)
