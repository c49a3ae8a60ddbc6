"""Checkpoints of timm networks as their users have them. References: the forward of the network that was saved."""

from __future__ import annotations

import argparse
import copy
from collections import OrderedDict
from pathlib import Path

import networks
import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.utils import ModelEmaV2
from torch.optim.swa_utils import AveragedModel

from build_scripts.write_networks import TARGET, described
from edge_backbones.errors import SourceError
from edge_backbones.toolchain.sources.base import SourceOptions, read_checkpoint
from edge_backbones.toolchain.sources.checkpoints import common_prefix, flat_tensors, learned_shapes, stage_spelling
from edge_backbones.toolchain.sources.nearest import nearest
from edge_backbones.toolchain.sources.timm import load_timm

HEIGHT, WIDTH = 64, 96


def trained(name: str, *, seed: int = 7, **options) -> torch.nn.Module:
    """A network in which no number is a starting value."""
    torch.manual_seed(seed)
    net = timm.create_model(name, **options).eval()
    networks.randomise_batch_norm(net, seed=seed)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return net


def load(name: str, path: Path, **options):
    return load_timm(name, SourceOptions(weights=str(path), **options))


def saved(content, path: Path) -> Path:
    torch.save(content, path)
    return path


def pixels(size: tuple[int, int] = (HEIGHT, WIDTH), channels: int = 3) -> torch.Tensor:
    return torch.randn(2, channels, *size, generator=torch.Generator().manual_seed(3))


def assert_same_maps(actual, expected) -> None:
    assert len(actual) == len(expected)
    for one, reference in zip(actual, expected, strict=True):
        assert networks.relative(one.numpy(), reference.numpy()) < 1e-5  # attention is written in two ways


def assert_has_weights_of(loaded, state: dict[str, torch.Tensor]) -> None:
    """test_resnet: the network's names are those of the whole one."""
    own = loaded.module.net.state_dict()
    assert set(own) <= set(state)
    for key, tensor in own.items():
        assert torch.equal(tensor, state[key].to(tensor.dtype)), key


def refusal(name: str, path: Path, **options) -> str:
    with pytest.raises(SourceError) as caught:
        load(name, path, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- layouts that timm writes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("test_resnet", (64, 96)),  # FeatureListNet
        ("test_convnext", (64, 96)),  # with stages_0
        ("swinv2_cr_tiny_224", (224, 224)),
        ("mobilevit_xxs", (64, 96)),
        ("test_vit", (160, 160)),  # FeatureGetterNet
        ("test_efficientnet", (64, 96)),  # EfficientNetFeatures
        ("mobilenetv3_small_050", (64, 96)),  # MobileNetV3Features
        ("hrnet_w18_small", (64, 96)),  # HighResolutionNetFeatures
        ("pit_ti_224", (224, 224)),  # FeatureHookNet
    ],
)
def test_a_features_only_model_loads_under_its_own_names(name, size, tmp_path):
    net, images = trained(name, features_only=True), pixels(size)
    loaded = load(name, saved(net.state_dict(), tmp_path / "own.pth"), out_indices=tuple(net.feature_info.out_indices))
    with torch.no_grad():
        maps = net(images)
        if getattr(net, "output_fmt", None) is not None and str(net.output_fmt).endswith("NHWC"):
            maps = [m.permute(0, 3, 1, 2) for m in maps]
        assert_same_maps(loaded.module(images), maps)


@pytest.mark.parametrize("wrapper", ["list", "dict", "hook", "getter", "fx"])
def test_every_feature_wrapper_of_timm(wrapper, tmp_path):
    net = trained("test_resnet", features_only=True, feature_cls=wrapper)
    loaded = load("test_resnet", saved(net.state_dict(), tmp_path / "own.pth"), out_indices=(0, 1, 2, 3, 4))
    with torch.no_grad():
        maps = net(pixels())
        assert_same_maps(loaded.module(pixels()), list(maps.values()) if isinstance(maps, dict) else maps)


@pytest.mark.parametrize(
    ("name", "wrapper", "size"),
    [
        ("coat_tiny", "fx", (224, 224)),  # without a norm of one branch, which the last stage does not need
        ("crossvit_9_240", "fx", (240, 240)),  # without the fusion of the last block
        ("pit_ti_distilled_224", "getter", (224, 224)),  # without the norm behind the last stage
        ("efficientvim_m1", "fx", (224, 224)),  # without the weights that join states
    ],
)
def test_a_wrapper_may_leave_out_what_its_maps_do_not_need(name, wrapper, size, tmp_path):
    """The last stage is that of the whole network: fx returns tokens of its own layout."""
    whole = trained(name)
    net = timm.create_model(name, features_only=True, feature_cls=wrapper)
    (inner,) = (child for child in net.children())
    inner.load_state_dict(whole.state_dict(), strict=False)
    loaded = load(name, saved(net.state_dict(), tmp_path / "own.pth"))
    assert len(learned_shapes(loaded.module)) > len(learned_shapes(net)), "the file lacks nothing: nothing is tried"
    reference = load(name, saved(whole.state_dict(), tmp_path / "whole.pth"))
    with torch.no_grad():
        assert_same_maps(loaded.module(pixels(size)), reference.module(pixels(size)))


def test_what_a_map_needs_may_not_be_absent(tmp_path):
    """timm's FeatureListNet of coat has no class tokens, and cannot run itself: nothing says what they were."""
    net = timm.create_model("coat_tiny", features_only=True, feature_cls="list")
    said = refusal("coat_tiny", saved(net.state_dict(), tmp_path / "own.pth"))
    assert "has no weights for 4 tensors of coat_tiny, cls_token1 first" in said
    net = timm.create_model("sequencer2d_s", features_only=True)  # three stages of four, each under stages_
    said = refusal("sequencer2d_s", saved(net.state_dict(), tmp_path / "three.pth"))
    assert "has no weights for 80 tensors of sequencer2d_s, stages.3." in said
    state = trained("test_resnet", features_only=True).state_dict()
    lost = next(key for key in reversed(state) if key.endswith("running_var"))
    del state[lost]
    said = refusal("test_resnet", saved(state, tmp_path / "cut.pth"))
    assert f"has no weights for 1 tensors of test_resnet, {lost} first" in said


def test_a_file_of_fewer_stages_serves_these_stages_and_no_deeper_ones(tmp_path):
    net = trained("test_convnext", features_only=True, out_indices=(0, 1))
    path = saved(net.state_dict(), tmp_path / "two.pth")
    with torch.no_grad():
        assert_same_maps(load("test_convnext", path, out_indices=(0, 1)).module(pixels()), net(pixels()))
    assert "has no weights for" in refusal("test_convnext", path, out_indices=(2,))


@pytest.mark.parametrize("name", ["test_vit", "test_convnext"])
@pytest.mark.parametrize("options", [{"num_channels": 1}, {"img_size": (64, 96)}])
def test_other_channels_and_sizes_are_adapted_as_those_of_a_whole_network(name, options, tmp_path):
    """timm resizes position embeddings and sums colours by the names of the whole network."""
    whole = trained(name)
    state = {
        stage_spelling(key) if name == "test_convnext" else f"model.{key}": v for key, v in whole.state_dict().items()
    }
    native = {key: v for key, v in state.items() if "head" not in key}
    one = load(name, saved(whole.state_dict(), tmp_path / "whole.pth"), **options)
    other = load(name, saved(native, tmp_path / "features.pth"), **options)
    images = pixels(options.get("img_size", (160, 160)), options.get("num_channels", 3))
    with torch.no_grad():
        assert_same_maps(other.module(images), one.module(images))
    if "num_channels" in options:
        first = next(p for p in other.module.parameters() if p.ndim == 4)
        original = next(p for p in whole.parameters() if p.ndim == 4)
        torch.testing.assert_close(first, original.sum(1, keepdim=True))


# ---- prefixes -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def resnet() -> dict[str, torch.Tensor]:
    return dict(trained("test_resnet").state_dict())


@pytest.mark.parametrize(
    "prefix",
    [
        "module.",
        "_orig_mod.",
        "module._orig_mod.",
        "_orig_mod.module.",
        "model.",
        "backbone.",
        "encoder.",
        "student.",
        "teacher.",
        "model.backbone._orig_mod.module.",
        "teacher.backbone.",
        "model.backbone.conv_encoder.model._backbone.",
        "detector.backbone.0.body.",
        "image_encoder.",
        "resnet.",
    ],
)
def test_prefixes_of_wrappers(prefix, resnet, tmp_path):
    content = {f"{prefix}{key}": tensor for key, tensor in resnet.items()} | {"class_embed.weight": torch.ones(3, 4)}
    save_file(content, tmp_path / "wrapped.safetensors")
    assert_has_weights_of(load("test_resnet", tmp_path / "wrapped.safetensors"), resnet)


def test_blocks_that_were_compiled_one_by_one(resnet, tmp_path):
    content = {key.replace("layer2.0.", "layer2.0._orig_mod."): tensor for key, tensor in resnet.items()}
    assert any("_orig_mod" in key for key in content)
    assert_has_weights_of(load("test_resnet", saved(content, tmp_path / "regional.pth")), resnet)


@pytest.mark.parametrize("wrap", ["ddp", "compiled", "ema", "averaged"])
def test_wrappers_themselves(wrap, resnet, tmp_path):
    net = timm.create_model("test_resnet")
    net.load_state_dict(resnet)
    wrapped = {
        "ddp": lambda: torch.nn.DataParallel(net),
        "compiled": lambda: torch.compile(net, backend="eager"),
        "ema": lambda: ModelEmaV2(net),
        "averaged": lambda: AveragedModel(net),
    }[wrap]()
    assert_has_weights_of(load("test_resnet", saved(wrapped.state_dict(), tmp_path / "wrapped.pth")), resnet)


@pytest.mark.parametrize("kind", ["bfloat16", "float16", "float64"])
def test_other_precisions_become_float32(kind, resnet, tmp_path):
    content = {key: v.to(getattr(torch, kind)) if v.is_floating_point() else v for key, v in resnet.items()}
    loaded = load("test_resnet", saved(content, tmp_path / "half.pth"))
    assert_has_weights_of(loaded, content)
    assert {p.dtype for p in loaded.module.parameters()} == {torch.float32}


# ---- training checkpoints -------------------------------------------------------------------------------------------


def training(resnet) -> dict:
    """What lies beside the weights."""
    net = timm.create_model("test_resnet")
    optimizer = torch.optim.AdamW(net.parameters())
    net(pixels()).sum().backward()
    optimizer.step()
    return {
        "epoch": 3,
        "optimizer": optimizer.state_dict(),
        "args": argparse.Namespace(lr=0.1, output="x"),
        "metric": 0.5,
    }


@pytest.mark.parametrize(
    "container", ["state_dict", "model", "model_state_dict", "net", "ema", "model_ema", "state_dict_ema", "teacher"]
)
def test_containers_of_a_training_script(container, resnet, tmp_path):
    content = {**training(resnet), container: OrderedDict((f"module.{k}", v) for k, v in resnet.items())}
    assert_has_weights_of(load("test_resnet", saved(content, tmp_path / "last.pth.tar")), resnet)


def test_a_lightning_checkpoint(resnet, tmp_path):
    content = {
        "epoch": 1,
        "pytorch-lightning_version": "2.5.0",
        "state_dict": {**{f"model.{k}": v for k, v in resnet.items()}, "loss.weight": torch.ones(10)},
        "loops": {"fit_loop": {"state_dict": {}}},
        "optimizer_states": [training(resnet)["optimizer"]],
        "lr_schedulers": [{"last_epoch": 1}],
        "hyper_parameters": {"lr": 0.1, "backbone": "test_resnet"},
        "hparams_name": "kwargs",
    }
    assert_has_weights_of(load("test_resnet", saved(content, tmp_path / "last.ckpt")), resnet)


@pytest.mark.parametrize(
    ("taken", "left"),
    [
        ("state_dict_ema", "state_dict"),
        ("model_ema", "model"),
        ("state_dict", "model"),
        ("ema", "model"),
        ("teacher", "student"),
        ("state_dict.ema_model", "state_dict.model"),
        ("state_dict.teacher", "state_dict.student"),
        ("state_dict", "current_model_state"),
        ("teacher", "model"),
    ],
)
@pytest.mark.parametrize("swapped", [False, True])
def test_averaged_weights_and_teachers_are_preferred_in_either_order(taken, left, swapped, resnet, tmp_path):
    other = trained("test_resnet", seed=8).state_dict()
    nested: dict = {}
    for path, state in sorted([(taken, resnet), (left, other)], reverse=swapped):
        container, _, rest = path.partition(".")
        prefix = f"{rest}." if rest else "module."
        nested.setdefault(container, {}).update({f"{prefix}{k}": v for k, v in state.items()})
    assert_has_weights_of(load("test_resnet", saved(nested, tmp_path / "two.pth")), resnet)


def test_networks_of_the_same_rank_are_not_chosen_between(resnet, tmp_path):
    other = trained("test_resnet", seed=8).state_dict()
    content = {f"encoder_q.{k}": v for k, v in resnet.items()} | {f"encoder_k.{k}": v for k, v in other.items()}
    message = refusal("test_resnet", saved(content, tmp_path / "moco.pth"))
    assert "holds several networks that fit test_resnet, under 'encoder_q.' and 'encoder_k.'" in message
    twice = {f"encoder_q.{k}": v for k, v in resnet.items()} | {f"encoder_k.{k}": v for k, v in resnet.items()}
    assert_has_weights_of(load("test_resnet", saved(twice, tmp_path / "same.pth")), resnet)


def test_dicts_that_contain_themselves_end(resnet, tmp_path):
    content: dict = {"model": dict(resnet)}
    content["self"] = content
    nested: dict = {"model": dict(resnet)}
    for _ in range(40):  # 2 ** 40 paths
        nested = {"a": nested, "b": nested}
    for looped in (content, nested):
        assert len(flat_tensors(looped)) == len(resnet)
    assert_has_weights_of(load("test_resnet", saved(content, tmp_path / "loop.pth")), resnet)


# ---- refusals -------------------------------------------------------------------------------------------------------

FAMILIES = [
    "test_resnet",
    "test_vit",
    "test_convnext",
    "test_efficientnet",
    "test_byobnet",
    "test_nfnet",
    "test_mambaout",
    "swin_tiny_patch4_window7_224",
    "maxvit_pico_rw_256",
    "xcit_nano_12_p16_224",
    "eva02_tiny_patch14_224",
]


@pytest.mark.parametrize("layout", ["whole", "features_only"])
@pytest.mark.parametrize("given", FAMILIES[:6])
def test_a_family_is_refused_by_every_other(given, layout, tmp_path):
    with torch.device("meta"):
        meta = timm.create_model(given, features_only=layout == "features_only").state_dict()
    state = {f"module.{key}": torch.full(v.shape, 0.5).to(v.dtype) for key, v in meta.items()}
    path = saved(state, tmp_path / "other.pth")
    for name in FAMILIES:
        if name == given:
            continue
        message = refusal(name, path)
        assert "other.pth has no weights for" in message or f"other.pth does not fit {name}: size mismatch" in message
        assert "keys begin with 'module." in message
        assert f"It fits {given} of timm." in message
        assert f"First keys of the file: {', '.join(list(state)[:5])}, ...; of the network: " in message


def test_the_first_keys_of_the_network_are_shown(resnet, tmp_path):
    message = refusal("test_vit", saved(resnet, tmp_path / "other.pth"))
    whole = timm.create_model("test_vit").state_dict()
    assert message.endswith(f"of the network: {', '.join(list(whole)[:5])}, ...")


def test_a_deeper_network_is_not_cut_to_fit(resnet, tmp_path):
    block = {k.replace("layer2.0.", "layer2.5."): v for k, v in resnet.items() if k.startswith("layer2.0.")}
    content = {f"model.{key}": v for key, v in {**resnet, **block}.items()}
    message = refusal("test_resnet", saved(content, tmp_path / "deep.pth"))
    assert f"has {len(block)} tensors that test_resnet lacks, {next(iter(block))} first" in message
    net = trained("test_convnext", features_only=True).state_dict()
    net["stages_1.blocks.7.gamma"] = torch.ones(32)
    message = refusal("test_convnext", saved(net, tmp_path / "deep.pth"))
    assert "has 1 tensors that test_convnext lacks, stages_1.blocks.7.gamma first" in message


@pytest.mark.parametrize("extra", ["reg_token", "patch_embed.proj.lora_A", "blocks.1.mlp.fc1.lora_B", "dist_token"])
def test_a_tensor_that_changes_the_function_is_not_left_out(extra, tmp_path):
    state = {**trained("test_vit").state_dict(), extra: torch.ones(1, 4, 64)}
    message = refusal("test_vit", saved(state, tmp_path / "more.pth"))
    assert f"has 1 tensors that test_vit lacks, {extra} first" in message


@pytest.mark.parametrize(
    "extra", ["mask_token", "decoder_pos_embed", "decoder_blocks.0.weight", "fc.bias", "blocks.0.total_ops"]
)
def test_what_only_training_uses_is_left_out(extra, tmp_path):
    net = trained("test_vit", features_only=True)
    state = {**{k.removeprefix("model."): v for k, v in net.state_dict().items()}, extra: torch.ones(1, 4, 64)}
    with torch.no_grad():
        loaded = load("test_vit", saved(state, tmp_path / "more.pth"), out_indices=tuple(net.feature_info.out_indices))
        assert_same_maps(loaded.module(pixels((160, 160))), net(pixels((160, 160))))


def test_a_prefix_of_nobody_is_named_with_the_way_out(resnet, tmp_path):
    content = {f"zebra.{key}": v for key, v in resnet.items()}
    message = refusal("test_resnet", saved(content, tmp_path / "zebra.pth"))
    assert "All are there under 'zebra.', which is not the prefix of a known wrapper: save them without it." in message
    without = {key.removeprefix("zebra."): v for key, v in content.items()}
    assert_has_weights_of(load("test_resnet", saved(without, tmp_path / "plain.pth")), resnet)


def test_quantized_weights_are_refused(resnet, tmp_path):
    content = {k: v.to(torch.int8) if k == "layer1.0.conv1.weight" else v for k, v in resnet.items()}
    message = refusal("test_resnet", saved(content, tmp_path / "int8.pth"))
    assert "size mismatch for layer1.0.conv1.weight" in message or "layer1.0.conv1.weight" in message
    assert "int8 in the file" in message


@pytest.mark.parametrize("prefix", ["", "model.", "module.model."])
@pytest.mark.parametrize("lost", ["layer2.0.conv1.weight", "layer2.0.bn1.running_var", "conv1.0.weight"])
def test_one_missing_tensor_is_enough(prefix, lost, resnet, tmp_path):
    content = {f"{prefix}{key}": v for key, v in resnet.items() if key != lost}
    message = refusal("test_resnet", saved(content, tmp_path / "part.pth"))
    assert f"has no weights for 1 tensors of test_resnet, {lost} first" in message


def test_a_pickle_that_needs_classes_names_them(resnet, tmp_path):
    content = {"state_dict": resnet, "hyper_parameters": {"root": Path("x")}}
    message = refusal("test_resnet", saved(content, tmp_path / "last.ckpt"))
    assert "last.ckpt cannot be read as a checkpoint (it is a pickle with pathlib" in message


# ---- parts ----------------------------------------------------------------------------------------------------------


def test_common_prefix_is_of_whole_segments():
    assert common_prefix(["a.bc.x", "a.bd.x"]) == "a."
    assert common_prefix(["a.b.x", "a.b.y"]) == "a.b."
    assert common_prefix(["a.b.x", "a.b"]) == "a."
    assert common_prefix(["a", "b"]) == common_prefix([]) == ""


def test_the_optimizer_is_not_read_as_weights(resnet, tmp_path):
    content = {**training(resnet), "model": copy.copy(resnet)}
    assert set(read_checkpoint(saved(content, tmp_path / "x.pth"))) == {f"model.{key}" for key in resnet}


@pytest.mark.parametrize("name", ["resnet18", "test_vit", "mobilenetv3_small_050", "mobilevit_xxs"])
@pytest.mark.parametrize("layout", ["whole", "features_only", "one channel"])
def test_the_nearest_network_is_named(name, layout):
    options = {"whole": {"num_classes": 7}, "features_only": {"features_only": True}, "one channel": {"in_chans": 1}}
    with torch.device("meta"):
        state = timm.create_model(name, **options[layout]).state_dict()
    assert nearest({f"model.{key}": tensor for key, tensor in state.items()}) == name
    assert nearest(state, but=name) is None


def test_no_network_is_named_for_what_is_none():
    with torch.device("meta"):
        state = timm.create_model("resnet18").state_dict()
    assert nearest({key: v for key, v in state.items() if not key.startswith("layer3.")}) is None
    assert nearest({"weight": torch.ones(3)}) is None
    assert nearest({}) is None


def test_the_table_of_networks_is_of_this_timm():
    """``make networks`` writes it anew."""
    lines = set(TARGET.read_text(encoding="utf-8").splitlines())
    for name in ("resnet18", "test_vit", "convnext_atto", "swin_tiny_patch4_window7_224", "efficientnet_b0"):
        assert " ".join(described(name)[:2]) in lines
