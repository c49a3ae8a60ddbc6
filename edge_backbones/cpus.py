"""Count the CPUs that this process may use: its affinity mask and the CPU quotas of its cgroups limit them.

The kernel enforces a quota by stopping every thread of the group for the rest of a period (mostly 0.1 s) once their CPU time
is used up. A library that starts a thread per core under a quota of one CPU therefore stops in most calls.
"""

from __future__ import annotations

import functools
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

_MICROSECONDS = re.compile(r"0*[1-9][0-9]{0,17}")


class Cpus(NamedTuple):
    """CPUs (hardware threads) of a machine, and the limits of a process on it.

    ``machine``: how many the machine has. ``allowed``: how many are in the affinity mask (taskset, cpuset, docker
    --cpuset-cpus). ``quota``: CPUs worth of time that the strictest cgroup grants (docker --cpus, Kubernetes limits); None
    without a quota.
    """

    machine: int
    allowed: int
    quota: float | None

    @property
    def usable(self) -> int:
        """Return how many threads can compute all the time, at least 1.

        A quota is rounded down. Under a quota of 1.5 CPUs the kernel stops two threads for a quarter of the time, in the
        middle of calls: the slowest 1 % of calls were then slower than with one thread (benchmarks/threads.py).
        """
        return min(self.allowed, max(1, math.floor(self.quota))) if self.quota is not None else self.allowed

    @property
    def limits(self) -> str:
        """Return why fewer CPUs are usable than the machine has; empty if all of them are."""
        masked = f"its affinity mask has {self.allowed}" if self.allowed < self.machine else ""
        throttled = f"its cgroup has a quota of {self.quota:g}" if self.quota is not None else ""
        return " and ".join(filter(None, (masked, throttled))) if self.usable < self.machine else ""


def count(root: Path = Path("/")) -> Cpus:
    """Return the CPUs of this process. ``root``: root folder of the cgroup files; tests pass a copy of another machine's."""
    machine = os.cpu_count() or 1
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else machine
    return Cpus(machine, allowed, cpu_quota(root))


def usable() -> int:
    """Return how many threads of this process can compute all the time. Quotas are read once per process."""
    return count().usable


def limit() -> int | None:
    """Return `usable` if this process may use fewer CPUs than the machine has; None if nothing limits it."""
    here = count()
    return here.usable if here.usable < here.machine else None


def cores(root: Path = Path("/")) -> int:
    """Return how many physical cores are in this process's affinity mask. Two CPUs of one core (SMT) share its units."""
    if not hasattr(os, "sched_getaffinity"):
        return os.cpu_count() or 1
    topology = (root / f"sys/devices/system/cpu/cpu{cpu}/topology" for cpu in os.sched_getaffinity(0))
    return len({_text(folder / "thread_siblings_list") or folder for folder in topology})


@functools.cache
def cpu_quota(root: Path = Path("/")) -> float | None:
    """Return the smallest CPU quota of this process's cgroups and of their parents, in CPUs; None if no file has one.

    Reads cgroup v1 and v2. A container sees its own cgroup at most, and not the groups around it. A file that is missing or
    cannot be understood limits nothing.
    """
    quotas = [
        quota for folder in _groups(root) for quota in (_quota_v2(folder), _quota_v1(folder)) if quota is not None
    ]
    return min(quotas, default=None)


def _groups(root: Path) -> Iterator[Path]:
    """Yield the folders of the cgroups that this process is in, each followed by its parents.

    /proc/self/cgroup names a group per hierarchy, and /proc/self/mountinfo says where each hierarchy is mounted and which
    group the mount shows: in a container without a cgroup namespace, the container's own.
    """
    mounts = dict(_mounts(_text(root / "proc/self/mountinfo")))
    for line in _text(root / "proc/self/cgroup").splitlines():
        number, _, rest = line.partition(":")
        controllers, _, group = rest.partition(":")
        kind = "cgroup2" if number == "0" and not controllers else "cgroup" if "cpu" in controllers.split(",") else ""
        if kind not in mounts:
            continue
        shown, mountpoint = mounts[kind]
        top = root / mountpoint.relative_to("/")
        inside = PurePosixPath(group)
        below = inside.relative_to(shown).parts if inside.is_relative_to(shown) and ".." not in inside.parts else ()
        yield from (top.joinpath(*below[:depth]) for depth in range(len(below), -1, -1))


def _mounts(mountinfo: str) -> Iterator[tuple[str, tuple[PurePosixPath, PurePosixPath]]]:
    """Yield (type, (group that is shown, mount point)) of cgroup2 and of the v1 hierarchy of CPU time.

    A line is ``36 35 98:0 /group /mountpoint rw,noatime shared:1 - cgroup cgroup rw,cpu,cpuacct`` (proc_pid_mountinfo(5)).
    """
    for line in mountinfo.splitlines():
        before, _, after = line.partition(" - ")
        fields, kinds = before.split(" "), after.split(" ")
        if len(fields) < 5 or len(kinds) < 3 or not fields[4].startswith("/"):
            continue
        if kinds[0] == "cgroup2" or (kinds[0] == "cgroup" and "cpu" in kinds[2].split(",")):
            shown, mountpoint = (PurePosixPath(re.sub(r"\\([0-7]{3})", _character, path)) for path in fields[3:5])
            yield kinds[0], (shown, mountpoint)


def _character(octal: re.Match[str]) -> str:
    return chr(int(octal[1], 8))


def _quota_v2(group: Path) -> float | None:
    quota, _, period = _text(group / "cpu.max").partition(" ")
    return _ratio(quota, period)


def _quota_v1(group: Path) -> float | None:
    return _ratio(_text(group / "cpu.cfs_quota_us"), _text(group / "cpu.cfs_period_us"))


def _ratio(quota: str, period: str) -> float | None:
    """Return quota / period; None for ``max`` and -1, which mean no quota, and for anything that is not two numbers."""
    if not (_MICROSECONDS.fullmatch(quota) and _MICROSECONDS.fullmatch(period)):
        return None
    return int(quota) / int(period)


def _text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8", "replace").strip("\0 \n")
    except (OSError, ValueError):
        return ""
