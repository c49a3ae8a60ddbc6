"""``python -m benchmarks.device``: from an empty folder to feature maps on a device with a CPU, and the memory there.

As on a device: the wheel with ``[cpu]`` goes into an environment of Python 3.10 that holds nothing else, and a process there
opens mobilenetv3_large_100's int8 bundle. Every round starts from nothing: a new folder, and pip without its cache, so that
every package is downloaded from the index (or read from the folders of wheels that pip is configured for). Where there is no
Python 3.10 the running one is taken, and the results say which. Results: benchmarks/results/device.json.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import readme_table
from benchmarks.common import RESULTS, ROOT, add, machine
from benchmarks.networks import bundle_of
from build_scripts.device_install import build_wheel, find_oldest_python

MODEL = "mobilenetv3_large_100"
SECONDS, MEGABYTES = 60, 150
_CALLS = 100
_DEVICE = """
import json, sys
import numpy
from edge_backbones import EdgeBackbone

def megabytes(field):
    with open("/proc/self/status") as status:
        return int(status.read().split(field + ":")[1].split()[0]) * 1024 / 1e6

with EdgeBackbone.from_pretrained(sys.argv[1], engine="int8", threads=2) as backbone:
    images = numpy.zeros(backbone.input.opt_shape, numpy.float32)
    stages = len(backbone(images).feature_maps)
    for _ in range(int(sys.argv[2])):
        backbone(images)
    fields = {"peak_mb": "VmHWM", "resident_mb": "VmRSS", "private_mb": "RssAnon", "files_mb": "RssFile"}
    memory = {name: megabytes(field) for name, field in fields.items()}
loaded = {name.partition(".")[0] for name in sys.modules}
print(json.dumps({"stages": stages, "torch": "torch" in loaded, **memory}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="times that everything is installed anew")
    found = measure(parser.parse_args().rounds)
    path = RESULTS / "device.json"
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    readme_table.update()
    print(f"wrote {path.relative_to(ROOT).as_posix()} and the table of benchmarks/README.md")
    sys.exit(0 if all(row["reached"] for row in found["figures"]) else 1)


def measure(rounds: int) -> dict[str, Any]:
    """Return the medians of the seconds over all rounds, and the largest memory of any process."""
    bundle = bundle_of(MODEL)
    python = find_oldest_python() or sys.executable
    with tempfile.TemporaryDirectory() as folder:
        wheel = build_wheel(Path(folder))
        installs = [install_and_run(python, wheel, Path(folder) / f"round-{index}", bundle) for index in range(rounds)]
        executable = str(Path(folder) / "round-0" / "bin" / "python")
        packages = {
            row["name"]: row["version"] for row in json.loads(_run(executable, "-m", "pip", "list", "--format", "json"))
        }
        version = _run(executable, "-c", "import platform; print(platform.python_version())").strip()
        memory = [json.loads(_run(executable, "-c", _DEVICE, str(bundle), str(_CALLS))) for _ in range(rounds)]
        size = sum(p.stat().st_size for p in (Path(folder) / "round-0").rglob("*") if not p.is_symlink()) / 1e6
    parts = {part: statistics.median(times[part] for times in installs) for part in installs[0]}
    most = {name: max(figures[name] for figures in memory) for name in memory[0]}
    assert not most.pop("torch")
    rows: list[dict[str, Any]] = []
    what = f"{MODEL}: empty folder to first feature maps, Python {version}, pip without a cache"
    add(rows, what, statistics.median(sum(times.values()) for times in installs), SECONDS, "s", **parts)
    print(f"     {', '.join(f'{part} {seconds:.1f} s' for part, seconds in parts.items())}; {size:.0f} MB installed")
    add(rows, f"{MODEL}: most resident memory of the runtime's process", most["peak_mb"], MEGABYTES, "MB", **most)
    kinds = f"{most['private_mb']:.0f} MB private, {most['files_mb']:.0f} MB of files"
    print(f"     after {_CALLS} more calls {most['resident_mb']:.0f} MB: {kinds}")
    return {
        "machine": machine(),
        "device": {"python": version, "packages": packages, "installed_mb": size, "pip_cache": "off"},
        "rounds": installs,
        "figures": rows,
    }


def install_and_run(python: str, wheel: Path, folder: Path, bundle: Path) -> dict[str, float]:
    """Return the seconds of each part. Installs the release of OpenVINO that the bundle's engines were compiled with."""
    release = importlib.metadata.version("openvino")
    executable = str(folder / "bin" / "python")
    commands = {
        "environment": (python, "-m", "venv", str(folder)),
        "install": (executable, "-m", "pip", "install", "--no-cache-dir", f"{wheel}[cpu]", f"openvino=={release}"),
        "first_maps": (executable, "-c", _DEVICE, str(bundle), "0"),
    }
    seconds = {}
    for part, command in commands.items():
        start = time.perf_counter()
        _run(*command)
        seconds[part] = time.perf_counter() - start
    return seconds


def _run(*command: str) -> str:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd="/", check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")
    return done.stdout


if __name__ == "__main__":
    main()
