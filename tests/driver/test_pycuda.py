"""A program that holds a context, streams and arrays of pycuda, and passes them."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from edge_backbones.errors import InputError
from edge_backbones.runtime.backbone import EdgeBackbone
from edge_backbones.spec import ShapeRange
from edge_backbones.testing import SPEC, pooled, pooling_input
from tests.driver.machine import DriverMachine

BACKENDS = pytest.mark.parametrize("backend", ["cuda-bindings", "pycuda"])


def pixels() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((2, 3, 32, 48)).astype(np.float32)


@BACKENDS
def test_the_primary_context_of_pycuda_its_streams_and_its_arrays_are_taken(driver, backend):
    import pycuda.driver as cuda

    cuda.init()
    context = cuda.Device(0).retain_primary_context()
    context.push()
    from pycuda import gpuarray

    machine = DriverMachine(driver, backend)
    images, stream = pixels(), cuda.Stream()
    array = gpuarray.to_gpu(images)
    with EdgeBackbone(
        SPEC, pooling_input(ShapeRange(min=1, opt=2, max=4)), machine.open(), device="cuda:0"
    ) as backbone:
        for _ in range(3):
            maps = backbone(array, stream=stream).feature_maps
            stream.synchronize()
            for actual, expected in zip(maps, pooled(images), strict=True):
                taken = gpuarray.GPUArray(actual.shape, actual.dtype, gpudata=actual.pointer, base=actual)
                np.testing.assert_array_equal(taken.get(), expected)
        maps = backbone.graphed(array, stream=stream)().feature_maps
        stream.synchronize()
        np.testing.assert_array_equal(machine.gpu.value(maps[0], int(stream.handle)), pooled(images)[0])
    assert cuda.Context.get_current() == context  # it is current as before
    assert "pycuda.autoinit" not in sys.modules
    array.gpudata.free()
    context.pop()


@BACKENDS
def test_arrays_of_another_context_are_refused(driver, backend):
    """As pycuda.autoinit makes one: kernels of the primary context would crash on them, and take the context along."""
    import pycuda.driver as cuda

    cuda.init()
    context = cuda.Device(0).make_context()
    from pycuda import gpuarray

    array = gpuarray.to_gpu(pixels())
    machine = DriverMachine(driver, backend)
    with EdgeBackbone(
        SPEC, pooling_input(ShapeRange(min=1, opt=2, max=4)), machine.open(), device="cuda:0"
    ) as backbone:
        for call in (backbone, backbone.graphed):
            with pytest.raises(
                InputError,
                match=r"in a context of cuda:0 that is not its primary one \(pycuda.autoprimaryctx makes that\)",
            ):
                call(array, stream=machine.stream)
    assert driver.calls("execute_async_v3") == 0
    array.gpudata.free()
    context.pop()
