"""C++ and Python answer the same about manifests, machines and engines, sentence by sentence."""

from __future__ import annotations

import hashlib
import json
import random
import subprocess
from pathlib import Path

import pytest

from edge_backbones.engines import registry
from edge_backbones.machine.hosts import Host
from tests.conformance.make_cases import all_cases, answered
from tests.cpp_programs import program


@pytest.fixture(scope="module")
def cases() -> list[dict]:
    return all_cases()


def told(answers: Path, asked: list[dict], folder: Path) -> dict:
    (folder / "cases.json").write_text(json.dumps(asked), encoding="utf-8")
    done = subprocess.run([answers, folder / "cases.json"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def answers() -> Path:
    return program("answers")


@pytest.fixture(scope="module")
def cpp(answers: Path, cases: list[dict], tmp_path_factory: pytest.TempPathFactory) -> dict:
    return told(answers, cases, tmp_path_factory.mktemp("conformance"))


def of_kind(kind: str, cases: list[dict], cpp: dict) -> list[tuple[dict, dict]]:
    return [(case, answer) for case, answer in zip(cases, cpp["answers"], strict=True) if case["kind"] == kind]


def test_the_same_manifests_are_accepted_and_read_alike(cases, cpp):
    accepted = 0
    for case, answer in of_kind("manifest", cases, cpp):
        expected = answered(case)
        if "error" in expected:
            assert "error" in answer, (bytes.fromhex(case["manifest"]), expected)
            continue
        accepted += 1
        assert answer == expected
    assert accepted > 50  # a reader that refuses everything would pass otherwise


def test_a_refusal_of_a_version_or_a_digest_has_the_same_words(cases, cpp):
    compared = 0
    for case, answer in of_kind("manifest", cases, cpp):
        expected = answered(case)
        if "error" in expected and "is not a valid manifest" not in expected["message"]:
            compared += 1
            assert answer == expected
    assert compared > 20


def in_words_of_cpp(answer: dict, missing: dict[str, str]) -> dict:
    """Replace the one sentence that differs: a program has the libraries that it was built with."""
    text = json.dumps(answer)
    for name in registry.ROWS:
        flavour = registry.get(name)
        for jetson in (True, False):
            install = flavour.install(Host("", (), "", {}, jetson=jetson))
            python = f"needs {name}, which is not installed: {install}"
            text = text.replace(json.dumps(python)[1:-1], json.dumps(missing[name])[1:-1])
    return json.loads(text)


def test_the_same_engine_is_chosen_for_the_same_reasons(cases, cpp):
    seen = set()
    for case, answer in of_kind("choose", cases, cpp):
        expected = in_words_of_cpp(answered(case), cpp["missing"])
        assert answer == expected, (case["host"], case["engine"], case["place"], case["code"])
        seen |= {key for key in expected if expected[key]}
    assert seen == {"reasons", "loads", "chosen", "passed_over", "refusal"}


@pytest.mark.parametrize("kind", ["text", "device", "machine"])
def test_small_things_are_told_alike(kind, cases, cpp):
    compared = of_kind(kind, cases, cpp)
    assert compared
    for case, answer in compared:
        assert answer == answered(case), case


def group(root: Path, mountinfo: str, cgroup: str, **files: str) -> dict:
    for path, text in {"proc/self/mountinfo": mountinfo, "proc/self/cgroup": cgroup, **files}.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)
    return {"kind": "quota", "root": str(root)}


def test_quotas_of_cgroups_are_read_alike(answers, tmp_path):
    v2 = "30 20 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n"
    inside = "30 20 0:26 /docker/abc /sys/fs/cgroup rw shared:1 - cgroup2 cgroup2 rw\n"
    v1 = "36 35 98:0 / /sys/fs/c\\040g rw - cgroup cgroup rw,cpu,cpuacct\n"
    top = "sys/fs/cgroup"
    asked = [
        group(tmp_path / "none", "", ""),
        group(tmp_path / "max", v2, "0::/a/b\n", **{f"{top}/a/b/cpu.max": "max 100000\n"}),
        group(
            tmp_path / "two",
            v2,
            "0::/a/b\n",
            **{f"{top}/a/b/cpu.max": "250000 100000", f"{top}/a/cpu.max": "150000 100000"},
        ),
        group(tmp_path / "inside", inside, "0::/docker/abc/x\n", **{f"{top}/x/cpu.max": "50000 100000"}),
        group(tmp_path / "outside", inside, "0::/elsewhere\n", **{f"{top}/cpu.max": "70000 100000"}),
        group(tmp_path / "odd", v2, "0::/\n", **{f"{top}/cpu.max": "-5 100000"}),
        group(tmp_path / "zero", v2, "0::/\n", **{f"{top}/cpu.max": "100000 0"}),
        group(
            tmp_path / "v1",
            v1,
            "4:cpu,cpuacct:/g\n",
            **{"sys/fs/c g/g/cpu.cfs_quota_us": "-1", "sys/fs/c g/g/cpu.cfs_period_us": "100000"},
            **{"sys/fs/c g/cpu.cfs_quota_us": "300000", "sys/fs/c g/cpu.cfs_period_us": "100000"},
        ),
    ]
    found = told(answers, asked, tmp_path)["answers"]
    assert found == [answered(case) for case in asked]
    assert sum(quota is not None for quota in found) == 4


def test_sha_256_is_that_of_hashlib(answers, tmp_path):
    draw = random.Random(1)
    nist = [b"", b"abc", b"abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq"]
    data = [*nist, *(draw.randbytes(size) for size in (*range(1, 200), 1000, 4096, 65537))]
    asked = [{"kind": "sha256", "data": one.hex()} for one in data]
    for one, answer in zip(data, told(answers, asked, tmp_path)["answers"], strict=True):
        assert answer == dict.fromkeys(("whole", "pieces", "plain"), hashlib.sha256(one).hexdigest())
