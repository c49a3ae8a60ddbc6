"""tests/gpu, looked at without a GPU: how they spare a Jetson, and whether what they call is there."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
from types import SimpleNamespace

import pytest

from benchmarks.gpu_pytest import TESTS
from edge_backbones.machine import gpus

H100 = gpus.Gpu(0, "NVIDIA H100 80GB HBM3", "sm_90", 85 << 30, "13.0", 132, False)
ORIN = gpus.Gpu(0, "Orin", "sm_87", 8 << 30, "12.6", 8, True)


def gpu_tests_module(name: str):
    """A module of tests/gpu, which is no package."""
    spec = importlib.util.spec_from_file_location(name, TESTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("gpu", "lost", "flat"), [(H100, 3, False), (H100, 1, True), (ORIN, 3, True), (ORIN, 70, False)]
)
def test_memory_of_a_jetson_is_the_systems(monkeypatch, gpu, lost, flat):
    module = gpu_tests_module("gpu_engines")
    free = iter((1 << 30, (1 << 30) - (lost << 20)))
    monkeypatch.setattr(module, "free_bytes", lambda memory: next(free))
    monkeypatch.setattr(module, "resident_bytes", lambda: 1 << 28)
    monkeypatch.setattr(gpus, "find_gpus", lambda: (gpu,))
    if flat:
        module.assert_flat(SimpleNamespace(gpu=0), lambda: None, 10)
        return
    with pytest.raises(AssertionError, match="bytes of device memory are gone"):
        module.assert_flat(SimpleNamespace(gpu=0), lambda: None, 10)


def test_a_jetson_is_tested_with_less_memory_and_fewer_calls(monkeypatch):
    module = gpu_tests_module("gpu_engines")
    for gpu, calls, threads in ((H100, 10_000, 8), (ORIN, 1_000, 3)):
        monkeypatch.setattr(gpus, "find_gpus", lambda gpu=gpu: (gpu,))
        assert (module.many_calls(0), module.many_threads(0)) == (calls, threads)


def test_the_memory_of_a_jetson_is_not_filled(monkeypatch):
    monkeypatch.syspath_prepend(str(TESTS))
    module = gpu_tests_module("test_gpu_engines")
    monkeypatch.setattr(gpus, "find_gpus", lambda: (ORIN,))
    monkeypatch.setattr(module.cuda, "open_memory", lambda *_: pytest.fail("memory was touched"))
    with pytest.raises(pytest.skip.Exception, match="has the memory of the system"):
        module.test_out_of_memory_is_typed_and_the_process_lives("tensorrt", 0)


@pytest.mark.parametrize("path", sorted(TESTS.glob("*.py")), ids=lambda path: path.stem)
def test_gpu_tests_call_what_there_is(path):
    """Most of them need what is not here, so a parameter that was renamed shows nowhere else."""
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
