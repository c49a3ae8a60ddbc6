"""``python -m build_scripts.emulate_aarch64 [BUNDLE]``: a bundle on an emulated 64-bit ARM CPU, against this machine.

For x86-64 Linux and root. debootstrap lays out Debian (or Ubuntu) for arm64 once, in .cache/aarch64, from the archive that
apt is configured for; QEMU runs its programs, in namespaces of their own: nothing is registered on this machine. There pip
installs the wheel with ``[cpu,onnxruntime]``. OpenVINO and ONNX Runtime compile the bundle's int8 and fp32 graphs, and run
the golden images on one thread. The feature maps are compared here, with the golden samples and with those of the same
engines on this machine. Without BUNDLE: a small network, which is built first. Results: benchmarks/results/aarch64.json.

A plugin of QEMU (count_instructions.c) counts the instructions of one call. Emulation shows whether the instructions for ARM
compute the same, and how many there are. It says nothing of speed: an instruction with 16 int8 products counts as much as one
that moves a register, and waiting for memory counts nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import os
import platform
import shutil
import signal
import ssl
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from build_scripts.device_install import OLDEST, ROOT, build_small, build_wheel
from edge_backbones import Bundle, EdgeBackbonesError
from edge_backbones.bundle.reader import load_golden
from edge_backbones.deploy.parity import compare
from edge_backbones.engines import registry
from edge_backbones.parity_report import Gate

RESULTS = ROOT / "benchmarks" / "results" / "aarch64.json"
CACHE = ROOT / ".cache" / "aarch64"
CPU = "cortex-a76"  # of those that QEMU knows the nearest to Orin's Cortex-A78AE
_TOOLS = {
    "apt-get": "apt",
    "cc": "gcc libc6-dev",
    "debootstrap": "debootstrap",
    "dpkg-deb": "dpkg",
    "qemu-aarch64": "qemu-user",
    "qemu-aarch64-static": "qemu-user-static",
    "unshare": "util-linux",
}
_PYTHON = "/opt/env/bin/python"
_PASSED_ON = ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY")

# In a user and a mount namespace of its own, where the kernel has a list of binary formats for each (Linux 6.7).
_ENTER = r"""
set -e
root=$1 qemu=$2; shift 2
if mount -t binfmt_misc binfmt_misc /proc/sys/fs/binfmt_misc 2>/dev/null; then
  printf '%s' ':aarch64:M::\x7fELF\x02\x01\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00\x02\x00\xb7\x00:'\
'\xff\xff\xff\xff\xff\xff\xff\x00\xff\xff\xff\xff\xff\xff\xff\xff\xfe\xff\xff\xff:'"$qemu"':F' \
    > /proc/sys/fs/binfmt_misc/register
fi
for folder in proc sys dev; do mount --rbind "/$folder" "$root/$folder"; done
if [ -e "$root/cpuinfo" ]; then mount --bind "$root/cpuinfo" "$root/proc/cpuinfo"; fi
exec chroot "$root" "$@"
"""

# The kernel's names of the bits of AT_HWCAP and AT_HWCAP2, as /proc/cpuinfo of an ARM machine has them.
_HWCAP = (
    "fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm jscvt fcma lrcpc dcpop sha3 sm3 sm4 "
    "asimddp sha512 sve asimdfhm dit uscat ilrcpc flagm ssbs sb paca pacg"
)
_HWCAP2 = (
    "dcpodp sve2 sveaes svepmull svebitperm svesha3 svesm4 flagm2 frint svei8mm svef32mm svef64mm svebf16 i8mm bf16 dgh "
    "rng bti"
)
_ASK_CPU = """
import ctypes, json, sys
ask = ctypes.CDLL(None).getauxval
ask.restype, ask.argtypes = ctypes.c_ulong, [ctypes.c_ulong]
print(json.dumps([sys.version_info[:2], ask(16), ask(26)]))
"""

_RUN = """
import collections, json, os, platform, sys
import numpy
from edge_backbones import Bundle
from edge_backbones.bundle.reader import load_golden
from edge_backbones.engines import registry
from edge_backbones.engines.base import CompileOptions, LoadOptions
from edge_backbones.engines.onnxruntime.library import load_library
from edge_backbones.machine.hosts import this_host
from edge_backbones.progress import no_progress

INTEGER = {"QLinearConv", "ConvInteger", "QGemm", "QLinearMatMul", "MatMulInteger", "MatMulIntegerToFloat"}
FLOAT = {"Conv", "FusedConv", "NhwcFusedConv", "Gemm", "FusedGemm", "MatMul", "FusedMatMul"}

def products(flavour, data, session):
    if flavour == "openvino":
        facts = [op.get_rt_info() for op in session._loaded.model.get_runtime_model().get_ops()]
        products = ("Convolution", "FullyConnected", "MatMul")
        return [fact["runtimePrecision"].astype(str) for fact in facts if fact["layerType"].astype(str) in products]
    import onnx
    library = load_library()
    options = library.SessionOptions()
    options.log_severity_level, options.optimized_model_filepath = 3, f"{out}/optimised.onnx"
    library.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    kinds = [node.op_type for node in onnx.load(options.optimized_model_filepath).graph.node]
    return ["int8" if kind in INTEGER else "f32" for kind in kinds if kind in INTEGER | FLOAT]

path, out, *wanted = sys.argv[1:]
bundle, found = Bundle.open(path), {}
golden, manifest = load_golden(bundle), bundle.manifest
for name in wanted:
    flavour, precision = name.split("/")
    graph = next(g for g in manifest.graphs if (g.format, g.precision) == ("onnx", precision))
    maker = registry.get(flavour)
    engine = maker.compile(bundle, graph, CompileOptions(), no_progress)
    with_one_thread = LoadOptions(threads=1)
    session = maker.load(engine.key, bytearray(engine.data), manifest.backbone, manifest.input, with_one_thread)
    maps = collections.defaultdict(list)
    for case in golden.cases:
        for image in golden.inputs[case]:
            for stage, feature_map in zip(manifest.backbone.outputs, session.run(image[None])):
                maps[f"{case}/{stage}"].append(feature_map)
    os.getpriority(os.PRIO_PROCESS, 0)  # the plugin of QEMU reports
    session.run(image[None])
    os.getpriority(os.PRIO_PROCESS, 0)
    numpy.savez(f"{out}/{flavour}-{precision}.npz", **{key: numpy.concatenate(parts) for key, parts in maps.items()})
    found[name] = collections.Counter(products(flavour, engine.data, session))
    session.close()
print(json.dumps({
    "architecture": platform.machine(), "cpu_features": this_host({}).cpu_features, "python": platform.python_version(),
    "numpy": numpy.__version__, "libc": platform.libc_ver()[1], "products": found, "torch": "torch" in sys.modules,
    **{name: registry.get(name).version() for name in ("openvino", "onnxruntime")},
}))
"""
_FLAVOURS = ("openvino", "onnxruntime")


class EmulationError(RuntimeError):
    """Emulation does not work here; the message says what to do, in one line."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", nargs="?", type=Path, help="a bundle with engines for this machine")
    parser.add_argument("--cpu", default=CPU, help=f"which one QEMU shows, by default {CPU}; max has all it knows")
    parser.add_argument("--mirror", help="archive with arm64 to install from, instead of the one apt is configured for")
    parser.add_argument("--suite", help="release there, instead of apt's: Debian 12, Ubuntu 22.04 or newer")
    arguments = parser.parse_args()
    try:
        check_machine()
        if arguments.bundle is not None:
            precisions_of(Bundle.open(arguments.bundle))
        with alone():
            device = make_root(*archive(arguments.mirror, arguments.suite))
            found = emulate(arguments.bundle, device, arguments.cpu)
    except (EmulationError, EdgeBackbonesError) as error:
        sys.exit(f"emulate_aarch64: {error}")
    stored = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    stored.setdefault(arguments.cpu, {})[found["network"]] = found
    RESULTS.write_text(json.dumps(stored, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {RESULTS.relative_to(ROOT).as_posix()}")
    sys.exit(0 if found["passed"] else 1)


def check_machine() -> None:
    """Raise EmulationError for what is missing, before anything is downloaded."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        raise EmulationError(
            f"this is {sys.platform} on {platform.machine()}: it compares with an x86-64 Linux machine, run it there"
        )
    if os.geteuid() != 0:
        raise EmulationError("debootstrap and chroot are root's: run it with sudo, or in a container as root")
    if missing := sorted({package for tool, package in _TOOLS.items() if shutil.which(tool) is None}):
        raise EmulationError(f"this machine lacks programs: apt install {' '.join(missing)}")


@contextlib.contextmanager
def alone() -> Iterator[None]:
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise EmulationError(f"another run uses {CACHE}: wait until it ends") from None
        yield


def archive(mirror: str | None, suite: str | None) -> tuple[str, str]:
    """Return where debootstrap gets packages: the one that was named, or the first release in apt's configuration."""
    if mirror and suite:
        return mirror, suite
    told = command("apt-get", "indextargets", "--format", "$(SITE)|$(RELEASE)|$(COMPONENT)", "Created-By: Packages")
    found = first_release(told)
    if found is None:
        raise EmulationError(
            "apt is configured for no Debian or Ubuntu archive: apt-get update, or say --mirror and --suite"
        )
    return mirror or found[0], suite or found[1]


def first_release(targets: str) -> tuple[str, str] | None:
    """Return address and name of the first release with a main component; updates alone are no system."""
    rows = [line.split("|") for line in targets.splitlines()]
    releases = [(site, release) for site, release, component in rows if component == "main" and "-" not in release]
    return next(iter(releases), None)


def make_root(mirror: str, suite: str) -> Path:
    """Create the files of a small arm64 system with Python. Packages are unpacked, not configured: only Python runs."""
    root = CACHE / suite
    if root.is_dir():
        return root
    print(f"laying out {suite} for arm64 in {root.relative_to(ROOT)}", flush=True)
    half = Path(tempfile.mkdtemp(prefix=f"{suite}.", dir=CACHE))
    try:
        options = ("--arch=arm64", "--foreign", "--variant=minbase", "--include=python3,python3-venv")
        try:
            command("debootstrap", "--force-check-gpg", *options, suite, str(half), mirror)
        except EmulationError as error:
            raise EmulationError(f"{error} (an archive without arm64? Ubuntu has it in its ports: --mirror)") from None
        for package in sorted((half / "var/cache/apt/archives").glob("*.deb")):
            command("dpkg-deb", "--extract", str(package), str(half))
            package.unlink()
        half.chmod(0o755)
        half.rename(root)
    finally:
        shutil.rmtree(half, ignore_errors=True)
    return root


def emulate(bundle: Path | None, root: Path, cpu: str) -> dict[str, Any]:
    """Install, run, count and compare. Prints its findings, and returns what goes into the results."""
    network(root)
    write_cpuinfo(root, cpu)
    work = root / "data"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    qemu = command("qemu-aarch64", "--version").splitlines()[0]
    try:
        opened = Bundle.open(bundle or build_small(CACHE / "net.bundle"))
        engines = [f"{flavour}/{precision}" for precision in precisions_of(opened) for flavour in _FLAVOURS]
        golden = load_golden(opened)
        references = {
            f"{case}/{stage}": values for case, maps in golden.outputs.items() for stage, values in maps.items()
        }
        about = {"network": opened.manifest.source.name, "qemu": qemu, "system": root.name}
        install(root, cpu, work)
        print("compiling and running there", flush=True)
        there, here = work / "there", work / "here"
        there.mkdir()
        here.mkdir()
        told = counted(root, cpu, "-c", _RUN, str(opened.path), str(there), *engines).splitlines()
        device, instructions = json.loads(told[-1]), instructions_of(told[:-1], engines)
        if device.pop("torch") or device["architecture"] != "aarch64":
            raise EmulationError(f"the device was not bare or not ARM: {device}")
        run = ("-c", _RUN, str(opened.path), str(here), *engines)
        machine = json.loads(
            command(sys.executable, *run, env={**os.environ, "PYTHONPATH": str(ROOT)}).splitlines()[-1]
        )
        del machine["torch"]
        products = {"device": device.pop("products"), "here": machine.pop("products")}
        found: dict[str, dict[str, Any]] = {}
        for engine in engines:
            precision, file = engine.partition("/")[2], f"{engine.replace('/', '-')}.npz"
            gate = next(e.parity.gate for e in opened.manifest.engines if e.key.precision == precision)
            with np.load(there / file) as theirs, np.load(here / file) as ours:
                stages = judge(engine, gate, dict(theirs), {"golden": references, "x86_64": dict(ours)})
            found[engine] = {
                "passed": all(stage["passed"] for stage in stages),
                "products": {where: counts[engine] for where, counts in products.items()},
                "instructions": instructions[engine],
                "stages": stages,
            }
    finally:
        shutil.rmtree(work, ignore_errors=True)
    passed = all(row["passed"] for row in found.values())
    print(f"ok: {len(found)} engines are within their gates" if passed else "FAILED: see the stages above")
    for engine, row in found.items():
        kinds = ", ".join(f"{count} in {kind}" for kind, count in sorted(row["products"]["device"].items()))
        print(f"     {engine}: convolutions and matrix products {kinds}; {row['instructions']}")
    return {**about, "device": device, "here": machine, "engines": found, "passed": passed}


def counted(root: Path, cpu: str, *words: str) -> str:
    """Run the device's Python under QEMU with the plugin that counts, and return the output.

    It runs outside of the device's root, because the plugin and this QEMU need this machine's libraries.
    """
    plugin = CACHE / "count_instructions.so"
    source = Path(__file__).with_name("count_instructions.c")
    command("cc", "-O2", "-shared", "-fPIC", "-o", str(plugin), str(source))
    [packages] = (root / "opt/env/lib").glob("python3*/site-packages")
    (root / "proc/cpuinfo").write_bytes((root / "cpuinfo").read_bytes())  # QEMU looks for files below the root first
    environment = {"PATH": os.environ["PATH"], "HOME": str(root / "root"), "LC_ALL": "C.UTF-8"}
    environment |= {"PYTHONPATH": str(packages), "QEMU_CPU": cpu}
    qemu = ("qemu-aarch64", "-plugin", str(plugin), "-L", str(root), str(root / "usr/bin/python3"))
    return command(*qemu, *words, env=environment, shown=words)


def instructions_of(lines: Sequence[str], engines: Sequence[str]) -> dict[str, dict[str, int]]:
    """Return how many instructions one call of each engine takes. ``lines``: what the plugin wrote, two for each engine."""
    reports = [[int(word) for word in line.split()[1:]] for line in lines if line.startswith("COUNT ")]
    if len(reports) != 2 * len(engines):
        raise EmulationError(f"{2 * len(engines)} reports of the plugin were expected, and {len(reports)} came")
    kinds = ("all", "int8_products", "float_multiply_adds")
    return {
        engine: {kind: last - first for kind, first, last in zip(kinds, before, after, strict=True)}
        for engine, before, after in zip(engines, reports[::2], reports[1::2], strict=True)
    }


def precisions_of(bundle: Bundle) -> list[str]:
    """Return the precisions of the engines for a CPU like this one. Raises EmulationError if there are none."""
    keys = [engine.key for engine in bundle.manifest.engines]
    found = [key.precision for key in keys if key.flavour == "openvino" and key.architecture == platform.machine()]
    if not found:
        raise EmulationError(f"{bundle.path} has no engine to compare with: edge-backbones compile {bundle.path}")
    return list(dict.fromkeys(found))


def judge(
    engine: str, gate: Gate, device: Mapping[str, np.ndarray], references: Mapping[str, Mapping[str, np.ndarray]]
) -> list[dict[str, Any]]:
    """Compare each map of the device with the golden samples and with this machine's engine, by the engine's gate."""
    rows = []
    for stage in dict.fromkeys(key.partition("/")[2] for key in device):
        found = {name: worst(stage, reference, device, gate) for name, reference in references.items()}
        passed = all(figures.pop("passed") for figures in found.values())
        rows.append({"stage": stage, "passed": passed, **found})
        told = (f"{name} {figures['cosine']:.6f}, {figures['sqnr_db']:.1f} dB" for name, figures in found.items())
        print(f"{'ok  ' if passed else 'MISS'} {engine} {stage}: cosine and SQNR against {'; '.join(told)}")
    return rows


def worst(
    stage: str, expected: Mapping[str, np.ndarray], actual: Mapping[str, np.ndarray], gate: Gate
) -> dict[str, Any]:
    """Return the worst image of all cases, figure by figure."""
    keys = [key for key in actual if key.partition("/")[2] == stage]
    images = [
        compare(stage, one, other, gate) for key in keys for one, other in zip(expected[key], actual[key], strict=True)
    ]
    return {
        "cosine": min(image.cosine for image in images),
        "sqnr_db": min(image.sqnr_db for image in images),
        "max_abs": max(image.max_abs for image in images),
        "passed": all(image.passed for image in images),
    }


def network(root: Path) -> None:
    """Give the system what pip needs: host names, and the certificates that this machine trusts."""
    for name in ("resolv.conf", "hosts"):
        if Path("/etc", name).exists():
            (root / "etc" / name).write_bytes(Path("/etc", name).read_bytes())
    trusted = os.environ.get("PIP_CERT") or ssl.get_default_verify_paths().cafile
    if trusted:
        (root / "etc/certificates.pem").write_bytes(Path(trusted).read_bytes())


def write_cpuinfo(root: Path, cpu: str) -> None:
    """Write a /proc/cpuinfo like that of the emulated machine: QEMU would show this machine's."""
    (root / "cpuinfo").unlink(missing_ok=True)
    try:
        version, *capabilities = json.loads(inside(root, cpu, "/usr/bin/python3", "-c", _ASK_CPU))
    except EmulationError as error:
        raise EmulationError(
            f"this machine starts no program for ARM ({error}): it takes Linux 6.7, or QEMU registered with the kernel "
            "(apt install qemu-user-static binfmt-support); and a --cpu that qemu-aarch64-static -cpu help lists"
        ) from None
    if tuple(version) < tuple(int(part) for part in OLDEST.split(".")):
        raise EmulationError(
            f"{root.name} has Python {version[0]}.{version[1]}, older than {OLDEST}: say a newer --suite"
        )
    (root / "cpuinfo").write_text(cpuinfo(*capabilities), encoding="ascii")


def cpuinfo(hwcap: int, hwcap2: int) -> str:
    bits = ((hwcap, _HWCAP), (hwcap2, _HWCAP2))
    features = [name for value, names in bits for bit, name in enumerate(names.split()) if value >> bit & 1]
    described = (
        f"Features\t: {' '.join(features)}\nCPU implementer\t: 0x41\nCPU architecture: 8\n"
        "CPU variant\t: 0x0\nCPU part\t: 0xd0b\nCPU revision\t: 0\n"  # ONNX Runtime crashes without these three
    )
    return "\n".join(f"processor\t: {number}\n{described}" for number in range(os.cpu_count() or 1))


def install(root: Path, cpu: str, work: Path) -> None:
    """Install the wheel and its dependencies. The environment is kept for the next run, the wheel is always new."""
    print("installing there: minutes the first time", flush=True)
    if not (root / _PYTHON.lstrip("/")).is_symlink():
        inside(root, cpu, "/usr/bin/python3", "-m", "venv", "/opt/env")
    wheel = f"/data/{build_wheel(work).name}"
    versions = {name: str(registry.get(name).version()).partition("-")[0] for name in _FLAVOURS}
    releases = [f"{name}=={version}" for name, version in versions.items()]  # maps of the same release are compared
    pip = (_PYTHON, "-m", "pip", "install", "--no-compile")
    inside(root, cpu, *pip, "--force-reinstall", "--no-deps", wheel)
    inside(root, cpu, *pip, f"{wheel}[cpu,onnxruntime]", *releases)


def inside(root: Path, cpu: str, *words: str) -> str:
    """Run a command in the emulated system, and return its output."""
    qemu = shutil.which("qemu-aarch64-static")
    environment = {"HOME": "/root", "PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C.UTF-8", "QEMU_CPU": cpu}
    environment |= {name: value for name, value in os.environ.items() if name.upper() in _PASSED_ON}
    if (root / "etc/certificates.pem").exists():
        environment["PIP_CERT"] = "/etc/certificates.pem"
    namespaces = ("unshare", "--user", "--map-root-user", "--mount")
    return command(*namespaces, "sh", "-c", _ENTER, "enter", str(root), str(qemu), *words, env=environment, shown=words)


def command(*words: str, env: dict[str, str] | None = None, shown: Sequence[str] = ()) -> str:
    done = subprocess.run(words, capture_output=True, text=True, env=env, stdin=subprocess.DEVNULL, check=False)
    if done.returncode:
        lines = (done.stderr.strip() or done.stdout.strip() or "no word").splitlines()
        how = (
            f"ended with {done.returncode}"
            if done.returncode > 0
            else f"was ended by {signal.Signals(-done.returncode).name}"
        )
        short = [word if "\n" not in word else "..." for word in shown or words]
        raise EmulationError(f"{' '.join(short)} {how}: {lines[-1]}")
    return done.stdout


if __name__ == "__main__":
    main()
