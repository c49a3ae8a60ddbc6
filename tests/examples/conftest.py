"""What the programs in ``examples/`` read, made once for the whole run: a folder with ``samples/`` and two bundles in it."""

from __future__ import annotations

import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.photographs import quick_timing

__all__ = ["quick_timing"]

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which commands are typed: treat ``samples/`` in it as read-only."""
    from build_scripts.lite0 import NETWORK
    from build_scripts.samples import write_samples
    from edge_backbones import BuildOptions, build_bundle

    folder = tmp_path_factory.mktemp("examples")
    samples = folder / "samples"
    write_samples(samples)
    fp32 = {"precisions": "fp32", "torchscript": False, "golden": 2, "cache": None}
    trained = BuildOptions(weights=str(samples / "lite0.safetensors"), out_indices=(1, 2, 3, 4), **fp32)
    build_bundle(NETWORK, samples / "features.bundle", images=samples / "photographs", options=trained)
    detector = BuildOptions(from_model=True, height=480, width=640, **fp32)
    build_bundle(samples / "detr", samples / "detr.bundle", images=samples / "photographs", options=detector)
    return folder


def command_of(program: str) -> list[str]:
    """Return the words of the command in the docstring of a program that runs it."""
    text = (ROOT / "examples" / f"{program}.py").read_text(encoding="utf-8")
    (line,) = [line for line in text.splitlines() if line.startswith(f"    python examples/{program}.py ")]
    return shlex.split(line)


@pytest.fixture
def typed(place: Path) -> Callable[..., list[str]]:
    """Run a program with the command in its docstring, and return the lines that it prints.

    ``instead``: words of the command that are replaced. ``more``: words that are added.
    """

    def run(program: str, *more: object, instead: dict[str, str] | None = None) -> list[str]:
        python, path, *words = [(instead or {}).get(word, word) for word in command_of(program)]
        assert (python, path) == ("python", f"examples/{program}.py")
        command = [sys.executable, ROOT / path, *words, *map(str, more)]
        done = subprocess.run(command, cwd=place, capture_output=True, text=True, encoding="utf-8", check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    return run
