"""What a device imports: proven in fresh interpreters where the workstation's libraries cannot be imported at all."""

from __future__ import annotations

import ast
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import edge_backbones
from edge_backbones import errors
from edge_backbones.installation import pip_install

WORKSTATION = ("torch", "timm", "transformers", "onnx", "onnx_ir", "onnxscript", "onnxruntime")
EXTRAS = (
    *WORKSTATION,
    "openvino",
    "PIL",
    "matplotlib",
    "jinja2",
    "pynvml",
    "typer",
    "rich",
    "tensorrt_rtx",
    "tensorrt_rtx_bindings",
    "cuda",
    "av",
    "cv2",
    "zarr",
)
OF_THE_WORKSTATION = ("auto", "cli", "integrations", "pictures", "toolchain")
ON_DEVICE = [
    "edge_backbones",
    *(
        module.name
        for module in pkgutil.walk_packages(edge_backbones.__path__, "edge_backbones.")
        if module.name.split(".")[1] not in (*OF_THE_WORKSTATION, "__main__")
    ),
    "edge_backbones.pictures",
    *(
        f"edge_backbones.integrations.ros2.{name}"
        for name in ("frames", "maps", "figures", "interrupts", "options", "pipeline", "program")
    ),
    "edge_backbones.integrations.triton_serving",
    "edge_backbones.toolchain.artifacts",
    "edge_backbones.toolchain.build",
]


def run_without(poisoned: tuple[str, ...], code: str) -> subprocess.CompletedProcess:
    prelude = f"import sys; sys.modules.update(dict.fromkeys({poisoned!r}))\n"
    return subprocess.run([sys.executable, "-W", "error", "-c", prelude + code], capture_output=True, text=True)


@pytest.mark.parametrize("module", ON_DEVICE)
def test_device_modules_import_without_the_workstation_libraries(module):
    done = run_without(WORKSTATION, f"import {module}")
    assert done.returncode == 0, done.stderr


def test_a_library_that_does_not_load_is_told_with_the_way_out():
    """numpy of another processor, in an environment that was copied."""
    done = run_without(("numpy",), "from edge_backbones import EdgeBackbone")
    *_, last = done.stderr.strip().splitlines()
    assert last.startswith("edge_backbones.errors.BrokenLibraryError: an installed library is not for this machine")
    assert "python3 -m venv ENV" in last
    other = run_without(("edge_backbones.bundle.reader",), "from edge_backbones import EdgeBackbone")
    assert "BrokenLibraryError" not in other.stderr
    assert "edge_backbones.bundle.reader" in other.stderr


@pytest.mark.parametrize("module", ON_DEVICE)
def test_device_modules_import_without_any_extra(module):
    done = run_without(EXTRAS, f"import {module}")
    assert done.returncode == 0, done.stderr


def test_importing_the_package_loads_nothing_heavy():
    code = "import edge_backbones; heavy = {'numpy', 'msgspec', 'openvino'} & set(sys.modules); assert not heavy, heavy"
    done = run_without((), code)
    assert done.returncode == 0, done.stderr


def test_a_missing_engine_library_is_named_with_its_install_command(tmp_path):
    code = (
        "from edge_backbones.engines.openvino.session import load_library\n"
        "from edge_backbones import EdgeBackbonesError\n"
        "try:\n    load_library()\nexcept EdgeBackbonesError as error:\n    print(error)"
    )
    done = run_without(("openvino",), code)
    assert pip_install("cpu") in done.stdout, done.stderr


@pytest.mark.parametrize("missing", ["rclpy", "sensor_msgs"])
def test_the_node_of_ros_says_how_to_get_ros(missing):
    done = run_without((missing,), "import edge_backbones.integrations.ros2.node")
    *_, last = done.stderr.strip().splitlines()
    assert last.startswith("edge_backbones.errors.MissingDependencyError: the ROS 2 node (")
    assert "source /opt/ros/DISTRIBUTION/setup.bash" in last
    assert "pip install ros-rclpy " in last


def test_the_program_of_ros_says_it_in_one_line():
    code = "import runpy\nrunpy.run_module('edge_backbones.integrations.ros2', run_name='__main__')"
    done = run_without(("rclpy",), code)
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("the ROS 2 node (rclpy")
    assert done.returncode == 1


def test_a_missing_command_line_library_is_named_with_its_install_command():
    done = run_without(("typer",), "import edge_backbones.cli.main")
    assert done.returncode == 1
    assert pip_install("cli") in done.stderr


def test_public_names_are_reachable_and_listed_on_a_device():
    """numpy and msgspec are enough to import any of them."""
    code = (
        "import edge_backbones\n"
        "from edge_backbones import *\n"
        "assert {name for name in edge_backbones.__all__ if globals().get(name) is None} == set()\n"
        "assert sorted(edge_backbones.__all__) == dir(edge_backbones)\n"
    )
    done = run_without(EXTRAS, code)
    assert done.returncode == 0, done.stderr
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        edge_backbones.nothing  # noqa: B018


def test_type_checkers_see_the_public_names_where_they_are_imported_from():
    tree = ast.parse(Path(edge_backbones.__file__).read_text(encoding="utf-8"))
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    seen = {alias.asname: node.module for node in block.body for alias in node.names}
    assert seen == edge_backbones._HOMES


def test_every_error_is_public():
    kinds = {name for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, Exception)}
    assert kinds <= set(edge_backbones.__all__)
