"""Refusals that need no library: none is imported for them, and nothing is written. The exit code follows the one rule."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from edge_backbones.errors import SourceError
from edge_backbones.toolchain.sources import names

ROOT = Path(__file__).parents[3]
HEAVY = {"torch", "timm", "transformers", "onnx", "onnxruntime", "openvino", "huggingface_hub", "matplotlib", "PIL"}
# Prints the heavy libraries that the command imported, behind what it says.
CODE = f"""
import atexit, sys
from edge_backbones.cli.main import main
atexit.register(lambda: print("IMPORTED", *sorted({HEAVY} & sys.modules.keys()), file=sys.stderr))
main()
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with photographs, an empty folder, a file, a folder that is no model, and a target that exists."""
    place = tmp_path_factory.mktemp("refusals")
    for folder in ("photos", "empty", "texts", "model", "there.bundle"):
        (place / folder).mkdir()
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(place / "photos" / "a.png")
    (place / "texts" / "a.txt").touch()
    (place / "file").touch()
    (place / "net.onnx").touch()
    return place


def refused(place: Path, *arguments: str) -> tuple[int, str]:
    """The exit code and the last line of a command that imports nothing heavy."""
    command = [sys.executable, "-c", CODE, *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=place, env=environment, stdin=subprocess.DEVNULL)
    *_, line, imported = done.stderr.strip().splitlines()
    assert imported == "IMPORTED", done.stderr
    assert done.stdout == ""
    return done.returncode, line


BUILD = ("build", "resnet18", "x.bundle", "--images", "photos")


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("build", "resnet18", "x.bundle"), 1, "int8 needs calibration images"),
        (("build", "resnet18", "x.bundle", "-i", "nowhere"), 1, "nowhere does not exist"),
        (("build", "resnet18", "x.bundle", "-i", "empty"), 1, "empty has no images: it is empty"),
        (("build", "resnet18", "x.bundle", "-i", "texts"), 1, "texts has no images: of its files, 1 with .txt"),
        (("build", "resnet18", "x.bundle", "-i", "file"), 1, "file is not an .npz file"),
        (("build", "resnet18", "there.bundle", "-i", "photos"), 1, "there.bundle exists already"),
        (("build", "resnet18", "file/x.bundle", "-i", "photos"), 1, "x.bundle cannot be written: nothing can be made in"),
        (("build", "resnt18", "x.bundle", "-i", "photos"), 1, "no model 'resnt18'. Near names: resnet18,"),
        (("build", "timm/resnt18.a1_in1k", "x.bundle", "-i", "photos"), 1, "no model 'timm/resnt18.a1_in1k'"),
        (("build", "./nowhere", "x.bundle", "-i", "photos"), 1, "nowhere does not exist"),
        (("build", "./model", "x.bundle", "-i", "photos"), 1, "model has no config.json"),
        (("build", "net.onnx", "x.bundle", "-i", "photos"), 1, "net.onnx is a network without its source"),
        (("build", "a/net.pt", "x.bundle", "-i", "photos"), 1, "a/net.pt is a file of weights: name the network"),
        ((*BUILD, "--profile", "orin-nan"), 1, "did you mean jetson-orin-nano"),
        ((*BUILD, "--weights", "nothing.pth"), 1, "weights 'nothing.pth' are neither"),
        ((*BUILD, "--calibration", "nothing.json"), 1, "nothing.json does not exist"),
        ((*BUILD, "--image-processor", "nothing"), 1, "nothing does not exist"),
        ((*BUILD, "-w", "random:a"), 2, "random weights need a seed"),
        ((*BUILD, "--precison", "int8"), 2, "No such option: --precison"),
        ((*BUILD, "-p", "int3"), 2, "'int3' is not one of"),
        ((*BUILD, "-f", "nonsense"), 2, "'nonsense' is not one of"),
        ((*BUILD, "--percentile", "101"), 2, "percentile in (0, 100]"),
        ((*BUILD, "--program", "exported_program"), 2, "is of flavour torch_tensorrt"),
        ((*BUILD, "--golden", "0"), 2, "--golden"),
        (("build", "resnet18"), 2, "Missing argument"),
        (("biuld",), 2, "Did you mean 'build'?"),
        (("compile", "nothing.bundle"), 1, "there is no such folder"),
        (("compile", "file"), 1, "it is a file, and a bundle is a folder"),
        (("compile", "x", "-f", "nonsense"), 2, "'nonsense' is not one of"),
        (("compile", "x", "-p", "int3"), 2, "'int3' is not one of"),
        (("verify", "nothing.bundle"), 1, "there is no such folder"),
        (("verify", "x", "--sigstore-issuer", "y"), 1, "there is no such folder"),
        (("run", "nothing.bundle", "photos"), 1, "there is no such folder"),
        (("run", "x", "photos", "-o", "file"), 1, "file is a file: --out takes a folder"),
        (("bench", "nothing.bundle", "-o", "photos"), 1, "photos is a folder: --out takes a file"),
        (("bench", "x", "-o", "file/a.json"), 1, "file/a.json cannot be written (nothing can be made in"),
        (("bench", "x", "--against", "nothing.json"), 1, "nothing.json cannot be read: it does not exist"),
        (("bench", "x", "--vs", "tourch"), 2, "--vs takes torch,"),
        (("report", "x", "--bench", "photos"), 1, "photos cannot be read"),
        (("report", "nothing.bundle"), 1, "there is no such folder"),
        (("inspect", "nothing.bundle"), 1, "there is no such folder"),
        (("profiles", "t5"), 1, "no device profile 't5'"),
        (("-q", "inspect", "x", "-v"), 2, "exclude each other"),
    ],
)  # fmt: skip
def test_a_refusal_imports_nothing_and_has_its_exit_code(place, arguments, code, said):
    before = sorted(place.rglob("*"))
    returned, line = refused(place, *arguments)
    assert said in line
    assert "Errno" not in line
    assert returned == code
    assert sorted(place.rglob("*")) == before


@pytest.mark.parametrize(
    "source",
    ["resnet18", "resnet50.a1_in1k", "timm/resnet18", "someone/anything", "hf-hub:timm/resnet18", "tv_resnet50"],
)
def test_what_a_loader_may_take_is_left_to_it(source):
    names.refuse(source)


def test_names_of_other_packages_are_left_to_them(monkeypatch):
    monkeypatch.delitem(sys.modules, "timm", raising=False)  # a program that imported it may have registered its own
    with pytest.raises(SourceError):
        names.refuse("my_own_net")
    monkeypatch.setattr(names.importlib.metadata, "entry_points", lambda group: ["theirs"])
    names.refuse("my_own_net")
    with pytest.raises(SourceError, match="is a network without its source"):
        names.refuse("my_own_net.onnx")


def test_a_folder_that_save_pretrained_wrote_is_taken_whatever_its_name(tmp_path):
    folder = tmp_path / "net.pt"
    folder.mkdir()
    (folder / "config.json").touch()
    names.refuse(str(folder))
