"""The GPU suite where there is no GPU: it says so part by part. And its processes and figures, on the CPU."""

from __future__ import annotations

import argparse
import ast
import contextlib
import importlib
import importlib.util
import inspect
import json
import math
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest

from benchmarks import gpu_common, gpu_overhead, gpu_processes, gpu_suite, gpu_tasks
from benchmarks.gpu_suite import (
    FAILED,
    NOTHING_RUN,
    PASSED,
    Child,
    ChildError,
    MissingError,
    Part,
    PartFailedError,
    Suite,
)
from edge_backbones.machine import gpus
from edge_backbones.testing import pooled

NO_DRIVER = "no NVIDIA driver (libcuda.so.1 is missing)"
H100 = gpus.Gpu(0, "NVIDIA H100 80GB HBM3", "sm_90", 85 << 30, "13.0", 132, False)


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(gpus, "no_gpu_reason", lambda: NO_DRIVER)


def options(**given):
    defaults = {"out": None, "seconds": 60.0, "bundles": gpu_suite.BUNDLES, "only": None, "device": 0, "commit": None}
    return argparse.Namespace(**{**defaults, **given})


# ---- a machine without a GPU


def test_every_part_is_listed_as_not_run(no_gpu, tmp_path, capsys):
    out = tmp_path / "here.json"
    assert gpu_suite.main(["--out", str(out)]) == NOTHING_RUN
    document = json.loads(out.read_text(encoding="utf-8"))
    assert document["device"] is None
    assert document["driver"] is None
    assert document["python"].startswith("3.")
    assert "numpy" in document["versions"]
    assert {"system", "commit", "uncommitted_changes", "date"} <= document.keys()
    assert {part["status"] for part in document["parts"]} == {"not run"}
    assert {part["reason"] for part in document["parts"]} == {NO_DRIVER}
    names = [part["name"] for part in document["parts"]]
    for file in gpu_suite.TESTS.glob("test_*.py"):
        assert f"tests/gpu/{file.name}" in names
    assert "ceilings" in names
    assert "TensorRT-RTX on this GPU" in names
    assert "overhead: tensorrt" in names
    assert "benchmark: resnet50, batch 32" in names
    assert names[-1] == "roofline"  # of what was timed before
    assert f"not run: ceilings ({NO_DRIVER})" in capsys.readouterr().out


@pytest.mark.parametrize(("only", "named"), [("tests", "tests/gpu/"), ("benchmark", "resnet50")])
def test_one_half(no_gpu, tmp_path, only, named):
    out = tmp_path / "here.json"
    assert gpu_suite.main(["--only", only, "--out", str(out)]) == NOTHING_RUN
    names = [part["name"] for part in json.loads(out.read_text(encoding="utf-8"))["parts"]]
    assert any(named in name for name in names)
    assert all(name.startswith("tests/gpu") == (only == "tests") for name in names)


def test_nothing_is_written_where_no_gpu_gives_a_name(no_gpu, capsys):
    folder = gpu_suite.ROOT / "benchmarks" / "results"
    before = sorted(folder.iterdir())
    assert gpu_suite.main([]) == NOTHING_RUN
    assert sorted(folder.iterdir()) == before
    assert "wrote nothing" in capsys.readouterr().out


def test_a_gpu_that_is_not_there(monkeypatch, tmp_path):
    monkeypatch.setattr(gpus, "no_gpu_reason", lambda: "")
    monkeypatch.setattr(gpus, "find_gpus", lambda: (H100,))
    out = tmp_path / "here.json"
    assert gpu_suite.main(["--device", "3", "--out", str(out)]) == NOTHING_RUN
    assert "no cuda:3" in out.read_text(encoding="utf-8")


def test_tests_without_a_gpu_are_skipped_with_the_probes_reason(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # so that a machine with a GPU runs this too
    with pytest.raises(MissingError, match=r"no NVIDIA driver|no GPU is visible|CUDA_ERROR_NO_DEVICE"):
        Suite(options())._test(gpu_suite.TESTS / "test_gpu_arrays.py", 60)


# ---- parts


def test_parts_and_exit_codes(tmp_path, capsys):
    def suite(*actions):
        made = Suite(options(out=tmp_path / "figures.json"))
        made.gpu = H100
        for number, action in enumerate(actions):
            made.measure(f"part {number}", action)
        return made.finish(), json.loads((tmp_path / "figures.json").read_text(encoding="utf-8"))

    def works():
        return {"x": 1.5}

    def lacks():
        raise MissingError("onnx is not installed")

    def fails():
        raise ChildError("its process ended with -11")

    def breaks():
        return {"x": 1 // 0}

    def half():
        raise PartFailedError("one of two", {"x": 2})

    code, document = suite(works, lacks)
    assert code == PASSED
    assert [part["status"] for part in document["parts"]] == ["passed", "not run"]
    assert document["parts"][0]["figures"] == {"x": 1.5}
    assert document["parts"][1]["reason"] == "onnx is not installed"
    assert document["device"]["architecture"] == "sm_90"
    code, document = suite(fails, breaks, half, works)
    assert code == FAILED
    assert [part["status"] for part in document["parts"]] == ["failed", "failed", "failed", "passed"]
    assert [part["reason"] for part in document["parts"][:3]] == [
        "its process ended with -11",
        "ZeroDivisionError: integer division or modulo by zero",
        "one of two",
    ]
    assert document["parts"][2]["figures"] == {"x": 2}
    assert "ZeroDivisionError" in capsys.readouterr().err  # with its traceback, for the log
    assert suite(lacks)[0] == NOTHING_RUN


def test_graphs_are_made_where_they_can_be(tmp_path, monkeypatch):
    made = Suite(options(out=tmp_path / "figures.json", bundles=tmp_path / "bundles", seconds=50.0))
    made.gpu = H100
    monkeypatch.setattr(gpu_suite, "prepare", lambda folder: (folder / "one.bundle").mkdir(parents=True))
    monkeypatch.setattr(made, "_benchmark", lambda: None)
    monkeypatch.setattr(gpu_suite, "test_files", list)
    monkeypatch.setattr(gpu_suite, "_TO_PREPARE", ("json", "no_such_library"))
    made._end = time.monotonic() + 50
    made.run()
    assert str(made.parts[0]) == (
        "not run: make the graphs (no_such_library not installed: make them elsewhere with --prepare)"
    )
    monkeypatch.setattr(gpu_suite, "_TO_PREPARE", ("json",))
    made.run()
    assert (made.parts[1].status, made.parts[1].figures) == ("passed", {"bundles": 1})
    assert made.left > 49
    made.run()
    assert len(made.parts) == 2  # they are there


def test_targets_are_held_against_what_was_measured(tmp_path, capsys):
    def overhead(us, target, kept):
        memory = {"kept_bytes_per_call": kept, "largest_bytes_in_a_call": 900.0}
        return {"overhead_us": us, "target_us": target, "device_arrays": memory, "host_arrays": memory}

    def faster(times):
        return {"torch.compile max-autotune fp16": {"latency_ms": times, "pipelined_ms": 1.0}}

    both = {"cuda_graphs_off": overhead(18.0, 20, 0.0), "cuda_graphs_on": overhead(7.0, 5, 3.0)}
    ours = {
        "tensorrt fp16 with CUDA graphs": faster(1.2),
        "torch eager fp16": faster(0.5),
        "tensorrt int8": faster(2.0),
    }
    parts = [
        Part("overhead: tensorrt", "passed", figures=both),
        Part("overhead: torchscript", "passed", figures={"overhead_us": 3.0, "device_arrays": {}}),
        Part("benchmark: resnet50, batch 32", "passed", figures={"times_faster_than": ours}),
        Part("benchmark: vit_small_patch16_224, batch 1", "passed", figures={"times_faster_than": ours}),
        Part("overhead: tensorrt_rtx", "not run", "not installed"),
    ]
    found = gpu_suite.targets(parts)
    assert [(row["what"], row["reached"]) for row in found] == [
        ("tensorrt, cuda graphs off: microseconds over the bare call", True),
        ("tensorrt, cuda graphs off: bytes that a call leaves behind (device arrays)", True),
        ("tensorrt, cuda graphs off: bytes that a call leaves behind (host arrays)", True),
        ("tensorrt, cuda graphs on: microseconds over the bare call", False),
        ("tensorrt, cuda graphs on: bytes that a call leaves behind (device arrays)", False),
        ("tensorrt, cuda graphs on: bytes that a call leaves behind (host arrays)", False),
        (
            "resnet50, batch 32: tensorrt fp16 with CUDA graphs, times as fast as torch.compile max-autotune fp16",
            True,
        ),
    ]
    made = Suite(options(out=tmp_path / "figures.json"))
    made.parts = parts
    made.finish()
    assert json.loads((tmp_path / "figures.json").read_text(encoding="utf-8"))["targets"] == found
    assert "microseconds over the bare call: 7, at most 5: MISSED" in capsys.readouterr().out


def test_no_part_begins_when_the_time_is_over(tmp_path):
    suite = Suite(options(out=tmp_path / "figures.json", seconds=0.0))
    part = suite.measure("ceilings", lambda: pytest.fail("it began"))
    assert (part.status, part.reason) == ("not run", "the 0 s that it was given were over")


def test_the_other_half_is_kept(tmp_path, monkeypatch):
    out = tmp_path / "figures.json"
    first = Suite(options(out=out))
    first.gpu = H100
    first.add(Part("tests/gpu/test_x.py", "passed"))
    first.add(Part("ceilings", "passed", figures={"copy_gb_per_s": 1.0}))
    second = Suite(options(out=out, only="tests"))
    second.gpu = H100
    assert [part.name for part in second._kept(tests=False)] == ["ceilings"]
    assert [part.name for part in second._kept(tests=True)] == ["tests/gpu/test_x.py"]
    monkeypatch.setattr(gpu_processes, "_output", lambda *command: None)  # no git here: another commit
    second = Suite(options(out=out, only="tests", commit="0123"))
    second.gpu = H100
    assert second._kept(tests=False) == []


def test_the_name_of_the_document():
    suite = Suite(options())
    suite.gpu = H100
    assert suite.path == gpu_suite.ROOT / "benchmarks" / "results" / "nvidia-h100-80gb-hbm3.json"


def test_a_report_of_pytest(tmp_path):
    (tmp_path / "test_it.py").write_text(
        "import pytest\n"
        "def test_good(): pass\n"
        "def test_bad(): assert 1 == 2, 'one is not two'\n"
        "def test_left_out(): pytest.skip('pycuda is not installed')\n",
        encoding="utf-8",
    )
    report = tmp_path / "report.xml"

    def run(*chosen):
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--junitxml", str(report), *chosen]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, check=False).returncode

    with pytest.raises(PartFailedError, match="1 of 2 failed, test_bad: AssertionError: one is not two") as failed:
        gpu_suite.read_report(report, run("test_it.py"))
    assert failed.value.figures["passed"] == 1
    assert failed.value.figures["not_run"] == {"pycuda is not installed": ["test_left_out"]}
    figures = gpu_suite.read_report(report, run("test_it.py::test_good", "test_it.py::test_left_out"))
    assert figures == {"passed": 1, "failed": {}, "not_run": {"pycuda is not installed": ["test_left_out"]}}
    with pytest.raises(MissingError, match="pycuda is not installed"):
        gpu_suite.read_report(report, run("test_it.py::test_left_out"))
    with pytest.raises(PartFailedError, match="ended with -11"):  # a crash behind the last test
        run("test_it.py::test_good")
        gpu_suite.read_report(report, -11)


def test_a_command_that_does_not_end_is_ended():
    start = time.monotonic()
    sleeper = (
        "import subprocess, sys; print('asleep', flush=True); subprocess.run([sys.executable, '-c', 'while 1: pass'])"
    )
    code, output = gpu_suite.run_command([sys.executable, "-c", sleeper], 1.0, {})
    assert code is None
    assert "asleep" in output
    assert time.monotonic() - start < 20


# ---- processes


def test_contenders_take_turns(tmp_path, monkeypatch):
    """The same code as on a GPU, with the CPU in its place."""
    monkeypatch.setattr(gpu_suite, "ROUNDS", 2)
    monkeypatch.setattr(gpu_suite, "SECONDS_PER_TURN", 0.05)
    monkeypatch.setattr(gpu_suite, "_TIME_FOR_ROUNDS", 0.0)
    suite = Suite(options(device="cpu", seconds=120.0))
    kinds = [
        {"kind": "eager", "size": 64},
        {"kind": "torchscript", "size": 64},
        {"kind": "tensorrt", "precision": "int8", "bundle": "no.bundle", "cuda_graphs": True},
    ]
    # One that cannot start fails the part, which keeps what the others gave.
    with pytest.raises(PartFailedError, match="tensorrt int8 with CUDA graphs: ") as failed:
        suite._compare("test_resnet", 2, kinds)
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


def test_answers_of_a_process():
    with Child("contend", device="cpu", model="no_such_network", batch=1, kind="eager") as child:
        with pytest.raises(ChildError, match="no_such_network"):
            child.read(120)
        with pytest.raises(ChildError, match="ended with 0"):
            child.ask({"seconds": 1}, 10)
    slow = Child("contend", device="cpu", model="test_resnet", batch=1, kind="eager")
    with slow, pytest.raises(gpu_suite.SlowChildError, match="no answer within 0 s"):
        slow.read(0.01)


@pytest.mark.skipif(gpu_suite.importlib.util.find_spec("tensorrt") is not None, reason="tensorrt is installed")
def test_a_library_that_is_not_installed():
    child = Child("overhead", device=0, flavour="tensorrt")
    with child, pytest.raises(MissingError, match="pip install 'edge-backbones"):
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


def test_prepared_bundles_compile(tmp_path):
    pytest.importorskip("tensorrt_rtx_bindings", reason="the 'rtx' extra is not installed", exc_type=ImportError)
    gpu_suite.prepare(tmp_path, parity=("test_resnet",), benchmark=(), precisions=("fp16",))
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


@pytest.mark.parametrize(
    ("module", "arguments"), [("gpu_suite", []), ("gpu_suite", ["--only", "tests"]), ("gpu_tasks", ["ceilings", "{}"])]
)
def test_a_machine_without_msgspec_is_told_in_one_line(module, arguments):
    code = (
        "import runpy, sys; sys.modules['msgspec'] = None; "
        f"sys.argv[1:] = {arguments!r}; runpy.run_module('benchmarks.{module}', run_name='__main__')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=gpu_suite.ROOT, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == NOTHING_RUN, done.stderr
    assert done.stdout.startswith("not run: msgspec is not installed: install it (pip install msgspec), or carry")
    assert (done.stdout.count("\n"), done.stderr) == (1, "")


# ---- a Jetson

ORIN = gpus.Gpu(0, "Orin", "sm_87", 8 << 30, "12.6", 8, True)


def gpu_tests_module(name: str):
    """A module of tests/gpu, which is no package."""
    spec = importlib.util.spec_from_file_location(name, gpu_suite.TESTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("gpu", "times"), [(H100, 1), (ORIN, 4)])
def test_a_jetson_gets_more_time(monkeypatch, tmp_path, gpu, times):
    asked = {}

    class Suite(gpu_suite.Suite):
        def run(self):
            asked["seconds"] = self.options.seconds

            class Child(contextlib.AbstractContextManager):
                def __init__(self, *_, **__):
                    pass

                def __exit__(self, *_):
                    pass

                def read(self, seconds):
                    asked["task"] = seconds
                    return {}

            monkeypatch.setattr(gpu_suite, "Child", Child)
            self._ask("ceilings")

    monkeypatch.setattr(gpu_suite, "Suite", Suite)
    monkeypatch.setattr(gpus, "no_gpu_reason", lambda: "")
    monkeypatch.setattr(gpus, "find_gpus", lambda: (gpu,))
    gpu_suite.main(["--out", str(tmp_path / "out.json")])
    assert asked == {"seconds": 480 * times, "task": 200 * times}
    gpu_suite.main(["--out", str(tmp_path / "out.json"), "--seconds", "900"])
    assert asked["seconds"] == 900  # what was said counts


@pytest.mark.parametrize(
    ("gpu", "lost", "flat"), [(H100, 3, False), (H100, 1, True), (ORIN, 3, True), (ORIN, 70, False)]
)
def test_memory_of_a_jetson_is_the_systems(monkeypatch, gpu, lost, flat):
    module = gpu_tests_module("gpu_engines")
    free = iter((1 << 30, (1 << 30) - (lost << 20)))
    monkeypatch.setattr(module, "free_bytes", lambda memory: next(free))
    monkeypatch.setattr(module, "resident_bytes", lambda: 1 << 28)
    monkeypatch.setattr(gpus, "find_gpus", lambda: (gpu,))
    refused = (
        contextlib.nullcontext() if flat else pytest.raises(AssertionError, match="bytes of device memory are gone")
    )
    with refused:
        module.assert_flat(SimpleNamespace(gpu=0), lambda: None, 10)


def test_the_memory_of_a_jetson_is_not_filled(monkeypatch):
    monkeypatch.syspath_prepend(str(gpu_suite.TESTS))
    module = gpu_tests_module("test_gpu_engines")
    monkeypatch.setattr(gpus, "find_gpus", lambda: (ORIN,))
    monkeypatch.setattr(module.cuda, "open_memory", lambda *_: pytest.fail("memory was touched"))
    with pytest.raises(pytest.skip.Exception, match="has the memory of the system"):
        module.test_out_of_memory_is_typed_and_the_process_lives("tensorrt", None, 0)


@pytest.mark.parametrize("path", sorted(gpu_suite.TESTS.glob("*.py")), ids=lambda path: path.stem)
def test_gpu_tests_call_what_there_is(path):
    """They run on no machine here, so a parameter that was renamed shows nowhere else."""
    tree, known = ast.parse(path.read_text(encoding="utf-8")), {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(("edge_backbones", "benchmarks")):
            module = importlib.import_module(node.module)
            for alias in node.names:
                found = getattr(module, alias.name, None) or importlib.import_module(f"{node.module}.{alias.name}")
                known[alias.asname or alias.name] = found
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        called = node.func
        if isinstance(called, ast.Attribute) and isinstance(called.value, ast.Name) and called.value.id in known:
            function = getattr(known[called.value.id], called.attr)  # it is there
        else:
            function = known.get(called.id) if isinstance(called, ast.Name) else None
        if function is None or not callable(function):
            continue
        parameters = inspect.signature(function).parameters
        if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
            continue
        named = {keyword.arg for keyword in node.keywords if keyword.arg is not None}
        assert named <= set(parameters), f"line {node.lineno}: {ast.unparse(called)} has no {named - set(parameters)}"


# ---- figures


def test_medians_and_ratios():
    turns = {
        "a": [{"latency_ms": 1.0, "pipelined_ms": 1.0}, {"latency_ms": 2.0, "pipelined_ms": 2.0}],
        "b": [{"latency_ms": 3.0, "pipelined_ms": 4.0}, {"latency_ms": 10.0, "pipelined_ms": 4.0}],
    }
    assert gpu_suite.medians(turns["a"]) == {"latency_ms": 1.5, "pipelined_ms": 1.5}
    assert gpu_suite.medians([]) == {}
    found = gpu_suite.ratios(turns)
    assert found["a"]["b"] == {"latency_ms": 4.0, "pipelined_ms": 3.0}  # of each round, not of medians
    assert math.isclose(found["b"]["a"]["latency_ms"], (1 / 3 + 0.2) / 2)


def test_the_roofline_of_what_was_timed(tmp_path):
    """The same code as on a GPU, with the CPU in its place."""
    import onnx

    figures = {"contenders": {"tensorrt int8": {"pipelined_ms": 4.0}, "torch eager fp16": {"pipelined_ms": 8.0}}}
    parts = [Part("ceilings", "passed"), Part("benchmark: net, batch 2", "passed", figures=figures)]
    timed = gpu_suite.timed_engines(parts)
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


def test_only_a_gpu_that_is_named_is_refused():
    answer = {
        "version": "1.7",
        "accepted": False,
        "diagnostics_names": ["UNSUPPORTED_CC"],
        "deserialise_log": "no sm_90",
    }
    assert gpu_tasks.rtx_refusal(answer) == "TensorRT-RTX 1.7 refuses this GPU (UNSUPPORTED_CC): no sm_90"
    assert gpu_tasks.rtx_refusal({**answer, "accepted": True}) == ""
    assert gpu_tasks.rtx_refusal({**answer, "diagnostics_names": ["MALFORMED_ENGINE"]}) == ""
    suite = Suite(options())
    suite.rtx_refusal = gpu_tasks.rtx_refusal(answer)
    with pytest.raises(MissingError, match=r"refuses this GPU|pip install"):
        suite._require("tensorrt_rtx")
    suite._require("torchscript")


def test_names():
    assert gpu_suite.slug("NVIDIA GeForce RTX 4090") == "nvidia-geforce-rtx-4090"
    assert gpu_suite.contender_name({"kind": "compile"}) == "torch.compile max-autotune fp16"
    plan = {"kind": "tensorrt", "precision": "int8", "cuda_graphs": True}
    assert gpu_suite.contender_name(plan) == "tensorrt int8 with CUDA graphs"


def test_a_contender_that_computes_something_else_is_refused():
    import numpy as np

    maps = [np.random.default_rng(0).random((2, 3, 4)) for _ in range(2)]
    assert gpu_tasks._checked_cosine(maps, maps) > 0.9999
    with pytest.raises(RuntimeError, match="computes something else"):
        gpu_tasks._checked_cosine(maps, [maps[0], -maps[1]])
    with pytest.raises(RuntimeError, match="computes something else"):
        gpu_tasks._checked_cosine(maps, [maps[0], maps[1] * np.nan])
