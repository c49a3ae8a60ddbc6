"""The photographs that packages carry: which there are, and what is said where there are none."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from build_scripts import photographs as module
from edge_backbones.errors import MissingDependencyError, SourceError


def foolbox_at(monkeypatch: pytest.MonkeyPatch, folder: Path | None) -> None:
    """Let foolbox be found in ``folder``, or not at all."""
    spec = None
    if folder is not None:
        spec = ModuleSpec("foolbox", None, is_package=True)
        spec.submodule_search_locations = [str(folder)]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)


def test_photographs_of_things_are_colour_and_more_than_those_of_crops() -> None:
    things = module.photographs_of_things()
    assert set(things) - set(module.photographs()) == {"camera", "clock_motion"}
    assert all(image.mode == "RGB" and min(image.size) >= 224 for image in things.values())


def test_crops_do_not_change(tmp_path: Path) -> None:
    first, second = (module.write_crops(tmp_path / name, 9) for name in ("first", "second"))
    assert [path.name for path in first] == [path.name for path in second]
    assert {path.stem.partition("_")[2] for path in first} == set(module.photographs())
    for one, other in zip(first, second, strict=True):
        assert np.array_equal(np.asarray(Image.open(one)), np.asarray(Image.open(other)))


def test_imagenet_photographs_have_the_labels_of_their_names() -> None:
    found = module.imagenet_photographs()
    assert list(found) == [f"imagenet_{number:02d}" for number in range(20)]
    assert all(one.image.mode == "RGB" and 0 <= one.label < 1000 for one in found.values())
    assert (found["imagenet_04"].label, found["imagenet_19"].label) == (949, 305)  # strawberry, dung beetle


def test_foolbox_itself_is_not_imported() -> None:
    code = (
        "import sys; from build_scripts.photographs import imagenet_photographs; "
        "assert len(imagenet_photographs()) == 20; assert 'foolbox' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(module.__file__).parents[1])


def test_foolbox_that_is_not_installed_is_named_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    foolbox_at(monkeypatch, None)
    with pytest.raises(MissingDependencyError, match=r"-m pip install foolbox$"):
        module.imagenet_photographs()


def test_foolbox_without_photographs_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    foolbox_at(monkeypatch, tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "imagenet_of_something.jpg").touch()
    with pytest.raises(SourceError, match=r"holds no file data/imagenet_NUMBER_LABEL\.jpg: .*--force-reinstall"):
        module.imagenet_photographs()
