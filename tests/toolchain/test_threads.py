"""How many threads each engine library gets: what the user says, else what the limits of the process allow."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from edge_backbones import BuildOptions, EdgeBackbone, build_bundle, cpus
from edge_backbones.cpus import Cpus
from edge_backbones.engines.onnxruntime.options import session_options
from edge_backbones.engines.openvino import session as openvino
from edge_backbones.images import fit as fitting
from edge_backbones.images.config import ImageConfig
from edge_backbones.testing import make_bundle
from edge_backbones.toolchain import steps
from edge_backbones.toolchain.onnx_runtime import reference_options


@pytest.fixture
def limited(monkeypatch):
    """A function that gives this process a quota on a machine of 64 CPUs."""

    def limit(quota: float | None) -> None:
        monkeypatch.setattr(cpus, "count", lambda: Cpus(64, 64, quota))

    return limit


def threads_of_openvino(path, **options) -> int:
    with EdgeBackbone.from_pretrained(path, device="cpu", **options) as backbone:
        return backbone._engine._loaded.model.get_property("INFERENCE_NUM_THREADS")


def test_openvino_gets_the_smaller_of_its_own_choice_and_the_limit(tmp_path, limited, monkeypatch):
    path = make_bundle(tmp_path / "b.bundle").path
    monkeypatch.setattr(openvino, "_own_choice", lambda: 2)
    for quota, threads in ((1.0, 1), (1.5, 1), (0.2, 1)):
        limited(quota)
        assert threads_of_openvino(path) == threads
    limited(48.0)
    assert openvino.most_threads(None) == 2  # a hybrid CPU or two sockets: OpenVINO wants fewer than the quota allows
    assert openvino.most_threads(5) == 5
    limited(None)
    assert openvino.most_threads(None) is None
    limited(1.0)
    assert threads_of_openvino(path, threads=1) == 1


def test_the_own_choice_of_openvino_is_read_from_it():
    model = openvino.core().compile_model(openvino.read_model(_doubling()), "CPU", openvino.settings(None))
    assert openvino._own_choice() == model.get_property("INFERENCE_NUM_THREADS") >= 1


def _doubling() -> bytes:
    from onnx import TensorProto, helper

    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [2]) for name in "xy")
    graph = helper.make_graph([helper.make_node("Add", ["x", "x"], ["y"])], "doubling", [x], [y])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9).SerializeToString()


def test_openvino_pins_no_threads(tmp_path):
    """Pinned, two engines would share the first core while the second is idle."""
    with EdgeBackbone.from_pretrained(make_bundle(tmp_path / "b.bundle").path, device="cpu", threads=1) as backbone:
        assert backbone._engine._loaded.model.get_property("ENABLE_CPU_PINNING") is False


def test_a_limit_changes_no_entry_of_the_cache_of_engines(limited):
    limited(1.0)
    assert "INFERENCE_NUM_THREADS" not in openvino.settings(None)


@pytest.mark.parametrize(
    ("quota", "cores", "given", "threads"),
    [(None, 8, None, 0), (3.5, 8, None, 3), (12.0, 8, None, 8), (0.5, 8, None, 1), (3.0, 8, 5, 5), (None, 8, 2, 2)],
)
def test_onnx_runtime_gets_the_limit_but_no_more_threads_than_cores(limited, monkeypatch, quota, cores, given, threads):
    monkeypatch.setattr(cpus, "cores", lambda: cores)
    limited(quota)
    assert session_options(given).intra_op_num_threads == threads
    if given is None:
        assert reference_options().intra_op_num_threads == threads


def test_threads_of_onnx_runtime_do_not_spin_between_calls():
    assert session_options().get_session_config_entry("session.force_spinning_stop") == "1"


@pytest.mark.parametrize(
    ("quota", "threads", "expected"), [(1.0, None, 1), (64.0, None, 3), (1.0, 2, 2), (None, None, 3)]
)
def test_torch_gets_no_more_threads_than_the_limit(tmp_path_factory, scripted, limited, quota, threads, expected):
    limited(quota)
    during = []
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with EdgeBackbone.from_pretrained(
            scripted, engine="torchscript", device="cpu", threads=threads, allow_host_code=True
        ) as backbone:
            module = backbone._engine._module
            backbone._engine._module = lambda x: during.append(torch.get_num_threads()) or module(x)
            backbone(np.zeros(backbone.input.opt_shape, np.float32))
        assert (during, torch.get_num_threads()) == ([expected], 3)
    finally:
        torch.set_num_threads(before)


@pytest.fixture(scope="module")
def scripted(tmp_path_factory):
    from edge_backbones import compile_bundle

    path = tmp_path_factory.mktemp("threads") / "scripted.bundle"
    build_bundle("test_resnet", path, options=BuildOptions(weights="random:0", precisions="fp32", cache=None))
    compile_bundle(path, flavour="torchscript", allow_host_code=True)
    return path


def test_a_build_keeps_torch_to_the_limit_and_puts_its_number_back(limited):
    limited(1.0)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with steps.usable_cpus():
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(("threads", "expected"), [(None, 2), (5, 5)])
def test_preprocessing_gets_the_limit(limited, monkeypatch, threads, expected):
    limited(2.5)
    seen = []
    monkeypatch.setattr(fitting, "resample", lambda *given: seen.append(given[-1]) or np.zeros((32, 32, 3), np.uint8))
    config = ImageConfig(mean=(0.5,) * 3, std=(0.5,) * 3)
    fitting.fit(np.zeros((64, 64, 3), np.uint8), config, 32, 32, threads)
    assert seen == [expected]


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system has no affinity masks")
def test_under_a_mask_of_one_cpu_no_library_starts_a_second_thread(tmp_path):
    path = make_bundle(tmp_path / "b.bundle").path
    code = """
import os, sys
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
import numpy as np
from edge_backbones import EdgeBackbone
from edge_backbones.engines.onnxruntime.options import session_options
with EdgeBackbone.from_pretrained(sys.argv[1], device="cpu") as backbone:
    backbone(np.zeros(backbone.input.opt_shape, np.float32))
    print(backbone._engine._loaded.model.get_property("INFERENCE_NUM_THREADS"), session_options().intra_op_num_threads)
"""
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    numbers = done.stdout.split()
    assert numbers == (["1", "1"] if (os.cpu_count() or 1) > 1 else ["1", "0"])
