"""Which engine runs where: decided from the key alone."""

from __future__ import annotations

import re

import msgspec
import pytest

from edge_backbones.bundle.manifest import EngineKey, GpuKey
from edge_backbones.engines import registry
from edge_backbones.engines.compat import numbers
from edge_backbones.engines.registry import reasons_against
from edge_backbones.engines.tensorrt.plans import library_to_load, reasons_in_plan
from edge_backbones.installation import pip_install
from edge_backbones.machine.gpus import Gpu
from edge_backbones.machine.hosts import Host, cpu_features, device_name

KEY = EngineKey(
    flavour="openvino",
    library_version="2026.4.1",
    architecture="x86_64",
    cpu_features=("avx2", "avx512f", "avx512_vnni"),
    device_name="Xeon",
    precision="int8",
    graph_sha256="0" * 64,
)
HOST = Host("x86_64", ("avx2", "avx512f", "avx512_vnni", "amx_int8"), "Xeon 2", {"openvino": "2026.4.1"})


WAY_OUT = r"pip install (--editable )?'.*'|run edge-backbones compile here|update the driver|no NVIDIA driver"
"""Each says what to do; why there is no GPU is said by who looked for one, with its own way out."""


def test_the_same_or_a_richer_cpu_fits():
    assert reasons_against(KEY, HOST) == []


@pytest.mark.parametrize(
    ("host", "reason"),
    [
        (Host("x86_64", ("avx2",), "Atom", {"openvino": "2026.4.1"}), "avx512f, avx512_vnni; this one (Atom)"),
        (Host("aarch64", ("asimd",), "Orin", {"openvino": "2026.4.1"}), "compiled for x86_64; this machine is aarch64"),
        (Host("x86_64", HOST.cpu_features, "Xeon", {"openvino": "2026.5"}), "openvino 2026.4.1; here 2026.5"),
        (Host("x86_64", HOST.cpu_features, "Xeon", {}), pip_install("cpu")),
    ],
)
def test_every_obstacle_is_a_sentence(host, reason):
    (only,) = reasons_against(KEY, host)
    assert reason in only
    assert re.search(WAY_OUT, only), only


def test_a_plan_whose_key_names_no_gpu_is_refused_in_words():
    for flavour in ("tensorrt", "tensorrt_rtx", "tensorrt_lean"):
        (reason,) = reasons_against(msgspec.structs.replace(KEY, flavour=flavour), HOST)
        assert reason == "is a plan, and its key says nothing of a GPU: run edge-backbones compile here"


@pytest.mark.parametrize(
    ("computes_in", "features", "fits"),
    [
        ("bf16", ("avx2", "avx512_bf16"), True),
        ("bf16", ("avx2", "amx_bf16"), True),
        ("bf16", ("avx2", "avx512_fp16"), False),
        ("fp16", ("asimd", "asimdhp"), True),
        ("fp16", ("avx2", "avx512_bf16"), False),
        ("fp32", (), True),
    ],
)
def test_an_engine_runs_only_where_the_cpu_computes_in_its_format(computes_in, features, fits):
    """OpenVINO would emulate bf16, or compute fp16 in another format, and the parity of the bundle would not hold."""
    key = msgspec.structs.replace(KEY, precision="bf16", cpu_features=(), computes_in=computes_in)
    reasons = reasons_against(key, Host("x86_64", features, "Atom", {"openvino": "2026.4.1"}))
    assert bool(reasons) is not fits
    if not fits:
        assert reasons == [
            f"computes in {computes_in}; this CPU (Atom) has no instructions for it: run edge-backbones compile here"
        ]


def test_a_key_that_does_not_say_what_it_computes_in_keeps_its_name():
    """Names hold a hash of the key. Engines of earlier releases must be found by the names that they had."""
    assert KEY.name == "openvino-2026.4.1-x86_64-avx512_vnni-int8-d4dc85ce"
    assert "computes_in" not in msgspec.json.decode(msgspec.json.encode(KEY))
    assert msgspec.structs.replace(KEY, computes_in="bf16").name != KEY.name


def test_all_obstacles_are_listed():
    assert (
        len(
            reasons_against(
                msgspec.structs.replace(KEY, library_version="1"), Host("aarch64", (), "x", {"openvino": "2"})
            )
        )
        == 2
    )


CPUINFO = """processor\t: 0
model name\t: Some CPU @ 3 GHz
flags\t\t: fpu sse avx2 avx512_vnni avx512f
processor\t: 1
flags\t\t: amx_int8
"""


def test_features_are_read_from_the_first_core_weakest_first():
    assert cpu_features(CPUINFO, "x86_64") == ("avx2", "avx512f", "avx512_vnni")
    assert cpu_features("Features\t: fp asimd asimddp", "aarch64") == ("asimd", "asimddp")
    assert cpu_features("", "x86_64") == ()
    assert device_name(CPUINFO) == "Some CPU @ 3 GHz"


ORIN = Gpu(
    index=0, name="Orin", architecture="sm_87", memory_bytes=8 << 30, driver="12.6", multiprocessors=8, integrated=True
)
A10 = Gpu(
    index=0,
    name="NVIDIA A10",
    architecture="sm_86",
    memory_bytes=24 << 30,
    driver="12.8",
    multiprocessors=72,
    integrated=False,
)
PLAN = EngineKey(
    flavour="tensorrt",
    library_version="10.3.0",
    architecture="aarch64",
    cpu_features=(),
    device_name="Orin",
    precision="int8",
    graph_sha256="0" * 64,
    gpu=GpuKey(architectures=("sm_87",), driver="12.6"),
)
JETSON = Host("aarch64", ("asimd",), "Cortex-A78AE", {"tensorrt": "10.3.0"}, ORIN)


def key(**changes):
    gpu = {name: changes.pop(name) for name in list(changes) if name in GpuKey.__struct_fields__}
    return msgspec.structs.replace(PLAN, gpu=msgspec.structs.replace(PLAN.gpu, **gpu), **changes)


def host(**changes):
    fields = {
        "architecture": "aarch64",
        "cpu_features": (),
        "device_name": "CPU",
        "versions": JETSON.versions,
        "gpu": ORIN,
    }
    return Host(**{**fields, **changes})


def test_a_plan_runs_where_it_was_compiled():
    assert reasons_against(PLAN, JETSON) == []


@pytest.mark.parametrize(
    ("engine", "there", "reason"),
    [
        (key(), host(gpu=A10), "compiled for sm_87; this GPU (NVIDIA A10) is sm_86"),
        (
            key(device_name="Orin Nano"),
            host(),
            "compiled for the kernels of Orin Nano (None SMs); this GPU is Orin (8 SMs)",
        ),
        (key(), host(versions={"tensorrt": "10.7.0"}), "compiled with tensorrt 10.3.0; here 10.7.0"),
        (key(), host(versions={}), f"needs tensorrt, which is not installed: {pip_install('tensorrt')}"),
        (key(), host(versions={"tensorrt_lean": "10.3.0"}), "needs tensorrt, which is not installed"),
        (key(), host(gpu=None, no_gpu="no NVIDIA driver"), "needs an NVIDIA GPU: no NVIDIA driver"),
        (key(driver="13.0"), host(), "under a driver for CUDA 13.0; the one here serves CUDA 12.6: update the driver"),
        (key(architecture="x86_64"), host(), "compiled on x86_64; this machine is aarch64"),
        (
            key(version_compatible=True, host_code=True),
            host(versions={"tensorrt": "10.1.0"}),
            "compiled with tensorrt 10.3.0 or newer; here 10.1.0",
        ),
        (
            key(version_compatible=True),
            host(versions={"tensorrt": "10.13.0", "tensorrt_lean": "11.4.0"}),
            "compiled with tensorrt 10.3.0; here 10.13.0",
        ),
        (key(multiprocessors=16), host(), "the kernels of Orin (16 SMs); this GPU is Orin (8 SMs)"),
        (
            key(flavour="tensorrt_rtx", library_version="1.7.1", architectures=("sm_89", "sm_120")),
            host(versions={"tensorrt_rtx": "1.7.1"}),
            "compiled for sm_89, sm_120; this GPU (Orin) is sm_87",
        ),
    ],
)
def test_every_obstacle_of_a_plan_is_a_sentence(engine, there, reason):
    (only,) = reasons_against(engine, there)
    assert reason in only
    assert re.search(WAY_OUT, only), only


@pytest.mark.parametrize(
    ("engine", "there"),
    [
        (key(device_name="Orin Nano", hardware_compatibility="same_compute_capability"), host()),
        (key(architectures=("sm_80",), hardware_compatibility="ampere_plus", architecture="x86_64"),
         host(architecture="x86_64", gpu=A10)),
        (key(version_compatible=True, host_code=True), host(versions={"tensorrt": "11.4.0.106"})),
        (key(multiprocessors=8), host()),
        (key(version_compatible=True), host(versions={"tensorrt_lean": "10.3.0"})),
        (key(flavour="tensorrt_rtx", library_version="1.7.1", architectures=("sm_86",)),
         host(architecture="x86_64", gpu=A10, versions={"tensorrt_rtx": "1.7.1"})),
        (key(driver=None), host()),
    ],
)  # fmt: skip
def test_plans_that_move(engine, there):
    assert reasons_against(engine, there) == []


def test_older_gpus_than_ampere_are_not_compatible():
    turing = Gpu(0, "Tesla T4", "sm_75", 16 << 30, "12.6", 40, False)
    engine = key(architectures=("sm_80",), hardware_compatibility="ampere_plus")
    assert "this GPU (Tesla T4) is sm_75" in reasons_against(engine, host(gpu=turing))[0]


def test_a_plan_without_weights_needs_a_library_that_reads_graphs():
    stripped = key(version_compatible=True, stripped=True)
    (reason,) = reasons_against(stripped, host(versions={"tensorrt_lean": "10.3.0"}))
    assert "written without weights, and tensorrt_lean takes none from a graph: compile it without --strip" in reason
    assert reasons_against(stripped, host(versions={"tensorrt": "10.3.0", "tensorrt_lean": "10.3.0"})) == []
    (reason,) = reasons_against(stripped, host(versions={}))
    assert "needs tensorrt" in reason


def test_on_a_jetson_tensorrt_is_jetpacks():
    (reason,) = reasons_against(PLAN, host(versions={}, jetson=True))
    assert "sudo apt install python3-libnvinfer" in reason
    assert "pip install" not in reason
    rtx = key(flavour="tensorrt_rtx", library_version="1.7.1", architectures=("sm_87",))
    assert "which no Jetson has: run edge-backbones compile here" in reasons_against(rtx, host(jetson=True))[0]


def test_the_lean_runtime_takes_over_for_newer_plans_only():
    compatible = key(version_compatible=True, host_code=True)
    assert library_to_load(compatible, host()) == "tensorrt"
    assert library_to_load(compatible, host(versions={"tensorrt_lean": "11.4.0"})) == "tensorrt_lean"
    assert (
        library_to_load(compatible, host(versions={"tensorrt": "10.1.0", "tensorrt_lean": "11.4.0"})) == "tensorrt_lean"
    )
    assert library_to_load(key(), host()) == "tensorrt"


def test_plans_of_tensorrt_whose_header_nobody_documented():
    assert reasons_in_plan(PLAN, b"") == ["the plan is empty: compile it again"]
    assert reasons_in_plan(PLAN, b"anything") == []
    assert "written by tensorrt_rtx: open it with that flavour" in reasons_in_plan(PLAN, b"vtrt" + bytes(60))[0]


@pytest.mark.parametrize(
    ("version", "expected"),
    [
        ("10.3.0", (10, 3, 0)),
        ("2026.4.1-22982-e2", (2026, 4, 1, 22982, 2)),
        ("", (0,)),
        ("none", (0,)),
        ("\u0663.1", (1,)),
    ],
)
def test_a_version_is_read_as_its_numbers(version, expected):
    assert numbers(version) == expected


def test_a_version_of_many_digits_is_no_crash():
    """Python reads at most a few thousand digits of a number, and a manifest may have more."""
    assert numbers("9" * 10_000)[0] == 999_999_999


@pytest.mark.parametrize(
    ("architecture", "expected"), [("x86_64", ((), ())), ("AMD64", ((), ()))] + [
        (arm, (("onnxruntime",), ("openvino",))) for arm in ("aarch64", "arm64")
    ],
)  # fmt: skip
def test_libraries_for_the_cpu_are_rivals_on_arm_alone(architecture, expected):
    host = Host(architecture, (), "CPU", {"openvino": "2026.4.1", "onnxruntime": "1.32.0"})
    assert (registry.get("openvino").rivals(host), registry.get("onnxruntime").rivals(host)) == expected
    assert registry.get("tensorrt").rivals(host) == ()
