"""``python -m build_scripts.fuzz``: random damage to every kind of file that a stranger may hand over, for some minutes.

Each kind runs in a child process, which is told what to try by number: the same number gives the same bytes. A case ends well
when the file is read, or refused with one line. Everything else is a finding, and is printed with its number: another
exception, several lines, a line of more than 700 characters, a process that ended, more than 2 seconds, or 200 MB more than
the file has. Engines (``blobs``) and graphs that pass the gate go to OpenVINO, whose own deaths are counted apart.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from build_scripts.fuzz_kinds import Kind, kinds
from edge_backbones.errors import EdgeBackbonesError

COUNTS = {
    "manifests": 60_000,
    "golden": 6_000,
    "graphs": 2_000,
    "blobs": 5_000,
    "profiles": 10_000,
    "bench": 10_000,
    "calibration": 10_000,
    "matrix": 10_000,
}
NATIVE = ("graphs", "blobs")  # OpenVINO sees the bytes
_SLOW_SECONDS, _LARGE_MB, _LONG_LINE = 2.0, 200.0, 700


@dataclass
class Found:
    """Results of the cases of one kind."""

    endings: Counter[str]
    findings: list[str]
    slowest: float = 0.0
    largest_mb: float = 0.0


def run(kind: Kind, numbers: range, *, started: Callable[[int], None] = lambda _: None) -> Found:
    """Try cases by number in this process. `Found.findings` has one line for each that went wrong."""
    found = Found(Counter(), [])
    for number in numbers:
        started(number)
        data = kind.damaged(random.Random(number))
        before, begin = _peak_mb(), time.perf_counter()
        try:
            kind.use(data)
            found.endings["read"] += 1
        except EdgeBackbonesError as error:
            found.endings[type(error).__name__] += 1
            if "\n" in str(error) or len(str(error)) > _LONG_LINE:
                found.findings.append(f"{number}: a message of {len(str(error))} characters: {str(error)[:200]!r}")
        except Exception as error:
            found.endings["untyped"] += 1
            found.findings.append(f"{number}: {type(error).__name__}: {str(error)[:200]!r}")
        seconds, mb = time.perf_counter() - begin, _peak_mb() - before - len(data) / 1e6
        found.slowest, found.largest_mb = max(found.slowest, seconds), max(found.largest_mb, mb)
        if seconds > _SLOW_SECONDS or mb > _LARGE_MB:
            found.findings.append(f"{number}: took {seconds:.1f} s and {mb:.0f} MB")
    return found


def _peak_mb() -> float:
    if sys.platform == "win32":
        return 0.0
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


def _child(name: str, begin: int, end: int) -> None:
    """Try cases. Print the number of each when it begins, and the results at the end."""
    with tempfile.TemporaryDirectory() as folder:

        def started(number: int) -> None:
            sys.stdout.write(f"{number}\n")
            sys.stdout.flush()

        found = run(kinds(Path(folder))[name], range(begin, end), started=started)
        ending = {
            "endings": found.endings,
            "findings": found.findings,
            "slowest": found.slowest,
            "mb": found.largest_mb,
        }
        sys.stdout.write(json.dumps(ending) + "\n")


def _in_children(name: str, count: int, batch: int, patience: float = 120.0) -> tuple[Found, list[str]]:
    """Try every case of a kind in child processes, and note those that ended a child."""
    whole, deaths = Found(Counter(), []), []
    begin = 0
    while begin < count:
        end = min(begin + batch, count)
        command = [sys.executable, "-m", "build_scripts.fuzz", "--child", name, str(begin), str(end)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=patience + batch)
            said, code = done.stdout.splitlines(), str(done.returncode)
        except subprocess.TimeoutExpired as error:
            said, code = (error.stdout or b"").decode().splitlines(), "hung"
        if code == "0":
            ending = json.loads(said[-1])
            whole.endings.update(ending["endings"])
            whole.findings += ending["findings"]
            whole.slowest, whole.largest_mb = max(whole.slowest, ending["slowest"]), max(whole.largest_mb, ending["mb"])
            begin = end
            continue
        last = int(said[-1]) if said else begin
        deaths.append(f"{last}: the process ended ({code})")
        if last > begin:  # those before it again, for their figures
            again, more = _in_children_before(name, begin, last)
            whole.endings.update(again.endings)
            whole.findings += again.findings
            deaths += more
        begin = last + 1
    return whole, deaths


def _in_children_before(name: str, begin: int, end: int) -> tuple[Found, list[str]]:
    command = [sys.executable, "-m", "build_scripts.fuzz", "--child", name, str(begin), str(end)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return Found(Counter(), []), [f"{begin} to {end}: ended, together only"]
    ending = json.loads(done.stdout.splitlines()[-1])
    return Found(Counter(ending["endings"]), ending["findings"], ending["slowest"], ending["mb"]), []


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--only", nargs="+", choices=list(COUNTS), default=list(COUNTS))
    parser.add_argument("--share", type=float, default=1.0, help="of the cases; 0.01 takes a minute")
    arguments = parser.parse_args()
    if arguments.child:
        name, begin, end = arguments.child
        _child(name, int(begin), int(end))
        return 0
    bad = 0
    for name in arguments.only:
        count, begun = max(1, int(COUNTS[name] * arguments.share)), time.monotonic()
        found, deaths = _in_children(name, count, 250 if name in NATIVE else 2000)
        whose = "OpenVINO's child" if name in NATIVE else "our process"
        print(
            f"{name}: {count} cases, {len(found.findings)} findings, {whose} ended {len(deaths)} times, slowest "
            f"{found.slowest:.2f} s, at most {found.largest_mb:.0f} MB over the file, {time.monotonic() - begun:.0f} s; "
            + ", ".join(f"{ending} {n}" for ending, n in found.endings.most_common()),
            flush=True,
        )
        for line in [*found.findings, *deaths][:20]:
            print(f"  {name} {line}", flush=True)
        bad += len(found.findings) + (0 if name in NATIVE else len(deaths))
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
