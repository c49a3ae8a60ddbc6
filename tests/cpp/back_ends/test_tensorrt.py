"""Sessions over TensorRT and TensorRT-RTX in C++, on stand-ins for both and for CUDA; and over the real TensorRT-RTX.

No GPU is needed, and none has run this code. The stand-ins keep the rules of CUDA and TensorRT (tests/driver/libcuda,
standin/nvinfer.cpp): work runs as late as CUDA allows, and a rule that is broken ends the program.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

from edge_backbones import ShapeRange
from edge_backbones.bundle.manifest import EngineRecord, GpuKey
from edge_backbones.bundle.writer import record_file, write_manifest
from edge_backbones.engines.tensorrt.library import library_version
from edge_backbones.spec import Precision
from edge_backbones.testing import make_bundle, pooling_input
from tests.cpp_programs import built, cmake, configured, run
from tests.docs.snippets import snippets

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the C++ library is for Linux")
CASES = (
    "a_new_stream_with_an_old_handle_waits", "another_gpu", "contexts_of_another_profile_are_replaced",
    "default_streams", "destroyed_with_work_pending", "device_memory", "dla", "every_call_fails_once", "fixed_shape",
    "host_code", "host_memory", "later_calls_allocate_nothing", "memory_runs_out", "memory_runs_out_in_every_call",
    "no_gpu", "one_context_serves_streams_in_turn", "other_plans", "page_locked_memory_is_used_in_place", "profiles",
    "reasons_in_the_log", "stripped", "threads", "unusable_memory", "wrong_shapes",
)  # fmt: skip
MACHINES = {"another_gpu": {"STANDIN_DEVICES": "2"}, "no_gpu": {"STANDIN_DEVICES": "0"}}
PLAN = """standin-plan
input pixel_values FLOAT -1 3 32 48
output pool4 FLOAT 4
output pool8 FLOAT 8
profile 1 3 32 48 2 3 32 48 4 3 32 48
scratch 1000
"""
HERE = Path(__file__).parent
PAGE = Path(__file__).parents[3] / "docs" / "how-to" / "cpp-gpu.md"
RELEASE = "11.4.0.106"  # what standin/nvinfer.cpp says that it is


@pytest.fixture(scope="session")
def nvidia() -> Path:
    """The stand-ins (nvidia/include, nvidia/lib), and programs that run sessions over them."""
    return built(HERE)


def ran(*command: Path | str, **environment: str) -> subprocess.CompletedProcess:
    return run(*command, env={**os.environ, **environment})


@pytest.mark.parametrize("library", ["nvinfer", "tensorrt_rtx"])
def test_every_case_is_known(library, nvidia):
    assert tuple(ran(nvidia / f"session_{library}").stdout.split()) == CASES


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("library", ["nvinfer", "tensorrt_rtx"])
def test_session(library, case, nvidia):
    done = ran(nvidia / f"session_{library}", case, **MACHINES.get(case, {}))
    assert done.returncode == 0, done.stderr


def test_a_plan_runs_on_a_dla_core_that_is_there(nvidia):
    done = ran(nvidia / "session_nvinfer", "dla", STANDIN_DLA_CORES="2")
    assert done.returncode == 0, done.stderr


# -- bundles, through the C functions


@pytest.fixture(scope="session")
def project(nvidia) -> Path:
    roots = [f"-DTensorRT_ROOT={nvidia / 'nvidia'}", f"-DCUDA_ROOT={nvidia / 'nvidia'}"]
    return built(HERE / "user", "all", "-DCOMPONENT=TensorRT", *roots)


@pytest.fixture
def plan_bundle(tmp_path):
    """Return a function that writes a bundle of average pooling with an engine for the CPU and one for the stand-in's GPU."""

    def write(plan: str = PLAN, **key: Any) -> Path:
        bundle = make_bundle(tmp_path / "pooling.bundle", pooling_input(ShapeRange(min=1, opt=2, max=4)))
        gpu = {"architectures": ("sm_90",), "driver": "12.9", "multiprocessors": 132, **key.pop("gpu", {})}
        wanted = {
            "flavour": "tensorrt", "library_version": RELEASE, "architecture": platform.machine(), "cpu_features": (),
            "device_name": "Stand-in GPU 0", "precision": Precision.FP32, "gpu": GpuKey(**gpu), "computes_in": msgspec.UNSET,
        }  # fmt: skip
        (cpu,) = bundle.manifest.engines
        changed = msgspec.structs.replace(cpu.key, **{**wanted, **key})
        path = changed.path(plan.encode(), ".plan")
        (bundle.path / path).write_text(plan)
        record = EngineRecord(key=changed, file=record_file(bundle.path, path), parity=cpu.parity)
        write_manifest(bundle.path, msgspec.structs.replace(bundle.manifest, engines=(cpu, record)))
        return bundle.path

    return write


def opened(project: Path, nvidia: Path, bundle: Path, device: str = "cuda", **environment: str):
    library, cudart = project / "libedge_backbones_c.so", nvidia / "nvidia" / "lib" / "libcudart.so"
    return ran(sys.executable, "-m", "tests.cpp.back_ends.gpu_child", library, cudart, bundle, device, **environment)


@pytest.mark.parametrize("device", ["cuda", "auto", "cuda:0"])
def test_a_bundle_runs_on_the_gpu(device, project, nvidia, plan_bundle):
    done = opened(project, nvidia, plan_bundle(), device)
    assert done.returncode == 0, done.stderr
    name, where = done.stdout.split()
    assert name.startswith(f"tensorrt-{RELEASE}-sm_90-fp32-")
    assert where == "cuda:0"


def test_a_release_without_its_build_number_is_the_same(project, nvidia, plan_bundle):
    done = opened(project, nvidia, plan_bundle(library_version=RELEASE.rpartition(".")[0]))
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"library_version": "11.3.0.99"}, "compiled with tensorrt 11.3.0.99; here 11.4.0.106: "),
        ({"library_version": "11.4"}, "compiled with tensorrt 11.4; here 11.4.0.106: "),
        ({"gpu": {"architectures": ("sm_87",)}}, "compiled for sm_87; this GPU (Stand-in GPU 0) is sm_90: "),
        (
            {"gpu": {"driver": "13.0"}},
            "compiled under a driver for CUDA 13.0; the one here serves CUDA 12.9: update",
        ),
        (
            {"gpu": {"multiprocessors": 16}},
            "compiled for the kernels of Stand-in GPU 0 (16 SMs); this GPU is Stand-in GPU 0",
        ),
        ({"gpu": {"stripped": True}}, "was written without weights, and the C++ library takes none from a graph: "),
        ({"gpu": {"host_code": True}}, "carries a runtime, which is code: it is run only with allow_host_code"),
    ],
)
def test_plans_that_do_not_fit_are_not_deserialised(changes, reason, project, nvidia, plan_bundle):
    done = opened(project, nvidia, plan_bundle("this is no plan", **changes))
    assert done.returncode == 1
    assert done.stderr.startswith("EngineMismatchError: no engine of ")
    assert reason in done.stderr
    assert "does not load" not in done.stderr


def test_a_plan_that_does_not_load_says_why(project, nvidia, plan_bundle):
    done = opened(project, nvidia, plan_bundle("this is no plan"))
    assert done.returncode == 1
    assert done.stderr.startswith("EngineMismatchError: tensorrt-")
    assert (
        ": tensorrt 11.4.0.106 does not load this plan (Serialization assertion failed): run edge-backbones"
        in done.stderr
    )


def test_without_a_gpu_the_reason_is_the_drivers(project, nvidia, plan_bundle):
    done = opened(project, nvidia, plan_bundle(), STANDIN_DEVICES="0")
    assert done.returncode == 1
    assert "needs an NVIDIA GPU: driver present, " in done.stderr


def test_the_calls_of_the_page_compile(nvidia, tmp_path):
    (code,) = (found.code for found in snippets(PAGE) if "run_on_device(eb::" in found.code)
    program = (
        "#include <edge_backbones/edge_backbones.hpp>\nnamespace eb = edge_backbones;\n" + code + "int main() {}\n"
    )
    (tmp_path / "main.cpp").write_text(program)
    (tmp_path / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.18)\nproject(page CXX)\n"
        "find_package(edge_backbones REQUIRED COMPONENTS TensorRT)\nadd_library(page OBJECT main.cpp)\n"
        "target_compile_options(page PRIVATE -fsyntax-only -Wall -Wextra -Wconversion -Werror)\n"
        "target_link_libraries(page PRIVATE edge_backbones::tensorrt)\n"
    )
    roots = [f"-DTensorRT_ROOT={nvidia / 'nvidia'}", f"-DCUDA_ROOT={nvidia / 'nvidia'}"]
    done = configured(tmp_path, tmp_path / "build", *roots)
    assert done.returncode == 0, done.stderr
    done = run(cmake(), "--build", tmp_path / "build")
    assert done.returncode == 0, done.stdout + done.stderr


# -- the libraries of NVIDIA, and what CMake says without them


def test_the_real_tensorrt_rtx_says_that_there_is_no_driver(nvidia):
    headers = f"-DCUDA_RUNTIME_INCLUDE_DIR={nvidia / 'nvidia' / 'include'}"
    root = f"-DTensorRT_RTX_ROOT={nvidia / 'nvidia_rtx'}"
    project = built(HERE / "user", "all", "-DCOMPONENT=TensorRT_RTX", root, headers)
    done = ran(project / "without_gpu")
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert first == f"tensorrt_rtx {library_version('tensorrt_rtx')}"
    assert second.startswith("EngineMismatchError: ")
    assert "needs an NVIDIA GPU: " in second or "the plan is empty" in second  # on a machine that has one


@pytest.mark.parametrize(
    ("component", "root", "library"),
    [("TensorRT", "TensorRT_ROOT", "libnvinfer.so"), ("TensorRT_RTX", "TensorRT_RTX_ROOT", "libtensorrt_rtx.so")],
)
def test_a_component_without_headers_is_left_out_with_a_message(component, root, library, tmp_path):
    missing = [f"-D{component}_{name}={component}_{name}-NOTFOUND" for name in ("INCLUDE_DIR", "LIBRARY")]
    off = [
        "-DCMAKE_FIND_ROOT_PATH=/nowhere",
        "-DCMAKE_FIND_ROOT_PATH_MODE_INCLUDE=ONLY",
        "-DCMAKE_FIND_ROOT_PATH_MODE_LIBRARY=ONLY",
    ]
    (tmp_path / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.18)\nproject(user CXX)\n"
        f"find_package(edge_backbones REQUIRED OPTIONAL_COMPONENTS {component})\n"
        f"if(TARGET edge_backbones::{component.lower()})\n  message(FATAL_ERROR found)\nendif()\n"
    )
    done = configured(tmp_path, tmp_path / "build", *missing, *off)
    assert done.returncode == 0, done.stderr
    said = " ".join(done.stdout.split())
    assert f"NvInferRuntime.h, {library}, cuda_runtime_api.h, libcudart.so cannot be found" in said
    assert f"set {root}" in said


def test_tensorrt_is_refused_with_the_headers_of_tensorrt_rtx(nvidia, tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixed")
    done = configured(
        HERE / "user", folder, "-DCOMPONENT=TensorRT", f"-DTensorRT_ROOT={nvidia / 'nvidia'}",
        f"-DCUDA_ROOT={nvidia / 'nvidia'}", f"-DTensorRT_INCLUDE_DIR={nvidia / 'nvidia_rtx' / 'include'}",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    done = run(cmake(), "--build", folder)
    assert done.returncode != 0
    assert "edge_backbones::tensorrt needs the headers of TensorRT" in done.stdout + done.stderr
