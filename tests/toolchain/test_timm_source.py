"""Networks of timm: names, stages, options, and weights from everywhere that weights come from."""

from __future__ import annotations

import logging
import time
from pathlib import Path

import huggingface_hub
import networks
import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file

from edge_backbones.errors import HubUnreachableError, InputError, SourceError
from edge_backbones.toolchain.sources.base import SourceOptions
from edge_backbones.toolchain.sources.timm import load_timm

RESNET_STAGES = ("act1", "layer1", "layer2", "layer3", "layer4")


def load(name: str, **options):
    return load_timm(name, SourceOptions(**{"weights": "random:0", **options}))


@pytest.fixture(scope="module")
def images(photographs) -> np.ndarray:
    return networks.normalised(networks.crops(photographs, 2, 64, 96))


# ---- names ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("resnet81", "resnet18"),
        ("mobilnetv3_small_050", "mobilenetv3_small_050"),
        ("resnet18.a1_in1kk", r"resnet18\.a1_in1k"),
        ("test_resnet.r999_in1k", r"test_resnet\.r160_in1k"),
        ("qqqqqqqq", "timm.list_models"),
    ],
)
def test_an_unknown_name_suggests_near_ones(name, near):
    with pytest.raises(SourceError, match=f"no model '{name}'.*{near}"):
        load(name)


# ---- stages ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("selection", "indices"),
    [
        ({}, (4,)),
        ({"out_indices": (0, 1, 2, 3, 4)}, (0, 1, 2, 3, 4)),
        ({"out_indices": (1, 3)}, (1, 3)),
        ({"out_indices": (-2, -1)}, (3, 4)),
        ({"out_indices": (1, -1)}, (1, 4)),
        ({"out_features": ("layer1", "layer3")}, (1, 3)),
        ({"out_features": ("layer2",), "out_indices": (-3,)}, (2,)),
    ],
)
def test_stages_are_kept_by_index_or_name(selection, indices, images):
    backbone = load("test_resnet", **selection)
    assert backbone.spec.stage_names == RESNET_STAGES
    assert backbone.spec.out_indices == selection.get("out_indices", indices)
    assert backbone.spec.out_features == tuple(RESNET_STAGES[i] for i in indices)
    assert backbone.spec.strides == tuple((2 ** (i + 1),) * 2 for i in indices)
    all_maps = networks.maps_of(load("test_resnet", out_indices=(0, 1, 2, 3, 4)).module, images)
    for actual, index in zip(networks.maps_of(backbone.module, images), indices, strict=True):
        np.testing.assert_array_equal(actual, all_maps[index])


@pytest.mark.parametrize(
    ("selection", "message"),
    [
        ({"out_indices": (1, 1)}, "duplicates"),
        ({"out_indices": (4, -1)}, r"duplicates, got \[4, -1\]\(equivalent to \(4, 4\)\)"),
        ({"out_indices": (3, 1)}, r"same order as stage_names, expected \[1, 3\]"),
        ({"out_indices": (5,)}, "valid indices"),
        ({"out_indices": (-6,)}, "valid indices"),
        ({"out_indices": ()}, "at least one of"),
        ({"out_features": ("layer9",)}, "subset of stage_names"),
        ({"out_features": ("layer3", "layer1")}, "same order"),
        ({"out_features": ("layer1",), "out_indices": (2,)}, "correspond to the same stages"),
        ({"out_features": ("layer1",), "out_indices": (1, 2)}, "same length"),
    ],
)
def test_a_bad_stage_selection_is_refused(selection, message):
    with pytest.raises(InputError, match=message):
        load("test_resnet", **selection)


def test_every_block_of_a_transformer_is_a_stage():
    backbone = load("test_vit", out_indices=(0, 5))
    assert backbone.spec.stage_names == tuple(f"blocks.{i}" for i in range(6))
    assert backbone.spec.out_features == ("blocks.0", "blocks.5")


# ---- options of the architecture ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_efficientnet"])
@pytest.mark.parametrize("channels", [1, 4])
def test_other_numbers_of_channels(name, channels):
    backbone = load(name, num_channels=channels, img_size=(64, 96))
    assert backbone.channels_in == channels
    assert len(backbone.image_config.mean) == len(backbone.image_config.std) == channels
    three = load(name).image_config
    assert backbone.image_config.mean[0] == pytest.approx(sum(three.mean) / 3)
    (feature_map,) = networks.maps_of(backbone.module, np.zeros((2, channels, 64, 96), np.float32))
    assert feature_map.shape[0] == 2
    assert backbone.source.options == {"num_channels": channels}


def test_a_transformer_is_made_for_the_asked_size(images):
    made = load("test_vit", img_size=(64, 96))
    assert (made.height, made.width) == (64, 96)
    (feature_map,) = networks.maps_of(made.module, images)
    assert feature_map.shape == (2, 64, 64 // 16, 96 // 16)


def test_a_convolutional_network_takes_any_size(images):
    made = load("test_resnet", img_size=(64, 96))
    assert (made.height, made.width) == (64, 96)
    assert networks.maps_of(made.module, images)[0].shape[2:] == (2, 3)


def test_the_networks_own_size_is_the_default():
    assert [(made.height, made.width) for made in (load("resnet10t"), load("test_vit"))] == [(176, 176), (160, 160)]


def test_output_stride_trades_stride_for_dilation(images):
    backbone = load("resnet10t", output_stride=16, out_indices=(3, 4))
    assert backbone.spec.strides == ((16, 16), (16, 16))
    assert [m.shape[2:] for m in networks.maps_of(backbone.module, images)] == [(4, 6), (4, 6)]
    assert backbone.source.options["output_stride"] == 16


@pytest.mark.parametrize(("name", "stride"), [("test_vit", 16), ("resnet10t", 5)])
def test_an_output_stride_that_the_architecture_does_not_have_is_refused(name, stride):
    with pytest.raises(SourceError, match=f"{name} cannot be dilated to a stride of {stride} "):
        load(name, output_stride=stride)


# ---- random weights -------------------------------------------------------------------------------------------------


def test_random_weights_depend_on_the_seed_and_on_nothing_else(images):
    torch.manual_seed(1234)
    state = torch.random.get_rng_state()
    first = networks.maps_of(load("test_vit", img_size=(64, 96)).module, images)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.rand(17)
    again = load("test_vit", img_size=(64, 96))
    other = load("test_vit", img_size=(64, 96), weights="random:1")
    np.testing.assert_array_equal(first[0], networks.maps_of(again.module, images)[0])
    assert networks.relative(networks.maps_of(other.module, images)[0], first[0]) > 0.1
    assert (again.source.seed, other.source.seed) == (0, 1)


@pytest.mark.parametrize(
    ("name", "asleep"),
    [
        ("resnet18", "layer1.0.bn2.weight"),  # scale of a branch's last norm
        ("swinv2_cr_tiny_224", "stages_0.blocks.0.norm1.weight"),
        ("nf_regnet_b0", "stages_1.0.conv3.gain"),
        ("convnext_atto", "stages_0.blocks.0.gamma"),  # starts at 1e-6
        ("beit_base_patch16_224", "blocks.0.attn.relative_position_bias_table"),
    ],
)
def test_no_branch_and_no_table_of_random_weights_is_left_at_zero(name, asleep):
    """As training starts them they would take the branch, or the table, out of every comparison."""
    stated = {
        key: p for key, p in timm.create_model(name, features_only=True).named_parameters() if key.endswith(asleep)
    }
    assert len(stated) == 1
    assert all(p.abs().max() <= 1e-5 for p in stated.values())
    first, again = load(name, out_indices=(2,)), load(name, out_indices=(2,))
    woken = {key: p for key, p in first.module.named_parameters() if key.endswith(asleep)}
    assert len(woken) == 1
    assert all(0.01 < p.abs().max() < 0.2 for p in woken.values())
    for (key, one), (_, other) in zip(first.module.named_parameters(), again.module.named_parameters(), strict=True):
        assert torch.equal(one, other), key
        assert key.endswith("bias") or one.abs().max() > 0, key


@pytest.mark.parametrize("weights", ["random", "random:", "random:x", "random:-1", "random:1.5"])
def test_random_weights_need_a_seed(weights):
    with pytest.raises(SourceError, match=r"need a seed, as in random:0"):
        load("test_resnet", weights=weights)


# ---- checkpoints ----------------------------------------------------------------------------------------------------


def classifier(name: str, **options) -> torch.nn.Module:
    """A whole network, as somebody trained it."""
    torch.manual_seed(7)
    net = timm.create_model(name, **options).eval()
    networks.randomise_batch_norm(net, seed=7)
    return net


def saved(net: torch.nn.Module, path: Path) -> Path:
    if path.suffix == ".safetensors":
        save_file(net.state_dict(), path)
    else:
        torch.save(net.state_dict(), path)
    return path


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("test_resnet", {"num_classes": 7}),
        ("test_efficientnet", {}),
        ("test_vit", {"num_classes": 7, "img_size": (64, 96)}),
        ("test_resnet", {"in_chans": 4}),
    ],
)
def test_a_checkpoint_gives_the_maps_of_the_network_it_was_saved_from(tmp_path, images, name, options, suffix):
    net = classifier(name, **options)
    path = saved(net, tmp_path / f"trained{suffix}")
    channels = options.get("in_chans", 3)
    batch = np.repeat(images[:, :1], channels, axis=1) if channels != 3 else images
    with torch.no_grad():
        expected = net.forward_intermediates(torch.from_numpy(batch), indices=(-2, -1), intermediates_only=True)
    backbone = load(name, weights=str(path), num_channels=channels, img_size=(64, 96), out_indices=(-2, -1))
    for actual, reference in zip(networks.maps_of(backbone.module, batch), expected, strict=True):
        assert networks.relative(actual, reference.numpy()) < 1e-6  # attention is written as matrix products
    assert backbone.source.weights == "checkpoint"
    assert backbone.source.weights_sha256 is not None


def test_weights_are_found_inside_a_training_checkpoint(tmp_path, images):
    net = classifier("test_resnet")
    content = {"epoch": 3, "state_dict": {f"module.{key}": value for key, value in net.state_dict().items()}}
    torch.save(content, tmp_path / "last.pt")
    plain = load("test_resnet", weights=str(saved(net, tmp_path / "plain.safetensors")))
    trained = load("test_resnet", weights=str(tmp_path / "last.pt"))
    (actual,), (expected,) = networks.maps_of(trained.module, images), networks.maps_of(plain.module, images)
    np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize(
    ("saved_from", "message"),
    [
        ("test_vit", r"has no weights for \d+ tensors of test_resnet, conv1\.0\.weight first"),
        ("test_convnext", r"has no weights for \d+ tensors of test_resnet, conv1\.0\.weight first"),
        ("test_efficientnet", r"does not fit test_resnet: size mismatch for bn1\.weight"),
        ("resnet10t", r"does not fit test_resnet: size mismatch for conv1\.0\.weight"),
    ],
)
def test_a_checkpoint_of_another_network_is_refused_naming_a_tensor(tmp_path, saved_from, message):
    path = saved(classifier(saved_from), tmp_path / "other.safetensors")
    with pytest.raises(SourceError, match=rf"other\.safetensors {message}"):
        load("test_resnet", weights=str(path))


@pytest.mark.parametrize("missing", ["layer2.0.conv1.weight", "layer2.0.bn1.weight", "layer2.0.bn1.running_var"])
def test_a_checkpoint_that_lacks_a_tensor_is_refused(tmp_path, missing):
    state = classifier("test_resnet").state_dict()
    del state[missing]
    save_file(state, tmp_path / "part.safetensors")
    with pytest.raises(SourceError, match=rf"part\.safetensors has no weights for 1 tensors of .*, {missing} first"):
        load("test_resnet", weights=str(tmp_path / "part.safetensors"))


class _CreatesAFile:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_with_code_is_refused_and_not_run(tmp_path, zipped):
    evidence, path = tmp_path / "executed", tmp_path / "weights.pth"
    torch.save({"conv1.weight": _CreatesAFile(evidence)}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(SourceError, match=r"weights\.pth cannot be read as a checkpoint"):
        load("test_resnet", weights=str(path))
    assert not evidence.exists()
    torch.load(path, weights_only=False)
    assert evidence.exists()  # the file would have done it


def test_a_whole_pickled_module_is_refused(tmp_path):
    torch.save(classifier("test_resnet"), tmp_path / "module.pth")
    with pytest.raises(SourceError, match=r"module\.pth cannot be read as a checkpoint"):
        load("test_resnet", weights=str(tmp_path / "module.pth"))


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("kept", [0, 5, 20_000])
def test_a_truncated_checkpoint_is_refused(tmp_path, suffix, kept):
    path = saved(classifier("test_resnet"), tmp_path / f"half{suffix}")
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(SourceError, match=rf"half\{suffix} cannot be read as a checkpoint"):
        load("test_resnet", weights=str(path))


def test_a_file_of_something_else_is_refused(tmp_path):
    torch.save(torch.zeros(3), tmp_path / "tensor.pth")
    with pytest.raises(SourceError, match=r"tensor\.pth cannot be read as a checkpoint"):
        load("test_resnet", weights=str(tmp_path / "tensor.pth"))


@pytest.mark.parametrize("weights", ["no/such/file.pth", ".", ""])
def test_weights_that_are_nothing_known_are_refused(weights):
    with pytest.raises(SourceError, match="neither 'pretrained', 'random:SEED' nor a file"):
        load("test_resnet", weights=weights)


# ---- the model hub --------------------------------------------------------------------------------------------------


@pytest.fixture
def no_hub(monkeypatch):
    """A machine without network and with an empty cache; ``cached`` puts a file into it."""
    cache: dict[str, Path] = {}

    def unreachable():
        raise ConnectionError("no route to host")

    def cached(repository: str, filename: str, **_):
        return str(cache[filename]) if filename in cache else None

    monkeypatch.setattr(huggingface_hub, "get_session", unreachable)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", cached)
    return cache


def test_an_unreachable_hub_is_said_quickly_with_the_ways_out(no_hub):
    started = time.monotonic()
    with pytest.raises(HubUnreachableError, match=r"hub does not answer.*--weights model\.safetensors.*random:0"):
        load("test_resnet", weights="pretrained")
    assert time.monotonic() - started < 5


@pytest.mark.parametrize("filename", ["model.safetensors", "pytorch_model.bin"])
def test_cached_weights_serve_when_the_hub_is_away(no_hub, tmp_path, images, filename):
    net = classifier("test_resnet")
    no_hub[filename] = saved(net, tmp_path / filename)
    backbone = load("test_resnet", weights="pretrained", out_indices=(-1,))
    with torch.no_grad():
        (expected,) = net.forward_intermediates(torch.from_numpy(images), indices=(-1,), intermediates_only=True)
    np.testing.assert_array_equal(networks.maps_of(backbone.module, images)[0], expected.numpy())
    assert backbone.source.weights == "pretrained"


def test_the_classifier_of_a_healthy_file_is_not_talked_of(no_hub, tmp_path, caplog):
    no_hub["model.safetensors"] = saved(classifier("test_resnet"), tmp_path / "model.safetensors")
    load("test_resnet", weights="pretrained")
    assert "nexpected keys" not in caplog.text
    logging.getLogger("timm.models._builder").warning("Unexpected keys (a) found while loading pretrained weights.")
    assert "Unexpected keys (a)" in caplog.text, "the logger is as it was"


def test_a_network_that_was_never_trained_says_so(no_hub):
    with pytest.raises(SourceError, match=r"timm has no pretrained weights for seresnet18: .*random:0"):
        load("seresnet18", weights="pretrained")
