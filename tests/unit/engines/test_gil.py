"""Other threads run Python while an engine computes: its call releases the GIL.

A second thread counts. With a switch interval of an hour nobody takes the GIL from the thread that holds it, so the counter
can advance during a call only if the call lets go of it. No time is measured.
"""

from __future__ import annotations

import contextlib
import ctypes
import sys
import threading
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from onnx import TensorProto, helper

from edge_backbones import EdgeBackbone
from edge_backbones.engines.onnxruntime.session import OnnxRuntimeSession
from edge_backbones.testing import SPEC, make_bundle, pooled, pooling_input

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="usleep is of POSIX")

INPUT = pooling_input(1, 512, 768)  # a call of a millisecond or more


@contextlib.contextmanager
def switching_every(seconds: float) -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(seconds)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


def lets_others_run(call: Callable[[], object], *, tries: int) -> bool:
    """Return whether another thread ran Python during one of ``tries`` calls: a busy machine may not get to it in each."""
    count, ended = [0], threading.Event()

    def counting() -> None:
        while not ended.is_set():
            count[0] += 1
            time.sleep(1e-4)  # lets go of the GIL, which nobody takes from it

    thread = threading.Thread(target=counting)
    with switching_every(3600):
        thread.start()
        try:
            for _ in range(tries):
                before = count[0]
                call()
                if count[0] != before:
                    return True
            return False
        finally:
            ended.set()
            thread.join()


def test_the_test_tells_a_call_that_holds_the_gil_from_one_that_does_not():
    microseconds = 20_000
    assert not lets_others_run(lambda: ctypes.PyDLL(None).usleep(microseconds), tries=10)
    assert lets_others_run(lambda: ctypes.CDLL(None).usleep(microseconds), tries=100)
    assert not lets_others_run(lambda: sum(range(100_000)), tries=10)


def pixels() -> np.ndarray:
    return np.random.default_rng(0).standard_normal(INPUT.opt_shape).astype(np.float32)


def test_a_call_of_openvino_lets_other_threads_run(tmp_path):
    make_bundle(tmp_path / "pool.bundle", INPUT)
    array = pixels()
    with EdgeBackbone.from_pretrained(tmp_path / "pool.bundle", threads=1) as backbone:
        engine = backbone._engine  # alone: numpy lets go of the GIL too, in the check for NaN
        assert lets_others_run(lambda: engine.run(array), tries=200)
        np.testing.assert_allclose(engine.run(array)[0], pooled(array)[0], atol=1e-5)


def test_a_call_of_onnx_runtime_lets_other_threads_run():
    nodes = [
        helper.make_node("AveragePool", ["pixel_values"], [f"pool{k}"], f"pool{k}", kernel_shape=[k, k], strides=[k, k])
        for k in (4, 8)
    ]
    ports = [helper.make_tensor_value_info("pixel_values", TensorProto.FLOAT, INPUT.opt_shape)]
    outputs = [helper.make_tensor_value_info(f"pool{k}", TensorProto.FLOAT, [1, 3, 512 // k, 768 // k]) for k in (4, 8)]
    graph = helper.make_graph(nodes, "pooling", ports, outputs)
    model = helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 17)])
    session = OnnxRuntimeSession(model.SerializeToString(), input=INPUT, spec=SPEC, threads=1)
    array = pixels()
    try:
        assert lets_others_run(lambda: session.run(array), tries=200)
        np.testing.assert_allclose(session.run(array)[0], pooled(array)[0], atol=1e-5)
    finally:
        session.close()
