"""The Python example of the README, run as it stands."""

from __future__ import annotations

import re
from pathlib import Path

from build_scripts.photographs import write_crops

README = Path(__file__).parents[2] / "README.md"


def test_the_python_example_runs_and_prints_what_it_says(tmp_path, monkeypatch, capsys):
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert len(code.strip().splitlines()) <= 11
    write_crops(tmp_path / "photographs", 12)
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})  # the point of the test
    assert capsys.readouterr().out.splitlines() == [
        "layer1 (2, 64, 56, 56)",
        "layer2 (2, 128, 28, 28)",
        "layer3 (2, 256, 14, 14)",
        "layer4 (2, 512, 7, 7)",
    ]
