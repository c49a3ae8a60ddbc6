"""Preparing changes the form of a network and not what it computes. Batch norm has statistics as after training here."""

from __future__ import annotations

import copy
import dataclasses

import msgspec
import networks
import numpy as np
import pytest
import torch
from timm.utils.model import freeze_batch_norm_2d
from torch import nn

from edge_backbones.errors import ExportError, SourceError
from edge_backbones.toolchain import prepare as steps
from edge_backbones.toolchain.prepare import fold_batch_norm, prepare, warm_batch_norm

ROUNDING = 1e-5  # relative; folding reorders float32 arithmetic


def count(module: nn.Module, kind: type[nn.Module]) -> int:
    return sum(isinstance(m, kind) for m in module.modules())


def parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.fixture(scope="module")
def images(photographs) -> np.ndarray:
    return networks.normalised(networks.crops(photographs, 3, 64, 96))


# ---- whole networks -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "leaves_none"),
    [
        ("resnet10t", True),
        ("mobilenetv3_small_050", True),
        ("test_efficientnet", True),
        ("test_byobnet", True),
        ("resnetv2_18", False),
    ],
)
def test_the_folded_network_is_the_loaded_one_frozen(name, leaves_none, images):
    loaded = networks.trained_like(name, out_indices=(-3, -2, -1))
    frozen = freeze_batch_norm_2d(copy.deepcopy(loaded.module)).train()  # frozen statistics do not move in train mode
    prepared = prepare(loaded, networks.input_spec(64, 96))
    assert prepared.folded_batch_norms > 0
    assert (prepared.kept_batch_norms == 0) == leaves_none
    assert count(prepared.module, nn.BatchNorm2d) == prepared.kept_batch_norms
    for actual, plain, constant in zip(
        networks.maps_of(prepared.module, images),
        networks.maps_of(loaded.module, images),
        networks.maps_of(frozen, images),
        strict=True,
    ):
        assert networks.relative(actual, plain) < ROUNDING
        assert networks.relative(actual, constant) < ROUNDING


def test_loading_and_preparing_leave_the_network_in_eval_mode_and_the_loaded_one_untouched(images):
    loaded = networks.trained_like("test_efficientnet")
    state = {key: value.clone() for key, value in loaded.module.state_dict().items()}
    modules = [type(m) for m in loaded.module.modules()]
    prepared = prepare(loaded, networks.input_spec(64, 96))
    assert not any(m.training for m in (*loaded.module.modules(), *prepared.module.modules()))
    assert [type(m) for m in loaded.module.modules()] == modules
    assert all(torch.equal(value, state[key]) for key, value in loaded.module.state_dict().items())
    assert all(p.requires_grad for p in loaded.module.parameters())
    assert not any(p.requires_grad for p in prepared.module.parameters())


@pytest.mark.parametrize("wrong", ["LoadedBackbone", "PreparedBackbone"])
def test_a_module_in_train_mode_is_no_artifact(wrong):
    loaded = networks.trained_like("test_resnet")
    artifact = loaded if wrong == "LoadedBackbone" else prepare(loaded, networks.input_spec(64, 96))
    artifact.module.train()
    with pytest.raises(ValueError, match="eval mode"):
        dataclasses.replace(artifact)


@pytest.mark.parametrize("name", ["mobileone_s0", "repvgg_a0"])
def test_parallel_branches_are_merged(name, images):
    loaded = networks.trained_like(name, out_indices=(1, 2))
    prepared = prepare(loaded, networks.input_spec(64, 96))
    assert count(prepared.module, nn.Conv2d) < count(loaded.module, nn.Conv2d) / 1.5
    assert prepared.kept_batch_norms == 0
    for actual, expected in zip(
        networks.maps_of(prepared.module, images), networks.maps_of(loaded.module, images), strict=True
    ):
        assert networks.relative(actual, expected) < ROUNDING


def test_a_family_that_works_in_nhwc_comes_out_nchw():
    loaded = networks.trained_like("swin_tiny_patch4_window7_224", img_size=(64, 96), out_indices=(0, 1))
    spec = prepare(loaded, networks.input_spec(64, 96)).spec
    assert spec.channels == (96, 192)
    assert spec.strides == ((4, 4), (8, 8))


@pytest.mark.parametrize("name", ["resnet10t", "test_vit"])
def test_weights_behind_the_last_kept_stage_are_gone(name):
    options = {"img_size": (64, 96)}
    sizes = [parameters(networks.trained_like(name, out_indices=(i,), **options).module) for i in (1, -1)]
    prepared = prepare(networks.trained_like(name, out_indices=(1,), **options), networks.input_spec(64, 96))
    assert sizes[0] < sizes[1] / 2
    assert parameters(prepared.module) <= sizes[0]


# ---- the measured spec ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "size", "indices", "channels", "strides"),
    [
        ("resnet10t", (64, 96), (1, 4), (64, 512), ((4, 4), (32, 32))),
        ("test_vit", (64, 96), (0, 5), (64, 64), ((16, 16), (16, 16))),
        ("resnet10t", (65, 97), (1, 4), (64, 512), ((4, 4), (32, 32))),  # borders make the quotient uneven
        ("test_efficientnet", (50, 70), (0, 4), (16, 64), ((2, 2), (32, 32))),
    ],
)
def test_channels_and_strides_are_read_off_the_maps(name, size, indices, channels, strides):
    loaded = networks.trained_like(name, img_size=size, out_indices=indices)
    spec = prepare(loaded, networks.input_spec(*size)).spec
    assert spec.out_indices == indices
    assert spec.channels == channels
    assert spec.strides == strides
    assert tuple(spec.num_features[i] for i in indices) == channels
    assert len(spec.num_features) == len(spec.stage_names)


def test_wrong_metadata_is_not_believed():
    loaded = networks.trained_like("resnet10t", out_indices=(4,))
    lies = msgspec.structs.replace(loaded.spec, strides=((8, 8),), channels=(7,), num_features=(1, 2, 3, 4, 5))
    lying = dataclasses.replace(loaded, spec=lies)
    spec = prepare(lying, networks.input_spec(64, 96)).spec
    assert (spec.channels, spec.strides, spec.num_features) == ((512,), ((32, 32),), (1, 2, 3, 4, 512))


class Flat(nn.Module):
    def forward(self, x):
        return (x.mean((2, 3)),)


def test_what_is_not_a_feature_map_is_refused():
    with pytest.raises(SourceError, match=r"should be NCHW, the forward gave \[\(1, 3\)\]"):
        prepare(networks.hand_made(Flat()), networks.input_spec(8, 8))


def test_an_input_size_that_the_network_does_not_take_is_refused():
    with pytest.raises(SourceError, match="does not take images of 64x96"):
        prepare(networks.trained_like("test_vit3"), networks.input_spec(64, 96))


# ---- camera frames --------------------------------------------------------------------------------------------------


def test_preprocessing_of_camera_frames_is_in_the_module(photographs):
    loaded = networks.trained_like("resnet10t", out_indices=(-2, -1))
    assert len(set(loaded.image_config.mean)) == len(set(loaded.image_config.std)) == 3  # else their order is not seen
    frames = networks.crops(photographs, 2, 64, 96)
    prepared = prepare(loaded, networks.input_spec(64, 96, name="image"))
    expected = networks.maps_of(loaded.module, networks.normalised(frames, loaded.image_config))
    for actual, reference in zip(networks.maps_of(prepared.module, frames), expected, strict=True):
        assert networks.relative(actual, reference) < ROUNDING


# ---- where folding must not happen ----------------------------------------------------------------------------------


class Block(nn.Module):
    """What the small networks below are made of."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.conv2 = nn.Conv2d(3, 3, 3, padding=1)
        self.bn = nn.BatchNorm2d(3)
        self.bn2 = nn.BatchNorm2d(3)


class Plain(Block):
    def forward(self, x):
        return (self.bn2(self.conv2(self.bn(self.conv(x)).relu())),)


class ConvUsedTwice(Block):
    def forward(self, x):
        return (self.bn(self.conv(x)) + self.conv(x + 1),)


class ConvResultUsedTwice(Block):
    def forward(self, x):
        y = self.conv(x)
        return (self.bn(y) + y,)


class ConvResultReturned(Block):
    def forward(self, x):
        y = self.conv(x)
        return y, self.bn(y)


class NormUsedTwice(Block):
    def forward(self, x):
        return (self.bn(self.conv(x)) + self.bn(self.conv2(x)),)


class TwoNormsOnOneConv(Block):
    def forward(self, x):
        y = self.conv(x)
        return (self.bn(y) - self.bn2(y),)


class ActivationInBetween(Block):
    def forward(self, x):
        return (self.bn(torch.relu_(self.conv(x))),)


class WeightUsedElsewhere(Block):
    def forward(self, x):
        return (self.bn(self.conv(x)) + self.conv.weight.mean(),)


class NormBeforeConv(Block):
    def forward(self, x):
        return (self.conv(self.bn(x)),)


class BatchStatistics(Block):
    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(3, track_running_stats=False)

    def forward(self, x):
        return (self.bn(self.conv(x)),)


def hand_made(kind: type[nn.Module], stages: int = 1):
    torch.manual_seed(0)
    return networks.hand_made(kind(), stages=stages)


def test_a_chain_of_convolutions_and_norms_is_folded(images):
    loaded = hand_made(Plain)
    prepared = prepare(loaded, networks.input_spec(64, 96))
    assert (prepared.folded_batch_norms, prepared.kept_batch_norms) == (2, 0)
    (actual,), (expected,) = networks.maps_of(prepared.module, images), networks.maps_of(loaded.module, images)
    assert networks.relative(actual, expected) < 1e-6


@pytest.mark.parametrize(
    "kind",
    [
        ConvUsedTwice,
        ConvResultUsedTwice,
        ConvResultReturned,
        NormUsedTwice,
        TwoNormsOnOneConv,
        ActivationInBetween,
        WeightUsedElsewhere,
        NormBeforeConv,
        BatchStatistics,
    ],
)
def test_a_norm_that_is_not_alone_with_its_convolution_is_left(kind, images):
    loaded = hand_made(kind, stages=2 if kind is ConvResultReturned else 1)
    prepared = prepare(loaded, networks.input_spec(64, 96))
    assert prepared.folded_batch_norms == 0
    for actual, expected in zip(
        networks.maps_of(prepared.module, images), networks.maps_of(loaded.module, images), strict=True
    ):
        np.testing.assert_array_equal(actual, expected)


class Affineless(Block):
    """No affine parameters and a convolution without bias; grouped, strided and padded unevenly."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, (3, 5), stride=(2, 1), groups=3, bias=False)
        self.bn = nn.BatchNorm2d(6, affine=False, eps=1e-2)
        self.bn.running_mean.normal_()
        self.bn.running_var.uniform_(0.5, 2)

    def forward(self, x):
        return (self.bn(self.conv(nn.functional.pad(x, (0, 1, 2, 0)))),)


def test_a_norm_without_affine_parameters_folds_into_a_grouped_convolution(images):
    net = Affineless().eval()
    folded = copy.deepcopy(net)
    assert fold_batch_norm(folded, torch.from_numpy(images)) == (1, 1)  # bn2 is never called
    assert networks.relative(networks.maps_of(folded, images)[0], networks.maps_of(net, images)[0]) < 1e-6


class DependsOnItsOwnType(Block):
    """A network that a fold changes, as code that looks at its own modules is."""

    def forward(self, x):
        return (self.bn(self.conv(x)) * (2.0 if isinstance(self.bn, nn.BatchNorm2d) else 1.0),)


def test_a_fold_that_changes_the_network_is_refused():
    with pytest.raises(ExportError, match=r"folding batch norm changes stage0 by 5\.0e-01 relative"):
        prepare(hand_made(DependsOnItsOwnType), networks.input_spec(64, 96))


# ---- how the fold is judged ------------------------------------------------------------------------------------------


class AmplifiesRounding(Block):
    """Rounding of float32 is a hundredth of the map here: a network outside the statistics of its norms."""

    def forward(self, x):
        return (torch.sin(1e5 * self.bn(self.conv(x))),)


def test_a_right_fold_of_a_network_that_amplifies_rounding_is_accepted(images):
    loaded = hand_made(AmplifiesRounding)
    naive = copy.deepcopy(loaded.module)
    fold_batch_norm(naive, torch.from_numpy(images))
    (one,), (other,) = networks.maps_of(naive, images), networks.maps_of(loaded.module, images)
    assert networks.relative(one, other) > 2e-3  # in float32 it could not be told from a wrong fold
    prepared = prepare(loaded, networks.input_spec(64, 96))
    assert prepared.folded_batch_norms == 1
    # The weights are those of the exact fold, rounded once.
    norm, conv = loaded.module.bn, loaded.module.conv
    scale = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
    bias = (conv.bias.double() - norm.running_mean.double()) * scale + norm.bias.double()
    torch.testing.assert_close(prepared.module.conv.weight, (conv.weight.double() * scale.view(-1, 1, 1, 1)).float())
    torch.testing.assert_close(prepared.module.conv.bias, bias.float(), rtol=2e-7, atol=1e-8)


def other_eps(weight, bias, mean, var, eps, gamma, beta):
    return fuse(weight, bias, mean, var, 2 * eps, gamma, beta)


def dropped_bias(weight, bias, mean, var, eps, gamma, beta):
    return fuse(weight, None, mean, var, eps, gamma, beta)


def one_channel_scaled(weight, bias, mean, var, eps, gamma, beta):
    weight, bias = fuse(weight, bias, mean, var, eps, gamma, beta)
    with torch.no_grad():
        weight[-1] *= 1.001
    return weight, bias


fuse = steps.fuse_conv_bn_weights


@pytest.mark.parametrize("wrong", [other_eps, dropped_bias, one_channel_scaled])
@pytest.mark.parametrize("network", ["small", "sensitive", "resnet10t"])
def test_a_wrong_fold_is_refused(wrong, network, monkeypatch):
    if network == "resnet10t":
        loaded = networks.trained_like(network, out_indices=(-1,))
        for module in loaded.module.modules():  # timm's convolutions have none, and one is dropped here
            if isinstance(module, nn.Conv2d) and module.bias is None:
                module.bias = nn.Parameter(torch.full((module.out_channels,), 0.1))
    else:
        loaded = hand_made(Plain if network == "small" else AmplifiesRounding)
    monkeypatch.setattr(steps, "fuse_conv_bn_weights", wrong)
    with pytest.raises(ExportError, match=r"folding batch norm changes .* at most 1e-08 is rounding in float64"):
        prepare(loaded, networks.input_spec(64, 96))


def test_a_fold_into_a_shared_convolution_is_refused(monkeypatch):
    def careless(net, sample):
        net.conv.weight, net.conv.bias = fuse(
            net.conv.weight,
            net.conv.bias,
            net.bn.running_mean,
            net.bn.running_var,
            net.bn.eps,
            net.bn.weight,
            net.bn.bias,
        )
        net.bn = nn.Identity()
        return 1, 0

    monkeypatch.setattr(steps, "fold_batch_norm", careless)
    with pytest.raises(ExportError, match="folding batch norm changes stage0"):
        prepare(hand_made(ConvUsedTwice), networks.input_spec(64, 96))


class SingleOnly(Block):
    """Runs in float32 only, as an operator of a user's own does."""

    def forward(self, x):
        if x.dtype is not torch.float32:
            raise TypeError("this kernel takes float32")
        return (self.bn(self.conv(x)),)


def test_a_network_that_only_runs_in_float32_is_judged_in_float32(images, monkeypatch):
    loaded = hand_made(SingleOnly)
    prepared = prepare(loaded, networks.input_spec(64, 96))
    (actual,), (expected,) = networks.maps_of(prepared.module, images), networks.maps_of(loaded.module, images)
    assert networks.relative(actual, expected) < 1e-6
    monkeypatch.setattr(steps, "fuse_conv_bn_weights", dropped_bias)
    with pytest.raises(ExportError, match=r"at most 0\.001 is rounding in float32"):
        prepare(loaded, networks.input_spec(64, 96))


# ---- warming --------------------------------------------------------------------------------------------------------


def test_warm_statistics_are_the_mean_over_the_batches(images):
    loaded = hand_made(Plain)
    norm = loaded.module.bn
    batches = [images[:2], images[1:]]
    with torch.no_grad():
        outputs = [loaded.module.conv(torch.from_numpy(batch)).double() for batch in batches]
    warmed = warm_batch_norm(loaded, batches)
    expected_mean = sum(y.mean((0, 2, 3)) for y in outputs) / 2
    expected_var = sum(y.var((0, 2, 3), unbiased=True) for y in outputs) / 2
    torch.testing.assert_close(norm.running_mean.double(), expected_mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(norm.running_var.double(), expected_var, rtol=1e-4, atol=1e-5)
    assert warmed.source.batch_norm_warmed
    assert not loaded.source.batch_norm_warmed
    assert norm.momentum == 0.1
    assert not any(m.training for m in warmed.module.modules())


def test_a_network_without_batch_norm_is_not_said_to_be_warmed(images):
    loaded = networks.trained_like("test_vit", img_size=(64, 96))
    assert warm_batch_norm(loaded, [images]) is loaded
