"""The file of a build matrix, and what decides whether a task of it is made again."""

from __future__ import annotations

from pathlib import Path

import pytest

from build_scripts import matrix_tasks
from build_scripts.matrix_tasks import read_matrix, tasks_of
from edge_backbones.errors import InputError
from edge_backbones.machine.profiles import load_profile
from tests.build_scripts.matrices import ALL, Pretender, carry_out, profile_file, write


def test_a_folder_may_move(folder):
    path = write(folder, device='\n[[devices]]\nprofile = "cards/mine.toml"\n')
    profile_file(folder / "cards" / "mine.toml")
    (folder / "weights.pt").write_bytes(b"weights")
    path.write_text(path.read_text().replace('"random:0"', '"weights.pt"'))
    carry_out(path, first := Pretender())
    assert len(first.asked) == 9
    moved = folder.with_name(f"{folder.name}-moved")
    folder.rename(moved)
    moved_path = moved / path.name
    carry_out(moved_path, second := Pretender())
    assert second.asked == []
    (moved / "weights.pt").write_bytes(b"trained")
    carry_out(moved_path, third := Pretender())
    assert set(third.asked) == set(first.asked)


def test_an_edited_profile_makes_its_engines_again(folder):
    """And a comment in it does not: what it says counts."""
    path = write(folder, device='\n[[devices]]\nprofile = "cards/mine.toml"\n')
    text = profile_file(folder / "cards" / "mine.toml")
    carry_out(path, Pretender())
    (folder / "cards" / "mine.toml").write_text(text + "\n# it is blue\n")
    carry_out(path, same := Pretender())
    assert same.asked == []
    (folder / "cards" / "mine.toml").write_text(
        text.replace("workspace_bytes = 1_073_741_824", "workspace_bytes = 4096")
    )
    carry_out(path, edited := Pretender())
    assert set(edited.asked) == {name.replace("rtx-40", "mine") for name in ALL if "rtx-40" in name}


def test_another_library_makes_again_what_it_made(folder, monkeypatch):
    path = write(folder)
    carry_out(path, Pretender())
    monkeypatch.setattr(matrix_tasks.registry, "InstalledVersions", lambda: {"tensorrt_rtx": "99.1"})
    carry_out(path, engines := Pretender())
    assert set(engines.asked) == {name for name in ALL if "rtx-40" in name}
    monkeypatch.setattr(matrix_tasks, "_versions", lambda: {"onnxruntime": "99.1"})
    carry_out(path, everything := Pretender())
    assert set(everything.asked) == ALL


def test_what_decides_the_ranges_is_among_the_versions():
    assert {"onnxruntime", "numpy", "torch"} <= set(matrix_tasks._versions())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("out = 3", r"matrix.toml is not a build matrix: .*out"),
        ('out = "x"\nmodels = []\ndevices = []', "there are no models"),
        ('out = "x"\ncolour = 1\nmodels = []\ndevices = []', "unknown field `colour`"),
        (
            'out = "x"\ndevices = [{profile = "cpu"}]\nmodels = [{source = "a"}, {source = "a"}]',
            "two models are named a",
        ),
        (
            'out = "x"\ndevices = [{profile = "cpu"}]\nmodels = [{source = "a", options = {hight = 3}}]',
            "'hight'.* there are",
        ),
        (
            'out = "x"\ndevices = [{profile = "cpu"}]\nmodels = [{source = "a", name = "../b"}]',
            "cannot be part of a file name",
        ),
    ],
)
def test_a_matrix_that_is_none_is_refused(tmp_path, text, message):
    path = tmp_path / "matrix.toml"
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        read_matrix(path)
    with pytest.raises(InputError, match="cannot be read"):
        read_matrix(tmp_path / "nothing.toml")


def test_paths_are_relative_to_the_matrix(folder, monkeypatch):
    """Wherever it is called from; a profile among the options too."""
    path = write(folder, more=', profile = "cards/mine.toml"', device='\n[[devices]]\nprofile = "cards/mine.toml"\n')
    profile_file(folder / "cards" / "mine.toml")
    monkeypatch.chdir(folder.parent)
    *_, (build, engines) = tasks_of(read_matrix(path), Path(folder.name))
    assert build.options["profile"] == engines[-1].profile == str(folder / "cards" / "mine.toml")
    assert build.images == str(folder / "photographs")
    assert load_profile(engines[-1].profile).name == "mine"
