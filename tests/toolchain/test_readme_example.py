"""The Python examples of the README, run as they stand: one builds a bundle, the other runs it."""

from __future__ import annotations

import re
from pathlib import Path

from build_scripts.photographs import write_crops
from edge_backbones.deploy.pack import pack_bundle

README = Path(__file__).parents[2] / "README.md"


def test_the_python_examples_run_and_print_what_they_say(tmp_path, monkeypatch, capsys):
    build, features = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert len(build.strip().splitlines() + features.strip().splitlines()) <= 14
    write_crops(tmp_path / "photographs", 12)
    monkeypatch.chdir(tmp_path)
    exec(compile(build, "README.md", "exec"), {})  # the point of the test
    pack_bundle("resnet18.bundle", "robot.bundle")
    capsys.readouterr()
    exec(compile(features, "README.md", "exec"), {})
    assert capsys.readouterr().out.splitlines() == [
        "layer1 (1, 64, 56, 56)",
        "layer2 (1, 128, 28, 28)",
        "layer3 (1, 256, 14, 14)",
        "layer4 (1, 512, 7, 7)",
    ]
