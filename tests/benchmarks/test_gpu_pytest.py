"""How the GPU suite runs files of tests: what is kept of those that fail, hang, die or lose the GPU."""

from __future__ import annotations

import shutil
import sys

import pytest

from benchmarks import gpu_pytest
from benchmarks.gpu_common import MissingError
from benchmarks.gpu_processes import PartFailedError, PartSlowError
from benchmarks.gpu_pytest import TESTS, run_tests


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Run a file of tests beside a copy of the conftest of tests/gpu, which looks for no GPU here."""
    shutil.copy(TESTS / "conftest.py", tmp_path / "conftest.py")
    monkeypatch.setattr(gpu_pytest, "TESTS", tmp_path)

    def run(text, seconds=60.0, **more):
        text = "import os, time, pytest\nfrom edge_backbones.machine import gpus\n" + text
        (tmp_path / "test_it.py").write_text(text, encoding="utf-8")
        # The conftest asks for a GPU when tests are collected.
        (tmp_path / "gpu_is_here.py").write_text(
            "from edge_backbones.machine import gpus\ngpus.no_gpu_reason = lambda: ''\n", encoding="utf-8"
        )
        monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{gpu_pytest.ROOT}")
        chosen = ["-p", "gpu_is_here", "-c", "/dev/null", "--rootdir", str(tmp_path)]
        return run_tests(tmp_path / "test_it.py", seconds, device=0, bundles=tmp_path, chosen=chosen, **more)

    return run


def test_counts_reasons_and_messages(run):
    assert run(
        "def test_good(gpu, bundles): assert gpu == 0 and bundles.is_dir()\n"
        "@pytest.mark.skip(reason='torch is not installed')\n"
        "def test_marked(): pass\n"
        "def test_left_out(): pytest.skip('pycuda is not installed')\n"
    ) == {
        "passed": 1,
        "failed": {},
        "not_run": {"torch is not installed": ["test_marked"], "pycuda is not installed": ["test_left_out"]},
    }
    with pytest.raises(PartFailedError, match="1 of 2 failed, test_bad: AssertionError: one is not two") as failed:
        run("def test_bad():\n    assert 1 == 2, 'one is not two'\ndef test_good(): pass\n")
    assert failed.value.figures["passed"] == 1
    assert "one is not two" in failed.value.figures["failed"]["test_bad"]
    with pytest.raises(MissingError, match="torch is not installed"):
        run("def test_left_out(): pytest.skip('torch is not installed')\n")


def test_a_test_whose_clean_up_fails_did_not_pass(run):
    with pytest.raises(PartFailedError, match="test_it: RuntimeError: left over") as failed:
        run("@pytest.fixture\ndef thing():\n    yield\n    raise RuntimeError('left over')\ndef test_it(thing): pass\n")
    assert failed.value.figures["passed"] == 0


def test_a_file_that_cannot_be_read_is_a_failure(run):
    with pytest.raises(PartFailedError, match="pytest ended with 2"):
        run("import no_such_module\n")


def test_a_process_that_dies_ends_one_test(run):
    with pytest.raises(PartFailedError, match="1 of 3 failed, test_dies: the process ended with -6") as failed:
        run("def test_first(): pass\ndef test_dies(): os.abort()\ndef test_last(): pass\n")
    assert failed.value.figures["passed"] == 2


def test_a_process_that_dies_behind_the_last_test(run):
    with pytest.raises(PartFailedError, match="after the last test: the process ended with -6"):
        run("import atexit\natexit.register(os.abort)\ndef test_good(): pass\n")


def test_a_lost_gpu_ends_one_test(run, tmp_path):
    """The tests behind it run in another process, where the GPU is well."""
    with pytest.raises(PartFailedError, match="1 of 3 failed, test_faults: RuntimeError: waiting failed") as failed:
        run(
            "lost = []\n"
            "def test_first(): pass\n"
            "def test_faults():\n"
            "    lost.append(1)\n"
            "    raise RuntimeError('waiting failed: CUDA_ERROR_ILLEGAL_ADDRESS')\n"
            "def test_last(): assert not lost\n"
        )
    assert failed.value.figures["passed"] == 2


def test_a_test_that_hangs_is_named_and_the_others_are_kept(run):
    with pytest.raises(PartSlowError, match="ended after 4 s in test_hangs, 1 tests were left") as slow:
        run("def test_first(): pass\ndef test_hangs(): time.sleep(600)\ndef test_last(): pass\n", seconds=4.0)
    assert slow.value.figures["passed"] == 1
    assert slow.value.figures["no_time"] == ["test_last"]


def test_processes_that_begin_no_test_are_not_started_for_ever(run, tmp_path):
    """The second process dies before its first test."""
    mark = tmp_path / "died"
    with pytest.raises(PartFailedError, match="test_dies: the process ended with -6"):
        run(
            f"if os.path.exists({str(mark)!r}): os.abort()\n"
            f"def test_dies():\n    open({str(mark)!r}, 'w').close()\n    os.abort()\ndef test_last(): pass\n"
        )


def test_a_machine_without_pytest(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "pytest", None)
    with pytest.raises(MissingError) as missing:
        run_tests(TESTS / "test_gpu_memory.py", 60, device=0, bundles=tmp_path)
    assert str(missing.value) == "pytest is missing (python -m pip install pytest)"


def test_tests_without_a_gpu_are_left_out_with_the_probes_reason(monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # so that a machine with a GPU runs this too
    with pytest.raises(MissingError, match=r"no NVIDIA driver|no GPU is visible|CUDA_ERROR_NO_DEVICE"):
        run_tests(TESTS / "test_gpu_arrays.py", 60, device=0, bundles=tmp_path)
