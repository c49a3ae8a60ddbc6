"""What the robot's service may do, as a systemd unit and as a container: no more than it needs, and less than compiling."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import yaml

from build_scripts import fetch_systemd

JETSON = Path(__file__).parents[2] / "build_scripts" / "jetson"
ROBOT, COMPILE = JETSON / "edge-backbones@.service", JETSON / "edge-backbones-compile@.service"
BUNDLES = "/var/lib/edge-backbones"

# Exactly these, in both units.
LOCKS = {
    "AmbientCapabilities": [""],
    "CapabilityBoundingSet": [""],
    "DevicePolicy": ["closed"],
    "LockPersonality": ["yes"],
    "NoNewPrivileges": ["yes"],
    "PrivateMounts": ["yes"],
    "PrivateNetwork": ["yes"],
    "PrivateTmp": ["yes"],
    "ProtectClock": ["yes"],
    "ProtectControlGroups": ["yes"],
    "ProtectHome": ["yes"],
    "ProtectHostname": ["yes"],
    "ProtectKernelLogs": ["yes"],
    "ProtectKernelModules": ["yes"],
    "ProtectKernelTunables": ["yes"],
    "ProtectProc": ["invisible"],
    "ProtectSystem": ["strict"],
    "RemoveIPC": ["yes"],
    "RestrictAddressFamilies": ["AF_UNIX"],
    "RestrictNamespaces": ["yes"],
    "RestrictRealtime": ["yes"],
    "RestrictSUIDSGID": ["yes"],
    "SystemCallArchitectures": ["native"],
    "SystemCallErrorNumber": ["EPERM"],
    "SystemCallFilter": ["@system-service", "~@privileged"],
    "WorkingDirectory": ["/tmp"],
}
WRITING = {
    "StateDirectory", "CacheDirectory", "LogsDirectory", "ConfigurationDirectory", "RuntimeDirectory", "ReadWritePaths",
    "BindPaths", "TemporaryFileSystem",
}  # fmt: skip


def settings(path: Path) -> dict[str, dict[str, list[str]]]:
    """A unit file: for every section its settings, and for each of those its values in order."""
    sections: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    section = ""
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("["):
            section = line.strip("[]")
        elif line and line[0] not in "#;":
            name, _, value = line.partition("=")
            sections[section][name].append(value)
    return {section: dict(found) for section, found in sections.items()}


@pytest.mark.parametrize("unit", [ROBOT, COMPILE], ids=lambda path: path.stem)
def test_every_lock_is_on(unit):
    service = settings(unit)["Service"]
    assert {name: service.get(name) for name in LOCKS} == LOCKS


def test_both_units_see_the_gpu_and_no_other_device():
    robot, compiling = (settings(unit)["Service"] for unit in (ROBOT, COMPILE))
    assert robot["DeviceAllow"] == compiling["DeviceAllow"]
    assert all(re.fullmatch(r"(/dev/\w+(-\w+)?|char-\S+) rw", line) for line in robot["DeviceAllow"])
    # CUDA on Orin opens all of these, and fails without any of them; char- patterns are of names in /proc/devices.
    allowed = {line.removesuffix(" rw") for line in robot["DeviceAllow"]}
    assert {"/dev/nvmap", "/dev/host1x-fence", "char-*.gpu", "char-nvhost*", "char-nvidia*", "char-drm"} <= allowed
    assert robot["SupplementaryGroups"] == compiling["SupplementaryGroups"] == ["video render"]
    assert robot["LimitMEMLOCK"] == compiling["LimitMEMLOCK"] == ["infinity"]


def test_only_compiling_may_write_to_a_bundle():
    robot, compiling = (settings(unit)["Service"] for unit in (ROBOT, COMPILE))
    assert not WRITING & set(robot)
    assert {name: compiling[name] for name in WRITING & set(compiling)} == {
        "StateDirectory": ["edge-backbones"], "CacheDirectory": ["edge-backbones"],
    }  # fmt: skip
    assert [robot["User"], compiling["User"]] == [["robot"], ["edge-backbones"]]
    assert int(compiling["UMask"][0], 8) & 0o055 == 0  # the robot reads what it wrote
    assert all(BUNDLES in service["NoExecPaths"][0] for service in (robot, compiling))
    for service in (robot, compiling):
        [bundle] = [word for word in shlex.split(service["ExecStart"][0]) if "%i" in word]
        assert bundle == f"{BUNDLES}/%i.bundle"


def test_compiling_comes_first_and_a_robot_starts_without_it():
    robot, compiling = settings(ROBOT), settings(COMPILE)
    name = COMPILE.name.replace("@", "@%i")
    assert robot["Unit"]["Wants"] == [name]
    assert robot["Unit"]["After"][0].split()[0] == name
    assert "Requires" not in robot["Unit"]
    assert "Install" not in compiling
    assert compiling["Service"]["Type"] == ["oneshot"]
    assert not any(word.startswith("ExecStartPre") for word in robot["Service"])


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="systemd is for Linux only")
@pytest.mark.parametrize("unit", [ROBOT, COMPILE], ids=lambda path: path.stem)
def test_systemd_calls_the_exposure_small(unit):
    analyze = fetch_systemd.require_analyze()
    version = subprocess.run([analyze, "--version"], capture_output=True, text=True, check=True).stdout
    if int(version.split()[1].partition(".")[0]) < 250:
        pytest.skip(f"{version.splitlines()[0]} judges running units only, 250 files too")
    command = [analyze, "security", "--no-pager", "--offline=true", str(unit)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    exposure = re.search(r"Overall exposure level for \S+: ([\d.]+)", done.stdout)
    assert exposure, done.stdout + done.stderr
    assert float(exposure[1]) <= 2.0
    assert done.stderr == ""  # a setting that it does not know is told there
    done = subprocess.run([analyze, "verify", str(unit)], capture_output=True, text=True, check=False)
    told = [line for line in done.stderr.splitlines() if "edge-backbones" in line and "is not executable" not in line]
    assert told == []


def test_systemd_is_fetched_by_root_alone_and_told_of_elsewhere(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RuntimeError, match="apt install systemd"):
        fetch_systemd.require_analyze()
    with pytest.raises(RuntimeError, match="only root can add"):  # there is no apt-get on this path either
        fetch_systemd.install_analyze()
    apt = tmp_path / "apt-get"
    apt.write_text("#!/bin/sh\necho 'E: no network' >&2; exit 100\n", encoding="utf-8")
    apt.chmod(0o755)
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    with pytest.raises(RuntimeError, match="only root can add"):
        fetch_systemd.install_analyze()
    monkeypatch.setattr("os.geteuid", lambda: 0)
    with pytest.raises(RuntimeError, match=r"apt-get update failed \(E: no network\): install systemd"):
        fetch_systemd.install_analyze()
    made = tmp_path / "systemd-analyze"
    apt.write_text(f"#!/bin/sh\n[ $1 = update ] || {{ : > {made} && /bin/chmod 755 {made}; }}\n", encoding="utf-8")
    assert fetch_systemd.install_analyze() == str(made)


@pytest.fixture
def services() -> dict[str, dict[str, Any]]:
    return yaml.safe_load((JETSON / "compose.yaml").read_text(encoding="utf-8"))["services"]


@pytest.mark.parametrize("name", ["compile", "robot"])
def test_a_container_has_no_privileges(services, name):
    service = services[name]
    assert service["network_mode"] == "none"
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert 0 < service["pids_limit"] <= 1024
    assert service["ulimits"] == {"memlock": -1, "core": 0}
    [tmpfs] = service["tmpfs"]
    assert re.fullmatch(r"/tmp:mode=1777,size=\d+[mg]", tmpfs)
    assert not {"privileged", "cap_add", "devices", "ports", "network", "networks", "pid", "userns_mode"} & set(service)


def test_only_the_container_that_compiles_may_write_to_bundles(services):
    writable = {
        name: [volume.rpartition("}:")[2] for volume in service["volumes"] if not volume.endswith(":ro")]
        for name, service in services.items()
    }
    assert writable == {"compile": ["/bundles"], "robot": []}
    assert any(volume.endswith("}:/bundles:ro") for volume in services["robot"]["volumes"])
