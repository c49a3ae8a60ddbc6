"""build_scripts/emulate_aarch64.py, as far as it goes without an emulated machine: which takes minutes and root."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import numpy as np
import pytest

from build_scripts import emulate_aarch64 as module
from build_scripts.emulate_aarch64 import EmulationError
from edge_backbones.machine.hosts import cpu_features
from edge_backbones.parity_report import Gate

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the script is for Linux alone")


def test_a_machine_that_cannot_is_told_before_anything_is_done(monkeypatch, tmp_path):
    monkeypatch.setattr(module.platform, "machine", lambda: "aarch64")
    with pytest.raises(EmulationError, match="compares with an x86-64 Linux machine, run it there"):
        module.check_machine()
    monkeypatch.setattr(module.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(module.os, "geteuid", lambda: 1000)
    with pytest.raises(EmulationError, match="run it with sudo"):
        module.check_machine()
    monkeypatch.setattr(module.os, "geteuid", lambda: 0)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(
        EmulationError, match="apt install apt debootstrap dpkg gcc libc6-dev qemu-user qemu-user-static util-linux"
    ):
        module.check_machine()
    for tool in module._TOOLS:
        (tmp_path / tool).write_text("#!/bin/sh\n")
        (tmp_path / tool).chmod(0o755)
    module.check_machine()


def test_the_archive_is_that_of_apt():
    told = "http://a/security|x-security|main\nhttp://a/debian|x-updates|main\nhttp://a/more|x|extra\n"
    assert module.first_release(told) is None
    assert module.first_release(f"{told}http://a/debian|x|main\nhttp://b/debian|y|main\n") == ("http://a/debian", "x")
    assert module.first_release("") is None


def test_nothing_half_made_stays(monkeypatch, tmp_path):
    monkeypatch.setattr(module, "CACHE", tmp_path)
    monkeypatch.setattr(module, "ROOT", tmp_path)
    shell = module.command

    def fail(*words: str, **_: object) -> str:
        return shell("sh", "-c", f"touch {words[-2]}/file; echo first; echo 'E: no arm64 here' >&2; exit 3")

    monkeypatch.setattr(module, "command", fail)
    with pytest.raises(EmulationError, match=r"ended with 3: E: no arm64 here .*--mirror"):
        module.make_root("http://a", "x")
    assert list(tmp_path.iterdir()) == []


def test_a_crash_names_its_signal():
    with pytest.raises(EmulationError, match="was ended by SIGILL"):
        module.command("sh", "-c", "kill -ILL $$")


def test_one_run_at_a_time(monkeypatch, tmp_path):
    monkeypatch.setattr(module, "CACHE", tmp_path / "cache")
    with module.alone(), pytest.raises(EmulationError, match="another run uses"), module.alone():
        pass
    with module.alone():
        pass


@pytest.mark.parametrize(
    ("hwcap", "hwcap2", "features"),
    [  # bits as in the kernel's arch/arm64/include/uapi/asm/hwcap.h
        (1 << 1, 0, ("asimd",)),
        (1 << 1 | 1 << 10 | 1 << 20, 0, ("asimd", "asimdhp", "asimddp")),
        (1 << 1 | 1 << 22, 1 << 13 | 1 << 14, ("asimd", "sve", "bf16", "i8mm")),
        (0x80000000, 1 << 17, ()),
    ],
)
def test_the_emulated_cpu_is_described_as_the_kernel_would(hwcap, hwcap2, features):
    described = module.cpuinfo(hwcap, hwcap2)
    assert cpu_features(described, "aarch64") == features
    for name in ("implementer", "architecture", "variant", "part", "revision"):  # ONNX Runtime needs all of them
        assert described.count(f"CPU {name}") == described.count("processor") > 0


def test_the_instructions_of_one_call_are_counted():
    lines = ["a warning", "COUNT 100 10 1", "COUNT 150 14 3", "COUNT 1000 20 7", "COUNT 1900 20 8"]
    assert module.instructions_of(lines, ["openvino/int8", "onnxruntime/int8"]) == {
        "openvino/int8": {"all": 50, "int8_products": 4, "float_multiply_adds": 2},
        "onnxruntime/int8": {"all": 900, "int8_products": 0, "float_multiply_adds": 1},
    }
    with pytest.raises(EmulationError, match="4 reports of the plugin were expected, and 3 came"):
        module.instructions_of(lines[:4], ["openvino/int8", "onnxruntime/int8"])


@pytest.mark.parametrize(
    ("kind", "words"),
    [  # as llvm-mc assembles them
        (
            "INT8",
            {
                "sdot v0.4s, v1.16b, v2.16b": 0x4E829420,
                "udot v3.2s, v4.8b, v5.8b": 0x2E859483,
                "udot v0.4s, v1.16b, v2.4b[3]": 0x6FA2E820,
                "smmla v0.4s, v1.16b, v2.16b": 0x4E82A420,
                "ummla v0.4s, v1.16b, v2.16b": 0x6E82A420,
                "usmmla v0.4s, v1.16b, v2.16b": 0x4E82AC20,
                "sdot z0.s, z1.b, z2.b": 0x44820020,
                "udot z0.s, z1.b, z2.b[1]": 0x44AA0420,
                "smmla z0.s, z1.b, z2.b": 0x45029820,
                "ummla z0.s, z1.b, z2.b": 0x45C29820,
            },
        ),
        (
            "FLOAT",
            {
                "fmla v0.4s, v1.4s, v2.4s": 0x4E22CC20,
                "fmla v0.4s, v1.4s, v2.s[2]": 0x4F821820,
                "fmla z0.s, p1/m, z2.s, z3.s": 0x65A30440,
                "fmla z0.s, z1.s, z2.s[1]": 0x64AA0020,
                "fmopa za0.s, p0/m, p1/m, z0.s, z1.s": 0x80812000,
            },
        ),
        (
            None,
            {
                "add v0.4s, v1.4s, v2.4s": 0x4EA28420,
                "fmul v0.4s, v1.4s, v2.4s": 0x6E22DC20,
                "smlal v0.4s, v1.4h, v2.4h": 0x0E628020,
                "bfdot v0.4s, v1.8h, v2.8h": 0x6E42FC20,
                "bfmmla v0.4s, v1.8h, v2.8h": 0x6E42EC20,
                "ldr q0, [x1]": 0x3DC00020,
                "b #4": 0x14000001,
            },
        ),
    ],
)
def test_the_plugin_knows_the_instructions(kind, words):
    source = Path(module.__file__).with_name("count_instructions.c").read_text(encoding="utf-8")
    rows = [
        (int(mask, 16), int(bits, 16), name) for mask, bits, name in re.findall(r"\{(0x\w+), (0x\w+), (\w+)\}", source)
    ]
    assert len(rows) == 12
    for text, word in words.items():
        assert next((name for mask, bits, name in rows if word & mask == bits), None) == kind, text


def test_the_worst_image_counts():
    expected = {
        f"{case}/{stage}": np.random.default_rng(0).standard_normal((3, 2, 4, 5)) for case in "ab" for stage in "xy"
    }
    actual = {key: value.astype(np.float32) for key, value in expected.items()}
    gate = Gate(min_cosine=0.99, min_sqnr_db=15.0)
    assert module.worst("x", expected, actual, gate)["passed"]
    actual["b/x"][1] *= -1
    found = module.worst("x", expected, actual, gate)
    assert not found["passed"]
    assert found["cosine"] == pytest.approx(-1)
    assert found["sqnr_db"] == pytest.approx(-10 * np.log10(4), abs=1e-4)
    assert module.worst("y", expected, actual, gate)["passed"]
    assert not module.worst("y", expected, {**actual, "a/y": actual["a/y"][:, :1]}, gate)["passed"]
