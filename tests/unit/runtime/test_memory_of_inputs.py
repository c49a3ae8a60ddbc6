"""What docs/how-to/beside-cpp.md says about inputs: which memory the engine reads in place, and which is copied."""

from __future__ import annotations

import numpy as np
import pytest

from edge_backbones import EdgeBackbone
from edge_backbones.errors import InputError
from edge_backbones.testing import SPEC, NumpySession, pooling_input

INPUT = pooling_input(1)


class Recording(NumpySession):
    """Keeps the array that it was given, and its address: the memory that an engine would read."""

    def run(self, array):
        self.given = array
        return super().run(array)


class Tensor:
    """A CPU tensor of another library, which has DLPack and nothing of numpy."""

    def __init__(self, array: np.ndarray) -> None:
        self._array = array

    def __dlpack__(self, **options):
        return self._array.__dlpack__(**options)

    def __dlpack_device__(self):
        return self._array.__dlpack_device__()


def read_by_engine(values) -> np.ndarray:
    session = Recording(INPUT)
    with EdgeBackbone(SPEC, INPUT, session) as backbone:
        backbone(values)
    return session.given


def pixels() -> np.ndarray:
    return np.random.default_rng(0).standard_normal(INPUT.opt_shape).astype(np.float32)


def test_an_array_of_the_engines_dtype_in_c_order_is_read_in_place():
    array = pixels()
    assert np.shares_memory(read_by_engine(array), array)


def test_memory_that_exports_the_buffer_protocol_is_read_in_place():
    memory = bytearray(pixels().tobytes())
    array = np.frombuffer(memory, np.float32).reshape(INPUT.opt_shape)
    assert read_by_engine(array).ctypes.data == np.frombuffer(memory, np.uint8).ctypes.data
    view = memoryview(memory).cast("f", INPUT.opt_shape)
    assert np.shares_memory(read_by_engine(np.asarray(view)), array)


def test_a_cpu_tensor_with_dlpack_is_read_in_place():
    array = pixels()
    assert np.shares_memory(read_by_engine(Tensor(array)), array)


@pytest.mark.parametrize("kind", ["read-only", "steps", "float64"])
def test_other_memory_is_copied_and_has_the_same_values(kind):
    array = pixels()
    given = {
        "read-only": lambda: np.frombuffer(array.tobytes(), np.float32).reshape(array.shape),
        "steps": lambda: np.repeat(array, 2, axis=3)[..., ::2],
        "float64": lambda: array.astype(np.float64),
    }[kind]()
    seen = read_by_engine(given)
    assert not np.shares_memory(seen, given)
    assert (seen.dtype, seen.flags.c_contiguous, seen.flags.writeable) == (np.float32, True, True)
    np.testing.assert_array_equal(seen, array)


def test_a_plain_buffer_is_refused():
    with pytest.raises(InputError, match="of type memoryview does not fit: pass a numpy array or a DLPack tensor"):
        read_by_engine(memoryview(pixels()))
