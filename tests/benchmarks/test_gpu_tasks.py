"""What the processes of the GPU suite do, on the CPU where there is no GPU: contenders, timings, figures."""

from __future__ import annotations

import importlib.util
import math
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from benchmarks import gpu_common, gpu_contend, gpu_overhead, gpu_prepare, gpu_processes, gpu_targets, gpu_tasks
from benchmarks.gpu_common import MissingError
from benchmarks.gpu_processes import Child, ChildError, PartFailedError, PartSlowError, SlowChildError, run_command
from benchmarks.gpu_results import Part
from edge_backbones.machine import gpus
from edge_backbones.testing import pooled


def test_contenders_take_turns(monkeypatch):
    """The same code as on a GPU, with the CPU in its place."""
    monkeypatch.setattr(gpu_contend, "SECONDS_PER_TURN", 0.05)
    kinds = [
        {"kind": "eager", "size": 64},
        {"kind": "torchscript", "size": 64},
        {"kind": "tensorrt", "precision": "int8", "bundle": "no.bundle", "graphed": True},
    ]
    # One that cannot start fails the part, which keeps what the others gave.
    with pytest.raises(PartFailedError, match="tensorrt int8 with CUDA graphs: ") as failed:
        gpu_contend.compare("cpu", "test_resnet", 2, kinds, 240, rounds=2)
    figures = failed.value.figures
    assert figures["rounds"] == 2
    assert figures["contenders"].keys() == {"torch eager fp16", "torchscript fp16"}
    assert figures["failed"].keys() == {"tensorrt int8 with CUDA graphs"}
    for contender in figures["contenders"].values():
        assert 0.999 < contender["cosine"] <= 1 + 1e-9
        assert 0 < contender["fastest_ms"] <= contender["latency_ms"] <= contender["latency_p99_ms"]
        assert contender["pipelined_ms"] > 0
    ratio = figures["times_faster_than"]["torchscript fp16"]["torch eager fp16"]["latency_ms"]
    assert ratio * figures["times_faster_than"]["torch eager fp16"]["torchscript fp16"]["latency_ms"] > 0


def test_contenders_that_are_not_ready_in_time_are_ended():
    with pytest.raises(PartSlowError, match="torch eager fp16: no answer within 0 s") as slow:
        gpu_contend.compare("cpu", "test_resnet", 1, [{"kind": "eager"}, {"kind": "torchscript"}], 0.2)
    assert slow.value.figures["rounds"] == 0
    assert slow.value.figures["not_run"].keys() == {"torch eager fp16", "torchscript fp16"}


@pytest.mark.parametrize("fault", ["slow", "dies"])
def test_the_rounds_before_a_fault_are_kept(monkeypatch, fault):
    """A contender that answers once, and then no more."""

    class Fake(Child):
        def __init__(self, task, **arguments):
            self.asked = 0

        def read(self, seconds):
            return {"cosine": 1.0}

        def ask(self, question, seconds):
            self.asked += 1
            if self.asked > 1:
                raise SlowChildError("no answer within 60 s") if fault == "slow" else ChildError("ended with -11")
            return {"latency_ms": 1.0, "pipelined_ms": 0.5}

        def __exit__(self, *exception):
            pass

    monkeypatch.setattr(gpu_contend, "Child", Fake)
    with pytest.raises(PartFailedError) as failed:
        gpu_contend.compare(0, "net", 1, [{"kind": "eager"}, {"kind": "torchscript"}], 60)
    assert failed.value.figures["rounds"] == 1
    assert failed.value.figures["contenders"].keys() == {"torchscript fp16"}


def test_answers_of_a_process():
    with Child("contend", device="cpu", model="no_such_network", batch=1, kind="eager") as child:
        with pytest.raises(ChildError, match="no_such_network"):
            child.read(120)
        with pytest.raises(ChildError, match="ended with 0"):
            child.ask({"seconds": 1}, 10)
    slow = Child("contend", device="cpu", model="test_resnet", batch=1, kind="eager")
    with slow, pytest.raises(SlowChildError, match="no answer within 0 s"):
        slow.read(0.01)


@pytest.mark.skipif(importlib.util.find_spec("tensorrt") is not None, reason="tensorrt is installed")
def test_a_library_that_is_not_installed():
    child = Child("overhead", device=0, flavour="tensorrt")
    with child, pytest.raises(MissingError, match="needs the 'tensorrt' extra: pip install"):
        child.read(60)


def test_what_counts_as_missing():
    assert gpu_tasks.is_missing(ModuleNotFoundError("no timm", name="timm"))
    assert gpu_tasks.is_missing(MissingError("no bundle"))
    assert not gpu_tasks.is_missing(ModuleNotFoundError("a typing error of ours", name="edge_backbones.runtme"))
    assert not gpu_tasks.is_missing(ImportError("libnvinfer.so.10: undefined symbol"))
    assert not gpu_tasks.is_missing(RuntimeError("CUDA error"))


def test_what_tensorrt_rtx_answers():
    pytest.importorskip("tensorrt_rtx_bindings", reason="the 'rtx' extra is not installed", exc_type=ImportError)
    with Child("rtx_answer", device=0) as child:
        answer = child.read(120)
    assert answer["version"]
    assert answer["validity"] in ("VALID", "SUBOPTIMAL", "INVALID")
    if not gpus.find_gpus():
        assert not answer["accepted"]
        assert "cudaError" in answer["deserialise_log"]
        assert "cudaError" in answer["validity_log"]
        assert not answer["compiled_for_this_gpu"]
        assert answer["compile_log"]


def test_what_a_task_had_is_kept(monkeypatch):
    """A task that gives more and more of its figures, and then ends, fails, dies or hangs."""

    def opened(then):
        code = f"import json, sys, time; [print(json.dumps(a), flush=True) for a in ({{'a': 1}}, {{'a': 1, 'b': 2}})]; {then}"
        monkeypatch.setattr(gpu_processes, "command_of", lambda task, arguments: [sys.executable, "-c", code])
        return Child("any")

    with opened("pass") as child:
        assert child.read_all(60) == {"a": 1, "b": 2}
    for then, error, words in (
        ("print(json.dumps({'error': 'RuntimeError: no'}))", PartFailedError, "RuntimeError: no"),
        ("sys.exit(3)", PartFailedError, "ended with 3"),
        ("time.sleep(600)", PartSlowError, "ended after 5 s"),
    ):
        with opened(then) as child, pytest.raises(error, match=words) as kept:
            child.read_all(5)
        assert kept.value.figures == {"a": 1, "b": 2}


def test_a_command_that_does_not_end_is_ended_with_its_children(tmp_path):
    noted = tmp_path / "child"
    sleeper = (
        "import subprocess, sys; print('asleep', flush=True); "
        f"child = subprocess.Popen([sys.executable, '-c', 'while 1: pass']); "
        f"open({str(noted)!r}, 'w').write(str(child.pid)); child.wait()"
    )
    code, output = run_command([sys.executable, "-c", sleeper], 3.0, {})
    assert code is None
    assert "asleep" in output
    state = Path(f"/proc/{noted.read_text(encoding='utf-8')}/stat")
    for _ in range(100):  # the kernel takes a moment to end it
        if not state.exists() or state.read_text(encoding="utf-8").rpartition(")")[2].split()[0] == "Z":
            break
        time.sleep(0.05)
    else:
        pytest.fail("its child still runs")


def test_prepared_bundles_compile(tmp_path):
    pytest.importorskip("tensorrt_rtx_bindings", reason="the 'rtx' extra is not installed", exc_type=ImportError)
    gpu_prepare.prepare(tmp_path, parity=("test_resnet",), benchmark=(), precisions=("fp16",))
    assert [path.name for path in tmp_path.glob("*.bundle")] == ["parity-test_resnet-fp16.bundle"]
    assert (tmp_path / "pooling.onnx").read_bytes() == gpu_common.pooling_onnx()
    assert not list(tmp_path.glob("*/engines"))
    bundle = str(tmp_path / "parity-test_resnet-fp16.bundle")
    with Child("compile_plan", device=0, bundle=bundle, flavour="tensorrt_rtx") as child:
        (engine,) = child.read(120)["engines"]
    assert engine["bytes"] > 0
    assert engine["measured"] == bool(engine["stages"])


def test_pooling_by_convolutions_is_the_pooling_backbone():
    import onnxruntime

    session = onnxruntime.InferenceSession(gpu_common.convolved_pooling_onnx(), providers=["CPUExecutionProvider"])
    for shape in ((1, 3, 32, 48), (2, 3, 64, 40)):
        images = np.random.default_rng(0).random(shape, np.float32)
        maps = session.run(["pool4", "pool8"], {"pixel_values": images})
        for actual, expected in zip(maps, pooled(images), strict=True):
            np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)


def test_medians_and_ratios():
    turns = {
        "a": [{"latency_ms": 1.0, "pipelined_ms": 1.0}, {"latency_ms": 2.0, "pipelined_ms": 2.0}],
        "b": [{"latency_ms": 3.0, "pipelined_ms": 4.0}, {"latency_ms": 10.0, "pipelined_ms": 4.0}],
    }
    assert gpu_contend.medians(turns["a"]) == {"latency_ms": 1.5, "pipelined_ms": 1.5}
    assert gpu_contend.medians([]) == {}
    found = gpu_contend.ratios(turns)
    assert found["a"]["b"] == {"latency_ms": 4.0, "pipelined_ms": 3.0}  # of each round, not of medians
    assert math.isclose(found["b"]["a"]["latency_ms"], (1 / 3 + 0.2) / 2)


def test_the_roofline_of_what_was_timed(tmp_path):
    """The same code as on a GPU, with the CPU in its place."""
    import onnx

    figures = {"contenders": {"tensorrt int8": {"pipelined_ms": 4.0}, "torch eager fp16": {"pipelined_ms": 8.0}}}
    parts = [Part("ceilings", "done"), Part("contend-all-net-2", "done", figures=figures)]
    timed = gpu_targets.timed_engines(parts)
    assert timed == [
        {"model": "net", "batch": 2, "name": "tensorrt int8", "precision": "int8", "milliseconds": 4.0},
        {"model": "net", "batch": 2, "name": "torch eager fp16", "precision": "fp16", "milliseconds": 8.0},
    ]
    ends = [
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT16, ["batch", channels, 224, 224])
        for name, channels in (("x", 3), ("y", 5))
    ]
    weight = onnx.helper.make_tensor("w", onnx.TensorProto.FLOAT16, [5, 3, 1, 1], [0.0] * 15)
    node = onnx.helper.make_node("Conv", ["x", "w"], ["y"])
    graph = onnx.helper.make_graph([node], "g", ends[:1], ends[1:], [weight])
    (tmp_path / "net-fp16.bundle" / "graphs").mkdir(parents=True)
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(model, tmp_path / "net-fp16.bundle" / "graphs" / "fp16.onnx")
    (engine,), missing = gpu_tasks.rooflines(timed, {"fp16": 1e9}, 1e9, tmp_path)
    assert missing.keys() == {"net, batch 2, tensorrt int8"}
    assert "net-int8.bundle is not in" in missing["net, batch 2, tensorrt int8"]
    assert engine["name"] == "torch eager fp16"
    assert math.isclose(engine["operations_ms"], 1e3 * 2 * 2 * 224 * 224 * 15 / 1e9)
    assert math.isclose(engine["bytes_ms"], 1e3 * 2 * (2 * 224 * 224 * 8 + 15) / 1e9)
    assert math.isclose(engine["fraction"], engine["operations_ms"] / 8.0)

    found, _ = gpu_tasks.matrix_ceilings("cpu", side=64)
    assert {"fp16", "bf16", "tf32", "fp32"} <= found.keys()
    assert min(found.values()) > 0


def test_timings_are_of_the_call_and_of_the_waiting():
    figures = gpu_tasks.timings(lambda: None, lambda: time.sleep(0.01), 0.2)
    assert figures["latency_ms"] >= 10
    assert figures["pipelined_ms"] >= 10 / gpu_common.PIPELINED
    assert figures["pipelined_ms"] < figures["latency_ms"]


def test_host_allocations():
    kept = []
    leaking = gpu_overhead.host_allocations(lambda: kept.append(bytearray(10_000)), lambda: None)
    assert 10_000 <= leaking["kept_bytes_per_call"] < 11_000
    passing = gpu_overhead.host_allocations(lambda: len(bytearray(10_000)), lambda: None)
    assert passing["kept_bytes_per_call"] < 100
    assert 10_000 <= passing["largest_bytes_in_a_call"] < 11_000
    assert gpu_overhead.host_allocations(lambda: None, lambda: None)["largest_bytes_in_a_call"] < 1000


def test_names():
    assert gpu_targets.contender_name({"kind": "compile"}) == "torch.compile max-autotune fp16"
    plan = {"kind": "tensorrt", "precision": "int8", "graphed": True}
    assert gpu_targets.contender_name(plan) == "tensorrt int8 with CUDA graphs"


def test_a_contender_that_computes_something_else_is_refused():
    import numpy as np

    maps = [np.random.default_rng(0).random((2, 3, 4)) for _ in range(2)]
    assert gpu_tasks._checked_cosine(maps, maps) > 0.9999
    with pytest.raises(RuntimeError, match="computes something else"):
        gpu_tasks._checked_cosine(maps, [maps[0], -maps[1]])
    with pytest.raises(RuntimeError, match="computes something else"):
        gpu_tasks._checked_cosine(maps, [maps[0], maps[1] * np.nan])
