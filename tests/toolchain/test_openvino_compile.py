"""The CPU compiler and its cache: keyed by content, healed when damaged, refused graphs named."""

from __future__ import annotations

import dataclasses
import itertools
import signal
import subprocess
import sys
from collections.abc import Sequence

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from edge_backbones.engines import compat
from edge_backbones.engines.openvino import compile as compiler
from edge_backbones.engines.openvino.session import OpenVinoSession
from edge_backbones.errors import CompileError, EngineMismatchError, MissingDependencyError
from edge_backbones.spec import Precision


def scaling_graph(factor: float) -> bytes:
    """y = factor * x on (2, 3)."""
    constant = helper.make_tensor("factor", TensorProto.FLOAT, [1], [factor])
    graph = helper.make_graph(
        [helper.make_node("Mul", ["x", "factor"], ["y"])],
        "scaling",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 3])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [2, 3])],
        [constant],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    return model.SerializeToString()


def result_of(data: bytes) -> np.ndarray:
    session = OpenVinoSession(bytearray(data), outputs=["y"])
    return session.run(np.ones((2, 3), np.float32))[0]


def three_results(rows: int | str) -> bytes:
    """From x of (rows, 3): ``last`` is 3x, ``first`` the sum of each row, ``same`` the tensor of ``last`` by another name."""
    value, axes = helper.make_tensor("three", TensorProto.FLOAT, [1], [3.0]), helper.make_tensor("axes", 7, [1], [1])
    nodes = [
        helper.make_node("Mul", ["x", "three"], ["last"]),
        helper.make_node("ReduceSum", ["x", "axes"], ["first"]),
        helper.make_node("Identity", ["last"], ["same"]),
    ]
    widths = {"last": 3, "first": 1, "same": 3}
    outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [rows, width]) for name, width in widths.items()]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [rows, 3])
    graph = helper.make_graph(nodes, "three", [x], outputs, [value, axes])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    return model.SerializeToString()


@pytest.mark.parametrize("rows", [2, "rows"], ids=["fixed", "of any size"])
@pytest.mark.parametrize("order", [("last", "first"), ("first", "last"), ("same", "first"), ("first", "same")])
def test_outputs_come_in_the_order_of_the_bundle_and_not_of_the_library(rows, order):
    """Whatever order the library has: it sorts, merges and drops outputs between releases."""
    engine = compiler.compile_graph(two_of(three_results(rows), order), Precision.FP32, cache=None)
    images = np.arange(6, dtype=np.float32).reshape(2, 3)
    expected = {"last": 3 * images, "first": images.sum(axis=1, keepdims=True), "same": 3 * images}
    for asked in (order, order[::-1]):
        session = OpenVinoSession(bytearray(engine.data), outputs=asked)
        for _ in range(2):  # the second call writes into arrays that are there
            for name, actual in zip(asked, session.run(images), strict=True):
                np.testing.assert_array_equal(actual, expected[name])
        session.close()


def two_of(graph: bytes, order: Sequence[str]) -> bytes:
    """The graph with these outputs only, in this order."""
    model = onnx.load_from_string(graph)
    kept = {output.name: output for output in model.graph.output}
    del model.graph.output[:]
    model.graph.output.extend(kept[name] for name in order)
    return model.SerializeToString()


@pytest.mark.parametrize("order", list(itertools.permutations(("last", "first", "same"))))
def test_a_tensor_of_two_names_is_two_outputs(order):
    engine = compiler.compile_graph(two_of(three_results(2), order), Precision.FP32, cache=None)
    images = np.arange(6, dtype=np.float32).reshape(2, 3)
    expected = {"last": 3 * images, "first": images.sum(axis=1, keepdims=True), "same": 3 * images}
    session = OpenVinoSession(bytearray(engine.data), outputs=order)
    for name, actual in zip(order, session.run(images), strict=True):
        np.testing.assert_array_equal(actual, expected[name])


def test_an_engine_without_an_output_of_the_bundle_is_refused():
    engine = compiler.compile_graph(scaling_graph(3.0), Precision.FP32, cache=None)
    with pytest.raises(EngineMismatchError, match=r"the engine returns \['y'\], the manifest promises \['z'\]"):
        OpenVinoSession(bytearray(engine.data), outputs=["z"])


def test_whatever_decides_what_the_engine_is_decides_which_entry_of_the_cache(tmp_path, monkeypatch):
    """Graph, precision, library, CPU, settings, and whether an int8 graph is adapted."""

    def from_cache(graph=3.0, precision=Precision.INT8, **options) -> bool:
        return compiler.compile_graph(scaling_graph(graph), precision, cache=tmp_path, **options).from_cache

    assert not from_cache()
    assert from_cache()
    for other in ({"graph": 5.0}, {"precision": Precision.FP16}, {"as_written": True}):
        assert not from_cache(**other), other
        assert from_cache(**other), other
    settings = compiler.session.settings(None)
    with monkeypatch.context() as changed:
        changed.setattr(compiler.session, "settings", lambda *_: {**settings, "NUM_STREAMS": 2})
        assert not from_cache()
    with monkeypatch.context() as changed:
        changed.setattr(compiler.session, "library_version", lambda: "2030.1")
        assert not from_cache()
    here = compat.hosts.this_host({})
    with monkeypatch.context() as changed:
        changed.setattr(compat.hosts, "this_host", lambda _: dataclasses.replace(here, cpu_features=("avx2",)))
        assert not from_cache()
    assert from_cache()


def test_an_engine_comes_from_the_cache_the_second_time(tmp_path, monkeypatch):
    first = compiler.compile_graph(scaling_graph(3.0), Precision.FP32, cache=tmp_path)
    monkeypatch.setattr(compiler.session, "compile_model", lambda graph: pytest.fail("compiled again"))
    again = compiler.compile_graph(scaling_graph(3.0), Precision.FP32, cache=tmp_path)
    assert (first.from_cache, again.from_cache) == (False, True)
    assert again.data == first.data
    assert again.key == first.key
    np.testing.assert_array_equal(result_of(again.data), np.full((2, 3), 3.0))


def test_another_graph_or_precision_is_another_engine(tmp_path):
    compiler.compile_graph(scaling_graph(3.0), Precision.FP32, cache=tmp_path)
    other = compiler.compile_graph(scaling_graph(5.0), Precision.FP32, cache=tmp_path)
    assert not other.from_cache
    np.testing.assert_array_equal(result_of(other.data), np.full((2, 3), 5.0))
    assert not compiler.compile_graph(scaling_graph(3.0), Precision.FP16, cache=tmp_path).from_cache


def test_a_damaged_cache_entry_is_made_again(tmp_path):
    first = compiler.compile_graph(scaling_graph(3.0), Precision.FP32, cache=tmp_path)
    (entry,) = tmp_path.glob("*.blob")
    entry.write_bytes(first.data[:-1])
    healed = compiler.compile_graph(scaling_graph(3.0), Precision.FP32, cache=tmp_path)
    assert not healed.from_cache
    assert compiler.compile_graph(scaling_graph(3.0), Precision.FP32, cache=tmp_path).from_cache
    np.testing.assert_array_equal(result_of(healed.data), np.full((2, 3), 3.0))


def test_the_cache_forgets_the_oldest_engines(tmp_path, monkeypatch):
    compiler.compile_graph(scaling_graph(1.0), Precision.FP32, cache=tmp_path)
    (oldest,) = tmp_path.glob("*.blob")
    monkeypatch.setattr(compiler, "CACHE_LIMIT_BYTES", oldest.stat().st_size + 10)
    compiler.compile_graph(scaling_graph(2.0), Precision.FP32, cache=tmp_path)
    assert oldest not in set(tmp_path.glob("*.blob"))
    assert len(list(tmp_path.glob("*.blob"))) == 1


def test_a_cache_that_cannot_be_written_costs_nothing_but_time(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    engine = compiler.compile_graph(scaling_graph(3.0), Precision.FP32, cache=blocked / "cache")
    np.testing.assert_array_equal(result_of(engine.data), np.full((2, 3), 3.0))


@pytest.mark.parametrize("garbage", [b"", b"not onnx", scaling_graph(1.0)[:40]])
def test_what_is_no_graph_is_a_compile_error_before_openvino_sees_it(garbage):
    with pytest.raises(CompileError, match="this graph is refused: "):
        compiler.compile_graph(garbage, Precision.FP32, cache=None)


def test_without_openvino_the_message_is_the_install_command(monkeypatch):
    monkeypatch.setattr(compiler.session, "library_version", lambda: None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'edge-backbones\[cpu\]'"):
        compiler.compile_graph(scaling_graph(1.0), Precision.FP32, cache=None)


CLOSED_IN_ANOTHER_ORDER = """
import os, signal, sys, time
from pathlib import Path
from edge_backbones.engines.openvino.session import OpenVinoSession, compile_model, read_model

signal.signal(signal.SIGINT, signal.default_int_handler)
blob = compile_model(read_model(Path(sys.argv[1]).read_bytes()))
first, second = (OpenVinoSession(bytearray(blob), outputs=["y"]) for _ in range(2))
for session in (first, second):
    session.close()
del first, second, session
try:
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(60)
except KeyboardInterrupt:
    print("interrupted")
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no POSIX signals")
def test_ctrl_c_is_an_interruption_after_engines_were_closed_first_come_first(tmp_path):
    """OpenVINO's plugin takes the thread's signal stack with it: the process died of the next signal."""
    (tmp_path / "graph.onnx").write_bytes(scaling_graph(3.0))
    done = subprocess.run(
        [sys.executable, "-c", CLOSED_IN_ANOTHER_ORDER, str(tmp_path / "graph.onnx")],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode != -signal.SIGSEGV
    assert (done.returncode, done.stdout.split()) == (0, ["interrupted"]), done.stderr
