"""Which engine runs where: decided from the key alone."""

from __future__ import annotations

import msgspec
import pytest

from edge_backbones.manifest import EngineKey
from edge_backbones.runtime.compat import Host, cpu_features, device_name, reasons_against

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


def test_the_same_or_a_richer_cpu_fits():
    assert reasons_against(KEY, HOST) == []


@pytest.mark.parametrize(
    ("host", "reason"),
    [
        (Host("x86_64", ("avx2",), "Atom", {"openvino": "2026.4.1"}), "avx512f, avx512_vnni; this one (Atom)"),
        (Host("aarch64", ("asimd",), "Orin", {"openvino": "2026.4.1"}), "compiled for x86_64; this machine is aarch64"),
        (Host("x86_64", HOST.cpu_features, "Xeon", {"openvino": "2026.5"}), "openvino 2026.4.1; here 2026.5"),
        (Host("x86_64", HOST.cpu_features, "Xeon", {}), "pip install 'edge-backbones[cpu]'"),
    ],
)
def test_every_obstacle_is_a_sentence(host, reason):
    (only,) = reasons_against(KEY, host)
    assert reason in only


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
