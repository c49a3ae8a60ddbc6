"""build_scripts/emulate_aarch64.py, as far as it goes without an emulated machine: which takes minutes and root."""

from __future__ import annotations

import sys

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
    with pytest.raises(EmulationError, match="apt install apt debootstrap dpkg qemu-user-static util-linux"):
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
    assert cpu_features(module.cpuinfo(hwcap, hwcap2), "aarch64") == features


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
