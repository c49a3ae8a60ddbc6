"""Say what this machine can build and run, and how to fix the rest. Nothing is installed, downloaded or changed.

:func:`look` describes the machine. :func:`judge` and :func:`judge_engines` turn a description into findings, so tests can
give them recorded machines.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import platform
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from edge_backbones import cpus
from edge_backbones.bundle.manifest import EngineRecord
from edge_backbones.bundle.reader import Bundle
from edge_backbones.engines import registry
from edge_backbones.engines import select as session
from edge_backbones.engines.base import COMPILE
from edge_backbones.engines.openvino import session as openvino
from edge_backbones.engines.tensorrt import library as tensorrt_library
from edge_backbones.errors import root_cause
from edge_backbones.installation import pip_install
from edge_backbones.machine import gpus, hosts
from edge_backbones.machine.profiles import RTX_ARCHITECTURES, DeviceProfile, modules_of, profile_of
from edge_backbones.machine.system import System, gib, read_system

_FAST_INT8 = ("avx_vnni", "avx512_vnni", "amx_int8", "asimddp", "i8mm")
_BUILD = ("torch", "timm", "transformers", "onnx", "onnxscript", "onnx-ir", "onnxruntime", "openvino")
_DISTRIBUTIONS = (
    *_BUILD,
    "Pillow",
    "matplotlib",
    "Jinja2",
    "typer",
    "rich",
    "cuda-bindings",
    "pycuda",
    "torch-tensorrt",
)
# What a compilation of TensorRT needs beside the plan, with some left for the system.
_MEMORY_TO_COMPILE = 2 << 30
_FIRST_L4T = 36  # JetPack 6
_FIRST_CUDA = 12  # the oldest CUDA that cuda-bindings exists for
_INSTEAD_OF_JETPACK_5 = "flash JetPack 6.2 (Orin), or use the CPU engine in a container of Ubuntu 22.04"
_BOARD = "-v /proc/device-tree/model:/tmp/nv_jetson_model:ro"  # where system.board_name looks for it


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """One thing that was checked: what was found, and how to fix it.

    ``ok``: whether there is nothing to do; ``fix`` is empty then. ``absent``: it is not here, and nothing needs it.
    """

    topic: str
    ok: bool
    found: str
    fix: str = ""
    absent: bool = False


class Python(msgspec.Struct, frozen=True, kw_only=True):
    """The Python that runs this. ``system_packages``: whether it can import the packages of the Python in /usr."""

    version: str
    executable: str
    virtual: bool
    system_packages: bool


class Machine(msgspec.Struct, frozen=True, kw_only=True):
    """Description of a machine.

    ``cpus``: its logical cores, and how many of them this process may use. ``libraries``: the version of each installed
    distribution. ``tensorrt``: the version of each TensorRT flavour that can be imported. ``broken``: distributions that are
    installed and fail to import, with the reason. ``no_gpu``: why there is no GPU; empty if there is one.
    """

    system: System
    host: hosts.Host
    cpus: cpus.Cpus
    python: Python
    libraries: Mapping[str, str]
    tensorrt: Mapping[str, str]
    broken: Mapping[str, str] = {}
    gpus: tuple[gpus.Gpu, ...] = ()
    no_gpu: str = ""


def look(root: Path = Path("/")) -> Machine:
    """Describe this machine. Starts the GPU driver if there is one. Tests read another machine's files from ``root``."""
    libraries = {}
    for name in _DISTRIBUTIONS:
        try:
            libraries[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    broken = {}
    if "openvino" in libraries:
        try:
            openvino.load_library()
        except Exception as error:
            broken["openvino"] = " ".join(str(root_cause(error)).split())[:200]
    found = gpus.find_gpus()
    return Machine(
        system=read_system(root),
        host=registry.this_machine(0 if found else None),
        cpus=cpus.count(root),
        python=Python(
            version=platform.python_version(),
            executable=sys.executable,
            virtual=sys.prefix != sys.base_prefix,
            system_packages=_sees_system_packages(),
        ),
        libraries=libraries,
        broken=broken,
        # Found by importing: on a Jetson apt installs TensorRT, and pip does not list it.
        tensorrt={
            flavour: version
            for flavour in tensorrt_library.FLAVOURS
            if (version := tensorrt_library.library_version(flavour)) is not None
        },
        gpus=found,
        no_gpu=gpus.no_gpu_reason(),
    )


def judge(machine: Machine) -> list[Finding]:
    """Return the findings about a machine, in the order in which a person would ask."""
    profile = _profile(machine)
    findings = [_machine(machine), _memory(machine)]
    findings += [_jetson(machine.system)] if machine.system.jetson else []
    findings += [_python(machine), _int8(machine.host), _speed(machine)]
    for purpose, extra, names in (
        ("run on the CPU (OpenVINO)", "cpu", ("openvino",)),
        ("read image files", "images", ("Pillow",)),
        ("draw feature maps and reports", "report", ("matplotlib", "Jinja2")),
        ("build bundles", "build", _BUILD),
    ):
        findings.append(_library(machine, purpose, extra, names))
    findings += [_gpu(machine), _cuda(machine), _tensorrt(machine)]
    findings += [_optional(machine, flavour) for flavour in ("tensorrt_lean", "tensorrt_rtx")]
    if machine.gpus and not _is_too_old(machine.system):
        findings.append(_served(machine, profile))
    if machine.system.jetson:
        findings.append(_dla(machine, profile))
    return findings


def _is_too_old(system: System) -> bool:
    return system.l4t is not None and int(system.l4t.partition(".")[0]) < _FIRST_L4T


def judge_engines(machine: Machine, bundle: Bundle) -> list[Finding]:
    """Return one finding per engine of a bundle: that it runs on the machine, or why it does not."""
    found = []
    for engine in bundle.manifest.engines:
        reasons = session.reasons_against(bundle, engine, machine.host, engine.name, device="auto")
        told = "; ".join(reasons) or "runs here"
        fix = _way_to_run(machine, engine, bundle.path, reasons) if reasons else ""
        found.append(Finding(topic=f"engine {engine.name}", ok=not reasons, found=told, fix=fix))
    if not found:
        fix = f"edge-backbones compile {bundle.path}"
        found.append(Finding(topic="engines", ok=False, found=f"{bundle.path} has none", fix=fix))
    return found


def _way_to_run(machine: Machine, engine: EngineRecord, path: Path, reasons: Sequence[str]) -> str:
    """Return the command or the advice that makes an engine run on the machine, which now refuses it for ``reasons``."""
    if engine.key.gpu is not None and not machine.gpus:
        instead = f"edge-backbones compile {path} makes one for this CPU"
        return _gpu(machine).fix or f"it is for a machine with that GPU; {instead}"
    if not engine.parity.measured:
        return f"edge-backbones verify {path}"
    if any(COMPILE in reason for reason in reasons):
        return f"edge-backbones compile {path}" + (" --device cpu" if not engine.key.gpu and machine.gpus else "")
    return "; ".join(reason.rpartition(": ")[2] for reason in reasons)  # the advice follows the last colon


def _sees_system_packages() -> bool:
    """Return whether this Python can import the packages of the Python in /usr."""
    if sys.base_prefix != "/usr":  # a Python of pyenv or conda
        return False
    if sys.prefix == sys.base_prefix:
        return True
    try:
        text = (Path(sys.prefix) / "pyvenv.cfg").read_text(encoding="utf-8")
    except OSError:
        return False
    settings = dict(line.partition("=")[::2] for line in text.lower().replace(" ", "").splitlines())
    return settings.get("include-system-site-packages") == "true"


def _machine(machine: Machine) -> Finding:
    system, host = machine.system, machine.host
    where = ", in a container" if system.container else ""
    name = f"{system.board} ({system.name})" if system.board and system.name else system.board or system.name
    processor = ", ".join(dict.fromkeys([host.architecture, host.device_name]))  # a Jetson's has no other name
    limited = f", of which this process uses {machine.cpus.usable}: {limits}" if (limits := machine.cpus.limits) else ""
    found = f"{name or platform.system()}{where}, {processor}, {machine.cpus.machine} logical cores{limited}"
    return Finding(topic="machine", ok=True, found=found)


def _memory(machine: Machine) -> Finding:
    memory = machine.system.memory
    if memory is None:
        return Finding(topic="memory", ok=True, found="not known on this system", absent=True)
    found = f"{gib(memory.available)} of {gib(memory.total)} available, swap {gib(memory.swap)}"
    little = memory.available + memory.swap < _MEMORY_TO_COMPILE
    fix = (
        f"compiling takes about {gib(_MEMORY_TO_COMPILE)}: close programs, add swap (fallocate, mkswap, swapon), or compile "
        "with --workspace 256 and one --shapes"
    )
    return Finding(topic="memory", ok=not little, found=found, fix=fix if little else "")


def _jetson(system: System) -> Finding:
    if system.l4t is None:
        return Finding(
            topic="JetPack",
            ok=False,
            found=f"{system.board or 'a Jetson'}, and no /etc/nv_tegra_release",
            fix="in a container mount it: docker run --runtime nvidia -v /etc/nv_tegra_release:/etc/nv_tegra_release:ro "
            + _BOARD,
        )
    jetpack = system.jetpack or ""
    found = f"JetPack {jetpack} (Jetson Linux {system.l4t})"
    release = tuple(int(part) for part in system.l4t.split("."))
    if release >= (36, 4):
        return Finding(topic="JetPack", ok=True, found=found)
    if release >= (36,):
        fix = "its TensorRT is 8.6 and 10.3 is the oldest that engines are made with: upgrade to JetPack 6.2 (apt, or flash)"
    else:
        fix = f"its Python and its TensorRT are older than 3.10 and 10.3, which are needed: {_INSTEAD_OF_JETPACK_5}"
    return Finding(topic="JetPack", ok=False, found=found, fix=fix)


def _python(machine: Machine) -> Finding:
    python = machine.python
    seen = (
        ""
        if not python.virtual
        else ", a virtual environment " + ("with the system's packages" if python.system_packages else "of its own")
    )
    return Finding(topic="python", ok=True, found=f"{python.version} ({python.executable}){seen}")


def _int8(host: hosts.Host) -> Finding:
    """Check for int8 dot-product instructions: without them int8 runs at about the speed of fp32."""
    fast = [feature for feature in host.cpu_features if feature in _FAST_INT8]
    found = f"instructions: {', '.join(host.cpu_features) or 'not known on this system'}"
    fix = "" if fast else "this CPU has no int8 dot product: measure before you prefer int8 over fp32"
    return Finding(topic="fast int8 on the CPU", ok=bool(fast), found=found, fix=fix)


def _speed(machine: Machine) -> Finding:
    """Check the power mode and the clocks, which change an engine's latency from one day to the next."""
    settings = machine.system.settings
    found = ", ".join(f"{name} {value}" for name, value in settings.items() if name != "Jetson")
    fix = ""
    if machine.system.jetson:
        mode = settings.get("Jetson power mode")
        if mode is None:
            fix = "power mode not readable here: nvpmodel -q shows it, sudo jetson_clocks holds the clocks"
        elif not mode.startswith("MAXN"):
            fix = f"{mode} holds the clocks down: /etc/nvpmodel.conf has the modes, sudo nvpmodel -m ID sets one"
    elif settings.get("cpu governor") == "powersave":
        fix = "latencies waver: sudo cpupower frequency-set -g performance"
    return Finding(topic="power mode and clocks", ok=not fix, found=found or "not shown by this system", fix=fix)


def _library(machine: Machine, purpose: str, extra: str, distributions: Sequence[str]) -> Finding:
    """Check that the distributions of one extra are installed and can be imported."""
    versions = [f"{name} {machine.libraries[name]}" for name in distributions if name in machine.libraries]
    missing = [name for name in distributions if name not in machine.libraries]
    broken = [name for name in distributions if name in machine.broken]
    parts = [", ".join(versions), f"missing: {', '.join(missing)}" if missing else ""]
    parts += [f"{name} does not load: {machine.broken[name]}" for name in broken]
    fixes = [pip_install(extra)] if missing else []
    fixes += [f"pip install --force-reinstall {' '.join(broken)}"] if broken else []
    return Finding(topic=purpose, ok=not fixes, found="; ".join(filter(None, parts)), fix=", ".join(fixes))


def _gpu(machine: Machine) -> Finding:
    topic = "NVIDIA GPU"
    if machine.gpus:
        listed = ", ".join(f"{g.name} ({g.architecture}, {gib(g.memory_bytes)})" for g in machine.gpus)
        kernel = f"driver {machine.system.driver}, " if machine.system.driver else ""
        return Finding(topic=topic, ok=True, found=f"{listed}; {kernel}CUDA up to {machine.gpus[0].driver}")
    fix = ""
    if machine.system.driver or machine.system.jetson:
        fix = "the kernel has the driver and this process does not see it"
        fix += ": docker run --runtime nvidia (or --gpus all)" if machine.system.container else ": reboot, or see dmesg"
    found = f"{machine.no_gpu}; CPU engines do not need one"
    return Finding(topic=topic, ok=not fix, found=found, fix=fix, absent=not fix)


def _cuda(machine: Machine) -> Finding:
    """Check that cuda-bindings or pycuda is installed: one of them is needed to use GPU memory, the CUDA toolkit is not."""
    versions = [
        f"{name} {machine.libraries[name]}" for name in ("cuda-bindings", "pycuda") if name in machine.libraries
    ]
    toolkit = f"toolkit {machine.system.cuda}" if machine.system.cuda else "no toolkit (none is needed)"
    driver = int(machine.gpus[0].driver.partition(".")[0]) if machine.gpus else 0
    wanted = driver >= _FIRST_CUDA and not versions
    lacking = f"{'missing' if wanted else 'not installed'}: cuda-bindings; {toolkit}"
    found = ", ".join([*versions, toolkit]) if versions else lacking
    return Finding(
        topic="reach the GPU's memory (CUDA)",
        ok=not wanted,
        found=found,
        fix=f"pip install 'cuda-bindings=={driver}.*'" if wanted else "",
        absent=not versions and not wanted,
    )


def why_not_the_gpu(machine: Machine) -> str:
    """Return why engines for this machine's GPU cannot be compiled, and the fix; empty if they can, or if there is no GPU."""
    if not machine.gpus:
        seen = _gpu(machine)
        return "" if seen.ok else f"there is a GPU, and it is not usable ({machine.no_gpu}): {seen.fix}"
    finding = _tensorrt(machine)
    if finding.ok:
        return ""
    return f"{machine.gpus[0].name} is here, and TensorRT is not usable ({finding.found}): {finding.fix}"


def _serving(machine: Machine) -> str:
    """Return the flavour that `edge-backbones compile` picks on the machine if the user names none."""
    gpu = machine.gpus[0] if machine.gpus else None
    host = dataclasses.replace(machine.host, versions=machine.tensorrt, gpu=gpu, jetson=machine.system.jetson)
    return registry.serving(host).name


def _tensorrt(machine: Machine) -> Finding:
    topic, version = "compile and run engines of this GPU (TensorRT)", machine.tensorrt.get("tensorrt")
    if _serving(machine) == "tensorrt_rtx":
        found = f"{version or 'not installed'}; TensorRT-RTX {machine.tensorrt['tensorrt_rtx']} serves this GPU"
        return Finding(topic=topic, ok=True, found=found)
    if version is not None:
        fix = tensorrt_library.against_release("tensorrt", version, jetson=machine.system.jetson)
        return Finding(topic=topic, ok=not fix, found=version, fix=fix)
    system, python = machine.system, machine.python
    if not system.jetson and not machine.gpus:
        found = "not installed; there is no GPU here that would need it"
        return Finding(topic=topic, ok=True, found=found, absent=True)
    if not system.jetson:
        return Finding(topic=topic, ok=False, found="missing", fix=pip_install("tensorrt"))
    if _is_too_old(system):
        found = f"JetPack {system.jetpack} has an older one than engines are made with"
        return Finding(topic=topic, ok=False, found=found, fix=_INSTEAD_OF_JETPACK_5)
    short = ".".join(python.version.split(".")[:2])
    if not system.tensorrt_pythons:
        return Finding(
            topic=topic,
            ok=False,
            found="missing: JetPack's TensorRT has no Python package here",
            fix="sudo apt install python3-libnvinfer",
        )
    theirs = system.tensorrt_pythons[-1]
    remade = (
        f"/usr/bin/python{theirs} -m venv --system-site-packages ENV, {pip_install('cli', 'ENV/bin/pip')}, and "
        "ENV/bin/edge-backbones doctor tells the rest"
    )
    if short not in system.tensorrt_pythons:
        found = f"JetPack's TensorRT is for Python {theirs} and this is {short}"
        return Finding(topic=topic, ok=False, found=found, fix=f"use the system's Python: {remade}")
    if not python.system_packages:
        blind = "this virtual environment" if python.virtual else f"{python.executable}, not the system's Python,"
        found = f"JetPack's TensorRT is installed, and {blind} does not see it"
        fix = f"make an environment of the system's Python and with its packages: {remade}"
        return Finding(topic=topic, ok=False, found=found, fix=fix)
    found = f"installed for Python {theirs}, and cannot be loaded"
    fix = "python3 -c 'import tensorrt' tells why; sudo apt install --reinstall python3-libnvinfer"
    return Finding(topic=topic, ok=False, found=found, fix=fix)


def _optional(machine: Machine, flavour: str) -> Finding:
    """Check a flavour that few need: its absence needs no fix unless this machine's GPU depends on it."""
    purpose, install = {
        "tensorrt_lean": ("run version-compatible plans (TensorRT lean)", "pip install tensorrt-lean"),
        "tensorrt_rtx": ("compile for RTX GPUs, without one too (TensorRT-RTX)", pip_install("rtx")),
    }[flavour]
    version = machine.tensorrt.get(flavour)
    if version is not None:
        return Finding(topic=purpose, ok=True, found=version)
    if machine.system.jetson:
        return Finding(topic=purpose, ok=True, found="not installed; nothing on a Jetson needs it", absent=True)
    architectures = {gpu.architecture for gpu in machine.gpus}
    if flavour == "tensorrt_rtx" and architectures & set(RTX_ARCHITECTURES) and _serving(machine) == "openvino":
        return Finding(topic=purpose, ok=False, found="missing", fix=install)
    return Finding(topic=purpose, ok=True, found=f"not installed; where it is wanted: {install}", absent=True)


def _profile(machine: Machine) -> DeviceProfile | None:
    return profile_of(machine.gpus[0] if machine.gpus else None, board=machine.system.board)


def _served(machine: Machine, profile: DeviceProfile | None) -> Finding:
    if profile is None:
        gpu = machine.gpus[0]
        hidden = machine.system.jetson and not machine.system.board
        return Finding(
            topic="device profile",
            ok=False,
            found=f"none is known to be of {gpu.name} ({gpu.architecture}, {gib(gpu.memory_bytes)})",
            fix=(f"in a container docker run {_BOARD} shows the board; or " if hidden else "")
            + "compile --profile NAME (edge-backbones profiles lists them) or --profile FILE.toml, your own; without one "
            "engines are compiled all the same, and TensorRT alone says what it cannot run",
        )
    pays = ", ".join(profile.pays)
    return Finding(
        topic="device profile",
        ok=True,
        found=f"{profile.name} ({profile.title}): {pays} pay; see edge-backbones profiles",
    )


def _dla(machine: Machine, profile: DeviceProfile | None) -> Finding:
    if profile is None or profile.kind != "jetson":
        return Finding(topic="DLA", ok=True, found="not known: no profile tells this board", absent=True)
    if not profile.dla_cores:
        return Finding(topic="DLA", ok=True, found=f"{profile.title} has none", absent=True)
    cores = max(module.dla_cores for module in modules_of(profile, machine.gpus[0] if machine.gpus else None))
    releases = " or ".join(s.tensorrt for s in profile.software if s.dla)
    counted = "1 core" if cores == 1 else f"{cores} cores"
    return Finding(topic="DLA", ok=True, found=f"{counted}, for TensorRT {releases} (--dla-core)")
