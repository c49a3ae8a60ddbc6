"""The README's blocks, typed in exactly the environments that they name: its workstation, and a robot with a CPU."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from build_scripts.device_install import build_wheel
from build_scripts.photographs import photographs, write_crops
from edge_backbones import Bundle
from edge_backbones.deploy.pack import pack_bundle
from tests.videos import make_video

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


def section(title: str) -> str:
    return TEXT.split(f"\n## {title}\n")[1].split("\n## ")[0]


def blocks(language: str, text: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


WORKSTATION = blocks("sh", section("On your workstation"))[0]
WHEEL, CPU, GRAPHS, JETSON = blocks("sh", section("On the robot"))
(FEATURES,) = blocks("python", section("On the robot"))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    return build_wheel(tmp_path_factory.mktemp("wheel"))


def type_in(folder: Path, commands: str, *, first_on_path: Path) -> str:
    """Run the lines of a block in a shell that stops at the first failure; return what they print."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL"))}
    environment["PATH"] = f"{first_on_path}{os.pathsep}{environment['PATH']}"
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", commands],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_robot_with_a_cpu_runs_the_block_in_a_bare_environment(wheel, old_python, bundle, tmp_path):
    shutil.copy(wheel, tmp_path)
    assert wheel.name in WHEEL
    pack_bundle(bundle, tmp_path / "robot.bundle")
    (tmp_path / "features.py").write_text(FEATURES, encoding="utf-8")
    (tmp_path / "path").mkdir()
    (tmp_path / "path" / "python3").symlink_to(old_python)
    printed = type_in(tmp_path, CPU, first_on_path=tmp_path / "path")
    stages = Bundle.open(bundle).manifest.backbone.out_features
    assert [line.partition(" ")[0] for line in printed.splitlines()[-len(stages) :]] == list(
        stages
    )  # behind pip's lines
    installed = {path.name.partition("-")[0] for path in (tmp_path / "edge").rglob("*.dist-info")}
    assert {name for name in installed if "torch" in name or name in ("timm", "transformers", "onnx", "typer")} == set()


def closure(distribution: str, extras: set[str]) -> set[str]:
    """Return the names of every distribution that pip would install with these extras, without the package itself."""
    found: set[tuple[str, str]] = set()
    todo = [(distribution, extra) for extra in ("", *extras)]
    while todo:
        name, extra = todo.pop()
        if (name, extra) in found:
            continue
        found.add((name, extra))
        for text in importlib.metadata.requires(name) or ():
            asked = Requirement(text)
            if asked.marker is None or asked.marker.evaluate({"extra": extra}):
                todo += [(canonicalize_name(asked.name), more) for more in ("", *asked.extras)]
    return {name for name, _ in found} - {distribution}


def link_packages(names: set[str], target: Path) -> None:
    """Link what the distributions hold into ``target``, so that nothing else of this environment can be imported there."""
    held = {name: importlib.metadata.distribution(name) for name in names}
    tops = {
        name: {file.parts[0] for file in found.files or () if file.parts[0] not in ("..", "__pycache__")}
        for name, found in held.items()
    }
    shared = {top for top, count in Counter(top for parts in tops.values() for top in parts).items() if count > 1}
    for name, found in held.items():
        for top in tops[name] - shared:
            (target / top).symlink_to(Path(str(found.locate_file(top))))
        for file in found.files or ():
            if file.parts[0] in shared and ".." not in file.parts:  # a folder of several distributions
                place = target / Path(*file.parts[:2])
                place.parent.mkdir(exist_ok=True)
                if not place.is_symlink():
                    place.symlink_to(Path(str(found.locate_file(Path(*file.parts[:2])))))


def test_a_workstation_runs_the_block_with_the_extras_that_it_installs(wheel, tmp_path):
    make, install, *commands = WORKSTATION.strip().splitlines()
    assert make == "python3 -m venv .venv && . .venv/bin/activate"
    extras = re.fullmatch(r"pip install '\.\[(.*)\]'", install)
    assert extras is not None
    environment = tmp_path / ".venv"
    subprocess.run([shutil.which("python3") or "python3", "-m", "venv", environment], check=True)
    (packages,) = environment.glob("lib/python*/site-packages")
    link_packages(closure("edge-backbones", set(extras[1].split(","))) - {"pip", "setuptools"}, packages)
    pip = [environment / "bin" / "python", "-m", "pip", "install", "--quiet", "--no-deps", wheel]
    subprocess.run(pip, check=True, cwd=tmp_path, env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"})
    assert not (packages / "skimage").exists()  # of the extra demo, which this environment has not

    write_crops(tmp_path / "photographs", 12)
    photographs()["coffee"].save(tmp_path / "photo.jpg")
    make_video(tmp_path / "clip.mp4")
    (build,) = [number for number, line in enumerate(commands) if line.startswith("edge-backbones build resnet50 ")]
    # A small network in its place, and no weights of a hub.
    commands[build] = commands[build].replace("build resnet50", "build test_resnet --weights random:0")
    graphs = GRAPHS.strip().splitlines()[0]
    printed = type_in(tmp_path, "\n".join([*commands, graphs]), first_on_path=environment / "bin")
    assert "layer4" in printed
    for made in (
        "resnet50.bundle.report.html",
        "features/photo.npz",
        "features/photo.png",
        "maps.mp4",
        "robot.bundle/graphs",
    ):
        assert (tmp_path / made).exists()


def test_the_jetson_block_compiles_what_was_packed_with_graphs():
    assert "pack resnet50.bundle robot.bundle --graphs" in GRAPHS
    assert "edge/bin/edge-backbones compile robot.bundle" in JETSON
    assert "--system-site-packages" in JETSON
    assert len(TEXT.split()) <= 1200
