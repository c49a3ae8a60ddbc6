"""Modules as people write them: each is loaded, folded and exported as what it computes, or refused in one true line."""

from __future__ import annotations

import copy
import dataclasses
import re
import warnings
from typing import Any

import networks
import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils import parametrizations, parametrize, prune

from edge_backbones.errors import SourceError
from edge_backbones.toolchain.artifacts import LoadedBackbone, PreparedBackbone
from edge_backbones.toolchain.export import export_onnx
from edge_backbones.toolchain.prepare import prepare
from edge_backbones.toolchain.sources.base import SourceOptions
from edge_backbones.toolchain.sources.load import load_source
from edge_backbones.toolchain.sources.module_source import ModuleSource
from edge_backbones.toolchain.sources.timm import load_timm

ROUNDING = 1e-6
SIZE = (32, 48)


class Net(nn.Module):
    """A convolution and a batch norm, then another without one."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, 2, 1, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.last = nn.Conv2d(8, 4, 3, 2, 1)

    def forward(self, x: torch.Tensor) -> Any:
        first = self.bn(self.conv(x)).relu()
        return first, self.last(first)


def net(kind: type[nn.Module] = Net) -> Any:
    torch.manual_seed(0)
    module = kind()
    networks.randomise_batch_norm(module)
    return module.eval()


def load(module: nn.Module, names: tuple[str, ...] = ("c1", "c2")) -> LoadedBackbone:
    return load_source(ModuleSource(module=module, stage_names=names, size=SIZE), SourceOptions())


def images(count: int = 2) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((count, 3, *SIZE)).astype(np.float32)


def assert_computes(prepared: PreparedBackbone, expected: list[np.ndarray]) -> None:
    actual = networks.maps_of(prepared.module, images())
    assert len(actual) == len(expected)
    for one, reference in zip(actual, expected, strict=True):
        assert networks.relative(one, reference) < ROUNDING


# ---- weights that are computed --------------------------------------------------------------------------------------


def weight_normed(module: Net) -> None:
    with pytest.warns(FutureWarning, match="weight_norm"):
        nn.utils.weight_norm(module.conv)
    module.conv.weight_g.data *= 1.7


def magnitude_pruned(module: Net) -> None:
    prune.l1_unstructured(module.conv, "weight", 0.5)
    prune.random_unstructured(module.last, "bias", 1)


class Symmetric(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight + weight.flip(-1)


COMPUTED = {
    "weight_norm": weight_normed,
    "spectral_norm": lambda m: nn.utils.spectral_norm(m.conv),
    "pruned": magnitude_pruned,
    "parametrizations.weight_norm": lambda m: parametrizations.weight_norm(m.conv),
    "parametrizations.spectral_norm": lambda m: parametrizations.spectral_norm(m.conv),
    "parametrized by hand": lambda m: parametrize.register_parametrization(m.conv, "weight", Symmetric()),
}


@pytest.mark.parametrize("kind", COMPUTED)
@pytest.mark.parametrize("ran", ["under no_grad", "with a gradient", "never"])
def test_a_computed_weight_becomes_plain_and_is_folded(kind, ran):
    module = net()
    COMPUTED[kind](module)
    module.eval()
    if ran != "never":
        with torch.set_grad_enabled(ran == "with a gradient"):
            module(torch.from_numpy(images()))
    state = {key: value.clone() for key, value in module.state_dict().items()}
    loaded = load(module)
    prepared = prepare(loaded, networks.input_spec(*SIZE))
    assert (prepared.folded_batch_norms, prepared.kept_batch_norms) == (1, 0)
    assert set(dict(loaded.module.net.named_parameters())) == set(dict(net().named_parameters()))
    assert_computes(prepared, networks.maps_of(module, images()))
    assert module.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in module.state_dict().items())


def clamp(module: Any, args: Any) -> None:
    module.weight.data.clamp_(-0.1, 0.1)


def clamp_below(module: Any, args: Any) -> None:
    with torch.no_grad():
        module.conv.weight.clamp_(-0.1, 0.1)


def compute_weight(module: Any, args: Any) -> None:
    module.weight = module.raw * 2


def with_own_weight_hook(module: Net) -> None:
    module.conv.raw = nn.Parameter(module.conv.weight.detach().clone())
    del module.conv.weight
    module.conv.register_forward_pre_hook(compute_weight)


HOOKED = {
    "weight clamped by its own hook": lambda m: m.conv.register_forward_pre_hook(clamp),
    "weight clamped by a hook above": lambda m: m.register_forward_pre_hook(clamp_below),
    "weight computed by an own hook": with_own_weight_hook,
    "norm whose result a hook changes": lambda m: m.bn.register_forward_hook(lambda module, args, out: out * 2),
    "norm whose input a hook changes": lambda m: m.bn.register_forward_pre_hook(lambda module, args: (args[0] * 2,)),
    "convolution whose result a hook changes": lambda m: m.conv.register_forward_hook(lambda m, args, out: out * 2),
}


@pytest.mark.parametrize("kind", HOOKED)
def test_what_a_hook_changes_is_not_folded(kind):
    module = net()
    HOOKED[kind](module)
    prepared = prepare(load(module), networks.input_spec(*SIZE))
    assert prepared.folded_batch_norms == 0
    assert_computes(prepared, networks.maps_of(copy.deepcopy(module), images()))


def test_a_hook_that_only_looks_is_no_obstacle():
    module, seen = net(), []
    module.conv.register_forward_hook(lambda module, args, out: seen.append(tuple(out.shape)))
    assert prepare(load(module), networks.input_spec(*SIZE)).folded_batch_norms == 1


class Scaled(nn.BatchNorm2d):
    """A norm that does more than its class says."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 3 * super().forward(x)


@pytest.mark.parametrize(("kind", "folded"), [(nn.SyncBatchNorm, 1), (Scaled, 0)])
def test_batch_norms_of_other_classes_are_folded_where_they_only_normalise(kind, folded):
    module = net()
    norm = kind(8)
    norm.load_state_dict(module.bn.state_dict())
    module.bn = norm.eval()
    prepared = prepare(load(module), networks.input_spec(*SIZE))
    assert prepared.folded_batch_norms == folded
    assert_computes(prepared, networks.maps_of(module, images()))


class Widened(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return torch.cat([weight, weight.flip(0)])


def test_a_parametrization_that_changes_the_shape_is_right_all_the_same():
    module = net()
    module.conv.weight = nn.Parameter(module.conv.weight[:4].detach().clone())
    parametrize.register_parametrization(module.conv, "weight", Widened(), unsafe=True)
    assert_computes(prepare(load(module), networks.input_spec(*SIZE)), networks.maps_of(module, images()))


# ---- wrappers -------------------------------------------------------------------------------------------------------


def never(*args: Any) -> None:
    raise AssertionError("a backend of torch.compile was started")


def compiled_inside(module: Net) -> Net:
    module.last = torch.compile(module.last, backend=never)
    module.conv.compile(backend=never)
    return module


class LikeDistributed(nn.parallel.DistributedDataParallel):
    """Without the process group that it needs."""

    def __init__(self, module: nn.Module) -> None:
        nn.Module.__init__(self)
        self.module = module


def compiled_in_place(module: Net) -> Net:
    module.compile(backend=never)
    return module


WRAPPED = {
    "torch.compile": lambda m: torch.compile(m, backend=never),
    "module.compile()": compiled_in_place,
    "torch.compile of parts": compiled_inside,
    "DataParallel": nn.DataParallel,
    "DistributedDataParallel": LikeDistributed,
    "both": lambda m: torch.compile(LikeDistributed(m), backend=never),
    "inside another": lambda m: nn.Sequential(nn.Identity(), torch.compile(nn.DataParallel(m), backend=never)),
}


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # of torch._dynamo's own imports
@pytest.mark.parametrize("kind", WRAPPED)
def test_wrappers_are_taken_off(kind, tmp_path):
    expected = networks.maps_of(net(), images())
    wrapped = WRAPPED[kind](net())
    loaded = load(wrapped)
    names = {type(m).__name__ for m in loaded.module.modules()}
    assert not names & {"OptimizedModule", "DataParallel", "LikeDistributed"}
    prepared = prepare(loaded, networks.input_spec(*SIZE, batch=2))
    assert prepared.folded_batch_norms == 1
    assert_computes(prepared, expected)
    session = onnxruntime.InferenceSession(export_onnx(prepared, tmp_path / "net.onnx").path)
    for actual, reference in zip(session.run(None, {"pixel_values": images()}), expected, strict=True):
        assert networks.relative(actual, reference) < 1e-5


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
def test_a_live_timm_network_may_be_wrapped_too():
    module = load_timm("test_resnet", SourceOptions(weights="random:0")).module.net
    plain, wrapped = (
        load_source(source, SourceOptions(img_size=(64, 64)))
        for source in (module, torch.compile(module, backend=never))
    )
    assert wrapped.source == plain.source
    assert wrapped.spec == plain.spec


# ---- adapters -------------------------------------------------------------------------------------------------------


class Adapter(nn.Module):
    """A layer as PEFT puts it in the place of a convolution: 1 x 1, of rank 2."""

    def __init__(self, base_layer: nn.Conv2d) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.down = nn.Conv2d(8, 2, 1, bias=False)
        self.up = nn.Conv2d(2, 4, 1, bias=False)
        self.merged = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base_layer(x) if self.merged else self.base_layer(x) + self.up(self.down(x))

    def merge(self, safe_merge: bool = False, adapter_names: Any = None) -> None:
        with torch.no_grad():
            self.base_layer.weight += torch.einsum("or,ri->oi", self.up.weight[..., 0, 0], self.down.weight[..., 0, 0])[
                ..., None, None
            ]
        self.merged = True


class Pointwise(Net):
    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Conv2d(8, 4, 1)


class Peft(nn.Module):
    """What PEFT's models have in common."""

    def __init__(self, base_model: nn.Module) -> None:
        super().__init__()
        self.base_model = base_model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.base_model(*args, **kwargs)

    def merge_and_unload(self) -> nn.Module:
        adapter = self.base_model.last
        adapter.merge()
        self.base_model.last = adapter.base_layer
        return self.base_model


def adapted() -> Any:
    module = net(Pointwise)
    module.last = Adapter(module.last)
    return module


@pytest.mark.parametrize("wrap", [lambda m: m, Peft, lambda m: nn.Sequential(Peft(m))])
def test_adapters_are_merged_on_the_copy(wrap):
    module = wrap(adapted())
    expected = networks.maps_of(module, images())
    assert networks.relative(expected[1], networks.maps_of(net(Pointwise), images())[1]) > 0.01
    loaded = load(module)
    assert not [m for m in loaded.module.modules() if isinstance(m, (Adapter, Peft))]
    assert_computes(prepare(loaded, networks.input_spec(*SIZE)), expected)
    assert [m.merged for m in module.modules() if isinstance(m, Adapter)] == [False]


class Unmergeable(Peft):
    def merge_and_unload(self) -> nn.Module:
        raise ValueError("cannot merge adapters of a quantised model")


def test_adapters_that_do_not_merge_are_refused_with_the_call_that_merges():
    with pytest.raises(
        SourceError, match=r"cannot be merged \(ValueError: cannot merge .*: pass model\.merge_and_unload"
    ):
        load(Unmergeable(adapted()))


# ---- what cannot be taken -------------------------------------------------------------------------------------------


def scripted(module: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated, by another class of warning in each release
        return torch.jit.script(module)


def with_scripted_part(module: Net) -> nn.Module:
    module.last = scripted(module.last)
    return module


def quantised(module: Net) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated
        module.last = torch.ao.nn.quantized.Conv2d(8, 4, 3)
    return module


def with_fake_quantisation(module: Net) -> nn.Module:
    module.last = nn.Sequential(module.last, torch.ao.quantization.FakeQuantize())
    return module


def lazy(module: Net) -> nn.Module:
    module.last = nn.LazyConv2d(4, 3)
    return module


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (scripted, "this .* is TorchScript: pass the nn.Module that it was scripted or traced from"),
        (with_scripted_part, "last of this Net is TorchScript"),
        (quantised, r"last of this Net is quantised already \(Conv2d\): pass the float network"),
        (with_fake_quantisation, r"last\.1 of this Net is quantised already \(FakeQuantize\)"),
        (lazy, r"last\.weight of this Net has no shape yet \(a lazy layer\): run the module on one image first"),
        (lambda m: m.to("meta"), "this Net is on the meta device and has no weights: load them first"),
    ],
)
def test_what_has_no_float_weights_is_refused(change, words):
    with pytest.raises(SourceError, match=words):
        load(change(net()))


class Holder(Net):
    def __init__(self) -> None:
        super().__init__()
        self.handle = (i for i in range(3))


def test_a_module_that_does_not_copy_is_refused():
    with pytest.raises(SourceError, match="this Holder cannot be copied: cannot pickle 'generator' object"):
        load(net(Holder))


class Guided(Net):
    def forward(self, x: torch.Tensor, mask: torch.Tensor, *, scale: float, bias: float = 0.0) -> Any:
        return super().forward(x * mask * scale)


def test_a_forward_with_more_arguments_is_refused_by_their_names():
    with pytest.raises(
        SourceError, match="forward of this Guided needs mask, scale besides the image: wrap it in a module"
    ):
        load(net(Guided))


class Dropping(Net):
    def forward(self, x: torch.Tensor) -> Any:
        return tuple(functional.dropout(m, 0.1) for m in super().forward(x))  # training=True is its default


def test_a_network_that_draws_random_numbers_is_refused():
    with pytest.raises(SourceError, match=r"another c1 each time it sees the same image: .*training=self\.training"):
        prepare(load(net(Dropping)), networks.input_spec(*SIZE))


class Root(Net):
    def forward(self, x: torch.Tensor) -> Any:
        first, second = super().forward(x)
        return first, (second - 100).sqrt()


def test_values_that_are_not_finite_are_traced_to_their_cause():
    module = net()
    module.last.weight.data[1, 2, 0, 0] = torch.nan
    with pytest.raises(
        SourceError, match=r"c2 is not finite on an image of noise: net\.last\.weight holds 1 of 288 values"
    ):
        prepare(load(module), networks.input_spec(*SIZE))
    with pytest.raises(
        SourceError, match=r"c2 is not finite .*: all its weights are finite, so something in its forward"
    ):
        prepare(load(net(Root)), networks.input_spec(*SIZE))


# ---- types ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_module_in_another_float_type_is_copied_to_float32(dtype):
    module = net().to(dtype)
    expected = networks.maps_of(copy.deepcopy(module).float(), images())
    assert_computes(prepare(load(module), networks.input_spec(*SIZE)), expected)
    assert {p.dtype for p in module.parameters()} == {dtype}


class FloatInside(Net):
    """Asks for float32 by name, as much attention does, and keeps a table that is no buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.table = torch.linspace(0.5, 2, 8).view(1, 8, 1, 1)
        self.grid: Any = None

    def forward(self, x: torch.Tensor) -> Any:
        if self.grid is None:
            self.grid = torch.linspace(-1, 1, x.shape[-1], dtype=torch.float32)
        first = functional.conv2d((x + self.grid).float(), self.conv.weight.to(torch.float32), stride=2, padding=1)
        first = self.bn(first * 1.0) + torch.zeros(1, dtype=torch.float32)
        return first, self.last(functional.conv2d(first, self.table.expand(8, 8, 1, 1)))


def test_code_that_asks_for_float32_is_judged_in_float64_all_the_same():
    module = net(FloatInside)
    loaded = load(module)
    loaded.module.net.grid = None
    prepared = prepare(loaded, networks.input_spec(*SIZE))
    assert prepared.module.net.grid.dtype == prepared.module.net.table.dtype == torch.float32
    assert {t.dtype for t in prepared.module.state_dict().values() if t.is_floating_point()} == {torch.float32}
    assert_computes(prepared, networks.maps_of(module, images()))


class WritesItsInput(Net):
    def forward(self, x: torch.Tensor) -> Any:
        return super().forward(x.sub_(0.5).mul_(2))


def test_a_network_that_normalises_its_input_in_place_leaves_the_images_alone(tmp_path):
    module = net(WritesItsInput)
    given = images()
    expected = networks.maps_of(module, given.copy())
    prepared = prepare(load(module), networks.input_spec(*SIZE, batch=2))
    for actual, reference in zip(networks.maps_of(prepared.module, given), expected, strict=True):
        assert networks.relative(actual, reference) < ROUNDING
    np.testing.assert_array_equal(given, images())
    session = onnxruntime.InferenceSession(export_onnx(prepared, tmp_path / "net.onnx").path)
    for actual, reference in zip(session.run(None, {"pixel_values": given}), expected, strict=True):
        assert networks.relative(actual, reference) < 1e-5


# ---- outputs --------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Maps:
    low: torch.Tensor
    high: torch.Tensor
    loss: Any = None


class Returning(Net):
    form: Any = None

    def forward(self, x: torch.Tensor) -> Any:
        return type(self).form(*super().forward(x))


def returning(form: Any) -> nn.Module:
    return net(type("Returning", (Returning,), {"form": staticmethod(form)}))


@pytest.mark.parametrize(
    "form",
    [
        lambda a, b: [a, b],
        lambda a, b: (a, None, b, None),
        lambda a, b: {"x": a, "y": b},
        lambda a, b: {"c2": b, "c1": a},  # by name, not by place
        lambda a, b: {"c2": b, "aux": {"mask": a > 0}, "c1": a},
        lambda a, b: {"maps": {"low": [a], "high": (b, None)}},
        lambda a, b: Maps(a, b),
        lambda a, b: (Maps(a, b), None),
        lambda a, b: (a.double(), b.double()),
    ],
)
def test_maps_are_found_in_what_a_forward_returns(form, tmp_path):
    expected = networks.maps_of(net(), images())
    prepared = prepare(load(returning(form)), networks.input_spec(*SIZE, batch=2))
    assert_computes(prepared, expected)
    session = onnxruntime.InferenceSession(export_onnx(prepared, tmp_path / "net.onnx").path)
    assert [output.name for output in session.get_outputs()] == ["c1", "c2"]
    for actual, reference in zip(session.run(None, {"pixel_values": images()}), expected, strict=True):
        assert networks.relative(actual, reference) < 1e-5


@pytest.mark.parametrize(
    ("form", "words"),
    [
        (
            lambda a, b: (a, b > 0),
            "output[1] is torch.bool of shape (1, 4, 8, 12): a stage must be a dense float tensor",
        ),
        (lambda a, b: {"c1": a, "ids": b.int()}, "output['ids'] is torch.int32 of shape"),
        (lambda a, b: (a, torch.fft.rfft2(b)), "output[1] is torch.complex64 of shape"),
        (lambda a, b: (a, [{"note": "ok"}]), "output[1][0]['note'] is a str: a stage must be a float tensor"),
        (lambda a, b: (a, b, 3.5), "output[2] is a float"),
        (lambda a, b: Maps(a, b, loss=0), "output['loss'] is a int"),
        (lambda a, b: a.to_sparse(), "output is torch.sparse_coo of shape"),
        (lambda a, b: None, "returns [], not NCHW, NCHW for ('c1', 'c2')"),
        (lambda a, b: (a, None), "returns [(1, 8, 16, 24)], not NCHW, NCHW for ('c1', 'c2')"),
        (lambda a, b: (a, b.mean()), "returns [(1, 8, 16, 24), ()], not NCHW, NCHW"),
    ],
)
def test_what_is_no_map_is_named_with_its_type(form, words):
    with pytest.raises(SourceError, match=re.escape(words)):
        load(returning(form))
