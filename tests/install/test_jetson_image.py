"""Dockerfile.jetson and what lies beside it: its steps are run here, as far as they need neither Ubuntu nor a Jetson."""

from __future__ import annotations

import configparser
import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import openvino
import pytest
import yaml
from dockerfile_parse import DockerfileParser

from edge_backbones import Bundle
from edge_backbones.engines.registry import InstalledVersions
from edge_backbones.engines.select import choose_engine
from edge_backbones.machine.hosts import this_host
from edge_backbones.machine.profiles import load_profile

ROOT = Path(__file__).parents[2]
DOCKERFILE = ROOT / "Dockerfile.jetson"
JETSON = ROOT / "build_scripts" / "jetson"
JETPACKS = {"6": ("3.10", "manylinux_2_35", "jetson-orin-nano"), "7": ("3.12", "manylinux_2_39", "jetson-thor")}
OPENVINO = openvino.__version__.partition("-")[0]


def stages() -> list[tuple[str, list[tuple[str, str]]]]:
    """Every stage of the Dockerfile: what it starts from, and its instructions."""
    parser = DockerfileParser(fileobj=io.BytesIO(DOCKERFILE.read_bytes()))
    found: list[tuple[str, list[tuple[str, str]]]] = []
    for step in parser.structure:
        if step["instruction"] == "FROM":
            found.append((step["value"], []))
        elif found and step["instruction"] != "COMMENT":
            found[-1][1].append((step["instruction"], step["value"]))
    return found


def instructions(kind: str) -> list[str]:
    return [value for _, steps in stages() for name, value in steps if name == kind]


def numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))


def environment(**more: str) -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")} | more


@pytest.fixture(scope="module")
def image(old_python, tmp_path_factory) -> Path:
    """The root of an image of JetPack 6: COPY and RUN of the stage that installs, on this machine's Python 3.10."""
    root = tmp_path_factory.mktemp("image")
    [install] = [steps for source, steps in stages() if source.endswith(" AS install")]
    for name, value in install:
        here = value.replace("${JETPACK}", "6")
        if name == "COPY":
            *sources, target = here.split()
            place = root / target.lstrip("/")
            for source in sources:
                if (ROOT / source).is_dir():
                    shutil.copytree(ROOT / source, place, ignore=shutil.ignore_patterns("__pycache__"))
                else:
                    place.mkdir(parents=True, exist_ok=True)
                    shutil.copy(ROOT / source, place)
        elif name == "RUN" and "apt-get" not in here:
            moved = re.sub(r"(?<![\w.])/(opt|src)\b", rf"{root}/\1", here)
            moved = re.sub(r"(?<![\w/])python3(?= -m venv)", old_python, moved)
            done = subprocess.run(["sh", "-c", moved], env=environment(), capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stdout + done.stderr
    return root


def in_image(image: Path, *command: str, **more: str) -> subprocess.CompletedProcess[str]:
    path = f"{image}/opt/edge-backbones/bin:{os.environ['PATH']}"
    return subprocess.run(command, env=environment(PATH=path, **more), capture_output=True, text=True, check=False)


def test_the_image_holds_the_runtime_and_no_more(image):
    [site] = image.glob("opt/edge-backbones/lib/python3*/site-packages")
    names = {path.name.partition("-")[0].lower() for path in site.glob("*.dist-info")}
    assert {"edge_backbones", "numpy", "msgspec", "typer", "rich", "cuda_bindings"} <= names
    assert not names & {"pip", "torch", "timm", "transformers", "onnx", "openvino"}
    size = sum(path.stat().st_size for path in site.rglob("*") if path.is_file())
    assert size < 150e6  # beside Ubuntu and TensorRT
    told = in_image(image, "edge-backbones", "doctor", "--json")
    assert {"machine", "memory", "NVIDIA GPU"} <= {finding["topic"] for finding in json.loads(told.stdout)}


def test_health_is_that_of_the_feature_maps(image, bundle, tmp_path):
    [check] = instructions("HEALTHCHECK")
    command = json.loads(re.search(r"CMD (\[.*\])", check)[1])
    mine = shutil.copytree(bundle, tmp_path / "net.bundle")
    # No engine of this bundle runs where there is neither a GPU nor OpenVINO.
    ill = in_image(image, *command, BUNDLE=str(mine))
    assert ill.returncode == 1
    assert "openvino" in ill.stdout.lower()
    site = image / "openvino"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(site), f"openvino=={OPENVINO}"]
    python = next(image.glob("opt/edge-backbones/bin/python3.*")).name.removeprefix("python")
    subprocess.run([*pip, "--python-version", python, "--only-binary=:all:", "--no-deps"], check=True)
    subprocess.run(
        [*pip[:-1], "openvino-telemetry", "--python-version", python, "--only-binary=:all:", "--no-deps"], check=True
    )
    well = in_image(image, *command, BUNDLE=str(mine), PYTHONPATH=str(site))
    assert well.returncode == 0, well.stdout + well.stderr
    assert "is whole and right" in well.stdout
    graph = Bundle.open(mine).manifest.engines[0].file.path
    (mine / graph).write_bytes(b"damaged")
    assert in_image(image, *command, BUNDLE=str(mine), PYTHONPATH=str(site)).returncode == 1


@pytest.mark.parametrize("jetpack", JETPACKS)
def test_every_pinned_wheel_exists_for_the_board(jetpack, tmp_path):
    python, platform, _ = JETPACKS[jetpack]
    requirements = JETSON / f"jetpack-{jetpack}" / "requirements.txt"
    platforms = [f"{platform}_aarch64", "manylinux_2_28_aarch64", "manylinux_2_17_aarch64", "manylinux2014_aarch64"]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--only-binary=:all:", "--python-version", python]
    command += [option for platform in platforms for option in ("--platform", platform)]
    subprocess.run(
        [*command, "--require-hashes", "--dest", str(tmp_path), "-r", str(requirements)],
        check=True,
        env=environment(),
    )
    wheels = [path.name for path in tmp_path.iterdir()]
    assert any("aarch64" in name and name.startswith("numpy-") for name in wheels)
    assert all(name.endswith(("-any.whl", "aarch64.whl")) for name in wheels)
    asked = {re.split(r"[=<>]", line)[0] for line in requirements.with_suffix(".in").read_text().split()}
    assert asked <= {line.partition("==")[0] for line in requirements.read_text().splitlines()}


@pytest.mark.parametrize("jetpack", JETPACKS)
def test_tensorrt_is_one_that_the_board_runs(jetpack):
    text = (JETSON / f"jetpack-{jetpack}" / "tensorrt.pref").read_text()
    version = numbers(re.search(r"^Pin: version ([\d.]+)", text, re.MULTILINE)[1])
    ranges = [software.tensorrt for software in load_profile(JETPACKS[jetpack][2]).software]
    spans = [[numbers(end) for end in re.findall(r"[\d.]+", span)] for span in ranges]
    # A range may name fewer parts than a package does: 10.3 is any 10.3.
    assert any(span[0] <= version and version[: len(span[-1])] <= span[-1] for span in spans), (version, ranges)
    sources = (JETSON / f"jetpack-{jetpack}" / "nvidia.list").read_text()
    keys = {value.split()[-1] for value in instructions("ADD")}
    key, fingerprint = re.search(r"signed-by=([^\] ,]+),([0-9A-F]{40})\]", sources).groups()
    assert key in keys
    if jetpack == "7":  # CUDA's file is named after the end of its fingerprint
        assert fingerprint.endswith("3bf863cc".upper())
        assert any(value.split()[-2].endswith("/3bf863cc.pub") for value in instructions("ADD"))


@pytest.mark.skipif(not (shutil.which("apt-get") and shutil.which("gpg")), reason="a system without apt")
def test_a_repository_that_another_key_signed_is_refused(tmp_path):
    """What the line with a fingerprint says is what apt does: here with a repository, and a key, of our own."""
    tmp_path.chmod(0o755)
    home, repository, lists = (tmp_path / name for name in ("gpg", "repository", "lists"))
    home.mkdir(mode=0o700)
    gpg = ["gpg", "--homedir", str(home), "--quiet", "--batch", "--yes"]
    subprocess.run([*gpg, "--passphrase", "", "--quick-gen-key", "a key", "rsa2048", "sign", "never"], check=True)
    told = subprocess.run([*gpg, "--with-colons", "--list-keys"], capture_output=True, text=True, check=True).stdout
    ours = re.search(r"^fpr:+([0-9A-F]{40}):", told, re.MULTILINE)[1]
    key = tmp_path / "key.asc"
    subprocess.run([*gpg, "--armor", "--output", str(key), "--export"], check=True)
    repository.mkdir()
    (repository / "Packages").touch()
    nothing = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    date = time.strftime("%a, %d %b %Y %H:%M:%S UTC", time.gmtime())
    (tmp_path / "Release").write_text(f"Origin: ours\nDate: {date}\nSHA256:\n {nothing} 0 Packages\n")
    subprocess.run(
        [*gpg, "--output", str(repository / "InRelease"), "--clearsign", str(tmp_path / "Release")], check=True
    )
    line = (JETSON / "jetpack-6" / "nvidia.list").read_text()
    theirs = re.search(r",([0-9A-F]{40})\]", line)[1]
    at_home = (
        re.sub(r"arch=arm64 signed-by=[^,]+", f"signed-by={key}", line).partition("http")[0] + f"file:{repository} ./"
    )
    for path in tmp_path.rglob("*"):  # apt reads as a user of its own
        if not path.is_relative_to(home):
            path.chmod(0o755 if path.is_dir() else 0o644)

    def update(sources: str) -> str:
        shutil.rmtree(lists, ignore_errors=True)
        (lists / "partial").mkdir(parents=True)
        (tmp_path / "sources.list").write_text(sources + "\n")
        places = {
            "Etc::sourcelist": tmp_path / "sources.list", "Etc::sourceparts": "-", "State::lists": lists,
            "Cache": tmp_path / "cache",
        }  # fmt: skip
        options = [option for name, place in places.items() for option in ("-o", f"Dir::{name}={place}")]
        # As whoever runs the tests: the folders of a test are closed to apt's user.
        command = ["apt-get", "-o", "APT::Sandbox::User=", *options, "update"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return done.stdout + done.stderr

    assert "is not signed" in update(at_home)
    assert "is not signed" not in update(at_home.replace(theirs, ours))
    assert list(lists.glob("*InRelease"))


def test_everything_that_is_copied_is_sent_to_the_builder():
    rules = [line for line in (ROOT / "Dockerfile.jetson.dockerignore").read_text().splitlines() if line[:1] != "#"]
    assert rules[0] == "*"
    sent = [rule[1:] for rule in rules if rule.startswith("!")]
    for value in instructions("COPY"):
        if value.startswith("--from"):
            continue
        for jetpack in JETPACKS:
            for source in value.replace("${JETPACK}", jetpack).split()[:-1]:
                assert (ROOT / source).exists(), source
                assert any(source == rule or source.startswith(f"{rule}/") for rule in sent), source


def test_nobody_is_root_at_the_end():
    assert stages()[-1][1][-1][0] == "CMD"
    assert [value for name, value in stages()[-1][1] if name == "USER"] == ["${UID}"]
    [made] = [value for name, value in stages()[-1][1] if name == "RUN"]
    assert made.endswith('useradd --uid "${UID}" --groups video --create-home robot')
    assert "HOME=/home/robot" in " ".join(value for name, value in stages()[-1][1] if name == "ENV")


def test_the_images_that_it_starts_from_have_their_dates_and_can_be_given_by_digest():
    given = dict(value.split("=") for value in re.findall(r"^ARG (\w+=\S+)$", DOCKERFILE.read_text(), re.MULTILINE))
    assert [source for source, _ in stages()[:2]] == ["${JAMMY} AS jetpack-6", "${NOBLE} AS jetpack-7"]
    for name in ("JAMMY", "NOBLE"):
        assert re.fullmatch(rf"ubuntu:{name.lower()}-\d{{8}}", given[name])


# ---- compose, systemd, the application


def takes(command: list[str]) -> None:
    """Fail unless the command line has this command and these options."""
    name, *rest = command
    helped = subprocess.run(
        [sys.executable, "-m", "edge_backbones", name, "--help"], capture_output=True, text=True, check=True,
        env={**os.environ, "COLUMNS": "200", "NO_COLOR": "1"},
    ).stdout  # fmt: skip
    for option in (word for word in rest if word.startswith("--")):
        assert option in helped, f"{name} has no {option}"


def test_the_compose_file_fits_the_image():
    document: dict[str, Any] = yaml.safe_load((JETSON / "compose.yaml").read_text())
    compile_, robot = document["services"]["compile"], document["services"]["robot"]
    build = compile_["build"]
    assert (JETSON / build["context"]).resolve() == ROOT
    assert (ROOT / build["dockerfile"]).is_file()
    assert set(build["args"]) <= {value.partition("=")[0] for value in instructions("ARG")} | {"JETPACK"}
    takes(compile_["command"])
    assert robot["depends_on"] == {"compile": {"condition": "service_completed_successfully"}}
    assert {service["runtime"] for service in (compile_, robot)} == {"nvidia"}
    mounts = dict(volume.rsplit("}:", 1)[-1].split(":")[:2][::-1] for volume in robot["volumes"] if volume[0] == ".")
    assert (JETSON / mounts["/robot.py"]).is_file()
    assert robot["entrypoint"][1] == "/robot.py"


def test_the_units_start_what_there_is():
    def command(unit: str) -> list[str]:
        parser = configparser.ConfigParser(interpolation=None, strict=False)
        parser.optionxform = str  # type: ignore[assignment,method-assign]
        parser.read(JETSON / unit)
        return shlex.split(parser["Service"]["ExecStart"])

    compiling, robot = command("edge-backbones-compile@.service"), command("edge-backbones@.service")
    takes(compiling[1:])
    assert Path(robot[1]) == Path(robot[0]).parents[1] / "robot.py"
    assert Path(robot[0]).parent == Path(compiling[0]).parent


def test_the_application_changes_engines_between_frames(bundle, tmp_path):
    mine = shutil.copytree(bundle, tmp_path / "net.bundle")
    opened = Bundle.open(mine)
    # Of this network int8 or fp32, whichever was the faster when they were timed.
    best = choose_engine(opened, this_host(InstalledVersions()))
    contents = {file.path: bytes(opened.read(file)) for file in best.files}
    opened.remove_engine(best.name)
    command = [sys.executable, str(JETSON / "robot.py"), str(mine), "--every", "0.2"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as robot:
        assert robot.stdout is not None

        def told(pattern: str) -> str:
            deadline = time.monotonic() + 120
            for line in robot.stdout:
                if re.search(pattern, line):
                    return line
                assert time.monotonic() < deadline
            raise AssertionError(f"it ended with {robot.wait()}, and has not said {pattern}")

        try:
            assert best.name not in told(r"layer1")
            told(r"^\d+ frames: median [\d.]+ ms, p99 [\d.]+ ms$")
            manifest = (mine / "manifest.json").read_bytes()
            (mine / "manifest.json").write_bytes(b"half")
            robot.send_signal(signal.SIGHUP)
            told("serving on with the engine in use")
            (mine / "manifest.json").write_bytes(manifest)
            Bundle.open(mine).add_engine(best, contents)
            robot.send_signal(signal.SIGHUP)
            told(f"changed to {re.escape(best.name)}")
            told("frames: median")
            robot.send_signal(signal.SIGTERM)
            assert robot.wait(60) == 0
        finally:
            robot.kill()


def test_an_environment_of_another_machine_is_told(image, tmp_path):
    copy = shutil.copytree(image / "opt" / "edge-backbones", tmp_path / "copied", symlinks=True)
    for binary in copy.glob("lib/python3*/site-packages/numpy/_core/_multiarray_umath*.so"):
        binary.write_bytes(b"\x7fELF of another processor")
    done = subprocess.run(
        [str(copy / "bin" / "python"), "-m", "edge_backbones", "doctor"],
        capture_output=True, text=True, check=False, env=environment(),
    )  # fmt: skip
    assert done.returncode == 1
    assert "an installed library is not for this machine" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    done = subprocess.run(
        [str(copy / "bin" / "python"), "-c", "from edge_backbones import EdgeBackbone"],
        capture_output=True, text=True, check=False, env=environment(),
    )  # fmt: skip
    *_, last = done.stderr.strip().splitlines()
    assert last.startswith("edge_backbones.errors.BrokenLibraryError: an installed library is not for this machine")
    assert "python3 -m venv ENV" in last


def test_the_noise_is_what_the_bundle_takes(bundle):
    sys.path.insert(0, str(JETSON))
    try:
        import robot
    finally:
        sys.path.remove(str(JETSON))
    from edge_backbones import EdgeBackbone

    with EdgeBackbone.from_pretrained(bundle) as backbone:
        frame = next(robot.frames(backbone))
        assert frame.dtype == np.float32
        assert all(np.isfinite(feature_map).all() for feature_map in backbone(frame).feature_maps)
