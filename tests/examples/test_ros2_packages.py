"""The packages for ROS 2: files that colcon, ros2 launch and ros2 run read. colcon itself is not here."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
import types
import xml.etree.ElementTree
from pathlib import Path
from typing import Any

import pytest
import setuptools
import yaml

from edge_backbones.integrations.ros2 import options

ROS2 = Path(__file__).parents[2] / "examples" / "ros2"
NODE = ROS2 / "edge_backbones_ros"
MESSAGES = ROS2 / "edge_backbones_msgs"


def manifest(package: Path) -> xml.etree.ElementTree.Element:
    return xml.etree.ElementTree.parse(package / "package.xml").getroot()


def test_the_packages_declare_themselves():
    kinds = {NODE: "ament_python", MESSAGES: "ament_cmake"}
    for package, kind in kinds.items():
        root = manifest(package)
        assert root.findtext("name") == package.name
        assert root.findtext("export/build_type") == kind
        assert root.findtext("license") == "Apache-2.0"


def test_every_message_is_generated_and_uses_known_types():
    cmake = (MESSAGES / "CMakeLists.txt").read_text()
    names = sorted(path.name for path in (MESSAGES / "msg").iterdir())
    assert names == ["FeatureMap.msg", "FeatureMaps.msg"]
    known = {"string", "uint8", "uint32", "uint64", "std_msgs/Header", "FeatureMap"}
    for name in names:
        assert f'"msg/{name}"' in cmake
        for line in (MESSAGES / "msg" / name).read_text().splitlines():
            if words := line.partition("#")[0].split():
                kind, field = words
                assert kind.removesuffix("[]") in known
                assert field.isidentifier()
    assert "std_msgs" in [one.text for one in manifest(MESSAGES).findall("depend")]


def test_the_file_of_parameters_has_every_one_with_its_default():
    text = (NODE / "config" / "backbone.yaml").read_text()
    found = yaml.safe_load(text)["/**"]["ros__parameters"]
    assert found == {**options.DEFAULTS, "autostart": True}
    options.Options.of(found)


def test_the_package_installs_what_ros_looks_for(monkeypatch):
    given: dict[str, Any] = {}
    monkeypatch.setattr(setuptools, "setup", lambda **arguments: given.update(arguments))
    monkeypatch.chdir(NODE)
    runpy.run_path("setup.py")
    assert given["packages"] == ["edge_backbones_ros"]
    for folder, files in given["data_files"]:
        assert files, folder
        assert all((NODE / file).is_file() for file in files)
    assert given["version"] == manifest(NODE).findtext("version")
    assert "entry_points" not in given  # setuptools would write the path of colcon's Python
    assert "scripts" not in given
    assert dict(given["data_files"])["lib/edge_backbones_ros"] == ["scripts/backbone"]


def start(executable: Path, *folders: Path, **environment: str) -> subprocess.CompletedProcess:
    path = os.pathsep.join(map(str, folders))
    variables = {**os.environ, "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1", **environment}
    return subprocess.run([executable], env=variables, capture_output=True, text=True)


def test_the_executable_runs_with_the_python_that_is_active(tmp_path):
    program = tmp_path / "edge_backbones" / "integrations" / "ros2" / "program.py"
    program.parent.mkdir(parents=True)
    program.write_text("import sys\ndef run():\n    print(sys.prefix)\n    return 7\n")
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    done = start(NODE / "scripts" / "backbone", NODE, tmp_path, PATH=path)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (7, sys.prefix, "")


def test_without_edge_backbones_one_line_says_so(tmp_path):
    (tmp_path / "python3").write_text(f'#!/bin/sh\nexec {sys.base_prefix}/bin/python3 -S "$@"\n')
    (tmp_path / "python3").chmod(0o755)
    path = os.pathsep.join((str(tmp_path), os.environ["PATH"]))
    done = start(NODE / "scripts" / "backbone", NODE, PATH=path)
    (line,) = done.stderr.splitlines()
    assert line.startswith("edge_backbones is not installed for ")
    assert "activate the environment that has it" in line
    assert done.returncode == 1


class Recorded:
    """Stands in for a class of launch: remembers its arguments."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        self.arguments, self.named = arguments, named


@pytest.fixture
def launch(monkeypatch) -> None:
    modules = {
        "ament_index_python": {},
        "ament_index_python.packages": {"get_package_share_directory": lambda name: f"/share/{name}"},
        "launch": {"LaunchDescription": list},
        "launch.actions": {"DeclareLaunchArgument": Recorded},
        "launch.substitutions": {"LaunchConfiguration": str},
        "launch_ros": {},
        "launch_ros.actions": {"LifecycleNode": Recorded},
        "launch_ros.parameter_descriptions": {"ParameterValue": lambda value, value_type: value},
    }
    for name, contents in modules.items():
        module = types.ModuleType(name)
        vars(module).update(contents)
        monkeypatch.setitem(sys.modules, name, module)


def test_the_launch_file_starts_the_node_with_its_parameters(launch):
    *arguments, node = runpy.run_path(str(NODE / "launch" / "backbone.launch.py"))["generate_launch_description"]()
    declared = {one.arguments[0]: one.named.get("default_value") for one in arguments}
    assert declared == {
        "bundle": None,
        "image": "image",
        "namespace": "",
        "parameters": "/share/edge_backbones_ros/config/backbone.yaml",
    }
    assert (node.named["package"], node.named["executable"]) == ("edge_backbones_ros", "backbone")
    default = declared["parameters"]
    assert node.named["parameters"] == [default, "parameters", {"bundle": "bundle"}]  # a file may hold a few of them
    assert node.named["remappings"] == [("image", "image"), ("image/compressed", ["image", "/compressed"])]
