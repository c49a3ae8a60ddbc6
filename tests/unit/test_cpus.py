"""How many CPUs a process may use: the files of cgroups v1 and v2 in the layouts that systems and containers have."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from edge_backbones import cpus
from edge_backbones.cpus import Cpus

V2 = "30 24 0:26 {shown} /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n"
V1 = (
    "31 24 0:27 {shown} /sys/fs/cgroup/memory rw shared:5 - cgroup cgroup rw,memory\n"
    "32 24 0:28 {shown} /sys/fs/cgroup/cpuset rw shared:6 - cgroup cgroup rw,cpuset\n"
    "33 24 0:29 {shown} /sys/fs/cgroup/cpu,cpuacct rw shared:7 - cgroup cgroup rw,cpu,cpuacct\n"
)


def lay_out(root: Path, mountinfo: str, groups: str, files: dict[str, str]) -> Path:
    """Write /proc/self and, below /sys/fs/cgroup, the files of cgroups."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/mountinfo").write_text("1 0 8:1 / / rw - ext4 /dev/sda1 rw\n" + mountinfo)
    (root / "proc/self/cgroup").write_text(groups)
    for name, text in files.items():
        file = root / "sys/fs/cgroup" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return root


def v1(folder: str, quota: str, period: str = "100000") -> dict[str, str]:
    at = f"cpu,cpuacct/{folder}".rstrip("/")
    return {f"{at}/cpu.cfs_quota_us": f"{quota}\n", f"{at}/cpu.cfs_period_us": f"{period}\n"}


@pytest.mark.parametrize(
    ("mountinfo", "groups", "files", "quota"),
    [
        pytest.param(V2.format(shown="/"), "0::/\n", {"cpu.max": "150000 100000\n"}, 1.5, id="v2 container"),
        pytest.param(V2.format(shown="/"), "0::/\n", {"cpu.max": "max 100000\n"}, None, id="v2 container, no quota"),
        pytest.param(V2.format(shown="/"), "0::/\n", {"cgroup.procs": ""}, None, id="v2 root, which has no cpu.max"),
        pytest.param(
            V2.format(shown="/docker/abc"), "0::/docker/abc\n", {"cpu.max": "50000 100000\n"}, 0.5,
            id="v2 container in the namespace of the host",
        ),
        pytest.param(
            V2.format(shown="/docker/abc"), "0::/docker/abc/worker\n",
            {"cpu.max": "200000 100000\n", "worker/cpu.max": "max 100000\n"}, 2.0, id="v2 group in such a container",
        ),
        pytest.param(
            V2.format(shown="/"), "0::/system.slice/robot.service\n",
            {"system.slice/cpu.max": "max 100000\n", "system.slice/robot.service/cpu.max": "20000 10000\n"}, 2.0,
            id="v2 systemd service",
        ),
        pytest.param(
            V2.format(shown="/"), "0::/kubepods.slice/pod1.slice/main\n",
            {"kubepods.slice/pod1.slice/cpu.max": "100000 100000", "kubepods.slice/pod1.slice/main/cpu.max": "400000 100000"},
            1.0, id="v2, the parent is stricter",
        ),
        pytest.param(
            V2.format(shown="/"), "0::/a/b\n", {"a/b/cpu.max": "100000 100000", "cpu.max": "300000 100000"}, 1.0,
            id="v2, the group is stricter",
        ),
        pytest.param(
            V2.format(shown="/"), "0::/../other\n", {"cpu.max": "300000 100000", "../other/cpu.max": "1 1"}, 3.0,
            id="v2 group outside the namespace",
        ),
        pytest.param(V1.format(shown="/"), "4:cpu,cpuacct:/\n3:cpuset:/\n", v1("", "250000"), 2.5, id="v1 container"),
        pytest.param(V1.format(shown="/"), "4:cpu,cpuacct:/\n", v1("", "-1"), None, id="v1 without a quota"),
        pytest.param(
            V1.format(shown="/docker/abc"), "4:cpuacct,cpu:/docker/abc\n", v1("", "100000"), 1.0,
            id="v1 container in the namespace of the host",
        ),
        pytest.param(
            V1.format(shown="/"), "4:cpu,cpuacct:/user.slice/job\n1:name=systemd:/user.slice\n",
            {**v1("user.slice/job", "-1"), **v1("user.slice", "600000", "200000"), **v1("", "-1")}, 3.0,
            id="v1, the parent has the quota",
        ),
        pytest.param(
            V1.format(shown="/") + V2.format(shown="/").replace("/sys/fs/cgroup", "/sys/fs/cgroup/unified"),
            "4:cpu,cpuacct:/job\n0::/job\n", {**v1("job", "100000"), "unified/job/cgroup.procs": ""}, 1.0, id="hybrid",
        ),
        pytest.param(
            V2.format(shown="/").replace("/sys/fs/cgroup", r"/sys/fs/cgroup/with\040space"), "0::/a\n",
            {"with space/a/cpu.max": "100000 100000"}, 1.0, id="a mount point with a space",
        ),
        pytest.param("", "0::/\n", {"cpu.max": "100000 100000"}, None, id="not mounted"),
        pytest.param(V1.format(shown="/"), "3:cpuset:/\n", v1("", "100000"), None, id="in no group of CPU time"),
    ],
)  # fmt: skip
def test_the_strictest_quota_on_the_way_to_the_root_counts(tmp_path, mountinfo, groups, files, quota):
    assert cpus.cpu_quota(lay_out(tmp_path / "root", mountinfo, groups, files)) == quota


@pytest.mark.parametrize(
    "text", ["", "max", "100000", "100000 0", "0 100000", "-5 1", "1e5 1", "² 1", "a b c", "1" * 5000 + " 1", "\xff"]
)
def test_a_quota_that_cannot_be_understood_limits_nothing(tmp_path, text):
    root = lay_out(tmp_path, V2.format(shown="/"), "0::/\n", {"cpu.max": text})
    assert cpus.cpu_quota(root) is None


@pytest.mark.parametrize(
    ("mountinfo", "groups"),
    [
        ("- cgroup2 cgroup2 rw\n", "0::/\n"),
        ("30 24 0:26 / relative rw - cgroup2 cgroup2 rw\n", "0::/\n"),
        ("30 24 0:26 / /sys/fs/cgroup rw - cgroup2\n", "0::/\n"),
        (V2.format(shown="/"), "garbage\n\n0\n:::\n0::relative\n"),
        ("\0" * 100, "\0" * 100),
    ],
)
def test_damaged_descriptions_of_groups_limit_nothing(tmp_path, mountinfo, groups):
    assert cpus.cpu_quota(lay_out(tmp_path, mountinfo, groups, {})) is None


def test_a_system_without_cgroups_has_no_quota(tmp_path):
    assert cpus.cpu_quota(tmp_path) is None


@pytest.mark.parametrize(
    ("found", "usable", "limits"),
    [
        (Cpus(64, 64, None), 64, ""),
        (Cpus(64, 2, None), 2, "its affinity mask has 2"),
        (Cpus(64, 64, 2.0), 2, "its cgroup has a quota of 2"),
        (Cpus(64, 64, 1.5), 1, "its cgroup has a quota of 1.5"),
        (Cpus(64, 64, 0.25), 1, "its cgroup has a quota of 0.25"),
        (Cpus(64, 4, 2.5), 2, "its affinity mask has 4 and its cgroup has a quota of 2.5"),
        (Cpus(4, 4, 8.0), 4, ""),
        (Cpus(1, 1, 0.5), 1, ""),
    ],
)
def test_the_smaller_of_mask_and_quota_is_usable_and_is_told(found, usable, limits):
    assert (found.usable, found.limits) == (usable, limits)


def test_without_a_limit_every_library_keeps_its_own_rule(monkeypatch):
    monkeypatch.setattr(cpus, "count", lambda: Cpus(8, 8, None))
    assert (cpus.limit(), cpus.usable()) == (None, 8)
    monkeypatch.setattr(cpus, "count", lambda: Cpus(8, 8, 3.5))
    assert (cpus.limit(), cpus.usable()) == (3, 3)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system has no affinity masks")
def test_a_child_process_counts_its_affinity_mask():
    code = (
        "import os, sys; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
        "from edge_backbones import cpus; print(cpus.usable(), cpus.count().allowed)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["1", "1"]
