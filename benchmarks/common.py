"""What the benchmarks share: folders, the machine's description, rows of figures, photographs and bundles for timing."""

from __future__ import annotations

import datetime
import importlib.metadata
import platform
import re
import subprocess
import time
from pathlib import Path
from typing import Any

import edge_backbones
from edge_backbones.bundle.reader import Bundle
from edge_backbones.deploy.compile import compile_bundle
from edge_backbones.errors import BundleError
from edge_backbones.machine.hosts import this_host

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
CACHE = ROOT / ".cache" / "bench"
FEW_IMAGES = 8  # what a bundle that is only timed is calibrated on
_BEGIN = time.monotonic()


def say(what: str) -> None:
    """Print what begins now, after the minutes and seconds since the start."""
    minutes, seconds = divmod(int(time.monotonic() - _BEGIN), 60)
    print(f"[{minutes}:{seconds:02}] {what}", flush=True)


def add(
    rows: list[dict[str, Any]],
    what: str,
    value: float,
    target: float,
    unit: str,
    *,
    at_least: bool = False,
    **raw: float,
) -> None:
    """Record and print one figure beside its target."""
    reached = value >= target if at_least else value <= target
    figure = {"what": what, "value": value, "target": target, "unit": unit, "at_least": at_least, "reached": reached}
    rows.append({**figure, **raw})
    bound = ">=" if at_least else "<="
    print(f"{'ok  ' if reached else 'MISS'} {what}: {value:.2f} {unit} (target {bound} {target:g})", flush=True)


def machine() -> dict[str, Any]:
    """Return what a results file says of this machine: CPU, system, versions of the libraries, commit and date."""
    host = this_host({})
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    libraries = ("openvino", "onnxruntime", "torch", "timm", "numpy")
    return {
        "cpu": host.device_name,
        "cpu_features": host.cpu_features,
        "threads": 2,
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in libraries},
        "commit": commit.stdout.strip(),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
    }


def machine_name() -> str:
    """Return the name of this machine's results file, without its suffix."""
    host = this_host({})
    return re.sub(
        r"[^a-z0-9]+", "-", f"{host.device_name} {host.cpu_features[-1] if host.cpu_features else ''}".lower()
    ).strip("-")


def photograph_folder(count: int) -> Path:
    """Return a folder of ``count`` crops of photographs; write it if it is not there."""
    from build_scripts.photographs import write_crops

    folder = CACHE / f"photographs_{count}"
    if len(list(folder.glob("*.png"))) != count:
        write_crops(folder, count)
    return folder


def timing_bundle(model: str, name: str, **options: Any) -> Path:
    """Return a bundle that is only timed, and build it once: seeded weights, few calibration images, open gates."""
    from edge_backbones import build_bundle

    target = CACHE / "growth" / f"{name}.bundle"
    if not refreshed(target):
        print(f"building {target.name}", flush=True)
        options = {"method": "max", "golden": 1, **options}
        build_bundle(
            model, target, images=photograph_folder(FEW_IMAGES), options=timing_options(options), overwrite=True
        )
    return target


def timing_options(options: dict[str, Any]) -> Any:
    """BuildOptions for a build that is only timed: seeded weights, no TorchScript module, an open int8 gate, no cache."""
    from edge_backbones import BuildOptions
    from edge_backbones.parity_report import Gate
    from edge_backbones.spec import Precision

    gates = {Precision.INT8: Gate(min_cosine=1e-6)}
    return BuildOptions(weights="random:0", torchscript=False, gates=gates, cache=None, **options)


def refreshed(bundle: Path) -> bool:
    """Compile a bundle's engines with today's code, and return whether that could be done.

    False if there is no bundle, or if its graphs are older than the code.
    """
    try:
        graphs = [bundle / graph.file.path for graph in Bundle.open(bundle).manifest.graphs]
    except BundleError:
        return False
    changed = max(file.stat().st_mtime for file in Path(edge_backbones.__path__[0]).rglob("*.py"))
    if min(graph.stat().st_mtime for graph in graphs) < changed:
        return False
    compile_bundle(bundle)
    return True
