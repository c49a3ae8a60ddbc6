"""Measure energy and device memory with the meters that a machine has.

- RAPL (``/sys/class/powercap``): energy counters of CPU packages. On Linux only root may read them.
- INA3221 and INA238 (``hwmon``): power monitors of Jetson boards, read 20 times a second. AGX Orin and AGX Xavier have no
  monitor of the whole board: the rails are added up, as jetson_stats does, which is less than a meter at the plug shows.
- NVML (nvidia-ml-py): energy, memory and clocks of NVIDIA GPUs.

A figure that the machine cannot measure is None.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edge_backbones.machine import gpus
from edge_backbones.machine.system import is_jetson

_SAMPLES_PER_SECOND = 20
_INPUT_RAILS = ("VDD_IN", "POM_5V_IN", "VIN")  # names of the rail that feeds the whole module
_NO_RAILS = ("NC", "sum of shunt voltages")  # an unconnected channel, and a sum that the kernel adds


@dataclass
class Metered:
    """Energy of the machine while it was metered. ``joules`` is None without a meter, and until the end."""

    joules: float | None = None


@contextlib.contextmanager
def metered(root: Path = Path("/")) -> Iterator[Metered]:
    """Measure the energy that the machine uses inside the block: the board of a Jetson, else all CPU packages and GPUs."""
    found = Metered()
    board = board_power(root)
    if board is not None:
        with _sampled(board) as samples:
            yield found
        found.joules = _integral(samples)
        return
    counters = [*cpu_counters(root), *gpu_counters()]
    before = [read() for read, _ in counters]
    yield found
    if counters:
        spent = [(read() - start) % wrap for (read, wrap), start in zip(counters, before, strict=True)]
        found.joules = sum(spent)


def cpu_counters(root: Path = Path("/")) -> list[tuple[Callable[[], float], float]]:
    """Return, for each CPU package, a function that reads its joules so far, and the value at which the counter wraps."""
    counters: list[tuple[Callable[[], float], float]] = []
    for folder in sorted((root / "sys/class/powercap").glob("*-rapl:[0-9]*")):
        if folder.name.count(":") > 1:  # a part of a package, which counts it already
            continue
        try:
            if _name(folder) == "psys":  # the whole platform, which counts every package
                continue
            _number(folder / "energy_uj")
            wrap = _number(folder / "max_energy_range_uj")
        except (OSError, ValueError):
            continue  # this user may not read it
        counters.append((lambda file=folder / "energy_uj": _number(file) / 1e6, wrap / 1e6))  # type: ignore[misc]
    return counters


def _name(folder: Path) -> str:
    try:
        return (folder / "name").read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        return ""


def board_power(root: Path = Path("/")) -> Callable[[], float] | None:
    """Return a function that reads the watts of a Jetson board: its input, or the sum of its rails; None elsewhere."""
    for chip in sorted((root / "sys/class/hwmon").glob("hwmon*")):
        if is_jetson(root) and _name(chip) == "ina238":  # Thor: microwatts at the power input
            with contextlib.suppress(OSError, ValueError):
                _number(chip / "power1_input")
                return lambda: _number(chip / "power1_input") / 1e6
    rails: dict[str, Callable[[], float]] = {}
    for label in sorted((root / "sys/bus/i2c/drivers/ina3221").glob("*/hwmon/hwmon*/in*_label")):
        rail = label.read_text(encoding="ascii").strip()
        number = label.name.removeprefix("in").removesuffix("_label")
        volts, amperes = label.with_name(f"in{number}_input"), label.with_name(f"curr{number}_input")
        try:
            _number(volts), _number(amperes)
        except (OSError, ValueError):
            continue
        if rail not in _NO_RAILS:
            rails[rail] = functools.partial(_watts, volts, amperes)
    of_input = [watts for rail, watts in rails.items() if rail in _INPUT_RAILS]
    counted = of_input[:1] or list(rails.values())
    return (lambda: sum(watts() for watts in counted)) if counted else None


def _watts(millivolts: Path, milliamperes: Path) -> float:
    return _number(millivolts) * _number(milliamperes) / 1e6


def gpu_counters() -> list[tuple[Callable[[], float], float]]:
    """Return, for each NVIDIA GPU that counts its energy, a function that reads its joules so far; it does not wrap."""
    library = _nvml()
    if library is None:
        return []
    counters: list[tuple[Callable[[], float], float]] = []
    for index in range(library.nvmlDeviceGetCount()):
        handle = library.nvmlDeviceGetHandleByIndex(index)
        try:
            library.nvmlDeviceGetTotalEnergyConsumption(handle)
        except library.NVMLError:
            continue  # GPUs before Volta do not count it
        counters.append((lambda h=handle: library.nvmlDeviceGetTotalEnergyConsumption(h) / 1e3, float("inf")))  # type: ignore[misc]
    return counters


def device_memory_mb(device: str) -> float | None:
    """Return the memory in MB that all processes use on a GPU (``cuda:1``); None for the CPU and without NVML."""
    library = _nvml() if device != "cpu" else None
    if library is None:
        return None
    try:
        handle = _handle(library, gpus.find_gpus()[int(device.partition(":")[2] or 0)])
        return float(library.nvmlDeviceGetMemoryInfo(handle).used) / 1e6
    except library.NVMLError:
        return None  # the GPU of a Jetson shares the memory of the CPU


def gpu_settings() -> dict[str, str]:
    """Return the clocks and the power limit of the first GPU that this process may use, as far as NVML knows them."""
    library, there = _nvml(), gpus.find_gpus()
    if library is None or not there:
        return {}
    asked: dict[str, Callable[[Any], float]] = {
        "GPU MHz now": lambda gpu: library.nvmlDeviceGetClockInfo(gpu, library.NVML_CLOCK_SM),
        "GPU MHz at most": lambda gpu: library.nvmlDeviceGetMaxClockInfo(gpu, library.NVML_CLOCK_SM),
        "GPU memory MHz now": lambda gpu: library.nvmlDeviceGetClockInfo(gpu, library.NVML_CLOCK_MEM),
        "GPU watts at most": lambda gpu: library.nvmlDeviceGetEnforcedPowerLimit(gpu) / 1e3,
    }
    found = {}
    for name, ask in asked.items():
        with contextlib.suppress(library.NVMLError):  # not every GPU has every sensor
            found[name] = f"{ask(_handle(library, there[0])):.0f}"
    return found


def _handle(library: Any, gpu: gpus.Gpu) -> Any:
    """Return NVML's handle of a GPU, found by its bus address: NVML's order differs from CUDA's."""
    return library.nvmlDeviceGetHandleByPciBusId(gpu.bus_address.encode())


def _nvml() -> Any:
    """Return nvidia-ml-py after starting it; None if it is not installed or finds no driver."""
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    return pynvml


def _number(file: Path) -> float:
    return float(file.read_text(encoding="ascii"))


@contextlib.contextmanager
def _sampled(watts: Callable[[], float]) -> Iterator[list[tuple[float, float]]]:
    """Collect (seconds, watts) in a thread, from the start of the block to its end."""
    samples = [(time.perf_counter(), watts())]
    done = threading.Event()

    def sample() -> None:
        while not done.wait(1 / _SAMPLES_PER_SECOND):
            samples.append((time.perf_counter(), watts()))

    thread = threading.Thread(target=sample, name="power meter", daemon=True)
    thread.start()
    try:
        yield samples
    finally:
        done.set()
        thread.join()
        samples.append((time.perf_counter(), watts()))


def _integral(samples: list[tuple[float, float]]) -> float:
    pairs = itertools.pairwise(samples)
    return sum((end - start) * (before + after) / 2 for (start, before), (end, after) in pairs)
