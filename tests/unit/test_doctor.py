"""What doctor says of machines that are not at hand: their files are in tests/unit/machines, the rest is said here."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import msgspec
import pytest

from edge_backbones import doctor
from edge_backbones.bundle.manifest import GpuKey
from edge_backbones.bundle.reader import Bundle
from edge_backbones.cpus import Cpus
from edge_backbones.doctor import Finding, Machine, Python, judge, judge_engines
from edge_backbones.errors import MissingDependencyError
from edge_backbones.installation import pip_install
from edge_backbones.machine import hosts
from edge_backbones.machine.gpus import Gpu
from edge_backbones.machine.system import read_system
from edge_backbones.testing import make_bundle

MACHINES = Path(__file__).with_name("machines")
ALL = ("jetpack5-agx-xavier", "jetpack6-orin-nano", "jetpack7-agx-thor", "server-h100", "laptop", "bare")
ALL_CPUS = Cpus(6, 6, None)
RUNTIME = {"openvino": "2026.4.1", "Pillow": "12.0.0"}


def gpu(name: str, architecture: str, gib: float, driver: str, *, integrated: bool = False) -> Gpu:
    return Gpu(0, name, architecture, int(gib * 2**30), driver, 8, integrated)


ORIN_NANO = gpu("Orin", "sm_87", 7.4, "12.6", integrated=True)
THOR = gpu("NVIDIA Thor", "sm_110", 122.8, "13.0", integrated=True)
H100 = gpu("NVIDIA H100 80GB HBM3", "sm_90", 79.1, "12.4")


def machine(
    name: str,
    *,
    python: str = "3.10.12",
    virtual: bool = True,
    system_packages: bool | None = None,
    libraries: dict[str, str] = RUNTIME,
    tensorrt: dict[str, str] | None = None,
    gpus: tuple[Gpu, ...] = (),
    no_gpu: str = "no NVIDIA driver (libcuda.so.1 is missing)",
    cpus: Cpus = ALL_CPUS,
) -> Machine:
    root = MACHINES / name
    cpuinfo = (root / "proc/cpuinfo").read_text()
    architecture = "aarch64" if name.startswith("jetpack") else "x86_64"
    host = hosts.Host(
        architecture,
        hosts.cpu_features(cpuinfo, architecture),
        hosts.device_name(cpuinfo) or architecture,
        {**({"openvino": libraries["openvino"]} if "openvino" in libraries else {}), **(tensorrt or {})},
        gpus[0] if gpus else None,
        "" if gpus else no_gpu,
        read_system(root).jetson,
    )
    return Machine(
        system=read_system(root),
        host=host,
        cpus=cpus,
        python=Python(
            version=python,
            executable="/env/bin/python",
            virtual=virtual,
            system_packages=not virtual if system_packages is None else system_packages,
        ),
        libraries=libraries,
        tensorrt=tensorrt or {},
        gpus=gpus,
        no_gpu="" if gpus else no_gpu,
    )


def finding(found: list[Finding], topic: str) -> Finding:
    [one] = [f for f in found if f.topic.startswith(topic)]
    return one


# ---- files


@pytest.mark.parametrize(
    ("name", "l4t", "jetpack", "driver", "cuda", "pythons", "mode"),
    [
        ("jetpack5-agx-xavier", "35.4.1", "5.1.2", None, "11.4.19", ("3.8",), "15W"),
        ("jetpack6-orin-nano", "36.4.3", "6.2", "540.4.0", "12.6.11", ("3.10",), "25W"),
        ("jetpack7-agx-thor", "38.2.1", "7.0", "580.00", "13.0.48", ("3.12",), "MAXN"),
        ("server-h100", None, None, "550.54.15", "12.4.1", (), None),
        ("laptop", None, None, None, None, (), None),
        ("bare", None, None, None, None, (), None),
    ],
)
def test_the_files_of_a_machine(name, l4t, jetpack, driver, cuda, pythons, mode):
    system = read_system(MACHINES / name)
    assert (system.l4t, system.jetpack, system.driver, system.cuda) == (l4t, jetpack, driver, cuda)
    assert system.tensorrt_pythons == pythons
    assert system.settings.get("Jetson power mode") == mode
    assert system.container == (name == "server-h100")
    assert system.memory is not None
    assert system.memory.available <= system.memory.total


@pytest.mark.parametrize(
    ("l4t", "jetpack"),
    [
        ("32.7.1", "4"),
        ("35.3.1", "5.1.1"),
        ("36.3.0", "6.0"),
        ("36.4.0", "6.1"),
        ("36.4.7", "6.2.1"),
        ("39.1.0", "7.2"),
    ],
)
def test_the_jetpack_of_a_jetson_linux(tmp_path, l4t, jetpack):
    major, _, rest = l4t.partition(".")
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/nv_tegra_release").write_text(f"# R{major} (release), REVISION: {rest}, GCID: 1, BOARD: generic\n")
    assert read_system(tmp_path).jetpack == jetpack


def test_files_that_are_damaged_say_nothing(tmp_path):
    for path in ("etc/nv_tegra_release", "proc/meminfo", "usr/local/cuda/version.json", "var/lib/nvpmodel/status"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(b"\xff\x00 {broken")
    system = read_system(tmp_path)
    assert (system.l4t, system.memory, system.cuda, system.settings) == (None, None, None, {})
    assert read_system(tmp_path / "nothing") == msgspec.convert({}, type(system))


# ---- Jetsons


def test_the_limits_of_a_process_are_told():
    def found(cpus: Cpus) -> str:
        return judge(machine("server-h100", cpus=cpus))[0].found

    assert found(Cpus(64, 64, None)).endswith(", 64 logical cores")
    assert found(Cpus(64, 64, 2.5)).endswith(
        ", 64 logical cores, of which this process uses 2: its cgroup has a quota of 2.5"
    )
    assert found(Cpus(64, 8, None)).endswith(", of which this process uses 8: its affinity mask has 8")


def test_an_orin_nano_as_it_should_be():
    found = judge(
        machine(
            "jetpack6-orin-nano",
            system_packages=True,
            libraries={**RUNTIME, "cuda-bindings": "12.6.2"},
            tensorrt={"tensorrt": "10.3.0"},
            gpus=(ORIN_NANO,),
        )
    )
    assert finding(found, "JetPack").found == "JetPack 6.2 (Jetson Linux 36.4.3)"
    assert finding(found, "compile and run engines").ok
    assert finding(found, "reach the GPU").ok
    assert finding(found, "fast int8").ok
    assert finding(found, "device profile").found.startswith(
        "jetson-orin-nano (NVIDIA Jetson Orin Nano): fp16, int8 pay"
    )
    assert "has none" in finding(found, "DLA").found
    assert finding(found, "NVIDIA GPU").found == "Orin (sm_87, 7.4 GiB); driver 540.4.0, CUDA up to 12.6"
    memory = finding(found, "memory")
    assert not memory.ok
    assert "add swap" in memory.fix
    speed = finding(found, "power mode")
    assert "Jetson power mode 25W" in speed.found
    assert "25W holds the clocks down: /etc/nvpmodel.conf has the modes" in speed.fix


@pytest.mark.parametrize(
    ("options", "found", "fix"),
    [
        ({}, "does not see it", "/usr/bin/python3.10 -m venv --system-site-packages"),
        ({"python": "3.12.3"}, "is for Python 3.10 and this is 3.12", "/usr/bin/python3.10 -m venv"),
        ({"virtual": False}, "cannot be loaded", "tells why"),
        (
            {"virtual": False, "system_packages": False},
            "/env/bin/python, not the system's Python, does not see it",
            "/usr/bin/python3.10 -m venv --system-site-packages",
        ),
        ({"tensorrt": {"tensorrt": "8.6.2"}}, "8.6.2", "10.3 is the oldest"),
    ],
)
def test_a_tensorrt_that_python_does_not_find(options, found, fix):
    one = finding(judge(machine("jetpack6-orin-nano", gpus=(ORIN_NANO,), **options)), "compile and run engines")
    assert not one.ok
    assert found in one.found
    assert fix in one.fix


def test_a_jetson_without_the_python_package_of_tensorrt(monkeypatch):
    seen = machine("jetpack6-orin-nano", gpus=(ORIN_NANO,))
    seen = msgspec.structs.replace(seen, system=msgspec.structs.replace(seen.system, tensorrt_pythons=()))
    assert finding(judge(seen), "compile and run engines").fix == "sudo apt install python3-libnvinfer"


def test_jetpack_5_is_told_what_it_lacks():
    found = judge(machine("jetpack5-agx-xavier"))
    jetpack = finding(found, "JetPack")
    assert not jetpack.ok
    instead = (
        "flash JetPack 6.2 (Orin), or use the CPU engine in a container of Ubuntu 22.04"  # OpenVINO asks for its glibc
    )
    assert jetpack.fix.endswith(instead)
    assert finding(found, "compile and run engines").fix == instead
    # Its GPU, seen, changes nothing of that.
    xavier = gpu("Xavier", "sm_72", 30.0, "11.4", integrated=True)
    found = judge(machine("jetpack5-agx-xavier", gpus=(xavier,)))
    assert not [one for one in found if one.topic == "device profile"]
    assert finding(found, "reach the GPU").fix == ""
    assert finding(found, "compile and run engines").fix == instead
    assert "no int8 dot product" in finding(found, "fast int8").fix
    assert "Jetson power mode 15W" in finding(found, "power mode").found


def test_jetpack_6_0_is_told_to_upgrade():
    seen = machine("jetpack6-orin-nano")
    seen = msgspec.structs.replace(seen, system=msgspec.structs.replace(seen.system, l4t="36.3.0"))
    assert "upgrade to JetPack 6.2" in finding(judge(seen), "JetPack").fix


def test_a_thor():
    found = judge(
        machine(
            "jetpack7-agx-thor",
            python="3.12.3",
            system_packages=True,
            libraries={**RUNTIME, "cuda-bindings": "13.0.1"},
            tensorrt={"tensorrt": "10.13.3"},
            gpus=(THOR,),
        )
    )
    assert finding(found, "JetPack").found == "JetPack 7.0 (Jetson Linux 38.2.1)"
    assert finding(found, "device profile").found.startswith("jetson-thor")
    assert finding(found, "power mode").ok
    assert not finding(found, "memory").fix
    assert {f.topic for f in found if not f.ok} == {
        "draw feature maps and reports",
        "build bundles",
    }


def test_a_jetson_in_a_container_that_hides_what_it_is():
    seen = machine("jetpack6-orin-nano")
    hidden = msgspec.structs.replace(seen.system, l4t=None, container=True)
    found = judge(msgspec.structs.replace(seen, system=hidden))
    assert "-v /etc/nv_tegra_release" in finding(found, "JetPack").fix
    assert "-v /proc/device-tree/model:/tmp/nv_jetson_model:ro" in finding(found, "JetPack").fix
    assert "--runtime nvidia" in finding(found, "NVIDIA GPU").fix
    bare = msgspec.structs.replace(hidden, tensorrt_pythons=())
    missing = finding(judge(msgspec.structs.replace(seen, system=bare)), "compile and run engines")
    assert missing.fix == "sudo apt install python3-libnvinfer"


@pytest.mark.parametrize("name", ALL)
def test_a_container_hides_the_device_tree_and_not_the_chip(tmp_path, name):
    """Docker masks /sys/firmware, where /proc/device-tree leads, and its /etc is the image's."""
    tree = Path(shutil.copytree(MACHINES / name, tmp_path / name))
    shutil.rmtree(tree / "proc/device-tree", ignore_errors=True)
    (tree / "etc/nv_tegra_release").unlink(missing_ok=True)
    (tree / ".dockerenv").touch()
    system = read_system(tree)
    assert (system.jetson, system.board, system.l4t) == (name.startswith("jetpack"), "", None)
    seen = msgspec.structs.replace(machine(name), system=system)
    assert ("--runtime nvidia" in doctor.why_not_the_gpu(seen)) == (name not in ("laptop", "bare"))


def test_a_container_that_is_shown_the_board_knows_it(tmp_path):
    tree = Path(shutil.copytree(MACHINES / "jetpack6-orin-nano", tmp_path / "machine"))
    board = read_system(tree).board
    (tree / "tmp").mkdir()
    (tree / "proc/device-tree/model").rename(tree / "tmp/nv_jetson_model")
    assert "Orin Nano" in board
    system = read_system(tree)
    assert (system.board, system.settings["Jetson"]) == (board, board)
    (tree / "proc/device-tree/model").write_bytes(b"NVIDIA Jetson AGX Orin Developer Kit\0")
    assert read_system(tree).board == "NVIDIA Jetson AGX Orin Developer Kit"  # the device tree itself comes first


def test_a_module_that_only_its_board_tells_apart():
    """Orin Nano and Orin NX of 8 GB, seen by CUDA as one: in a container without the board nothing tells them apart."""
    seen = machine("jetpack6-orin-nano", gpus=(ORIN_NANO,))
    assert finding(judge(seen), "device profile").found.startswith("jetson-orin-nano")
    hidden = msgspec.structs.replace(seen, system=msgspec.structs.replace(seen.system, board="", container=True))
    found = finding(judge(hidden), "device profile")
    assert not found.ok
    assert found.fix.startswith(
        "in a container docker run -v /proc/device-tree/model:/tmp/nv_jetson_model:ro shows the board"
    )


@pytest.mark.parametrize(("gib", "cores"), [(7.4, "1 core,"), (15.2, "2 cores,")])
def test_dla_cores_are_those_of_the_module(gib, cores):
    seen = machine("jetpack6-orin-nano", gpus=(gpu("Orin", "sm_87", gib, "12.6", integrated=True),))
    board = "NVIDIA Jetson Orin NX Engineering Reference Developer Kit"
    seen = msgspec.structs.replace(seen, system=msgspec.structs.replace(seen.system, board=board))
    assert finding(judge(seen), "DLA").found.startswith(cores)


# ---- others


def test_a_library_that_is_installed_and_does_not_load_is_told(monkeypatch):
    seen = machine("bare", libraries={"openvino": "2026.4.1"})
    why = "_pyopenvino.so: cannot open shared object file: wrong ELF class"
    one = finding(judge(msgspec.structs.replace(seen, broken={"openvino": why})), "run on the CPU")
    assert not one.ok
    assert one.found == f"openvino 2026.4.1; openvino does not load: {why}"
    assert one.fix == "pip install --force-reinstall openvino"
    assert doctor.look().broken == {}

    def refuse():
        raise MissingDependencyError("the CPU engine", "cpu") from ImportError("openvino: invalid ELF header")

    monkeypatch.setattr(doctor.openvino, "load_library", refuse)
    monkeypatch.setattr(doctor.tensorrt_library, "library_version", lambda flavour: None)
    assert doctor.look().broken == {"openvino": "openvino: invalid ELF header"}


def test_a_server():
    found = judge(machine("server-h100", gpus=(H100,), tensorrt={"tensorrt": "10.16.1"}))
    assert finding(found, "machine").found.startswith("Ubuntu 22.04.4 LTS, in a container, x86_64, Intel(R) Xeon(R)")
    assert finding(found, "device profile").found.startswith("h100")
    assert finding(found, "reach the GPU").fix == "pip install 'cuda-bindings==12.*'"
    assert finding(found, "power mode").ok
    assert not any(f.topic in ("JetPack", "DLA") for f in found)


def test_the_system_is_in_brackets_only_behind_a_board():
    seen = machine("jetpack6-orin-nano", gpus=(ORIN_NANO,))
    board, name = seen.system.board, seen.system.name
    assert finding(judge(seen), "machine").found.startswith(f"{board} ({name}), ")
    bare = msgspec.structs.replace(seen, system=msgspec.structs.replace(seen.system, name=""))
    assert finding(judge(bare), "machine").found.startswith(f"{board}, ")


def test_what_few_need_is_asked_for_where_it_serves():
    topics = ("run version-compatible plans", "compile for RTX GPUs")
    server = judge(machine("server-h100", gpus=(H100,)))
    assert all(finding(server, topic).ok and "pip install" in finding(server, topic).found for topic in topics)
    card = gpu("NVIDIA GeForce RTX 4090", "sm_89", 24, "13.0")
    assert finding(judge(machine("laptop", gpus=(card,))), topics[1]).fix == pip_install("rtx")
    assert finding(judge(machine("laptop", gpus=(card,), tensorrt={"tensorrt": "10.13.0"})), topics[1]).ok
    assert finding(judge(machine("jetpack6-orin-nano")), topics[0]).found.endswith("nothing on a Jetson needs it")


def test_a_laptop_and_a_bare_machine():
    laptop, bare = judge(machine("laptop")), judge(machine("bare", libraries={}))
    assert "cpupower" in finding(laptop, "power mode").fix
    assert finding(laptop, "fast int8").ok
    assert finding(laptop, "NVIDIA GPU").found.endswith("CPU engines do not need one")
    assert finding(bare, "run on the CPU").fix == pip_install("cpu")
    assert not finding(bare, "fast int8").ok
    assert finding(bare, "power mode").found == "not shown by this system"
    assert not finding(bare, "memory").ok


GPUS = {"jetpack6-orin-nano": ORIN_NANO, "jetpack7-agx-thor": THOR, "server-h100": H100}


@pytest.mark.parametrize("tensorrt", [{}, {"tensorrt": "8.6.2"}, {"tensorrt": "10.3.0"}])
@pytest.mark.parametrize("python", ["3.10.12", "3.12.3"])
@pytest.mark.parametrize("gpus", [True, False])
@pytest.mark.parametrize("name", ALL)
def test_every_finding_is_a_plain_line(name, gpus, python, tensorrt):
    seen = (GPUS[name],) if gpus and name in GPUS else ()
    found = judge(machine(name, gpus=seen, python=python, tensorrt=tensorrt))
    assert len({f.topic for f in found}) == len(found)
    for one in found:
        assert one.found
        assert "\n" not in one.found + one.fix
        assert one.ok or one.fix, one
        assert not re.search(r"None|\bsm_None|\(\)|\bdict\b", one.found + one.fix), one
    assert json.loads(msgspec.json.encode(found))[0]["topic"] == "machine"


def test_this_machine_is_looked_at():
    seen = doctor.look()
    assert seen.python.executable
    assert seen.libraries["openvino"]
    assert judge(seen)


# ---- bundles


def test_which_engines_of_a_bundle_run_there(tmp_path):
    bundle = make_bundle(tmp_path / "net.bundle")
    [engine] = bundle.manifest.engines
    here = msgspec.structs.replace(machine("laptop"), host=hosts.this_host({"openvino": engine.key.library_version}))
    [found] = judge_engines(here, bundle)
    assert (found.ok, found.found, found.topic) == (True, "runs here", f"engine {engine.name}")
    bare = machine("laptop", libraries={})
    [found] = judge_engines(bare, with_key(bundle, architecture="x86_64", cpu_features=()))
    assert (found.ok, found.fix) == (False, pip_install("cpu"))
    [found] = judge_engines(machine("jetpack6-orin-nano"), bundle)
    assert not found.ok
    assert found.fix == f"edge-backbones compile {bundle.path}"


def with_key(bundle: Bundle, *, measured: bool = True, **changes) -> Bundle:
    """A bundle whose one engine has another key."""
    [engine] = bundle.manifest.engines
    parity = engine.parity if measured else msgspec.structs.replace(engine.parity, stages=())
    engine = msgspec.structs.replace(engine, key=msgspec.structs.replace(engine.key, **changes), parity=parity)
    return Bundle(path=bundle.path, manifest=msgspec.structs.replace(bundle.manifest, engines=(engine,)))


@pytest.mark.parametrize(
    ("where", "changes", "fix"),
    [
        ({}, {}, "it is for a machine with that GPU; edge-backbones compile {} makes one for this CPU"),
        ({"name": "server-h100"}, {}, "the kernel has the driver .* docker run --runtime nvidia"),
        ({"name": "server-h100", "gpus": (H100,)}, {}, "edge-backbones compile {}$"),
        ({"name": "server-h100", "gpus": (H100,)}, {"measured": False}, "edge-backbones verify {}$"),
        (
            {"name": "jetpack6-orin-nano", "gpus": (ORIN_NANO,)},
            {},
            "sudo apt install python3-libnvinfer, .*--system-site-packages ENV",
        ),
        (
            {"name": "jetpack6-orin-nano", "gpus": (ORIN_NANO,), "tensorrt": {"tensorrt": "10.3.0"}},
            {"gpu": GpuKey(architectures=("sm_87",), driver="13.0")},
            "update the driver$",
        ),
    ],
)
def test_the_way_to_run_an_engine_of_a_gpu(tmp_path, where, changes, fix):
    asked = {
        "flavour": "tensorrt",
        "library_version": "10.3.0",
        "architecture": "aarch64",
        "device_name": "Orin",
        "gpu": GpuKey(architectures=("sm_87",)),
        **changes,
    }
    bundle = with_key(make_bundle(tmp_path / "net.bundle"), **asked)
    [found] = judge_engines(machine(**{"name": "laptop", **where}), bundle)
    assert not found.ok
    assert re.match(fix.format(re.escape(str(bundle.path))), found.fix), found


def test_a_bundle_without_engines_is_told_how_to_get_one(tmp_path):
    bundle = make_bundle(tmp_path / "net.bundle")
    manifest = msgspec.structs.replace(bundle.manifest, engines=())
    empty = type(bundle)(path=bundle.path, manifest=manifest)
    [found] = judge_engines(machine("laptop"), empty)
    assert found.fix == f"edge-backbones compile {bundle.path}"


def test_a_gpu_that_no_profile_knows_is_said():
    known = machine("server-h100", gpus=(H100,), tensorrt={"tensorrt": "10.13.0"})
    assert finding(judge(known), "device profile").found.startswith("h100")
    other = machine("server-h100", gpus=(gpu("NVIDIA B300", "sm_103", 270, "13.0"),), tensorrt={"tensorrt": "10.13.0"})
    found = finding(judge(other), "device profile")
    assert not found.ok
    assert "none is known to be of NVIDIA B300 (sm_103" in found.found
    assert "--profile FILE.toml" in found.fix


def test_the_clock_of_every_jetson_gpu_is_found():
    shown = {name: read_system(MACHINES / name).settings.get("Jetson GPU MHz now") for name in ALL}
    assert {name for name, clock in shown.items() if clock} == {name for name in ALL if name.startswith("jetpack")}
    assert (shown["jetpack5-agx-xavier"], shown["jetpack7-agx-thor"]) == ("675", "1575")


def test_pythons_are_in_the_order_of_their_numbers(tmp_path):
    for python in ("3.8", "3.10", "3.9"):
        (tmp_path / f"usr/lib/python{python}/dist-packages/tensorrt").mkdir(parents=True)
        (tmp_path / f"usr/lib/python{python}/dist-packages/tensorrt/__init__.py").touch()
    assert read_system(tmp_path).tensorrt_pythons == ("3.8", "3.9", "3.10")


def test_a_server_with_an_old_tensorrt_is_not_told_of_jetpack():
    found = finding(
        judge(machine("server-h100", gpus=(H100,), tensorrt={"tensorrt": "8.6.1"})), "compile and run engines"
    )
    assert (found.ok, "JetPack" in found.fix, "pip install --upgrade tensorrt" in found.fix) == (False, False, True)


def test_a_gpu_that_a_container_hides_is_not_passed_over():
    """docker run without --runtime nvidia: not a machine without a GPU."""
    seen = machine("jetpack6-orin-nano")
    hidden = msgspec.structs.replace(seen.system, container=True)
    why = doctor.why_not_the_gpu(msgspec.structs.replace(seen, system=hidden))
    assert why.startswith("there is a GPU, and it is not usable")
    assert "docker run --runtime nvidia" in why


def test_why_a_gpu_is_not_compiled_for():
    assert doctor.why_not_the_gpu(machine("laptop")) == ""
    assert doctor.why_not_the_gpu(machine("server-h100", gpus=(H100,), tensorrt={"tensorrt": "10.13.0"})) == ""
    why = doctor.why_not_the_gpu(machine("jetpack6-orin-nano", gpus=(ORIN_NANO,)))
    assert why.startswith("Orin is here, and TensorRT is not usable")
    assert "--system-site-packages" in why


def test_what_is_not_here_and_not_needed_is_marked_absent():
    found = {finding.topic: finding for finding in judge(machine("laptop"))}
    for topic, finding in found.items():
        if finding.found.startswith("not "):
            assert finding.absent or not finding.ok, topic
    assert found["NVIDIA GPU"].absent
    assert not found["machine"].absent
    assert not [finding for finding in found.values() if finding.absent and finding.fix]
