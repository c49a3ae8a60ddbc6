"""DLPack and the CUDA Array Interface without a GPU: host memory where values are read, and made-up addresses where not."""

from __future__ import annotations

import ctypes
import dataclasses
import gc
import subprocess
import sys
import textwrap
import threading
import tracemalloc
import weakref
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_backbones.engines.gpu import dlpack
from edge_backbones.engines.gpu.arrays import DeviceArray, from_foreign, is_on_gpu, stream_pointer
from edge_backbones.engines.gpu.dlpack import ForeignArray, Rows
from edge_backbones.errors import InputError

ADDRESS = 0x7F00_0000_0000  # nothing may read what is there
CPU, CUDA, CUDA_HOST, ROCM, MANAGED = 1, 2, 3, 10, 13
DTYPES = [*"bBhHiIqQefd", "?"]
NEW_NUMPY = np.lib.NumpyVersion(np.__version__) >= "2.1.0"  # knows the versioned form, bool and read-only arrays
FORMS = [True, False] if NEW_NUMPY else [False]  # versioned or not

new_capsule = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)(
    ("PyCapsule_New", ctypes.pythonapi)
)
rename_capsule = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.py_object, ctypes.c_char_p)(
    ("PyCapsule_SetName", ctypes.pythonapi)
)
USED = {b"dltensor": b"used_dltensor", b"dltensor_versioned": b"used_dltensor_versioned"}
is_capsule = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_char_p)(("PyCapsule_IsValid", ctypes.pythonapi))
pointer_in = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_char_p)(
    ("PyCapsule_GetPointer", ctypes.pythonapi)
)


class Managed(ctypes.Structure):
    """DLManagedTensor of dlpack.h."""

    _fields_ = (("tensor", dlpack._Tensor), ("context", ctypes.c_void_p), ("deleter", ctypes.c_void_p))


class ManagedVersioned(ctypes.Structure):
    """DLManagedTensorVersioned of dlpack.h."""

    _fields_ = (
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("context", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
        ("flags", ctypes.c_uint64),
        ("tensor", dlpack._Tensor),
    )


class Owner:
    """What keeps memory, and can be watched."""


class Library:
    """An array of another library: any DLPack tensor that there may be, and how often its deleter was called."""

    def __init__(self, shape=(2, 3), strides=None, *, code=2, bits=32, lanes=1, pointer=ADDRESS, offset=0, **others):
        self.device = others.pop("device", (CUDA, 0))
        self.versioned = others.pop("versioned", NEW_NUMPY)
        self.newest = others.pop("newest", (1, 0))
        self.ndim = others.pop("ndim", len(shape))
        self.has_shape = others.pop("has_shape", True)
        self.flags = others.pop("flags", 0)
        self.has_deleter = others.pop("has_deleter", True)
        assert not others
        self.shape, self.strides, self.pointer, self.offset = shape, strides, pointer, offset
        self.dtype = (code, bits, lanes)
        self.deleted = 0
        self.asked = []
        self.kept = []

    def __dlpack_device__(self):
        return self.device

    def __dlpack__(self, **asked):
        self.asked.append(asked)
        return self.capsule()

    def capsule(self):
        managed = (ManagedVersioned if self.versioned else Managed)()
        tensor = managed.tensor
        tensor.data = self.pointer
        tensor.device_type, tensor.device_index = self.device
        tensor.ndim = self.ndim
        tensor.code, tensor.bits, tensor.lanes = self.dtype
        int64s = ctypes.c_int64 * len(self.shape)
        if self.has_shape:
            self.kept.append(shape := int64s(*self.shape))
            tensor.shape = ctypes.addressof(shape)
        if self.strides is not None:
            self.kept.append(strides := int64s(*self.strides))
            tensor.strides = ctypes.addressof(strides)
        tensor.byte_offset = self.offset
        if self.versioned:
            managed.major, managed.minor = self.newest
            managed.flags = self.flags
        name = b"dltensor_versioned" if self.versioned else b"dltensor"

        @ctypes.CFUNCTYPE(None, ctypes.c_void_p)
        def delete(address):
            assert address == ctypes.addressof(managed)
            self.deleted += 1

        @ctypes.CFUNCTYPE(None, ctypes.c_void_p)
        def destroy(capsule):  # the address, not the object: that one is being destroyed
            if is_capsule(capsule, name):
                delete(pointer_in(capsule, name))

        self.kept += [managed, tensor, delete, destroy, name]
        if self.has_deleter:
            managed.deleter = ctypes.cast(delete, ctypes.c_void_p).value
        return new_capsule(ctypes.addressof(managed), name, ctypes.cast(destroy, ctypes.c_void_p).value)


class OnHost:
    """Host memory, exported by the code that exports GPU memory."""

    def __init__(self, array, owner=None, versioned=None):
        self.array, self.owner, self.versioned = array, owner, versioned

    def __dlpack_device__(self):
        return CPU, 0

    def __dlpack__(self, *, max_version=None, **_):
        versioned = max_version is not None if self.versioned is None else self.versioned
        array = self.array
        return dlpack.make_capsule(
            array.ctypes.data, array.shape, array.dtype, (array, self.owner), device=(CPU, 0), versioned=versioned
        )


def from_host(values) -> ForeignArray:
    return dlpack.read(values, None, (CPU,))


def take(capsule) -> ForeignArray:
    """Read a capsule that is there already."""
    return dlpack.read(SimpleNamespace(__dlpack__=lambda **_: capsule), None, (CUDA,))


def taken(capsule) -> tuple[ctypes.c_void_p, ctypes.c_void_p]:
    """Take a capsule as a library in C does; return the managed tensor and its deleter."""
    name = dlpack._capsule_name(capsule)
    managed = (ManagedVersioned if name == b"dltensor_versioned" else Managed).from_address(
        dlpack._capsule_pointer(capsule, name)
    )
    assert not rename_capsule(capsule, USED[name])
    return ctypes.c_void_p(ctypes.addressof(managed)), ctypes.c_void_p(managed.deleter)


def refusal(call) -> str:
    """The message of an InputError that is gone again, with the frames that it held."""
    try:
        call()
    except InputError as error:
        return str(error)
    raise AssertionError("nothing was refused")


def on_gpu(pointer=ADDRESS, shape=(2, 3), dtype=np.float32, *, device=0, owner=None, synchronize=None, stream=0):
    return DeviceArray(pointer, shape, dtype, device=device, owner=owner, synchronize=synchronize, stream=stream)


# ---- taking arrays: DLPack

shapes = st.lists(st.integers(0, 4), max_size=5).map(tuple)
steps = st.sampled_from([slice(None), slice(None, None, 2), slice(None, None, -1), slice(1, None), slice(0, 1)])


@st.composite
def views(draw):
    """Host arrays with strides of every kind: C order, any other order, steps, backwards, offsets, repeated."""
    array = np.zeros(draw(shapes), draw(st.sampled_from(DTYPES if NEW_NUMPY else DTYPES[:-1])))
    array = array.transpose(draw(st.permutations(range(array.ndim))))
    array = array[(*(draw(steps) for _ in range(array.ndim)), ...)]
    return np.broadcast_to(array, (2, *array.shape)) if NEW_NUMPY and draw(st.booleans()) else array


@given(views())
def test_any_array_of_numpy_is_read_as_it_is(array):
    foreign = from_host(array)
    assert foreign.shape == array.shape
    assert foreign.dtype == array.dtype
    assert foreign.nbytes == array.nbytes
    assert foreign.contiguous == array.flags.c_contiguous
    assert foreign.pointer == array.ctypes.data
    assert foreign.producer_stream is None


class OldNumpy:
    """numpy before 2.1: no keyword but ``stream``, and null strides for C order."""

    def __init__(self, array):
        self.array = array

    def __dlpack_device__(self):
        return CPU, 0

    def __dlpack__(self, *, stream=None):
        return self.array.__dlpack__(stream=stream)


@given(views().filter(lambda array: array.flags.writeable and array.dtype != bool))
def test_the_older_form_is_read_too(array):
    foreign = from_host(OldNumpy(array))
    assert (foreign.shape, foreign.dtype, foreign.pointer) == (array.shape, array.dtype, array.ctypes.data)
    assert foreign.contiguous == array.flags.c_contiguous


@pytest.mark.parametrize("versioned", FORMS)
def test_memory_is_given_back_once_and_only_when_nobody_holds_it(versioned):
    library = Library((2, 3), versioned=versioned)
    foreign = from_foreign(library, stream=0)
    second_holder = foreign.owner
    assert (foreign.pointer, foreign.shape, foreign.dtype, foreign.device) == (ADDRESS, (2, 3), np.float32, 0)
    del foreign
    gc.collect()
    assert library.deleted == 0
    del second_holder
    assert library.deleted == 1


def test_memory_may_be_given_back_by_another_thread():
    library = Library()
    held = [from_foreign(library, stream=0)]
    thread = threading.Thread(target=held.clear)
    thread.start()
    thread.join()
    assert library.deleted == 1


def test_a_tensor_without_a_deleter_is_nobodys_to_give_back():
    library = Library(has_deleter=False)
    assert from_foreign(library, stream=0).shape == (2, 3)
    assert library.deleted == 0


@pytest.mark.parametrize(
    ("shape", "strides", "contiguous"),
    [
        ((2, 3), None, True),
        ((2, 3), (3, 1), True),
        ((2, 3), (1, 2), False),
        ((2, 3), (4, 1), False),
        ((2, 3), (0, 1), False),
        ((1, 3), (77, 1), True),
        ((0, 3), (9, 9), True),
        ((), None, True),
        ((), (), True),
        ((1, 1), (0, 0), True),
        ((4,), (-1,), False),
    ],
)
def test_c_order_is_told_by_strides_that_matter(shape, strides, contiguous):
    assert from_foreign(Library(shape, strides), stream=0).contiguous is contiguous


@pytest.mark.parametrize(("shape", "contiguous"), [((2, 4, 5, 3), False), ((2, 4, 5, 1), True), ((2, 1, 1, 3), True)])
def test_channels_last_memory_of_one_channel_or_one_cell_is_in_c_order(shape, contiguous):
    array = DeviceArray(256, shape, np.float32, device=0, owner=None, synchronize=None).channels_first()
    assert from_foreign(array, stream=0).contiguous is contiguous


def test_the_byte_offset_is_part_of_the_pointer():
    assert from_foreign(Library(offset=512), stream=0).pointer == ADDRESS + 512


def test_a_read_only_array_is_taken():
    assert from_foreign(Library(flags=1), stream=0).pointer == ADDRESS
    assert from_foreign(interface(data=(ADDRESS, True)), stream=0).pointer == ADDRESS


@pytest.mark.parametrize(("device", "index"), [((CUDA, 3), 3), ((MANAGED, 0), None)])
def test_the_device_is_kept_and_managed_memory_has_none(device, index):
    assert from_foreign(Library(device=device), stream=0).device == index


@pytest.mark.parametrize("dtype", DTYPES if NEW_NUMPY else DTYPES[:-1])
def test_dtypes_come_through(dtype):
    dtype = np.dtype(dtype)
    code = {"i": 0, "u": 1, "f": 2, "b": 6}[dtype.kind]
    assert from_foreign(Library(code=code, bits=dtype.itemsize * 8), stream=0).dtype == dtype


@pytest.mark.parametrize(
    ("tensor", "said"),
    [
        ({"code": 4, "bits": 16}, "of dtype (4, 16, 1) cannot be read through DLPack (Unsupported dtype"),  # bfloat16
        ({"code": 5, "bits": 64}, "dtype complex64 of an array on a GPU does not fit: cast it to float32"),
        ({"code": 10, "bits": 8}, "of dtype (10, 8, 1) cannot be read"),  # float8_e4m3fn
        ({"code": 17, "bits": 4}, "of dtype (17, 4, 1) cannot be read"),  # float4_e2m1fn
        ({"code": 0, "bits": 4}, "of dtype (0, 4, 1) cannot be read"),
        ({"code": 2, "bits": 128}, "of dtype (2, 128, 1) cannot be read"),
        ({"code": 99, "bits": 8}, "of dtype (99, 8, 1) cannot be read"),
        ({"lanes": 4}, "of dtype (2, 32, 4) cannot be read through DLPack (Unsupported lanes"),
        ({"newest": (2, 0), "versioned": True}, "version is too high" if NEW_NUMPY else "cannot be read"),
        ({"ndim": -1}, "-1 axes"),
        ({"has_shape": False}, "2 axes without a shape"),
        ({"pointer": None}, "null pointer does not fit shape (2, 3)"),
        ({"shape": (2, -3)}, "negative dimensions"),
    ],
)
def test_what_cannot_be_read_is_refused_and_given_back_once(tensor, said):
    library = Library(**tensor)
    message = refusal(lambda: from_foreign(library, stream=0))
    assert said in message
    assert "\n" not in message
    assert library.deleted == 1


@pytest.mark.parametrize(("code", "bits"), [(4, 16), (10, 8)])
def test_the_older_form_is_refused_for_the_same_reasons(code, bits):
    library = Library(code=code, bits=bits, versioned=False)
    assert f"of dtype ({code}, {bits}, 1) cannot be read" in refusal(lambda: from_foreign(library, stream=0))
    assert library.deleted == 1


def test_a_capsule_on_another_device_than_it_was_said_to_be_on_is_refused():
    library = Library(device=(CPU, 0))
    library.__class__ = type("Liar", (Library,), {"__dlpack_device__": lambda self: (CUDA, 0)})
    assert "device (1, 0)" in refusal(lambda: from_foreign(library, stream=0))
    assert library.deleted == 1


@pytest.mark.parametrize("versioned", FORMS)
def test_a_capsule_is_taken_once(versioned):
    library = Library(versioned=versioned)
    capsule = library.capsule()
    first = take(capsule)
    with pytest.raises(InputError, match="taken before"):
        take(capsule)
    del capsule
    assert library.deleted == 0
    del first
    assert library.deleted == 1


@pytest.mark.parametrize(("given", "said"), [(None, "NoneType"), (b"x", "bytes"), (3, "int")])
def test_what_is_no_capsule_is_refused(given, said):
    library = Library()
    library.capsule = lambda: given
    with pytest.raises(InputError, match=f"{said} does not fit: __dlpack__ has to return a capsule"):
        from_foreign(library, stream=0)


@pytest.mark.parametrize("name", [b"arrow_array", None])
def test_a_capsule_of_another_kind_is_refused(name):
    with pytest.raises(InputError, match=r"named .* does not fit: DLPack has"):
        take(new_capsule(1, name, None))


@pytest.mark.parametrize(
    ("stream", "passed_on"), [(0, 1), (1, 1), (2, 2), (0x5555_0000, 0x5555_0000), (-1, -1), (np.int64(7), 7)]
)
def test_the_stream_is_passed_on_and_the_default_one_is_called_1(stream, passed_on):
    library = Library()
    from_foreign(library, stream=stream)
    assert library.asked == [{"stream": passed_on, **dlpack._VERSION}]


@pytest.mark.parametrize("stream", [-2, 1.5, "1", True])
def test_a_stream_that_is_none_is_refused_before_anything_is_asked(stream):
    library = Library()
    with pytest.raises(InputError, match="does not fit: DLPack takes 1"):
        from_foreign(library, stream=stream)
    assert library.asked == []


class Standard2023(Library):
    def __dlpack__(self, *, stream=None, max_version=None):
        return super().__dlpack__(stream=stream, max_version=max_version)


class Standard2021(Library):
    def __dlpack__(self, stream=None):
        return super().__dlpack__(stream=stream)


class WithoutStreams(Library):
    def __dlpack__(self):
        return super().__dlpack__()


@pytest.mark.parametrize(
    ("library", "asked"),
    [
        (Standard2023(versioned=NEW_NUMPY), {"stream": 9, "max_version": dlpack._VERSION.get("max_version")}),
        (Standard2021(versioned=False), {"stream": 9}),
    ],
)
def test_libraries_of_older_editions_are_asked_in_their_words(library, asked):
    assert from_foreign(library, stream=9).shape == (2, 3)
    assert library.asked == [asked]


def test_a_library_that_cannot_wait_for_a_stream_is_refused():
    with pytest.raises(InputError, match="unexpected keyword argument 'stream'"):
        from_foreign(WithoutStreams(), stream=9)


@pytest.mark.parametrize(
    "error", [BufferError, RuntimeError, TypeError, ValueError, AssertionError, NotImplementedError]
)
def test_what_a_library_refuses_is_told_in_its_words(error):
    library = Library()
    library.capsule = lambda: (_ for _ in ()).throw(error("tensors that require gradient"))
    with pytest.raises(
        InputError, match=r"test_arrays\.Library of dtype .* cannot .*tensors that require gradient"
    ) as caught:
        from_foreign(library, stream=0)
    assert isinstance(caught.value.__cause__, error)


# ---- taking arrays: CUDA Array Interface


def interface(**changes):
    described = {
        "version": 3,
        "shape": (2, 3),
        "typestr": "<f4",
        "data": (ADDRESS, False),
        "strides": None,
        "stream": None,
    }
    described.update(changes)
    return SimpleNamespace(
        __cuda_array_interface__={key: value for key, value in described.items() if value is not Ellipsis}
    )


def test_the_cuda_array_interface_is_read():
    values = interface()
    assert vars(from_foreign(values, stream=0)) == {
        "pointer": ADDRESS,
        "shape": (2, 3),
        "dtype": np.dtype(np.float32),
        "device": None,
        "contiguous": True,
        "owner": values,
        "producer_stream": None,
        "rows": None,
    }


def test_an_array_of_the_cuda_array_interface_is_held():
    values = Owner()
    values.__cuda_array_interface__ = interface().__cuda_array_interface__
    watched = weakref.ref(values)
    foreign = from_foreign(values, stream=0)
    del values
    assert watched() is foreign.owner
    del foreign
    assert watched() is None


@pytest.mark.parametrize(
    ("changes", "field", "value"),
    [
        ({"strides": (12, 4)}, "contiguous", True),
        ({"strides": (4, 8)}, "contiguous", False),
        ({"strides": (24, 4)}, "contiguous", False),
        ({"strides": (-12, 4)}, "contiguous", False),
        ({"strides": ...}, "contiguous", True),
        ({"shape": (1, 3), "strides": (0, 4)}, "contiguous", True),
        ({"shape": [2, np.int64(3)]}, "shape", (2, 3)),
        ({"shape": ()}, "shape", ()),
        ({"shape": (0, 3), "data": (0, False)}, "pointer", 0),
        ({"shape": (0, 3), "data": (None, False)}, "pointer", 0),
        ({"typestr": "|u1"}, "dtype", np.dtype(np.uint8)),
        ({"typestr": "<f2"}, "dtype", np.dtype(np.float16)),
        ({"stream": 1}, "producer_stream", 1),
        ({"stream": 2}, "producer_stream", 2),
        ({"stream": 0x5555_0000}, "producer_stream", 0x5555_0000),
        ({"version": 2, "stream": ...}, "producer_stream", None),
        ({"mask": None}, "shape", (2, 3)),
    ],
)
def test_every_entry_of_the_cuda_array_interface_is_read(changes, field, value):
    assert getattr(from_foreign(interface(**changes), stream=0), field) == value


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"stream": 0}, "stream 0 .* the standard has 1"),
        ({"stream": -1}, "stream -1"),
        ({"stream": "per-thread"}, "is not one .*TypeError"),
        ({"mask": interface()}, "mask"),
        ({"version": 4}, "version 4 .*up to 3"),
        ({"version": ...}, "KeyError: 'version'"),
        ({"shape": ...}, "KeyError: 'shape'"),
        ({"shape": (2.5, 3)}, "TypeError"),
        ({"shape": (-2, 3)}, "is not one .*negative dimensions"),
        ({"data": ADDRESS}, "TypeError"),
        ({"data": (0, False)}, r"null pointer does not fit shape \(2, 3\)"),
        ({"strides": (4,)}, "is not one .*length of strides and shape"),
        ({"typestr": "<V2"}, r"dtype \|V2 .*cast it"),  # torch's bfloat16
        ({"typestr": ">f4"}, "dtype >f4"),
        ({"typestr": "<c8"}, "dtype complex64"),
        ({"typestr": "nonsense"}, "TypeError"),
    ],
)
def test_a_cuda_array_interface_that_does_not_fit_is_refused(changes, said):
    with pytest.raises(InputError, match=said) as caught:
        from_foreign(interface(**changes), stream=0)
    assert "\n" not in str(caught.value)


def test_dlpack_goes_first_because_it_waits():
    library = Library((4, 5))
    library.__cuda_array_interface__ = interface().__cuda_array_interface__
    assert from_foreign(library, stream=0).shape == (4, 5)


class Shy:
    @property
    def __cuda_array_interface__(self):
        raise RuntimeError("Variable that requires grad")


def test_a_refused_cuda_array_interface_is_told():
    with pytest.raises(InputError, match="Variable that requires grad"):
        from_foreign(Shy(), stream=0)


# ---- which arrays are on a GPU


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.zeros(2), False),
        ([1.0, 2.0], False),
        (None, False),
        (Library(device=(CPU, 0)), False),
        (Library(device=(CUDA_HOST, 0)), False),
        (Library(device=(ROCM, 0)), False),
        (Library(device=(CUDA, 1)), True),
        (Library(device=(MANAGED, 0)), True),
        (interface(), True),
        (on_gpu(), True),
    ],
)
def test_where_an_array_is(values, expected):
    assert is_on_gpu(values) is expected


def test_an_array_that_is_nowhere_is_refused():
    nowhere = SimpleNamespace(__dlpack__=None, __dlpack_device__=lambda: (_ for _ in ()).throw(ValueError("meta")))
    with pytest.raises(InputError, match="does not say where it is"):
        is_on_gpu(nowhere)


@pytest.mark.parametrize(("values", "said"), [(np.zeros(2), r"device \(1, 0\)"), ([1.0], "builtins.list does not fit")])
def test_host_arrays_are_not_taken_for_gpu_arrays(values, said):
    with pytest.raises(InputError, match=said):
        from_foreign(values, stream=0)


# ---- streams


class WithInt:
    """cuda.bindings and numba: a stream that is an int when asked."""

    handle = ctypes.c_void_p(3)

    def __int__(self):
        return 44


@pytest.mark.parametrize(
    ("stream", "pointer"),
    [
        (None, 0),
        (0, 0),
        (2, 2),
        (np.uint64(2**63 + 8), 2**63 + 8),
        (SimpleNamespace(__cuda_stream__=lambda: (0, 123)), 123),
        (SimpleNamespace(__cuda_stream__=(0, 124)), 124),
        (SimpleNamespace(__cuda_stream__=lambda: (0, 125), cuda_stream=9), 125),
        (SimpleNamespace(cuda_stream=0), 0),
        (SimpleNamespace(cuda_stream=456), 456),
        (SimpleNamespace(ptr=789), 789),
        (SimpleNamespace(handle=1011), 1011),
        (SimpleNamespace(handle=ctypes.c_void_p(1012)), 1012),
        (SimpleNamespace(handle=ctypes.c_void_p(None)), 0),
        (WithInt(), 44),
    ],
)
def test_streams_of_every_library_become_pointers(stream, pointer):
    assert stream_pointer(stream) == pointer


@pytest.mark.parametrize(
    ("stream", "said"),
    [
        ("cuda:0", "'cuda:0' of type builtins.str"),
        (1.0, "1.0 of type builtins.float"),
        (True, "True of type builtins.bool"),
        (-1, "-1 of type builtins.int"),
        (object(), "of type builtins.object"),
        (SimpleNamespace(ptr="x"), "SimpleNamespace"),
        (SimpleNamespace(__cuda_stream__=lambda: (1, 123)), r"\(1, 123\), not \(0, pointer\)"),
        (SimpleNamespace(__cuda_stream__=lambda: 123), "123, not"),
        (SimpleNamespace(__cuda_stream__=lambda: (0, None)), "does not fit"),
    ],
)
def test_what_is_no_stream_is_refused(stream, said):
    with pytest.raises(InputError, match=said):
        stream_pointer(stream)


# ---- giving arrays


@given(st.sampled_from(DTYPES), shapes, st.booleans())
def test_numpy_reads_what_is_exported(dtype, shape, versioned):
    array = np.arange(np.prod(shape, dtype=int)).reshape(shape).astype(dtype)
    if array.dtype == bool and not NEW_NUMPY:
        return  # older numpy does not read it
    taken = np.from_dlpack(OnHost(array, versioned=versioned))
    assert (taken.shape, taken.dtype) == (array.shape, array.dtype)
    assert np.array_equal(taken, array)
    assert not array.size or np.shares_memory(taken, array)


@given(st.sampled_from(DTYPES), shapes, st.booleans(), st.booleans())
def test_what_is_exported_can_be_taken_again(dtype, shape, versioned, through_dlpack):
    array = on_gpu(ADDRESS, shape, dtype, device=3)
    pointer = ADDRESS if 0 not in shape else 0  # both standards want null where there is nothing
    if through_dlpack:
        capsule = array.__dlpack__(max_version=(1, 3) if versioned else None)
        foreign = take(capsule)
        assert foreign.device == 3
    else:
        foreign = from_foreign(SimpleNamespace(__cuda_array_interface__=array.__cuda_array_interface__), stream=0)
    assert (foreign.pointer, foreign.shape, foreign.dtype) == (pointer, shape, np.dtype(dtype))
    assert foreign.contiguous
    assert foreign.nbytes == array.nbytes


@pytest.mark.parametrize(
    ("max_version", "name"),
    [
        (None, b"dltensor"),
        ((0, 8), b"dltensor"),
        ((1, 0), b"dltensor_versioned"),
        ((1, 3), b"dltensor_versioned"),
        ((2, 0), b"dltensor_versioned"),
    ],
)
def test_the_form_of_the_capsule_is_one_that_the_consumer_knows(max_version, name):
    newest = name if NEW_NUMPY else b"dltensor"
    assert dlpack._capsule_name(on_gpu().__dlpack__(max_version=max_version)) == newest


@pytest.mark.parametrize("versioned", FORMS)
@pytest.mark.parametrize("taken", [True, False])
def test_the_owner_lives_as_long_as_the_last_consumer(versioned, taken):
    owner = Owner()
    watched = weakref.ref(owner)
    array = on_gpu(owner=owner)
    held = array.__dlpack__(max_version=(1, 0) if versioned else None)
    if taken:
        held = take(held)
    del array, owner
    gc.collect()
    assert watched() is not None
    del held
    assert watched() is None


def test_every_export_holds_the_owner_for_itself():
    owner = Owner()
    watched = weakref.ref(owner)
    array = on_gpu(owner=owner)
    first, second = from_foreign(array, stream=0), from_foreign(array, stream=0)
    del array, owner, first
    assert watched() is not None
    del second
    assert watched() is None


@pytest.mark.parametrize("versioned", FORMS)
def test_a_consumer_that_fails_keeps_its_error_and_the_owner_is_let_go(versioned):
    owner = Owner()
    watched = weakref.ref(owner)
    array = on_gpu(owner=owner)
    # The capsule dies while the TypeError is on its way: a deleter or destructor in Python would swallow the error.
    with pytest.raises(TypeError, match="unsupported operand"):
        array.__dlpack__(max_version=(1, 0) if versioned else None) + 1
    with pytest.raises((BufferError, RuntimeError), match="device"):
        np.from_dlpack(array)
    del array, owner
    gc.collect()
    assert watched() is None


@pytest.mark.parametrize("versioned", FORMS)
def test_a_thread_that_python_does_not_know_may_give_the_memory_back(versioned):
    owner = Owner()
    watched = weakref.ref(owner)
    let_go = threading.Event()
    weakref.finalize(owner, let_go.set)
    capsule = on_gpu(owner=owner).__dlpack__(max_version=(1, 0) if versioned else None)
    address, deleter = taken(capsule)
    del owner
    assert watched() is not None
    thread = ctypes.c_void_p()
    process = ctypes.CDLL(None)
    assert process.pthread_create(ctypes.byref(thread), None, deleter, address) == 0
    assert process.pthread_join(thread, None) == 0  # ctypes lets go of the GIL, which the deleter needs
    assert let_go.is_set()
    assert watched() is None


@pytest.mark.parametrize("versioned", FORMS)
def test_memory_given_back_after_the_interpreter_ended_is_no_crash(versioned):
    program = f"""
        import ctypes
        from edge_backbones.engines.gpu import arrays
        from tests.unit.engines.gpu.test_arrays import taken
        array = arrays.DeviceArray({ADDRESS}, (2, 3), "f4", device=0, owner=object(), synchronize=None)
        capsule = array.__dlpack__(max_version={(1, 0) if versioned else None})
        address, deleter = taken(capsule)
        held_at_exit = arrays.from_foreign(array, stream=0)
        never_taken = array.__dlpack__()
        # What C++ libraries do with their globals: after Py_Finalize, in exit().
        at_exit = ctypes.CDLL(None).__cxa_atexit
        at_exit(deleter, address, None)
        print("ended")
    """
    ended = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, check=False
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "ended\n", "")


def test_ten_thousand_round_trips_leave_nothing_behind():
    owner = Owner()
    library = Library()
    array = on_gpu(owner=owner)

    def round_trips(count):
        for index in range(count):
            from_foreign(array, stream=0)
            take(array.__dlpack__())
            array.__dlpack__(max_version=(1, 0) if index % 2 else None)  # nobody takes it

    round_trips(100)
    gc.collect()
    references = sys.getrefcount(owner), sys.getrefcount(array), sys.getrefcount(np.dtype(np.float32))
    tracemalloc.start()
    try:
        round_trips(10)
        before, _ = tracemalloc.get_traced_memory()
        round_trips(10_000)
        gc.collect()
        after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert after - before < 5_000  # half a byte for each
    now = sys.getrefcount(owner), sys.getrefcount(array), sys.getrefcount(np.dtype(np.float32))
    assert all(abs(a - b) < 10 for a, b in zip(now, references, strict=True))
    assert library.deleted == 0


def test_threads_export_and_take_one_array_at_once():
    owner = Owner()
    watched = weakref.ref(owner)
    waited = []
    array = on_gpu(owner=owner, synchronize=waited.append, stream=5)

    def take(array, stream):
        foreign = SimpleNamespace(__dlpack__=array.__dlpack__, __dlpack_device__=array.__dlpack_device__)
        return [from_foreign(foreign, stream=stream).shape for _ in range(500)]

    with ThreadPoolExecutor(8) as threads:
        taken = list(threads.map(take, [array] * 8, range(10, 18)))
    assert taken == [[(2, 3)] * 500] * 8
    assert sorted(waited) == sorted(list(range(10, 18)) * 500)
    del array, owner
    assert watched() is None


@pytest.mark.parametrize(
    ("ours", "consumer", "waited"),
    [
        (5, None, [1]),
        (5, 1, [1]),
        (5, 0, [1]),
        (5, 2, [2]),
        (5, 9, [9]),
        (5, 5, []),
        (5, -1, []),
        (0, None, []),
        (0, 1, []),
        (1, 1, []),
        (0, 9, [9]),
        (2, 2, [2]),  # each thread has its own
    ],
)
def test_the_consumers_stream_waits_for_the_values(ours, consumer, waited):
    calls = []
    array = on_gpu(stream=ours, synchronize=calls.append, owner=Owner())
    array.__dlpack__(stream=consumer)
    assert calls == waited
    if consumer is not None:  # and that of our own next engine, without a capsule
        taken = from_foreign(array, stream=consumer)
        assert calls == 2 * waited
        assert (taken.pointer, taken.shape, taken.dtype, taken.device) == (ADDRESS, (2, 3), np.float32, 0)
        assert taken.contiguous
        assert taken.owner is array.owner


def test_values_that_are_there_are_not_waited_for():
    array = on_gpu(stream=5, synchronize=None)
    assert array.__cuda_array_interface__["stream"] is None
    assert from_foreign(array, stream=9).shape == (2, 3)


def test_what_fails_while_waiting_is_not_hidden():
    def fails(stream):
        raise OSError(f"stream {stream} is gone")

    with pytest.raises(OSError, match="stream 9 is gone"):
        on_gpu(synchronize=fails).__dlpack__(stream=9)


@pytest.mark.parametrize(("stream", "said"), [(0, 1), (1, 1), (2, 2), (77, 77)])
def test_the_cuda_array_interface_of_ours(stream, said):
    array = on_gpu(shape=[2, np.int64(3)], dtype="f2", synchronize=print, stream=stream)
    assert array.__cuda_array_interface__ == {
        "version": 3,
        "shape": (2, 3),
        "typestr": "<f2",
        "data": (ADDRESS, False),
        "strides": None,
        "stream": said,
    }


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"copy": True}, "copy=True"),
        ({"dl_device": (CPU, 0)}, r"\(1, 0\) does not fit: .* is on \(2, 1\)"),
        ({"dl_device": (CUDA, 0)}, r"\(2, 0\) does not fit"),
        ({"stream": -2}, "-2"),
        ({"stream": "5"}, "'5'"),
    ],
)
def test_what_would_need_a_copy_is_a_buffer_error(asked, said):
    waited = []
    array = on_gpu(device=1, synchronize=waited.append)
    with pytest.raises(BufferError, match=said) as caught:
        array.__dlpack__(**asked)
    assert isinstance(caught.value, InputError)
    assert waited == []


@pytest.mark.parametrize("asked", [{"copy": False}, {"copy": None}, {"dl_device": (CUDA, 1)}, {"dl_device": None}])
def test_what_needs_no_copy_is_given(asked):
    assert on_gpu(device=1).__dlpack__(**asked) is not None


@pytest.mark.parametrize(
    ("pointer", "shape", "dtype", "said"),
    [
        (0, (2, 3), "f4", "null pointer"),
        (ADDRESS, (2, -3), "f4", r"\(2, -3\)"),
        (ADDRESS, (2,), "c8", "complex64"),
        (ADDRESS, (2,), ">f4", ">f4"),
        (ADDRESS, (2,), "U4", "<U4"),
    ],
)
def test_an_array_that_nobody_could_take_is_not_made(pointer, shape, dtype, said):
    with pytest.raises(InputError, match=said):
        on_gpu(pointer, shape, dtype)


def test_an_array_says_what_it_is():
    array = on_gpu(shape=(4, 5), dtype=np.float16, device=2)
    assert (array.ndim, array.nbytes, len(array)) == (2, 40, 4)
    assert repr(array) == "DeviceArray(shape=(4, 5), dtype=float16, device=2)"
    with pytest.raises(AttributeError):
        array.pointer = 1
    with pytest.raises(TypeError, match="without axes"):
        len(on_gpu(shape=()))


def test_numpy_does_not_take_it_for_an_object():
    with pytest.raises(InputError, match="not on the host"):
        np.asarray(on_gpu())


def test_a_view_of_a_larger_array_says_its_rows():
    class View:
        def __init__(self, shape, strides) -> None:
            self.__cuda_array_interface__ = {
                "version": 3,
                "shape": shape,
                "typestr": "<f4",
                "data": (4096, False),
                "strides": strides,
            }

    cases = [
        ((2, 3, 32, 48), (3 * 32 * 256, 32 * 256, 256, 4), Rows(192, 192, 256)),  # rows
        ((2, 3, 32, 48), (3 * 32 * 64 * 4, 32 * 64 * 4, 64 * 4, 4), Rows(192, 192, 256)),  # the left part
        ((2, 3, 32, 48), (40000, 32 * 48 * 4, 48 * 4, 4), Rows(2, 3 * 32 * 48 * 4, 40000)),  # images apart
        ((1, 3, 32, 48), (7, 8 * 32 * 48 * 4, 48 * 4, 4), Rows(3, 32 * 48 * 4, 8 * 32 * 48 * 4)),  # planes apart
        ((2, 3, 32, 48), (70000, 32 * 256, 256, 4), None),  # two distances
        ((2, 3, 32, 48), (18432, 6144, 192, 8), None),  # every other value
        ((2, 3, 32, 48), (4 * 3 * 32 * 48, 4, 4 * 3 * 48, 4 * 3), None),  # another order
        ((2, 3, 32, 48), (-18432, 6144, 192, 4), None),  # backwards
    ]
    for shape, strides, rows in cases:
        array = from_foreign(View(shape, strides), stream=1)
        assert not array.contiguous
        assert array.rows == rows, strides


def test_maps_in_channels_last_memory_go_through_dlpack_and_into_another_engine():
    values = np.arange(2 * 4 * 5 * 3, dtype=np.float32).reshape(2, 4, 5, 3)
    nhwc = DeviceArray(4096, values.shape, values.dtype, device=0, owner=None, synchronize=None)
    view = nhwc.channels_first()
    assert view.shape == (2, 3, 4, 5)
    assert view.__cuda_array_interface__["strides"] == tuple(values.transpose(0, 3, 1, 2).strides)
    taken = from_foreign(view, stream=1)
    assert not taken.contiguous
    assert dataclasses.replace(view).strides == view.strides
