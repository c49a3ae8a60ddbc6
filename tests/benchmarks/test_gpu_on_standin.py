"""``make gpu`` from end to end over the stand-in for libcuda: the tests of tests/gpu themselves run, and pass.

What needs torch, cupy or TensorRT is left out there, because these libraries cannot use the stand-in.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from benchmarks import gpu_parts
from benchmarks.gpu_results import ROOT
from build_scripts.fetch_bindings import default_folder
from build_scripts.fetch_cuda import why_not_here
from tests.driver.build import build
from tests.driver.conftest import VERSIONS

PARTS = ("memory", "engines", "processes", "ceilings", "overhead-stand-in")


@pytest.fixture(scope="module")
def libcuda(tmp_path_factory):
    if why := why_not_here():
        pytest.skip(why)
    return build(tmp_path_factory.mktemp("libcuda"))


@pytest.fixture
def run(libcuda, tmp_path):
    def run(*arguments, release="cuda-13", **machine):
        places = [default_folder() / name for name in (release, "cuda-core", "pycuda")]
        for place in places:
            assert (place / ".complete").is_file(), f"{place} is not there: run python -m build_scripts.fetch_cuda"
        environment = {
            **os.environ,
            "LD_LIBRARY_PATH": str(libcuda.parent),
            "PYTHONPATH": os.pathsep.join(map(str, [*places, ROOT])),
            **{
                f"STANDIN_{name.upper()}": str(value)
                for name, value in {"version": VERSIONS[release], **machine}.items()
            },
        }
        out = tmp_path / "gpu.json"
        command = [sys.executable, "-m", "benchmarks.gpu_suite", "--out", str(out), *arguments]
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=560
        )
        assert done.stderr == ""
        document = json.loads(out.read_text(encoding="utf-8"))
        return done.returncode, {part["name"]: part for part in document["parts"]}, document

    return run


@pytest.mark.parametrize(
    ("release", "machine"), [("cuda-13", {}), ("cuda-12", {"integrated": 1})], ids=["a server", "a Jetson"]
)
def test_every_part_that_needs_no_other_library_is_done(run, release, machine):
    code, parts, document = run("--only", *PARTS, release=release, **machine)
    assert {name: (part["state"], part["reason"]) for name, part in parts.items()} == dict.fromkeys(PARTS, ("done", ""))
    assert code == 0
    assert document["device"]["integrated"] == bool(machine)
    # Most of these files ran: a part in which nearly everything is left out proves nothing.
    assert parts["memory"]["figures"]["passed"] >= 50
    assert parts["engines"]["figures"]["passed"] >= 35
    assert parts["processes"]["figures"]["passed"] >= 6
    left_out = {why for name in ("memory", "engines", "processes") for why in parts[name]["figures"]["not_run"]}
    known = (
        "the driver is a stand-in",
        "is not installed",
        "are numpy, which allocates",
        "has the memory of the system",
    )
    assert all(any(words in why for words in known) for why in left_out), left_out
    assert parts["ceilings"]["figures"]["copy_gb_per_s"] > 0
    assert parts["overhead-stand-in"]["figures"].keys() == {"call", "graphed"}


def test_a_bare_machine_gets_answers_and_goes_on_where_it_stopped(run):
    code, parts, _ = run("--only", "ceilings", "overhead", "contend", "rtx", "plan", "roofline", "graphs")
    assert code == 0
    done = [name for name, part in parts.items() if part["state"] == "done"]
    assert done == ["ceilings", "overhead-stand-in"]
    assert all(part["reason"] for name, part in parts.items() if name not in done)
    code, parts, _ = run("--budget", "0")
    assert code == 0
    assert list(parts) == [row.name for row in gpu_parts.rows()]
    assert {name: part["reason"] for name, part in parts.items() if part["state"] == "done"} == dict.fromkeys(
        done, "in an earlier run"
    )
    assert parts["memory"]["reason"] == "it takes about 30 s, and 0 s of 0 s are left"


def test_a_fault_of_the_gpu_fails_a_part_and_not_the_suite(run):
    """A GPU with too little memory for what a part takes."""
    code, parts, _ = run("--only", "ceilings", "overhead-stand-in", memory=128 << 20)
    assert code == 1
    assert (parts["ceilings"]["state"], parts["overhead-stand-in"]["state"]) == ("failed", "done")
    assert "OutOfMemoryError: cuda:0 has no 268.4 MB left" in parts["ceilings"]["reason"]
