"""DLPack with torch at the other end, over host memory: the code paths are those of GPU memory."""

from __future__ import annotations

import gc
import weakref

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from edge_backbones.engines.gpu import dlpack
from edge_backbones.engines.gpu.arrays import from_foreign, is_on_gpu
from edge_backbones.engines.gpu.dlpack import ForeignArray
from edge_backbones.errors import InputError
from edge_backbones.integrations.modules import EngineModule
from edge_backbones.runtime.backbone import EdgeBackbone
from edge_backbones.testing import SPEC, NumpySession, pooled, pooling_input

CPU = 1
DTYPES = {
    torch.float16: np.float16,
    torch.float32: np.float32,
    torch.float64: np.float64,
    torch.uint8: np.uint8,
    torch.int8: np.int8,
    torch.int32: np.int32,
    torch.int64: np.int64,
    torch.bool: np.bool_,
}


class Owner:
    """What keeps memory, and can be watched."""


class OnHost:
    """Host memory, exported by the code that exports GPU memory."""

    def __init__(self, array, owner, versioned):
        self.array, self.owner, self.versioned = array, owner, versioned

    def __dlpack_device__(self):
        return CPU, 0

    def __dlpack__(self, **_):
        array = self.array
        return dlpack.make_capsule(
            array.ctypes.data, array.shape, array.dtype, self.owner, device=(CPU, 0), versioned=self.versioned
        )


def from_host(values) -> ForeignArray:
    return dlpack.read(values, None, (CPU,))


IMAGES = torch.randn(2, 3, 32, 48, generator=torch.Generator().manual_seed(0))


def maps_of(tensor: torch.Tensor) -> tuple[np.ndarray, ...]:
    return EdgeBackbone(SPEC, pooling_input(), NumpySession(pooling_input()))(tensor).feature_maps


@pytest.mark.parametrize(
    "view",
    [
        lambda t: t,
        lambda t: t.double(),
        lambda t: t[:1].expand(2, -1, -1, -1),
        lambda t: t.to(memory_format=torch.channels_last),
        lambda t: t.flip(3),
        lambda t: torch.complex(t, -t).imag,
        lambda t: torch.complex(t, -t).conj().imag.resolve_neg(),
    ],
)
def test_a_tensor_on_the_host_gives_the_maps_of_its_values(view):
    tensor = view(IMAGES)
    np.testing.assert_allclose(maps_of(tensor)[0], pooled(tensor.float().numpy())[0], atol=1e-6)


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
@pytest.mark.parametrize(
    ("view", "message"),
    [
        (
            lambda t: t.bfloat16(),
            r"of torch.bfloat16 cannot be read .*: pass a dense float32 tensor on the CPU, detached",
        ),
        (lambda t: t.to(torch.float8_e4m3fn), r"of torch.float8_e4m3fn cannot be read .*: pass a dense float32 tensor"),
        (lambda t: t.requires_grad_(), r"cannot be read through DLPack \(.*gradient.*\): pass .*, detached"),
        (lambda t: torch.nn.Parameter(t), r"cannot be read through DLPack \(.*gradient.*\): pass .*, detached"),
        (lambda t: t.to_sparse(), r"cannot be read through DLPack \(.*layout.*\): pass a dense float32 tensor"),
        (lambda t: t.to_mkldnn(), r"does not say where it is \(.*Opaque.*\): pass a dense array on a GPU or the CPU"),
        (
            lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8),
            r"of torch.qint8 cannot be read .*: pass a dense",
        ),
        (lambda t: t.to("meta"), r"does not say where it is \(.*meta.*\): pass a dense array on a GPU or the CPU"),
        (lambda t: torch.complex(t, t).conj().imag, r"Tensor is a negative view, .*: pass tensor.resolve_neg\(\)"),
        (lambda t: torch.complex(t, t).conj(), r"Tensor is a conjugate view, .*: pass tensor.resolve_conj\(\)"),
        (lambda t: torch._efficientzerotensor(t.shape), r"is a zero tensor without memory, .*: pass tensor.clone\(\)"),
        (lambda t: t.long(), r"of dtype int64 does not fit: this engine takes float32"),
        (lambda t: torch.complex(t, t), r"of dtype complex64 does not fit: this engine takes float32"),
        (lambda t: t.double() * 1e39, r"of dtype float64 has values beyond float32"),
        (lambda t: t / 0, r"has values that are not finite \(4608 infinite in sample 0"),
        (lambda t: t[:0], r"of shape \(0, 3, 32, 48\) does not fit"),
    ],
)
def test_a_tensor_whose_values_cannot_be_passed_is_refused_in_one_true_line(view, message):
    with pytest.raises(InputError, match=message) as refused:
        maps_of(view(IMAGES.clone()))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "make", [lambda t: torch.complex(t, t).conj().imag, lambda t: torch._efficientzerotensor(t.shape)]
)
def test_views_are_refused_wherever_they_are(make):
    """On a GPU as here: DLPack passes memory, and the values are others."""
    with pytest.raises(InputError, match="which DLPack cannot pass"):
        from_foreign(make(IMAGES), stream=0)


def test_bfloat16_of_numpy_is_taken():
    """As jax has it, with the dtype of ml_dtypes."""
    ml_dtypes = pytest.importorskip("ml_dtypes")
    images = IMAGES.numpy().astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(maps_of(images)[0], pooled(images.astype(np.float32))[0])


@given(st.sampled_from(list(DTYPES)), st.lists(st.integers(0, 4), max_size=4), st.data())
def test_any_tensor_is_read_as_it_is(dtype, shape, data):
    tensor = torch.zeros(shape, dtype=dtype).permute(data.draw(st.permutations(range(len(shape)))))
    foreign = from_host(tensor)
    assert foreign.shape == tuple(tensor.shape)
    assert foreign.dtype == DTYPES[dtype]
    assert foreign.contiguous == tensor.is_contiguous()
    assert foreign.pointer == tensor.data_ptr()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_module_refuses_values_beyond_the_dtype_of_its_engine(dtype):
    input = msgspec.structs.replace(pooling_input(), pixel_dtype="float16")
    module = EngineModule(EdgeBackbone(SPEC, input, NumpySession(input)))
    assert module.infer(IMAGES.to(dtype))["feature_maps"][0].dtype == dtype
    with pytest.raises(InputError, match="values beyond float16, whose largest is 65504"):
        module.infer(IMAGES.to(dtype) * 1e5)


def test_repeated_axes_are_not_contiguous():
    assert not from_host(torch.zeros(3, 1).expand(3, 4)).contiguous


def test_channels_last_is_not_c_order():
    assert not from_host(torch.zeros(1, 3, 8, 8).to(memory_format=torch.channels_last)).contiguous


def test_a_tensor_lives_as_long_as_it_is_held():
    values = np.arange(6, dtype=np.float32)
    watched = weakref.ref(values)
    foreign = from_host(torch.from_numpy(values))
    assert foreign.pointer == values.ctypes.data
    del values
    gc.collect()
    assert watched() is not None
    del foreign
    assert watched() is None


@pytest.mark.parametrize(
    ("tensor", "said"),
    [
        (torch.zeros(2, dtype=torch.bfloat16), "dtype torch.bfloat16"),
        (torch.zeros(2, dtype=torch.complex64), "dtype complex64"),
        (torch.zeros(2, dtype=torch.float8_e4m3fn), "float8_e4m3fn"),
        (torch.zeros(2, dtype=torch.float8_e5m2), "float8_e5m2"),
        (torch.zeros(2, requires_grad=True), r"torch\.Tensor of dtype torch\.float32 cannot .*require grad"),
        (torch.zeros(2, dtype=torch.complex64).conj(), "conjugate"),
        (torch.zeros(2, 2).to_sparse(), "layout"),
    ],
)
def test_what_cannot_be_passed_is_refused(tensor, said):
    with pytest.raises(InputError, match=said):
        from_host(tensor)


def test_tensors_on_the_host_and_nowhere():
    assert not is_on_gpu(torch.zeros(2))
    with pytest.raises(InputError, match="device \\(1, 0\\)"):
        from_foreign(torch.zeros(2), stream=0)
    with pytest.raises(InputError, match="does not say where it is"):
        is_on_gpu(torch.zeros(2, device="meta"))


@pytest.mark.parametrize("versioned", [True, False])
@pytest.mark.parametrize("dtype", ["f2", "f4", "f8", "u1", "i1", "i4", "i8"])
@pytest.mark.parametrize("shape", [(2, 3, 4), (0, 3), (), (1, 1)])
def test_torch_reads_what_is_exported(shape, dtype, versioned):
    array = np.arange(np.prod(shape, dtype=int)).reshape(shape).astype(dtype)
    tensor = torch.from_dlpack(OnHost(array, None, versioned))
    assert tuple(tensor.shape) == shape
    np.testing.assert_array_equal(tensor.numpy(), array)
    if array.size:
        tensor.fill_(7)  # the same memory
        assert (array == 7).all()


@pytest.mark.parametrize("versioned", [True, False])
def test_views_of_a_tensor_hold_the_owner(versioned):
    array, owner = np.zeros((4, 5), np.float32), Owner()
    watched = weakref.ref(owner)
    tensor = torch.from_dlpack(OnHost(array, owner, versioned))
    part = tensor[1:, ::2]
    del tensor, owner
    gc.collect()
    assert watched() is not None
    del part
    assert watched() is None


@pytest.mark.parametrize("versioned", [True, False])
def test_a_tensor_that_dies_of_an_error_does_not_hide_it(versioned):
    array, owner = np.zeros((4, 5), np.float32), Owner()
    watched = weakref.ref(owner)
    with pytest.raises(TypeError, match="unsupported operand"):
        torch.from_dlpack(OnHost(array, owner, versioned)) + "text"
    del owner
    gc.collect()
    assert watched() is None


def test_a_tensor_goes_through_and_back():
    tensor = torch.arange(24, dtype=torch.float32).reshape(2, 3, 4)
    foreign = from_host(tensor)
    capsule = dlpack.make_capsule(
        foreign.pointer, foreign.shape, foreign.dtype, foreign.owner, device=(CPU, 0), versioned=True
    )
    expected = tensor.clone()
    del tensor, foreign
    gc.collect()
    assert torch.equal(torch.from_dlpack(capsule), expected)
