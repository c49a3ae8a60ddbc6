"""The Tab key: the protocol of bash, as its script speaks it, in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from edge_backbones.testing import make_bundle, pooling_input


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("completion") / "pool.bundle", pooling_input(1)).path


# Prints what a completion imported of what is slow, behind what it offers.
CODE = """
import atexit, sys
from edge_backbones.cli.main import main
heavy = {"torch", "timm", "transformers", "onnx", "onnxruntime", "openvino", "tensorrt", "matplotlib"}
atexit.register(lambda: print("IMPORTED", *sorted(heavy & sys.modules.keys())))
main()
"""


def offered(typed: str) -> list[str]:
    """What is offered for the last word of a line, which is empty behind a space."""
    words = typed.split(" ")
    environment = {
        **os.environ, "COMP_WORDS": typed, "COMP_CWORD": str(len(words) - 1), "_EDGE_BACKBONES_COMPLETE": "complete_bash",
    }  # fmt: skip
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, env=environment)
    assert done.stderr == ""
    *lines, imported = done.stdout.splitlines()
    assert imported == "IMPORTED"
    return [line for line in lines if line]  # bash is sent an empty line where nothing is offered


def test_commands_and_options():
    assert offered("edge-backbones ver") == ["verify"]
    assert set(offered("edge-backbones ")) >= {"build", "compile", "run", "doctor"}
    assert offered("edge-backbones build a b --im") == ["--images", "--image-processor"]
    assert "--quiet" in offered("edge-backbones run --q")


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("build m b --precision ", ["auto", "fp32", "fp16", "bf16", "int8", "fp8"]),
        ("build m b -p f", ["fp32", "fp16", "fp8"]),
        ("build m b --flavour torchs", ["torchscript"]),
        ("build m b --input ", ["pixel_values", "image", "frame"]),
        ("build m b --profile jetson-t", ["jetson-thor"]),
        ("build resnet10", ["resnet101", "resnet101_clip", "resnet101_clip_gap", "resnet101c", "resnet101d", "resnet101s",
                            "resnet10t"]),
        ("compile b -f tensorrt_r", ["tensorrt_rtx"]),
        ("compile b --precision int", ["int8"]),
        ("compile b --profile a1", ["a100", "a10"]),
        ("run b i -d ", ["auto", "cpu", "cuda"]),
        ("profiles t", ["t4"]),
        ("run nothing.bundle i --engine ", []),
    ],
)  # fmt: skip
def test_values(typed, expected):
    assert offered(f"edge-backbones {typed}") == expected


def test_engines_of_the_bundle_that_was_typed(bundle):
    [fp32, flavour, name] = offered(f"edge-backbones run {bundle} photo.jpg --engine ")
    assert (fp32, flavour) == ("fp32", "openvino")
    assert name.startswith("openvino-")
    assert offered(f"edge-backbones verify {bundle} -e openvino-") == [name]
    assert offered(f"edge-backbones remove {bundle} ") == [name]


def test_the_script_for_the_shell_can_be_shown():
    environment = {**os.environ, "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    command = [sys.executable, "-m", "edge_backbones.cli.main", "--show-completion", "bash"]
    script = subprocess.run(command, capture_output=True, text=True, env=environment).stdout
    assert "_EDGE_BACKBONES_COMPLETE=complete_bash" in script
    assert subprocess.run(["bash", "-n"], input=script, text=True).returncode == 0
